"""What capacity drops under a scenario's routing: expected by layer at any factor, and token by token in a sample.

Legend: L MoE layers, E experts, D domains.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.cost.layer import rank_tokens
from moesim.describe.workload import Balanced
from moesim.errors import check
from moesim.routing.capacity import Limit, expected_kept_LE, limit_of, rerouted
from moesim.routing.drops import sample_drops
from moesim.routing.load import next_weights
from moesim.routing.popularity import Popularities
from moesim.scenario import Scenario
from moesim.seeds import stream

Floats = NDArray[np.float64]
_MOST_SCORES = 50_000_000  # drawn token by token: tokens x experts, over all layers that are drawn
FEW_DROPS = 0.01  # of all assignments: what a report calls few
_LEAST_DROP = 1e-6  # asked for no drops at all: since some token may always be one too many
_MOST_FACTOR = 4096.0


@dataclass(frozen=True, kw_only=True)
class DropPoint:
    """Share of assignments dropped, and of expert buffers left empty, at one capacity factor."""

    capacity_factor: float
    drop_fraction: float
    padding_fraction: float


@dataclass(frozen=True, kw_only=True)
class NeededCapacity:
    """The least capacity that drops no more than wanted, in the mean layer and in the worst."""

    wanted_drop_fraction: float
    capacity_factor: float  # mean over layers
    worst_layer_capacity_factor: float
    drop_fraction: float  # reached at capacity_factor
    padding_fraction: float


@dataclass(frozen=True, kw_only=True)
class TokenDrops:
    """What single tokens lose: drawn one by one in one micro-batch of one group, in num_layers of the layers.

    hurt_fraction: tokens that lose any of their experts; lost_fraction: that lose all of them.
    """

    num_tokens: int
    num_layers: int
    drop_fraction: float
    hurt_fraction: float
    lost_fraction: float


def limit_at(
    scenario: Scenario, popularities: Popularities, factor: float | None, *, pad: bool = False
) -> Limit | None:
    """The scenario's capacity convention at a capacity factor; None where nothing is ever dropped."""
    return limit_of(
        scenario.routing.capacity,
        capacity_factor=factor,
        tokens_per_rank=int(rank_tokens(scenario.parallel, scenario.train)),
        num_source_ranks=_num_source_ranks(scenario),
        num_experts=popularities.num_experts,
        top_k=popularities.router.top_k,
        pad=pad,
    )


def places_of(scenario: Scenario, popularities: Popularities, factor: float | None) -> float | None:
    """Assignments that one layer's full buffers hold in a group and micro-batch; None without a limit."""
    limit = limit_at(scenario, popularities, factor, pad=True)
    if limit is None:
        return None
    return float(
        limit.total_places * (popularities.num_experts if limit.of == "expert" else _num_source_ranks(scenario))
    )


def expected_drops_L(scenario: Scenario, popularities: Popularities, factor: float) -> Floats:
    """(L,) expected dropped share of each layer's assignments at a capacity factor, under the scenario's policy."""
    limit = limit_at(scenario, popularities, factor)
    inclusion_LE = popularities.inclusion_LE
    if limit is None:
        return np.zeros(len(inclusion_LE))
    num_tokens = rank_tokens(scenario.parallel, scenario.train) * _num_source_ranks(scenario)
    count_LE = num_tokens * inclusion_LE
    is_exact = isinstance(scenario.routing.popularity, Balanced) and popularities.is_uniform
    if is_exact and limit.of == "expert":
        kept_LE = np.minimum(count_LE, limit.total_places)
    else:
        kept_LE = count_LE * expected_kept_LE(inclusion_LE, limit, _rank_of_E(scenario, popularities))
    if scenario.routing.drop_policy == "reroute":
        kept_LE = np.asarray(rerouted(count_LE, kept_LE, limit, next_weights(popularities)), dtype=np.float64)
    return np.maximum(1.0 - kept_LE.sum(axis=1) / count_LE.sum(axis=1), 0.0)


def drop_point(scenario: Scenario, popularities: Popularities, factor: float) -> DropPoint:
    """Expected drops and padding, mean over layers, at one capacity factor. docs/model.md#drop-curve."""
    dropped = float(expected_drops_L(scenario, popularities, factor).mean())
    tokens = rank_tokens(scenario.parallel, scenario.train) * _num_source_ranks(scenario)
    assigned = tokens * float(popularities.inclusion_LE.sum(axis=1).mean())
    places = places_of(scenario, popularities, factor)
    padding = 0.0 if not places else max(0.0, 1.0 - (1.0 - dropped) * assigned / places)
    return DropPoint(capacity_factor=factor, drop_fraction=dropped, padding_fraction=padding)


