"""What one layer costs one rank, phase by phase: seconds forward and backward, bytes that its collectives move.

The phases of a layer in order: attention (with the tensor-parallel gather and scatter around it), router, permute,
dispatch, experts, combine, unpermute; or the dense feed-forward block instead of all after attention. Nothing here
knows of other ranks: collectives are given as bytes, their seconds come from the fabric. See docs/model.md#layer.

Legend: T tokens of a micro-batch on one tensor-parallel group after context parallelism; S = T/tp, a rank's own
tokens under sequence parallelism; R expert-parallel ranks; E experts on one rank; leading ... any axes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.cost.activations import rank_kv_heads
from moesim.cost.context import key_value_bytes, output_bytes, query_bytes
from moesim.cost.device import DeviceCost
from moesim.cost.recompute import Operation
from moesim.describe.flops import layer_flops
from moesim.describe.model import Attention, Ffn, GroupedQueryAttention, LatentAttention, Layer, Model, MoeFfn
from moesim.describe.parallel import Parallelism
from moesim.describe.workload import Dispatcher, Training
from moesim.units import BYTES_PER_ELEMENT

Floats = NDArray[np.floating]
ACTIVATION_BYTES = BYTES_PER_ELEMENT["bf16"]
_SHARES = 33
LOGIT_BYTES = BYTES_PER_ELEMENT["float32"]


@dataclass(frozen=True, kw_only=True)
class PassCost:
    """Seconds of one layer in one direction on one rank, except what depends on where tokens went (see experts_s,
    moving_s).
    """

    attention_s: float
    router_s: float = 0.0
    dense_ffn_s: float = 0.0  # the dense block, or the shared experts
    core_attention_s: float = 0.0  # of attention_s: scores and weighted values, behind which a ring of cp hides
    num_tp_collectives: int = 0  # all-gathers plus reduce-scatters of tp_bytes around attention and the dense block


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """One layer on one rank: both directions, and what its collectives move."""

    forward: PassCost
    backward: PassCost
    tp_bytes: float  # of the gathered (T, hidden) tensor
    cp_bytes: float  # of the keys and values of all ranks of a context-parallel group; 0 without one
    cp_exchange_bytes: tuple[float, float] = (0.0, 0.0)  # a rank's queries, keys and values; its attention's output


def rank_tokens(parallel: Parallelism, train: Training) -> float:
    """S: the tokens of a micro-batch that one rank holds under sequence and context parallelism."""
    return train.seq_len * train.micro_batch / (parallel.cp * parallel.tp)


def layer_cost(model: Model, layer: Layer, *, parallel: Parallelism, train: Training, device: DeviceCost) -> LayerCost:
    """Every phase of one layer that does not depend on routing. See docs/model.md#layer."""
    tp, own = parallel.tp, rank_tokens(parallel, train)
    group = own * tp
    elementwise = _norms_and_residuals_bytes(model, layer, own)
    forward = _attention_s(model, layer, parallel=parallel, train=train, device=device, backward=False)
    backward = _attention_s(model, layer, parallel=parallel, train=train, device=device, backward=True)
    router = dense = (0.0, 0.0)
    # Attention gathers its input and scatters its output; a dense block does so once more.
    num_collectives = 0 if parallel.tp == 1 else 2 + 2 * (layer.cross_attention is not None)
    if isinstance(layer.ffn, MoeFfn):
        router = _router_s(model, layer.ffn, own, device)
        if layer.ffn.shared is not None:
            dense = _ffn_s(model, layer.ffn.shared, group, parallel.tp, device)
            num_collectives += 2 if parallel.tp > 1 else 0
    else:
        dense = _ffn_s(model, layer.ffn, group, parallel.tp, device)
        num_collectives += 2 if parallel.tp > 1 else 0
    return LayerCost(
        forward=PassCost(
            attention_s=forward + float(device.stream_s(elementwise)),
            router_s=router[0],
            dense_ffn_s=dense[0],
            core_attention_s=_core_attention_s(model, layer, parallel, train, device, backward=False),
            num_tp_collectives=num_collectives,
        ),
        backward=PassCost(
            attention_s=backward + float(device.stream_s(2 * elementwise)),
            router_s=router[1],
            dense_ffn_s=dense[1],
            core_attention_s=_core_attention_s(model, layer, parallel, train, device, backward=True),
            # Megatron keeps shards of what column-parallel products take in, and gathers them once more.
            num_tp_collectives=num_collectives + num_collectives // 2,
        ),
        tp_bytes=group * model.hidden * ACTIVATION_BYTES,
        cp_bytes=group * parallel.cp * key_value_bytes(layer.attention, tp) if parallel.cp > 1 else 0.0,
        cp_exchange_bytes=(
            group * (query_bytes(layer.attention, tp) + key_value_bytes(layer.attention, tp)),
            group * output_bytes(layer.attention, tp),
        ),
    )


