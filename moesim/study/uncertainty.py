"""How sure a prediction is: each unknown as a distribution, P10, P50 and P90 of every headline number, what matters.

The engine runs for what changes the load or its wires only (a few seeds at a few skews, two NIC rates), on few
micro-batches, beside one whole step. All else multiplies. Draws are named after their unknown, so two scenarios that
share one meet the same luck. See docs/model.md#uncertainty.

Legend: N draws, G skews, S seeds, C rates of a NIC.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.catalog.failures import default_operations, fleet_names, load_fleet
from moesim.describe.checks import check_whole
from moesim.describe.hardware import Cluster
from moesim.describe.reliability import SERVER_GPUS
from moesim.describe.workload import Lognormal
from moesim.errors import check
from moesim.metrics.memory import fullest, micro_batches_to_fill
from moesim.metrics.step import StepResult
from moesim.scenario import Scenario
from moesim.study.goodput import (
    UNKNOWN,
    Range,
    RunPlan,
    best_interval_s,
    checkpoints_of,
    expected_goodput,
    ramp_stages,
    step_factors,
    typical_fleet,
)
from moesim.study.simulate import simulate
from moesim.study.uncertainty_inputs import Spread, Unknown, of_numbers, of_sample, of_spread
from moesim.timeline.step import run_step
from moesim.units import DAY_S, HOUR_S, KILO

Progress = Callable[[str], None]
Floats = NDArray[np.float64]
GINI = Spread(low=0.10, high=0.38, law="even")  # of real text, where nobody says
NIC = Spread(low=0.92, high=1.03)  # 40.5 and 45.5 GB/s over their median, 44: DeepEP on 2 to 4 nodes of H800
SAMPLED_FILLS = 2  # of the pipeline, in a run that is only compared with others like it
UNITS: Mapping[str, str] = {
    "step_s": "s",
    "tokens_per_s_per_gpu": "tokens/s",
    "mfu": "1",
    "peak_bytes": "bytes",
    "days": "days",
    "gpu_hours": "h",
    "cost": "",
}
BETTER_HIGH = ("tokens_per_s_per_gpu", "mfu")


@dataclass(frozen=True, kw_only=True)
class UncertaintyPlan:
    """What is not known, as ranges; None: known, as the scenario has it. run: what is trained, for days and money."""

    run: RunPlan | None = None
    gini: Spread | None = GINI
    nic: Spread | None = NIC  # rate that NICs achieve over the catalog's: derate and jitter
    efficiency: Spread | None = None  # speed of arithmetic over the predicted; None: the model error holds it
    failures_per_thousand_server_days: Spread | None = None  # None: as run.fleet says
    price_per_gpu_hour: Spread | None = None
    model_error: bool = True  # measured steps over their predictions
    num_draws: int = 1000
    num_seeds: int = 4

    def __post_init__(self) -> None:
        check_whole("uncertainty", "num_draws", self.num_draws, least=10)
        check(self.num_draws <= 100 * KILO, "uncertainty", "num_draws", "must not exceed 100000", self.num_draws)
        check_whole("uncertainty", "num_seeds", self.num_seeds)
        priced = self.price_per_gpu_hour is None or self.run is not None
        check(priced, "uncertainty", "price_per_gpu_hour", "needs tokens to train", self.price_per_gpu_hour)


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A headline number with one unknown at its P10 and at its P90, all others at their medians."""

    unknown: str
    metric: str
    at_p10: float
    at_p90: float

    @property
    def width(self) -> float:
        return abs(self.at_p90 - self.at_p10)


