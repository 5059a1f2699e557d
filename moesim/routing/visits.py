"""How likely a token sends at least one copy to each rank and each node: the bytes of a deduplicated dispatch.

Legend: L MoE layers, E experts, R ranks of an expert-parallel group, N nodes that these ranks lie on, S sets of experts
(the experts of a rank, or of a node), T pool tokens, K experts per token.

A token that picks three experts of one rank goes there once; its copies are visits, fewer than its k assignments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moesim.describe.model import Router
from moesim.routing.popularity import Popularities
from moesim.routing.reach import random_second_reach, reach_of_sets, uniform_reach
from moesim.routing.sampler import Choices, perturbation_scale

Floats = NDArray[np.float64]


class ExpertMap(Protocol):
    """What visits need of a placement (``moesim.placement.Placement``; that room stands below this one)."""

    @property
    def expert_to_rank_E(self) -> NDArray[np.int64]: ...
    @property
    def num_ranks(self) -> int: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class VisitProbabilities:
    """rank_visits_LR, node_visits_LN: P(a token sends at least one copy there), its own rank and node included.

    node_of_rank_R numbers the nodes 0..N-1 in the order of their ids.
    """

    rank_visits_LR: Floats
    node_visits_LN: Floats
    node_of_rank_R: NDArray[np.int64]

    @property
    def num_nodes(self) -> int:
        return int(self.node_visits_LN.shape[1])


def visit_probabilities(
    popularities: Popularities, placement: ExpertMap, node_of_rank_R: NDArray[np.int64] | None = None
) -> VisitProbabilities:
    """Visits of every layer under a placement; node_of_rank_R gives each rank's node (any ids; None: all on one node).

    Exact for plain routers (hypergeometric when experts are equal, else quadrature); from the popularity's own pool for
    group-limited ones, averaged over ranks that are alike by symmetry when experts are equal. docs/model.md#visits.

    >>> from moesim.describe.model import Router
    >>> from moesim.describe.workload import Multinomial
    >>> from moesim.placement import contiguous
    >>> from moesim.routing.popularity import popularity_LE
    >>> rng = np.random.default_rng(0)
    >>> equal = popularity_LE(Multinomial(), num_layers=1, num_experts=256, router=Router(top_k=8), rng=rng)
    >>> visits = visit_probabilities(equal, contiguous(256, 64), np.arange(64) // 8)
    >>> round(float(visits.node_visits_LN.sum()), 2)
    5.29
    """
    ranks = placement.num_ranks
    given_R = np.zeros(ranks, dtype=np.int64) if node_of_rank_R is None else np.asarray(node_of_rank_R)
    assert given_R.shape == (ranks,), "every rank of the group needs its node"
    assert placement.expert_to_rank_E.size == popularities.num_experts, "the placement is of another number of experts"
    nodes, node_of_rank_R = np.unique(given_R, return_inverse=True)
    rank_of_E = placement.expert_to_rank_E
    return VisitProbabilities(
        rank_visits_LR=_visits(popularities, rank_of_E, ranks),
        node_visits_LN=_visits(popularities, node_of_rank_R[rank_of_E], nodes.size),
        node_of_rank_R=node_of_rank_R,
    )


def _visits(popularities: Popularities, set_of_E: NDArray[np.int64], num_sets: int) -> Floats:
    router, num_layers = popularities.router, popularities.num_layers
    if popularities.pool_LTK is not None:
        visits_LS = _pool_visits(popularities.pool_LTK, set_of_E, num_sets)
        if popularities.is_uniform:
            alike_S = _alike_sets(set_of_E, num_sets, popularities.router.num_groups)
            mean_A = np.bincount(alike_S, weights=visits_LS[0]) / np.bincount(alike_S)
            visits_LS = np.tile(mean_A[alike_S], (num_layers, 1))
        return visits_LS
    if popularities.domains is not None:
        parts = popularities.domains
        visits_DLS = [_plain_visits(weights_LE, router, set_of_E, num_sets) for weights_LE in parts.log_weights_DLE]
        return np.tensordot(parts.share_D, np.stack(visits_DLS), axes=1)
    weights_LE = popularities.log_weights_LE
    if popularities.zero_log_weights_LZ is not None:
        weights_LE = np.concatenate([weights_LE, popularities.zero_log_weights_LZ], axis=1)
    if popularities.is_uniform and router.choice == "top_k" and router.num_zero_experts == 0:
        sizes_S = np.bincount(set_of_E, minlength=num_sets)
        return np.tile(uniform_reach(popularities.num_experts, router.top_k, sizes_S), (num_layers, 1))
    return _plain_visits(weights_LE, router, set_of_E, num_sets)


def _plain_visits(log_weights_LE: Floats, router: Router, set_of_E: NDArray[np.int64], num_sets: int) -> Floats:
    """Visits of a router without groups; experts beyond set_of_E are zero-compute ones, which nobody visits."""
    weights_LE = log_weights_LE / perturbation_scale(router)
    if router.choice == "random_second":
        return random_second_reach(weights_LE, set_of_E, num_sets=num_sets)
    num_zero = weights_LE.shape[1] - set_of_E.size
    all_of_E = np.concatenate([set_of_E, np.full(num_zero, num_sets, dtype=np.int64)])
    reach_LS = reach_of_sets(weights_LE, all_of_E, top_k=router.top_k, num_sets=num_sets + (num_zero > 0))
    return reach_LS[:, :num_sets]


def _pool_visits(pool_LTK: Choices, set_of_E: NDArray[np.int64], num_sets: int) -> Floats:
    """Share of pool tokens that visit each set; a choice of -1 reaches no expert."""
    from moesim.routing.kernels import count_visits

    return count_visits(np.ascontiguousarray(pool_LTK), set_of_E, num_sets) / pool_LTK.shape[1]


def _alike_sets(set_of_E: NDArray[np.int64], num_sets: int, num_groups: int) -> NDArray[np.int64]:
    """(S,) class of each set: with equal experts, sets that take equally many from router groups are visited alike."""
    group_of_E = np.arange(set_of_E.size) // (set_of_E.size // num_groups)
    taken_SN = np.bincount(set_of_E * num_groups + group_of_E, minlength=num_sets * num_groups).reshape(
        num_sets, num_groups
    )
    return np.unique(np.sort(taken_SN, axis=1), axis=0, return_inverse=True)[1].reshape(-1)
