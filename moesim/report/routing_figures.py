"""Figures of the routing notebook: drops over capacity and skew, where they fall, what skew costs, balance in training.

Legend: L MoE layers, R GPUs of an expert-parallel group. Maps of the load itself are in `load_figures`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from moesim.report.style import (
    COLOURS,
    Picture,
    behind,
    finish,
    headline,
    house_style,
    light_grid,
    new_figure,
    spread,
)
from moesim.units import GIB, format_bytes, format_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from moesim.metrics.memory import MemoryOverSteps
    from moesim.study.balance import BalanceCurve
    from moesim.study.routing import RoutingStudy
    from moesim.study.skew import DropCurve

ASKED = COLOURS["moe"]
DASHED = (0, (5, 3))
_SHADES = ("#9ECAE1", "#4292C6", "#08519C", "#08306B")  # of other skews, the mildest first
REDRAW_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "counts": "from one step to the next",
        "favourites": "with other experts popular",
        "drift": "as popularity drifts",
    }
)
POLICY_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "none": "no balancing",
        "aux_loss": "auxiliary loss",
        "loss_free": "loss-free bias",
        "noisy_gating": "noisy gating",
    }
)
_POLICY_COLOURS = {"none": COLOURS["alert"], "aux_loss": "#0072B2", "loss_free": "#009E73", "noisy_gating": "#AA7733"}


def percent(share: float) -> str:
    """A share that somebody typed, without idle zeros.

    >>> percent(0.01), percent(0.001)
    ('1%', '0.1%')
    """
    return f"{share * 100:.3g}%"


def drop_family(study: RoutingStudy) -> Picture:
    """Dropped assignments and empty room over capacity factors, a line for each skew, the asked one marked."""
    needed, asked = study.needed, study.scenario.routing.capacity_factor
    wanted = needed.wanted_drop_fraction
    title = f"Keeping drops under {percent(wanted)} takes a capacity factor of {needed.capacity_factor:.2f}"
    with house_style():
        figure = new_figure(9.6, 4.0)
        drops, empty = figure.subplots(1, 2)
        headline(figure, title)
        colours = _skew_colours(study.drop_curves)
        for axes, name in ((drops, "drop_fraction"), (empty, "padding_fraction")):
            tops = [
                _percent_line(axes, curve, name, colour)
                for curve, colour in zip(study.drop_curves, colours, strict=True)
            ]
            axes.set(xlabel="Capacity factor: room over the mean load [×]", ylim=(0, max(*tops, 5.0) * 1.12))
            if asked is not None:
                axes.axvline(asked, color=COLOURS["quiet"], linewidth=1.2, linestyle=DASHED)
            light_grid(axes, "y")
        drops.set(ylabel="Dropped assignments [%]", title="what experts turn away")
        empty.set(ylabel="Empty places [%]", title="what padded buffers hold for nothing")
        drops.axhline(wanted * 100, color=COLOURS["alert"], linewidth=1.2, linestyle=DASHED)
        drops.annotate(
            f"wanted: {percent(wanted)}",
            (0.01, wanted * 100),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            va="bottom",
            fontsize=9,
            color=COLOURS["alert"],
        )
        _name_lines(empty, study.drop_curves, colours)
        if asked is not None:
            drops.annotate(
                f"asked: {asked:g}",
                (asked, drops.get_ylim()[1] * 0.95),
                xytext=(4, 0),
                textcoords="offset points",
                fontsize=9,
                color=COLOURS["quiet"],
                bbox=behind(),
            )
    alt = "; ".join(
        f"Gini {curve.gini:.2f}: "
        + ", ".join(f"{p.capacity_factor:g} drops {p.drop_fraction:.1%}" for p in curve.points)
        for curve in study.drop_curves
    )
    return finish(figure, f"{title}. {alt}.")


def _skew_colours(curves: Sequence[DropCurve]) -> list[str]:
    others = sum(not curve.asked for curve in curves)
    shades = iter(_SHADES[round(i * (len(_SHADES) - 1) / max(others - 1, 1))] for i in range(others))
    return [ASKED if curve.asked else next(shades) for curve in curves]


def _percent_line(axes: Axes, curve: DropCurve, name: str, colour: str) -> float:
    """Draw one skew's line and return its highest value [%]."""
    values = [getattr(point, name) * 100 for point in curve.points]
    factors = [point.capacity_factor for point in curve.points]
    width = 2.6 if curve.asked else 1.7
    axes.plot(factors, values, color=colour, linewidth=width, marker="o", markersize=4, zorder=3 if curve.asked else 2)
    return max(values)


