"""What autograd really keeps from forward to backward: every storage once, as ``saved_tensors_hooks`` sees it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


@dataclass(frozen=True, kw_only=True)
class SavedStorage:
    """One storage that some node keeps; shape and dtype are those of the first tensor saved from it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    num_bytes: int


@dataclass(kw_only=True)
class Saved:
    """The storages kept so far, in the order in which they were saved."""

    storages: list[SavedStorage] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(storage.num_bytes for storage in self.storages)


@contextmanager
def recording_saved(*, besides: Iterable[Tensor] = ()) -> Iterator[Saved]:
    """Record what operations in the block save for their backward, but for the storages of ``besides`` (parameters).

    A view counts as its whole storage, once however many nodes keep it. Of a checkpoint its inputs are seen: what
    happens inside has hooks of its own.

    >>> x = torch.ones(4, requires_grad=True)
    >>> with recording_saved() as saved:
    ...     y = x.exp().sum()
    >>> saved.num_bytes
    16
    """
    saved = Saved()
    # Storages are held while recording, so that no address is used a second time.
    seen = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in besides}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = storage
            saved.storages.append(
                SavedStorage(shape=tuple(tensor.shape), dtype=tensor.dtype, num_bytes=storage.nbytes())
            )
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
