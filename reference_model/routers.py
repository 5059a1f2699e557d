"""Routers: how a token picks its experts. A router is a frozen policy, called on logits; its weight lives in the layer.

Legend: T tokens, E experts, K experts per token, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Choice(NamedTuple):
    """What a router decided. All in float32, except the expert ids (int64).

    weights_TK: how much each chosen expert counts in the token's output; experts_TK: their ids, most probable first;
    probabilities_TE: the scores over all experts, which drops by probability and balancing losses look at.
    """

    weights_TK: Tensor
    experts_TK: Tensor
    probabilities_TE: Tensor


@dataclass(frozen=True, kw_only=True)
class SoftmaxTopK:
    """Softmax over all experts, then the top_k most probable; with ``normalise`` their weights sum to one.

    Normalised it is Mixtral's router (arXiv 2401.04088, section 2.1), since a softmax over the chosen logits is the
    renormalised softmax over all; without it is that of OLMoE and DeepSeek-V2.

    >>> SoftmaxTopK(top_k=1)(torch.tensor([[0.0, 2.0]])).experts_TK.tolist()
    [[1]]
    """

    top_k: int
    normalise: bool = True
    kind: Literal["softmax"] = "softmax"

    def __call__(self, logits_TE: Tensor) -> Choice:
        assert 1 <= self.top_k <= logits_TE.shape[-1], (self.top_k, logits_TE.shape)
        probabilities_TE = logits_TE.float().softmax(dim=-1)
        weights_TK, experts_TK = probabilities_TE.topk(self.top_k, dim=-1)
        if self.normalise:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return Choice(weights_TK, experts_TK, probabilities_TE)


Router = SoftmaxTopK  # the closed union of router kinds: one class and one word here for each that follows


def router_logits(x_TH: Tensor, weight_EH: Tensor) -> Tensor:
    """Logits (T, E) in float32 whatever x's precision is, and also under autocast.

    A half-precision router flips close choices and lets large logits overflow (ST-MoE, arXiv 2202.08906, section 3.3).
    """
    with torch.autocast(device_type=x_TH.device.type, enabled=False):
        return functional.linear(x_TH.float(), weight_EH.float())
