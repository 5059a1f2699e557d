"""Context parallelism of three kinds: what is exchanged, what of it shows, what is held, what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from moesim.catalog.models import load_model
from moesim.cost.activations import layer_tensors
from moesim.cost.context import buffer_bytes, key_value_bytes, output_bytes, query_bytes
from moesim.cost.device import device_cost
from moesim.cost.layer import layer_cost
from moesim.cost.memory import stage_memory
from moesim.describe.model import Ffn, GroupedQueryAttention, Layer, Model
from moesim.describe.parallel import Parallelism
from moesim.describe.workload import Training
from moesim.errors import InputError
from moesim.fabric.collectives import even_alltoall_s
from moesim.metrics.memory import memory_by_stage
from moesim.scenario import Scenario
from moesim.timeline.attention_group import context_s
from moesim.timeline.load import step_load
from moesim.timeline.step import run_step

KINDS = ("ring", "alltoall", "allgather")
LONG: dict[str, Any] = {
    "model": "qwen3-30b-a3b",
    "cluster": "h100-8x-ib400",
    "num_gpus": 32,
    "cp": 4,
    "ep": 8,
    "global_batch": 16,
    "seq_len": 16384,
    "recompute": "full",
}


def exposed_s(*, backward: bool = False, **leaves: Any) -> float:
    scenario = Scenario.make(**LONG | leaves)
    device = device_cost(scenario.cluster.gpu, scenario.train.precision)
    layer = scenario.model.layers[0]
    cost = layer_cost(scenario.model, layer, parallel=scenario.parallel, train=scenario.train, device=device)
    core_s = (cost.backward if backward else cost.forward).core_attention_s
    return float(context_s(scenario, cost, core_s, is_backward=backward))


def test_a_token_has_the_bytes_of_its_heads() -> None:
    attention = load_model("qwen3-30b-a3b").layers[0].attention  # 32 heads, 4 key-value heads, 128 wide
    assert (query_bytes(attention, 1), key_value_bytes(attention, 1), output_bytes(attention, 1)) == (8192, 2048, 8192)
    assert key_value_bytes(attention, 8) == 2 * 128 * 2  # never less than one head
    latent = load_model("deepseek-v3").layers[0].attention
    assert query_bytes(latent, 1) == 128 * 192 * 2
    assert key_value_bytes(latent, 1) == 128 * (192 + 128) * 2
    assert output_bytes(latent, 2) == 64 * 128 * 2


def test_a_ring_hides_behind_attention_once_the_sequence_is_long() -> None:
    assert exposed_s(cp_kind="ring", seq_len=1024) > 0
    assert exposed_s(cp_kind="ring", seq_len=131072) == 0
    assert exposed_s(cp_kind="ring", seq_len=131072, backward=True) == 0
    for kind in ("alltoall", "allgather"):  # neither overlaps with anything
        assert exposed_s(cp_kind=kind, seq_len=131072) > exposed_s(cp_kind=kind, seq_len=16384) > 0


def test_a_ring_never_shows_more_than_gathering_in_one_node() -> None:
    for seq_len in (1024, 4096, 16384):
        ring, gathered = (exposed_s(cp_kind=kind, seq_len=seq_len) for kind in ("ring", "allgather"))
        # A hop is a point-to-point copy at the all-to-all's rate, which is lower than that of a collective.
        assert ring < 1.3 * gathered


def test_exchanging_heads_moves_what_a_rank_has_whatever_the_number_of_ranks() -> None:
    scenario = Scenario.make(**LONG)
    whole = 1024.0 * 1024
    times = [float(even_alltoall_s(n, n, whole, scenario.cluster)) for n in (2, 4, 8)]
    latency = float(scenario.cluster.latency_intra_s)
    wires = [seconds - latency for seconds in times]
    assert wires[1] / wires[0] == pytest.approx((3 / 4) / (1 / 2))
    assert wires[2] / wires[0] == pytest.approx((7 / 8) / (1 / 2))
    assert float(even_alltoall_s(4, 4, 0.0, scenario.cluster)) == 0.0


def test_two_nodes_are_slower_than_one_for_every_kind() -> None:
    for kind in KINDS:  # tp=2 beside it: eight ranks of a sequence lie on two nodes
        near, far = (exposed_s(cp_kind=kind, model="olmoe-1b-7b", tp=2, cp=cp, seq_len=2048) for cp in (4, 8))
        assert far > 1.2 * near, kind


def test_one_rank_per_sequence_knows_no_kind() -> None:
    results = []
    for kind in KINDS:
        scenario = Scenario.make(**LONG | {"cp": 1, "cp_kind": kind, "global_batch": 32})
        results.append((run_step(scenario).step_s, memory_by_stage(scenario, step_load(scenario))))
    assert results[0] == results[1] == results[2]


def test_the_kind_reaches_the_step_and_memory() -> None:
    scenarios = [Scenario.make(**LONG | {"seq_len": 65536, "cp_kind": kind}) for kind in KINDS]
    steps = [run_step(scenario).step_s for scenario in scenarios]
    assert steps[0] < min(steps[1:])
    tensors = [
        sum(t.bytes for t in layer_tensors(s.model, s.model.layers[0], s.parallel) if t.per == "token")
        for s in scenarios
    ]
    assert tensors[1] - tensors[0] == output_bytes(scenarios[0].model.layers[0].attention, 1)
    assert tensors[2] == tensors[0]


def test_what_attention_holds_for_its_exchange_counts_where_it_is_the_most() -> None:
    attention = load_model("llama-3-8b").layers[0].attention
    pair = key_value_bytes(attention, 1)
    held = {kind: buffer_bytes(attention, Parallelism(cp=8, cp_kind=kind)) for kind in KINDS}  # type: ignore[arg-type]
    assert held == {"ring": 4 * pair, "alltoall": 2 * (pair + query_bytes(attention, 1)), "allgather": 16 * pair}
    assert buffer_bytes(attention, Parallelism()) == 0.0
    # Many key-value heads beside a narrow block: the whole sequence's keys and values are the peak.
    heads = GroupedQueryAttention(num_heads=16, num_kv_heads=16, head_dim=64)
    model = Model(name="narrow", hidden=1024, vocab=64, layers=(Layer(attention=heads, ffn=Ffn(width=256)),))
    peaks = {}
    for kind in KINDS:
        parallel = Parallelism(cp=16, cp_kind=kind)  # type: ignore[arg-type]
        ranks, train = parallel.rank_layout(16), Training(seq_len=65536, global_batch=1)
        memory = stage_memory(model, parallel, ranks, train, stage=0, received_GMLR=None)
        peaks[kind] = (memory.allocated_bytes, memory.moment)
    assert peaks["allgather"][1] == "backward of layer 1 of 1: attention"
    gathered = 4096 * 2 * 16 * key_value_bytes(heads, 1)
    assert peaks["allgather"][0] > gathered
    assert peaks["ring"][0] < peaks["allgather"][0]


@pytest.mark.parametrize(
    ("leaves", "message"),
    [
        ({"cp_kind": "alltoall", "cp": 8}, "must divide the 4 key-value heads of a tensor-parallel rank"),
        ({"cp_kind": "alltoall", "cp": 4, "tp": 2}, "must divide the 2 key-value heads"),
        ({"cp_kind": "ulysses"}, "must be ring or alltoall or allgather"),
        ({"seq_len": 4}, r"must be a multiple of 2\*cp = 8"),
    ],
)
def test_what_does_not_divide_is_refused_by_name(leaves: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Scenario.make(**LONG | leaves)


def test_attention_of_a_ring_is_that_of_the_others() -> None:
    base = Scenario.make(**LONG)
    seconds = []
    for kind in KINDS:
        parallel = replace(base.parallel, cp_kind=kind)  # type: ignore[arg-type]
        device = device_cost(base.cluster.gpu, "bf16")
        cost = layer_cost(base.model, base.model.layers[0], parallel=parallel, train=base.train, device=device)
        assert cost.forward.core_attention_s < cost.forward.attention_s
        seconds.append(cost.forward.attention_s)
    assert len(set(seconds)) == 1
