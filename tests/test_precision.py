"""Recipes of narrow formats: what their casts move, where rows travel narrow, and laws that products and casts obey."""

from __future__ import annotations

import dataclasses
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.catalog.hardware import GPU_NAMES, load_gpu
from moesim.catalog.models import load_model
from moesim.cost.device import device_cost
from moesim.cost.layer import experts_s, weight_casts_s
from moesim.cost.precision import DEEPSEEK_FP8, RECIPES, recipe_of
from moesim.describe.parallel import Parallelism
from moesim.describe.workload import Kept, Precision, Training
from moesim.errors import InputError
from moesim.scenario import Scenario
from moesim.study.accuracy import carried_cases, score
from moesim.timeline.step import run_step

DEEPSEEK = load_model("deepseek-v3")
MOE = DEEPSEEK.layers[-1].ffn
TINY = {"model": "olmoe-1b-7b", "cluster": "b200-8x-ib400", "num_gpus": 8, "ep": 8, "global_batch": 16}
POSSIBLE = [
    (gpu, precision)
    for gpu in GPU_NAMES
    for precision in RECIPES
    if RECIPES[precision].peak in load_gpu(gpu).peak_flops_per_s
]


def expert_pass_s(gpu, precision, rows, *, backward=False):
    device = device_cost(load_gpu(gpu), precision, "datasheet")
    return float(
        experts_s(DEEPSEEK, MOE, np.full((1, 4), rows), parallel=Parallelism(), device=device, backward=backward)[0]
    )


def test_every_precision_has_a_recipe_with_its_source():
    assert set(RECIPES) == set(get_args(Precision))
    assert all(len(recipe.source) > 20 for name, recipe in RECIPES.items() if name != "bf16")


def moved(casts):
    return sum(cast.element_bytes for cast in casts)


def test_a_cast_reads_the_wide_tensor_and_writes_both_layouts_with_their_scales():
    assert moved(RECIPES["fp8"].both_layouts()) * 128 == 128 * 2 + 2 * (128 + 4)
    assert moved(RECIPES["mxfp8"].both_layouts()) * 32 == 32 * 2 + 2 * (32 + 1)
    assert moved(RECIPES["fp8_tensor"].both_layouts()) == 2 + 2 + 2  # the largest element is looked for first
    assert moved(RECIPES["nvfp4"].both_layouts()) * 16 == 2 * 16 * 2 + 2 * (8 + 1)


def casts_of(recipe):
    """Kernels of a linear layer by what they cast: its input (forward, backward), gradient, weight (once, backward)."""
    return (
        len(recipe.input_casts(backward=False)),
        len(recipe.input_casts(backward=True)),
        len(recipe.gradient_casts()),
        len(recipe.weight_casts()),
        len(recipe.weight_transposes()),
    )


def test_the_casts_of_a_linear_layer_are_counted_for_every_recipe():
    assert {name: casts_of(recipe) for name, recipe in RECIPES.items()} == {
        "bf16": (0, 0, 0, 0, 0),
        "fp8": (1, 0, 1, 1, 0),
        "fp8_tensor": (2, 0, 2, 2, 0),
        "mxfp8": (1, 0, 1, 1, 0),
        "nvfp4": (2, 0, 2, 2, 0),
    }
    assert casts_of(DEEPSEEK_FP8) == (1, 2, 2, 1, 1)
    uncast = dataclasses.replace(DEEPSEEK_FP8, cast_reads=0)
    assert casts_of(uncast) == (0, 0, 0, 0, 0)
    assert DEEPSEEK_FP8.activation_casts() == ()
    kept = Training(precision="bf16", kept=Kept(activation_input="fp8"))
    assert len(recipe_of(kept).activation_casts()) == 1  # there and back, in any format


def test_what_the_dispatch_brings_narrow_is_not_cast_again_and_a_shared_input_is_cast_once():
    assert DEEPSEEK_FP8.arrives_narrow("deepep")
    assert not DEEPSEEK_FP8.arrives_narrow("alltoall")
    assert not RECIPES["fp8"].arrives_narrow("deepep")  # Transformer Engine casts what its experts take
    assert DEEPSEEK_FP8.input_casts(backward=False, arrives_narrow=True) == ()
    for backward in (False, True):
        assert DEEPSEEK_FP8.input_casts(backward=backward, cast_before=True) == ()
        assert RECIPES["fp8"].input_casts(backward=backward, cast_before=True) == RECIPES["fp8"].input_casts(
            backward=backward
        )


def test_keeping_rows_costs_more_casts_and_less_waiting_for_weights():
    """DeepSeek's way against Transformer Engine's, same format: each pass of the experts takes longer, weights less."""
    gpu, rows_E = load_gpu("h800"), np.full((1, 4), 8192.0)
    recipes = {"megatron": RECIPES["fp8"], "deepseek": DEEPSEEK_FP8}
    ways = {name: device_cost(gpu, "fp8", "datasheet", recipe) for name, recipe in recipes.items()}

    def casts_s(device):
        uncast = dataclasses.replace(device, recipe=dataclasses.replace(device.recipe, cast_reads=0))
        on = {"parallel": Parallelism(), "dispatcher": "deepep"}
        return sum(
            float((experts_s(DEEPSEEK, MOE, rows_E, device=of, backward=way, **on) * sign)[0])
            for of, sign in ((device, 1), (uncast, -1))
            for way in (False, True)
        )

    assert casts_s(ways["deepseek"]) > 1.2 * casts_s(ways["megatron"])
    layer = DEEPSEEK.layers[-1]
    weights = {
        name: sum(weight_casts_s(DEEPSEEK, layer, num_rank_experts=4, parallel=Parallelism(), device=device).values())
        for name, device in ways.items()
    }
    assert weights["deepseek"] < weights["megatron"]


