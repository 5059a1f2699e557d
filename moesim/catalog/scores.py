"""How far moesim was off on the measurements that it carries, row by row, and which rows are like a question.

``scores.csv`` is made by tools/make_accuracy.py from moesim.study.accuracy; a test makes it again and compares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from moesim.door.records import read_records

SCORES = Path(__file__).parent / "scores.csv"
COLUMNS = (
    *("kind", "id", "gpu", "is_moe", "crosses_nodes", "precision"),
    *("predicted_s", "measured_s", "inside_envelope", "used_in_fit"),
)
LEAST_ROWS = 3  # fewer say nothing about rows to come


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """What makes one question like another: the same GPU, experts or none, nodes crossed or not, precision."""

    gpu: str
    is_moe: bool
    crosses_nodes: bool
    precision: str


@dataclass(frozen=True, kw_only=True)
class Score:
    """One measurement beside its prediction [s]."""

    kind: str
    id: str
    like: Likeness
    predicted_s: float
    measured_s: float
    inside_envelope: bool
    used_in_fit: bool

    @property
    def error_fraction(self) -> float:
        return self.predicted_s / self.measured_s - 1.0


@dataclass(frozen=True, kw_only=True)
class CasesLike:
    """Rows like a question: the narrowest set with at least LEAST_ROWS, and what they share, in words."""

    scores: tuple[Score, ...]
    shared: str
    same_gpu: bool

    @property
    def num_rows(self) -> int:
        return len(self.scores)

    @property
    def median_error(self) -> float:
        """Median absolute error."""
        return _quantile([abs(score.error_fraction) for score in self.scores], 0.5)

    @property
    def measured_over_predicted(self) -> tuple[float, float, float]:
        """(smallest, median, largest) factor from predicted to measured."""
        factors = [score.measured_s / score.predicted_s for score in self.scores]
        return min(factors), _quantile(factors, 0.5), max(factors)


@cache
def scores() -> tuple[Score, ...]:
    """Every scored row that moesim carries."""
    return tuple(
        Score(
            kind=row["kind"],
            id=row["id"],
            like=Likeness(
                gpu=row["gpu"],
                is_moe=row["is_moe"] == "1",
                crosses_nodes=row["crosses_nodes"] == "1",
                precision=row["precision"],
            ),
            predicted_s=float(row["predicted_s"]),
            measured_s=float(row["measured_s"]),
            inside_envelope=row["inside_envelope"] == "1",
            used_in_fit=row["used_in_fit"] == "1",
        )
        for row in read_records(SCORES, needed=COLUMNS)
    )


def cases_like(like: Likeness, kind: str = "training") -> CasesLike | None:
    """Scored rows of a kind, none used in a fit, that are like this one; None where there are fewer than LEAST_ROWS.

    >>> found = cases_like(Likeness(gpu="b200", is_moe=False, crosses_nodes=False, precision="bf16"))
    >>> found is not None and found.same_gpu
    True
    """
    rows = [score for score in scores() if score.kind == kind and not score.used_in_fit]
    model = "MoE" if like.is_moe else "dense"
    place = "across nodes" if like.crosses_nodes else "within a node"
    levels: Sequence[tuple[str, bool, Callable[[Likeness], bool]]] = (
        (f"{model}, {like.gpu}, {place}, {like.precision}", True, lambda other: other == like),
        (
            f"{model}, {like.gpu}, {place}",
            True,
            lambda other: (other.gpu, other.is_moe, other.crosses_nodes) == (like.gpu, like.is_moe, like.crosses_nodes),
        ),
        (f"{model}, {like.gpu}", True, lambda other: (other.gpu, other.is_moe) == (like.gpu, like.is_moe)),
        (f"any model, {like.gpu}", True, lambda other: other.gpu == like.gpu),
        (
            f"{model}, {place}, any GPU",
            False,
            lambda other: (other.is_moe, other.crosses_nodes) == (like.is_moe, like.crosses_nodes),
        ),
        ("any", False, lambda _: True),
    )
    for shared, same_gpu, fits in levels:
        found = tuple(score for score in rows if fits(score.like))
        if len(found) >= LEAST_ROWS:
            return CasesLike(scores=found, shared=shared, same_gpu=same_gpu)
    return None


def _quantile(values: Sequence[float], share: float) -> float:
    """Linear between the two nearest, as NumPy's; this file is read where nothing heavy may be loaded."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])
