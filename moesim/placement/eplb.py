"""The baseline: EPLB's public algorithm (DeepSeek's expert-parallelism load balancer), written from its description.

Legend: L layers, E experts, S slots, R ranks, N nodes, G groups of experts, P packs, I items.

Replicate greedily (each further slot to the expert with the largest load per replica), then pack heaviest first into
packs of equal count (each item to the lightest pack with room). Global: over all ranks at once. Hierarchical, where
the nodes divide the groups: groups packed onto nodes, replicas inside a node, then a node's slots onto its ranks.
Plain loops on purpose: this is the oracle that ``search`` is measured against, not the fast path.
Source: github.com/deepseek-ai/EPLB, README, 2025-02; DeepSeek-V3, arXiv 2412.19437, section 3.4.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.errors import check

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]


def packed_evenly(weight_I: Floats, num_packs: int) -> tuple[Whole, Whole]:
    """(pack of each item, its place in that pack): heaviest item first to the lightest pack that has room.

    >>> packed_evenly(np.array([4.0, 1.0, 3.0, 2.0]), 2)[0].tolist()
    [0, 0, 1, 1]
    """
    size = weight_I.size // num_packs
    pack_I = np.arange(weight_I.size) // size
    place_I = np.zeros(weight_I.size, dtype=np.int64)
    if size == 1:
        return pack_I, place_I
    weights, filled = [0.0] * num_packs, [0] * num_packs
    for item in np.argsort(-weight_I, kind="stable").tolist():
        lightest = min((p for p in range(num_packs) if filled[p] < size), key=weights.__getitem__)
        pack_I[item], place_I[item] = lightest, filled[lightest]
        weights[lightest] += float(weight_I[item])
        filled[lightest] += 1
    return pack_I, place_I


def replicated(load_E: Floats, num_slots: int) -> tuple[Whole, Whole]:
    """(expert of each slot, replicas of each expert); the first E slots hold each expert once."""
    expert_S = np.concatenate((np.arange(load_E.size), np.zeros(num_slots - load_E.size, dtype=np.int64)))
    count_E = np.ones(load_E.size, dtype=np.int64)
    for slot in range(load_E.size, num_slots):
        expert_S[slot] = np.argmax(load_E / count_E)
        count_E[expert_S[slot]] += 1
    return expert_S, count_E


def eplb_layer(load_E: Floats, num_slots: int, num_ranks: int, num_nodes: int = 1, num_groups: int = 1) -> Whole:
    """(S,) expert of each slot of one layer. Hierarchical where num_nodes divides num_groups, else global."""
    if num_groups % num_nodes:
        num_groups, num_nodes = 1, 1
    size = load_E.size // num_groups
    node_G, place_G = packed_evenly(load_E.reshape(num_groups, size).sum(axis=1), num_nodes)
    slots_per_node, ranks_per_node = num_slots // num_nodes, num_ranks // num_nodes
    expert_S = np.empty(num_slots, dtype=np.int64)
    for node in range(num_nodes):
        groups = np.flatnonzero(node_G == node)
        groups = groups[np.argsort(place_G[groups])]
        members = (groups[:, None] * size + np.arange(size)).reshape(-1)
        local_S, count_E = replicated(load_E[members], slots_per_node)
        rank_S, place_S = packed_evenly((load_E[members] / count_E)[local_S], ranks_per_node)
        first = node * slots_per_node
        expert_S[first + rank_S * (slots_per_node // ranks_per_node) + place_S] = members[local_S]
    return expert_S


def eplb_layers(
    load_LE: ArrayLike, num_slots: int, num_ranks: int, *, num_nodes: int = 1, num_groups: int = 1
) -> Whole:
    """(L, S) expert of each slot. Raises InputError where counts do not divide."""
    load = np.asarray(load_LE, dtype=np.float64)
    num_experts, owner = load.shape[1], "placement.eplb"
    check(num_slots % num_ranks == 0, owner, "num_slots", f"must be a multiple of num_ranks={num_ranks}", num_slots)
    check(num_slots >= num_experts, owner, "num_slots", f"must be at least num_experts={num_experts}", num_slots)
    check(num_ranks % num_nodes == 0, owner, "num_nodes", f"must divide num_ranks={num_ranks}", num_nodes)
    check(num_experts % num_groups == 0, owner, "num_groups", f"must divide num_experts={num_experts}", num_groups)
    return np.stack([eplb_layer(row_E, num_slots, num_ranks, num_nodes, num_groups) for row_E in load])
