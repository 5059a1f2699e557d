"""What skew costs: drops against capacity, step time and memory against skew, memory over many steps.

Legend: L MoE layers, E experts, S steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moesim.describe.workload import Balanced, Recorded
from moesim.errors import InputError, check
from moesim.metrics.step import StepResult
from moesim.metrics.summary import memory_by_stage
from moesim.routing.popularity import Popularities, popularity_LE
from moesim.routing.statistics import gini
from moesim.scenario import Scenario
from moesim.seeds import stream
from moesim.study.drops import DropPoint, drop_point
from moesim.study.routed import redrawn, routed_base
from moesim.study.simulate import simulate
from moesim.study.sizes import CAPACITY_FACTORS
from moesim.timeline.load import StepLoad

Floats = NDArray[np.float64]
Progress = Callable[[str], None]
Redraw = Literal["counts", "favourites", "drift"]
GINIS = (0.1, 0.25, 0.4, 0.6)  # real text lies in 0.10 to 0.38
STEP_FACTORS = (1.0, 1.25, 1.5, 2.0, None)
_EULER = 0.5772156649015329


@dataclass(frozen=True, kw_only=True)
class DropCurve:
    """Drops and padding over capacity factors under one skew; gini is that of the load."""

    gini: float
    asked: bool  # the scenario's own popularity, or the recording
    points: tuple[DropPoint, ...]


@dataclass(frozen=True, kw_only=True)
class CostPoint:
    """One simulated step at a skew and a capacity factor (None: nothing is dropped)."""

    popularity: str
    gini: float  # of the realised load
    capacity_factor: float | None
    step_s: float
    tokens_per_s_per_gpu: float
    wait_s: float
    drop_fraction: float
    max_mean: float
    peak_bytes: float
    headroom_bytes: float


@dataclass(frozen=True, kw_only=True)
class MemoryOverSteps:
    """Peak memory of the fullest GPU in each of S steps [bytes], and what a GPU holds.

    redraw: what differs between steps. The chance beyond what was sampled is read off a Gumbel law with the samples'
    mean and variance: each sample is the largest of many ranks, micro-batches and layers.
    """

    redraw: Redraw
    peak_bytes_S: tuple[float, ...]
    capacity_bytes: float

    @property
    def p50_bytes(self) -> float:
        return float(np.quantile(self.peak_bytes_S, 0.5))

    @property
    def p90_bytes(self) -> float:
        return float(np.quantile(self.peak_bytes_S, 0.9))

    @property
    def p99_bytes(self) -> float:
        """The peak that 99 of 100 steps stay under: the fitted law's, or the samples' where that is higher."""
        place, scale = self._gumbel
        return max(place - scale * math.log(-math.log(0.99)), float(np.quantile(self.peak_bytes_S, 0.99)))

    @property
    def out_of_memory_fraction(self) -> float:
        """Probability that a step needs more than a GPU holds."""
        place, scale = self._gumbel
        if scale == 0.0:
            return float(place > self.capacity_bytes)
        # Far above capacity exp overflows to inf, which is certainty.
        exponent = min((place - self.capacity_bytes) / scale, 700.0)
        return -math.expm1(-math.exp(exponent))

    @property
    def fits_at_p99(self) -> bool:
        return self.p99_bytes <= self.capacity_bytes

    @property
    def _gumbel(self) -> tuple[float, float]:
        """(mode, scale) of the Gumbel law with the samples' mean and variance."""
        peaks_S = np.array(self.peak_bytes_S)
        scale = float(peaks_S.std(ddof=1)) * math.sqrt(6.0) / math.pi if peaks_S.size > 1 else 0.0
        return float(peaks_S.mean()) - _EULER * scale, scale

    def to_dict(self) -> dict[str, object]:
        """Plain values: the samples and what follows from them."""
        names = ("p50_bytes", "p90_bytes", "p99_bytes", "out_of_memory_fraction", "fits_at_p99")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in names}


def drop_curves(
    scenario: Scenario,
    popularities: Popularities | None = None,
    *,
    ginis: Sequence[float] = GINIS,
    factors: Sequence[float] = CAPACITY_FACTORS,
    progress: Progress | None = None,
) -> list[DropCurve]:
    """Expected drops over capacity factors for lognormal popularities of several Ginis and for the scenario's own.

    popularities: the own ones, where they are known (a recording's). Ginis that the router cannot reach are left out.
    Ordered by Gini. docs/model.md#drop-curve.
    """
    own = routed_base(scenario).popularities if popularities is None else popularities
    curves = [_drop_curve(scenario, own, factors, is_asked=True)]
    for wanted in ginis:
        if abs(wanted - curves[0].gini) < 0.01:
            continue
        _say(progress, f"drops at a Gini of {wanted:g}")
        skewed = _with_gini(scenario, wanted)
        if skewed is not None:
            curves.append(_drop_curve(skewed, routed_base(skewed).popularities, factors, is_asked=False))
    return sorted(curves, key=lambda curve: curve.gini)


