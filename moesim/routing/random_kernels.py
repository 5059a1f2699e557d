"""Random numbers for numba kernels: a counter, exponential times, and choice by weight.

Legend: E items with weights.

A stream is splitmix64 started at a hash, so it depends on no thread: ``state += GOLDEN``, then ``mix(state)``. Steele,
Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014. Marsaglia, Tsang: The ziggurat method for
generating random variables, J. Stat. Software 5 (2000). Vose, IEEE TSE 17 (1991).
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX_A, _MIX_B = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31, _S32, _S11 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(32), np.uint64(11)
_LOW32, _LAST32 = np.uint64(0xFFFFFFFF), np.uint32(0xFFFFFFFF)
_UNIT53, _TWO32 = 2.0**-53, 2.0**32


@njit(nogil=True, cache=True, inline="always")
def mix(z):  # type: ignore[no-untyped-def]
    z = (z ^ (z >> _S30)) * MIX_A
    z = (z ^ (z >> _S27)) * _MIX_B
    return z ^ (z >> _S31)


@njit(nogil=True, cache=True, inline="always")
def unit(bits):  # type: ignore[no-untyped-def]
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
def exponential(state):  # type: ignore[no-untyped-def]
    """(state, x): a draw from Exp(1); 99 % of them cost one multiplication and one comparison."""
    state += GOLDEN
    bits = mix(state)
    layer = np.int64(bits & _LOW8)
    x = unit(bits) * _EDGE[layer]
    if x < _EDGE[layer + 1]:
        return state, x
    return _exponential_slow(state, layer, x)


@njit(nogil=True, cache=True)
def _exponential_slow(state, layer, x):  # type: ignore[no-untyped-def]
    """The wedge of a layer, and the tail, of the ziggurat (the tail beyond r is r plus a fresh draw)."""
    offset = 0.0
    while True:
        state += GOLDEN
        if layer == 0:
            offset += _EDGE[1]
        elif _DENSITY[layer] + unit(mix(state)) * (_DENSITY[layer + 1] - _DENSITY[layer]) < np.exp(-x):
            return state, offset + x
        state += GOLDEN
        bits = mix(state)
        layer = np.int64(bits & _LOW8)
        x = unit(bits) * _EDGE[layer]
        if x < _EDGE[layer + 1]:
            return state, offset + x


@njit(nogil=True, cache=True)
def build_alias(weights_E, keep_E, pick_E2):  # type: ignore[no-untyped-def]
    """Vose's alias table: column e gives pick_E2[e, 0] = e with probability keep_E[e] / 2**32, else pick_E2[e, 1].

    A part of a larger table is built on its own: its items count from 0.
    """
    size = weights_E.size
    total = weights_E.sum()
    scaled = weights_E * (size / total)
    small = np.empty(size, np.int64)
    large = np.empty(size, np.int64)
    num_small = 0
    num_large = 0
    for e in range(size):
        keep_E[e] = _LAST32
        pick_E2[e, 0] = e
        pick_E2[e, 1] = e
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
        keep_E[poor] = np.uint32(min(scaled[poor] * _TWO32, _TWO32 - 1.0))
        pick_E2[poor, 1] = rich
        scaled[rich] -= 1.0 - scaled[poor]
        if scaled[rich] < 1.0:
            num_large -= 1
            small[num_small] = rich
            num_small += 1


@njit(nogil=True, cache=True, inline="always")
def pick_by_weight(bits, first, size, keep_E, pick_E2):  # type: ignore[no-untyped-def]
    """One of items first..first+size, out of 64 random bits: the upper half is the column, the lower keeps it or not.

    Both answers are looked up by a number, not by a branch, which the processor could only guess.
    """
    column = first + np.int64(((bits >> _S32) * np.uint64(size)) >> _S32)
    return first + np.int64(pick_E2[column, np.int64((bits & _LOW32) >= keep_E[column])])
