"""What a layer keeps for its backward pass, tensor by tensor.

Two units: bytes per *token* of the rank's micro-batch (micro_batch * seq_len / cp tokens, before tensor parallelism)
and bytes per *assignment* that the rank receives (token-expert pairs after drops). Routed tensors scale with
assignments and are never divided by ep: the all-to-all trades tokens, it does not remove them.

Tensor parallelism is with sequence parallelism, so every tensor is divided by tp: inner ones by width, norm inputs by
sequence. Saved tensors are those of Megatron-LM with TransformerEngine in BF16: a norm fused into the next product
keeps its input and its output; rotary embedding writes new queries and keys, and the packed projection is freed; flash
attention keeps queries, keys, values, output and one fp32 logsumexp per head; SwiGLU keeps its input, the next product
SwiGLU's output. In a narrow format (``cost.precision``) inputs of products are kept as cast, by columns alone. See
docs/model.md#activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from moesim.cost.precision import RECIPES
from moesim.cost.software import MEGATRON, Framework
from moesim.describe.model import Attention, Ffn, GroupedQueryAttention, LatentAttention, Layer, Model, MoeFfn
from moesim.describe.parallel import Parallelism
from moesim.describe.workload import Kept, Precision

AS_MADE = Kept()
ATTENTION_OUTPUTS = ("attention output", "attention output before its all-to-all")
ACTIVATION_INPUTS = ("ffn activation input", "shared activation input", "expert activation input")
BF16_BYTES, FP32_BYTES, INT64_BYTES = 2, 4, 8
# Inputs of products.
CAST = (
    "attention norm output",
    "query latent normalised",
    "key-value latent normalised",
    "ffn norm output",
    "ffn activation output",
    "shared activation output",
    "expert input",
    "expert activation output",
)
TILE_BYTES = RECIPES["fp8"].scale_bytes  # an element's share of its tile's scale
KEPT_BYTES: Mapping[str, float] = {"bf16": BF16_BYTES, "e5m6": 12 / 8 + TILE_BYTES, "fp8": 1 + TILE_BYTES}


@dataclass(frozen=True, kw_only=True)
class SavedTensor:
    """One tensor kept from forward to backward. ``elements`` are those on one rank, per token or per received
    assignment."""

    name: str
    part: Literal["attention", "ffn", "shared", "router", "experts", "dispatch", "head"]
    per: Literal["token", "assignment"]
    elements: float
    element_bytes: float
    why: str

    @property
    def bytes(self) -> float:
        return self.elements * self.element_bytes


def layer_input(model: Model, parallel: Parallelism) -> SavedTensor:
    """The residual stream that enters a layer: all that full recomputation keeps of it."""
    why = "input of the first norm; with full recomputation the only tensor kept"
    return SavedTensor(
        name="layer input",
        part="attention",
        per="token",
        elements=model.hidden / parallel.tp,
        element_bytes=BF16_BYTES,
        why=why,
    )


def layer_tensors(
    model: Model,
    layer: Layer,
    parallel: Parallelism,
    software: Framework = MEGATRON,
    precision: Precision = "bf16",
    kept: Kept = AS_MADE,
) -> tuple[SavedTensor, ...]:
    """Every tensor one layer saves without recomputation. precision: of its products, whose inputs are kept as cast;
    kept: formats of others.

    >>> from moesim.describe.model import GroupedQueryAttention
    >>> attention = GroupedQueryAttention(num_heads=64, num_kv_heads=8, head_dim=128)
    >>> layer = Layer(attention=attention, ffn=Ffn(width=28672))
    >>> model = Model(name="llama-3-70b", hidden=8192, vocab=128256, layers=(layer,))
    >>> sum(tensor.bytes for tensor in layer_tensors(model, layer, Parallelism())) / 8192
    33.53125
    """
    keeps_twice = parallel.cp > 1 and parallel.cp_kind == "alltoall" and software.cp_keeps_output_twice
    tensors = [layer_input(model, parallel)]
    tensors += _attention_tensors(model.hidden, layer.attention, parallel.tp, keeps_twice)
    if layer.cross_attention is not None:
        tensors.append(_token("cross-attention input", "attention", model.hidden / parallel.tp, "input of its norm"))
        tensors += _attention_tensors(model.hidden, layer.cross_attention, parallel.tp, keeps_twice)
    tensors.append(_token("ffn block input", "ffn", model.hidden / parallel.tp, "input of the second norm"))
    tensors.append(
        _token(
            "ffn norm output", "ffn", model.hidden / parallel.tp, "input of the feed-forward, router and shared expert"
        )
    )
    if isinstance(layer.ffn, MoeFfn):
        tensors += _moe_tensors(model.hidden, layer.ffn, parallel, software)
    else:
        tensors += _ffn_tensors(layer.ffn, "ffn", parallel.tp)
    if precision != "bf16":
        tensors = _as_cast(tensors, layer, RECIPES[precision].operand_bytes)
    return tuple(_as_kept(tensor, kept) for tensor in tensors)


def _as_kept(tensor: SavedTensor, kept: Kept) -> SavedTensor:
    """The tensor in the format that is asked for it."""
    if tensor.name in ATTENTION_OUTPUTS:
        return replace(tensor, element_bytes=KEPT_BYTES[kept.attention_output])
    if tensor.name in ACTIVATION_INPUTS:
        return replace(tensor, element_bytes=KEPT_BYTES[kept.activation_input])
    return tensor


def _as_cast(tensors: list[SavedTensor], layer: Layer, operand_bytes: float) -> list[SavedTensor]:
    """The tensors with the inputs of products in their narrow format, the layout of the weight gradient's product.

    What flash attention, the router and activations keep stays BF16: a MoE layer's norm output stands for the router
    and once more, narrow, for the shared experts.
    """
    found = []
    for tensor in tensors:
        serves_router = tensor.name == "ffn norm output" and layer.is_moe
        if tensor.name in CAST and not serves_router:
            found.append(replace(tensor, element_bytes=operand_bytes))
        else:
            found.append(tensor)
        if serves_router and isinstance(layer.ffn, MoeFfn) and layer.ffn.shared is not None:
            copy = replace(tensor, name="shared input", part="shared", element_bytes=operand_bytes)
            found.append(replace(copy, why="cast for the shared experts"))
    return found


def head_tensors(model: Model, parallel: Parallelism, software: Framework = MEGATRON) -> tuple[SavedTensor, ...]:
    """What the final norm, the head and the loss hold when the backward pass begins (last stage only)."""
    hidden, vocab = model.hidden / parallel.tp, model.vocab / parallel.tp
    tensors = (
        _token("final norm input", "head", hidden, "input of the final norm"),
        _token("final norm output", "head", hidden, "input of the head product"),
        _token(
            "logit gradients",
            "head",
            vocab,
            "gradient of the loss, input of the head's backward; fused loss: written over the logits",
        ),
    )
    if software.fused_cross_entropy:
        return tensors
    why = "softmax of the logits, kept by the loss"
    return (
        *tensors,
        SavedTensor(name="logits fp32", part="head", per="token", elements=vocab, element_bytes=FP32_BYTES, why=why),
    )


def mtp_tensors(model: Model, parallel: Parallelism) -> tuple[SavedTensor, ...]:
    """What a multi-token-prediction layer saves before its transformer block: two norms and the joining projection."""
    hidden = model.hidden / parallel.tp
    return (
        _token("mtp norm inputs", "attention", 2 * hidden, "inputs of the norms of hidden state and next embedding"),
        _token(
            "mtp projection input", "attention", 2 * hidden, "both, joined: input of the projection to the layer input"
        ),
    )


def placeholder_gradient_bytes(
    model: Model, layers: tuple[Layer, ...], parallel: Parallelism, software: Framework = MEGATRON
) -> float:
    """TransformerEngine's dummy weight gradients: one BF16 tensor per distinct weight shape of the stage, kept for the
    whole run.

    With gradient accumulation fused into the weight-gradient product autograd still wants a tensor of the weight's
    shape; TransformerEngine hands it a cached one (transformer_engine/pytorch/module/base.py, get_dummy_wgrad).
    """
    if not software.placeholder_gradients:
        return 0.0
    shapes = {shape for layer in layers for shape in weight_shapes(model.hidden, layer, parallel)}
    return sum(rows * columns for rows, columns in shapes) * BF16_BYTES


def workspace_bytes(layers: tuple[Layer, ...], software: Framework = MEGATRON) -> float:
    """Workspaces of the matrix products, kept for the whole run; grouped ones where a layer has experts."""
    grouped = software.grouped_workspace_bytes.value if any(layer.is_moe for layer in layers) else 0.0
    return software.product_workspace_bytes.value + grouped


def rank_kv_heads(attention: GroupedQueryAttention, tp: int) -> float:
    """Key-value heads on one tensor-parallel rank: a head is never cut, so with tp > num_kv_heads ranks hold copies."""
    return max(attention.num_kv_heads / tp, 1.0)


def _token(
    name: str, part: Literal["attention", "ffn", "shared", "router", "head"], elements: float, why: str
) -> SavedTensor:
    return SavedTensor(name=name, part=part, per="token", elements=elements, element_bytes=BF16_BYTES, why=why)


def fc1_rows(ffn: Ffn) -> int:
    """Columns that the first product makes: gate and up projections where gated."""
    return ffn.width * (2 if ffn.gated else 1)


def _attention_tensors(hidden: int, attention: Attention, tp: int, keeps_twice: bool) -> list[SavedTensor]:
    heads = attention.num_heads / tp
    tensors = [
        _token("attention norm output", "attention", hidden / tp, "input of the query, key and value projections")
    ]
    if isinstance(attention, LatentAttention):
        if attention.q_lora_rank is not None:
            tensors += _latent_tensors("query latent", attention.q_lora_rank / tp, 0.0)
        rotary = attention.qk_rope_head_dim / tp
        tensors += _latent_tensors("key-value latent", attention.kv_lora_rank / tp, rotary)
        q_dim = k_dim = attention.qk_nope_head_dim + attention.qk_rope_head_dim
        v_dim, kv_heads = attention.v_head_dim, heads
    else:
        q_dim = k_dim = v_dim = attention.head_dim
        kv_heads = rank_kv_heads(attention, tp)
        if attention.qk_norm != "none":
            why = "inputs of the norms of queries and keys"
            tensors.append(
                _token("queries and keys before their norm", "attention", heads * q_dim + kv_heads * k_dim, why)
            )
    tensors += [
        _token("queries", "attention", heads * q_dim, "after rotary embedding; kept by flash attention"),
        _token("keys", "attention", kv_heads * k_dim, "after rotary embedding; kept by flash attention"),
        _token("values", "attention", kv_heads * v_dim, "kept by flash attention"),
        _token(
            "attention output", "attention", heads * v_dim, "kept by flash attention; input of the output projection"
        ),
    ]
    if keeps_twice:
        tensors.append(
            _token(
                "attention output before its all-to-all",
                "attention",
                heads * v_dim,
                "kept apart by context parallelism",
            )
        )
    why = "softmax statistics of flash attention"
    tensors.append(
        SavedTensor(name="logsumexp", part="attention", per="token", elements=heads, element_bytes=FP32_BYTES, why=why)
    )
    return tensors


def _latent_tensors(name: str, rank: float, rotary: float) -> list[SavedTensor]:
    """Of a down-projection's output and the norm that is fused into the up-projection."""
    why = "input of the norm before the up-projection" + ("; rotary key" if rotary else "")
    return [
        _token(name, "attention", rank + rotary, why),
        _token(f"{name} normalised", "attention", rank, "input of the up-projection"),
    ]


