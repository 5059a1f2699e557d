"""RMS norm that keeps its input alone for the backward, as fused kernels do: what lies between is computed again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _Normalise(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32, rounded once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight_H)
        ctx.eps = eps
        return (_unit(x, eps)[0] * weight_H).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_H = ctx.saved_tensors
        unit, inverse = _unit(x, ctx.eps)
        wide = grad.float()
        grad_weight_H = (wide * unit).flatten(0, -2).sum(0).to(weight_H.dtype)
        scaled = wide * weight_H
        grad_x = inverse * (scaled - unit * (scaled * unit).mean(-1, keepdim=True))
        return grad_x.to(x.dtype), grad_weight_H, None


def _unit(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide * inverse, inverse


class RmsNorm(nn.Module):
    """arXiv 1910.07467, with a weight per dimension: (..., H) -> (..., H)."""

    def __init__(self, hidden: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(hidden)), eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) -> (..., H) in x's precision."""
        return _Normalise.apply(x, self.weight, self.eps)
