"""The step's constants from the training rows that they may be fitted on, and errors with a whole release left out.

A fit is a group of constants and a rule that names its rows by their configuration. Groups follow one another; each
is fitted with the constants of those before it. The least sum of absolute log errors counts. Deterministic. DeepSeek's
constants come from its trace (moesim.study.accuracy_trace), not from steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moesim.catalog.step import ConstantName, StepConstant, step_constants
from moesim.door.records import Record
from moesim.errors import MoesimError
from moesim.scenario import Scenario
from moesim.study.accuracy_training import express, release_of, step_s
from moesim.timeline.step import run_step

STEP = 0.05  # of a constant's logarithm, to see how errors follow it
FARTHEST = 0.4  # that a constant's logarithm moves in one round
PASSES, ROUNDS, REWEIGHTINGS = 3, 2, 30
STAY = 0.02
SMOOTH_ERROR = 0.02  # errors count absolutely beyond, squared below

Floats = NDArray[np.float64]
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


def _is_dense_or_waits_for_its_host(case: Case) -> bool:
    """Llama-3 70B on 8 B200, its shortest and most runs left out; one micro-batch of a small model's many kernels."""
    scenario = case.scenario
    longer = scenario.train.seq_len > 4096
    of_70b = scenario.cluster.gpu.name == "b200" and scenario.model.name.startswith("llama-3-70b")
    short = scenario.num_micro_batches == 1 and scenario.train.recompute == "none"
    waits = scenario.model.name.startswith("moonlight") and short
    return waits or (of_70b and (scenario.num_micro_batches == 8 or longer))


def _is_small_even_moe(case: Case) -> bool:
    scenario, train = case.scenario, case.scenario.train
    plain = train.precision == "bf16" and train.recompute == "none" and "forward_backward" not in train.overlaps
    even = scenario.model.is_moe and scenario.routing.popularity.kind == "balanced"
    return plain and even and scenario.cluster.num_gpus <= 16 and scenario.num_micro_batches not in (1, 8)


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
        rule="8 B200, dense: Llama-3 70B with 8 micro-batches or long sequences, and Moonlight's single micro-batch on "
        "8 H100 without recomputation, which waits for its host",
        takes=_is_dense_or_waits_for_its_host,
    ),
    Fit(
        keys=(("product_fraction", "a100-80gb"), ("stream_fraction", "a100-80gb")),
        rule="MoE in BF16 on at most 16 GPUs, routing even, nothing recomputed nor beside exchanges, neither 1 nor 8 "
        "micro-batches",
        takes=_is_small_even_moe,
    ),
    Fit(
        keys=(("issue_s", "gb200"),),
        rule="runs without CUDA graphs on Grace hosts",
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
    for fit in FITS * PASSES:
        taken = [case for case in cases if fit.takes(case)]
        names = tuple(case.id for case in taken)
        now = tuple(replace(c, fitted_on=names) if key_of(c) in fit.keys else c for c in now)
        now = _fitted(now, fit.keys, taken)
    return now


def constants_without(
    constants: Sequence[StepConstant], cases: Sequence[Case], release: str
) -> tuple[StepConstant, ...]:
    """Fitted constants as they would be had no row of a release been known.

    Fits that lose some rows start anew from a guess, so that nothing of the release is left in what its other rows do
    not tell, and are made again on those; a constant that loses all stays the guess: that of other GPUs (fractions, the
    host's time), 1 where there are none, and nothing once a step.
    """
    now = tuple(constants)
    losing = [fit for fit in FITS if any(fit.takes(case) and case.release == release for case in cases)]
    for fit in losing:
        now = tuple(_guessed(constant, now, fit.keys) for constant in now)
    for fit in losing * PASSES:
        kept = [case for case in cases if fit.takes(case) and case.release != release]
        now = _fitted(now, fit.keys, kept) if kept else now
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
    """The constants with those of keys moved to the least sum of absolute log errors.

    Newton's way on the logarithms of the constants: errors are taken as straight lines around the values reached so
    far, solved by weighted least squares whose weights make squares absolute; a few rounds.
    """
    for _ in range(ROUNDS):
        errors_N = _log_errors(constants, cases)
        slopes_NK = np.array([(_log_errors(_moved(constants, {k: STEP}), cases) - errors_N) / STEP for k in keys]).T
        move_K: NDArray[np.floating] = np.zeros(len(keys))
        for _ in range(REWEIGHTINGS):
            weights_N = 1.0 / np.hypot(errors_N + slopes_NK @ move_K, SMOOTH_ERROR) ** 0.5
            held = STAY * np.eye(len(keys))  # what no row tells stays where it is
            rows = np.vstack([slopes_NK * weights_N[:, None], held])
            move_K = np.linalg.lstsq(rows, np.append(-errors_N * weights_N, np.zeros(len(keys))), rcond=None)[0]
        constants = _moved(constants, dict(zip(keys, np.clip(move_K, -FARTHEST, FARTHEST), strict=True)))
    return constants


def _moved(constants: tuple[StepConstant, ...], by: Mapping[Key, float]) -> tuple[StepConstant, ...]:
    """Each constant times e to the power of its move."""
    factors = {key: math.exp(move) for key, move in by.items()}
    return tuple(
        replace(c, value=replace(c.value, value=float(c.value) * factors.get(key_of(c), 1.0))) for c in constants
    )


def _log_errors(constants: Sequence[StepConstant], cases: Sequence[Case]) -> Floats:
    return np.array([math.log(_predicted_s(case, constants) / case.measured_s) for case in cases])


def _predicted_s(case: Case, constants: Sequence[StepConstant]) -> float:
    of_gpu = step_constants(case.scenario.cluster.gpu.name, among=constants)
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
