"""Peak memory of a rank, stage by stage: weights, gradients, optimizer, activations in flight, buffers under the
sampled skew.

Legend: G expert-parallel groups of a stage, M micro-batches, L MoE layers of the stage, R expert-parallel ranks.

The peak is taken over all passes of the stage in the schedule's own order: the tensors saved by all chunks in flight,
plus what the pass holds at its worst moment (``moments``), or on the last stage what head and loss hold, or on the
first stage the embedding's gradient; or over the optimizer step, where its states are not fp32. See
docs/model.md#memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.cost.activations import layer_input, placeholder_gradient_bytes, workspace_bytes
from moesim.cost.chunks import ChunkMemory, Worst, chunk_memory
from moesim.cost.software import Framework, software_of
from moesim.cost.static import StaticMemory, static_memory
from moesim.describe.model import Model
from moesim.describe.parallel import Parallelism, RankLayout
from moesim.describe.pipeline import Placed, chunk_depths, stage_chunks
from moesim.describe.schedules import Operation, make_schedule
from moesim.describe.workload import Dispatcher, Training

Floats = NDArray[np.floating]


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Memory of one rank at its peak moment [bytes], by part. ``pipeline_bytes`` is contained in ``comm_bytes``."""

    stage: int
    rank: int
    weights_bytes: float
    gradients_bytes: float
    optimizer_bytes: float
    activations_bytes: float
    dispatch_bytes: float
    comm_bytes: float
    reserved_bytes: float
    pipeline_bytes: float = 0.0
    moment: str = ""

    @property
    def peak_bytes(self) -> float:
        """All parts: what the device must hold."""
        static = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes
        return static + self.activations_bytes + self.dispatch_bytes + self.comm_bytes + self.reserved_bytes

    @property
    def allocated_bytes(self) -> float:
        """What the framework's allocator hands out (torch's max_memory_allocated): no context, NCCL or reserve."""
        return self.peak_bytes - self.reserved_bytes - (self.comm_bytes - self.pipeline_bytes)


def stage_memory(
    model: Model,
    parallel: Parallelism,
    layout: RankLayout,
    train: Training,
    *,
    stage: int,
    received_GMLR: Floats | None,
    expert_copies: float = 1.0,
    dispatcher: Dispatcher = "alltoall",
    software: Framework | None = None,
) -> RankMemory:
    """Memory of the worst rank of a stage at the worst moment of a step.

    received_GMLR: assignments (token-expert pairs after drops) that each expert-parallel rank receives, by group of
    ``layout.groups("ep")``, micro-batch, MoE layer of this stage, rank; None for a stage without MoE layers. A trained
    multi-token-prediction layer may have its own entry at the end of L; else it receives what the last MoE layer does.
    """
    profile = stage_profile(
        model,
        parallel,
        layout,
        train,
        stage=stage,
        received_GMLR=received_GMLR,
        expert_copies=expert_copies,
        dispatcher=dispatcher,
        software=software,
    )
    return fullest_of(profile)


def fullest_of(profile: StageProfile) -> RankMemory:
    """The stage's fullest rank at its worst moment: in some operation, or in the optimizer step."""
    in_passes, in_update = profile.at(*profile.fullest()), profile.at_update()
    return max(in_passes, in_update, key=lambda memory: memory.peak_bytes)


