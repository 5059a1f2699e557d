"""The planning report's figures of memory, time and size. Each takes plain results and returns a `Picture`.

A title states the answer, an axis its unit; a part is labelled where it stands rather than in a legend. The figures of
expert load are in `load_figures`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from moesim.metrics.step import COMM_PARTS, MEMORY_PARTS, STEP_PARTS, StepResult
from moesim.report.style import (
    COLOURS,
    MEMORY_WORDS,
    WORDS,
    Picture,
    behind,
    finish,
    headline,
    house_style,
    light_grid,
    new_figure,
    spread,
)
from moesim.units import GIB, GIGA, format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from moesim.describe.counts import Description
    from moesim.study.links import BreakEven
    from moesim.study.sizes import EpPoint
    from moesim.study.twins import Twins

TWIN_NAMES = {
    "moe": "this MoE",
    "dense_active": "dense, as large as\nits active part",
    "dense_total": "dense, as large as\nall of it",
}
_WAITING = ("wait_for_slowest", "pipeline_bubble")


def capacity_bytes(result: StepResult) -> float:
    """What a GPU can hold [bytes], as the result compared it."""
    return result.memory["peak_bytes"] + result.headroom_bytes


def memory_over_ep(points: Sequence[EpPoint], *, capacity: float, asked_ep: int) -> Picture:
    """Memory of the fullest GPU by part, stacked, for each expert-parallel size, against what a GPU holds [bytes]."""
    fitting = [point.ep for point in points if point.fits]
    if not fitting:
        title = "No expert-parallel size makes this fit into a GPU's memory"
    elif len(fitting) == len(points):
        title = f"Memory fits at every expert-parallel size from {points[0].ep} to {points[-1].ep}"
    else:
        title = "Memory fits with " + _listed([str(ep) for ep in fitting]) + " GPUs sharing the experts"
    bars = [point.memory for point in points]
    labels = [f"{point.ep}\n(asked)" if point.ep == asked_ep else str(point.ep) for point in points]
    return _memory_bars(
        title,
        bars,
        labels,
        "Expert-parallel size: GPUs that share one set of experts",
        capacity,
        [p.fits for p in points],
    )


def memory_by_stage(result: StepResult) -> Picture:
    """Memory of each pipeline stage's fullest GPU by part, stacked, against what a GPU holds."""
    stages = result.memory_by_rank
    capacity = capacity_bytes(result)
    peaks = [stage["peak_bytes"] for stage in stages]
    fullest = max(range(len(peaks)), key=lambda i: peaks[i])
    if len(stages) == 1:
        title = f"The fullest GPU needs {format_bytes(peaks[0])} of {format_bytes(capacity)}"
    else:
        needed = f"{format_bytes(peaks[fullest])} of {format_bytes(capacity)}"
        title = f"Pipeline stage {stages[fullest]['stage']} is the fullest: {needed}"
    labels = [str(stage["stage"]) for stage in stages]
    fits = [peak <= capacity for peak in peaks]
    return _memory_bars(title, stages, labels, "Pipeline stage (0 holds the first layers)", capacity, fits)


def _memory_bars(
    title: str,
    bars: Sequence[Mapping[str, float]],
    labels: Sequence[str],
    x_label: str,
    capacity: float,
    fits: Sequence[bool],
) -> Picture:
    with house_style():
        figure = new_figure(9.0, 4.4)
        axes = figure.subplots()
        headline(figure, title)
        base = [0.0] * len(bars)
        middles: dict[str, float] = {}
        for part in MEMORY_PARTS:
            heights = [bar[part] / GIB for bar in bars]
            if max(heights) <= 0:
                continue
            axes.bar(
                range(len(bars)),
                heights,
                bottom=base,
                color=_memory_colour(part),
                width=0.72,
                edgecolor="white",
                linewidth=0.6,
            )
            middles[part] = base[-1] + heights[-1] / 2
            base = [low + height for low, height in zip(base, heights, strict=True)]
        top = max(*base, capacity / GIB) * 1.1
        crowded = len(bars) > 12
        for i, (height, fit) in enumerate(zip(base, fits, strict=True)):
            text = f"{height:.0f}" if crowded else f"{height:.0f} GiB"
            axes.text(
                i,
                height + top * 0.012,
                text,
                ha="center",
                va="bottom",
                fontsize=8.5 if crowded else 9.5,
                fontweight="normal" if fit else "bold",
                color=COLOURS["ink"] if fit else COLOURS["alert"],
                bbox=behind(),
                zorder=5,
            )
        axes.axhline(capacity / GIB, color=COLOURS["alert"], linewidth=1.6, linestyle=(0, (5, 3)))
        axes.set(xlim=(-0.6, len(bars) - 0.4), ylim=(0, top), xlabel=x_label, ylabel="Memory of the fullest GPU [GiB]")
        axes.set_xticks(range(len(bars)), list(labels))
        light_grid(axes, "y")
        _right_labels(axes, middles, capacity / GIB, top)
    alt = "; ".join(f"{label.split()[0]}: {height:.0f} GiB" for label, height in zip(labels, base, strict=True))
    return finish(figure, f"{title}. {x_label}: {alt}. A GPU holds {capacity / GIB:.0f} GiB.")


