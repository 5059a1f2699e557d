"""Model FLOPs per token by part: the products that training needs, no recomputation. See docs/model.md#flops.

A product of T rows with a matrix of P parameters is 2*T*P FLOPs. A causal query sees half the sequence on average; the
``full_attention`` convention counts the whole square instead. The backward is twice the forward: one product for the
gradient of the input, one for that of the weight (of both factors, in attention).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from moesim.describe.model import Attention, Ffn, GroupedQueryAttention, Layer, Model, MoeFfn

FLOP_PARTS = (
    "attention_projections",
    "attention_sequence",
    "router",
    "experts",
    "shared_experts",
    "dense_ffn",
    "head",
)
BACKWARD_OVER_FORWARD = 2.0


@dataclass(frozen=True, kw_only=True)
class LayerFlops:
    """Forward FLOPs per token of one layer by part [FLOP/token]."""

    attention_projections: float
    attention_sequence: float
    router: float
    experts: float
    shared_experts: float
    dense_ffn: float

    @property
    def total(self) -> float:
        return (
            self.attention_projections
            + self.attention_sequence
            + self.router
            + self.experts
            + self.shared_experts
            + self.dense_ffn
        )


def layer_flops(model: Model, layer: Layer, seq_len: int, *, full_attention: bool = False) -> LayerFlops:
    """Forward FLOPs per token of one layer at a sequence length, the top-k experts counted."""
    hidden, ffn, cross = model.hidden, layer.ffn, layer.cross_attention
    projections = _projection_flops(hidden, layer.attention)
    whole_square = full_attention or not layer.causal
    sequence = _sequence_flops(layer.attention, seq_len, whole_square=whole_square)
    if cross is not None:
        projections += _projection_flops(hidden, cross)
        sequence += _sequence_flops(cross, seq_len, whole_square=True)
    router = experts = shared = dense = 0.0
    if isinstance(ffn, MoeFfn):
        router = 2.0 * hidden * ffn.num_experts
        experts = ffn.router.top_k * ffn_flops(hidden, ffn.expert)
        if ffn.shared is not None:
            shared = ffn_flops(hidden, ffn.shared) + 2.0 * hidden * ffn.has_shared_gate
    else:
        dense = ffn_flops(hidden, ffn)
    return LayerFlops(
        attention_projections=projections,
        attention_sequence=sequence,
        router=router,
        experts=experts,
        shared_experts=shared,
        dense_ffn=dense,
    )


def ffn_flops(hidden: int, ffn: Ffn) -> float:
    """Forward FLOPs per token of one feed-forward block (three products when gated, two when plain)."""
    return 2.0 * (3 if ffn.gated else 2) * hidden * ffn.width


def _projection_flops(hidden: int, attention: Attention) -> float:
    """Products with one attention block's weights; keys and values are expanded from the latent, as in training."""
    if isinstance(attention, GroupedQueryAttention):
        num_heads, num_kv_heads = attention.num_heads, attention.num_kv_heads
        return 2.0 * hidden * attention.head_dim * (2 * num_heads + 2 * num_kv_heads)
    query_width = attention.num_heads * (attention.qk_nope_head_dim + attention.qk_rope_head_dim)
    rank = attention.q_lora_rank
    query = hidden * query_width if rank is None else rank * (hidden + query_width)
    up_width = attention.num_heads * (attention.qk_nope_head_dim + attention.v_head_dim)
    down = hidden * (attention.kv_lora_rank + attention.qk_rope_head_dim)
    output = attention.num_heads * attention.v_head_dim * hidden
    return 2.0 * (query + down + attention.kv_lora_rank * up_width + output)


def _sequence_flops(attention: Attention, seq_len: int, *, whole_square: bool) -> float:
    """Scores and weighted values of one query over the keys it sees."""
    if isinstance(attention, GroupedQueryAttention):
        window = min(seq_len, attention.sliding_window or seq_len)
        dims = 2 * attention.head_dim
    else:
        window = seq_len
        dims = attention.qk_nope_head_dim + attention.qk_rope_head_dim + attention.v_head_dim
    # Causal: the first `window` queries see half of it on average, all later ones the whole window.
    seen = window if whole_square else window - window * window / (2 * seq_len)
    return 2.0 * attention.num_heads * dims * seen


def forward_flops_by_part(
    model: Model, seq_len: int, *, full_attention: bool = False, with_mtp: bool = False
) -> dict[str, float]:
    """Forward FLOPs per token of the whole model by the names of FLOP_PARTS (and ``mtp`` when asked for).

    >>> from moesim.catalog.models import load_model
    >>> parts = forward_flops_by_part(load_model("mixtral-8x7b"), 4096)
    >>> parts["experts"] / sum(parts.values()) > 0.8
    True
    """
    flops = dict.fromkeys(FLOP_PARTS, 0.0)
    for layer, repeats in Counter(model.layers).items():
        one = layer_flops(model, layer, seq_len, full_attention=full_attention)
        for part in FLOP_PARTS[:-1]:
            flops[part] += repeats * getattr(one, part)
    flops["head"] = 2.0 * model.hidden * model.vocab
    if with_mtp:
        flops["mtp"] = mtp_flops(model, seq_len, full_attention=full_attention)
    return flops


def backward_flops_by_part(
    model: Model, seq_len: int, *, full_attention: bool = False, with_mtp: bool = False
) -> dict[str, float]:
    """Backward FLOPs per token by part: twice the forward."""
    forward = forward_flops_by_part(model, seq_len, full_attention=full_attention, with_mtp=with_mtp)
    return {part: BACKWARD_OVER_FORWARD * value for part, value in forward.items()}


def training_flops_per_token(
    model: Model, seq_len: int, *, full_attention: bool = False, with_mtp: bool = False
) -> float:
    """Forward and backward FLOPs of one trained token: the numerator of the model FLOPs utilisation."""
    forward = forward_flops_by_part(model, seq_len, full_attention=full_attention, with_mtp=with_mtp)
    return (1.0 + BACKWARD_OVER_FORWARD) * sum(forward.values())


def mtp_flops(model: Model, seq_len: int, *, full_attention: bool = False) -> float:
    """Forward FLOPs per token of the multi-token-prediction layers: each a layer, its projection, the head again."""
    hidden = model.hidden
    extra = 2.0 * 2 * hidden * hidden + 2.0 * hidden * model.vocab
    layers = (layer_flops(model, layer, seq_len, full_attention=full_attention) for layer in model.mtp_layers)
    return sum(one.total + extra for one in layers)
