"""Numba kernels that change one layer's layout: swaps, replica transfers, descent, kicks. Imported only by ``kernels``.

Legend: E experts, R ranks, S slots (rank r owns slots first_R1[r] to first_R1[r+1]), X most replicas of one expert.

A slot holds a replica; an expert's replicas share its load evenly, so a slot of expert e weighs load_E[e] / count_E[e].
A rank's time is its load times slowness_R (1 / relative speed). Descent takes load off the slowest rank, by swapping
slots or by moving a replica from one expert to another, as long as every rank it touches ends below the old maximum.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_A, _MIX_B = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31, _S32 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(32)
_TINY = 1e-12  # relative gain below which a move is rounding noise
_PAIR_SLOTS = 6  # most slots of a rank for which exchanging two for two is tried


@njit(nogil=True, cache=True)
def below(state_1, limit):  # type: ignore[no-untyped-def]
    """A whole number in 0..limit-1 from splitmix64; state_1[0] advances."""
    state_1[0] += _GOLDEN
    z = state_1[0]
    z = (z ^ (z >> _S30)) * _MIX_A
    z = (z ^ (z >> _S27)) * _MIX_B
    z = z ^ (z >> _S31)
    return np.int64(((z >> _S32) * np.uint64(limit)) >> _S32)


@njit(nogil=True, cache=True)
def refresh(load_E, expert_S, first_R1, count_E, load_R):  # type: ignore[no-untyped-def]
    """Recompute count_E and load_R from expert_S: sums of many small steps drift."""
    count_E[:] = 0
    for s in range(expert_S.size):
        count_E[expert_S[s]] += 1
    for r in range(load_R.size):
        load_R[r] = 0.0
        for s in range(first_R1[r], first_R1[r + 1]):
            load_R[r] += load_E[expert_S[s]] / count_E[expert_S[s]]


@njit(nogil=True, cache=True)
def slowest(load_R, slowness_R):  # type: ignore[no-untyped-def]
    """(rank, time) of the rank that is done last."""
    rank = 0
    worst = load_R[0] * slowness_R[0]
    for r in range(1, load_R.size):
        time = load_R[r] * slowness_R[r]
        if time > worst:
            worst = time
            rank = r
    return rank, worst


@njit(nogil=True, cache=True)
def _best_swap(load_E, expert_S, first_R1, slowness_R, count_E, load_R, hot, limit):  # type: ignore[no-untyped-def]
    """(time, i, j): the swap of a slot of rank hot with any other that leaves the smaller larger time of the two."""
    best = limit
    best_i = -1
    best_j = -1
    for r in range(load_R.size):
        if r == hot or load_R[r] * slowness_R[r] >= best:
            continue
        for i in range(first_R1[hot], first_R1[hot + 1]):
            weight = load_E[expert_S[i]] / count_E[expert_S[i]]
            for j in range(first_R1[r], first_R1[r + 1]):
                less = weight - load_E[expert_S[j]] / count_E[expert_S[j]]
                if less <= 0.0:
                    continue
                time = max((load_R[hot] - less) * slowness_R[hot], (load_R[r] + less) * slowness_R[r])
                if time < best:
                    best = time
                    best_i = i
                    best_j = j
    return best, best_i, best_j


@njit(nogil=True, cache=True)
def _best_double_swap(load_E, expert_S, first_R1, slowness_R, count_E, load_R, hot, limit):  # type: ignore[no-untyped-def]
    """(time, i, i2, j, j2): as _best_swap, two slots for two."""
    best = limit
    best_i = -1
    best_i2 = -1
    best_j = -1
    best_j2 = -1
    for i in range(first_R1[hot], first_R1[hot + 1]):
        for i2 in range(i + 1, first_R1[hot + 1]):
            weight = load_E[expert_S[i]] / count_E[expert_S[i]] + load_E[expert_S[i2]] / count_E[expert_S[i2]]
            for r in range(load_R.size):
                if r == hot or load_R[r] * slowness_R[r] >= best:
                    continue
                for j in range(first_R1[r], first_R1[r + 1]):
                    rest = weight - load_E[expert_S[j]] / count_E[expert_S[j]]
                    if rest <= 0.0:
                        continue
                    for j2 in range(j + 1, first_R1[r + 1]):
                        less = rest - load_E[expert_S[j2]] / count_E[expert_S[j2]]
                        if less <= 0.0:
                            continue
                        time = max((load_R[hot] - less) * slowness_R[hot], (load_R[r] + less) * slowness_R[r])
                        if time < best:
                            best = time
                            best_i, best_i2, best_j, best_j2 = i, i2, j, j2
    return best, best_i, best_i2, best_j, best_j2


@njit(nogil=True, cache=True)
def _transfer_time(load_E, slots_EX, rank_S, slowness_R, count_E, load_R, taker, slot, giver, change_R):  # type: ignore[no-untyped-def]
    """Largest time of the ranks touched when slot passes from expert giver to taker; change_R is left as zeros."""
    taker_share = load_E[taker] / (count_E[taker] + 1)
    giver_share = load_E[giver] / (count_E[giver] - 1)
    less = load_E[taker] / count_E[taker] - taker_share
    more = giver_share - load_E[giver] / count_E[giver]
    for x in range(count_E[taker]):
        change_R[rank_S[slots_EX[taker, x]]] -= less
    for x in range(count_E[giver]):
        change_R[rank_S[slots_EX[giver, x]]] += more
    change_R[rank_S[slot]] += taker_share - giver_share
    worst = 0.0
    for x in range(count_E[taker]):
        r = rank_S[slots_EX[taker, x]]
        worst = max(worst, (load_R[r] + change_R[r]) * slowness_R[r])
    for x in range(count_E[giver]):
        r = rank_S[slots_EX[giver, x]]
        worst = max(worst, (load_R[r] + change_R[r]) * slowness_R[r])
    for x in range(count_E[taker]):
        change_R[rank_S[slots_EX[taker, x]]] = 0.0
    for x in range(count_E[giver]):
        change_R[rank_S[slots_EX[giver, x]]] = 0.0
    return worst


@njit(nogil=True, cache=True)
def _givable(load_E, rank_S, slots_EX, slowness_R, count_E, load_R, limit, slot_S):  # type: ignore[no-untyped-def]
    """Fill slot_S with slots that their experts can spare: the ranks of the others stay below limit. Returns how many.

    Whether the slot's next expert relieves one of those ranks is not looked at: that is rare.
    """
    size = 0
    for e in range(load_E.size):
        if count_E[e] < 2:
            continue
        more = load_E[e] / (count_E[e] - 1) - load_E[e] / count_E[e]
        num_over = 0
        over = 0
        for x in range(count_E[e]):
            r = rank_S[slots_EX[e, x]]
            if (load_R[r] + more) * slowness_R[r] >= limit:
                num_over += 1
                over = x
        for x in range(count_E[e]):
            if num_over == 0 or (num_over == 1 and x == over):
                slot_S[size] = slots_EX[e, x]
                size += 1
    return size


@njit(nogil=True, cache=True)
def _best_transfer(  # type: ignore[no-untyped-def]
    load_E, expert_S, first_R1, rank_S, slots_EX, slowness_R, count_E, load_R, hot, limit, change_R
):
    """(time, taker, slot): the best way to give an expert of rank hot one more replica, at another expert's cost."""
    best = limit
    best_taker = -1
    best_slot = -1
    slot_S = np.empty(expert_S.size, np.int64)
    size = _givable(load_E, rank_S, slots_EX, slowness_R, count_E, load_R, limit, slot_S)
    for i in range(first_R1[hot], first_R1[hot + 1]):
        taker = expert_S[i]
        if count_E[taker] >= slots_EX.shape[1]:
            continue
        for slot in slot_S[:size]:
            giver = expert_S[slot]
            if giver == taker:
                continue
            time = _transfer_time(load_E, slots_EX, rank_S, slowness_R, count_E, load_R, taker, slot, giver, change_R)
            if time < best:
                best = time
                best_taker = taker
                best_slot = slot
    return best, best_taker, best_slot


