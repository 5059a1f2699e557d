"""From a step to a run of weeks: failures, checkpoints, days, money and energy to a number of tokens, with ranges.

Each of num_runs runs draws a step time (a seed of the engine, times what measured steps like this one took over their
predictions), a failure rate where the fleet is not known, and its own failures. Runs are numbered, and run i meets the
same luck whatever is asked: two questions differ by what was asked alone. See docs/model.md#goodput.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.catalog.failures import (
    checkpoint_facts,
    default_operations,
    fleet_names,
    load_fleet,
    mean_time_between_s,
)
from moesim.catalog.scores import cases_like
from moesim.describe.checks import check_number, check_whole
from moesim.describe.counts import describe
from moesim.describe.reliability import SERVER_GPUS, Checkpoints, Fleet, Operations
from moesim.errors import InputError, check, near_match
from moesim.metrics.scored import step_likeness
from moesim.scenario import Scenario
from moesim.seeds import stream
from moesim.study.simulate import simulate
from moesim.timeline.failures import RUN_PARTS, RunOutcome, run_with_failures
from moesim.units import DAY_S, GIGA, HOUR_S, KILO

Progress = Callable[[str], None]
Floats = NDArray[np.float64]
UNKNOWN = "unknown"  # the fleet of a cluster that nobody has measured
QUANTILES = (0.1, 0.5, 0.9)
NUM_STEP_SEEDS = 3
RAMP_STAGES = 4
HOST_LINK_BYTES_PER_S = 20 * GIGA  # of one GPU's state to host memory, before an asynchronous write
LONGEST_INTERVAL_S = 2 * DAY_S


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What is to be trained, on machines that fail how often, saved how, paid how. None: the best, or not asked."""

    tokens: float
    fleet: str = UNKNOWN  # or one of catalog.failures.fleet_names()
    inspected: bool = False  # machines are watched: failures are known within a minute
    num_spares: int | None = None  # servers of 8; None: one of a hundred
    checkpoint_interval_s: float | None = None  # None: the best
    checkpoint_write_bytes_per_s: float | None = None  # of the storage, for the whole job
    checkpoint_async: bool = True  # training stands still only while state is copied to host memory
    ramp_tokens: float = 0.0  # over which the batch grows from ramp_batch to the scenario's
    ramp_batch: int | None = None
    price_per_gpu_hour: float | None = None
    currency: str = "USD"
    pue: float = 1.25  # of the building, over what its machines draw
    host_w_per_gpu: float = 0.0  # of hosts and network, besides the GPU
    num_runs: int = 32

    def __post_init__(self) -> None:
        for name in ("tokens", "ramp_tokens", "pue", "host_w_per_gpu"):
            check_number("goodput", name, getattr(self, name))
        check(self.tokens > 0, "goodput", "tokens", "must be positive", self.tokens)
        check(
            0 <= self.ramp_tokens < self.tokens, "goodput", "ramp_tokens", "must be less than tokens", self.ramp_tokens
        )
        ramps = (self.ramp_tokens > 0) == (self.ramp_batch is not None)
        check(ramps, "goodput", "ramp_batch", "goes with ramp_tokens", self.ramp_batch)
        check(self.pue >= 1, "goodput", "pue", "must be at least 1", self.pue)
        check(self.host_w_per_gpu >= 0, "goodput", "host_w_per_gpu", "must not be negative", self.host_w_per_gpu)
        for name in ("checkpoint_interval_s", "checkpoint_write_bytes_per_s", "price_per_gpu_hour"):
            value = getattr(self, name)
            if value is not None:
                check_number("goodput", name, value)
                check(value > 0, "goodput", name, "must be positive", value)
        if self.num_spares is not None:
            check_whole("goodput", "num_spares", self.num_spares, least=0)
        check_whole("goodput", "num_runs", self.num_runs, least=2)
        check(self.num_runs <= KILO, "goodput", "num_runs", "must not exceed 1000", self.num_runs)
        fleets = (UNKNOWN, *fleet_names())
        rule = f"must be one of {', '.join(fleets)}"
        check(self.fleet in fleets, "goodput", "fleet", rule, self.fleet, near_match(self.fleet, fleets))


