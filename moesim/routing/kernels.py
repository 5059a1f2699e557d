"""The sampler's numba kernels. Imported only by ``sampler`` and only when tokens are drawn.

Legend: T tokens, K experts per token, E experts, N expert groups of S = E/N experts each.

The kernels draw top-k of Gumbel-perturbed log weights without perturbing every expert. Perturbed order equals the
order in which independent exponential clocks of rate w_e ring (log w + Gumbel = -log(ring time): first to ring is
largest). The clocks of a group ring together at rate W = sum of w; who rang is drawn by weight (Walker's alias table),
skipping those that already rang; after a ring its rate leaves W. The plain router needs no times at all, only who rings
next. The group-limited one needs the first two ring times of each group (its score, the sum of its two largest
perturbed values, is the smallest product of ring times) and then rings of the chosen groups until k experts are found;
who rang second is drawn only in groups that are chosen. Times between rings come from a ziggurat, not a logarithm.

Randomness is a counter: token t's stream is splitmix64 started at hash(seed, t), so the result depends on no thread or
chunk. Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014. Vose, IEEE TSE 17 (1991).
Marsaglia, Tsang: The ziggurat method for generating random variables, J. Stat. Software 5 (2000).
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_A, _MIX_B = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31, _S32, _S11 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(32), np.uint64(11)
_LOW32 = np.uint64(0xFFFFFFFF)
_UNIT53, _UNIT32 = 2.0**-53, 2.0**-32
# Below this share of weight left, scanning the rest by weight is cheaper than rejecting those that already rang.
_SCAN_SHARE = 0.15
# Below this share left, W minus the rates that rang has lost digits: sum the rest afresh.
_RESUM_SHARE = 1e-3


@njit(nogil=True, cache=True, inline="always")
def _mix(z):  # type: ignore[no-untyped-def]
    z = (z ^ (z >> _S30)) * _MIX_A
    z = (z ^ (z >> _S27)) * _MIX_B
    return z ^ (z >> _S31)


@njit(nogil=True, cache=True, inline="always")
def _unit(bits):  # type: ignore[no-untyped-def]
    """A uniform in (0, 1): never 0, so its logarithm is finite."""
    return (np.float64(bits >> _S11) + 0.5) * _UNIT53


def _ziggurat() -> tuple[np.ndarray, np.ndarray]:
    """Right edges of 256 layers of equal area under exp(-x), widest first, and the density at each edge.

    The base layer (a rectangle and the tail beyond the edge r) is stretched to the rectangle of the same area.
    """

    def excess(r: float) -> float:  # height of the stack of 255 layers on top of r, over the density's peak of 1
        area = (r + 1.0) * math.exp(-r)
        x = r
        for _ in range(254):
            height = math.exp(-x) + area / x
            if height >= 1.0:
                return 1.0
            x = -math.log(height)
        return math.exp(-x) + area / x - 1.0

    low, high = 5.0, 12.0
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if excess(middle) > 0.0 else (low, middle)
    area = (low + 1.0) * math.exp(-low)
    edges = [area / math.exp(-low), low]
    for _ in range(254):
        edges.append(-math.log(min(math.exp(-edges[-1]) + area / edges[-1], 1.0)))
    edge = np.array([*edges, 0.0])
    return edge, np.exp(-edge)


_EDGE, _DENSITY = _ziggurat()
_LOW8 = np.uint64(0xFF)


@njit(nogil=True, cache=True, inline="always")
def _exponential(state):  # type: ignore[no-untyped-def]
    """(state, x): a draw from Exp(1); 99 % of them cost one multiplication and one comparison."""
    state += _GOLDEN
    bits = _mix(state)
    layer = np.int64(bits & _LOW8)
    x = _unit(bits) * _EDGE[layer]
    if x < _EDGE[layer + 1]:
        return state, x
    return _exponential_slow(state, layer, x)


@njit(nogil=True, cache=True)
def _exponential_slow(state, layer, x):  # type: ignore[no-untyped-def]
    """The wedge of a layer, and the tail, of the ziggurat (the tail beyond r is r plus a fresh draw)."""
    offset = 0.0
    while True:
        state += _GOLDEN
        if layer == 0:
            offset += _EDGE[1]
        elif _DENSITY[layer] + _unit(_mix(state)) * (_DENSITY[layer + 1] - _DENSITY[layer]) < np.exp(-x):
            return state, offset + x
        state += _GOLDEN
        bits = _mix(state)
        layer = np.int64(bits & _LOW8)
        x = _unit(bits) * _EDGE[layer]
        if x < _EDGE[layer + 1]:
            return state, offset + x


@njit(nogil=True, cache=True)
def build_alias(weights_E, keep_E, other_E):  # type: ignore[no-untyped-def]
    """Vose's alias table: column e is kept with keep_E[e], else becomes other_E[e]."""
    size = weights_E.size
    total = weights_E.sum()
    scaled = weights_E * (size / total)
    small = np.empty(size, np.int64)
    large = np.empty(size, np.int64)
    num_small = 0
    num_large = 0
    for e in range(size):
        keep_E[e] = 1.0
        other_E[e] = e
        if scaled[e] < 1.0:
            small[num_small] = e
            num_small += 1
        else:
            large[num_large] = e
            num_large += 1
    while num_small > 0 and num_large > 0:
        num_small -= 1
        poor = small[num_small]
        rich = large[num_large - 1]
        keep_E[poor] = scaled[poor]
        other_E[poor] = rich
        scaled[rich] -= 1.0 - scaled[poor]
        if scaled[rich] < 1.0:
            num_large -= 1
            small[num_small] = rich
            num_small += 1


