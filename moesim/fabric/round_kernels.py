"""Rounds of fair shares as numba kernels: for any links, and for messages of one tier that pass two ports each.

Legend: R ranks, F flows, J links, P links of a route (padded with -1), M messages, X pairs of an out-port and an
in-port.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
Ints = NDArray[np.int64]

HELD_FRACTION = 0.25  # of the geometric mean of the remaining times: how long a round holds its shares
PAIRS_HELD_FRACTION = 0.35  # the same where pairs of ports are moved
TOGETHER_FRACTION = 0.05  # flows that end within so much of the first one end in one round
LATE_FRACTION = 0.02  # of the same mean: how late a round may let a flow begin
SHARE_PASSES = 2  # how often what flows limited elsewhere leave is handed to the others
MOST_ROUNDS = 500
SAME_FRACTION = 1e-9  # finishes that differ by less are the same but for rounding
LEAST_ROOM_FRACTION = 1e-3  # of a link's rate, for those that outlast a round
SLOWER = np.float32(1.0 - 1e-6)
MANTISSA = 8388608.0  # of a float32: the step of its bits from one doubling to the next


@njit(cache=True)
def rounds_of_shares(
    bytes_F: Floats, begin_F: Floats, link_FP: NDArray[np.int32], rate_J: Floats, finish_F: Floats
) -> int:
    """Fill finish_F: see moesim.fabric.port.finish_s. Returns the number of rounds."""
    num_flows, num_links = bytes_F.size, rate_J.size
    order = np.argsort(begin_F)
    left_F, speed_F = bytes_F.copy(), np.zeros(num_flows)
    active, staying = np.empty(num_flows, np.int64), np.empty(num_flows, np.int64)
    room_J, share_J = np.empty(num_links), np.zeros(num_links)
    num_active = following = num_joined = num_rounds = 0
    now = mean_s = 0.0
    while num_active > 0 or following < num_flows:
        if num_active == 0:
            now = max(now, begin_F[order[following]])
        while following < num_flows and begin_F[order[following]] <= now:
            active[num_active] = order[following]
            num_active += 1
            following += 1
        if following > num_joined:
            share_J[:] = 0.0  # the last round's shares are no guide once flows join
            num_joined = following
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

    share_J: those of the round before, or 0; "at first" is halfway to them. What flows that are slower elsewhere leave
    takes more than SHARE_PASSES to spread, and changes little from round to round.
    """
    count_J, slow_J, taken_J = np.zeros(room_J.size), np.zeros(room_J.size), np.zeros(room_J.size)
    for at in range(num_flows):
        for link in link_FP[flows[at]]:
            if link >= 0:
                count_J[link] += 1.0
    for link in range(room_J.size):
        even = room_J[link] / count_J[link] if count_J[link] > 0 else 0.0
        share_J[link] = max(even, 0.5 * (share_J[link] + even)) if count_J[link] > 0 else 0.0
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


