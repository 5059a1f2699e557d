"""Visits of ranks and nodes: closed forms, the field notes' vectors, and the sampler as a referee."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesim.describe.model import Router
from moesim.describe.workload import Balanced, Lognormal, Multinomial
from moesim.placement import Placement, contiguous
from moesim.routing.popularity import Popularities, popularity_LE
from moesim.routing.sampler import draw_choices
from moesim.routing.visits import visit_probabilities

DEEPSEEK_V3 = Router(top_k=8, num_groups=8, top_groups=4)


def drawn(
    popularity: Balanced | Multinomial | Lognormal, layers: int, experts: int, router: Router, seed: int = 0
) -> Popularities:
    return popularity_LE(
        popularity, num_layers=layers, num_experts=experts, router=router, rng=np.random.default_rng(seed)
    )


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


def test_a_token_visits_a_set_once_however_many_of_its_experts_it_picks_and_none_where_it_is_dropped() -> None:
    pool_LTK = np.array([[[0, 1], [0, 2], [3, -1], [-1, -1]]], dtype=np.int16)
    popularities = replace(
        drawn(Lognormal(gini=0.3), 1, 4, Router(top_k=2, num_groups=2, top_groups=1)), pool_LTK=pool_LTK
    )
    visits = visit_probabilities(popularities, contiguous(4, 2))
    assert visits.rank_visits_LR.tolist() == [[2 / 4, 2 / 4]]
    assert visits.node_visits_LN.tolist() == [[3 / 4]]


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
