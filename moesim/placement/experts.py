"""Where experts live: the map from experts to the ranks of an expert-parallel group.

Legend: E experts, R ranks of one expert-parallel group (an expert-TP set counts as one rank), L layers; ``load_..E`` is
any array whose last axis runs over experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.errors import InputError, check


@dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """expert_to_rank_E[e] is the rank, 0..num_ranks-1, that holds expert e. A rank may hold none."""

    expert_to_rank_E: NDArray[np.int64]
    num_ranks: int

    def __post_init__(self) -> None:
        ranks_E = np.asarray(self.expert_to_rank_E)
        whole = ranks_E.ndim == 1 and ranks_E.size >= 1 and np.issubdtype(ranks_E.dtype, np.integer)
        check(whole, "placement", "expert_to_rank", "must be a non-empty row of whole rank numbers", ranks_E.tolist())
        inside = bool((ranks_E >= 0).all() and (ranks_E < self.num_ranks).all())
        check(inside, "placement", "expert_to_rank", f"must lie in 0..{self.num_ranks - 1}", ranks_E.tolist())
        frozen_E = ranks_E.astype(np.int64)
        frozen_E.setflags(write=False)
        object.__setattr__(self, "expert_to_rank_E", frozen_E)

    @property
    def num_experts(self) -> int:
        return int(self.expert_to_rank_E.size)

    @property
    def num_experts_R(self) -> NDArray[np.int64]:
        """(R,) experts that each rank holds."""
        return np.bincount(self.expert_to_rank_E, minlength=self.num_ranks)

    def rank_loads(self, load_E: NDArray[np.floating]) -> NDArray[np.floating]:
        """load_..E summed over the experts of each rank: load_..R, same dtype.

        >>> contiguous(4, 2).rank_loads(np.array([1.0, 2.0, 3.0, 4.0]))
        array([3., 7.])
        """
        assert load_E.shape[-1] == self.num_experts, "the load's last axis runs over experts"
        num_experts_R = self.num_experts_R
        by_rank_E = np.argsort(self.expert_to_rank_E, kind="stable")
        if not np.array_equal(by_rank_E, np.arange(self.num_experts)):
            load_E = load_E[..., by_rank_E]
        if (num_experts_R == num_experts_R[0]).all():
            return load_E.reshape(*load_E.shape[:-1], self.num_ranks, -1).sum(axis=-1)
        holders_R = np.nonzero(num_experts_R)[0]
        first_expert = (np.cumsum(num_experts_R) - num_experts_R)[holders_R]
        load_R = np.zeros((*load_E.shape[:-1], self.num_ranks), dtype=load_E.dtype)
        load_R[..., holders_R] = np.add.reduceat(load_E, first_expert, axis=-1)
        return load_R


def contiguous(num_experts: int, num_ranks: int) -> Placement:
    """The first E/R experts on rank 0, the next on rank 1, and so on (Megatron's layout).

    Raises InputError when num_ranks does not divide num_experts.

    >>> contiguous(8, 4).expert_to_rank_E.tolist()
    [0, 0, 1, 1, 2, 2, 3, 3]
    """
    if num_experts % num_ranks:
        rule = f"must divide the model's num_experts={num_experts}"
        near = [size for size in range(1, num_experts + 1) if num_experts % size == 0]
        closest = sorted(sorted(near, key=lambda size: abs(size - num_ranks))[:2])
        raise InputError("parallel", "ep", rule, num_ranks, "Nearest that do: " + ", ".join(map(str, closest)) + ".")
    return Placement(expert_to_rank_E=np.arange(num_experts) // (num_experts // num_ranks), num_ranks=num_ranks)
