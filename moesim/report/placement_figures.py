"""Figures of the placement notebook: GPUs before and after, policies, replicas, traffic against balance, ageing.

Legend: L MoE layers, R GPUs of an expert-parallel group. A load is a ratio to the layer's mean GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.report.style import (
    COLOURS,
    MEMORY_WORDS,
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
    from matplotlib.image import AxesImage

    from moesim.study.placement import PlacementPoint, PlacementStudy, TradePoint

POLICY_COLOURS: Mapping[str, str] = MappingProxyType(
    {
        "contiguous": "#777777",
        "striped": "#AA7733",
        "random": "#999999",
        "by_load": "#0072B2",
        "eplb": "#009E73",
        "eplb_global": "#44BB99",
        "search_hierarchical": "#AA4499",
        "node_aware": "#332288",
        "search": "#D55E00",
        "today": "#777777",
        "map": "#777777",
        "fresh": "#222222",
    }
)
_REPLICA_PARTS = ("weights_bytes", "gradients_bytes", "optimizer_bytes")
_AGED = ("today", "by_load", "eplb", "search", "fresh")  # lines of the ageing figure: more would hide each other
_MAX_GPU_LINES = 40  # node borders beyond this many would hide the map
NO_GAIN = 0.005  # of the busiest GPU, over the mean: less is none
ALIKE = 0.01  # copies of a token that differ by less are alike
LEAST_SPAN = 0.05  # of an axis of busiest GPUs


def colour_of(policy: str) -> str:
    """A policy keeps its colour in every figure."""
    return POLICY_COLOURS.get(policy, COLOURS["attention"])


def before_after(study: PlacementStudy) -> Picture:
    """Load of every GPU in every layer, today and after, as a ratio to the layer's mean GPU."""
    import seaborn
    from matplotlib.colors import LogNorm

    points = (study.base, study.after)
    ratios = [_ratio_LR(point) for point in points]
    span = float(2.0 ** max(0.5, np.ceil(2 * np.log2(max(r.max() for r in ratios) + 1e-9)) / 2))
    title = (
        f"The busiest GPU of a layer gets {study.base.max_mean:.2f} times the mean before and "
        f"{study.after.max_mean:.2f} times after"
    )
    num_layers, num_ranks = ratios[0].shape
    with house_style():
        figure = new_figure(9.6, min(5.0, 2.4 + 0.06 * num_layers))
        headline(figure, title)
        image: AxesImage | None = None
        axes_row = figure.subplots(1, 2, sharey=True)
        for axes, point, ratio_LR in zip(axes_row, points, ratios, strict=True):
            image = axes.imshow(
                np.clip(ratio_LR, 1 / span, span),
                aspect="auto",
                interpolation="nearest",
                norm=LogNorm(1 / span, span),
                cmap=seaborn.color_palette("vlag", as_cmap=True),
            )
            axes.set_title(f"{point_name(point)}: fullest GPU {ratio_LR.max():.2f} ×", fontsize=9.5)
            axes.set_xlabel(f"GPU of the group (0 to {num_ranks - 1}); lines part nodes")
            _node_borders(axes, point)
            rows = range(0, num_layers, max(1, -(-num_layers // 8)))
            axes.set_yticks(rows, [str(study.layers[row]) for row in rows])
            axes.tick_params(length=0)
            for spine in axes.spines.values():
                spine.set_visible(False)
        axes_row[0].set_ylabel("MoE layer, by its place in the model")
        assert image is not None
        bar = figure.colorbar(image, ax=list(axes_row), pad=0.015, aspect=18)
        ticks = [t for t in (0.25, 0.5, 0.7, 0.85, 1, 1.2, 1.5, 2, 4) if 1 / span <= t <= span]
        bar.set_ticks(ticks, labels=[f"{t:g}×" for t in ticks])
        bar.ax.minorticks_off()
        bar.set_label("GPU's load over the mean [×]")
        bar.outline.set_visible(False)  # type: ignore[operator]
    return finish(figure, f"{title}. Left: {point_name(points[0])}. Right: {point_name(points[1])}.")


def policies(study: PlacementStudy) -> Picture:
    """Busiest GPU over the mean by policy (mean and range over layers) against the bound, and the simulated step."""
    points = sorted(study.by_policy, key=lambda point: -point.max_mean)
    best = study.best
    excess = best.max_mean / best.lower_bound - 1
    title = f"No layout of {best.num_slots} slots gets below {best.lower_bound:.2f} times the mean: only copies help"
    if study.rearranging_helps or best.max_mean < 1.02:
        title = (
            f"{best.policy} comes within {excess:.1%} of what {best.num_slots} slots allow: "
            f"{best.max_mean:.3f} against {best.lower_bound:.3f}"
        )
    has_steps = sum(point.step is not None for point in points) > 1
    with house_style():
        figure = new_figure(9.6, 1.6 + 0.42 * len(points))
        headline(figure, title)
        grid: Any = figure.subplots(1, 2 if has_steps else 1, sharey=True, squeeze=False)[0]
        _balance_panel(grid[0], points)
        if has_steps:
            _step_panel(grid[1], points)
    alt = "; ".join(f"{point.policy} {point.max_mean:.3f}" for point in points)
    return finish(figure, f"{title}. Mean over layers: {alt}.")


def redundancy(study: PlacementStudy) -> Picture:
    """What expert slots beyond one copy each buy and cost: balance, memory, step time, over slots per GPU."""
    points = study.by_slots
    num_ranks = points[0].placed.placements.ranks.num_ranks
    per_gpu = [point.num_slots / num_ranks for point in points]
    title = redundancy_title(study)
    has_steps = sum(point.step is not None for point in points) > 1
    with house_style():
        figure = new_figure(9.6, 3.4)
        headline(figure, title)
        grid = figure.subplots(1, 3 if has_steps else 2)
        _slots_balance_panel(grid[0], points, per_gpu)
        _slots_memory_panel(grid[1], study, per_gpu)
        if has_steps:
            _slots_step_panel(grid[2], study, per_gpu)
        for axes in grid:
            axes.set_xlabel("Expert slots per GPU and layer")
            axes.set_xticks(per_gpu, [f"{slots:g}" for slots in per_gpu])
            axes.margins(x=0.12)
    shown = "; ".join(f"{slots:g}: {point.max_mean:.3f}" for slots, point in zip(per_gpu, points, strict=True))
    return finish(figure, f"{title}. Busiest GPU over the mean by slots per GPU: {shown}.")


def redundancy_title(study: PlacementStudy) -> str:
    """What the first replicas buy, and what they cost."""
    points = study.by_slots
    if len(points) < 2:
        return f"{points[0].num_slots} slots: the busiest GPU gets {points[0].max_mean:.2f} times the mean"
    num_ranks = points[0].placed.placements.ranks.num_ranks
    if points[0].max_mean - min(point.max_mean for point in points) < NO_GAIN:
        chosen, alone = study.chosen_slots, points[0]
        if (
            chosen.step is not None
            and alone.step is not None
            and chosen.step.step_s < alone.step.step_s * (1 - NO_GAIN)
        ):
            shorter = 1 - chosen.step.step_s / alone.step.step_s
            return f"Copies even out nothing more, yet a step is {shorter:.0%} shorter with {chosen.num_slots} slots"
        return f"Copies have nothing to even out: the busiest GPU gets {alone.max_mean:.2f} times the mean without"
    more = (points[1].num_slots - points[0].num_slots) / num_ranks
    cost = points[1].replica_bytes.total_bytes - points[0].replica_bytes.total_bytes
    return (
        f"{more:g} more slot{'' if more == 1 else 's'} per GPU and layer: the busiest GPU gets "
        f"{points[1].max_mean:.2f} instead of {points[0].max_mean:.2f} times the mean, for {format_bytes(cost)}"
    )


def front(study: PlacementStudy) -> Picture:
    """Traffic between nodes against balance: each policy and number of slots a point, node_aware's trades a line."""
    points = list({(point.policy, point.num_slots): point for point in study.points}.values())
    least = min(points, key=lambda point: (point.cross_node_per_token, point.max_mean))
    best = min(points, key=lambda point: point.max_mean)
    title = (
        f"Least traffic: {least.cross_node_per_token:.2f} copies of a token leave its node ({point_name(least)}); "
        f"most even: {best.cross_node_per_token:.2f} copies ({point_name(best)})"
    )
    copies = [point.cross_node_per_token for point in points] + [trade.cross_node_per_token for trade in study.trades]
    middle, reach = (max(copies) + min(copies)) / 2, max(copies) - min(copies)
    if reach < ALIKE * middle:
        title = f"No layout changes the traffic by {ALIKE:.0%}: {middle:.2f} copies of a token leave its node"
    with house_style():
        figure = new_figure(9.0, 4.4)
        axes = figure.subplots()
        headline(figure, title)
        trades = sorted(study.trades, key=lambda trade: trade.max_mean)
        colour = colour_of("node_aware")
        axes.plot(
            [trade.cross_node_per_token for trade in trades],
            [_excess_percent(trade.max_mean) for trade in trades],
            color=colour,
            linewidth=1.3,
            marker="o",
            markersize=3.5,
            zorder=2,
        )
        for point in points:
            axes.scatter(
                point.cross_node_per_token,
                _excess_percent(point.max_mean),
                s=64,
                color=colour_of(point.policy),
                edgecolor="white",
                linewidth=0.8,
                zorder=3,
            )
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")
        axes.minorticks_off()
        axes.margins(x=0.32, y=0.14)
        half = 0.82 * max(reach, ALIKE * middle)  # so that what hardly differs does not look far apart
        axes.set_xlim(middle - half, middle + half)
        _label_points(axes, points, study.trades)
        axes.set(
            xlabel="Copies of a token that leave its node, mean over layers", ylabel="Busiest GPU above the mean [%]"
        )
        if trades:
            axes.set_title("dark line: node_aware, giving up to 20% of balance for fewer copies", fontsize=9)
        light_grid(axes, "both")
    alt = "; ".join(f"{point_name(p)} {p.cross_node_per_token:.2f}, {p.max_mean:.3f}" for p in points)
    return finish(figure, f"{title}. Copies, busiest over mean: {alt}.")


def ageing(study: PlacementStudy) -> Picture:
    """Balance of layouts that stay while the load drifts; placed anew it would stay at the lowest line."""
    found = study.ageing
    drift = [1 - correlation for correlation in found.correlations]
    best, base = found.best, found.max_mean["today"]
    stale = next((d for d, a, b in zip(drift, found.max_mean[best], base, strict=True) if a > (1 + b) / 2), None)
    title = (
        f"{best} has lost half of its gain once the load's correlation with the one placed for is {1 - stale:.2f}"
        if stale is not None
        else f"{best} keeps more than half of its gain however the load drifts"
    )
    shown = {name: values for name, values in found.max_mean.items() if name in (*_AGED, best)}
    with house_style():
        figure = new_figure(9.0, 3.7)
        axes = figure.subplots()
        headline(figure, title)
        for name, values in shown.items():
            axes.plot(
                range(len(drift)),
                values,
                color=colour_of(name),
                linewidth=2.4 if name == best else 1.6,
                linestyle=(0, (4, 3)) if name == "fresh" else "-",
                marker="o",
                markersize=3.5,
            )
        ends = {name: values[-1] for name, values in shown.items()}
        low, high = axes.get_ylim()
        places = spread(list(ends.values()), (high - low) * 0.065, low, high)
        for name, place in zip(ends, places, strict=True):
            axes.annotate(
                {"fresh": "placed anew each time", "today": f"today ({study.base.policy})"}.get(name, name),
                (1.012, place),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=9.5,
                color=colour_of(name),
                annotation_clip=False,
            )
        axes.set_xticks(range(len(drift)), [f"{correlation:g}" for correlation in found.correlations])
        axes.set(
            xlabel="Correlation of the load's logarithm with the one placed for (1: as it was, 0: another load)",
            ylabel="Busiest GPU over the mean [×]",
        )
        light_grid(axes, "y")
    alt = "; ".join(f"{name}: " + ", ".join(f"{v:.2f}" for v in values) for name, values in found.max_mean.items())
    return finish(figure, f"{title}. {alt}.")


def point_name(point: PlacementPoint) -> str:
    """A policy and its slots, for a label."""
    return f"{point.policy}, {point.num_slots} slots"


def _excess_percent(max_mean: float) -> float:
    """How far the busiest GPU is above the mean; at least a hundredth, for a logarithmic axis."""
    return max(100 * (max_mean - 1), 0.01)


def _ratio_LR(point: PlacementPoint) -> np.ndarray:
    load_LR = point.placed.rank_loads_LR
    return load_LR / np.maximum(load_LR.mean(axis=1, keepdims=True), 1e-300)


def _node_borders(axes: Axes, point: PlacementPoint) -> None:
    nodes_R = point.placed.placements.ranks.node_of_rank_R
    borders = np.flatnonzero(np.diff(nodes_R)) + 0.5
    if len(borders) <= _MAX_GPU_LINES:
        for border in borders:
            axes.axvline(border, color="white", linewidth=1.2)


def _balance_panel(axes: Axes, points: Sequence[PlacementPoint]) -> None:
    for y, point in enumerate(points):
        max_mean_L = point.placed.max_mean_L
        colour = colour_of(point.policy)
        axes.plot([max_mean_L.min(), max_mean_L.max()], [y, y], color=colour, linewidth=5, alpha=0.3)
        axes.plot(point.max_mean, y, marker="o", color=colour, markersize=8)
        axes.plot(point.lower_bound, y, marker="|", color=COLOURS["ink"], markersize=16, markeredgewidth=2)
        axes.text(
            max_mean_L.max(),
            y,
            f"  {point.max_mean:.3f}",
            va="center",
            fontsize=9.5,
            bbox=behind(),
            color=COLOURS["ink"],
        )
    axes.set_yticks(range(len(points)), [point.policy for point in points])
    axes.set_ylim(len(points) - 0.5, -0.5)
    axes.set_xlabel("Busiest GPU over the mean [×]")
    axes.set_title("dot: mean layer; band: all layers; black: no layout beats it", fontsize=9)
    axes.margins(x=0.16)
    light_grid(axes, "x")


def _step_panel(axes: Axes, points: Sequence[PlacementPoint]) -> None:
    widest = max(point.step.step_s for point in points if point.step is not None)
    for y, point in enumerate(points):
        if point.step is None:
            axes.text(0, y, " not simulated", va="center", fontsize=9.5, color=COLOURS["quiet"])
            continue
        axes.barh(y, point.step.step_s, height=0.6, color=colour_of(point.policy))
        fits = "" if point.step.fits else ", does not fit"
        axes.text(
            point.step.step_s + widest * 0.01, y, format_seconds(point.step.step_s) + fits, va="center", fontsize=9.5
        )
    axes.set_xlim(0, widest * 1.32)
    axes.set_xlabel("Time of one training step [s]")
    axes.set_title("simulated with each policy", fontsize=9)
    light_grid(axes, "x")


def _slots_balance_panel(axes: Axes, points: Sequence[PlacementPoint], per_gpu: Sequence[float]) -> None:
    policy = points[0].policy
    worst = [point.worst_max_mean for point in points]
    axes.fill_between(
        per_gpu,
        [point.placed.max_mean_L.min() for point in points],
        worst,
        color=colour_of(policy),
        alpha=0.2,
        linewidth=0,
    )
    axes.plot(per_gpu, [point.max_mean for point in points], color=colour_of(policy), marker="o", linewidth=2)
    axes.plot(
        per_gpu, [point.lower_bound for point in points], color=COLOURS["ink"], linestyle=(0, (4, 3)), linewidth=1.2
    )
    low, high = axes.get_ylim()
    axes.set_ylim(low, max(high, low + LEAST_SPAN))  # so that rounding does not look like a difference
    axes.set_ylabel("Busiest GPU over the mean [×]")
    axes.set_title("band: all layers; dashed: the bound", fontsize=9)
    light_grid(axes, "y")


def _slots_memory_panel(axes: Axes, study: PlacementStudy, per_gpu: Sequence[float]) -> None:
    base = np.zeros(len(per_gpu))
    width = 0.6 * min(np.diff(per_gpu), default=1.0)
    for part in _REPLICA_PARTS:
        sizes = np.array([getattr(point.replica_bytes, part) for point in study.by_slots]) / GIB
        colour = COLOURS[part.removesuffix("_bytes")]
        axes.bar(per_gpu, sizes, bottom=base, width=width, color=colour, label=MEMORY_WORDS[part])
        base += sizes
    top = max(float(base.max()), 1e-3)
    for x, height in zip(per_gpu, base, strict=True):
        axes.text(x, height + top * 0.02, f"{height:.1f}", ha="center", va="bottom", fontsize=9.5, bbox=behind())
    today = study.base
    free = None
    if today.step is not None:
        free = (today.step.headroom_bytes + today.replica_bytes.total_bytes) / GIB
    if free is not None and 0 < free < 3 * top:
        axes.axhline(free, color=COLOURS["alert"], linewidth=1.5, linestyle=(0, (5, 3)))
        top = max(top, free)
        axes.set_title(f"dashed: {free:.0f} GiB are free without replicas", fontsize=9)
    elif free is not None:
        axes.set_title(f"{free:.0f} GiB are free without replicas" if free > 0 else "none is free as it is", fontsize=9)
    axes.set_ylim(0, top * 1.18)
    axes.set_ylabel("Memory of replicas per GPU [GiB]")
    axes.legend(loc="upper left", fontsize=9, frameon=True, facecolor="white", edgecolor="none", framealpha=0.85)
    light_grid(axes, "y")


def _slots_step_panel(axes: Axes, study: PlacementStudy, per_gpu: Sequence[float]) -> None:
    known = [(slots, p.step) for slots, p in zip(per_gpu, study.by_slots, strict=True) if p.step is not None]
    seconds = [step.step_s for _, step in known]
    axes.plot(
        [slots for slots, _ in known], seconds, color=colour_of(study.by_slots[0].policy), marker="o", linewidth=2
    )
    for slots, step in known:
        if not step.fits:
            axes.plot(slots, step.step_s, marker="x", color=COLOURS["alert"], markersize=11, markeredgewidth=2)
    if study.base.step is not None:
        axes.axhline(study.base.step.step_s, color=colour_of(study.base.policy), linewidth=1.4, linestyle=(0, (4, 3)))
    crosses = "; cross: does not fit" if any(not step.fits for _, step in known) else ""
    axes.set_title(f"dashed: today{crosses}", fontsize=9)
    today = [] if study.base.step is None else [study.base.step.step_s]
    axes.set_ylim(0, 1.08 * max(seconds + today))
    axes.set_ylabel("Time of one training step [s]")
    light_grid(axes, "y")


def _label_points(axes: Axes, points: Sequence[PlacementPoint], trades: Sequence[TradePoint]) -> None:
    """A name beside each point; points of one policy that lie together share the first one's; none on another mark."""
    low, high = axes.get_xlim()
    bottom, top = np.log10(axes.get_ylim())

    def place(point: PlacementPoint | TradePoint) -> tuple[float, float]:
        height = (np.log10(_excess_percent(point.max_mean)) - bottom) / (top - bottom)
        return (point.cross_node_per_token - low) / (high - low), float(height)

    marks = [*(place(point) for point in points), *(place(trade) for trade in trades)]
    named: dict[str, list[PlacementPoint]] = {"left": [], "right": []}
    for point in points:
        if point.policy == "node_aware" and trades:
            continue  # its line is named above the figure
        x, y = place(point)
        twins = [place(other) for side in named.values() for other in side if other.policy == point.policy]
        if any(abs(a - x) < 0.03 and abs(b - y) < 0.08 for a, b in twins):
            continue
        blocked = any(0.005 < a - x < 0.3 and abs(b - y) < 0.06 for a, b in marks)
        named["left" if blocked else "right"].append(point)
    for side, members in named.items():
        heights = spread([place(point)[1] for point in members], 0.055, 0.0, 1.0)
        for point, height in zip(members, heights, strict=True):
            axes.annotate(
                point_name(point),
                (place(point)[0] + (0.012 if side == "right" else -0.012), height),
                xycoords="axes fraction",
                ha="left" if side == "right" else "right",
                va="center",
                fontsize=9,
                color=colour_of(point.policy),
            )
