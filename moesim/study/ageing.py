"""How layouts age: their balance while they stay and the load drifts away from the one they were made for.

Legend: D states of the drift, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.placement.price import staleness
from moesim.placement.slots import LayerPlacements

Floats = NDArray[np.float64]

NO_LOAD = 1e-6  # of the mean: an expert without load has no logarithm
CORRELATIONS = (1.0, 0.99, 0.97, 0.94, 0.9, 0.8, 0.6, 0.3, 0.0)


@dataclass(frozen=True, kw_only=True)
class Ageing:
    """Balance of layouts that stay while the load drifts, over the correlation of its logarithm with that of today.

    max_mean[policy][i] belongs to correlations[i], mean over layers; ``today`` is today's layout, ``fresh`` the
    search run anew on each load.
    """

    num_slots: int  # of all but today's
    correlations: tuple[float, ...]
    max_mean: Mapping[str, tuple[float, ...]]

    @property
    def best(self) -> str:
        """The policy whose layout is the most even before anything drifts."""
        names = [name for name in self.max_mean if name not in ("today", "fresh")]
        return min(names, key=lambda name: self.max_mean[name][0])


NOT_AGED = Ageing(num_slots=0, correlations=(), max_mean={})


def aged_layouts(
    layouts: Mapping[str, LayerPlacements],
    load_LE: Floats,
    *,
    anew: Callable[[Floats], LayerPlacements],
    rng: np.random.Generator,
) -> Ageing:
    """The layouts by name, one of them ``today``, over CORRELATIONS; anew places each drifted load afresh."""
    load_DLE = drifted(load_LE, CORRELATIONS, rng)
    ages = {name: staleness(placed, load_DLE) for name, placed in layouts.items()}
    ages["fresh"] = np.stack([anew(row_LE).max_mean(row_LE) for row_LE in load_DLE])
    num_slots = next(placed.ranks.num_slots for name, placed in layouts.items() if name != "today")
    return Ageing(
        num_slots=num_slots,
        correlations=CORRELATIONS,
        max_mean={name: tuple(ages_DL.mean(axis=1).tolist()) for name, ages_DL in ages.items()},
    )


def drifted(load_LE: Floats, correlations: Sequence[float], rng: np.random.Generator) -> Floats:
    """(D, L, E) loads whose logarithm correlates with today's as asked; each keeps its layer's total and its spread.

    The other part of the logarithm is today's own, dealt to the experts anew: a stationary first-order process seen
    after as many steps as bring its correlation to that value.

    >>> drifted(np.array([[1.0, 3.0]]), [1.0], np.random.default_rng(0)).tolist()
    [[[1.0, 3.0]]]
    """
    floor = np.maximum(load_LE.mean(axis=1, keepdims=True), 1e-300) * NO_LOAD
    log_LE = np.log(np.maximum(load_LE, floor))
    log_LE -= log_LE.mean(axis=1, keepdims=True)
    other_LE = rng.permuted(log_LE, axis=1)
    loads = []
    for correlation in correlations:
        mixed_LE = np.exp(correlation * log_LE + np.sqrt(1.0 - correlation**2) * other_LE)
        loads.append(mixed_LE / mixed_LE.sum(axis=1, keepdims=True) * load_LE.sum(axis=1, keepdims=True))
    return np.stack(loads)
