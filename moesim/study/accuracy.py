"""Predicted against measured: rows of any kind, their errors, and what they say together.

A row's error is predicted over measured - 1. Whether a row lies inside the envelope depends on its configuration alone;
rows that moesim cannot express are listed with the reason, never left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from moesim.catalog.scores import Likeness
from moesim.door.records import Record, read_records
from moesim.errors import check, near_match
from moesim.units import format_bytes, format_seconds

Kind = Literal["dispatch", "layer", "training", "memory", "trace"]
KINDS: tuple[Kind, ...] = get_args(Kind)
WITH_SCORES: tuple[Kind, ...] = ("dispatch", "layer", "training")  # whose rows other questions are compared with
NEEDED: Mapping[Kind, tuple[str, ...]] = {
    "dispatch": ("op", "gpu", "ep_size"),
    "layer": ("gpu", "forward_ms", "ep"),
    "training": ("id", "model", "gpu"),
    "memory": ("gpu",),
    "trace": ("id", "what", "ms"),
}
BINDS_FROM = 0.2  # of a step: from here on a part besides kernels names the row
CARRIED = Path(__file__).parent.parent / "catalog" / "measurements"


@dataclass(frozen=True, kw_only=True)
class AccuracyRow:
    """One measurement and its prediction, in its unit. group: what its errors are summed up with (a release and
    operation).
    """

    id: str
    group: str
    predicted: float
    measured: float
    inside_envelope: bool
    used_in_fit: bool
    source: str
    reasons: tuple[str, ...] = ()  # why outside the envelope
    like: Likeness  # what other questions are compared with
    parts_s: Mapping[str, float] = field(default_factory=dict)  # of the prediction, by what the GPU does
    left_out_error: float | None = None  # with constants fitted without any row of its release; None: none was fitted
    unit: Literal["s", "bytes"] = "s"

    @property
    def error_fraction(self) -> float:
        return self.predicted / self.measured - 1.0

    def words(self, value: float) -> str:
        """A value of this row's unit."""
        return format_bytes(value) if self.unit == "bytes" else format_seconds(value)

    def to_dict(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "group": self.group,
            "predicted": self.predicted,
            "measured": self.measured,
            "unit": self.unit,
            "error_fraction": self.error_fraction,
            "inside_envelope": self.inside_envelope,
            "used_in_fit": self.used_in_fit,
            "gpu": self.like.gpu,
            "reasons": list(self.reasons),
            "parts_s": dict(self.parts_s),
            "left_out_error": self.left_out_error,
            "source": self.source,
        }


@dataclass(frozen=True, kw_only=True)
class NotExpressed:
    """A row of a table that has no prediction, and why."""

    id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ErrorSummary:
    """Errors of some rows: how many, absolute median and 90th percentile, mean signed error, the worst one."""

    name: str
    num_rows: int
    median: float
    p90: float
    bias: float
    worst: float
    worst_id: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "num_rows": self.num_rows,
            "median_absolute_error": self.median,
            "p90_absolute_error": self.p90,
            "mean_error": self.bias,
            "worst_error": self.worst,
            "worst_id": self.worst_id,
        }


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """All rows of a table of one kind, the worst first, and those that could not be expressed."""

    kind: Kind
    rows: tuple[AccuracyRow, ...]
    not_expressed: tuple[NotExpressed, ...]

    @property
    def tested(self) -> tuple[AccuracyRow, ...]:
        """Rows whose measurement had no part in a fit."""
        return tuple(row for row in self.rows if not row.used_in_fit)

    def groups(self) -> tuple[ErrorSummary, ...]:
        """Tested rows by group, by name."""
        names = sorted({row.group for row in self.tested})
        return tuple(summarise_errors(name, [row for row in self.tested if row.group == name]) for name in names)

    @property
    def left_out(self) -> tuple[AccuracyRow, ...]:
        """Every row as if nothing of its release had been fitted on; nothing where no row says."""
        if all(row.left_out_error is None for row in self.rows):
            return ()
        errors = ((row, row.error_fraction if row.left_out_error is None else row.left_out_error) for row in self.rows)
        return tuple(replace(row, predicted=row.measured * (1.0 + error)) for row, error in errors)

    def summary(self) -> dict[str, Any]:
        """Counts, and the errors of tested, fitted, inside and outside rows; a part without rows is null."""
        parts = {
            "tested": self.tested,
            "tested_inside_envelope": [row for row in self.tested if row.inside_envelope],
            "tested_outside_envelope": [row for row in self.tested if not row.inside_envelope],
            "used_in_fit": [row for row in self.rows if row.used_in_fit],
            "leave_one_release_out": self.left_out,
        }
        errors = {name: summarise_errors(name, rows).to_dict() if rows else None for name, rows in parts.items()}
        return {
            "num_rows": len(self.rows),
            "num_not_expressed": len(self.not_expressed),
            "num_outside_envelope": sum(not row.inside_envelope for row in self.rows),
            **errors,
            "groups": [group.to_dict() for group in self.groups()],
        }

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "rows": [row.to_dict() for row in self.rows],
            "not_expressed": [{"id": row.id, "reason": row.reason} for row in self.not_expressed],
            "summary": self.summary(),
        }


