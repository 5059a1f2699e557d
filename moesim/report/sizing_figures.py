"""Figures of the sizing notebook: days and GPU-hours over size by kind, what binds, memory; and all numbers."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from moesim.report.style import COLOURS, Picture, finish, headline, house_style, light_grid, new_figure
from moesim.report.tables import _table
from moesim.study.sizing import GROUPS
from moesim.units import GIB, KILO, MEGA, format_seconds

if TYPE_CHECKING:
    from great_tables import GT

    from moesim.study.sizing import SizedRun, SizingStudy

_KINDS = ("attention", "moe", "optimizer", "recompute", "head", "permute", "quiet")
_GROUP_COLOURS: Mapping[str, str] = MappingProxyType(
    dict(zip(GROUPS, ("compute", "host", "communication", "wait_for_slowest", "pipeline_bubble"), strict=True))
)
_NOTHING = "Nothing that was tried is possible"


def days(study: SizingStudy) -> Picture:
    """Days over the number of GPUs, by kind, P10 to P90."""
    fastest = study.fastest
    title = "Nothing fits" if fastest is None or fastest.days is None else (
        f"{fastest.name} are done first: {fastest.days.p10:,.0f} to {fastest.days.p90:,.0f} days"
    )  # fmt: skip
    return _over_size(study, "days", title, "Days", 1.0)


def spent(study: SizingStudy) -> Picture:
    """GPU-hours, or cost where all are priced, over the number of GPUs, by kind."""
    priced = all(point.cost is not None for point in study.points if point.days is not None)
    name, unit = ("cost", study.run.currency) if priced else ("gpu_hours", "GPU-hours")
    most = max((getattr(p, name).p90 for p in study.points if getattr(p, name) is not None), default=0.0)
    scale, word = (MEGA, "million") if most >= MEGA else (KILO, "thousand")
    best = study.cheapest
    found = None if best is None else getattr(best, name)
    title = "Nothing fits in time" if best is None or found is None else (
        f"{best.name} take the least: {found.p10 / scale:,.3g} to {found.p90 / scale:,.3g} {word}"
    )  # fmt: skip
    return _over_size(study, name, title, f"{word.capitalize()} {unit}", scale)


def shares(study: SizingStudy) -> Picture:
    """Each step by group of parts, as shares of it."""
    points = [point for point in study.points if point.parts_s is not None and point.step_s]
    title = _NOTHING
    if points:
        most = max(points, key=lambda point: _share(point, "arithmetic"))
        title = f"Arithmetic takes at most {_share(most, 'arithmetic'):.0%} of a step ({most.name})"
    with house_style():
        figure = new_figure(9.6, 1.3 + 0.36 * max(len(points), 2))
        headline(figure, title)
        axes = figure.subplots()
        names = [point.name for point in points]
        left = [0.0] * len(points)
        for group in GROUPS:
            widths = [_share(point, group) for point in points]
            axes.barh(names, widths, left=left, color=COLOURS[_GROUP_COLOURS[group]], height=0.7, label=group)
            for i, width in enumerate(widths):
                if width >= 0.06:
                    ink = "white" if group in GROUPS[:3] else COLOURS["ink"]
                    axes.text(left[i] + width / 2, i, f"{width:.0%}", ha="center", va="center", fontsize=9, color=ink)
                left[i] += width
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_xlabel("Share of the step, mean over ranks")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
        figure.legend(loc="outside lower center", ncols=len(GROUPS), fontsize=9)
    return finish(figure, f"{title}.")


def memory(study: SizingStudy) -> Picture:
    """Peak memory of the fullest GPU against what one holds."""
    points = [point for point in study.points if point.peak_bytes is not None]
    over = [point for point in points if not point.fits]
    title = _NOTHING if not points else (
        "All fit" if not over else f"{len(over)} of {len(points)} need more memory than their GPU has"
    )  # fmt: skip
    with house_style():
        figure = new_figure(9.6, 1.2 + 0.36 * max(len(points), 2))
        headline(figure, title)
        axes = figure.subplots()
        for i, point in enumerate(points):
            assert point.peak_bytes is not None
            assert point.memory_bytes is not None
            peak, has = point.peak_bytes / GIB, point.memory_bytes / GIB
            axes.barh(i, peak, color=COLOURS["activations" if point.fits else "alert"], height=0.6)
            axes.plot([has, has], [i - 0.38, i + 0.38], color=COLOURS["ink"], linewidth=1.6)
            axes.annotate(f"{peak:,.0f} of {has:,.0f}", (max(peak, has), i), xytext=(5, 0),
                          textcoords="offset points", va="center", fontsize=9)  # fmt: skip
        axes.set_yticks(range(len(points)), [point.name for point in points])
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel("GiB of the fullest GPU; the line is what it holds")
        light_grid(axes, "x")
    return finish(figure, f"{title}.")


def table(study: SizingStudy) -> GT:
    """Every kind and size, one a line."""
    names = ("GPUs", "Fits?", "Step", "Days, P10 to P90", "Thousand GPU-hours", "Binds", "Note")
    frame: dict[str, list[str]] = {name: [] for name in names}
    for point in study.points:
        possible = point.days is not None and point.gpu_hours is not None and point.step_s is not None
        row = [point.name, "impossible", "–", "–", "–", "–", point.reason]
        if possible and point.days and point.gpu_hours and point.step_s:
            hours = point.gpu_hours
            row[1:6] = [
                "yes" if point.fits else "no",
                format_seconds(point.step_s),
                f"{point.days.p10:,.0f} to {point.days.p90:,.0f}",
                f"{hours.p10 / KILO:,.0f} to {hours.p90 / KILO:,.0f}",
                point.binds,
            ]
        for name, value in zip(names, row, strict=True):
            frame[name].append(value)
    if not any(frame["Note"]):
        del frame["Note"]
    right = ("Step", "Days, P10 to P90", "Thousand GPU-hours")
    return _table("sizing", frame, right=right, alert=("Fits?", ("no", "impossible")))


def _over_size(study: SizingStudy, name: str, title: str, unit: str, scale: float) -> Picture:
    """A ranged number over the number of GPUs, one line for each kind; hollow where it does not fit."""
    with house_style():
        figure = new_figure(9.6, 3.8)
        headline(figure, title)
        axes = figure.subplots()
        kinds = list(dict.fromkeys(point.cluster for point in study.points))
        sizes = sorted({point.num_gpus for point in study.points})
        for k, kind in enumerate(kinds):
            points = [p for p in study.points if p.cluster == kind and getattr(p, name) is not None]
            if not points:
                continue
            colour = COLOURS[_KINDS[k % len(_KINDS)]]
            aside = 1.0 + 0.025 * (k - (len(kinds) - 1) / 2)  # so that bars do not hide each other
            at = [point.num_gpus * aside for point in points]
            low, middle, high = (
                [getattr(getattr(point, name), q) / scale for point in points] for q in ("p10", "p50", "p90")
            )
            axes.plot(at, middle, color=colour, linewidth=1.5, label=points[0].gpu)
            axes.vlines(at, low, high, color=colour, linewidth=4, alpha=0.35)
            for x, y, point in zip(at, middle, points, strict=True):
                face = colour if point.fits else "white"
                axes.plot([x], [y], marker="o", markersize=7, color=colour, markerfacecolor=face)
        if study.deadline_days is not None and name == "days":
            axes.axhline(study.deadline_days, color=COLOURS["alert"], linewidth=1.2, linestyle=(0, (4, 3)))
        if name == "days":
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
            axes.yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if f"{y:e}"[0] in "235" else "")
        else:
            axes.set_ylim(bottom=0)
        axes.set_xscale("log")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axes.set_xlabel("GPUs (hollow: does not fit)")
        axes.set_ylabel(unit)
        figure.legend(loc="outside lower center", ncols=max(len(kinds), 1))
        light_grid(axes, "y")
    return finish(figure, f"{title}.")


def _share(point: SizedRun, group: str) -> float:
    assert point.parts_s is not None
    assert point.step_s
    return point.parts_s[group] / point.step_s
