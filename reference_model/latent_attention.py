"""Multi-head latent attention: queries, keys and values from small latents.

Legend: B sequences, S tokens of a sequence, H hidden, N heads, D head dimension of queries and keys, V of values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reference_model.attention import mix, rotate
from reference_model.discard import discard
from reference_model.norm import RmsNorm


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Widths of latents and heads: a head's queries and keys have a part without positions and a part with them.

    q_lora_rank: None projects queries directly.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim


class LatentAttention(nn.Module):
    """Causal multi-head latent attention (arXiv 2405.04434, section 2.1), without biases.

    The rotary key is one for all heads. recompute_core: the backward computes attention itself again; recompute_up: the
    latents' norms, queries, keys and values. Where values are as wide as keys a CPU has a fused kernel; elsewhere
    scores are kept there.
    """

    def __init__(
        self,
        *,
        hidden: int,
        num_heads: int,
        sizes: LatentConfig,
        recompute_core: bool = False,
        recompute_up: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads, self.sizes = num_heads, sizes
        self.recompute_core, self.recompute_up = recompute_core, recompute_up
        if sizes.q_lora_rank is not None:
            self.q_down = nn.Linear(hidden, sizes.q_lora_rank, bias=False)
            self.q_norm = RmsNorm(sizes.q_lora_rank)
        self.q_up = nn.Linear(sizes.q_lora_rank or hidden, num_heads * sizes.qk_head_dim, bias=False)
        self.kv_down = nn.Linear(hidden, sizes.kv_lora_rank + sizes.qk_rope_head_dim, bias=False)
        self.kv_norm = RmsNorm(sizes.kv_lora_rank)
        kv_head_dim = sizes.qk_nope_head_dim + sizes.v_head_dim
        self.kv_up = nn.Linear(sizes.kv_lora_rank, num_heads * kv_head_dim, bias=False)
        self.out = nn.Linear(num_heads * sizes.v_head_dim, hidden, bias=False)

    def forward(self, x_BSH: Tensor, turns_S: Tensor) -> Tensor:
        """(B, S, H) -> (B, S, H); turns_S: (S, rotary dimension / 2) complex factors of ``rotary_turns``."""
        q_latent = x_BSH if self.sizes.q_lora_rank is None else self.q_down(x_BSH)
        kv_latent, rotary_key = self.kv_down(x_BSH).split(
            [self.sizes.kv_lora_rank, self.sizes.qk_rope_head_dim], dim=-1
        )
        made = self.heads(q_latent, kv_latent, rotary_key, turns_S)
        mixed = mix(*made[:3], recompute=self.recompute_core)
        if self.recompute_up and torch.is_grad_enabled():
            discard(made, lambda: self.heads(q_latent, kv_latent, rotary_key, turns_S), before=[mixed])
        return self.out(mixed)

    def heads(self, q_latent: Tensor, kv_latent: Tensor, rotary_key: Tensor, turns_S: Tensor) -> tuple[Tensor, ...]:
        """Queries (B, S, N, D), keys (B, S, N, D) and values (B, S, N, V), and the latents normalised on the way."""
        sizes, turns_S1 = self.sizes, turns_S[:, None]
        normed = [self.kv_norm(kv_latent)]
        if sizes.q_lora_rank is not None:
            normed.append(self.q_norm(q_latent))
        q_plain, q_rotary = (
            self.q_up(normed[-1] if sizes.q_lora_rank is not None else q_latent)
            .unflatten(-1, (self.num_heads, -1))
            .split([sizes.qk_nope_head_dim, sizes.qk_rope_head_dim], dim=-1)
        )
        k_plain, v_BSNV = (
            self.kv_up(normed[0])
            .unflatten(-1, (self.num_heads, -1))
            .split([sizes.qk_nope_head_dim, sizes.v_head_dim], dim=-1)
        )
        k_rotary = rotate(rotary_key[..., None, :], turns_S1).expand(-1, -1, self.num_heads, -1)
        q_BSND = torch.cat([q_plain, rotate(q_rotary, turns_S1)], dim=-1)
        return q_BSND, torch.cat([k_plain, k_rotary], dim=-1), v_BSNV.contiguous(), *normed
