"""A small decoder: grouped-query attention with rotary positions, RMS norms, dense and Mixture-of-Experts layers.

Legend: B sequences, S tokens of a sequence, T = B*S, H hidden, N query heads, G key-value heads, D head dimension,
V vocabulary, E experts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reference_model.attention import Attention, rotary_turns
from reference_model.capacity import DropPolicy
from reference_model.discard import discard
from reference_model.latent_attention import LatentAttention, LatentConfig
from reference_model.layer import FeedForward, LayerResult, MoeLayer
from reference_model.layer import Module as LayerModule
from reference_model.norm import RmsNorm
from reference_model.routers import Router

# Megatron-LM's names; one that a layer does not have changes nothing there.
Module = Literal["core_attn", "mla_up_proj", "mlp", "moe", "moe_act", "layernorm", "shared_experts"]
Recompute = Literal["none", "full"] | tuple[Module, ...]


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """The MoE layers: of each ``every`` layers the last is one. capacity_factor None drops nothing."""

    num_experts: int
    width: int
    router: Router
    every: int = 2
    shared_width: int = 0
    capacity_factor: float | None = None
    drop_policy: DropPolicy = "probability"
    router_in_float32: bool = True


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes of a decoder; moe None makes every layer dense.

    latent: latent attention instead of grouped queries; num_kv_heads is then num_heads, head_dim that of the queries.
    """

    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dense_width: int
    vocab: int
    moe: MoeConfig | None = None
    rope_theta: float = 10_000.0
    latent: LatentConfig | None = None

    def __post_init__(self) -> None:
        assert self.num_heads % self.num_kv_heads == 0, "every key-value head serves as many query heads"
        assert self.head_dim % 2 == 0, "rotary positions turn pairs of dimensions"
        assert self.moe is None or self.moe_layers, "an MoE model has at least one MoE layer"
        same = self.latent is None or (self.num_kv_heads, self.head_dim) == (self.num_heads, self.latent.qk_head_dim)
        assert same, "latent attention has keys for every head, as wide as its queries"

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The numbers of the MoE layers, counted from 0."""
        if self.moe is None:
            return ()
        return tuple(i for i in range(self.num_layers) if i % self.moe.every == self.moe.every - 1)

    def design(self, name: str) -> dict[str, Any]:
        """The same sizes as moesim's design file says them: ``moesim describe --model`` reads it as YAML or JSON."""
        attention: dict[str, Any] = {"kind": "gqa" if self.latent is None else "mla", "num_heads": self.num_heads}
        if self.latent is None:
            attention |= {"num_kv_heads": self.num_kv_heads, "head_dim": self.head_dim}
        else:
            attention |= asdict(self.latent)
        values: dict[str, Any] = {"schema": 1, "name": name, "hidden": self.hidden, "num_layers": self.num_layers}
        values |= {"vocab": self.vocab, "attention": attention, "ffn": {"width": self.dense_width}}
        if self.moe is not None:
            sizes = ("num_experts", "width", "every", "shared_width")
            values["moe"] = {size: getattr(self.moe, size) for size in sizes} | {"top_k": self.moe.router.top_k}
        return values


class TransformerResult(NamedTuple):
    """logits_BSV, and the MoE layers' results by the layers' numbers."""

    logits_BSV: Tensor
    moe: dict[int, LayerResult]


