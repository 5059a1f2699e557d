"""Expert parallelism for real: every rank has its own tokens and some of the experts; copies travel by all-to-all.

Ranks are those of one ``torch.distributed`` group (gloo on CPUs, NCCL on GPUs). Splits are uneven: a pair of ranks
exchanges as many rows as the routing says, so that the host waits once per layer, for their number.

Legend: T tokens of this rank, K experts per token, E experts, R ranks, S slots of all ranks, L slots of this rank,
N replicas, P rows to send, Q rows received, H hidden.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import checkpoint

from reference_model.capacity import place_in_expert
from reference_model.dispatch import combine, permute, permute_weights, plan_dispatch
from reference_model.experts import Experts, compute_dtype
from reference_model.layer import LayerResult, MoeLayer
from reference_model.routers import NOBODY, Choice

# What a forward pass does, in this order; ``*_wait`` is waiting for the slowest rank, ``*_wire`` what follows.
PHASES = (
    *("router", "permute", "dispatch_wait", "counts", "dispatch_wire", "sort", "experts"),
    *("unsort", "combine_wait", "combine_wire", "unpermute", "shared"),
)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Which expert each slot holds; rank r has the slots r*L to (r+1)*L - 1. An expert in several slots has replicas.

    physical_to_logical: one layer's list of ``moesim place``. Raises ValueError where an expert has no slot, or the
    slots do not divide among the ranks.

    >>> Placement(physical_to_logical=(0, 1, 2, 0), num_ranks=2).slots_of_rank(1)
    (2, 3)
    """

    physical_to_logical: tuple[int, ...]
    num_ranks: int

    def __post_init__(self) -> None:
        num_slots, held = len(self.physical_to_logical), set(self.physical_to_logical)
        if num_slots % self.num_ranks:
            raise ValueError(f"placement: {num_slots} slots do not divide among {self.num_ranks} ranks")
        if held != set(range(len(held))):
            raise ValueError(f"placement: every expert from 0 to {max(held)} needs a slot; there are {sorted(held)}")

    @staticmethod
    def of(physical_to_logical: ArrayLike, *, num_ranks: int) -> Placement:
        """From any one-dimensional array of expert ids."""
        slots = np.asarray(physical_to_logical)
        if slots.ndim != 1 or not np.issubdtype(slots.dtype, np.integer):
            raise ValueError(f"placement: one layer's slots are a list of expert ids; got {slots.dtype} {slots.shape}")
        return Placement(physical_to_logical=tuple(int(expert) for expert in slots), num_ranks=num_ranks)

    @property
    def num_experts(self) -> int:
        return max(self.physical_to_logical) + 1

    def slots_of_rank(self, rank: int) -> tuple[int, ...]:
        """The slots that a rank holds."""
        count = len(self.physical_to_logical) // self.num_ranks
        return tuple(range(rank * count, (rank + 1) * count))

    def replicas(self) -> tuple[Tensor, Tensor]:
        """(slot_EN, count_E): each expert's slots, rising, the first one again where it has fewer than N."""
        slots = [[s for s, held in enumerate(self.physical_to_logical) if held == e] for e in range(self.num_experts)]
        most = max(map(len, slots))
        table = [mine + [mine[0]] * (most - len(mine)) for mine in slots]
        return torch.tensor(table), torch.tensor([len(mine) for mine in slots])