# The rare paths (scan, resum) are functions of their own: inlined by numba they made the common path 13 times slower.
@njit(nogil=True, cache=True)
def _next_by_rejection(state, first, size, keep_E, other_E, token, rang_in_token_E):  # type: ignore[no-untyped-def]
    """(state, expert): who of experts first..first+size rings next: alias draws until one that did not ring."""
    while True:
        state += _GOLDEN
        bits = _mix(state)
        column = first + np.int64(((bits >> _S32) * np.uint64(size)) >> _S32)
        expert = column
        if np.float64(bits & _LOW32) * _UNIT32 >= keep_E[column]:
            expert = first + other_E[column]
        if rang_in_token_E[expert] != token:
            return state, expert


@njit(nogil=True, cache=True)
def _next_by_scan(state, first, size, remaining, weights_E, token, rang_in_token_E):  # type: ignore[no-untyped-def]
    """As _next_by_rejection, by walking the weights of those that did not ring."""
    state += _GOLDEN
    target = _unit(_mix(state)) * remaining
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
def draw_plain(weights_E, seed, first_token, choices_TK):  # type: ignore[no-untyped-def]
    """Fill choices_TK with top-k of perturbed weights, highest first; no expert twice in a token.

    Row i is token first_token + i of the seed's sequence, whatever else is drawn.
    """
    num_tokens, top_k = choices_TK.shape
    size = weights_E.size
    keep_E = np.empty(size)
    other_E = np.empty(size, np.int64)
    build_alias(weights_E, keep_E, other_E)
    rang_in_token_E = np.full(size, -1, np.int64)
    total = weights_E.sum()
    for t in range(num_tokens):
        state = _mix(seed + np.uint64(first_token + t) * _MIX_A)
        remaining = total
        for k in range(top_k):
            if remaining > _SCAN_SHARE * total:
                state, expert = _next_by_rejection(state, 0, size, keep_E, other_E, t, rang_in_token_E)
            else:
                state, expert = _next_by_scan(state, 0, size, remaining, weights_E, t, rang_in_token_E)
            rang_in_token_E[expert] = t
            choices_TK[t, k] = expert
            remaining -= weights_E[expert]
            if remaining <= _RESUM_SHARE * total:
                remaining = _sum_left(0, size, weights_E, t, rang_in_token_E)


