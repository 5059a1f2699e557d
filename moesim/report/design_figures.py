"""Figures of the design notebook: what size costs, axis by axis, and where the time of each design goes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from moesim.report.style import COLOURS, Picture, finish, headline, house_style, light_grid, new_figure, short_count
from moesim.study.design_axes import AXES, DesignCost, DesignPoint, DesignStudy, value_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AXIS_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "num_experts": "experts in a layer",
        "top_k": "experts a token uses",
        "expert_width": "width of an expert",
        "granularity": "pieces each expert is cut into",
        "shared_experts": "shared experts",
        "moe_every": "every n-th MoE layer kept",
        "capacity_factor": "capacity factor",
    }
)
_AXIS_COLOURS: Mapping[str, str] = MappingProxyType(
    {
        "num_experts": "#0072B2",
        "top_k": "#E69F00",
        "expert_width": "#009E73",
        "granularity": "#CC79A7",
        "shared_experts": "#56B4E9",
        "moe_every": "#882255",
        "capacity_factor": "#999933",
    }
)
_PARTS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "compute_s": ("computing", "compute"),
        "exposed_comm_s": ("exposed communication", "communication"),
        "wait_s": ("waiting for the slowest GPU", "wait_for_slowest"),
        "bubble_s": ("pipeline fill and drain", "pipeline_bubble"),
        "other_s": ("optimizer and host", "host"),
    }
)
_COST_LABEL = "GPU-hours per 1B tokens"


def change_words(point: DesignPoint) -> str:
    """A design for a reader: what was asked, or the axis in words and its value.

    >>> change_words(DesignPoint(axis="top_k", value=4.0))
    '4 experts a token uses'
    """
    if not point.axis:
        return "as asked"
    if point.axis == "moe_every":
        assert point.value is not None
        return f"every {'2nd' if point.value == 2 else f'{point.value:g}th'} MoE layer kept"
    if point.axis in ("capacity_factor", "expert_width"):
        return f"{AXIS_WORDS[point.axis]} {value_words(point.value)}"
    if point.axis == "granularity":
        assert point.value is not None
        return f"experts cut into {point.value:g}" if point.value >= 1 else f"{1 / point.value:g} experts made one"
    return f"{value_words(point.value)} {AXIS_WORDS[point.axis]}"


def three_digits(count: float) -> str:
    """A large count to three digits.

    >>> three_digits(671.03e9)
    '671B'
    """
    return short_count(float(f"{count:.3g}"))


def price_of_size(study: DesignStudy) -> Picture:
    """GPU-hours per token over total parameters: each MoE design, and dense models of any of those sizes."""
    asked = study.asked.costs[0]
    own, active, total = (cost.gpu_hours_per_billion_tokens for cost in study.asked.costs)
    title = (
        f"At {three_digits(asked.total_parameters)} parameters a token costs {own / total:.2f} × as much as in a dense "
        f"model as large, {own / active:.2f} × as much as in one as large as the active part"
    )
    with house_style():
        figure = new_figure(9.6, 4.4)
        headline(figure, title)
        axes = figure.subplots()
        axes.set_xscale("log")
        axes.set_yscale("log")
        dense = {cost.total_parameters: cost for point in (study.asked, *study.possible) for cost in point.costs[1:]}
        sizes = sorted(dense)
        axes.plot(
            sizes,
            [dense[size].gpu_hours_per_billion_tokens for size in sizes],
            color=COLOURS["dense_active"],
            linewidth=1.4,
            marker=".",
            label="dense models",
            zorder=1,
        )
        for axis, colour in _AXIS_COLOURS.items():
            mine = [point.costs[0] for point in study.possible if point.axis == axis]
            if mine:
                axes.scatter(
                    [cost.total_parameters for cost in mine],
                    [cost.gpu_hours_per_billion_tokens for cost in mine],
                    s=46,
                    facecolors=[colour if cost.fits else "white" for cost in mine],
                    edgecolors=colour,
                    label=AXIS_WORDS[axis],
                    zorder=2,
                )
        axes.scatter(
            [asked.total_parameters],
            [own],
            s=150,
            marker="*",
            color=COLOURS["moe"],
            label="as asked",
            zorder=3,
        )
        axes.set_xlabel("Parameters, total")
        axes.set_ylabel(_COST_LABEL)
        axes.xaxis.set_major_formatter(lambda x, _: short_count(x))
        _round_ticks(axes)
        all_fit = all(point.costs[0].fits for point in (study.asked, *study.possible))
        told = "Varied" if all_fit else "Varied (hollow: does not fit)"
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), title=told, alignment="left")
        light_grid(axes, "both")
    return finish(figure, f"{title}.")


def over_axes(study: DesignStudy) -> Picture:
    """Cost of a token over each axis, beside the dense twins of equal active and of equal total size."""
    shown = [axis for axis in AXES if len(study.on(axis)) > 1]
    title = _strongest(study)
    columns = min(4, max(2, len(shown) + 1))
    lines = -(-(len(shown) + 1) // columns)  # one place for the legend
    with house_style():
        figure = new_figure(9.6, 0.7 + 2.2 * lines)
        headline(figure, title)
        grid = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
        for axes, axis in zip(grid, shown, strict=False):
            _one_axis(axes, study, axis)
        for i, axes in enumerate(grid):
            if i % columns == 0:
                axes.set_ylabel(_COST_LABEL)
        for axes in grid[len(shown) :]:
            axes.set_axis_off()
        handles, labels = grid[0].get_legend_handles_labels()
        grid[len(shown)].legend(handles, labels, loc="center", fontsize=9)
    return finish(figure, f"{title}. {_spoken(study)}")


def _one_axis(axes: Axes, study: DesignStudy, axis: str) -> None:
    points = study.on(axis)
    at = np.arange(len(points))
    moe = [point.costs[0] for point in points]
    axes.set_yscale("log")
    for which, label, dash in (
        (2, "dense, equal total size", (0, (1, 1.5))),
        (1, "dense, equal active size", (0, (4, 2))),
    ):
        hours = [point.costs[which].gpu_hours_per_billion_tokens for point in points]
        colour = COLOURS["dense_total" if which == 2 else "dense_active"]
        axes.plot(at, hours, color=colour, linewidth=1.5, linestyle=dash, label=label)
    hours = [cost.gpu_hours_per_billion_tokens for cost in moe]
    axes.plot(at, hours, color=COLOURS["moe"], linewidth=1.8, label="this MoE", zorder=2)
    axes.scatter(
        at,
        hours,
        s=30,
        facecolors=[COLOURS["moe"] if cost.fits else "white" for cost in moe],
        edgecolors=COLOURS["moe"],
        label="(hollow: does not fit)" if not all(cost.fits for cost in moe) else None,
        zorder=3,
    )
    own = [i for i, point in enumerate(points) if point.value == study.asked_values[axis]]
    axes.scatter(
        own,
        [hours[i] for i in own],
        s=150,
        marker="*",
        color=COLOURS["moe"],
        edgecolors="white",
        linewidth=0.6,
        label="as asked",
        zorder=4,
    )
    axes.set_xticks(at, [value_words(point.value) for point in points])
    axes.set_xlim(-0.4, len(points) - 0.6)
    axes.set_title(AXIS_WORDS[axis])
    _round_ticks(axes)
    light_grid(axes, "y")


def _round_ticks(axes: Axes) -> None:
    """1, 2 and 5 of each power of ten on a logarithmic axis, as plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.4g}")


