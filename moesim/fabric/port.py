"""When ranks are done with an exchange, fast: the fabric's fidelity ``port``, the default inside a step.

Legend: R ranks, F flows, J links, P links of a route; leading axes (...) are micro-batches, layers, groups.

Two estimates of max-min fair sharing (``moesim.fabric.exact``):

- **Shares of a port**, for many matrices at once. A message ends when the slower of its ports would end it, if that
  port alone were shared evenly: by then each other message of the port has moved as much as it has, or is done. A
  closed form; it needs that nothing but the ranks' own ports can be full. Where a late port's largest message might be
  held up elsewhere, the matrix is settled by rounds between ports. docs/model.md#port-shares.
- **Rounds of shares**, for everything else: single exchanges, an oversubscribed spine, several planes or paths,
  messages that start at different times, exchanges that meet. Fair rates are held for a while, then settled anew, some
  tens of times. docs/model.md#rounds.

How far each is from exact is measured in docs/accuracy.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.errors import check
from moesim.fabric.exact import refuse_dead_links
from moesim.fabric.flows import Flows, flows_of, together
from moesim.fabric.port_kernels import shared_ports
from moesim.fabric.round_kernels import rounds_of_shares
from moesim.fabric.topology import Topology

Floats = NDArray[np.float64]

MOST_FLOWS_IN_ROUNDS = 100_000


def port_finish_s(bytes_RR: ArrayLike, topology: Topology, starts: ArrayLike | None = None) -> Floats:
    """When each rank's last message, out or in, has arrived [s], shape (..., R).

    bytes_RR: (..., R, R), what rank i sends rank j [bytes]; under one byte is no message, the diagonal is none either.
    starts: when each rank hands over what it sends, (R,), or each message, (R, R) [s]; None is 0. A rank without
    messages is done at 0. Raises InputError naming ranks and links for impossible bytes and for dead links.

    >>> from moesim.catalog.hardware import load_cluster
    >>> from moesim.fabric.topology import topology_of
    >>> finish_BR = port_finish_s(np.full((5, 16, 16), 1e6), topology_of(load_cluster("h100-8x-ib400"), 16))
    >>> finish_BR.shape, bool(np.ptp(finish_BR) == 0)
    ((5, 16), True)
    """
    bytes_ = np.asarray(bytes_RR)
    shape = (topology.num_ranks, topology.num_ranks)
    check(bytes_.shape[-2:] == shape, "port", "bytes", f"must be shaped (..., {shape[0]}, {shape[1]})", bytes_.shape)
    bytes_BRR = bytes_.reshape(-1, *shape)
    if starts is None and only_ports_bind(topology):
        finish_BR, open_B = _port_shares(bytes_BRR, topology)
    else:
        finish_BR, open_B = np.zeros(bytes_BRR.shape[:2]), np.arange(len(bytes_BRR))
    for batch in open_B:
        flows = flows_of(bytes_BRR[batch], starts)
        finish_BR[batch] = rank_finish_s(flows, _rounds(flows, topology), topology.num_ranks)
    return finish_BR.reshape(bytes_.shape[:-1])


def finish_s(flows: Flows, topology: Topology) -> Floats:
    """When each message has arrived [s], shape (F,): as ``moesim.fabric.exact.finish_s``, estimated. Raises InputError.

    Several exchanges at once are one call with ``together``. By rounds of shares; an exchange too large for them by
    shares of ports, whose error falls with the number of messages.
    """
    if flows.num_flows > MOST_FLOWS_IN_ROUNDS and only_ports_bind(topology) and np.ptp(flows.start_F) == 0:
        pairs = flows.source_F.astype(np.int64) * topology.num_ranks + flows.target_F
        if np.unique(pairs).size == flows.num_flows:
            return _of_one_exchange(flows, topology)
    return _rounds(flows, topology)


def contended_finish_s(exchanges: Sequence[Flows], topology: Topology) -> list[Floats]:
    """When each message of several exchanges that share the wires has arrived [s], an array (F,) for each exchange.

    Each exchange has its own starts (``Flows.start_F``): an expert all-to-all beside a gradient reduce-scatter beside a
    pipeline send. Raises InputError.
    """
    finish_F = finish_s(together(exchanges), topology)
    return np.split(finish_F, np.cumsum([flows.num_flows for flows in exchanges])[:-1])


def rank_finish_s(flows: Flows, finish_F: ArrayLike, num_ranks: int) -> Floats:
    """When each rank's last message, out or in, has arrived [s], shape (R,); 0 for a rank without messages."""
    finish_R = np.zeros(num_ranks)
    np.maximum.at(finish_R, flows.source_F, finish_F)
    np.maximum.at(finish_R, flows.target_F, finish_F)
    return finish_R


def only_ports_bind(topology: Topology) -> bool:
    """Whether ranks' NVLink ports and NICs are the only links that can be full, and all ranks pay alike latencies."""
    if topology.num_planes > 1 or topology.extra_latency_s_R is not None:
        return False
    if topology.cross_rail != "spine":
        return True
    nic_J = topology.rate_bytes_per_s_J[2 * topology.num_ranks : topology.first_leaf_up].reshape(2, -1)
    rail_R = np.arange(topology.num_ranks) % topology.ranks_per_node
    needed = np.concatenate([np.bincount(rail_R, nic_R, minlength=topology.ranks_per_node) for nic_R in nic_J])
    leaf_J = topology.rate_bytes_per_s_J[topology.first_leaf_up :]
    return topology.num_paths == 1 and bool((leaf_J >= needed * (1.0 - 1e-9)).all())


