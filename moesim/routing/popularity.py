"""How popular each expert of each layer is: weights that the router perturbs, and the load that follows from them.

Legend: L MoE layers, E experts, Z zero-compute experts, T pool tokens, K experts per token, D domains.

Inclusion is what a layer's expert expects from one token: the probability that the token uses it, after the router's
groups and top-k. Rows sum to k, less what reaches no expert. Plain routers have it in closed form or by quadrature
(``reach``); group-limited routers with unequal weights have it from a pool of drawn tokens, which also serves the
visits, so that load and traffic agree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.describe.model import Router
from moesim.describe.popularity import DomainMixture, HotExperts, Skewed, measure_of
from moesim.describe.workload import Balanced, Multinomial, Popularity, Recorded
from moesim.errors import check
from moesim.routing.reach import random_second_reach, reach_of_sets
from moesim.routing.routers import draw_expert_choice
from moesim.routing.sampler import Choices, draw_choices, perturbation_scale
from moesim.routing.shapes import Shape, normal_fields, shape_of, skew_of
from moesim.routing.solve import CV_PER_GINI, OWNER, solve, statistic_of, surrogate_skew, tolerance_of

Floats = NDArray[np.float64]

POOL_TOKENS = (
    8192  # drawn tokens per layer; the pool is then the layer's popularity, so its noise is a little extra skew
)
_POOL_TOKENS_MOST = 131072
_UNIFORM_POOL_TOKENS = 65536  # one pool serves all layers
_EXPERT_CHOICE_TOKENS = 2048  # every expert scores every token of a pool
_TRIAL_ASSIGNMENTS = 1_000_000  # drawn per trial skew, over all layers
_GINI_TOLERANCE = 0.001
_FIRST_MOST = 8.0  # largest skew that a first guess tries


@dataclass(frozen=True, kw_only=True, eq=False)
class DomainParts:
    """The domains of a mixture: share_D of all tokens, and each one's own weights and load."""

    names: tuple[str, ...]
    share_D: Floats
    log_weights_DLE: Floats
    inclusion_DLE: Floats
    run_tokens: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Popularities:
    """Selection weights and expected load of every MoE layer.

    log_weights_LE: what the router perturbs; inclusion_LE: expected assignments of one token to the expert (rows sum to
    top_k, each at most 1); sigma: spread of the log weights (for other kinds than the lognormal their skew: 0 means
    equal experts); pool_LTK: drawn tokens of routers without a closed form, one pool for all layers (L = 1) where
    weights are equal, None where visits have one. zero_log_weights_LZ, nowhere_L: the weights of zero-compute experts,
    and assignments of one token that reach no expert (rows of inclusion_LE then sum to top_k - nowhere). domains: of a
    mixture. repeat_L: probability that a token copies the first expert of the token before it; first_LE: how often
    each expert is a token's first.
    """

    router: Router
    log_weights_LE: Floats
    inclusion_LE: Floats
    sigma: float
    pool_LTK: Choices | None = None
    zero_log_weights_LZ: Floats | None = None
    nowhere_L: Floats | None = None
    domains: DomainParts | None = None
    repeat_L: Floats | None = None
    first_LE: Floats | None = None

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
    popularity: Popularity,
    *,
    num_layers: int,
    num_experts: int,
    router: Router,
    rng: np.random.Generator,
    step: int = 0,
) -> Popularities:
    """Draw the popularity of every expert of num_layers MoE layers at a step (which only drifting ones depend on).

    Balanced and Multinomial: equal weights, inclusion k/E. Others: one skew for all layers, solved so that the mean
    over layers of the Gini (or coefficient of variation, max/mean, hot share) of inclusion_LE is the one asked for.
    Recorded: as counted. Expert choice: even loads; the popularity is what token choice would make of the same scores.
    Raises InputError when the router cannot reach it (top-k of E experts cannot exceed a Gini of 1 - k/E, since no
    expert takes a token twice). docs/model.md#popularity.

    >>> from moesim.describe.workload import Lognormal
    >>> from moesim.routing.statistics import gini
    >>> drawn = popularity_LE(Lognormal(gini=0.25), num_layers=4, num_experts=64, router=Router(top_k=6),
    ...                       rng=np.random.default_rng(0))
    >>> round(float(gini(drawn.inclusion_LE).mean()), 3)
    0.25
    """
    check(step >= 0, OWNER, "step", "must be at least 0", step)
    if isinstance(popularity, Recorded):
        return _recorded(popularity, num_layers, num_experts, router, rng)
    if isinstance(popularity, Balanced | Multinomial) or num_layers == 0 or _is_equal(popularity):
        drawn = _uniform(num_layers, num_experts, router, rng)
    else:
        drawn = _skewed(popularity, num_layers, num_experts, router, rng, step)
    if isinstance(popularity, Balanced) or popularity.correlation.first_repeat is None:
        return drawn
    return _repeating(drawn, popularity.correlation.first_repeat)