def _drop_curve(
    scenario: Scenario, popularities: Popularities, factors: Sequence[float], *, is_asked: bool
) -> DropCurve:
    asked = scenario.routing.capacity_factor
    wanted = sorted({*factors, *([asked] if asked else [])})
    points = tuple(drop_point(scenario, popularities, factor) for factor in wanted)
    return DropCurve(gini=float(gini(popularities.inclusion_LE).mean()), asked=is_asked, points=points)


def _with_gini(scenario: Scenario, wanted: float) -> Scenario | None:
    """The scenario under a lognormal popularity of this Gini; None where its router cannot have it."""
    try:
        skewed = scenario.with_(popularity="lognormal", gini=wanted)
        routed_base(skewed)
    except InputError:
        return None
    return skewed


def cost_over_skew(
    scenario: Scenario,
    *,
    ginis: Sequence[float] = GINIS,
    step: StepResult | None = None,
    progress: Progress | None = None,
) -> list[CostPoint]:
    """A step under forced balance, under several Ginis and as asked; each without drops and, where a capacity factor is
    asked, with it. Ordered by Gini.

    With a capacity factor a skewed step may well be a quick one, since it leaves work undone; hence both. step: the
    scenario's own result, where it is known.
    """
    skews: list[tuple[str, Scenario | None]] = [("asked", scenario)]
    if scenario.routing.popularity.kind != "balanced":
        skews.append(("balanced", scenario.with_(popularity="balanced")))
    asked = float(gini(routed_base(scenario).popularities.inclusion_LE).mean())
    skews += [("lognormal", _with_gini(scenario, wanted)) for wanted in ginis if abs(wanted - asked) >= 0.02]
    points = []
    for name, skewed in skews:
        for factor in dict.fromkeys((scenario.routing.capacity_factor, None)):
            if skewed is None:
                continue
            is_known = name == "asked" and factor == scenario.routing.capacity_factor and step is not None
            if not is_known:
                _say(progress, f"step, {_skew_in_words(skewed)}, {_factor_in_words(factor)}")
            candidate = skewed if factor == scenario.routing.capacity_factor else skewed.with_(capacity_factor=factor)
            result = step if is_known and step is not None else simulate(candidate)
            points.append(_cost_point(candidate, result, name))
    return sorted(points, key=lambda point: (point.capacity_factor is None, point.gini))


def _skew_in_words(scenario: Scenario) -> str:
    popularity = scenario.routing.popularity
    wanted = getattr(popularity, "gini", None)
    return popularity.kind if wanted is None else f"Gini {wanted:g}"


def _factor_in_words(factor: float | None) -> str:
    return "no drops" if factor is None else f"capacity factor {factor:g}"


def cost_over_capacity(
    scenario: Scenario,
    *,
    factors: Sequence[float | None] = STEP_FACTORS,
    step: StepResult | None = None,
    progress: Progress | None = None,
) -> list[CostPoint]:
    """A step at several capacity factors and as asked, the popularity as asked; ordered, None (dropless) last."""
    asked = scenario.routing.capacity_factor
    points = []
    for factor in sorted({*factors, asked}, key=lambda value: math.inf if value is None else value):
        candidate = scenario if factor == asked else scenario.with_(capacity_factor=factor)
        if factor != asked or step is None:
            _say(progress, f"step, {_factor_in_words(factor)}")
        result = step if factor == asked and step is not None else simulate(candidate)
        points.append(_cost_point(candidate, result, "asked"))
    return points


def _say(progress: Progress | None, text: str) -> None:
    if progress is not None:
        progress(text)


def _cost_point(scenario: Scenario, result: StepResult, popularity: str) -> CostPoint:
    return CostPoint(
        popularity=popularity,
        gini=result.gini,
        capacity_factor=scenario.routing.capacity_factor,
        step_s=float(result.step_s),
        tokens_per_s_per_gpu=float(result.tokens_per_s_per_gpu),
        wait_s=float(result.wait_s),
        drop_fraction=result.drop_fraction,
        max_mean=result.max_mean_load,
        peak_bytes=float(result.memory["peak_bytes"]),
        headroom_bytes=float(result.headroom_bytes),
    )


