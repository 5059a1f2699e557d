"""Selective recomputation: what a module keeps no longer, what it does twice, and what that was measured to save."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moesim.catalog.models import load_model
from moesim.catalog.step import NO_LOSS
from moesim.cost.activations import layer_tensors
from moesim.cost.device import AttentionRate, ProductLaw, device_cost
from moesim.cost.memory import RankMemory, stage_memory
from moesim.cost.recompute import kept_tensors, made_again, operations_again, useful_modules
from moesim.describe.flops import layer_flops
from moesim.describe.model import Ffn, LatentAttention, Layer, Model, MoeFfn, Router
from moesim.describe.parallel import Parallelism
from moesim.describe.pipeline import stage_chunks
from moesim.describe.workload import MODULES, Training
from moesim.errors import InputError
from moesim.metrics.memory import memory_by_stage
from moesim.metrics.summary import summarise
from moesim.scenario import Scenario
from moesim.study.twins import dense_twins
from moesim.timeline import step as step_room
from moesim.timeline.load import step_load
from moesim.timeline.step import run_step

LATENT = LatentAttention(
    num_heads=16, q_lora_rank=None, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64
)
EXPERTS = MoeFfn(num_experts=16, expert=Ffn(width=512), router=Router(top_k=4), shared=Ffn(width=1024))
DENSE, MOE = Layer(attention=LATENT, ffn=Ffn(width=4096)), Layer(attention=LATENT, ffn=EXPERTS)
MODEL = Model(name="small", hidden=1024, vocab=32000, layers=(DENSE, DENSE, *(MOE,) * 6))
TRAIN = Training(seq_len=1024, global_batch=64)
MOONLIGHT: dict[str, Any] = {
    "model": "moonlight-16b-a3b",
    "cluster": "h100-8x-ib400",
    "num_gpus": 8,
    "tp": 2,
    "pp": 1,
    "ep": 8,
    "zero": 1,
    "global_batch": 4,
    "popularity": "balanced",
    "profile": "datasheet",
}
UNCUT = MOONLIGHT | {"tp": 1, "global_batch": 8}
ALL = ",".join(MODULES)


def kept_bytes(layer: Layer, recompute: str, parallel: Parallelism) -> float:
    """Per token, one assignment for each."""
    kept = kept_tensors(layer_tensors(MODEL, layer, parallel), layer, replace(TRAIN, recompute=recompute), parallel.tp)
    return sum(tensor.bytes for tensor in kept)


def peak(parallel: Parallelism, recompute: str, *, stage: int, skew: float) -> RankMemory:
    layout, train = parallel.rank_layout(16), replace(TRAIN, recompute=recompute)
    num_moe = sum(item.layer.is_moe for chunk in stage_chunks(MODEL, parallel, train, stage) for item in chunk)
    received = np.full((layout.edp, train.num_micro_batches(layout.dp), num_moe, parallel.ep), 4.0 * 1024 / parallel.tp)
    received[..., -1] *= skew
    return stage_memory(MODEL, parallel, layout, train, stage=stage, received_GMLR=received)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("tp", [1, 2])
def test_each_module_lowers_what_the_layers_that_have_it_keep_and_leaves_the_others_alone(module: str, tp: int) -> None:
    lowered = []
    for layer in (DENSE, MOE):
        kept, none = (kept_bytes(layer, recompute, Parallelism(tp=tp)) for recompute in (module, "none"))
        assert (kept < none) == bool(made_again(layer, module).operations)
        lowered.append(kept < none)
    alone = {"mlp": [True, False], "moe": [False, True], "moe_act": [False, True], "shared_experts": [False, True]}
    assert lowered == alone.get(module, [True, True])


subsets = st.sets(st.sampled_from(MODULES), min_size=1).map(",".join)


@settings(max_examples=60, deadline=None)
@example(modules="moe_act", one="moe", pp=4, vpp=2, tp=1, skew=1.0)
@given(
    modules=subsets,
    one=st.sampled_from(MODULES),
    pp=st.sampled_from([1, 2, 4]),
    vpp=st.sampled_from([1, 2]),
    tp=st.sampled_from([1, 2]),
    skew=st.floats(1.0, 4.0),
)
def test_recomputing_more_never_raises_the_peak_nor_keeps_less_than_full(
    modules: str, one: str, pp: int, vpp: int, tp: int, skew: float
) -> None:
    parallel = Parallelism(pp=pp, vpp=vpp if pp > 1 else 1, ep=4, tp=tp)
    for stage in range(pp):
        none, some, more, everything = (
            peak(parallel, recompute, stage=stage, skew=skew).peak_bytes
            for recompute in ("none", modules, f"{modules},{one}", ALL)
        )
        assert none >= some >= more >= everything
    for layer in (DENSE, MOE):
        assert kept_bytes(layer, ALL, parallel) >= kept_bytes(layer, "full", parallel)


def test_modules_may_come_in_any_order_as_text_or_list() -> None:
    base = Scenario.make(**MOONLIGHT)
    written = ("layernorm,moe_act", "moe_act, layernorm", ["layernorm", "moe_act"], ("moe_act", "layernorm", "moe_act"))
    made = [base.with_(recompute=text) for text in written]
    assert {scenario.point_id for scenario in made} == {made[0].point_id}
    assert {scenario.train.recompute for scenario in made} == {"moe_act,layernorm"}
    assert Training(recompute=()).recompute == "none"
    again = Scenario.from_mapping(made[0].raw)
    assert again.train == made[0].train


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("moe_akt", "Did you mean moe_act"),
        ("full,moe", "must be none, full or modules among core_attn, .*; got 'full'"),
        ("", "got ''"),
        (3, "must be a text or a list; got 3"),
        (["moe", 3], r"must be a text; got \['moe', 3\]"),
    ],
)
def test_a_module_that_is_none_is_refused(asked: object, message: str) -> None:
    with pytest.raises(InputError, match=f"recompute: .*{message}"):
        Scenario.make(**MOONLIGHT, recompute=asked)


def test_a_module_that_no_layer_has_is_refused_with_those_that_it_has() -> None:
    hint = "recompute: names what no layer of llama-3-8b has; got 'mla_up_proj'. It has core_attn, mlp."
    with pytest.raises(InputError, match=hint):
        Scenario.make(model="llama-3-8b", cluster="h100-8x-ib400", num_gpus=8, recompute="mla_up_proj", global_batch=8)
    # A norm before grouped-query attention is fused into the product behind it; the one before experts stands alone.
    assert useful_modules(load_model("mixtral-8x7b")) == ("core_attn", "moe", "moe_act", "layernorm")
    assert useful_modules(load_model("deepseek-v3")) == MODULES


def test_a_dense_twin_recomputes_what_it_has_of_the_modules() -> None:
    twins = dense_twins(Scenario.make(**UNCUT, recompute="moe_act,mla_up_proj"))
    assert twins["active"].train.recompute in ("mla_up_proj", "full")


def parts_s(
    scenario: Scenario, monkeypatch: pytest.MonkeyPatch, *, products: float, streams: float
) -> dict[str, float]:
    """Seconds of one rank by part, on a device without overheads: FLOPs and streamed bytes per second as given."""
    cost = device_cost(scenario.cluster.gpu, "bf16", "datasheet")
    ideal = dataclasses.replace(
        cost,
        peak_flops_per_s=products,
        law=ProductLaw(utilisation=1.0, reduce_overhead=0.0, memory_utilisation=1.0, start_s=0.0, tile_rows=1),
        memory_bytes_per_s=1e30,
        stream_bytes_per_s=streams,
        stream_start_s=0.0,
        attention_by_dims={1: AttentionRate(endless_flops_per_s=products, half_keys=0.0)},
        attention_backward_share=1.0,
    )
    monkeypatch.setattr(step_room, "device_cost", lambda *_: ideal)
    run = run_step(scenario, constants=NO_LOSS).stages[0]
    return {part: float(np.max(part_R)) for part, part_R in run.part_R.items()}


def test_products_are_done_again_exactly_as_often_as_the_modules_say(monkeypatch: pytest.MonkeyPatch) -> None:
    base = Scenario.make(**UNCUT)
    model, rows = base.model, 4096

    def flops(recompute: str) -> float:
        found = parts_s(base.with_(recompute=recompute), monkeypatch, products=1e12, streams=1e30)
        return found["recompute"] * 1e12

    layers = [layer_flops(model, layer, base.train.seq_len) for layer in model.layers]
    up_projections = 2 * len(layers) * (2048 * 16 * 192 + 512 * 16 * 256)
    by_module = {
        "core_attn": sum(one.attention_sequence for one in layers),
        "mla_up_proj": up_projections,
        "mlp": sum(one.dense_ffn for one in layers),
        "moe": sum(one.router + one.experts + one.shared_experts for one in layers),
        "shared_experts": sum(one.shared_experts for one in layers),
    }
    for module, expected in by_module.items():
        assert flops(module) == pytest.approx(rows * expected, rel=1e-9), module
    assert flops("moe_act,layernorm") < 1.0
    # What lies inside another is done again with it, once.
    together = sum(value for module, value in by_module.items() if module != "shared_experts")
    assert flops(ALL) == pytest.approx(rows * together, rel=1e-9)


def test_activation_and_norms_are_streamed_again_byte_for_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    base = Scenario.make(**UNCUT)

    def num_bytes(recompute: str) -> float:
        found = parts_s(base.with_(recompute=recompute), monkeypatch, products=1e30, streams=1e12)
        return found["recompute"] * 1e12

    # 26 layers of experts, six rows a token; 53 norms that are not fused: 27 before latent attention, 26 before experts
    assert num_bytes("moe_act") == pytest.approx(26 * 4096 * 6 * 3 * 1408 * 2)
    assert num_bytes("layernorm") == pytest.approx(53 * 4096 * 2 * 2048 * 2)


def test_the_exchanges_of_a_recomputed_moe_layer_happen_again_and_those_of_its_activation_do_not() -> None:
    base = Scenario.make(**MOONLIGHT)
    none, act, whole = (
        summarise(run_step(base.with_(recompute=how))).step_parts_s for how in ("none", "moe_act", "moe")
    )
    for part in ("dispatch", "combine"):
        assert act[part] == pytest.approx(none[part])
        assert whole[part] == pytest.approx(1.5 * none[part])  # forward, again, backward


def test_a_step_grows_by_what_is_recomputed_and_its_model_flops_do_not() -> None:
    base = Scenario.make(**MOONLIGHT)
    results = {how: summarise(run_step(base.with_(recompute=how))) for how in ("none", *MODULES, ALL)}
    none = results.pop("none")
    for result in results.values():
        added = {part: result.step_parts_s[part] - none.step_parts_s[part] for part in none.step_parts_s}
        assert added["recompute"] > 0
        assert result.step_s - none.step_s == pytest.approx(sum(added.values()))
        assert {part for part, seconds in added.items() if abs(seconds) > 1e-9} <= {
            "recompute",
            "tensor_parallel_comm",
            "dispatch",
            "combine",
            "host",
        }
        assert result.mfu * result.step_s == pytest.approx(none.mfu * none.step_s)


def test_operations_are_each_done_again_once_whatever_names_them() -> None:
    for chosen in itertools.combinations(MODULES, 2):
        again = operations_again(MOE, replace(TRAIN, recompute=chosen))
        assert len(again) == len(set(again))
    assert operations_again(MOE, replace(TRAIN, recompute="moe,moe_act,shared_experts")) == operations_again(
        MOE, replace(TRAIN, recompute="moe")
    )
    assert operations_again(MOE, replace(TRAIN, recompute="full")) == ()


def test_moonlights_modules_save_exactly_the_tensors_that_are_not_kept() -> None:
    base = Scenario.make(**MOONLIGHT)

    def allocated_bytes(recompute: str) -> float:
        scenario = base.with_(recompute=recompute)
        (memory,) = memory_by_stage(scenario, step_load(scenario), scenario.train)
        return memory.allocated_bytes

    none = allocated_bytes("none")
    saved = {module: none - allocated_bytes(module) for module in ("mla_up_proj", "moe_act")}
    # 27 layers of 4,096 tokens: queries, keys, values, normalised latent less the gathered rotary key;
    # 12,288 rows of 1,408 in 26
    assert saved["mla_up_proj"] == pytest.approx(27 * 4096 * (8 * (192 + 192 + 128) + 512 / 2 - 64) * 2)
    assert saved["moe_act"] == pytest.approx(26 * 12288 * 1408 * 2)
