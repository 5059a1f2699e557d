"""The whole step: what adds up, what cannot change, what must get slower, and what the trace holds."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from moesim.cost.software import MEGATRON
from moesim.describe.hardware import Sourced
from moesim.describe.schedules import OneForwardOneBackward
from moesim.errors import InputError
from moesim.metrics.summary import summarise
from moesim.scenario import Scenario
from moesim.timeline import step as step_room
from moesim.timeline.pipeline import DeadlockError
from moesim.timeline.step import run_step

SMALL = {"model": "mixtral-8x7b", "cluster": "h100-8x-ib400", "num_gpus": 32, "ep": 8, "pp": 2, "global_batch": 64}


def scenario(**changes):
    return Scenario.make(**{**SMALL, **changes})


def result(**changes):
    return summarise(run_step(scenario(**changes)))


LAYOUTS = [
    {},
    {"tp": 2, "ep": 4, "num_gpus": 32},
    {"tp": 4, "ep": 2, "pp": 1},
    {"ep": 4, "etp": 2, "recompute": "full"},
    {"pp": 4, "vpp": 2, "global_batch": 128, "overlap": "grad_reduce"},
    {"cp": 2, "zero": 3},
    {"ep": 1, "zero": 0, "capacity_factor": 1.0},
    {"model": "llama-3-8b", "ep": 1, "tp": 4},
    {"pp": 4, "schedule": "gpipe", "zero": 2},
    {"pp": 4, "overlap": "forward_backward,weight_gradient,grad_reduce"},
    {"pp": 4, "schedule": "dualpipe", "global_batch": 128},
    {"pp": 4, "schedule": "zb-h1", "recompute": "moe_act", "overlap": "grad_reduce"},
    {"model": "switch-base-128", "cluster": "a100-8x-ib200", "ep": 16, "pp": 1, "num_gpus": 16, "seq_len": 512},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_parts_of_every_rank_sum_to_the_step(layout):
    trace = run_step(scenario(**layout))
    for run in trace.stages:
        assert sum(
            np.broadcast_to(part_R, run.part_R["optimizer"].shape) for part_R in run.part_R.values()
        ) == pytest.approx(trace.step_s)
        assert min(float(np.min(part_R)) for part_R in run.part_R.values()) >= -1e-9
    parts = summarise(trace).step_parts_s
    assert sum(parts.values()) == pytest.approx(trace.step_s)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_step_lies_between_its_busiest_rank_and_all_stages_in_a_row(layout):
    trace = run_step(scenario(**layout))
    idle = ("wait_for_slowest", "pipeline_bubble")
    in_a_row = 0.0
    for run in trace.stages:
        shape = run.part_R["optimizer"].shape
        own_R = sum(np.broadcast_to(part_R, shape) for part, part_R in run.part_R.items() if part not in idle)
        assert own_R.max() <= trace.step_s * (1 + 1e-12)
        in_a_row += float((own_R + run.part_R["wait_for_slowest"]).max())
    assert trace.step_s <= in_a_row + 1e-9


def test_same_seed_gives_the_same_result_and_another_seed_another():
    first, second, other = result(seed=3), result(seed=3), result(seed=4)
    assert json.dumps(first.to_dict()) == json.dumps(second.to_dict())
    assert other.step_s != first.step_s


def test_holding_weight_gradients_back_shortens_the_bubble_and_computes_the_same():
    at = {"pp": 4, "global_batch": 64, "popularity": "balanced"}
    whole, split, gpipe = (result(**at, schedule=name) for name in ("1f1b", "zb-h1", "gpipe"))
    assert split.compute_s == pytest.approx(whole.compute_s)
    assert split.bubble_fraction < 0.7 * whole.bubble_fraction
    # Stages differ by embedding and head alone, so the bubble is near its closed form in either order.
    assert gpipe.step_s == pytest.approx(whole.step_s, rel=0.01)
    assert gpipe.memory["activations_bytes"] > whole.memory["activations_bytes"]


def test_a_step_that_cannot_go_on_names_the_ranks_and_what_they_wait_for(monkeypatch):
    class Backwards(OneForwardOneBackward):
        def __call__(self, stage, num_micro_batches):
            operations = super().__call__(stage, num_micro_batches)
            return operations[::-1] if stage == 1 else operations

    monkeypatch.setattr(step_room, "make_schedule", lambda *_, **sizes: Backwards(pp=sizes["pp"]))
    told = r"stage 0, ranks 0-7, waits for the backward of micro-batch 0 at chunk 0; .*stage 1, ranks 16-23, waits for"
    with pytest.raises(DeadlockError, match=told):
        run_step(scenario())


def test_one_expert_parallel_rank_exchanges_nothing():
    parts = result(ep=1).step_parts_s
    assert parts["dispatch"] == parts["combine"] == 0.0


def test_balanced_routing_never_waits_and_simulates_one_block_for_all():
    trace = run_step(scenario(popularity="balanced"))
    assert trace.num_simulated_blocks == 1 < trace.num_blocks
    assert summarise(trace).wait_s == pytest.approx(0.0, abs=1e-12)


def test_folded_replicas_give_the_step_of_unfolded_ones(monkeypatch):
    folded = run_step(scenario(popularity="balanced"))
    monkeypatch.setattr(step_room, "_all_blocks_same", lambda _times: False)
    unfolded = run_step(scenario(popularity="balanced"))
    assert unfolded.num_simulated_blocks == unfolded.num_blocks > 1
    assert unfolded.step_s == folded.step_s
    assert summarise(unfolded).step_parts_s == summarise(folded).step_parts_s


def test_skew_costs_time_and_capacity_buys_it_back_with_drops():
    balanced, skewed, capped = result(popularity="balanced"), result(gini=0.3), result(gini=0.3, capacity_factor=1.0)
    # At a factor of 1 the fullest rank holds what every rank holds when balanced: the step is as long, not shorter.
    assert balanced.step_s <= capped.step_s < skewed.step_s
    assert balanced.drop_fraction == skewed.drop_fraction == 0.0 < capped.drop_fraction
    assert capped.kept_assignment_fraction == pytest.approx(1 - capped.drop_fraction)


def test_drop_fraction_is_that_of_the_counts_drawn():
    trace = run_step(scenario(gini=0.3, capacity_factor=1.1))
    load = trace.load.load
    assert summarise(trace).drop_fraction == pytest.approx(
        1 - load.kept_GMLE.sum() / load.assigned_GMLE.sum(), rel=1e-4
    )
    assert (load.kept_GMLE <= load.assigned_GMLE + 1e-3).all()


@pytest.mark.parametrize(
    ("slower", "than"),
    [
        ({"recompute": "full"}, {}),
        ({"micro_batch": 1, "global_batch": 64, "overlap": "none"}, {"overlap": "grad_reduce"}),
        ({"cluster": "a100-8x-ib200"}, {}),
        ({"seq_len": 8192}, {}),
    ],
)
def test_more_work_or_a_slower_gpu_takes_longer(slower, than):
    assert result(**slower).step_s > result(**than).step_s


@pytest.mark.parametrize(
    ("cross_rail", "ep", "slows"), [("pxn", 32, False), ("direct", 32, False), ("spine", 32, True), ("spine", 8, False)]
)
def test_where_oversubscription_does_not_slow_the_all_to_alls_the_result_says_so(cross_rail, ep, slows):
    at = scenario(ep=ep, pp=1, model="qwen3-30b-a3b", popularity="balanced")

    def result_at(oversubscription):
        cluster = dataclasses.replace(at.cluster, cross_rail=cross_rail, oversubscription=oversubscription)
        return summarise(run_step(at.with_(cluster=cluster)))

    wide, narrow = result_at(1.0), result_at(4.0)
    assert (narrow.step_parts_s["dispatch"] > 2 * wide.step_parts_s["dispatch"]) == slows
    assert (narrow.step_parts_s["dispatch"] > wide.step_parts_s["dispatch"]) == slows
    assert any("oversubscription 4 does not slow" in warning for warning in narrow.warnings) == (not slows)
    assert not any("oversubscription" in warning for warning in wide.warnings)


@pytest.mark.parametrize("num_micro_batches", [1, 4])
@pytest.mark.parametrize("pp", [1, 2])
def test_sharding_more_exchanges_no_less_for_every_parameter_once_a_micro_batch(pp, num_micro_batches):
    dense = {"model": "llama-3-8b", "ep": 1, "pp": pp, "global_batch": 32 // pp * num_micro_batches}
    traces = [run_step(scenario(**dense, zero=zero)) for zero in (1, 2, 3)]
    exchanged = [
        [float(np.mean(run.part_R["gradient_reduction"])) for run in trace.stages] for trace in traces
    ]  # embedding and head included, on the stages that hold them
    for one, two, three in zip(*exchanged, strict=True):
        assert three > two >= one * (1 - 1e-9)
        assert (two == pytest.approx(one)) == (num_micro_batches == 1)
    assert traces[1].step_s >= traces[0].step_s * (1 - 1e-9)


def test_gathering_and_scattering_under_zero_3_is_booked_as_gradient_reduction():
    trace = run_step(scenario(pp=1, ep=1, model="llama-3-8b", zero=3))
    (backward,) = [op for op in trace.stages[0].operations if op.is_backward]
    booked = dict(zip(backward.times.names, backward.times.parts, strict=True))
    assert booked["gather weights"] == booked["scatter gradients"] == "gradient_reduction"


def test_a_slower_nic_slows_a_dispatch_that_crosses_nodes_and_one_that_does_not_is_untouched():
    def dispatch_s(ep, factor):
        at = scenario(ep=ep, pp=1, num_gpus=32, model="qwen3-30b-a3b")
        rate = dataclasses.replace(at.cluster.nic_bytes_per_s, value=at.cluster.nic_bytes_per_s.value / factor)
        return summarise(
            run_step(at.with_(cluster=dataclasses.replace(at.cluster, nic_bytes_per_s=rate)))
        ).step_parts_s["dispatch"]

    assert dispatch_s(32, 4) > 3 * dispatch_s(32, 1)
    assert dispatch_s(8, 4) == dispatch_s(8, 1)


def test_chrome_trace_opens_with_unique_thread_ids_and_no_overlap(tmp_path):
    trace = run_step(scenario())
    written = trace.write_chrome(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    threads: dict[int, set[int]] = {}
    rows: dict[int, list[tuple[float, float]]] = {}
    for event in events:
        assert event["pid"] >= 1
        assert event["tid"] >= 1
        threads.setdefault(event["tid"], set()).add(event["pid"])
        if event["ph"] == "X":
            rows.setdefault(event["pid"], []).append((event["ts"], event["ts"] + event["dur"]))
    assert all(len(pids) == 1 for pids in threads.values())
    assert sorted(rows) == sorted(rank + 1 for rank in written)
    for spans in rows.values():
        spans.sort()
        assert all(before[1] <= after[0] + 0.002 for before, after in itertools.pairwise(spans))
        assert spans[-1][1] == pytest.approx(trace.step_s * 1e6, rel=1e-6)


def test_a_trace_keeps_within_its_size_and_says_which_ranks_it_holds(tmp_path):
    trace = run_step(scenario())
    whole = trace.write_chrome(tmp_path / "whole.json")
    limit = (tmp_path / "whole.json").stat().st_size // 2
    part = trace.write_chrome(tmp_path / "part.json", max_bytes=limit)
    assert (tmp_path / "part.json").stat().st_size <= limit + 100
    assert part == whole[: len(part)]
    assert 0 < len(part) < len(whole)
    with pytest.raises(InputError, match=r"only ranks .* were traced"):
        trace.spans([10**6])


def test_spans_of_a_rank_sum_to_its_parts():
    trace = run_step(scenario(pp=1, num_gpus=8))
    rank = int(trace.stages[0].traced_R[0])
    spans = trace.spans([rank])
    idle = ("wait_for_slowest", "pipeline_bubble")
    busy = sum(float(np.broadcast_to(s, 8)[rank]) for part, s in trace.stages[0].part_R.items() if part not in idle)
    assert spans.seconds.sum() == pytest.approx(busy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ep": 64}, r"ep=64 does not divide dp\*cp\*tp = 16\*1\*1 = 16"),
        ({"ep": 16}, "must divide the 8 experts of mixtral-8x7b"),
        ({"model": "llama-3-8b"}, "must be 1, since llama-3-8b is dense"),
        ({"tp": 16, "ep": 1}, "must fit into a node of 8"),
        ({"global_batch": 65}, r"must be a multiple of micro_batch\*dp = 1\*16 = 16"),
        ({"pp": 32, "ep": 1, "num_gpus": 64, "vpp": 2}, "must not exceed the model's 32 layers"),
        ({"num_gpus": 30}, "must fill whole nodes of 8|must divide num_gpus=30"),
        ({"gini": 1.5}, "must lie in 0..0.95"),
        ({"popularity": "balanced", "gini": 0.2}, "gini"),
        ({"epp": 8}, "Did you mean .*ep"),
    ],
)
def test_an_impossible_scenario_is_refused_by_name(changes, message):
    with pytest.raises(InputError, match=message):
        scenario(**changes)


def test_ranks_asked_for_are_traced_beside_the_default_ones(tmp_path):
    trace = run_step(scenario(), trace_ranks=[3, 20])
    assert trace.write_chrome(tmp_path / "trace.json", ranks=[3, 20]) == [3, 20]
    assert run_step(scenario()).representative_ranks() == trace.representative_ranks()
    with pytest.raises(InputError, match=r"trace: ranks: must lie in 0\.\.31"):
        run_step(scenario(), trace_ranks=[32])


def test_a_group_that_straddles_two_nvlink_domains_is_not_taken_for_one_that_does_not():
    straddling = run_step(
        scenario(
            model="qwen3-30b-a3b",
            cluster="gb200-nvl72",
            pp=1,
            ep=64,
            num_gpus=576,
            popularity="balanced",
            global_batch=576,
        )
    )
    exchange = straddling.load.exchange_by_stage[0]
    first, second = exchange.dispatch_s_GMLR[0].max(), exchange.dispatch_s_GMLR[1].max()
    assert second > 2 * first  # ranks 64 to 127 lie in two domains of 72, ranks 0 to 63 in one


def test_deduplicating_by_node_sends_less_over_the_network_where_tokens_visit_several_ranks_of_a_node():
    at = {"model": "qwen3-30b-a3b", "ep": 32, "pp": 1, "num_gpus": 32}
    by_rank, by_node = result(**at), result(**at, dispatcher="deepep")
    assert by_node.step_parts_s["dispatch"] < 0.8 * by_rank.step_parts_s["dispatch"]
    assert by_node.step_s < by_rank.step_s


def test_one_and_two_threads_give_the_same_bytes():
    command = [sys.executable, "-m", "moesim", "simulate", "--model", "qwen3-30b-a3b", "--cluster", "h100-8x-ib400"]
    command += ["--num-gpus", "64", "--ep", "32", "--global-batch", "256", "--json"]
    answers = []
    for threads in ("1", "2"):
        limits = dict.fromkeys(
            ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), threads
        )
        done = subprocess.run(command, capture_output=True, check=True, env=os.environ | limits)
        answer = json.loads(done.stdout)
        assert answer.pop("run")
        answers.append(json.dumps(answer))
    assert answers[0] == answers[1]


def test_the_assumed_numbers_of_memory_are_listed_with_the_others():
    told = {item.part: item for item in result().provenance}
    numbers = [value for value in vars(MEGATRON).values() if isinstance(value, Sourced)]
    assert {number.source for number in numbers} == {told[part].source for part in told if part.startswith("memory: ")}
    assert told["memory: CUDA context"].kind == told["memory: NCCL buffers of a communicator"].kind == "assumed"
