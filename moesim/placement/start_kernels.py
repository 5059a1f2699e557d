"""Numba kernels that make one layer's layout from nothing: replica counts, then packing. Imported only by ``kernels``.

Legend: E experts, R ranks, S slots (rank r owns slots first_R1[r] to first_R1[r+1]).
"""

from __future__ import annotations

import numpy as np
from numba import njit

_TINY = 1e-12  # relative rounding allowance
_JUST_BELOW = 0.9999  # the sum may be in float32


@njit(nogil=True, cache=True)
def _sink_heaviest(heap, share_E, at):  # type: ignore[no-untyped-def]
    """Restore the heap of experts (largest share first, ties by number) below place ``at``."""
    while True:
        most = at
        for child in (2 * at + 1, 2 * at + 2):
            if child < heap.size:
                a, b = heap[child], heap[most]
                if share_E[a] > share_E[b] or (share_E[a] == share_E[b] and a < b):
                    most = child
        if most == at:
            return
        heap[at], heap[most] = heap[most], heap[at]
        at = most


@njit(nogil=True, cache=True)
def greedy_counts(load_E, num_slots, count_E, share_E):  # type: ignore[no-untyped-def]
    """Fill count_E and share_E: one replica each, every further one to the expert with the largest load per replica.

    Shares are rounded to load_E's precision.
    """
    count_E[:] = 1
    share_E[:] = load_E
    if num_slots == load_E.size:
        return
    # Before the last slot is given, some share is above the mean of all slots: lighter experts get no second one.
    heap = np.flatnonzero(load_E >= load_E.sum() / num_slots * _JUST_BELOW)
    for at in range(heap.size // 2 - 1, -1, -1):
        _sink_heaviest(heap, share_E, at)
    for _ in range(num_slots - load_E.size):
        heaviest = heap[0]
        count_E[heaviest] += 1
        share_E[heaviest] = load_E[heaviest] / count_E[heaviest]
        _sink_heaviest(heap, share_E, 0)


@njit(nogil=True, cache=True)
def capped_counts(load_E, num_slots, most, cut, count_E):  # type: ignore[no-untyped-def]
    """Fill count_E: as few replicas as bring every share to ``most``; each slot left over to the heaviest share that
    is at most ``cut``, or to the lightest of all when there is none. False if the slots do not suffice.

    Greedy counts thin the heaviest experts alone. Where a rank's other slots decide, company for the heavy matters.
    """
    share_E = np.empty(load_E.size)
    left = num_slots
    for e in range(load_E.size):
        count_E[e] = max(1, np.int64(np.ceil(load_E[e] / most * (1.0 - _TINY))))
        share_E[e] = load_E[e] / count_E[e]
        left -= count_E[e]
    if left < 0:
        return False
    lightest = np.argmin(load_E)
    for _ in range(left):
        best = -1
        for e in range(load_E.size):
            if share_E[e] <= cut and (best < 0 or share_E[e] > share_E[best]):
                best = e
        if best < 0:
            best = int(lightest)
        count_E[best] += 1
        share_E[best] = load_E[best] / count_E[best]
    return True


@njit(nogil=True, cache=True)
def levelled_counts(load_E, order_E, num_ranks, num_slots, depth, count_E):  # type: ignore[no-untyped-def]
    """Fill count_E: the heaviest experts share ``depth`` slots of every rank, largest share first; all others have one.

    Then both the shared and the other slots divide by the ranks. Suits loads that are all alike: 256 experts on 288
    slots of 36 ranks balance when 4 experts stand on 9 ranks each. False where depth leaves no such split.
    """
    num_shared = num_ranks * depth - (num_slots - load_E.size)
    if num_shared <= 0 or num_shared > load_E.size:
        return False
    count_E[:] = 1
    shared_load, shared_count = load_E[order_E[:num_shared]], np.empty(num_shared, np.int64)
    greedy_counts(shared_load, num_ranks * depth, shared_count, np.empty(num_shared))
    for i in range(num_shared):
        count_E[order_E[i]] = shared_count[i]
    return True


@njit(nogil=True, cache=True)
def _sink(heap, load_R, size):  # type: ignore[no-untyped-def]
    """Restore the heap of ranks (least loaded first, ties by number) after its first entry grew."""
    at = 0
    while True:
        least = at
        for child in (2 * at + 1, 2 * at + 2):
            if child < size:
                a, b = heap[child], heap[least]
                if load_R[a] < load_R[b] or (load_R[a] == load_R[b] and a < b):
                    least = child
        if least == at:
            return
        heap[at], heap[least] = heap[least], heap[at]
        at = least


@njit(nogil=True, cache=True)
def pack(share_E, count_E, first_R1, slowness_R, order_E, expert_S, load_R):  # type: ignore[no-untyped-def]
    """Fill expert_S and load_R: heaviest replica first, onto the rank that is soonest done and has a free slot.

    share_E: load of one replica of each expert; sums are rounded to load_R's precision.
    """
    num_ranks = slowness_R.size
    alike = slowness_R.min() == slowness_R.max()
    used_R = np.zeros(num_ranks, np.int64)
    load_R[:] = 0.0
    by_share = np.argsort(-share_E[order_E], kind="mergesort")
    heap = np.empty(num_ranks, np.int64)
    size = 0
    for r in range(num_ranks):
        if first_R1[r + 1] > first_R1[r]:
            heap[size] = r
            size += 1
    for position in range(by_share.size):
        e = order_E[by_share[position]]
        for _ in range(count_E[e]):
            best = heap[0]
            if not alike:
                best_time = np.inf
                for r in range(num_ranks):
                    time = (load_R[r] + share_E[e]) * slowness_R[r]
                    if time < best_time and first_R1[r] + used_R[r] < first_R1[r + 1]:
                        best_time = time
                        best = r
            expert_S[first_R1[best] + used_R[best]] = e
            used_R[best] += 1
            load_R[best] += share_E[e]
            if alike:
                if first_R1[best] + used_R[best] == first_R1[best + 1]:
                    size -= 1
                    heap[0] = heap[size]
                _sink(heap, load_R, size)
