"""Replicas that are not simulated: folded where nothing tells them apart, else estimated from those that are."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.errors import InputError
from moesim.metrics.summary import summarise
from moesim.scenario import Scenario
from moesim.timeline.pipeline import expected_latest_s
from moesim.timeline.step import run_step

# Few tokens, so that replicas differ by chance as much as they ever do.
SMALL = {"model": "qwen3-30b-a3b", "cluster": "h100-8x-ib400", "ep": 8, "pp": 2, "gini": 0.3, "seq_len": 128}


def step(num_groups, replicas, **more):
    num_gpus = 16 * num_groups
    asked = {"num_gpus": num_gpus, "global_batch": 2 * num_gpus // 2, "replicas": replicas}
    return run_step(Scenario.make(**SMALL | asked | more))


@pytest.mark.parametrize(("num_groups", "replicas"), [(4, 2), (8, 2), (8, 4)])
def test_a_sample_of_replicas_gives_the_step_of_all_within_one_percent(num_groups, replicas):
    for seed in range(4):
        sample, whole = (step(num_groups, n, seed=seed) for n in (replicas, num_groups))
        assert sample.num_simulated_blocks == replicas < whole.num_simulated_blocks == num_groups
        assert sample.step_s == pytest.approx(whole.step_s, rel=0.01)
        parts = summarise(sample).step_parts_s
        assert sum(parts.values()) == pytest.approx(sample.step_s)


@pytest.mark.parametrize(("num_replicas", "slower"), [(16, 1.18), (8, 1.14), (2, 1.06)])
def test_the_slowest_of_many_is_expected_where_a_persistent_spread_puts_it(num_replicas, slower):
    rng = np.random.default_rng(0)
    draws = rng.normal(1.0, 0.1, (4000, num_replicas))
    assert draws.max(axis=1).mean() == pytest.approx(slower, abs=0.005)  # the field notes' figures for 10 %
    samples = draws[:, : max(num_replicas // 2, 2)]
    expected = np.mean([expected_latest_s(ended, num_replicas) for ended in samples])
    assert expected == pytest.approx(slower, rel=0.01)


def test_balanced_replicas_are_folded_and_their_number_changes_no_byte():
    even = {key: value for key, value in SMALL.items() if key != "gini"} | {"popularity": "balanced"}
    few, all_ = (run_step(Scenario.make(**even, num_gpus=128, global_batch=128, replicas=n)) for n in (2, 8))
    assert few.num_simulated_blocks == all_.num_simulated_blocks == 1
    assert few.step_s == all_.step_s
    assert summarise(few).step_parts_s == summarise(all_).step_parts_s


def test_what_tells_replicas_apart_has_all_of_them_simulated():
    assert step(8, 2, rank_speeds="3=0.8").num_simulated_blocks == 8
    traced = run_step(Scenario.make(**SMALL, num_gpus=128, global_batch=128, replicas=2), trace_ranks=[63])
    assert traced.num_simulated_blocks == 8
    with pytest.raises(InputError, match="scenario: replicas: must be at least 2; got 1"):
        Scenario.make(**SMALL, num_gpus=128, global_batch=128, replicas=1)
