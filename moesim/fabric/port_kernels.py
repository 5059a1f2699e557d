"""The arithmetic of the fidelity ``port``: fair shares of one port, and when they are to be doubted, as numba kernels.

Legend: B matrices, R ranks, C size classes, V what is known of a port's class.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.fabric.round_kernels import rounds_between_ports

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]

NVLINK_OUT, NVLINK_IN, NIC_OUT, NIC_IN = 0, 1, 2, 3
SIZE_SHIFT = 20  # a float32 without its last 20 bits: eight size classes for each doubling
NUM_CLASSES = 97  # the largest message's, 95 below it, and one for all that is 12 doublings smaller
BYTES, NUMBER, BELOW, ABOVE = 0, 1, 2, 3  # bytes and number of a class, bytes of smaller classes, number of larger ones

FEW_RANKS = 32  # rounds then take about 0.1 ms a matrix or less: they need no sign
DOUBT_FRACTION = 0.02  # so much later than the shares a message might end before they are doubted
LATE_PORT_FRACTION = 0.9  # of the exchange: ports that end earlier are not looked at
SMALL_PORT_FRACTION = 0.75  # of the exchange: ports that end earlier hold up no message


@njit(cache=True)
def shared_ports(
    bytes_BRR: Singles,
    bits_BRR: NDArray[np.int32],
    per_node: int,
    hops: bool,
    rate_4R: Singles,
    intra_s: float,
    inter_s: float,
    settles: bool,
    finish_BR: Floats,
    finish_BRR: Floats,
    is_open_B: NDArray[np.bool_],
) -> None:
    """Fill finish_BR, and finish_BRR unless it is empty: see ``port.port_finish_s``. bits_BRR: bytes_BRR's memory as
    integers. hops: messages for another rail hop to its rank by NVLink. settles: doubtful matrices are settled by
    rounds, or named in is_open_B where ports of both tiers matter.
    """
    num_ranks = bytes_BRR.shape[1]
    in_pairs = finish_BRR.size > 0
    load = np.empty((2, 4, num_ranks), np.float32)  # bytes through a port: all, and those that hop
    end, first, late = np.empty((4, num_ranks)), np.empty((4, num_ranks)), np.empty((4, num_ranks))
    needed = np.empty((4, num_ranks), np.bool_)
    table = np.empty((4, num_ranks, NUM_CLASSES, 4), np.float32)  # BYTES, NUMBER, BELOW, ABOVE
    for batch in range(bytes_BRR.shape[0]):
        sizes, bits, finish = bytes_BRR[batch], bits_BRR[batch], finish_BR[batch]
        largest = _load(sizes, bits, per_node, hops, load)
        _last_ends(load, rate_4R, intra_s, inter_s, end, first, late)
        for rank in range(num_ranks):
            own = max(end[NVLINK_OUT, rank], end[NIC_IN, rank])
            # Where messages hop, the other two may carry those of other ranks.
            finish[rank] = own if hops else max(own, end[NVLINK_IN, rank], end[NIC_OUT, rank])
        last_s = end.max()
        may_doubt = settles and _most_s(largest, per_node, rate_4R, end) > (1.0 + DOUBT_FRACTION) * last_s
        # A port that ends before every rank moves none: it is left out of what follows.
        least = 0.0 if in_pairs else finish.min()
        if may_doubt:
            least = min(least, SMALL_PORT_FRACTION * last_s)
        uses_nvlink = uses_nic = False
        for rank in range(num_ranks):
            for port in range(4):
                needed[port, rank] = end[port, rank] > least
            uses_nvlink |= needed[NVLINK_OUT, rank] or needed[NVLINK_IN, rank]
            uses_nic |= needed[NIC_OUT, rank] or needed[NIC_IN, rank]
        if not (uses_nvlink or uses_nic):
            continue
        smallest = (largest >> SIZE_SHIFT) - NUM_CLASSES + 1
        _classify(sizes, bits, smallest, per_node, hops, needed, uses_nvlink, table)
        _wait_for_ports(
            sizes,
            bits,
            smallest,
            per_node,
            hops,
            inter_s,
            intra_s,
            end,
            first,
            late,
            rate_4R,
            table,
            uses_nvlink,
            finish,
            finish_BRR[batch],
        )
        if may_doubt and (
            num_ranks <= FEW_RANKS
            or _is_doubtful(sizes, bits, smallest, per_node, hops, rate_4R, end, first, needed, table)
        ):
            if max(end[NVLINK_OUT].max(), end[NVLINK_IN].max()) <= SMALL_PORT_FRACTION * last_s:
                rounds_between_ports(sizes, per_node, hops, False, rate_4R[NIC_OUT:], first[NIC_OUT:], finish)
            elif max(end[NIC_OUT].max(), end[NIC_IN].max()) == 0.0:
                rounds_between_ports(sizes, per_node, False, True, rate_4R[:NIC_OUT], first[:NIC_OUT], finish)
            else:
                is_open_B[batch] = True


@njit(cache=True)
def _wait_for_ports(
    sizes: Singles,
    bits: NDArray[np.int32],
    smallest: int,
    per_node: int,
    hops: bool,
    inter_s: float,
    intra_s: float,
    end: Floats,
    first: Floats,
    late: Floats,
    rate_4R: Singles,
    table: Singles,
    uses_nvlink: bool,
    finish: Floats,
    finish_RR: Floats,
) -> None:
    """Raise each rank's finish to when its messages end, and fill finish_RR unless it is empty."""
    num_ranks = sizes.shape[0]
    in_pairs = finish_RR.size > 0
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
                        done = _end(NIC_OUT, carrier, at, size, start, table, rate_4R, first, late)
                    if end[NIC_IN, target] > known:
                        done = max(done, _end(NIC_IN, target, at, size, start, table, rate_4R, first, late))
                if uses_nvlink and (near or carrier != source):
                    to = target if near else carrier
                    if end[NVLINK_OUT, source] > known:
                        done = max(done, _end(NVLINK_OUT, source, at, size, start, table, rate_4R, first, late))
                    if end[NVLINK_IN, to] > known:
                        done = max(done, _end(NVLINK_IN, to, at, size, start, table, rate_4R, first, late))
                if in_pairs:
                    finish_RR[source, target] = done
                if done > finish[source]:
                    finish[source] = done
                if done > finish[target]:
                    finish[target] = done


