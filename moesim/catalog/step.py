"""What a whole training step loses against its best kernels, by GPU and by the software that trains.

Megatron-LM's are fitted on whole measured steps, DeepSeek's on kernels of its published trace. ``step.yaml`` is written
by tools/make_step_constants.py; each constant has a meaning and names the rows behind it. See docs/model.md#sustained
and #host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from moesim.catalog.hardware import sourced
from moesim.describe.hardware import Sourced
from moesim.describe.workload import Software
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
    """One constant: of which GPUs and software, what it means, its value and the rows that it was fitted on."""

    name: ConstantName
    gpus: tuple[str, ...]
    software: Software
    meaning: str
    value: Sourced
    fitted_on: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StepConstants:
    """The constants of one GPU under one software.

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
    software: Software = "megatron"
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


def step_constants(
    gpu: str, software: Software = "megatron", among: Sequence[StepConstant] | None = None
) -> StepConstants:
    """The constants of a GPU under a software, the catalog's or others; those of FALLBACK_GPU where none names it.

    What a software has no constant of its own for is as with Megatron-LM; kernels lose nothing.

    >>> step_constants("h800", "deepseek").stream_fraction > step_constants("h800").stream_fraction
    True
    """
    if software == "kernels":
        return NO_LOSS
    known = all_step_constants() if among is None else among
    if not any(gpu in constant.gpus for constant in known):
        return step_constants(FALLBACK_GPU, software, known)
    named = {
        constant.name: constant
        for own in ("megatron", software)
        for constant in known
        if constant.software == own and gpu in constant.gpus
    }
    values = {name: float(constant.value) for name, constant in named.items()}
    return StepConstants(**values, constants=tuple(named.values()))


@cache
def left_out_errors() -> Mapping[str, float]:
    """Signed errors of training rows, each predicted with constants fitted without any row of its release; rows of
    releases that no constant was fitted on are not in it.
    """
    return {row["id"]: float(row["error_fraction"]) for row in read_records(LEFT_OUT, needed=("id", "error_fraction"))}


def rows_of_fit(software: Software = "megatron") -> frozenset[str]:
    """Ids of the rows that a software's constants were fitted on: training steps, or kernels of DeepSeek's trace."""
    own = (constant for constant in all_step_constants() if constant.software == software)
    return frozenset(row for constant in own for row in constant.fitted_on)


def _constant(entry: _ConstantFile) -> StepConstant:
    dimension: Any = "s" if entry.name in ("issue_s", "step_s") else "fraction"
    owner = f"step.yaml: {entry.name}"
    return StepConstant(
        name=entry.name,
        gpus=entry.gpus,
        software=entry.software,
        meaning=entry.meaning,
        value=sourced(entry.value, dimension, owner, "value", ""),
        fitted_on=entry.fitted_on,
    )