def test_rows_travel_narrow_only_by_deepep_in_deepseeks_recipe():
    narrow = {
        (name, dispatcher)
        for name, recipe in RECIPES.items()
        for dispatcher in ("alltoall", "deepep")
        if recipe.dispatch_element_bytes(dispatcher) < 2
    }
    assert narrow == {("fp8", "deepep")}
    assert RECIPES["fp8"].dispatch_element_bytes("deepep") == 1 + 4 / 128


@pytest.mark.parametrize(("gpu", "precision"), POSSIBLE)
def test_huge_experts_are_never_slower_in_a_narrow_format_than_in_bf16(gpu, precision):
    for backward in (False, True):
        wide, narrow = (expert_pass_s(gpu, name, 65536.0, backward=backward) for name in ("bf16", precision))
        assert narrow <= wide


@pytest.mark.parametrize(("gpu", "precision"), [pair for pair in POSSIBLE if pair[1] != "bf16"])
def test_casts_eat_what_a_small_linear_layer_gains_and_leave_a_large_one_faster(gpu, precision):
    device = device_cost(load_gpu(gpu), precision, "datasheet")

    def speed_up(rows, width):
        rows_E = np.array([rows])
        casts = device.recipe.both_layouts()
        casts_s = 2 * device.casts_s(casts, [rows * width]) + device.casts_s(casts, [width * width])
        narrow_s, wide_s = (
            float(on.grouped_s(rows_E, width, width) + on.backward_s(rows_E, width, width))
            for on in (device, device.wide)
        )
        return wide_s / (narrow_s + float(casts_s)), wide_s / narrow_s

    small, large = speed_up(256.0, 512), speed_up(16384.0, 8192)
    assert small[0] < 0.85 * small[1]
    assert small[0] < 1.01
    assert 1.2 < large[0] < large[1]


@settings(max_examples=40, deadline=None)
@given(rows=st.floats(1, 20_000), more=st.floats(1, 5_000), precision=st.sampled_from(sorted(RECIPES)))
def test_more_rows_never_take_less_time_in_any_format(rows, more, precision):
    assert expert_pass_s("b200", precision, rows) <= expert_pass_s("b200", precision, rows + more)


def test_weights_are_cast_once_a_step_and_only_the_first_micro_batch_waits():
    scenario = Scenario.make(**TINY, precision="mxfp8", popularity="balanced")
    assert scenario.num_micro_batches == 2
    forward = next(run for run in run_step(scenario).stages[0].operations if not run.is_backward)
    casts = [at for at, name in enumerate(forward.times.names) if name == "cast weights"]
    assert len(casts) == 2 * len(scenario.model.layers)  # attention, experts
    assert np.all(forward.times.seconds_PMV[casts][:, 0] > 0)
    assert np.all(forward.times.seconds_PMV[casts][:, 1] == 0)
    layer = scenario.model.layers[0]
    device = device_cost(scenario.cluster.gpu, "mxfp8")
    parts = weight_casts_s(scenario.model, layer, num_rank_experts=8, parallel=scenario.parallel, device=device)
    elements = 8 * 3 * 2048 * 1024
    moved = elements * (2 + 2 * (1 + 1 / 32)) / device.stream_bytes_per_s
    assert parts["experts"] == pytest.approx(moved + 16 * device.stream_start_s)
    wide = weight_casts_s(scenario.model, layer, num_rank_experts=8, parallel=scenario.parallel, device=device.wide)
    assert wide == {}


def test_every_format_runs_a_step_and_says_which_recipe_it_is():
    steps = {name: run_step(Scenario.make(**TINY, precision=name)) for name in RECIPES}
    for name, step in steps.items():
        told = {item.part: item.source for item in step.device.provenance}
        assert ("casts" in told) == (name != "bf16")
        assert f"peak {RECIPES[name].peak}" in told


@pytest.mark.parametrize(("gpu", "precision"), [("a100-80gb", "fp8"), ("h100-sxm", "mxfp8"), ("h200", "nvfp4")])
def test_a_format_that_the_gpu_lacks_is_refused_with_those_that_it_has(gpu, precision):
    with pytest.raises(InputError, match=rf"precision: must be one that {gpu} has a peak for: bf16.*got '{precision}'"):
        device_cost(load_gpu(gpu), precision)


def test_measured_fp8_layers_come_out_a_little_fast_with_nothing_fitted():
    rows = [row for row in score("layer", carried_cases("layer"), "carried").rows if row.like.precision == "fp8"]
    errors = {row.id: row.error_fraction for row in rows}
    print({name: f"{error:+.1%}" for name, error in errors.items()})
    assert len(errors) == 4
    assert np.median(np.abs(list(errors.values()))) < 0.07
    assert all(-0.15 < error < 0 for error in errors.values())
