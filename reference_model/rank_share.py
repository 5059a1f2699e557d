"""Time what single ranks of an expert-parallel layer do, one after the other in one process, under given loads.

A rank routes and lays out its own tokens, runs its experts on the rows that all ranks send them, and combines its own
tokens' rows. The exchanges between are left out: the rows received lie there. Tokens are made such that the layer's own
router picks the wanted experts, so nothing of the layer is replaced.

Legend: T tokens of a rank, E experts of all ranks, L experts of a rank, Q rows received, P of own tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reference_model.dispatch import combine, permute
from reference_model.fit import repeat_noise_fraction
from reference_model.layer import MoeLayer
from reference_model.routers import SoftmaxTopK
from reference_model.shapes import LayerShapes
from reference_model.timing import Arena, Call, Effort, arena_bytes, sample_times_s

Share = tuple[Sequence[int], Sequence[int]]  # what a rank's tokens send each expert (E), what its experts receive (L)
Progress = Callable[[int, int, str], None]  # done, total, what comes next
_AGREEMENT_FRACTION = 0.05  # between the two least disturbed passes over a share, as in a calibration
FULL = Effort(num_passes=3, min_samples=5, max_samples=100, budget_s=0.05)
QUICK = Effort(num_passes=2, min_samples=3, max_samples=50, budget_s=0.02, num_extra_passes=2)
_WANTED = 8.0  # logit of the experts that a token is to take; the others' is 0


def time_shares(
    shares: Sequence[Share], shape: LayerShapes, device: torch.device, effort: Effort, progress: Progress
) -> list[list[float]]:
    """Median seconds of a forward pass of each share in every pass over them; float32 on a CPU, else bf16.

    shape: the layer's sizes; it has as many experts as a share sends to. Passes visit the shares in another order each,
    on cold data; further ones visit those whose two least disturbed passes still disagree. Raises ValueError where a
    rank sends an expert more copies than it has tokens.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    expert_bytes = 3 * shape.hidden * shape.expert_width * dtype.itemsize
    row_bytes = 2 * shape.hidden * dtype.itemsize
    largest = max(len(received) * expert_bytes + (sum(sent) + sum(received)) * row_bytes for sent, received in shares)
    arena = Arena(device, dtype, arena_bytes(device, largest))
    runs = [RankShare(share, shape, arena) for share in shares]

    def sampler(run: RankShare) -> Callable[[], list[float]]:
        return lambda: sample_times_s(run.prepare, device, effort)

    return passes_over([sampler(run) for run in runs], effort, progress)


def passes_over(
    samplers: Sequence[Callable[[], Sequence[float]]], effort: Effort, progress: Progress
) -> list[list[float]]:
    """Median of what each sampler gives in every pass over them, in the order of the samplers."""
    medians: list[list[float]] = [[] for _ in samplers]
    for number in range(effort.num_passes + effort.num_extra_passes):
        order = np.random.default_rng(number).permutation(len(samplers))
        if number >= effort.num_passes:
            order = order[[repeat_noise_fraction({"pass_medians_s": medians[i]}) > _AGREEMENT_FRACTION for i in order]]
        for done, i in enumerate(order):
            progress(done, len(order), f"pass {number + 1}: load {i}")
            medians[i].append(float(np.median(samplers[i]())))
        progress(len(order), len(order), f"pass {number + 1}: done")
    return medians


def set_threads(num_threads: int) -> None:
    """How many threads torch uses from here on: one loses least where other work holds the machine's cores."""
    torch.set_num_threads(num_threads)


class RankShare:
    """One rank's part of a layer under one load; ``prepare`` gives its next forward call on cold data."""

    def __init__(self, share: Share, shape: LayerShapes, arena: Arena) -> None:
        sent_E, received_L = share
        place: dict[str, Any] = {"device": arena.device, "dtype": arena.dtype}
        self.arena = arena
        self.chosen_TE = chosen_experts(sent_E, shape.top_k).to(arena.device)
        router = SoftmaxTopK(top_k=shape.top_k)
        # Width 1, for the experts' weights give way to views of the arena, of as many experts as this rank holds.
        self.layer = MoeLayer(hidden=shape.hidden, width=1, num_experts=len(sent_E), router=router, **place)
        self.shape, self.num_local = shape, len(received_L)
        steer(self.layer)
        align = self.layer.experts.alignment()
        padded_L = -(-torch.tensor(received_L) // align) * align
        self.ends_L = padded_L.cumsum(0).to(torch.int32).to(arena.device)
        self.num_received = int(padded_L.sum())

    def prepare(self) -> Call:
        """The next call."""
        hidden, width, experts = self.shape.hidden, self.shape.expert_width, self.layer.experts
        w_in = nn.Parameter(self.arena.take(self.num_local, 2 * width, hidden))
        w_out = nn.Parameter(self.arena.take(self.num_local, hidden, width))
        x_TH = steered_tokens(self.chosen_TE, hidden, self.arena)
        received_QH = self.arena.take(self.num_received, hidden)
        weight_Q = torch.full((self.num_received,), 1.0 / self.shape.top_k, device=self.arena.device)

        @torch.no_grad()
        def forward() -> tuple[Tensor, Tensor]:
            experts.w_in, experts.w_out = w_in, w_out
            choice, _ = self.layer.choose(x_TH)
            plan = self.layer.plan(choice)
            rows_PH = permute(x_TH, plan)
            return experts(received_QH, self.ends_L, weight_Q), combine(rows_PH, plan)

        return forward


def steer(layer: MoeLayer) -> None:
    """From now on a token's first E numbers are its logits."""
    with torch.no_grad():
        layer.router_weight.copy_(torch.eye(*layer.router_weight.shape))


def steered_tokens(chosen_TE: Tensor, hidden: int, arena: Arena) -> Tensor:
    """x_TH: tokens that take these experts of a steered layer, cold but for the numbers that its router looks at."""
    x_TH = arena.take(len(chosen_TE), hidden)
    x_TH[:, : chosen_TE.shape[1]] = _WANTED * chosen_TE
    return x_TH


def chosen_experts(sent_E: Sequence[int], top_k: int) -> Tensor:
    """chosen_TE: which experts each token takes, top_k different ones, such that expert e gets sent_E[e] copies.

    >>> chosen_experts([2, 1, 1], top_k=2).int().tolist()
    [[1, 1, 0], [1, 0, 1]]
    """
    num_tokens, rest = divmod(sum(sent_E), top_k)
    if rest or max(sent_E) > num_tokens:
        raise ValueError(f"share: {list(sent_E)} are no top-{top_k} choices of {num_tokens} tokens")
    # Experts in a row, dealt to the tokens in turn: none comes round to the same token, since it has at most T copies.
    expert_C = torch.arange(len(sent_E)).repeat_interleave(torch.tensor(sent_E))
    chosen_TE = torch.zeros(num_tokens, len(sent_E), dtype=torch.bool)
    chosen_TE[torch.arange(len(expert_C)) % num_tokens, expert_C] = True
    return chosen_TE