class Block(nn.Module):
    """One layer: attention, then a dense feed-forward block or a mixture of experts, each behind a norm."""

    def __init__(self, config: TransformerConfig, moe: MoeConfig | None, recompute: Recompute = "none") -> None:
        super().__init__()
        hidden, modules = config.hidden, recompute if isinstance(recompute, tuple) else ()
        self.recompute_all, self.recompute_mlp = recompute == "full", "mlp" in modules
        self.recompute_norms = "layernorm" in modules
        self.attention_norm, self.ffn_norm = RmsNorm(hidden), RmsNorm(hidden)
        self.attention = _attention(config, modules)
        self.ffn: MoeLayer | FeedForward
        if moe is None:
            self.ffn = FeedForward(hidden=hidden, width=config.dense_width)
        else:
            self.ffn = MoeLayer(
                hidden=hidden,
                width=moe.width,
                num_experts=moe.num_experts,
                router=moe.router,
                shared_width=moe.shared_width,
                capacity_factor=moe.capacity_factor,
                drop_policy=moe.drop_policy,
                router_in_float32=moe.router_in_float32,
                recompute="full" if "moe" in modules else _inside_moe(modules),
            )

    def forward(self, x_BSH: Tensor, turns_S: Tensor) -> tuple[Tensor, LayerResult | None]:
        """(B, S, H) -> (B, S, H), and what an MoE layer decided."""
        if self.recompute_all and torch.is_grad_enabled():
            return checkpoint(self._forward, x_BSH, turns_S, use_reentrant=False)
        return self._forward(x_BSH, turns_S)

    def _forward(self, x_BSH: Tensor, turns_S: Tensor) -> tuple[Tensor, LayerResult | None]:
        x_BSH = self._attend(x_BSH, turns_S)
        if not isinstance(self.ffn, MoeLayer):
            if self.recompute_mlp and torch.is_grad_enabled():
                return x_BSH + checkpoint(self._dense, x_BSH, use_reentrant=False), None
            return x_BSH + self._dense(x_BSH), None
        normed_BSH = self.ffn_norm(x_BSH)
        result = self.ffn(normed_BSH.flatten(0, 1))
        if self.recompute_norms and torch.is_grad_enabled():
            before = [result.output_TH, result.logits_TE]
            discard([normed_BSH], lambda: [self.ffn_norm(x_BSH)], before=before)
        return x_BSH + result.output_TH.view_as(x_BSH), result

    def _attend(self, x_BSH: Tensor, turns_S: Tensor) -> Tensor:
        normed_BSH = self.attention_norm(x_BSH)
        mixed_BSH = self.attention(normed_BSH, turns_S)
        # Before grouped-query attention and dense blocks Megatron fuses the norm into the product: it stays.
        if self.recompute_norms and isinstance(self.attention, LatentAttention) and torch.is_grad_enabled():
            discard([normed_BSH], lambda: [self.attention_norm(x_BSH)], before=[mixed_BSH])
        return x_BSH + mixed_BSH

    def _dense(self, x_BSH: Tensor) -> Tensor:
        return self.ffn(self.ffn_norm(x_BSH))


def _attention(config: TransformerConfig, recompute: tuple[Module, ...]) -> Attention | LatentAttention:
    core = "core_attn" in recompute
    if config.latent is None:
        heads = {"num_heads": config.num_heads, "num_kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
        return Attention(hidden=config.hidden, **heads, recompute=core)
    return LatentAttention(
        hidden=config.hidden,
        num_heads=config.num_heads,
        sizes=config.latent,
        recompute_core=core,
        recompute_up="mla_up_proj" in recompute,
    )


def _inside_moe(modules: tuple[Module, ...]) -> tuple[LayerModule, ...]:
    return tuple(module for module in modules if module == "moe_act" or module == "shared_experts")


class Transformer(nn.Module):
    """A decoder that predicts the next token. The head has its own matrix.

    recompute: what the backward computes again: nothing, whole layers, or the modules named. It changes no number.

    >>> config = TransformerConfig(hidden=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, dense_width=16,
    ...                            vocab=32)
    >>> Transformer(config)(torch.zeros(1, 5, dtype=torch.int64)).logits_BSV.shape
    torch.Size([1, 5, 32])
    """

    def __init__(self, config: TransformerConfig, recompute: Recompute = "none") -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.hidden)
        moe = config.moe_layers
        layers = [config.moe if i in moe else None for i in range(config.num_layers)]
        self.blocks = nn.ModuleList(Block(config, layer, recompute) for layer in layers)
        self.norm = RmsNorm(config.hidden)
        self.head = nn.Linear(config.hidden, config.vocab, bias=False)

    def forward(self, tokens_BS: Tensor) -> TransformerResult:
        """Logits of the token after each: (B, S) -> (B, S, V), with the MoE layers' results."""
        latent = self.config.latent
        turned = self.config.head_dim if latent is None else latent.qk_rope_head_dim
        turns_S = rotary_turns(tokens_BS.shape[1], turned, self.config.rope_theta, device=tokens_BS.device)
        x_BSH = self.embedding(tokens_BS)
        results: dict[int, LayerResult] = {}
        for i, block in enumerate(self.blocks):
            x_BSH, result = block(x_BSH, turns_S)
            if result is not None:
                results[i] = result
        return TransformerResult(self.head(self.norm(x_BSH)), results)

    def moe_layers(self) -> dict[int, MoeLayer]:
        """The MoE layers by their numbers."""
        return {i: block.ffn for i, block in enumerate(self.blocks) if isinstance(block.ffn, MoeLayer)}


