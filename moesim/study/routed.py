"""Where one step's tokens go: load of every expert after the router, what it drops, what a rank receives.

Legend: G expert-parallel groups, M micro-batches, L MoE layers, E experts, R ranks of an expert-parallel group.

A load counts assignments: a token that takes k experts makes k of them in every MoE layer. What is realised here, after
router and placement, is what may be called balanced or not; the popularity asked for is only where it starts.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.describe.model import MoeFfn
from moesim.describe.workload import Recorded
from moesim.errors import NotModelledError, check
from moesim.routing.histogram import (
    Histogram,
    histogram_load,
    read_histogram,
    recorded_histogram,
    write_histogram,
)
from moesim.routing.popularity import Popularities
from moesim.routing.recorded import (
    RecordedRouting,
    load_LE,
    read_recorded,
    recorded_from_array,
    weights_of_inclusion,
    write_recorded,
)
from moesim.routing.routers import draw_token_sequence
from moesim.routing.sampler import draw_choices
from moesim.routing.statistics import (
    DEAD_SHARE_OF_MEAN,
    LoadAlert,
    collapse_alerts,
    cv,
    dead_experts,
    entropy,
    gini,
    load_alerts,
    max_mean,
    num_active_experts,
)
from moesim.scenario import Scenario
from moesim.seeds import stream
from moesim.study.drops import places_of
from moesim.timeline.load import StepLoad, redrawn, step_load

Floats = NDArray[np.float64]
TABLES = (".csv", ".parquet")  # endings of histograms among recordings


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutedLoad:
    """The load of one step, summed over its micro-batches and expert-parallel groups.

    assigned: chosen by routers; kept: what capacity leaves of it. layers: the model's numbers of the MoE layers.
    places: assignments that buffers padded to the capacity hold in each layer, None without a capacity factor.
    busiest_L: most kept by a rank over the mean rank, mean over micro-batches and groups: what a barrier waits for.
    """

    layers: tuple[int, ...]
    top_k: int
    assigned_LE: Floats
    kept_LE: Floats
    assigned_LR: Floats
    kept_LR: Floats
    places: float | None
    busiest_L: Floats
    domain_names: tuple[str, ...] = ()
    domain_inclusion_DLE: Floats | None = None  # how often a domain's token takes each expert
    source: str = "popularity"  # or the recording's file

    @property
    def num_experts(self) -> int:
        return int(self.assigned_LE.shape[1])

    @property
    def drop_fraction(self) -> float:
        """Dropped share of all assignments."""
        return max(0.0, 1.0 - float(self.kept_LE.sum() / self.assigned_LE.sum()))

    @property
    def drop_fraction_L(self) -> Floats:
        return _dropped(self.assigned_LE.sum(axis=1), self.kept_LE.sum(axis=1))

    @property
    def drop_fraction_LE(self) -> Floats:
        """Lost share of what chose each expert. Where others take over, what an expert turned away is not all lost."""
        return _lost(self.assigned_LE, self.kept_LE)

    @property
    def drop_fraction_LR(self) -> Floats:
        """Lost share of what was meant for each rank's experts."""
        return _lost(self.assigned_LR, self.kept_LR)

    @property
    def drop_fraction_D(self) -> Floats:
        """Dropped share of each domain's assignments, over all layers; empty without domains."""
        if self.domain_inclusion_DLE is None:
            return np.zeros(0)
        lost_D = (self.domain_inclusion_DLE * self.drop_fraction_LE).sum(axis=(1, 2))
        return np.asarray(lost_D / self.domain_inclusion_DLE.sum(axis=(1, 2)))

    @property
    def tokens_lost_L(self) -> Floats:
        """Tokens' worth of expert work lost in one step: dropped assignments over k."""
        return np.maximum(self.assigned_LE.sum(axis=1) - self.kept_LE.sum(axis=1), 0.0) / self.top_k

    @property
    def padding_fraction(self) -> float:
        """Empty share of buffers padded to the capacity; 0 where nothing is padded (no capacity factor)."""
        if self.places is None:
            return 0.0
        return max(0.0, 1.0 - float(self.kept_LE.sum()) / (self.places * len(self.layers)))

    @property
    def histogram(self) -> Histogram:
        """The step's chosen assignments as the table [step, layer, expert, tokens], rounded to whole ones."""
        whole_LE = np.rint(self.assigned_LE).astype(np.int64)
        return Histogram(steps_S=np.zeros(1, dtype=np.int64), layers=self.layers, tokens_SLE=whole_LE[None])

    @property
    def load_LE(self) -> Floats:
        """Shares of each layer's assignments before drops; rows sum to 1."""
        return self.assigned_LE / self.assigned_LE.sum(axis=1, keepdims=True)

    @property
    def alerts(self) -> list[dict[str, Any]]:
        """Experts over 3 times their layer's mean, the worst first: layer (the model's number), expert, ratio."""
        return self._named(load_alerts(self.assigned_LE))

    @property
    def collapsed(self) -> list[dict[str, Any]]:
        """Experts that over half of all tokens use, as alerts."""
        return self._named(collapse_alerts(self.assigned_LE, top_k=self.top_k))

    @property
    def dead(self) -> list[dict[str, int]]:
        """Experts with less than a hundredth of their layer's mean."""
        found = dead_experts(self.assigned_LE, share_of_mean=DEAD_SHARE_OF_MEAN)
        return [{"layer": self.layers[layer], "expert": expert} for layer, expert in found]

    def _named(self, alerts: tuple[LoadAlert, ...]) -> list[dict[str, Any]]:
        """With the model's layer numbers."""
        return [dataclasses.asdict(alert) | {"layer": self.layers[alert.layer]} for alert in alerts]

    def by_layer(self) -> list[dict[str, Any]]:
        """Statistics of each layer's load over its experts, drops and ranks included."""
        load = self.assigned_LE
        columns: dict[str, NDArray[Any]] = {
            "layer": np.array(self.layers),
            "gini": gini(load),
            "entropy": entropy(load, normalised=True),
            "cv": cv(load),
            "max_mean": max_mean(load),
            "max_vio": max_mean(load) - 1.0,
            "num_active_experts": num_active_experts(load),
            "drop_fraction": self.drop_fraction_L,
            "tokens_lost": self.tokens_lost_L,
            "rank_max_mean": max_mean(np.maximum(self.kept_LR, 1e-300)),
            "busiest_rank_ratio": self.busiest_L,
        }
        rows = zip(*(values.tolist() for values in columns.values()), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in rows]

    def to_dict(self) -> dict[str, Any]:
        """The results of ``moesim route``, plain values.

        gini, entropy (share of the largest possible), cv: mean over layers; max_mean, max_vio: the worst layer;
        num_active_experts: the fewest in any layer; tokens_lost_per_step: in the mean layer. by_layer has all of them
        layer by layer.
        """
        rows = self.by_layer()
        worst = max(row["max_mean"] for row in rows)
        return {
            **{name: float(np.mean([row[name] for row in rows])) for name in ("gini", "entropy", "cv")},
            "max_mean": worst,
            "max_vio": worst - 1.0,
            "num_active_experts": min(row["num_active_experts"] for row in rows),
            "num_experts": self.num_experts,
            "drop_fraction": self.drop_fraction,
            "drop_fraction_by_layer": self.drop_fraction_L.tolist(),
            "drop_fraction_by_expert": self.drop_fraction_LE.tolist(),
            "drop_fraction_by_rank": self.drop_fraction_LR.tolist(),
            "drop_fraction_by_domain": dict(zip(self.domain_names, self.drop_fraction_D.tolist(), strict=True)),
            "dropped_assignments_per_step": float(self.tokens_lost_L.sum()) * self.top_k,
            "tokens_lost_per_step": float(self.tokens_lost_L.mean()),
            "padding_fraction": self.padding_fraction,
            "busiest_rank_ratio": float(self.busiest_L.mean()),
            "alerts": self.alerts,
            "collapsed_experts": self.collapsed,
            "dead_experts": self.dead,
            "by_layer": rows,
            "load_LE": self.load_LE.tolist(),
            "source": self.source,
        }