def link_bytes_J(flows: Flows, topology: Topology) -> Floats:
    """Bytes that each link carries, shape (J,)."""
    link_FP = topology.routes(flows.source_F, flows.target_F).link_FP
    used_FP = link_FP >= 0
    weights_FP = np.broadcast_to(flows.bytes_F[:, None], link_FP.shape)
    carried_J = np.bincount(link_FP[used_FP], weights_FP[used_FP], minlength=topology.rate_bytes_per_s_J.size)
    return carried_J.astype(np.float64)


def busiest_link(flows: Flows, topology: Topology) -> tuple[float, int]:
    """(seconds at line rate, link) of the link that needs longest for its bytes: no exchange ends before that.

    (0.0, 0) where nothing is sent.
    """
    carried_J = link_bytes_J(flows, topology)
    with np.errstate(divide="ignore", invalid="ignore"):
        seconds_J = np.where(carried_J > 0, carried_J / topology.rate_bytes_per_s_J, 0.0)
    link = int(seconds_J.argmax())
    return float(seconds_J[link]), link


def _port_shares(bytes_BRR: NDArray, topology: Topology) -> tuple[Floats, NDArray[np.int64]]:
    """(finish_BR, which matrices it does not serve)."""
    finish_BR, is_open_B = np.zeros(bytes_BRR.shape[:2]), np.zeros(len(bytes_BRR), np.bool_)
    settles = topology.num_ranks**2 <= MOST_FLOWS_IN_ROUNDS
    _fill_by_shares(bytes_BRR, topology, settles, finish_BR, np.zeros((len(bytes_BRR), 0, 0)), is_open_B)
    return finish_BR, np.flatnonzero(is_open_B)


def _fill_by_shares(
    bytes_BRR: NDArray,
    topology: Topology,
    settles: bool,
    finish_BR: Floats,
    finish_BRR: Floats,
    is_open_B: NDArray[np.bool_],
) -> None:
    num_ranks = topology.num_ranks
    rate_4R = topology.rate_bytes_per_s_J[: 4 * num_ranks].reshape(4, num_ranks)
    single_BRR = np.ascontiguousarray(bytes_BRR, dtype=np.float32)
    _refuse_bad(single_BRR, topology)
    shared_ports(
        single_BRR,
        single_BRR.view(np.int32),
        topology.ranks_per_node,
        topology.cross_rail == "pxn",
        np.where(rate_4R == 0, 1.0, rate_4R).astype(np.float32),  # of ports that nothing uses
        topology.latency_intra_s,
        topology.latency_inter_s,
        settles,
        finish_BR,
        finish_BRR,
        is_open_B,
    )


def _refuse_bad(bytes_BRR: NDArray, topology: Topology) -> None:
    """Raise InputError naming ranks and links for impossible bytes and used dead links."""
    # A sum is below 0, NaN or infinite where a matrix may be bad; flows_of then says which ranks.
    doubtful = not np.isfinite(bytes_BRR.sum(dtype=np.float64)) or bytes_BRR.min(initial=0.0) < 0
    if doubtful or (topology.rate_bytes_per_s_J == 0).any():
        for matrix_RR in bytes_BRR:
            flows = flows_of(matrix_RR)
            refuse_dead_links(flows, topology, topology.routes(flows.source_F, flows.target_F))


def _of_one_exchange(flows: Flows, topology: Topology) -> Floats:
    """Finish of each message of one exchange by shares of ports."""
    bytes_RR = np.zeros((topology.num_ranks, topology.num_ranks))
    bytes_RR[flows.source_F, flows.target_F] = flows.bytes_F
    finish_BRR = np.zeros((1, *bytes_RR.shape))
    _fill_by_shares(bytes_RR[None], topology, False, np.zeros(finish_BRR.shape[:2]), finish_BRR, np.zeros(1, np.bool_))
    return flows.start_F + finish_BRR[0, flows.source_F, flows.target_F]


def _rounds(flows: Flows, topology: Topology) -> Floats:
    """Finish of each message by rounds of fair shares."""
    routes = topology.routes(flows.source_F, flows.target_F)
    refuse_dead_links(flows, topology, routes)
    begin_F = flows.start_F + routes.latency_F
    rate_J = topology.rate_bytes_per_s_J
    bound_F = np.isfinite(np.where(routes.link_FP >= 0, rate_J[routes.link_FP], np.inf)).any(axis=1)
    moves_F = bound_F & (flows.bytes_F > 0)
    finish_F = begin_F.copy()
    moving_F = np.zeros(int(moves_F.sum()))
    rounds_of_shares(flows.bytes_F[moves_F], begin_F[moves_F], routes.link_FP[moves_F], rate_J, moving_F)
    finish_F[moves_F] = moving_F
    return finish_F
