"""The search's numba kernels: one layer, its slots, the least time of the slowest rank. Imported only by ``search``.

Legend: E experts, R ranks, S slots (rank r owns slots first_R1[r] to first_R1[r+1]), X most replicas of one expert.

A start (replica counts, packed heaviest first) is descended from; kicks shake the best layout and descend again, until
the bound or the budget is met. See ``start_kernels`` and ``move_kernels``.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from moesim.placement.bound_kernels import lower_bound, refuted
from moesim.placement.move_kernels import below, descend, index_slots, kick, refresh, slowest
from moesim.placement.pair_kernels import walk_counts
from moesim.placement.start_kernels import capped_counts, greedy_counts, levelled_counts, pack

# Other replica counts to start from: levels of depth 1.._NUM_DEPTHS, and caps of _NUM_CAPS steps down from the most
# that the bound lets a rank take, each with the slots left over given to shares below these fractions of it.
_NUM_DEPTHS = 4
_NUM_CAPS = 6
_CUTS = np.array([0.0, 0.5, 0.75])
_PROMISING = 1.1  # a packed start this much worse than the best descended one is not worth descending from
_NUM_DESCENTS = 3
_RECOUNT_EVERY = 8  # kicks: then replicas pass between experts and all is packed anew
_HALVINGS = 9  # of the way from volume to the best time: the bound only steers
_TRIALS_A_KICK = 250  # where ranks have two slots: trials of a walk over counts for each kick elsewhere


@njit(nogil=True, cache=True)
def recount(expert_S, first_R1, load_R, slowness_R, count_E, most, state_1):  # type: ignore[no-untyped-def]
    """Move some replicas between experts (half the time one, a quarter two, ...), to those of the slowest rank by
    preference; one time in four draw all afresh. Changes count_E only."""
    if below(state_1, 4) == 0:
        count_E[:] = 1
        for _ in range(expert_S.size - count_E.size):
            count_E[below(state_1, count_E.size)] += 1
        return
    hot, _ = slowest(load_R, slowness_R)
    held = first_R1[hot + 1] - first_R1[hot]
    go_on = True
    while go_on:
        go_on = below(state_1, 2) == 0
        taker = expert_S[first_R1[hot] + below(state_1, held)]
        if below(state_1, 2) == 0:
            taker = expert_S[below(state_1, expert_S.size)]
        for _ in range(16):
            giver = expert_S[below(state_1, expert_S.size)]
            if giver != taker and count_E[giver] > 1 and count_E[taker] < most:
                count_E[giver] -= 1
                count_E[taker] += 1
                break


@njit(nogil=True, cache=True)
def improve(load_E, expert_S, first_R1, rank_S, slowness_R, goal, enough, max_kicks, max_moves, state_1):  # type: ignore[no-untyped-def]
    """Descend from expert_S, then kick and descend max_kicks times, keeping the best. Returns the slowest time."""
    most = expert_S.size - load_E.size + 1
    slots_EX = np.empty((load_E.size, most), np.int64)
    count_E = np.empty(load_E.size, np.int64)
    load_R = np.empty(slowness_R.size)
    change_R = np.zeros(slowness_R.size)
    order_E = np.argsort(-load_E, kind="mergesort")
    index_slots(expert_S, count_E, slots_EX)
    refresh(load_E, expert_S, first_R1, count_E, load_R)
    best = descend(load_E, expert_S, first_R1, rank_S, slots_EX, slowness_R, count_E, load_R, goal, max_moves, change_R)
    best_S = expert_S.copy()
    for turn in range(max_kicks):
        if best <= enough:
            break
        if most > 1 and turn % _RECOUNT_EVERY == _RECOUNT_EVERY - 1:
            recount(expert_S, first_R1, load_R, slowness_R, count_E, most, state_1)
            pack(load_E / count_E, count_E, first_R1, slowness_R, order_E, expert_S, load_R)
            index_slots(expert_S, count_E, slots_EX)
        else:
            kick(load_E, expert_S, first_R1, rank_S, slots_EX, slowness_R, count_E, load_R, state_1)
        worst = descend(
            load_E, expert_S, first_R1, rank_S, slots_EX, slowness_R, count_E, load_R, goal, max_moves, change_R
        )
        if worst <= best:
            best = worst
            best_S[:] = expert_S
        else:
            expert_S[:] = best_S
            index_slots(expert_S, count_E, slots_EX)
        refresh(load_E, expert_S, first_R1, count_E, load_R)
    expert_S[:] = best_S
    refresh(load_E, expert_S, first_R1, count_E, load_R)
    return slowest(load_R, slowness_R)[1]


@njit(nogil=True, cache=True)
def _other_start(load_E, order_E, num_ranks, num_slots, most, turn, count_E):  # type: ignore[no-untyped-def]
    """Replica counts of the turn-th start after the greedy one; False where there is none."""
    if turn < _NUM_DEPTHS:
        return levelled_counts(load_E, order_E, num_ranks, num_slots, turn + 1, count_E)
    turn -= _NUM_DEPTHS
    cap = most * (1.05 - 0.05 * (turn // _CUTS.size))
    return capped_counts(load_E, num_slots, cap, most * _CUTS[turn % _CUTS.size], count_E)


@njit(nogil=True, cache=True)
def _one_slot_each(load_E, expert_S):  # type: ignore[no-untyped-def]
    """Fill expert_S with greedy counts, expert after expert; returns the largest share."""
    count_E = np.empty(load_E.size, np.int64)
    share_E = np.empty(load_E.size)
    greedy_counts(load_E, expert_S.size, count_E, share_E)
    s = 0
    for e in range(load_E.size):
        for _ in range(count_E[e]):
            expert_S[s] = e
            s += 1
    return share_E.max()


@njit(nogil=True, cache=True)
def _two_slots_each(load_E, num_slots_R, slowness_R, tolerance, patience, max_kicks, best, state_1, expert_S):  # type: ignore[no-untyped-def]
    """Improve expert_S, packed heaviest first with time ``best``, by walks over counts. Returns its slowest time."""
    num_slots = expert_S.size
    if num_slots == load_E.size or refuted(load_E, num_slots_R, slowness_R, best / (1.0 + patience)):
        return best
    pace = slowness_R[0]
    bound = lower_bound(load_E, num_slots_R, slowness_R, best, _HALVINGS) / pace
    count_E = np.empty(load_E.size, np.int64)
    share_E = np.empty(load_E.size)
    walked_S = np.empty_like(expert_S)
    goal, enough = bound * (1.0 + tolerance), bound * (1.0 + patience)
    left = max_kicks * _TRIALS_A_KICK
    spread = 0
    while left > 0 and best > pace * enough:
        greedy_counts(load_E, num_slots, count_E, share_E)
        for _ in range(below(state_1, 1 + spread)):
            giver, taker = below(state_1, load_E.size), below(state_1, load_E.size)
            if count_E[giver] > 1:
                count_E[giver] -= 1
                count_E[taker] += 1
        spread += num_slots - load_E.size
        time, used = walk_counts(load_E, count_E, goal, enough, left, state_1, walked_S)
        left -= used
        if time * pace < best:
            best = time * pace
            expert_S[:] = walked_S
    return best


@njit(nogil=True, cache=True)
def _greedy_start(load_E, first_R1, slowness_R, order_E, goal, expert_S):  # type: ignore[no-untyped-def]
    """Fill expert_S as EPLB does: greedy counts packed heaviest first. Returns its slowest time.

    In float64, then in float32 as EPLB computes, for its rounding breaks ties, at times luckily; the better is kept.
    """
    count_E = np.empty(load_E.size, np.int64)
    share_E = np.empty(load_E.size)
    load_R = np.empty(slowness_R.size)
    greedy_counts(load_E, expert_S.size, count_E, share_E)
    pack(share_E, count_E, first_R1, slowness_R, order_E, expert_S, load_R)
    best = slowest(load_R, slowness_R)[1]
    if best <= goal:
        return best
    load32_E = load_E.astype(np.float32)
    share32_E = np.empty_like(load32_E)
    greedy_counts(load32_E, expert_S.size, count_E, share32_E)
    start_S = np.empty_like(expert_S)
    load32_R = np.empty(slowness_R.size, np.float32)
    pack(share32_E, count_E, first_R1, slowness_R, np.arange(load_E.size), start_S, load32_R)
    refresh(load_E, start_S, first_R1, count_E, load_R)
    if slowest(load_R, slowness_R)[1] < best:
        best = slowest(load_R, slowness_R)[1]
        expert_S[:] = start_S
    return best


@njit(nogil=True, cache=True)
def search_layer(load_E, first_R1, slowness_R, tolerance, patience, max_kicks, max_moves, seed, expert_S):  # type: ignore[no-untyped-def]
    """Fill expert_S with the best layout found; returns its slowest time.

    Where all ranks are alike and have one slot, greedy counts are the optimum; where they have two, only counts are
    searched. Else the first start is what EPLB does globally, so the result is never worse. Other counts, and then
    kicks of the best layout, follow only while the lower bound says that better may exist.
    """
    num_slots = expert_S.size
    num_ranks = slowness_R.size
    num_slots_R = first_R1[1:] - first_R1[:-1]
    alike = slowness_R.min() == slowness_R.max() and num_slots_R.min() == num_slots_R.max()
    if alike and num_slots == num_ranks:
        return _one_slot_each(load_E, expert_S) * slowness_R[0]
    order_E = np.argsort(-load_E, kind="mergesort")
    ideal = load_E.sum() / (1.0 / slowness_R).sum()
    goal = ideal * (1.0 + tolerance)
    best = _greedy_start(load_E, first_R1, slowness_R, order_E, goal, expert_S)
    if best <= goal or load_E.size <= 1:
        return best
    state_1 = np.empty(1, np.uint64)
    state_1[0] = seed
    if alike and num_slots == 2 * num_ranks:
        return _two_slots_each(load_E, num_slots_R, slowness_R, tolerance, patience, max_kicks, best, state_1, expert_S)
    rank_S = np.empty(num_slots, np.int64)
    for r in range(num_ranks):
        rank_S[first_R1[r] : first_R1[r + 1]] = r
    best = improve(load_E, expert_S, first_R1, rank_S, slowness_R, goal, goal, 0, max_moves, state_1)
    enough = ideal * (1.0 + patience)
    if best <= enough or max_kicks == 0 or refuted(load_E, num_slots_R, slowness_R, best / (1.0 + patience)):
        return best
    bound = lower_bound(load_E, num_slots_R, slowness_R, best, _HALVINGS)
    goal = (1.0 + tolerance) * bound
    enough = (1.0 + patience) * bound
    if num_slots > load_E.size:
        best = _other_starts(
            load_E, first_R1, rank_S, slowness_R, order_E, bound, goal, enough, best, max_moves, state_1, expert_S
        )
    return improve(load_E, expert_S, first_R1, rank_S, slowness_R, goal, enough, max_kicks, max_moves, state_1)


@njit(nogil=True, cache=True)
def _other_starts(  # type: ignore[no-untyped-def]
    load_E, first_R1, rank_S, slowness_R, order_E, bound, goal, enough, best, max_moves, state_1, expert_S
):
    """Descend from the most promising other counts; expert_S, whose time is ``best``, becomes the best found.

    Returns its slowest time.
    """
    num_starts = _NUM_DEPTHS + _NUM_CAPS * _CUTS.size
    most = bound / slowness_R.min()  # what the fastest rank can take by then
    count_E = np.empty(load_E.size, np.int64)
    load_R = np.empty(slowness_R.size)
    start_PS = np.empty((num_starts, expert_S.size), np.int64)
    time_P = np.full(num_starts, np.inf)
    for p in range(num_starts):
        if _other_start(load_E, order_E, slowness_R.size, expert_S.size, most, p, count_E):
            pack(load_E / count_E, count_E, first_R1, slowness_R, order_E, start_PS[p], load_R)
            time = slowest(load_R, slowness_R)[1]
            if time <= _PROMISING * best and not np.any(time_P[:p] == time):
                time_P[p] = time
    for p in np.argsort(time_P, kind="mergesort")[:_NUM_DESCENTS]:
        if time_P[p] == np.inf:
            break
        time = improve(load_E, start_PS[p], first_R1, rank_S, slowness_R, goal, goal, 0, max_moves, state_1)
        if time < best:
            best = time
            expert_S[:] = start_PS[p]
        if best <= enough:
            break
    return best


@njit(nogil=True, cache=True)
def search_layers(load_LE, first_R1, slowness_R, tolerance, patience, max_kicks, max_moves, seed_L, expert_LS, worst_L):  # type: ignore[no-untyped-def]
    """search_layer for each layer: fills expert_LS and worst_L."""
    for layer in range(load_LE.shape[0]):
        worst_L[layer] = search_layer(
            load_LE[layer],
            first_R1,
            slowness_R,
            tolerance,
            patience,
            max_kicks,
            max_moves,
            seed_L[layer],
            expert_LS[layer],
        )