@njit(cache=True)
def rounds_between_ports(
    sizes_RR: Singles,
    per_node: int,
    hops: bool,
    near: bool,
    rate_2R: Singles,
    first_2R: Floats,
    finish_R: Floats,
) -> None:
    """Raise finish_R to when each rank's messages of one tier end, by rounds, if only this tier's ports can be full.

    near: messages inside nodes (NVLink), else those between nodes (NIC), which with hops leave by the NIC of their
    target's rail. rate_2R, first_2R: bytes/s and first start of the tier's ports, out and in. Messages that pass the
    same two ports move alike: such a pair is moved as one, its smallest message first.
    """
    num_ranks = sizes_RR.shape[0]
    size_M, source_M = np.empty(num_ranks * num_ranks, np.float32), np.empty(num_ranks * num_ranks, np.int32)
    port_2X = np.empty((2, num_ranks * num_ranks), np.int32)
    part_2X = np.empty((2, num_ranks * num_ranks), np.int32)  # where a pair's messages that still move start, and end
    num_pairs = _pairs(sizes_RR, per_node, hops, near, size_M, source_M, port_2X, part_2X)
    moved_X, total_X = np.zeros(num_pairs, np.float32), np.empty(num_pairs, np.float32)
    speed_X = np.empty(num_pairs, np.float32)
    count_2R, room_2R, share_2R = np.zeros_like(rate_2R), np.empty_like(rate_2R), np.zeros_like(rate_2R)
    work_4R = np.empty((4, num_ranks), np.float32)
    number = np.empty(1, np.float32)
    for pair in range(num_pairs):
        total_X[pair] = size_M[part_2X[0, pair] : part_2X[1, pair]].sum()
        for side in range(2):
            count_2R[side, port_2X[side, pair]] += part_2X[1, pair] - part_2X[0, pair]
    now, num_rounds = 0.0, 0
    while num_pairs > 0:
        num_rounds += 1
        room_2R[:] = rate_2R
        _pair_speeds(num_pairs, port_2X, part_2X, count_2R, room_2R, share_2R, work_4R, speed_X)
        held_s = _pairs_held_s(num_pairs, part_2X, size_M, moved_X, total_X, speed_X, number)
        if num_rounds >= MOST_ROUNDS:
            held_s = np.inf
        for turn in range(2):
            # What ends in this round takes its bytes; the others share what that leaves.
            if turn == 1:
                for side in range(2):
                    for port in range(num_ranks):
                        least_room = np.float32(LEAST_ROOM_FRACTION) * rate_2R[side, port]
                        room_2R[side, port] = max(room_2R[side, port], least_room)
                _pair_speeds(num_pairs, port_2X, part_2X, count_2R, room_2R, share_2R, work_4R, speed_X)
            kept = 0
            for pair in range(num_pairs):
                out, into, low, high = port_2X[0, pair], port_2X[1, pair], part_2X[0, pair], part_2X[1, pair]
                speed, moved, total = speed_X[pair], moved_X[pair], total_X[pair]
                most = np.float32(speed * held_s)
                if size_M[low] - moved <= most:
                    start = now + max(first_2R[0, out], first_2R[1, into])
                    before = low
                    while low < high and size_M[low] - moved <= most:
                        left = size_M[low] - moved
                        rank, end = source_M[low], start + left / speed
                        finish_R[rank] = max(finish_R[rank], end)
                        finish_R[into] = max(finish_R[into], end)
                        room_2R[0, out] -= np.float32(left / held_s)
                        room_2R[1, into] -= np.float32(left / held_s)
                        total -= size_M[low]
                        low += 1
                    count_2R[0, out] -= low - before
                    count_2R[1, into] -= low - before
                if low < high:
                    port_2X[0, kept], port_2X[1, kept], part_2X[0, kept], part_2X[1, kept] = out, into, low, high
                    moved_X[kept] = moved + most if turn == 1 else moved
                    total_X[kept] = total
                    kept += 1
            num_pairs = kept
        now += held_s


@njit(cache=True)
def _pairs_held_s(
    num_pairs: int,
    part_2X: NDArray[np.int32],
    size_M: Singles,
    moved_X: Singles,
    total_X: Singles,
    speed_X: Singles,
    number: Singles,
) -> float:
    """How long a round of pairs holds its shares. number: room for one value, whose bits are read."""
    bits = number.view(np.int32)
    first_s, doublings, num_moving = np.float32(np.inf), 0, 0
    for pair in range(num_pairs):
        low, num_here = part_2X[0, pair], part_2X[1, pair] - part_2X[0, pair]
        least = size_M[low] - moved_X[pair]
        first_s = min(first_s, least / speed_X[pair])
        # The bits of a float32 grow almost as its logarithm.
        number[0] = np.sqrt(least * max(least, total_X[pair] / num_here - moved_X[pair])) / speed_X[pair]
        doublings += num_here * np.int64(bits[0])
        num_moving += num_here
    mean_s = 2.0 ** (doublings / num_moving / MANTISSA - 127.0)
    return max(PAIRS_HELD_FRACTION * mean_s, (1.0 + TOGETHER_FRACTION) * first_s)


