"""Search for the layout with the least time of the slowest rank, and the bound it is measured against.

Legend: L layers, E experts, R ranks, S slots. Kernels: ``kernels`` (search) and ``bound_kernels``, loaded when called.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.errors import InputError, check
from moesim.placement.slots import LayerPlacements, RankSlots

Floats = NDArray[np.float64]

_HALVINGS = 40


@dataclass(frozen=True, kw_only=True)
class Effort:
    """When the search stops. Fractions are excess over the lower bound.

    A descent goes on until ``goal_fraction``; other starts and kicks are tried only while the excess is over
    ``enough_fraction``, at most ``num_kicks`` of them a layer.
    """

    goal_fraction: float = 2e-4
    enough_fraction: float = 2e-3
    num_kicks: int = 60
    max_moves: int = 10_000

    def __post_init__(self) -> None:
        for name in ("goal_fraction", "enough_fraction", "num_kicks", "max_moves"):
            value = getattr(self, name)
            check(value >= 0, "placement.effort", name, "must not be negative", value)


def checked_loads(load_LE: ArrayLike) -> Floats:
    """load_LE as float64; InputError unless layers x experts, finite and non-negative."""
    load = np.ascontiguousarray(load_LE, dtype=np.float64)
    check(load.ndim == 2 and load.size > 0, "placement", "loads", "must be layers x experts", load.shape)
    if not (load.min() >= 0 and load.max() < np.inf):
        bad = np.argwhere(~(np.isfinite(load) & (load >= 0)))
        got = f"{len(bad)} not, first at {bad[0].tolist()}"
        raise InputError("placement", "loads", "must be finite and not negative", got)
    return load


def check_fits(num_experts: int, ranks: RankSlots) -> None:
    """InputError unless there is a slot for every expert."""
    rule = f"must be at least the model's num_experts={num_experts}"
    check(ranks.num_slots >= num_experts, "placement", "num_slots", rule, ranks.num_slots)


def least_max_load(
    load_LE: ArrayLike, ranks: RankSlots, *, rng: np.random.Generator, effort: Effort | None = None
) -> LayerPlacements:
    """Replicas and slots that make the slowest rank as fast as the search can, layer by layer.

    load_LE: any unit. Never slower than EPLB's global policy, from whose layout it starts. The result depends on rng's
    state alone. Raises InputError for loads that are no loads and for too few slots. docs/model.md#placement-search.

    >>> placed = least_max_load(
    ...     [[3.0, 1.0, 1.0, 1.0, 1.0, 1.0]],
    ...     RankSlots(num_slots_R=[4, 4], speed_R=[1, 1], node_of_rank_R=[0, 0]),
    ...     rng=np.random.default_rng(0),
    ... )
    >>> placed.max_mean([[3.0, 1.0, 1.0, 1.0, 1.0, 1.0]]).tolist()
    [1.0]
    """
    from moesim.placement import kernels

    load, effort = checked_loads(load_LE), effort or Effort()
    check_fits(load.shape[1], ranks)
    expert_LS = np.empty((load.shape[0], ranks.num_slots), dtype=np.int64)
    kernels.search_layers(
        _scaled(load),
        ranks.first_R1,
        1.0 / ranks.speed_R,
        effort.goal_fraction,
        effort.enough_fraction,
        effort.num_kicks,
        effort.max_moves,
        rng.integers(0, 2**64, size=load.shape[0], dtype=np.uint64),
        expert_LS,
        np.empty(load.shape[0]),
    )
    return LayerPlacements(physical_to_logical_LS=expert_LS, num_experts=load.shape[1], ranks=ranks)


def lower_bounds(load_LE: ArrayLike, ranks: RankSlots, *, reached_L: ArrayLike | None = None) -> Floats:
    """(L,) max/mean that no layout of these slots can beat, with each expert's replicas sharing its load evenly.

    reached_L: max/mean of known layouts, which saves work. Arguments by volume, replicas, company and counting, see
    ``bound_kernels``; tight where a rank has 4 slots or more, within some percent below. docs/model.md#placement-bound.

    >>> ranks = RankSlots(num_slots_R=[2, 2], speed_R=[1, 1], node_of_rank_R=[0, 0])
    >>> lower_bounds([[5.0, 1.0, 1.0, 1.0]], ranks).round(3).tolist()
    [1.5]
    """
    from moesim.placement import bound_kernels

    load = checked_loads(load_LE)
    check_fits(load.shape[1], ranks)
    scaled, slowness_R = _scaled(load), 1.0 / ranks.speed_R
    total_L = scaled.sum(axis=1)
    ideal_L = total_L / ranks.speed_R.sum()
    worst_L = total_L * float(slowness_R.max())  # all of it on the slowest rank
    reached = worst_L if reached_L is None else np.asarray(reached_L, dtype=np.float64) * ideal_L
    bound_L = np.empty(load.shape[0])
    bound_kernels.lower_bounds(scaled, ranks.num_slots_R, slowness_R, reached * (1.0 + 1e-9), _HALVINGS, bound_L)
    return bound_L / ideal_L


def _scaled(load_LE: Floats) -> Floats:
    """Loads with a mean between 1 and 2 in each layer: tolerances then mean the same. A layer without load is even.

    Scaled by powers of two, which round nothing: ties stay ties.
    """
    mean_L1 = load_LE.mean(axis=1, keepdims=True)
    scale_L1 = np.exp2(np.floor(np.log2(np.where(mean_L1 > 0, mean_L1, 1.0))))
    return np.where(mean_L1 > 0, load_LE / scale_L1, 1.0)


def warm() -> None:
    """Compile the kernels of this room into numba's cache, so that no later run pays for it (some 25 s)."""
    from moesim.placement.nodes import fewer_crossings
    from moesim.placement.slots import even_slots

    load, ranks, rng = np.array([[3.0, 1.0, 2.0, 1.0]]), even_slots(6, 2, num_nodes=2), np.random.default_rng(0)
    placed = least_max_load(load, ranks, rng=rng)
    lower_bounds(load, ranks)
    fewer_crossings(placed, load, np.zeros((1, 4, 4)), max_mean_limit_L=2.0, rng=rng, num_steps=1)
