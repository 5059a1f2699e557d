"""From normal variables to log popularity: every kind of popularity is a monotone map of one field of normals.

Legend: F fields, L layers, E experts, D domains.

So correlation between layers, drift over steps and overlap of domains are made once, on the normals (a Gaussian
copula), and every kind has them. Drift is the stationary Ornstein-Uhlenbeck walk z(t+n) = r**n z(t) + sqrt(1 - r**2n)
noise, r = exp(-1/drift_steps), whose law at any step is the normal's: skew stays as asked while favourites change.
Uhlenbeck, Ornstein: On the theory of the Brownian motion, Phys. Rev. 36 (1930).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.describe.popularity import DomainMixture, HotExperts, PowerLaw, Skewed

Floats = NDArray[np.float64]
Draw = Callable[[np.random.Generator], Floats]

_QUANTILE_KNOTS = 4096
_LEAST_LOG = -500.0  # an expert this much rarer than the most popular one is never chosen


@dataclass(frozen=True, kw_only=True, eq=False)
class Shape:
    """log_weights(skew) is (D, L, E), D = 1 without domains; skew 0 makes all experts equal, most is the largest tried.

    hot_LE: which experts are the hot ones, for kinds that have any.
    """

    log_weights: Callable[[float], Floats]
    most: float
    hot_LE: NDArray[np.bool_] | None = None


def normal_fields(
    popularity: Skewed, num_layers: int, num_experts: int, rng: np.random.Generator, step: int = 0
) -> Floats:
    """normal_DLE: standard normals of every domain at a step, correlated as the popularity says.

    Any two layers correlate by ``correlation.layers``, a step and one n later by exp(-n/drift_steps), two domains by
    ``overlap``. Step 0 does not depend on whether there is drift; the walk to a late step costs its logarithm.
    """
    num_domains = len(popularity.domains) if isinstance(popularity, DomainMixture) else 1
    num_fields = num_domains + 1 if num_domains > 1 else 1
    shared = popularity.correlation.layers

    def draw(rng: np.random.Generator) -> Floats:
        own_FLE = rng.standard_normal((num_fields, num_layers, num_experts))
        if shared == 0.0:
            return own_FLE
        common_F1E = rng.standard_normal((num_fields, 1, num_experts))
        return math.sqrt(shared) * common_F1E + math.sqrt(1.0 - shared) * own_FLE

    normal_FLE = draw(rng)
    if popularity.correlation.drift_steps is not None:
        seed = int(rng.integers(2**63))
        normal_FLE = drifted(normal_FLE, step, popularity.correlation.drift_steps, seed, draw)
    if not isinstance(popularity, DomainMixture) or num_domains == 1:
        return normal_FLE
    overlap = popularity.overlap
    return math.sqrt(overlap) * normal_FLE[-1] + math.sqrt(1.0 - overlap) * normal_FLE[:-1]


def drifted(start: Floats, step: int, drift_steps: float, seed: int, draw: Draw) -> Floats:
    """Where the walk from start is at a step; draw(rng) makes one set of standard normals.

    Every position has noise of its own, so any two steps are jointly right whatever else is asked: forward to the next
    power of two, then by bisection with the walk's bridge.

    >>> zero = np.zeros(100_000)
    >>> walk = drifted(zero, 3, 3.0, 0, lambda rng: rng.standard_normal(100_000))
    >>> abs(float(walk.var()) - (1 - np.exp(-2.0))) < 0.02
    True
    """
    assert step >= 0, "steps count from 0"

    def noise(position: int) -> Floats:
        return draw(np.random.default_rng(np.random.SeedSequence(entropy=seed, spawn_key=(position,))))

    def kept(steps: int) -> float:
        return math.exp(-steps / drift_steps)

    def lost(steps: int) -> float:  # 1 - kept**2
        return -math.expm1(-2.0 * steps / drift_steps)

    left, right, before, after = 0, 0, start, start
    while right < step:
        left, before, right = right, after, max(2 * right, 1)
        after = kept(right - left) * before + math.sqrt(lost(right - left)) * noise(right)
    while step not in (left, right):
        middle = (left + right) // 2
        to_middle, from_middle, whole = middle - left, right - middle, lost(right - left)
        mean = kept(to_middle) * lost(from_middle) * before + kept(from_middle) * lost(to_middle) * after
        inside = mean / whole + math.sqrt(lost(to_middle) * lost(from_middle) / whole) * noise(middle)
        if middle <= step:
            left, before = middle, inside
        else:
            right, after = middle, inside
    return before if step == left else after


def shape_of(popularity: Skewed, normal_DLE: Floats, num_routed: int) -> Shape:
    """The kind's log weights as a function of its skew; only the first num_routed experts can be hot ones."""
    if popularity.kind in ("lognormal", "domains"):
        return Shape(log_weights=lambda skew: skew * normal_DLE, most=30.0)
    if popularity.kind == "zipf":
        order = np.argsort(-normal_DLE, axis=-1)
        rank_DLE = np.empty(normal_DLE.shape)
        np.put_along_axis(rank_DLE, order, np.arange(1.0, normal_DLE.shape[-1] + 1.0)[None, None], axis=-1)
        return Shape(log_weights=lambda skew: -skew * np.log(rank_DLE), most=50.0)
    if isinstance(popularity, PowerLaw):
        exceeded_DLE = 1.0 - _normal_cdf(normal_DLE)
        if popularity.span is not None and popularity.exponent is not None:
            cut_DLE = _cut_power_law(exceeded_DLE, popularity.exponent, popularity.span)
            return Shape(log_weights=lambda _: cut_DLE, most=1.0)
        return Shape(log_weights=lambda skew: -skew * np.log(exceeded_DLE), most=30.0)
    if isinstance(popularity, HotExperts):
        hot_LE = _hot_experts(popularity, normal_DLE[0], num_routed)
        return Shape(log_weights=lambda skew: skew * hot_LE[None].astype(float), most=60.0, hot_LE=hot_LE)
    assert popularity.kind == "dirichlet"
    below_DLE = _normal_cdf(normal_DLE)
    return Shape(log_weights=lambda skew: _log_gamma_quantile(below_DLE, skew), most=1000.0)