def again_s(
    model: Model, layer: Layer, operation: Operation, *, parallel: Parallelism, train: Training, device: DeviceCost
) -> float:
    """Seconds of one operation of the attention, or of a norm, done a second time (those of a feed-forward stand in its
    forward).
    """
    own = rank_tokens(parallel, train)
    if operation == "core attention":
        return _core_attention_s(model, layer, parallel, train, device, backward=False)
    if operation in ("attention norm", "ffn norm"):
        return float(device.stream_s(2 * own * model.hidden * ACTIVATION_BYTES))
    assert operation == "up projections", operation
    assert isinstance(layer.attention, LatentAttention)
    rows, ups = own * parallel.tp, _up_projections(model.hidden, layer.attention, parallel.tp)
    products_s = sum(float(_linear_s(device, np.array([rows]), *shape, backward=False)) for shape in ups)
    return products_s + float(device.stream_s(2 * rows * sum(columns for _, columns in ups) * ACTIVATION_BYTES))


def weight_gradients_s(
    model: Model, layer: Layer, *, parallel: Parallelism, train: Training, device: DeviceCost
) -> tuple[float, float]:
    """Seconds of a layer's backward that make weight gradients, for which nobody waits: of its attention, and of its
    dense or shared feed-forward block. Those of the router are not told apart.
    """
    rows = np.array([rank_tokens(parallel, train) * parallel.tp])
    ffn = layer.ffn.shared if isinstance(layer.ffn, MoeFfn) else layer.ffn
    blocks = (layer.attention, layer.cross_attention)
    of_attention = [shape for block in blocks if block is not None for shape in _projections(model, block, parallel.tp)]
    of_ffn = [] if ffn is None else _ffn_products(model, ffn, parallel.tp)
    attention_s, ffn_s = (
        sum(float(device.weight_gradient_s(rows, reduced, columns)) for reduced, columns in shapes)
        for shapes in (of_attention, of_ffn)
    )
    return attention_s, ffn_s


def expert_weight_gradients_s(
    model: Model, moe: MoeFfn, rows_E: Floats, *, parallel: Parallelism, device: DeviceCost
) -> Floats:
    """Seconds of a rank's experts' backward that make weight gradients; the result drops the last axis."""
    shapes = _ffn_products(model, moe.expert, parallel.etp)
    return sum((device.weight_gradient_s(rows_E, *shape) for shape in shapes), np.zeros(rows_E.shape[:-1]))


def head_weight_gradient_s(model: Model, *, parallel: Parallelism, train: Training, device: DeviceCost) -> float:
    """Seconds of the head's backward that make its weight gradient."""
    rows = np.array([rank_tokens(parallel, train) * parallel.tp])
    return float(device.wide.weight_gradient_s(rows, model.hidden, model.vocab / parallel.tp))


def experts_s(
    model: Model,
    moe: MoeFfn,
    rows_E: Floats,
    *,
    parallel: Parallelism,
    device: DeviceCost,
    backward: bool,
    dispatcher: Dispatcher = "alltoall",
) -> Floats:
    """Seconds of a rank's experts, given rows_E[..., e] tokens for each of them; the result drops the last axis.

    Grouped products in and out with the activation between, casts of what they take in, unless the dispatcher brings
    it cast. See docs/model.md#experts.
    """
    width = moe.expert.width / parallel.etp
    inner = width * (2 if moe.expert.gated else 1)
    rows = rows_E.sum(axis=-1)
    activation: Floats
    if backward:
        activation = device.stream_s(rows * (2 * inner + width) * ACTIVATION_BYTES)
    else:
        activation = expert_activation_s(moe, rows_E, parallel=parallel, device=device)
    narrow = device.recipe.arrives_narrow(dispatcher)
    into = _linear_s(device, rows_E, model.hidden, inner, backward=backward, arrives_narrow=narrow)
    out = _linear_s(device, rows_E, width, model.hidden, backward=backward)
    kept = device.casts_s(device.recipe.activation_casts(), rows_E * inner)
    # Rows are copied to where each expert's fill whole tiles, and results from there.
    padding = 2 * device.stream_s(2 * rows * model.hidden * ACTIVATION_BYTES) if device.recipe.pads_rows else 0.0
    return into + out + kept + activation + padding