@njit(cache=True)
def _most_s(largest: int, per_node: int, rate_4R: Singles, end: Floats) -> float:
    """Seconds of the fullest port, were every message as large as the largest: no message's progress is slower."""
    bits, num_ranks = np.empty(1, np.int32), rate_4R.shape[1]
    bits[0] = largest
    most_s = 0.0
    for port in range(4):
        num_messages = num_ranks - 1 if port <= NVLINK_IN else num_ranks - (num_ranks % per_node or per_node)
        for rank in range(num_ranks):
            if end[port, rank] > 0.0:
                most_s = max(most_s, num_messages * bits.view(np.float32)[0] / rate_4R[port, rank])
    return most_s


@njit(cache=True)
def _largest_messages(
    sizes: Singles, per_node: int, hops: bool, late_s: float, end: Floats, most_4R: Singles, whose_4R: NDArray[np.int32]
) -> None:
    """Fill the largest message of each port that ends after late_s, and whose it is: source * R + target."""
    num_ranks = sizes.shape[0]
    most_4R[:] = np.float32(0.0)
    for source in range(num_ranks):
        node_start = source - source % per_node
        for block in range(0, num_ranks, per_node):
            near = block == node_start
            for target in range(block, min(block + per_node, num_ranks)):
                size = sizes[source, target]
                if size < 1.0 or source == target:
                    continue
                message = source * num_ranks + target
                peer = node_start + target - block
                carrier = peer if hops and not near and peer < num_ranks else source
                if not near:
                    if end[NIC_OUT, carrier] > late_s and size > most_4R[NIC_OUT, carrier]:
                        most_4R[NIC_OUT, carrier], whose_4R[NIC_OUT, carrier] = size, message
                    if end[NIC_IN, target] > late_s and size > most_4R[NIC_IN, target]:
                        most_4R[NIC_IN, target], whose_4R[NIC_IN, target] = size, message
                if near or carrier != source:
                    to = target if near else carrier
                    if end[NVLINK_OUT, source] > late_s and size > most_4R[NVLINK_OUT, source]:
                        most_4R[NVLINK_OUT, source], whose_4R[NVLINK_OUT, source] = size, message
                    if end[NVLINK_IN, to] > late_s and size > most_4R[NVLINK_IN, to]:
                        most_4R[NVLINK_IN, to], whose_4R[NVLINK_IN, to] = size, message