def _ffn_tensors(ffn: Ffn, part: Literal["ffn", "shared"], tp: int) -> list[SavedTensor]:
    return [
        _token(
            f"{part} activation input", part, fc1_rows(ffn) / tp, "gate and up projections: input of the activation"
        ),
        _token(f"{part} activation output", part, ffn.width / tp, "input of the down projection"),
    ]


def _moe_tensors(hidden: int, ffn: MoeFfn, parallel: Parallelism, software: Framework) -> list[SavedTensor]:
    etp = parallel.etp
    tensors = (
        _routing_maps(ffn, parallel.tp) if software.routing_records == "maps" else _routing_lists(ffn, parallel.tp)
    )
    why = "received tokens sorted by expert: input of the experts' first product"
    if not software.fused_activation:
        unweighted = "input of the product with its gate"
        tensors.append(
            _assignment("expert activation unweighted", "experts", ffn.expert.width / etp, BF16_BYTES, unweighted)
        )
    tensors += [
        _assignment("expert input", "dispatch", hidden, BF16_BYTES, why),
        _assignment(
            "expert activation input", "experts", fc1_rows(ffn.expert) / etp, BF16_BYTES, "gate and up projections"
        ),
        _assignment(
            "expert activation output",
            "experts",
            ffn.expert.width / etp,
            BF16_BYTES,
            "weighted by the gate: input of the down projection",
        ),
        _assignment("expert gates", "experts", 1, FP32_BYTES, "fp32 gate of the assignment, applied in the activation"),
    ]
    return tensors + (_ffn_tensors(ffn.shared, "shared", parallel.tp) if ffn.shared is not None else [])


