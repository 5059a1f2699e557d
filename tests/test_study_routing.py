"""The routing study: realised load, drops over skew and capacity, what skew costs, balance over training."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from moesim import Scenario, simulate
from moesim.errors import InputError
from moesim.seeds import stream
from moesim.study.balance import balance_over_training
from moesim.study.drops import token_drops
from moesim.study.routed import RoutedLoad, routed_base, routed_load
from moesim.study.routing import RoutingStudy, routing_study
from moesim.study.skew import cost_over_capacity, cost_over_skew
from moesim.timeline.load import redrawn
from tests.routed_cases import scenario, under


@pytest.fixture(scope="module")
def study() -> RoutingStudy:
    return routing_study(scenario(), num_steps=6)


def test_the_realised_load_is_the_one_that_the_step_is_simulated_with() -> None:
    load, popularities = routed_load(scenario())
    step = simulate(scenario())
    found = load.to_dict()
    assert np.allclose(found["load_LE"], step.load_LE)
    assert found["gini"] == pytest.approx(step.gini)
    assert found["max_mean"] == pytest.approx(step.max_mean_load)
    assert found["drop_fraction"] == pytest.approx(step.drop_fraction, abs=1e-6)
    assert found["drop_fraction_by_layer"] == pytest.approx(step.drop_fraction_by_layer)
    assert found["alerts"] == step.alerts
    assert np.allclose(popularities.inclusion_LE.sum(axis=1), 8)


def test_every_token_makes_k_assignments_in_every_layer() -> None:
    load, _ = routed_load(scenario())
    assert load.assigned_LE.sum(axis=1).tolist() == [32 * 1024 * 8] * 16
    assert load.assigned_LR.sum(axis=1).tolist() == [32 * 1024 * 8] * 16


def test_drops_by_expert_by_rank_and_by_layer_are_one_and_the_same_loss() -> None:
    load, _ = routed_load(scenario())
    lost = (load.drop_fraction_LE * load.assigned_LE).sum()
    assert lost > 0
    assert (load.drop_fraction_LR * load.assigned_LR).sum() == pytest.approx(lost)
    assert (load.tokens_lost_L * load.top_k).sum() == pytest.approx(lost)
    assert load.drop_fraction == pytest.approx(lost / load.assigned_LE.sum())


def hand_made() -> RoutedLoad:
    """One layer of four experts on two ranks; the first one overflows, the last gets nothing."""
    assigned_LE, kept_LE = np.array([[12.0, 3.0, 1.0, 0.0]]), np.array([[6.0, 3.0, 1.0, 0.0]])
    return RoutedLoad(
        layers=(5,),
        top_k=2,
        assigned_LE=assigned_LE,
        kept_LE=kept_LE,
        assigned_LR=assigned_LE.reshape(1, 2, 2).sum(axis=2),
        kept_LR=kept_LE.reshape(1, 2, 2).sum(axis=2),
        places=40.0,
        busiest_L=np.array([1.8]),
    )


def test_a_load_made_by_hand_gives_what_can_be_counted_by_hand() -> None:
    found = hand_made().to_dict()
    assert found["drop_fraction"] == pytest.approx(6 / 16)
    assert found["drop_fraction_by_expert"] == [[0.5, 0.0, 0.0, 0.0]]
    assert found["drop_fraction_by_rank"] == [[pytest.approx(6 / 15), 0.0]]
    assert found["tokens_lost_per_step"] == 3.0
    assert found["padding_fraction"] == pytest.approx(30 / 40)
    assert (found["max_mean"], found["max_vio"], found["num_active_experts"]) == (3.0, 2.0, 3)
    assert found["dead_experts"] == [{"layer": 5, "expert": 3}]
    assert found["alerts"] == []  # three times the mean is not over it
    assert found["collapsed_experts"] == [{"layer": 5, "expert": 0, "ratio": 3.0}]  # 12 of the 8 tokens' 16 choices
    assert found["by_layer"][0]["rank_max_mean"] == pytest.approx(9 / 5)


def test_an_alert_names_the_models_layer() -> None:
    crowded = dataclasses.replace(hand_made(), assigned_LE=np.array([[14.0, 1.0, 1.0, 0.0]]))
    assert crowded.to_dict()["alerts"] == [{"layer": 5, "expert": 0, "ratio": 3.5}]


def test_without_a_capacity_factor_nothing_is_dropped_and_nothing_padded() -> None:
    load, _ = routed_load(scenario(capacity_factor=None))
    assert (load.drop_fraction, load.padding_fraction, load.places) == (0.0, 0.0, None)


def test_a_dense_model_has_nothing_to_route() -> None:
    dense = Scenario.make(model="llama-3-8b", cluster="h100-8x-ib400", num_gpus=8, global_batch=8)
    with pytest.raises(InputError, match="must have experts to route to; got 'llama-3-8b'"):
        routed_load(dense)


def test_more_skew_drops_more_at_every_capacity_factor(study: RoutingStudy) -> None:
    table = np.array([[point.drop_fraction for point in curve.points] for curve in study.drop_curves])
    assert [curve.asked for curve in study.drop_curves].count(True) == 1
    assert (np.diff(table, axis=0) >= -1e-9).all()
    assert (np.diff(table, axis=1) <= 1e-9).all()


def test_the_asked_curve_agrees_with_the_drawn_step(study: RoutingStudy) -> None:
    asked = next(curve for curve in study.drop_curves if curve.asked)
    at_asked = next(point for point in asked.points if point.capacity_factor == 1.25)
    assert at_asked.drop_fraction == pytest.approx(study.load.drop_fraction, abs=2e-3)
    assert at_asked.padding_fraction == pytest.approx(study.load.padding_fraction, abs=2e-3)


def test_single_tokens_lose_what_the_counts_say(study: RoutingStudy) -> None:
    tokens = study.tokens
    assert tokens is not None
    assert tokens.num_tokens == 8 * 1024
    assert tokens.drop_fraction == pytest.approx(study.load.drop_fraction, abs=0.01)
    assert tokens.drop_fraction < tokens.hurt_fraction < 8 * tokens.drop_fraction
    assert tokens.lost_fraction < 0.01 * tokens.hurt_fraction  # eight experts rarely are full all at once
    assert token_drops(scenario(capacity_factor=None), routed_base(scenario()).popularities) is None


def test_a_share_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match=r"wanted_drop_fraction: must be at least 0, and below 1; got 1.5"):
        routing_study(scenario(), wanted_drop_fraction=1.5)


def test_without_drops_skew_costs_time_and_waiting() -> None:
    unhosted = scenario(cuda_graphs="full")  # so small a step waits for its host, whatever its kernels take
    points = [p for p in cost_over_skew(unhosted, ginis=(0.1, 0.6)) if p.capacity_factor is None]
    assert [p.popularity for p in points] == ["balanced", "lognormal", "asked", "lognormal"]
    assert (np.diff([p.step_s for p in points]) > 0).all()
    assert (np.diff([p.wait_s for p in points]) > 0).all()


def test_a_capacity_buys_time_for_drops(study: RoutingStudy) -> None:
    assert study.over_capacity[-1].capacity_factor is None
    assert (np.diff([p.drop_fraction for p in study.over_capacity]) < 0).all()
    unhosted = cost_over_capacity(scenario(cuda_graphs="full"), factors=(1.0, 1.25, 2.0, None))
    assert (np.diff([p.step_s for p in unhosted]) > 0).all()


def test_a_known_step_is_not_simulated_again(study: RoutingStudy) -> None:
    said: list[str] = []
    found = cost_over_capacity(scenario(), factors=(1.25, 2.0), step=study.step, progress=said.append)
    assert said == ["step, capacity factor 2"]
    assert found[0].step_s == study.step.step_s


def test_balancing_evens_the_scenarios_own_skew_out_and_costs_less_wait() -> None:
    curves = {
        curve.policy: curve
        for curve in balance_over_training(scenario(global_batch=1024), num_steps=1500, learning_rate=1e-3)
    }
    load, _ = routed_load(scenario())
    noisy = curves.pop("noisy_gating")  # noise evens out at once what the loss then holds
    assert noisy.max_vio[0] < curves["none"].max_vio[0]
    assert noisy.final_max_vio < curves["aux_loss"].final_max_vio
    first = [curve.max_vio[0] for curve in curves.values()]
    drawn = np.mean([row["max_vio"] for row in load.by_layer()])
    assert np.allclose(first, drawn, rtol=0.35)  # another draw of the same law, over 4 layers
    ends = [curves[name].final_max_vio for name in ("loss_free", "aux_loss", "none")]
    assert ends == sorted(ends)
    assert curves["loss_free"].steps_until_balanced is not None
    assert curves["none"].steps_until_balanced is None
    assert curves["loss_free"].lost_s < curves["aux_loss"].lost_s < curves["none"].lost_s


def test_a_redrawn_step_with_the_same_popularity_and_stream_is_the_step_itself() -> None:
    for asked in (scenario(), under({"kind": "megatron"}, pad_to_capacity=True), under({"kind": "rank_buffer"})):
        base = routed_base(asked)
        again = redrawn(asked, base, base.popularities, stream(asked.seed, "load"))
        assert np.array_equal(again.load.assigned_GMLE, base.load.assigned_GMLE)
        assert np.array_equal(again.kept_GMLS, base.kept_GMLS)
        assert np.array_equal(again.rows_GMLS, base.rows_GMLS)


def test_the_study_is_plain_values_and_a_table(study: RoutingStudy) -> None:
    plain = json.loads(json.dumps(study.to_dict(), allow_nan=False))
    assert plain["needed_capacity"]["wanted_drop_fraction"] == 0.01
    rows = study.rows()
    assert all(len(row) == 5 for row in rows)
    assert {row[0] for row in rows} >= {"route", "by_layer", "needed_capacity", "over_capacity"}