def where_time_goes(study: DesignStudy) -> Picture:
    """GPU time of a token by part, design by design."""
    points = (study.asked, *study.possible)
    share = study.asked.costs[0].exposed_comm_s / study.asked.costs[0].step_s
    lost = study.asked.costs[0].wait_s / study.asked.costs[0].step_s
    title = f"As asked, exposed communication takes {share:.0%} and waiting for the slowest GPU {lost:.0%} of the step"
    with house_style():
        figure = new_figure(9.6, 1.2 + 0.27 * len(points))
        headline(figure, title)
        axes = figure.subplots()
        at = np.arange(len(points))[::-1]
        left = np.zeros(len(points))
        for part, (words, colour) in _PARTS.items():
            hours = np.array([_hours_of(point.costs[0], part) for point in points])
            axes.barh(at, hours, left=left, height=0.72, color=COLOURS[colour], label=words)
            left += hours
        for y, point, end in zip(at, points, left, strict=True):
            change = end / left[0] - 1
            told = f"{end:,.4g}" + (f"  ({change:+.0%})" if point.axis else "")
            if not point.costs[0].fits:
                told += "  does not fit"
            axes.annotate(told, (end, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
        axes.set_yticks(at, [change_words(point) for point in points])
        axes.get_yticklabels()[0].set_fontweight("bold")
        axes.set_xlim(0, 1.17 * left.max())
        axes.set_xlabel(_COST_LABEL)
        axes.legend(loc="upper center", bbox_to_anchor=(0.38, -0.5 / (0.27 * len(points))), ncols=5, fontsize=8.5)
        light_grid(axes, "x")
    return finish(figure, f"{title}. {_spoken(study)}")


def _hours_of(cost: DesignCost, part: str) -> float:
    """GPU-hours per thousand million tokens of one part; other_s is what no other part holds."""
    named = [getattr(cost, name) for name in _PARTS if name != "other_s"]
    seconds = max(cost.step_s - sum(named), 0.0) if part == "other_s" else getattr(cost, part)
    return float(seconds / cost.step_s * cost.gpu_hours_per_billion_tokens)


def _strongest(study: DesignStudy) -> str:
    """The axis whose points lie furthest apart, as a headline."""
    spans = {axis: study.spread_of(axis) for axis in AXES if len(study.on(axis)) > 1}
    if not spans:
        return "Nothing was varied"
    most = max(spans, key=lambda axis: spans[axis])
    return f"The cost of a token moves most with {AXIS_WORDS[most]}: by {spans[most]:.2g} × over what was tried"


def _spoken(study: DesignStudy) -> str:
    return "; ".join(
        f"{change_words(point)}: {point.costs[0].gpu_hours_per_billion_tokens:,.4g}"
        for point in (study.asked, *study.possible)
    )