def memory_over_steps(
    scenario: Scenario,
    num_steps: int = 32,
    *,
    redraw: Redraw = "favourites",
    base: StepLoad | None = None,
    progress: Progress | None = None,
) -> MemoryOverSteps:
    """Peak memory of the fullest GPU over num_steps steps, each with its own routing; no clock runs.

    redraw: ``counts`` draws each step's tokens anew under one popularity, as in consecutive steps; ``favourites`` also
    hands the same popularities to other experts of each layer (groups of a group-limited router stay together), as a
    long run or another seed may: nobody knows beforehand which experts will be popular. ``drift`` lets the scenario's
    own popularity drift by its correlation.drift_steps from one sampled step to the next. base: the step's load where
    it is known. Raises InputError. docs/model.md#memory-over-steps.
    """
    check(num_steps >= 2, "parameters", "num_steps", "must be at least 2", num_steps)
    drift_steps = drift_of(scenario)
    rule = "must be given for memory under drift"
    check(redraw != "drift" or drift_steps is not None, "routing.popularity.correlation", "drift_steps", rule, None)
    start = routed_base(scenario) if base is None else base
    rng = stream(scenario.seed, f"memory over steps: {redraw}")
    peaks = []
    for number in range(num_steps):
        if number % 8 == 0:
            _say(progress, f"memory, {redraw} of step {number + 1} of {num_steps}")
        popularities = start.popularities
        if redraw == "favourites":
            popularities = other_favourites(popularities, rng)
        elif drift_steps is not None and redraw == "drift":
            popularities = _drifted(scenario, start, number * math.ceil(drift_steps))
        peaks.append(peak_bytes(scenario, redrawn(scenario, start, popularities, rng)))
    return MemoryOverSteps(
        redraw=redraw, peak_bytes_S=tuple(peaks), capacity_bytes=scenario.cluster.gpu.memory_bytes.value
    )


def drift_of(scenario: Scenario) -> float | None:
    """Steps after which the scenario's popularity has forgotten most of itself; None where it stays."""
    popularity = scenario.routing.popularity
    return None if isinstance(popularity, Balanced | Recorded) else popularity.correlation.drift_steps


def _drifted(scenario: Scenario, base: StepLoad, step: int) -> Popularities:
    """The scenario's popularity as it is at a later step."""
    return popularity_LE(
        scenario.routing.popularity,
        num_layers=len(base.layers),
        num_experts=base.moe.num_experts,
        router=base.moe.router,
        rng=stream(scenario.seed, "popularity"),
        step=step,
    )


def peak_bytes(scenario: Scenario, load: StepLoad) -> float:
    """Memory of the fullest rank of any stage under a step's load [bytes]."""
    return max(memory.peak_bytes for memory in memory_by_stage(scenario, load))


def other_favourites(popularities: Popularities, rng: np.random.Generator) -> Popularities:
    """The same popularities on other experts: each layer's are shuffled, groups as wholes and inside themselves.

    The skew stays exactly what it was; drawn tokens (the pool) do not follow and are left out.
    """
    groups = popularities.router.num_groups
    num_layers, num_experts = popularities.inclusion_LE.shape
    size = num_experts // groups
    inside_LNS = rng.permuted(np.broadcast_to(np.arange(size), (num_layers, groups, size)), axis=-1)
    group_LN = rng.permuted(np.broadcast_to(np.arange(groups), (num_layers, groups)), axis=-1)
    order_LE = (group_LN[:, :, None] * size + inside_LNS).reshape(num_layers, num_experts)

    def shuffled(values: Floats) -> Floats:
        return np.take_along_axis(values, np.broadcast_to(order_LE, values.shape), axis=-1)

    domains, first_LE = popularities.domains, popularities.first_LE
    if domains is not None:
        domains = dataclasses.replace(
            domains,
            log_weights_DLE=shuffled(domains.log_weights_DLE),
            inclusion_DLE=shuffled(domains.inclusion_DLE),
        )
    return dataclasses.replace(
        popularities,
        log_weights_LE=shuffled(popularities.log_weights_LE),
        inclusion_LE=shuffled(popularities.inclusion_LE),
        pool_LTK=None,
        domains=domains,
        first_LE=None if first_LE is None else shuffled(first_LE),
    )
