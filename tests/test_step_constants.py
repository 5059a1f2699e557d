"""The step's constants: few, each with its rows; the host's floor, graphs, fused and unfused streams."""

from __future__ import annotations

import dataclasses
import math

import pytest

from moesim.catalog.models import load_model
from moesim.catalog.step import (
    FALLBACK_GPU,
    NO_LOSS,
    all_step_constants,
    left_out_errors,
    rows_of_fit,
    step_constants,
)
from moesim.cost.device import device_cost
from moesim.cost.host import issued_operations, sustained, unfused
from moesim.describe.parallel import Parallelism
from moesim.describe.workload import Routing, Training
from moesim.errors import InputError
from moesim.metrics.summary import step_parts
from moesim.scenario import Scenario
from moesim.study.accuracy import carried_cases
from moesim.study.accuracy_step import FITS, Case, _fitted, cases_of, constants_without, key_of
from moesim.study.accuracy_trace import FITTED
from moesim.timeline.step import run_step

MOST_CONSTANTS = 12
MEGATRON = tuple(constant for constant in all_step_constants() if constant.software == "megatron")
DENSE = {"model": "llama-3-8b", "cluster": "h100-8x-ib400", "num_gpus": 8, "global_batch": 16}


def test_constants_are_few_and_each_has_a_meaning_and_rows_that_are_carried() -> None:
    constants = all_step_constants()
    carried = {row["id"] for row in carried_cases("training")}
    assert len(constants) <= MOST_CONSTANTS
    assert all(constant.meaning and constant.fitted_on for constant in constants)
    assert rows_of_fit() <= carried
    assert rows_of_fit("deepseek") == set(FITTED)
    megatron = {key_of(constant) for constant in constants if constant.software == "megatron"}
    assert megatron == {key for fit in FITS for key in fit.keys}


def test_each_software_has_losses_of_its_own_and_kernels_have_none() -> None:
    megatron, deepseek = step_constants("h800"), step_constants("h800", "deepseek")
    assert deepseek.stream_fraction > megatron.stream_fraction
    assert deepseek.issue_s == megatron.issue_s  # it names none
    assert step_constants("h800", "kernels") == NO_LOSS
    scenario = Scenario.make(model="olmoe-1b-7b", cluster="h800-8x-ib400", num_gpus=8, ep=8, global_batch=8)
    slow, own, bound = (run_step(scenario.with_(software=name)) for name in ("megatron", "deepseek", "kernels"))
    assert slow.step_s > own.step_s > bound.step_s
    assert bound.step_s == run_step(scenario, constants=NO_LOSS).step_s
    with pytest.raises(InputError, match="software: must be megatron or deepseek or kernels; got 'mine'"):
        scenario.with_(software="mine")


def test_every_row_of_a_fit_is_told_with_its_release_left_out() -> None:
    assert rows_of_fit() <= set(left_out_errors())


def test_a_gpu_that_no_constant_names_takes_the_fallbacks_and_says_so() -> None:
    assert step_constants("my-gpu") == step_constants(FALLBACK_GPU)
    gpu = dataclasses.replace(Scenario.make(**DENSE).cluster.gpu, name="my-gpu")
    told = sustained(device_cost(gpu, "bf16"), step_constants("my-gpu"), gpu).provenance
    assert {item.kind for item in told if item.part.startswith("step:")} == {"assumed"}


def test_with_no_loss_a_device_is_what_it_was() -> None:
    gpu = Scenario.make(**DENSE).cluster.gpu
    alone = device_cost(gpu, "bf16")
    assert unfused(sustained(alone, NO_LOSS, gpu), NO_LOSS) == alone


def test_a_pass_takes_the_longer_of_host_and_device() -> None:
    scenario = Scenario.make(**DENSE, seq_len=1024)
    kernels = run_step(scenario, constants=NO_LOSS)
    slow = dataclasses.replace(NO_LOSS, issue_s=1.0)
    bound = run_step(scenario, constants=slow)
    layer, num_layers = scenario.model.layers[0], len(scenario.model.layers)
    counts = [
        issued_operations(layer, parallel=scenario.parallel, train=scenario.train, routing=scenario.routing, way=way)
        for way in ("forward", "backward")
    ]
    around = step_parts(kernels)["embedding_head"] + step_parts(kernels)["optimizer"]
    rest = step_parts(kernels)["gradient_reduction"]
    expected = scenario.num_micro_batches * num_layers * sum(counts) * 1.0 + around + rest
    assert bound.step_s == pytest.approx(expected)
    assert step_parts(kernels)["host"] == 0.0


