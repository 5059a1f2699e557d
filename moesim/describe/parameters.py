"""How many parameters a model has, by part: pure functions of a Model, equal to the last parameter to what is built.

H is the width of the residual stream (``model.hidden``). See docs/model.md#parameters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields

from moesim.describe.model import Attention, Ffn, GroupedQueryAttention, Layer, Model, MoeFfn

PARTS = (
    "input_embedding",
    "attention",
    "router",
    "experts",
    "shared_experts",
    "dense_ffn",
    "norms",
    "head",
    "extra",
)


@dataclass(frozen=True, kw_only=True)
class LayerParameters:
    """Parameters of one layer by part. ``experts`` counts all of them, ``active_experts`` the top-k a token uses."""

    attention: int
    cross_attention: int
    router: int
    experts: int
    per_expert: int
    active_experts: int
    shared_experts: int
    dense_ffn: int
    norms: int

    @property
    def outside_experts(self) -> int:
        """Parameters that every expert-parallel rank holds: all but the routed experts."""
        return self.attention + self.cross_attention + self.router + self.shared_experts + self.dense_ffn + self.norms

    @property
    def total(self) -> int:
        return self.outside_experts + self.experts

    @property
    def active(self) -> int:
        """Parameters that one token's forward uses."""
        return self.outside_experts + self.active_experts


def layer_parameters(model: Model, layer: Layer) -> LayerParameters:
    """Parameters of one layer of the model, by part.

    >>> from moesim.catalog.models import load_model
    >>> mixtral = load_model("mixtral-8x7b")
    >>> layer_parameters(mixtral, mixtral.layers[0]).per_expert
    176160768
    """
    hidden, ffn = model.hidden, layer.ffn
    cross = layer.cross_attention
    norm_size = hidden * (2 if model.has_norm_bias else 1)
    router = per_expert = num_experts = top_k = shared = dense = 0
    if isinstance(ffn, MoeFfn):
        num_experts, top_k = ffn.num_experts, ffn.router.top_k
        router = (hidden + ffn.router.has_linear_bias) * num_experts
        per_expert = ffn_parameters(hidden, ffn.expert)
        if ffn.shared is not None:
            shared = ffn_parameters(hidden, ffn.shared) + hidden * ffn.has_shared_gate
    else:
        dense = ffn_parameters(hidden, ffn)
    return LayerParameters(
        attention=attention_parameters(hidden, layer.attention),
        cross_attention=attention_parameters(hidden, cross) if cross is not None else 0,
        router=router,
        experts=num_experts * per_expert,
        per_expert=per_expert,
        active_experts=top_k * per_expert,
        shared_experts=shared,
        dense_ffn=dense,
        norms=layer.num_norms * norm_size,
    )


def ffn_parameters(hidden: int, ffn: Ffn) -> int:
    """Parameters of one feed-forward block: three matrices when gated, two when plain; biases if it has them."""
    num_inner = 2 if ffn.gated else 1
    biases = num_inner * ffn.width + hidden if ffn.has_bias else 0
    return (num_inner + 1) * hidden * ffn.width + biases


def attention_parameters(hidden: int, attention: Attention) -> int:
    """Parameters of one attention block with its inner norms, biases and sinks. MLA: arXiv 2405.04434 section 2.1."""
    if isinstance(attention, GroupedQueryAttention):
        num_heads, num_kv_heads, dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
        qkv_width = (num_heads + 2 * num_kv_heads) * dim
        total = hidden * qkv_width + num_heads * dim * hidden
        total += qkv_width * attention.qkv_bias + hidden * attention.output_bias + num_heads * attention.has_sinks
        qk_norm = {"none": 0, "head": 2 * dim, "full": (num_heads + num_kv_heads) * dim}
        return total + qk_norm[attention.qk_norm]
    query_width = attention.num_heads * (attention.qk_nope_head_dim + attention.qk_rope_head_dim)
    down_width = attention.kv_lora_rank + attention.qk_rope_head_dim
    rank = attention.q_lora_rank
    query = hidden * query_width if rank is None else hidden * rank + rank + rank * query_width
    up_width = attention.num_heads * (attention.qk_nope_head_dim + attention.v_head_dim)
    key_value = hidden * down_width + attention.kv_lora_rank + attention.kv_lora_rank * up_width
    output = attention.num_heads * attention.v_head_dim * hidden
    biases = ((rank or 0) + down_width + hidden) * attention.has_bias
    return query + key_value + output + biases


def parameters_by_part(model: Model) -> dict[str, int]:
    """Parameters of the whole model by the names of PARTS, without multi-token-prediction layers."""
    return _by_part(model, active=False)


def active_parameters_by_part(model: Model) -> dict[str, int]:
    """Parameters that one token's forward uses, by the names of PARTS: top-k experts, all of the rest."""
    return _by_part(model, active=True)


def _by_part(model: Model, *, active: bool) -> dict[str, int]:
    counts = dict.fromkeys(PARTS, 0)
    for layer, repeats in _distinct(model.layers).items():
        one = layer_parameters(model, layer)
        counts["attention"] += repeats * (one.attention + one.cross_attention)
        counts["router"] += repeats * one.router
        counts["experts"] += repeats * (one.active_experts if active else one.experts)
        counts["shared_experts"] += repeats * one.shared_experts
        counts["dense_ffn"] += repeats * one.dense_ffn
        counts["norms"] += repeats * one.norms
    table = model.vocab * model.hidden
    counts["input_embedding"] = table
    counts["head"] = 0 if model.tie_embeddings else table
    counts["norms"] += model.num_final_norms * model.hidden * (2 if model.has_norm_bias else 1)
    counts["extra"] = model.num_extra_parameters
    return counts


def _distinct(layers: tuple[Layer, ...]) -> Mapping[Layer, int]:
    """Each different layer and how often it stands in the stack: identical layers are counted once."""
    return Counter(layers)


def total_parameters(model: Model) -> int:
    """All parameters, without multi-token-prediction layers."""
    return sum(parameters_by_part(model).values())


def active_parameters(model: Model, *, with_input_embedding: bool = True) -> int:
    """Parameters that one token's forward uses. Without the input embedding, a tied table still counts as the head."""
    active = sum(active_parameters_by_part(model).values())
    if with_input_embedding or model.tie_embeddings:
        return active
    return active - model.vocab * model.hidden


def published_active_parameters(model: Model) -> int:
    """Active parameters in the publisher's own convention."""
    return active_parameters(model, with_input_embedding=model.active_includes_input_embedding)


def mtp_parameters(model: Model) -> int:
    """Parameters of the multi-token-prediction layers that no other part holds: embedding and head are the model's own.

    Each adds a projection of two streams to one and three norms to its layer. arXiv 2412.19437 section 2.2.
    """
    extra = 2 * model.hidden * model.hidden + 3 * model.hidden
    return sum(layer_parameters(model, layer).total + extra for layer in model.mtp_layers)


def stack_parameters(model: Model, layers: tuple[Layer, ...]) -> LayerParameters:
    """The sum over some layers of the model, by part (``per_expert`` and ``active_experts`` summed too)."""
    sums = Counter[str]()
    for layer, repeats in _distinct(layers).items():
        one = layer_parameters(model, layer)
        for item in fields(one):
            sums[item.name] += repeats * getattr(one, item.name)
    return LayerParameters(**{item.name: sums[item.name] for item in fields(LayerParameters)})
