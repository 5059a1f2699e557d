"""What recorded training runs say: quality at equal FLOPs, load and balance, collapse, precision, each over seeds.

Legend: N seeds, S recorded steps, L MoE layers, E experts, D domains, T tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.errors import check
from moesim.routing.consistency import Experts, agreement, domain_load_DLE, repetition, specialisation
from moesim.routing.recorded import RecordedRouting, read_recorded
from moesim.routing.statistics import collapse_alerts, dead_experts, max_vio

Floats = NDArray[np.float64]
Table = Mapping[str, Floats]

DENSE, MOE = "dense", "auxiliary"
DEAD_SHARE = 0.01  # of the layer's mean load
_LOSS = "loss_"


class TrainingRun(Protocol):
    """One run as reference_model.runs reads it: facts of run.json, tables as columns, (step, file) of routing."""

    @property
    def variant(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def facts(self) -> Mapping[str, Any]: ...
    @property
    def metrics(self) -> Table: ...
    @property
    def heldout(self) -> Table: ...
    @property
    def histogram(self) -> Table: ...
    @property
    def routing(self) -> Sequence[tuple[int, Path]]: ...
    @property
    def moe_layers(self) -> tuple[int, ...]: ...


Runs = Mapping[str, Sequence[TrainingRun]]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A number over seeds."""

    mean: float
    low: float
    high: float
    num_seeds: int

    @classmethod
    def of(cls, values: ArrayLike) -> Spread:
        """Mean and extremes of a value for each seed."""
        seeds = np.asarray(values, dtype=np.float64)
        return cls(mean=float(seeds.mean()), low=float(seeds.min()), high=float(seeds.max()), num_seeds=seeds.size)


@dataclass(frozen=True, kw_only=True, eq=False)
class LossCurve:
    """Held-out loss of a variant [nats per byte], a row for each seed; sizes are those of one model."""

    variant: str
    seeds: tuple[int, ...]
    steps_S: Floats
    loss_NS: Floats
    last_by_domain: Mapping[str, Spread]
    total_parameters: int
    active_parameters: int
    flops_per_token: float

    @property
    def last(self) -> Spread:
        return Spread.of(self.loss_NS[:, -1])


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A variant against another on the same batches, seed by seed.

    difference: last held-out loss, negative where the first is better; match_fraction: the share of the steps after
    which the first has the other's last loss, of the seeds that reach it.
    """

    first: str
    other: str
    difference: Spread
    difference_by_domain: Mapping[str, Spread]
    match_fraction: Spread | None
    num_matching: int


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadCurve:
    """How even a variant's load is over training: MaxVio of each recorded window of steps, the mean over layers."""

    variant: str
    steps_S: Floats
    max_vio_NS: Floats
    num_dead_NS: NDArray[np.int64]  # experts of all layers under DEAD_SHARE of their layer's mean
    busiest_share_NS: Floats  # of a layer's tokens that choose its busiest expert, the largest over layers
    num_collapsed_N: NDArray[np.int64]  # experts that have taken over in the last window (collapse_from)
    num_experts: int  # of all MoE layers

    @property
    def last_max_vio(self) -> Spread:
        return Spread.of(self.max_vio_NS[:, -1])


@dataclass(frozen=True, kw_only=True, eq=False)
class UsageMap:
    """Load of each expert over its layer's mean in each window of steps, of one layer of one run."""

    variant: str
    seed: int
    layer: int
    steps_S: Floats
    ratio_SE: Floats


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingOverTraining:
    """How the same held-out tokens are routed at recorded steps of a variant.

    share_LED: of one seed, the domains' shares of each expert's tokens at the last step. explained_NSL: how much of a
    token's domain its expert tells. overlap_NSL: experts shared with the last step's choice, chance_NSL without
    relation. repeat_NL: consecutive tokens with the same first expert at the last step, repeat_chance_NL if shuffled.
    """

    variant: str
    layers: tuple[int, ...]
    domains: tuple[str, ...]
    steps_S: Floats
    share_LED: Floats
    shown_seed: int
    explained_NSL: Floats
    overlap_NSL: Floats
    chance_NSL: Floats
    repeat_NL: Floats
    repeat_chance_NL: Floats