def skew_of(popularity: Skewed) -> float | None:
    """The skew that the law's own parameter stands for; None where a statistic of the load is given instead."""
    if popularity.kind in ("lognormal", "domains"):
        return popularity.sigma
    if popularity.kind == "zipf":
        return popularity.exponent
    if popularity.kind == "dirichlet":
        return None if popularity.concentration is None else 1.0 / popularity.concentration
    if isinstance(popularity, PowerLaw) and popularity.exponent is not None:
        return 1.0 if popularity.span is not None else 1.0 / (popularity.exponent - 1.0)
    return None


def _hot_experts(popularity: HotExperts, normal_LE: Floats, num_routed: int) -> NDArray[np.bool_]:
    hot_LE = np.zeros(normal_LE.shape, dtype=bool)
    if popularity.place == "first":
        hot_LE[:, : popularity.num_hot] = True
    else:
        hottest = np.argsort(-normal_LE[:, :num_routed], axis=-1)[:, : popularity.num_hot]
        np.put_along_axis(hot_LE, hottest, True, axis=-1)
    return hot_LE


def _normal_cdf(normal: Floats) -> Floats:
    """P(Z < z), kept off 0 and 1 so that quantiles stay finite."""
    twice = np.vectorize(math.erfc, otypes=[np.float64])(-normal / math.sqrt(2.0))
    return np.clip(0.5 * twice, 1e-300, 1.0 - 1e-16)


def _cut_power_law(exceeded: Floats, exponent: float, span: float) -> Floats:
    """Log weights of density w**-exponent on 1..span, by its quantile function."""
    steepness = 1.0 - exponent
    below = 1.0 - exceeded
    if abs(steepness) < 1e-9:
        return below * math.log(span)
    return np.log1p(below * math.expm1(steepness * math.log(span))) / steepness


def _log_gamma_quantile(below: Floats, skew: float) -> Floats:
    """Log of the gamma law's quantiles, shape 1/skew: normalised, such variables are a Dirichlet draw.

    The density of y = log x is exp(a y - e**y)/Gamma(a): summed on a grid, and x**a/Gamma(a + 1) below the grid.
    """
    if skew <= 1e-9:
        return np.zeros_like(below)
    shape = 1.0 / skew
    low = max(math.log(1e-6), math.log(shape) - 40.0 / math.sqrt(shape))
    high = math.log(shape + 12.0 * math.sqrt(shape) + 40.0)
    grid_Q = np.linspace(low, high, _QUANTILE_KNOTS)
    density_Q = np.exp(shape * grid_Q - np.exp(grid_Q) - math.lgamma(shape))
    rise_Q = 0.5 * (density_Q[1:] + density_Q[:-1]) * (grid_Q[1] - grid_Q[0])
    under = math.exp(min(shape * low - math.lgamma(shape + 1.0), 0.0))
    cdf_Q = under + np.concatenate([[0.0], np.cumsum(rise_Q)])
    inside = np.interp(below * cdf_Q[-1], cdf_Q, grid_Q)
    tail = (np.log(below * cdf_Q[-1]) + math.lgamma(shape + 1.0)) / shape
    log_weights = np.where(below * cdf_Q[-1] < under, np.minimum(tail, low), inside)
    return np.maximum(log_weights, log_weights.max(axis=-1, keepdims=True) + _LEAST_LOG)