def _dropped(assigned: Floats, kept: Floats) -> Floats:
    """Dropped share, 0 where nothing was assigned."""
    return np.maximum(1.0 - kept / np.where(assigned > 0, assigned, 1.0), 0.0) * (assigned > 0)


def _lost(assigned_Lx: Floats, kept_Lx: Floats) -> Floats:
    """Lost share by expert or rank: of what each turned away, as much as nobody else took."""
    turned_away_Lx = np.maximum(assigned_Lx - kept_Lx, 0.0)
    lost_L1 = np.maximum((assigned_Lx - kept_Lx).sum(axis=1, keepdims=True), 0.0)
    share_L1 = lost_L1 / np.maximum(turned_away_Lx.sum(axis=1, keepdims=True), 1e-300)
    return turned_away_Lx * np.minimum(share_L1, 1.0) / np.where(assigned_Lx > 0, assigned_Lx, 1.0)


def routed_load(
    scenario: Scenario, recorded: str | Path | RecordedRouting | None = None
) -> tuple[RoutedLoad, Popularities]:
    """(load of one step, popularities): the scenario's, or how often a recording took each expert.

    recorded: a router-replay file (.npy, .npz, .safetensors, .jsonl), a histogram (.csv, .parquet), or an open
    recording. Raises InputError for a dense model and for a recording of other layers, experts or top-k.

    >>> routed_load(scenario)[0].drop_fraction  # doctest: +SKIP
    0.031
    """
    asked, rest = as_recorded(scenario, recorded)
    base = routed_base(asked)
    if rest is None:
        popularity = asked.routing.popularity
        source = popularity.file if isinstance(popularity, Recorded) else "popularity"
        return summarise_load(asked, base, source), base.popularities
    popularities, source = recorded_inclusion(base, rest)
    drawn = redrawn(asked, base, popularities, stream(asked.seed, "load"))
    return summarise_load(asked, drawn, source), popularities


