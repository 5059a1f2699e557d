"""docs/accuracy.md: one section per kind of comparison, each written between its own two marks.

A section is replaced whole and the others stay, so that tools that measure different things share the page.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moesim.door import read_text, write_text_atomically
from moesim.study.accuracy import rows_by_part, summarise_errors
from moesim.units import format_seconds

if TYPE_CHECKING:
    from moesim.study.accuracy import Accuracy, AccuracyRow, ErrorSummary
    from moesim.study.accuracy_trace import TraceRow

HEAD = (
    "# Accuracy\n\nPredicted against measured, written by the tools named in each section. Errors are predicted over "
)
HEAD += "measured - 1.\n"
NUM_WORST = 12
SUMMARISED = (
    *("tested", "tested_inside_envelope", "tested_outside_envelope", "used_in_fit"),
    "leave_one_release_out",  # every row, predicted without any row of its release
)
TITLES = {
    "dispatch": "Exchanges alone: dispatch, combine and NCCL collectives",
    "layer": "One MoE layer",
    "training": "Whole training steps",
    "memory": "Peak memory",
    "trace": "One overlapped pair of DeepSeek-V3",
}


def write_section(page: str | Path, name: str, text: str) -> None:
    """Put text between the marks of section ``name`` of a page, after the last section where it is new.

    >>> write_section("docs/accuracy.md", "port", "## Port against exact")  # doctest: +SKIP
    """
    path = Path(page)
    old = read_text(path) if path.is_file() else HEAD
    block = f"<!-- {name}: begin -->\n{text.strip()}\n<!-- {name}: end -->"
    marks = re.compile(rf"<!-- {re.escape(name)}: begin -->.*?<!-- {re.escape(name)}: end -->", re.DOTALL)
    new = marks.sub(lambda _: block, old) if marks.search(old) else f"{old.rstrip()}\n\n{block}\n"
    write_text_atomically(path, new)


def accuracy_section(accuracy: Accuracy, *, figure: str = "", said: Sequence[str] = ()) -> str:
    """The section of one kind: how good, by group, the worst rows, what could not be expressed.

    figure: a picture's path beside the page. said: paragraphs of the writer's own, after the first table.
    """
    summary = accuracy.summary()
    lines = [f"## {TITLES[accuracy.kind]}", ""]
    if figure:
        lines += [f"![Predicted against measured: {TITLES[accuracy.kind]}]({figure})", ""]
    lines += [
        f"{len(accuracy.rows)} rows, {len(accuracy.tested)} of them tested (no part in a fit), "
        f"{summary['num_outside_envelope']} outside the envelope, {len(accuracy.not_expressed)} not expressed.",
        "",
        "| rows | n | median abs. error | 90th percentile | mean (bias) | worst |",
        "|---|---|---|---|---|---|",
    ]
    for name in SUMMARISED:
        part = summary[name]
        if part is not None:
            lines.append(
                f"| {name.replace('_', ' ')} | {part['num_rows']} | {part['median_absolute_error']:.1%} | "
                f"{part['p90_absolute_error']:.1%} | {part['mean_error']:+.1%} | {part['worst_error']:+.1%} |"
            )
    lines += ["", *(line for paragraph in said for line in (paragraph, ""))]
    lines += ["Tested rows by release and operation:", "", *_group_table(accuracy.groups()), ""]
    lines += _part_table(accuracy)
    lines += [f"The worst {NUM_WORST} tested rows:", "", *_row_table(accuracy.tested[:NUM_WORST]), ""]
    if accuracy.not_expressed:
        lines += ["Rows without a prediction:", ""]
        lines += [f"- `{row.id}`: {row.reason}" for row in accuracy.not_expressed]
    return "\n".join(lines)


def _group_table(groups: Sequence[ErrorSummary]) -> list[str]:
    rows = [
        f"| {group.name} | {group.num_rows} | {group.median:.1%} | {group.p90:.1%} | {group.bias:+.1%} | "
        f"{group.worst:+.1%} (`{group.worst_id}`) |"
        for group in groups
    ]
    return ["| group | n | median | 90th percentile | bias | worst |", "|---|---|---|---|---|---|", *rows]


def _part_table(accuracy: Accuracy) -> list[str]:
    """Tested rows by what takes most of their step; nothing for kinds that have no parts."""
    kinds = {name: summarise_errors(name, rows) for name, rows in rows_by_part(accuracy).items()}
    if not kinds:
        return []
    return [
        "Tested rows by what takes a fifth or more of the predicted step besides kernels (`kernels`: nothing does):",
        "",
        *_group_table(list(kinds.values())),
        "",
    ]


def _row_table(rows: Sequence[AccuracyRow]) -> list[str]:
    body = [
        f"| `{row.id}` | {row.words(row.predicted)} | {row.words(row.measured)} | "
        f"{row.error_fraction:+.1%} | {'; '.join(row.reasons) or 'inside'} |"
        for row in rows
    ]
    return ["| row | predicted | measured | error | envelope |", "|---|---|---|---|---|", *body]


def trace_section(rows: Sequence[TraceRow]) -> str:
    """The section of one overlapped pair: every kind of kernel, and how much communication shows."""
    by_id = {row.id: row for row in rows}
    told = []
    for row in rows:
        error = f"{row.error_fraction:+.1%}{' *' if row.used_in_fit else ''}"
        seconds = f"{format_seconds(row.predicted_s)} | {format_seconds(row.measured_s)}"
        told.append(f"| {row.id} | {seconds} | {error} | {row.what} |")
    exposed, span = by_id["exposed communication"], by_id["span"]
    predicted_share = exposed.predicted_s / span.predicted_s
    measured_share = exposed.measured_s / span.measured_s
    idle_s = span.measured_s - by_id["computing"].measured_s
    busy_s = sum(by_id[kind].measured_s for kind in ("dispatch", "combine", "wait"))
    return "\n".join(
        [
            "## One overlapped pair of DeepSeek-V3",
            "",
            "A forward of four MoE layers beside a backward of four (DualPipe, EP64, H800, FP8, routing forced even): "
            f"the published profile of one rank ({span.source}) beside the same pair of a simulated step with "
            "`software: deepseek`. Its two constants are fitted on the kinds marked with a star, which are no test; "
            "nothing else is fitted to the trace. Spans of kernels alone and with the losses of Megatron-LM's steps "
            "stand last. That these two kinds are fitted was chosen after the table was seen, and which casts that "
            "software makes after their number in the trace ([why](decisions/fp8-casts.md)). Made by "
            "tools/make_accuracy.py from `moesim.study.accuracy_trace`.",
            "",
            f"Exposed communication: {predicted_share:.1%} of the span, measured {measured_share:.1%} "
            f"({abs(predicted_share - measured_share) * 100:.1f} points off).",
            "",
            "| kernels | predicted | measured | error | what |",
            "|---|---|---|---|---|",
            *told,
            "",
            "Waiting is that of a rank a little faster than the slowest ([model](model.md#leading-ranks)); the rule "
            "was found after the measured figure was seen, and nothing in it is fitted. Dependencies leave no "
            "communication exposed: what is predicted of it runs while kernels start. The trace agrees in kind: "
            f"computing stands still for {format_seconds(idle_s)}, communication runs in "
            f"{exposed.measured_s / idle_s:.1%} of that and in {busy_s / span.measured_s:.1%} of the whole, so these "
            "are gaps between its 923 computing kernels (5 us each; here 2 us at most, and fewer kernels), not waits "
            "for an exchange. Kernels of the trace ran beside collectives that held 20 of 132 multiprocessors; so do "
            "the predicted ones.",
        ]
    )
