"""Phases beside one another: against the serial layout, by hand, between the busiest queue and everything in a row."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cli.call import SCENARIO_OPTIONS
from moesim.describe.parallel import Parallelism
from moesim.describe.workload import Overlap
from moesim.errors import InputError
from moesim.metrics.summary import step_parts
from moesim.scenario import Scenario
from moesim.timeline.overlap import alone, beside, halved, lay_out_program, overlapped
from moesim.timeline.phases import Phase, lay_out
from moesim.timeline.reduction import _shape_of_groups, hidden_behind_s
from moesim.timeline.step import run_step

ROOT = Path(__file__).parent.parent
SMALL = {
    "model": "qwen3-30b-a3b",
    "cluster": "h100-8x-ib400",
    "num_gpus": 32,
    "ep": 16,
    "pp": 2,
    "global_batch": 128,
    "micro_batch": 2,
    "seq_len": 1024,
}


def compute(seconds, name="experts", **more):
    return Phase(name=name, part="experts", layer=0, seconds=seconds, **more)


def comm(seconds, name="dispatch", ranks=1, **more):
    return Phase(name=name, part=name, layer=0, seconds=seconds, ranks_in_step=ranks, **more)


def lay(program, num_runs=1, num_ranks=1, block_size=1, share=0.0):
    return lay_out_program(
        program,
        num_runs=num_runs,
        num_ranks=num_ranks,
        block_size=block_size,
        traced=np.arange(num_ranks),
        sm_share=share,
    )


def random_chain(rng, num_runs, num_ranks, length, is_backward=False):
    kinds = rng.integers(0, 2, length).astype(bool)
    kinds[0] = False
    return [
        (comm if is_comm else compute)(
            rng.random((num_runs, num_ranks)),
            is_backward=is_backward,
            **({"ranks": int(rng.choice([1, 2, 4]))} if is_comm else {}),
        )
        for is_comm in kinds
    ]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), length=st.integers(1, 8))
def test_a_chain_alone_takes_what_the_serial_layout_takes(seed, length):
    chain = random_chain(np.random.default_rng(seed), 3, 8, length)
    size = {"num_runs": 3, "num_ranks": 8, "block_size": 4}
    serial = lay_out(chain, traced=np.arange(8), **size)
    queued = lay(alone(chain), **size)
    assert queued.duration_MB == pytest.approx(serial.duration_MB)
    assert queued.start_PMV == pytest.approx(serial.start_PMV)
    assert {part: list(own) for part, own in queued.part_R.items()} == {
        part: pytest.approx(list(own)) for part, own in serial.part_R.items()
    }


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), lengths=st.tuples(st.integers(1, 8), st.integers(1, 8)), share=st.floats(0, 0.5))
def test_two_chains_take_between_the_busiest_queue_and_everything_in_a_row(seed, lengths, share):
    rng = np.random.default_rng(seed)
    chains = [random_chain(rng, 2, 4, length) for length in lengths]
    size = {"num_runs": 2, "num_ranks": 4, "block_size": 4}
    times = lay(beside(*chains), share=share, **size)
    in_a_row = sum(lay_out(chain, traced=np.arange(4), **size).duration_MB for chain in chains)
    phases = [phase for chain in chains for phase in chain]
    assert (times.duration_MB <= in_a_row / (1 - share) + 1e-9).all()
    for is_comm in (False, True):
        own_MR = sum((np.asarray(p.seconds) for p in phases if p.is_comm == is_comm), np.zeros((2, 4)))
        assert (times.duration_MB[:, 0] >= own_MR.max(axis=1) - 1e-9).all()
    total_R = sum(np.broadcast_to(own, 4) for own in times.part_R.values())
    assert total_R == pytest.approx(np.full(4, times.duration_MB.sum()))


def test_what_computes_beside_a_collective_runs_slower_by_the_multiprocessors_it_holds():
    first, second = [compute(1.0), comm(1.0), compute(0.5)], [compute(2.0)]
    times = lay(beside(first, second), share=0.25)
    # The second chain's two seconds begin with the collective: 0.75 done when it ends, 1.25 left at full speed.
    assert times.duration_MB[0, 0] == pytest.approx(1.0 + 1.0 + 1.25 + 0.5)
    assert times.hidden_comm_R[0] == pytest.approx(1.0)
    assert times.part_R["dispatch"][0] == pytest.approx(0.0)


def test_a_collective_that_waits_for_its_last_rank_already_slows_its_own():
    late = compute(np.array([[1.0, 3.0]]))
    times = lay(beside([late, comm(1.0, ranks=2)], [compute(4.0)]), num_ranks=2, block_size=2, share=0.5)
    # Rank 0 launches at 1 and ends at 4, having done 1.5 of its 4 seconds; rank 1 holds nothing back until 3.
    assert times.duration_MB[0, 0] == pytest.approx(max(4 + 2.5, 4 + 3.5))
    assert times.part_R["wait_for_slowest"][0] == pytest.approx(7.5 - 6.5)


def test_weight_gradients_fill_the_time_of_the_next_collective():
    backward = [compute(3.0, weights_s=1.0), comm(2.0), compute(0.5)]
    apart = overlapped(backward, {"weight_gradient"}, tp=1, latency_s=0.0)
    assert [phase.name for phase in apart] == ["experts", "dispatch", "experts weights", "experts"]
    assert lay(alone(apart)).duration_MB[0, 0] == pytest.approx(2.0 + 2.0 + 0.5)


def test_shared_experts_run_beside_the_dispatch():
    shared = compute(1.5, name="shared experts")
    forward = [compute(1.0), comm(2.0), compute(3.0), comm(1.0, name="combine"), shared]
    aside = overlapped(forward, {"shared_experts"}, tp=1, latency_s=0.0)
    assert lay(alone(aside)).duration_MB[0, 0] == pytest.approx(7.0)
    assert lay(alone(forward)).duration_MB[0, 0] == pytest.approx(8.5)


def test_two_chunks_compute_one_half_while_the_other_travels():
    forward = [compute(1.0), comm(2.0), compute(4.0), comm(2.0, name="combine"), compute(1.0)]
    chunked = overlapped(forward, {"chunked_dispatch"}, tp=1, latency_s=0.0)
    # 1 before, half a dispatch, both halves computed, half a combine, 1 after.
    assert lay(alone(chunked)).duration_MB[0, 0] == pytest.approx(1 + 1 + 4 + 1 + 1)
    late = overlapped(forward, {"chunked_dispatch"}, tp=1, latency_s=0.5)
    assert lay(alone(late)).duration_MB[0, 0] == pytest.approx(8.0 + 0.25 + 0.25)


def test_tensor_parallel_pieces_hide_behind_products_but_for_the_first():
    in_step = Phase(name="tensor parallel", part="tensor_parallel_comm", layer=0, seconds=4.0)
    chain = [in_step, compute(5.0, products_s=10.0), compute(1.0)]
    assert lay(alone(overlapped(chain, {"tensor_parallel"}, tp=4, latency_s=0.0))).duration_MB[0, 0] == pytest.approx(7)
    chain[1] = dataclasses.replace(chain[1], products_s=2.0)  # the rest of the phase is attention itself
    assert lay(alone(overlapped(chain, {"tensor_parallel"}, tp=4, latency_s=0.0))).duration_MB[0, 0] == pytest.approx(8)


def test_what_runs_beside_one_another_takes_no_less_than_the_host_needs_to_issue_it():
    chains = [compute(1.0), comm(1.0)], [compute(1.0)]
    program = beside(*chains)
    size = {"num_runs": 1, "num_ranks": 1, "block_size": 1, "traced": np.arange(1), "sm_share": 0.0}
    bound, free = (lay_out_program(program, issue_s=issue_s, **size) for issue_s in (5.0, 1.0))
    assert (bound.duration_MB[0, 0], bound.part_R["host"][0]) == pytest.approx((5.0, 3.0))
    assert free.duration_MB[0, 0] == pytest.approx(2.0)
    assert "host" not in free.part_R


def test_two_halves_of_a_batch_hide_each_others_exchanges():
    forward = [compute(2.0), comm(2.0), compute(2.0), comm(2.0, name="combine")]
    half = halved(forward, 0.0)
    assert lay(beside(half, half)).duration_MB[0, 0] == pytest.approx(5.0)


OVERLAPS = [
    {"overlap": "weight_gradient"},
    {"overlap": "chunked_dispatch"},
    {"overlap": "two_batch", "seq_len": 8192},  # with few tokens the host, which issues every half, takes longer
    {"overlap": "forward_backward"},
    {"overlap": "forward_backward,weight_gradient,grad_reduce"},
    {"overlap": "forward_backward", "vpp": 2},
    {"schedule": "dualpipe"},
    {"schedule": "dualpipe", "overlap": "weight_gradient", "pp": 4, "ep": 8},
    {"schedule": "zb-h1", "overlap": "chunked_dispatch"},
    {"overlap": "tensor_parallel", "tp": 2},
    {"overlap": "shared_experts", "model": "deepseek-v2"},
    {"overlap": "grad_reduce,param_gather"},
]


def test_every_overlap_is_tried_here_and_told_by_help_and_glossary():
    told = SCENARIO_OPTIONS["Training step"]["overlap"][1], (ROOT / "docs" / "glossary.md").read_text()
    for name in get_args(Overlap):
        assert all(name in text for text in told), name
        assert any(name in str(asked.get("overlap")) for asked in OVERLAPS), name


@pytest.mark.parametrize("asked", OVERLAPS, ids=str)
def test_an_overlap_hides_communication_shortens_the_step_and_loses_no_second(asked):
    plain = {key: value for key, value in asked.items() if key not in ("overlap", "schedule")}
    before, after = run_step(Scenario.make(**SMALL | plain)), run_step(Scenario.make(**SMALL | asked))
    hidden_s = np.mean([run.hidden_comm_s for run in after.stages])
    assert hidden_s > 0
    assert after.step_s < before.step_s
    for run in after.stages:
        shape = run.part_R["optimizer"].shape
        total_R = sum(np.broadcast_to(own, shape) for own in run.part_R.values())
        assert total_R == pytest.approx(after.step_s)
    # The wires carry the same, seen or hidden (two_batch and chunks start each exchange twice).
    names = ("dispatch", "combine", "tensor_parallel_comm", "gradient_reduction")
    exposed, whole = (sum(step_parts(trace)[name] for name in names) for trace in (after, before))
    if "dualpipe" not in str(asked):
        assert exposed + hidden_s == pytest.approx(whole, rel=0.03)


@pytest.mark.parametrize("asked", [{}, *OVERLAPS], ids=str)
def test_faster_links_and_faster_computing_together_never_slow_a_step(asked):
    at = Scenario.make(**SMALL | asked)

    def times(number, factor):
        return dataclasses.replace(number, value=number.value * factor)

    gpu = at.cluster.gpu
    faster = dataclasses.replace(
        at.cluster,
        nvlink_bytes_per_s=times(at.cluster.nvlink_bytes_per_s, 1.5),
        nic_bytes_per_s=times(at.cluster.nic_bytes_per_s, 1.5),
        gpu=dataclasses.replace(
            gpu,
            memory_bytes_per_s=times(gpu.memory_bytes_per_s, 1.5),
            peak_flops_per_s={name: times(peak, 1.5) for name, peak in gpu.peak_flops_per_s.items()},
        ),
    )
    assert run_step(at.with_(cluster=faster)).step_s < run_step(at).step_s


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"overlap": "two_batch", "micro_batch": 1}, "micro_batch must be even"),
        ({"overlap": "two_batch,forward_backward"}, "must not name two_batch"),
        ({"overlap": "forward_backward", "schedule": "gpipe"}, "must be 1f1b or dualpipe"),
        ({"overlap": "foward_backward"}, "Did you mean .*forward_backward"),
        ({"schedule": "dualpipe", "global_batch": 96}, "at least 2\\*pp = 4 micro-batches, not 3"),
        ({"schedule": "dualpipe", "pp": 1}, "even number of stages"),
        ({"schedule": "zb-h1", "vpp": 2}, "must be 1f1b with vpp=2"),
    ],
)
def test_an_overlap_or_schedule_that_cannot_run_is_refused_by_name(asked, message):
    with pytest.raises(InputError, match=message):
        Scenario.make(**SMALL | asked)


def test_buckets_hide_behind_what_a_pass_computes_not_behind_its_exchanges():
    def hidden_s(chain, total_s):
        times = lay_out(chain, num_runs=1, num_ranks=1, block_size=1, traced=np.arange(1))
        return hidden_behind_s(total_s, times, -1, num_buckets=4, in_pass=4)

    free, shared = [compute(4.0)], [compute(2.0), comm(2.0)]
    # Four buckets of half a second, each as its second of backward ends: the last one shows.
    assert hidden_s(free, 2.0) == pytest.approx(1.5)
    # Half of the ports' time is taken: each bucket takes a second of the pass, and again the last one shows.
    assert hidden_s(shared, 2.0) == pytest.approx(1.5)
    # Buckets of a whole second queue behind one another there: 1.5 s of them fit between 1 s and 4 s.
    assert hidden_s(free, 4.0) == pytest.approx(3.0)
    assert hidden_s(shared, 4.0) == pytest.approx(1.5)


@pytest.mark.parametrize("ranks_per_node", [4, 6, 8, 72])
@pytest.mark.parametrize("kind", ["dpcp", "edp"])
def test_ranks_of_a_reduction_group_that_share_a_node_are_those_counted_one_by_one(
    kind: str, ranks_per_node: int
) -> None:
    def together(groups: list[np.ndarray]) -> int:
        return min(max(Counter((own // ranks_per_node).tolist()).values()) for own in groups)

    for tp, pp, cp, ep, replicate in itertools.product((1, 2), (1, 2, 3), (1, 2), (1, 3, 4), (1, 2)):
        num_gpus = 24 * tp * cp * pp
        groups_NR = Parallelism(tp=tp, pp=pp, cp=cp, ep=ep).rank_layout(num_gpus).groups(kind)
        if groups_NR.shape[1] % replicate:
            continue
        split = groups_NR.reshape(len(groups_NR), replicate, -1)
        sharing = [own for group in split for own in group]
        same = [group[:, i] for group in split for i in range(group.shape[1])]
        found = _shape_of_groups(tp, pp, cp, ep, 1, replicate, num_gpus, ranks_per_node, kind)
        assert found == (split.shape[2], together(sharing), replicate, together(same))