def weight_casts_s(
    model: Model, layer: Layer, *, num_rank_experts: int, parallel: Parallelism, device: DeviceCost
) -> dict[str, float]:
    """Seconds to cast a layer's weights to the recipe's format, by part; once a step, before the first micro-batch."""
    blocks = (layer.attention, layer.cross_attention)
    of_part = {"attention": [shape for b in blocks if b is not None for shape in _projections(model, b, parallel.tp)]}
    dense = layer.ffn.shared if isinstance(layer.ffn, MoeFfn) else layer.ffn
    of_part["dense_ffn"] = [] if dense is None else _ffn_products(model, dense, parallel.tp)
    if isinstance(layer.ffn, MoeFfn):
        of_part["experts"] = _ffn_products(model, layer.ffn.expert, parallel.etp) * num_rank_experts
    casts = device.recipe.weight_casts()
    seconds = {part: float(sum(device.casts_s(casts, [k * n]) for k, n in shapes)) for part, shapes in of_part.items()}
    return {part: value for part, value in seconds.items() if value}


def expert_activation_s(moe: MoeFfn, rows_E: Floats, *, parallel: Parallelism, device: DeviceCost) -> Floats:
    """Seconds of the activation between the experts' products, forward; the result drops the last axis."""
    width = moe.expert.width / parallel.etp
    inner = width * (2 if moe.expert.gated else 1)
    return device.stream_s(rows_E.sum(axis=-1) * (inner + width) * ACTIVATION_BYTES)


@dataclass(frozen=True, kw_only=True)
class MovingCost:
    """Seconds that a rank moves rows about its own memory: before the dispatch, after it, before the combine, after it.
    The gradients take as long on their way back. See docs/model.md#moving-rows.
    """

    lay_out_s: Floats | float
    sort_s: Floats | float
    sort_back_s: Floats | float
    unpermute_s: Floats | float


def moving_s(
    model: Model,
    *,
    own_tokens: float,
    laid_out_rows: float,
    arrived_rows: Floats,
    rows_E: Floats,
    exchanges: bool,
    dispatcher: Dispatcher,
    device: DeviceCost,
) -> MovingCost:
    """Seconds to lay rows out for the wire and to sort what arrived by expert, there and back.

    own_tokens: of the rank, each read once; laid_out_rows: one for each of their experts; arrived_rows: what the
    dispatch brings a rank; rows_E[..., e]: what its experts compute, the result drops the last axis. exchanges: whether
    there is anybody to exchange with. A fused kernel reads a token once and writes each of its rows.
    """
    row_bytes = model.hidden * ACTIVATION_BYTES
    rows = rows_E.sum(axis=-1)
    laid_out_s = device.stream_s((own_tokens + laid_out_rows) * row_bytes)
    if not exchanges:
        return MovingCost(lay_out_s=laid_out_s, sort_s=0.0, sort_back_s=0.0, unpermute_s=laid_out_s)
    if dispatcher == "deepep":  # its kernels take tokens as they lie; rows are made of them where they arrive
        sorted_s = device.stream_s((arrived_rows + rows) * row_bytes)
        return MovingCost(lay_out_s=0.0, sort_s=sorted_s, sort_back_s=sorted_s, unpermute_s=0.0)
    # A rank with one expert has nothing to sort: rows arrive by sender, and all are the expert's.
    sorted_s = device.stream_s(2 * rows * row_bytes) if rows_E.shape[-1] > 1 else np.zeros_like(rows)
    return MovingCost(lay_out_s=laid_out_s, sort_s=sorted_s, sort_back_s=sorted_s, unpermute_s=laid_out_s)


def embedding_s(model: Model, *, parallel: Parallelism, train: Training, device: DeviceCost, backward: bool) -> float:
    """Seconds to look up (or scatter gradients into) a rank's tokens in the input embedding."""
    moved = 2 * rank_tokens(parallel, train) * model.hidden * ACTIVATION_BYTES
    return float(device.stream_s(moved * (2 if backward else 1)))


