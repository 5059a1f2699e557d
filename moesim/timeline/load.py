"""The routed load of one step, stage by stage: rows of each expert and the time each rank spends in the all-to-alls.

Legend: G expert-parallel groups of a stage, M micro-batches, L MoE layers (of the model, or of a stage), E experts, R
ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from moesim.cost.layer import ACTIVATION_BYTES, rank_tokens
from moesim.cost.precision import RECIPES
from moesim.describe.capacity import Megablocks, RankBuffer
from moesim.describe.model import MoeFfn, Router
from moesim.describe.pipeline import stage_chunks, trained_layers
from moesim.describe.placement import PolicyName
from moesim.describe.workload import Balanced, Multinomial, Popularity, Recorded
from moesim.errors import NotModelledError
from moesim.fabric.collectives import allgather_s, alltoall_finish_s
from moesim.fabric.each_message import exchange_finish_s, topology_of_group
from moesim.fabric.ports import ports_of
from moesim.fabric.senders import combine_ports_by_sender, dispatch_ports_by_sender
from moesim.fabric.traffic import Dedup, Direction, PortBytes, combine_ports, dispatch_ports, expected_copies
from moesim.placement import Placement
from moesim.placement.maps import load_map
from moesim.placement.policies import POLICIES, Known
from moesim.placement.slots import RankSlots
from moesim.routing.load import ExpertLoad, draw_load
from moesim.routing.popularity import Popularities, popularity_LE
from moesim.routing.visits import VisitProbabilities, visit_probabilities
from moesim.scenario import Scenario
from moesim.seeds import stream
from moesim.timeline.placed import PlacedExperts, placed_experts, scenario_ranks, sender_weights, token_choices
from moesim.timeline.stage import StageLoad

Floats = NDArray[np.floating]
Ranks = NDArray[np.int64]
_Arrays = TypeVar("_Arrays", "StepLoad", ExpertLoad, "Exchange")
Nodes = tuple[tuple[int, ...], ...]  # of each group, of each of its ranks
# alltoall sends a row for each of a token's experts (Megatron-LM's MoEAlltoAllTokenDispatcher permutes, then sends),
# deepep a token once over the network to each node, and from there once to each rank.
DEDUP: Mapping[str, Dedup] = {"alltoall": "none", "deepep": "node"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Exchange:
    """Seconds that each rank spends in each all-to-all, all layers of the model, for one way of lying on nodes; and the
    rows that reach it.
    """

    dispatch_s_GMLR: Floats
    combine_s_GMLR: Floats
    dispatch_backward_s_GMLR: Floats  # the gradient of the dispatch goes back as a combine does
    combine_backward_s_GMLR: Floats
    arrived_GMLR: Floats  # rows that the dispatch brings each rank: tokens where it sends each only once


@dataclass(frozen=True, kw_only=True, eq=False)
class StepLoad:
    """Where the tokens of one step went, in every MoE layer of the model."""

    moe: MoeFfn
    # Numbers of the MoE layers in the model; trained multi-token-prediction layers follow the stack.
    layers: tuple[int, ...]
    positions_by_stage: tuple[tuple[int, ...], ...]  # which of these layers each stage holds, chunk by chunk
    popularities: Popularities
    placed: PlacedExperts
    load: ExpertLoad
    kept_GMLS: Floats  # kept assignments of each slot
    rows_GMLS: Floats  # rows of each slot: what is computed and held, padding included
    exchange_by_stage: tuple[Exchange, ...]
    laid_out_rows: float  # that each rank writes for the wire, of a layer and micro-batch
    etp: int

    @property
    def placement(self) -> Placement:
        """Which rank has each slot."""
        return self.placed.rank_of_slot

    @property
    def rows_GMLRE(self) -> Floats:
        """Kept assignments of each slot, by the rank that has it; E counts a rank's slots."""
        return self.rows_GMLS.reshape(*self.rows_GMLS.shape[:-1], self.placement.num_ranks, -1)

    def received_GMLR(self, stage: int) -> Floats | None:
        """Kept assignments that each expert-parallel rank of a stage receives in its MoE layers; None without any."""
        positions = list(self.positions_by_stage[stage])
        return self.placement.rank_loads(self.rows_GMLS[:, :, positions]) if positions else None

    def first(self, num_groups: int, num_micro_batches: int) -> StepLoad:
        """The part that its first groups and micro-batches are, as if the step had no more."""

        def cut(part: _Arrays, names: Iterable[str]) -> _Arrays:
            return replace(part, **{name: getattr(part, name)[:num_groups, :num_micro_batches] for name in names})

        kept = cut(self, ("kept_GMLS", "rows_GMLS"))
        return replace(
            kept,
            load=cut(self.load, ("assigned_GMLE", "kept_GMLE", "rows_GMLE")),
            exchange_by_stage=tuple(cut(e, [f.name for f in fields(Exchange)]) for e in self.exchange_by_stage),
        )

    def of_stage(self, stage: int) -> StageLoad | None:
        """What a stage's phases need; ranks in rank order, expert-tensor ranks sharing their rows. None without MoE."""
        at = list(self.positions_by_stage[stage])
        if not at:
            return None
        exchange = self.exchange_by_stage[stage]
        rows_MLGRE = np.moveaxis(self.rows_GMLRE[:, :, at], 0, 2)
        return StageLoad(
            laid_out_rows=self.laid_out_rows,
            rows_MLRE=np.repeat(rows_MLGRE, self.etp, axis=3).reshape(*rows_MLGRE.shape[:2], -1, rows_MLGRE.shape[-1]),
            arrived_MLR=_by_rank(exchange.arrived_GMLR[:, :, at], self.etp),
            dispatch_s_MLR=_by_rank(exchange.dispatch_s_GMLR[:, :, at], self.etp),
            combine_s_MLR=_by_rank(exchange.combine_s_GMLR[:, :, at], self.etp),
            dispatch_backward_s_MLR=_by_rank(exchange.dispatch_backward_s_GMLR[:, :, at], self.etp),
            combine_backward_s_MLR=_by_rank(exchange.combine_backward_s_GMLR[:, :, at], self.etp),
        )


