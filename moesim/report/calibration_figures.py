"""Figures of the calibration notebook: points and fitted curves, residuals of held-out points, whole layers.

Filled points were fitted, hollow ones held out; a line is what the profile predicts between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from moesim.cost.profile import CurveKind, Direction
from moesim.report.style import COLOURS, Picture, finish, headline, house_style, light_grid, new_figure
from moesim.study.calibration import GOAL_P90_FRACTION, CalibrationStudy, PredictedPoint
from moesim.units import MILLI

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
KIND_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "grouped": "grouped products",
        "grouped_skewed": "uneven grouped products",
        "dense": "dense products",
        "router": "router",
        "permute": "permute",
        "combine": "combine",
        "activation": "activation",
        "copy": "copy",
        "all_to_all": "all-to-all",
        "all_to_all_skewed": "uneven all-to-all",
        "layer": "whole layers",
    }
)
_SIZES: Mapping[str, str] = MappingProxyType(
    {"dense": "rows", "activation": "rows", "copy": "bytes moved", "all_to_all": "bytes through the busiest rank"}
)
_SHADES = ("#9ECAE1", "#4292C6", "#08519C", "#E69F00", "#D55E00", "#882255")  # by number of experts with tokens
_PARTS: Mapping[str, str] = MappingProxyType(
    {
        "router": COLOURS["router"],
        "permute": COLOURS["permute"],
        "first product": COLOURS["experts"],
        "activation": COLOURS["dense_ffn"],
        "second product": COLOURS["shared_experts"],
        "combine": COLOURS["combine"],
        "sum of gradients": COLOURS["gradient_reduction"],  # in the backward alone
    }
)


def products(study: CalibrationStudy) -> Picture:
    """Share of the run's own roofline that grouped products reach, over tokens per expert, with the fitted curves."""
    shape = study.profile.shapes[0]
    pairs = ((shape.hidden, 2 * shape.expert_width), (shape.expert_width, shape.hidden))
    by_size: dict[int, list[float]] = {}
    for p in study.of("grouped", "forward"):
        by_size.setdefault(p.point.size, []).append(_share(study, p))
    median = {size: float(np.median(shares)) for size, shares in by_size.items()}
    least = min(median, key=lambda size: median[size])
    title = (
        f"Grouped products reach {median[max(median)]:.0%} of the run's roofline at {max(median):,} tokens per expert, "
        f"least at {least:,}: {median[least]:.0%}"
    )
    with house_style():
        figure = new_figure(9.6, 5.6)
        panels = np.atleast_2d(figure.subplots(2, 2, sharex=True, sharey=True))
        headline(figure, title)
        for row, direction in zip(panels, DIRECTIONS, strict=True):
            for axes, (width_in, width_out) in zip(row, pairs, strict=True):
                _product_panel(axes, study, direction, width_in, width_out)
        panels[0, 0].set_ylim(bottom=0.0)  # of all panels, once each has said how high it goes
        panels[0, 0].legend(title="experts with tokens", title_fontsize=9, loc="lower right", ncols=2)
        for axes in panels[1]:
            axes.set_xlabel("Tokens per expert")
        for axes in panels[:, 0]:
            axes.set_ylabel("Share of roofline")
    return finish(figure, f"{title}. Measured on {study.profile.device.name} in {study.profile.dtype}.")