def mtp_projection_s(
    model: Model, *, parallel: Parallelism, train: Training, device: DeviceCost, backward: bool
) -> float:
    """Seconds before the transformer block of one multi-token-prediction layer, forward or backward.

    The next token's embedding is looked up, it and the hidden state pass a norm each, both are joined, and a product
    takes them from 2 * hidden to hidden. Its tensor-parallel gather is not counted. arXiv 2412.19437 section 2.2;
    docs/model.md#layer.
    """
    own = rank_tokens(parallel, train)
    lookup, norms, joining = 2, 4, 4  # tensors of (own, hidden) read and written
    moved = (lookup + norms + joining) * own * model.hidden * ACTIVATION_BYTES
    shape = (2 * model.hidden, model.hidden / parallel.tp)
    product_s = float(_linear_s(device, np.array([own * parallel.tp]), *shape, backward=backward))
    return product_s + float(device.stream_s(moved * (2 if backward else 1)))


def head_s(model: Model, *, parallel: Parallelism, train: Training, device: DeviceCost, backward: bool) -> float:
    """Seconds of final norm, output head and loss on the last stage: one product, in BF16 also in an FP8 run, then
    float32 logits passed over three times.
    """
    rows = rank_tokens(parallel, train) * parallel.tp
    columns = model.vocab / parallel.tp
    logits_s = float(device.stream_s(3 * rows * columns * LOGIT_BYTES))
    product = device.wide.backward_s if backward else device.wide.grouped_s
    return float(product(np.array([rows]), model.hidden, columns)) + logits_s


def optimizer_s(num_parameters: float, train: Training, device: DeviceCost) -> float:
    """Seconds of one Adam step over a rank's shard: reads gradient, main weight and two moments, writes three and the
    bf16 weight, in the number formats of ``train.optimizer``.
    """
    each = train.optimizer.gradient_bytes + 2 * train.optimizer.state_bytes + ACTIVATION_BYTES
    return float(device.stream_s(num_parameters * each))


def _attention_s(
    model: Model, layer: Layer, *, parallel: Parallelism, train: Training, device: DeviceCost, backward: bool
) -> float:
    rows = np.array([rank_tokens(parallel, train) * parallel.tp])
    seconds = _core_attention_s(model, layer, parallel, train, device, backward=backward)
    for attention in (layer.attention, layer.cross_attention):
        if attention is None:
            continue
        projections = _projections(model, attention, parallel.tp)
        for at, shape in enumerate(projections):
            # The down projections of latent attention, or what stands for them, take the same hidden state.
            again = isinstance(attention, LatentAttention) and at == len(projections) - 3
            seconds += float(_linear_s(device, rows, *shape, backward=backward, cast_before=again))
        rotated = 2 * float(rows[0]) * sum(columns for _, columns in projections[:-1])
        seconds += float(device.stream_s(rotated * ACTIVATION_BYTES))
    return seconds


def packed_attention_s(
    model: Model,
    layer: Layer,
    share: Floats,
    *,
    parallel: Parallelism,
    train: Training,
    device: DeviceCost,
    backward: bool,
) -> Floats:
    """Seconds of scores and weighted values of packed sequences, beyond those of whole ones (mostly less than 0).

    share: of a whole sequence's attention, any shape; between _SHARES evenly spaced ones times are interpolated. See
    docs/model.md#packed-documents.
    """
    grid = np.linspace(float(share.min()), float(share.max()), _SHARES)
    seconds = [
        _core_attention_s(model, layer, parallel, train, device, backward=backward, share=float(each)) for each in grid
    ]
    whole = _core_attention_s(model, layer, parallel, train, device, backward=backward)
    return np.interp(share, grid, seconds) - whole


def _core_attention_s(
    model: Model,
    layer: Layer,
    parallel: Parallelism,
    train: Training,
    device: DeviceCost,
    *,
    backward: bool,
    share: float = 1.0,
) -> float:
    """Seconds of scores and weighted values on one rank. A flash kernel's backward makes five products for the
    forward's two, three of them over query elements and two over value elements. arXiv 2205.14135.
    """
    rows = rank_tokens(parallel, train) * parallel.tp
    flops = share * rows * layer_flops(model, layer, train.seq_len).attention_sequence / parallel.tp
    query_dim, value_dim = _head_dims(layer.attention)
    dims = query_dim + value_dim
    heads = layer.attention.num_heads / parallel.tp * (1 if layer.cross_attention is None else 2)
    keys_seen = flops / (2.0 * rows * heads * dims)
    if backward:
        flops *= (3 * query_dim + 2 * value_dim) / dims
    return device.attention_s(flops, dims=dims, keys_seen=keys_seen, backward=backward)


def _head_dims(attention: Attention) -> tuple[int, int]:
    """Elements of a head's query, and of its value."""
    if isinstance(attention, GroupedQueryAttention):
        return attention.head_dim, attention.head_dim
    return attention.qk_nope_head_dim + attention.qk_rope_head_dim, attention.v_head_dim


