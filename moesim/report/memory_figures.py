"""Figures of the memory notebook: memory over a step, what recomputation and offloading trade, and skew."""

from __future__ import annotations

from collections.abc import Mapping
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
    signed_percent,
    spread,
)
from moesim.units import GIB, MILLI, format_bytes, format_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from moesim.metrics.memory_timeline import StageTimeline
    from moesim.study.memory import MemoryStudy

FAMILY_COLOURS: Mapping[str, str] = MappingProxyType(
    {"asked": COLOURS["ink"], "recompute": "#0072B2", "offload": "#882255", "both": "#117733"}
)
NAMED = 0.97  # of the asked peak: what saves less is a dot without a name
MOST_STAGES = 4  # of a timeline: the ends, the fullest, the emptiest


def timeline(study: MemoryStudy) -> Picture:
    """What the fullest GPU of some stages holds over a step."""
    fullest = study.fullest
    at = int(fullest.peak_bytes_K.argmax())
    when = fullest.start_s_K[at]
    doing = fullest.names_K[at].replace("_", " ")
    title = f"Stage {fullest.stage} is fullest in a {doing} after {format_seconds(when)}"
    if doing == "optimizer":
        title = f"Stage {fullest.stage} is fullest in the optimizer step, after {format_seconds(when)}"
    lines = _shown(study.timeline)
    scale, unit = (1.0, "s") if lines[0].end_s_K[-1] >= 1 else (MILLI, "ms")
    with house_style():
        figure = new_figure(9.6, 1.1 + 1.55 * len(lines))
        headline(figure, title)
        panels = np.atleast_1d(figure.subplots(len(lines), 1, sharex=True, sharey=True))
        for axes, line in zip(panels, lines, strict=True):
            _one_stage(axes, line, study.capacity_bytes, scale)
        panels[-1].set_xlabel(f"Time since the step began [{unit}]")
        top = max(study.capacity_bytes, *(line.peak_bytes for line in lines)) / GIB
        panels[0].set_ylim(0, 1.12 * top)
        panels[0].set_xlim(0, max(float(line.end_s_K[-1]) for line in lines) / scale)
    told = "; ".join(f"stage {line.stage}: {format_bytes(line.peak_bytes)}" for line in lines)
    return finish(figure, f"{title}. Peak of the fullest GPU by stage: {told}.")


def _one_stage(axes: Axes, line: StageTimeline, capacity_bytes: float, scale: float) -> None:
    """Held between operations as a line, the worst moment of each operation as a bar over it."""
    times = np.column_stack([line.start_s_K, line.end_s_K]).ravel() / scale
    held = np.column_stack([line.begin_bytes_K, line.end_bytes_K]).ravel() / GIB
    worst = np.repeat(line.peak_bytes_K, 2) / GIB
    gaps = np.isin(np.arange(times.size), np.arange(1, times.size, 2))
    axes.fill_between(times, 0, worst, where=np.ones_like(gaps), color="#DDAA33", alpha=0.35, linewidth=0, step="post")
    axes.plot(times, held, color="#332288", linewidth=1.1)
    axes.axhline(capacity_bytes / GIB, color=COLOURS["alert"], linewidth=1.3, linestyle=(0, (5, 3)))
    axes.set_title(f"stage {line.stage}, GPU {line.rank}: at most {format_bytes(line.peak_bytes)}", fontsize=9.5)
    axes.set_ylabel("[GiB]")
    light_grid(axes, "y")


def _shown(lines: tuple[StageTimeline, ...]) -> list[StageTimeline]:
    """At most MOST_STAGES: first, last, fullest, emptiest, in order."""
    if len(lines) <= MOST_STAGES:
        return list(lines)
    chosen = {
        lines[0].stage,
        lines[-1].stage,
        max(lines, key=lambda line: line.peak_bytes).stage,
        min(lines, key=lambda line: line.peak_bytes).stage,
    }
    return [line for line in lines if line.stage in chosen]