def step_load(scenario: Scenario, num_groups: int | None = None) -> StepLoad | None:
    """Draw the step's load; None for a dense model.

    num_groups: of the expert-parallel groups of a stage only the first so many; None: all. Raises NotModelledError
    where MoE layers differ.
    """
    model, parallel, choice = scenario.model, scenario.parallel, scenario.placement
    stack, layers = trained_layers(model, scenario.train), moe_layers(scenario)
    if not layers:
        return None
    moe = stack[layers[0]].ffn
    assert isinstance(moe, MoeFfn)
    if any(stack[i].ffn != moe for i in layers):
        raise NotModelledError(f"model {model.name}: MoE layers that differ from one another are not modelled")
    asked = scenario.routing.popularity
    fixed = (asked, len(layers), moe.num_experts, moe.router, scenario.seed, _stamp(asked))
    placed_for, popularities = _popularities(*fixed, 0), _popularities(*fixed, choice.age_steps)
    placed = _placed(scenario, placed_for, popularities)
    if isinstance(scenario.routing.capacity, RankBuffer) and placed.rank_of_expert_E is None:
        what = "rank-level buffers with replicas, or with a placement that differs from layer to layer"
        raise NotModelledError(f"scenario.routing.capacity: {what}, are not modelled")
    load = draw_load(
        popularities,
        scenario.routing,
        tokens_per_rank=int(rank_tokens(parallel, scenario.train)),
        num_source_ranks=parallel.ep * parallel.etp,
        num_groups=num_groups or scenario.layout.edp,
        num_micro_batches=scenario.num_micro_batches,
        rng=stream(scenario.seed, "load"),
        rank_of_E=placed.rank_of_expert_E,
    )
    kept_GMLS = placed.of_slots(load.kept_GMLE)
    sent = _sent(scenario, placed, load)
    exchanges: dict[Nodes, Exchange] = {}
    by_stage = [_nodes_of_groups(scenario, stage)[: load.kept_GMLE.shape[0]] for stage in range(parallel.pp)]
    for nodes in by_stage:
        if nodes not in exchanges:
            exchanges[nodes] = _exchange(scenario, placed, sent, nodes)
    return StepLoad(
        moe=moe,
        layers=layers,
        positions_by_stage=positions_by_stage(scenario),
        popularities=popularities,
        placed=placed,
        load=load,
        kept_GMLS=kept_GMLS,
        rows_GMLS=kept_GMLS if load.rows_GMLE is load.kept_GMLE else placed.of_slots(load.rows_GMLE),
        exchange_by_stage=tuple(exchanges[nodes] for nodes in by_stage),
        laid_out_rows=sent.laid_out_rows,
        etp=parallel.etp,
    )