def _recorded(
    popularity: Recorded, num_layers: int, num_experts: int, router: Router, rng: np.random.Generator
) -> Popularities:
    """A recording of these layers and experts. InputError for one of others."""
    from pathlib import Path

    from moesim.door.rows import TABLE_SUFFIXES
    from moesim.routing import histogram, recorded  # they stand on this module

    path = popularity.file
    if Path(path).suffix.lower() in TABLE_SUFFIXES:
        layers, load_LE = histogram.histogram_load(path, num_experts=num_experts)
        found = histogram.histogram_popularities(load_LE, router, owner=path)
    else:
        trace = recorded.read_recorded(path, num_experts=num_experts)
        layers, found = trace.layers, recorded.recorded_popularities(trace, router, rng=rng)
    check(len(layers) == num_layers, path, "layers", f"must be the model's {num_layers} MoE layers", len(layers))
    return found


def _is_equal(popularity: Skewed) -> bool:
    measure, value = measure_of(popularity)
    own_weights = isinstance(popularity, DomainMixture) or getattr(popularity, "span", None) is not None
    return value == (1.0 if measure == "max_mean" else 0.0) and not own_weights


def _is_limited(router: Router) -> bool:
    return router.top_groups < router.num_groups


def _uniform(num_layers: int, num_experts: int, router: Router, rng: np.random.Generator) -> Popularities:
    pool_LTK = None
    if _is_limited(router):
        pool_LTK = draw_choices(np.zeros(num_experts), router, _UNIFORM_POOL_TOKENS, rng)[None]
    elif router.choice == "expert_choice":
        pool_LTK = draw_expert_choice(np.zeros(num_experts), router, _EXPERT_CHOICE_TOKENS, rng)[None]
    weights_LE = np.zeros((num_layers, num_experts + router.num_zero_experts))
    if router.choice == "random_second":
        inclusion_LE = _plain_inclusion(weights_LE, router)
    else:
        inclusion_LE = np.full(weights_LE.shape, router.top_k / weights_LE.shape[1])
    return _assembled(router, weights_LE[None], inclusion_LE[None], np.ones(1), 0.0, pool_LTK)


def _skewed(
    popularity: Skewed, num_layers: int, num_experts: int, router: Router, rng: np.random.Generator, step: int
) -> Popularities:
    _check_reachable(popularity, num_experts, router)
    normal_DLE = normal_fields(popularity, num_layers, num_experts + router.num_zero_experts, rng, step)
    shape = shape_of(popularity, normal_DLE, num_experts)
    share_D = np.ones(1)
    if isinstance(popularity, DomainMixture):
        share_D = np.array([domain.share for domain in popularity.domains])
        share_D /= share_D.sum()
    if _is_limited(router):
        skew, pool_LTK, inclusion_DLE = _solve_limited(popularity, shape, share_D, router, num_layers, num_experts, rng)
    else:
        chooser = dataclasses.replace(router, choice="top_k") if router.choice == "expert_choice" else router
        skew = _solve_plain(popularity, shape, share_D, chooser, num_experts)
        inclusion_DLE, pool_LTK = _plain_inclusion(shape.log_weights(skew), router), None
        if router.choice == "expert_choice":
            inclusion_DLE = np.full(inclusion_DLE.shape, router.top_k / num_experts)
            mixed_LE = np.tensordot(share_D, shape.log_weights(skew), axes=1)
            pool_LTK = _stacked(
                [draw_expert_choice(weights_E, router, _EXPERT_CHOICE_TOKENS, rng) for weights_E in mixed_LE]
            )
    drawn = _assembled(router, shape.log_weights(skew), inclusion_DLE, share_D, skew, pool_LTK)
    if not isinstance(popularity, DomainMixture):
        return drawn
    parts = DomainParts(
        names=tuple(domain.name for domain in popularity.domains),
        share_D=share_D,
        log_weights_DLE=shape.log_weights(skew),
        inclusion_DLE=inclusion_DLE[:, :, :num_experts],
        run_tokens=popularity.run_tokens,
    )
    return dataclasses.replace(drawn, domains=parts)