@dataclass(frozen=True, kw_only=True, eq=False)
class StageProfile:
    """Memory of a stage pass by pass; P: activations, dispatch buffers.

    live_KGRP: what is kept when pass k begins; peak_KGRP: the same and what the pass holds at its worst moment [bytes].
    """

    stage: int
    operations: tuple[Operation, ...]
    micro_batch_K: tuple[int, ...]  # of the step, over all lines of the schedule
    static: StaticMemory
    live_KGRP: Floats
    peak_KGRP: Floats
    ranks_GR: NDArray[np.int64]  # global rank numbers
    standing_bytes: float  # placeholder gradients and workspaces, all through the step
    pipeline_bytes: float
    communicator_bytes: float
    context_bytes: float
    reserve_fraction: float
    worst_K: tuple[Worst, ...]

    def fullest(self) -> tuple[int, int, int]:
        """Operation, group and rank of the largest peak in a pass."""
        total_KGR = self.peak_KGRP.sum(axis=-1)
        event, group, rank = (int(i) for i in np.unravel_index(int(total_KGR.argmax()), total_KGR.shape))
        return event, group, rank

    def at(self, event: int, group: int, rank: int) -> RankMemory:
        """Memory of one rank in one pass, at that pass's worst moment."""
        activations, dispatch = (float(part) for part in self.peak_KGRP[event, group, rank])
        moment = self.worst_K[event].moment(group, self.micro_batch_K[event], rank)
        return self._memory(int(self.ranks_GR[group, rank]), activations, dispatch, 0.0, moment)

    def at_update(self) -> RankMemory:
        """Memory of the stage's first rank while the optimizer runs; no chunk is in flight."""
        return self._memory(int(self.ranks_GR.flat[0]), 0.0, 0.0, self.static.update_bytes, "optimizer step")

    def held_bytes(self, kept_bytes: Floats | float, copies_bytes: float = 0.0) -> Floats | float:
        """Memory of a GPU that keeps this much of chunks: with all that stands, the reserve and what is outside torch.

        copies_bytes: of the optimizer's states, while it runs.
        """
        static = self.static
        standing = static.weights_bytes + static.gradients_bytes + static.optimizer_bytes + copies_bytes
        allocated = standing + self.standing_bytes + self.pipeline_bytes + kept_bytes
        return allocated * (1.0 + self.reserve_fraction) + self.communicator_bytes + self.context_bytes

    def _memory(self, rank: int, activations: float, dispatch: float, copies: float, moment: str) -> RankMemory:
        static = self.static
        activations, optimizer = activations + self.standing_bytes, static.optimizer_bytes + copies
        standing = static.weights_bytes + static.gradients_bytes + optimizer
        reserve = self.reserve_fraction * (standing + activations + dispatch + self.pipeline_bytes)
        return RankMemory(
            stage=self.stage,
            rank=rank,
            weights_bytes=static.weights_bytes,
            gradients_bytes=static.gradients_bytes,
            optimizer_bytes=optimizer,
            activations_bytes=activations,
            dispatch_bytes=dispatch,
            comm_bytes=self.pipeline_bytes + self.communicator_bytes,
            reserved_bytes=self.context_bytes + reserve,
            pipeline_bytes=self.pipeline_bytes,
            moment=moment,
        )


