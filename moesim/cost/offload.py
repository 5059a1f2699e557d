"""What lies in the host's memory instead of the GPU's, and how many bytes cross the host link for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moesim.cost.activations import layer_tensors
from moesim.cost.recompute import kept_tensors
from moesim.cost.software import MEGATRON, Framework
from moesim.describe.model import Model
from moesim.describe.parallel import Parallelism
from moesim.describe.pipeline import Placed
from moesim.describe.workload import Training

LAYERS_ON_GPU = 2  # of a chunk, the last: one is sent while the next is made, and the backward begins with them


@dataclass(frozen=True, kw_only=True)
class LayerOffload:
    """Bytes of one layer that a forward sends to the host, and its backward fetches again."""

    moe_index: int  # among the stage's MoE layers; -1: dense
    token_bytes: float  # per token of the rank's micro-batch, before tensor parallelism
    assignment_bytes: float  # per assignment received


def chunk_offload(
    model: Model, parallel: Parallelism, train: Training, chunk: Sequence[Placed], software: Framework = MEGATRON
) -> tuple[LayerOffload, ...]:
    """What a chunk's forward sends to the host with offloaded activations: all that its layers keep, but the last
    LAYERS_ON_GPU of them. Nothing where activations stay. docs/model.md#offloading.
    """
    if "activations" not in train.offloaded:
        return ()
    found = []
    for item in chunk[: len(chunk) - LAYERS_ON_GPU]:
        kept = kept_tensors(
            layer_tensors(model, item.layer, parallel, software, train.precision, train.kept),
            item.layer,
            train,
            parallel.tp,
        )
        per = {unit: sum(t.bytes for t in kept if t.per == unit) for unit in ("token", "assignment")}
        found.append(
            LayerOffload(moe_index=item.moe_index, token_bytes=per["token"], assignment_bytes=per["assignment"])
        )
    return tuple(found)


def optimizer_transfer_s(num_parameters: float, train: Training, host_bytes_per_s: float) -> float:
    """Seconds that a rank's optimizer states need to come for their update and go back, both ways at once; 0 where they
    stay. num_parameters: of the rank's shard.

    >>> optimizer_transfer_s(1e9, Training(offload="optimizer"), 50e9)
    0.24
    """
    if "optimizer" not in train.offloaded:
        return 0.0
    return num_parameters * train.optimizer.state_bytes / host_bytes_per_s