class _AllToAll(torch.autograd.Function):
    """Rows of several tensors to other ranks in one node, so that every rank's backward meets in the same order."""

    @staticmethod
    def forward(ctx: Any, group: Any, send_R: list[int], receive_R: list[int], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.send_R, ctx.receive_R = group, send_R, receive_R
        return tuple(exchange(tensor, send_R, receive_R, group) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        back = (exchange(grad.contiguous(), ctx.receive_R, ctx.send_R, ctx.group) for grad in grads)
        return (None, None, None, *back)


def exchange(tensor: Tensor, send_R: list[int], receive_R: list[int], group: Any) -> Tensor:
    """The rows received, by source rank: send_R[i] rows of the tensor go to rank i, receive_R[i] come from it."""
    received = tensor.new_empty(sum(receive_R), *tensor.shape[1:])
    # As bytes: not every backend knows every precision, and none has to.
    to, out = (part.reshape(len(part), math.prod(part.shape[1:])).view(torch.uint8) for part in (received, tensor))
    distributed.all_to_all_single(to, out, receive_R, send_R, group=group)
    return received


@dataclass(kw_only=True)
class PhaseClock:
    """Seconds of each phase on this rank; without a device it times nothing and holds nobody up.

    While it runs, each phase ends when the device is done, and ranks wait for each other before each exchange, so that
    waiting and moving bytes are told apart.
    """

    device: torch.device | None = None
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    _last_s: float = 0.0

    def start(self) -> None:
        """The first phase begins."""
        self._last_s = self._now_s()

    def lap(self, phase: str) -> None:
        """This phase ends here, and the next begins."""
        now_s = self._now_s()
        self.seconds[phase] += now_s - self._last_s
        self._last_s = now_s

    def wait(self, phase: str, group: Any) -> None:
        """This phase is waiting for the slowest rank."""
        if self.device is not None:
            distributed.barrier(group=group)
            self.lap(phase)

    def _now_s(self) -> float:
        if self.device is None:
            return 0.0
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class ExpertParallelMoe(nn.Module):
    """A ``MoeLayer`` whose experts are spread over ranks: the same mathematics on each rank's own tokens.

    layer: built alike on every rank (same weights); its experts give way to the copies in this rank's slots. Capacity
    counts per source rank, as in Megatron-LM. Without replicas a float32 forward gives the very bits of the layer on
    all ranks' tokens one after the other, where the BLAS gives a row the same bits in products of any number of rows.
    After the backward of all ranks, ``reduce_gradients`` adds up what ranks share.
    """

    slot_EN: Tensor
    count_E: Tensor

    def __init__(self, layer: MoeLayer, placement: Placement, group: Any = None) -> None:
        super().__init__()
        assert placement.num_experts == layer.num_experts, (placement.num_experts, layer.num_experts)
        assert placement.num_ranks == distributed.get_world_size(group), "one rank of the group per rank placed"
        self.placement, self.group, self.rank = placement, group, distributed.get_rank(group)
        held = [placement.physical_to_logical[slot] for slot in placement.slots_of_rank(self.rank)]
        self.layer, self.layer.experts = layer, _copies(layer.experts, held)
        slot_EN, count_E = placement.replicas()
        device = layer.router_weight.device
        self.register_buffer("slot_EN", slot_EN.to(device), persistent=False)
        self.register_buffer("count_E", count_E.to(device), persistent=False)

    def forward(self, x_TH: Tensor, clock: PhaseClock | None = None) -> LayerResult:
        """This rank's tokens in, their output out: (T, H) -> (T, H). The plan says which slot's row each copy has."""
        clock = clock or PhaseClock()
        clock.start()
        if self.layer.recompute == "full" and torch.is_grad_enabled():
            return checkpoint(self._forward, x_TH, clock, use_reentrant=False)
        return self._forward(x_TH, clock)

    def _forward(self, x_TH: Tensor, clock: PhaseClock) -> LayerResult:
        choice, logits_TE = self.layer.choose(x_TH)
        clock.lap("router")
        plan = plan_dispatch(
            choice._replace(experts_TK=self.slots(choice)), num_experts=len(self.placement.physical_to_logical)
        )
        rows_PH = permute(x_TH.to(compute_dtype(x_TH)), plan)
        weight_P = permute_weights(choice.weights_TK, plan)
        clock.lap("permute")
        clock.wait("dispatch_wait", self.group)
        sent_RL, received_RL = self._counts(plan.load_E)
        send_R, receive_R = sent_RL.sum(1).tolist(), received_RL.sum(1).tolist()
        clock.lap("counts")
        kept = slice(sum(send_R))  # behind the last kept copy's row there are only rows that drops left empty
        rows_QH, weight_Q = _AllToAll.apply(self.group, send_R, receive_R, rows_PH[kept], weight_P[kept])
        clock.lap("dispatch_wire")
        rows_QH = self._experts(rows_QH, weight_Q, received_RL, clock)
        clock.wait("combine_wait", self.group)
        (rows_PH,) = _AllToAll.apply(self.group, receive_R, send_R, rows_QH)
        clock.lap("combine_wire")
        output_TH = combine(rows_PH, plan)
        clock.lap("unpermute")
        output_TH = self.layer.with_shared(output_TH, x_TH)
        clock.lap("shared")
        return LayerResult(output_TH, choice, plan, logits_TE)

    def slots(self, choice: Choice) -> Tensor:
        """slot_TK: the slot that each kept copy goes to, -1 for others; replicas take an expert's copies in turn.

        Ranks begin their turn at different replicas, so that few copies each do not all meet at the first one.
        """
        capacity = self.layer.capacity(choice.experts_TK.shape[0])
        drops = capacity < choice.experts_TK.shape[0]
        place_TK = place_in_expert(choice, self.layer.num_experts, self.layer.drop_policy if drops else None)
        expert_TK = choice.experts_TK.clamp(min=0)
        slot_TK = self.slot_EN[expert_TK, (place_TK + self.rank) % self.count_E[expert_TK]]
        return slot_TK.where((place_TK < capacity) & (choice.experts_TK >= 0), NOBODY)

    def reduce_gradients(self) -> None:
        """Add up over all ranks the gradients of what they share: router, shared expert, and experts with replicas.

        The loss is the sum of the ranks' losses; scale it for a mean.
        """
        grads = [_gradient(parameter) for parameter in self.layer.experts.parameters()]
        for name, parameter in self.layer.named_parameters():
            if not name.startswith("experts."):
                distributed.all_reduce(_gradient(parameter), group=self.group)
        (replicated,) = torch.nonzero(self.count_E > 1, as_tuple=True)
        if not len(replicated):
            return
        held_L = [self.placement.physical_to_logical[slot] for slot in self.placement.slots_of_rank(self.rank)]
        number_of = {expert: number for number, expert in enumerate(replicated.tolist())}
        local = torch.tensor([i for i, e in enumerate(held_L) if e in number_of], dtype=torch.int64)
        number = torch.tensor([number_of[e] for e in held_L if e in number_of], dtype=torch.int64)
        local, number = local.to(replicated.device), number.to(replicated.device)
        for grad in grads:
            total = grad.new_zeros(len(replicated), *grad.shape[1:]).index_add_(0, number, grad[local])
            distributed.all_reduce(total, group=self.group)
            grad[local] = total[number]

    def _experts(self, rows_QH: Tensor, weight_Q: Tensor, received_RL: Tensor, clock: PhaseClock) -> Tensor:
        """Rows as received, by source rank and then slot, through this rank's experts and back into that order."""
        num_rows, num_slots = rows_QH.shape[0], received_RL.shape[1]
        if num_rows == 0:
            return rows_QH * weight_Q[:, None]  # nothing came; the graph must still lead back to the exchange
        slot_Q = torch.arange(num_slots).repeat(received_RL.shape[0]).repeat_interleave(received_RL.reshape(-1))
        # A received row is a token with one choice. Sorting is stable: an expert's rows stand by rank, then by token.
        arrived = Choice(weight_Q[:, None], slot_Q.to(rows_QH.device)[:, None], weight_Q[:, None])
        plan = plan_dispatch(arrived, num_experts=num_slots, alignment=self.layer.experts.alignment())
        sorted_PH, weight_P = permute(rows_QH, plan), permute_weights(arrived.weights_TK, plan)
        clock.lap("sort")
        sorted_PH = self.layer.experts(
            sorted_PH, plan.ends_E, weight_P, recompute_activation="moe_act" in self.layer.recompute
        )
        clock.lap("experts")
        rows_QH = combine(sorted_PH, plan)
        clock.lap("unsort")
        return rows_QH

    def _counts(self, load_S: Tensor) -> Tensor:
        """(sent_RL, received_RL) on the host: rows to each rank's slots, from each rank to this one's. The one wait."""
        received_S = torch.empty_like(load_S)
        distributed.all_to_all_single(received_S, load_S, group=self.group)
        return torch.stack([load_S, received_S]).cpu().view(2, self.placement.num_ranks, -1)


def phase_table(clock: PhaseClock, group: Any = None) -> list[dict[str, float]]:
    """Every rank's seconds by phase, on every rank."""
    table: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(table, clock.seconds, group=group)
    return table


def _copies(experts: Experts, held: Sequence[int]) -> Experts:
    """Experts with the weights of these ones, in this order."""
    _, hidden, width = experts.w_out.shape
    mine = Experts(
        num_experts=len(held),
        hidden=hidden,
        width=width,
        activation=experts.activation,
        path=experts.forced_path,
        device=experts.w_out.device,
        dtype=experts.w_out.dtype,
    )
    with torch.no_grad():
        mine.w_in.copy_(experts.w_in[list(held)])
        mine.w_out.copy_(experts.w_out[list(held)])
    return mine


def _gradient(parameter: nn.Parameter) -> Tensor:
    """Its gradient, zero where this rank's tokens gave it none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
