"""Expert capacity and the assignments it drops (Megatron's convention).

Legend: L layers, E experts, C counts, F capacity factors.

Each source rank gives each expert C = ceil(T k / E * factor) places per micro-batch and drops what overflows. Which of
the overflowing assignments fall is the policy (probability: the least router weights; position: the last tokens); by
number both drop the same, so everything here serves both. The policy matters for quality, and for nothing that moesim
times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_KNOTS = 257  # where the expected kept count is tabulated; between knots it is linear to 1e-4 of a standard deviation
_REACH_SD = 8.0  # standard deviations around the capacity that the knots cover


def megatron_capacity(
    *, tokens_per_rank: int, top_k: int, num_experts: int, capacity_factor: float | None
) -> int | None:
    """Places per expert on each source rank: ceil(T*k/E*factor); None when nothing is dropped.

    No drop without a factor, nor when the capacity reaches tokens_per_rank (no expert can get more: a token picks an
    expert once). Source: Megatron-Core, moe_utils.get_capacity and topk_softmax_with_capacity.

    >>> megatron_capacity(tokens_per_rank=4096, top_k=8, num_experts=256, capacity_factor=1.25)
    160
    """
    if capacity_factor is None:
        return None
    capacity = math.ceil(tokens_per_rank * top_k / num_experts * capacity_factor)
    return None if capacity >= tokens_per_rank else capacity


def kept_of_count(
    count: NDArray[np.floating], *, capacity: int, tokens_per_rank: int, num_source_ranks: int
) -> NDArray[np.floating]:
    """Expected assignments kept of an expert's count over all source ranks, each capped at capacity [same shape].

    Given the total, source ranks that route alike share it as a hypergeometric law does (S*T tokens, T on each rank),
    so kept = S * E[min(H, capacity)]; exact at whole counts near the knots, linear in between.
    """
    if num_source_ranks == 1:
        return np.minimum(count, count.dtype.type(capacity))
    total = tokens_per_rank * num_source_ranks
    spread = _REACH_SD * math.sqrt(capacity) * num_source_ranks
    middle = float(capacity * num_source_ranks)
    low, high = max(middle - spread, 0.0), min(middle + spread, float(total))
    knots_C = np.unique(np.round(np.concatenate([[0.0], np.linspace(low, high, _KNOTS), [float(total)]])))
    kept_C = num_source_ranks * _capped_mean(knots_C, total, tokens_per_rank, capacity)
    return np.interp(count, knots_C, kept_C).astype(count.dtype)


def expected_kept_fraction(inclusion_LE: Floats, *, capacity: int | None, tokens_per_rank: int) -> Floats:
    """(L,) share of assignments that stay, when each of a rank's tokens picks expert e with probability inclusion.

    A rank's count is binomial (tokens are independent); the mean of min(count, capacity) is summed over experts.

    >>> expected_kept_fraction(np.full((1, 4), 0.25), capacity=None, tokens_per_rank=64)
    array([1.])
    """
    if capacity is None:
        return np.ones(inclusion_LE.shape[0])
    centre, spread = capacity / tokens_per_rank, _REACH_SD * math.sqrt(capacity) / tokens_per_rank
    near = np.linspace(max(centre - spread, 0.0), min(centre + spread, 1.0), _KNOTS)
    knots_C = np.unique(np.concatenate([[0.0], near, [1.0]]))
    capped_C = _capped_binomial_mean(knots_C, tokens_per_rank, capacity)
    kept_LE = np.interp(inclusion_LE, knots_C, capped_C)
    return kept_LE.sum(axis=1) / (tokens_per_rank * inclusion_LE.sum(axis=1))


def drop_curve(inclusion_LE: Floats, capacity_factors: Sequence[float], *, tokens_per_rank: int, top_k: int) -> Floats:
    """(F,) mean over layers of the dropped share of assignments at each capacity factor.

    >>> drop_curve(np.full((1, 8), 0.25), [1.0, 8.0], tokens_per_rank=1024, top_k=2).round(3)
    array([0.022, 0.   ])
    """
    drops_F = []
    for factor in capacity_factors:
        capacity = megatron_capacity(
            tokens_per_rank=tokens_per_rank, top_k=top_k, num_experts=inclusion_LE.shape[1], capacity_factor=factor
        )
        kept_L = expected_kept_fraction(inclusion_LE, capacity=capacity, tokens_per_rank=tokens_per_rank)
        drops_F.append(1.0 - float(kept_L.mean()))
    return np.maximum(np.array(drops_F), 0.0)


def _capped_mean(totals_C: Floats, population: int, drawn: int, capacity: int) -> Floats:
    """E[min(H, capacity)] for H hypergeometric: drawn of population tokens, totals_C of which chose the expert."""
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1.0, population + 1.0)))])
    totals_C1 = totals_C.astype(np.int64)[:, None]
    below = np.arange(capacity)  # E[min(H, C)] = C - sum over h < C of (C - h) P(H = h)
    rest = drawn - below
    possible = (below <= totals_C1) & (rest <= population - totals_C1)
    h, r = np.minimum(below, totals_C1), np.minimum(rest, population - totals_C1)
    log_p = log_factorial[totals_C1] - log_factorial[h] - log_factorial[totals_C1 - h]
    log_p += log_factorial[population - totals_C1] - log_factorial[r] - log_factorial[population - totals_C1 - r]
    log_p -= log_factorial[population] - log_factorial[drawn] - log_factorial[population - drawn]
    return np.asarray(capacity - np.where(possible, np.exp(log_p), 0.0) @ (capacity - below), dtype=np.float64)


def _capped_binomial_mean(probability_C: Floats, drawn: int, capacity: int) -> Floats:
    """E[min(B, capacity)] for B binomial(drawn, probability)."""
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1.0, drawn + 1.0)))])
    below = np.arange(capacity)
    log_ways = log_factorial[drawn] - log_factorial[below] - log_factorial[drawn - below]
    inner_C1 = np.clip(probability_C, 1e-300, 1.0 - 1e-16)[:, None]
    log_p = log_ways + below * np.log(inner_C1) + (drawn - below) * np.log1p(-inner_C1)
    return capacity - np.exp(log_p) @ (capacity - below)
