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

FIRST_STEP, LAST_STEP = 0.2, 0.004  # of a constant's logarithm
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


def _is_b200_dense_70b(case: Case) -> bool:
    scenario = case.scenario
    return scenario.cluster.gpu.name == "b200" and scenario.model.name.startswith("llama-3-70b")


def _is_small_grok_in_bf16(case: Case) -> bool:
    scenario = case.scenario
    few = scenario.cluster.num_gpus <= 32 and scenario.train.precision == "bf16"
    return few and scenario.model.name == "grok-1"


def _is_in_bf16_on_gb200(case: Case) -> bool:
    scenario = case.scenario
    graphed = scenario.train.cuda_graphs != "none"
    return scenario.cluster.gpu.name == "gb200" and scenario.train.precision == "bf16" and graphed


def _is_ungraphed_on_grace(case: Case) -> bool:
    scenario = case.scenario
    return scenario.cluster.gpu.name in ("gb200", "gb300") and scenario.train.cuda_graphs == "none"


FITS = (
    Fit(
        keys=(
            ("product_fraction", "b200"),
            ("attention_fraction", "b200"),
            ("issue_s", "a100-80gb"),
            ("step_s", "a100-80gb"),
        ),
        rule="dense rows on B200: Llama-3 70B is fitted, Llama-3 405B tests",
        takes=_is_b200_dense_70b,
    ),
    Fit(
        keys=(("product_fraction", "a100-80gb"),),
        rule="Grok-1 proxies in BF16 on at most 32 H100 are fitted; larger ones and FP8 test",
        takes=_is_small_grok_in_bf16,
    ),
    Fit(
        keys=(("product_fraction", "gb200"),),
        rule="BF16 on GB200 with CUDA graphs is fitted, FP8 and GB300 test",
        takes=_is_in_bf16_on_gb200,
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
            found.append(Case(id=name, release=release_of(row), scenario=scenario, measured_s=step_s(row, name)))
        except MoesimError:
            continue
    return tuple(found)


def fitted_constants(
    constants: Sequence[StepConstant], cases: Sequence[Case], without: str | None = None
) -> tuple[StepConstant, ...]:
    """The constants with all values of FITS fitted, from the values given; without: a release that is left out.

    A group that loses all its rows keeps the values given.
    """
    now = tuple(constants)
    for fit in FITS:
        taken = [case for case in cases if fit.takes(case)]
        kept = [case for case in taken if case.release != without]
        if kept:
            now = _fitted(now, fit.keys, kept)
        if without is None:
            names = tuple(case.id for case in taken)
            now = tuple(replace(c, fitted_on=names) if key_of(c) in fit.keys else c for c in now)
    return now


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


def left_out_errors(constants: Sequence[StepConstant], cases: Sequence[Case]) -> Mapping[str, Mapping[str, float]]:
    """Signed errors by release and row, each predicted with the constants fitted without any row of its release."""
    errors = {}
    for release in dict.fromkeys(case.release for case in cases):
        own = [case for case in cases if case.release == release]
        others = fitted_constants(constants, cases, without=release)
        errors[release] = {case.id: _predicted_s(case, others) / case.measured_s - 1.0 for case in own}
    return errors
