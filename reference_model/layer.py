"""The Mixture-of-Experts layer: router, permute, experts, combine; capacity with drops, or dropless; a shared expert.

Legend: T tokens, K experts per token, E experts, P rows, H hidden, W expert width.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from reference_model.capacity import DropPolicy, capacity_tokens
from reference_model.dispatch import Plan, combine, permute, permute_weights, plan_dispatch
from reference_model.experts import Activation, Experts, Path, activate, compute_dtype, inner_width
from reference_model.routers import Choice, ExpertChoice, GshardTop2, NoisyTopK, Router, router_logits

Module = Literal["moe_act", "shared_experts"]  # of Megatron-LM's names, those inside this layer
Recompute = Literal["none", "full"] | tuple[Module, ...]


class LayerResult(NamedTuple):
    """output_TH, and what the layer decided on the way: logits (float32), the router's choice, the rows it planned."""

    output_TH: Tensor
    choice: Choice
    plan: Plan
    logits_TE: Tensor


class FeedForward(nn.Module):
    """A dense block that every token passes: a shared expert. Several are one of their summed width."""

    def __init__(
        self, *, hidden: int, width: int, activation: Activation = "swiglu", device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.activation = activation
        self.w_in = nn.Linear(hidden, inner_width(width, activation), bias=False, device=device, dtype=dtype)
        self.w_out = nn.Linear(width, hidden, bias=False, device=device, dtype=dtype)

    def forward(self, x_TH: Tensor) -> Tensor:
        """(T, H) -> (T, H)."""
        return self.w_out(activate(self.w_in(x_TH), self.activation))


class MoeLayer(nn.Module):
    """Sparse feed-forward layer. The router's weights and arithmetic are float32 in any precision of the rest.

    router_in_float32: False does the router's product in the precision of the rest instead (its weights stay float32).
    capacity_factor: None is dropless; else an expert takes at most ceil(T*k/E*CF) copies (``capacity_tokens``).
    recompute: what the backward computes again: nothing, the whole layer, or of it the experts' activation, the shared
    expert.
    router_bias: of routers with ``bias``, float32, a buffer that ``losses.update_bias_`` moves; else None.
    noise_weight: of the noisy router; else None.

    >>> from reference_model.routers import SoftmaxTopK
    >>> layer = MoeLayer(hidden=8, width=16, num_experts=4, router=SoftmaxTopK(top_k=2))
    >>> layer(torch.zeros(3, 8)).output_TH.shape
    torch.Size([3, 8])
    """

    router_bias: Tensor | None

    def __init__(
        self,
        *,
        hidden: int,
        width: int,
        num_experts: int,
        router: Router,
        activation: Activation = "swiglu",
        shared_width: int = 0,
        capacity_factor: float | None = None,
        drop_policy: DropPolicy = "probability",
        router_in_float32: bool = True,
        recompute: Recompute = "none",
        path: Path | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.router_in_float32 = router_in_float32
        self.router, self.capacity_factor, self.drop_policy = router, capacity_factor, drop_policy
        self.recompute, self.num_experts = recompute, num_experts
        assert capacity_factor is None or not isinstance(router, ExpertChoice), "expert choice sets its own capacity"
        place = {"device": device, "dtype": dtype}
        self.router_weight = nn.Parameter(torch.empty(num_experts, hidden, device=device, dtype=torch.float32))
        nn.init.normal_(self.router_weight, std=hidden**-0.5)
        # From zero, as its paper has it: every expert's noise starts out equally wide.
        noisy = isinstance(router, NoisyTopK)
        self.noise_weight = nn.Parameter(torch.zeros_like(self.router_weight)) if noisy else None
        biased = getattr(router, "bias", False)
        self.register_buffer(
            "router_bias", torch.zeros(num_experts, device=device, dtype=torch.float32) if biased else None
        )
        self.experts = Experts(
            num_experts=num_experts, hidden=hidden, width=width, activation=activation, path=path, **place
        )
        self.shared = (
            FeedForward(hidden=hidden, width=shared_width, activation=activation, **place) if shared_width else None
        )

    def forward(self, x_TH: Tensor) -> LayerResult:
        """(T, H) -> (T, H) with choice, plan and logits beside it; tokens of a batch are flattened by the caller."""
        if self.recompute == "full" and torch.is_grad_enabled():
            return checkpoint(self._forward, x_TH, use_reentrant=False)
        return self._forward(x_TH)

    def _forward(self, x_TH: Tensor) -> LayerResult:
        choice, logits_TE = self.choose(x_TH)
        plan = self.plan(choice)
        rows_PH = permute(x_TH.to(compute_dtype(x_TH)), plan)
        weight_P = permute_weights(choice.weights_TK, plan)
        rows_PH = self.experts(rows_PH, plan.ends_E, weight_P, recompute_activation="moe_act" in self.recompute)
        output_TH = self.with_shared(combine(rows_PH, plan), x_TH)
        return LayerResult(output_TH, choice, plan, logits_TE)

    def with_shared(self, output_TH: Tensor, x_TH: Tensor) -> Tensor:
        """The routed experts' output plus the shared expert's, where there is one."""
        if self.shared is None:
            return output_TH
        if "shared_experts" in self.recompute and torch.is_grad_enabled():
            return output_TH + checkpoint(self.shared, x_TH, use_reentrant=False)
        return output_TH + self.shared(x_TH)

    def choose(self, x_TH: Tensor) -> tuple[Choice, Tensor]:
        """(the router's choice, its logits); random routers are random in training only."""
        logits_TE = self.logits(x_TH)
        if isinstance(self.router, NoisyTopK):
            assert self.noise_weight is not None
            noise_TE = router_logits(x_TH, self.noise_weight) if self.training else None
            return self.router(logits_TE, noise_TE), logits_TE
        if isinstance(self.router, GshardTop2):
            return self.router(logits_TE, random_second=self.training), logits_TE
        if isinstance(self.router, ExpertChoice):
            return self.router(logits_TE), logits_TE
        return self.router(logits_TE, self.router_bias), logits_TE

    def logits(self, x_TH: Tensor) -> Tensor:
        """The router's logits (T, E), a float32 tensor also where they were rounded to the precision of the rest."""
        if self.router_in_float32:
            return router_logits(x_TH, self.router_weight)
        working = compute_dtype(x_TH)
        return functional.linear(x_TH.to(working), self.router_weight.to(working)).float()

    def capacity(self, num_tokens: int) -> int:
        """The most copies that an expert takes of this many tokens."""
        if isinstance(self.router, ExpertChoice):
            return self.router.tokens_taken(num_tokens, self.num_experts)
        return capacity_tokens(num_tokens, self.router.top_k, self.num_experts, self.capacity_factor)

    def plan(self, choice: Choice) -> Plan:
        """Rows for this choice, with this layer's capacity, policy and alignment."""
        return plan_dispatch(
            choice,
            num_experts=self.num_experts,
            capacity=self.capacity(choice.experts_TK.shape[0]),
            policy=self.drop_policy,
            alignment=self.experts.alignment(),
        )


def layer_by_loops(layer: MoeLayer, x_TH: Tensor) -> Tensor:
    """The oracle: the layer's output (T, H), expert by expert, without sorting rows or padding.

    It shares only the router with the layer; drops are redone here by sorting each expert's copies.
    """
    choice, _ = layer.choose(x_TH)
    capacity = layer.capacity(x_TH.shape[0])
    output_TH = torch.zeros_like(x_TH) if layer.shared is None else layer.shared(x_TH)
    for expert, (w_in_IH, w_out_HW) in enumerate(zip(layer.experts.w_in, layer.experts.w_out, strict=True)):
        token, slot = torch.nonzero(choice.experts_TK == expert, as_tuple=True)
        weight = choice.weights_TK[token, slot]
        if token.numel() > capacity:
            rank = {"probability": -weight, "position": token, "slot": slot * x_TH.shape[0] + token}[layer.drop_policy]
            chosen = rank.argsort(stable=True)[:capacity]
            token, weight = token[chosen], weight[chosen]
        inner = functional.linear(x_TH[token], w_in_IH)
        if layer.experts.activation == "swiglu":
            gate, up = inner.chunk(2, dim=-1)
            inner = functional.silu(gate) * up
        else:
            inner = inner.relu() if layer.experts.activation == "relu" else functional.gelu(inner)
        rows = functional.linear(inner, w_out_HW) * weight[:, None]
        output_TH = output_TH.index_add(0, token, rows.to(output_TH.dtype))
    return output_TH
