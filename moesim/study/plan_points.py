"""One configuration's step as a planner sees it: days, GPU-hours, money, and the limits that it breaks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from moesim.cost.precision import RECIPES
from moesim.scenario import Scenario
from moesim.study.drops import expected_drops_L
from moesim.study.fast import FastStep
from moesim.study.plan_question import Offer, PlanQuestion
from moesim.study.plan_space import Leaves, flops_per_token
from moesim.study.simulate import simulate
from moesim.timeline.load import step_load
from moesim.units import DAY_S, HOUR_S


@dataclass(frozen=True, kw_only=True)
class Miss:
    """A limit that a plan breaks: which, by what value. shortfall: how far, as a share of the limit."""

    rule: str
    value: float
    limit: float
    shortfall: float


@dataclass(frozen=True, kw_only=True)
class PlanPoint:
    """One configuration and what training would take with it. cost: None without prices."""

    cluster: str
    settings: Leaves
    ranks_per_node: int
    step_s: float
    tokens_per_s_per_gpu: float
    days: float
    gpu_hours: float
    cost: float | None
    mfu: float
    drop_fraction: float
    peak_bytes: float
    headroom_fraction: float
    parts: Mapping[str, float]  # shares of the step, by metrics.step.STEP_PARTS
    misses: tuple[Miss, ...]
    fast_step_s: float  # as the fast path has it
    is_confirmed: bool = False  # by the event engine, whose numbers these then are

    @property
    def price(self) -> float:
        """What plans are ranked by: cost, or GPU-hours without prices."""
        return self.gpu_hours if self.cost is None else self.cost

    @property
    def shortfall(self) -> float:
        return max((miss.shortfall for miss in self.misses), default=0.0)

    @property
    def cheapness(self) -> tuple[Any, ...]:
        """A total order: the cheapest first, then the fastest, then by name."""
        return self.price, self.days, self.cluster, str(self.settings)

    @property
    def fastness(self) -> tuple[Any, ...]:
        return self.days, self.price, self.cluster, str(self.settings)

    @cached_property
    def nearness(self) -> tuple[Any, ...]:
        return self.shortfall, *self.cheapness

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the same for the same question."""
        return {
            "config": {"cluster": self.cluster, **self.settings},
            **{
                name: getattr(self, name)
                for name in (
                    *("step_s", "tokens_per_s_per_gpu", "days", "gpu_hours", "cost", "mfu", "drop_fraction"),
                    *("peak_bytes", "headroom_fraction", "fast_step_s"),
                )
            },
            "confirmed": self.is_confirmed,
            "parts_fraction": dict(self.parts),
        }


