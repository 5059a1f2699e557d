"""Memory of a rank: laws, closed forms, and the B200 runs that are carried as measurements."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.cost.memory import chunk_order, num_in_flight, stage_memory, static_memory
from moesim.describe.model import Ffn, GroupedQueryAttention, Layer, Model, MoeFfn, Router
from moesim.describe.parallel import Parallelism
from moesim.describe.workload import Training

ATTENTION = GroupedQueryAttention(num_heads=16, num_kv_heads=4, head_dim=64)
DENSE = Layer(attention=ATTENTION, ffn=Ffn(width=4096))
MOE = Layer(attention=ATTENTION, ffn=MoeFfn(num_experts=16, expert=Ffn(width=512), router=Router(top_k=4)))
MODEL = Model(name="small", hidden=1024, vocab=32000, layers=(DENSE, *(MOE,) * 7))


def peak(parallel: Parallelism, train: Training, *, num_gpus: int = 16, stage: int = 0, skew: float = 1.0):
    """Memory of a stage with every rank receiving its balanced share, the last rank ``skew`` times as much."""
    layout = parallel.layout(num_gpus)
    tokens = train.micro_batch * train.seq_len / parallel.cp / parallel.tp
    shape = (layout.edp * parallel.etp, train.num_micro_batches(layout.dp), _num_moe(parallel, stage), parallel.ep)
    received = np.full(shape, tokens * 4)
    received[..., -1] *= skew
    return stage_memory(MODEL, parallel, layout, train, stage=stage, received_GMLR=received)


def _num_moe(parallel: Parallelism, stage: int) -> int:
    per_stage = 8 // parallel.pp
    return per_stage - (stage == 0)


def test_a_hotter_rank_needs_more_memory_and_is_the_one_reported() -> None:
    parallel, train = Parallelism(ep=8), Training(seq_len=1024, global_batch=64)
    even, skewed = peak(parallel, train), peak(parallel, train, skew=3.0)
    assert skewed.rank % 8 == 7
    assert skewed.activations_bytes > even.activations_bytes
    assert skewed.dispatch_bytes > 1.5 * even.dispatch_bytes


def test_expert_parallelism_does_not_divide_the_routed_activations_of_a_rank() -> None:
    train = Training(seq_len=1024, global_batch=64)
    small, large = (peak(Parallelism(ep=ep), train) for ep in (2, 16))
    assert small.activations_bytes == pytest.approx(large.activations_bytes)
    assert small.dispatch_bytes == pytest.approx(large.dispatch_bytes)
    assert small.weights_bytes > large.weights_bytes


def test_a_stage_holds_the_micro_batches_that_1f1b_and_megatron_interleaving_say() -> None:
    assert [num_in_flight(Parallelism(pp=4), stage, 8) for stage in range(4)] == [4, 3, 2, 1]
    assert [num_in_flight(Parallelism(pp=4), stage, 2) for stage in range(4)] == [2, 2, 2, 1]
    assert [num_in_flight(Parallelism(pp=4, vpp=2), stage, 8) for stage in range(4)] == [11, 9, 7, 5]
    forwards, backwards = chunk_order(2, 2, 4)
    assert sorted(forwards) == sorted(backwards)


def test_all_ranks_of_an_unsharded_model_hold_its_weights_once() -> None:
    parallel = Parallelism(ep=16, zero=0)
    layout = parallel.layout(16)
    train = Training(seq_len=1024, global_batch=64)
    one = static_memory(MODEL, parallel, layout, train, stage=0)
    alone = static_memory(MODEL, Parallelism(zero=0), Parallelism().layout(1), train, stage=0)
    expert_bytes = 7 * 16 * 3 * 1024 * 512 * 2
    assert alone.weights_bytes - one.weights_bytes == pytest.approx(expert_bytes * 15 / 16)
    assert one.optimizer_bytes == 6 * one.weights_bytes
    assert one.gradients_bytes == 2 * one.weights_bytes