@dataclass(frozen=True, kw_only=True)
class PrecisionRow:
    """One way of computing in half precision.

    flipped: share of held-out tokens whose experts are not those of float64, the mean over layers and evaluations after
    the first; largest_logit: of the whole run; overflow_steps: of each seed, the first step with a number that is not
    finite; logit_NS: the largest logit of each logged step.
    """

    variant: str
    precision: str
    router_in_float32: bool
    z_loss: bool
    flipped: Spread
    largest_logit: Spread
    overflow_steps: tuple[int | None, ...]
    last_loss: Spread
    steps_S: tuple[float, ...] = ()
    logit_NS: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingStudy:
    """Everything the training notebook shows; ``to_dict`` and ``rows`` for files."""

    curves: tuple[LossCurve, ...]
    gains: tuple[Comparison, ...]  # every MoE variant against the dense model
    balancing: tuple[Comparison, ...]  # every other MoE variant against the auxiliary loss
    loads: tuple[LoadCurve, ...]
    usage: tuple[UsageMap, ...]
    routing: RoutingOverTraining
    collapse: tuple[LoadCurve, ...]
    collapse_curves: tuple[LossCurve, ...]
    precision: tuple[PrecisionRow, ...]
    facts: Mapping[str, Any]  # of where and when the runs were recorded

    @property
    def gain(self) -> Comparison:
        """The MoE with the auxiliary loss against the dense model."""
        return next(comparison for comparison in self.gains if comparison.first == MOE)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return _plain(self)

    def rows(self) -> Iterator[tuple[str, str, Any, Any, str]]:
        """One long table: section, name, x, value, unit."""
        for curve in (*self.curves, *self.collapse_curves):
            section = "loss" if curve in self.curves else "collapse_loss"
            for seed, loss_S in zip(curve.seeds, curve.loss_NS, strict=True):
                for step, loss in zip(curve.steps_S, loss_S, strict=True):
                    yield section, f"{curve.variant}-s{seed}", step, loss, "nats/byte"
        for name, loads in (("max_vio", self.loads), ("collapse_max_vio", self.collapse)):
            for load in loads:
                for number, row_S in enumerate(load.max_vio_NS):
                    for step, value in zip(load.steps_S, row_S, strict=True):
                        yield name, f"{load.variant}-{number}", step, value, ""
        for row in self.precision:
            yield "precision_flipped", row.variant, "", row.flipped.mean, "fraction"
            yield "precision_largest_logit", row.variant, "", row.largest_logit.mean, ""


def training_study(*, quality: Runs, collapse: Runs, precision: Runs) -> TrainingStudy:
    """The study of recorded runs by variant. Raises InputError where a variant is missing, or seeds do not pair.

    >>> study = training_study(**{name: read_runs(name) for name in EXPERIMENTS})  # doctest: +SKIP
    """
    for variant in (DENSE, MOE):
        check(bool(quality.get(variant)), "runs", "quality", f"must hold finished runs of {variant}", sorted(quality))
    check(bool(collapse), "runs", "collapse", "must hold finished runs", "none")
    check(bool(precision), "runs", "precision", "must hold finished runs", "none")
    order = dict.fromkeys((DENSE, MOE, *quality))
    moes = {variant: quality[variant] for variant in order if variant != DENSE}
    one = quality[MOE][0]
    return TrainingStudy(
        curves=tuple(loss_curve(variant, quality[variant]) for variant in order),
        gains=tuple(compare(runs, quality[DENSE]) for runs in moes.values()),
        balancing=tuple(compare(runs, quality[MOE]) for variant, runs in moes.items() if variant != MOE),
        loads=tuple(load_curve(variant, runs) for variant, runs in moes.items()),
        usage=tuple(usage_map(runs[0], one.moe_layers[-1]) for runs in moes.values()),
        routing=routing_over_training(quality[MOE]),
        collapse=tuple(load_curve(variant, runs) for variant, runs in collapse.items()),
        collapse_curves=tuple(loss_curve(variant, runs) for variant, runs in collapse.items()),
        precision=tuple(precision_row(variant, runs) for variant, runs in precision.items()),
        facts=one.facts,
    )