def _routing_maps(ffn: MoeFfn, tp: int) -> list[SavedTensor]:
    """Megatron-LM with TransformerEngine: every record spans all experts."""
    experts = ffn.num_experts / tp
    return [
        _routing("router scores", experts, FP32_BYTES, "fp32 softmax or sigmoid of the logits"),
        _routing("router probabilities", experts, FP32_BYTES, "fp32 gates scattered over all experts"),
        _routing("routing map", experts, 1, "which expert a token uses"),
        _routing(
            "permute map",
            (2 * ffn.num_experts + 1) / tp,
            FP32_BYTES,
            "row numbers of the fused permute (TransformerEngine)",
        ),
    ]


def _routing_lists(ffn: MoeFfn, tp: int) -> list[SavedTensor]:
    """The reference model: records span the chosen experts; a token is not split over tp there."""
    assert tp == 1, "the reference model has no tensor parallelism"
    top_k, router = ffn.router.top_k, ffn.router
    tensors = [
        _routing("router scores", ffn.num_experts, FP32_BYTES, "fp32 softmax or sigmoid of the logits"),
        _routing("chosen experts", top_k, INT64_BYTES, "ids that the weights were gathered by"),
        _routing("rows", top_k, INT64_BYTES, "the row of each assignment, kept by permute and combine"),
        _routing("kept", top_k, 1, "whether an assignment has a row"),
        _assignment("token of each row", "dispatch", 1, INT64_BYTES, "kept by combine"),
    ]
    if router.normalise_top_k:
        tensors.append(_routing("weights and their sum", top_k + 1, FP32_BYTES, "fp32, before they are normalised"))
    if router.scoring == "sigmoid":
        tensors.append(_routing("sum of scores", 1, FP32_BYTES, "fp32, makes probabilities for balancing losses"))
    return tensors


