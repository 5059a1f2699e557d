"""The sampler against enumeration, and its two engines against each other."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moesim.describe.model import Router
from moesim.describe.popularity import Dirichlet, HotExperts, Lognormal, PowerLaw, Skewed, Zipf
from moesim.errors import InputError
from moesim.routing.popularity import popularity_LE
from moesim.routing.reach import reach_of_sets
from moesim.routing.sampler import draw_choices, draw_counts_streaming, stream_choices

ROUTERS = (Router(top_k=4), Router(top_k=4, num_groups=8, top_groups=3), Router(top_k=2, choice="random_second"))
LOG_WEIGHTS_8 = np.log(np.array([8.0, 1.0, 3.0, 0.5, 2.0, 2.0, 0.2, 5.0]))
SKEWED_5 = np.log(np.array([500.0, 1.0, 2.0, 30.0, 0.4]))


def chi_square_limit(freedom: int) -> float:
    """The chi-square quantile 1 - 3e-5 (z = 4) by Wilson and Hilferty's cube; seeds are fixed, so no test flickers."""
    return freedom * (1 - 2 / (9 * freedom) + 4 * math.sqrt(2 / (9 * freedom))) ** 3


def codes(choices_TK: NDArray[np.int16], base: int) -> NDArray[np.int64]:
    return choices_TK.astype(np.int64) @ base ** np.arange(choices_TK.shape[1])


def ordered_probability(weights: NDArray[np.float64], order: tuple[int, ...]) -> float:
    """Sequential choice by weight without replacement, which is what perturbed top-k draws."""
    probability, left = 1.0, float(weights.sum())
    for expert in order:
        probability *= weights[expert] / left
        left -= weights[expert]
    return probability


@pytest.mark.parametrize("engine", ["numba", "numpy"])
@pytest.mark.parametrize("log_weights", [LOG_WEIGHTS_8, SKEWED_5, np.zeros(4)])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_plain_choices_follow_the_enumerated_law_of_ordered_choices(
    engine: str, log_weights: NDArray[np.float64], top_k: int
) -> None:
    num_tokens = 60_000
    choices = draw_choices(log_weights, Router(top_k=top_k), num_tokens, np.random.default_rng(7), engine=engine)  # type: ignore[arg-type]
    orders = list(itertools.permutations(range(log_weights.size), top_k))
    expected = num_tokens * np.array([ordered_probability(np.exp(log_weights), order) for order in orders])
    codes_of_orders = codes(np.array(orders, dtype=np.int16), log_weights.size)
    seen = np.array([np.sum(codes(choices, log_weights.size) == code) for code in codes_of_orders])
    assert seen.sum() == num_tokens
    common = expected >= 5
    rest_expected, rest_seen = expected[~common].sum(), seen[~common].sum()
    statistic = ((seen[common] - expected[common]) ** 2 / expected[common]).sum()
    statistic += (rest_seen - rest_expected) ** 2 / max(rest_expected, 5.0)
    assert statistic < chi_square_limit(int(common.sum()))


# One regime each: repeats are common, a level of its own for the hot, one for nearly every expert, and tails of ties.
REGIMES_7 = {
    "one of seven has 0.99": np.log(np.array([1.0, 1.0, 594.0, 1.0, 1.0, 1.0, 1.0])),
    "three of seven have 0.99": np.log(np.array([1.0, 132.0, 1.0, 132.0, 132.0, 1.0, 1.0])),
    "each half of the one before": -math.log(2) * np.arange(7.0),
    "each a thousandth of the one before": -math.log(1000) * np.array([0.0, 3.0, 1.0, 2.0, 5.0, 4.0, 6.0]),
}


@pytest.mark.parametrize("regime", REGIMES_7)
@pytest.mark.parametrize("top_k", [2, 4, 5])
def test_skewed_choices_follow_the_enumerated_law_in_every_regime_of_the_kernel(regime: str, top_k: int) -> None:
    log_weights, num_tokens = REGIMES_7[regime], 200_000
    choices = draw_choices(log_weights, Router(top_k=top_k), num_tokens, np.random.default_rng(17))
    orders = list(itertools.permutations(range(7), top_k))
    expected = num_tokens * np.array([ordered_probability(np.exp(log_weights), order) for order in orders])
    seen = np.bincount(codes(choices, 7), minlength=7**top_k)[codes(np.array(orders, dtype=np.int16), 7)]
    assert seen.sum() == num_tokens  # no expert twice
    common = expected >= 5
    rest_expected, rest_seen = expected[~common].sum(), seen[~common].sum()
    statistic = ((seen[common] - expected[common]) ** 2 / expected[common]).sum()
    statistic += (rest_seen - rest_expected) ** 2 / max(rest_expected, 5.0)
    assert statistic < chi_square_limit(int(common.sum()))


