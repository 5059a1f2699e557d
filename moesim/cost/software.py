"""What memory depends on besides the mathematics: one set of facts for each framework. See docs/model.md#memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from moesim.describe.hardware import Sourced
from moesim.describe.workload import Training
from moesim.units import GIB, MIB


@dataclass(frozen=True, kw_only=True)
class Framework:
    """What memory depends on besides the mathematics: one set per framework, never per run.

    fused_cross_entropy: the loss writes its gradient over the BF16 logits; otherwise fp32 logits stand beside a BF16
    gradient. placeholder_gradients: cached dummy weight gradients (TransformerEngine). cp_keeps_output_twice: with
    all-to-all context parallelism the attention output stays on both sides of its exchange. product_workspace_bytes: of
    dense matrix products; grouped_workspace_bytes: of the streams of grouped ones. allocator_reserve_fraction: reserved
    beyond allocated, as a share of allocated. routing_records: what a MoE layer notes of its routing, maps over all
    experts or lists over the chosen ones. fused_activation: experts' activation and gate in one kernel; otherwise the
    activation's output stays beside its product with the fp32 gate, and fp32 copies arise in its backward.
    """

    name: str
    fused_cross_entropy: bool
    placeholder_gradients: bool
    cp_keeps_output_twice: bool
    product_workspace_bytes: Sourced
    grouped_workspace_bytes: Sourced
    context_bytes: Sourced
    nccl_bytes_per_communicator: Sourced
    allocator_reserve_fraction: Sourced
    routing_records: Literal["maps", "lists"] = "maps"
    fused_activation: bool = True


MEGATRON = Framework(
    name="Megatron-LM with TransformerEngine",
    fused_cross_entropy=False,
    placeholder_gradients=True,
    cp_keeps_output_twice=True,
    product_workspace_bytes=Sourced(
        value=2 * 32 * MIB,
        unit="bytes",
        kind="spec",
        source="cuBLAS workspaces on Hopper and later: 32 MiB of TransformerEngine "
        "(pytorch/module/base.py, get_cublas_workspace_size_bytes) and 32 MiB of PyTorch (CUDABlas)",
        date="2026-05",
    ),
    grouped_workspace_bytes=Sourced(
        value=4 * 32 * MIB,
        unit="bytes",
        kind="spec",
        source="TransformerEngine pytorch/module/base.py, get_multi_stream_cublas_workspace: four streams of 32 MiB",
        date="2026-05",
    ),
    context_bytes=Sourced(
        value=0.75 * GIB,
        unit="bytes",
        kind="assumed",
        source="CUDA context with loaded kernels; 0.5 to 1 GiB is usual on Hopper and Blackwell",
        date="2026-05",
    ),
    nccl_bytes_per_communicator=Sourced(
        value=2 * 16 * 4 * MIB,
        unit="bytes",
        kind="assumed",
        source="NCCL user guide: NCCL_BUFFSIZE is 4 MiB per channel; send and receive, 16 channels assumed",
        date="2026-05",
    ),
    allocator_reserve_fraction=Sourced(
        value=0.053,
        unit="1",
        kind="measured",
        source="mean of reserved/allocated - 1 over the 16 distinct configurations of SimuMax docs/b200/"
        "b200_release_v1.2_summary.json carried with the project (range 0.028 to 0.093)",
        date="2026-05-01",
    ),
)

# The project's own torch model: what its MoE layer saves is checked tensor by tensor; workspaces, context and reserve
# are Megatron's.
REFERENCE = replace(
    MEGATRON,
    name="reference_model",
    placeholder_gradients=False,
    cp_keeps_output_twice=False,
    routing_records="lists",
)

# DeepSeek's own framework, as far as it is known to differ: placeholder gradients are TransformerEngine's.
DEEPSEEK = replace(MEGATRON, name="DeepSeek's framework", placeholder_gradients=False)


def software_of(train: Training) -> Framework:
    """The facts of the software that trains.

    >>> software_of(Training(software="deepseek")).placeholder_gradients
    False
    """
    software = DEEPSEEK if train.software == "deepseek" else MEGATRON
    return replace(software, fused_cross_entropy=True) if train.fused_loss else software