def _routing(name: str, elements: float, element_bytes: int, why: str) -> SavedTensor:
    return SavedTensor(name=name, part="router", per="token", elements=elements, element_bytes=element_bytes, why=why)


def _assignment(
    name: str, part: Literal["experts", "dispatch"], elements: float, element_bytes: int, why: str
) -> SavedTensor:
    return SavedTensor(name=name, part=part, per="assignment", elements=elements, element_bytes=element_bytes, why=why)


def weight_shapes(hidden: int, layer: Layer, parallel: Parallelism) -> list[tuple[float, float]]:
    """(rows, columns) of the layer's weight products on one rank."""
    shapes: list[tuple[float, float]] = []
    tp = parallel.tp
    for attention in (layer.attention, layer.cross_attention):
        if attention is None:
            continue
        heads = attention.num_heads
        if isinstance(attention, LatentAttention):
            q_rows = heads * (attention.qk_nope_head_dim + attention.qk_rope_head_dim) / tp
            if attention.q_lora_rank is None:
                shapes.append((q_rows, hidden))
            else:
                shapes += [(attention.q_lora_rank, hidden), (q_rows, attention.q_lora_rank)]
            shapes.append((attention.kv_lora_rank + attention.qk_rope_head_dim, hidden))
            shapes.append((heads * (attention.qk_nope_head_dim + attention.v_head_dim) / tp, attention.kv_lora_rank))
            shapes.append((hidden, heads * attention.v_head_dim / tp))
        else:
            qkv_rows = (heads / tp + 2 * rank_kv_heads(attention, tp)) * attention.head_dim
            shapes.append((qkv_rows, hidden))
            shapes.append((hidden, heads * attention.head_dim / tp))
    blocks: list[tuple[Ffn | None, int]] = [(layer.ffn, tp)] if isinstance(layer.ffn, Ffn) else []
    if isinstance(layer.ffn, MoeFfn):
        blocks = [(layer.ffn.expert, parallel.etp), (layer.ffn.shared, tp)]
    for ffn, split in blocks:
        if ffn is not None:
            shapes += [(fc1_rows(ffn) / split, hidden), (hidden, ffn.width / split)]
    return shapes