def popularity_weights(popularity: Skewed) -> NDArray[np.float64]:
    """Log weights of 256 experts, top-8."""
    rng, router = np.random.default_rng(3), Router(top_k=8)
    return popularity_LE(popularity, num_layers=1, num_experts=256, router=router, rng=rng).log_weights_LE[0]


@pytest.mark.parametrize(
    "popularity",
    [
        Lognormal(gini=0.7),
        Lognormal(gini=0.9),
        Zipf(gini=0.9),
        Dirichlet(gini=0.9),
        PowerLaw(gini=0.9),
        HotExperts(num_hot=1, share=0.12),
        HotExperts(num_hot=16, share=0.9),
    ],
    ids=lambda popularity: f"{popularity.kind}-{popularity.gini or popularity.num_hot}",
)
def test_every_expert_of_a_skewed_layer_is_included_as_often_as_quadrature_says(popularity: Skewed) -> None:
    log_weights, num_tokens = popularity_weights(popularity), 400_000
    exact = reach_of_sets(log_weights[None], np.arange(256), top_k=8, num_sets=256)[0]
    counts = draw_counts_streaming(log_weights[None], Router(top_k=8), num_tokens, np.random.default_rng(5))[0]
    deviation = np.sqrt(num_tokens * exact * (1 - exact)) + 1.0  # and the quadrature's own error, 1e-6 of a token
    assert np.abs((counts - num_tokens * exact) / deviation).max() < 4.5


def test_levels_end_where_seven_tenths_of_their_weight_are_left() -> None:
    from moesim.routing import kernels

    assert kernels._level_starts(np.ones(100), 5).tolist() == [0, 30, 51, 66, 77, 100]  # 100, 70, 49, 34, 23 left
    assert kernels._level_starts(np.array([90.0, 5.0, 3.0, 2.0]), 9).tolist() == [0, 1, 2, 3, 4]


@settings(deadline=None, max_examples=30)
@given(offset=st.floats(-200.0, 200.0), seed=st.integers(0, 2**32 - 1), skew=st.floats(0.0, 4.0))
def test_only_differences_of_log_popularity_matter(offset: float, seed: int, skew: float) -> None:
    log_weights = np.round(skew * np.random.default_rng(seed).standard_normal(16), 3)
    for router in ROUTERS[:1] + ROUTERS[2:]:
        drawn = [
            draw_choices(weights, router, 50, np.random.default_rng(seed))
            for weights in (log_weights, log_weights + offset)
        ]
        # Rounding of the offset may turn a draw that falls on a column's very edge, once in about 1e12.
        assert np.array_equal(*drawn)


@settings(deadline=None, max_examples=200)
@given(
    logs=st.lists(st.floats(-40.0, 0.0), min_size=2, max_size=24),
    top_k=st.integers(1, 8),
    order_seed=st.integers(0, 2**32 - 1),
)
def test_a_draw_is_new_with_a_probability_that_no_skew_can_make_small(
    logs: list[float], top_k: int, order_seed: int
) -> None:
    """Whichever experts rang, the level that serves has at least 0.7/k of its weight left (docs/model.md)."""
    from moesim.routing import kernels

    falling = np.sort(np.exp(logs))[::-1].copy()
    most = min(top_k, falling.size)
    starts = kernels._level_starts(falling, most)
    assert starts[0] == 0
    assert starts[-1] == falling.size
    assert (np.diff(starts) > 0).all()
    assert starts.size - 1 <= most
    order = np.random.default_rng(order_seed).permutation(falling.size)
    rung = np.zeros(falling.size, dtype=bool)
    for expert in order[: most - 1]:
        rung[expert] = True
        level = int(np.searchsorted(starts, int(np.argmin(rung)), side="right")) - 1
        first = starts[level]
        assert falling[first:][~rung[first:]].sum() >= 0.7 / most * falling[first:].sum() * (1 - 1e-9)


