"""Permute and combine: from tokens to rows sorted by expert, and back. Nothing here waits for the device.

A *copy* is one (token, choice) pair; a copy that is not dropped gets a *row*. Each expert's rows stand together, padded
to the alignment that the grouped product wants; the number of rows set aside depends on sizes only, not on the routing.

Legend: T tokens, K experts per token, E experts, C = T*K copies, P rows set aside, H hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from reference_model.routers import Choice

DropPolicy = Literal["probability", "position"]


def capacity_tokens(num_tokens: int, top_k: int, num_experts: int, capacity_factor: float | None) -> int:
    """The most copies that one expert takes from one source rank, Megatron's convention: ceil(T*k/E*CF), at most T.

    None: dropless. Source: Megatron-LM, ``get_capacity``. Rounding is that of (T*k/E)*CF in float64.

    >>> capacity_tokens(4096, 8, 256, 1.25)
    160
    """
    if capacity_factor is None:
        return num_tokens
    return min(num_tokens, math.ceil(num_tokens * top_k / num_experts * capacity_factor))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where each copy's row is. Arrays live on the tokens' device.

    row_TK: the row of each copy (0 for a dropped one, which has weight 0); kept_TK: whether it has one;
    token_P: the token that each row copies (any token for padding); weight's way back is ``copy_P`` (C for padding);
    ends_E: int32, the end of each expert's rows with padding; load_E: copies kept per expert.
    """

    row_TK: Tensor
    kept_TK: Tensor
    token_P: Tensor
    copy_P: Tensor
    ends_E: Tensor
    load_E: Tensor


def plan_dispatch(
    choice: Choice,
    *,
    num_experts: int,
    capacity: int | None = None,
    policy: DropPolicy = "probability",
    alignment: int = 1,
) -> Plan:
    """Give every copy its row; beyond ``capacity`` copies per expert the least probable (or last to come) are dropped.

    choice.experts_TK names the experts; rows of an expert are ordered by token (dropless, or policy position) or by
    falling weight (policy probability).
    """
    experts_TK = choice.experts_TK
    num_tokens, top_k = experts_TK.shape
    num_copies, device = num_tokens * top_k, experts_TK.device
    expert_C = experts_TK.reshape(-1)
    limit = num_tokens if capacity is None else min(capacity, num_tokens)
    assert min(num_tokens, limit) >= 1, (num_tokens, capacity)

    if limit < num_tokens and policy == "probability":
        by_weight_C = choice.weights_TK.detach().reshape(-1).argsort(descending=True, stable=True)
        order_C = by_weight_C[expert_C[by_weight_C].argsort(stable=True)]
    else:
        order_C = expert_C.argsort(stable=True)
    demand_E = torch.zeros(num_experts, dtype=torch.int64, device=device).scatter_add_(
        0, expert_C, torch.ones_like(expert_C)
    )
    first_E = demand_E.cumsum(0) - demand_E
    place_C = torch.empty_like(order_C)  # how many copies of the same expert come before this one
    place_C[order_C] = torch.arange(num_copies, device=device) - first_E[expert_C[order_C]]

    load_E = demand_E.clamp(max=limit)
    padded_E = (load_E + alignment - 1) // alignment * alignment
    ends_E = padded_E.cumsum(0)
    kept_C = place_C < limit
    row_C = (ends_E - padded_E)[expert_C] + place_C

    num_rows = _rows_set_aside(num_copies, num_experts, limit, alignment)
    # Dropped copies write to one row too many, which is cut off: no mask, so no wait for its count.
    copy_P = torch.full((num_rows + 1,), num_copies, dtype=torch.int64, device=device)
    copy_P.scatter_(0, torch.where(kept_C, row_C, num_rows), torch.arange(num_copies, device=device))
    copy_P = copy_P[:num_rows]
    return Plan(
        row_TK=torch.where(kept_C, row_C, 0).view(num_tokens, top_k),
        kept_TK=kept_C.view(num_tokens, top_k),
        token_P=torch.div(copy_P, top_k, rounding_mode="floor").clamp(max=num_tokens - 1),
        copy_P=copy_P,
        ends_E=ends_E.to(torch.int32),
        load_E=load_E,
    )


def _rows_set_aside(num_copies: int, num_experts: int, limit: int, alignment: int) -> int:
    """The most rows that any routing of this size can need."""
    nonempty = min(num_experts, num_copies)
    most = min(num_copies + nonempty * (alignment - 1), num_experts * -(-limit // alignment) * alignment)
    return -(-most // alignment) * alignment


class _Permute(torch.autograd.Function):
    """Rows gather their tokens; backward, tokens gather their rows: no atomic adds, the same sum every time."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, row_TK: Tensor, kept_TK: Tensor, token_P: Tensor) -> Tensor:
        ctx.save_for_backward(row_TK, kept_TK)
        return x_TH.index_select(0, token_P)

    @staticmethod
    def backward(ctx: Any, grad_PH: Tensor) -> tuple[Tensor, None, None, None]:
        row_TK, kept_TK = ctx.saved_tensors
        return _weighted_rows(grad_PH, row_TK, kept_TK.to(grad_PH.dtype)), None, None, None


class _Combine(torch.autograd.Function):
    """Tokens gather and weigh their rows; backward, rows gather their token's gradient."""

    @staticmethod
    def forward(ctx: Any, y_PH: Tensor, weights_TK: Tensor, row_TK: Tensor, token_P: Tensor, copy_P: Tensor) -> Tensor:
        ctx.save_for_backward(y_PH, weights_TK, row_TK, token_P, copy_P)
        return _weighted_rows(y_PH, row_TK, weights_TK)

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        y_PH, weights_TK, row_TK, token_P, copy_P = ctx.saved_tensors
        # Padding copies nobody: it looks up a weight of zero, one place behind the last copy.
        weight_P = torch.cat([weights_TK.reshape(-1), weights_TK.new_zeros(1)])[copy_P]
        grad_PH = grad_TH.index_select(0, token_P) * weight_P.to(grad_TH.dtype)[:, None]
        rows_TKH = y_PH.index_select(0, row_TK.reshape(-1)).view(*row_TK.shape, -1)
        # A product, not a sum of rounded products: it accumulates in float32 also in bf16.
        grad_weights_TK = (rows_TKH @ grad_TH.to(rows_TKH.dtype)[..., None])[..., 0].to(weights_TK.dtype)
        return grad_PH, grad_weights_TK, None, None, None


def _weighted_rows(y_PH: Tensor, row_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Sum over k of weights_TK[:, k] * y[row_TK[:, k]], in the wider of both precisions, returned in y's: (T, H)."""
    rows_TKH = y_PH.index_select(0, row_TK.reshape(-1)).view(*row_TK.shape, -1)
    return (rows_TKH * weights_TK[..., None]).sum(dim=1).to(y_PH.dtype)


def permute(x_TH: Tensor, plan: Plan) -> Tensor:
    """Tokens to rows sorted by expert: (T, H) -> (P, H). Padding rows hold some token's values, which nobody reads."""
    return _Permute.apply(x_TH, plan.row_TK, plan.kept_TK, plan.token_P)


def combine(y_PH: Tensor, weights_TK: Tensor, plan: Plan) -> Tensor:
    """Rows back to tokens, each weighted by its router weight: (P, H) -> (T, H). A dropped copy adds nothing."""
    kept_weights_TK = weights_TK * plan.kept_TK
    return _Combine.apply(y_PH, kept_weights_TK, plan.row_TK, plan.token_P, plan.copy_P)
