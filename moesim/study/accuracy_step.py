"""The step's constants from the training rows that they may be fitted on, and errors with a whole release left out.

A fit is a group of constants and a rule that names its rows by their configuration. Groups follow one another; each
is fitted with the constants of those before it. The least mean log error counts, by pattern search: deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from moesim.catalog.step import ConstantName, StepConstant, step_constants
from moesim.door.records import Record
from moesim.errors import MoesimError
from moesim.scenario import Scenario
from moesim.study.accuracy_training import express, release_of, step_s
from moesim.timeline.step import run_step

FIRST_STEP, LAST_STEP = 0.06, 0.008  # of a constant's logarithm
SMOOTH_ERROR = 0.02  # errors count absolutely beyond, squared below

Key = tuple[ConstantName, str]  # a constant and the first of its GPUs


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training row that moesim can express."""

    id: str
    release: str
    scenario: Scenario
    measured_s: float


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Constants fitted together, on the rows that the rule takes."""

    keys: tuple[Key, ...]
    rule: str
    takes: Callable[[Case], bool]


def _is_70b_or_short_on_b200(case: Case) -> bool:
    scenario, micro_batches = case.scenario, case.scenario.num_micro_batches
    if scenario.cluster.gpu.name != "b200":
        return False
    if scenario.model.is_moe:
        return micro_batches == 4
    longer = scenario.train.seq_len > 4096
    return scenario.model.name.startswith("llama-3-70b") and (micro_batches == 8 or longer)


def _is_grok_in_bf16_on_32(case: Case) -> bool:
    scenario = case.scenario
    on_32 = scenario.cluster.num_gpus == 32 and scenario.train.precision == "bf16"
    return on_32 and scenario.model.name == "grok-1"


def _is_ungraphed_on_grace(case: Case) -> bool:
    scenario = case.scenario
    return scenario.cluster.gpu.name in ("gb200", "gb300") and scenario.train.cuda_graphs == "none"


FITS = (
    Fit(
        keys=(
            ("product_fraction", "b200"),
            ("attention_fraction", "b200"),
            ("stream_fraction", "a100-80gb"),
            ("issue_s", "a100-80gb"),
            ("step_s", "a100-80gb"),
        ),
        rule="8 B200: Llama-3 70B with 8 micro-batches or long sequences and DeepSeek-V3 with 4 are fitted; Llama-3 405B "
        "and all else test",
        takes=_is_70b_or_short_on_b200,
    ),
    Fit(
        keys=(("product_fraction", "a100-80gb"),),
        rule="the Grok-1 proxy in BF16 on 32 H100 is fitted; other sizes and FP8 test",
        takes=_is_grok_in_bf16_on_32,
    ),
    Fit(
        keys=(("issue_s", "gb200"),),
        rule="runs without CUDA graphs on Grace hosts are fitted",
        takes=_is_ungraphed_on_grace,
    ),
)


def cases_of(rows: Sequence[Record]) -> tuple[Case, ...]:
    """The rows that have a scenario and a step time."""
    found = []
    for row in rows:
        name = row.get("id", "?")
        try:
            scenario, _ = express(row, name)
            measured_s = step_s(row, name)
        except MoesimError:
            continue
        found.append(Case(id=name, release=release_of(row), scenario=scenario, measured_s=measured_s))
    return tuple(found)


def fitted_constants(constants: Sequence[StepConstant], cases: Sequence[Case]) -> tuple[StepConstant, ...]:
    """The constants with all values of FITS fitted, from the values given, and the rows of each."""
    now = tuple(constants)
    for fit in FITS:
        taken = [case for case in cases if fit.takes(case)]
        names = tuple(case.id for case in taken)
        now = tuple(replace(c, fitted_on=names) if key_of(c) in fit.keys else c for c in now)
        now = _fitted(now, fit.keys, taken)
    return now


def constants_without(
    constants: Sequence[StepConstant], cases: Sequence[Case], release: str
) -> tuple[StepConstant, ...]:
    """Fitted constants as they would be had no row of a release been known.

    Fits that lose some rows are made again; a constant that loses all is guessed from those of other GPUs (fractions,
    the host's time), 1 where there are none, and nothing once a step.
    """
    now = tuple(constants)
    for fit in FITS:
        taken = [case for case in cases if fit.takes(case)]
        kept = [case for case in taken if case.release != release]
        if len(kept) == len(taken):
            continue
        now = _fitted(now, fit.keys, kept) if kept else tuple(_guessed(c, now, fit.keys) for c in now)
    return now


def _guessed(constant: StepConstant, among: Sequence[StepConstant], lost: Sequence[Key]) -> StepConstant:
    if key_of(constant) not in lost:
        return constant
    others = [float(c.value) for c in among if c.name == constant.name and key_of(c) not in lost]
    neutral = 0.0 if constant.name == "step_s" else 1.0
    value = sum(others) / len(others) if others else neutral
    return replace(constant, value=replace(constant.value, value=value))


def key_of(constant: StepConstant) -> Key:
    return constant.name, constant.gpus[0]


def _fitted(
    constants: tuple[StepConstant, ...], keys: Sequence[Key], cases: Sequence[Case]
) -> tuple[StepConstant, ...]:
    best, best_error, step = constants, _error(constants, cases), FIRST_STEP
    while step > LAST_STEP:
        moved = False
        for key in keys:
            for factor in (math.exp(step), math.exp(-step)):
                tried = tuple(_scaled(c, factor) if key_of(c) == key else c for c in best)
                error = _error(tried, cases)
                if error < best_error - 1e-9:
                    best, best_error, moved = tried, error, True
                    break
        if not moved:
            step /= 2
    return best


def _scaled(constant: StepConstant, factor: float) -> StepConstant:
    return replace(constant, value=replace(constant.value, value=float(constant.value) * factor))


def _error(constants: Sequence[StepConstant], cases: Sequence[Case]) -> float:
    """Mean absolute log error, rounded off near none."""
    errors = [math.log(_predicted_s(case, constants) / case.measured_s) for case in cases]
    return sum(math.hypot(error, SMOOTH_ERROR) for error in errors) / len(errors)


def _predicted_s(case: Case, constants: Sequence[StepConstant]) -> float:
    of_gpu = step_constants(case.scenario.cluster.gpu.name, constants)
    return run_step(case.scenario, constants=of_gpu).step_s


def left_out_errors(constants: Sequence[StepConstant], cases: Sequence[Case]) -> Mapping[str, float]:
    """Signed errors of rows whose release was fitted on, predicted with the constants fitted without that release."""
    fitted_on = {row for constant in constants for row in constant.fitted_on}
    errors: dict[str, float] = {}
    for release in dict.fromkeys(case.release for case in cases if case.id in fitted_on):
        without = constants_without(constants, cases, release)
        own = [case for case in cases if case.release == release]
        errors |= {case.id: _predicted_s(case, without) / case.measured_s - 1.0 for case in own}
    return errors
