"""Capacity: how many copies an expert takes, and which are left out when more tokens want it.

Legend: T tokens, K experts per token, E experts, C = T*K copies.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from reference_model.routers import Choice

# probability: an expert keeps its heaviest copies; position: its first ones, token after token (Megatron-LM has both);
# slot: all tokens' first choices before any second one, each by position (GShard, Tutel).
DropPolicy = Literal["probability", "position", "slot"]


def capacity_tokens(num_tokens: int, top_k: int, num_experts: int, capacity_factor: float | None) -> int:
    """The most copies that one expert takes from one source rank, Megatron's convention: ceil(T*k/E*CF), at most T.

    None: dropless. Source: Megatron-LM, ``get_capacity``. Rounding is that of (T*k/E)*CF in float64.

    >>> capacity_tokens(4096, 8, 256, 1.25)
    160
    """
    if capacity_factor is None:
        return num_tokens
    return min(num_tokens, math.ceil(num_tokens * top_k / num_experts * capacity_factor))


def expert_counts(experts_TK: Tensor, num_experts: int) -> Tensor:
    """How many copies each expert is wanted for (E, int64); -1 counts for nobody. Never waits for the device.

    >>> expert_counts(torch.tensor([[0, 2], [2, -1]]), 3).tolist()
    [1, 0, 2]
    """
    bin_C = experts_TK.reshape(-1) + 1  # those of nobody first, to be cut off
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=experts_TK.device)
    return counts.scatter_add_(0, bin_C, torch.ones_like(bin_C))[1:]


def place_in_expert(choice: Choice, num_experts: int, policy: DropPolicy | None = None) -> Tensor:
    """place_TK: how many copies of the same expert come before this one (int64); of those of nobody, any number.

    policy None is ``position``, the order of tokens. Never waits for the device.
    """
    expert_TK, (num_tokens, top_k) = choice.experts_TK, choice.experts_TK.shape
    expert_C = expert_TK.reshape(-1)
    device = expert_C.device
    if policy == "probability":
        first_C = choice.weights_TK.detach().reshape(-1).argsort(descending=True, stable=True)
        order_C = first_C[expert_C[first_C].argsort(stable=True)]
    elif policy == "slot":
        first_C = torch.arange(num_tokens * top_k, device=device).view(num_tokens, top_k).T.reshape(-1)
        order_C = first_C[expert_C[first_C].argsort(stable=True)]
    else:
        order_C = expert_C.argsort(stable=True)
    counts_E = expert_counts(expert_TK, num_experts)
    # Copies of nobody (-1) sort first: they stand before the first expert's.
    num_unwanted = expert_C.numel() - counts_E.sum()
    start_E = counts_E.cumsum(0) - counts_E + num_unwanted
    place_C = torch.empty_like(order_C)
    place_C[order_C] = torch.arange(order_C.numel(), device=device) - start_E[expert_C[order_C].clamp(min=0)]
    return place_C.view(num_tokens, top_k)
