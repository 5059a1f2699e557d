"""Bytes through each rank's ports in the dispatch and the combine of an MoE layer.

Legend: G expert-parallel groups, M micro-batches, L MoE layers, R ranks of a group, N nodes these ranks lie on, Q rails
(a rank's position among the group's ranks of its node). With expert-TP the R ranks are those of one expert-TP index;
the others carry the same.

All ranks of a group bring alike tokens, so what rank i sends rank j depends on j alone: inside a step the matrix of
bytes is never built, its port sums have closed forms. ``pair_bytes`` builds it, for whoever wants each message. Nothing
is floored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moesim.placement import Placement
from moesim.routing.popularity import Popularities
from moesim.routing.visits import VisitProbabilities

Floats = NDArray[np.floating]
Dedup = Literal["none", "rank", "node"]
CrossRail = Literal["pxn", "direct", "spine"]
Direction = Literal["dispatch", "combine"]


@dataclass(frozen=True, kw_only=True, eq=False)
class PortBytes:
    """Bytes through the four ports of every rank, shape (..., R); local copies cross no port."""

    nvlink_out: Floats
    nvlink_in: Floats
    nic_out: Floats
    nic_in: Floats


@dataclass(frozen=True, kw_only=True, eq=False)
class Copies:
    """Token copies that one rank sends to each rank or node of its group (itself included), per micro-batch and layer.

    assignments_GMLR: without deduplication; visits_GMLR: once per rank; node_visits_GMLN: once per node.
    """

    assignments_GMLR: Floats
    visits_GMLR: Floats
    node_visits_GMLN: Floats
    node_of_rank_R: NDArray[np.int64]


def expected_copies(
    kept_GMLE: Floats,
    *,
    popularities: Popularities,
    visits: VisitProbabilities,
    placement: Placement,
    tokens_per_rank: int,
    num_source_ranks: int,
) -> Copies:
    """Copies under the kept load of each micro-batch.

    kept_GMLE counts assignments of all num_source_ranks ranks of a group (ep * etp), each bringing tokens_per_rank. A
    rank that keeps f times its expected load is visited with probability 1 - (1 - v)**f: as f for rare visits, and
    never by more tokens than there are. docs/model.md#copies.
    """
    node_of_E = visits.node_of_rank_R[placement.expert_to_rank_E]
    node_placement = Placement(expert_to_rank_E=node_of_E, num_ranks=visits.num_nodes)
    load_GMLR = placement.rank_loads(kept_GMLE)
    expected_LE = popularities.inclusion_LE * (tokens_per_rank * num_source_ranks)
    rank_factor = _factor(load_GMLR, placement.rank_loads(expected_LE))
    node_factor = _factor(node_placement.rank_loads(kept_GMLE), node_placement.rank_loads(expected_LE))
    return Copies(
        assignments_GMLR=load_GMLR / np.float32(num_source_ranks),
        visits_GMLR=_scaled_visits(visits.rank_visits_LR, rank_factor, tokens_per_rank),
        node_visits_GMLN=_scaled_visits(visits.node_visits_LN, node_factor, tokens_per_rank),
        node_of_rank_R=visits.node_of_rank_R,
    )


def _factor(kept: Floats, expected: Floats) -> NDArray[np.float32]:
    return (kept / np.where(expected > 0, expected, np.inf)).astype(np.float32)


def _scaled_visits(visits: Floats, factor: NDArray[np.float32], tokens_per_rank: int) -> NDArray[np.float32]:
    # A certain visit (v = 1) stays certain at any factor: the clip keeps its logarithm finite.
    log_miss = np.log1p(-np.minimum(visits, 1.0 - 1e-12)).astype(np.float32)
    copies = factor * log_miss
    np.expm1(copies, out=copies)
    copies *= np.float32(-tokens_per_rank)
    return copies


def dispatch_ports(
    copies: Copies, *, token_bytes: float, dedup: Dedup = "rank", cross_rail: CrossRail = "pxn"
) -> PortBytes:
    """Bytes of a dispatch through every rank's ports (PortBytes of shape (G, M, L, R)).

    token_bytes: one copy on the wire (hidden * bytes per element, plus scales). dedup: ``none`` sends every assignment,
    ``rank`` a token once to each rank, ``node`` once over the NIC to each node and from there by NVLink to each rank
    (DeepEP's normal kernels, github.com/deepseek-ai/DeepEP). cross_rail ``pxn``: a message to another rail first hops
    by NVLink to the rank of that rail, whose NIC carries it (NCCL 2.12); ``direct`` and ``spine``: the sender's own
    NIC. docs/model.md#dispatch.
    """
    return _scaled(_dispatch(copies, dedup, cross_rail), token_bytes)


def combine_ports(
    copies: Copies, *, token_bytes: float, dedup: Dedup = "rank", cross_rail: CrossRail = "pxn"
) -> PortBytes:
    """Bytes of the combine: every copy goes back to its token's rank, summed per rank (or node) where deduplicated.

    The byte matrix is the dispatch's transpose; with pxn the hop is again at the sender's side.
    """
    if dedup == "node":
        out = _dispatch(copies, dedup, cross_rail)
        back = PortBytes(nvlink_out=out.nvlink_in, nvlink_in=out.nvlink_out, nic_out=out.nic_in, nic_in=out.nic_out)
        return _scaled(back, token_bytes)
    sent = copies.assignments_GMLR if dedup == "none" else copies.visits_GMLR
    alike = np.ones(copies.node_of_rank_R.size, dtype=np.float32)
    return _scaled(_pair_ports(sent, alike, copies.node_of_rank_R, cross_rail), token_bytes)


def pair_bytes(
    copies: Copies, *, token_bytes: float, dedup: Literal["none", "rank"] = "rank", direction: Direction = "dispatch"
) -> Floats:
    """What each rank of a group sends each other one, shape (G, M, L, R, R) [bytes]; nothing on the diagonal.

    The combine is the dispatch's transpose (at its own bytes of a token). For messages that cross once per node see
    ``node_bytes``.
    """
    received = copies.assignments_GMLR if dedup == "none" else copies.visits_GMLR
    size = copies.node_of_rank_R.size
    bytes_GMLRR = np.repeat(received[..., None, :] * np.float32(token_bytes), size, axis=-2)
    bytes_GMLRR[..., np.arange(size), np.arange(size)] = 0.0
    return bytes_GMLRR if direction == "dispatch" else np.swapaxes(bytes_GMLRR, -1, -2)


def node_bytes(copies: Copies, *, token_bytes: float) -> Floats:
    """What each rank sends each node where a token goes there once, shape (G, M, L, R, N) [bytes]; its own included."""
    size = copies.node_of_rank_R.size
    return np.repeat(copies.node_visits_GMLN[..., None, :] * np.float32(token_bytes), size, axis=-2)


def _dispatch(copies: Copies, dedup: Dedup, cross_rail: CrossRail) -> PortBytes:
    if dedup == "node":
        return _forwarded_ports(copies.visits_GMLR, copies.node_visits_GMLN, copies.node_of_rank_R)
    received = copies.assignments_GMLR if dedup == "none" else copies.visits_GMLR
    alike = np.ones(copies.node_of_rank_R.size, dtype=np.float32)
    return _pair_ports(alike, received, copies.node_of_rank_R, cross_rail)


def _scaled(ports: PortBytes, token_bytes: float) -> PortBytes:
    scale = np.float32(token_bytes)
    return PortBytes(
        nvlink_out=ports.nvlink_out * scale,
        nvlink_in=ports.nvlink_in * scale,
        nic_out=ports.nic_out * scale,
        nic_in=ports.nic_in * scale,
    )


def _one_hot(index_R: NDArray[np.int64]) -> NDArray[np.float32]:
    return np.eye(int(index_R.max()) + 1, dtype=np.float32)[index_R]


def rails(node_of_rank_R: NDArray[np.int64]) -> NDArray[np.int64]:
    """(R,) each rank's position among the ranks of its node.

    >>> rails(np.array([0, 0, 1, 1, 1])).tolist()
    [0, 1, 0, 1, 2]
    """
    before_RR = np.tril(node_of_rank_R[:, None] == node_of_rank_R[None, :], k=-1)
    return before_RR.sum(axis=1)


def _pair_ports(sent: Floats, received: Floats, node_of_rank_R: NDArray[np.int64], cross_rail: CrossRail) -> PortBytes:
    """Port sums when rank i sends rank j sent[i] * received[j]; both (..., R) or (R,)."""
    in_node_RN = _one_hot(node_of_rank_R)
    sent_node = (sent @ in_node_RN)[..., node_of_rank_R]
    received_node = (received @ in_node_RN)[..., node_of_rank_R]
    sent_other = (sent @ in_node_RN).sum(axis=-1, keepdims=True) - sent_node
    received_other = (received @ in_node_RN).sum(axis=-1, keepdims=True) - received_node
    nvlink_out = sent * (received_node - received)
    nvlink_in = received * (sent_node - sent)
    nic_out = sent * received_other
    nic_in = received * sent_other
    if cross_rail != "pxn" or in_node_RN.shape[1] == 1:
        return PortBytes(nvlink_out=nvlink_out, nvlink_in=nvlink_in, nic_out=nic_out, nic_in=nic_in)
    rail_R = rails(node_of_rank_R)
    on_rail_RQ = _one_hot(rail_R)
    rail_total = received @ on_rail_RQ
    # What all its node sends through rank p, per unit sent: everything for p's rail on other nodes.
    through = rail_total[..., rail_R] - received
    through_node = (through @ in_node_RN)[..., node_of_rank_R]
    # Rails without a rank on the sender's node are reached from the sender's own NIC.
    missing_NQ = 1.0 - np.minimum(in_node_RN.T @ on_rail_RQ, 1.0)
    unrouted = (rail_total @ missing_NQ.T)[..., node_of_rank_R]
    return PortBytes(
        nvlink_out=nvlink_out + sent * (through_node - through),
        nvlink_in=nvlink_in + (sent_node - sent) * through,
        nic_out=sent_node * through + sent * unrouted,
        nic_in=nic_in + np.zeros_like(nic_out),
    )


def _forwarded_ports(visits: Floats, node_visits: Floats, node_of_rank_R: NDArray[np.int64]) -> PortBytes:
    """Port sums of a dispatch that crosses the NIC once per node: to the rank of the sender's rail, which forwards."""
    rail_R = rails(node_of_rank_R)
    size_R = np.bincount(node_of_rank_R)[node_of_rank_R]
    # handled_R[p]: senders of other nodes whose copies for p's node arrive at p.
    other_RR = node_of_rank_R[:, None] != node_of_rank_R[None, :]
    handled_R = (other_RR & (rail_R[:, None] % size_R[None, :] == rail_R[None, :])).sum(axis=0).astype(np.float32)
    in_node_RN = _one_hot(node_of_rank_R)
    handled_node_R = (handled_R @ in_node_RN)[node_of_rank_R]
    visits_node = (visits @ in_node_RN)[..., node_of_rank_R]
    here = node_visits[..., node_of_rank_R]
    return PortBytes(
        nvlink_out=(visits_node - visits) * (1.0 + handled_R),
        nvlink_in=visits * (size_R.astype(np.float32) - 1.0 + handled_node_R - handled_R),
        nic_out=node_visits.sum(axis=-1, keepdims=True) - here,
        nic_in=here * handled_R,
    )
