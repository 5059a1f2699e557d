"""Placement and replicas reach the step: loads, traffic, memory, time."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moesim.catalog.models import load_model
from moesim.describe.parameters import parameters_by_part
from moesim.errors import InputError
from moesim.metrics.summary import summarise
from moesim.scenario import Scenario
from moesim.study.sizes import rank_memories
from moesim.timeline.load import step_load
from moesim.timeline.step import run_step

ASKED = {
    "model": "qwen3-30b-a3b",
    "cluster": "h100-8x-ib400",
    "num_gpus": 64,
    "ep": 32,
    "global_batch": 256,
    "gini": 0.35,
}


EVEN = {**{k: v for k, v in ASKED.items() if k != "gini"}, "popularity": "balanced"}


def scenario(**changes):
    return Scenario.make(**{**ASKED, **changes})


def result(**changes):
    return summarise(run_step(scenario(**changes)))


def test_a_searched_placement_shortens_the_wait_that_skew_makes():
    contiguous, searched = result(), result(policy="search")
    assert searched.wait_s < 0.8 * contiguous.wait_s
    assert searched.step_s < contiguous.step_s
    assert searched.gini == contiguous.gini  # of experts: where they live changes nothing


def test_replicas_shorten_it_further_and_cost_memory_and_gradient_traffic():
    searched, replicated = result(policy="search"), result(policy="search", num_slots=160)
    assert replicated.wait_s <= searched.wait_s * 1.001
    held = parameters_by_part(load_model("qwen3-30b-a3b"))["experts"] / 32  # experts on each rank, without replicas
    assert replicated.memory["weights_bytes"] - searched.memory["weights_bytes"] == pytest.approx(0.25 * held * 2)
    assert replicated.memory["gradients_bytes"] - searched.memory["gradients_bytes"] == pytest.approx(0.25 * held * 4)
    assert replicated.step_parts_s["gradient_reduction"] > searched.step_parts_s["gradient_reduction"]


@pytest.mark.parametrize(
    "changes",
    [{}, {"policy": "striped"}, {"policy": "eplb", "num_slots": 160}, {"policy": "search", "num_slots": 192}],
    ids=str,
)
def test_slots_hold_every_assignment_once(changes):
    load = run_step(scenario(**changes)).load
    assert load.kept_GMLS.sum() == pytest.approx(load.load.kept_GMLE.sum(), rel=1e-6)
    by_expert = np.zeros_like(load.load.kept_GMLE[0, 0], dtype=np.float64)
    for layer, expert_S in enumerate(load.placed.layers.physical_to_logical_LS):
        np.add.at(by_expert[layer], expert_S, load.kept_GMLS[0, 0, layer])
    assert by_expert == pytest.approx(load.load.kept_GMLE[0, 0], rel=1e-5)


def test_an_even_load_ties_all_placements():
    steps = [
        summarise(run_step(Scenario.make(**EVEN, policy=policy))).step_s
        for policy in ("contiguous", "striped", "search")
    ]
    assert steps == pytest.approx([steps[0]] * 3, rel=1e-9)


def test_one_expert_on_each_rank_leaves_nothing_to_rearrange():
    contiguous, searched = (result(ep=128, num_gpus=128, policy=policy) for policy in ("contiguous", "search"))
    assert searched.step_parts_s["experts"] == pytest.approx(contiguous.step_parts_s["experts"], rel=1e-6)


def test_a_map_of_ones_own_is_read_and_a_wrong_one_refused(tmp_path):
    at = scenario()
    order = np.random.default_rng(0).permutation(128)
    rank_of_expert = np.empty(128, dtype=int)
    rank_of_expert[order] = np.arange(128) // 4
    (tmp_path / "map.json").write_text(json.dumps({"expert_to_rank": rank_of_expert.tolist()}))
    mapped = run_step(at.with_(policy="map", map=str(tmp_path / "map.json")))
    assert mapped.load.placed.layers.physical_to_logical_LS.shape == (48, 128)
    assert mapped.step_s != run_step(at).step_s
    (tmp_path / "map.json").write_text(json.dumps({"expert_to_rank": [0] * 128}))
    with pytest.raises(InputError, match="must put 4 experts on rank 0"):
        run_step(at.with_(policy="map", map=str(tmp_path / "map.json")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_slots": 130}, "must be a multiple of num_ranks=32"),
        ({"num_slots": 96}, "must be at least the model's num_experts=128"),
        ({"policy": "map"}, "must name a file where policy is map"),
        ({"policy": "serch"}, "Did you mean search"),
    ],
)
def test_an_impossible_placement_is_refused_by_name(changes, message):
    with pytest.raises(InputError, match=message):
        run_step(scenario(**changes))


def routed(base: Scenario, **routing: object) -> Scenario:
    """The scenario with other fields of its routing."""
    raw = base.to_dict()
    return Scenario.from_mapping(raw | {"routing": raw["routing"] | routing})


def test_padding_to_capacity_costs_compute_memory_and_traffic_and_drops_the_same():
    plain = scenario(gini=0.3, capacity_factor=1.5)
    one, other = (summarise(run_step(asked)) for asked in (plain, routed(plain, pad_to_capacity=True)))
    assert other.step_parts_s["experts"] > 1.1 * one.step_parts_s["experts"]
    assert other.step_parts_s["dispatch"] > 1.5 * one.step_parts_s["dispatch"]
    assert other.step_parts_s["permute"] > 1.05 * one.step_parts_s["permute"]
    assert other.memory["activations_bytes"] > one.memory["activations_bytes"]
    assert other.drop_fraction == one.drop_fraction


def test_padded_buffers_travel_whole_whatever_the_skew():
    """Megatron: each rank sends every expert ceil(T*k/E*factor) rows; two factors tell the rate and the latency."""

    def dispatch_s(factor: float, gini: float) -> np.ndarray:
        padded = routed(scenario(gini=gini, capacity_factor=factor), pad_to_capacity=True)
        return step_load(padded).exchange_by_stage[0].combine_s_GMLR

    assert np.ptp(dispatch_s(1.0, 0.3)) < 1e-5 * dispatch_s(1.0, 0.3).max(), "counted in float32"
    assert dispatch_s(1.0, 0.3).max() == pytest.approx(dispatch_s(1.0, 0.0).max())
    one, two, four = (float(dispatch_s(factor, 0.3).max()) for factor in (1.0, 2.0, 4.0))
    assert four - two == pytest.approx(2 * (two - one), rel=1e-4)
    assert two > 1.8 * one, "latency is the smaller part"


def test_what_megablocks_drops_has_travelled_and_what_it_pads_has_not():
    free = scenario(gini=0.3)
    limited = routed(free, capacity_factor=1.0, capacity={"kind": "megablocks"})
    padded = routed(limited, pad_to_capacity=True)
    all_of, some, more = (summarise(run_step(asked)) for asked in (free, limited, padded))
    assert some.drop_fraction > 0.05
    assert some.step_parts_s["dispatch"] == pytest.approx(all_of.step_parts_s["dispatch"])
    assert more.step_parts_s["dispatch"] == pytest.approx(all_of.step_parts_s["dispatch"])
    before_sending = summarise(run_step(routed(free, capacity_factor=1.0)))
    assert before_sending.step_parts_s["dispatch"] < 0.97 * all_of.step_parts_s["dispatch"]


def test_a_dispatcher_that_takes_no_padded_buffers_sends_what_it_keeps():
    plain = routed(scenario(gini=0.3, capacity_factor=1.5), dispatcher="deepep")
    one, other = (summarise(run_step(asked)) for asked in (plain, routed(plain, pad_to_capacity=True)))
    assert other.step_parts_s["dispatch"] == one.step_parts_s["dispatch"]
    assert other.step_parts_s["experts"] > 1.1 * one.step_parts_s["experts"]


def test_the_study_counts_replicas_in_memory_as_the_step_does():
    asked = scenario(policy="search", num_slots=160)
    step, sampled = summarise(run_step(asked)), rank_memories(asked)
    for part in ("weights_bytes", "gradients_bytes", "optimizer_bytes"):
        assert max(getattr(memory, part) for memory in sampled) == step.memory[part]
