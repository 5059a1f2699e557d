"""What would make a step fit: every way told does, in the order of its predicted cost; modules by predicted cost."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from moesim.cli.app import app
from moesim.cost.recompute import useful_modules
from moesim.scenario import Scenario
from moesim.study.advice import changes
from moesim.study.fits import headroom_bytes, module_choices, predicted_step_s, remedies, ways_to_fit, with_headroom
from moesim.study.sizes import rank_memories
from moesim.timeline.step import run_step

TIGHT: dict[str, Any] = {
    "model": "moonlight-16b-a3b",
    "cluster": "h100-8x-ib400",
    "num_gpus": 8,
    "tp": 2,
    "ep": 8,
    "pp": 1,
    "micro_batch": 5,
    "global_batch": 60,
    "popularity": "balanced",
    "profile": "datasheet",
}


@pytest.fixture(scope="module")
def tight() -> Scenario:
    return Scenario.make(**TIGHT)


def test_every_way_told_makes_it_fit_and_they_stand_in_the_order_of_their_cost(tight: Scenario) -> None:
    assert headroom_bytes(tight) < 0
    ways = ways_to_fit(tight)
    assert len(ways) >= 3
    costs = [way.cost_fraction for way in ways]
    assert costs == sorted(costs)
    capacity = tight.cluster.gpu.memory_bytes.value
    base_s = run_step(tight).step_s
    for way in ways:
        changed = tight.with_(**way.leaves)
        assert max(memory.peak_bytes for memory in rank_memories(changed)) <= capacity
        assert run_step(changed).step_s / base_s - 1 == pytest.approx(way.cost_fraction, abs=0.02)


def test_a_step_that_fits_needs_no_way(tight: Scenario) -> None:
    assert ways_to_fit(tight.with_(micro_batch=1)) == ()
    assert module_choices(tight.with_(micro_batch=1)) == []


def test_modules_are_the_fewest_of_those_that_cost_the_least_time_for_a_byte(tight: Scenario) -> None:
    ((leaves, _),) = module_choices(tight)
    chosen = leaves["recompute"].split(",")
    base_s, free = predicted_step_s(tight), headroom_bytes(tight)

    def cost(module: str) -> float:
        alone = tight.with_(recompute=module)
        saved = headroom_bytes(alone) - free
        return (predicted_step_s(alone) - base_s) / saved if saved > 0 else float("inf")

    dearest = max(cost(module) for module in chosen)
    assert all(cost(module) >= dearest for module in useful_modules(tight.model) if module not in chosen)
    fewer = sorted(chosen, key=cost)[:-1]
    assert headroom_bytes(tight.with_(recompute=",".join(fewer))) < 0 <= headroom_bytes(tight.with_(**leaves))


def test_a_step_of_many_micro_batches_is_predicted_from_one_fill_of_the_pipeline() -> None:
    scenario = Scenario.make(
        model="qwen3-30b-a3b", cluster="h100-8x-ib400", num_gpus=32, pp=4, ep=8, global_batch=512, profile="datasheet"
    )
    assert predicted_step_s(scenario) == pytest.approx(run_step(scenario).step_s, rel=0.05)


def test_each_remedy_that_is_possible_lowers_memory_or_is_not_one(tight: Scenario) -> None:
    free = headroom_bytes(tight)
    tried = with_headroom(tight, remedies(tight))
    helped = {name for leaves, _, headroom in tried if headroom > free for name in leaves}
    assert {"recompute", "offload", "fused_loss", "moments", "tp", "zero"} <= helped


def test_advice_begins_with_the_ways_to_fit_and_no_larger_micro_batch(tight: Scenario) -> None:
    options = changes(tight)
    names = {change.name for change in options if change.fits}
    assert {way.name for way in ways_to_fit(tight)} <= names
    assert all(not change.fits for change in options if change.leaves.get("micro_batch", 0) > 5)


def test_simulate_tells_ways_to_fit_where_asked() -> None:
    settings = [part for name, value in TIGHT.items() for part in ("--set", f"{name}={value}")]
    found = CliRunner().invoke(app, ["simulate", *settings, "--fit", "--json"])
    assert found.exit_code == 0, found.output
    ways = json.loads(found.stdout)["result"]["ways_to_fit"]
    assert ways
    assert set(ways[0]) == {"settings", "words", "headroom_bytes", "cost_fraction"}
    told = CliRunner().invoke(app, ["simulate", *settings, "--fit"])
    assert "What would make it fit" in told.stdout
