"""Balancing dynamics: closed forms of small deviations, collapse, histograms, and the published cases.

Fitted on the 1B case of the loss-free balancing paper, tested on its 3B case, whose numbers took no part in the fit.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from moesim.errors import InputError
from moesim.routing.balancing import (
    FITTED,
    AuxiliaryLoss,
    Balancing,
    BalancingRun,
    Dynamics,
    LossFreeBias,
    NoBalancing,
    NoisyGating,
    TrainingSetting,
    early_cost,
    fit_dynamics,
    simulate_balancing,
)
from moesim.routing.balancing_kernel import fluid_inclusion
from moesim.routing.reach import reach_of_sets
from moesim.routing.statistics import max_vio

STILL = Dynamics(
    drift=0.0,
    reinforcement=0.0,
    pull=1.0,
    gate_scale=0.16,
    sequence_noise=0.0,
    learning_rate=1e-3,
    batch_tokens=1152 * 2048,
)
# 64 routed experts, top-6: MaxVio_global 0.72 (auxiliary loss), 0.04 (loss-free). The weight 1e-3, the learning rates
# and the 3B case's batch are remembered from arXiv 2408.15664, not read again.
PAPER_1B = TrainingSetting(
    num_experts=64,
    top_k=6,
    num_layers=9,
    num_steps=42_000,
    sequences_per_batch=1152,
    seq_len=2048,
    learning_rate=1e-3,
)
PAPER_3B = replace(PAPER_1B, num_layers=11, num_steps=56_500, sequences_per_batch=1728, learning_rate=7.8e-4)
PAPER_WEIGHT = 1e-3
SMALL = replace(PAPER_1B, num_experts=16, top_k=2, num_layers=2, num_steps=2000, sequences_per_batch=256, seq_len=4096)


def run_of(
    policy: Balancing, setting: TrainingSetting, dynamics: Dynamics | None = None, seed: int = 0
) -> BalancingRun:
    return simulate_balancing(policy, setting, rng=np.random.default_rng(seed), dynamics=dynamics)


def sensitivity(num_experts: int, top_k: int) -> float:
    """Relative change of one expert's load per unit of its preference, others equal: w t exp(-w t) / inclusion."""
    time = -math.log1p(-top_k / num_experts)
    return time * math.exp(-time) / (top_k / num_experts)


# --- the load ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spread", "top_k"), [(0.0, 6), (0.5, 6), (2.0, 1), (5.0, 8), (30.0, 4)])
def test_inclusions_sum_to_k_from_any_first_guess(spread: float, top_k: int) -> None:
    offset_E = spread * np.random.default_rng(0).standard_normal(64)
    reached = []
    for guess in (0.0, 1e-3, 50.0):
        inclusion_E = np.empty(64)
        fluid_inclusion(offset_E, float(top_k), guess, inclusion_E)
        assert inclusion_E.sum() == pytest.approx(top_k, rel=1e-6)
        reached.append(inclusion_E)
    assert reached[1] == pytest.approx(reached[0], abs=1e-6)
    assert reached[2] == pytest.approx(reached[0], abs=1e-6)


def test_the_load_is_that_of_the_sampler() -> None:
    offset_E = 0.7 * np.random.default_rng(1).standard_normal(64)
    inclusion_E = np.empty(64)
    fluid_inclusion(offset_E, 6.0, 0.0, inclusion_E)
    exact_E = reach_of_sets(offset_E[None], np.arange(64), top_k=6, num_sets=64)[0]
    # The limit of many experts: off by order 1/k of the saturation, a few percent at k = 6.
    assert inclusion_E == pytest.approx(exact_E, rel=0.05)


# --- small deviations --------------------------------------------------------------------------------------------


def test_without_forces_nothing_moves() -> None:
    run = run_of(NoBalancing(), SMALL, STILL)
    assert np.ptp(run.max_vio_TL, axis=0).max() == 0.0
    assert run.final_max_vio == pytest.approx(float(run.max_vio_TL[0].mean()))


def test_small_imbalance_decays_under_the_auxiliary_loss_at_its_rate() -> None:
    setting = replace(SMALL, initial_spread=0.003, num_steps=500, seq_len=4096 * 10_000)  # no noise of counting
    rate = STILL.pull * 0.01 * sensitivity(16, 2)
    run = run_of(AuxiliaryLoss(weight=0.01), setting, STILL)
    decay = np.log(run.max_vio_TL[400] / run.max_vio_TL[0])
    assert decay == pytest.approx(np.full(2, 400 * math.log1p(-rate)), rel=0.015)  # second order in the spread


