"""Number formats in which tensors and parameters wait, and the published layout of DeepSeek-V3 that uses them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesim.catalog.models import load_model
from moesim.cost.activations import layer_tensors
from moesim.cost.memory import stage_profile
from moesim.cost.moments import forward_moments, layer_moments, rows_per_assignment
from moesim.cost.precision import RECIPES
from moesim.cost.recompute import kept_tensors
from moesim.cost.static import outer_parameters, rank_parameters, static_memory
from moesim.describe.parallel import Parallelism
from moesim.describe.pipeline import stage_chunks
from moesim.describe.workload import Kept, Optimizer, Training
from moesim.errors import InputError
from moesim.metrics.memory import memory_by_stage
from moesim.scenario import Scenario
from moesim.study.fits import headroom_bytes, remedies
from moesim.study.uncertainty_published import DEEPSEEK_V3
from moesim.timeline.load import step_load
from moesim.timeline.reduction import gradient_reduction_s

V3 = load_model("deepseek-v3")
MOE = V3.layers[-1]
PUBLISHED = Training(
    precision="fp8",
    recompute="layernorm,mla_up_proj,moe_act",
    schedule="dualpipe",
    mtp=True,
    kept=Kept(attention_output="e5m6", activation_input="fp8"),
    optimizer=Optimizer(moments="bf16", average="host"),
    global_batch=32,
)
DUAL = Parallelism(pp=16, ep=64)


def test_a_layer_of_deepseek_v3_keeps_what_its_report_says() -> None:
    tensors = layer_tensors(V3, MOE, Parallelism(ep=64), precision="fp8", kept=PUBLISHED.kept)
    kept = kept_tensors(tensors, MOE, PUBLISHED, 1)
    tile = 4 / 128  # of an element's scale
    assert {t.name: t.bytes for t in kept if t.per == "token" and t.part != "router"} == {
        "layer input": 7168 * 2,
        "query latent": 1536 * 2,
        "key-value latent": (512 + 64) * 2,
        "attention output": 128 * 128 * (1.5 + tile),
        "logsumexp": 128 * 4,
        "ffn block input": 7168 * 2,
        "shared activation input": 2 * 2048 * (1 + tile),
        "shared activation output": 2048 * (1 + tile),
    }
    assert {t.name: t.bytes for t in kept if t.per == "assignment"} == {
        "expert input": 7168 * (1 + tile),
        "expert activation input": 2 * 2048 * (1 + tile),
        "expert gates": 4,
    }


@pytest.mark.parametrize("pp", [2, 4, 8, 16])
def test_every_stage_of_dualpipe_holds_pp_and_one_micro_batches(pp: int) -> None:
    dense = replace(V3, layers=V3.layers[:1] * pp, mtp_layers=())
    parallel, train = Parallelism(pp=pp), Training(schedule="dualpipe", global_batch=2 * pp)
    layer = 4096 * sum(tensor.bytes for tensor in layer_tensors(dense, dense.layers[0], parallel))
    for stage in range(pp):
        found = stage_profile(dense, parallel, parallel.rank_layout(pp), train, stage=stage, received_GMLR=None)
        begun = [op.way == "forward" for op in found.operations]
        held = found.live_KGRP.sum(axis=-1)[:, 0, 0] + np.array(begun) * layer  # a forward's own, once it ends
        assert held.max() == pytest.approx((pp + 1) * layer)


def test_the_outer_stages_of_dualpipe_hold_embedding_and_head_once_for_the_prediction_layer_too() -> None:
    table = V3.vocab * V3.hidden
    for stage in (0, 15):
        assert outer_parameters(V3, DUAL, PUBLISHED, stage) == 2 * table + V3.hidden
    assert outer_parameters(V3, DUAL, PUBLISHED, 7) == 0
    one_way = replace(PUBLISHED, schedule="1f1b")
    assert outer_parameters(V3, DUAL, one_way, 15) == 2 * table + V3.hidden  # the embedding once more
    tied = replace(V3, tie_embeddings=True)
    assert outer_parameters(tied, DUAL, PUBLISHED, 0) == table + V3.hidden


def test_narrow_weights_leave_only_their_casts_and_embedding_and_head() -> None:
    narrow = replace(PUBLISHED, optimizer=replace(PUBLISHED.optimizer, weights="narrow"))
    layout = DUAL.rank_layout(2048)
    for stage in (0, 7):
        wide, lean = (static_memory(V3, DUAL, layout, train, stage=stage) for train in (PUBLISHED, narrow))
        placed = [item for chunk in stage_chunks(V3, DUAL, PUBLISHED, stage) for item in chunk]
        in_layers = sum(sum(rank_parameters(V3, item, DUAL)) for item in placed)
        assert lean.weights_bytes == pytest.approx(wide.weights_bytes - 2 * in_layers)
        assert lean.weights_bytes == pytest.approx(
            2 * outer_parameters(V3, DUAL, narrow, stage) + 2 * (1 + 4 / 128) * in_layers
        )
        assert (lean.gradients_bytes, lean.optimizer_bytes) == (wide.gradients_bytes, wide.optimizer_bytes)


def test_narrow_weights_are_gathered_narrow() -> None:
    base = Scenario.make(model="mixtral-8x7b", cluster="h100-8x-ib400", num_gpus=16, ep=8, precision="fp8")
    wide, lean = (gradient_reduction_s(s, 1e9, 1e9) for s in (base, base.with_(weights="narrow")))
    assert lean[0] == wide[0]
    assert 0.5 < lean[1] / wide[1] < 0.55


def test_an_average_on_the_gpu_is_one_fp32_more_of_each_parameters_states() -> None:
    assert Optimizer(average="gpu").state_bytes == 16
    assert Optimizer(average="host").state_bytes == Optimizer().state_bytes == 12


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"kept": {"attention_output": "fp4"}}, "attention_output: must be bf16 or e5m6 or fp8"),
        ({"optimizer": {"weights": "narrow"}}, "needs a narrow precision"),
        ({"precision": "fp8", "optimizer": {"weights": "narrow", "main_weights": "remainder"}}, "make no main weight"),
        ({"optimizer": {"average": "cloud"}}, "average: must be none or gpu or host"),
    ],
)
def test_formats_that_do_not_go_together_are_refused(train: dict, said: str) -> None:
    asked = {"model": "deepseek-v3", "cluster": "h800-8x-ib400", "num_gpus": 64, "train": {"global_batch": 64, **train}}
    with pytest.raises(InputError, match=said):
        Scenario.from_mapping(asked)


def test_rows_that_travel_narrow_are_narrow_until_they_are_multiplied_and_wide_when_made() -> None:
    parallel, kept = Parallelism(ep=64), Kept(activation_input="fp8")
    joined, row, sent = rows_per_assignment(MOE.ffn, parallel), 7168 * 2, 7168 * (1 + 4 / 128)  # type: ignore[arg-type]
    by_name = {m.name: m for m in layer_moments(V3, MOE, parallel, "deepep", recipe=RECIPES["fp8"], kept=kept)}
    assert by_name["combine"].dispatch_assignment_bytes == pytest.approx((1 + joined) * sent)
    assert by_name["send back"].dispatch_assignment_bytes == pytest.approx((1 + joined) * row)
    assert by_name["send back"].assignment_bytes == pytest.approx(-(2 * 2048 + 2048) * (1 + 4 / 128))
    assert "send back" not in {m.name for m in layer_moments(V3, MOE, parallel, "deepep", recipe=RECIPES["mxfp8"])}
    pad = next(m for m in forward_moments(V3, MOE, parallel, "deepep", RECIPES["fp8"]) if m.name == "pad")
    assert pad.dispatch_assignment_bytes == pytest.approx((2 + joined) * sent + 2 * row)


def test_no_format_that_keeps_less_raises_the_peak_and_together_deepseek_v3_fits_an_h800_if_routing_is_even() -> None:
    plain = {"attention_output": "bf16", "activation_input": "bf16", "average": "gpu", "moments": "fp32"}
    base = Scenario.make(**{**DEEPSEEK_V3, **plain, "popularity": "balanced"})
    saved = [headroom_bytes(base)]
    for name in plain:
        base = base.with_(**{name: DEEPSEEK_V3[name]})
        saved.append(headroom_bytes(base))
    assert saved == sorted(saved)
    assert len(set(saved)) == len(saved)
    assert saved[0] < 0 < saved[-1]
    assert headroom_bytes(base.with_(weights="narrow")) > saved[-1]


def test_the_formats_reach_the_step_by_their_flat_names() -> None:
    asked = {"model": "mixtral-8x7b", "cluster": "h100-8x-ib400", "num_gpus": 8, "ep": 8, "global_batch": 8}
    base = Scenario.make(**asked, popularity="balanced")
    lean = base.with_(attention_output="fp8", activation_input="fp8")
    assert lean.train.kept == Kept(attention_output="fp8", activation_input="fp8")
    (wide,), (narrow,) = (memory_by_stage(s, step_load(s)) for s in (base, lean))
    elements = 32 * 128 + 2 * 2 * 14336  # attention's output; inputs of SwiGLU in two experts
    assert wide.activations_bytes - narrow.activations_bytes == pytest.approx(32 * 4096 * elements * (1 - 4 / 128))


def test_what_would_make_it_fit_offers_narrower_formats_where_they_are_open() -> None:
    base = Scenario.make(**{**DEEPSEEK_V3, "activation_input": "bf16"})
    offered = [leaves for leaves, _ in remedies(base)]
    assert {"weights": "narrow"} in offered
    assert {"activation_input": "fp8"} in offered
    taken = [leaves for leaves, _ in remedies(base.with_(weights="narrow", activation_input="fp8"))]
    assert not [leaves for leaves in taken if "weights" in leaves or "activation_input" in leaves]
    wide = [leaves for leaves, _ in remedies(base.with_(precision="bf16"))]
    assert {"weights": "narrow"} not in wide