@pytest.mark.parametrize(
    ("num_experts", "router"),
    [
        (8, Router(top_k=2, num_groups=4, top_groups=2)),
        (8, Router(top_k=3, num_groups=2, top_groups=1)),
        (8, Router(top_k=2, num_groups=8, top_groups=3)),
        (6, Router(top_k=3, num_groups=2, top_groups=1)),
        (8, Router(top_k=4, num_groups=4, top_groups=2)),
        (12, Router(top_k=4, num_groups=3, top_groups=2)),  # third rings of two groups compete
    ],
)
@pytest.mark.parametrize("skew", [0.0, 1.0, 3.0, 8.0])
def test_group_limited_kernel_and_numpy_oracle_draw_the_same_law(num_experts: int, router: Router, skew: float) -> None:
    num_tokens = 40_000
    log_weights = skew * np.random.default_rng(num_experts).standard_normal(num_experts)
    fast = codes(draw_choices(log_weights, router, num_tokens, np.random.default_rng(1)), num_experts)
    plain = codes(draw_choices(log_weights, router, num_tokens, np.random.default_rng(2), engine="numpy"), num_experts)
    seen, index = np.unique(np.concatenate([fast, plain]), return_inverse=True)
    counts_2C = np.stack([np.bincount(part, minlength=seen.size) for part in np.split(index, 2)])
    common = counts_2C.sum(axis=0) >= 20
    counts_2C = np.column_stack([counts_2C[:, common], counts_2C[:, ~common].sum(axis=1)]).astype(float)
    statistic = ((counts_2C[0] - counts_2C[1]) ** 2 / np.maximum(counts_2C.sum(axis=0), 1)).sum()
    assert statistic < chi_square_limit(max(int(common.sum()), 1))