@njit(nogil=True, cache=True)
def _replace(expert, old_slot, new_slot, slots_EX, count_E):  # type: ignore[no-untyped-def]
    for x in range(count_E[expert]):
        if slots_EX[expert, x] == old_slot:
            slots_EX[expert, x] = new_slot
            return


@njit(nogil=True, cache=True)
def _swap(load_E, expert_S, rank_S, slots_EX, count_E, load_R, i, j):  # type: ignore[no-untyped-def]
    a = expert_S[i]
    b = expert_S[j]
    if a == b:
        return
    less = load_E[a] / count_E[a] - load_E[b] / count_E[b]
    load_R[rank_S[i]] -= less
    load_R[rank_S[j]] += less
    expert_S[i] = b
    expert_S[j] = a
    _replace(a, i, j, slots_EX, count_E)
    _replace(b, j, i, slots_EX, count_E)


@njit(nogil=True, cache=True)
def _transfer(load_E, expert_S, rank_S, slots_EX, count_E, load_R, taker, slot):  # type: ignore[no-untyped-def]
    giver = expert_S[slot]
    for x in range(count_E[taker]):
        load_R[rank_S[slots_EX[taker, x]]] -= load_E[taker] / count_E[taker]
    for x in range(count_E[giver]):
        load_R[rank_S[slots_EX[giver, x]]] -= load_E[giver] / count_E[giver]
    _replace(giver, slot, slots_EX[giver, count_E[giver] - 1], slots_EX, count_E)
    count_E[giver] -= 1
    slots_EX[taker, count_E[taker]] = slot
    count_E[taker] += 1
    expert_S[slot] = taker
    for x in range(count_E[taker]):
        load_R[rank_S[slots_EX[taker, x]]] += load_E[taker] / count_E[taker]
    for x in range(count_E[giver]):
        load_R[rank_S[slots_EX[giver, x]]] += load_E[giver] / count_E[giver]