def _check_reachable(popularity: Skewed, num_experts: int, router: Router) -> None:
    """Refuse at once what top-k without repetition can never reach."""
    measure, wanted = measure_of(popularity)
    top_k = router.top_k
    bounds = {
        "gini": (1.0 - top_k / num_experts, "1 - k/E"),
        "cv": (np.sqrt(num_experts / top_k - 1.0) if top_k < num_experts else 0.0, "sqrt(E/k - 1)"),
        "max_mean": (num_experts / top_k, "E/k"),
    }
    if isinstance(popularity, HotExperts):
        rule = f"must be below num_experts={num_experts}"
        check(popularity.num_hot < num_experts, OWNER, "num_hot", rule, popularity.num_hot)
        bounds["share"] = (popularity.num_hot / top_k, "num_hot/k")
    if measure in bounds and router.num_zero_experts == 0:
        most, formula = bounds[measure]
        reason = f"must stay below {formula} = {most:.3g} (top-{top_k} of {num_experts} experts)"
        check(wanted < most, OWNER, measure, reason, wanted)


def _plain_inclusion(log_weights_xLE: Floats, router: Router) -> Floats:
    """Inclusion of a router without groups, exact; leading axes are kept, rows sum to top_k (less fallen seconds)."""
    num_experts = log_weights_xLE.shape[-1]
    flat_LE = log_weights_xLE.reshape(-1, num_experts) / perturbation_scale(router)
    single_E = np.arange(num_experts)
    if router.choice == "random_second":
        return random_second_reach(flat_LE, single_E, num_sets=num_experts).reshape(log_weights_xLE.shape)
    inclusion_LE = reach_of_sets(flat_LE, single_E, top_k=router.top_k, num_sets=num_experts)
    inclusion_LE *= router.top_k / inclusion_LE.sum(axis=1, keepdims=True)
    return np.minimum(inclusion_LE, 1.0).reshape(log_weights_xLE.shape)


def _solve_plain(popularity: Skewed, shape: Shape, share_D: Floats, router: Router, num_experts: int) -> float:
    given = skew_of(popularity)
    if given is not None:
        return given
    measure, wanted = measure_of(popularity)
    statistic = statistic_of(measure, shape)

    def reached(skew: float) -> float:
        mixed_LE = np.tensordot(share_D, _plain_inclusion(shape.log_weights(skew), router), axes=1)
        return statistic(mixed_LE[:, :num_experts])

    start = _first_skew(popularity, shape, share_D, router, num_experts, statistic)
    tolerance = tolerance_of(measure, wanted, _GINI_TOLERANCE / 10)
    return solve(reached, measure, wanted, start, most=shape.most, tolerance=tolerance)


def _first_skew(
    popularity: Skewed,
    shape: Shape,
    share_D: Floats,
    router: Router,
    num_experts: int,
    statistic: Callable[[Floats], float],
) -> float:
    most = shape.most if popularity.kind in ("dirichlet", "hot_experts") else _FIRST_MOST
    wanted = measure_of(popularity)[1]
    return surrogate_skew(shape, share_D, statistic, wanted, router.top_k, num_experts, most)