def test_group_limited_choices_use_no_more_than_top_groups_and_repeat_no_expert() -> None:
    router = Router(top_k=8, num_groups=8, top_groups=4)
    log_weights = 0.7 * np.random.default_rng(0).standard_normal(256)
    choices = draw_choices(log_weights, router, 5_000, np.random.default_rng(3))
    assert all(len(set(row)) == 8 for row in choices.tolist())
    assert max(len(set(row)) for row in (choices // 32).tolist()) == 4


def test_a_sample_depends_on_the_seed_alone_and_its_tokens_not_on_how_many_are_drawn() -> None:
    router = Router(top_k=4)
    first = draw_choices(np.zeros(32), router, 1_000, np.random.default_rng(5))
    assert np.array_equal(first, draw_choices(np.zeros(32), router, 1_000, np.random.default_rng(5)))
    assert np.array_equal(first[:100], draw_choices(np.zeros(32), router, 100, np.random.default_rng(5)))
    assert not np.array_equal(first, draw_choices(np.zeros(32), router, 1_000, np.random.default_rng(6)))


def test_all_experts_are_chosen_when_top_k_is_their_number_however_skewed() -> None:
    choices = draw_choices(np.array([0.0, 40.0, -80.0, 3.0]), Router(top_k=4), 200, np.random.default_rng(0))
    assert np.array_equal(np.sort(choices, axis=1), np.tile(np.arange(4), (200, 1)))


def test_more_experts_than_a_choice_can_number_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="moe: num_experts: must not exceed 32767 where tokens are drawn; got 32768"):
        draw_choices(np.zeros(32768), Router(top_k=2), 1, np.random.default_rng(0))


@pytest.mark.parametrize("router", ROUTERS)
def test_choices_do_not_depend_on_threads_nor_on_chunks(router: Router) -> None:
    log_weights = np.random.default_rng(3).standard_normal(32)
    one, two = (
        draw_choices(log_weights, router, 5_001, np.random.default_rng(5), num_threads=threads) for threads in (1, 2)
    )
    assert np.array_equal(one, two)
    chunks = stream_choices(log_weights, router, 5_001, np.random.default_rng(5), chunk_tokens=700)
    assert np.array_equal(one, np.concatenate([chunk.copy() for chunk in chunks]))


@pytest.mark.parametrize("router", ROUTERS)
def test_streamed_counts_are_those_of_the_choices_whatever_threads_and_chunks(router: Router) -> None:
    log_weights_LE = np.random.default_rng(3).standard_normal((2, 32))
    streamed = [
        draw_counts_streaming(
            log_weights_LE, router, 9_999, np.random.default_rng(6), chunk_tokens=chunk, num_threads=threads
        )
        for chunk, threads in ((1_000, 1), (1_000, 2), (20_000, 2))
    ]
    rng = np.random.default_rng(6)
    drawn = [draw_choices(log_weights_E, router, 9_999, rng) for log_weights_E in log_weights_LE]
    counts_LE = np.stack([np.bincount(choices[choices >= 0], minlength=32) for choices in drawn])
    assert all(np.array_equal(counts_LE, counts) for counts in streamed)


def test_streaming_takes_the_memory_of_one_chunk_however_many_tokens() -> None:
    router = Router(top_k=8)
    draw_counts_streaming(np.zeros((1, 256)), router, 10, np.random.default_rng(0))  # loads the kernels
    peaks = []
    for num_tokens in (100_000, 1_600_000):
        tracemalloc.start()
        counts = draw_counts_streaming(np.zeros((1, 256)), router, num_tokens, np.random.default_rng(0))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert counts.sum() == num_tokens * 8
    # One chunk of 32,768 tokens is 0.5 MB; all choices of the larger draw would be 25.6 MB.
    assert peaks[1] < 1_500_000
    assert peaks[1] < peaks[0] * 1.2


def test_streamed_counts_of_equal_experts_pass_chi_square() -> None:
    for router in (Router(top_k=8), Router(top_k=8, num_groups=8, top_groups=4)):
        counts = draw_counts_streaming(np.zeros((1, 256)), router, 200_000, np.random.default_rng(11))[0]
        mean = 200_000 * 8 / 256
        # An expert's count varies as k/E (1 - k/E) per token; 255 of 256 are free.
        statistic = ((counts - mean) ** 2).sum() / (mean * (1 - 8 / 256)) * 255 / 256
        assert statistic < chi_square_limit(255)


def test_the_ziggurat_draws_the_exponential_law() -> None:
    from numba import njit

    from moesim.routing.random_kernels import exponential

    @njit
    def draws(num: int, seed: np.uint64) -> NDArray[np.float64]:
        out, state = np.empty(num), seed
        for i in range(num):
            state, out[i] = exponential(state)
        return out

    sample = draws(400_000, np.uint64(9))
    # 500 cells of equal probability; the tail beyond the ziggurat's last edge 7.697 lies in the last, tested apart.
    cell = np.minimum((500 * -np.expm1(-sample)).astype(int), 499)
    assert ((np.bincount(cell, minlength=500) - 800.0) ** 2 / 800.0).sum() < chi_square_limit(499)
    in_tail, mean_tail = (sample > 7.0).sum(), sample[sample > 7.0].mean()
    assert in_tail == pytest.approx(400_000 * math.exp(-7.0), abs=4 * math.sqrt(400_000 * math.exp(-7.0)))
    assert mean_tail == pytest.approx(8.0, abs=4 / math.sqrt(in_tail))


@pytest.mark.parametrize("skew", [0.0, 1.5])
@pytest.mark.parametrize("router", [Router(top_k=2, num_groups=4, top_groups=2, group_score="max"), ROUTERS[2]])
def test_kernel_and_oracle_agree_on_best_expert_group_scores_and_on_random_seconds(router: Router, skew: float) -> None:
    log_weights = skew * np.random.default_rng(8).standard_normal(8)
    tables = []
    for engine in ("numba", "numpy"):
        drawn = draw_choices(log_weights, router, 60_000, np.random.default_rng(4), engine=engine)  # type: ignore[arg-type]
        tables.append(np.bincount(codes(drawn + 1, 9), minlength=81).astype(float))
    seen = np.stack(tables)[:, np.sum(tables, axis=0) >= 20]
    statistic = ((seen[0] - seen[1]) ** 2 / seen.sum(axis=0)).sum()
    assert statistic < chi_square_limit(seen.shape[1])


def test_of_many_equal_experts_a_random_second_stays_with_probability_2_minus_2_ln_2() -> None:
    drawn = draw_choices(np.zeros(2_000), Router(top_k=2, choice="random_second"), 100_000, np.random.default_rng(1))
    # E[2 t1/(t1 + t2)] with t1/t2 uniform is the integral of 2u/(1 + u) over 0..1.
    assert (drawn[:, 1] >= 0).mean() == pytest.approx(2 - 2 * math.log(2), abs=4 * 0.5 / math.sqrt(100_000))
    assert (drawn[:, 0] >= 0).all()


def test_noise_on_logits_flattens_popularity_as_a_wider_perturbation_does() -> None:
    log_weights = np.log(np.array([8.0, 4.0, 2.0, 1.0]))
    scale = math.sqrt(1 + 6 * 2.0**2 / math.pi**2)
    expected = np.exp(log_weights / scale) / np.exp(log_weights / scale).sum()
    for engine in ("numba", "numpy"):
        noisy = Router(top_k=1, noise_std=2.0)
        drawn = draw_choices(log_weights, noisy, 100_000, np.random.default_rng(2), engine=engine)  # type: ignore[arg-type]
        assert np.bincount(drawn[:, 0]) / 100_000 == pytest.approx(expected, abs=0.007)  # four deviations
