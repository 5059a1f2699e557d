"""What keeps a router's load even and its logits small: two losses of long standing, one update without a loss.

Legend: T tokens, S sequences, K experts per token, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reference_model.capacity import expert_counts
from reference_model.routers import Choice

BALANCE_WEIGHT = 0.01  # Switch Transformer's alpha, arXiv 2101.03961, section 2.2
Z_WEIGHT = 0.001  # ST-MoE's c_z, arXiv 2202.08906, section 3.3
BIAS_RATE = 0.001  # the loss-free update's u, arXiv 2408.15664, section 4


def balance_loss(choice: Choice, *, num_sequences: int = 1, per_choice: bool = False) -> Tensor:
    """E * sum_e f_e P_e: f_e the share of tokens that chose expert e (dropped ones too), P_e its mean probability.

    It is k when even, and the same as transformers' ``load_balancing_loss_func`` (Mixtral, Qwen3-MoE, OLMoE; Switch
    with k = 1); ``per_choice`` divides by k (Megatron, DeepSeek). num_sequences: tokens are that many sequences of one
    length, each balanced by itself, and the mean is returned (Switch's groups, DeepSeek-V3's sequence-wise loss). Not
    yet multiplied by its weight. Gradients reach the logits by way of P only. arXiv 2101.03961, equations 4 to 6.

    >>> even = Choice(torch.ones(2, 1), torch.tensor([[0], [1]]), torch.full((2, 2), 0.5))
    >>> balance_loss(even).item()
    1.0
    """
    num_tokens, num_experts = choice.probabilities_TE.shape
    probability_SE = choice.probabilities_TE.view(num_sequences, -1, num_experts).mean(dim=1)
    experts_STK = choice.experts_TK.view(num_sequences, num_tokens // num_sequences, -1)
    chosen_SE = torch.stack([expert_counts(experts_TK, num_experts) for experts_TK in experts_STK])
    share_SE = chosen_SE / (num_tokens // num_sequences)
    loss = num_experts * (share_SE * probability_SE).sum(dim=-1).mean()
    return loss / choice.experts_TK.shape[1] if per_choice else loss


def pooled_choice(choices: list[Choice]) -> Choice:
    """Several layers' choices as one: Mixtral's loss takes shares and probabilities over all layers together."""
    return Choice(*(torch.cat(parts) for parts in zip(*choices, strict=True)))


def importance_loss(choice: Choice) -> Tensor:
    """Squared coefficient of variation of the experts' summed weights; 0 when even. arXiv 1701.06538, equation 7."""
    num_experts = choice.probabilities_TE.shape[1]
    chosen_TK = choice.experts_TK >= 0
    weight_E = choice.weights_TK.new_zeros(num_experts).scatter_add(
        0, choice.experts_TK.clamp(min=0).reshape(-1), (choice.weights_TK * chosen_TK).reshape(-1)
    )
    return weight_E.var(unbiased=False) / weight_E.mean().square()


class _TokenLoss(torch.autograd.Function):
    """Keeps one float32 copy of the logits, turned into probabilities in place, and in the backward into gradients."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, target_T: Tensor) -> Tensor:
        wide_TV = logits_TV.to(torch.float32, copy=True)
        wide_TV -= wide_TV.amax(dim=-1, keepdim=True)
        target_T1 = target_T[:, None]
        chosen_T = wide_TV.gather(1, target_T1)[:, 0]
        sum_T = wide_TV.exp_().sum(dim=-1)
        wide_TV /= sum_T[:, None]
        ctx.save_for_backward(wide_TV, target_T1)
        ctx.dtype = logits_TV.dtype
        return sum_T.log() - chosen_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None]:
        wide_TV, target_T1 = ctx.saved_tensors
        wide_TV.scatter_add_(1, target_T1, wide_TV.new_full((1, 1), -1.0).expand_as(target_T1))
        wide_TV *= grad_T[:, None]
        return wide_TV.to(ctx.dtype), None


def token_loss(logits_TV: Tensor, target_T: Tensor) -> Tensor:
    """Each token's cross-entropy in nats, float32: (T, V) logits of any precision, (T,) targets -> (T,).

    As Megatron-LM's: one float32 tensor of the logits' size stands beside them, where torch's own has three in its
    backward. It can be differentiated once.

    >>> token_loss(torch.zeros(1, 4), torch.tensor([2])).exp().item()
    4.0
    """
    return _TokenLoss.apply(logits_TV, target_T)


def router_z_loss(logits_TE: Tensor) -> Tensor:
    """Mean square of the logits' log-sum-exp, which keeps logits small. ST-MoE, arXiv 2202.08906, equation 5.

    >>> router_z_loss(torch.zeros(1, 1)).item()
    0.0
    """
    return logits_TE.float().logsumexp(dim=-1).square().mean()


@torch.no_grad()
def update_bias_(bias_E: Tensor, counts_E: Tensor, *, rate: float = BIAS_RATE) -> None:
    """Loss-free balancing, in place: the bias of an expert with less than the mean load rises by rate, else it falls.

    counts_E: tokens that chose each expert in the last step, of all ranks together, before any were dropped. Exactly
    the mean changes nothing. Wang et al., arXiv 2408.15664, algorithm 1.

    >>> bias_E = torch.zeros(2)
    >>> update_bias_(bias_E, torch.tensor([3, 1])); bias_E.sign().tolist()
    [-1.0, 1.0]
    """
    load_E = counts_E.to(bias_E.dtype)
    bias_E += rate * (load_E.mean() - load_E).sign()
