"""One training step, end to end: loads, phases of each stage, the pipeline's clock, and the trace that it leaves.

Legend: C virtual stages, B blocks of ranks, M micro-batches, R ranks of a stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
from numpy.typing import NDArray

from moesim.catalog.step import StepConstants
from moesim.cost.device import DeviceCost, device_cost
from moesim.cost.host import constants_of, once_a_step_s, sustained, unfused
from moesim.cost.layer import ACTIVATION_BYTES, optimizer_s, rank_tokens
from moesim.cost.offload import optimizer_transfer_s
from moesim.cost.precision import recipe_of
from moesim.cost.static import outer_parameters, rank_parameters
from moesim.describe.parallel import RankLayout
from moesim.describe.pipeline import chunk_depths, stage_chunks
from moesim.describe.schedules import Operation, Schedule, Way, make_schedule
from moesim.describe.workload import Overlap
from moesim.errors import check
from moesim.fabric.collectives import send_s
from moesim.scenario import Scenario
from moesim.timeline.load import StepLoad, groups_lie_alike, step_load
from moesim.timeline.overlap import WITHIN, alone, beside, halved, lay_out_program, overlapped, sm_share
from moesim.timeline.packed import PackedWork, packed_work
from moesim.timeline.phases import Floats, OperationTimes, Phase, lay_out
from moesim.timeline.pipeline import StageClock, StageWork, run_pipeline
from moesim.timeline.reduction import gradient_reduction_s, hidden_behind_s, sharded_weights_s
from moesim.timeline.stage import StageLoad, StagePlan
from moesim.timeline.trace import OperationRun, StageRun, Trace


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """All operations of one kind on a stage: a way through a chunk, one run for each micro-batch of its line; or a
    forward and the backward beside it.
    """

    way: Way
    chunk: int
    micro_batches_N: NDArray[np.int64]
    times: OperationTimes
    beside: int | None = None  # chunk of the backward
    beside_N: NDArray[np.int64] | None = None  # its micro-batches


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """A stage laid out, before the clock runs."""

    kinds: tuple[_Kind, ...]
    traced_R: NDArray[np.int64]
    reduce_s: float  # what shows of it
    hidden_s: float  # of reducing gradients and gathering weights, behind the last backward and the next forward
    optimizer_s: float
    host_s: float  # of the optimizer's states on the host link, beyond the update itself
    gather_s: float


def run_step(
    scenario: Scenario,
    trace_ranks: Sequence[int] = (),
    constants: StepConstants | None = None,
    packed: PackedWork | None = None,
    device: DeviceCost | None = None,
) -> Trace:
    """Simulate one training step. Same scenario, same trace, on any number of threads.

    trace_ranks: global ranks whose spans are kept, besides the median and the hottest rank of each stage. constants:
    what the step loses against its kernels alone; None: the catalog's of this GPU, none with a calibration profile.
    packed: the attention of its packed sequences in place of what the scenario's documents draw.
    device: what kernels take, in place of the GPU's own.

    Raises InputError where the scenario breaks a rule that only shows here, NotModelledError for what is not modelled.
    """
    parallel, layout = scenario.parallel, scenario.layout
    known = range(layout.num_gpus)
    check(
        all(rank in known for rank in trace_ranks), "trace", "ranks", f"must lie in 0..{known[-1]}", list(trace_ranks)
    )
    gpu = scenario.cluster.gpu
    train = scenario.train
    kernels = device_cost(gpu, train.precision, scenario.profile, recipe_of(train)) if device is None else device
    constants = constants_of(gpu, train, kernels) if constants is None else constants
    device = sustained(kernels, constants, gpu)
    packed = packed_work(scenario) if packed is None else packed
    drawn = _drawn_blocks(scenario, packed, trace_ranks)
    load = step_load(scenario, drawn * layout.block_size // (parallel.ep * parallel.etp))
    paired = "forward_backward" in scenario.train.overlaps
    schedule = make_schedule(scenario.train.schedule, pp=parallel.pp, vpp=parallel.vpp, paired=paired)
    stages = [
        _lay_out_stage(scenario, device, constants, load, packed, schedule, stage, trace_ranks, drawn)
        for stage in range(parallel.pp)
    ]
    times = [kind.times for stage in stages for kind in stage.kinds]
    num_blocks = 1 if _all_blocks_same(times) else drawn
    send = neighbour_send_s(scenario)
    work = [_work(scenario, schedule, s, stages[s], num_blocks, send) for s in range(parallel.pp)]
    step_s, clocks = run_pipeline(work, schedule, layout.num_blocks, partial(_ranks_in_words, layout))
    runs = [_stage_run(scenario, s, stages[s], work[s], clocks[s]) for s in range(parallel.pp)]
    return Trace(
        scenario=scenario,
        device=device,
        load=load,
        packed=packed,
        step_s=step_s,
        stages=tuple(runs),
        ranks_per_stage=layout.ranks_per_stage,
        num_blocks=layout.num_blocks,
        num_simulated_blocks=num_blocks,
    )


def _lay_out_stage(
    scenario: Scenario,
    device: DeviceCost,
    constants: StepConstants,
    load: StepLoad | None,
    packed: PackedWork | None,
    schedule: Schedule,
    stage: int,
    trace_ranks: Sequence[int],
    drawn: int,
) -> _Stage:
    parallel, layout, model = scenario.parallel, scenario.layout, scenario.model
    chunks = stage_chunks(model, parallel, scenario.train, stage)
    here = load.of_stage(stage) if load is not None else None
    parameters = [
        [rank_parameters(model, placed, parallel, scenario.expert_copies) for placed in chunk] for chunk in chunks
    ]
    outer = outer_parameters(model, parallel, scenario.train, stage)
    with_outer = 0 if stage == 0 else len(chunks) - 1  # the chunk that needs the embedding, or the head
    copies = schedule.num_copies
    gathers, scatters = zip(
        *(
            sharded_weights_s(
                scenario, sum(d for d, _ in chunk) + outer * (c == with_outer), sum(e for _, e in chunk), copies
            )
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
        depths=chunk_depths(parallel, scenario.train, stage),
        last_depth=parallel.pp * parallel.vpp - 1,
        load=here,
        packed=packed,
        num_ranks=drawn * layout.block_size,
        weight_gather_C=gathers,
        gradient_scatter_C=scatters,
        moe_device=unfused(device, constants),
        issue_s=constants.issue_s,
    )
    asked = [rank - int(layout.stage_ranks(stage)[0]) for rank in trace_ranks if rank in layout.stage_ranks(stage)]
    traced_R = _traced_ranks(here, drawn * layout.block_size, asked)

    operations = schedule(stage, scenario.num_micro_batches)
    kinds = _kinds(plan, schedule, operations, traced_R)
    dense = sum(d for chunk in parameters for d, _ in chunk) + outer
    expert = sum(e for chunk in parameters for _, e in chunk)
    reduce_s, gather_s = gradient_reduction_s(scenario, dense, expert, copies)
    reduced_s = _hidden_s(plan, "grad_reduce", reduce_s, kinds, operations[-1])
    gathered_s = _hidden_s(plan, "param_gather", gather_s, kinds, operations[0])
    split = layout.num_shards(copies)
    slowest = float(scenario.speed_of_rank[layout.stage_ranks(stage)].min())
    shard = dense / split[0] + expert / split[1]
    update_s = optimizer_s(shard, scenario.train, device) / slowest
    transfer_s = optimizer_transfer_s(shard, scenario.train, scenario.cluster.gpu.host_bytes_per_s.value)
    return _Stage(
        kinds=kinds,
        traced_R=traced_R,
        reduce_s=reduce_s - reduced_s,
        hidden_s=reduced_s + gathered_s,
        optimizer_s=update_s + once_a_step_s(dense + expert, device, constants),
        host_s=max(transfer_s - update_s, 0.0),
        gather_s=gather_s - gathered_s,
    )


def _hidden_s(plan: StagePlan, name: Overlap, total_s: float, kinds: Sequence[_Kind], op: Operation) -> float:
    """What of total_s hides behind a stage's first or last operation, where the overlap of that name is asked for."""
    if name not in plan.scenario.train.overlaps:
        return 0.0
    kind = next(kind for kind in kinds if (kind.way, kind.chunk) == op[:2] and kind.beside_N is None)
    num_buckets = sum(max(len(chunk), 1) for chunk in plan.chunks)  # what holds no layer may hold embedding or head
    in_pass, run = max(len(plan.chunks[kind.chunk]), 1), -1 if op.is_backward else 0
    return hidden_behind_s(total_s, kind.times, run, num_buckets=num_buckets, in_pass=in_pass)


