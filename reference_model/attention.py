"""Grouped-query attention with rotary positions.

Legend: B sequences, S tokens of a sequence, H hidden, N query heads, G key-value heads, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


class Attention(nn.Module):
    """Causal grouped-query attention (arXiv 2305.13245) with rotary positions, without biases.

    recompute: the backward computes scores, softmax and values again from queries, keys and values.
    """

    def __init__(
        self, *, hidden: int, num_heads: int, num_kv_heads: int, head_dim: int, recompute: bool = False
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim, self.recompute = num_heads, num_kv_heads, head_dim, recompute
        self.qkv = nn.Linear(hidden, (num_heads + 2 * num_kv_heads) * head_dim, bias=False)
        self.out = nn.Linear(num_heads * head_dim, hidden, bias=False)

    def forward(self, x_BSH: Tensor, turns_S: Tensor) -> Tensor:
        """(B, S, H) -> (B, S, H); turns_S: (S, D/2) complex factors of ``rotary_turns``."""
        heads = self.qkv(x_BSH).unflatten(-1, (-1, self.head_dim))
        q_BSND, k_BSGD, v_BSGD = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=2)
        turns_S1 = turns_S[:, None]
        # Values as a tensor of their own: as a view they would keep the whole projection. Heads stay behind positions
        # in memory, so that the output, laid out as the queries are, is the next product's input without a copy.
        inputs = (rotate(q_BSND, turns_S1), rotate(k_BSGD, turns_S1), v_BSGD.contiguous())
        return self.out(mix(*inputs, recompute=self.recompute))


def mix(q_BSND: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, *, recompute: bool = False) -> Tensor:
    """Causal attention alone: (B, S, N*D), D of the values. recompute: its backward starts with it anew."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(_mix, q_BSND, k_BSGD, v_BSGD, use_reentrant=False)
    return _mix(q_BSND, k_BSGD, v_BSGD)


def _mix(q_BSND: Tensor, k_BSGD: Tensor, v_BSGD: Tensor) -> Tensor:
    q_BNSD, k_BGSD, v_BGSD = q_BSND.transpose(1, 2), k_BSGD.transpose(1, 2), v_BSGD.transpose(1, 2)
    mixed_BNSD = functional.scaled_dot_product_attention(q_BNSD, k_BGSD, v_BGSD, is_causal=True, enable_gqa=True)
    return mixed_BNSD.transpose(1, 2).flatten(2)


def rotary_turns(seq_len: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """(S, D/2) unit complex numbers: position p turns pair i by p / theta**(2i/D). arXiv 2104.09864 section 3.2."""
    pair = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    angles = torch.outer(torch.arange(seq_len, device=device, dtype=torch.float32), theta ** (-pair / head_dim))
    return torch.polar(torch.ones_like(angles), angles)


class _Rotate(torch.autograd.Function):
    """Keeps nothing of its input: the backward turns the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, turns_S: Tensor) -> Tensor:
        ctx.save_for_backward(turns_S)
        return _turn(x, turns_S)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (turns_S,) = ctx.saved_tensors
        return _turn(grad, turns_S.conj()), None


def _turn(x: Tensor, turns_S: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.complex(first, second) * turns_S
    return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)


def rotate(x: Tensor, turns_S: Tensor) -> Tensor:
    """Turn each pair (i, i + D/2) of the last dimension by its position's angle: (..., S, D) -> (..., S, D).

    turns_S: what broadcasts with the pairs, such as (S, 1, D/2) where heads stand between.
    """
    return _Rotate.apply(x, turns_S)
