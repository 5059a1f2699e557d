"""Descriptions refuse what cannot be, by name; rank groups partition the ranks."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.catalog.hardware import load_cluster
from moesim.describe.hardware import Sourced
from moesim.describe.model import (
    Ffn,
    GroupedQueryAttention,
    LatentAttention,
    Layer,
    Model,
    MoeFfn,
    Router,
)
from moesim.describe.parallel import Parallelism
from moesim.describe.workload import Lognormal, Routing, Training
from moesim.errors import InputError

KINDS = ("tp", "cp", "dp", "pp", "etp", "ep", "edp", "dpcp")
small = st.sampled_from([1, 2, 3, 4])


@st.composite
def layouts(draw: st.DrawFn) -> Any:
    """A parallelism and a number of GPUs that it divides."""
    tp, cp, pp, ep, etp = (draw(small) for _ in range(5))
    per_stage = np.lcm.reduce([tp * cp, ep * etp]) * draw(small)
    return Parallelism(tp=tp, cp=cp, pp=pp, ep=ep, etp=etp).rank_layout(int(per_stage) * pp)


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_groups_of_each_kind_partition_the_ranks(layout: Any) -> None:
    p = layout.parallel
    sizes = {"tp": p.tp, "cp": p.cp, "dp": layout.dp, "pp": p.pp, "etp": p.etp, "ep": p.ep, "edp": layout.edp}
    for kind in KINDS:
        groups = layout.groups(kind)
        assert sorted(groups.ravel()) == list(range(layout.num_gpus)), kind
        assert groups.shape[1] == sizes.get(kind, layout.dp * p.cp), kind


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_only_pipeline_groups_cross_stages_and_blocks_hold_whole_groups(layout: Any) -> None:
    stage_of = np.arange(layout.num_gpus) // layout.ranks_per_stage
    block_of = np.arange(layout.num_gpus) // layout.block_size
    for kind in KINDS:
        stages = stage_of[layout.groups(kind)]
        assert (stages == stages[:, :1]).all() == (kind != "pp" or layout.parallel.pp == 1)
    for kind in ("tp", "cp", "etp", "ep"):
        blocks = block_of[layout.groups(kind)]
        assert (blocks == blocks[:, :1]).all(), kind
    assert layout.num_blocks * layout.block_size == layout.ranks_per_stage
    assert [int(r) for r in layout.stage_ranks(0)] == list(range(layout.ranks_per_stage))


def test_groups_follow_megatrons_order() -> None:
    layout = Parallelism(tp=2, pp=2, ep=4).rank_layout(16)
    assert layout.groups("tp")[:2].tolist() == [[0, 1], [2, 3]]
    assert layout.groups("dp")[:2].tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert layout.groups("ep")[:2].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert layout.groups("edp")[:2].tolist() == [[0, 4], [1, 5]]
    assert layout.groups("pp")[:2].tolist() == [[0, 8], [1, 9]]
    with_context = Parallelism(tp=2, cp=2).rank_layout(8)
    assert with_context.groups("cp").tolist() == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert with_context.groups("dpcp").tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize(
    ("sizes", "num_gpus", "message"),
    [
        ({"ep": 64}, 96, "parallel: ep: ep=64 does not divide dp*cp*tp = 96*1*1 = 96; got 64"),
        ({"ep": 4, "etp": 3}, 16, "parallel: ep: ep*etp=12 does not divide dp*cp*tp = 16*1*1 = 16; got 4"),
        ({"tp": 2, "cp": 2, "ep": 16}, 8, "parallel: ep: ep=16 does not divide dp*cp*tp = 2*2*2 = 8; got 16"),
        ({"tp": 8, "pp": 3}, 64, "parallel: num_gpus: tp*cp*pp = 8*1*3 = 24 must divide num_gpus=64; got 64"),
        ({}, 0, "parallel: num_gpus: must be at least 1; got 0"),
        ({}, 8.0, "parallel: num_gpus: must be a whole number; got 8.0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_word_for_word(sizes: Any, num_gpus: Any, message: str) -> None:
    with pytest.raises(InputError) as refusal:
        Parallelism(**sizes).rank_layout(num_gpus)
    assert str(refusal.value) == message


ATTENTION = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
LATENT = dict.fromkeys(("num_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 4)
LAYER = Layer(attention=GroupedQueryAttention(**ATTENTION), ffn=Ffn(width=4))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Parallelism(tp=0), "parallel: tp: must be at least 1; got 0"),
        (lambda: Parallelism(ep="8"), "parallel: ep: must be a whole number; got '8'"),
        (lambda: Parallelism(zero=4), "parallel: zero: must be 0, 1, 2 or 3; got 4"),
        (lambda: Parallelism(pp=True), "parallel: pp: must be a whole number; got True"),
        (lambda: Training(seq_len=0), "train: seq_len: must be at least 1; got 0"),
        (lambda: Training(global_batch=1e3), "train: global_batch: must be a whole number; got 1000.0"),
        (
            lambda: Training(precision="fp4"),
            "train: precision: must be bf16 or fp8 or fp8_tensor or mxfp8 or nvfp4; got 'fp4'",
        ),
        (
            lambda: Training(recompute="ful"),
            "train: recompute: must be none, full or modules among core_attn, mla_up_proj, mlp, moe, moe_act, "
            "layernorm, shared_experts; got 'ful'. Did you mean full?",
        ),
        (
            lambda: Training(global_batch=10).num_micro_batches(4),
            "train: global_batch: must be a multiple of micro_batch*dp = 1*4 = 4; got 10",
        ),
        (lambda: Lognormal(gini=1.0), "routing.popularity: gini: must lie in 0..0.95; got 1.0"),
        (lambda: Lognormal(gini=float("nan")), "routing.popularity: gini: must be finite; got nan"),
        (lambda: Routing(capacity_factor=0), "routing: capacity_factor: must be positive, or null for dropless; got 0"),
        (
            lambda: Routing(drop_policy="x"),
            "routing: drop_policy: must be probability or position or random or reroute; got 'x'",
        ),
        (
            lambda: GroupedQueryAttention(**ATTENTION | {"num_kv_heads": 3}),  # type: ignore[arg-type]
            "attention: num_kv_heads: must divide num_heads=4; got 3",
        ),
        (
            lambda: GroupedQueryAttention(**ATTENTION, sliding_window=0),  # type: ignore[arg-type]
            "attention: sliding_window: must be at least 1; got 0",
        ),
        (lambda: LatentAttention(**LATENT, q_lora_rank=0), "attention: q_lora_rank: must be at least 1; got 0"),
        (lambda: Ffn(width=-4), "ffn: width: must be at least 1; got -4"),
        (lambda: Router(top_k=0), "router: top_k: must be at least 1; got 0"),
        (lambda: Router(top_k=1, top_groups=2), "router: top_groups: must lie in 1..num_groups=1; got 2"),
        (lambda: Router(top_k=1, scoring="relu"), "router: scoring: must be softmax or sigmoid; got 'relu'"),
        (lambda: moe(4, top_k=5), "moe: top_k: must not exceed num_experts=4; got 5"),
        (lambda: moe(6, top_k=1, num_groups=4), "moe: num_groups: must divide num_experts=6; got 4"),
        (
            lambda: moe(8, top_k=3, num_groups=4),
            "moe: top_k: must not exceed the 2 experts of top_groups=1 groups; got 3",
        ),
        (lambda: moe(1_000_001), "moe: num_experts: must not exceed 100000; got 1000001"),
        (lambda: Model(name="m", hidden=8, vocab=8, layers=()), "model m: layers: must not be empty; got 0"),
        (lambda: Model(name="m", hidden=8, vocab=-1, layers=(LAYER,)), "model m: vocab: must be at least 1; got -1"),
        (
            lambda: Sourced(value=float("inf"), unit="B", kind="spec", source="s", date="2025"),
            "number from s: value: must be finite; got inf",
        ),
        (
            lambda: load_cluster("h100-8x-ib400", num_gpus=12),
            "cluster h100-8x-ib400: num_gpus: must fill whole nodes of 8; got 12",
        ),
        (
            lambda: load_cluster("h100-8x-ib400", num_gpus=8_000_000),
            "cluster h100-8x-ib400: num_gpus: must not exceed 1000000; got 8000000",
        ),
    ],
)
def test_an_impossible_description_is_refused_word_for_word(make: Any, message: str) -> None:
    with pytest.raises(InputError) as refusal:
        make()
    assert str(refusal.value) == message


def moe(num_experts: int, *, top_k: int = 1, num_groups: int = 1) -> MoeFfn:
    return MoeFfn(num_experts=num_experts, expert=Ffn(width=4), router=Router(top_k=top_k, num_groups=num_groups))


def test_descriptions_are_frozen_and_change_by_replace() -> None:
    training = Training()
    with pytest.raises(dataclasses.FrozenInstanceError):
        training.seq_len = 8  # type: ignore[misc]
    assert dataclasses.replace(training, seq_len=8).seq_len == 8
    with pytest.raises(InputError, match="seq_len"):
        dataclasses.replace(training, seq_len=-8)


def test_numpys_whole_numbers_are_whole_numbers() -> None:
    assert Parallelism(ep=np.int64(8)).rank_layout(np.int64(16)).edp == 2  # type: ignore[arg-type]
