"""Experts in their slots: from loads and popularities of experts to those of slots, replicas sharing an expert's
load.

To the rest of a step a slot is an expert of its own: it has a load, a popularity and a rank. A replicated expert's
weight in the router's race is split over its slots; a token may then, rarely, draw two replicas of one expert, which
makes the copies of such layers a little too many. See docs/model.md#replicas.

Legend: L MoE layers, E experts, S slots of an expert-parallel group, R its ranks, T pool tokens, K experts per token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from moesim.fabric.senders import SenderWeights
from moesim.placement import Placement
from moesim.placement.nodes import coactivation_EE
from moesim.placement.slots import LayerPlacements, RankSlots, even_slots
from moesim.placement.splits import Even, LeastLoaded, Nearest, Split, Uneven
from moesim.routing.popularity import Popularities
from moesim.routing.sampler import draw_choices
from moesim.routing.visits import VisitProbabilities
from moesim.scenario import Scenario

Floats = NDArray[np.floating]
SPLITS: Mapping[str, Split] = MappingProxyType(
    {
        "even": Even(),
        "nearest": Nearest(),
        "least_loaded": LeastLoaded(),
        "uneven": Uneven(max_passes=20, tolerance=1e-3),
    }
)
_NO_SHARE = 1e-12  # a replica that serves nobody still has a logarithm
_SURE = 1.0 - 1e-9
_GOLDEN = 0.6180339887498949
PAIR_TOKENS = 6144  # of each layer, to see which experts serve a token together; fewer, and chance pairs mislead
COUNTED_TOKENS = 2048  # others, to count copies between nodes by
_POOL_TOKENS = 8192  # of a pool that all layers shared, once each layer places its experts otherwise


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacedExperts:
    """Where every layer's experts live, how replicas share an expert's load, and the popularity of every slot."""

    layers: LayerPlacements
    share_LS: NDArray[np.float64]  # of its expert's load that a slot serves
    rank_of_slot: Placement  # the same for all layers
    popularities: Popularities  # of slots
    is_by_sender: bool = False  # whether it depends on the sender which replica serves it

    def of_slots(self, load_LE: Floats) -> Floats:
        """load_..LE as load_..LS, same dtype."""
        expert_LS = self.layers.physical_to_logical_LS
        if self._is_identity:
            return load_LE
        slots = np.take_along_axis(load_LE, expert_LS.reshape(*(1,) * (load_LE.ndim - 2), *expert_LS.shape), axis=-1)
        return slots * self.share_LS.astype(load_LE.dtype)

    @property
    def rank_of_expert_E(self) -> NDArray[np.int64] | None:
        """Where each expert is, the same in all layers; None where layers place their experts otherwise."""
        expert_LS = self.layers.physical_to_logical_LS
        if expert_LS.shape[1] != self.layers.num_experts or (expert_LS != expert_LS[0]).any():
            return None
        return self.layers.layer(0).expert_to_rank_E

    @property
    def _is_identity(self) -> bool:
        expert_LS = self.layers.physical_to_logical_LS
        return expert_LS.shape[1] == self.layers.num_experts and bool(
            (expert_LS == np.arange(expert_LS.shape[1])).all()
        )


def placed_experts(
    layers: LayerPlacements,
    popularities: Popularities,
    split: str = "even",
    *,
    expected_LE: NDArray[np.float64] | None = None,
) -> PlacedExperts:
    """Slots of a placement, replicas of an expert sharing its load as the split of that name does.

    expected_LE: the load that the split looks at, of when experts were placed (None: the popularities' own).
    """
    expert_LS = layers.physical_to_logical_LS
    expected_LE = popularities.inclusion_LE if expected_LE is None else expected_LE
    share_LS = _share_of_slots(layers, SPLITS[split], expected_LE)
    placed = PlacedExperts(
        layers=layers,
        share_LS=share_LS,
        rank_of_slot=Placement(expert_to_rank_E=layers.ranks.rank_of_slot_S, num_ranks=layers.ranks.num_ranks),
        popularities=popularities,
        is_by_sender=split == "nearest" and bool((share_LS < 1.0).any()),
    )
    if placed._is_identity:
        return placed
    replicated = bool((share_LS < 1.0).any())
    log_share_LS = np.log(np.maximum(share_LS, _NO_SHARE))

    def of_slots(values: NDArray[np.float64], *, log: bool = False) -> NDArray[np.float64]:
        """(..., L, E) as (..., L, S): weights by their logarithm, probabilities as they are."""
        index = np.broadcast_to(expert_LS, (*values.shape[:-1], expert_LS.shape[1]))
        taken = np.take_along_axis(values, index, axis=-1)
        return taken + log_share_LS if log else taken * share_LS

    log_weights_LS = of_slots(popularities.log_weights_LE, log=True)
    parts = popularities.domains
    slots = dataclasses.replace(
        popularities,
        log_weights_LE=log_weights_LS,
        inclusion_LE=of_slots(popularities.inclusion_LE),
        # Slots of an evenly popular layer are no longer alike once some experts have replicas.
        sigma=max(popularities.sigma, float(log_weights_LS.std())) if replicated else popularities.sigma,
        pool_LTK=None if popularities.pool_LTK is None else _pool_of_slots(popularities.pool_LTK, layers, share_LS),
        first_LE=None if popularities.first_LE is None else of_slots(popularities.first_LE),
        domains=None
        if parts is None
        else dataclasses.replace(
            parts,
            log_weights_DLE=of_slots(parts.log_weights_DLE, log=True),
            inclusion_DLE=of_slots(parts.inclusion_DLE),
        ),
    )
    return dataclasses.replace(placed, popularities=slots)


def _share_of_slots(layers: LayerPlacements, split: Split, load_LE: NDArray[np.float64]) -> NDArray[np.float64]:
    """(L, S) share of its expert's load that a slot serves; slots of one rank share what the rank serves evenly."""
    expert_LS, rank_S = layers.physical_to_logical_LS, layers.ranks.rank_of_slot_S
    if isinstance(split, Even) or bool((layers.num_replicas_LE == 1).all()):
        return np.asarray(1.0 / np.take_along_axis(layers.num_replicas_LE, expert_LS, axis=1))
    at = (np.arange(layers.num_layers)[:, None], expert_LS, rank_S)
    return np.asarray(split(layers, load_LE)[at] / np.swapaxes(layers.held_LRE, 1, 2)[at])


def sender_weights(placed: PlacedExperts, visits: VisitProbabilities) -> SenderWeights:
    """What each rank sends each other over what the mean rank does, where senders take the nearest replica.

    A token's choices are taken to be independent, corrected so that a mean sender has the visits given.
    docs/model.md#nearest-replica.
    """
    layers = placed.layers
    expert_LS, num_ranks = layers.physical_to_logical_LS, layers.ranks.num_ranks
    node_S = layers.ranks.node_of_rank_R[layers.ranks.rank_of_slot_S]
    share_LRS = _nearest_share_LRS(layers)
    mean_LS = np.maximum(placed.share_LS, _NO_SHARE)
    of_expert_LS = placed.popularities.inclusion_LE / mean_LS
    sent_LRS = share_LRS * of_expert_LS[:, None]
    assert expert_LS.shape == of_expert_LS.shape
    log_miss_LRS = np.log1p(-np.minimum(sent_LRS, _SURE))
    log_miss_mean_LS = np.log1p(-np.minimum(placed.popularities.inclusion_LE, _SURE))
    on_rank_SR = np.eye(num_ranks)[layers.ranks.rank_of_slot_S]
    on_node_SN = np.eye(layers.ranks.num_nodes)[node_S]

    def over_mean(values_LRx: NDArray[np.float64]) -> NDArray[np.float64]:
        mean_L1x = values_LRx.mean(axis=1, keepdims=True)
        return np.where(mean_L1x > 0, values_LRx / np.where(mean_L1x > 0, mean_L1x, 1.0), 1.0)

    def visited(in_set: NDArray[np.float64], exact_Lx: NDArray[np.float64]) -> NDArray[np.float64]:
        mean_Lx = log_miss_mean_LS @ in_set
        known_Lx = np.log1p(-np.minimum(exact_Lx, _SURE))
        correction_Lx = np.where(mean_Lx < 0, known_Lx / np.where(mean_Lx < 0, mean_Lx, 1.0), 1.0)
        return over_mean(-np.expm1((log_miss_LRS @ in_set) * correction_Lx[:, None]))

    return SenderWeights(
        assignments_LRR=over_mean(sent_LRS @ on_rank_SR),
        visits_LRR=visited(on_rank_SR, visits.rank_visits_LR),
        node_visits_LRN=visited(on_node_SN, visits.node_visits_LN)
        if visits.num_nodes == layers.ranks.num_nodes
        else np.ones((layers.num_layers, num_ranks, visits.num_nodes)),
    )


def _nearest_share_LRS(layers: LayerPlacements) -> NDArray[np.float64]:
    """(L, R, S) share of an expert's tokens that a sender gives each slot: its own, else its node's, else all."""
    expert_LS, ranks = layers.physical_to_logical_LS, layers.ranks
    rank_S, nodes_R = ranks.rank_of_slot_S, ranks.node_of_rank_R
    on_node_RN = np.eye(ranks.num_nodes)[nodes_R]
    held_LRS = np.take_along_axis(
        layers.held_LRE, np.broadcast_to(expert_LS[:, None], (layers.num_layers, ranks.num_ranks, rank_S.size)), axis=2
    )
    # of the sender's whole node, and of the group
    near_LRS = np.einsum("lrs,rq->lqs", held_LRS, on_node_RN @ on_node_RN.T)
    all_L1S = held_LRS.sum(axis=1, keepdims=True)
    is_own_RS = np.arange(ranks.num_ranks)[:, None] == rank_S
    is_near_RS = nodes_R[:, None] == nodes_R[rank_S]
    near = np.where(near_LRS > 0, is_near_RS / np.maximum(near_LRS, 1), 1.0 / all_L1S)
    return np.where(held_LRS > 0, is_own_RS / np.maximum(held_LRS, 1), near)


def _pool_of_slots(
    pool_LTK: NDArray[np.int16], layers: LayerPlacements, share_LS: NDArray[np.float64]
) -> NDArray[np.int16]:
    """The pool's choices as slots; tokens take an expert's replicas in turn, as often as their shares say."""
    slots_LEX = layers.logical_to_physical_LEX()
    num_layers = layers.num_layers
    shared = pool_LTK.shape[0] != num_layers
    num_tokens = min(pool_LTK.shape[1], _POOL_TOKENS) if shared else pool_LTK.shape[1]
    out = np.empty((num_layers, num_tokens, pool_LTK.shape[2]), dtype=np.int16)
    turn_T1 = (np.arange(num_tokens)[:, None] + 0.5) * _GOLDEN % 1.0  # evenly spread however many replicas there are
    for layer in range(num_layers):
        slots_EX = slots_LEX[layer]
        if slots_EX.shape[1] == 1:
            out[layer] = slots_EX[:, 0].astype(np.int16)[pool_LTK[0 if shared else layer, :num_tokens]]
            continue
        up_to_EX = np.cumsum(np.where(slots_EX >= 0, share_LS[layer][slots_EX], 0.0), axis=1)
        experts_TK = pool_LTK[0 if shared else layer, :num_tokens].astype(np.int64)
        number_TK = (turn_T1[..., None] * up_to_EX[:, -1][experts_TK][..., None] >= up_to_EX[experts_TK]).sum(axis=-1)
        out[layer] = slots_EX[experts_TK, number_TK]
    return out


@dataclass(frozen=True, kw_only=True, eq=False)
class Choices:
    """Experts of some tokens of each layer: how often two serve one token, and other tokens to count copies by."""

    together_LEE: NDArray[np.float64]
    counted_LTK: NDArray[np.int16]


def token_choices(popularities: Popularities, rng: np.random.Generator) -> Choices | None:
    """Tokens of the popularity, from its own pool where it has one; None for routers whose tokens miss experts."""
    router, num_experts = popularities.router, popularities.num_experts
    num_tokens = PAIR_TOKENS + COUNTED_TOKENS
    pool_LTK = popularities.pool_LTK
    if pool_LTK is not None and pool_LTK.shape[1] >= num_tokens:
        drawn_LTK = np.repeat(pool_LTK, popularities.num_layers // len(pool_LTK), axis=0)[:, :num_tokens]
    elif popularities.zero_log_weights_LZ is not None or router.choice != "top_k":
        return None
    else:
        rows = popularities.log_weights_LE
        drawn_LTK = np.stack([draw_choices(log_weights_E, router, num_tokens, rng) for log_weights_E in rows])
    if int(drawn_LTK.min()) < 0 or int(drawn_LTK.max()) >= num_experts:
        return None
    together_LEE = np.stack([coactivation_EE(chosen_TK[:PAIR_TOKENS], num_experts) for chosen_TK in drawn_LTK])
    return Choices(together_LEE=together_LEE, counted_LTK=drawn_LTK[:, PAIR_TOKENS:])


def scenario_ranks(scenario: Scenario, num_slots: int) -> RankSlots:
    """num_slots over the ranks of the scenario's first expert-parallel group, on the nodes that they stand in.

    One placement serves all groups and stages, so a rank is as slow as the slowest GPU that stands in its place in any.
    """
    parallel, layout = scenario.parallel, scenario.layout
    ranks_R = layout.stage_ranks(0)[: parallel.ep * parallel.etp : parallel.etp]
    node_of_rank_R = np.unique(ranks_R // scenario.cluster.ranks_per_node, return_inverse=True)[1]
    speed_R = scenario.speed_of_rank.reshape(-1, parallel.ep, parallel.etp).min(axis=(0, 2))
    even = even_slots(num_slots, parallel.ep, speed_R=speed_R)
    return RankSlots(num_slots_R=even.num_slots_R, speed_R=speed_R, node_of_rank_R=node_of_rank_R)