@njit(cache=True)
def _pairs(
    sizes_RR: Singles,
    per_node: int,
    hops: bool,
    near: bool,
    size_M: Singles,
    source_M: NDArray[np.int32],
    port_2X: NDArray[np.int32],
    part_2X: NDArray[np.int32],
) -> int:
    """Fill the messages of a tier, pair by pair, each pair's from small to large; returns the number of pairs.

    Neighbours in this order share no port, so that sums over ports need not wait for each other.
    """
    num_ranks = sizes_RR.shape[0]
    num_pairs = num_messages = 0
    for step in range(num_ranks):
        for lead in range(num_ranks):
            target = lead + step if lead + step < num_ranks else lead + step - num_ranks
            node_start = lead - lead % per_node
            if (target - target % per_node == node_start) != near or target == lead:
                continue
            low, high = lead, lead + 1  # the ranks whose messages pass this pair of ports
            if hops:
                # Of a node's ranks the target's carrier leads; those without one in their node send for themselves.
                carrier = node_start + target % per_node
                if carrier < num_ranks:
                    if lead != carrier:
                        continue
                    low, high = node_start, min(node_start + per_node, num_ranks)
            first = num_messages
            for source in range(low, high):
                size = sizes_RR[source, target]
                if size < 1.0:
                    continue
                at = num_messages
                while at > first and size_M[at - 1] > size:
                    size_M[at], source_M[at] = size_M[at - 1], source_M[at - 1]
                    at -= 1
                size_M[at], source_M[at] = size, source
                num_messages += 1
            if num_messages > first:
                port_2X[0, num_pairs], port_2X[1, num_pairs] = lead, target
                part_2X[0, num_pairs], part_2X[1, num_pairs] = first, num_messages
                num_pairs += 1
    return num_pairs


@njit(cache=True, error_model="numpy")
def _pair_speeds(
    num_pairs: int,
    port_2X: NDArray[np.int32],
    part_2X: NDArray[np.int32],
    count_2R: Singles,
    room_2R: Singles,
    share_2R: Singles,
    work_4R: Singles,
    speed_X: Singles,
) -> None:
    """As ``_fair_speeds``, for the messages of pairs: each passes one out-port and one in-port."""
    slow_2R, taken_2R = work_4R[:2], work_4R[2:]
    for side in range(2):
        for port in range(room_2R.shape[1]):
            even = room_2R[side, port] / max(count_2R[side, port], np.float32(1.0))
            share_2R[side, port] = max(np.float32(0.5) * (share_2R[side, port] + even), even)
    for _ in range(SHARE_PASSES):
        work_4R[:] = np.float32(0.0)
        for pair in range(num_pairs):
            out, into = port_2X[0, pair], port_2X[1, pair]
            num_here = np.float32(part_2X[1, pair] - part_2X[0, pair])
            out_share, in_share = share_2R[0, out], share_2R[1, into]
            slow_out = num_here if in_share < out_share * SLOWER else np.float32(0.0)
            slow_in = num_here if out_share < in_share * SLOWER else np.float32(0.0)
            slow_2R[0, out] += slow_out
            taken_2R[0, out] += slow_out * in_share
            slow_2R[1, into] += slow_in
            taken_2R[1, into] += slow_in * out_share
        for side in range(2):
            for port in range(room_2R.shape[1]):
                others = count_2R[side, port] - slow_2R[side, port]
                if others > 0:
                    even = room_2R[side, port] / count_2R[side, port]
                    share_2R[side, port] = max(even, (room_2R[side, port] - taken_2R[side, port]) / others)
    for pair in range(num_pairs):
        speed_X[pair] = min(share_2R[0, port_2X[0, pair]], share_2R[1, port_2X[1, pair]])


def warm() -> None:
    """Compile the kernels."""
    rounds_of_shares(np.ones(1), np.zeros(1), np.zeros((1, 4), np.int32), np.ones(1), np.zeros(1))