Prediction = AccuracyRow | NotExpressed
Predict = Callable[[Record, str], Sequence[Prediction]]


def summarise_errors(name: str, rows: Sequence[AccuracyRow]) -> ErrorSummary:
    """The errors of at least one row together."""
    assert rows, f"no rows to sum up under {name}"
    errors = np.array([row.error_fraction for row in rows])
    worst = int(np.abs(errors).argmax())
    return ErrorSummary(
        name=name,
        num_rows=len(rows),
        median=float(np.median(np.abs(errors))),
        p90=float(np.quantile(np.abs(errors), 0.9)),
        bias=float(errors.mean()),
        worst=float(errors[worst]),
        worst_id=rows[worst].id,
    )


def rows_by_part(accuracy: Accuracy) -> dict[str, tuple[AccuracyRow, ...]]:
    """Tested rows that say what their prediction is made of, by its largest part besides kernels where that takes a
    fifth of the step, else by kernels.
    """
    found: dict[str, list[AccuracyRow]] = {}
    for row in accuracy.tested:
        if not row.parts_s:
            continue
        others = {name: seconds for name, seconds in row.parts_s.items() if name != "kernels"}
        largest = max(others, key=lambda name: others[name])
        binds = largest if others[largest] >= BINDS_FROM * row.predicted else "kernels"
        found.setdefault(binds, []).append(row)
    return {name: tuple(found[name]) for name in sorted(found)}


def score(kind: Kind, cases: Sequence[Record], owner: str) -> Accuracy:
    """Predict every row of a table of measurements and set it beside what was measured; the worst row first.

    kind ``dispatch``: exchanges and collectives alone; ``layer``: one MoE layer; ``training``: whole steps; ``memory``:
    peaks; ``trace``: kernels of DeepSeek-V3's overlapped pair. Raises InputError for a table that does not have the
    kind's columns.
    """
    check(kind in KINDS, "accuracy", "kind", "must be one of " + ", ".join(KINDS), kind, near_match(kind, KINDS))
    predict = _predictor(kind)
    named = ((row, row.get("id") or row.get("case") or "?") for row in cases)
    found = [result for row, name in named for result in predict(row, f"{owner}: {name}")]
    rows = [row for row in found if isinstance(row, AccuracyRow)]
    return Accuracy(
        kind=kind,
        rows=tuple(sorted(rows, key=lambda row: (-abs(row.error_fraction), row.id))),
        not_expressed=tuple(row for row in found if isinstance(row, NotExpressed)),
    )


def _predictor(kind: Kind) -> Predict:
    match kind:
        case "dispatch":
            from moesim.study.accuracy_dispatch import predict
        case "layer":
            from moesim.study.accuracy_layer import predict
        case "training":
            from moesim.study.accuracy_training import predict
        case "memory":
            from moesim.study.accuracy_memory import predict
        case "trace":
            from moesim.study.accuracy_trace import predict
    return predict


def carried_cases(kind: Kind) -> tuple[Record, ...]:
    """The measurements that moesim carries, each row with its source."""
    return read_records(CARRIED / f"{kind}.csv", needed=("source",))


def asked_cases(path: str, kind: Kind) -> tuple[Record, ...]:
    """A user's table of measurements, or the carried ones where path is "". Raises InputError as read_cases does."""
    check(kind in KINDS, "accuracy", "kind", "must be one of " + ", ".join(KINDS), kind, near_match(kind, KINDS))
    return read_cases(path, kind) if path else carried_cases(kind)


def read_cases(path: str | Path, kind: Kind) -> tuple[Record, ...]:
    """A user's table of measurements. Raises InputError where a column that the kind needs is missing."""
    return read_records(path, needed=NEEDED[kind])
