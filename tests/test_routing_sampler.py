"""The sampler against enumeration, and its two engines against each other."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from moesim.describe.model import Router
from moesim.errors import InputError
from moesim.routing.sampler import draw_choices

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


@pytest.mark.parametrize(
    ("num_experts", "router"),
    [
        (8, Router(top_k=2, num_groups=4, top_groups=2)),
        (8, Router(top_k=3, num_groups=2, top_groups=1)),
        (8, Router(top_k=2, num_groups=8, top_groups=3)),
        (6, Router(top_k=3, num_groups=2, top_groups=1)),
        (8, Router(top_k=4, num_groups=4, top_groups=2)),
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