def _solve_limited(
    popularity: Skewed,
    shape: Shape,
    share_D: Floats,
    router: Router,
    num_layers: int,
    num_experts: int,
    rng: np.random.Generator,
) -> tuple[float, Choices, Floats]:
    """(skew, pool_LTK, inclusion_DLE): trial pools with common random numbers find the skew, then the pool is drawn.

    Gini and coefficient of variation are solved on small pools with their noise taken out; the others, whose noise has
    no such law, on pools of the final size and seed.
    """
    measure, wanted = measure_of(popularity)
    num_tokens = _pool_size(measure, wanted, num_experts, router.top_k)
    trial_seed = int(rng.integers(2**63))
    given = skew_of(popularity)
    if given is not None:
        return (given, *_draw_pools(shape.log_weights(given), share_D, router, num_tokens, rng))
    statistic = statistic_of(measure, shape)
    has_square_noise = measure in ("gini", "cv")
    trial_tokens = num_tokens
    if has_square_noise:
        trial_tokens = int(np.clip(_TRIAL_ASSIGNMENTS // (num_layers * router.top_k), 512, num_tokens)) // 2 * 2

    def reached(skew: float) -> float:
        trial_rng = np.random.default_rng(trial_seed)
        pool_LTK, _ = _draw_pools(shape.log_weights(skew), share_D, router, trial_tokens, trial_rng)
        whole = statistic(_inclusion(pool_LTK, num_experts))
        if not has_square_noise:
            return whole
        halves = (pool_LTK[:, ::2], pool_LTK[:, 1::2])  # both hold every domain
        half = float(np.mean([statistic(_inclusion(part, num_experts)) for part in halves]))
        # Spread and sampling noise add in squares, noise as c/tokens: two sizes give c, and the Gini of num_tokens.
        noise = (half**2 - whole**2) * trial_tokens
        return float(np.sqrt(max(whole**2 - noise / trial_tokens + noise / num_tokens, 0.0)))

    start = _first_skew(popularity, shape, share_D, router, num_experts, statistic)
    tolerance = tolerance_of(measure, wanted, _GINI_TOLERANCE)
    skew = solve(reached, measure, wanted, start, most=shape.most, tolerance=tolerance)
    final_rng = rng if has_square_noise else np.random.default_rng(trial_seed)
    return (skew, *_draw_pools(shape.log_weights(skew), share_D, router, num_tokens, final_rng))


def _pool_size(measure: str, wanted: float, num_experts: int, top_k: int) -> int:
    """Tokens per layer that keep the pool's noise at half the wanted spread, or InputError when too many."""
    if measure not in ("gini", "cv"):
        return POOL_TOKENS
    per_cv = 1.0 / CV_PER_GINI if measure == "gini" else 1.0
    wanted_noise_cv = 0.5 * wanted / per_cv
    needed = num_experts / top_k / wanted_noise_cv**2
    least = 2 * per_cv * np.sqrt(num_experts / top_k / _POOL_TOKENS_MOST)
    rule = f"must be 0 or at least {least:.2g} for a group-limited router of {num_experts} experts"
    check(needed <= _POOL_TOKENS_MOST, OWNER, measure, rule, wanted, "kind: multinomial has equal experts.")
    return max(POOL_TOKENS, int(np.ceil(needed / 2)) * 2)


def _draw_pools(
    log_weights_DLE: Floats, share_D: Floats, router: Router, num_tokens: int, rng: np.random.Generator
) -> tuple[Choices, Floats]:
    """(pool_LTK, inclusion_DLE): tokens of all domains, each as many as its share, and each domain's own load."""
    num_experts = log_weights_DLE.shape[-1]
    ends_D = np.rint(np.cumsum(share_D) * num_tokens).astype(int)
    sizes_D = np.maximum(np.diff(ends_D, prepend=0), 1)
    pools = [
        np.stack([draw_choices(log_weights_E, router, int(size), rng) for log_weights_E in log_weights_LE])
        for log_weights_LE, size in zip(log_weights_DLE, sizes_D, strict=True)
    ]
    inclusion_DLE = np.stack([_inclusion(pool_LTK, num_experts) for pool_LTK in pools])
    return np.concatenate(pools, axis=1), inclusion_DLE


def _inclusion(pool_LTK: Choices, num_experts: int) -> Floats:
    counts_LE = np.stack([np.bincount(pool_TK[pool_TK >= 0], minlength=num_experts) for pool_TK in pool_LTK])
    return counts_LE / pool_LTK.shape[1]


def _stacked(pools: list[Choices]) -> Choices:
    """Pools of unequal width as one, missing choices -1."""
    width = max(pool_TK.shape[1] for pool_TK in pools)
    padded = [np.pad(p, ((0, 0), (0, width - p.shape[1])), constant_values=-1) for p in pools]
    return np.stack(padded).astype(np.int16)


def _assembled(
    router: Router,
    log_weights_DLE: Floats,
    inclusion_DLE: Floats,
    share_D: Floats,
    skew: float,
    pool_LTK: Choices | None,
) -> Popularities:
    """Popularities of the mixture; zero-compute experts, the last ones, are kept apart."""
    inclusion_LE = np.tensordot(share_D, inclusion_DLE, axes=1)
    # A mixture's own weights: those whose first choices are the mixture's.
    log_weights_LE = log_weights_DLE[0]
    if share_D.size > 1:
        shares_DLE = np.exp(log_weights_DLE - log_weights_DLE.max(axis=-1, keepdims=True))
        shares_DLE /= shares_DLE.sum(axis=-1, keepdims=True)
        log_weights_LE = np.log(np.tensordot(share_D, shares_DLE, axes=1))
    routed = inclusion_LE.shape[1] - router.num_zero_experts
    nowhere_L = None
    if router.num_zero_experts or router.choice == "random_second":
        nowhere_L = router.top_k - inclusion_LE[:, :routed].sum(axis=1)
    return Popularities(
        router=router,
        log_weights_LE=log_weights_LE[:, :routed],
        inclusion_LE=inclusion_LE[:, :routed],
        sigma=skew,
        pool_LTK=pool_LTK,
        zero_log_weights_LZ=log_weights_LE[:, routed:] if router.num_zero_experts else None,
        nowhere_L=nowhere_L,
    )


def _repeating(drawn: Popularities, first_repeat: float) -> Popularities:
    """Add how often a token copies its predecessor's first expert so that first experts repeat as often as asked.

    Copying with probability c repeats with c + (1 - c) S, S = sum of squared first-choice shares (chance). What a token
    chooses is not changed by it, only what its neighbour does.
    """
    place = f"{OWNER}.correlation"
    is_token_choice = drawn.router.choice != "expert_choice"
    check(is_token_choice, place, "first_repeat", "has no meaning where experts choose tokens", first_repeat)
    first_LE = first_shares(drawn)
    chance_L = (first_LE**2).sum(axis=1)
    chance = float(chance_L.mean()) if chance_L.size else 0.0
    rule = f"must be at least {chance:.3g}, what independent tokens repeat with this popularity"
    check(first_repeat >= chance - 1e-9, place, "first_repeat", rule, first_repeat)
    repeat_L = np.clip((first_repeat - chance_L) / (1.0 - chance_L), 0.0, None)
    return dataclasses.replace(drawn, repeat_L=repeat_L, first_LE=first_LE)


def first_shares(drawn: Popularities) -> Floats:
    """(L, E) how often each expert is a token's first choice; rows sum to 1 (less zero-compute experts)."""
    if drawn.pool_LTK is not None and not drawn.is_uniform:
        counts = [np.bincount(pool_TK[:, 0], minlength=drawn.num_experts) for pool_TK in drawn.pool_LTK]
        return np.stack(counts) / drawn.pool_LTK.shape[1]
    scale = perturbation_scale(drawn.router)
    log_weights_LE = drawn.log_weights_LE / scale
    if drawn.zero_log_weights_LZ is not None:
        log_weights_LE = np.concatenate([log_weights_LE, drawn.zero_log_weights_LZ / scale], axis=1)
    shares_LE = np.exp(log_weights_LE - log_weights_LE.max(axis=1, keepdims=True))
    shares_LE /= shares_LE.sum(axis=1, keepdims=True)
    return shares_LE[:, : drawn.num_experts]