@njit(nogil=True, cache=True)
def draw_grouped(weights_E, num_groups, top_groups, by_two, seed, first_token, choices_TK):  # type: ignore[no-untyped-def]
    """As draw_plain, inside the top_groups best groups.

    A group's score: the sum of its two largest perturbed log weights (by_two), or its largest.
    """
    num_tokens, top_k = choices_TK.shape
    size = weights_E.size // num_groups
    keep_E = np.empty(weights_E.size)
    other_E = np.empty(weights_E.size, np.int64)
    total_N = np.empty(num_groups)
    for n in range(num_groups):
        first = n * size
        build_alias(weights_E[first : first + size], keep_E[first : first + size], other_E[first : first + size])
        total_N[n] = weights_E[first : first + size].sum()
    rang_in_token_E = np.full(weights_E.size, -1, np.int64)
    # Of each group: who rang first, when the ring after those handed out comes (and the second), the weight left then.
    expert_N = np.empty(num_groups, np.int64)
    time_N = np.empty(num_groups)
    second_N = np.empty(num_groups)
    remaining_N = np.empty(num_groups)
    num_rung_N = np.empty(num_groups, np.int64)
    score_N = np.empty(num_groups)
    chosen = np.empty(top_groups, np.int64)
    for t in range(num_tokens):
        state = _mix(seed + np.uint64(first_token + t) * _MIX_A)
        for n in range(num_groups):
            first = n * size
            state, gap = _exponential(state)
            now = gap / total_N[n]
            state += _GOLDEN
            bits = _mix(state)
            expert = first + np.int64(((bits >> _S32) * np.uint64(size)) >> _S32)
            if np.float64(bits & _LOW32) * _UNIT32 >= keep_E[expert]:
                expert = first + other_E[expert]
            remaining = total_N[n] - weights_E[expert]
            if remaining <= _RESUM_SHARE * total_N[n]:
                rang_in_token_E[expert] = t
                remaining = _sum_left(first, size, weights_E, t, rang_in_token_E)
            expert_N[n] = expert
            time_N[n] = now
            remaining_N[n] = remaining
            num_rung_N[n] = 0
            second_N[n] = np.inf
            score_N[n] = now
            if size > 1:
                state, gap = _exponential(state)
                second_N[n] = now + gap / remaining
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
            if num_rung_N[best] == 1:
                rang_in_token_E[expert_N[best]] = t
                choices_TK[t, k] = expert_N[best]
                time_N[best] = second_N[best]
                continue
            first = best * size
            remaining = remaining_N[best]
            if remaining > _SCAN_SHARE * total_N[best]:
                state, expert = _next_by_rejection(state, first, size, keep_E, other_E, t, rang_in_token_E)
            else:
                state, expert = _next_by_scan(state, first, size, remaining, weights_E, t, rang_in_token_E)
            rang_in_token_E[expert] = t
            choices_TK[t, k] = expert
            if num_rung_N[best] == size:
                time_N[best] = np.inf
                continue
            remaining -= weights_E[expert]
            if remaining <= _RESUM_SHARE * total_N[best]:
                remaining = _sum_left(first, size, weights_E, t, rang_in_token_E)
            remaining_N[best] = remaining
            state, gap = _exponential(state)
            time_N[best] += gap / remaining


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
        state = _mix(seed + np.uint64(first_token + t) * _MIX_A)
        first = choices_TK[t, 0]
        remaining = total - weights_E[first]
        if remaining <= _RESUM_SHARE * total:
            remaining = 0.0
            for e in range(size):
                if e != first:
                    remaining += weights_E[e]
        state, early = _exponential(state)
        state, gap = _exponential(state)
        early /= total
        state += _GOLDEN
        if _unit(_mix(state)) >= 2.0 * early / (2.0 * early + gap / remaining):
            choices_TK[t, 1] = -1
