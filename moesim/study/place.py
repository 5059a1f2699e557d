"""One load, one policy: where experts go, how even that is, and what it costs against the best there can be.

Legend: L layers, E experts, R ranks, S slots, N nodes, T tokens, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.cost.software import MEGATRON
from moesim.describe.model import MoeFfn, Router
from moesim.describe.parameters import layer_parameters
from moesim.errors import InputError, check, near_match
from moesim.placement.nodes import cross_node_tokens
from moesim.placement.policies import POLICIES, Known, Policy
from moesim.placement.price import Migration, SlotBytes, migration, moved_slots, slot_bytes
from moesim.placement.search import check_fits, checked_loads, lower_bounds
from moesim.placement.slots import LayerPlacements, RankSlots
from moesim.placement.splits import Nearest, share_by_sender_NEN
from moesim.scenario import Scenario
from moesim.seeds import stream
from moesim.study.sizes import rank_memories
from moesim.timeline.load import StepLoad, positions_by_stage, step_load
from moesim.timeline.placed import Choices, token_choices

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]

DEFAULT_POLICY = "search"
OWNER = "place"


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacedLoad:
    """A load under a placement. Loads and tokens are in the load's own unit; max_mean and lower_bound are ratios.

    lower_bound_L: no layout of these slots has a smaller max_mean. cross_node_tokens_L: assignments that leave the node
    they come from, when every rank brings as many. moved_slots_L: slots that a rank must fetch, None without a previous
    placement.
    """

    policy: str
    placements: LayerPlacements
    load_LE: Floats
    rank_loads_LR: Floats
    max_mean_L: Floats
    lower_bound_L: Floats
    cross_node_tokens_L: Floats
    moved_slots_L: Whole | None
    contiguous_max_mean_L: Floats | None  # of the layout that nobody chose; None where the ranks do not divide

    def layers(self) -> list[dict[str, Any]]:
        """One mapping per layer, as ``moesim place --json`` prints it."""
        moved_L = [None] * len(self.max_mean_L) if self.moved_slots_L is None else self.moved_slots_L.tolist()
        columns: Mapping[str, list[Any]] = {
            "layer": list(range(len(self.max_mean_L))),
            "max_mean": self.max_mean_L.tolist(),
            "lower_bound": self.lower_bound_L.tolist(),
            "rank_loads": self.rank_loads_LR.tolist(),
            "cross_node_tokens": self.cross_node_tokens_L.tolist(),
            "moved_slots": moved_L,
            "physical_to_logical": self.placements.physical_to_logical_LS.tolist(),
        }
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def place_load(
    load_LE: ArrayLike,
    ranks: RankSlots,
    *,
    policy: str | None = None,
    given: LayerPlacements | None = None,
    num_groups: int = 1,
    previous: LayerPlacements | None = None,
    choices: Choices | None = None,
    rng: np.random.Generator,
) -> PlacedLoad:
    """Place a load by a policy's name and measure what comes out.

    load_LE: layers x experts, any unit; policy: one of POLICIES (None: search); given: a placement to measure instead;
    num_groups: the router's expert groups, which hierarchical policies keep on a node; previous: today's placement,
    which searches stay close to; choices: tokens of the load, which node_aware needs. Raises InputError for what is no
    load, for slots that do not suffice and for an unknown policy.

    >>> from moesim.placement.slots import even_slots
    >>> ranks = even_slots(4, 2)
    >>> placed = place_load([[3.0, 1.0, 1.0, 3.0]], ranks, policy="eplb", rng=np.random.default_rng(0))
    >>> placed.max_mean_L.tolist()
    [1.0]
    """
    load = checked_loads(load_LE)
    check_fits(load.shape[1], ranks)
    with np.errstate(over="ignore"):
        total = load.sum()
    check(bool(np.isfinite(total)), OWNER, "loads", "must sum to a finite number", float(load.max()))
    name = "map" if given is not None else policy or DEFAULT_POLICY
    placements = given
    if placements is None:
        together = None if choices is None else choices.together_LEE
        known = Known(num_groups=num_groups, previous=previous, coactivation_LEE=together)
        placements = policy_of(name)(load, ranks, rng=rng, known=known)
    return measured(name, placements, load, previous=previous, choices=choices)


def measured(
    policy: str,
    placements: LayerPlacements,
    load_LE: Floats,
    *,
    previous: LayerPlacements | None = None,
    choices: Choices | None = None,
) -> PlacedLoad:
    """What a load comes to under placements that stand."""
    max_mean_L = placements.max_mean(load_LE)
    return PlacedLoad(
        policy=policy,
        placements=placements,
        load_LE=load_LE,
        rank_loads_LR=placements.rank_loads(load_LE),
        max_mean_L=max_mean_L,
        lower_bound_L=_bounds(load_LE, placements.ranks, max_mean_L),
        cross_node_tokens_L=_crossing(placements, load_LE, choices),
        moved_slots_L=None if previous is None else moved_slots(previous, placements),
        contiguous_max_mean_L=_contiguous_max_mean(load_LE, placements.ranks),
    )


def policy_of(name: str) -> Policy:
    """The policy of a name. Raises InputError, with the nearest name, for an unknown one."""
    if name not in POLICIES:
        raise InputError(OWNER, "policy", "is not known", name, near_match(name, POLICIES))
    return POLICIES[name]


def _bounds(load_LE: Floats, ranks: RankSlots, reached_L: Floats) -> Floats:
    """The room's bounds; where a layout meets its bound, their sums differ by rounding, which is taken off."""
    bound_L = lower_bounds(load_LE, ranks, reached_L=reached_L)
    assert bool((bound_L <= reached_L * (1.0 + 1e-9)).all()), "a layout beats its lower bound"
    return np.minimum(bound_L, reached_L)


