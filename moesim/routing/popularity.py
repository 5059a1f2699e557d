"""How popular each expert of each layer is: weights that the router perturbs, and the load that follows from them.

Legend: L MoE layers, E experts, T pool tokens, K experts per token.

Inclusion is what a layer's expert expects from one token: the probability that the token uses it, after the router's
groups and top-k. Rows sum to k. Plain routers have it in closed form or by quadrature (``reach``); group-limited
routers with unequal weights have it from a pool of drawn tokens, which also serves the visits, so that load and
traffic agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.describe.model import Router
from moesim.describe.workload import Balanced, Lognormal, Multinomial, Popularity
from moesim.errors import InputError, check
from moesim.routing.reach import reach_of_sets
from moesim.routing.sampler import Choices, draw_choices
from moesim.routing.statistics import gini

Floats = NDArray[np.float64]

POOL_TOKENS = (
    8192  # drawn tokens per layer; the pool is then the layer's popularity, so its noise is a little extra skew
)
_POOL_TOKENS_MOST = 131072
_UNIFORM_POOL_TOKENS = 65536  # one pool serves all layers
_TRIAL_ASSIGNMENTS = 1_000_000  # drawn per trial sigma, over all layers
_GINI_TOLERANCE = 0.001
_SIGMA_MOST = 30.0
_GINI_PER_CV = 1 / np.sqrt(np.pi)  # small noise of coefficient of variation c has Gini c/sqrt(pi) (normal law)


@dataclass(frozen=True, kw_only=True, eq=False)
class Popularities:
    """Selection weights and expected load of every MoE layer.

    log_weights_LE: what the router perturbs; inclusion_LE: expected assignments of one token to the expert (rows sum to
    top_k, each at most 1); sigma: spread of the log weights; pool_LTK: drawn tokens of group-limited routers, one pool
    for all layers (L = 1) where weights are equal, None where visits have a closed form.
    """

    router: Router
    log_weights_LE: Floats
    inclusion_LE: Floats
    sigma: float
    pool_LTK: Choices | None = None

    @property
    def num_layers(self) -> int:
        return int(self.inclusion_LE.shape[0])

    @property
    def num_experts(self) -> int:
        return int(self.inclusion_LE.shape[1])

    @property
    def is_uniform(self) -> bool:
        return self.sigma == 0.0


def popularity_LE(
    popularity: Popularity, *, num_layers: int, num_experts: int, router: Router, rng: np.random.Generator
) -> Popularities:
    """Draw the popularity of every expert of num_layers MoE layers, each layer on its own.

    Balanced and Multinomial: equal weights, inclusion k/E. Lognormal: one sigma for all layers, solved so that the mean
    over layers of the Gini of inclusion_LE is the one asked for. Raises InputError when the router cannot reach it
    (top-k of E experts cannot exceed a Gini of 1 - k/E, since no expert takes a token twice).
    docs/model.md#popularity.

    >>> drawn = popularity_LE(Lognormal(gini=0.25), num_layers=4, num_experts=64, router=Router(top_k=6),
    ...                       rng=np.random.default_rng(0))
    >>> round(float(gini(drawn.inclusion_LE).mean()), 3)
    0.25
    """
    if isinstance(popularity, Balanced | Multinomial) or popularity.gini == 0.0:
        return _uniform(num_layers, num_experts, router, rng)
    if num_layers == 0:
        return _uniform(0, num_experts, router, rng)
    return _lognormal(popularity, num_layers, num_experts, router, rng)


def _is_limited(router: Router) -> bool:
    return router.top_groups < router.num_groups


def _uniform(num_layers: int, num_experts: int, router: Router, rng: np.random.Generator) -> Popularities:
    pool_LTK = None
    if _is_limited(router):
        pool_LTK = draw_choices(np.zeros(num_experts), router, _UNIFORM_POOL_TOKENS, rng)[None]
    return Popularities(
        router=router,
        log_weights_LE=np.zeros((num_layers, num_experts)),
        inclusion_LE=np.full((num_layers, num_experts), router.top_k / num_experts),
        sigma=0.0,
        pool_LTK=pool_LTK,
    )


def _lognormal(
    wanted: Lognormal, num_layers: int, num_experts: int, router: Router, rng: np.random.Generator
) -> Popularities:
    top_k = router.top_k
    most = 1.0 - top_k / num_experts
    reason = f"must stay below 1 - k/E = {most:.3g} (top-{top_k} of {num_experts} experts)"
    check(wanted.gini < most, "routing.popularity", "gini", reason, wanted.gini)
    normal_LE = rng.standard_normal((num_layers, num_experts))
    if _is_limited(router):
        return _lognormal_limited(wanted.gini, normal_LE, router, rng)

    def inclusion_at(sigma: float) -> Floats:
        return reach_of_sets(sigma * normal_LE, np.arange(num_experts), top_k=top_k, num_sets=num_experts)

    start = _surrogate_sigma(wanted.gini, normal_LE, top_k)
    sigma = _solve(
        lambda trial: float(gini(inclusion_at(trial)).mean()), wanted.gini, start, tolerance=_GINI_TOLERANCE / 10
    )
    inclusion_LE = inclusion_at(sigma)
    inclusion_LE *= top_k / inclusion_LE.sum(axis=1, keepdims=True)
    return Popularities(
        router=router, log_weights_LE=sigma * normal_LE, inclusion_LE=np.minimum(inclusion_LE, 1.0), sigma=sigma
    )


def _lognormal_limited(wanted_gini: float, normal_LE: Floats, router: Router, rng: np.random.Generator) -> Popularities:
    """Group-limited: trial pools with common random numbers find sigma, a larger pool then is the popularity."""
    num_layers, num_experts = normal_LE.shape
    num_tokens = _pool_size(wanted_gini, num_experts, router.top_k)
    trial_tokens = int(np.clip(_TRIAL_ASSIGNMENTS // (num_layers * router.top_k), 512, num_tokens)) // 2 * 2
    trial_seed = int(rng.integers(2**63))

    def gini_at(sigma: float) -> float:
        pool_LTK = _draw_pool(sigma * normal_LE, router, trial_tokens, np.random.default_rng(trial_seed))
        whole = float(gini(_inclusion(pool_LTK, num_experts)).mean())
        halves = np.split(pool_LTK, 2, axis=1)
        half = float(np.mean([gini(_inclusion(part, num_experts)).mean() for part in halves]))
        # Spread and sampling noise add in squares, noise as c/tokens: two sizes give c, and the Gini of num_tokens.
        noise = (half**2 - whole**2) * trial_tokens
        return float(np.sqrt(max(whole**2 - noise / trial_tokens + noise / num_tokens, 0.0)))

    start = _surrogate_sigma(wanted_gini, normal_LE, router.top_k)
    sigma = _solve(gini_at, wanted_gini, start, tolerance=_GINI_TOLERANCE)
    pool_LTK = _draw_pool(sigma * normal_LE, router, num_tokens, rng)
    inclusion_LE = _inclusion(pool_LTK, num_experts)
    return Popularities(
        router=router, log_weights_LE=sigma * normal_LE, inclusion_LE=inclusion_LE, sigma=sigma, pool_LTK=pool_LTK
    )


def _pool_size(wanted_gini: float, num_experts: int, top_k: int) -> int:
    """Tokens per layer that keep the pool's noise at half the wanted spread, or InputError when too many."""
    wanted_noise_cv = 0.5 * wanted_gini / _GINI_PER_CV
    needed = num_experts / top_k / wanted_noise_cv**2
    least = 2 * _GINI_PER_CV * np.sqrt(num_experts / top_k / _POOL_TOKENS_MOST)
    rule = f"must be 0 or at least {least:.2g} for a group-limited router of {num_experts} experts"
    check(
        needed <= _POOL_TOKENS_MOST,
        "routing.popularity",
        "gini",
        rule,
        wanted_gini,
        "kind: multinomial has equal experts.",
    )
    return max(POOL_TOKENS, int(np.ceil(needed / 2)) * 2)


