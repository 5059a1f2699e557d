"""Bytes through ports where what a rank sends depends on who it is: replicas of an expert that are near some senders.

Legend: G expert-parallel groups, M micro-batches, L MoE layers, R ranks of a group, N nodes, P ranks as ports' owners.

``traffic`` sums ports in closed form because all ranks send alike. Here sender a sends destination b weight_ab times
what the mean sender sends it (weights of a destination have mean 1), so every port is a fixed sum over destinations,
layer by layer: an operator that each micro-batch's copies are multiplied with. With weights of 1 the two agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moesim.fabric.traffic import Copies, CrossRail, Dedup, PortBytes, rails

Floats = NDArray[np.floating]
Ranks = NDArray[np.int64]
ScaledBy = Literal["sender", "receiver"]


@dataclass(frozen=True, kw_only=True, eq=False)
class SenderWeights:
    """What sender a sends each rank b, or node n, over what the mean sender sends there; mean over a is 1."""

    assignments_LRR: Floats
    visits_LRR: Floats
    node_visits_LRN: Floats


def dispatch_ports_by_sender(
    copies: Copies, weights: SenderWeights, *, token_bytes: float, dedup: Dedup = "rank", cross_rail: CrossRail = "pxn"
) -> PortBytes:
    """As ``traffic.dispatch_ports``, each sender by its weights. docs/model.md#nearest-replica."""
    if dedup == "node":
        return _forwarded(copies, weights, token_bytes)
    sent, flow_LRR = _pairs(copies, weights, dedup)
    return _pair_ports(sent, flow_LRR, copies.node_of_rank_R, cross_rail, token_bytes, scaled_by="receiver")


def combine_ports_by_sender(
    copies: Copies, weights: SenderWeights, *, token_bytes: float, dedup: Dedup = "rank", cross_rail: CrossRail = "pxn"
) -> PortBytes:
    """As ``traffic.combine_ports``: the dispatch's bytes go back to the ranks that sent them."""
    if dedup == "node":
        out = _forwarded(copies, weights, token_bytes)
        return PortBytes(nvlink_out=out.nvlink_in, nvlink_in=out.nvlink_out, nic_out=out.nic_in, nic_in=out.nic_out)
    sent, flow_LRR = _pairs(copies, weights, dedup)
    back_LRR = np.swapaxes(flow_LRR, 1, 2)
    return _pair_ports(sent, back_LRR, copies.node_of_rank_R, cross_rail, token_bytes, scaled_by="sender")


def _pairs(copies: Copies, weights: SenderWeights, dedup: Dedup) -> tuple[Floats, Floats]:
    if dedup == "none":
        return copies.assignments_GMLR, weights.assignments_LRR
    return copies.visits_GMLR, weights.visits_LRR


def _pair_ports(
    copies_GMLR: Floats,
    flow_LRR: Floats,
    node_of_rank_R: Ranks,
    cross_rail: CrossRail,
    token_bytes: float,
    *,
    scaled_by: ScaledBy,
) -> PortBytes:
    """Port sums of messages a to b of flow_ab times the copies of the receiver (dispatch) or the sender (combine)."""
    num_ranks = node_of_rank_R.size
    is_near = node_of_rank_R[:, None] == node_of_rank_R[None, :]
    here, there = np.arange(num_ranks)[:, None], np.arange(num_ranks)[None, :]
    owner_of_copies = np.broadcast_to(there if scaled_by == "receiver" else here, is_near.shape)

    def through(port_of_message: Ranks, is_used: NDArray[np.bool_]) -> Floats:
        """(L, P, R) what copies of each rank bring through each port, given which port each message uses."""
        operator = np.zeros((len(flow_LRR), num_ranks, num_ranks))
        at: Any = (slice(None), np.broadcast_to(port_of_message, is_near.shape)[is_used], owner_of_copies[is_used])
        np.add.at(operator, at, flow_LRR[:, is_used])
        return operator

    local = is_near & (here != there)
    hop = _hop(node_of_rank_R) if cross_rail == "pxn" else np.broadcast_to(here, is_near.shape)
    hopping = ~is_near & (hop != here)
    return PortBytes(
        nvlink_out=_applied(through(here, local | hopping), copies_GMLR, token_bytes),
        nvlink_in=_applied(through(there, local) + through(hop, hopping), copies_GMLR, token_bytes),
        nic_out=_applied(through(hop, ~is_near), copies_GMLR, token_bytes),
        nic_in=_applied(through(there, ~is_near), copies_GMLR, token_bytes),
    )