@dataclass(frozen=True, kw_only=True)
class Range:
    """The P10, P50 and P90 of a number over runs."""

    p10: float
    p50: float
    p90: float

    @staticmethod
    def of(values: Sequence[float] | Floats) -> Range:
        """The quantiles of a sample."""
        return Range(**dict(zip(("p10", "p50", "p90"), map(float, np.quantile(values, QUANTILES)), strict=True)))


@dataclass(frozen=True, kw_only=True)
class IntervalPoint:
    """A checkpoint interval: goodput as the formula and as the runs have it."""

    interval_s: float
    expected_fraction: float
    simulated: Range


@dataclass(frozen=True, kw_only=True)
class GoodputStudy:
    """What the goodput report shows. Ranges are over runs; money is None where no price was given."""

    scenario: Scenario
    plan: RunPlan
    step_s: Range  # as predicted, times what measured steps like it took over theirs
    ideal_s: float  # of the run, by the median step, without a failure or a checkpoint
    num_steps: float
    mean_time_between_failures_s: float  # of the median rate
    checkpoint_bytes: float
    checkpoints: Checkpoints
    best_interval_s: float
    young_interval_s: float
    daly_interval_s: float
    operations: Operations
    intervals: tuple[IntervalPoint, ...]
    runs: tuple[RunOutcome, ...]
    days: Range
    goodput_fraction: Range
    failures: Range
    gpu_hours: Range
    energy_kwh: Range
    cost: Range | None
    model_error_told: str  # which measured steps stand behind the spread of step times

    @property
    def parts_fraction(self) -> Mapping[str, float]:
        """Share of all time by RUN_PARTS, mean over runs."""
        return {part: float(np.mean([run.seconds[part] / run.total_s for run in self.runs])) for part in RUN_PARTS}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the same for the same question and seed."""
        skipped = {"scenario", "runs"}
        plain = {name: value for name, value in asdict(replace(self, runs=())).items() if name not in skipped}
        return plain | {"parts_fraction": dict(self.parts_fraction)}

    def rows(self) -> list[tuple[str, str, float | str, float | str, str]]:
        """The study as one long table: section, name, x, value, unit; x is a quantile or an interval."""
        units = {
            "step_s": "s",
            "days": "days",
            "goodput_fraction": "1",
            "failures": "count",
            "gpu_hours": "h",
            "energy_kwh": "kWh",
        }
        found: list[tuple[str, str, float | str, float | str, str]] = []
        for name, unit in units.items():
            found += [("run", name, quantile, value, unit) for quantile, value in asdict(getattr(self, name)).items()]
        if self.cost is not None:
            found += [("run", "cost", q, value, self.plan.currency) for q, value in asdict(self.cost).items()]
        found += [("parts", part, "", share, "1") for part, share in self.parts_fraction.items()]
        for point in self.intervals:
            found.append(("interval", "expected_fraction", point.interval_s, point.expected_fraction, "1"))
            found += [("interval", q, point.interval_s, value, "1") for q, value in asdict(point.simulated).items()]
        return found


def goodput_study(scenario: Scenario, plan: RunPlan, progress: Progress | None = None) -> GoodputStudy:
    """Train plan.tokens on the scenario's cluster, failures and all.

    Raises InputError, NotModelledError, and MoesimError where failures leave no time to work.
    """
    say = progress or (lambda _: None)
    num_gpus = scenario.cluster.num_gpus
    operations = default_operations(num_gpus, _spares(plan, num_gpus))
    stages = ramp_stages(scenario, plan)
    full = []  # seconds per token with the whole batch, one for each seed
    for seed in range(scenario.seed, scenario.seed + NUM_STEP_SEEDS):
        say(f"the step, seed {seed}")
        full.append(_seconds_per_token(scenario, seed))
    weighed = plan.tokens  # of tokens, each by its batch's seconds over those of the whole batch
    for stage, tokens in stages[:-1]:
        say(f"the step with {stage.train.global_batch:,} sequences")
        weighed += tokens * (_seconds_per_token(stage, scenario.seed) / full[0] - 1.0)
    work_s = np.array(full) * weighed  # of the whole run, one for each seed
    factors, told = step_factors(scenario)
    own = np.array(full) * scenario.train.global_batch * scenario.train.seq_len

    fleet = typical_fleet(plan)
    luck = [stream(scenario.seed, f"goodput run {i}") for i in range(plan.num_runs)]
    drawn = [_Draw.of(rng, plan, work_s, factors) for rng in luck]
    rate = float(np.median([draw.rate for draw in drawn]))
    mean_s = mean_time_between_s(rate, num_gpus)
    size_bytes, shape = checkpoints_of(scenario, plan)
    best_s = best_interval_s(shape, operations, fleet, rate, num_gpus)
    checkpoints = replace(shape, interval_s=plan.checkpoint_interval_s or best_s)

    def runs(at: Checkpoints) -> list[RunOutcome]:
        return [draw.run(num_gpus, at, operations, i, scenario.seed) for i, draw in enumerate(drawn)]

    say("runs with failures")
    outcomes = runs(checkpoints)
    around = sorted({best_s / 4, best_s / 2, best_s, 2 * best_s, 4 * best_s, checkpoints.interval_s})
    points = []
    for interval_s in around:
        say(f"a checkpoint every {interval_s / 60:,.0f} min")
        at = replace(checkpoints, interval_s=interval_s)
        simulated = outcomes if interval_s == checkpoints.interval_s else runs(at)
        expected = expected_goodput(at, operations, fleet, rate, num_gpus)
        shares = Range.of([run.goodput_fraction for run in simulated])
        points.append(IntervalPoint(interval_s=interval_s, expected_fraction=expected, simulated=shares))

    paid_gpus = num_gpus + operations.num_spares * SERVER_GPUS
    total_s = np.array([run.total_s for run in outcomes])
    gpu_hours = total_s / HOUR_S * paid_gpus
    watts = (scenario.cluster.gpu.tdp_w.value + plan.host_w_per_gpu) * plan.pue
    return GoodputStudy(
        scenario=scenario,
        plan=plan,
        step_s=Range.of([float(s * f) for s in own for f in factors]),
        ideal_s=float(np.median(work_s) * np.median(factors)),
        num_steps=float(sum(share / (s.train.global_batch * s.train.seq_len) for s, share in stages)),
        mean_time_between_failures_s=mean_s,
        checkpoint_bytes=size_bytes,
        checkpoints=checkpoints,
        best_interval_s=best_s,
        young_interval_s=young_interval_s(checkpoints.stall_s, mean_s),
        daly_interval_s=daly_interval_s(checkpoints.stall_s, mean_s),
        operations=operations,
        intervals=tuple(points),
        runs=tuple(outcomes),
        days=Range.of(total_s / DAY_S),
        goodput_fraction=Range.of([run.goodput_fraction for run in outcomes]),
        failures=Range.of([run.num_failures for run in outcomes]),
        gpu_hours=Range.of(gpu_hours),
        energy_kwh=Range.of(gpu_hours * watts / KILO),
        cost=None if plan.price_per_gpu_hour is None else Range.of(gpu_hours * plan.price_per_gpu_hour),
        model_error_told=told,
    )


def step_factors(scenario: Scenario) -> tuple[Floats, str]:
    """(measured over predicted of the measured steps like this one, which ones those are); 1 where there are none."""
    found = cases_like(step_likeness(scenario))
    if found is None:
        return np.ones(1), "no measured step is like this one: its step time carries no model error"
    factors = np.array([score.measured_s / score.predicted_s for score in found.scores])
    return factors, f"{found.num_rows} measured steps ({found.shared})"


def ramp_stages(scenario: Scenario, plan: RunPlan) -> list[tuple[Scenario, float]]:
    """(scenario at a batch, tokens trained with it): the batch grows in RAMP_STAGES steps to the scenario's own.

    Raises InputError where no whole number of micro-batches comes near ramp_batch.
    """
    if plan.ramp_batch is None:
        return [(scenario, plan.tokens)]
    full = scenario.train.global_batch
    unit = scenario.layout.dp * scenario.train.micro_batch
    unit *= scenario.parallel.pp if scenario.parallel.vpp > 1 else 1
    fits = unit <= plan.ramp_batch < full
    rule = f"must lie from {unit} (one micro-batch for each replica) to below {full}"
    if not fits:
        raise InputError("goodput", "ramp_batch", rule, plan.ramp_batch)
    share = plan.ramp_tokens / RAMP_STAGES
    batches = np.linspace(plan.ramp_batch, full, RAMP_STAGES + 1)
    middles = (batches[:-1] + batches[1:]) / 2
    stages = [(scenario.with_(global_batch=int(max(round(b / unit), 1) * unit)), share) for b in middles]
    return [*stages, (scenario, plan.tokens - plan.ramp_tokens)]


def expected_goodput(
    checkpoints: Checkpoints, operations: Operations, fleet: Fleet, rate_per_gpu_hour: float, num_gpus: int
) -> float:
    """Kept work over all time of endless training, by the formula. See docs/model.md#goodput.

    Failures are memoryless; slow servers, planned stops and an empty shelf of spares are left out.
    """
    rate = 1.0 / mean_time_between_s(rate_per_gpu_hour, num_gpus)
    recovery_s = _recovery_s(operations, fleet) + checkpoints.write_s - checkpoints.stall_s
    segment_s = checkpoints.interval_s + checkpoints.stall_s
    exponent = rate * (recovery_s + segment_s)
    if exponent > 500:
        return 0.0
    return rate * checkpoints.interval_s / (math.exp(rate * recovery_s) * math.expm1(rate * segment_s))


def best_interval_s(
    checkpoints: Checkpoints, operations: Operations, fleet: Fleet, rate_per_gpu_hour: float, num_gpus: int
) -> float:
    """The interval between checkpoints with the largest expected goodput, by golden section over its logarithm."""

    def goodput(log_s: float) -> float:
        at = replace(checkpoints, interval_s=math.exp(log_s))
        return expected_goodput(at, operations, fleet, rate_per_gpu_hour, num_gpus)

    low, high = math.log(max(checkpoints.stall_s, 1.0) / 10), math.log(LONGEST_INTERVAL_S)
    golden = (math.sqrt(5.0) - 1.0) / 2.0
    for _ in range(60):
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (left, high) if goodput(left) < goodput(right) else (low, right)
    # Training goes on while a checkpoint is written, but the next one waits for the last.
    return max(math.exp((low + high) / 2), checkpoints.write_s)


def young_interval_s(stall_s: float, mean_time_between_failures_s: float) -> float:
    """Young's interval, first order. Commun. ACM 17, 1974.

    >>> young_interval_s(50.0, 10_000.0)
    1000.0
    """
    return math.sqrt(2.0 * stall_s * mean_time_between_failures_s)


def daly_interval_s(stall_s: float, mean_time_between_failures_s: float) -> float:
    """Daly's interval, of higher order. Future Gener. Comput. Syst. 22, 2006.

    >>> round(daly_interval_s(50.0, 10_000.0))
    967
    """
    if stall_s >= 2.0 * mean_time_between_failures_s:
        return mean_time_between_failures_s
    share = stall_s / (2.0 * mean_time_between_failures_s)
    return young_interval_s(stall_s, mean_time_between_failures_s) * (1 + math.sqrt(share) / 3 + share / 9) - stall_s


@dataclass(frozen=True, kw_only=True)
class _Draw:
    """What one run is dealt: its fleet and rate, and its undisturbed length."""

    fleet: Fleet
    rate: float  # per GPU and hour
    work_s: float

    @staticmethod
    def of(rng: np.random.Generator, plan: RunPlan, work_s: Floats, factors: Floats) -> _Draw:
        which_seed, which_factor, which_fleet, how_often = rng.random(4)
        seconds = work_s[int(which_seed * len(work_s))] * factors[int(which_factor * len(factors))]
        if plan.fleet != UNKNOWN:
            fleet = load_fleet(plan.fleet, inspected=plan.inspected)
            return _Draw(fleet=fleet, rate=fleet.per_gpu_hour.value, work_s=float(seconds))
        fleets = [load_fleet(name, inspected=plan.inspected) for name in fleet_names()]
        fleet, rate = drawn_fleet(fleets, which_fleet, how_often)
        return _Draw(fleet=fleet, rate=rate, work_s=float(seconds))

    def run(
        self, num_gpus: int, checkpoints: Checkpoints, operations: Operations, number: int, seed: int
    ) -> RunOutcome:
        return run_with_failures(
            self.work_s,
            num_gpus=num_gpus,
            fleet=self.fleet,
            checkpoints=checkpoints,
            operations=operations,
            rng=stream(seed, f"goodput failures {number}"),
            rate_factor=self.rate / self.fleet.per_gpu_hour.value,
        )


def drawn_fleet(fleets: Sequence[Fleet], which: float, how_often: float) -> tuple[Fleet, float]:
    """(fleet whose kinds of failure a run meets, rate per GPU and hour) of a cluster that nobody has measured.

    The rate lies between the least and the greatest of the fleets, evenly in its logarithm; both from 0..1.
    """
    rates = sorted(fleet.per_gpu_hour.value for fleet in fleets)
    return fleets[int(which * len(fleets))], float(rates[0] * (rates[-1] / rates[0]) ** how_often)


def _recovery_s(operations: Operations, fleet: Fleet) -> float:
    """Mean seconds from a failure to the first step, with spares on the shelf."""
    return operations.restart_s + sum(
        kind.share * (kind.detection_s + kind.needs_server * operations.swap_s) for kind in fleet.kinds
    )


def _spares(plan: RunPlan, num_gpus: int) -> int:
    return math.ceil(num_gpus / SERVER_GPUS / 100) if plan.num_spares is None else plan.num_spares


def typical_fleet(plan: RunPlan) -> Fleet:
    """The fleet whose kinds of failure the formula takes: the one asked for, or the largest that was published."""
    return load_fleet("meta-32k-h100" if plan.fleet == UNKNOWN else plan.fleet, inspected=plan.inspected)


def checkpoints_of(scenario: Scenario, plan: RunPlan) -> tuple[float, Checkpoints]:
    """(bytes of a checkpoint, how work is saved; its interval is still to be chosen)."""
    facts, num_gpus = checkpoint_facts(), scenario.cluster.num_gpus
    size_bytes = describe(scenario.model, scenario.train.seq_len).total_parameters * facts.bytes_per_parameter.value
    write_s = size_bytes / (plan.checkpoint_write_bytes_per_s or facts.write_bytes_per_s.value)
    copied_s = size_bytes / num_gpus / HOST_LINK_BYTES_PER_S
    stall_s = min(copied_s, write_s) if plan.checkpoint_async else write_s
    return size_bytes, Checkpoints(interval_s=HOUR_S, stall_s=stall_s, write_s=write_s)


def _seconds_per_token(scenario: Scenario, seed: int) -> float:
    return 1.0 / simulate(replace(scenario, seed=seed)).tokens_per_s