def as_recorded(
    scenario: Scenario, recorded: str | Path | RecordedRouting | None
) -> tuple[Scenario, str | Path | RecordedRouting | None]:
    """(the scenario with the recording as its popularity, what of the recording that could not take in).

    A scenario takes files, but no histogram for a group-limited router: it does not say which experts go together, so
    steps cannot be simulated with it, only counts drawn.
    """
    if recorded is None or isinstance(recorded, RecordedRouting):
        return scenario, recorded
    moe = next((layer.ffn for layer in scenario.model.layers if isinstance(layer.ffn, MoeFfn)), None)
    is_limited = moe is not None and moe.router.top_groups < moe.router.num_groups
    if is_limited and Path(recorded).suffix.lower() in TABLES:
        return scenario, recorded
    return scenario.with_recording(recorded), None


def routed_base(scenario: Scenario) -> StepLoad:
    """The step's own load, or InputError for a model that routes nothing."""
    base = step_load(scenario)
    check(base is not None, "model", "layers", "must have experts to route to", scenario.model.name)
    assert base is not None
    return base


def summarise_load(scenario: Scenario, step: StepLoad, source: str = "popularity") -> RoutedLoad:
    """The sums of a step's load, over groups and micro-batches."""
    load = step.load
    by_rank = [step.placement.rank_loads(step.kept_GMLS[:, :, at]) for at in range(len(step.layers))]
    busiest_L = [float((ranks.max(axis=-1) / np.maximum(ranks.mean(axis=-1), 1e-30)).mean()) for ranks in by_rank]
    assigned_LE = load.assigned_GMLE.sum(axis=(0, 1), dtype=np.float64)
    kept_LE = load.kept_GMLE.sum(axis=(0, 1), dtype=np.float64)
    places = places_of(scenario, step.popularities, scenario.routing.capacity_factor)
    parts = step.popularities.domains
    return RoutedLoad(
        layers=step.layers,
        top_k=step.moe.router.top_k,
        assigned_LE=assigned_LE,
        kept_LE=kept_LE,
        assigned_LR=_by_rank(step, assigned_LE),
        kept_LR=_by_rank(step, kept_LE),
        places=None if places is None else places * math.prod(load.assigned_GMLE.shape[:2]),
        domain_names=() if parts is None else parts.names,
        domain_inclusion_DLE=None if parts is None else parts.inclusion_DLE,
        busiest_L=np.array(busiest_L),
        source=source,
    )


def _by_rank(step: StepLoad, load_LE: Floats) -> Floats:
    return np.asarray(step.placement.rank_loads(step.placed.of_slots(load_LE)), dtype=np.float64)