def stage_profile(
    model: Model,
    parallel: Parallelism,
    layout: RankLayout,
    train: Training,
    *,
    stage: int,
    received_GMLR: Floats | None,
    expert_copies: float = 1.0,
    dispatcher: Dispatcher = "alltoall",
    software: Framework | None = None,
) -> StageProfile:
    """Memory of every rank of a stage, pass by pass. Arguments as of ``stage_memory``."""
    software = software or software_of(train)
    chunks = stage_chunks(model, parallel, train, stage)
    received = _received(received_GMLR, chunks, train.num_micro_batches(layout.dp))
    tokens = train.micro_batch * train.seq_len / parallel.cp
    memories = []
    for v, chunk in enumerate(chunks):
        depth = chunk_depths(parallel, train, stage)[v]
        head, embedding = depth == parallel.pp * parallel.vpp - 1, depth == 0
        memories.append(
            chunk_memory(model, parallel, train, software, dispatcher, chunk, received, tokens, head, embedding)
        )
    paired = "forward_backward" in train.overlaps
    schedule = make_schedule(train.schedule, pp=parallel.pp, vpp=parallel.vpp, paired=paired)
    paired_ops = schedule(stage, train.num_micro_batches(layout.dp))
    operations = [one for op in paired_ops for one in (op, op.beside) if one is not None]
    per_line = train.num_micro_batches(layout.dp) // schedule.num_lines
    micro_batch_K = [op.micro_batch + schedule.place(stage, op.chunk)[0] * per_line for op in operations]
    live_KGRP = _live(memories, operations, micro_batch_K)
    worst = [memories[op.chunk].worst[op.way != "forward"] for op in operations]
    excess_KGRP = np.stack([w.excess_GMRP[:, m] for w, m in zip(worst, micro_batch_K, strict=True)])
    for k, op in enumerate(operations):
        if op.beside is not None:  # what the forward holds beyond what it keeps is there during the backward as well
            kept = memories[op.chunk].kept_GMRP[:, micro_batch_K[k]]
            excess_KGRP[k + 1] += excess_KGRP[k] - kept
    ranks_GR = np.broadcast_to(layout.stage_ranks(stage)[0], (received.shape[0], received.shape[3]))
    if received_GMLR is not None:
        groups = layout.groups("ep").reshape(parallel.pp, -1, parallel.ep)[stage]
        ranks_GR = groups[:: len(groups) // received.shape[0]]
    layers = tuple(item.layer for chunk in chunks for item in chunk)
    return StageProfile(
        stage=stage,
        operations=tuple(operations),
        micro_batch_K=tuple(micro_batch_K),
        static=static_memory(model, parallel, layout, train, stage=stage, expert_copies=expert_copies),
        live_KGRP=live_KGRP,
        peak_KGRP=live_KGRP + excess_KGRP,
        ranks_GR=ranks_GR,
        standing_bytes=placeholder_gradient_bytes(model, layers, parallel, software)
        + workspace_bytes(layers, software),
        # The gradient last sent to the stage before is still referenced; the one received is the layer's output's.
        pipeline_bytes=tokens * layer_input(model, parallel).bytes if stage > 0 else 0.0,
        communicator_bytes=num_communicators(parallel, layout) * software.nccl_bytes_per_communicator.value,
        context_bytes=software.context_bytes.value,
        reserve_fraction=software.allocator_reserve_fraction.value,
        worst_K=tuple(worst),
    )


def num_communicators(parallel: Parallelism, layout: RankLayout) -> int:
    """NCCL communicators with more than one rank that a rank belongs to, and the world's."""
    sizes = (parallel.tp, parallel.cp, parallel.pp, parallel.ep, parallel.etp, layout.dp * parallel.cp, layout.edp)
    return sum(size > 1 for size in sizes) + (layout.num_gpus > 1) + 2 * (parallel.replicate > 1)


def _received(received_GMLR: Floats | None, chunks: tuple[tuple[Placed, ...], ...], num_micro_batches: int) -> Floats:
    """The given array, one entry per MoE layer of the stage."""
    num_moe = sum(item.moe_index >= 0 for chunk in chunks for item in chunk)
    num_mtp = sum(item.moe_index >= 0 and item.is_mtp for chunk in chunks for item in chunk)
    if received_GMLR is None:
        assert num_moe == 0, "a stage with MoE layers needs received_GMLR"
        return np.zeros((1, num_micro_batches, 0, 1))
    given = received_GMLR.shape[2]
    assert given in (num_moe, num_moe - num_mtp), f"{given} MoE layers given, the stage has {num_moe}"
    assert received_GMLR.shape[1] == num_micro_batches, "one entry per micro-batch"
    if given == num_moe:
        return received_GMLR
    return np.concatenate([received_GMLR, np.repeat(received_GMLR[:, :, -1:], num_moe - given, axis=2)], axis=2)


def _live(memories: list[ChunkMemory], operations: Sequence[Operation], micro_batch_K: Sequence[int]) -> Floats:
    """K x G x R x P: what is kept when each operation begins: from its forward until its weight gradient."""
    change_KGRP = np.zeros((len(operations) + 1, *memories[0].kept_GMRP[:, 0].shape))
    for k, (op, micro_batch) in enumerate(zip(operations, micro_batch_K, strict=True)):
        if op.way != "input_gradient":
            kept = memories[op.chunk].kept_GMRP[:, micro_batch]
            change_KGRP[k + 1] = kept if op.way == "forward" else -kept
    live: Floats = np.cumsum(change_KGRP, axis=0)[:-1]
    return live