def test_small_imbalance_grows_by_reinforcement_at_its_rate() -> None:
    setting = replace(SMALL, initial_spread=0.01, num_steps=500)
    run = run_of(NoBalancing(), setting, replace(STILL, reinforcement=0.002))
    assert run.max_vio_TL[400] / run.max_vio_TL[0] == pytest.approx(
        np.full(2, math.exp(400 * 0.002 * sensitivity(16, 2))), rel=0.05
    )


def test_the_auxiliary_loss_must_outweigh_reinforcement() -> None:
    forces = replace(STILL, reinforcement=0.004)
    setting = replace(SMALL, initial_spread=0.1, num_steps=8000)
    holds, fails = (run_of(AuxiliaryLoss(weight=weight), setting, forces) for weight in (0.008, 0.002))
    assert holds.final_max_vio < 0.01
    assert holds.collapses == ()
    assert fails.final_max_vio > 1.0  # experts die until the loss can hold those that are left
    assert {one.what for one in fails.collapses} == {"died"}


def test_the_loss_free_bias_reaches_balance_as_fast_as_its_rate_allows() -> None:
    setting = replace(SMALL, initial_spread=0.5, num_steps=3000)
    steps = {}
    for rate in (0.001, 0.002):
        run = run_of(LossFreeBias(update_rate=rate), setting, STILL)
        reached = run.steps_until_balanced(0.05)
        assert reached is not None
        steps[rate] = reached
    assert steps[0.001] == pytest.approx(2 * steps[0.002], rel=0.05)
    # The farthest of 16 preferences lies about two spreads out: 1.0 * 0.16 / 0.001 = 160 steps, or a few times that.
    assert 60 < steps[0.001] < 400


def test_a_larger_bias_rate_ends_less_balanced() -> None:
    ends = [run_of(LossFreeBias(update_rate=rate), SMALL).final_max_vio for rate in (0.001, 0.01)]
    assert ends[1] > 2 * ends[0]


def test_noise_softens_the_load_but_holds_nothing_back() -> None:
    plain, noisy = (run_of(policy, SMALL, STILL) for policy in (NoBalancing(), NoisyGating(noise=2.0)))
    assert noisy.final_max_vio < 0.75 * plain.final_max_vio
    pushed = replace(STILL, reinforcement=0.01)
    assert run_of(NoisyGating(noise=2.0), SMALL, pushed).collapses
    assert not run_of(NoisyGating(noise=2.0, weight=0.1), SMALL, pushed).collapses


# --- what a run says ---------------------------------------------------------------------------------------------


def test_an_expert_that_takes_over_and_those_that_die_are_named_once_with_their_step() -> None:
    run = run_of(NoBalancing(), SMALL, replace(STILL, reinforcement=0.01))
    over = [one for one in run.collapses if one.what == "took over"]
    died = [one for one in run.collapses if one.what == "died"]
    assert {one.layer for one in over} == {0, 1}
    assert len({(one.layer, one.expert) for one in died}) == len(died) >= 10
    assert [one.step for one in run.collapses] == sorted(one.step for one in run.collapses)
    first = over[0]
    assert 0 < first.step < SMALL.num_steps
    # Halfway from an eighth to all of the tokens of a top-2 router with 16 experts: 4.5 times the mean.
    assert run.max_vio_TL[first.step, first.layer] > 3.5 >= run.max_vio_TL[first.step - 1, first.layer]


def test_histograms_are_taken_every_so_many_steps_and_hold_the_batch() -> None:
    run = simulate_balancing(LossFreeBias(), SMALL, rng=np.random.default_rng(0), dynamics=STILL, histogram_every=600)
    assert run.histogram.steps_S.tolist() == [0, 600, 1200, 1800]
    assignments = SMALL.batch_tokens * SMALL.top_k
    assert run.histogram.tokens_SLE.sum(axis=2) == pytest.approx(np.full((4, 2), assignments), abs=16)
    assert max_vio(run.histogram.tokens_SLE) == pytest.approx(run.max_vio_TL[[0, 600, 1200, 1800]], abs=1e-4)
    assert simulate_balancing(LossFreeBias(), SMALL, rng=np.random.default_rng(0)).histogram.steps_S.tolist() == [
        0,
        1000,
    ]


def test_one_seed_gives_one_run_however_often_histograms_are_taken() -> None:
    runs = [
        simulate_balancing(AuxiliaryLoss(), SMALL, rng=np.random.default_rng(7), histogram_every=every)
        for every in (1000, 77)
    ]
    assert np.array_equal(runs[0].max_vio_TL, runs[1].max_vio_TL)
    assert np.array_equal(runs[0].rank_max_mean_TL, runs[1].rank_max_mean_TL)
    assert not np.array_equal(runs[0].max_vio_TL, run_of(AuxiliaryLoss(), SMALL, seed=8).max_vio_TL)


