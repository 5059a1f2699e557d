"""Measure the fast path against the event engine and write the section of docs/accuracy.md:
``python tools/make_fast_accuracy.py`` (most of half an hour, nearly all of it the engine's).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moesim.report.accuracy_page import write_section
from moesim.study.fast_error import Difference, differences

ROOT = Path(__file__).resolve().parents[1]
NUMBER = 200
ROUTINGS: Mapping[str, tuple[Mapping[str, Any], int]] = {  # flat names, seed
    "balanced": ({"popularity": "balanced"}, 3),
    "lognormal, Gini 0.25": ({"gini": 0.25}, 4),
}


def main() -> None:
    """Print the table and write it."""
    found = {
        name: differences(popularity, NUMBER, seed, lambda told: print(told, file=sys.stderr))
        for name, (popularity, seed) in ROUTINGS.items()
    }
    text = section(found)
    print(text)
    write_section(ROOT / "docs" / "accuracy.md", "fast", text)


def section(found: Mapping[str, Sequence[Difference]]) -> str:
    """The section, in Markdown."""
    rows = []
    for name, some in found.items():
        for what, errors in (("step", [d.step_error for d in some]), ("peak memory", [d.peak_error for d in some])):
            median, p95 = np.quantile(np.abs(errors), (0.5, 0.95))
            told = f"{median:.2%} | {p95:.2%} | {min(errors):+.2%} to {max(errors):+.2%}"
            rows.append(f"| {name} | {what} | {len(some)} | {told} |")
    worst = sorted((d for some in found.values() for d in some), key=lambda d: -abs(d.step_error))[:4]
    told = [f"{d.step_error:+.2%} {d.model} {' '.join(f'{k}={v}' for k, v in d.changes.items())}" for d in worst]
    return "\n".join(
        [
            "## The fast path against the event engine",
            "",
            f"Made by `tools/make_fast_accuracy.py`: {NUMBER} random valid configurations of each routing, of four "
            "models on four clusters of 32 to 128 GPUs (`moesim/study/fast_error.py`); tp, pp, vpp, cp, ep, etp, zero, "
            "micro-batch, recomputation, dispatcher, schedule (1F1B, GPipe, ZB-H1) and GPUs are drawn. What one way "
            "refuses the other refuses in the same words.",
            "",
            "| routing | of | configurations | median error | 95th percentile | worst |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            "Steps furthest off: " + "; ".join(told) + ".",
            "",
        ]
    )


if __name__ == "__main__":
    main()