def _hop(node_of_rank_R: Ranks) -> Ranks:
    """(R, R) whose NIC carries a message a to b under PXN: the rank of a's node on b's rail, else a itself."""
    rail_R = rails(node_of_rank_R)
    on_rail = {(node, rail): rank for rank, (node, rail) in enumerate(zip(node_of_rank_R, rail_R, strict=True))}
    ranks = range(node_of_rank_R.size)
    return np.array([[on_rail.get((node_of_rank_R[a], rail_R[b]), a) for b in ranks] for a in ranks])


def _forwarded(copies: Copies, weights: SenderWeights, token_bytes: float) -> PortBytes:
    """Port sums of a dispatch that crosses the NIC once per node, to the rank of the sender's rail, which forwards."""
    nodes_R = copies.node_of_rank_R
    num_ranks, num_nodes = nodes_R.size, int(nodes_R.max()) + 1
    rail_R, size_N = rails(nodes_R), np.bincount(nodes_R)
    first_N = [np.flatnonzero(nodes_R == node) for node in range(num_nodes)]
    receiver_RN = np.array([[first_N[n][rail_R[a] % size_N[n]] for n in range(num_nodes)] for a in range(num_ranks)])
    starts_RR = np.where(nodes_R[:, None] == nodes_R[None, :], np.arange(num_ranks)[:, None], receiver_RN[:, nodes_R])
    there = np.broadcast_to(np.arange(num_ranks)[None, :], starts_RR.shape)
    moves = starts_RR != there
    flow_LRR, cross_LRN = weights.visits_LRR, weights.node_visits_LRN
    crosses = nodes_R[:, None] != np.arange(num_nodes)[None, :]
    to_node = np.broadcast_to(np.arange(num_nodes)[None, :], crosses.shape)

    def summed(shape: tuple[int, int], port: Ranks, owner: Ranks, flow: Floats) -> Floats:
        operator = np.zeros((len(flow), *shape))
        at: Any = (slice(None), port, owner)
        np.add.at(operator, at, flow)
        return operator

    square, wide = (num_ranks, num_ranks), (num_ranks, num_nodes)
    out = summed(square, starts_RR[moves], there[moves], flow_LRR[:, moves])
    into = summed(square, there[moves], there[moves], flow_LRR[:, moves])
    sender_RN = np.broadcast_to(np.arange(num_ranks)[:, None], crosses.shape)
    nic_out = summed(wide, sender_RN[crosses], to_node[crosses], cross_LRN[:, crosses])
    nic_in = summed(wide, receiver_RN[crosses], to_node[crosses], cross_LRN[:, crosses])
    return PortBytes(
        nvlink_out=_applied(out, copies.visits_GMLR, token_bytes),
        nvlink_in=_applied(into, copies.visits_GMLR, token_bytes),
        nic_out=_applied(nic_out, copies.node_visits_GMLN, token_bytes),
        nic_in=_applied(nic_in, copies.node_visits_GMLN, token_bytes),
    )


def _applied(operator_LPK: Floats, copies_GMLK: Floats, token_bytes: float) -> NDArray[np.float32]:
    """(G, M, L, P) bytes, from what each of K destinations' copies bring through each port."""
    by_layer = np.swapaxes(operator_LPK, 1, 2).astype(np.float32) * np.float32(token_bytes)
    copies_LXK = np.moveaxis(copies_GMLK, 2, 0).reshape(len(by_layer), -1, by_layer.shape[1]).astype(np.float32)
    ported_LXP = copies_LXK @ by_layer
    shape = copies_GMLK.shape
    return np.moveaxis(ported_LXP.reshape(shape[2], shape[0], shape[1], -1), 0, 2)
