"""Figures of the goodput notebook: where the time goes, how often to save, how runs advance."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from moesim.report.style import COLOURS, Picture, finish, headline, house_style, light_grid, new_figure, short_count
from moesim.units import DAY_S, MINUTE_S, format_seconds

if TYPE_CHECKING:
    from moesim.study.goodput import GoodputStudy
    from moesim.timeline.failures import RunOutcome

PART_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "repeated": "work done again after a failure",
        "slow": "slowed by a slow server",
        "checkpoint": "standing still to save",
        "detection": "until a failure is known",
        "spare": "bringing a spare server in",
        "restart": "restarting",
        "planned": "planned stops",
    }
)
_SHOWN_RUNS = 40


def lost_time(study: GoodputStudy) -> Picture:
    """Days lost to each cause, mean over runs."""
    total_days = float(np.mean([run.total_s for run in study.runs])) / DAY_S
    days = {part: study.parts_fraction[part] * total_days for part in PART_WORDS}
    order = sorted(days, key=lambda part: days[part])
    lost = sum(days.values())
    title = f"Of {total_days:,.1f} days, {lost:,.1f} are lost" + (
        f", most of it {PART_WORDS[order[-1]]}" if lost > 0 else ""
    )
    with house_style():
        figure = new_figure(9.6, 3.2)
        headline(figure, title)
        axes = figure.subplots()
        axes.barh(
            [PART_WORDS[part] for part in order], [days[part] for part in order], color=COLOURS["moe"], height=0.65
        )
        for i, part in enumerate(order):
            share = days[part] / total_days
            axes.annotate(
                f"{days[part]:,.2f} d ({share:.1%})",
                (days[part], i),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
            )
        axes.set_xlim(0, 1.25 * max(*days.values(), 1e-9))
        axes.set_xlabel("Days of the run, mean over runs")
        light_grid(axes, "x")
    return finish(
        figure, f"{title}. " + "; ".join(f"{PART_WORDS[p]}: {days[p]:.2f} days" for p in reversed(order)) + "."
    )


def interval(study: GoodputStudy) -> Picture:
    """Goodput over the checkpoint interval: the formula, the runs, Young's and Daly's choice."""
    at = np.array([point.interval_s for point in study.intervals]) / MINUTE_S
    low, middle, high = (
        np.array([getattr(point.simulated, name) for point in study.intervals]) for name in ("p10", "p50", "p90")
    )
    chosen = study.checkpoints.interval_s
    title = f"Saving every {format_seconds(chosen)} keeps {study.goodput_fraction.p50:.1%} of the time"
    with house_style():
        figure = new_figure(9.6, 3.6)
        headline(figure, title)
        axes = figure.subplots()
        axes.fill_between(at, low, high, color=COLOURS["dense_ffn"], alpha=0.3, linewidth=0, label="runs, P10 to P90")
        axes.plot(at, middle, color=COLOURS["attention"], linewidth=2, marker="o", label="runs, median")
        expected = [point.expected_fraction for point in study.intervals]
        axes.plot(
            at, expected, color=COLOURS["ink"], linewidth=1.2, linestyle=(0, (4, 3)), label="formula, spares at hand"
        )
        bottom, top = min(*low, *expected), max(*high, *expected)
        room = max(top - bottom, 0.01)
        axes.set_ylim(bottom - 0.25 * room, min(top + 0.1 * room, 1.0))
        marks = {"Young": study.young_interval_s, "best": study.best_interval_s}
        for i, (name, seconds) in enumerate(marks.items()):
            axes.axvline(seconds / MINUTE_S, color=COLOURS["quiet"], linewidth=0.9, linestyle=(0, (1, 2)))
            axes.annotate(
                f"{name} {format_seconds(seconds)}",
                (seconds / MINUTE_S, bottom - 0.22 * room),
                xytext=(4 if i else -4, 0),
                textcoords="offset points",
                ha="left" if i else "right",
                fontsize=9,
                color=COLOURS["quiet"],
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.set_xlabel("Training between two checkpoints [min]")
        axes.set_ylabel("Kept of all time")
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:.1%}")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
        light_grid(axes, "y")
    return finish(figure, f"{title}. Young: {format_seconds(study.young_interval_s)}.")


def progress(study: GoodputStudy) -> Picture:
    """Tokens over days, run by run."""
    runs = study.runs[:_SHOWN_RUNS]
    tokens = study.plan.tokens
    title = (
        f"{short_count(tokens)} tokens take {study.days.p10:,.0f} to {study.days.p90:,.0f} days "
        f"(without failures {study.ideal_s / DAY_S:,.0f})"
    )
    with house_style():
        figure = new_figure(9.6, 3.4)
        headline(figure, title)
        axes = figure.subplots()
        for run in runs:
            days, done = _advance(run)
            axes.plot(days, done * tokens, color=COLOURS["attention"], linewidth=0.8, alpha=0.45)
        axes.plot([], [], color=COLOURS["attention"], linewidth=1.2, label=f"{len(runs)} runs")
        axes.plot(
            [0, study.ideal_s / DAY_S],
            [0, tokens],
            color=COLOURS["ink"],
            linewidth=1.6,
            linestyle=(0, (4, 3)),
            label="without failures",
        )
        axes.set_xlabel("Days")
        axes.set_ylabel("Tokens trained")
        axes.yaxis.set_major_formatter(lambda y, _: short_count(y) if y else "0")
        axes.set_xlim(0)
        axes.set_ylim(0, 1.05 * tokens)
        axes.legend(loc="lower right")
        light_grid(axes, "both")
    return finish(figure, f"{title}.")


def _advance(run: RunOutcome) -> tuple[np.ndarray, np.ndarray]:
    """(days, share of the work that is done) of a run: even between outages, thrown back at each."""
    days, done, at, worked = [0.0], [0.0], 0.0, 0.0
    idle = sum(outage.end_s - outage.start_s for outage in run.outages)
    work_s = run.seconds["training"]
    speed = (work_s + sum(outage.lost_s for outage in run.outages)) / (run.total_s - idle)
    for outage in run.outages:
        worked += (outage.start_s - at) * speed
        kept = max(worked - outage.lost_s, 0.0)
        days += [outage.start_s / DAY_S, outage.start_s / DAY_S, outage.end_s / DAY_S]
        done += [worked / work_s, kept / work_s, kept / work_s]
        at, worked = outage.end_s, kept
    days.append(run.total_s / DAY_S)
    done.append(1.0)
    return np.array(days), np.minimum(np.array(done), 1.0)
