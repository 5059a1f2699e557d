"""Memory over steps as a simulated step tells it: a part of each step stands for all of it, and nothing is made up."""

import dataclasses

import numpy as np
import pytest

from moesim.metrics import memory as memory_of_steps
from moesim.metrics.memory import expected_redraw, memory_over_steps
from moesim.scenario import Scenario
from moesim.study.simulate import simulate
from moesim.timeline.load import step_load
from moesim.units import GIB

SIZES = {"model": "olmoe-1b-7b", "cluster": "h100-8x-ib400", "num_gpus": 32, "ep": 8, "pp": 2, "micro_batch": 8}
SIZES |= {"seq_len": 4096, "global_batch": 512, "gini": 0.5}


def scenario(**changes: object) -> Scenario:
    return Scenario.make(**SIZES | changes)


@pytest.mark.parametrize("redraw", ["counts", "favourites"])
def test_a_part_of_each_step_gives_the_law_of_whole_steps(redraw: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = scenario()
    base = step_load(asked)
    whole = memory_over_steps(asked, 24, redraw=redraw, base=base)
    monkeypatch.setattr(memory_of_steps, "MOST_COUNTS", 2_000)
    part = memory_over_steps(asked, 24, redraw=redraw, base=base)
    assert part.peak_bytes_S != whole.peak_bytes_S
    spread = np.std(whole.peak_bytes_S)
    # The means of 24 samples each differ by chance; a part leaves the rest as it was.
    assert np.mean(part.peak_bytes_S) == pytest.approx(np.mean(whole.peak_bytes_S), abs=2 * spread)
    assert part.p99_bytes == pytest.approx(whole.p99_bytes, rel=0.02)


def test_a_step_tells_what_99_of_100_steps_need_and_the_chance_of_too_much() -> None:
    asked = scenario()
    step = simulate(asked)
    over = memory_over_steps(asked, redraw="favourites")
    assert step.memory_over_steps["redraw"] == "favourites"
    assert step.memory["peak_p99_bytes"] == max(over.p99_bytes, step.memory["peak_bytes"])
    assert step.memory_over_steps["dispatch_bytes"]["p99"] == pytest.approx(np.quantile(over.dispatch_bytes_S, 0.99))
    assert step.memory_over_steps["activations_bytes"]["p50"] == pytest.approx(np.median(over.activations_bytes_S))
    assert step.out_of_memory_fraction == over.out_of_memory_fraction


def test_a_gpu_between_the_median_and_p99_is_warned_about() -> None:
    asked = scenario()
    over = memory_over_steps(asked, redraw="favourites")
    own = simulate(asked).memory["peak_bytes"]
    limit = max(own, over.p50_bytes) + 0.2 * (over.p99_bytes - max(own, over.p50_bytes))
    gpu = asked.cluster.gpu
    held = dataclasses.replace(gpu.memory_bytes, value=limit)
    cluster = dataclasses.replace(asked.cluster, gpu=dataclasses.replace(gpu, memory_bytes=held))
    step = simulate(asked.with_(cluster=cluster))
    assert step.fits
    assert 0.01 < step.out_of_memory_fraction < 0.99
    assert any("fits in this step, but" in warning for warning in step.warnings)


@pytest.mark.parametrize(
    ("changes", "redraw"),
    [
        ({}, "favourites"),
        ({"policy": "random"}, "favourites"),
        ({"policy": "search"}, "counts"),  # other favourites would be placed as well
        ({"popularity": "multinomial", "gini": None}, "favourites"),
        ({"popularity": "balanced", "gini": None}, "counts"),
    ],
)
def test_what_differs_between_steps_is_what_nobody_knows(changes: dict, redraw: str) -> None:
    asked = {name: value for name, value in (SIZES | changes).items() if value is not None}
    assert expected_redraw(Scenario.make(**asked)) == redraw


def test_forced_balance_and_dense_models_need_the_same_in_every_step() -> None:
    sizes = {name: value for name, value in SIZES.items() if name != "gini"}
    dense = {"model": "llama-3-8b", "ep": 1, "micro_batch": 1, "seq_len": 512}
    for changes in ({"popularity": "balanced"}, dense):
        step = simulate(Scenario.make(**sizes | changes))
        assert step.memory["peak_p99_bytes"] == pytest.approx(step.memory["peak_bytes"], abs=1e-6 * GIB)
        assert step.out_of_memory_fraction == float(not step.fits)
        assert step.memory_over_steps["num_steps"] == 1


def test_a_part_of_a_dualpipe_step_fills_the_pipeline_from_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_of_steps, "MOST_COUNTS", 1)
    asked = scenario(schedule="dualpipe", micro_batch=1)
    assert len(memory_over_steps(asked, 2).peak_bytes_S) == 2
