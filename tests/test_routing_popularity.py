"""Popularity and reach: closed forms, enumeration, and the sampler as a referee."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from moesim.describe.model import Router
from moesim.describe.workload import Balanced, Lognormal, Multinomial
from moesim.errors import InputError
from moesim.routing.popularity import Popularities, popularity_LE
from moesim.routing.reach import reach_of_sets, uniform_reach
from moesim.routing.sampler import draw_choices
from moesim.routing.statistics import gini

DEEPSEEK_V3 = Router(top_k=8, num_groups=8, top_groups=4)


def drawn(
    popularity: Balanced | Multinomial | Lognormal, layers: int, experts: int, router: Router, seed: int = 0
) -> Popularities:
    return popularity_LE(
        popularity, num_layers=layers, num_experts=experts, router=router, rng=np.random.default_rng(seed)
    )


def enumerated_reach(weights: NDArray[np.float64], members: set[int], top_k: int) -> float:
    """P(one of members is among the first top_k of a sequential choice without replacement), by listing all orders."""
    total = 0.0
    for order in itertools.permutations(range(weights.size), top_k):
        if members & set(order):
            probability, left = 1.0, float(weights.sum())
            for expert in order:
                probability *= weights[expert] / left
                left -= weights[expert]
            total += probability
    return total


@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
@pytest.mark.parametrize("skew", [0.0, 1.0, 4.0])
def test_reach_equals_enumeration_of_all_ordered_choices(top_k: int, skew: float) -> None:
    log_weights = skew * np.random.default_rng(5).standard_normal(6)
    set_of_E = np.array([0, 1, 0, 2, 2, 1])
    reach = reach_of_sets(log_weights[None], set_of_E, top_k=top_k, num_sets=4)[0]
    expected = [
        enumerated_reach(np.exp(log_weights), set(np.nonzero(set_of_E == s)[0].tolist()), top_k) for s in range(4)
    ]
    assert reach == pytest.approx(expected, abs=1e-6)  # quadrature; sharp for small k


def test_inclusion_of_single_experts_sums_to_top_k_whatever_the_skew() -> None:
    for skew in (0.0, 0.5, 2.0, 8.0):
        log_weights_LE = skew * np.random.default_rng(1).standard_normal((3, 128))
        inclusion = reach_of_sets(log_weights_LE, np.arange(128), top_k=8, num_sets=128)
        assert inclusion.sum(axis=1) == pytest.approx(np.full(3, 8.0), abs=1e-6)
        assert inclusion.max() <= 1.0


def test_reach_of_equal_experts_is_hypergeometric() -> None:
    set_of_E = np.repeat(np.arange(4), [1, 3, 20, 40])
    quadrature = reach_of_sets(np.zeros((1, 64)), set_of_E, top_k=6, num_sets=4)[0]
    assert quadrature == pytest.approx(uniform_reach(64, 6, np.array([1, 3, 20, 40])), abs=1e-6)


@pytest.mark.parametrize("kind", [Balanced(), Multinomial(), Lognormal(gini=0.0)])
def test_equal_popularity_includes_every_expert_with_k_over_e(kind: Balanced | Multinomial | Lognormal) -> None:
    popularities = drawn(kind, 3, 64, Router(top_k=6))
    assert np.array_equal(popularities.inclusion_LE, np.full((3, 64), 6 / 64))
    assert popularities.is_uniform


@pytest.mark.parametrize("wanted", [0.05, 0.25, 0.6])
@pytest.mark.parametrize(
    ("layers", "experts", "router"),
    [(20, 256, DEEPSEEK_V3), (20, 256, Router(top_k=8)), (32, 8, Router(top_k=2)), (6, 512, Router(top_k=1))],
)
def test_the_expected_load_has_the_gini_that_was_asked_for(
    wanted: float, layers: int, experts: int, router: Router
) -> None:
    popularities = drawn(Lognormal(gini=wanted), layers, experts, router, seed=11)
    assert gini(popularities.inclusion_LE).mean() == pytest.approx(wanted, abs=0.005)
    assert popularities.inclusion_LE.sum(axis=1) == pytest.approx(np.full(layers, float(router.top_k)))
    assert popularities.inclusion_LE.max() <= 1.0


def test_group_limited_inclusion_agrees_with_the_numpy_oracle() -> None:
    popularities = drawn(Lognormal(gini=0.4), 1, 64, Router(top_k=4, num_groups=8, top_groups=3))
    num_tokens = 20_000
    choices = draw_choices(
        popularities.log_weights_LE[0], popularities.router, num_tokens, np.random.default_rng(9), engine="numpy"
    )
    seen = np.bincount(choices.ravel(), minlength=64) / num_tokens
    inclusion = popularities.inclusion_LE[0]
    deviation = np.sqrt(seen * (1 - seen) * (1 / num_tokens + 1 / 8192) + 1e-7)
    assert np.abs(seen - inclusion).max() < 5 * deviation.max()
    assert np.mean(((seen - inclusion) / deviation) ** 2) == pytest.approx(1.0, abs=0.6)  # 64 squared normals


def test_layers_are_drawn_independently() -> None:
    inclusion = drawn(Lognormal(gini=0.3), 2, 256, Router(top_k=8)).inclusion_LE
    assert (
        abs(np.corrcoef(inclusion[0], inclusion[1]).ravel()[1]) < 0.25
    )  # four standard deviations of 256 independent pairs


def test_a_gini_that_top_k_cannot_reach_is_refused() -> None:
    with pytest.raises(InputError, match=r"gini: must stay below 1 - k/E = 0\.75 \(top-2 of 8 experts\); got 0\.8"):
        drawn(Lognormal(gini=0.8), 4, 8, Router(top_k=2))
    with pytest.raises(InputError, match="must not exceed about"):
        drawn(Lognormal(gini=0.499), 4, 4, Router(top_k=2))
    with pytest.raises(InputError, match=r"at least 0\.0\d+ for a group-limited router"):
        drawn(Lognormal(gini=0.005), 4, 256, DEEPSEEK_V3)


def test_the_same_seed_draws_the_same_popularity() -> None:
    for router in (DEEPSEEK_V3, Router(top_k=8)):
        first, again = (drawn(Lognormal(gini=0.3), 2, 64, router, seed=4) for _ in range(2))
        assert np.array_equal(first.inclusion_LE, again.inclusion_LE)
        assert not np.array_equal(first.inclusion_LE, drawn(Lognormal(gini=0.3), 2, 64, router, seed=5).inclusion_LE)