@dataclass(frozen=True, kw_only=True)
class UncertaintyStudy:
    """Ranges of the headline numbers. drawn_N: each number by draw; bars: the widest first, by number."""

    scenario: Scenario
    plan: UncertaintyPlan
    step: StepResult  # as predicted, nothing drawn
    unknowns: tuple[Unknown, ...]
    ranges: Mapping[str, Range]
    bars: tuple[Bar, ...]
    fits_fraction: float  # of draws
    told: str  # which measured steps stand behind the model error
    drawn_N: Mapping[str, Floats] = field(repr=False)

    def tornado(self, metric: str) -> tuple[Bar, ...]:
        """The bars of one number, the widest first."""
        return tuple(bar for bar in self.bars if bar.metric == metric)

    @property
    def headline(self) -> str:
        """The number that a planner asks for first."""
        return next(name for name in ("cost", "gpu_hours", "step_s") if name in self.ranges)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the same for the same question and seed."""
        return {
            "unknowns": [unknown.to_dict() for unknown in self.unknowns],
            "ranges": {name: asdict(found) for name, found in self.ranges.items()},
            "tornado": [asdict(bar) for bar in self.bars],
            "fits_fraction": self.fits_fraction,
            "num_draws": self.plan.num_draws,
            "model_error_told": self.told,
            "predicted_step_s": self.step.step_s,
        }


def uncertainty_study(
    scenario: Scenario, plan: UncertaintyPlan | None = None, progress: Progress | None = None
) -> UncertaintyStudy:
    """P10, P50 and P90 of a scenario's headline numbers, and what widens them.

    Raises InputError, and NotModelledError as a simulation does.

    >>> study = uncertainty_study(scenario, UncertaintyPlan(run=RunPlan(tokens=1e12)))  # doctest: +SKIP
    >>> study.ranges["days"].p90  # doctest: +SKIP
    41.3
    """
    plan, say = plan or UncertaintyPlan(), progress or (lambda _: None)
    say("the step")
    step = simulate(scenario)
    model = _Model.of(scenario, plan, step, say)
    unknowns, told = _unknowns(scenario, plan, model)
    drawn = model({unknown.name: unknown.drawn_N for unknown in unknowns})
    middle = {unknown.name: np.array([unknown.p50]) for unknown in unknowns}
    bars = []
    for unknown in unknowns:
        ends = [model(middle | {unknown.name: np.array([value])}) for value in (unknown.p10, unknown.p90)]
        bars += [
            Bar(unknown=unknown.name, metric=name, at_p10=float(ends[0][name][0]), at_p90=float(ends[1][name][0]))
            for name in drawn
        ]
    return UncertaintyStudy(
        scenario=scenario,
        plan=plan,
        step=step,
        unknowns=unknowns,
        ranges={name: Range.of(values) for name, values in drawn.items()},
        bars=tuple(sorted(bars, key=lambda bar: -bar.width)),
        fits_fraction=float(np.mean(drawn["peak_bytes"] <= scenario.cluster.gpu.memory_bytes.value)),
        told=told,
        drawn_N=drawn,
    )


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One number of two scenarios under the same draws: second over first, and the share of draws that it wins."""

    metric: str
    ratio: Range
    second_better_fraction: float


def compare(first: UncertaintyStudy, second: UncertaintyStudy) -> tuple[Pair, ...]:
    """Two scenarios draw by draw: luck that both meet cancels. Raises InputError where they drew differently.

    Measured steps like both stand behind one model error: then it cancels, too, which says that moesim errs alike.
    """
    rule = "must be the same in both, to meet the same luck"
    check(first.scenario.seed == second.scenario.seed, "scenario", "seed", rule, second.scenario.seed)
    check(first.plan.num_draws == second.plan.num_draws, "uncertainty", "num_draws", rule, second.plan.num_draws)
    pairs = []
    for name in first.drawn_N:
        if name not in second.drawn_N:
            continue
        ratio = second.drawn_N[name] / first.drawn_N[name]
        wins = ratio > 1.0 if name in BETTER_HIGH else ratio < 1.0
        pairs.append(Pair(metric=name, ratio=Range.of(ratio), second_better_fraction=float(np.mean(wins))))
    return tuple(pairs)