def test_ranks_that_share_experts_wait_less_for_the_hottest() -> None:
    busiest = [
        float(run_of(NoBalancing(), replace(SMALL, num_ranks=ranks), STILL).rank_max_mean_TL[-1].mean())
        for ranks in (1, 4, 16)
    ]
    assert busiest[0] == pytest.approx(1.0)
    assert busiest[0] < busiest[1] < busiest[2]
    assert busiest[2] == pytest.approx(1.0 + run_of(NoBalancing(), SMALL, STILL).final_max_vio, rel=0.01)


def test_the_cost_of_the_first_hours_is_the_time_waited() -> None:
    run = run_of(NoBalancing(), SMALL, STILL)
    known = replace(
        run,
        rank_max_mean_TL=np.concatenate([np.full((500, 2), 3.0), np.full((1500, 2), 1.5)]).astype(np.float32),
    )
    # A balanced step of 2 s, half of it waiting for the busiest rank, takes 2 + 1 * (3 - 1) = 4 s at first.
    cost = early_cost(known, hours=500 * 4.0 / 3600, balanced_step_s=2.0, expert_fraction=0.5)
    assert (cost.num_steps, cost.mean_max_mean) == (500, pytest.approx(3.0))
    assert cost.lost_s == pytest.approx(500 * 2.0)
    assert cost.settled_lost_s == pytest.approx(500 * 0.5)


def test_policies_and_settings_outside_their_range_are_refused() -> None:
    with pytest.raises(InputError, match="balancing: weight: must not be negative; got -1"):
        AuxiliaryLoss(weight=-1)
    with pytest.raises(InputError, match="update_rate: must be finite"):
        LossFreeBias(update_rate=math.nan)
    with pytest.raises(InputError, match="top_k: must be below num_experts=16; got 16"):
        replace(SMALL, top_k=16)
    with pytest.raises(InputError, match="num_ranks: must divide num_experts=16; got 3"):
        replace(SMALL, num_ranks=3)
    with pytest.raises(InputError, match="gate_scale: must be positive; got 0"):
        replace(STILL, gate_scale=0)
    assert (AuxiliaryLoss().weight, LossFreeBias().update_rate) == (0.01, 0.001)


# --- published cases ---------------------------------------------------------------------------------------------


def test_the_fitted_dynamics_give_the_1b_case_they_were_fitted_on() -> None:
    shorter = replace(PAPER_1B, num_steps=20_000)
    # Nine layers over 2,000 correlated steps scatter by about 3 % (auxiliary loss); the fit itself used more.
    assert run_of(LossFreeBias(), shorter).final_max_vio == pytest.approx(0.04, rel=0.05)
    assert run_of(AuxiliaryLoss(weight=PAPER_WEIGHT), shorter).final_max_vio == pytest.approx(0.72, rel=0.10)


def test_the_3b_case_is_met_with_its_batch_and_learning_rate_as_remembered_and_missed_with_the_1b_ones() -> None:
    """A weak test, since nobody read the batch and the rate again: docs/decisions/balancing-from-one-case.md."""
    shorter = replace(PAPER_3B, num_steps=20_000)
    loss_free = run_of(LossFreeBias(), shorter).final_max_vio
    aux_loss = run_of(AuxiliaryLoss(weight=PAPER_WEIGHT), shorter).final_max_vio
    assert loss_free == pytest.approx(0.04, abs=0.01)
    assert aux_loss == pytest.approx(0.52, rel=0.15)
    # All of it comes from the batch and the learning rate, which are remembered: at the 1B case's nothing differs.
    same = run_of(AuxiliaryLoss(weight=PAPER_WEIGHT), replace(shorter, sequences_per_batch=1152, learning_rate=1e-3))
    assert same.final_max_vio > 1.2 * 0.52


@pytest.mark.slow
def test_fitting_again_gives_the_fitted_dynamics() -> None:
    fitted = fit_dynamics(
        FITTED,
        replace(PAPER_1B, num_layers=24),
        loss_free=LossFreeBias(),
        loss_free_max_vio=0.04,
        aux_loss=AuxiliaryLoss(weight=PAPER_WEIGHT),
        aux_loss_max_vio=0.72,
    )
    assert fitted.drift == pytest.approx(FITTED.drift, rel=0.05)
    assert fitted.pull == pytest.approx(FITTED.pull, rel=0.10)
