"""How likely a token of the plain top-k router reaches each set of experts, exactly (no sampling).

Legend: L layers, E experts, S sets of experts (single experts, ranks, nodes), Q quadrature nodes.

Perturbed top-k is a race of exponential clocks of rate w_e; a token uses the first k to ring. It reaches set S unless k
others ring before S's first ring, which comes at rate W_S:
    P(S reached) = integral over t of W_S exp(-W_S t) P(fewer than k of the others rang by t) dt.
The number that rang by t is a sum of independent Bernoulli variables of probability 1 - exp(-w_e t): its law up to k
- 1 is a product of polynomials, one per set; leaving one set out is a product of what stands before and after it, so
every term is a sum of positive numbers. The integral is a trapezoid sum over ln t, which converges geometrically
there. The race is Plackett and Luce's (Luce 1959; Efraimidis and Spirakis, Inf. Process. Lett. 97, 2006).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_LOG_STEP = 0.3  # trapezoid step over ln t: row sums are within 1e-6 of k up to k = 10
_FIRST_MASS = 1e-6  # ring probability (of anybody) before the first node; that piece is added in closed form
_LAST_EXPONENT = 25.0  # the race is over when the slowest of the k+1 fastest has exponent 25
_CHUNK_NODES = 1024  # quadrature nodes handled at once, so that a polynomial stays in cache


def uniform_reach(num_experts: int, top_k: int, set_sizes_S: NDArray[np.int64]) -> Floats:
    """P(a token reaches each set) when all experts are equally popular: 1 - C(E-s, k)/C(E, k) (hypergeometric).

    >>> uniform_reach(256, 8, np.array([32])).round(3)
    array([0.662])
    """
    others_S = num_experts - np.asarray(set_sizes_S, dtype=np.float64)
    drawn_K = np.arange(top_k)
    miss_SK = np.maximum(others_S[:, None] - drawn_K, 0.0) / (num_experts - drawn_K)
    return 1.0 - miss_SK.prod(axis=1)


def reach_of_sets(log_weights_LE: Floats, set_of_E: NDArray[np.int64], *, top_k: int, num_sets: int) -> Floats:
    """reach_LS: probability that a token's top-k holds at least one expert of each set.

    set_of_E[e] is expert e's set, 0..num_sets-1 (a set may be empty: reach 0). Singleton sets give the inclusion
    probability of each expert. docs/model.md#reach.
    """
    num_layers, num_experts = log_weights_LE.shape
    weights_LE = np.exp(log_weights_LE - log_weights_LE.max(axis=1, keepdims=True))
    weights_LE /= weights_LE.sum(axis=1, keepdims=True)
    if top_k == num_experts:
        occupied_S = np.bincount(set_of_E, minlength=num_sets) > 0
        return np.tile(occupied_S.astype(np.float64), (num_layers, 1))
    fastest_LE = -np.sort(-weights_LE, axis=1)
    log_first = np.log(_FIRST_MASS)
    log_last_L = np.log(_LAST_EXPONENT / fastest_LE[:, top_k])
    num_nodes = int(np.ceil((log_last_L.max() - log_first) / _LOG_STEP)) + 1
    layers_at_once = max(1, _CHUNK_NODES // num_nodes)
    chunks = [slice(i, i + layers_at_once) for i in range(0, num_layers, layers_at_once)]
    return np.concatenate([_reach_chunk(weights_LE[c], set_of_E, top_k, num_sets, num_nodes) for c in chunks])


def random_second_reach(log_weights_LE: Floats, set_of_E: NDArray[np.int64], *, num_sets: int) -> Floats:
    """reach_LS of the top-2 router that keeps its second choice at random (GShard), in closed form.

    After a first choice i, the second is kept with probability h_i = E[2 t1/(t1 + t2)], t1 the first ring and t2 - t1 a
    wait longer by c = 1/(1 - s_i) in the mean: with u = t1's share of both waits, uniform on 0..1 before the stretch,
    h = integral of 2u/(c + (2 - c)u) over 0..1. Arrays as in reach_of_sets. docs/model.md#reach.

    >>> random_second_reach(np.zeros((1, 4)), np.arange(4), num_sets=4).round(3)
    array([[0.392, 0.392, 0.392, 0.392]])
    """
    share_LE = np.exp(log_weights_LE - log_weights_LE.max(axis=1, keepdims=True))
    share_LE /= share_LE.sum(axis=1, keepdims=True)
    left_LE = np.maximum(1.0 - share_LE, 1e-300)
    slope = 2.0 - 1.0 / left_LE
    safe = np.where(np.abs(slope) < 1e-3, 1.0, slope)
    kept_LE = 2.0 / safe * (1.0 - (2.0 - safe) / safe * np.log(2.0 / (2.0 - safe)))
    # Where first and second wait alike in the mean (c near 2) the integral is expanded about u = 1/2.
    kept_LE = np.where(np.abs(slope) < 1e-3, 0.5 + slope / 12, kept_LE)
    handed_LE = share_LE * kept_LE / left_LE  # times another's share: that one is second, and kept
    first_LS, handed_LS = (np.zeros((share_LE.shape[0], num_sets)) for _ in range(2))
    for expert, member in enumerate(set_of_E):
        first_LS[:, member] += share_LE[:, expert]
        handed_LS[:, member] += handed_LE[:, expert]
    return first_LS + (handed_LE.sum(axis=1, keepdims=True) - handed_LS) * first_LS


def _reach_chunk(weights_LE: Floats, set_of_E: NDArray[np.int64], top_k: int, num_sets: int, num_nodes: int) -> Floats:
    """reach_of_sets for a few layers. Polynomials are (degree + 1, L*Q): coefficient j is P(exactly j rang)."""
    num_layers = weights_LE.shape[0]
    time_Q = _FIRST_MASS * np.exp(_LOG_STEP * np.arange(num_nodes))
    trapezoid_Q = np.full(num_nodes, _LOG_STEP)
    trapezoid_Q[[0, -1]] /= 2
    members_S = [np.nonzero(set_of_E == s)[0] for s in range(num_sets)]
    poly_S = [_ring_counts(weights_LE[:, members], time_Q, top_k) for members in members_S]
    one = np.ones((1, num_layers * num_nodes))
    before_S = [one]
    for poly in poly_S[:-1]:
        before_S.append(_product(before_S[-1], poly, top_k))
    after = one
    reach_LS = np.zeros((num_layers, num_sets))
    for s in range(num_sets - 1, -1, -1):
        rate_L1 = weights_LE[:, members_S[s]].sum(axis=1, keepdims=True)
        fewer = _sum_below(before_S[s], after, top_k).reshape(num_layers, num_nodes)
        exponent_LQ = rate_L1 * time_Q
        integral_L = (exponent_LQ * np.exp(-exponent_LQ) * fewer) @ trapezoid_Q
        reach_LS[:, s] = integral_L - np.expm1(-rate_L1[:, 0] * _FIRST_MASS)
        after = _product(after, poly_S[s], top_k)
    return np.clip(reach_LS, 0.0, 1.0)


def _ring_counts(weights_LM: Floats, time_Q: Floats, top_k: int) -> Floats:
    """P(j of these experts rang by t), j < top_k, as (degree + 1, L*Q)."""
    poly = np.ones((1, weights_LM.shape[0] * time_Q.size))
    for m in range(weights_LM.shape[1]):
        rang = -np.expm1(-(weights_LM[:, m, None] * time_Q).reshape(1, -1))
        poly = _product(poly, np.concatenate([1.0 - rang, rang]), top_k)
    return poly


def _product(left: Floats, right: Floats, top_k: int) -> Floats:
    """The product of two polynomials up to degree top_k - 1."""
    if right.shape[0] > left.shape[0]:
        left, right = right, left
    size = min(left.shape[0] + right.shape[0] - 1, top_k)
    out = np.zeros((size, left.shape[1]))
    for degree in range(min(right.shape[0], size)):
        span = min(left.shape[0], size - degree)
        out[degree : degree + span] += left[:span] * right[degree]
    return out


def _sum_below(left: Floats, right: Floats, top_k: int) -> Floats:
    """Sum of the coefficients of left*right of degree below top_k: P(fewer than k of the others rang)."""
    up_to = np.cumsum(right, axis=0)
    total = np.zeros(left.shape[1])
    for degree in range(min(left.shape[0], top_k)):
        total += left[degree] * up_to[min(top_k - 1 - degree, up_to.shape[0] - 1)]
    return total
