"""Peak memory against runs on 8 B200: what torch's allocator handed out, per pipeline stage.

Source: MooreThreads/SimuMax@4dcaae5, docs/b200/b200_release_v1.2_summary.json (2026-05-01): Megatron-LM 23e00ed with
TransformerEngine 2.11, BF16 with fp32 gradients, distributed optimizer, fused cross entropy, no recomputation, no
overlap, balanced routing padded to capacity 1.0. The peak does not depend on the number of micro-batches there, so each
row stands once; model sizes are the launcher's (405B with 16 key-value heads; vocabulary plus one, padded to 128*tp).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesim.cost.memory import stage_memory
from moesim.cost.software import MEGATRON
from moesim.describe.model import Ffn, GroupedQueryAttention, LatentAttention, Layer, Model, MoeFfn, Router
from moesim.describe.parallel import Parallelism
from moesim.describe.workload import Training
from moesim.units import MIB

FUSED = replace(MEGATRON, fused_cross_entropy=True)
# model, tp, pp, cp, seq_len, highest allocated MiB over the ranks of each stage
DENSE_RUNS = (
    ("70b", 1, 2, 1, 4096, (68149.2, 64479.5)),
    ("70b", 2, 1, 1, 4096, (62136.4,)),
    ("70b", 4, 1, 1, 4096, (40009.8,)),
    ("70b", 8, 1, 1, 4096, (28965.4,)),
    ("405b", 1, 2, 1, 4096, (88688.9, 89173.4)),
    ("405b", 2, 1, 1, 4096, (83549.9,)),
    ("405b", 4, 1, 1, 4096, (54158.1,)),
    ("405b", 8, 1, 1, 4096, (39499.8,)),
    ("70b", 2, 1, 4, 32768, (70070.6,)),
    ("70b", 1, 1, 8, 32768, (107017.1,)),
    ("405b", 2, 1, 4, 32768, (89113.8,)),
    ("405b", 1, 1, 8, 32768, (142557.5,)),
    ("70b", 2, 1, 4, 131072, (115372.0,)),
    ("70b", 1, 1, 8, 131072, (151539.4,)),
    ("405b", 2, 1, 4, 131072, (120962.5,)),
)


def llama(size: str, tp: int) -> Model:
    hidden, width, heads, kv_heads, num_layers = {"70b": (8192, 28672, 64, 8, 12), "405b": (16384, 53248, 128, 16, 4)}[
        size
    ]
    attention = GroupedQueryAttention(num_heads=heads, num_kv_heads=kv_heads, head_dim=128)
    layers = (Layer(attention=attention, ffn=Ffn(width=width)),) * num_layers
    return Model(name=size, hidden=hidden, vocab=padded(128257, tp), layers=layers)


def deepseek_v3_of_four_layers() -> Model:
    attention = LatentAttention(
        num_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    )
    dense = Layer(attention=attention, ffn=Ffn(width=18432))
    ffn = MoeFfn(num_experts=256, expert=Ffn(width=2048), router=Router(top_k=8), shared=Ffn(width=2048))
    moe = Layer(attention=attention, ffn=ffn)
    return Model(name="deepseek-v3", hidden=7168, vocab=padded(129281, 1), layers=(dense, moe, moe, moe))


def padded(vocab: int, tp: int) -> int:
    return -(-vocab // (128 * tp)) * 128 * tp


def dense_errors() -> list[float]:
    """Predicted over measured - 1, one per stage of each run."""
    errors = []
    for size, tp, pp, cp, seq_len, measured_mib in DENSE_RUNS:
        parallel = Parallelism(tp=tp, pp=pp, cp=cp, cp_kind="alltoall", zero=1)
        layout = parallel.rank_layout(8)
        train = Training(seq_len=seq_len, global_batch=4 * layout.dp)
        model = llama(size, tp)
        for stage, mib in enumerate(measured_mib):
            memory = stage_memory(model, parallel, layout, train, stage=stage, received_GMLR=None, software=FUSED)
            errors.append(memory.allocated_bytes / (mib * MIB) - 1)
    return errors


def test_dense_peaks_on_b200_are_within_a_tenth_of_a_percent() -> None:
    errors = np.abs(dense_errors())
    assert len(errors) == 17
    assert errors.mean() < 0.0005  # 0.0002 when written; the milestone asks for 0.01
    assert errors.max() < 0.001  # 0.0005 when written; the milestone asks for 0.02


@pytest.mark.parametrize("num_micro_batches", [4, 8])
def test_the_moe_peak_on_b200_is_within_one_percent(num_micro_batches: int) -> None:
    parallel = Parallelism(ep=8, zero=1)
    layout = parallel.rank_layout(8)
    received = np.full((1, num_micro_batches, 3, 8), 4096.0 * 8)
    train = Training(global_batch=8 * num_micro_batches)
    model = deepseek_v3_of_four_layers()
    memory = stage_memory(model, parallel, layout, train, stage=0, received_GMLR=received, software=FUSED)
    error = memory.allocated_bytes / (106803.8 * MIB) - 1
    assert -0.01 < error < 0.0  # -0.0068 when written: 731 MiB of the four-layer run are not accounted for


def test_what_the_allocator_reserves_on_b200_is_within_four_percent() -> None:
    parallel = Parallelism(tp=4, zero=1)
    train = Training(global_batch=8)
    model = llama("70b", 4)
    memory = stage_memory(model, parallel, parallel.rank_layout(8), train, stage=0, received_GMLR=None, software=FUSED)
    reserved = memory.allocated_bytes + memory.reserved_bytes - FUSED.context_bytes.value
    assert reserved / (40.18 * 1024 * MIB) - 1 == pytest.approx(0.0, abs=0.04)  # runs lie 2.8 to 9.3 % above allocated
