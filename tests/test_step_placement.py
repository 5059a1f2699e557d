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


def test_padding_to_capacity_costs_compute_and_memory_and_sends_no_more():
    at = {"gini": 0.3, "capacity_factor": 1.5}
    plain = run_step(scenario(**at))
    raw = plain.scenario.to_dict()
    padded = run_step(Scenario.from_mapping(raw | {"routing": raw["routing"] | {"pad_to_capacity": True}}))
    one, other = summarise(plain), summarise(padded)
    assert other.step_parts_s["experts"] > 1.1 * one.step_parts_s["experts"]
    assert other.memory["activations_bytes"] > one.memory["activations_bytes"]
    assert other.step_parts_s["dispatch"] == one.step_parts_s["dispatch"]
    assert other.drop_fraction == one.drop_fraction


def test_the_study_counts_replicas_in_memory_as_the_step_does():
    asked = scenario(policy="search", num_slots=160)
    step, sampled = summarise(run_step(asked)), rank_memories(asked)
    for part in ("weights_bytes", "gradients_bytes", "optimizer_bytes"):
        assert max(getattr(memory, part) for memory in sampled) == step.memory[part]
