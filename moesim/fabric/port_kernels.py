"""The arithmetic of the fidelity ``port``: fair shares of one port, and rounds of fair shares, as numba kernels.

Legend: B matrices, R ranks, F flows, J links, P links of a route (padded with -1), C size classes.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
Ints = NDArray[np.int64]

NVLINK_OUT, NVLINK_IN, NIC_OUT, NIC_IN = 0, 1, 2, 3
SIZE_SHIFT = 20  # a float32 without its last 20 bits: eight size classes for each doubling
NUM_CLASSES = 97  # the largest message's, 95 below it, and one for all that is 12 doublings smaller
HELD_FRACTION = 0.25  # of the geometric mean of the remaining times: how long a round holds its shares
TOGETHER_FRACTION = 0.05  # flows that end within so much of the first one end in one round
LATE_FRACTION = 0.02  # of the same mean: how late a round may let a flow begin
SHARE_PASSES = 2  # how often what flows limited elsewhere leave is handed to the others
MOST_ROUNDS = 500
SAME_FRACTION = 1e-9  # finishes that differ by less are the same but for rounding
LEAST_ROOM_FRACTION = 1e-3  # of a link's rate, for those that outlast a round


@njit(cache=True)
def shared_ports(
    bytes_BRR: Singles,
    bits_BRR: NDArray[np.int32],
    per_node: int,
    hops: bool,
    rate_4R: Singles,
    intra_s: float,
    inter_s: float,
    finish_BR: Floats,
    finish_BRR: Floats,
) -> None:
    """Fill finish_BR, and finish_BRR unless it is empty: see ``port.port_finish_s``. bits_BRR: bytes_BRR's memory as
    integers. hops: messages for another rail hop to its rank by NVLink.
    """
    num_ranks = bytes_BRR.shape[1]
    in_pairs = finish_BRR.size > 0
    load = np.empty((2, 4, num_ranks), np.float32)  # bytes through a port: all, and those that hop
    end, first, late = np.empty((4, num_ranks)), np.empty((4, num_ranks)), np.empty((4, num_ranks))
    needed = np.empty((4, num_ranks), np.bool_)
    inside = np.empty((4, num_ranks, NUM_CLASSES, 2), np.float32)  # bytes and number of a port's messages in a class
    outside = np.empty((4, num_ranks, NUM_CLASSES, 2), np.float32)  # bytes in smaller classes, number in larger ones
    for batch in range(bytes_BRR.shape[0]):
        sizes, bits, finish = bytes_BRR[batch], bits_BRR[batch], finish_BR[batch]
        largest = _load(sizes, bits, per_node, hops, load)
        _last_ends(load, rate_4R, intra_s, inter_s, end, first, late)
        for rank in range(num_ranks):
            own = max(end[NVLINK_OUT, rank], end[NIC_IN, rank])
            # Where messages hop, the other two may carry those of other ranks.
            finish[rank] = own if hops else max(own, end[NVLINK_IN, rank], end[NIC_OUT, rank])
        # A port that ends before every rank moves none: it is left out of what follows.
        least = 0.0 if in_pairs else finish.min()
        uses_nvlink = uses_nic = False
        for rank in range(num_ranks):
            for port in range(4):
                needed[port, rank] = end[port, rank] > least
            uses_nvlink |= needed[NVLINK_OUT, rank] or needed[NVLINK_IN, rank]
            uses_nic |= needed[NIC_OUT, rank] or needed[NIC_IN, rank]
        if not (uses_nvlink or uses_nic):
            continue
        smallest = (largest >> SIZE_SHIFT) - NUM_CLASSES + 1
        _classify(sizes, bits, smallest, per_node, hops, needed, uses_nvlink, inside, outside)
        for source in range(num_ranks):
            node_start = source - source % per_node
            for block in range(0, num_ranks, per_node):
                near = block == node_start
                if near and not uses_nvlink:
                    continue
                for target in range(block, min(block + per_node, num_ranks)):
                    size = sizes[source, target]
                    if size < 1.0 or source == target:
                        continue
                    at = max((bits[source, target] >> SIZE_SHIFT) - smallest, 0)
                    known = 0.0 if in_pairs else min(finish[source], finish[target])
                    carrier, start, done = source, intra_s if near else inter_s, 0.0
                    if not near:
                        peer = node_start + target - block
                        if hops and peer < num_ranks and peer != source:
                            carrier, start = peer, inter_s + intra_s
                        if end[NIC_OUT, carrier] > known:
                            done = _end(NIC_OUT, carrier, at, size, start, inside, outside, rate_4R, first, late)
                        if end[NIC_IN, target] > known:
                            done = max(
                                done, _end(NIC_IN, target, at, size, start, inside, outside, rate_4R, first, late)
                            )
                    if uses_nvlink and (near or carrier != source):
                        to = target if near else carrier
                        if end[NVLINK_OUT, source] > known:
                            done = max(
                                done, _end(NVLINK_OUT, source, at, size, start, inside, outside, rate_4R, first, late)
                            )
                        if end[NVLINK_IN, to] > known:
                            done = max(
                                done, _end(NVLINK_IN, to, at, size, start, inside, outside, rate_4R, first, late)
                            )
                    if in_pairs:
                        finish_BRR[batch, source, target] = done
                    if done > finish[source]:
                        finish[source] = done
                    if done > finish[target]:
                        finish[target] = done


@njit(cache=True)
def _load(sizes: Singles, bits: NDArray[np.int32], per_node: int, hops: bool, load: Singles) -> int:
    """Fill load, and return the bits of the largest message."""
    num_ranks = sizes.shape[0]
    load[:] = np.float32(0.0)
    largest = 0
    for source in range(num_ranks):
        node_start = source - source % per_node
        rail = source - node_start
        own_nic = own_nvlink = own_hops = np.float32(0.0)
        for block in range(0, num_ranks, per_node):
            num_here = min(per_node, num_ranks - block)
            if block == node_start:
                for at in range(num_here):
                    size = sizes[source, block + at] if at != rail else np.float32(0.0)
                    size = size if size >= 1.0 else np.float32(0.0)
                    largest = max(largest, int(bits[source, block + at]) if at != rail else 0)
                    own_nvlink += size
                    load[0, NVLINK_IN, block + at] += size
                continue
            for at in range(num_here):
                size = sizes[source, block + at]
                size = size if size >= 1.0 else np.float32(0.0)
                largest = max(largest, int(bits[source, block + at]))
                load[0, NIC_IN, block + at] += size
            if not hops:
                for at in range(num_here):
                    size = sizes[source, block + at]
                    own_nic += size if size >= 1.0 else np.float32(0.0)
                continue
            num_carriers = min(num_here, num_ranks - node_start)
            for at in range(num_carriers):
                size = sizes[source, block + at] if at != rail else np.float32(0.0)
                size = size if size >= 1.0 else np.float32(0.0)
                load[1, NIC_IN, block + at] += size
                load[1, NIC_OUT, node_start + at] += size
                own_hops += size
            for at in range(num_here):  # to its own rail, or to one that its node does not have
                size = sizes[source, block + at] if at == rail or at >= num_carriers else np.float32(0.0)
                own_nic += size if size >= 1.0 else np.float32(0.0)
        load[0, NIC_OUT, source] += own_nic
        load[0, NVLINK_OUT, source] = own_nvlink + own_hops
        load[1, NVLINK_OUT, source] = own_hops
    if hops:  # what a NIC sends for others came in by NVLink
        for rank in range(num_ranks):
            load[0, NIC_OUT, rank] += load[1, NIC_OUT, rank]
            load[1, NVLINK_IN, rank] = load[1, NIC_OUT, rank]
            load[0, NVLINK_IN, rank] += load[1, NIC_OUT, rank]
    return largest


@njit(cache=True)
def _last_ends(
    load: Singles, rate_4R: Singles, intra_s: float, inter_s: float, end: Floats, first: Floats, late: Floats
) -> None:
    """Fill end (of a port's last message), first (the first start on it), late (share of bytes that start later)."""
    for port in range(4):
        early_s = intra_s if port <= NVLINK_IN else inter_s
        for rank in range(end.shape[1]):
            whole, hopped = load[0, port, rank], load[1, port, rank]
            if whole <= 0.0:
                end[port, rank] = 0.0
                continue
            only_hops = hopped >= whole * (1.0 - 1e-6)
            first[port, rank] = inter_s + intra_s if only_hops else early_s
            late[port, rank] = 1.0 if only_hops else hopped / whole
            last = inter_s + intra_s if hopped > 0.0 else early_s
            work_s = whole / rate_4R[port, rank]
            end[port, rank] = max(first[port, rank] + work_s, last + late[port, rank] * work_s)


@njit(cache=True)
def _classify(
    sizes: Singles,
    bits: NDArray[np.int32],
    smallest: int,
    per_node: int,
    hops: bool,
    needed: NDArray[np.bool_],
    uses_nvlink: bool,
    inside: Singles,
    outside: Singles,
) -> None:
    """Fill inside and outside of the needed ports."""
    num_ranks = sizes.shape[0]
    for port in range(4):
        for rank in range(num_ranks):
            if needed[port, rank]:
                inside[port, rank] = np.float32(0.0)
    for source in range(num_ranks):
        node_start = source - source % per_node
        for block in range(0, num_ranks, per_node):
            near = block == node_start
            if near and not uses_nvlink:
                continue
            for target in range(block, min(block + per_node, num_ranks)):
                size = sizes[source, target]
                if size < 1.0 or source == target:
                    continue
                at = max((bits[source, target] >> SIZE_SHIFT) - smallest, 0)
                carrier = source
                if not near:
                    peer = node_start + target - block
                    carrier = peer if hops and peer < num_ranks else source
                    _count(NIC_OUT, carrier, at, size, needed, inside)
                    _count(NIC_IN, target, at, size, needed, inside)
                if uses_nvlink and (near or carrier != source):
                    _count(NVLINK_OUT, source, at, size, needed, inside)
                    _count(NVLINK_IN, target if near else carrier, at, size, needed, inside)
    for port in range(4):
        for rank in range(num_ranks):
            if needed[port, rank]:
                smaller, larger = np.float32(0.0), np.float32(0.0)
                for at in range(NUM_CLASSES):
                    outside[port, rank, at, 0] = smaller
                    smaller += inside[port, rank, at, 0]
                    back = NUM_CLASSES - 1 - at
                    outside[port, rank, back, 1] = larger
                    larger += inside[port, rank, back, 1]


@njit(cache=True)
def _count(port: int, rank: int, at: int, size: float, needed: NDArray[np.bool_], inside: Singles) -> None:
    if needed[port, rank]:
        inside[port, rank, at, 0] += size
        inside[port, rank, at, 1] += np.float32(1.0)


@njit(cache=True)
def _end(
    port: int,
    rank: int,
    at: int,
    size: float,
    start: float,
    inside: Singles,
    outside: Singles,
    rate_4R: Singles,
    first: Floats,
    late: Floats,
) -> float:
    """When a message ends on a port whose messages share it evenly: each of the others has moved as much, or all."""
    alike = min(inside[port, rank, at, 0], inside[port, rank, at, 1] * size)
    work_s = (outside[port, rank, at, 0] + outside[port, rank, at, 1] * size + alike) / rate_4R[port, rank]
    return max(first[port, rank] + work_s, start + late[port, rank] * work_s)


@njit(cache=True)
def rounds_of_shares(
    bytes_F: Floats, begin_F: Floats, link_FP: NDArray[np.int32], rate_J: Floats, finish_F: Floats
) -> int:
    """Fill finish_F: see moesim.fabric.port.finish_s. Returns the number of rounds."""
    num_flows, num_links = bytes_F.size, rate_J.size
    order = np.argsort(begin_F)
    left_F, speed_F = bytes_F.copy(), np.zeros(num_flows)
    active, staying = np.empty(num_flows, np.int64), np.empty(num_flows, np.int64)
    room_J, share_J = np.empty(num_links), np.empty(num_links)
    num_active = following = num_rounds = 0
    now = mean_s = 0.0
    while num_active > 0 or following < num_flows:
        if num_active == 0:
            now = max(now, begin_F[order[following]])
        while following < num_flows and begin_F[order[following]] <= now:
            active[num_active] = order[following]
            num_active += 1
            following += 1
        num_rounds += 1
        room_J[:] = rate_J
        _fair_speeds(active, num_active, link_FP, room_J, share_J, speed_F)
        first_s, mean_s = np.inf, 0.0
        for at in range(num_active):
            rest_s = left_F[active[at]] / speed_F[active[at]]
            first_s = min(first_s, rest_s)
            mean_s += np.log(rest_s)
        mean_s = np.exp(mean_s / num_active)
        held_s = max(HELD_FRACTION * mean_s, (1.0 + TOGETHER_FRACTION) * first_s)
        if following < num_flows:
            held_s = min(held_s, max(begin_F[order[following]] - now, LATE_FRACTION * mean_s))
        elif num_rounds >= MOST_ROUNDS:
            held_s = np.inf
        # What ends in this round takes its bytes; the others share what that leaves.
        num_staying = 0
        for at in range(num_active):
            flow = active[at]
            rest_s = left_F[flow] / speed_F[flow]
            if rest_s <= held_s:
                finish_F[flow] = now + rest_s
                for link in link_FP[flow]:
                    if link >= 0:
                        room_J[link] -= left_F[flow] / held_s
            else:
                staying[num_staying] = flow
                num_staying += 1
        for link in range(num_links):  # shares are not exact: a link may have been promised a little too often
            room_J[link] = max(room_J[link], LEAST_ROOM_FRACTION * rate_J[link])
        _fair_speeds(staying, num_staying, link_FP, room_J, share_J, speed_F)
        num_active = 0
        for at in range(num_staying):
            flow = staying[at]
            rest_s = left_F[flow] / speed_F[flow]
            if rest_s <= held_s:
                finish_F[flow] = now + rest_s
            else:
                left_F[flow] -= speed_F[flow] * held_s
                active[num_active] = flow
                num_active += 1
        now += held_s
    _wait_for_links(bytes_F, begin_F, link_FP, rate_J, finish_F)
    return num_rounds


@njit(cache=True)
def rounds_in_batches(
    bytes_BF: Floats,
    begin_F: Floats,
    link_FP: NDArray[np.int32],
    rate_J: Floats,
    source_F: Ints,
    target_F: Ints,
    finish_BR: Floats,
) -> None:
    """Fill finish_BR by rounds, matrix by matrix; a message without links (-1 alone) arrives at its begin."""
    for batch in range(bytes_BF.shape[0]):
        bytes_F, finish_R = np.floor(bytes_BF[batch]), finish_BR[batch]
        moving = np.flatnonzero((bytes_F > 0.0) & (link_FP[:, 0] >= 0))
        finish_F = begin_F.copy()
        ended = np.empty(moving.size)
        rounds_of_shares(bytes_F[moving], begin_F[moving], link_FP[moving], rate_J, ended)
        finish_F[moving] = ended
        for flow in range(bytes_F.size):
            if bytes_F[flow] > 0.0:
                finish_R[source_F[flow]] = max(finish_R[source_F[flow]], finish_F[flow])
                finish_R[target_F[flow]] = max(finish_R[target_F[flow]], finish_F[flow])


@njit(cache=True)
def _wait_for_links(
    bytes_F: Floats, begin_F: Floats, link_FP: NDArray[np.int32], rate_J: Floats, finish_F: Floats
) -> None:
    """Raise the last finish on each link to what the link needs for its bytes: rounds may promise it too often.

    Flows that end together are all raised: which of them a rounding puts last must not matter.
    """
    num_links = rate_J.size
    carried_J, first_J, last_J = np.zeros(num_links), np.full(num_links, np.inf), np.zeros(num_links)
    for flow in range(bytes_F.size):
        for link in link_FP[flow]:
            if link >= 0:
                carried_J[link] += bytes_F[flow]
                first_J[link] = min(first_J[link], begin_F[flow])
                last_J[link] = max(last_J[link], finish_F[flow])
    for flow in range(bytes_F.size):
        least_s = 0.0
        for link in link_FP[flow]:
            if link >= 0 and finish_F[flow] >= last_J[link] * (1.0 - SAME_FRACTION):
                least_s = max(least_s, first_J[link] + carried_J[link] / rate_J[link])
        finish_F[flow] = max(finish_F[flow], least_s)


@njit(cache=True)
def _fair_speeds(
    flows: Ints, num_flows: int, link_FP: NDArray[np.int32], room_J: Floats, share_J: Floats, speed_F: Floats
) -> None:
    """Fill speed_F of some flows: the least share on the route, where a link's share is even at first, and then what
    flows that are slower elsewhere leave to the others.
    """
    count_J, slow_J, taken_J = np.zeros(room_J.size), np.zeros(room_J.size), np.zeros(room_J.size)
    for at in range(num_flows):
        for link in link_FP[flows[at]]:
            if link >= 0:
                count_J[link] += 1.0
    for link in range(room_J.size):
        share_J[link] = room_J[link] / count_J[link] if count_J[link] > 0 else np.inf
    for turn in range(SHARE_PASSES + 1):
        for at in range(num_flows):
            flow = flows[at]
            speed = np.inf
            for link in link_FP[flow]:
                if link >= 0:
                    speed = min(speed, share_J[link])
            speed_F[flow] = speed
        if turn == SHARE_PASSES:
            return
        slow_J[:], taken_J[:] = 0.0, 0.0
        for at in range(num_flows):
            flow = flows[at]
            for link in link_FP[flow]:
                if link >= 0 and speed_F[flow] < share_J[link] * (1.0 - 1e-6):
                    slow_J[link] += 1.0
                    taken_J[link] += speed_F[flow]
        for link in range(room_J.size):
            if slow_J[link] < count_J[link]:
                even = room_J[link] / count_J[link]
                share_J[link] = max(even, (room_J[link] - taken_J[link]) / (count_J[link] - slow_J[link]))


def warm() -> None:
    """Compile the kernels."""
    sizes = np.ones((1, 2, 2), np.float32)
    rates = np.ones((4, 2), np.float32)
    pairs = np.zeros((1, 2, 2))
    shared_ports(sizes, sizes.view(np.int32), 1, False, rates, 0.0, 0.0, np.zeros((1, 2)), pairs)
    rounds_of_shares(np.ones(1), np.zeros(1), np.zeros((1, 4), np.int32), np.ones(1), np.zeros(1))
    ends, route = np.zeros(1, np.int64), np.zeros((1, 4), np.int32)
    rounds_in_batches(np.ones((1, 1)), np.zeros(1), route, np.ones(1), ends, ends, np.zeros((1, 1)))