def _contiguous_max_mean(load_LE: Floats, ranks: RankSlots) -> Floats | None:
    """(L,) max/mean of each expert once, in order; None where the ranks do not divide the experts."""
    num_layers, num_experts = load_LE.shape
    if num_experts % ranks.num_ranks:
        return None
    return load_LE.reshape(num_layers, ranks.num_ranks, -1).sum(axis=2).max(axis=1) / np.maximum(
        load_LE.sum(axis=1) / ranks.num_ranks, 1e-300
    )


def _crossing(placements: LayerPlacements, load_LE: Floats, choices: Choices | None) -> Floats:
    """(L,) see PlacedLoad.cross_node_tokens_L."""
    if choices is not None:
        tokens_L = load_LE.sum(axis=1) / choices.counted_LTK.shape[2]
        return cross_node_tokens(placements, choices.counted_LTK) * tokens_L
    nodes = placements.ranks.num_nodes
    crossing_L = np.zeros(len(load_LE))
    for layer, load_E in enumerate(load_LE):
        share_NEN = share_by_sender_NEN(placements, Nearest(), load_LE, layer)
        crossing_L[layer] = load_E @ (1.0 - np.einsum("nen->e", share_NEN) / nodes)
    return crossing_L


def scenario_load(scenario: Scenario) -> tuple[Floats, Choices | None, Router]:
    """(load_LE, tokens, router) of a scenario's step. Raises NotModelledError where MoE layers differ."""
    drawn = step_load(scenario)
    assert drawn is not None, "a model without experts has nothing to place"
    return load_of(drawn), token_choices(drawn.popularities, stream(scenario.seed, "tokens")), drawn.moe.router


def load_of(drawn: StepLoad) -> Floats:
    """(L, E) assignments of a drawn step after drops, over its groups and micro-batches."""
    return drawn.load.kept_GMLE.sum(axis=(0, 1), dtype=np.float64)


def expert_bytes(scenario: Scenario) -> SlotBytes:
    """Memory of one slot of one layer on each of its GPUs in training [bytes]: weights, gradients, Adam's states, the
    latter none where they lie in the host's memory.

    ZeRO shares the states (stage 1), the gradients (2) and the weights (3) over the replicas of the expert-parallel
    group, as ``moesim.cost.memory`` counts them.
    """
    layer = next(layer for layer in scenario.model.layers if isinstance(layer.ffn, MoeFfn))
    parameters = layer_parameters(scenario.model, layer).per_expert / scenario.parallel.etp
    whole = slot_bytes(parameters, optimizer=scenario.train.optimizer)
    stays = "optimizer" not in scenario.train.offloaded
    (_, shards), zero = scenario.layout.num_shards(), scenario.parallel.zero
    return SlotBytes(
        weights_bytes=whole.weights_bytes / (shards if zero >= 3 else 1),
        gradients_bytes=whole.gradients_bytes / (shards if zero >= 2 else 1),
        optimizer_bytes=whole.optimizer_bytes / (shards if zero >= 1 else 1) if stays else 0.0,
    )


