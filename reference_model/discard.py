"""Selective recomputation: give back what a forward pass made, and make it again when the backward comes near.

Unlike with a checkpoint around an operation and the next one, nothing but the thing itself is computed twice, and what
takes it in stays as it is. Megatron-LM does the same with its norms and up-projections.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, UntypedStorage


def discard(made: Sequence[Tensor], again: Callable[[], Sequence[Tensor]], before: Sequence[Tensor]) -> None:
    """Free the memory of ``made``; ``again`` fills it as soon as a gradient of one of ``before`` is there.

    made: tensors of a storage each, that nobody reads any more but the backward of what took them in. before: results
    whose gradients all of those backwards need: at least one of them must be part of the loss. Nothing happens where
    no gradients are recorded.

    >>> x = torch.ones(3, requires_grad=True)
    >>> middle = x.exp()
    >>> end = middle.square()
    >>> discard([middle], lambda: [x.exp()], before=[end])
    >>> middle.untyped_storage().nbytes()
    0
    >>> end.sum().backward()
    >>> torch.allclose(x.grad, 2 * torch.ones(3).exp() ** 2)
    True
    """
    watched = [tensor for tensor in before if tensor.requires_grad]
    if not watched:
        return
    storages = [tensor.untyped_storage() for tensor in made]
    sizes = [storage.nbytes() for storage in storages]
    assert sizes == [tensor.numel() * tensor.element_size() for tensor in made], "made must be whole storages"
    device = made[0].device.type
    dtype, casting = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)

    # Emptied by the first gradient: what hangs on a result lives as long as the graph.
    to_fill = [(storages, sizes, again)]

    def fill(_: Tensor) -> None:
        if to_fill:
            with torch.autocast(device, dtype=dtype, enabled=casting):
                _fill(*to_fill.pop())

    for tensor in watched:
        tensor.register_hook(fill)
    for storage in storages:
        storage.resize_(0)


@torch.no_grad()
def _fill(storages: Sequence[UntypedStorage], sizes: Sequence[int], again: Callable[[], Sequence[Tensor]]) -> None:
    """By storage: to autograd nothing was written to."""
    for storage, size, tensor in zip(storages, sizes, again(), strict=True):
        storage.resize_(size)
        storage.copy_(tensor.untyped_storage())
