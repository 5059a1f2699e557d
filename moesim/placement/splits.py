"""Which replica a sender picks: an expert's load as shares of the ranks that hold it. Each split is a policy you call.

Legend: L layers, E experts, R ranks (of experts and of senders), S slots, N nodes. share_LER[l, e, r] is the share of
expert e's load that rank r serves; rows sum to 1. ``LayerPlacements.rank_loads(load, share_LER=...)`` takes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.errors import check
from moesim.placement.slots import LayerPlacements

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Even:
    """Every slot of an expert takes the same share, whoever sends: a random or round-robin choice."""

    kind: Literal["even"] = "even"

    def __call__(self, placed: LayerPlacements, load_LE: ArrayLike) -> Floats:  # noqa: ARG002 one call for all splits
        return placed.share_LER


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """A sender takes the replica on its own rank, else evenly those of its node, else evenly all.

    sent_R: share of the tokens that each rank sends (None: all alike).
    """

    kind: Literal["nearest"] = "nearest"
    sent_R: tuple[float, ...] | None = None

    def __call__(self, placed: LayerPlacements, load_LE: ArrayLike) -> Floats:  # noqa: ARG002 one call for all splits
        sent, nodes = _sent(placed, self.sent_R), placed.ranks.node_of_rank_R
        on_node_RN = np.eye(placed.ranks.num_nodes)[nodes]
        held_LER = np.swapaxes(placed.held_LRE, 1, 2).astype(np.float64)
        has_LER = held_LER > 0
        held_LEN = held_LER @ on_node_RN
        # Senders without the expert share their node's replicas; nodes without it share all.
        without_LEN = ((~has_LER) * sent) @ on_node_RN
        local_LEN = np.where(held_LEN > 0, without_LEN / np.maximum(held_LEN, 1), 0.0)
        far_LE1 = np.where(held_LEN > 0, 0.0, without_LEN).sum(axis=2, keepdims=True)
        from_node_LER = held_LER * local_LEN[..., nodes]
        return has_LER * sent + from_node_LER + held_LER * far_LE1 / placed.num_replicas_LE[:, :, None]


@dataclass(frozen=True, kw_only=True)
class LeastLoaded:
    """Senders fill the least loaded replica first, experts one after the other, heaviest first: one pass, no regret."""

    kind: Literal["least_loaded"] = "least_loaded"

    def __call__(self, placed: LayerPlacements, load_LE: ArrayLike) -> Floats:
        return _poured(placed, load_LE, num_passes=1, tolerance=0.0)


@dataclass(frozen=True, kw_only=True)
class Uneven:
    """The weights that make the slowest rank fastest: pour each expert again and again until no rank gains.

    Every pass lowers the sum of load squared over speed, whose minimum over all splits also has the least maximum.
    """

    kind: Literal["uneven"] = "uneven"
    max_passes: int = 200
    tolerance: float = 1e-9  # largest change of a share in a pass that counts as none

    def __call__(self, placed: LayerPlacements, load_LE: ArrayLike) -> Floats:
        return _poured(placed, load_LE, num_passes=self.max_passes, tolerance=self.tolerance)


Split = Even | Nearest | LeastLoaded | Uneven


def share_by_sender_NEN(placed: LayerPlacements, split: Split, load_LE: ArrayLike, layer: int) -> Floats:
    """(N, E, N) share of expert e's load from senders of node n that node m serves; the last axis sums to 1.

    Only Nearest depends on the sender.
    """
    num_nodes = placed.ranks.num_nodes
    on_node_RN = np.eye(num_nodes)[placed.ranks.node_of_rank_R]
    if not isinstance(split, Nearest):
        share_EN = split(placed, load_LE)[layer] @ on_node_RN
        return np.broadcast_to(share_EN, (num_nodes, *share_EN.shape))
    held_EN = placed.held_LRE[layer].T @ on_node_RN
    far_EN = held_EN / held_EN.sum(axis=1, keepdims=True)
    own_NEN = np.broadcast_to(np.eye(num_nodes)[:, None, :], (num_nodes, *far_EN.shape))
    return np.where((held_EN.T > 0)[:, :, None], own_NEN, far_EN)


def _sent(placed: LayerPlacements, sent_R: ArrayLike | None) -> Floats:
    ranks = placed.ranks.num_ranks
    if sent_R is None:
        return np.full(ranks, 1.0 / ranks)
    sent = np.asarray(sent_R, dtype=np.float64)
    fine = sent.shape == (ranks,) and bool((sent >= 0).all()) and float(sent.sum()) > 0
    check(fine, "placement.split", "sent", f"must be {ranks} shares, not all zero", sent.tolist())
    return sent / sent.sum()


def _poured(placed: LayerPlacements, load_LE: ArrayLike, *, num_passes: int, tolerance: float) -> Floats:
    """share_LER when each expert's load is poured onto its ranks up to one level, given what others poured before."""
    load, speed_R = np.asarray(load_LE, dtype=np.float64), placed.ranks.speed_R
    share_LER = np.zeros((placed.num_layers, placed.num_experts, placed.ranks.num_ranks))
    for layer in range(placed.num_layers):
        held_RE = placed.held_LRE[layer] > 0
        holders = [np.flatnonzero(held_RE[:, e]) for e in range(placed.num_experts)]
        single = np.array([held.size == 1 for held in holders])
        alone_R = np.array([held[0] for held in holders])
        share_LER[layer, single, alone_R[single]] = 1.0
        load_R = np.bincount(alone_R[single], weights=load[layer, single], minlength=speed_R.size)
        poured = {
            e: np.zeros(holders[e].size) for e in np.argsort(-load[layer], kind="stable").tolist() if not single[e]
        }
        for _ in range(num_passes):
            change = 0.0
            for e, before in poured.items():
                held = holders[e]
                load_R[held] -= before
                after = level_fill(load_R[held], speed_R[held], float(load[layer, e]))
                load_R[held] += after
                change = max(change, float(np.abs(after - before).max()))
                poured[e] = after
            if change <= tolerance * max(float(load[layer].max()), 1e-300):
                break
        for e, after in poured.items():
            total = float(after.sum())
            share_LER[layer, e, holders[e]] = after / total if total > 0 else 1.0 / holders[e].size
    return share_LER


def level_fill(load_R: Floats, speed_R: Floats, amount: float) -> Floats:
    """What each rank gets of ``amount`` so that those that get any end at one common time, the rest above it.

    >>> level_fill(np.array([0.0, 2.0, 9.0]), np.ones(3), 4.0).tolist()
    [3.0, 1.0, 0.0]
    """
    time_R = load_R / speed_R
    order = np.argsort(time_R, kind="stable")
    filled = np.cumsum(speed_R[order])
    level_R = (amount + np.cumsum(load_R[order])) / filled
    last = int(np.flatnonzero(level_R > time_R[order])[-1]) if amount > 0 else 0
    return np.maximum(level_R[last] - time_R, 0.0) * speed_R if amount > 0 else np.zeros_like(load_R)
