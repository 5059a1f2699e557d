"""Peak memory of a rank, stage by stage: weights, gradients, optimizer, activations in flight, buffers under the
sampled skew.

Legend: G expert-parallel groups of a stage, M micro-batches, L MoE layers of the stage, R expert-parallel ranks.

The peak is taken over every moment of the step at which a backward chunk begins or proceeds: the tensors saved by all
chunks in flight, plus what that backward holds (``activations.layer_moments``), or on the last stage what head and loss
hold, or on the first stage the embedding's gradient. The optimizer step needs no more than the gradients and states
that stand all along. See docs/model.md#memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from moesim.cost.activations import (
    BF16_BYTES,
    FP32_BYTES,
    MEGATRON,
    SavedTensor,
    Software,
    head_moment,
    head_tensors,
    layer_input,
    layer_moments,
    layer_tensors,
    mtp_tensors,
    placeholder_gradient_bytes,
    rank_kv_heads,
    workspace_bytes,
)
from moesim.cost.context import buffer_bytes
from moesim.cost.recompute import kept_tensors
from moesim.describe.model import GroupedQueryAttention, LatentAttention, Layer, Model
from moesim.describe.parallel import Parallelism, RankLayout
from moesim.describe.parameters import layer_parameters
from moesim.describe.pipeline import Placed, mtp_stage, stage_chunks
from moesim.describe.schedules import ScheduleName, in_flight, make_schedule
from moesim.describe.workload import Training

Floats = NDArray[np.floating]
ADAM_BYTES = 3 * FP32_BYTES  # main weight and two moments


@dataclass(frozen=True, kw_only=True)
class StaticMemory:
    """What stands all through the step [bytes]."""

    weights_bytes: float
    gradients_bytes: float
    optimizer_bytes: float


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


def static_memory(
    model: Model, parallel: Parallelism, layout: RankLayout, train: Training, *, stage: int, expert_copies: float = 1.0
) -> StaticMemory:
    """Weights, gradients and optimizer states of a rank of a stage.

    Weights are BF16, gradients fp32 (Megatron's main gradients), the optimizer is Adam with fp32 main weights and two
    moments. zero=0: all replicated. zero=1 (Megatron's distributed optimizer): states over the dp*cp ranks, those of
    experts over edp. zero=2 (as DeepSpeed): gradients too, but for the layer in backward. zero=3 (as DeepSpeed, FSDP):
    weights too, but for two gathered layers (the live one and the one fetched ahead).
    """
    placed = [item for chunk in stage_chunks(model, parallel, train, stage) for item in chunk]
    layers = [rank_parameters(model, item, parallel, expert_copies) for item in placed]
    outer = outer_parameters(model, parallel, train, stage)
    dense, expert = outer + sum(d for d, _ in layers), sum(e for _, e in layers)
    split_dense, split_expert = layout.dp * parallel.cp, layout.edp

    def total_bytes(element_bytes: float, *, sharded: bool, num_whole: int) -> float:
        if not sharded:
            return (dense + expert) * element_bytes
        rests = sorted((d * (1 - 1 / split_dense) + e * (1 - 1 / split_expert) for d, e in layers), reverse=True)
        return (dense / split_dense + expert / split_expert + sum(rests[:num_whole])) * element_bytes

    return StaticMemory(
        weights_bytes=total_bytes(BF16_BYTES, sharded=parallel.zero >= 3, num_whole=2),
        gradients_bytes=total_bytes(FP32_BYTES, sharded=parallel.zero >= 2, num_whole=1),
        optimizer_bytes=total_bytes(ADAM_BYTES, sharded=parallel.zero >= 1, num_whole=0),
    )


def rank_parameters(
    model: Model, placed: Placed, parallel: Parallelism, expert_copies: float = 1.0
) -> tuple[float, float]:
    """(dense, expert) parameters of one layer on one rank.

    Over tp: products by rows or columns; norms, router and the down-projections of latent attention are whole on each
    rank, and so is at least one key-value head. Experts: num_experts * expert_copies / ep
    of them, each over etp; expert_copies is slots over experts, above 1 where experts have replicas.
    """
    parts = layer_parameters(model, placed.layer)
    tp, norms, joining = parallel.tp, parts.norms, 0.0
    if placed.is_mtp:  # its layer stands in model.mtp_layers; the joining projection and three norms come on top
        joining = 2 * model.hidden**2
        norms += 3 * model.hidden
    whole = _latent_down_parameters(model.hidden, placed.layer)
    copied = _copied_kv_parameters(model.hidden, placed.layer, tp)
    split = parts.attention - whole + parts.cross_attention + parts.shared_experts + parts.dense_ffn + joining
    return (
        split / tp + copied + whole + parts.router + norms,
        parts.experts * expert_copies / parallel.ep / parallel.etp,
    )


def _latent_down_parameters(hidden: int, layer: Layer) -> int:
    attention = layer.attention
    if not isinstance(attention, LatentAttention):
        return 0
    return hidden * ((attention.q_lora_rank or 0) + attention.kv_lora_rank + attention.qk_rope_head_dim)


def _copied_kv_parameters(hidden: int, layer: Layer, tp: int) -> float:
    """What a rank holds of key and value projections beyond 1/tp of them: with tp > num_kv_heads, a whole head."""
    copied = 0.0
    for attention in (layer.attention, layer.cross_attention):
        if isinstance(attention, GroupedQueryAttention):
            heads = rank_kv_heads(attention, tp) - attention.num_kv_heads / tp
            copied += 2 * heads * attention.head_dim * (hidden + attention.qkv_bias)
    return copied


def outer_parameters(model: Model, parallel: Parallelism, train: Training, stage: int) -> float:
    """Parameters of a rank outside the layers: embedding (first stage), head, final norms (last stage).

    Tied embeddings stand on the first and, with pp > 1, once more on the last stage. So does the embedding on the stage
    where multi-token-prediction layers are trained, which look up their tokens there; a tied head is that copy.
    """
    is_first, is_last = stage == 0, stage == parallel.pp - 1
    table = model.vocab * model.hidden / parallel.tp
    num_tables = int(is_first) + int(is_last and not (model.tie_embeddings and is_first))
    looks_up_again = stage == mtp_stage(model, parallel, train) and not (model.tie_embeddings and is_last)
    num_tables += int(not is_first and looks_up_again)
    norms = model.num_final_norms * model.hidden * (2 if model.has_norm_bias else 1)
    return num_tables * table + is_last * norms + is_first * model.num_extra_parameters


def stage_memory(
    model: Model,
    parallel: Parallelism,
    layout: RankLayout,
    train: Training,
    *,
    stage: int,
    received_GMLR: Floats | None,
    expert_copies: float = 1.0,
    software: Software = MEGATRON,
) -> RankMemory:
    """Memory of the worst rank of a stage at the worst moment of a step.

    received_GMLR: assignments (token-expert pairs after drops) that each expert-parallel rank receives, by group of
    ``layout.groups("ep")``, micro-batch, MoE layer of this stage, rank; None for a stage without MoE layers. A trained
    multi-token-prediction layer may have its own entry at the end of L; else it receives what the last MoE layer does.
    """
    static = static_memory(model, parallel, layout, train, stage=stage, expert_copies=expert_copies)
    chunks = stage_chunks(model, parallel, train, stage)
    num_micro_batches = train.num_micro_batches(layout.dp)
    received = _received(received_GMLR, chunks, num_micro_batches)
    tokens = train.micro_batch * train.seq_len / parallel.cp
    is_last = stage == parallel.pp - 1

    memories = []
    for v, chunk in enumerate(chunks):
        head = is_last and v == parallel.vpp - 1
        embedding = stage == 0 and v == 0
        memories.append(_chunk_memory(model, parallel, train, software, chunk, received, tokens, head, embedding))
    forwards, backwards = chunk_order(parallel.pp, parallel.vpp, num_micro_batches)
    live_KGRP = _live(memories, forwards, backwards, num_in_flight(parallel, stage, num_micro_batches, train.schedule))
    peak_KGRP = live_KGRP + np.stack([memories[v].excess_GMRP[:, m] for v, m in backwards])
    total_KGR = peak_KGRP.sum(axis=-1)
    event, group, rank = (int(i) for i in np.unravel_index(int(total_KGR.argmax()), total_KGR.shape))
    chunk_index, micro_batch = backwards[event]
    activations, dispatch = (float(part) for part in peak_KGRP[event, group, rank])

    layers = tuple(item.layer for chunk in chunks for item in chunk)
    activations += placeholder_gradient_bytes(model, layers, parallel, software) + workspace_bytes(layers, software)
    # the gradient last sent to the stage before is still referenced; the one received is the layer's output gradient
    pipeline = tokens * layer_input(model, parallel).bytes if stage > 0 else 0.0
    standing = static.weights_bytes + static.gradients_bytes + static.optimizer_bytes
    reserve = software.allocator_reserve_fraction.value * (standing + activations + dispatch + pipeline)
    worst = layout.stage_ranks(stage)[0]
    if received_GMLR is not None:
        groups = layout.groups("ep").reshape(parallel.pp, -1, parallel.ep)[stage]
        worst = groups[group * (len(groups) // received.shape[0]), rank]
    return RankMemory(
        stage=stage,
        rank=int(worst),
        weights_bytes=static.weights_bytes,
        gradients_bytes=static.gradients_bytes,
        optimizer_bytes=static.optimizer_bytes,
        activations_bytes=activations,
        dispatch_bytes=dispatch,
        comm_bytes=pipeline + num_communicators(parallel, layout) * software.nccl_bytes_per_communicator.value,
        reserved_bytes=software.context_bytes.value + reserve,
        pipeline_bytes=pipeline,
        moment=memories[chunk_index].moments[int(memories[chunk_index].choice_GMR[group, micro_batch, rank])],
    )


@lru_cache(maxsize=4096)
def num_in_flight(parallel: Parallelism, stage: int, num_micro_batches: int, schedule: ScheduleName = "1f1b") -> int:
    """Chunks whose activations a stage holds at most, by the schedule's order of operations.

    1F1B: min(M, pp - stage). Interleaved: (pp - stage - 1)*2 + (vpp - 1)*pp + 1, at most M*vpp (Megatron-LM,
    core/pipeline_parallel/schedules.py, warm-up plus the forward of the first steady step).
    ZB-H1: min(M, pp). GPipe: M.
    """
    order = make_schedule(schedule, pp=parallel.pp, vpp=parallel.vpp)
    return max(in_flight(order(stage, num_micro_batches)))


def chunk_order(pp: int, vpp: int, num_micro_batches: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(virtual stage, micro-batch) in order of forwards and of backwards: rounds of pp micro-batches per virtual stage.

    >>> chunk_order(2, 2, 2)
    ([(0, 0), (0, 1), (1, 0), (1, 1)], [(1, 0), (1, 1), (0, 0), (0, 1)])
    """
    rounds = [range(start, min(start + pp, num_micro_batches)) for start in range(0, num_micro_batches, pp)]
    forwards = [(v, m) for members in rounds for v in range(vpp) for m in members]
    return forwards, [(v, m) for members in rounds for v in reversed(range(vpp)) for m in members]


def num_communicators(parallel: Parallelism, layout: RankLayout) -> int:
    """NCCL communicators with more than one rank that a rank belongs to, and the world's."""
    sizes = (parallel.tp, parallel.cp, parallel.pp, parallel.ep, parallel.etp, layout.dp * parallel.cp, layout.edp)
    return sum(size > 1 for size in sizes) + (layout.num_gpus > 1)


@dataclass(frozen=True, kw_only=True)
class _ChunkMemory:
    """What one chunk keeps, and what its backward holds beyond all that is kept; P: activations, dispatch."""

    kept_GMRP: Floats
    excess_GMRP: Floats
    choice_GMR: NDArray[np.int64]  # index into moments
    moments: tuple[str, ...]


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


def _chunk_memory(
    model: Model,
    parallel: Parallelism,
    train: Training,
    software: Software,
    chunk: tuple[Placed, ...],
    received_GMLR: Floats,
    tokens: float,
    has_head: bool,
    has_embedding: bool,
) -> _ChunkMemory:
    shape = (received_GMLR.shape[0], received_GMLR.shape[1], received_GMLR.shape[3])

    def parts(per_token: tuple[float, float], per_assignment: tuple[float, float], item: Placed | None) -> Floats:
        result = np.broadcast_to(np.array(per_token) * tokens, (*shape, 2)).copy()
        if item is not None and item.moe_index >= 0:
            result += received_GMLR[:, :, item.moe_index, :, None] * np.array(per_assignment)
        return result

    def saved_parts(tensors: tuple[SavedTensor, ...], item: Placed | None) -> Floats:
        return parts(_sum(tensors, "token"), _sum(tensors, "assignment"), item)

    tensors_of = [
        layer_tensors(model, item.layer, parallel, software) + (mtp_tensors(model, parallel) if item.is_mtp else ())
        for item in chunk
    ]
    left_of = [
        kept_tensors(tensors, item.layer, train, parallel.tp) for tensors, item in zip(tensors_of, chunk, strict=True)
    ]
    kept = [saved_parts(left, item) for left, item in zip(left_of, chunk, strict=True)]
    kept_GMRP = np.sum(kept, axis=0) if kept else np.zeros((*shape, 2))

    candidates: list[Floats] = []
    names: list[str] = []
    freed = np.zeros_like(kept_GMRP)  # by the backward of the layers behind
    for i, item in reversed(list(enumerate(chunk))):
        where = f"backward of layer {i + 1} of {len(chunk)}"
        again = [tensor for tensor in tensors_of[i] if tensor not in left_of[i]]
        # Of a whole layer all is made again at once; modules of the attention follow the feed-forward's backward.
        of_attention = tuple(tensor for tensor in again if tensor.part == "attention")
        later = of_attention if train.recompute != "full" else ()
        first = tuple(tensor for tensor in again if tensor not in later)
        for moment in layer_moments(model, item.layer, parallel):
            working = parts(moment.per_token, moment.per_assignment, item)
            candidates.append(saved_parts(first, item) + working - freed)
            names.append(f"{where}: {moment.name}")
        if (
            later or parallel.cp > 1
        ):  # beside the gradient of the layer's output; what the feed-forward kept is gone by then
            gone = saved_parts(tuple(tensor for tensor in left_of[i] if tensor.part != "attention"), item)
            exchanged = parts((buffer_bytes(item.layer.attention, parallel), 0.0), (0.0, 0.0), None)
            held = saved_parts((*of_attention, layer_input(model, parallel)), item)
            candidates.append(held + exchanged - gone - freed)
            names.append(f"{where}: attention{' again' if later else ''}")
        freed = freed + kept[i]
    if has_head:
        per_token, fixed = head_moment(model, parallel, software)
        num_losses = 1 + sum(item.is_mtp for item in chunk)
        tensors = head_tensors(model, parallel, software)
        head = num_losses * saved_parts(tensors, None) + parts((per_token, 0.0), (0.0, 0.0), None)
        candidates.append(head + np.array([fixed, 0.0]))
        names.append("backward of the head")
    if has_embedding:
        gradient = model.vocab * model.hidden / parallel.tp * BF16_BYTES
        candidates.append(np.array([gradient, 0.0]) - kept_GMRP)
        names.append("gradient of the embedding")
    if not candidates:
        candidates, names = [np.zeros_like(kept_GMRP)], ["a stage that holds nothing"]
    stacked = np.stack(candidates)
    choice_GMR = stacked.sum(axis=-1).argmax(axis=0)
    excess_GMRP = np.take_along_axis(stacked, choice_GMR[None, ..., None], axis=0)[0]
    return _ChunkMemory(kept_GMRP=kept_GMRP, excess_GMRP=excess_GMRP, choice_GMR=choice_GMR, moments=tuple(names))


def _sum(tensors: tuple[SavedTensor, ...], per: str) -> tuple[float, float]:
    """Bytes of the tensors counted per token or per assignment: (activations, dispatch)."""
    chosen = [tensor for tensor in tensors if tensor.per == per]
    dispatch = sum(tensor.bytes for tensor in chosen if tensor.part == "dispatch")
    return sum(tensor.bytes for tensor in chosen) - dispatch, dispatch


def _live(
    memories: list[_ChunkMemory], forwards: list[tuple[int, int]], backwards: list[tuple[int, int]], ahead: int
) -> Floats:
    """K x G x R x P: what is kept when backward k begins: all forwards up to k + ahead less the backwards done."""
    done = np.cumsum([memories[v].kept_GMRP[:, m] for v, m in forwards], axis=0)
    gone = np.cumsum([memories[v].kept_GMRP[:, m] for v, m in backwards], axis=0)
    last = np.minimum(np.arange(len(backwards)) + ahead, len(forwards)) - 1
    return done[last] - np.concatenate([np.zeros_like(gone[:1]), gone[:-1]])
