"""Permute and combine: from tokens to rows sorted by expert, and back. Nothing here waits for the device.

A *copy* is one (token, choice) pair; a copy that is not dropped gets a *row*. Each expert's rows stand together, padded
to the alignment that the grouped product wants; the number of rows set aside depends on sizes only, not on the routing.
Router weights travel with the rows and are applied inside the experts, so that combining is a plain sum: permute and
combine are each other's backward.

Legend: T tokens, K experts per token, E experts, C = T*K copies, P rows set aside, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from reference_model.capacity import DropPolicy, expert_counts, place_in_expert
from reference_model.routers import Choice


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where each copy's row is. Arrays live on the tokens' device.

    row_TK: the row of each copy (0 for one without a row); kept_TK: whether it has one; copy_P: the copy that each row
    holds (C for padding); token_P: that copy's token (any for padding); ends_E: int32, the end of each expert's rows
    with padding; load_E: copies kept per expert.
    """

    row_TK: Tensor
    kept_TK: Tensor
    copy_P: Tensor
    token_P: Tensor
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
    """Give every copy its row; beyond ``capacity`` copies per expert those that ``policy`` ranks last are dropped.

    Rows of an expert are ordered by token (dropless, or policy position) or by the policy's rank.
    """
    experts_TK = choice.experts_TK
    num_tokens, top_k = experts_TK.shape
    num_copies, device = num_tokens * top_k, experts_TK.device
    limit = num_tokens if capacity is None else min(capacity, num_tokens)
    assert limit >= min(1, num_tokens), (num_tokens, capacity)

    place_TK = place_in_expert(choice, num_experts, policy if limit < num_tokens else None)
    kept_TK = (place_TK < limit) & (experts_TK >= 0)
    load_E = expert_counts(experts_TK, num_experts).clamp(max=limit)
    padded_E = (load_E + alignment - 1) // alignment * alignment
    ends_E = padded_E.cumsum(0)
    row_TK = (ends_E - padded_E)[experts_TK.clamp(min=0)] + place_TK

    num_rows = _rows_set_aside(num_copies, num_experts, limit, alignment)
    # Dropped copies write to one row too many, which is cut off: no mask, so no wait for its count.
    copy_P = torch.full((num_rows + 1,), num_copies, dtype=torch.int64, device=device)
    copy_P.scatter_(0, row_TK.where(kept_TK, num_rows).reshape(-1), torch.arange(num_copies, device=device))
    copy_P = copy_P[:num_rows]
    return Plan(
        row_TK=row_TK.where(kept_TK, 0),
        kept_TK=kept_TK,
        copy_P=copy_P,
        token_P=torch.div(copy_P, top_k, rounding_mode="floor").clamp(max=num_tokens - 1),
        ends_E=ends_E.to(torch.int32),
        load_E=load_E,
    )


def _rows_set_aside(num_copies: int, num_experts: int, limit: int, alignment: int) -> int:
    """The most rows that any routing of this size can need."""
    nonempty = min(num_experts, num_copies)
    most = min(num_copies + nonempty * (alignment - 1), num_experts * -(-limit // alignment) * alignment)
    return -(-most // alignment) * alignment


def _sum_of_rows(y_PH: Tensor, row_TK: Tensor, kept_TK: Tensor) -> Tensor:
    """Each token's rows summed, gathered and added in one kernel, in the order of its choices: (T, H)."""
    return functional.embedding_bag(row_TK, y_PH, mode="sum", per_sample_weights=kept_TK.to(y_PH.dtype))


class _Permute(torch.autograd.Function):
    """Rows gather their tokens; backward, tokens gather their rows: no atomic adds, the same sum every time."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, row_TK: Tensor, kept_TK: Tensor, token_P: Tensor) -> Tensor:
        ctx.save_for_backward(row_TK, kept_TK)
        return x_TH.index_select(0, token_P)

    @staticmethod
    def backward(ctx: Any, grad_PH: Tensor) -> tuple[Tensor, None, None, None]:
        return _sum_of_rows(grad_PH, *ctx.saved_tensors), None, None, None


class _Combine(torch.autograd.Function):
    """Tokens gather their rows; backward, rows gather their token's gradient."""

    @staticmethod
    def forward(ctx: Any, y_PH: Tensor, row_TK: Tensor, kept_TK: Tensor, token_P: Tensor) -> Tensor:
        ctx.save_for_backward(token_P)
        ctx.num_rows = y_PH.shape[0]
        return _sum_of_rows(y_PH, row_TK, kept_TK)

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, None, None, None]:
        (token_P,) = ctx.saved_tensors
        return grad_TH.index_select(0, token_P[: ctx.num_rows]), None, None, None


class _PermuteWeights(torch.autograd.Function):
    """Rows gather their copy's weight, padding a zero; backward, copies gather their row's gradient."""

    @staticmethod
    def forward(ctx: Any, weights_TK: Tensor, row_TK: Tensor, kept_TK: Tensor, copy_P: Tensor) -> Tensor:
        ctx.save_for_backward(row_TK, kept_TK)
        return torch.cat([weights_TK.reshape(-1), weights_TK.new_zeros(1)]).index_select(0, copy_P)

    @staticmethod
    def backward(ctx: Any, grad_P: Tensor) -> tuple[Tensor, None, None, None]:
        row_TK, kept_TK = ctx.saved_tensors
        return grad_P[row_TK].where(kept_TK, 0.0), None, None, None


def permute(x_TH: Tensor, plan: Plan) -> Tensor:
    """Tokens to rows sorted by expert: (T, H) -> (P, H). Padding rows hold some token's values, of weight zero."""
    return _Permute.apply(x_TH, plan.row_TK, plan.kept_TK, plan.token_P)


def permute_weights(weights_TK: Tensor, plan: Plan) -> Tensor:
    """Each row's router weight (P); zero for padding, which so reaches no output and no gradient."""
    return _PermuteWeights.apply(weights_TK, plan.row_TK, plan.kept_TK, plan.copy_P)


def combine(y_PH: Tensor, plan: Plan) -> Tensor:
    """Rows back to tokens, summed: (P, H) -> (T, H). Dropped copies add nothing; rows of nobody may be missing."""
    return _Combine.apply(y_PH, plan.row_TK, plan.kept_TK, plan.token_P)
