"""Which layers live on which pipeline stage."""

from __future__ import annotations

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
