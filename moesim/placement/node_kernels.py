"""Numba kernel that trades experts between nodes so that those used together stand together. Imported by ``nodes``.

Legend: E experts, R ranks, S slots, N nodes. An expert's replicas share its tokens evenly, so the part of them on node
n is the chance that a token's copy for e goes there. pull_EN[e, n] sums over experts f how often e and f are used
together times that part of f: what node n gains when expert e moves in.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from moesim.placement.move_kernels import below

_UNIT32 = 2.0**-32


@njit(nogil=True, cache=True)
def _excess(load, slowness, limit):  # type: ignore[no-untyped-def]
    return max(0.0, load * slowness / limit - 1.0)


@njit(nogil=True, cache=True)
def trade(  # type: ignore[no-untyped-def]
    load_E, coactive_EE, pull_EN, expert_S, rank_S, node_R, slowness_R, held_RE, weights_3, limit, num_steps, state_1
):
    """Anneal expert_S by swaps; keep the cheapest layout whose slowest rank is done by ``limit``.

    weights_3: price of a cross-node copy, of a moved slot, and of a rank's relative excess over the limit. held_RE:
    what ranks hold already (moving there is free). pull_EN is changed. Returns the gain of the kept layout over the
    first (0: none was found).
    """
    num_experts = load_E.size
    num_nodes = node_R.max() + 1
    count_E = np.zeros(num_experts, np.int64)
    for s in range(expert_S.size):
        count_E[expert_S[s]] += 1
    load_R = np.zeros(slowness_R.size)
    for s in range(expert_S.size):
        e = expert_S[s]
        load_R[rank_S[s]] += load_E[e] / count_E[e]
    best_S = expert_S.copy()
    gain = 0.0
    best_gain = 0.0
    over = 0.0
    for r in range(slowness_R.size):
        over += _excess(load_R[r], slowness_R[r], limit)
    scale = 1.0 - 1.0 / num_nodes
    heat = weights_3[0] * scale * coactive_EE.sum() / num_experts / 8.0 + weights_3[1] * 0.5
    for step in range(num_steps):
        temperature = heat * (1.0 - step / num_steps) ** 3 + 1e-12
        i = below(state_1, expert_S.size)
        j = below(state_1, expert_S.size)
        a, b = expert_S[i], expert_S[j]
        p, q = rank_S[i], rank_S[j]
        if a == b or p == q:
            continue
        m, n = node_R[p], node_R[q]
        part_a, part_b = 1.0 / count_E[a], 1.0 / count_E[b]
        together = 0.0
        if m != n:
            together = part_a * (pull_EN[a, n] - pull_EN[a, m]) + part_b * (pull_EN[b, m] - pull_EN[b, n])
            together -= 2.0 * part_a * part_b * coactive_EE[a, b]
        moved = np.float64(held_RE[p, a]) - held_RE[p, b] + held_RE[q, b] - held_RE[q, a]
        less = load_E[a] * part_a - load_E[b] * part_b
        now = _excess(load_R[p], slowness_R[p], limit) + _excess(load_R[q], slowness_R[q], limit)
        then = _excess(load_R[p] - less, slowness_R[p], limit) + _excess(load_R[q] + less, slowness_R[q], limit)
        change = weights_3[0] * scale * together - weights_3[1] * moved - weights_3[2] * (then - now)
        if change < 0.0:
            chance = (np.float64(below(state_1, 2**32)) + 0.5) * _UNIT32
            if chance >= np.exp(change / temperature):
                continue
        gain += weights_3[0] * scale * together - weights_3[1] * moved
        over += then - now
        expert_S[i] = b
        expert_S[j] = a
        load_R[p] -= less
        load_R[q] += less
        if m != n:
            for e in range(num_experts):
                flow = part_a * coactive_EE[e, a] - part_b * coactive_EE[e, b]
                pull_EN[e, m] -= flow
                pull_EN[e, n] += flow
        if over <= 1e-9 and gain > best_gain + 1e-12:
            best_gain = gain
            best_S[:] = expert_S
    expert_S[:] = best_S
    return best_gain
