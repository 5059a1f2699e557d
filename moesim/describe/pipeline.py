"""Which layers live on which pipeline stage."""

from __future__ import annotations

from dataclasses import dataclass

from moesim.describe.model import Layer, Model
from moesim.describe.parallel import Parallelism
from moesim.describe.stages import Held, check_layout, held_counting_ends, held_evenly, held_with_ends
from moesim.describe.workload import Training
from moesim.errors import check


def held_by_stage(num_layers: int, parallel: Parallelism, num_mtp: int = 0) -> tuple[Held, ...]:
    """What each virtual stage holds, in order of depth: by the parallelism's layout or rule.

    num_mtp: multi-token-prediction layers that are trained; only a layout's text says where they lie, else they end
    the last stage. Raises InputError where a layout does not hold the layers that there are.

    >>> [held.num_layers for held in held_by_stage(5, Parallelism(pp=2))]
    [3, 2]
    """
    p = parallel
    if p.layout is not None:
        held = check_layout(p.layout, p.pp, p.vpp)
        count = sum(stage.num_layers for stage in held)
        check(count == num_layers, "parallel", "layout", f"must hold the model's {num_layers} layers", count)
        if isinstance(p.layout, str):
            mtp = sum(stage.num_mtp for stage in held)
            rule = f"must hold the {num_mtp} multi-token-prediction layers that are trained (train.mtp)"
            check(mtp == num_mtp, "parallel", "layout", rule, mtp)
            return held
    elif p.num_first_stage_layers is not None or p.num_last_stage_layers is not None:
        first, last = p.num_first_stage_layers, p.num_last_stage_layers
        held = held_with_ends(num_layers, p.pp, p.vpp, first=first, last=last)
    elif p.embedding_as_layer or p.loss_as_layer:
        held = held_counting_ends(num_layers, p.pp, p.vpp, embedding=p.embedding_as_layer, loss=p.loss_as_layer)
    else:
        held = held_evenly(num_layers, p.pp, p.vpp)
    return (*held[:-1], held[-1]._replace(num_mtp=num_mtp))


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A layer on a stage: ``moe_index`` counts the stage's MoE layers (-1: dense); ``number`` is the layer's in the
    model, multi-token-prediction layers following the stack.
    """

    layer: Layer
    moe_index: int
    number: int = 0
    is_mtp: bool = False


def trained_layers(model: Model, train: Training) -> tuple[Layer, ...]:
    """The layers that a step runs through: the stack, then the multi-token-prediction layers where they are trained."""
    return model.layers + (model.mtp_layers if train.mtp else ())


def stage_chunks(model: Model, parallel: Parallelism, train: Training, stage: int) -> tuple[tuple[Placed, ...], ...]:
    """The layers of each virtual stage of a stage, trained multi-token-prediction layers included; some may be empty.

    Raises InputError as ``held_by_stage`` does.
    """
    stack = trained_layers(model, train)
    start, start_mtp = 0, len(model.layers)
    numbers_by_depth: list[tuple[int, ...]] = []
    for held in held_by_stage(len(model.layers), parallel, len(stack) - len(model.layers)):
        numbers_by_depth.append((*range(start, start + held.num_layers), *range(start_mtp, start_mtp + held.num_mtp)))
        start, start_mtp = start + held.num_layers, start_mtp + held.num_mtp
    chunks: list[tuple[Placed, ...]] = []
    num_moe = 0
    for depth in chunk_depths(parallel, train, stage):
        placed = []
        for i in numbers_by_depth[depth]:
            moe_index = num_moe if stack[i].is_moe else -1
            placed.append(Placed(layer=stack[i], moe_index=moe_index, number=i, is_mtp=i >= len(model.layers)))
            num_moe += stack[i].is_moe
        chunks.append(tuple(placed))
    return tuple(chunks)


def chunk_depths(parallel: Parallelism, train: Training, stage: int) -> tuple[int, ...]:
    """Which parts of the model, in order of depth, a stage's chunks are. DualPipe's second is the mirrored one.

    >>> chunk_depths(Parallelism(pp=2, vpp=2), Training(), 1)
    (1, 3)
    """
    if train.schedule == "dualpipe":
        return stage, parallel.pp - 1 - stage
    return tuple(range(stage, parallel.pp * parallel.vpp, parallel.pp))


def mtp_stage(model: Model, parallel: Parallelism, train: Training) -> int | None:
    """The stage of the trained multi-token-prediction layers; None where none are trained."""
    num_mtp = len(model.mtp_layers) if train.mtp else 0
    stages = enumerate(held_by_stage(len(model.layers), parallel, num_mtp))
    return next((c % parallel.pp for c, held in stages if held.num_mtp), None)
