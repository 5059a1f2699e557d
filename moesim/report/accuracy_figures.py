"""Predicted against measured: every row as a point, rows of a fit hollow, the worst ones named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
)
from moesim.units import format_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from moesim.study.accuracy import Accuracy

NUM_NAMED = 3
BAND = 0.25  # shaded around predicted = measured
WORST_SHOWN = 12
WHAT = {"dispatch": "Exchanges alone", "layer": "One MoE layer", "training": "Whole training steps"}


def predicted_measured(accuracy: Accuracy) -> Picture:
    """Predicted over measured seconds of every row, and beside it the signed errors of the tested rows, worst first.

    Needs at least one row.
    """
    tested = accuracy.tested or accuracy.rows
    errors = np.array([row.error_fraction for row in tested])
    median, p90 = np.median(np.abs(errors)), np.quantile(np.abs(errors), 0.9)
    fitted = len(accuracy.rows) - len(accuracy.tested)
    what = WHAT[accuracy.kind]
    title = f"{what}: half of {len(tested)} tested rows within {median:.0%} of the measured time, nine in ten {p90:.0%}"
    with house_style():
        figure = new_figure(9.6, 4.6)
        headline(figure, title)
        left, right = figure.subplots(1, 2, width_ratios=[1.15, 1.0])
        _scatter(left, accuracy)
        _worst(right, accuracy)
    worst = accuracy.rows[0]
    alt = f"{title}; {fitted} rows took part in a fit. Worst: {worst.id} {signed_percent(worst.error_fraction)}."
    return finish(figure, alt)


def _scatter(axes: Axes, accuracy: Accuracy) -> None:
    ends = [value for row in accuracy.rows for value in (row.predicted, row.measured)]
    span = np.array([min(ends) * 0.7, max(ends) * 1.4])
    axes.fill_between(span, span * (1 - BAND), span * (1 + BAND), color="#EEEEEE", lw=0, label=f"within {BAND:.0%}")
    axes.plot(span, span, color="#777777", lw=0.9)
    marks: list[tuple[str, bool, dict[str, Any]]] = [
        ("tested", False, {"color": COLOURS["moe"], "alpha": 0.75}),
        ("used in a fit", True, {"facecolors": "none", "edgecolors": "#777777"}),
    ]
    for label, used, look in marks:
        rows = [row for row in accuracy.rows if row.used_in_fit == used]
        if rows:
            axes.scatter(
                [row.measured for row in rows],
                [row.predicted for row in rows],
                s=16,
                linewidths=0.8,
                label=label,
                **look,
            )
    axes.set(xscale="log", yscale="log", xlim=span, ylim=span, xlabel="measured", ylabel="predicted")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: format_seconds(value))
        axis.set_minor_formatter(lambda *_: "")
    light_grid(axes, "both")
    axes.legend(loc="upper left")


def _worst(axes: Axes, accuracy: Accuracy) -> None:
    rows = (accuracy.tested or accuracy.rows)[:WORST_SHOWN][::-1]
    errors = [row.error_fraction for row in rows]
    axes.barh(range(len(rows)), errors, color=COLOURS["moe"], alpha=0.75, height=0.7)
    axes.axvline(0.0, color="#777777", lw=0.9)
    for at, row in enumerate(rows):
        inside = row.error_fraction < 0
        axes.annotate(
            f"{row.id}  {signed_percent(row.error_fraction)}",
            (0.0, at),
            xytext=(4 if inside else -4, 0),
            textcoords="offset points",
            ha="left" if inside else "right",
            va="center",
            fontsize=7,
            bbox=behind(),
        )
    reach = 1.15 * max(abs(error) for error in errors)
    axes.set(xlim=(-reach, reach), yticks=[], xlabel="predicted over measured - 1", title="the worst tested rows")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:+.0%}" if value else "0")
    light_grid(axes, "x")