@dataclass(frozen=True, kw_only=True)
class _Model:
    """Headline numbers of a scenario as a function of its unknowns' values."""

    step: StepResult
    num_gpus: int
    tokens_per_step: int
    ginis_G: Floats
    log_step_GS: Floats  # of a step, over the predicted one
    more_bytes_GS: Floats  # of the fullest GPU, over the predicted one's
    nics_C: Floats
    log_step_C: Floats
    run: RunPlan | None
    weighed_tokens: float  # each by its batch's seconds over those of the whole batch
    goodput: Callable[[Floats], Floats] | None  # share of all time that is kept, by failures per GPU and hour

    @staticmethod
    def of(scenario: Scenario, plan: UncertaintyPlan, step: StepResult, say: Progress) -> _Model:
        ginis = _ginis(scenario, plan)
        num_seeds = plan.num_seeds if _is_drawn(scenario) else 1
        steps_GS, peaks_GS = np.empty((len(ginis), num_seeds)), np.empty((len(ginis), num_seeds))
        for i, gini in enumerate(ginis):
            skewed = {} if gini is None else {"gini": gini}
            for seed in range(num_seeds):
                say(f"skew {i + 1} of {len(ginis)}, seed {seed + 1} of {num_seeds}")
                steps_GS[i, seed], peaks_GS[i, seed] = _sampled(scenario, **skewed, seed=scenario.seed + seed)
        own = ginis.index(_own_gini(scenario)) if len(ginis) > 1 else 0
        nics, log_step_C = [1.0], np.zeros(1)
        if plan.nic is not None and _crosses_nodes(scenario):
            nics = sorted({plan.nic.at(0.02), 1.0, plan.nic.at(0.98)})
            say("faster and slower NICs")
            times = [
                steps_GS[own, 0] if nic == 1.0 else _sampled(scenario, cluster=_with_nics(scenario.cluster, nic))[0]
                for nic in nics
            ]
            log_step_C = np.log(np.array(times) / steps_GS[own, 0])
        return _Model(
            step=step,
            num_gpus=scenario.cluster.num_gpus,
            tokens_per_step=scenario.train.global_batch * scenario.train.seq_len,
            ginis_G=np.array([0.0 if gini is None else gini for gini in ginis]),
            log_step_GS=np.log(steps_GS / steps_GS[own, 0]),
            more_bytes_GS=peaks_GS - peaks_GS[own, 0],
            nics_C=np.array(nics),
            log_step_C=log_step_C,
            run=plan.run,
            weighed_tokens=_weighed_tokens(scenario, plan.run, step, say) if plan.run else 0.0,
            goodput=goodput_over_rates(scenario, plan) if plan.run else None,
        )

    def __call__(self, values: Mapping[str, Floats]) -> dict[str, Floats]:
        one = np.ones_like(next(iter(values.values()))) if values else np.ones(1)
        gini, seeds = values.get("gini", self.ginis_G[0] * one), values.get("routing", 0 * one).astype(int)
        log_step, more_bytes = (
            np.array([np.interp(g, self.ginis_G, table[:, s]) for g, s in zip(gini, seeds, strict=True)])
            for table in (self.log_step_GS, self.more_bytes_GS)
        )
        log_step = log_step + np.interp(values.get("nic", one), self.nics_C, self.log_step_C)
        exposed = self.step.exposed_comm_s / self.step.step_s
        arithmetic = exposed + (1.0 - exposed) / values.get("efficiency", one)
        factor = np.exp(log_step) * arithmetic * values.get("model error", one)
        step_s = self.step.step_s * factor
        found = {
            "step_s": step_s,
            "tokens_per_s_per_gpu": self.tokens_per_step / step_s / self.num_gpus,
            "mfu": self.step.mfu / factor,
            "peak_bytes": self.step.memory["peak_bytes"] + more_bytes,
        }
        if self.run is not None and self.goodput is not None:
            total_s = self.weighed_tokens / self.tokens_per_step * step_s / self.goodput(values["failures"])
            found |= {"days": total_s / DAY_S, "gpu_hours": total_s / HOUR_S * self.num_gpus}
            if "price" in values:
                found["cost"] = found["gpu_hours"] * values["price"]
        return found


def _unknowns(scenario: Scenario, plan: UncertaintyPlan, model: _Model) -> tuple[tuple[Unknown, ...], str]:
    """Everything that is drawn, and which measured steps stand behind the model error."""
    num, seed = plan.num_draws, scenario.seed
    found: list[Unknown] = []

    def add(name: str, spread: Spread, words: str, source: str) -> None:
        found.append(of_spread(name, spread, num, seed, words=words, source=source))

    factors, told = step_factors(scenario) if plan.model_error else (np.ones(1), "no model error was asked for")
    if plan.model_error:
        words = "measured over predicted time of steps like it"
        found.append(of_sample("model error", factors, num, seed, words=words, source=told, luck=told))
    if len(model.ginis_G) > 1 and plan.gini is not None:
        add("gini", plan.gini, "skew of the experts' load (Gini)", "measured on real text: 0.10 to 0.38")
    if model.log_step_GS.shape[1] > 1:
        middle = len(model.ginis_G) // 2
        ranked = dict(enumerate(model.log_step_GS[middle]))
        words = "which experts are popular, and each token's choice"
        found.append(of_numbers("routing", ranked, num, seed, words=words, source=f"{len(ranked)} seeds of the engine"))
    if plan.nic is not None and len(model.nics_C) > 1:
        add("nic", plan.nic, "rate of NICs over the catalog's", "DeepEP on H800: 40.5 to 45.5 GB/s, median 44")
    if plan.efficiency is not None:
        add("efficiency", plan.efficiency, "speed of arithmetic over the predicted", "given")
    if plan.run is not None:
        add("failures", _failure_rate(plan), "failures per GPU and hour", _fleet_told(plan))
        price = plan.price_per_gpu_hour
        if price is None and plan.run.price_per_gpu_hour is not None:
            price = Spread(low=plan.run.price_per_gpu_hour, high=plan.run.price_per_gpu_hour)
        if price is not None:
            add("price", price, f"{plan.run.currency} for a GPU and hour", "given")
    return tuple(found), told


