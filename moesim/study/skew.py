"""What skew costs: drops against capacity, step time and memory against skew."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moesim.errors import InputError
from moesim.metrics.step import StepResult
from moesim.routing.popularity import Popularities
from moesim.routing.statistics import gini
from moesim.scenario import Scenario
from moesim.study.drops import DropPoint, drop_point
from moesim.study.routed import routed_base
from moesim.study.simulate import simulate
from moesim.study.sizes import CAPACITY_FACTORS

Progress = Callable[[str], None]
GINIS = (0.1, 0.25, 0.4, 0.6)  # real text lies in 0.10 to 0.38
STEP_FACTORS = (1.0, 1.25, 1.5, 2.0, None)


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