def _right_labels(axes: Axes, middles: Mapping[str, float], capacity_gib: float, top: float) -> None:
    """The parts' names to the right of the last bar, in their colours, apart from each other."""
    names = [*middles, "capacity"]
    wanted = [*middles.values(), capacity_gib]
    places = spread(wanted, top * 0.062, top * 0.03, top * 0.98)
    for name, place in zip(names, places, strict=True):
        is_capacity = name == "capacity"
        colour = COLOURS["alert"] if is_capacity else _memory_colour(name)
        words = f"a GPU holds {capacity_gib:.0f} GiB" if is_capacity else MEMORY_WORDS[name]
        axes.annotate(
            "■ " if not is_capacity else "- ",
            (1.012, place),
            xycoords=("axes fraction", "data"),
            color=colour,
            va="center",
            fontsize=10,
            annotation_clip=False,
        )
        axes.annotate(
            words,
            (1.036, place),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=9.5,
            color=colour if is_capacity else COLOURS["ink"],
            annotation_clip=False,
        )


def _memory_colour(part: str) -> str:
    return COLOURS[part.removesuffix("_bytes")]


def step_time(result: StepResult) -> Picture:
    """Where the mean GPU's time goes in one step [s]: every part, grouped; communication hatched; hidden one beside."""
    groups = {
        "computing": [p for p in STEP_PARTS if p not in COMM_PARTS and p not in _WAITING],
        "communicating": list(COMM_PARTS),
        "waiting": list(_WAITING),
    }
    seconds = result.step_parts_s
    rows: list[tuple[str, float, str]] = []
    for group, parts in groups.items():
        kept = sorted((p for p in parts if seconds[p] > 0), key=lambda p: -seconds[p])
        rows += [(part, seconds[part], group) for part in kept]
    if result.hidden_comm_s > 0:
        rows.append(("hidden", result.hidden_comm_s, "communicating behind compute (costs no time)"))
    title = f"One step takes {format_seconds(result.step_s)}; the largest part is {result.binds}"
    with house_style():
        figure = new_figure(9.0, 1.1 + 0.33 * (len(rows) + len({row[2] for row in rows})))
        axes = figure.subplots()
        headline(figure, title)
        widest = max(row[1] for row in rows)
        y, last = 0.0, ""
        ticks, names = [], []
        for part, part_s, group in rows:
            if group != last:
                total_s = sum(row[1] for row in rows if row[2] == group)
                share = f"{total_s / result.step_s:.0%} of the step" if part != "hidden" else ""
                axes.text(
                    0,
                    y,
                    f"{group}: {format_seconds(total_s)}" + (f", {share}" if share else ""),
                    va="center",
                    fontsize=10,
                    fontweight="bold",
                    color=COLOURS["quiet"],
                )
                y, last = y + 1, group
            hidden = part == "hidden"
            is_comm = part in COMM_PARTS or hidden
            axes.barh(
                y,
                part_s,
                height=0.74,
                color="white" if hidden else COLOURS[part],
                hatch="////" if is_comm else None,
                edgecolor=COLOURS["communication"] if hidden else "white",
                linewidth=0.8,
            )
            label = format_seconds(part_s) + ("" if hidden else f" · {part_s / result.step_s:.1%}")
            axes.text(part_s + widest * 0.008, y, label, va="center", fontsize=9.5)
            ticks.append(y)
            names.append("hidden communication" if hidden else WORDS[part])
            y += 1
        axes.set(xlim=(0, widest * 1.16), ylim=(y - 0.4, -0.6), xlabel="Time in one step, mean over all GPUs [s]")
        axes.set_yticks(ticks, names)
        light_grid(axes, "x")
        axes.spines["left"].set_visible(False)
    alt = "; ".join(f"{'hidden communication' if p == 'hidden' else WORDS[p]} {format_seconds(s)}" for p, s, _ in rows)
    return finish(figure, f"{title}. {alt}.")


