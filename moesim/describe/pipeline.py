"""Which layers live on which pipeline stage."""

from __future__ import annotations

from dataclasses import dataclass

from moesim.describe.model import Layer, Model
from moesim.describe.parallel import Parallelism
from moesim.describe.workload import Training
from moesim.errors import check


def stage_layers(num_layers: int, pp: int, vpp: int = 1) -> tuple[tuple[range, ...], ...]:
    """Layer ranges of each stage: result[stage] holds one range per virtual stage.

    The stack is cut into pp*vpp consecutive chunks, chunk c going to stage c % pp. Where the layers do not divide,
    chunks at the ends are the shorter ones (last, first, last but one, ...), since embedding and head already weigh
    on those stages. Raises InputError when a chunk would be empty.

    >>> stage_layers(5, 2)
    ((range(0, 3),), (range(3, 5),))
    """
    num_chunks = pp * vpp
    rule = f"pp*vpp = {pp}*{vpp} = {num_chunks} must not exceed the model's {num_layers} layers"
    check(num_chunks <= num_layers, "parallel", "pp", rule, pp)
    full = -(-num_layers // num_chunks)
    sizes = [full] * num_chunks
    for i in range(full * num_chunks - num_layers):
        sizes[i // 2 if i % 2 else num_chunks - 1 - i // 2] -= 1
    starts = [sum(sizes[:c]) for c in range(num_chunks)]
    chunks = [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    return tuple(tuple(chunks[v * pp + stage] for v in range(vpp)) for stage in range(pp))


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A layer on a stage: ``moe_index`` counts the stage's MoE layers (-1: dense)."""

    layer: Layer
    moe_index: int
    is_mtp: bool = False


def stage_chunks(model: Model, parallel: Parallelism, train: Training, stage: int) -> tuple[tuple[Placed, ...], ...]:
    """The layers of each virtual stage of a stage; trained multi-token-prediction layers end the last one."""
    chunks: list[tuple[Placed, ...]] = []
    num_moe = 0
    ranges = stage_layers(len(model.layers), parallel.pp, parallel.vpp)[stage]
    for v, positions in enumerate(ranges):
        layers = [(model.layers[i], False) for i in positions]
        if train.mtp and stage == parallel.pp - 1 and v == parallel.vpp - 1:
            layers += [(layer, True) for layer in model.mtp_layers]
        placed = []
        for layer, is_mtp in layers:
            placed.append(Placed(layer=layer, moe_index=num_moe if layer.is_moe else -1, is_mtp=is_mtp))
            num_moe += layer.is_moe
        chunks.append(tuple(placed))
    return tuple(chunks)
