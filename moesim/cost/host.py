"""What a step costs besides its kernels alone: rates that hold under power, and a host that issues every operation.

A pass over a layer takes the longer of what the device computes and what the host needs to issue it: Python, autograd
and library code around each launch. A module inside a CUDA graph is issued as one operation. See docs/model.md#host
and #sustained.
"""

from __future__ import annotations

from dataclasses import replace

from moesim.catalog.step import FALLBACK_GPU, NO_LOSS, StepConstants, step_constants
from moesim.cost.device import DeviceCost, Provenance
from moesim.cost.recompute import operations_again
from moesim.describe.hardware import Gpu
from moesim.describe.model import LatentAttention, Layer, MoeFfn
from moesim.describe.parallel import Parallelism
from moesim.describe.schedules import Way
from moesim.describe.workload import Routing, Training
from moesim.units import BYTES_PER_ELEMENT

# Operations that the host issues in the forward of a module: kernels, collectives and copies, counted in Megatron-LM
# core 0.15 (transformer/, transformer/moe/) with Transformer Engine's fused layers. The backward issues BACKWARD times
# as many: products have two gradients each, most others one kernel that also saves nothing. What is beyond once is the
# weight gradients', where they run in a pass of their own.
ISSUED = {
    "grouped-query attention": 11,  # norm with product, rotation, scores to values, product, residual
    "latent attention": 22,  # two more norms and products, rotations and joins of parts of heads
    "dense ffn": 6,  # norm with product, activation, product, residual
    "shared experts": 6,
    "router": 10,  # norm, scores in float32, top-k, masks, losses
    "preprocess": 8,  # counts of each expert and rank, sorted indices
    "exchange alltoall": 16,  # permute, all-to-all, sort; and back: probabilities travel as well
    "exchange deepep": 10,  # dispatch and combine are one kernel each, with layouts made before
    "experts": 8,  # two grouped products, activation with probabilities, splits of the counts
    "tensor-parallel collective": 2,
}
AGAIN = {  # of an operation that the backward does once more, with the wrapper that keeps its inputs
    "attention norm": 2,
    "up projections": 10,  # two products, rotations and joins
    "core attention": 4,
    "ffn norm": 2,
    "shared experts": 8,
    "dense ffn": 8,
    "expert activation": 4,
}
BACKWARD = 1.6
ROUTED = ("router", "preprocess", "exchange alltoall", "exchange deepep", "experts")
GRAPHED = {  # by the module that a CUDA graph may hold (Megatron's --cuda-graph-scope)
    "attn": ("grouped-query attention", "latent attention"),
    "mlp": ("dense ffn",),
    "moe_router": ("router", "shared experts"),
    "moe_preprocess": ("preprocess",),
    "moe": (*ROUTED, "shared experts"),
}


def constants_of(gpu: Gpu, train: Training, device: DeviceCost) -> StepConstants:
    """The step's constants of a GPU and software; none where kernels were calibrated: a profile brings its speeds."""
    return NO_LOSS if device.profile is not None else step_constants(gpu.name, train.software)


def sustained(device: DeviceCost, constants: StepConstants, gpu: Gpu) -> DeviceCost:
    """The device at the rates that it keeps up through a step, with where they come from. See
    docs/model.md#sustained.
    """
    told = []
    for constant in constants.constants:
        source, kind = constant.value.source, constant.value.kind
        if gpu.name not in constant.gpus:
            source, kind = f"that of {FALLBACK_GPU}: {source}", "assumed"
        told.append(Provenance(part=f"step: {constant.name}", kind=kind, source=source))
    return replace(
        device,
        law=replace(device.law, utilisation=device.law.utilisation * constants.product_fraction),
        weight_law=replace(device.weight_law, utilisation=device.weight_law.utilisation * constants.product_fraction),
        attention_by_dims={
            dims: replace(rate, endless_flops_per_s=rate.endless_flops_per_s * constants.attention_fraction)
            for dims, rate in device.attention_by_dims.items()
        },
        bf16=None if device.bf16 is None else sustained(device.bf16, constants, gpu),
        provenance=(*device.provenance, *told),
    )


def unfused(device: DeviceCost, constants: StepConstants) -> DeviceCost:
    """The sustained device for layers with experts, whose memory-bound kernels are not fused. See
    docs/model.md#sustained.
    """
    wide = None if device.bf16 is None else unfused(device.bf16, constants)
    return replace(device, times_moved=1.0 / constants.stream_fraction, bf16=wide)


def once_a_step_s(num_parameters: float, device: DeviceCost, constants: StepConstants) -> float:
    """Seconds of a step besides micro-batches, reduction and the optimizer's own update: a rank's float32 gradients are
    cleared and scaled, and what the constant step_s stands for. See docs/model.md#host.
    """
    cleared, scaled = BYTES_PER_ELEMENT["float32"], 2 * BYTES_PER_ELEMENT["float32"]
    passed_over = num_parameters * (cleared + scaled) if constants.constants else 0.0
    return float(device.stream_s(passed_over)) + constants.step_s


def issued_operations(layer: Layer, *, parallel: Parallelism, train: Training, routing: Routing, way: Way) -> float:
    """How many operations the host issues for one pass over a layer, modules in CUDA graphs counting one each.

    What is recomputed is issued again with the backward, or with the inputs' gradients.

    >>> from moesim.catalog.models import load_model
    >>> layer = load_model("llama-3-8b").layers[0]
    >>> issued_operations(layer, parallel=Parallelism(), train=Training(), routing=Routing(), way="forward")
    17.0
    """
    if train.cuda_graphs == "full":
        return 0.0
    modules = ["latent attention" if isinstance(layer.attention, LatentAttention) else "grouped-query attention"]
    num_collectives = 2
    if isinstance(layer.ffn, MoeFfn):
        exchanges = parallel.ep * parallel.etp > 1
        modules += ["router", "preprocess", *([f"exchange {routing.dispatcher}"] if exchanges else []), "experts"]
        modules += ["shared experts"] if layer.ffn.shared is not None else []
        num_collectives += 2 * (layer.ffn.shared is not None)
    else:
        modules.append("dense ffn")
        num_collectives += 2
    graphed = {name for scope in train.graphed_modules for name in GRAPHED[scope]}
    alone = sum(ISSUED[name] for name in modules if name not in graphed)
    alone += num_collectives * ISSUED["tensor-parallel collective"] * (parallel.tp > 1)
    graphs = float(sum(name in graphed for name in modules))
    if way == "forward":
        return alone + graphs
    if way == "weight_gradient":
        return alone * (BACKWARD - 1.0)
    again = alone if train.recompute == "full" else 0.0
    for operation in operations_again(layer, train):
        again += AGAIN.get(operation) or sum(ISSUED[name] for name in modules if name in ROUTED)
    return alone * (BACKWARD if way == "backward" else 1.0) + again + graphs
