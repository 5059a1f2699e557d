"""Experts in their slots: from loads and popularities of experts to those of slots, replicas sharing an expert's
load.

To the rest of a step a slot is an expert of its own: it has a load, a popularity and a rank. A replicated expert's
weight in the router's race is split over its slots; a token may then, rarely, draw two replicas of one expert, which
makes the copies of such layers a little too many. See docs/model.md#replicas.

Legend: L MoE layers, E experts, S slots of an expert-parallel group, R its ranks, T pool tokens, K experts per token.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.placement import Placement
from moesim.placement.nodes import coactivation_EE
from moesim.placement.slots import LayerPlacements, RankSlots, even_slots
from moesim.routing.popularity import Popularities
from moesim.routing.sampler import draw_choices
from moesim.scenario import Scenario

Floats = NDArray[np.floating]
PAIR_TOKENS = 6144  # of each layer, to see which experts serve a token together; fewer, and chance pairs mislead
COUNTED_TOKENS = 2048  # others, to count copies between nodes by
_POOL_TOKENS = 8192  # of a pool that all layers shared, once each layer places its experts otherwise


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacedExperts:
    """Where every layer's experts live, and the popularity of every slot."""

    layers: LayerPlacements
    share_LS: NDArray[np.float64]  # of its expert's load that a slot serves
    rank_of_slot: Placement  # the same for all layers
    popularities: Popularities  # of slots

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


def placed_experts(layers: LayerPlacements, popularities: Popularities) -> PlacedExperts:
    """Slots of a placement, replicas of an expert sharing its load evenly."""
    expert_LS = layers.physical_to_logical_LS
    share_LS = 1.0 / np.take_along_axis(layers.num_replicas_LE, expert_LS, axis=1)
    placed = PlacedExperts(
        layers=layers,
        share_LS=share_LS,
        rank_of_slot=Placement(expert_to_rank_E=layers.ranks.rank_of_slot_S, num_ranks=layers.ranks.num_ranks),
        popularities=popularities,
    )
    if placed._is_identity:
        return placed
    replicated = bool((share_LS < 1.0).any())
    log_weights_LS = np.take_along_axis(popularities.log_weights_LE, expert_LS, axis=1) + np.log(share_LS)
    of_slots = dataclasses.replace(
        popularities,
        log_weights_LE=log_weights_LS,
        inclusion_LE=np.take_along_axis(popularities.inclusion_LE, expert_LS, axis=1) * share_LS,
        # Slots of an evenly popular layer are no longer alike once some experts have replicas.
        sigma=max(popularities.sigma, float(log_weights_LS.std())) if replicated else popularities.sigma,
        pool_LTK=None if popularities.pool_LTK is None else _pool_of_slots(popularities.pool_LTK, layers),
    )
    return dataclasses.replace(placed, popularities=of_slots)


def _pool_of_slots(pool_LTK: NDArray[np.int16], layers: LayerPlacements) -> NDArray[np.int16]:
    """The pool's choices as slots; a token takes replica number t mod count of an expert."""
    slots_LEX = layers.logical_to_physical_LEX()
    counts_LE = layers.num_replicas_LE
    num_layers = layers.num_layers
    shared = pool_LTK.shape[0] != num_layers
    num_tokens = min(pool_LTK.shape[1], _POOL_TOKENS) if shared else pool_LTK.shape[1]
    out = np.empty((num_layers, num_tokens, pool_LTK.shape[2]), dtype=np.int16)
    token_T1 = np.arange(num_tokens)[:, None]
    for layer in range(num_layers):
        experts_TK = pool_LTK[0 if shared else layer, :num_tokens].astype(np.int64)
        out[layer] = slots_LEX[layer][experts_TK, token_T1 % counts_LE[layer][experts_TK]]
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
    """num_slots over the ranks of the scenario's first expert-parallel group, on the nodes that they stand in."""
    parallel = scenario.parallel
    ranks_R = scenario.layout.stage_ranks(0)[: parallel.ep * parallel.etp : parallel.etp]
    node_of_rank_R = np.unique(ranks_R // scenario.cluster.ranks_per_node, return_inverse=True)[1]
    even = even_slots(num_slots, parallel.ep)
    return RankSlots(num_slots_R=even.num_slots_R, speed_R=even.speed_R, node_of_rank_R=node_of_rank_R)