@njit(nogil=True, cache=True)
def index_slots(expert_S, count_E, slots_EX):  # type: ignore[no-untyped-def]
    """Fill count_E and slots_EX (the slots of each expert, in order)."""
    count_E[:] = 0
    for s in range(expert_S.size):
        e = expert_S[s]
        slots_EX[e, count_E[e]] = s
        count_E[e] += 1


@njit(nogil=True, cache=True)
def descend(  # type: ignore[no-untyped-def]
    load_E, expert_S, first_R1, rank_S, slots_EX, slowness_R, count_E, load_R, goal, max_moves, change_R
):
    """Improve the layout until no move helps the slowest rank, or its time is at most goal. Returns that time."""
    num_even = first_R1[1] - first_R1[0]
    for _ in range(max_moves):
        hot, worst = slowest(load_R, slowness_R)
        if worst <= goal:
            return worst
        limit = worst * (1.0 - _TINY)
        _, i, j = _best_swap(load_E, expert_S, first_R1, slowness_R, count_E, load_R, hot, limit)
        if i >= 0:
            _swap(load_E, expert_S, rank_S, slots_EX, count_E, load_R, i, j)
            continue
        if expert_S.size > load_E.size:
            _, taker, slot = _best_transfer(
                load_E, expert_S, first_R1, rank_S, slots_EX, slowness_R, count_E, load_R, hot, limit, change_R
            )
            if taker >= 0:
                _transfer(load_E, expert_S, rank_S, slots_EX, count_E, load_R, taker, slot)
                continue
        if 2 < num_even <= _PAIR_SLOTS:
            _, i, i2, j, j2 = _best_double_swap(load_E, expert_S, first_R1, slowness_R, count_E, load_R, hot, limit)
            if i >= 0:
                _swap(load_E, expert_S, rank_S, slots_EX, count_E, load_R, i, j)
                _swap(load_E, expert_S, rank_S, slots_EX, count_E, load_R, i2, j2)
                continue
        return worst
    return slowest(load_R, slowness_R)[1]


@njit(nogil=True, cache=True)
def kick(load_E, expert_S, first_R1, rank_S, slots_EX, slowness_R, count_E, load_R, state_1):  # type: ignore[no-untyped-def]
    """Shake a layout: the slowest rank and a few others swap slots at random; up to two replicas change experts."""
    hot, _ = slowest(load_R, slowness_R)
    size = expert_S.size
    for turn in range(2 + below(state_1, 3)):
        r = hot if turn == 0 else below(state_1, load_R.size)
        if first_R1[r + 1] == first_R1[r]:
            continue
        i = first_R1[r] + below(state_1, first_R1[r + 1] - first_R1[r])
        j = below(state_1, size)
        if rank_S[j] != r:
            _swap(load_E, expert_S, rank_S, slots_EX, count_E, load_R, i, j)
    if size == load_E.size:
        return
    for _ in range(below(state_1, 3)):
        taker = expert_S[below(state_1, size)]
        slot = below(state_1, size)
        giver = expert_S[slot]
        if taker != giver and count_E[giver] > 1 and count_E[taker] < slots_EX.shape[1]:
            _transfer(load_E, expert_S, rank_S, slots_EX, count_E, load_R, taker, slot)