def _kinds(
    plan: StagePlan, schedule: Schedule, operations: Sequence[Operation], traced_R: NDArray[np.int64]
) -> tuple[_Kind, ...]:
    """A stage's operations by kind, laid out."""
    scenario = plan.scenario
    per_line = scenario.num_micro_batches // schedule.num_lines
    by_kind: dict[tuple[Way, int, int | None], list[tuple[int, int]]] = {}
    for op in operations:
        partner = None if op.beside is None else op.beside.chunk
        micro_batches = (op.micro_batch, -1 if op.beside is None else op.beside.micro_batch)
        by_kind.setdefault((op.way, op.chunk, partner), []).append(micro_batches)

    phases_of = cache(plan.phases)

    def chain(way: Way, chunk: int, micro_batches: NDArray[np.int64]) -> list[Phase]:
        of_load = micro_batches + schedule.place(plan.stage, chunk)[0] * per_line
        phases = [phase.of_runs(of_load) for phase in phases_of(way, chunk)]
        latency_s = float(scenario.cluster.latency_inter_s)
        return overlapped(phases, scenario.train.overlaps, tp=scenario.parallel.tp, latency_s=latency_s)

    kinds = []
    for (way, chunk, partner), runs in by_kind.items():
        own_N, beside_N = (np.array(column) for column in zip(*runs, strict=True))
        chains = [chain(way, chunk, own_N)]
        if partner is not None:  # the backward takes the first turn: its exchange runs beside the forward's attention
            chains.insert(0, chain("backward", partner, beside_N))
        times = _laid_out(plan, chains, len(own_N), traced_R)
        kinds.append(
            _Kind(
                way=way,
                chunk=chunk,
                micro_batches_N=own_N,
                times=times,
                beside=partner,
                beside_N=None if partner is None else beside_N,
            )
        )
    return tuple(kinds)


