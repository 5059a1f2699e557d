"""Layouts that keep each of the router's expert groups on one node: who takes which groups, then each node by itself.

Legend: L layers, E experts, S slots, N nodes, G groups of experts, M groups of one node, J experts of one node.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.errors import check
from moesim.placement.eplb import packed_evenly
from moesim.placement.search import Effort, least_max_load
from moesim.placement.slots import LayerPlacements, RankSlots, even_slots

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]


def groups_divide(num_experts: int, num_groups: int, ranks: RankSlots) -> bool:
    """Whether alike nodes, numbered one after the other, can each hold as many whole groups and slots for them."""
    nodes = ranks.num_nodes
    in_a_row = np.array_equal(ranks.node_of_rank_R, np.arange(ranks.num_ranks) // max(ranks.num_ranks // nodes, 1))
    alike = in_a_row and ranks.are_alike and ranks.num_ranks % nodes == 0
    return alike and num_experts % num_groups == 0 and num_groups % nodes == 0


def check_groups(num_experts: int, num_groups: int, ranks: RankSlots) -> None:
    """InputError unless groups divide, saying which of the numbers does not."""
    owner, nodes = "placement.search", ranks.num_nodes
    check(num_experts % num_groups == 0, owner, "num_groups", f"must divide num_experts={num_experts}", num_groups)
    check(num_groups % nodes == 0, owner, "num_groups", f"must be a multiple of num_nodes={nodes}", num_groups)
    fine = groups_divide(num_experts, num_groups, ranks)
    check(fine, owner, "hierarchical", "needs nodes of alike ranks, numbered one after the other", "unlike nodes")


def eplb_groups_LNM(load_LE: Floats, num_groups: int, num_nodes: int) -> Whole:
    """(L, N, M) groups of each node as EPLB gives them out: heaviest first, to the lightest node with room."""
    load_LG = load_LE.reshape(load_LE.shape[0], num_groups, -1).sum(axis=2)
    node_LG = np.stack([packed_evenly(load_G, num_nodes)[0] for load_G in load_LG])
    return np.argsort(node_LG, axis=1, kind="stable").reshape(len(load_LG), num_nodes, -1)


def searched_groups_LNM(
    load_LE: Floats, num_groups: int, num_nodes: int, *, rng: np.random.Generator, effort: Effort | None = None
) -> Whole:
    """(L, N, M) groups of each node, so that the nodes' loads are as even as the search can make them."""
    load_LG = load_LE.reshape(load_LE.shape[0], num_groups, -1).sum(axis=2)
    placed = least_max_load(load_LG, even_slots(num_groups, num_nodes), rng=rng, effort=effort)
    return placed.physical_to_logical_LS.reshape(len(load_LG), num_nodes, -1)


def within_nodes(
    load_LE: Floats, groups_LNM: Whole, ranks: RankSlots, *, rng: np.random.Generator, effort: Effort | None = None
) -> LayerPlacements:
    """The search in each node by itself, over the experts of its groups. ranks: as ``check_groups`` demands.

    With EPLB's groups no layer is slower than under its hierarchical policy, and each expert stays on the same node.
    """
    layers, nodes, per_node = groups_LNM.shape
    experts = load_LE.shape[1]
    size = experts // (nodes * per_node)
    member_LNJ = (groups_LNM[..., None] * size + np.arange(size)).reshape(layers, nodes, -1)
    local = least_max_load(
        np.take_along_axis(load_LE, member_LNJ.reshape(layers, -1), axis=1).reshape(layers * nodes, -1),
        even_slots(ranks.num_slots // nodes, ranks.num_ranks // nodes),
        rng=rng,
        effort=effort,
    )
    local_LNS = local.physical_to_logical_LS.reshape(layers, nodes, -1)
    expert_LS = np.take_along_axis(member_LNJ, local_LNS, axis=2).reshape(layers, -1)
    return LayerPlacements(physical_to_logical_LS=expert_LS, num_experts=experts, ranks=ranks)


def grouped_search(
    load_LE: Floats, ranks: RankSlots, num_groups: int, *, rng: np.random.Generator, effort: Effort | None = None
) -> LayerPlacements:
    """Groups onto nodes by search and by EPLB's rule, each node searched; in each layer the faster of the two.

    Never slower than EPLB's hierarchical policy. Raises InputError where groups do not divide.
    """
    check_groups(load_LE.shape[1], num_groups, ranks)
    found = [
        within_nodes(load_LE, groups_LNM, ranks, rng=rng, effort=effort)
        for groups_LNM in (
            searched_groups_LNM(load_LE, num_groups, ranks.num_nodes, rng=rng, effort=effort),
            eplb_groups_LNM(load_LE, num_groups, ranks.num_nodes),
        )
    ]
    first, second = (placed.physical_to_logical_LS for placed in found)
    slower_L = found[0].max_mean(load_LE) > found[1].max_mean(load_LE)
    expert_LS = np.where(slower_L[:, None], second, first)
    return LayerPlacements(physical_to_logical_LS=expert_LS, num_experts=load_LE.shape[1], ranks=ranks)
