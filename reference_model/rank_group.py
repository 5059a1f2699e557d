"""Time an expert-parallel layer over local ranks that all work at once, under given loads.

Each rank is a process of its own: of one thread on CPUs, joined by gloo; with its own GPU, joined by NCCL.

Legend: T tokens of a rank, E experts of all ranks, S ranks, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, distributed, nn

from reference_model.exchange import sample_together_s
from reference_model.expert_parallel import ExpertParallelMoe, Placement
from reference_model.layer import MoeLayer
from reference_model.rank_share import chosen_experts, passes_over, steer, steered_tokens
from reference_model.ranks import backend_of, run_on_ranks
from reference_model.routers import SoftmaxTopK
from reference_model.shapes import LayerShapes
from reference_model.timing import Arena, Call, Effort, arena_bytes

Load = Sequence[Sequence[int]]  # sent_SE: what each rank's tokens send each expert


def time_groups(loads: Sequence[Load], shape: LayerShapes, device: torch.device, effort: Effort) -> list[list[float]]:
    """Median seconds of a forward of the whole layer under each load, in every pass; by the slowest rank each time.

    As many ranks as a load has rows, which hold the experts contiguously. Precision and passes are those of
    ``rank_share.time_shares``. Raises ValueError where a rank sends an expert more copies than it has tokens.
    """
    for load in loads:
        for sent_E in load:
            chosen_experts(sent_E, shape.top_k)
    num_ranks, width = len(loads[0]), 3 * len(loads[0][0]) // len(loads[0]) * shape.expert_width
    most_tokens = max(sum(sent_E) // shape.top_k for load in loads for sent_E in load)
    num_bytes = arena_bytes(device, (width + most_tokens) * shape.hidden * _dtype(device).itemsize)
    backend = backend_of(device.type)
    return run_on_ranks(_on_rank, num_ranks, loads, shape, device.type, effort, num_bytes, backend=backend)[0]


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _on_rank(
    loads: Sequence[Load], shape: LayerShapes, device_type: str, effort: Effort, num_arena_bytes: int
) -> list[list[float]]:
    rank, num_ranks, num_experts = distributed.get_rank(), distributed.get_world_size(), len(loads[0][0])
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device(device_type)
    dtype = _dtype(device)
    router, width = SoftmaxTopK(top_k=shape.top_k), shape.expert_width
    # Width 1, for the experts' weights give way to views of the arena.
    layer = MoeLayer(hidden=shape.hidden, width=1, num_experts=num_experts, router=router, device=device, dtype=dtype)
    steer(layer)
    group = ExpertParallelMoe(layer, Placement.of(range(num_experts), num_ranks=num_ranks))
    arena = Arena(device, dtype, num_arena_bytes)

    def sampler(load: Load) -> Callable[[], list[float]]:
        chosen_TE = chosen_experts(load[rank], shape.top_k).to(device)
        return lambda: sample_together_s(lambda: _next_call(group, chosen_TE, width, arena), device, effort)

    return passes_over([sampler(load) for load in loads], effort, lambda *_: None)


def _next_call(group: ExpertParallelMoe, chosen_TE: Tensor, width: int, arena: Arena) -> Call:
    """The next forward, on cold data."""
    experts = group.layer.experts
    num_local, hidden, _ = experts.w_out.shape
    w_in = nn.Parameter(arena.take(num_local, 2 * width, hidden))
    w_out = nn.Parameter(arena.take(num_local, hidden, width))
    x_TH = steered_tokens(chosen_TE, hidden, arena)

    @torch.no_grad()
    def forward() -> Tensor:
        experts.w_in, experts.w_out = w_in, w_out
        return group(x_TH).output_TH

    return forward