def twins(found: Twins) -> Picture:
    """The MoE beside its two dense twins on the same cluster: step time, tokens per second and GPU, memory."""
    moe, active, total = found.moe, found.active, found.total
    results = {"moe": moe, "dense_active": active, "dense_total": total}
    capacity = capacity_bytes(moe)
    faster = moe.tokens_per_s_per_gpu / total.tokens_per_s_per_gpu
    against = moe.tokens_per_s_per_gpu / active.tokens_per_s_per_gpu
    title = (
        f"Tokens/s: {_times(faster)} the dense model of equal total size, {_times(against)} that of equal active size"
    )
    peaks = {k: r.memory["peak_bytes"] / GIB for k, r in results.items()}
    panels = (
        ("Time of one step [s]", {k: r.step_s for k, r in results.items()}, "{:,.2f} s", None),
        ("Throughput [tokens/s per GPU]", {k: r.tokens_per_s_per_gpu for k, r in results.items()}, "{:,.0f}", None),
        ("Memory of the fullest GPU [GiB]", peaks, "{:,.0f} GiB", capacity / GIB),
    )
    with house_style():
        figure = new_figure(9.6, 2.9)
        headline(figure, title)
        for i, (axes, (label, values, shown, limit)) in enumerate(
            zip(figure.subplots(1, 3, sharey=True), panels, strict=True)
        ):
            widest = max(*values.values(), limit or 0.0)
            for y, (name, value) in enumerate(values.items()):
                over = limit is not None and value > limit
                axes.barh(y, value, height=0.62, color=COLOURS[name])
                text = shown.format(value) + (", does not fit" if over else "")
                inside = value > widest * 0.62
                axes.text(
                    value - widest * 0.02 if inside else value + widest * 0.02,
                    y,
                    text,
                    va="center",
                    fontsize=9.5,
                    ha="right" if inside else "left",
                    color=_ink_on(COLOURS[name]) if inside else COLOURS["ink"],
                    fontweight="bold" if over else "normal",
                    zorder=5,
                    bbox=None if inside else behind(),
                )
            if limit is not None:
                axes.axvline(limit, color=COLOURS["alert"], linewidth=1.6, linestyle=(0, (5, 3)))
                axes.set_title(f"dashed: a GPU holds {limit:.0f} GiB", fontsize=9)
            axes.set(xlabel=label, xlim=(0, widest * 1.08), ylim=(2.55, -0.55))
            if i == 0:
                axes.set_yticks(range(3), list(TWIN_NAMES.values()))
            light_grid(axes, "x")
    alt = "; ".join(f"{panel[0]}: " + ", ".join(panel[2].format(v) for v in panel[1].values()) for panel in panels)
    return finish(figure, f"{title}. MoE, dense of active size, dense of total size: {alt}.")


