"""When each message of an exchange arrives, if links share their rate fairly: the fabric's fidelity ``exact``.

Legend: F flows, J links, P links of a route (padded with -1).

Max-min fairness: at every moment no flow could be faster without slowing one that is no faster. Rates hold until the
next message starts or ends. docs/model.md#exact.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.errors import InputError
from moesim.fabric.flows import Flows
from moesim.fabric.topology import Routes, Topology

Floats = NDArray[np.float64]
_DONE = 1e-11  # a message is done when this share of its bytes is left: rounding, not waiting


def finish_s(flows: Flows, topology: Topology) -> Floats:
    """When each message has arrived [s], shape (F,).

    A message starts at its start plus its route's latency and then moves at its max-min fair rate. Several exchanges
    at once are one call with ``together``. Raises InputError naming ranks and links where a message could never end.
    """
    routes = topology.routes(flows.source_F, flows.target_F)
    _refuse_dead_links(flows, topology, routes)
    return filled_finish_s(flows.bytes_F, flows.start_F + routes.latency_F, routes.link_FP, topology.rate_bytes_per_s_J)


def _refuse_dead_links(flows: Flows, topology: Topology, routes: Routes) -> None:
    """Raise InputError if a message with bytes passes a link of rate zero: it would never end."""
    dead_J = topology.rate_bytes_per_s_J == 0
    if not dead_J.any():
        return
    stuck_FP = (routes.link_FP >= 0) & dead_J[routes.link_FP] & (flows.bytes_F > 0)[:, None]
    if not stuck_FP.any():
        return
    flow, hop = np.argwhere(stuck_FP)[0]
    link = int(routes.link_FP[flow, hop])
    others = np.setdiff1d(np.unique(routes.link_FP[stuck_FP]), [link])
    pair = f"rank {flows.source_F[flow]} to rank {flows.target_F[flow]}"
    got = f"{int(stuck_FP.any(axis=1).sum())} messages without end, the first from {pair}"
    hint = f"Also dead and used: {topology.names(others)}" if others.size else ""
    raise InputError("topology", topology.link_name(link), "must have a rate above 0: messages pass it", got, hint)


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
        speed_F = _fair_rates(active_F, link_FP, rate_J)
        step = (left_F[active_F] / speed_F[active_F]).min()
        following = begin_F[waiting_F].min() if waiting_F.any() else np.inf
        arrives = following <= now + step
        step, now = (following - now, following) if arrives else (step, now + step)
        left_F[active_F] -= speed_F[active_F] * step
        done_F = active_F & (left_F <= _DONE * bytes_F)
        finish_F[done_F] = now
        active_F &= ~done_F
    return finish_F


def _fair_rates(active_F: NDArray[np.bool_], link_FP: NDArray[np.int32], rate_J: Floats) -> Floats:
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