def loss_curve(variant: str, runs: Sequence[TrainingRun]) -> LossCurve:
    """Held-out loss over steps of a variant's runs."""
    facts = runs[0].facts
    return LossCurve(
        variant=variant,
        seeds=tuple(run.seed for run in runs),
        steps_S=runs[0].heldout["step"],
        loss_NS=np.stack([run.heldout["loss"] for run in runs]),
        last_by_domain={
            name: Spread.of([run.heldout[_LOSS + name][-1] for run in runs]) for name in domains_of(runs[0])
        },
        total_parameters=sum(facts["parameters_by_part"].values()),
        active_parameters=facts["active_parameters"],
        flops_per_token=facts["forward_flops_per_token"],
    )


def domains_of(run: TrainingRun) -> tuple[str, ...]:
    """The domains that a run's losses are told for, in order."""
    return tuple(name.removeprefix(_LOSS) for name in run.heldout if name.startswith(_LOSS))


def compare(first: Sequence[TrainingRun], other: Sequence[TrainingRun]) -> Comparison:
    """Two variants, seed by seed. Raises InputError where they have no seed in common."""
    by_seed = {run.seed: run for run in other}
    pairs = [(run, by_seed[run.seed]) for run in first if run.seed in by_seed]
    seeds = ([run.seed for run in first], sorted(by_seed))
    check(bool(pairs), "runs", f"{first[0].variant} and {other[0].variant}", "must share a seed", seeds)
    last = [(a.heldout["loss"][-1], b.heldout["loss"][-1]) for a, b in pairs]
    matches = [_first_reached(a, b.heldout["loss"][-1]) for a, b in pairs]
    reached = [match for match in matches if match is not None]
    return Comparison(
        first=first[0].variant,
        other=other[0].variant,
        difference=Spread.of([a - b for a, b in last]),
        difference_by_domain={
            name: Spread.of([a.heldout[_LOSS + name][-1] - b.heldout[_LOSS + name][-1] for a, b in pairs])
            for name in domains_of(pairs[0][0])
        },
        match_fraction=Spread.of(reached) if reached else None,
        num_matching=len(reached),
    )


def _first_reached(run: TrainingRun, loss: float) -> float | None:
    """The share of a run's steps after which its held-out loss is at most this, between evaluations on a line."""
    losses_S, steps_S = run.heldout["loss"], run.heldout["step"]
    at = int(np.argmax(losses_S <= loss))
    if losses_S[at] > loss:
        return None
    if at == 0:
        return float(steps_S[0] / steps_S[-1])
    part = (losses_S[at - 1] - loss) / (losses_S[at - 1] - losses_S[at])
    return float((steps_S[at - 1] + part * (steps_S[at] - steps_S[at - 1])) / steps_S[-1])


def load_SLE(run: TrainingRun) -> tuple[Floats, Floats]:
    """(steps_S, tokens that chose each expert of each layer in the window that ends there) of a run's histogram."""
    table = run.histogram
    steps_S, layers = np.unique(table["step"]), np.unique(table["layer"])
    return steps_S, table["tokens"].reshape(steps_S.size, layers.size, -1)


def load_curve(variant: str, runs: Sequence[TrainingRun]) -> LoadCurve:
    """How even the load of a variant's runs is, window by window."""
    steps_S, _ = load_SLE(runs[0])
    loads_NSLE = np.stack([load_SLE(run)[1] for run in runs])
    top_k = int(runs[0].facts["config"]["model"]["moe"]["router"]["top_k"])
    share_NSLE = loads_NSLE / loads_NSLE.sum(axis=-1, keepdims=True) * top_k
    dead = [[len(dead_experts(load_LE, share_of_mean=DEAD_SHARE)) for load_LE in seed_SLE] for seed_SLE in loads_NSLE]
    return LoadCurve(
        variant=variant,
        steps_S=steps_S,
        max_vio_NS=max_vio(loads_NSLE).mean(axis=-1),
        num_dead_NS=np.array(dead, dtype=np.int64),
        busiest_share_NS=share_NSLE.max(axis=(-1, -2)),
        num_collapsed_N=np.array([len(collapse_alerts(seed_SLE[-1], top_k=top_k)) for seed_SLE in loads_NSLE]),
        num_experts=int(np.prod(loads_NSLE.shape[2:])),
    )


