"""The sampler's numba kernels. Imported only by ``sampler`` and only when tokens are drawn.

Legend: T tokens, K experts per token, E experts, V levels, N expert groups of S = E/N experts each.

The kernels draw top-k of Gumbel-perturbed log weights without perturbing every expert. Perturbed order equals the
order in which independent exponential clocks of rate w_e ring (log w + Gumbel = -log(ring time): first to ring is
largest). The plain router needs no times, only who rings next: drawn by weight, those that already rang do not count.
The group-limited one needs the first two ring times of each group (its score, the sum of its two largest perturbed
values, is the smallest product of ring times) and then rings of the chosen groups until k experts are found; the clocks
of a group ring together at the rate of those that did not ring yet.

Two things keep the plain kernel fast whatever the skew. Draws come in blocks without a branch: a draw that repeats an
expert is overwritten by the next. And levels: experts stand by falling weight, and level v has an alias table of its
own over those from level_starts_V[v] on, which serves once all before have rung; a level ends where less than
_LEVEL_SHARE of its weight is left. So an expert that has most of the weight is not drawn again and again, and a draw
is new with a probability of at least _LEVEL_SHARE / k (docs/model.md#router-sample).

Token t's random numbers are the stream at hash(seed, t), so the result depends on no thread or chunk.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from moesim.routing.random_kernels import GOLDEN, MIX_A, build_alias, exponential, mix, pick_by_weight, unit

_LEVEL_SHARE = 0.7
_BLOCK_DRAWS = 6  # at a time, once a first block of k has left choices open
# In a group: below this share of weight left, scanning the rest by weight is cheaper than rejecting those that rang.
_SCAN_SHARE = 0.15
# Below this share left, weight minus that of those that rang has lost digits: sum the rest afresh.
_RESUM_SHARE = 1e-3


@njit(nogil=True, cache=True)
def _level_starts(falling_E, most):  # type: ignore[no-untyped-def]
    """First expert of each level, and E after the last; no more than most levels can be reached."""
    size = falling_E.size
    left_E = np.empty(size)  # weight from this expert on
    left = 0.0
    for e in range(size - 1, -1, -1):
        left += falling_E[e]
        left_E[e] = left
    starts = np.empty(most + 1, np.int64)
    num_levels = 0
    first = 0
    while first < size and num_levels < most:
        starts[num_levels] = first
        num_levels += 1
        level_weight = left_E[first]
        first += 1
        while first < size and left_E[first] > _LEVEL_SHARE * level_weight:
            first += 1
    starts[num_levels] = size
    return starts[: num_levels + 1]


@njit(nogil=True, cache=True)
def draw_plain(weights_E, seed, first_token, choices_TK):  # type: ignore[no-untyped-def]
    """Fill choices_TK with top-k of perturbed weights, highest first; no expert twice in a token.

    Row i is token first_token + i of the seed's sequence, whatever else is drawn.
    """
    num_tokens, top_k = choices_TK.shape
    size = weights_E.size
    by_weight_E = np.argsort(-weights_E)
    falling_E = weights_E[by_weight_E]
    starts_V = _level_starts(falling_E, top_k)
    num_levels = starts_V.size - 1
    keep_VE = np.empty((num_levels, size), np.uint32)
    pick_VE2 = np.empty((num_levels, size, 2), np.int16)
    for v in range(num_levels):
        first = starts_V[v]
        build_alias(falling_E[first:], keep_VE[v, first:], pick_VE2[v, first:])
    rang_in_token_E = np.full(size, -1, np.int64)
    found = np.empty(top_k + _BLOCK_DRAWS, np.int64)
    for t in range(num_tokens):
        state = mix(seed + np.uint64(first_token + t) * MIX_A)
        num_found = np.int64(0)
        num_draws = top_k
        not_rung = 0  # all experts before it rang
        level = 0
        while True:
            first = starts_V[level]
            keep_E, pick_E2 = keep_VE[level], pick_VE2[level]
            for _ in range(num_draws):
                state += GOLDEN
                expert = pick_by_weight(mix(state), first, size - first, keep_E, pick_E2)
                found[num_found] = expert
                num_found += np.int64(rang_in_token_E[expert] != t)
                rang_in_token_E[expert] = t
            if num_found >= top_k:
                break
            while rang_in_token_E[not_rung] == t:
                not_rung += 1
            while not_rung >= starts_V[level + 1]:
                level += 1
            num_draws = _BLOCK_DRAWS
        for k in range(top_k):
            choices_TK[t, k] = by_weight_E[found[k]]


# What is called once in a few rings is a function of its own; what every ring needs is inlined: passing arrays counts
# their references, which takes longer than the rest of a ring, and inlining the rare made the common 13 times slower.
@njit(nogil=True, cache=True)
def _next_by_rejection(state, first, size, keep_E, pick_E2, token, rang_in_token_E):  # type: ignore[no-untyped-def]
    """(state, expert): who of experts first..first+size rings next: draws until one that did not ring."""
    while True:
        state += GOLDEN
        expert = pick_by_weight(mix(state), first, size, keep_E, pick_E2)
        if rang_in_token_E[expert] != token:
            return state, expert


@njit(nogil=True, cache=True)
def _next_by_scan(state, first, size, remaining, weights_E, token, rang_in_token_E):  # type: ignore[no-untyped-def]
    """As _next_by_rejection, by walking the weights of those that did not ring."""
    state += GOLDEN
    target = unit(mix(state)) * remaining
    last = first
    for e in range(first, first + size):
        if rang_in_token_E[e] != token:
            last = e
            target -= weights_E[e]
            if target <= 0.0:
                break
    return state, last


@njit(nogil=True, cache=True)
def _sum_left(first, size, weights_E, token, rang_in_token_E):  # type: ignore[no-untyped-def]
    """Weight of those of experts first..first+size that did not ring in this token."""
    left = 0.0
    for e in range(first, first + size):
        if rang_in_token_E[e] != token:
            left += weights_E[e]
    return left


@njit(nogil=True, cache=True)
def _group_tables(weights_E, num_groups):  # type: ignore[no-untyped-def]
    """Alias tables (keep_E, pick_E2) and total_N, the weight of each group."""
    size = weights_E.size // num_groups
    keep_E = np.empty(weights_E.size, np.uint32)
    pick_E2 = np.empty((weights_E.size, 2), np.int16)
    total_N = np.empty(num_groups)
    for n in range(num_groups):
        group = slice(n * size, (n + 1) * size)
        build_alias(weights_E[group], keep_E[group], pick_E2[group])
        total_N[n] = weights_E[group].sum()
    return keep_E, pick_E2, total_N


@njit(nogil=True, cache=True)
def draw_grouped(weights_E, num_groups, top_groups, by_two, seed, first_token, choices_TK):  # type: ignore[no-untyped-def]
    """As draw_plain, inside the top_groups best groups.

    A group's score: the sum of its two largest perturbed log weights (by_two), or its largest.
    """
    num_tokens, top_k = choices_TK.shape
    size = weights_E.size // num_groups
    keep_E, pick_E2, total_N = _group_tables(weights_E, num_groups)
    rang_in_token_E = np.full(weights_E.size, -1, np.int64)
    # Of each group: who rang first, when the ring after those handed out comes (and the second), the weight left then.
    expert_N = np.empty(num_groups, np.int64)
    time_N, second_N = np.empty(num_groups), np.empty(num_groups)
    left_N, score_N = np.empty(num_groups), np.empty(num_groups)
    num_rung_N = np.empty(num_groups, np.int64)
    chosen = np.empty(top_groups, np.int64)
    for t in range(num_tokens):
        state = mix(seed + np.uint64(first_token + t) * MIX_A)
        for n in range(num_groups):
            first, total = n * size, total_N[n]
            state, gap = exponential(state)
            now = gap / total
            state += GOLDEN
            expert = pick_by_weight(mix(state), first, size, keep_E, pick_E2)
            left = total - weights_E[expert]
            if left <= _RESUM_SHARE * total:
                rang_in_token_E[expert] = t
                left = _sum_left(first, size, weights_E, t, rang_in_token_E)
            expert_N[n], num_rung_N[n], left_N[n] = expert, 0, left
            time_N[n], second_N[n], score_N[n] = now, np.inf, now
            if size > 1:
                state, gap = exponential(state)
                second_N[n] = now + gap / left
                if by_two:
                    score_N[n] = now * second_N[n]
        for c in range(top_groups):
            best = 0
            for n in range(1, num_groups):
                if score_N[n] < score_N[best]:
                    best = n
            chosen[c] = best
            score_N[best] = np.inf
        for k in range(top_k):
            best = chosen[0]
            for c in range(1, top_groups):
                if time_N[chosen[c]] < time_N[best]:
                    best = chosen[c]
            num_rung_N[best] += 1
            if num_rung_N[best] == 1:  # who rings second is drawn only in groups that are chosen
                rang_in_token_E[expert_N[best]] = t
                choices_TK[t, k] = expert_N[best]
                time_N[best] = second_N[best]
                continue
            first, left, total = best * size, left_N[best], total_N[best]
            if left > _SCAN_SHARE * total:
                state, expert = _next_by_rejection(state, first, size, keep_E, pick_E2, t, rang_in_token_E)
            else:
                state, expert = _next_by_scan(state, first, size, left, weights_E, t, rang_in_token_E)
            rang_in_token_E[expert] = t
            choices_TK[t, k] = expert
            if num_rung_N[best] == size:
                time_N[best] = np.inf
                continue
            left -= weights_E[expert]
            if left <= _RESUM_SHARE * total:
                left = _sum_left(first, size, weights_E, t, rang_in_token_E)
            left_N[best] = left
            state, gap = exponential(state)
            time_N[best] += gap / left


@njit(nogil=True, cache=True)
def count_choices(choices_TK, counts_E):  # type: ignore[no-untyped-def]
    """Add each expert's choices to counts_E; entries below 0 chose nobody."""
    for t in range(choices_TK.shape[0]):
        for k in range(choices_TK.shape[1]):
            if choices_TK[t, k] >= 0:
                counts_E[choices_TK[t, k]] += 1