def _projections(model: Model, attention: Attention, tp: int) -> list[tuple[float, float]]:
    """(reduced, columns) of each projection on one tensor-parallel rank, the output projection last."""
    if isinstance(attention, GroupedQueryAttention):
        qkv = (attention.num_heads / tp + 2 * rank_kv_heads(attention, tp)) * attention.head_dim
        return [(model.hidden, qkv), (attention.num_heads / tp * attention.head_dim, model.hidden)]
    query_up, key_value_up = _up_projections(model.hidden, attention, tp)
    query_down = [] if attention.q_lora_rank is None else [(model.hidden, attention.q_lora_rank)]
    key_value_down = (model.hidden, attention.kv_lora_rank + attention.qk_rope_head_dim)
    out = (attention.num_heads / tp * attention.v_head_dim, model.hidden)
    return [*query_down, query_up, key_value_down, key_value_up, out]


def _up_projections(hidden: int, attention: LatentAttention, tp: int) -> list[tuple[float, float]]:
    """(reduced, columns) of the queries' projection, from the hidden state where they have no latent, and of the keys'
    and values'.
    """
    heads = attention.num_heads / tp
    query_dim = attention.qk_nope_head_dim + attention.qk_rope_head_dim
    return [
        (attention.q_lora_rank or hidden, heads * query_dim),
        (attention.kv_lora_rank, heads * (attention.qk_nope_head_dim + attention.v_head_dim)),
    ]


def _router_s(model: Model, moe: MoeFfn, own: float, device: DeviceCost) -> tuple[float, float]:
    scores_bytes = 4 * own * moe.num_experts * LOGIT_BYTES  # written, scored, selected, kept
    rows = np.array([own])
    forward = device.wide.grouped_s(rows, model.hidden, moe.num_experts) + device.stream_s(scores_bytes)
    backward = device.wide.backward_s(rows, model.hidden, moe.num_experts) + device.stream_s(scores_bytes)
    return float(forward), float(backward)


def _ffn_s(model: Model, ffn: Ffn, tokens: float, tp: int, device: DeviceCost) -> tuple[float, float]:
    """Seconds of a feed-forward block forward and backward: products, the activation between, what is kept narrow."""
    shapes, rows = _ffn_products(model, ffn, tp), np.array([tokens])
    inner, width = shapes[0][1], shapes[1][0]

    def pass_s(moved: float, *, backward: bool) -> float:
        seconds = sum(float(_linear_s(device, rows, *shape, backward=backward)) for shape in shapes)
        kept_s = device.casts_s(device.recipe.activation_casts(), rows * inner)
        return seconds + float(kept_s) + float(device.stream_s(tokens * moved * ACTIVATION_BYTES))

    return pass_s(inner + width, backward=False), pass_s(2 * inner + width, backward=True)


def _ffn_products(model: Model, ffn: Ffn, tp: int) -> list[tuple[float, float]]:
    """(reduced, columns) of a feed-forward block's products on one tensor-parallel rank."""
    width = ffn.width / tp
    return [(model.hidden, width * (2 if ffn.gated else 1)), (width, model.hidden)]


def _linear_s(
    device: DeviceCost,
    rows_E: Floats,
    reduced: float,
    columns: float,
    *,
    backward: bool,
    cast_before: bool = False,
    arrives_narrow: bool = False,
) -> Floats:
    """Seconds of a linear layer in one direction: its product, and casts of its input and of its result's gradient.

    cast_before: another layer that takes the same input has cast it; arrives_narrow: the dispatch brings it cast.
    """
    recipe = device.recipe
    of_input = recipe.input_casts(backward=backward, cast_before=cast_before, arrives_narrow=arrives_narrow)
    seconds = device.casts_s(of_input, rows_E * reduced)
    if not backward:
        return seconds + device.grouped_s(rows_E, reduced, columns)
    seconds += device.casts_s(recipe.gradient_casts(), rows_E * columns)
    seconds += device.casts_s(recipe.weight_transposes(), np.full_like(rows_E, reduced * columns, dtype=np.float64))
    return seconds + device.backward_s(rows_E, reduced, columns)


def _norms_and_residuals_bytes(model: Model, layer: Layer, own: float) -> float:
    """Bytes of the block's norms (read, write) and residual additions (two reads, one write)."""
    per_norm, per_residual = 2, 3
    num_residuals = 3 if layer.cross_attention is not None else 2
    return (layer.num_norms * per_norm + num_residuals * per_residual) * own * model.hidden * ACTIVATION_BYTES
