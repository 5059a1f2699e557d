"""Measure ``port`` against ``exact`` and write the section of docs/accuracy.md: ``python tools/make_port_accuracy.py``.

Its seed is not the one on which the rounds' constants were chosen (0).
"""

from __future__ import annotations

from pathlib import Path

from moesim.report.accuracy_page import write_section
from moesim.study.port_error import port_cases, port_errors, summarise_errors, worst_cases

ROOT = Path(__file__).resolve().parents[1]
SEED, NUM_SINGLE, NUM_MEETING = 1, 300, 100


def main() -> None:
    """Print the table and write it."""
    cases = [*port_cases(NUM_SINGLE, SEED), *port_cases(NUM_MEETING, SEED, at_once=2)]
    errors = [error for case in cases for error in port_errors(case)]
    rows = [
        f"| {row.group} | {row.num_cases} | {row.makespan_median:.2%} | {row.makespan_lowest:+.1%} to "
        f"{row.makespan_highest:+.1%} | {row.rank_median:.2%} | {row.rank_p95:.1%} | {row.rank_worst:.0%} |"
        for row in sorted(summarise_errors(errors), key=lambda row: row.group)
    ]
    worst = [
        f"{case['error']:+.1%} {case['pattern'].replace('_', ' ')}, {case['ranks']} ranks, {case['cross_rail']}"
        f"{' ' + format(case['oversubscription'], 'g') + ':1' if case['oversubscription'] > 1 else ''}"
        for case in worst_cases(errors)
    ]
    text = "\n".join(
        [
            "## The fabric: port against exact",
            "",
            f"Made by `tools/make_port_accuracy.py`: seed {SEED}, {len(cases)} exchanges of 8 to 64 ranks, ten "
            "patterns (`moesim/fabric/patterns.py`), PXN, direct and spine (1:1, 2:1, 4:1), 1 to 300 MB a rank. "
            "The truth is max-min fair sharing (`exact`). *Batched* is the closed form used inside a step on "
            "non-blocking fabrics; all else are rounds of shares.",
            "",
            "| | cases | last message, median | worst | each rank, median | 95th percentile | worst |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            "Furthest off: " + "; ".join(worst) + ".",
        ]
    )
    print(text)
    write_section(ROOT / "docs" / "accuracy.md", "port", text)


if __name__ == "__main__":
    main()
