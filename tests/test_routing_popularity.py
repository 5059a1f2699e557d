"""Popularity, reach and visits: closed forms, enumeration, and the sampler as a referee."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from moesim.describe.model import Router
from moesim.describe.workload import Balanced, Lognormal, Multinomial
from moesim.errors import InputError
from moesim.placement import Placement, contiguous
from moesim.routing.popularity import Popularities, popularity_LE
from moesim.routing.reach import reach_of_sets, uniform_reach
from moesim.routing.sampler import draw_choices
from moesim.routing.statistics import gini
from moesim.routing.visits import visit_probabilities

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
    assert abs(np.corrcoef(inclusion)[0, 1]) < 0.25  # four standard deviations of 256 independent pairs


def test_a_gini_that_top_k_cannot_reach_is_refused() -> None:
    with pytest.raises(InputError, match=r"gini: must stay below 1 - k/E = 0\.75 \(top-2 of 8 experts\); got 0\.8"):
        drawn(Lognormal(gini=0.8), 4, 8, Router(top_k=2))
    with pytest.raises(InputError, match="must not exceed about"):
        drawn(Lognormal(gini=0.499), 4, 4, Router(top_k=2))
    with pytest.raises(InputError, match=r"at least 0\.0\d+ for a group-limited router"):
        drawn(Lognormal(gini=0.005), 4, 256, DEEPSEEK_V3)


@pytest.mark.parametrize(
    ("nodes", "distinct", "remote"),
    [(2, 1.99, 1.00), (4, 3.61, 2.71), (8, 5.29, 4.63), (16, 6.52, 6.12), (32, 7.27, 7.04)],
)
def test_expected_distinct_nodes_of_a_uniform_token_match_the_field_notes(
    nodes: int, distinct: float, remote: float
) -> None:
    popularities = drawn(Multinomial(), 1, 256, Router(top_k=8))
    visits = visit_probabilities(popularities, contiguous(256, 8 * nodes), np.arange(8 * nodes) // 8)
    assert visits.node_visits_LN.sum() == pytest.approx(distinct, abs=0.005)
    assert visits.node_visits_LN.sum() * (1 - 1 / nodes) == pytest.approx(remote, abs=0.005)


def test_group_limited_tokens_visit_about_four_of_eight_nodes() -> None:
    visits = visit_probabilities(drawn(Multinomial(), 2, 256, DEEPSEEK_V3), contiguous(256, 64), np.arange(64) // 8)
    assert visits.node_visits_LN.sum(axis=1) == pytest.approx(np.full(2, 3.98), abs=0.015)  # field notes, section 4
    assert np.ptp(visits.rank_visits_LR) == 0.0  # all ranks are alike by symmetry


def test_visits_under_skew_agree_with_drawn_tokens() -> None:
    popularities = drawn(Lognormal(gini=0.5), 1, 64, Router(top_k=4))
    rank_of_E = np.random.default_rng(2).permutation(np.arange(64) % 8)
    visits = visit_probabilities(popularities, Placement(expert_to_rank_E=rank_of_E, num_ranks=8), np.arange(8) // 2)
    choices = draw_choices(popularities.log_weights_LE[0], popularities.router, 40_000, np.random.default_rng(3))
    for r in range(8):
        assert visits.rank_visits_LR[0, r] == pytest.approx((rank_of_E[choices] == r).any(axis=1).mean(), abs=0.012)
    for n in range(4):
        seen = (rank_of_E[choices] // 2 == n).any(axis=1).mean()
        assert visits.node_visits_LN[0, n] == pytest.approx(seen, abs=0.012)  # five standard deviations of 40 k tokens


def test_pool_visits_and_pool_load_agree_where_a_rank_holds_one_expert() -> None:
    popularities = drawn(Lognormal(gini=0.3), 2, 32, Router(top_k=4, num_groups=4, top_groups=2))
    visits = visit_probabilities(popularities, contiguous(32, 32))
    assert visits.rank_visits_LR == pytest.approx(popularities.inclusion_LE)
    assert visits.node_visits_LN == pytest.approx(np.ones((2, 1)))


def test_permuting_expert_ids_with_their_map_changes_no_visit() -> None:
    popularities = drawn(Lognormal(gini=0.4), 2, 32, Router(top_k=4))
    order = np.random.default_rng(8).permutation(32)
    permuted = Popularities(
        router=popularities.router,
        log_weights_LE=popularities.log_weights_LE[:, order],
        inclusion_LE=popularities.inclusion_LE[:, order],
        sigma=popularities.sigma,
    )
    before = contiguous(32, 8)
    after = Placement(expert_to_rank_E=before.expert_to_rank_E[order], num_ranks=8)
    original, moved = visit_probabilities(popularities, before), visit_probabilities(permuted, after)
    assert moved.rank_visits_LR == pytest.approx(original.rank_visits_LR, abs=1e-9)


def test_the_same_seed_draws_the_same_popularity() -> None:
    for router in (DEEPSEEK_V3, Router(top_k=8)):
        first, again = (drawn(Lognormal(gini=0.3), 2, 64, router, seed=4) for _ in range(2))
        assert np.array_equal(first.inclusion_LE, again.inclusion_LE)
        assert not np.array_equal(first.inclusion_LE, drawn(Lognormal(gini=0.3), 2, 64, router, seed=5).inclusion_LE)
