"""The short design YAML of a model that does not exist yet, as a Model.

A design names what matters and leaves the rest out::

    schema: 1
    name: my-moe
    hidden: 4096
    num_layers: 32
    vocab: 128256
    attention: {kind: gqa, num_heads: 32, num_kv_heads: 8}
    ffn: {width: 14336}            # the dense layers
    moe: {every: 2, num_experts: 64, top_k: 2, width: 7168, shared_width: 7168}
    dense_first_layers: 1
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from moesim.describe.model import (
    Attention,
    Ffn,
    GroupedQueryAttention,
    LatentAttention,
    Layer,
    Model,
    MoeFfn,
    Router,
    Scoring,
)
from moesim.door import parse_as, refusals_of
from moesim.errors import check

MAX_LAYERS = 2000


@dataclass(frozen=True, kw_only=True)
class GqaDesign:
    """Grouped-query attention; num_kv_heads defaults to num_heads, head_dim to hidden / num_heads."""

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    qkv_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    sliding_window: int | None = None
    kind: Literal["gqa"] = "gqa"


@dataclass(frozen=True, kw_only=True)
class FfnDesign:
    """The feed-forward block of the dense layers."""

    width: int
    gated: bool = True


@dataclass(frozen=True, kw_only=True)
class MoeDesign:
    """The MoE block, and which layers have it.

    Of each ``every`` layers, counted from 0, the one at ``offset`` (the last where not given) is an MoE layer, except
    among the model's dense_first_layers.
    """

    num_experts: int
    top_k: int
    width: int
    every: int = 1
    offset: int | None = None
    shared_width: int = 0
    gated: bool = True
    scoring: Scoring = "softmax"
    num_groups: int = 1
    top_groups: int = 1

    def __post_init__(self) -> None:
        check(self.every >= 1, "moe", "every", "must be at least 1", self.every)
        offset = self.offset or 0
        check(0 <= offset < self.every, "moe", "offset", f"must lie in 0..{self.every - 1}", offset)
        check(self.shared_width >= 0, "moe", "shared_width", "must not be negative", self.shared_width)


@dataclass(frozen=True, kw_only=True)
class Design:
    """A whole design file."""

    name: str
    hidden: int
    num_layers: int
    vocab: int
    attention: GqaDesign | LatentAttention
    ffn: FfnDesign | None = None
    moe: MoeDesign | None = None
    dense_first_layers: int = 0
    num_mtp_layers: int = 0
    tie_embeddings: bool = False
    active_includes_input_embedding: bool = True
    source: str = ""
    notes: tuple[str, ...] = ()
    schema: Literal[1] = 1

    def __post_init__(self) -> None:
        check(self.hidden >= 1, "design", "hidden", "must be at least 1", self.hidden)
        for name, least in (("num_layers", 1), ("dense_first_layers", 0), ("num_mtp_layers", 0)):
            value = getattr(self, name)
            rule = f"must lie in {least}..{MAX_LAYERS}"
            check(least <= value <= MAX_LAYERS, "design", name, rule, value)
        rule = f"must not exceed num_layers={self.num_layers}"
        check(self.dense_first_layers <= self.num_layers, "design", "dense_first_layers", rule, self.dense_first_layers)


def is_design(raw: object) -> bool:
    """Whether a plain value looks like a design rather than a Hugging Face config: it says ``hidden`` or ``schema``."""
    return isinstance(raw, Mapping) and ("hidden" in raw or "schema" in raw) and "model_type" not in raw


def model_from_design(raw: object, *, owner: str) -> Model:
    """The Model of a design. Raises InputError naming owner, field, rule and value.

    >>> design = {"name": "tiny", "hidden": 64, "num_layers": 2, "vocab": 100, "attention": {"num_heads": 4},
    ...           "moe": {"num_experts": 4, "top_k": 1, "width": 128}}
    >>> model_from_design(design, owner="tiny.yaml").moe_layers
    (0, 1)
    """
    if isinstance(raw, Mapping) and isinstance(raw.get("attention"), Mapping) and "kind" not in raw["attention"]:
        kind = "mla" if "kv_lora_rank" in raw["attention"] else "gqa"
        raw = {**raw, "attention": {"kind": kind, **raw["attention"]}}
    design = parse_as(Design, raw, owner)
    with refusals_of(owner):
        are_moe = _moe_layers(design)
        attention = _attention(design)
        layers = tuple(
            Layer(attention=attention, ffn=_moe(design) if is_moe else _dense(design, owner)) for is_moe in are_moe
        )
        return Model(
            name=design.name,
            hidden=design.hidden,
            vocab=design.vocab,
            layers=layers,
            mtp_layers=(layers[-1],) * design.num_mtp_layers,
            tie_embeddings=design.tie_embeddings,
            active_includes_input_embedding=design.active_includes_input_embedding,
            source=design.source or owner,
            hypothetical=True,
            notes=design.notes,
        )


def _moe_layers(design: Design) -> list[bool]:
    moe = design.moe
    if moe is None:
        return [False] * design.num_layers
    offset = moe.every - 1 if moe.offset is None else moe.offset
    are_moe = [i >= design.dense_first_layers and i % moe.every == offset for i in range(design.num_layers)]
    hint = "Take moe out for a dense model."
    rule = "must leave at least one MoE layer"
    check(any(are_moe), "design", "moe.every", rule, moe.every, hint)
    return are_moe


def _attention(design: Design) -> Attention:
    attention = design.attention
    if isinstance(attention, LatentAttention):
        return attention
    head_dim = attention.head_dim
    check(attention.num_heads >= 1, "design", "attention.num_heads", "must be at least 1", attention.num_heads)
    if head_dim is None:
        rule = f"must divide hidden={design.hidden} where head_dim is not given"
        check(design.hidden % attention.num_heads == 0, "design", "attention.num_heads", rule, attention.num_heads)
        head_dim = design.hidden // attention.num_heads
    kv_heads = attention.num_heads if attention.num_kv_heads is None else attention.num_kv_heads
    values = dataclasses.asdict(attention) | {"head_dim": head_dim, "num_kv_heads": kv_heads}
    return GroupedQueryAttention(**values)


def _dense(design: Design, owner: str) -> Ffn:
    check(design.ffn is not None, owner, "ffn", "is needed: some layers are dense", None)
    assert design.ffn is not None
    return Ffn(width=design.ffn.width, gated=design.ffn.gated)


def _moe(design: Design) -> MoeFfn:
    moe = design.moe
    assert moe is not None
    return MoeFfn(
        num_experts=moe.num_experts,
        expert=Ffn(width=moe.width, gated=moe.gated),
        router=Router(top_k=moe.top_k, scoring=moe.scoring, num_groups=moe.num_groups, top_groups=moe.top_groups),
        shared=Ffn(width=moe.shared_width, gated=moe.gated) if moe.shared_width else None,
    )
