"""What a whole training step loses against its best kernels, by GPU: constants fitted on whole measured steps.

``step.yaml`` is written by tools/make_step_constants.py; each constant has a meaning and names the rows behind it. See
docs/model.md#sustained and #host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from moesim.catalog.hardware import sourced
from moesim.describe.hardware import Sourced
from moesim.door import parse_as, read_yaml
from moesim.door.records import read_records
from moesim.errors import check

ConstantName = Literal["product_fraction", "attention_fraction", "stream_fraction", "issue_s", "step_s"]
NAMES: tuple[ConstantName, ...] = get_args(ConstantName)
FILE = Path(__file__).parent / "step.yaml"
LEFT_OUT = Path(__file__).parent / "left_out.csv"
FALLBACK_GPU = "h100-sxm"  # whose constants stand in, marked assumed, for a GPU that no constant names


@dataclass(frozen=True, kw_only=True)
class StepConstant:
    """One constant: of which GPUs, what it means, its value and the rows that it was fitted on."""

    name: ConstantName
    gpus: tuple[str, ...]
    meaning: str
    value: Sourced
    fitted_on: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StepConstants:
    """The constants of one GPU.

    product_fraction, attention_fraction: of the best rate of a kernel alone, kept up through a step (clocks under
    power). stream_fraction: bytes that fused kernels would move over those that a step's kernels move. issue_s: host
    time to issue one operation. step_s: what a step takes besides all that is counted.
    """

    product_fraction: float = 1.0
    attention_fraction: float = 1.0
    stream_fraction: float = 1.0
    issue_s: float = 0.0
    step_s: float = 0.0
    constants: tuple[StepConstant, ...] = ()

    def __post_init__(self) -> None:
        for name in ("product_fraction", "attention_fraction", "stream_fraction"):
            check(0 < getattr(self, name) <= 2, "step constants", name, "must lie in 0..2", getattr(self, name))
        for name in ("issue_s", "step_s"):
            check(getattr(self, name) >= 0, "step constants", name, "must not be negative", getattr(self, name))


NO_LOSS = StepConstants()  # kernels alone, no host


@dataclass(frozen=True, kw_only=True)
class _ConstantFile:
    name: ConstantName
    gpus: tuple[str, ...]
    meaning: str
    value: Any
    fitted_on: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _File:
    schema: Literal[1]
    constants: tuple[_ConstantFile, ...]


@cache
def all_step_constants() -> tuple[StepConstant, ...]:
    """Every constant of the catalog, in the file's order."""
    file = parse_as(_File, read_yaml(FILE), "step.yaml")
    return tuple(_constant(entry) for entry in file.constants)


def step_constants(gpu: str, among: Sequence[StepConstant] | None = None) -> StepConstants:
    """The constants of a GPU, the catalog's or others; those of FALLBACK_GPU where none names it.

    >>> 0 < step_constants("b200").product_fraction < 1
    True
    """
    known = all_step_constants() if among is None else among
    named = {constant.name: constant for constant in known if gpu in constant.gpus}
    if not named:
        return step_constants(FALLBACK_GPU, known)
    values = {name: float(constant.value) for name, constant in named.items()}
    return StepConstants(**values, constants=tuple(named.values()))


@cache
def left_out_errors() -> Mapping[str, float]:
    """Signed errors of training rows, each predicted with constants fitted without any row of its release; rows of
    releases that no constant was fitted on are not in it.
    """
    return {row["id"]: float(row["error_fraction"]) for row in read_records(LEFT_OUT, needed=("id", "error_fraction"))}


def rows_of_fit() -> frozenset[str]:
    """Ids of the training rows that some constant was fitted on."""
    return frozenset(row for constant in all_step_constants() for row in constant.fitted_on)


def _constant(entry: _ConstantFile) -> StepConstant:
    dimension: Any = "s" if entry.name in ("issue_s", "step_s") else "fraction"
    owner = f"step.yaml: {entry.name}"
    return StepConstant(
        name=entry.name,
        gpus=entry.gpus,
        meaning=entry.meaning,
        value=sourced(entry.value, dimension, owner, "value", ""),
        fitted_on=entry.fitted_on,
    )