def _product_panel(axes: Axes, study: CalibrationStudy, direction: Direction, width_in: int, width_out: int) -> None:
    mine = [p for p in study.of("grouped", direction) if (p.point.width_in, p.point.width_out) == (width_in, width_out)]
    for number, num_active in enumerate(sorted({p.point.num_active for p in mine})):
        column = [p for p in mine if p.point.num_active == num_active]
        colour = _SHADES[number % len(_SHADES)]
        sizes = np.geomspace(column[0].point.size, column[-1].point.size, 100)
        load_CE = np.repeat(sizes[:, None], num_active, axis=1)
        widths = {"width_in": width_in, "width_out": width_out}
        ideal_s = num_active * study.profile.fit.ideal_s("grouped", direction, sizes, width_in, width_out)
        predicted_s = study.profile.part_s("grouped", load_CE, direction=direction, **widths).seconds
        axes.plot(sizes, ideal_s / predicted_s, color=colour, linewidth=1.2, label=str(num_active))
        _marks(axes, column, [_share(study, p) for p in column], colour)
    axes.axhline(1.0, color=COLOURS["quiet"], linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_title(f"{direction}, {width_in} to {width_out}")
    light_grid(axes, "y")


def _share(study: CalibrationStudy, p: PredictedPoint) -> float:
    """Of the roofline: ideal seconds over measured ones."""
    widths = (p.point.width_in, p.point.width_out)
    ideal_s = study.profile.fit.ideal_s("grouped", p.point.direction, np.array(float(p.point.size)), *widths)
    return p.point.num_active * float(ideal_s) / p.point.median_s


def parts(study: CalibrationStudy) -> Picture:
    """Seconds over size of everything else that was timed: points and curves, forward and backward."""
    kinds = [kind for kind in get_args(CurveKind) if kind != "grouped" and study.of(kind, "forward")]
    title = "Small operations take a fixed time, large ones time in proportion: measured and fitted"
    num_rows = -(-len(kinds) // 4)
    with house_style():
        figure = new_figure(9.6, 2.6 * num_rows + 0.5)
        panels = np.atleast_1d(figure.subplots(num_rows, 4)).ravel()
        headline(figure, title)
        for axes, kind in zip(panels, kinds, strict=False):
            _part_panel(axes, study, kind)
        for axes in panels[len(kinds) :]:
            axes.axis("off")
        panels[0].legend()
    told = ", ".join(KIND_WORDS[kind] for kind in kinds)
    return finish(figure, f"{title}: {told}.")


def _part_panel(axes: Axes, study: CalibrationStudy, kind: CurveKind) -> None:
    for direction, colour in zip(DIRECTIONS, (COLOURS["compute"], COLOURS["moe"]), strict=True):
        points = study.of(kind, direction)
        if not points:
            continue
        last = points[-1].point  # of several pairs of widths the one timed last
        mine = [p for p in points if (p.point.width_in, p.point.width_out) == (last.width_in, last.width_out)]
        sizes = np.geomspace(mine[0].point.size, mine[-1].point.size, 100)
        widths = {"width_in": last.width_in, "width_out": last.width_out}
        seconds = study.profile.part_s(kind, sizes[:, None], direction=direction, **widths).seconds
        axes.plot(sizes, seconds / MILLI, color=colour, linewidth=1.2, label=direction)
        _marks(axes, mine, [p.point.median_s / MILLI for p in mine], colour)
    axes.set(xscale="log", yscale="log", xlabel=_SIZES.get(kind, "tokens"), ylabel="ms")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(lambda *_: "")  # powers of ten are enough
    axes.set_title(KIND_WORDS[kind])
    light_grid(axes, "y")


def _marks(axes: Axes, points: Sequence[PredictedPoint], values: Sequence[float], colour: str) -> None:
    for held_out, face in ((False, colour), (True, "white")):
        chosen = [(p.point.size, v) for p, v in zip(points, values, strict=True) if p.point.held_out == held_out]
        if chosen:
            style: dict[str, Any] = {"markersize": 4.5, "markerfacecolor": face, "markeredgecolor": colour}
            axes.plot(*zip(*chosen, strict=True), linestyle="none", marker="o", **style)


def residuals(study: CalibrationStudy) -> Picture:
    """Error of every held-out point by kind; a grey bar as wide as repeating the measurement disagrees."""
    rows = study.profile.errors
    inside = len(rows) - len(study.beyond_goal)
    title = f"{inside} of {len(rows)} kinds are predicted as closely as hoped on points the fit never saw"
    with house_style():
        figure = new_figure(9.6, 0.3 * len(rows) + 1.3)
        axes = figure.subplots()
        headline(figure, title)
        for y, row in enumerate(rows):
            errors = [p.error_fraction for p in study.of(row.kind, row.direction) if p.point.held_out]
            colour = COLOURS["alert"] if row in study.beyond_goal else COLOURS["compute"]
            axes.barh(y, 2 * row.noise_fraction, left=-row.noise_fraction, height=0.7, color="#E4E4E4")
            axes.plot(errors, [y] * len(errors), linestyle="none", marker="o", markersize=4, color=colour, alpha=0.55)
            axes.plot(row.bias_fraction, y, marker="|", markersize=12, markeredgewidth=2, color=colour)
        for limit in (-GOAL_P90_FRACTION, 0.0, GOAL_P90_FRACTION):
            axes.axvline(limit, color=COLOURS["quiet"], linewidth=0.8, linestyle=(0, (4, 3)) if limit else "solid")
        axes.set_yticks(range(len(rows)), [f"{KIND_WORDS[row.kind]}, {row.direction}" for row in rows])
        axes.set(xlabel="Predicted over measured time, less 1", ylim=(len(rows) - 0.4, -0.6))
        axes.set_title("point: a held-out shape; stroke: their median; grey: noise of repeating; dashed: 15%")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:+.0%}")
        light_grid(axes, "x")
    worst = max(rows, key=lambda row: row.median_fraction)
    alt = f"{title}; largest median {worst.median_fraction:.1%}, {KIND_WORDS[worst.kind]} {worst.direction}."
    return finish(figure, alt)


def layers(study: CalibrationStudy) -> Picture:
    """Each timed layer as the sum of its predicted parts, over its measured time."""
    medians = {d: float(np.median([p.error_fraction for p in study.of("layer", d)])) for d in DIRECTIONS}
    told = " and ".join(f"{medians[d]:+.0%} {d}" for d in DIRECTIONS).replace("-", "−")
    title = f"A whole layer against the sum of its parts: {told}"
    with house_style():
        figure = new_figure(9.6, 3.8)
        panels = figure.subplots(1, 2, sharey=True)
        headline(figure, title)
        for axes, direction in zip(panels, DIRECTIONS, strict=True):
            timed = study.of("layer", direction)
            bottom = np.zeros(len(timed))
            for name, colour in _PARTS.items():
                share = np.array([p.parts_s.get(name, 0.0) / p.point.median_s for p in timed])
                axes.bar(range(len(timed)), share, bottom=bottom, color=colour, width=0.7, label=name)
                bottom += share
            axes.axhline(1.0, color=COLOURS["ink"], linewidth=1.1)
            axes.set_xticks(range(len(timed)), [f"{p.point.size:,}" for p in timed])
            axes.set(xlabel="Tokens")
            axes.set_title(f"{direction}; line: the layer as measured")
        panels[0].set_ylabel("Share of the measured time")
        panels[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return finish(figure, f"{title}.")