class Judge:
    """From a step to days, GPU-hours and money, and to the limits that it breaks."""

    def __init__(self, base: Scenario, question: PlanQuestion, offer: Offer) -> None:
        self._base, self._question, self._offer = base, question, offer
        gpu, limits = base.cluster.gpu, question.limits
        self._tokens_per_step = base.train.global_batch * base.train.seq_len
        self._flops = flops_per_token(base.model, base)
        self._peak = gpu.peak_flops_per_s[RECIPES[base.train.precision].peak].value
        self.capacity_bytes = gpu.memory_bytes.value
        self.available_bytes = self.capacity_bytes * (1.0 - limits.memory_headroom_fraction)
        self._drops: dict[tuple[Any, ...], float] = {}

    def days_and_price(self, step_s: float, num_gpus: int) -> tuple[float, float]:
        """Of the whole run, without interruptions; price in GPU-hours where none is given."""
        seconds = self._question.tokens / self._tokens_per_step * step_s
        gpu_hours = seconds / HOUR_S * num_gpus
        return seconds / DAY_S, gpu_hours * (self._offer.price_per_gpu_hour or 1.0)

    def __call__(self, leaves: Leaves, step: FastStep) -> PlanPoint:
        """A configuration's point by the fast path."""
        days, price = self.days_and_price(step.step_s, leaves["num_gpus"])
        return self.judged(
            PlanPoint(
                cluster=self._offer.name,
                settings=leaves,
                ranks_per_node=self._base.cluster.ranks_per_node,
                step_s=step.step_s,
                tokens_per_s_per_gpu=step.tokens_per_s_per_gpu,
                days=days,
                gpu_hours=days * DAY_S / HOUR_S * leaves["num_gpus"],
                cost=price if self._question.is_priced else None,
                mfu=step.tokens_per_s_per_gpu * self._flops / self._peak,
                drop_fraction=self._drop_fraction(leaves),
                peak_bytes=step.peak_bytes,
                headroom_fraction=step.headroom_bytes / self.capacity_bytes,
                parts={part: seconds / step.step_s for part, seconds in step.parts.items()},
                misses=(),
                fast_step_s=step.step_s,
            )
        )

    def confirmed(self, point: PlanPoint) -> PlanPoint:
        """The point by the event engine. Raises MoesimError."""
        step = simulate(self._base.with_(**point.settings))
        days, price = self.days_and_price(step.step_s, point.settings["num_gpus"])
        return self.judged(
            replace(
                point,
                step_s=float(step.step_s),
                tokens_per_s_per_gpu=float(step.tokens_per_s_per_gpu),
                days=days,
                gpu_hours=days * DAY_S / HOUR_S * point.settings["num_gpus"],
                cost=price if self._question.is_priced else None,
                mfu=float(step.mfu),
                drop_fraction=float(step.drop_fraction),
                peak_bytes=float(step.memory["peak_bytes"]),
                headroom_fraction=float(step.headroom_bytes) / self.capacity_bytes,
                parts={part: float(seconds / step.step_s) for part, seconds in step.step_parts_s.items()},
                is_confirmed=True,
            )
        )

    def judged(self, point: PlanPoint) -> PlanPoint:
        """The point with the limits that it breaks."""
        limits, days = self._question.limits, point.days
        headroom = limits.memory_headroom_fraction
        found: list[Miss] = []
        if point.headroom_fraction < headroom:
            over = point.peak_bytes / self.available_bytes - 1.0
            found.append(Miss(rule="memory", value=point.headroom_fraction, limit=headroom, shortfall=over))
        if limits.deadline_s is not None and days * DAY_S > limits.deadline_s:
            limit = limits.deadline_s / DAY_S
            found.append(Miss(rule="deadline", value=days, limit=limit, shortfall=days / limit - 1.0))
        if limits.budget is not None and point.price > limits.budget:
            over = point.price / limits.budget - 1.0
            found.append(Miss(rule="budget", value=point.price, limit=limits.budget, shortfall=over))
        if limits.drop_fraction is not None and point.drop_fraction > limits.drop_fraction:
            over = point.drop_fraction - limits.drop_fraction
            found.append(Miss(rule="drops", value=point.drop_fraction, limit=limits.drop_fraction, shortfall=over))
        if limits.mfu is not None and point.mfu < limits.mfu:
            found.append(Miss(rule="mfu", value=point.mfu, limit=limits.mfu, shortfall=limits.mfu / point.mfu - 1.0))
        return replace(point, misses=tuple(found))

    def _drop_fraction(self, leaves: Leaves) -> float:
        """Expected, mean over layers."""
        factor = leaves["capacity_factor"]
        if factor is None or not self._base.model.is_moe:
            return 0.0
        key = tuple(leaves[name] for name in ("capacity_factor", "micro_batch", "tp", "cp", "ep", "etp"))
        if key not in self._drops:
            scenario = self._base.with_(**leaves)
            few = replace(self._base.train, global_batch=1, micro_batch=1)
            load = step_load(replace(self._base, train=few))
            assert load is not None
            self._drops[key] = float(expected_drops_L(scenario, load.popularities, factor).mean())
        return self._drops[key]
