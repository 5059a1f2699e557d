"""The fast path against the event engine."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from moesim.metrics.step import STEP_PARTS
from moesim.scenario import Scenario
from moesim.study.fast import FastPath, FastStep, Refused, engine_step
from moesim.study.fast_error import differences
from moesim.study.sweep_points import compute
from moesim.timeline.pipeline import expected_largest

SMALL = {"model": "olmoe-1b-7b", "cluster": "h100-8x-ib400", "num_gpus": 16, "ep": 8, "global_batch": 64}


def test_a_dozen_random_balanced_configurations_are_the_engines_within_1_percent_and_refusals_word_for_word() -> None:
    found = differences({"popularity": "balanced"}, 12, seed=1)
    assert max(abs(one.step_error) for one in found) < 0.01
    assert max(abs(one.peak_error) for one in found) < 0.01


def test_a_dozen_random_skewed_configurations_are_within_8_percent_of_the_engine() -> None:
    errors = [abs(one.step_error) for one in differences({"gini": 0.25}, 12, seed=2)]
    assert np.median(errors) < 0.03
    assert max(errors) < 0.08


def test_a_pass_of_skewed_weight_gradients_ends_with_the_rank_that_has_most_over_all_its_layers() -> None:
    base = Scenario.make(
        model="mixtral-8x7b",
        cluster="h100-8x-ib400",
        num_gpus=32,
        pp=2,
        ep=8,
        etp=2,
        global_batch=64,
        schedule="zb-h1",
        gini=0.25,
    )
    fast, engine = FastPath(base).step(base), engine_step(base)
    assert fast.step_s == pytest.approx(engine.step_s, rel=0.005)
    assert fast.wait_s == pytest.approx(engine.wait_s, rel=0.02)
    assert fast.step_s < 0.97 * FastPath(base)([{"schedule": "1f1b"}])[0].step_s  # where each layer's exchange waits


@pytest.mark.slow
def test_200_random_configurations_keep_the_promised_errors_of_step_and_memory() -> None:
    balanced = differences({"popularity": "balanced"}, 200, seed=3)
    assert max(abs(one.step_error) for one in balanced) < 0.01
    assert max(abs(one.peak_error) for one in balanced) < 0.01
    skewed = differences({"gini": 0.25}, 200, seed=4)
    assert np.median([abs(one.step_error) for one in skewed]) < 0.03
    assert np.quantile([abs(one.step_error) for one in skewed], 0.95) < 0.08


def test_a_step_drawn_out_over_many_micro_batches_is_the_engines() -> None:
    base = Scenario.make(**SMALL, popularity="balanced", pp=2).with_(ep=4, vpp=2, global_batch=1024)
    fast = FastPath(base)([{}])[0]
    assert isinstance(fast, FastStep)
    assert fast.step_s == pytest.approx(engine_step(base).step_s, rel=1e-6)


def test_the_parts_of_a_step_are_the_engines_and_sum_to_it() -> None:
    base = Scenario.make(**SMALL, popularity="balanced", pp=2, zero=2).with_(ep=4)
    fast, engine = FastPath(base).step(base), engine_step(base)
    assert sum(fast.parts.values()) == pytest.approx(fast.step_s)
    for part in STEP_PARTS:
        assert fast.parts[part] == pytest.approx(engine.parts[part], abs=1e-3 * engine.step_s), part
    assert fast.exposed_comm_s == pytest.approx(engine.exposed_comm_s, rel=0.01)


def test_what_the_fast_path_does_not_know_is_asked_of_the_engine() -> None:
    base = Scenario.make(**SMALL, overlap="shared_experts,tensor_parallel")
    assert FastPath(base)([{"ep": 4}]) == [engine_step(base.with_(ep=4))]


def test_other_names_than_the_axes_start_a_base_of_their_own() -> None:
    base = Scenario.make(**SMALL)
    other, refused = FastPath(base)([{"gini": 0.5, "ep": 4}, {"gini": 0.5, "ep": 3}])
    assert other == FastPath(base.with_(gini=0.5))([{"ep": 4}])[0]
    assert isinstance(refused, Refused)
    assert "ep=3 does not divide" in refused.reason


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1"])
def test_peak_memory_under_every_schedule_is_the_engines(schedule: str) -> None:
    base = Scenario.make(**SMALL | {"global_batch": 256, "ep": 4}, popularity="balanced", pp=4, schedule=schedule)
    assert FastPath(base).step(base).peak_bytes == pytest.approx(engine_step(base).peak_bytes, rel=1e-3)


def test_order_and_company_of_configurations_change_nothing() -> None:
    base = Scenario.make(**SMALL)
    configurations = [{"ep": ep, "micro_batch": b} for ep in (2, 4, 8) for b in (1, 2)]
    forth, back = FastPath(base)(configurations), FastPath(base)(configurations[::-1])[::-1]
    assert forth == back
    assert forth[1] == FastPath(base)(configurations[1:2])[0]


def test_a_sweep_by_fast_has_the_fast_paths_numbers() -> None:
    base = Scenario.make(**SMALL)
    (outcome,), _ = compute("fast", [base])
    step = FastPath(base).step(base)
    assert outcome["result"]["step_s"] == step.step_s
    assert outcome["result"]["step_parts_s.experts"] == step.parts["experts"]
    assert outcome["result"]["memory.peak_bytes"] == step.peak_bytes  # as the engine names it
    assert set(outcome["result"]) >= {f.name for f in dataclasses.fields(FastStep)} - {"parts", "peak_bytes"}


def test_the_expected_largest_of_normal_numbers_is_near_what_drawing_them_gives() -> None:
    drawn = np.random.default_rng(0).standard_normal((20_000, 16)).max(axis=1).mean()
    assert expected_largest(16) == pytest.approx(drawn, rel=0.02)
    assert expected_largest(1) == 0.0
