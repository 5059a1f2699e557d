"""Placements made a while ago, what moving to another costs, and how many slots fit in memory."""

import dataclasses

import numpy as np
import pytest

from moesim.errors import InputError
from moesim.metrics.summary import summarise
from moesim.scenario import Scenario
from moesim.study.place import slots_that_fit
from moesim.study.placement import placement_study
from moesim.timeline.load import step_load
from moesim.timeline.step import run_step
from tests.test_cli_runs import answer, moesim

RAW = {
    "model": "olmoe-1b-7b",
    "cluster": "h100-8x-ib400",
    "num_gpus": 32,
    "parallel": {"pp": 2, "ep": 16},
    "train": {"seq_len": 2048, "micro_batch": 2, "global_batch": 32},
    "routing": {"popularity": {"kind": "lognormal", "gini": 0.4, "correlation": {"drift_steps": 1000}}},
}


def scenario(age_steps: int, policy: str = "search") -> Scenario:
    return Scenario.from_mapping(RAW | {"placement": {"policy": policy, "age_steps": age_steps}})


def busiest(asked: Scenario) -> float:
    """Load of the busiest rank over the mean, over layers, in the step."""
    drawn = step_load(asked)
    load_LR = drawn.placement.rank_loads(drawn.kept_GMLS.sum(axis=(0, 1)))
    return float((load_LR.max(axis=1) / load_LR.mean(axis=1)).mean())


def test_the_load_drifts_away_from_its_placement_and_the_step_gets_longer() -> None:
    ages = [busiest(scenario(age)) for age in (0, 100, 1000, 100_000)]
    assert ages[0] < ages[1] < ages[2]
    assert ages[3] > 1.1 * ages[0]
    fresh, stale = (summarise(run_step(scenario(age))) for age in (0, 1000))
    assert stale.wait_s > fresh.wait_s
    assert stale.gini == pytest.approx(fresh.gini, abs=0.02), "the skew is what it was, on other experts"


def test_an_old_placement_is_the_one_that_was_made_then() -> None:
    now, then = step_load(scenario(1000)).placed.layers, step_load(scenario(0)).placed.layers
    assert np.array_equal(now.physical_to_logical_LS, then.physical_to_logical_LS)


def test_a_placement_without_drift_does_not_age() -> None:
    still = RAW | {"routing": {"popularity": {"kind": "lognormal", "gini": 0.4}}}
    with pytest.raises(InputError, match=r"age_steps: needs routing.popularity.correlation.drift_steps"):
        Scenario.from_mapping(still | {"placement": {"age_steps": 5}})


def test_the_study_compares_todays_stale_layout_with_fresh_ones() -> None:
    study = placement_study(scenario(1000), policies=("contiguous", "search"), slots=(64,))
    fresh = next(point for point in study.by_policy if point.policy == "search")
    assert study.base.policy == "search"
    assert fresh is not study.base
    assert fresh.max_mean < study.base.max_mean
    assert fresh.step.step_s < study.base.step.step_s
    assert fresh.migration.num_moved_slots > 0


def test_place_tells_bytes_and_stall_of_moving_and_how_the_layout_ages(tmp_path) -> None:
    options = ["--model", "olmoe-1b-7b", "--cluster", "h100-8x-ib400", "--num-gpus", "32", "--ep", "16", "--pp", "2"]
    options += ["--seq-len", "512", "--global-batch", "32", "--gini", "0.4"]
    first = answer("place", *options, "--policy", "contiguous", "--out", str(tmp_path))["result"]
    assert first["migration"] is None
    previous = ["--previous", str(tmp_path / "physical_to_logical.json")]
    moved = answer("place", *options, *previous)["result"]
    assert moved["migration"]["num_moved_slots"] == sum(moved["moved_slots"]) > 0
    each_bytes = (
        3 * 2048 * 1024 * (2 + 12 / 1)
    )  # three products of an expert: BF16 weights, Adam's states on one replica
    total = moved["migration"]["nvlink_bytes"] + moved["migration"]["nic_bytes"]
    assert total == pytest.approx(moved["migration"]["num_moved_slots"] * each_bytes)
    assert moved["migration"]["stall_s"] > moved["migration"]["nic_bytes"] / 2 / 16 / 50e9, "over the mean port's time"
    ages = moved["staleness"]["max_mean"]
    assert ages[0] == pytest.approx(np.mean(moved["max_mean"]))
    assert ages[-1] > ages[0]
    _, shown, _ = moesim("place", *options, *previous)
    assert "Training stalls for" in shown


@pytest.mark.parametrize("zero", [0, 1])
def test_the_slots_that_fit_are_those_of_the_simulated_memory(zero: int) -> None:
    sizes = {"model": "olmoe-1b-7b", "cluster": "h100-8x-ib400", "num_gpus": 32, "ep": 16, "pp": 2, "zero": zero}
    asked = Scenario.make(**sizes, seq_len=512, global_batch=32, gini=0.3, policy="search")
    gpu = asked.cluster.gpu
    held = dataclasses.replace(gpu.memory_bytes, value=20e9)
    asked = asked.with_(cluster=dataclasses.replace(asked.cluster, gpu=dataclasses.replace(gpu, memory_bytes=held)))
    fitting = slots_that_fit(asked)
    assert fitting % 16 == 0
    assert 64 < fitting < 64 * 16
    assert summarise(run_step(asked.placed_anew("search", fitting))).fits
    assert not summarise(run_step(asked.placed_anew("search", fitting + 32))).fits, "a slot per GPU for chance in loads"


def test_place_warns_of_slots_that_do_not_fit() -> None:
    options = [
        "--model",
        "qwen3-235b-a22b",
        "--cluster",
        "h100-8x-ib400",
        "--num-gpus",
        "64",
        "--ep",
        "16",
        "--pp",
        "4",
    ]
    options += ["--ep", "16", "--pp", "4", "--seq-len", "512", "--global-batch", "32", "--policy", "contiguous"]
    found = answer("place", *options, "--num-slots", "256")
    assert found["result"]["num_slots_that_fit"] < 256
    assert any("256 slots do not fit in memory" in warning for warning in found["warnings"])
