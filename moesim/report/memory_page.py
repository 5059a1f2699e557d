"""The section of docs/accuracy.md on peak memory, and the one table that stands moesim and SimuMax beside each run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moesim.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from moesim.study.accuracy import AccuracyRow
    from moesim.study.accuracy_memory import MemoryRow


def memory_section(rows: Sequence[MemoryRow], steps: Mapping[str, AccuracyRow]) -> str:
    """Peaks by group, every row that is not beside SimuMax, then moesim and SimuMax beside each run of both.

    steps: predicted step times of training rows by id.
    """
    groups = list(dict.fromkeys(row.group for row in rows))
    lines = [
        "## Peak memory",
        "",
        "Torch's max_memory_allocated of the fullest rank. Nothing is fitted; number formats, loss and dispatcher are "
        "those of a run's recipe, as moesim/catalog/measurements/memory.csv says. The list of saved tensors was "
        "corrected while looking at the B200 rows, and what a MoE layer's forward and the optimizer step hold was "
        "found while looking at the H100 rows, so none of them is a test by unseen data.",
        "",
        "| rows | n | mean abs. error | worst |",
        "|---|---|---|---|",
    ]
    for group in groups:
        errors = np.array([row.error_fraction for row in rows if row.group == group])
        worst = errors[np.abs(errors).argmax()]
        lines.append(f"| {group} | {len(errors)} | {np.abs(errors).mean():.2%} | {worst:+.2%} |")
    alone = [row for row in rows if row.simumax_bytes is None]
    lines += ["", "| row | peak lies in | predicted | measured | error |", "|---|---|---|---|---|"]
    lines += [
        f"| `{row.id}` | {row.moment} | {format_bytes(row.predicted_bytes)} | {format_bytes(row.measured_bytes)} | "
        f"{row.error_fraction:+.1%} |"
        for row in alone
    ]
    lines += [
        "",
        "Moonlight's three rows have their peak in the optimizer step, where TransformerEngine makes bf16 moments "
        "fp32; so recomputation is predicted to save nothing of it, while 0.7 GB were measured.",
        "",
        *_beside_simumax([row for row in rows if row.simumax_bytes is not None], steps),
    ]
    return "\n".join(lines)


def _beside_simumax(rows: Sequence[MemoryRow], steps: Mapping[str, AccuracyRow]) -> list[str]:
    """One line a run: peak and step time as measured, with the errors of moesim and of SimuMax's own publication."""
    lines = [
        "### Beside SimuMax on 8 B200",
        "",
        "SimuMax's figures are those it published for these runs (docs/b200/b200_release_v1.2_summary.json at "
        "4dcaae5); where its step time stands empty it was not read. A star marks a step time that moesim's own "
        "constants were fitted on.",
        "",
        "| run | peak | moesim | SimuMax | step | moesim | SimuMax |",
        "|---|---|---|---|---|---|---|",
    ]
    memory: list[tuple[float, float]] = []
    time: dict[bool, list[tuple[float, float]]] = {False: [], True: []}  # fitted on, or not
    for row in rows:
        assert row.simumax_error_fraction is not None
        step = steps.get(row.id)
        measured_s = "" if step is None else format_seconds(step.measured)
        own = "" if step is None else f"{step.error_fraction:+.1%}{' *' if step.used_in_fit else ''}"
        theirs = "" if step is None or row.simumax_step_s is None else f"{row.simumax_step_s / step.measured - 1:+.1%}"
        lines.append(
            f"| `{row.id.removeprefix('simumax_')}` | {format_bytes(row.measured_bytes)} | {row.error_fraction:+.2%} | "
            f"{row.simumax_error_fraction:+.2%} | {measured_s} | {own} | {theirs} |"
        )
        memory.append((row.error_fraction, row.simumax_error_fraction))
        if step is not None and row.simumax_step_s is not None:
            time[step.used_in_fit].append((step.error_fraction, row.simumax_step_s / step.measured - 1))
    lines.append("")
    told = (
        ("Peak memory", "runs that both predict", memory),
        ("Step time", "runs that both predict and moesim was not fitted on", time[False]),
        ("Step time", "runs that moesim was fitted on", time[True]),
    )
    for what, which, pairs in told:
        if pairs:
            own_mean, their_mean = np.abs(np.array(pairs)).mean(axis=0)
            lines += [
                f"{what}, mean absolute error over the {len(pairs)} {which}: moesim {own_mean:.2%}, "
                f"SimuMax {their_mean:.2%}.",
                "",
            ]
    return lines