def redrawn(scenario: Scenario, base: StepLoad, popularities: Popularities, rng: np.random.Generator) -> StepLoad:
    """Another step's counts under the given popularities, for as many groups and micro-batches as base has; experts
    stay where base has them.

    The seconds of the exchanges stay those of base.
    """
    routing = scenario.routing
    if isinstance(routing.popularity, Balanced) and not popularities.is_uniform:  # a recording is not forced balance
        routing = replace(routing, popularity=Multinomial())
    num_groups, num_micro_batches = base.kept_GMLS.shape[:2]
    load = draw_load(
        popularities,
        routing,
        tokens_per_rank=int(rank_tokens(scenario.parallel, scenario.train)),
        num_source_ranks=scenario.parallel.ep * scenario.parallel.etp,
        num_groups=num_groups,
        num_micro_batches=num_micro_batches,
        rng=rng,
        rank_of_E=None if scenario.expert_copies > 1 else base.placed.rank_of_expert_E,
    )
    of_slots = base.placed.of_slots
    return replace(
        base,
        popularities=popularities,
        load=load,
        kept_GMLS=of_slots(load.kept_GMLE),
        rows_GMLS=of_slots(load.rows_GMLE),
    )


def moe_layers(scenario: Scenario) -> tuple[int, ...]:
    """Numbers of the MoE layers that are trained."""
    return tuple(i for i, layer in enumerate(trained_layers(scenario.model, scenario.train)) if layer.is_moe)


def positions_by_stage(scenario: Scenario) -> tuple[tuple[int, ...], ...]:
    """Positions in ``moe_layers`` of the MoE layers of each stage, chunk by chunk."""
    position = {number: at for at, number in enumerate(moe_layers(scenario))}
    stages = (
        stage_chunks(scenario.model, scenario.parallel, scenario.train, stage) for stage in range(scenario.parallel.pp)
    )
    return tuple(
        tuple(position[placed.number] for chunk in chunks for placed in chunk if placed.layer.is_moe)
        for chunks in stages
    )


def groups_lie_alike(scenario: Scenario) -> bool:
    """Whether every expert-parallel group of a stage lies on nodes as the stage's others do."""
    return all(len(set(_nodes_of_groups(scenario, stage))) == 1 for stage in range(scenario.parallel.pp))


def _nodes_of_groups(scenario: Scenario, stage: int) -> Nodes:
    """For each expert-parallel group of a stage, which of its ranks share a node (the first rank's is 0)."""
    parallel = scenario.parallel
    ranks_GR = scenario.layout.stage_ranks(stage).reshape(-1, parallel.ep, parallel.etp)[:, :, 0]
    nodes_GR = ranks_GR // scenario.cluster.ranks_per_node
    return tuple(tuple((nodes_R - nodes_R[0]).tolist()) for nodes_R in nodes_GR)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Sent:
    """What travels: rows for each slot, how often a token does, and rows that each rank lays out for the wire."""

    rows_GMLS: Floats
    dedup: Dedup
    laid_out_rows: float


def _sent(scenario: Scenario, placed: PlacedExperts, load: ExpertLoad) -> _Sent:
    """What the frameworks send of a drawn load. docs/model.md#what-is-sent.

    Who keeps a limit for each expert drops before sending; padded buffers then travel whole, every assignment in a
    place of its own. MegaBlocks drops and pads what has arrived; so does a dispatcher that takes no padded buffers.
    """
    routing, parallel = scenario.routing, scenario.parallel
    rows = rank_tokens(parallel, scenario.train) * placed.popularities.router.top_k
    if isinstance(routing.capacity, Megablocks):
        return _Sent(rows_GMLS=placed.of_slots(load.assigned_GMLE), dedup=DEDUP[routing.dispatcher], laid_out_rows=rows)
    limit = load.limit if routing.pad_to_capacity and routing.dispatcher == "alltoall" else None
    if limit is None or limit.of == "rank":
        return _Sent(rows_GMLS=placed.of_slots(load.kept_GMLE), dedup=DEDUP[routing.dispatcher], laid_out_rows=rows)
    places = limit.total_places * load.kept_GMLE.shape[-1] / (parallel.ep * parallel.etp)
    return _Sent(rows_GMLS=placed.of_slots(load.rows_GMLE), dedup="none", laid_out_rows=places)


