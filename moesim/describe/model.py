"""A transformer as moesim sees it: attention, feed-forward, layers. Sizes only; no weights.

Legend: hidden is the width of the residual stream; width is the inner width of a feed-forward block.
Counts and FLOPs are in ``moesim.describe.counts``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

from moesim.describe.checks import check_choice, check_number, check_whole
from moesim.errors import check
from moesim.units import KILO

Scoring = Literal["softmax", "sigmoid"]
Choice = Literal["top_k", "random_second", "expert_choice"]
GroupScore = Literal["top2_sum", "max"]
MAX_EXPERTS = int(100 * KILO)  # per layer; a hostile file must not fill memory
QkNorm = Literal["none", "head", "full"]


@dataclass(frozen=True, kw_only=True)
class GroupedQueryAttention:
    """Attention with num_kv_heads key-value heads shared by num_heads query heads (MHA when equal)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: QkNorm = "none"  # head: one weight per head_dim; full: over all heads
    sliding_window: int | None = None  # tokens a query looks back; None: all
    has_sinks: bool = False  # one learned sink logit per head (gpt-oss)
    kind: Literal["gqa"] = "gqa"

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_kv_heads", "head_dim"):
            check_whole("attention", name, getattr(self, name))
        rule = f"must divide num_heads={self.num_heads}"
        check(self.num_heads % self.num_kv_heads == 0, "attention", "num_kv_heads", rule, self.num_kv_heads)
        check_choice("attention", "qk_norm", self.qk_norm, get_args(QkNorm))
        if self.sliding_window is not None:
            check_whole("attention", "sliding_window", self.sliding_window)


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (MLA): keys and values from a latent of kv_lora_rank.

    DeepSeek-V2, arXiv 2405.04434 section 2.1.
    """

    num_heads: int
    q_lora_rank: int | None  # None: queries are projected directly
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    has_bias: bool = False
    kind: Literal["mla"] = "mla"

    def __post_init__(self) -> None:
        for name in ("num_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            check_whole("attention", name, getattr(self, name))
        if self.q_lora_rank is not None:
            check_whole("attention", "q_lora_rank", self.q_lora_rank)


Attention = GroupedQueryAttention | LatentAttention


@dataclass(frozen=True, kw_only=True)
class Ffn:
    """One feed-forward block: two matrices, or three when gated (SwiGLU, GeGLU)."""

    width: int
    gated: bool = True
    has_bias: bool = False

    def __post_init__(self) -> None:
        check_whole("ffn", "width", self.width)


@dataclass(frozen=True, kw_only=True)
class Router:
    """How a token picks its experts: scores, optional groups, top-k.

    choice ``top_k``: every token takes its k best (k = 1: Switch, arXiv 2101.03961). ``random_second``: of two, the
    second is kept with probability min(1, 2*g2), g2 its share of both gates (GShard, arXiv 2006.16668 algorithm 1).
    ``expert_choice``: every expert takes its T*k/E best tokens, so loads are even and a token gets 0 to E experts
    (arXiv 2202.09368). Group-limited: ``top2_sum`` scores a group by its two best experts (DeepSeek-V3, arXiv
    2412.19437 section 2.1.2), ``max`` by its best (device-limited routing of DeepSeek-V2, arXiv 2405.04434 section
    2.1.2).
    """

    top_k: int
    scoring: Scoring = "softmax"
    normalise_top_k: bool = True
    num_groups: int = 1  # expert groups of group-limited routing; 1: none
    top_groups: int = 1  # groups a token may use
    has_score_bias: bool = False  # loss-free balancing: a bias per expert for selection only (a buffer, no parameter)
    has_linear_bias: bool = False  # the router's linear layer has a bias (gpt-oss)
    choice: Choice = "top_k"
    group_score: GroupScore = "top2_sum"
    noise_std: float = 0.0  # of the normal noise that noisy top-k adds to a logit (arXiv 1701.06538 section 2.1)
    num_zero_experts: int = 0  # beside the others; they take assignments, but neither compute nor traffic

    def __post_init__(self) -> None:
        for name in ("top_k", "num_groups", "top_groups"):
            check_whole("router", name, getattr(self, name))
        rule = f"must lie in 1..num_groups={self.num_groups}"
        check(self.top_groups <= self.num_groups, "router", "top_groups", rule, self.top_groups)
        check_choice("router", "scoring", self.scoring, get_args(Scoring))
        check_choice("router", "choice", self.choice, get_args(Choice))
        check_choice("router", "group_score", self.group_score, get_args(GroupScore))
        check_number("router", "noise_std", self.noise_std)
        check(self.noise_std >= 0.0, "router", "noise_std", "must be at least 0", self.noise_std)
        check_whole("router", "num_zero_experts", self.num_zero_experts, least=0)
        plain = self.num_groups == 1 and self.num_zero_experts == 0
        check(self.choice == "top_k" or plain, "router", "choice", "takes no groups and no zero experts", self.choice)
        check(self.choice != "random_second" or self.top_k == 2, "router", "top_k", "must be 2", self.top_k)
        rule = "must be 0 for a group-limited router"
        zero_fits = self.num_zero_experts == 0 or self.num_groups == 1
        check(zero_fits, "router", "num_zero_experts", rule, self.num_zero_experts)


@dataclass(frozen=True, kw_only=True)
class MoeFfn:
    """A mixture of num_experts feed-forward blocks; a token uses router.top_k of them and the shared one, if any."""

    num_experts: int
    expert: Ffn
    router: Router
    shared: Ffn | None = None  # all shared experts as one block of their summed width
    has_shared_gate: bool = False  # a sigmoid gate on the shared block (Qwen2-MoE)

    def __post_init__(self) -> None:
        num_experts, top_k, groups = self.num_experts, self.router.top_k, self.router.num_groups
        check_whole("moe", "num_experts", num_experts)
        check(num_experts <= MAX_EXPERTS, "moe", "num_experts", f"must not exceed {MAX_EXPERTS}", num_experts)
        check(top_k <= num_experts, "moe", "top_k", f"must not exceed num_experts={num_experts}", top_k)
        check(num_experts % groups == 0, "moe", "num_groups", f"must divide num_experts={num_experts}", groups)
        reachable = num_experts // groups * self.router.top_groups
        rule = f"must not exceed the {reachable} experts of top_groups={self.router.top_groups} groups"
        check(top_k <= reachable, "moe", "top_k", rule, top_k)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One transformer block: attention, optional cross-attention (decoder of an encoder-decoder), feed-forward."""

    attention: Attention
    ffn: Ffn | MoeFfn
    cross_attention: GroupedQueryAttention | None = None
    causal: bool = True
    num_norms: int = 2  # norm vectors of size hidden in the block (three with cross-attention)

    def __post_init__(self) -> None:
        check_whole("layer", "num_norms", self.num_norms, least=0)

    @property
    def is_moe(self) -> bool:
        return isinstance(self.ffn, MoeFfn)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A whole model. ``layers`` is the stack in order; ``mtp_layers`` are multi-token-prediction layers after it."""

    name: str
    hidden: int
    vocab: int
    layers: tuple[Layer, ...]
    mtp_layers: tuple[Layer, ...] = ()
    tie_embeddings: bool = False
    has_norm_bias: bool = False  # LayerNorm with a bias instead of RMSNorm
    num_final_norms: int = 1
    num_extra_parameters: int = 0  # what no other part holds, such as T5's relative position tables
    active_includes_input_embedding: bool = True  # the publisher's convention for active parameters
    source: str = ""
    hypothetical: bool = False
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        owner = f"model {self.name}"
        for name, least in (("hidden", 1), ("vocab", 1), ("num_final_norms", 0), ("num_extra_parameters", 0)):
            check_whole(owner, name, getattr(self, name), least)
        check(len(self.layers) > 0, owner, "layers", "must not be empty", len(self.layers))

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Positions of the MoE layers in ``layers``."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.is_moe)

    @property
    def is_moe(self) -> bool:
        return any(layer.is_moe for layer in self.kinds)

    @cached_property
    def kinds(self) -> tuple[Layer, ...]:
        """The layers of the stack that differ, each once, in order."""
        return tuple(dict.fromkeys(self.layers))