def _laid_out(
    plan: StagePlan, chains: Sequence[Sequence[Phase]], num_runs: int, traced_R: NDArray[np.int64]
) -> OperationTimes:
    """An operation's phases, or two operations' side by side, on the clocks of a stage's ranks."""
    scenario = plan.scenario
    layout, overlaps = scenario.layout, set(scenario.train.overlaps)
    size = {
        "num_runs": num_runs,
        "num_ranks": plan.num_ranks,
        "block_size": layout.block_size,
    }
    phases = [phase for chain in chains for phase in chain]
    if (len(chains) == 1 and not overlaps & set(WITHIN)) or len({phase.is_comm for phase in phases}) < 2:
        return lay_out(phases, traced=traced_R, **size)
    # Layers run beside one another, so the host must issue them all within the operation, not each within its own time.
    issue_s = sum(phase.issue_s for phase in phases)
    chains = [[phase for phase in chain if not phase.issue_s] for chain in chains]
    if "two_batch" in overlaps:
        half = halved(chains[0], float(scenario.cluster.latency_inter_s))
        chains, issue_s = [half, half], 2 * issue_s
    program = alone(chains[0]) if len(chains) == 1 else beside(*chains)
    share = sm_share(scenario.routing.dispatcher, scenario.cluster.gpu)
    return lay_out_program(program, traced=traced_R, sm_share=share, issue_s=issue_s, **size)