def _exchange(scenario: Scenario, placed: PlacedExperts, sent: _Sent, nodes: Nodes) -> Exchange:
    """Every group's seconds in its all-to-alls; groups that lie on nodes alike are done together."""
    shape = (*sent.rows_GMLS.shape[:-1], placed.rank_of_slot.num_ranks)
    whole = Exchange(**{field.name: np.empty(shape) for field in fields(Exchange)})
    for pattern in dict.fromkeys(nodes):
        groups = [g for g, own in enumerate(nodes) if own == pattern]
        alike = replace(sent, rows_GMLS=sent.rows_GMLS[groups])
        part = _exchange_of_alike(scenario, placed, alike, np.array(pattern))
        for field in fields(Exchange):
            getattr(whole, field.name)[groups] = getattr(part, field.name)
    return whole


def _exchange_of_alike(scenario: Scenario, placed: PlacedExperts, sent: _Sent, node_of_rank_R: Ranks) -> Exchange:
    """Bytes between ranks, then the busiest port's time, for all micro-batches and layers at once."""
    parallel, train, cluster = scenario.parallel, scenario.train, scenario.cluster
    visits = _visits(placed.popularities, placed.rank_of_slot, node_of_rank_R)
    copies = expected_copies(
        sent.rows_GMLS,
        popularities=placed.popularities,
        visits=visits,
        placement=placed.rank_of_slot,
        tokens_per_rank=int(rank_tokens(parallel, train)),
        num_source_ranks=parallel.ep * parallel.etp,
    )
    num_rails = 1 if sent.dedup == "node" else int(np.unique(node_of_rank_R, return_counts=True)[1].max())
    ports = ports_of(cluster, num_rails=num_rails)
    wide = scenario.model.hidden * ACTIVATION_BYTES
    narrow = scenario.model.hidden * RECIPES[train.precision].dispatch_element_bytes(scenario.routing.dispatcher)
    received = placed.rank_of_slot.rank_loads(sent.rows_GMLS)

    def by_ports(ports_used: Callable[..., PortBytes], *, token_bytes: float) -> Floats:
        port_bytes = ports_used(copies, token_bytes=token_bytes, dedup=sent.dedup, cross_rail=cluster.cross_rail)
        return np.asarray(alltoall_finish_s(port_bytes, ports), dtype=np.float64)

    def seconds(finish_s: Callable[..., Floats], token_bytes: float) -> Floats:
        own = finish_s(token_bytes=token_bytes)
        if parallel.etp == 1:
            return own
        in_node = min(parallel.etp, cluster.ranks_per_node)
        return own + allgather_s(parallel.etp, in_node, received * token_bytes, cluster)

    dispatch: Callable[..., Floats] = partial(by_ports, dispatch_ports)
    combine: Callable[..., Floats] = partial(by_ports, combine_ports)
    if placed.is_by_sender:
        weights = sender_weights(placed, visits)
        dispatch = partial(by_ports, partial(dispatch_ports_by_sender, weights=weights))
        combine = partial(by_ports, partial(combine_ports_by_sender, weights=weights))
    if scenario.fidelity == "exact":
        if placed.is_by_sender:
            raise NotModelledError("fidelity exact: replicas that a sender chooses by its own place are not modelled")
        topology = topology_of_group(cluster, node_of_rank_R, scenario.seed)
        by_message = partial(exchange_finish_s, copies, topology, dedup=sent.dedup)
        dispatch, combine = (partial(by_message, direction=way) for way in get_args(Direction))
    # DeepEP's dispatch takes FP8 rows of gradients as well; combines stay wide. arXiv 2412.19437, section 3.3.3.
    gradient = narrow if scenario.routing.dispatcher == "deepep" else wide
    out, back = seconds(dispatch, narrow), seconds(combine, wide)
    return Exchange(
        dispatch_s_GMLR=out,
        combine_s_GMLR=back,
        dispatch_backward_s_GMLR=back,
        combine_backward_s_GMLR=out if gradient == narrow else seconds(dispatch, gradient),
        arrived_GMLR=received if sent.dedup == "none" else copies.visits_GMLR * (parallel.ep * parallel.etp),
    )


