"""Expert capacity in five conventions, and the assignments it is expected to drop.

Legend: L layers, E experts, R ranks, C counts, F capacity factors, G skews.

Every convention is so many places, for an expert or for a rank, in every bin of so many consecutive tokens: Megatron's
and Tutel's bins are source ranks, GShard's are groups of tokens, MegaBlocks' and HybridEP's the whole expert-parallel
group. Which of the overflowing assignments fall is the policy (probability: the least router weights; position: the
last tokens; random); by number all three drop the same, so counts serve all of them. Re-routing drops less: see
``rerouted``. Token by token: ``drops``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moesim.describe.capacity import Capacity, Gshard, Megablocks, Megatron, RankBuffer, Tutel
from moesim.errors import check

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_KNOTS = 257  # where the expected kept count is tabulated; between knots it is linear to 1e-4 of a standard deviation
_REACH_SD = 8.0  # standard deviations around the capacity that the knots cover
_NORMAL_TOKENS = 32768  # bins of more tokens: the binomial law's capped mean is the normal law's to 1e-4 of a count
_MOST_FACTOR = 4096.0  # where the search for a capacity factor gives up


@dataclass(frozen=True, kw_only=True)
class Limit:
    """places that each expert (or rank: ``of``) has in each of num_bins bins of bin_tokens consecutive tokens.

    slot_major: all first choices of a bin go before all second ones, instead of token after token.
    """

    places: int
    bin_tokens: int
    num_bins: int
    of: Literal["expert", "rank"] = "expert"
    slot_major: bool = False

    @property
    def total_places(self) -> int:
        """Places of one expert (or rank) in all bins."""
        return self.places * self.num_bins


def limit_of(
    capacity: Capacity,
    *,
    capacity_factor: float | None,
    tokens_per_rank: int,
    num_source_ranks: int,
    num_experts: int,
    top_k: int,
    pad: bool = False,
) -> Limit | None:
    """The limit that a convention sets to an expert-parallel group; None when nothing is ever dropped.

    None without a factor, and when a bin's tokens all fit (an expert takes a token once) unless buffers are padded,
    which fills all places whether or not they can be needed. Raises InputError for groups that do not divide a rank's
    tokens. Sources: Megatron-Core moe_utils.get_capacity; MegaBlocks layers/moe.py expert_capacity; Tutel
    moe_layer capacity; Mesh TensorFlow moe.py, top_2_gating; HybridEP budget of Megatron-Core's token dispatcher.

    >>> limit_of(Megablocks(), capacity_factor=1.25, tokens_per_rank=4096, num_source_ranks=8, num_experts=256, top_k=8)
    Limit(places=1280, bin_tokens=32768, num_bins=1, of='expert', slot_major=False)
    """
    if capacity_factor is None:
        return None
    all_tokens = tokens_per_rank * num_source_ranks
    if isinstance(capacity, Megatron):
        places = math.ceil(tokens_per_rank * top_k / num_experts * capacity_factor)
        limit = Limit(places=places, bin_tokens=tokens_per_rank, num_bins=num_source_ranks)
    elif isinstance(capacity, Megablocks):
        places = int(capacity_factor * top_k * tokens_per_rank * num_source_ranks / num_experts)
        if places == 0:
            return None
        limit = Limit(places=places, bin_tokens=all_tokens, num_bins=1)
    elif isinstance(capacity, Tutel):
        places = top_k * int(capacity_factor * math.ceil(tokens_per_rank / num_experts))
        limit = Limit(places=places, bin_tokens=tokens_per_rank, num_bins=num_source_ranks, slot_major=True)
    elif isinstance(capacity, Gshard):
        size = capacity.group_tokens or tokens_per_rank
        rule = f"must divide the {tokens_per_rank} tokens of a source rank"
        check(tokens_per_rank % size == 0, "routing.capacity", "group_tokens", rule, size)
        places = min(max(int(size * capacity_factor / num_experts), capacity.min_places), size)
        limit = Limit(places=places, bin_tokens=size, num_bins=all_tokens // size, slot_major=True)
    else:
        assert isinstance(capacity, RankBuffer)
        places = int(tokens_per_rank * top_k * capacity_factor)
        places += -places % capacity.align_rows
        limit = Limit(places=places, bin_tokens=all_tokens, num_bins=1, of="rank")
    most = limit.bin_tokens * (top_k if limit.of == "rank" else 1)
    return None if limit.places >= most and not pad else limit


def megatron_capacity(
    *, tokens_per_rank: int, top_k: int, num_experts: int, capacity_factor: float | None
) -> int | None:
    """Places per expert on each source rank: ceil(T*k/E*factor); None when nothing is dropped.

    No drop without a factor, nor when the capacity reaches tokens_per_rank (no expert can get more: a token picks an
    expert once). Source: Megatron-Core, moe_utils.get_capacity and topk_softmax_with_capacity.

    >>> megatron_capacity(tokens_per_rank=4096, top_k=8, num_experts=256, capacity_factor=1.25)
    160
    """
    limit = limit_of(
        Megatron(),
        capacity_factor=capacity_factor,
        tokens_per_rank=tokens_per_rank,
        num_source_ranks=1,
        num_experts=num_experts,
        top_k=top_k,
    )
    return None if limit is None else limit.places


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


def kept_of_limit(count_xE: NDArray[np.floating], limit: Limit, rank_of_E: Ints | None = None) -> NDArray[np.floating]:
    """Expected assignments kept of whole counts per expert, any leading axes [same shape and dtype].

    count_xE: over all tokens of the group. rank_of_E: needed by a limit of ranks, which cuts its experts in proportion.

    >>> limit = Limit(places=10, bin_tokens=64, num_bins=1, of="rank")
    >>> kept_of_limit(np.array([6.0, 14.0, 5.0, 1.0]), limit, np.array([0, 0, 1, 1]))
    array([3., 7., 5., 1.])
    """
    if limit.of == "rank":
        assert rank_of_E is not None, "a limit of ranks needs to know where experts are"
        share_xE = np.minimum(1.0, limit.total_places / np.maximum(_of_ranks(count_xE, rank_of_E), 1e-30))
        return (count_xE * share_xE[..., rank_of_E]).astype(count_xE.dtype)
    if limit.num_bins == 1:
        return np.minimum(count_xE, count_xE.dtype.type(limit.places))
    # Counts are whole numbers: one look-up table serves all of them, ten times faster than interpolating each.
    kept_of_whole = kept_of_count(
        np.arange(int(count_xE.max(initial=0)) + 1, dtype=count_xE.dtype),
        capacity=limit.places,
        tokens_per_rank=limit.bin_tokens,
        num_source_ranks=limit.num_bins,
    )
    return kept_of_whole[count_xE.astype(np.int64)]


def rerouted(
    count_xE: NDArray[np.floating], kept_xE: NDArray[np.floating], limit: Limit, weight_xE: Floats
) -> NDArray[np.floating]:
    """Assignments that experts serve once what overflowed has tried the tokens' next experts [same shape].

    weight_xE: how likely a token turns to an expert next (its weight times the share of tokens that do not use it yet:
    in the race of perturbed weights who rings next is drawn by weight). Experts fill in proportion until full, as water
    does; single bins are taken to fill alike. Switch, arXiv 2101.03961 appendix B.
    """
    served = kept_xE.astype(np.float64)
    weight_xE = np.broadcast_to(weight_xE, served.shape)
    free = np.maximum(limit.total_places - served, 0.0)
    left = (count_xE.astype(np.float64) - served).sum(axis=-1, keepdims=True)
    for _ in range(served.shape[-1]):
        open_weight = np.where(free > 1e-9, weight_xE, 0.0)
        total = open_weight.sum(axis=-1, keepdims=True)
        # Everybody is filled at one rate until the first is full, or nothing is left.
        per_weight = np.where(total > 0, left / np.maximum(total, 1e-300), 0.0)
        until_full = np.where(open_weight > 0, free / np.maximum(open_weight, 1e-300), np.inf).min(-1, keepdims=True)
        given = open_weight * np.minimum(per_weight, until_full)
        served += given
        free -= given
        left -= given.sum(axis=-1, keepdims=True)
        if float(left.max(initial=0.0)) <= 1e-6 or not bool((free > 1e-9).any()):
            break
    return served.astype(count_xE.dtype)


def expected_kept_LE(inclusion_LE: Floats, limit: Limit | None, rank_of_E: Ints | None = None) -> Floats:
    """Expected share of each expert's assignments that stays, when each token picks expert e with its inclusion.

    Tokens are independent: the count of a bin is binomial. A rank's count is nearly normal with its experts' variances
    summed (that a token's k experts differ is left out: it narrows the count a little).

    >>> expected_kept_LE(np.full((1, 4), 0.25), None)
    array([[1., 1., 1., 1.]])
    """
    if limit is None:
        return np.ones_like(inclusion_LE)
    tokens, places = limit.bin_tokens, limit.places
    if limit.of == "rank":
        assert rank_of_E is not None, "a limit of ranks needs to know where experts are"
        mean_LR = tokens * _of_ranks(inclusion_LE, rank_of_E)
        deviation_LR = np.sqrt(tokens * _of_ranks(inclusion_LE * (1.0 - inclusion_LE), rank_of_E))
        kept_LR = _capped_normal_mean(mean_LR, deviation_LR, places) / np.maximum(mean_LR, 1e-300)
        return np.minimum(kept_LR, 1.0)[:, rank_of_E]
    if tokens > _NORMAL_TOKENS:
        deviation_LE = np.sqrt(tokens * inclusion_LE * (1.0 - inclusion_LE))
        kept_LE = _capped_normal_mean(tokens * inclusion_LE, deviation_LE, places)
    else:
        centre, spread = places / tokens, _REACH_SD * math.sqrt(max(places, 1)) / tokens
        near = np.linspace(max(centre - spread, 0.0), min(centre + spread, 1.0), _KNOTS)
        knots_C = np.unique(np.concatenate([[0.0], near, [1.0]]))
        kept_LE = np.interp(inclusion_LE, knots_C, _capped_binomial_mean(knots_C, tokens, min(places, tokens)))
    return np.minimum(kept_LE / np.maximum(tokens * inclusion_LE, 1e-300), 1.0)


def expected_drop_L(inclusion_LE: Floats, limit: Limit | None, rank_of_E: Ints | None = None) -> Floats:
    """(L,) expected dropped share of each layer's assignments."""
    kept_LE = inclusion_LE * expected_kept_LE(inclusion_LE, limit, rank_of_E)
    return np.maximum(1.0 - kept_LE.sum(axis=1) / inclusion_LE.sum(axis=1), 0.0)


def expected_kept_fraction(inclusion_LE: Floats, *, capacity: int | None, tokens_per_rank: int) -> Floats:
    """(L,) share of assignments that stay under so many places per expert and source rank.

    >>> expected_kept_fraction(np.full((1, 4), 0.25), capacity=None, tokens_per_rank=64)
    array([1.])
    """
    if capacity is None:
        return np.ones(inclusion_LE.shape[0])
    limit = Limit(places=capacity, bin_tokens=tokens_per_rank, num_bins=1)
    return 1.0 - expected_drop_L(inclusion_LE, limit)


def capacity_factor_for_drop(
    inclusion_LE: Floats,
    wanted_drop_fraction: float,
    capacity: Capacity,
    *,
    tokens_per_rank: int,
    num_source_ranks: int,
    top_k: int,
    rank_of_E: Ints | None = None,
    worst_layer: bool = False,
) -> float:
    """The least capacity factor (to 0.1 %) expected to drop no more than wanted, in the mean layer or the worst.

    Raises InputError when no factor up to 4096 does.

    >>> capacity_factor_for_drop(np.full((1, 8), 0.25), 0.01, Megatron(), tokens_per_rank=1024, num_source_ranks=8,
    ...                          top_k=2) < 1.1
    True
    """

    def drop(factor: float) -> float:
        limit = limit_of(
            capacity,
            capacity_factor=factor,
            tokens_per_rank=tokens_per_rank,
            num_source_ranks=num_source_ranks,
            num_experts=inclusion_LE.shape[1],
            top_k=top_k,
        )
        drop_L = expected_drop_L(inclusion_LE, limit, rank_of_E)
        # Sums of floats drop 1e-16 of nothing.
        return float(drop_L.max() if worst_layer else drop_L.mean()) - 1e-12

    field = "wanted_drop_fraction"
    check(0.0 <= wanted_drop_fraction < 1.0, "routing", field, "must lie in 0..1", wanted_drop_fraction)
    low, high = 0.0, 1.0
    while drop(high) > wanted_drop_fraction:
        low, high = high, 2.0 * high
        rule = f"cannot be reached by a capacity factor up to {_MOST_FACTOR:g}"
        check(high <= _MOST_FACTOR, "routing", field, rule, wanted_drop_fraction)
    # Where the convention reads 0 as "no limit", 0 is no answer: the search stays above it.
    while high - low > 1e-3 * high:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if drop(middle) > wanted_drop_fraction else (low, middle)
    return high


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


def _of_ranks(value_xE: NDArray[Any], rank_of_E: Ints) -> NDArray[Any]:
    """Sums over the experts of each rank."""
    member_ER = np.eye(int(rank_of_E.max()) + 1, dtype=value_xE.dtype)[rank_of_E]
    return value_xE @ member_ER


def _capped_normal_mean(mean: Floats, deviation: Floats, capacity: int) -> Floats:
    """E[min(N, capacity)] for N normal: capacity - (distance Phi(z) + deviation phi(z)), z = distance/deviation."""
    distance = capacity - mean
    z = distance / np.maximum(deviation, 1e-12)
    below = 0.5 * np.vectorize(math.erfc, otypes=[np.float64])(-z / math.sqrt(2.0))
    at = np.exp(-0.5 * np.minimum(z * z, 1400.0)) / math.sqrt(2.0 * math.pi)
    return np.asarray(capacity - distance * below - deviation * at)


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
