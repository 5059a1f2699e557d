"""The planning study on a small scenario: what it holds, that it is the same each time, that its parts agree."""

import dataclasses
import itertools
import json
import math

import pytest

from moesim.errors import InputError
from moesim.metrics.step import MEMORY_PARTS
from moesim.scenario import Scenario
from moesim.study import links, planning, sizes
from moesim.study.planning import planning_study
from moesim.study.simulate import simulate

LEAVES = {
    "model": "mixtral-8x7b",
    "cluster": "h100-8x-ib400",
    "num_gpus": 32,
    "pp": 2,
    "ep": 8,
    "seq_len": 512,
    "global_batch": 64,
}
TOKENS = 1e12


@pytest.fixture(scope="module")
def scenario():
    return Scenario.make(**LEAVES)


@pytest.fixture(scope="module")
def said():
    return []


@pytest.fixture(scope="module")
def study(scenario, said):
    return planning_study(scenario, TOKENS, said.append)


def test_the_study_simulates_at_most_25_steps(scenario, monkeypatch):
    steps = []
    for module in (planning, links, sizes, __import__("moesim.study.twins", fromlist=["x"])):
        monkeypatch.setattr(module, "simulate", lambda s: steps.append(s) or simulate(s))
    planning_study(scenario, TOKENS)
    assert 10 < len(steps) <= 25
    assert len({(s.point_id, s.cluster.nic_bytes_per_s.value) for s in steps}) == len(steps), "none is simulated twice"


def test_the_study_is_the_same_each_time_and_plain_json(study, scenario):
    again = planning_study(scenario, TOKENS)
    text = json.dumps(study.to_dict(), allow_nan=False)
    assert text == json.dumps(again.to_dict(), allow_nan=False)
    assert json.loads(text) == study.to_dict()
    assert list(study.to_dict()) == sorted(study.to_dict())


def test_progress_says_what_comes_next(study, said):
    assert study is not None
    assert said[0] == "mixtral-8x7b on 32 GPUs"
    assert any("GB/s" in text for text in said)


def test_rows_are_a_long_table_with_units(study):
    rows = study.rows()
    assert all(len(row) == 5 for row in rows)
    keys = [row[:3] for row in rows]
    assert len(set(keys)) == len(keys), "section, name and x tell rows apart"
    units = {(section, name): unit for section, name, _, _, unit in rows}
    assert units["step", "step_s"] == "s"
    assert units["step", "tokens_per_s_per_gpu"] == "tokens/s"
    assert units["step", "headroom_bytes"] == "B"
    assert units["step", "mfu"] == "1"
    assert {"step", "dense_active", "dense_total", "twins", "nic_rate", "memory_over_ep", "drop_curve"} <= {
        row[0] for row in rows
    }


def test_the_moe_costs_more_than_its_active_twin_and_less_than_its_total_twin(study):
    assert study.twins.cost_over_active > 1.0
    assert study.twins.cost_over_total < 1.0
    assert study.twins.parameters["active"] < study.twins.parameters["total"]


def test_the_asked_network_speed_is_a_point_of_the_curves(study):
    even = study.break_even
    at = even.nic_bytes_per_s.index(even.asked_bytes_per_s)
    assert even.tokens_per_s_per_gpu["moe"][at] == study.step.tokens_per_s_per_gpu
    assert even.tokens_per_s_per_gpu["dense_total"][at] == study.twins.total.tokens_per_s_per_gpu
    for curve in even.tokens_per_s_per_gpu.values():
        assert all(low <= high * 1.001 for low, high in itertools.pairwise(curve)), "a faster network never hurts"


def test_a_break_even_is_where_both_cost_the_same():
    rates = (1.0, 4.0, 16.0, 64.0)

    def gain(rate: float) -> float:
        return math.log(rate / 7.0) + 0.1 * math.log(rate / 7.0) ** 3

    found = links._crossing(rates, [gain(rate) for rate in rates], gain)
    assert found == pytest.approx(7.0, rel=0.02)
    assert links._crossing(rates, [1.0, 2.0, 3.0, 4.0], gain) is None
    assert links._crossing(rates, [-1.0, 1.0, 3.0, 4.0], None) == pytest.approx(2.0)