def usage_map(run: TrainingRun, layer: int) -> UsageMap:
    """Load of each expert of one layer over its mean, window by window."""
    steps_S, tokens_SLE = load_SLE(run)
    tokens_SE = tokens_SLE[:, run.moe_layers.index(layer)]
    ratio_SE = tokens_SE / tokens_SE.mean(axis=1, keepdims=True)
    return UsageMap(variant=run.variant, seed=run.seed, layer=layer, steps_S=steps_S, ratio_SE=ratio_SE)


def routing_over_training(runs: Sequence[TrainingRun]) -> RoutingOverTraining:
    """Specialisation and consistency of recorded held-out routing; tokens are as many of each domain, in order."""
    domains = domains_of(runs[0])
    check(bool(runs[0].routing), "runs", runs[0].variant, "must have recorded routing (routing-STEP.npz)", "none")
    by_run = [[read_recorded(path) for _, path in run.routing] for run in runs]
    seq_len = int(runs[0].facts["config"]["seq_len"])
    explained, overlap, chance, repeats, shuffled = [], [], [], [], []
    for recordings in by_run:
        ids = [_experts(recorded) for recorded in recordings]
        num_experts = recordings[0].num_experts
        agreements = [agreement(now, ids[-1], num_experts=num_experts) for now in ids]
        told = [specialisation(_by_domain(now, len(domains), num_experts)) for now in ids]
        starts = np.arange(0, len(ids[-1]), min(seq_len, len(ids[-1]) // len(domains)))
        repeated = repetition(ids[-1], num_experts=num_experts, choices=1, starts=starts)
        explained.append([one.explained_fraction_L for one in told])
        overlap.append([one.overlap_L for one in agreements])
        chance.append([one.chance_L for one in agreements])
        repeats.append(repeated.first_L)
        shuffled.append(repeated.first_chance_L)
    last = by_run[0][-1]
    load_LED = np.moveaxis(_by_domain(_experts(last), len(domains), last.num_experts), 0, 2).astype(np.float64)
    return RoutingOverTraining(
        variant=runs[0].variant,
        layers=last.layers,
        domains=domains,
        steps_S=np.array([step for step, _ in runs[0].routing], dtype=np.float64),
        share_LED=load_LED / np.maximum(load_LED.sum(axis=2, keepdims=True), 1.0),
        shown_seed=runs[0].seed,
        explained_NSL=np.array(explained),
        overlap_NSL=np.array(overlap),
        chance_NSL=np.array(chance),
        repeat_NL=np.array(repeats),
        repeat_chance_NL=np.array(shuffled),
    )


def _experts(recorded: RecordedRouting) -> Experts:
    return np.concatenate([chunk.experts_TLK for chunk in recorded.chunks()])


def _by_domain(experts_TLK: Experts, num_domains: int, num_experts: int) -> NDArray[np.int64]:
    domain_T = np.repeat(np.arange(num_domains), len(experts_TLK) // num_domains)
    return domain_load_DLE(experts_TLK, domain_T, num_domains=num_domains, num_experts=num_experts)


def precision_row(variant: str, runs: Sequence[TrainingRun]) -> PrecisionRow:
    """What one way of computing in half precision did to the router."""
    config = runs[0].facts["config"]
    return PrecisionRow(
        variant=variant,
        precision=config["precision"],
        router_in_float32=config["model"]["moe"]["router_in_float32"],
        z_loss=config["z_weight"] > 0.0,
        flipped=Spread.of([float(_columns(run.heldout, "flipped_")[:, 1:].mean()) for run in runs]),
        largest_logit=Spread.of([float(_columns(run.metrics, "largest_logit_").max()) for run in runs]),
        overflow_steps=tuple(_first_overflow(run) for run in runs),
        last_loss=Spread.of([float(run.heldout["loss"][-1]) for run in runs]),
        steps_S=tuple(runs[0].metrics["step"].tolist()),
        logit_NS=tuple(tuple(_columns(run.metrics, "largest_logit_").max(axis=0).tolist()) for run in runs),
    )


def _columns(table: Table, prefix: str) -> Floats:
    return np.stack([values for name, values in table.items() if name.startswith(prefix)])


def _first_overflow(run: TrainingRun) -> int | None:
    over = np.flatnonzero(run.metrics["overflowed"])
    return int(run.metrics["step"][over[0]]) if over.size else None


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