def _draw_pool(log_weights_LE: Floats, router: Router, num_tokens: int, rng: np.random.Generator) -> Choices:
    return np.stack([draw_choices(log_weights_E, router, num_tokens, rng) for log_weights_E in log_weights_LE])


def _inclusion(pool_LTK: Choices, num_experts: int) -> Floats:
    counts_LE = np.stack([np.bincount(pool_TK.ravel(), minlength=num_experts) for pool_TK in pool_LTK])
    return counts_LE / pool_LTK.shape[1]


def _surrogate_sigma(wanted_gini: float, normal_LE: Floats, top_k: int) -> float:
    """A first sigma from the fluid limit: inclusion 1 - exp(-w t) with t such that a row sums to k; bisection."""

    def gini_at(sigma: float) -> float:
        weights_LE = np.exp(sigma * (normal_LE - normal_LE.max(axis=1, keepdims=True)))
        weights_LE *= top_k / weights_LE.sum(axis=1, keepdims=True)
        time_L1 = np.ones((normal_LE.shape[0], 1))
        for _ in range(30):  # Newton on a concave rising function, from the left: converges without overshooting
            left_LE = np.exp(-weights_LE * time_L1)
            missing_L1 = top_k - (1.0 - left_LE).sum(axis=1, keepdims=True)
            time_L1 += missing_L1 / np.maximum((weights_LE * left_LE).sum(axis=1, keepdims=True), 1e-12)
            if float(missing_L1.max()) < 1e-3 * top_k:
                break
        return float(gini(1.0 - np.exp(-weights_LE * time_L1)).mean())

    low, high = 0.0, 8.0
    for _ in range(12):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if gini_at(middle) < wanted_gini else (low, middle)
    return 0.5 * (low + high)


def _solve(gini_at: Callable[[float], float], wanted: float, start: float, *, tolerance: float) -> float:
    """Sigma with gini_at(sigma) = wanted: secant steps inside a bracket; InputError when no sigma reaches it."""
    low, high, highest = 0.0, _SIGMA_MOST, 0.0
    previous, sigma = (0.0, 0.0), start
    for _ in range(30):
        reached = gini_at(sigma)
        highest = max(highest, reached)
        if abs(reached - wanted) <= tolerance:
            return sigma
        low, high = (sigma, high) if reached < wanted else (low, sigma)
        rise = reached - previous[1]
        step = sigma + (wanted - reached) * (sigma - previous[0]) / rise if rise else low
        previous = (sigma, reached)
        sigma = step if low < step < high else 0.5 * (low + high)
    rule = f"must not exceed about {highest:.3g}, the most that this router and number of experts reach"
    raise InputError("routing.popularity", "gini", rule, wanted)
