"""What autograd really keeps from forward to backward: every storage once, as ``saved_tensors_hooks`` sees it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, UntypedStorage
from torch.autograd.graph import saved_tensors_hooks


@dataclass(frozen=True, kw_only=True)
class SavedStorage:
    """One storage that some node keeps; shape and dtype are those of the first tensor saved from it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    num_bytes: int


@dataclass(kw_only=True)
class Saved:
    """The storages kept at the block's end, in the order in which they were saved."""

    storages: list[SavedStorage] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(storage.num_bytes for storage in self.storages)


@contextmanager
def recording_saved(*, besides: Iterable[Tensor] = ()) -> Iterator[Saved]:
    """Record what operations in the block save for their backward, but for the storages of ``besides`` (parameters).

    A view counts as its whole storage, once however many nodes keep it, and for what it holds at the block's end: what
    ``discard`` gave back counts nothing. Of a checkpoint its inputs are seen: what
    happens inside has hooks of its own.

    >>> x = torch.ones(4, requires_grad=True)
    >>> with recording_saved() as saved:
    ...     y = x.exp().sum()
    >>> saved.num_bytes
    16
    """
    saved = Saved()
    # By what holds the bytes, not by address: a storage whose bytes were given back leaves its address to others.
    parameters = {tensor.untyped_storage()._cdata for tensor in besides}
    first: dict[int, tuple[UntypedStorage, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            first.setdefault(storage._cdata, (storage, tensor.detach()))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
    for storage, tensor in first.values():
        if storage.nbytes():
            saved.storages.append(
                SavedStorage(shape=tuple(tensor.shape), dtype=tensor.dtype, num_bytes=storage.nbytes())
            )