@njit(cache=True)
def _is_doubtful(
    sizes: Singles,
    bits: NDArray[np.int32],
    smallest: int,
    per_node: int,
    hops: bool,
    rate_4R: Singles,
    end: Floats,
    first: Floats,
    needed: NDArray[np.bool_],
    table: Singles,
) -> bool:
    """Whether the largest message of a late port would end much later if at each moment of its progress it moved at
    the least of its ports' even shares, instead of at those of its slowest port all along.

    The truth lies between the two but for what other ports leave it.
    """
    num_ranks, last_s = sizes.shape[0], end.max()
    most_4R, whose_4R = np.empty((4, num_ranks), np.float32), np.empty((4, num_ranks), np.int32)
    _largest_messages(sizes, per_node, hops, LATE_PORT_FRACTION * last_s, end, most_4R, whose_4R)
    before_s = np.empty(4)
    for port in range(4):
        for rank in range(num_ranks):
            if most_4R[port, rank] == 0.0 or not needed[port, rank]:
                continue
            source, target = whose_4R[port, rank] // num_ranks, whose_4R[port, rank] % num_ranks
            node_start = source - source % per_node
            near = target - target % per_node == node_start
            peer = node_start + target % per_node
            carrier = peer if hops and not near and peer < num_ranks else source
            ranks = (source, target if near else carrier, carrier, target)
            counts = (near or carrier != source, near or carrier != source, not near, not near)
            size, reached_s = sizes[source, target], first[port, rank]
            last = max((bits[source, target] >> SIZE_SHIFT) - smallest, 0)
            before_s[:] = 0.0
            for at in range(last + 1):
                longest_s = 0.0
                for kind in range(4):
                    owner = ranks[kind]
                    if counts[kind] and needed[kind, owner]:
                        work_s = (
                            _work(kind, owner, at, size, table)
                            if at == last
                            else table[kind, owner, at + 1, BELOW]
                            + _edge(at + 1 + smallest) * table[kind, owner, at, ABOVE]
                        ) / rate_4R[kind, owner]
                        longest_s = max(longest_s, work_s - before_s[kind])
                        before_s[kind] = work_s
                reached_s += longest_s
            if reached_s > (1.0 + DOUBT_FRACTION) * last_s:
                return True
    return False


@njit(cache=True)
def _edge(size_class: int) -> float:
    """The smallest size of a class [bytes]."""
    bits = np.empty(1, np.int32)
    bits[0] = size_class << SIZE_SHIFT
    return float(bits.view(np.float32)[0])


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
    table: Singles,
) -> None:
    """Fill the table of the needed ports."""
    num_ranks = sizes.shape[0]
    for port in range(4):
        for rank in range(num_ranks):
            if needed[port, rank]:
                table[port, rank, :, :BELOW] = np.float32(0.0)
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
                    _count(NIC_OUT, carrier, at, size, needed, table)
                    _count(NIC_IN, target, at, size, needed, table)
                if uses_nvlink and (near or carrier != source):
                    _count(NVLINK_OUT, source, at, size, needed, table)
                    _count(NVLINK_IN, target if near else carrier, at, size, needed, table)
    for port in range(4):
        for rank in range(num_ranks):
            if needed[port, rank]:
                smaller, larger = np.float32(0.0), np.float32(0.0)
                for at in range(NUM_CLASSES):
                    table[port, rank, at, BELOW] = smaller
                    smaller += table[port, rank, at, BYTES]
                    back = NUM_CLASSES - 1 - at
                    table[port, rank, back, ABOVE] = larger
                    larger += table[port, rank, back, NUMBER]


@njit(cache=True)
def _count(
    port: int,
    rank: int,
    at: int,
    size: float,
    needed: NDArray[np.bool_],
    table: Singles,
) -> None:
    if needed[port, rank]:
        table[port, rank, at, BYTES] += size
        table[port, rank, at, NUMBER] += np.float32(1.0)


@njit(cache=True)
def _end(
    port: int,
    rank: int,
    at: int,
    size: float,
    start: float,
    table: Singles,
    rate_4R: Singles,
    first: Floats,
    late: Floats,
) -> float:
    """When a message ends on a port whose messages share it evenly."""
    work_s = _work(port, rank, at, size, table) / rate_4R[port, rank]
    return max(first[port, rank] + work_s, start + late[port, rank] * work_s)


@njit(cache=True)
def _work(port: int, rank: int, at: int, size: float, table: Singles) -> float:
    """Bytes of a port until a message of a class is done: each of the others has moved as much, or all."""
    alike = min(table[port, rank, at, BYTES], table[port, rank, at, NUMBER] * size)
    return table[port, rank, at, BELOW] + table[port, rank, at, ABOVE] * size + alike


def warm() -> None:
    """Compile the kernels."""
    sizes = np.ones((1, 2, 2), np.float32)
    rates = np.ones((4, 2), np.float32)
    finish, open_ = (np.zeros((1, 2)), np.zeros((1, 2, 2))), np.zeros(1, np.bool_)
    shared_ports(sizes, sizes.view(np.int32), 1, False, rates, 0.0, 0.0, False, *finish, open_)