def needed_capacity(scenario: Scenario, popularities: Popularities, wanted_drop_fraction: float) -> NeededCapacity:
    """The least capacity factor, to 0.1 %, that is expected to drop at most wanted_drop_fraction.

    Raises InputError for a share outside 0..1, and where no factor up to 4096 drops so little. At 0 it is the least
    that drops under a millionth. docs/model.md#needed-capacity.
    """
    rule = "must be at least 0, and below 1"
    check(0.0 <= wanted_drop_fraction < 1.0, "parameters", "wanted_drop_fraction", rule, wanted_drop_fraction)
    limit = max(wanted_drop_fraction, _LEAST_DROP)
    in_mean = _least_factor(scenario, popularities, limit, of_worst_layer=False)
    in_worst = _least_factor(scenario, popularities, limit, of_worst_layer=True)
    reached = drop_point(scenario, popularities, in_mean)
    return NeededCapacity(
        wanted_drop_fraction=wanted_drop_fraction,
        capacity_factor=in_mean,
        worst_layer_capacity_factor=in_worst,
        drop_fraction=reached.drop_fraction,
        padding_fraction=reached.padding_fraction,
    )


def _least_factor(scenario: Scenario, popularities: Popularities, wanted: float, *, of_worst_layer: bool) -> float:
    """By bisection: a factor drops no more than a smaller one, but for MegaBlocks' 0, which is never tried."""

    def is_enough(factor: float) -> bool:
        drops_L = expected_drops_L(scenario, popularities, factor)
        return float(drops_L.max() if of_worst_layer else drops_L.mean()) <= wanted

    low, high = 0.0, 1.0
    while not is_enough(high):
        low, high = high, 2.0 * high
        rule = f"cannot be reached by a capacity factor up to {_MOST_FACTOR:g}"
        check(high <= _MOST_FACTOR, "parameters", "wanted_drop_fraction", rule, wanted)
    while high - low > 1e-3 * high:
        middle = 0.5 * (low + high)
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def token_drops(scenario: Scenario, popularities: Popularities) -> TokenDrops | None:
    """Draw single tokens and drop by the scenario's policy; None without a capacity factor.

    As many layers are drawn as fit into 50 million tokens x experts, and at least one: of the layers in order of their
    expected drops, evenly spaced ones, so that a single one is the median.
    """
    factor = scenario.routing.capacity_factor
    if not factor:
        return None
    tokens, ranks = int(rank_tokens(scenario.parallel, scenario.train)), _num_source_ranks(scenario)
    room = max(1, _MOST_SCORES // (tokens * ranks * popularities.num_experts))
    num_drawn = min(room, popularities.num_layers)
    by_drops = np.argsort(expected_drops_L(scenario, popularities, factor), kind="stable")
    at = (np.arange(num_drawn) + 0.5) * popularities.num_layers / num_drawn
    chosen = np.sort(by_drops[at.astype(int)])
    report = sample_drops(
        _of_layers(popularities, chosen),
        scenario.routing,
        tokens_per_rank=tokens,
        num_source_ranks=ranks,
        rng=stream(scenario.seed, "token drops"),
        rank_of_E=_rank_of_E(scenario, popularities),
    )
    drawn = report.num_tokens * len(chosen)
    return TokenDrops(
        num_tokens=report.num_tokens,
        num_layers=len(chosen),
        drop_fraction=report.drop_fraction,
        hurt_fraction=float(report.tokens_hurt_L.sum() / drawn),
        lost_fraction=float(report.tokens_lost_L.sum() / drawn),
    )


def _of_layers(popularities: Popularities, layers: NDArray[np.int64]) -> Popularities:
    """The popularities of some layers. A pool, which serves traffic only, is left out."""
    parts = popularities.domains
    if parts is not None:
        parts = dataclasses.replace(
            parts, log_weights_DLE=parts.log_weights_DLE[:, layers], inclusion_DLE=parts.inclusion_DLE[:, layers]
        )
    by_layer = ("log_weights_LE", "inclusion_LE", "zero_log_weights_LZ", "nowhere_L", "repeat_L", "first_LE")
    values = {name: getattr(popularities, name) for name in by_layer}
    kept: dict[str, Any] = {name: None if value is None else value[layers] for name, value in values.items()}
    return dataclasses.replace(popularities, pool_LTK=None, domains=parts, **kept)


def _num_source_ranks(scenario: Scenario) -> int:
    return scenario.parallel.ep * scenario.parallel.etp


def _rank_of_E(scenario: Scenario, popularities: Popularities) -> NDArray[np.int64]:
    """Contiguous: what a rank's buffer drops under another placement is not expected here, only drawn."""
    experts, ranks = popularities.num_experts, _num_source_ranks(scenario)
    return np.arange(experts) // (experts // ranks) if experts % ranks == 0 else np.zeros(experts, dtype=np.int64)