def build(config: TransformerConfig, *, seed: int, recompute: Recompute = "none") -> Transformer:
    """A transformer with weights drawn from this seed alone; the global generator is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Transformer(config, recompute)


def parameters_by_part(model: Transformer) -> dict[str, int]:
    """Parameters that the model holds, by moesim's names of the parts."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = _part(
            name,
            is_moe=".ffn.router_weight" in name
            or ".ffn.noise_weight" in name
            or ".ffn.experts." in name
            or ".ffn.shared." in name,
        )
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def _part(name: str, *, is_moe: bool) -> str:
    if name.startswith("embedding"):
        return "input_embedding"
    if name.startswith("head"):
        return "head"
    if ".attention." in name:  # with the norms of its latents
        return "attention"
    if "norm" in name:
        return "norms"
    if not is_moe:
        return "dense_ffn"
    return "router" if "router" in name or "noise" in name else "shared_experts" if ".shared." in name else "experts"


def active_parameters(config: TransformerConfig) -> int:
    """Parameters that one token's forward uses: all but the experts it does not take."""
    held = sum(parameters_by_part(Transformer(config)).values())
    if config.moe is None:
        return held
    idle = config.moe.num_experts - config.moe.router.top_k
    return held - len(config.moe_layers) * idle * 3 * config.hidden * config.moe.width


def forward_flops_per_token(config: TransformerConfig, seq_len: int, *, full_attention: bool = False) -> float:
    """FLOPs of the products in one token's forward, the chosen experts counted; causal attention half unless full.

    A product with a matrix of P parameters is 2*P FLOPs a token; the backward takes twice the forward.
    """
    hidden, heads = config.hidden, config.num_heads
    keys = seq_len if full_attention else seq_len / 2
    projections = 2.0 * hidden * config.head_dim * (2 * heads + 2 * config.num_kv_heads)
    sequence = 2.0 * heads * 2 * config.head_dim * keys
    if (latent := config.latent) is not None:
        projections = 2.0 * _latent_matrices(hidden, heads, latent)
        sequence = 2.0 * heads * (latent.qk_head_dim + latent.v_head_dim) * keys
    num_moe = len(config.moe_layers)
    flops = config.num_layers * (projections + sequence) + 2.0 * hidden * config.vocab
    flops += (config.num_layers - num_moe) * 6.0 * hidden * config.dense_width
    if config.moe is not None:
        moe = config.moe
        flops += num_moe * hidden * (2.0 * moe.num_experts + 6.0 * (moe.router.top_k * moe.width + moe.shared_width))
    return flops


def _latent_matrices(hidden: int, heads: int, sizes: LatentConfig) -> int:
    """Numbers in the matrices of latent attention."""
    rank, kv = sizes.q_lora_rank, sizes.kv_lora_rank
    queries = heads * sizes.qk_head_dim
    return (
        (hidden * queries if rank is None else rank * (hidden + queries))
        + hidden * (kv + sizes.qk_rope_head_dim)
        + kv * heads * (sizes.qk_nope_head_dim + sizes.v_head_dim)
        + heads * sizes.v_head_dim * hidden
    )


def equal_flops_width(moe: MoeConfig) -> int:
    """The width of a dense SwiGLU block that costs a token exactly as many FLOPs as this MoE layer, router included."""
    assert moe.num_experts % 3 == 0, "the router's 2*H*E FLOPs are those of E/3 more columns"
    return moe.router.top_k * moe.width + moe.shared_width + moe.num_experts // 3