def parameters(model: Description) -> Picture:
    """All parameters of a model against those one token uses, by part."""
    total_by_part, active_by_part, name = model.parameters_by_part, model.active_parameters_by_part, model.name
    total, active = sum(total_by_part.values()), sum(active_by_part.values())
    title = f"A token uses {active / total:.1%} of {name}: {format_count(active)} of {format_count(total)} parameters"
    parts = sorted((p for p, count in total_by_part.items() if count > 0), key=lambda p: -total_by_part[p])
    with house_style():
        figure = new_figure(9.0, 1.25 + 0.62 * len(parts))
        axes = figure.subplots()
        headline(figure, title)
        widest = max(total_by_part.values()) / GIGA
        for y, part in enumerate(parts):
            every, used = total_by_part[part] / GIGA, active_by_part.get(part, 0.0) / GIGA
            colour = COLOURS.get(part, COLOURS["other"])
            axes.barh(y - 0.19, every, height=0.36, color=colour, alpha=0.35)
            axes.barh(y + 0.19, used, height=0.36, color=colour)
            for place, value, words in ((-0.19, every, "held in memory"), (0.19, used, "used by a token")):
                axes.text(
                    value + widest * 0.008, y + place, f"{format_count(value * GIGA)} {words}", va="center", fontsize=9
                )
        axes.set(xlabel="Parameters [billions]", xlim=(0, widest * 1.24), ylim=(len(parts) - 0.4, -0.6))
        axes.set_yticks(range(len(parts)), [WORDS.get(part, part.replace("_", " ")) for part in parts])
        light_grid(axes, "x")
    alt = "; ".join(f"{WORDS.get(p, p)} {format_count(total_by_part[p])}" for p in parts)
    return finish(figure, f"{title}. Total by part: {alt}.")


def break_even(found: BreakEven) -> Picture:
    """Throughput of the MoE and its dense twins against the speed of each GPU's network card, and where they meet."""
    import numpy as np

    rates, at = found.nic_bytes_per_s, found.total_bytes_per_s
    curves = found.tokens_per_s_per_gpu
    wins_with_speed = curves["moe"][-1] > curves["dense_total"][-1]
    if at is not None:
        side = "Below" if wins_with_speed else "Above"
        title = f"{side} {at / GIGA:.3g} GB/s per GPU, a dense model of equal total size trains faster"
    else:
        title = (
            f"The MoE beats the dense model of equal total size at {'every' if wins_with_speed else 'no'} network speed"
        )
    with house_style():
        figure = new_figure(9.0, 3.9)
        axes = figure.subplots()
        headline(figure, title)
        gigabytes = np.asarray(rates) / GIGA
        for name, values in curves.items():
            axes.plot(
                gigabytes,
                values,
                color=COLOURS[name],
                linewidth=2.4 if name == "moe" else 1.8,
                marker="o",
                markersize=4,
            )
        top = max(max(values) for values in curves.values()) * 1.3
        ends = spread([values[-1] for values in curves.values()], top * 0.1, top * 0.04, top * 0.97)
        for (name, _), end in zip(curves.items(), ends, strict=True):
            axes.annotate(
                TWIN_NAMES[name],
                (1.015, end),
                xycoords=("axes fraction", "data"),
                va="center",
                color=COLOURS[name],
                fontsize=9.5,
                fontweight="bold" if name == "moe" else "normal",
                annotation_clip=False,
            )
        lines = [(found.asked_bytes_per_s, "this cluster", COLOURS["quiet"], 0.93)]
        if at is not None:
            lines.append((at, "break-even", COLOURS["alert"], 0.85))
        for rate, words, colour, height in lines:
            axes.axvline(rate / GIGA, color=colour, linewidth=1.3, linestyle=(0, (4, 3)))
            left = rate / GIGA > (gigabytes[0] * gigabytes[-1]) ** 0.5
            axes.annotate(
                f"{words}: {rate / GIGA:.3g} GB/s",
                (rate / GIGA, top * height),
                fontsize=9.5,
                color=colour,
                xytext=(-5 if left else 5, 0),
                textcoords="offset points",
                ha="right" if left else "left",
                bbox=behind(),
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(gigabytes, [f"{value:.3g}" for value in gigabytes])
        axes.minorticks_off()
        axes.set(
            xlabel="Network card of each GPU, one direction [GB/s]",
            ylabel="Throughput [tokens/s per GPU]",
            ylim=(0, top),
        )
        light_grid(axes, "y")
    return finish(figure, title)


def _times(ratio: float) -> str:
    return f"{ratio:.2f}×" if ratio < 10 else f"{ratio:,.0f}×"


def _ink_on(colour: str) -> str:
    """Black or white, whichever reads better on the colour."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 140 else COLOURS["ink"]


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]