def trades(study: MemoryStudy) -> Picture:
    """Memory of the fullest GPU against the step's time, by recomputation and offloading."""
    asked = study.trades[0]
    worth = [point for point in study.worth_it() if point.leaves]
    title = "No recomputation or offloading lowers memory here"
    lowest = min(study.trades, key=lambda point: point.peak_bytes)
    if lowest.leaves:
        cost = signed_percent(lowest.step_s / asked.step_s - 1)
        title = f"{lowest.name} needs least: {format_bytes(lowest.peak_bytes)}, at {cost} of step time"
    with house_style():
        figure = new_figure(9.6, 4.6)
        headline(figure, title)
        axes = figure.subplots()
        for family, colour in FAMILY_COLOURS.items():
            points = [point for point in study.trades if point.family == family]
            if points:
                axes.scatter(
                    [100 * (p.step_s / asked.step_s - 1) for p in points],
                    [p.peak_bytes / GIB for p in points],
                    s=46 if family == "asked" else 30,
                    color=colour,
                    zorder=4,  # above the names' backgrounds
                )
        axes.axhline(study.capacity_bytes / GIB, color=COLOURS["alert"], linewidth=1.3, linestyle=(0, (5, 3)))
        heights = [point.peak_bytes / GIB for point in study.trades]
        top = 1.1 * max(*heights, study.capacity_bytes / GIB)
        costs = [100 * (point.step_s / asked.step_s - 1) for point in study.trades]
        width = max(max(costs) - min(0.0, *costs), 5.0)
        axes.set_xlim(min(0.0, *costs) - 0.03 * width, max(costs) + 0.42 * width)
        axes.set_ylim(0, top)
        named = [point for point in study.trades if not point.leaves or point.peak_bytes < NAMED * asked.peak_bytes]
        wanted = [point.peak_bytes / GIB for point in named]
        for point, place in zip(named, spread(wanted, 0.05 * top, 0.03 * top, 0.98 * top), strict=True):
            axes.annotate(
                point.name or "as asked",
                (100 * (point.step_s / asked.step_s - 1), point.peak_bytes / GIB),
                xytext=(100 * (point.step_s / asked.step_s - 1) + 0.02 * width, place),
                fontsize=8.5,
                va="center",
                color=FAMILY_COLOURS[point.family],
                bbox=behind(),
            )
        axes.set_xlabel("Step time against the step asked for [%]")
        axes.set_ylabel("Peak memory of the fullest GPU [GiB]")
        light_grid(axes, "both")
    told = "; ".join(
        f"{point.name}: {format_bytes(point.peak_bytes)}, {signed_percent(point.step_s / asked.step_s - 1)}"
        for point in worth
    )
    return finish(figure, f"{title}. Worth it: {told or 'none'}.")


def over_skew(study: MemoryStudy) -> Picture:
    """The peak in half of the steps and in 99 of 100, over the skew of the experts' load."""
    points = study.over_skew
    low, high = points[0], points[-1]
    grown = high.p99_bytes - low.p99_bytes
    title = f"From Gini {low.gini:g} to {high.gini:g} the fullest GPU needs {format_bytes(grown)} more"
    if abs(grown) < 0.01 * low.p99_bytes:
        title = f"From Gini {low.gini:g} to {high.gini:g} the peak hardly moves: it lies outside the MoE layers"
    with house_style():
        figure = new_figure(9.6, 3.4)
        headline(figure, title)
        axes = figure.subplots()
        ginis = [point.gini for point in points]
        p50, p99 = ([getattr(point, name) / GIB for point in points] for name in ("p50_bytes", "p99_bytes"))
        axes.fill_between(ginis, p50, p99, color="#DDAA33", alpha=0.35, linewidth=0)
        axes.plot(ginis, p99, color=COLOURS["moe"], marker="o", markersize=4, label="99 of 100 steps stay under")
        axes.plot(ginis, p50, color=COLOURS["ink"], marker="o", markersize=4, label="half of the steps stay under")
        axes.axhline(study.capacity_bytes / GIB, color=COLOURS["alert"], linewidth=1.3, linestyle=(0, (5, 3)))
        axes.set_ylim(0, 1.12 * max(*p99, study.capacity_bytes / GIB))
        axes.set_xlabel("Gini of the experts' load (0: even)")
        axes.set_ylabel("Fullest GPU [GiB]")
        axes.legend(loc="lower right")
        light_grid(axes, "y")
    told = "; ".join(f"Gini {point.gini:g}: {format_bytes(point.p99_bytes)}" for point in points)
    return finish(figure, f"{title}. 99 of 100 steps stay under: {told}.")