def test_graphs_take_the_host_away_module_by_module() -> None:
    layer = load_model("deepseek-v3").layers[-1]
    parallel, routing = Parallelism(ep=8), Routing()

    def issued(cuda_graphs: str) -> float:
        train = Training(cuda_graphs=cuda_graphs)
        return issued_operations(layer, parallel=parallel, train=train, routing=routing, way="backward")

    steps = ["none", "attn", "attn,moe_router", "attn,moe_router,moe_preprocess", "attn,moe", "full"]
    counts = [issued(graphs) for graphs in steps]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == len(counts)
    assert counts[-1] == 0.0


def test_what_is_recomputed_is_issued_again() -> None:
    layer = load_model("deepseek-v3").layers[-1]

    def backward(recompute: str) -> float:
        train = Training(recompute=recompute)
        parallel, routing = Parallelism(ep=8), Routing()
        return issued_operations(layer, parallel=parallel, train=train, routing=routing, way="backward")

    assert backward("none") < backward("moe_act") < backward("moe_act,mla_up_proj") < backward("moe") < backward("full")


def test_an_unknown_module_to_graph_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match="cuda_graphs: must be none, full or modules among attn"):
        Training(cuda_graphs="moe_ruter")


def test_layers_with_experts_stream_more_and_casts_do_not() -> None:
    gpu = Scenario.make(**DENSE).cluster.gpu
    constants = step_constants("h100-sxm")
    fused = sustained(device_cost(gpu, "fp8"), constants, gpu)
    rough = unfused(fused, constants)
    start, many = fused.stream_start_s, 1e9
    ratio = (float(rough.stream_s(many)) - start) / (float(fused.stream_s(many)) - start)
    assert ratio == pytest.approx(1 / constants.stream_fraction)
    casts = fused.recipe.both_layouts()
    assert float(rough.casts_s(casts, [many])) == pytest.approx(float(fused.casts_s(casts, [many])))


def test_a_fit_finds_the_constant_that_made_its_rows() -> None:
    scenario = Scenario.make(**DENSE)
    made = tuple(
        dataclasses.replace(c, value=dataclasses.replace(c.value, value=0.6))
        if key_of(c) == ("product_fraction", "a100-80gb")
        else c
        for c in MEGATRON
    )
    rows = [scenario, scenario.with_(tp=2), scenario.with_(seq_len=8192)]
    measured = [run_step(row, constants=step_constants("h100-sxm", among=made)).step_s for row in rows]
    pairs = zip(rows, measured, strict=True)
    cases = [Case(id="row", release="r", scenario=row, measured_s=seconds) for row, seconds in pairs]
    found = _fitted(MEGATRON, [("product_fraction", "a100-80gb")], cases)
    value = next(float(c.value) for c in found if key_of(c) == ("product_fraction", "a100-80gb"))
    assert math.isclose(value, 0.6, rel_tol=0.01)


def test_a_release_left_out_changes_only_what_was_fitted_on_it() -> None:
    cases = cases_of([row for row in carried_cases("training") if "grok1_H100_8_BF16" in row["id"]])
    without = constants_without(MEGATRON, cases, cases[0].release)
    moved = {key_of(a) for a, b in zip(MEGATRON, without, strict=True) if float(a.value) != float(b.value)}
    assert moved == {("product_fraction", "a100-80gb"), ("stream_fraction", "a100-80gb")}


def test_what_a_release_said_is_forgotten_where_the_rows_that_are_left_do_not_tell_it() -> None:
    wanted = ("simumax_llama3_70b_l12_tp8_pp1_dp1_mbc8_cef", "mbridge_moonlight_recompute_[]")
    cases = cases_of([row for row in carried_cases("training") if row["id"] in wanted])
    assert len(cases) == 2

    def guessed(value: float) -> float:
        known = [
            dataclasses.replace(c, value=dataclasses.replace(c.value, value=value))
            if key_of(c) == ("product_fraction", "b200")
            else c
            for c in MEGATRON
        ]
        found = constants_without(known, cases, "Megatron-LM 23e00ed")
        return next(float(c.value) for c in found if key_of(c) == ("product_fraction", "b200"))

    assert guessed(0.3) == guessed(0.9)