def _visits(popularities: Popularities, placement: Placement, node_of_rank_R: Ranks) -> VisitProbabilities:
    """visit_probabilities, remembered: other batches and dispatchers of a search ask for the same ones."""
    return _visits_of(popularities, placement.expert_to_rank_E.tobytes(), placement.num_ranks, node_of_rank_R.tobytes())


@lru_cache(maxsize=32)
def _visits_of(popularities: Popularities, ranks: bytes, num_ranks: int, nodes: bytes) -> VisitProbabilities:
    placement = Placement(expert_to_rank_E=np.frombuffer(ranks, dtype=np.int64), num_ranks=num_ranks)
    return visit_probabilities(popularities, placement, np.frombuffer(nodes, dtype=np.int64))


def _by_rank(seconds_GMLR: Floats, etp: int) -> Floats:
    """(M, L, ranks of the stage) from groups and expert-parallel ranks."""
    seconds_MLGR = np.moveaxis(seconds_GMLR, 0, 2)
    return np.repeat(seconds_MLGR, etp, axis=3).reshape(*seconds_MLGR.shape[:2], -1)


def _placed(scenario: Scenario, placed_for: Popularities, popularities: Popularities) -> PlacedExperts:
    """Experts in their slots by what can be known beforehand: expected loads, not the step's own counts.

    What a policy finds is remembered: other batches and dispatchers of a search ask for the same.
    """
    choice, num_experts = scenario.placement, placed_for.num_experts
    ranks = scenario_ranks(scenario, choice.num_slots or num_experts)
    if choice.map is not None:
        layers = load_map(choice.map, num_layers=placed_for.num_layers, num_experts=num_experts, ranks=ranks)
        return placed_experts(layers, popularities, choice.split, expected_LE=placed_for.inclusion_LE)
    where = (ranks.num_slots_R, ranks.speed_R, ranks.node_of_rank_R)
    texts = tuple((array.tobytes(), array.dtype.str) for array in where)
    return _placed_by_policy(placed_for, popularities, choice.policy, choice.split, scenario.seed, texts)


@lru_cache(maxsize=16)
def _placed_by_policy(
    placed_for: Popularities,
    popularities: Popularities,
    name: PolicyName,
    split: str,
    seed: int,
    where: tuple[tuple[bytes, str], ...],
) -> PlacedExperts:
    """where: arrays of RankSlots, as texts."""
    slots, speeds, nodes = (np.frombuffer(text, dtype=dtype).copy() for text, dtype in where)
    ranks = RankSlots(num_slots_R=slots, speed_R=speeds, node_of_rank_R=nodes)
    together = token_choices(placed_for, stream(seed, "tokens")) if name == "node_aware" else None
    known = Known(
        num_groups=placed_for.router.num_groups,
        coactivation_LEE=None if together is None else together.together_LEE,
    )
    layers = POLICIES[name](placed_for.inclusion_LE, ranks, rng=stream(seed, "placement"), known=known)
    return placed_experts(layers, popularities, split, expected_LE=placed_for.inclusion_LE)


@lru_cache(maxsize=8)
def _popularities(
    popularity: Popularity,
    num_layers: int,
    num_experts: int,
    router: Router,
    seed: int,
    stamp: tuple[int, int] | None,  # noqa: ARG001 - for the cache alone
    step: int,
) -> Popularities:
    """stamp: tells one state of a recording's file from another, which the cache would otherwise take for the same."""
    return popularity_LE(
        popularity,
        num_layers=num_layers,
        num_experts=num_experts,
        router=router,
        rng=stream(seed, "popularity"),
        step=step,
    )


def _stamp(popularity: Popularity) -> tuple[int, int] | None:
    """When a recording's file was last written, and its size; None where there is none (then reading it says so)."""
    path = Path(popularity.file) if isinstance(popularity, Recorded) else None
    if path is None or not path.is_file():
        return None
    found = path.stat()
    return found.st_mtime_ns, found.st_size
