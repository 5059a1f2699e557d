"""Score every carried measurement; write moesim/catalog/scores.csv and the sections and figures of docs/accuracy.md.

Run from the repository: python tools/make_accuracy.py. Needs no extra; where `measured` is installed, its full tables
are scored as well and named in the dispatch section.
"""

from __future__ import annotations

from pathlib import Path

from moesim.catalog.measured import SOURCE, measured_cases
from moesim.catalog.scores import COLUMNS, SCORES
from moesim.door import write_text_atomically
from moesim.door.records import read_records
from moesim.errors import InputError
from moesim.report.accuracy_figures import predicted_measured
from moesim.report.accuracy_page import accuracy_section, trace_section, write_section
from moesim.report.memory_page import memory_section
from moesim.study.accuracy import CARRIED, WITH_SCORES, Accuracy, carried_cases, score, summarise_errors
from moesim.study.accuracy_dispatch import express, has_fit_setting, scored
from moesim.study.accuracy_memory import memory_rows
from moesim.study.accuracy_step import FITS
from moesim.study.accuracy_trace import trace_rows

DOCS = Path(__file__).parent.parent / "docs"


def score_lines(accuracies: list[Accuracy]) -> list[str]:
    """scores.csv: one line per row of every kind."""
    lines = [",".join(COLUMNS)]
    for accuracy in accuracies:
        for row in sorted(accuracy.rows, key=lambda row: row.id):
            like = row.like
            flags = (like.is_moe, like.crosses_nodes, row.inside_envelope, row.used_in_fit)
            moe, crosses, inside, fitted = (str(int(flag)) for flag in flags)
            times = (f"{row.predicted:.5g}", f"{row.measured:.5g}")
            cells = (accuracy.kind, row.id, like.gpu, moe, crosses, like.precision, *times, inside, fitted)
            lines.append(",".join(cells))
    return lines


def said_of(accuracy: Accuracy) -> list[str]:
    """What the section says beside its tables."""
    if accuracy.kind == "layer":
        return ["Nothing is fitted. The MoE layer alone; attention is left out."]
    if accuracy.kind == "training":
        return [
            "The step's constants (moesim/catalog/step.yaml) are fitted by tools/make_step_constants.py on the rows "
            "that a rule names (moesim.study.accuracy_step.FITS): "
            + "; ".join(fit.rule for fit in FITS)
            + ". All else tests. A row outside the envelope did something that moesim does not model; it was predicted "
            "without it. docs/decisions/step-constants.md tells what was seen before the rules were chosen."
        ]
    deepep = [row for row in accuracy.tested if row.like.is_moe]
    nccl = [row for row in accuracy.tested if not row.like.is_moe]
    parts = [summarise_errors(name, rows) for name, rows in (("DeepEP", deepep), ("NCCL", nccl))]
    told = [
        "Fitted by tools/make_libraries.py on the rows that a rule names (moesim.study.accuracy_dispatch.fit_rows): "
        "within a library, an operation and a link rate the smallest and the middle number of ranks of one GPU, never "
        "the largest; all else tests. docs/decisions/library-constants.md tells which choices were made after seeing "
        "rows.",
        "; ".join(
            f"{part.name}: {part.num_rows} tested rows, median {part.median:.1%}, 90th percentile {part.p90:.1%}, "
            f"worst {part.worst:+.1%} (`{part.worst_id}`)"
            for part in parts
        )
        + ".",
        "Why the worst are the worst: the dispatch of one collection on 8 nodes ran at 19 GB/s of a 50 GB/s NIC "
        "(congested; its combine reached 46) and stays in; the combine of DeepEP's hybrid-ep branch at 24 ranks took "
        "2.3 times as long as at 16, which no port explains; NCCL on eight B200 needs longer to reach its rate than on "
        "two or four, on which its start was fitted.",
    ]
    try:
        cases = measured_cases()
    except InputError:
        return told
    exchanges = [express(row, SOURCE) for row in cases]
    elsewhere = [scored(exchange) for exchange in exchanges if not has_fit_setting(exchange)]
    whole = summarise_errors("all", [row for row in elsewhere if row.inside_envelope])
    told.append(
        f"On the extra `measured` ({SOURCE}, {len(exchanges):,} rows), rows inside the envelope with numbers of ranks "
        f"that had no part in the fit: {whole.num_rows:,} rows, median {whole.median:.1%}, 90th percentile "
        f"{whole.p90:.1%}, worst {whole.worst:+.1%}."
    )
    return told


if __name__ == "__main__":
    accuracies = [score(kind, carried_cases(kind), f"carried {kind}") for kind in WITH_SCORES]
    write_text_atomically(SCORES, "\n".join(score_lines(accuracies)) + "\n")
    for accuracy in accuracies:
        figure = f"figures/accuracy-{accuracy.kind}.svg"
        write_text_atomically(DOCS / figure, predicted_measured(accuracy).svg + "\n")
        write_section(
            DOCS / "accuracy.md", accuracy.kind, accuracy_section(accuracy, figure=figure, said=said_of(accuracy))
        )
    steps = {row.id: row for accuracy in accuracies if accuracy.kind == "training" for row in accuracy.rows}
    peaks = memory_rows(read_records(CARRIED / "memory.csv"), "memory.csv")
    write_section(DOCS / "accuracy.md", "memory", memory_section(peaks, steps))
    write_section(DOCS / "accuracy.md", "trace", trace_section(trace_rows(read_records(CARRIED / "trace.csv"))))
    print(f"wrote {SCORES}, docs/accuracy.md and its figures")
