"""FSDP2 and HSDP: hand-computed bytes of a small stage, laws, what replicas exchange."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cost.memory import stage_memory
from moesim.cost.static import StaticMemory, rank_parameters, static_memory, table_buffers_bytes
from moesim.describe.model import Ffn, GroupedQueryAttention, Layer, Model, MoeFfn, Router
from moesim.describe.parallel import Parallelism
from moesim.describe.pipeline import stage_chunks
from moesim.describe.workload import Optimizer, Training
from moesim.errors import InputError
from moesim.fabric.collectives import allgather_s, allreduce_s, reduce_scatter_s
from moesim.scenario import Scenario
from moesim.timeline.reduction import _shape_of_groups, gradient_reduction_s, sharded_weights_s
from moesim.timeline.step import run_step

ATTENTION = GroupedQueryAttention(num_heads=16, num_kv_heads=4, head_dim=64)
DENSE = Layer(attention=ATTENTION, ffn=Ffn(width=4096))
MOE = Layer(attention=ATTENTION, ffn=MoeFfn(num_experts=16, expert=Ffn(width=512), router=Router(top_k=4)))
MODEL = Model(name="small", hidden=1024, vocab=32000, layers=(DENSE,) * 4)
LAYER = 1024 * (16 + 8) * 64 + 1024 * 1024 + 3 * 1024 * 4096 + 2 * 1024
TABLE = 32000 * 1024
WHOLE = 2 * TABLE + 1024 + 4 * LAYER
TRAIN = Training(seq_len=1024, global_batch=64)
ASKED = {"model": "llama-3-8b", "cluster": "h100-8x-ib400", "num_gpus": 32, "global_batch": 64}


def static(num_gpus: int = 8, train: Training = TRAIN, stage: int = 0, **sizes: int | bool) -> StaticMemory:
    parallel = Parallelism(**({"fsdp": True, "zero": 3} | sizes))  # type: ignore[arg-type]
    return static_memory(MODEL, parallel, parallel.rank_layout(num_gpus), train, stage=stage)


def test_fsdp_holds_fp32_shards_two_gathered_layers_and_one_layers_gradients_twice() -> None:
    found = static()
    assert found.weights_bytes == 2 * 2 * LAYER
    assert found.gradients_bytes == pytest.approx(4 * WHOLE / 8 + (4 + 2) * LAYER)
    assert found.optimizer_bytes == pytest.approx(12 * WHOLE / 8)  # the shard itself, two moments
    lean = static(train=replace(TRAIN, optimizer=Optimizer(gradients="bf16")))
    assert lean.gradients_bytes == pytest.approx(4 * WHOLE / 8 + (2 + 2) * LAYER)


def test_weights_that_stay_gathered_are_all_there_and_bf16_shards_stand_beside_states() -> None:
    assert static(zero=2).weights_bytes == 2 * WHOLE
    plain = static(train=replace(TRAIN, optimizer=Optimizer(main_weights="none", moments="bf16")))
    assert plain.weights_bytes == pytest.approx(2 * 2 * LAYER + 2 * WHOLE / 8)
    assert plain.gradients_bytes == pytest.approx(2 * WHOLE / 8 + (4 + 2) * LAYER)
    assert plain.optimizer_bytes == pytest.approx(4 * WHOLE / 8)


def test_with_a_pipeline_gradients_wait_whole_for_the_last_micro_batch() -> None:
    on_stage = TABLE + 2 * LAYER
    assert static(pp=2).gradients_bytes == pytest.approx(4 * on_stage / 4 + 4 * on_stage)


def test_groups_that_hold_the_same_shards_hold_more_of_them() -> None:
    one, two = static(num_gpus=16), static(num_gpus=16, replicate=2)
    assert two.optimizer_bytes == 2 * one.optimizer_bytes == static(num_gpus=8).optimizer_bytes
    assert two == static(num_gpus=8)
    megatron = static(num_gpus=16, zero=1, fsdp=False, replicate=2)
    assert megatron.optimizer_bytes == pytest.approx(12 * WHOLE / 8)


def test_head_and_embedding_are_gathered_and_reduced_as_units_of_their_own() -> None:
    assert table_buffers_bytes(TABLE, Parallelism(fsdp=True, zero=3), TRAIN) == (2 + 4) * TABLE
    assert table_buffers_bytes(TABLE, Parallelism(fsdp=True, zero=2), TRAIN) == 4 * TABLE
    assert table_buffers_bytes(TABLE, Parallelism(zero=3), TRAIN) == 0.0
    plain, sharded = (Parallelism(zero=3, fsdp=fsdp) for fsdp in (False, True))
    before, after = (
        stage_memory(MODEL, p, p.rank_layout(8), TRAIN, stage=0, received_GMLR=None) for p in (plain, sharded)
    )
    assert before.moment == after.moment == "backward of the head"
    assert after.activations_bytes - before.activations_bytes == pytest.approx((2 + 4) * TABLE)


sizes = st.sampled_from([1, 2, 4])


@settings(max_examples=40, deadline=None)
@given(ep=sizes, tp=sizes, cp=sizes, pp=sizes, replicate=sizes, moments=st.sampled_from(["fp32", "bf16"]))
def test_fewer_shards_or_weights_that_stay_never_need_less(
    ep: int, tp: int, cp: int, pp: int, replicate: int, moments: str
) -> None:
    model = replace(MODEL, layers=(DENSE, *(MOE,) * 7))
    train = replace(TRAIN, optimizer=Optimizer(moments=moments))

    def peak(**how: int | bool) -> float:
        parallel = Parallelism(ep=ep, tp=tp, cp=cp, pp=pp, **how)  # type: ignore[arg-type]
        layout = parallel.rank_layout(256)
        num_moe = sum(item.layer.is_moe for chunk in stage_chunks(model, parallel, train, 0) for item in chunk)
        shape = (1, train.num_micro_batches(layout.dp), num_moe, ep)
        received = np.full(shape, 4 * 1024 / cp / tp)
        return stage_memory(model, parallel, layout, train, stage=0, received_GMLR=received).peak_bytes

    train = replace(train, global_batch=256)
    sharded = peak(fsdp=True, zero=3)
    assert sharded <= peak(fsdp=True, zero=3, replicate=replicate) + 1
    assert sharded <= peak(fsdp=True, zero=2) + 1


def test_experts_are_sharded_over_their_own_replicas() -> None:
    model = replace(MODEL, layers=(MOE,))
    parallel = Parallelism(ep=4, fsdp=True, zero=3)
    dense, expert = rank_parameters(model, stage_chunks(model, parallel, TRAIN, 0)[0][0], parallel)
    found = static_memory(model, parallel, parallel.rank_layout(16), TRAIN, stage=0)
    outer = 2 * TABLE + 1024
    assert found.optimizer_bytes == pytest.approx(12 * ((outer + dense) / 16 + expert / 4))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"fsdp": True, "zero": 1}, "must be 2 or 3 with fsdp"),
        ({"replicate": 2, "zero": 0}, "needs zero of at least 1"),
        ({"replicate": 3}, "must divide the 32 replicas"),
        ({"replicate": 0}, "replicate"),
    ],
)
def test_sharding_that_cannot_be_is_refused(how: dict[str, int], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Scenario.make(**ASKED, **how)


def test_shards_are_exchanged_inside_a_group_and_added_up_across() -> None:
    flat, split = Scenario.make(**ASKED, fsdp=True, zero=3), Scenario.make(**ASKED, fsdp=True, zero=3, replicate=4)
    cluster, count = flat.cluster, 1e9
    assert _shape_of_groups(1, 1, 1, 1, 1, 4, 32, 8, "dpcp") == (8, 8, 4, 1)  # a node each; a rank of each node
    gather_s, scatter_s = sharded_weights_s(flat, count, 0.0)
    assert gather_s == pytest.approx(float(allgather_s(32, 8, 2 * count, cluster)))
    assert scatter_s == pytest.approx(float(reduce_scatter_s(32, 8, 4 * count, cluster)))
    across = float(allreduce_s(4, 1, 4 * count / 8, cluster))
    inside = float(reduce_scatter_s(8, 8, 4 * count, cluster))
    gather_s, scatter_s = sharded_weights_s(split, count, 0.0)
    assert gather_s == pytest.approx(float(allgather_s(8, 8, 2 * count, cluster)))
    assert scatter_s == pytest.approx(inside + across)
    assert gradient_reduction_s(split, count, 0.0) == (0.0, 0.0)
    piped = split.with_(pp=2, replicate=2)
    assert sharded_weights_s(piped, count, 0.0)[1] == 0.0
    assert gradient_reduction_s(piped, count, 0.0)[0] > 0.0


def test_gathers_hide_behind_layers_so_a_step_is_near_that_of_zero_1_whose_exchanges_hide() -> None:
    shown, fsdp, once = (
        run_step(Scenario.make(**ASKED, micro_batch=2, **how)).step_s
        for how in ({"zero": 3}, {"zero": 3, "fsdp": True}, {"zero": 1, "overlap": "grad_reduce,param_gather"})
    )
    assert 0.95 * once < fsdp < 0.9 * shown
