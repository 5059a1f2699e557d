"""A small fabric, and max-min fair finishes written plainly: filling anew at every start and end, the solver's oracle.

Legend: F flows, J links, P links of a route (padded with -1).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.describe.hardware import CrossRail
from moesim.fabric.topology import Topology

Floats = NDArray[np.float64]
NVLINK, NIC, INTRA_S, INTER_S = 450e9, 50e9, 2e-6, 5e-6
_DONE = 1e-12  # a message is done when this share of its bytes is left: rounding, not waiting


def fabric(
    num_ranks: int = 16, per_node: int = 8, cross_rail: CrossRail = "pxn", oversubscription: float = 1.0
) -> Topology:
    """NVLink 450 GB/s, NIC 50 GB/s, latencies 2 and 5 us."""
    num_nodes = -(-num_ranks // per_node)
    ports = [np.full(2 * num_ranks, NVLINK), np.full(2 * num_ranks, NIC)]
    leaves = [np.full(2 * per_node, num_nodes * NIC / oversubscription)] if cross_rail == "spine" else []
    return Topology(
        num_ranks=num_ranks,
        ranks_per_node=per_node,
        cross_rail=cross_rail,
        rate_bytes_per_s_J=np.concatenate(ports + leaves),
        latency_intra_s=INTRA_S,
        latency_inter_s=INTER_S,
    )


def filled_finish_s(bytes_F: Floats, begin_F: Floats, link_FP: NDArray[np.int32], rate_J: Floats) -> Floats:
    """Finish of each flow by progressive filling anew at every start and end."""
    finish_F, left_F = begin_F.copy(), bytes_F.copy()
    waiting_F = (bytes_F > 0) & np.isfinite(np.where(link_FP >= 0, rate_J[link_FP], np.inf)).any(axis=1)
    active_F = np.zeros(bytes_F.size, bool)
    now = 0.0
    while waiting_F.any() or active_F.any():
        if not active_F.any():
            now = begin_F[waiting_F].min()
        starts_F = waiting_F & (begin_F <= now)
        active_F |= starts_F
        waiting_F &= ~starts_F
        speed_F = fair_rates(active_F, link_FP, rate_J)
        step = (left_F[active_F] / speed_F[active_F]).min()
        following = begin_F[waiting_F].min() if waiting_F.any() else np.inf
        arrives = following <= now + step
        step, now = (following - now, following) if arrives else (step, now + step)
        left_F[active_F] -= speed_F[active_F] * step
        done_F = active_F & (left_F <= _DONE * bytes_F)
        finish_F[done_F] = now
        active_F &= ~done_F
    return finish_F


def fair_rates(active_F: NDArray[np.bool_], link_FP: NDArray[np.int32], rate_J: Floats) -> Floats:
    """Max-min fair rates of the active flows [bytes/s]: the link with the least share per flow settles its flows, over
    and over.
    """
    speed_F, free_F, room_J = np.zeros(active_F.size), active_F.copy(), rate_J.copy()
    passes_FP = link_FP >= 0
    while free_F.any():
        count_J = np.bincount(link_FP[free_F][passes_FP[free_F]], minlength=rate_J.size)
        share_J = np.where(count_J > 0, room_J / np.maximum(count_J, 1), np.inf)
        least = share_J.min()
        tight_J = share_J <= least * (1 + 1e-12)
        settled_F = free_F & (passes_FP & tight_J[link_FP]).any(axis=1)
        speed_F[settled_F] = least
        free_F &= ~settled_F
        taken = np.bincount(link_FP[settled_F][passes_FP[settled_F]], minlength=rate_J.size)
        room_J = np.maximum(room_J - taken * np.where(taken > 0, least, 0.0), 0.0)
    return speed_F
