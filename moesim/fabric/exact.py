"""When each message of an exchange arrives, if links share their rate fairly: the fabric's fidelity ``exact``.

Legend: F flows, J links, P links of a route (padded with -1).

Max-min fairness: at every moment no flow could be faster without slowing one that is no faster. Rates hold until the
next message starts or ends. docs/model.md#exact.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.errors import InputError
from moesim.fabric.flows import Flows
from moesim.fabric.topology import Routes, Topology

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]
_FOLD_FROM = 64  # below so many messages a fold costs more than it saves


def finish_s(flows: Flows, topology: Topology) -> Floats:
    """When each message has arrived [s], shape (F,).

    A message starts at its start plus its route's latency and then moves at its max-min fair rate. Several exchanges
    at once are one call with ``together``. Raises InputError naming ranks and links where a message could never end.
    docs/model.md#exact.

    >>> from moesim.catalog.hardware import load_cluster
    >>> from moesim.fabric.flows import flows_of
    >>> from moesim.fabric.topology import topology_of
    >>> topology = topology_of(load_cluster("h100-8x-ib400"), 2, operation=None)
    >>> finish_s(flows_of([[0, 45e6], [9e6, 0]]), topology).round(8).tolist()  # 450 GB/s after 3.33 us
    [0.00010333, 2.333e-05]
    """
    routes = topology.routes(flows.source_F, flows.target_F)
    refuse_dead_links(flows, topology, routes)
    return shared_finish_s(flows.bytes_F, flows.start_F + routes.latency_F, routes.link_FP, topology.rate_bytes_per_s_J)


def refuse_dead_links(flows: Flows, topology: Topology, routes: Routes) -> None:
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


def shared_finish_s(bytes_F: Floats, begin_F: Floats, link_FP: Ints, rate_J: Floats) -> Floats:
    """When messages that begin to move at begin_F [s] over the links of link_FP have arrived [s], shape (F,).

    Any links will do: rates above 0, infinite ones included; a message without bytes or finite links arrives at once.
    """
    finish_F = begin_F.astype(np.float64)
    bounded_FP = (link_FP >= 0) & np.isfinite(rate_J)[link_FP]
    moving = np.flatnonzero((bytes_F > 0) & bounded_FP.any(axis=1))
    if moving.size < bytes_F.size or not bounded_FP[link_FP >= 0].all():
        bytes_F, begin_F, link_FP = bytes_F[moving], begin_F[moving], packed(link_FP[moving], bounded_FP[moving])
    finish_F[moving] = _finish_of_moving(bytes_F, begin_F, np.ascontiguousarray(link_FP), rate_J)
    return finish_F


def packed(link_FP: Ints, kept_FP: NDArray[np.bool_]) -> Ints:
    """Routes with only the kept links, which stand first."""
    order_FP = np.argsort(~kept_FP, axis=1, kind="stable")
    return np.take_along_axis(np.where(kept_FP, link_FP, -1), order_FP, axis=1)


def _finish_of_moving(bytes_F: Floats, begin_F: Floats, link_FP: Ints, rate_J: Floats) -> Floats:
    """As shared_finish_s, for messages with bytes over finite links only: folded where symmetry allows."""
    from moesim.fabric.sharing_kernels import MOST_PAIRS, finish_shared

    fold = _fold(bytes_F, begin_F, link_FP, rate_J) if bytes_F.size >= _FOLD_FROM else None
    if fold is not None:
        finish_I = np.empty(fold.first_I.size)
        begin_I, rate_K = begin_F[fold.first_I], rate_J[fold.first_K]
        finish_shared(bytes_F[fold.first_I], begin_I, fold.link_IP, fold.weight_IP, rate_K, finish_I, MOST_PAIRS)
        return finish_I[fold.colour_F]
    finish_F = np.empty(bytes_F.size)
    finish_shared(bytes_F, begin_F, link_FP, np.empty((0, 0)), rate_J, finish_F, MOST_PAIRS)
    return finish_F


class _Fold(NamedTuple):
    """I colours of messages and K of links: which colour each message has, and the first of each colour."""

    colour_F: Ints
    first_I: NDArray[np.int64]
    first_K: NDArray[np.int64]
    link_IP: Ints
    weight_IP: Floats


def _fold(bytes_F: Floats, begin_F: Floats, link_FP: Ints, rate_J: Floats) -> _Fold | None:
    """Messages and links that symmetry makes equal, one of each; None where that saves less than half of the links."""
    from moesim.fabric import fold_kernels as kernels

    used_J = np.bincount(link_FP[link_FP >= 0], minlength=rate_J.size) > 0
    most_colours = int(used_J.sum()) // 2
    tag_F = bytes_F.view(np.uint64) * np.uint64(3) + begin_F.view(np.uint64)
    tag_J = np.where(used_J, rate_J, -1.0).view(np.uint64)
    if kernels.refine(tag_F, tag_J, link_FP, most_colours) > most_colours:
        return None
    colour_F, first_I = kernels.numbered(tag_F)
    colour_J, first_K = kernels.numbered(tag_J)
    colours = colour_F, first_I, colour_J, first_K, *kernels.messages_of_links(link_FP, rate_J.size)
    if not kernels.is_equitable(bytes_F, begin_F, link_FP, rate_J, *colours):
        return None
    link_IP, weight_IP = kernels.folded(link_FP, *colours)
    return _Fold(colour_F, first_I, first_K, link_IP, weight_IP)


def warm() -> None:
    """Compile the kernels into their cache."""
    for bytes_F in (np.ones(_FOLD_FROM), np.arange(1.0, _FOLD_FROM + 1)):
        shared_finish_s(bytes_F, np.zeros(_FOLD_FROM), np.arange(_FOLD_FROM, dtype=np.int32)[:, None] % 2, np.ones(2))