@njit(nogil=True, cache=True)
def drop_seconds(weights_E, seed, first_token, choices_TK):  # type: ignore[no-untyped-def]
    """Of top-2 choices, keep the second with probability 2*g2, else make it -1.

    g2 = t1/(t1 + t2) of the two ring times, which come after the choices: t1 is exponential of rate W, t2 - t1 of rate
    W - w_first, whoever is second.
    """
    total = weights_E.sum()
    size = weights_E.size
    for t in range(choices_TK.shape[0]):
        state = mix(seed + np.uint64(first_token + t) * MIX_A)
        first = choices_TK[t, 0]
        remaining = total - weights_E[first]
        if remaining <= _RESUM_SHARE * total:
            remaining = 0.0
            for e in range(size):
                if e != first:
                    remaining += weights_E[e]
        state, early = exponential(state)
        state, gap = exponential(state)
        early /= total
        state += GOLDEN
        if unit(mix(state)) >= 2.0 * early / (2.0 * early + gap / remaining):
            choices_TK[t, 1] = -1


@njit(nogil=True, cache=True)
def count_visits(pool_LTK, set_of_E, num_sets):  # type: ignore[no-untyped-def]
    """(L, S) tokens that choose at least one expert of each set."""
    num_layers, num_tokens, top_k = pool_LTK.shape
    visits_LS = np.zeros((num_layers, num_sets), np.int64)
    for layer in range(num_layers):
        seen_by_S = np.full(num_sets, -1)  # the last token that counted
        for token in range(num_tokens):
            for k in range(top_k):
                expert = pool_LTK[layer, token, k]
                if expert < 0:
                    continue
                s = set_of_E[expert]
                if seen_by_S[s] != token:
                    seen_by_S[s] = token
                    visits_LS[layer, s] += 1
    return visits_LS