def _drawn_blocks(scenario: Scenario, packed: PackedWork | None, trace_ranks: Sequence[int]) -> int:
    """How many of a stage's blocks are simulated; the rest stand behind them where nothing tells blocks apart."""
    layout = scenario.layout
    least = max(scenario.replicas, *(r % layout.ranks_per_stage // layout.block_size + 1 for r in (0, *trace_ranks)))
    tells_apart = packed is not None or scenario.placement.rank_speeds or not groups_lie_alike(scenario)
    return layout.num_blocks if tells_apart else min(least, layout.num_blocks)


def _ranks_in_words(layout: RankLayout, stage: int, block: int) -> str:
    """Whom a process stands for.

    >>> from moesim.describe.parallel import Parallelism
    >>> _ranks_in_words(Parallelism(pp=2, ep=4).rank_layout(16), 1, 1)
    'stage 1, ranks 12-15,'
    """
    first = stage * layout.ranks_per_stage + block * layout.block_size
    return f"stage {stage}, ranks {first}-{first + layout.block_size - 1},"


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


def _work(
    scenario: Scenario, schedule: Schedule, s: int, stage: _Stage, num_blocks: int, send: tuple[float, float]
) -> StageWork:
    """What the clock needs of a stage. A chunk's output goes to the neighbouring stage, or from the last stage round to
    the first one's next chunk.
    """
    pp, num_chunks = scenario.parallel.pp, schedule.num_chunks
    shape = (num_chunks, num_blocks, scenario.num_micro_batches // schedule.num_lines)
    pairs = np.zeros(shape)
    seconds: dict[Way, NDArray[np.float64]] = {}
    for kind in stage.kinds:
        own = pairs if kind.beside_N is not None else seconds.setdefault(kind.way, np.zeros(shape))
        own[kind.chunk][:, kind.micro_batches_N] = kind.times.duration_MB[:, :num_blocks].T
    last = pp * num_chunks // schedule.num_lines - 1
    depths = [schedule.place(s, c)[1] for c in range(num_chunks)]
    wraps = schedule.num_lines == 1  # to the first stage again
    return StageWork(
        seconds_CBM=seconds,
        pair_CBM=pairs,
        forward_send_C=np.array([0.0 if d == last else send[wraps and s == pp - 1] for d in depths]),
        backward_send_C=np.array([0.0 if d == 0 else send[wraps and s == 0] for d in depths]),
        reduce_s=stage.reduce_s,
        optimizer_s=stage.optimizer_s + stage.host_s,
        gather_s=stage.gather_s,
    )


def _stage_run(scenario: Scenario, s: int, stage: _Stage, work: StageWork, clock: StageClock) -> StageRun:
    # One block that stands for all stands for every rank; a sample stands for itself.
    block_size, drawn = scenario.layout.block_size, stage.kinds[0].times.hidden_comm_R.size
    num_ranks = scenario.layout.ranks_per_stage if clock.bubble_B.size == 1 else drawn
    num_simulated = clock.bubble_B.size
    block_R = np.minimum(np.arange(num_ranks) // block_size, num_simulated - 1)
    part_R: dict[str, Floats] = {}
    for kind in stage.kinds:
        for part, seconds_R in kind.times.part_R.items():
            part_R[part] = part_R.get(part, 0.0) + np.tile(seconds_R, num_ranks // drawn)
    part_R["pipeline_send"] = np.full(num_ranks, clock.send_s)
    part_R["wait_for_slowest"] = part_R["wait_for_slowest"] + clock.block_wait_B[block_R]
    part_R["pipeline_bubble"] = clock.bubble_B[block_R]
    part_R["gradient_reduction"] = part_R.get("gradient_reduction", 0.0) + np.full(
        num_ranks, work.reduce_s + work.gather_s
    )
    part_R["optimizer"] = np.full(num_ranks, stage.optimizer_s)
    part_R["host_transfer"] = part_R.get("host_transfer", np.zeros(num_ranks)) + stage.host_s
    updated_s = clock.optimizer_start_s + stage.optimizer_s
    tail = (
        ("gradient reduction", "gradient_reduction", clock.reduce_start_s, work.reduce_s),
        ("optimizer", "optimizer", clock.optimizer_start_s, stage.optimizer_s),
        *([("optimizer states to and fro", "host_transfer", updated_s, stage.host_s)] if stage.host_s else []),
        ("gather updated weights", "gradient_reduction", clock.optimizer_start_s + work.optimizer_s, work.gather_s),
    )
    runs = [
        OperationRun(
            way=kind.way,
            chunk=kind.chunk,
            micro_batches_N=kind.micro_batches_N,
            beside_N=kind.beside_N,
            beside=kind.beside,
            times=kind.times,
            start_BN=clock.start_CBM[kind.way][kind.chunk][:, kind.micro_batches_N],
            send_s=_send_after_s(work, kind),
        )
        for kind in stage.kinds
    ]
    return StageRun(
        stage=s,
        traced_R=stage.traced_R,
        block_of_traced=stage.traced_R // block_size,
        operations=tuple(runs),
        tail=tail,
        part_R=part_R,
        hidden_comm_s=stage.hidden_s + float(sum(kind.times.hidden_comm_R.mean() for kind in stage.kinds)),
    )


def _send_after_s(work: StageWork, kind: _Kind) -> float:
    """What a kind's runs spend handing on; a pair's both ways at once."""
    own = work.send_s(Operation(kind.way, kind.chunk, 0))
    return own if kind.beside is None else max(own, work.send_s(Operation("backward", kind.beside, 0)))


def neighbour_send_s(scenario: Scenario) -> tuple[float, float]:
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