def _failure_rate(plan: UncertaintyPlan) -> Spread:
    """Failures per GPU and hour: given, of the fleet that was named, or between all fleets."""
    assert plan.run is not None
    given = plan.failures_per_thousand_server_days
    if given is not None:
        gpu_hours = KILO * SERVER_GPUS * DAY_S / HOUR_S
        return replace(given, low=given.low / gpu_hours, high=given.high / gpu_hours)
    names = fleet_names() if plan.run.fleet == UNKNOWN else (plan.run.fleet,)
    rates = [load_fleet(name).per_gpu_hour.value for name in names]
    return Spread(low=min(rates), high=max(rates), law="log-even")


def _fleet_told(plan: UncertaintyPlan) -> str:
    assert plan.run is not None
    if plan.failures_per_thousand_server_days is not None:
        return "given"
    return "between the published clusters'" if plan.run.fleet == UNKNOWN else plan.run.fleet


def goodput_over_rates(scenario: Scenario, plan: UncertaintyPlan) -> Callable[[Floats], Floats]:
    """The share of time that is kept, by the formula, over failures per GPU and hour, saving as the median wants."""
    run, num_gpus = plan.run, scenario.cluster.num_gpus
    assert run is not None
    fleet, operations = typical_fleet(run), default_operations(num_gpus)
    rate = _failure_rate(plan).at(0.5)
    _, shape = checkpoints_of(scenario, run)
    best_s = run.checkpoint_interval_s or best_interval_s(shape, operations, fleet, rate, num_gpus)
    checkpoints = replace(shape, interval_s=best_s)
    return np.vectorize(
        lambda one: expected_goodput(checkpoints, operations, fleet, float(one), num_gpus), otypes=[float]
    )


def _weighed_tokens(scenario: Scenario, run: RunPlan, step: StepResult, say: Progress) -> float:
    """Tokens to train, those of the batch's ramp counted by how much longer each takes."""
    weighed = run.tokens
    for stage, tokens in ramp_stages(scenario, run)[:-1]:
        say(f"the step with {stage.train.global_batch:,} sequences")
        per_token = run_step(stage).step_s / stage.train.global_batch * scenario.train.global_batch
        weighed += tokens * (per_token / step.step_s - 1.0)
    return weighed


def _sampled(scenario: Scenario, **changes: Any) -> tuple[float, float]:
    """(seconds, bytes of the fullest GPU) of a step with few micro-batches, to be compared with others like it."""
    described = {"cluster": scenario.cluster, "model": scenario.model}
    short = with_fills(scenario, SAMPLED_FILLS)
    short = short.with_(**described | changes)
    trace = run_step(short)
    return trace.step_s, float(fullest(short, trace.load).peak_bytes)


def with_fills(scenario: Scenario, num_fills: int) -> Scenario:
    """The scenario with micro-batches for so many fills of its pipeline, where it has more."""
    most = num_fills * micro_batches_to_fill(scenario) * scenario.parallel.vpp
    batch = scenario.train.micro_batch * scenario.layout.dp * min(scenario.num_micro_batches, most)
    return scenario.with_(cluster=scenario.cluster, model=scenario.model, global_batch=batch)


def _with_nics(cluster: Cluster, factor: float) -> Cluster:
    """The cluster with NICs of another rate."""
    return replace(
        cluster, nic_bytes_per_s=replace(cluster.nic_bytes_per_s, value=cluster.nic_bytes_per_s.value * factor)
    )


def _own_gini(scenario: Scenario) -> float | None:
    """The Gini that a scenario's popularity is made by; None where it is not."""
    popularity = scenario.routing.popularity
    return popularity.gini if isinstance(popularity, Lognormal) else None


def _ginis(scenario: Scenario, plan: UncertaintyPlan) -> list[float | None]:
    """Skews that the engine runs at, in order; the scenario's own is one of them."""
    own = _own_gini(scenario)
    if own is None or plan.gini is None or not scenario.model.is_moe:
        return [own]
    ends = {plan.gini.at(0.02), plan.gini.at(0.98)}
    return [*sorted({own, *(end for end in ends if not math.isclose(end, own))})]


def _is_drawn(scenario: Scenario) -> bool:
    """Whether another seed gives another load."""
    return scenario.model.is_moe and scenario.routing.popularity.kind != "balanced"


def _crosses_nodes(scenario: Scenario) -> bool:
    return scenario.cluster.num_gpus > scenario.cluster.ranks_per_node
