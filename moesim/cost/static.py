"""What stands on a rank all through a step: weights, gradients, optimizer states. See docs/model.md#memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moesim.cost.activations import BF16_BYTES, FP32_BYTES, rank_kv_heads
from moesim.cost.precision import LAYOUTS, recipe_of
from moesim.describe.model import GroupedQueryAttention, LatentAttention, Layer, Model
from moesim.describe.parallel import Parallelism, RankLayout
from moesim.describe.parameters import layer_parameters
from moesim.describe.pipeline import Placed, mtp_stage, stage_chunks
from moesim.describe.schedules import make_schedule
from moesim.describe.workload import Training


@dataclass(frozen=True, kw_only=True)
class StaticMemory:
    """What stands all through the step, and what the update of the weights makes for a moment [bytes]."""

    weights_bytes: float
    gradients_bytes: float
    optimizer_bytes: float
    update_bytes: float = 0.0


def static_memory(
    model: Model, parallel: Parallelism, layout: RankLayout, train: Training, *, stage: int, expert_copies: float = 1.0
) -> StaticMemory:
    """Weights, gradients and optimizer states of a rank of a stage.

    Weights are BF16, with copies in the products' narrow format or, where ``train.optimizer`` says so, in that alone;
    gradients, main weights and Adam's two moments as it says, the latter two in the host's memory where they are
    offloaded. zero=0: all replicated. zero=1 (Megatron's distributed optimizer): states over the dp*cp ranks, those of
    experts over edp. zero=2 (as DeepSpeed): gradients too, but for the layer in backward. zero=3 (as DeepSpeed):
    weights too, but for two gathered layers (the live one and the one fetched ahead). States that are not fp32 are
    updated as fp32 copies, all of an optimizer's at once, dense parameters and experts having one each
    (TransformerEngine pytorch/optimizers/fused_adam.py, Megatron-LM core/optimizer).
    """
    placed = [item for chunk in stage_chunks(model, parallel, train, stage) for item in chunk]
    layers = [rank_parameters(model, item, parallel, expert_copies) for item in placed]
    return static_of(layers, outer_parameters(model, parallel, train, stage), parallel, layout, train)


def static_of(
    layers: Sequence[tuple[float, float]], outer: float, parallel: Parallelism, layout: RankLayout, train: Training
) -> StaticMemory:
    """As static_memory, of a stage whose layers have these (dense, expert) parameters on a rank, and outer ones."""
    if parallel.fsdp:
        return _fsdp_of(layers, outer, parallel, layout, train)
    dense, expert = outer + sum(d for d, _ in layers), sum(e for _, e in layers)
    split_dense, split_expert = layout.num_shards(_copies(parallel, train))

    def total_bytes(element_bytes: float, *, sharded: bool, num_whole: int = 0) -> float:
        if not sharded:
            return (dense + expert) * element_bytes
        rests = sorted((d * (1 - 1 / split_dense) + e * (1 - 1 / split_expert) for d, e in layers), reverse=True)
        return (dense / split_dense + expert / split_expert + sum(rests[:num_whole])) * element_bytes

    stays = "optimizer" not in train.offloaded
    if train.optimizer.weights == "bf16":
        wide_bytes = total_bytes(BF16_BYTES, sharded=parallel.zero >= 3, num_whole=2)
    else:  # the casts are the weights, but for embedding and head, and for the shards that layers are gathered from
        in_shards = (dense - outer) / split_dense + expert / split_expert if parallel.zero >= 3 else 0.0
        wide_bytes = outer * BF16_BYTES + in_shards * weight_bytes(train)
    update_bytes = max(dense / split_dense, expert / split_expert) * train.optimizer.copied_bytes
    return StaticMemory(
        weights_bytes=wide_bytes + _cast_bytes(layers, parallel, train),
        gradients_bytes=total_bytes(train.optimizer.gradient_bytes, sharded=parallel.zero >= 2, num_whole=1),
        optimizer_bytes=total_bytes(train.optimizer.state_bytes, sharded=True) if stays else 0.0,
        update_bytes=update_bytes if stays else 0.0,
    )


def _fsdp_of(
    layers: Sequence[tuple[float, float]], outer: float, parallel: Parallelism, layout: RankLayout, train: Training
) -> StaticMemory:
    """As static_of, by FSDP2 with a layer as its unit. docs/model.md#fsdp.

    The shard is the main weight, its gradient of the same format. Beside it stand two layers gathered in BF16 (the live
    one; the buffer of the one fetched ahead, or of the last one), with zero=2 all of them; of the backward the live
    layer's BF16 gradients and what is being reduced of the one before. With pp > 1 gradients wait, whole, for the
    replica's last micro-batch.
    """
    states = train.optimizer
    split_dense, split_expert = layout.num_shards(_copies(parallel, train))
    sizes = sorted((d + e for d, e in layers), reverse=True)
    whole = outer + sum(sizes)
    own = (outer + sum(d for d, _ in layers)) / split_dense + sum(e for _, e in layers) / split_expert
    has_main = states.main_weights == "fp32"
    gathered = outer * (parallel.zero < 3)
    if states.weights == "bf16":  # else the casts are what is gathered
        gathered += sum(sizes[:2] if parallel.zero == 3 else sizes)
    waiting = states.gradient_bytes * whole if parallel.pp > 1 else 0.0
    reduced = (states.gradient_bytes + BF16_BYTES) * max(sizes, default=0.0)
    return StaticMemory(
        weights_bytes=BF16_BYTES * gathered
        + (0.0 if has_main else BF16_BYTES * own)
        + _cast_bytes(layers, parallel, train),
        gradients_bytes=(FP32_BYTES if has_main else BF16_BYTES) * own + max(waiting, reduced),
        optimizer_bytes=states.state_bytes * own if "optimizer" not in train.offloaded else 0.0,
    )


def _copies(parallel: Parallelism, train: Training) -> int:
    return make_schedule(train.schedule, pp=parallel.pp, vpp=parallel.vpp).num_copies


def table_buffers_bytes(num_parameters: float, parallel: Parallelism, train: Training) -> float:
    """What FSDP holds of an embedding or a head while it computes its gradient, beyond that in BF16: the table gathered
    (it is, already, with zero=2), and what is reduced of it. 0 without FSDP.
    """
    if not parallel.fsdp:
        return 0.0
    reduced = train.optimizer.gradient_bytes if parallel.pp == 1 else 0.0
    return num_parameters * (reduced + (BF16_BYTES if parallel.zero == 3 else 0.0))


def weight_bytes(train: Training) -> float:
    """Of one parameter of a layer, as replicas exchange it.

    >>> from moesim.describe.workload import Optimizer
    >>> weight_bytes(Training(precision="fp8", optimizer=Optimizer(weights="narrow")))
    1.03125
    """
    return BF16_BYTES if train.optimizer.weights == "bf16" else recipe_of(train).operand_bytes


def weight_layouts(train: Training) -> int:
    """How many layouts of narrow weights stand: by rows and by columns, or by rows alone (DeepSeek's framework).

    >>> weight_layouts(Training(precision="fp8")), weight_layouts(Training(precision="fp8", software="deepseek"))
    (2, 1)
    """
    return 1 if recipe_of(train).keeps_rows else LAYOUTS


def _cast_bytes(layers: Sequence[tuple[float, float]], parallel: Parallelism, train: Training) -> float:
    """Copies of a stage's layer weights in the products' narrow format, kept from the first micro-batch to the last; of
    gathered weights those of two layers. Where columns are made for the backward, one layer has them at a time.
    """
    if train.precision == "bf16":
        return 0.0
    sizes = sorted((dense + expert for dense, expert in layers), reverse=True)
    standing = weight_layouts(train) * sum(sizes[:2] if parallel.zero >= 3 else sizes)
    made = (LAYOUTS - weight_layouts(train)) * max(sizes, default=0.0)
    return recipe_of(train).operand_bytes * (standing + made)


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
    where multi-token-prediction layers are trained, which look up their tokens there; a tied head is that copy. With
    DualPipe a rank holds two parts of the model, and a table that both need once: embedding, head and the prediction
    layers' lie together on the outer stages (arXiv 2412.19437 section 3.2.3).
    """
    parts = {stage, parallel.pp - 1 - stage} if train.schedule == "dualpipe" else {stage}
    is_first, is_last = 0 in parts, parallel.pp - 1 in parts
    looks_up = is_first or mtp_stage(model, parallel, train) in parts
    num_tables = int(looks_up or is_last) if model.tie_embeddings else looks_up + is_last
    norms = model.num_final_norms * model.hidden * (2 if model.has_norm_bias else 1)
    return (
        num_tables * model.vocab * model.hidden / parallel.tp + is_last * norms + is_first * model.num_extra_parameters
    )
