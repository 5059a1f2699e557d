"""Predicted against measured: every row as a point, rows of a fit hollow, the worst ones named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.report.sentences import Sentence
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

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from moesim.study.accuracy import Accuracy

NUM_NAMED = 3
BAND = 0.25  # shaded around predicted = measured
WORST_SHOWN = 12
PART_WORDS = {
    "kernels": "kernels",
    "communication": "communication",
    "host": "waiting for the host",
    "others": "waiting for other GPUs",
}
PART_COLOURS = {
    "kernels": COLOURS["compute"],
    "communication": COLOURS["communication"],
    "host": COLOURS["host"],
    "others": COLOURS["other"],
}
WHAT = {
    "dispatch": "Exchanges alone",
    "layer": "One MoE layer",
    "training": "Whole training steps",
    "memory": "Peak memory",
    "trace": "DeepSeek-V3's overlapped pair",
}


def predicted_measured(accuracy: Accuracy) -> Picture:
    """Predicted over measured values of every row, and beside it the signed errors of the tested rows, worst first.

    Needs at least one row.
    """
    tested = accuracy.tested or accuracy.rows
    errors = np.array([row.error_fraction for row in tested])
    median, p90 = np.median(np.abs(errors)), np.quantile(np.abs(errors), 0.9)
    fitted = len(accuracy.rows) - len(accuracy.tested)
    what, unit = WHAT[accuracy.kind], "peak" if tested[0].unit == "bytes" else "time"
    title = (
        f"{what}: half of {len(tested)} tested rows within {median:.0%} of the measured {unit}, nine in ten {p90:.0%}"
    )
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
    base = 4 if accuracy.rows[0].unit == "bytes" else 10  # 4, 16, 64 GiB
    axes.set_xscale("log", base=base)
    axes.set_yscale("log", base=base)
    axes.set(xlim=span, ylim=span, xlabel="measured", ylabel="predicted")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: accuracy.rows[0].words(value))
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


def by_release(accuracy: Accuracy) -> Picture:
    """Signed error of every row, a line for each group; rows of a fit hollow, and as crosses what they would be had
    nothing of their release been known. Needs at least one row.
    """
    names = sorted({row.group for row in accuracy.rows})
    worst = max(accuracy.rows, key=lambda row: abs(row.error_fraction))
    title = f"{len(names)} groups of rows: where errors gather, and which rows took part in a fit"
    with house_style():
        figure = new_figure(9.6, 1.4 + 0.3 * len(names))
        headline(figure, title)
        axes = figure.subplots()
        axes.axvline(0.0, color="#777777", lw=0.9)
        for label, rows, look in (
            ("tested", accuracy.tested, {"color": COLOURS["moe"], "alpha": 0.75, "marker": "o"}),
            (
                "used in a fit",
                [row for row in accuracy.rows if row.used_in_fit],
                {"facecolors": "none", "edgecolors": "#777777", "marker": "o"},
            ),
            (
                "its release left out",
                [row for row in accuracy.left_out if row.left_out_error is not None],
                {"color": COLOURS["compute"], "marker": "x", "alpha": 0.6},
            ),
        ):
            if rows:
                at = [names.index(row.group) for row in rows]
                axes.scatter([row.error_fraction for row in rows], at, s=18, linewidths=0.9, label=label, **look)
        axes.set(yticks=range(len(names)), yticklabels=names, xlabel="predicted over measured - 1")
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:+.0%}" if value else "0")
        light_grid(axes, "x")
        axes.legend(loc="lower right")
    return finish(figure, f"{title}. Worst: {worst.id} {signed_percent(worst.error_fraction)}.")


def made_of(accuracy: Accuracy) -> Picture | Sentence:
    """What predictions are made of, over the measured time: kernels, communication, host, waiting; the worst tested
    rows. A sentence where no row says its parts.
    """
    rows = [row for row in accuracy.tested if row.parts_s][:WORST_SHOWN][::-1]
    if not rows:
        return Sentence(text="Rows of this kind are each of one piece: what they are made of is not told apart.")
    parts = list(rows[0].parts_s)
    title = "What the worst predictions are made of, over the measured time"
    with house_style():
        figure = new_figure(9.6, 1.5 + 0.3 * len(rows))
        headline(figure, title)
        axes = figure.subplots()
        left = np.zeros(len(rows))
        for part in parts:
            shares = np.array([row.parts_s[part] / row.measured for row in rows])
            axes.barh(range(len(rows)), shares, left=left, height=0.7, color=PART_COLOURS[part], label=PART_WORDS[part])
            left += shares
        axes.axvline(1.0, color=COLOURS["ink"], lw=1.0, label="measured")
        axes.set(yticks=range(len(rows)), yticklabels=[row.id for row in rows], xlabel="share of the measured step")
        axes.tick_params(axis="y", labelsize=7)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        light_grid(axes, "x")
        axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.14), ncols=5)
    largest = max(parts, key=lambda part: sum(row.parts_s[part] / row.measured for row in rows))
    return finish(figure, f"{title}: {len(rows)} rows, mostly {PART_WORDS[largest]}.")
