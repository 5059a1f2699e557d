"""One training step, end to end: loads, phases of each stage, the pipeline's clock, and the trace that it leaves.

Legend: C virtual stages, B blocks of ranks, M micro-batches, R ranks of a stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.cost.device import DeviceCost, device_cost
from moesim.cost.layer import ACTIVATION_BYTES, optimizer_s, rank_tokens
from moesim.cost.memory import outer_parameters, rank_parameters
from moesim.describe.pipeline import Placed, stage_chunks
from moesim.errors import check
from moesim.fabric.collectives import allgather_s, allreduce_s, reduce_scatter_s, send_s
from moesim.scenario import Scenario
from moesim.timeline.load import StepLoad, step_load
from moesim.timeline.phases import Floats, OperationTimes, lay_out
from moesim.timeline.pipeline import StageClock, StageWork, run_pipeline
from moesim.timeline.schedule import OneForwardOneBackward
from moesim.timeline.stage import StageLoad, StagePlan
from moesim.timeline.trace import OperationRun, StageRun, Trace
from moesim.units import BYTES_PER_ELEMENT

GRADIENT_BYTES = BYTES_PER_ELEMENT["float32"]  # Megatron reduces float32 main gradients


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """A stage laid out, before the clock runs."""

    forward: tuple[OperationTimes, ...]  # by chunk
    backward: tuple[OperationTimes, ...]
    traced_R: NDArray[np.int64]
    reduce_s: float
    hidden_s: float  # of the reduction, behind the last backward
    optimizer_s: float
    gather_s: float


def run_step(scenario: Scenario, trace_ranks: Sequence[int] = ()) -> Trace:
    """Simulate one training step. Same scenario, same trace, on any number of threads.

    trace_ranks: global ranks whose spans are kept, besides the median and the hottest rank of each stage.

    Raises InputError where the scenario breaks a rule that only shows here, NotModelledError for what is not modelled.
    """
    parallel, layout = scenario.parallel, scenario.layout
    known = range(layout.num_gpus)
    check(
        all(rank in known for rank in trace_ranks), "trace", "ranks", f"must lie in 0..{known[-1]}", list(trace_ranks)
    )
    device = device_cost(scenario.cluster.gpu, scenario.train.precision, scenario.profile)
    load = step_load(scenario)
    stages = [_lay_out_stage(scenario, device, load, stage, trace_ranks) for stage in range(parallel.pp)]
    times = [op for stage in stages for op in (*stage.forward, *stage.backward)]
    num_blocks = 1 if _all_blocks_same(times) else layout.num_blocks
    send = _send_s(scenario)
    work = [_work(stage, num_blocks, send, s, parallel.pp) for s, stage in enumerate(stages)]
    step_s, clocks = run_pipeline(work, OneForwardOneBackward(pp=parallel.pp, vpp=parallel.vpp))
    runs = [_stage_run(scenario, s, stages[s], work[s], clocks[s]) for s in range(parallel.pp)]
    return Trace(
        scenario=scenario,
        device=device,
        load=load,
        step_s=step_s,
        stages=tuple(runs),
        ranks_per_stage=layout.ranks_per_stage,
        num_blocks=layout.num_blocks,
        num_simulated_blocks=num_blocks,
    )


def _lay_out_stage(
    scenario: Scenario, device: DeviceCost, load: StepLoad | None, stage: int, trace_ranks: Sequence[int]
) -> _Stage:
    parallel, layout, model = scenario.parallel, scenario.layout, scenario.model
    chunks = stage_chunks(model, parallel, scenario.train, stage)
    here = load.of_stage(stage) if load is not None else None
    parameters = [
        [rank_parameters(model, placed, parallel, scenario.expert_copies) for placed in chunk] for chunk in chunks
    ]
    outer = outer_parameters(model, parallel, scenario.train, stage)
    with_outer = 0 if stage == 0 else len(chunks) - 1  # the chunk that needs the embedding, or the head
    gathers, scatters = zip(
        *(
            _sharded_weights_s(scenario, sum(d for d, _ in chunk) + outer * (c == with_outer), sum(e for _, e in chunk))
            for c, chunk in enumerate(parameters)
        ),
        strict=True,
    )
    plan = StagePlan(
        scenario=scenario,
        device=device,
        stage=stage,
        chunks=chunks,
        first_layers=tuple(chunk[0].number if chunk else 0 for chunk in chunks),
        load=here,
        weight_gather_C=gathers,
        gradient_scatter_C=scatters,
    )
    asked = [rank - int(layout.stage_ranks(stage)[0]) for rank in trace_ranks if rank in layout.stage_ranks(stage)]
    traced_R = _traced_ranks(here, layout.ranks_per_stage, asked)

    def times(phases: list) -> OperationTimes:
        return lay_out(
            phases,
            num_micro_batches=scenario.num_micro_batches,
            num_ranks=layout.ranks_per_stage,
            block_size=layout.block_size,
            traced=traced_R,
        )

    dense = sum(d for chunk in parameters for d, _ in chunk) + outer
    expert = sum(e for chunk in parameters for _, e in chunk)
    reduce_s, gather_s = _gradient_reduction_s(scenario, dense, expert)
    backward = tuple(times(plan.backward(c)) for c in range(parallel.vpp))
    hidden_s = _hidden_reduction_s(scenario, reduce_s, chunks, backward)
    split = (layout.dp * parallel.cp, layout.edp) if parallel.zero >= 1 else (1, 1)
    slowest = float(scenario.speed_of_rank[layout.stage_ranks(stage)].min())
    return _Stage(
        forward=tuple(times(plan.forward(c)) for c in range(parallel.vpp)),
        backward=backward,
        traced_R=traced_R,
        reduce_s=reduce_s,
        hidden_s=hidden_s,
        optimizer_s=optimizer_s(dense / split[0] + expert / split[1], device) / slowest,
        gather_s=gather_s,
    )


def _all_blocks_same(times: Sequence[OperationTimes]) -> bool:
    """Whether one block can stand for all: every operation takes each of them the same time."""
    return all(bool((op.duration_MB == op.duration_MB[:, :1]).all()) for op in times)


def _traced_ranks(load: StageLoad | None, num_ranks: int, asked: Sequence[int]) -> NDArray[np.int64]:
    """The rank of median load, the hottest, and those asked for, each once."""
    chosen = [0]
    if load is not None:
        order = np.argsort(load.rows_MLRE.sum(axis=(0, 1, 3)), kind="stable")
        chosen = [int(order[num_ranks // 2]), int(order[-1])]
    return np.array(list(dict.fromkeys((*chosen, *asked))), dtype=np.int64)


def _work(stage: _Stage, num_blocks: int, send: tuple[float, float], s: int, pp: int) -> StageWork:
    """What the clock needs of a stage. A chunk's output goes to the next stage, or from the last to the first one's
    next chunk.
    """
    vpp = len(stage.forward)
    forward_send = [0.0 if pp == 1 or (s == pp - 1 and c == vpp - 1) else send[s == pp - 1] for c in range(vpp)]
    backward_send = [0.0 if pp == 1 or (s == 0 and c == 0) else send[s == 0] for c in range(vpp)]
    return StageWork(
        forward_CBM=np.array([op.duration_MB[:, :num_blocks].T for op in stage.forward]),
        backward_CBM=np.array([op.duration_MB[:, :num_blocks].T for op in stage.backward]),
        forward_send_C=np.array(forward_send),
        backward_send_C=np.array(backward_send),
        reduce_s=stage.reduce_s - stage.hidden_s,
        optimizer_s=stage.optimizer_s,
        gather_s=stage.gather_s,
    )


def _stage_run(scenario: Scenario, s: int, stage: _Stage, work: StageWork, clock: StageClock) -> StageRun:
    block_size, num_ranks = scenario.layout.block_size, scenario.layout.ranks_per_stage
    num_simulated = clock.bubble_B.size
    block_R = np.minimum(np.arange(num_ranks) // block_size, num_simulated - 1)
    part_R: dict[str, Floats] = {}
    for op in (*stage.forward, *stage.backward):
        for part, seconds_R in op.part_R.items():
            part_R[part] = part_R.get(part, 0.0) + seconds_R
    num_micro_batches = scenario.num_micro_batches
    sends = float(num_micro_batches * (work.forward_send_C.sum() + work.backward_send_C.sum()))
    part_R["pipeline_send"] = np.full(num_ranks, sends)
    part_R["wait_for_slowest"] = part_R["wait_for_slowest"] + clock.block_wait_B[block_R]
    part_R["pipeline_bubble"] = clock.bubble_B[block_R]
    part_R["gradient_reduction"] = part_R.get("gradient_reduction", 0.0) + np.full(
        num_ranks, work.reduce_s + work.gather_s
    )
    part_R["optimizer"] = np.full(num_ranks, work.optimizer_s)
    tail = (
        ("gradient reduction", "gradient_reduction", clock.reduce_start_s, work.reduce_s),
        ("optimizer", "optimizer", clock.optimizer_start_s, work.optimizer_s),
        ("gather updated weights", "gradient_reduction", clock.optimizer_start_s + work.optimizer_s, work.gather_s),
    )
    runs = []
    for is_backward, kinds, starts in (
        (False, stage.forward, clock.forward_start_CBM),
        (True, stage.backward, clock.backward_start_CBM),
    ):
        sent = work.backward_send_C if is_backward else work.forward_send_C
        runs += [
            OperationRun(chunk=c, is_backward=is_backward, times=kinds[c], start_BM=starts[c], send_s=float(sent[c]))
            for c in range(len(kinds))
        ]
    return StageRun(
        stage=s,
        traced_R=stage.traced_R,
        block_of_traced=stage.traced_R // block_size,
        operations=tuple(runs),
        tail=tail,
        part_R=part_R,
        hidden_comm_s=stage.hidden_s,
    )


def _send_s(scenario: Scenario) -> tuple[float, float]:
    """Seconds to hand a micro-batch to the neighbouring stage, and from the last stage round to the first."""
    num_bytes = rank_tokens(scenario.parallel, scenario.train) * scenario.model.hidden * ACTIVATION_BYTES
    layout, in_node = scenario.layout, scenario.cluster.ranks_per_node
    node_of = np.arange(layout.num_gpus) // in_node
    stage_of = node_of.reshape(scenario.parallel.pp, layout.ranks_per_stage)
    next_near = bool((stage_of[:-1] == stage_of[1:]).all())
    round_near = bool((stage_of[0] == stage_of[-1]).all())
    return (
        float(send_s(num_bytes, next_near, scenario.cluster)),
        float(send_s(num_bytes, round_near, scenario.cluster)),
    )


def _group_shape(scenario: Scenario, kind: str) -> tuple[int, int]:
    """Ranks of a reduction group, and how many of them share a node: of the group that has the fewest together."""
    nodes = np.sort(scenario.layout.groups(kind) // scenario.cluster.ranks_per_node, axis=1)
    together = [int(np.unique(own, return_counts=True)[1].max()) for own in np.unique(nodes, axis=0)]
    return nodes.shape[1], min(together)


def _gradient_reduction_s(scenario: Scenario, dense: float, expert: float) -> tuple[float, float]:
    """Seconds after the last backward to reduce gradients, and after the optimizer to gather weights. Both are booked
    as the part gradient_reduction, as are ZeRO-3's gathers in every pass. See docs/model.md#gradient-reduction.
    """
    zero, cluster = scenario.parallel.zero, scenario.cluster
    reduce_s = gather_s = 0.0
    for kind, count in (("dpcp", dense), ("edp", expert)):
        size, in_node = _group_shape(scenario, kind)
        if size == 1 or not count:
            continue
        if zero == 0:
            reduce_s += float(allreduce_s(size, in_node, count * GRADIENT_BYTES, cluster))
        elif zero == 1:
            reduce_s += float(reduce_scatter_s(size, in_node, count * GRADIENT_BYTES, cluster))
        if zero in (1, 2):
            gather_s += float(allgather_s(size, in_node, count * ACTIVATION_BYTES, cluster))
    # A replica's gradient travels to its expert's first slot, the updated weights travel back.
    replicas = expert * (1.0 - 1.0 / scenario.expert_copies)
    near = scenario.parallel.ep * scenario.parallel.etp <= cluster.ranks_per_node
    reduce_s += float(send_s(replicas * GRADIENT_BYTES, near, cluster))
    gather_s += float(send_s(replicas * ACTIVATION_BYTES, near, cluster))
    return reduce_s, gather_s


def _sharded_weights_s(scenario: Scenario, dense: float, expert: float) -> tuple[float, float]:
    """Seconds of each pass of a chunk to gather its weights (ZeRO-3), of each backward to scatter its gradients
    (ZeRO-2, 3).
    """
    gather_s = scatter_s = 0.0
    for kind, count in (("dpcp", dense), ("edp", expert)):
        size, in_node = _group_shape(scenario, kind)
        if size == 1 or not count:
            continue
        if scenario.parallel.zero >= 3:
            gather_s += float(allgather_s(size, in_node, count * ACTIVATION_BYTES, scenario.cluster))
        if scenario.parallel.zero >= 2:
            scatter_s += float(reduce_scatter_s(size, in_node, count * GRADIENT_BYTES, scenario.cluster))
    return gather_s, scatter_s


def _hidden_reduction_s(
    scenario: Scenario, reduce_s: float, chunks: tuple[tuple[Placed, ...], ...], backward: tuple[OperationTimes, ...]
) -> float:
    """How much of the reduction hides behind the last backward: one bucket a layer, sent as soon as its layer is done.

    Contention of the buckets with the backward's own all-to-alls is not modelled. See docs/model.md#gradient-reduction.
    """
    num_buckets = sum(max(len(chunk), 1) for chunk in chunks)  # what holds no layer may hold embedding or head
    if scenario.train.overlap == "none" or not reduce_s:
        return 0.0
    last_s = float(backward[0].duration_MB[-1].min()) / max(len(chunks[0]), 1)
    bucket_s = reduce_s / num_buckets
    # Chunks that ended earlier reduced while later ones ran; the buckets of the last chunk follow one another.
    in_last = max(len(chunks[0]), 1)
    done_s = 0.0
    for i in range(in_last):
        done_s = max(done_s, (i + 1) * last_s) + bucket_s
    exposed_s = done_s - in_last * last_s
    return max(reduce_s - exposed_s, 0.0)
