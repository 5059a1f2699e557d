"""Routers: how a token picks its experts. A router is a frozen policy, called on logits; its weights live in the layer.

Legend: T tokens, E experts, K experts per token, N groups of experts, C tokens that an expert takes, H hidden.

Random routers draw from torch's default generator, as dropout does: recomputation in the backward pass replays it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

NOBODY = -1  # the expert id of a choice that was not made


class Choice(NamedTuple):
    """What a router decided. All in float32, except the expert ids (int64).

    weights_TK: how much each chosen expert counts in the token's output; experts_TK: their ids, best first, or -1 where
    a token uses fewer than K; probabilities_TE: the scores over all experts, which balancing losses look at; they sum
    to one.
    """

    weights_TK: Tensor
    experts_TK: Tensor
    probabilities_TE: Tensor


@dataclass(frozen=True, kw_only=True)
class SoftmaxTopK:
    """Softmax over all experts, then the top_k most probable; with ``normalise`` their weights sum to one.

    Normalised it is Mixtral's router (arXiv 2401.04088, section 2.1) and Qwen3's, since a softmax over the chosen
    logits is the renormalised softmax over all; without it is that of OLMoE and DeepSeek-V2. The latter limits a token
    to the top_groups groups with the most probable single expert (arXiv 2405.04434, section 2.2.2) and multiplies by
    ``scale``. bias: the layer keeps a bias per expert that counts in the choice only (loss-free balancing).

    >>> SoftmaxTopK(top_k=1)(torch.tensor([[0.0, 2.0]])).experts_TK.tolist()
    [[1]]
    """

    top_k: int
    normalise: bool = True
    num_groups: int = 1
    top_groups: int = 1
    scale: float = 1.0
    bias: bool = False
    kind: Literal["softmax"] = "softmax"

    def __call__(self, logits_TE: Tensor, bias_E: Tensor | None = None) -> Choice:
        probabilities_TE = logits_TE.float().softmax(dim=-1)
        weights_TK, experts_TK = _best_experts(probabilities_TE, bias_E, self, best_of_group=1)
        if self.normalise:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return Choice(_scaled(weights_TK, self.scale), experts_TK, probabilities_TE)


@dataclass(frozen=True, kw_only=True)
class SigmoidTopK:
    """DeepSeek-V3's router: independent sigmoid scores, a bias that counts in the choice only, the best groups.

    A token may use the top_groups of num_groups groups whose two best biased scores sum highest; the weights are the
    unbiased scores of its experts, over their sum if normalised, times ``scale``. arXiv 2412.19437, section 2.1.2.

    >>> SigmoidTopK(top_k=1)(torch.tensor([[0.0, 2.0]]), bias_E=torch.tensor([9.0, 0.0])).experts_TK.tolist()
    [[0]]
    """

    top_k: int
    normalise: bool = True
    num_groups: int = 1
    top_groups: int = 1
    scale: float = 1.0
    bias: bool = True
    kind: Literal["sigmoid"] = "sigmoid"

    def __call__(self, logits_TE: Tensor, bias_E: Tensor | None = None) -> Choice:
        scores_TE = logits_TE.float().sigmoid()
        weights_TK, experts_TK = _best_experts(scores_TE, bias_E, self, best_of_group=2)
        if self.normalise:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        probabilities_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True)
        return Choice(_scaled(weights_TK, self.scale), experts_TK, probabilities_TE)


@dataclass(frozen=True, kw_only=True)
class NoisyTopK:
    """Noise on the logits, of a width that the token learns; then a softmax over the top_k that remain.

    noise_logits_TE come from a second router weight: the noise's standard deviation is their softplus. Without them
    (evaluation) there is no noise. Shazeer et al., arXiv 1701.06538, equations 3 to 5.
    """

    top_k: int
    kind: Literal["noisy"] = "noisy"

    def __call__(self, logits_TE: Tensor, noise_logits_TE: Tensor | None = None) -> Choice:
        logits_TE = logits_TE.float()
        if noise_logits_TE is not None:
            logits_TE = logits_TE + torch.randn_like(logits_TE) * functional.softplus(noise_logits_TE.float())
        chosen_TK, experts_TK = logits_TE.topk(self.top_k, dim=-1)
        return Choice(chosen_TK.softmax(dim=-1), experts_TK, logits_TE.softmax(dim=-1))


@dataclass(frozen=True, kw_only=True)
class GshardTop2:
    """GShard's two experts: the best always, the second with a probability of twice its weight (at most one).

    The two weights sum to one, also where the second expert is left out. ``random_second=False`` (evaluation) always
    sends the second. arXiv 2006.16668, algorithm 1.
    """

    top_k: Literal[2] = 2
    kind: Literal["gshard"] = "gshard"

    def __call__(self, logits_TE: Tensor, random_second: bool = True) -> Choice:
        probabilities_TE = logits_TE.float().softmax(dim=-1)
        weights_TK, experts_TK = probabilities_TE.topk(2, dim=-1)
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        if random_second:
            second_T = weights_TK.detach()[:, 1]
            goes_T = torch.rand_like(second_T) < 2.0 * second_T
            goes_TK = torch.stack([torch.ones_like(goes_T), goes_T], dim=-1)
            weights_TK, experts_TK = weights_TK * goes_TK, experts_TK.where(goes_TK, NOBODY)
        return Choice(weights_TK, experts_TK, probabilities_TE)


@dataclass(frozen=True, kw_only=True)
class ExpertChoice:
    """Experts pick tokens: each takes the floor(T*top_k/E) tokens (at least one) most probable with it.

    top_k is the mean number of experts per token; the choice is as wide as the most chosen token needs, which waits for
    the device once. It looks at all tokens, future ones too: not for causal generation. arXiv 2202.09368, section 3.2.

    >>> ExpertChoice(top_k=1)(torch.tensor([[3.0, 0.0], [2.0, 1.0]])).experts_TK.tolist()
    [[0], [1]]
    """

    top_k: int
    kind: Literal["expert_choice"] = "expert_choice"

    def tokens_taken(self, num_tokens: int, num_experts: int) -> int:
        """How many tokens each expert takes."""
        return max(1, num_tokens * self.top_k // num_experts)

    def __call__(self, logits_TE: Tensor) -> Choice:
        probabilities_TE = logits_TE.float().softmax(dim=-1)
        tokens_CE = probabilities_TE.topk(self.tokens_taken(*logits_TE.shape), dim=0).indices
        chosen_TE = torch.zeros_like(probabilities_TE, dtype=torch.bool).scatter_(0, tokens_CE, True)
        width = max(1, int(chosen_TE.sum(dim=-1).max()))
        weights_TK, experts_TK = (probabilities_TE * chosen_TE).topk(width, dim=-1)
        return Choice(weights_TK, experts_TK.where(chosen_TE.gather(1, experts_TK), NOBODY), probabilities_TE)


# The closed union of router kinds: one class and one word here for each that follows.
Router = SoftmaxTopK | SigmoidTopK | NoisyTopK | GshardTop2 | ExpertChoice

# Switch Transformer (arXiv 2101.03961, section 2.1): one expert, weighted by its probability. Its layer has a
# capacity_factor (1.0 to 1.25 in the paper) and drops by position.
SWITCH_TOP_1 = SoftmaxTopK(top_k=1, normalise=False)


def _best_experts(
    scores_TE: Tensor, bias_E: Tensor | None, router: SoftmaxTopK | SigmoidTopK, *, best_of_group: int
) -> tuple[Tensor, Tensor]:
    """(weights_TK, experts_TK): the top_k best by biased score within the best groups, heaviest first."""
    assert 1 <= router.top_k <= scores_TE.shape[-1] // router.num_groups * router.top_groups, (router, scores_TE.shape)
    rank_TE = scores_TE.detach() if bias_E is None else scores_TE.detach() + bias_E
    if router.top_groups < router.num_groups:
        rank_TNS = rank_TE.unflatten(-1, (router.num_groups, -1))
        group_TN = rank_TNS.topk(min(best_of_group, rank_TNS.shape[-1]), dim=-1).values.sum(dim=-1)
        allowed_TN = torch.zeros_like(group_TN, dtype=torch.bool)
        allowed_TN.scatter_(1, group_TN.topk(router.top_groups, dim=-1).indices, True)
        rank_TE = rank_TNS.masked_fill(~allowed_TN[..., None], -torch.inf).flatten(1)
    experts_TK = rank_TE.topk(router.top_k, dim=-1).indices
    if bias_E is not None:  # the best by biased score need not be the heaviest
        order_TK = scores_TE.detach().gather(1, experts_TK).argsort(dim=-1, descending=True, stable=True)
        experts_TK = experts_TK.gather(1, order_TK)
    return scores_TE.gather(1, experts_TK), experts_TK


def _scaled(weights_TK: Tensor, scale: float) -> Tensor:
    return weights_TK if scale == 1.0 else weights_TK * scale


class _RouterProduct(torch.autograd.Function):
    """x @ weight.T in float32, keeping x for the backward in its own precision: half the memory where that is bf16."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, weight_EH: Tensor) -> Tensor:
        ctx.save_for_backward(x_TH, weight_EH)
        return functional.linear(x_TH.float(), weight_EH.float())

    @staticmethod
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor, Tensor]:
        x_TH, weight_EH = ctx.saved_tensors
        grad_x_TH = (grad_TE @ weight_EH.float()).to(x_TH.dtype)
        return grad_x_TH, (grad_TE.T @ x_TH.float()).to(weight_EH.dtype)


def router_logits(x_TH: Tensor, weight_EH: Tensor) -> Tensor:
    """Logits (T, E) in float32 whatever x's precision is, and also under autocast.

    A half-precision router flips close choices and lets large logits overflow (ST-MoE, arXiv 2202.08906, section 3.3).
    """
    with torch.autocast(device_type=x_TH.device.type, enabled=False):
        return _RouterProduct.apply(x_TH, weight_EH)
