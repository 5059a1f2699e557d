"""The Mixture-of-Experts layer: router, permute, experts, combine; capacity with drops, or dropless; a shared expert.

Legend: T tokens, K experts per token, E experts, P rows, H hidden, W expert width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from reference_model.dispatch import DropPolicy, Plan, capacity_tokens, combine, permute, plan_dispatch
from reference_model.experts import Path, SwigluExperts, row_alignment, swiglu
from reference_model.routers import Choice, Router, router_logits


class LayerResult(NamedTuple):
    """output_TH, and what the layer decided on the way: the router's choice and the rows it planned."""

    output_TH: Tensor
    choice: Choice
    plan: Plan


class SharedExpert(nn.Module):
    """A SwiGLU block that every token passes; several shared experts are one of their summed width."""

    def __init__(self, *, hidden: int, width: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * width, bias=False, device=device, dtype=dtype)
        self.down = nn.Linear(width, hidden, bias=False, device=device, dtype=dtype)

    def forward(self, x_TH: Tensor) -> Tensor:
        """(T, H) -> (T, H)."""
        return self.down(swiglu(self.gate_up(x_TH)))


class MoeLayer(nn.Module):
    """Sparse feed-forward layer. The router's weight and arithmetic are float32 in any precision of the rest.

    capacity_factor: None is dropless; else an expert takes at most ceil(T*k/E*CF) copies (``capacity_tokens``).
    path: ``grouped`` or ``loop``; None takes the fast one where there is one.

    >>> layer = MoeLayer(hidden=8, width=16, num_experts=4, router=SoftmaxTopK(top_k=2))
    >>> layer(torch.zeros(3, 8)).output_TH.shape
    torch.Size([3, 8])
    """

    def __init__(
        self,
        *,
        hidden: int,
        width: int,
        num_experts: int,
        router: Router,
        shared_width: int = 0,
        capacity_factor: float | None = None,
        drop_policy: DropPolicy = "probability",
        path: Path | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.router, self.capacity_factor, self.drop_policy, self.path = router, capacity_factor, drop_policy, path
        self.router_weight = nn.Parameter(torch.empty(num_experts, hidden, device=device, dtype=torch.float32))
        nn.init.normal_(self.router_weight, std=hidden**-0.5)
        self.experts = SwigluExperts(num_experts=num_experts, hidden=hidden, width=width, device=device, dtype=dtype)
        self.shared = (
            SharedExpert(hidden=hidden, width=shared_width, device=device, dtype=dtype) if shared_width else None
        )

    def forward(self, x_TH: Tensor) -> LayerResult:
        """(T, H) -> (T, H) with the choice and plan beside it; tokens of a batch are flattened by the caller."""
        choice = self.router(router_logits(x_TH, self.router_weight))
        plan = self.plan(choice, x_TH)
        rows_PH = self.experts(permute(x_TH, plan), plan.ends_E, self.path)
        output_TH = combine(rows_PH, choice.weights_TK, plan)
        if self.shared is not None:
            output_TH = output_TH + self.shared(x_TH)
        return LayerResult(output_TH, choice, plan)

    def plan(self, choice: Choice, x_TH: Tensor) -> Plan:
        """Rows for this choice, with this layer's capacity, policy and alignment."""
        num_tokens, top_k = choice.experts_TK.shape
        num_experts = self.router_weight.shape[0]
        capacity = capacity_tokens(num_tokens, top_k, num_experts, self.capacity_factor)
        alignment = row_alignment(x_TH.device, self.experts.down.dtype)
        return plan_dispatch(
            choice, num_experts=num_experts, capacity=capacity, policy=self.drop_policy, alignment=alignment
        )


def layer_by_loops(layer: MoeLayer, x_TH: Tensor) -> Tensor:
    """The oracle: the layer's output (T, H), expert by expert, without sorting rows or padding.

    It shares only the router with the layer; drops are redone here by sorting each expert's copies.
    """
    choice = layer.router(router_logits(x_TH, layer.router_weight))
    num_tokens, top_k = choice.experts_TK.shape
    num_experts = layer.router_weight.shape[0]
    capacity = capacity_tokens(num_tokens, top_k, num_experts, layer.capacity_factor)
    output_TH = torch.zeros_like(x_TH) if layer.shared is None else layer.shared(x_TH)
    for expert in range(num_experts):
        token, slot = torch.nonzero(choice.experts_TK == expert, as_tuple=True)
        weight = choice.weights_TK[token, slot]
        if token.numel() > capacity:
            ranks = (
                weight.argsort(descending=True, stable=True)
                if layer.drop_policy == "probability"
                else torch.arange(token.numel())
            )
            chosen = ranks[:capacity].to(token.device)
            token, weight = token[chosen], weight[chosen]
        inner = swiglu(functional.linear(x_TH[token], layer.experts.gate_up[expert]))
        rows = functional.linear(inner, layer.experts.down[expert])
        output_TH = output_TH.index_add(0, token, (rows * weight[:, None]).to(output_TH.dtype))
    return output_TH