def _name_lines(axes: Axes, curves: Sequence[DropCurve], colours: Sequence[str]) -> None:
    """Which line is which skew, to the right of the last panel."""
    top = axes.get_ylim()[1]
    wanted = [curve.points[-1].padding_fraction * 100 for curve in curves]
    for curve, colour, place in zip(curves, colours, spread(wanted, top * 0.085, top * 0.05, top * 0.97), strict=True):
        axes.annotate(
            f"Gini {curve.gini:.2f}" + (" (asked)" if curve.asked else ""),
            (1.02, place),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=9.5,
            color=colour,
            fontweight="bold" if curve.asked else "normal",
            annotation_clip=False,
        )


def drops_where(study: RoutingStudy) -> Picture:
    """Dropped share by layer, and by layer and GPU; needs a step that drops something."""
    load = study.load
    by_layer = load.drop_fraction_L * 100
    worst = int(by_layer.argmax())
    by_rank = load.drop_fraction_LR * 100
    title = f"Layer {load.layers[worst]} drops most: {by_layer[worst]:.1f}% of its assignments"
    with house_style():
        figure = new_figure(9.6, 3.9)
        bars, heat = figure.subplots(1, 2, width_ratios=(1.0, 1.25))
        headline(figure, title)
        rows = np.arange(len(load.layers))
        colours = [COLOURS["alert"] if row == worst else COLOURS["wait_for_slowest"] for row in rows]
        bars.barh(rows, by_layer, color=colours, height=0.8)
        bars.axvline(load.drop_fraction * 100, color=COLOURS["ink"], linewidth=1.1, linestyle=DASHED)
        bars.set(xlabel="Dropped assignments [%]", ylabel="MoE layer, by its place in the model")
        bars.set_title(f"by layer; dashed: all layers, {load.drop_fraction:.1%}", fontsize=9.5)
        bars.set_ylim(len(rows) - 0.4, -0.6)
        image = heat.imshow(by_rank, aspect="auto", interpolation="nearest", cmap="YlOrRd", vmin=0.0)
        heat.set_title(f"by layer and GPU, up to {by_rank.max():.0f}%", fontsize=9.5)
        heat.set(xlabel=f"GPU of an expert-parallel group (0 to {by_rank.shape[1] - 1})")
        bar = figure.colorbar(image, ax=heat, pad=0.02, aspect=18)
        bar.set_label("Dropped of what was meant for it [%]")
        bar.outline.set_visible(False)  # type: ignore[operator]
        shown = range(0, len(rows), max(1, -(-len(rows) // 8)))
        for axes in (bars, heat):
            axes.set_yticks(list(shown), [str(load.layers[row]) for row in shown])
            axes.tick_params(length=0)
        for spine in heat.spines.values():
            spine.set_visible(False)
        light_grid(bars, "x")
    return finish(
        figure,
        f"{title}; over all layers {load.drop_fraction:.1%}. The fullest GPU of a layer drops up to "
        f"{by_rank.max():.0f}% of what was meant for it.",
    )


def cost_over_skew(study: RoutingStudy) -> Picture:
    """Step time, and memory of the fullest GPU, over the Gini of the load, with and without a capacity."""
    dropless = [point for point in study.over_skew if point.capacity_factor is None]
    limited = [point for point in study.over_skew if point.capacity_factor is not None]
    low, high = dropless[0], dropless[-1]
    title = (
        f"Without drops, a Gini of {high.gini:.2f} makes the step {high.step_s / low.step_s:.2f} times as long as "
        "even routing"
    )
    lines = [("no drops", dropless, COLOURS["attention"])]
    if limited:
        factor = limited[0].capacity_factor
        drops = limited[-1].drop_fraction
        lines.append((f"capacity factor {factor:g} (drops up to {drops:.0%})", limited, COLOURS["alert"]))
    capacity = study.scenario.cluster.gpu.memory_bytes.value / GIB
    with house_style():
        figure = new_figure(9.6, 3.7)
        times, memory = figure.subplots(1, 2)
        headline(figure, title)
        for words, points, colour in lines:
            ginis = [point.gini for point in points]
            times.plot(
                ginis, [p.step_s for p in points], color=colour, linewidth=2.2, marker="o", markersize=4.5, label=words
            )
            memory.plot(
                ginis, [p.peak_bytes / GIB for p in points], color=colour, linewidth=2.2, marker="o", markersize=4.5
            )
        asked = next(point for point in study.over_skew if point.popularity == "asked")
        for axes in (times, memory):
            axes.axvline(asked.gini, color=COLOURS["quiet"], linewidth=1.2, linestyle=DASHED)
            axes.set(xlabel="Gini coefficient of the load (0: even)")
            light_grid(axes, "y")
        peaks = [point.peak_bytes / GIB for point in study.over_skew]
        times.set(ylim=(0, max(p.step_s for p in study.over_skew) * 1.25), ylabel="Time of one step [s]")
        memory.set(ylim=(0, max(*peaks, capacity) * 1.12), ylabel="Memory of the fullest GPU [GiB]")
        times.legend(loc="upper left", frameon=True, facecolor="white", edgecolor="none", framealpha=0.9)
        times.annotate(
            "asked", (asked.gini, 0), xytext=(4, 4), textcoords="offset points", fontsize=9, color=COLOURS["quiet"]
        )
        _capacity_line(memory, capacity)
    alt = "; ".join(
        f"{words}: "
        + ", ".join(f"{p.gini:.2f} {format_seconds(p.step_s)}, {format_bytes(p.peak_bytes)}" for p in points)
        for words, points, _ in lines
    )
    return finish(figure, f"{title}. Gini, step, memory, {alt}.")


def _capacity_line(axes: Axes, capacity_gib: float) -> None:
    axes.axhline(capacity_gib, color=COLOURS["alert"], linewidth=1.5, linestyle=DASHED)
    axes.annotate(
        f"a GPU holds {capacity_gib:.0f} GiB",
        (0.99, capacity_gib),
        xycoords=("axes fraction", "data"),
        xytext=(0, -3),  # below: the steps that do not fit are drawn above
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=9,
        color=COLOURS["alert"],
    )


def cost_over_capacity(study: RoutingStudy) -> Picture:
    """Step time, drops and memory at each capacity factor, the asked one marked; the last is without drops."""
    points = study.over_capacity
    free = points[-1]
    fastest = min(points, key=lambda point: point.step_s)
    saved = 1.0 - fastest.step_s / free.step_s
    title = (
        f"Dropping {fastest.drop_fraction:.0%} of the assignments buys {saved:.0%} of the step"
        if saved > 0.005
        else "Dropping assignments does not shorten the step"
    )
    asked = study.scenario.routing.capacity_factor
    panels: tuple[tuple[str, list[float], str], ...] = (
        ("Time of one step [s]", [p.step_s for p in points], "{:#.3g}"),
        ("Dropped assignments [%]", [p.drop_fraction * 100 for p in points], "{:.1f}"),
        ("Memory of the fullest GPU [GiB]", [p.peak_bytes / GIB for p in points], "{:.1f}"),
    )
    names = ["none" if p.capacity_factor is None else f"{p.capacity_factor:g}" for p in points]
    colours = [ASKED if p.capacity_factor == asked else COLOURS["dense_total"] for p in points]
    with house_style():
        figure = new_figure(9.6, 0.9 + 0.38 * len(points) + 0.6)
        headline(figure, title)
        for i, (axes, (label, values, shown)) in enumerate(
            zip(figure.subplots(1, 3, sharey=True), panels, strict=True)
        ):
            axes.barh(range(len(points)), values, color=colours, height=0.66)
            widest = max(*values, 1e-9)
            for y, value in enumerate(values):
                axes.text(value + widest * 0.02, y, shown.format(value), va="center", fontsize=9.5)
            axes.set(xlabel=label, xlim=(0, widest * 1.2), ylim=(len(points) - 0.45, -0.55))
            if i == 0:
                axes.set_yticks(
                    range(len(points)),
                    [
                        n + (" (asked)" if p.capacity_factor == asked else "")
                        for n, p in zip(names, points, strict=True)
                    ],
                )
                axes.set_ylabel("Capacity factor")
            light_grid(axes, "x")
    alt = "; ".join(
        f"{name}: {format_seconds(p.step_s)}, {p.drop_fraction:.1%} dropped, {format_bytes(p.peak_bytes)}"
        for name, p in zip(names, points, strict=True)
    )
    return finish(figure, f"{title}. {alt}.")


def memory_over_steps(study: RoutingStudy) -> Picture:
    """Peak memory of the fullest GPU in each sampled step, with P50, P90 and P99, against what a GPU holds."""
    worst = max(study.memory, key=lambda memory: memory.p99_bytes)
    capacity = worst.capacity_bytes / GIB
    title = (
        f"In 99 of 100 steps the fullest GPU needs at most {format_bytes(worst.p99_bytes)} of {capacity:.1f} GiB"
        if worst.fits_at_p99
        else f"One step in 100 needs over {format_bytes(worst.p99_bytes)}, more than a GPU's {capacity:.1f} GiB"
    )
    ends = [size / GIB for m in study.memory for size in (min(m.peak_bytes_S), max(m.peak_bytes_S), m.p99_bytes)]
    low, high = min(ends), max(ends)
    reach = max(high - low, 0.01 * high)
    is_near = low - reach <= capacity <= high + reach
    if is_near:
        low, high = min(low, capacity), max(high, capacity)
    margin = 0.08 * max(high - low, reach)
    with house_style():
        figure = new_figure(9.6, 0.9 + 0.85 * len(study.memory) + 0.5)
        axes = figure.subplots()
        headline(figure, title)
        axes.set(xlim=(low - margin, high + margin), ylim=(len(study.memory) - 0.3, -0.75))
        for row, memory in enumerate(study.memory):
            _memory_row(axes, row, memory)
        is_right = capacity > (low + high) / 2
        if is_near:
            axes.axvline(capacity, color=COLOURS["alert"], linewidth=1.6, linestyle=DASHED)
        place = capacity if is_near else high + margin if is_right else low - margin
        words = f"a GPU holds {capacity:.1f} GiB"
        axes.annotate(
            words if is_near else f"{words} →" if is_right else f"← {words}",
            (place, -0.7),
            xytext=(-5 if is_right else 5, 0),
            textcoords="offset points",
            ha="right" if is_right else "left",
            va="top",
            fontsize=9.5,
            color=COLOURS["alert"],
        )
        axes.set_yticks(range(len(study.memory)), [_row_name(memory) for memory in study.memory])
        axes.set_xlabel("Peak memory of the fullest GPU [GiB]")
        axes.set_title("dots: sampled steps; bars: what 50, 90 and 99 of 100 steps stay under", fontsize=9.5)
        light_grid(axes, "x")
    alt = "; ".join(
        f"{REDRAW_WORDS[m.redraw]}: median {format_bytes(m.p50_bytes)}, P99 {format_bytes(m.p99_bytes)}, "
        f"chance of too much {m.out_of_memory_fraction:.1%}"
        for m in study.memory
    )
    return finish(figure, f"{title}. {alt}.")


def _row_name(memory: MemoryOverSteps) -> str:
    words = REDRAW_WORDS[memory.redraw].split()
    middle = (len(words) + 1) // 2
    return " ".join(words[:middle]) + "\n" + " ".join(words[middle:])


def _memory_row(axes: Axes, row: int, memory: MemoryOverSteps) -> None:
    peaks = np.array(memory.peak_bytes_S) / GIB
    nudge = 0.13 * np.sin(np.arange(peaks.size) * 2.4)  # apart from each other, the same in every run
    axes.scatter(peaks, row + nudge, s=18, color=COLOURS["attention"], alpha=0.55, linewidths=0, zorder=3)
    marks = (("P50", memory.p50_bytes), ("P90", memory.p90_bytes), ("P99", memory.p99_bytes))
    left, right = axes.get_xlim()
    labels = spread([size / GIB for _, size in marks], 0.032 * (right - left), left, right)
    for (name, size), label in zip(marks, labels, strict=True):
        place = size / GIB
        axes.plot([place, place], [row - 0.24, row + 0.24], color=COLOURS["ink"], linewidth=1.6, zorder=4)
        axes.text(label, row + 0.3, name, ha="center", va="top", fontsize=8.5)


def balancing(curves: Sequence[BalanceCurve]) -> Picture:
    """MaxVio over training steps under each balancing policy, on a logarithmic scale."""
    best = min(curves, key=lambda curve: curve.final_max_vio)
    title = (
        f"{POLICY_WORDS[best.policy].capitalize()} ends most even: its busiest expert takes "
        f"{1 + best.final_max_vio:.2f} times the mean"
    )
    with house_style():
        figure = new_figure(9.6, 3.9)
        axes = figure.subplots()
        headline(figure, title)
        lowest = min(min(curve.max_vio) for curve in curves)
        highest = max(max(curve.max_vio) for curve in curves)
        for curve in curves:
            axes.plot(curve.steps, curve.max_vio, color=_POLICY_COLOURS[curve.policy], linewidth=1.9)
        bottom, top = max(lowest, 1e-3) * 0.7, highest * 1.5
        axes.set_yscale("log")
        axes.set(
            ylim=(bottom, top),
            xlim=(0, curves[0].steps[-1]),
            xlabel="Training step",
            ylabel="MaxVio: busiest expert over the mean, less 1",
        )
        ends = [float(np.log(curve.final_max_vio)) for curve in curves]
        span = float(np.log(top / bottom))
        places = spread(ends, span * 0.09, float(np.log(bottom)) + span * 0.03, float(np.log(top)) - span * 0.03)
        for curve, place in zip(curves, places, strict=True):
            axes.annotate(
                f"{POLICY_WORDS[curve.policy]}: {curve.final_max_vio:.2f}",
                (1.012, float(np.exp(place))),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=9.5,
                color=_POLICY_COLOURS[curve.policy],
                annotation_clip=False,
            )
        ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if bottom <= t <= top]
        axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
        axes.minorticks_off()
        light_grid(axes, "y")
    alt = "; ".join(f"{POLICY_WORDS[c.policy]} ends at {c.final_max_vio:.2f}" for c in curves)
    return finish(figure, f"{title}. MaxVio, mean over layers: {alt}.")