def test_the_nic_rate_is_all_that_a_sweep_changes(scenario):
    slow = links.with_nic(scenario, 1e9)
    assert slow.cluster.nic_bytes_per_s.value == 1e9
    assert slow.cluster.nic_bytes_per_s.kind == "assumed"
    back = dataclasses.replace(slow.cluster, nic_bytes_per_s=scenario.cluster.nic_bytes_per_s)
    assert back == scenario.cluster
    assert (slow.parallel, slow.train, slow.routing, slow.model) == (
        scenario.parallel,
        scenario.train,
        scenario.routing,
        scenario.model,
    )


def test_memory_over_ep_agrees_with_the_simulated_step_and_falls(study):
    points = {point.ep: point for point in study.memory_over_ep}
    assert list(points) == [1, 2, 4, 8]
    assert points[8].memory == {part: study.step.memory[part] for part in points[8].memory}
    assert points[8].fits == study.step.fits
    weights = [points[ep].memory["weights_bytes"] for ep in (1, 2, 4, 8)]
    assert weights == sorted(weights, reverse=True)
    for point in points.values():
        parts = sum(point.memory[part] for part in MEMORY_PARTS)
        assert parts == pytest.approx(point.memory["peak_bytes"])


def test_drops_fall_and_padding_rises_with_the_capacity_factor(study):
    drops = [point.drop_fraction for point in study.drop_curve]
    padding = [point.padding_fraction for point in study.drop_curve]
    assert drops == sorted(drops, reverse=True)
    assert padding == sorted(padding)
    assert 0.25 <= drops[0] < 0.5, "a capacity of 0.75 of the mean drops at least a quarter"
    assert all(0 <= share < 1 for share in (*drops, *padding))


def test_the_drop_curve_holds_the_least_factor_that_drops_few(study, scenario):
    few = [point for point in study.drop_curve if point.drop_fraction <= 0.01]
    assert few, "a factor that drops few is always among them"
    less = few[0].capacity_factor - 0.02
    assert next(p for p in sizes.drop_curve(scenario, [less]) if p.capacity_factor == less).drop_fraction > 0.01


def test_balanced_routing_drops_exactly_what_does_not_fit(scenario):
    points = {p.capacity_factor: p for p in sizes.drop_curve(scenario.with_(popularity="balanced"))}
    assert points[0.75].drop_fraction == pytest.approx(0.25)
    assert points[1.0].drop_fraction == 0.0
    assert points[2.0].padding_fraction == pytest.approx(0.5)


def test_twice_the_gpus_take_about_half_the_days(study):
    points = {point.num_gpus: point for point in study.cluster_sizes}
    assert list(points) == [8, 16, 32, 64, 128]
    assert points[32].step_s == study.step.step_s
    assert points[32].days == pytest.approx(TOKENS / study.step.tokens_per_s / 86400)
    assert 0.5 <= points[64].days / points[32].days < 1.0


def test_a_smaller_cluster_halves_ep_and_says_so(study):
    small = study.cluster_sizes[0]
    assert (small.num_gpus, small.ep) == (8, 4)
    assert "ep=8 does not divide" in small.reason


def test_an_impossible_cluster_size_carries_its_reason():
    asked = Scenario.make(**LEAVES | {"num_gpus": 64, "pp": 4, "tp": 8, "ep": 2, "global_batch": 2})
    points = sizes.cluster_sizes(asked, TOKENS, simulate(asked))
    assert points[0].step_s is None
    assert "tp*cp*pp = 8*1*4 = 32 must divide num_gpus=16" in points[0].reason
    assert "must be a multiple of micro_batch*dp" in points[-1].reason


def test_a_dense_model_has_a_study_without_twins():
    study = planning_study(Scenario.make(**LEAVES | {"model": "llama-3-8b", "ep": 1}), TOKENS)
    assert study.twins is None
    assert study.break_even is None
    assert study.drop_curve == ()
    assert [point.ep for point in study.memory_over_ep] == [1]
    json.dumps(study.to_dict(), allow_nan=False)


@pytest.mark.parametrize("tokens", [0, -1.0])
def test_the_tokens_to_train_must_be_positive(scenario, tokens):
    with pytest.raises(InputError, match="tokens_to_train: must be positive"):
        planning_study(scenario, tokens)


def test_rows_of_load_are_named_where_the_multi_token_prediction_layer_is_trained(study):
    sizes_of = {"model": "deepseek-v3", "cluster": "h800-8x-ib400", "num_gpus": 64, "ep": 64, "global_batch": 64}
    trained = Scenario.make(**sizes_of, mtp=True)
    layers = dataclasses.replace(study, scenario=trained).load_layers
    assert layers == (*range(3, 61), 61)
    assert len(simulate(trained).load_LE) == len(layers)