def slots_that_fit(scenario: Scenario) -> int:
    """Most expert slots of a group, alike on all its GPUs, that fit in memory; 0 where not even today's do.

    Today's slots and those that the free memory of the fullest GPU of any stage holds, allocator reserve included; at
    most every expert on every GPU. Activations are taken to stay as they are, though copies spread them.
    """
    slot, ep = expert_bytes(scenario), scenario.parallel.ep
    num_experts = next(layer.ffn.num_experts for layer in scenario.model.layers if isinstance(layer.ffn, MoeFfn))
    today = (scenario.placement.num_slots or num_experts) // ep
    free_bytes = [scenario.cluster.gpu.memory_bytes.value - memory.peak_bytes for memory in rank_memories(scenario)]
    if min(free_bytes) < 0:
        return 0
    with_reserve = 1.0 + MEGATRON.allocator_reserve_fraction.value
    layers = [len(positions) for positions in positions_by_stage(scenario)]
    more = [int(f // (n * slot.total_bytes * with_reserve)) for f, n in zip(free_bytes, layers, strict=True) if n]
    return min(today + min(more), num_experts) * ep


def migration_of(scenario: Scenario, previous: LayerPlacements, new: LayerPlacements) -> Migration:
    """What moving from one layout to another costs, optimizer states included.

    Pipeline stages move at once, each its own layers over its own wires; replicas of a group move alike, at once too.
    """
    cluster, slot = scenario.cluster, expert_bytes(scenario)
    moves = [
        migration(
            _layers_of(previous, positions),
            _layers_of(new, positions),
            slot,
            nic_bytes_per_s=cluster.nic_bytes_per_s.value,
            nvlink_bytes_per_s=cluster.nvlink_bytes_per_s.value,
            with_state=True,
        )
        for positions in positions_by_stage(scenario)
        if positions
    ]
    return Migration(
        num_moved_slots=sum(move.num_moved_slots for move in moves),
        nvlink_bytes=sum(move.nvlink_bytes for move in moves),
        nic_bytes=sum(move.nic_bytes for move in moves),
        stall_s=max(move.stall_s for move in moves),
    )


def _layers_of(placed: LayerPlacements, positions: Sequence[int]) -> LayerPlacements:
    rows = placed.physical_to_logical_LS[list(positions)]
    return LayerPlacements(physical_to_logical_LS=rows, num_experts=placed.num_experts, ranks=placed.ranks)


def slots_of_map(raw: object, ranks: RankSlots, num_experts: int) -> RankSlots:
    """The slots that a map's JSON speaks of, on the same ranks: a map of yesterday may have had fewer or more.

    Where it cannot tell, or they do not spread evenly, ranks as they are: then the map's own check says what is wrong.
    """
    found = _num_slots(raw, num_experts)
    if not found or found % ranks.num_ranks:
        return ranks
    slots_R = np.full(ranks.num_ranks, found // ranks.num_ranks)
    return RankSlots(num_slots_R=slots_R, speed_R=ranks.speed_R, node_of_rank_R=ranks.node_of_rank_R)


def _num_slots(raw: object, num_experts: int) -> int:
    """Slots of a layer in a map's JSON, 0 where it is none of the forms that ``moesim.placement.maps`` reads."""
    match raw:
        case {"physical_to_logical_map": [[*row], *_]} | {"physical_to_logical": [[*row], *_]}:
            return len(row)
        case {"physical_to_logical_map": [*row]} | {"physical_to_logical": [*row]}:
            return len(row)
        case {"expert_to_rank": _}:
            return num_experts
        case {"layer_list": [{"device_list": [*devices]}, *_]}:
            held = [device.get("device_expert") for device in devices if isinstance(device, dict)]
            return sum(len(experts) for experts in held if isinstance(experts, list))
    return 0
