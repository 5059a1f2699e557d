"""The skew at which a load has the Gini, coefficient of variation, max/mean or hot share that was asked for.

Legend: L layers, E experts, D domains.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from moesim.errors import InputError
from moesim.routing.shapes import Shape
from moesim.routing.statistics import cv, gini, max_mean

Floats = NDArray[np.float64]

OWNER = "routing.popularity"
CV_PER_GINI = float(np.sqrt(np.pi))  # small noise of coefficient of variation c has Gini c/sqrt(pi) (normal law)


def statistic_of(measure: str, shape: Shape) -> Callable[[Floats], float]:
    """What is asked of inclusion_LE: the mean over layers of a statistic."""
    if measure == "share":
        hot_LE = shape.hot_LE
        assert hot_LE is not None, "only hot experts have a share"
        return lambda load_LE: float(
            ((load_LE * hot_LE[:, : load_LE.shape[1]]).sum(axis=1) / load_LE.sum(axis=1)).mean()
        )
    statistic = {"gini": gini, "cv": cv, "max_mean": max_mean}[measure]
    return lambda load_LE: float(statistic(load_LE).mean())


def tolerance_of(measure: str, wanted: float, gini_tolerance: float) -> float:
    """How near the statistic must come: absolute for a Gini or a share, in proportion for the others."""
    return gini_tolerance if measure in ("gini", "share") else 4.0 * gini_tolerance * wanted


def surrogate_skew(
    shape: Shape,
    share_D: Floats,
    statistic: Callable[[Floats], float],
    wanted: float,
    top_k: int,
    num_routed: int,
    most: float,
) -> float:
    """A first skew from the fluid limit: inclusion 1 - exp(-w t) with t such that a row sums to k; bisection."""

    def reached(skew: float) -> float:
        load_DLE = fluid_inclusion(shape.log_weights(skew), top_k)
        return statistic(np.tensordot(share_D, load_DLE, axes=1)[:, :num_routed])

    low, high = 0.0, most
    for _ in range(12):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if reached(middle) < wanted else (low, middle)
    return 0.5 * (low + high)


def fluid_inclusion(log_weights_xE: Floats, top_k: int) -> Floats:
    """1 - exp(-w t), t such that a row sums to top_k: what the race gives when there are many experts."""
    weights = np.exp(log_weights_xE - log_weights_xE.max(axis=-1, keepdims=True))
    weights *= top_k / weights.sum(axis=-1, keepdims=True)
    time = np.ones((*weights.shape[:-1], 1))
    left = np.exp(-weights * time)
    for _ in range(30):  # Newton on a concave rising function, from the left: converges without overshooting
        missing = top_k - (1.0 - left).sum(axis=-1, keepdims=True)
        time += missing / np.maximum((weights * left).sum(axis=-1, keepdims=True), 1e-12)
        left = np.exp(-weights * time)
        if float(missing.max()) < 1e-3 * top_k:
            break
    return 1.0 - left


def solve(
    reached_at: Callable[[float], float], measure: str, wanted: float, start: float, *, most: float, tolerance: float
) -> float:
    """Skew with reached_at(skew) = wanted: secant steps inside a bracket; InputError when no skew reaches it."""
    low, high, highest = 0.0, most, 0.0
    previous, skew = (0.0, 1.0 if measure == "max_mean" else 0.0), start
    for _ in range(40):
        reached = reached_at(skew)
        highest = max(highest, reached)
        if abs(reached - wanted) <= tolerance:
            return skew
        low, high = (skew, high) if reached < wanted else (low, skew)
        rise = reached - previous[1]
        step = skew + (wanted - reached) * (skew - previous[0]) / rise if rise else low
        previous = (skew, reached)
        skew = step if low < step < high else 0.5 * (low + high)
    rule = f"must not exceed about {highest:.3g}, the most that this router and number of experts reach"
    raise InputError(OWNER, measure, rule, wanted)
