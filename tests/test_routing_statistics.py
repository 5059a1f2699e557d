"""Load statistics against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.routing import statistics as stat


def test_gini_of_equal_loads_is_zero_and_of_one_taker_is_its_supremum() -> None:
    assert stat.gini(np.full(256, 7.0)) == pytest.approx(0.0, abs=1e-12)
    assert stat.gini(np.eye(1, 256)[0]) == pytest.approx(255 / 256)


def test_gini_equals_mean_absolute_difference_over_twice_the_mean() -> None:
    load = np.random.default_rng(3).lognormal(size=40)
    by_pairs = np.abs(load[:, None] - load[None, :]).mean() / (2 * load.mean())
    assert stat.gini(load) == pytest.approx(by_pairs, rel=1e-12)


def test_gini_of_a_large_lognormal_sample_is_erf_of_half_sigma() -> None:
    import math

    load = np.random.default_rng(0).lognormal(sigma=0.8, size=400_000)
    assert stat.gini(load) == pytest.approx(math.erf(0.8 / 2), abs=0.003)  # sampling error of 400 k draws


def test_entropy_runs_from_zero_to_ln_of_the_number_of_experts() -> None:
    assert stat.entropy([5, 0, 0, 0]) == pytest.approx(0.0)
    assert stat.entropy([5, 5, 5, 5]) == pytest.approx(np.log(4))
    assert stat.entropy([1, 3], normalised=True) == pytest.approx(
        -(0.25 * np.log(0.25) + 0.75 * np.log(0.75)) / np.log(2)
    )


def test_spread_statistics_of_a_known_row() -> None:
    row = [1.0, 1.0, 1.0, 5.0]
    assert stat.cv(row) == pytest.approx(np.sqrt(3.0) / 2.0)
    assert stat.max_mean(row) == pytest.approx(2.5)
    assert stat.max_vio(row) == pytest.approx(1.5)
    assert stat.num_active_experts([0, 2, 0, 1]) == 2


def test_statistics_run_over_leading_axes_as_over_single_rows() -> None:
    load_MLE = np.random.default_rng(1).random((3, 5, 16))
    for function in (stat.gini, stat.entropy, stat.cv, stat.max_mean, stat.max_vio, stat.num_active_experts):
        together = function(load_MLE)
        assert together.shape == (3, 5)
        assert together[2, 4] == pytest.approx(function(load_MLE[2, 4]))


@pytest.mark.parametrize(("batch", "active"), [(8, 51.6), (16, 82.4), (32, 111.8), (64, 125.9)])
def test_expected_active_experts_match_the_field_notes(batch: int, active: float) -> None:
    assert stat.expected_active_experts(128, 8, batch) == pytest.approx(active, abs=0.05)


def test_alerts_name_the_experts_over_three_times_the_mean_hottest_first() -> None:
    load_LE = np.ones((2, 10))
    load_LE[0, 3], load_LE[1, 7] = 9.0, 90.0
    alerts = stat.load_alerts(load_LE)
    assert [(a.layer, a.expert) for a in alerts] == [(1, 7), (0, 3)]
    assert alerts[1].ratio == pytest.approx(9.0 / 1.8)
    assert stat.load_alerts(load_LE, ratio=9.5) == ()


def test_dead_experts_are_those_at_or_below_a_share_of_the_mean() -> None:
    assert stat.dead_experts([[0.0, 1.0, 2.0], [3.0, 3.0, 3.0]]) == ((0, 0),)
    assert stat.dead_experts([[0.02, 1.0, 2.0], [3.0, 3.0, 3.0]], share_of_mean=0.05) == ((0, 0),)


def test_a_row_without_load_has_no_statistic() -> None:
    with pytest.raises(AssertionError, match="not all zero"):
        stat.gini([[0.0, 0.0], [1.0, 2.0]])


def test_few_experts_of_which_a_token_takes_several_are_no_collapse() -> None:
    mixtral = np.ones(8)
    mixtral[0] = 7 / 3  # of 28/3 assignments of top-2 routing a quarter: half of all tokens, twice the even share
    assert stat.collapse_alerts(mixtral, top_k=2) == ()
    mixtral[0] = 3.2  # 63 % of the tokens
    assert len(stat.collapse_alerts(mixtral, top_k=2)) == 1
    assert stat.collapse_alerts(np.ones(4), top_k=4) == ()  # all experts serve all tokens, as they should


@pytest.mark.parametrize(("top_k", "num_experts"), [(1, 8), (2, 8), (8, 256), (4, 4)])
def test_the_limit_of_a_collapse_lies_halfway_from_the_even_share_to_all_tokens(top_k: int, num_experts: int) -> None:
    even = top_k / num_experts
    assert stat.collapse_from(top_k, num_experts) == pytest.approx((even + 1) / 2)
    assert stat.collapse_from(top_k, num_experts, share=0.0) == even


def test_a_router_collapses_when_one_expert_is_used_by_more_than_half_of_the_tokens_beyond_its_even_share() -> None:
    load_LE = np.ones((2, 8))
    load_LE[1, 2] = 6.0  # of 13 assignments of top-2 routing: 12/13 of the tokens
    assert stat.collapse_alerts(load_LE) == ()
    alerts = stat.collapse_alerts(load_LE, top_k=2)
    assert [(alert.layer, alert.expert) for alert in alerts] == [(1, 2)]
    assert alerts[0].ratio == pytest.approx(6 * 8 / 13)
    assert stat.collapse_alerts(load_LE, top_k=2, share=0.95) == ()


def test_load_statistics_hold_every_statistic_and_who_stands_out() -> None:
    load_LE = np.random.default_rng(2).random((3, 64)) + 0.5
    load_LE[0, 5], load_LE[2, 9] = 400.0, 0.001
    found = stat.load_statistics(load_LE)
    assert found.gini_L == pytest.approx(stat.gini(load_LE))
    assert found.entropy_L == pytest.approx(stat.entropy(load_LE, normalised=True))
    assert found.cv_L == pytest.approx(stat.cv(load_LE))
    assert found.max_vio_L == pytest.approx(found.max_mean_L - 1)
    assert found.num_active_L.tolist() == [64, 64, 64]
    assert [(alert.layer, alert.expert) for alert in found.hot] == [(0, 5)]
    assert [(alert.layer, alert.expert) for alert in found.collapsed] == [(0, 5)]
    assert found.dead == ((2, 9),)


def test_imbalance_that_changes_from_batch_to_batch_is_no_global_imbalance() -> None:
    load_SLE = np.ones((4, 1, 4))
    for step in range(4):
        load_SLE[step, 0, step] = 5.0
    assert stat.max_vio_global(load_SLE) == pytest.approx(0.0)
    assert stat.max_vio_batch(load_SLE) == pytest.approx(5 / 2 - 1)
    lasting = np.repeat(load_SLE[:1], 4, axis=0)
    assert stat.max_vio_global(lasting) == pytest.approx(stat.max_vio_batch(lasting))