def replay_of(scenario: Scenario, num_tokens: int) -> RecordedRouting:
    """Router replay of tokens drawn from the scenario's popularity, for other programs and for feeding back.

    Raises NotModelledError for routers whose tokens take varying numbers of experts, and for domain mixtures.
    """
    check(num_tokens >= 1, "parameters", "tokens", "must be at least 1", num_tokens)
    base = routed_base(scenario)
    popularities, router = base.popularities, base.moe.router
    if router.choice != "top_k" or popularities.zero_log_weights_LZ is not None or popularities.domains is not None:
        what = "a replay of routers with varying numbers of experts per token, or of domains,"
        raise NotModelledError(f"scenario.routing: {what} is not modelled")
    rng = stream(scenario.seed, "replay")
    experts_TLK = np.empty((num_tokens, popularities.num_layers, router.top_k), dtype=np.int16)
    for layer, weights_E in enumerate(popularities.log_weights_LE):
        if popularities.repeat_L is None:
            experts_TLK[:, layer] = draw_choices(weights_E, router, num_tokens, rng)
        else:
            repeat = float(popularities.repeat_L[layer])
            experts_TLK[:, layer] = draw_token_sequence(weights_E, router, num_tokens, repeat, rng)
    return recorded_from_array(experts_TLK, num_experts=popularities.num_experts, layers=base.layers)


def write_routing_file(path: Path, scenario: Scenario, load: RoutedLoad, num_tokens: int) -> Path:
    """Write a step's routing in the form that the path's ending names, and return the path.

    .npy, .npz, .safetensors, .jsonl: tokens, the recording's own or num_tokens drawn ones; .csv, .parquet: a histogram,
    of the recording step by step, or of the step that was drawn. Raises InputError for other endings, and for tokens
    where only a histogram was recorded.
    """
    is_table, source = path.suffix.lower() in TABLES, Path(load.source)
    if load.source == "popularity":
        if is_table:
            write_histogram(load.histogram, path)
        else:
            write_recorded(replay_of(scenario, num_tokens), path)
        return path
    if source.suffix.lower() in TABLES:
        rule = "must end in .csv or .parquet where a histogram was recorded: it does not say what single tokens took"
        check(is_table, str(path), "", rule, path.suffix)
        write_histogram(read_histogram(source, num_experts=load.num_experts), path)
        return path
    trace = read_recorded(source, num_experts=load.num_experts)
    if is_table:
        write_histogram(recorded_histogram(trace), path)
    else:
        write_recorded(trace, path)
    return path


def recorded_inclusion(base: StepLoad, recorded: str | Path | RecordedRouting) -> tuple[Popularities, str]:
    """(how often a token takes each expert of each layer as recorded, the recording's name), checked against base.

    Good for counts; which experts go together is not in it.
    """
    num_experts, top_k = base.moe.num_experts, base.moe.router.top_k
    if isinstance(recorded, RecordedRouting) or Path(recorded).suffix.lower() not in TABLES:
        trace = recorded if isinstance(recorded, RecordedRouting) else read_recorded(recorded, num_experts=num_experts)
        owner, layers, counts_LE = trace.owner, trace.layers, load_LE(trace)
        check(trace.top_k == top_k, owner, "experts per token", f"must be the model's {top_k}", trace.top_k)
        check(trace.num_experts == num_experts, owner, "num_experts", f"must be {num_experts}", trace.num_experts)
    else:
        owner = str(recorded)
        layers, counts_LE = histogram_load(recorded, num_experts=num_experts)
    rule = f"must be the model's {len(base.layers)} MoE layers"
    check(len(layers) == len(base.layers), owner, "layers", rule, len(layers))
    total_L1 = counts_LE.sum(axis=1, keepdims=True)
    check(bool((total_L1 > 0).all()), owner, "tokens", "must not all be 0 in a layer", total_L1.ravel().tolist())
    inclusion_LE = counts_LE * (top_k / total_L1)
    most = float(inclusion_LE.max())
    rule = f"an expert must not take more than all tokens (top-{top_k})"
    check(most <= 1.0 + 1e-9, owner, "tokens", rule, f"{most:.3g} times")
    inclusion_LE = np.minimum(inclusion_LE, 1.0)
    log_weights_LE = weights_of_inclusion(np.maximum(inclusion_LE, 0.5 * top_k / total_L1))
    sigma = max(float(log_weights_LE.std()), 1e-9)
    popularities = Popularities(
        router=base.moe.router, log_weights_LE=log_weights_LE, inclusion_LE=inclusion_LE, sigma=sigma
    )
    return popularities, owner
