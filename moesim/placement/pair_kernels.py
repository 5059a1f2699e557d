"""The search where every rank has two slots: replica counts alone decide. Numba kernels, imported only by ``kernels``.

Legend: E experts, S slots (slots 2r and 2r+1 are rank r's).

With two slots on each of alike ranks, the heaviest slot beside the lightest, the second beside the second lightest and
so on is the best pairing there is: exchange two slots of any other pairing and the larger sum does not rise. So the
search walks over replica counts, in order of share, and pairs them off in one pass.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from moesim.placement.move_kernels import below

_STEP = 5e-3  # of the slowest time: how far below it the walk aims, unless the goal is nearer
_PATIENCE = 8  # trials for each expert without a gain before a walk stops


@njit(nogil=True, cache=True)
def pair_off(share_E, count_E, order_E, target, expert_S):  # type: ignore[no-untyped-def]
    """(slowest time, sum of times over target, heavier expert of the slowest pair); fills expert_S unless empty.

    order_E: experts, heaviest share first.
    """
    i, j = 0, order_E.size - 1
    left_i, left_j = count_E[order_E[i]], count_E[order_E[j]]
    worst, over, hot, s = 0.0, 0.0, order_E[0], 0
    while i <= j:
        a, b = order_E[i], order_E[j]
        pairs = min(left_i, left_j) if i < j else left_i // 2
        time = share_E[a] + share_E[b]
        if time > worst:
            worst, hot = time, a
        if time > target:
            over += pairs * (time - target)
        if expert_S.size:
            for _ in range(pairs):
                expert_S[s], expert_S[s + 1] = a, b
                s += 2
        if i == j:
            break
        left_i -= pairs
        left_j -= pairs
        if left_i == 0:
            i += 1
            left_i = count_E[order_E[i]] if i < j else left_j
        if left_j == 0:
            j -= 1
            left_j = count_E[order_E[j]] if i < j else left_i
    return worst, over, hot


@njit(nogil=True, cache=True)
def _reorder(share_E, order_E, expert):  # type: ignore[no-untyped-def]
    """Put the expert, whose share changed, in its place again."""
    at = 0
    while order_E[at] != expert:
        at += 1
    while at > 0 and share_E[order_E[at - 1]] < share_E[expert]:
        order_E[at] = order_E[at - 1]
        at -= 1
    while at + 1 < order_E.size and share_E[order_E[at + 1]] > share_E[expert]:
        order_E[at] = order_E[at + 1]
        at += 1
    order_E[at] = expert


@njit(nogil=True, cache=True)
def walk_counts(load_E, count_E, goal, enough, num_trials, state_1, expert_S):  # type: ignore[no-untyped-def]
    """Pass replicas between experts at random, those of slowest pairs by preference, as long as less is over a target.

    count_E: where the walk starts; it ends at the best counts found, and expert_S is their pairing. The target is a
    little below the best time so far, but not below goal. The walk stops when long nothing helped. Returns (slowest
    time, trials made).
    """
    nothing = np.empty(0, np.int64)
    share_E = load_E / count_E
    order_E = np.argsort(-share_E, kind="mergesort")
    best, over, hot = pair_off(share_E, count_E, order_E, np.inf, nothing)
    best_E = count_E.copy()
    target = max(goal, best * (1.0 - _STEP))
    over = pair_off(share_E, count_E, order_E, target, nothing)[1]
    trial_E = order_E.copy()
    trials = 0
    stalled = 0
    while trials < num_trials and stalled < _PATIENCE * load_E.size and best > enough:
        trials += 1
        stalled += 1
        giver = below(state_1, load_E.size)
        taker = hot if below(state_1, 2) == 0 else below(state_1, load_E.size)
        if count_E[giver] < 2 or giver == taker or load_E[giver] / (count_E[giver] - 1) >= best:
            continue
        count_E[giver] -= 1
        count_E[taker] += 1
        share_E[giver] = load_E[giver] / count_E[giver]
        share_E[taker] = load_E[taker] / count_E[taker]
        trial_E[:] = order_E
        _reorder(share_E, trial_E, giver)
        _reorder(share_E, trial_E, taker)
        worst, trial_over, trial_hot = pair_off(share_E, count_E, trial_E, target, nothing)
        if trial_over > over:
            count_E[giver] += 1
            count_E[taker] -= 1
            share_E[giver] = load_E[giver] / count_E[giver]
            share_E[taker] = load_E[taker] / count_E[taker]
            continue
        if trial_over < over:
            stalled = 0
        over, hot = trial_over, trial_hot
        order_E[:] = trial_E
        if worst < best:
            best = worst
            best_E[:] = count_E
            target = max(goal, best * (1.0 - _STEP))
            over = pair_off(share_E, count_E, order_E, target, nothing)[1]
    count_E[:] = best_E
    share_E = load_E / count_E
    order_E = np.argsort(-share_E, kind="mergesort")
    return pair_off(share_E, count_E, order_E, np.inf, expert_S)[0], trials
