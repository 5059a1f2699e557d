"""Tables of the accuracy notebook: errors by group, the worst rows, and rows without a prediction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesim.report.tables import _table as table_of
from moesim.study.accuracy import Accuracy

if TYPE_CHECKING:
    from great_tables import GT

NUM_WORST = 12


def groups(accuracy: Accuracy) -> GT:
    """Tested rows by release: how many, median, nine in ten, bias."""
    found = accuracy.groups()
    frame = {
        "": [group.name for group in found],
        "Rows": [str(group.num_rows) for group in found],
        "Median error": [f"{group.median:.1%}" for group in found],
        "Nine in ten": [f"{group.p90:.1%}" for group in found],
        "Bias": [f"{group.bias:+.1%}" for group in found],
    }
    return table_of("groups", frame, right=list(frame)[1:])


def worst(accuracy: Accuracy) -> GT:
    """The worst rows, those of a fit named so."""
    rows = accuracy.rows[:NUM_WORST]
    frame = {
        "Row": [row.id for row in rows],
        "Predicted": [row.words(row.predicted) for row in rows],
        "Measured": [row.words(row.measured) for row in rows],
        "Error": [f"{row.error_fraction:+.1%}" for row in rows],
        "Part in a fit": ["yes" if row.used_in_fit else "" for row in rows],
        "Not modelled": ["; ".join(row.reasons) for row in rows],
    }
    return table_of("worst", frame, right=["Predicted", "Measured", "Error"])


def not_expressed(accuracy: Accuracy) -> GT:
    """Rows without a prediction, and why."""
    frame = {"Row": [row.id for row in accuracy.not_expressed], "Why": [row.reason for row in accuracy.not_expressed]}
    return table_of("not_expressed", frame, right=[])
