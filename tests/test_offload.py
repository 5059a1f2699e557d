"""What lies in the host's memory: what it frees, what it costs, and that nothing else moves."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from moesim.cost.device import device_cost
from moesim.cost.layer import optimizer_s
from moesim.cost.offload import LAYERS_ON_GPU, chunk_offload
from moesim.describe.pipeline import stage_chunks
from moesim.errors import InputError
from moesim.metrics.memory import memory_by_stage
from moesim.metrics.summary import step_parts, summarise
from moesim.scenario import Scenario
from moesim.timeline.load import step_load
from moesim.timeline.step import run_step

ASKED: dict[str, Any] = {
    "model": "moonlight-16b-a3b",
    "cluster": "h100-8x-ib400",
    "num_gpus": 16,
    "ep": 8,
    "global_batch": 32,
    "popularity": "balanced",
    "profile": "datasheet",
}
BASE = Scenario.make(**ASKED)


def slow_link(scenario: Scenario, share: float) -> Scenario:
    gpu = scenario.cluster.gpu
    link = dataclasses.replace(gpu.host_bytes_per_s, value=gpu.host_bytes_per_s.value * share)
    gpu = dataclasses.replace(gpu, host_bytes_per_s=link)
    return dataclasses.replace(scenario, cluster=dataclasses.replace(scenario.cluster, gpu=gpu))


def test_states_in_the_hosts_memory_are_gone_from_the_gpu_and_their_way_is_waited_for_once_a_step() -> None:
    away = BASE.with_(offload="optimizer")
    (here,), (there,) = (memory_by_stage(s, step_load(s)) for s in (BASE, away))
    assert there.optimizer_bytes == 0.0
    assert (there.weights_bytes, there.activations_bytes) == (here.weights_bytes, here.activations_bytes)
    stayed, moved = run_step(BASE), run_step(away)
    parts, before = step_parts(moved), step_parts(stayed)
    link_s = here.optimizer_bytes / BASE.cluster.gpu.host_bytes_per_s.value  # in and out at once
    assert parts["optimizer"] == before["optimizer"]
    assert link_s - before["optimizer"] <= parts["host_transfer"] < link_s  # the update itself hides some of it
    assert moved.step_s - stayed.step_s == pytest.approx(parts["host_transfer"])


def test_activations_on_their_way_to_the_host_hide_behind_computing_where_the_link_is_fast() -> None:
    away = BASE.with_(offload="activations")
    slow, fast = slow_link(away, 0.05), slow_link(away, 1e3)
    assert step_parts(run_step(fast))["host_transfer"] == 0.0
    assert run_step(fast).step_s == pytest.approx(run_step(BASE).step_s)
    waited = step_parts(run_step(slow))["host_transfer"]
    assert waited > 0.0
    assert step_parts(run_step(slow_link(away, 0.025)))["host_transfer"] > 2 * waited


def test_all_layers_but_the_last_two_of_a_chunk_are_sent() -> None:
    away = BASE.with_(offload="activations")
    (chunk,) = stage_chunks(away.model, away.parallel, away.train, 0)
    sent = chunk_offload(away.model, away.parallel, away.train, chunk)
    assert len(sent) == len(chunk) - LAYERS_ON_GPU
    assert chunk_offload(BASE.model, BASE.parallel, BASE.train, chunk) == ()
    recomputed = chunk_offload(away.model, away.parallel, dataclasses.replace(away.train, recompute="full"), chunk)
    assert all(layer.assignment_bytes == 0.0 for layer in recomputed)


def test_formats_of_gradients_and_states_scale_their_time() -> None:
    lean = BASE.with_(gradients="bf16", main_weights="remainder", moments="bf16")
    full, less = (step_parts(run_step(s)) for s in (BASE, lean))
    assert less["optimizer"] < full["optimizer"]
    assert less["gradient_reduction"] < full["gradient_reduction"]
    device = device_cost(BASE.cluster.gpu, "bf16", "datasheet")
    seconds = [optimizer_s(1e9, scenario.train, device) for scenario in (lean, BASE)]
    assert seconds[0] / seconds[1] == pytest.approx((2 + 2 * 6 + 2) / 30, rel=0.01)


@pytest.mark.parametrize("asked", ["weights", "optimizer,weights", "none,optimizer"])
def test_what_cannot_lie_in_the_hosts_memory_is_refused_by_name(asked: Any) -> None:
    with pytest.raises(InputError, match="offload: must be none or parts among optimizer, activations"):
        BASE.with_(offload=asked)


def test_a_result_says_where_the_host_links_rate_is_from_and_that_nothing_measured_stands_behind_it() -> None:
    told = summarise(run_step(BASE.with_(offload="activations")))
    assert any(item.part == "link to the host's memory" and "PCIe 5.0" in item.source for item in told.provenance)
    assert any("Offloading" in reason for reason in told.envelope["reasons"])
    assert not any("host's memory" in item.part for item in summarise(run_step(BASE)).provenance)
