"""The search of one kind of cluster: bounds first, then the fast path along every family's staircase."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from moesim.errors import MoesimError
from moesim.scenario import Scenario
from moesim.study.fast import AXES as FAST_AXES
from moesim.study.fast import FastPath, FastStep, Refused
from moesim.study.plan_points import Judge, PlanPoint
from moesim.study.plan_question import Offer, PlanQuestion
from moesim.study.plan_space import INNER, LeastStep, Leaves, Space, StaticBytes, telling
from moesim.units import DAY_S

CHUNK = 2048  # families that take their steps down the staircase together
NUM_NEAR = 16  # of what memory's bound sorts out, so many of the nearest are looked at where nothing else is left


class Fast(Protocol):
    """Steps, or why there are none, of configurations: `moesim.study.fast.FastPath`, or a test's own."""

    def __call__(self, configurations: Iterable[Leaves]) -> list[FastStep | Refused]: ...


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search of one cluster's space kept.

    points: the best of every value of every axis that keep all limits, or where there is none the nearest to it.
    """

    points: tuple[PlanPoint, ...]
    num_evaluated: int
    num_rejected: Mapping[str, int]  # by rule; those of bounds are families, or steps that were never evaluated
    num_families: int
    refusals: Mapping[str, int]  # of the fast path, by reason
    search_s: float  # seconds in this search, of these inside the fast path
    fast_s: float


def search(space: Space, question: PlanQuestion, offer: Offer, fast: Fast, *, bounded: bool = True) -> Found:
    """Walk every family down its staircase: a larger micro-batch while memory suffices, else more recomputation.

    bounded: leave out what bounds say cannot keep a limit, or cannot beat what was found. Memory never falls with the
    micro-batch nor rises with recomputation, and time never falls with recomputation.
    """
    began_s = time.perf_counter()
    search = _Search(space, question, offer, fast, bounded)
    families = space.families()
    while chunk := list(itertools.islice(families, CHUNK)):
        search.walk(chunk)
    search.look([other for point in search.kept() for other in space.others(point.settings)])
    if not search.best and search.near_memory:
        search.look([leaves for _, _, leaves in sorted(search.near_memory)])
    return Found(
        points=tuple(search.kept()),
        num_evaluated=search.num_evaluated,
        num_rejected=dict(sorted(search.rejected.items())),
        num_families=search.num_families,
        refusals=dict(search.refusals.most_common(8)),
        search_s=time.perf_counter() - began_s,
        fast_s=search.fast_s,
    )


class _Search:
    """The running state of one search."""

    def __init__(self, space: Space, question: PlanQuestion, offer: Offer, fast: Fast, bounded: bool) -> None:
        self._space, self._fast, self._bounded, self._limits = space, fast, bounded, question.limits
        self._static, self._least = StaticBytes(space.base), LeastStep(space.base)
        self._judge = Judge(space.base, question, offer)
        self.best: dict[tuple[str, Any], PlanPoint] = {}
        self.rejected: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.near_memory: list[tuple[float, str, Leaves]] = []
        self.num_evaluated = self.num_families = 0
        self.fast_s = 0.0

    def walk(self, families: Sequence[dict[str, Any]]) -> None:
        """Steps of many families at once: each call of the fast path takes the next step of every one."""
        self.num_families += len(families)
        places = [(family, 0, 0) for family in families if self._may_fit(family)]
        while places:
            asked = [(at, leaves) for at in places if (leaves := self._next(at)) is not None]
            outcomes = self._evaluate([leaves for _, leaves in asked])
            places = []
            for ((family, _, recompute), leaves), point in zip(asked, outcomes, strict=True):
                micro_batch = self._space.axes["micro_batch"].index(leaves["micro_batch"])
                if point is not None and any(miss.rule == "memory" for miss in point.misses):
                    places.append((family, micro_batch, recompute + 1))
                else:
                    places.append((family, micro_batch + 1, recompute))

    def kept(self) -> list[PlanPoint]:
        """The best of every value of every axis, the nearest to keeping all limits first."""
        return sorted({id(point): point for point in self.best.values()}.values(), key=lambda point: point.nearness)

    def look(self, configurations: Sequence[Leaves]) -> None:
        """Evaluate these, whatever bounds say."""
        self._evaluate(configurations)

    def _may_fit(self, family: dict[str, Any]) -> bool:
        available_bytes = self._judge.available_bytes
        static_bytes = self._static(family)
        if static_bytes <= available_bytes:
            return True
        self.rejected["memory (bound)"] += 1
        inner = {"micro_batch": self._space.axes["micro_batch"][0], "recompute": self._space.axes["recompute"][-1]}
        self.near_memory.append((static_bytes, str(family), family | inner))
        if len(self.near_memory) > 64 * NUM_NEAR:
            self.near_memory = sorted(self.near_memory)[:NUM_NEAR]
        return False

    def _next(self, place: tuple[dict[str, Any], int, int]) -> Leaves | None:
        """The configuration at a place of a family's staircase, or the next one that divides; None at its end."""
        family, micro_batch, recompute = place
        sizes, kinds = (self._space.axes[name] for name in INNER)
        while micro_batch < len(sizes) and not self._space.takes_micro_batch(family, sizes[micro_batch]):
            micro_batch += 1
        if micro_batch == len(sizes) or recompute == len(kinds):
            return None
        leaves = family | {"micro_batch": sizes[micro_batch], "recompute": kinds[recompute]}
        if self._bounded and (rule := self._hopeless(leaves)):
            self.rejected[rule] += 1
            return None
        return leaves

    def _hopeless(self, leaves: Leaves) -> str:
        """The limit that not even arithmetic at the GPUs' peak keeps, or that it cannot beat what was found."""
        days, price = self._judge.days_and_price(self._least(leaves), leaves["num_gpus"])
        limits = self._limits
        if limits.deadline_s is not None and days * DAY_S > limits.deadline_s:
            return "deadline (bound)"
        if limits.budget is not None and price > limits.budget:
            return "budget (bound)"
        best = self.best.get(("num_gpus", leaves["num_gpus"]))
        if best is not None and not best.misses and best.days <= days:
            return "slower (bound)"
        return ""

    def _evaluate(self, configurations: Sequence[Leaves]) -> list[PlanPoint | None]:
        began_s = time.perf_counter()
        steps = self._fast(configurations) if configurations else []
        self.fast_s += time.perf_counter() - began_s
        self.num_evaluated += len(steps)
        points: list[PlanPoint | None] = []
        for leaves, step in zip(configurations, steps, strict=True):
            if isinstance(step, Refused):
                self.refusals[step.reason] += 1
                self.rejected["refused"] += 1
                points.append(None)
                continue
            point = self._judge(leaves, step)
            for miss in point.misses[:1]:
                self.rejected[miss.rule] += 1
            nearness = point.nearness
            for key in telling(leaves).items():
                if key not in self.best or nearness < self.best[key].nearness:
                    self.best[key] = point
            points.append(point)
        return points


class Paths:
    """The fast path with a base for each value of what it does not vary by itself (`moesim.study.fast.AXES`)."""

    def __init__(self, base: Scenario) -> None:
        self._base = base
        self._paths: dict[str, FastPath] = {}

    def __call__(self, configurations: Iterable[Leaves]) -> list[FastStep | Refused]:
        """As FastPath's; what one base has in common is asked of it together."""
        asked = list(configurations)
        outcomes: dict[int, FastStep | Refused] = {}
        groups: dict[str, list[int]] = {}
        for i, leaves in enumerate(asked):
            groups.setdefault(repr([item for item in leaves.items() if item[0] not in FAST_AXES]), []).append(i)
        for key, members in groups.items():
            if key not in self._paths:
                first = asked[members[0]]
                others = {name: value for name, value in first.items() if name not in FAST_AXES}
                try:
                    self._paths[key] = FastPath(self._base.with_(**others))
                except MoesimError as error:
                    outcomes |= {i: Refused(str(error)) for i in members}
                    continue
            own = [{name: value for name, value in asked[i].items() if name in FAST_AXES} for i in members]
            outcomes |= dict(zip(members, self._paths[key](own), strict=True))
        return [outcomes[i] for i in range(len(asked))]


def search_offer(
    question: PlanQuestion, offer: Offer, sizes: Sequence[int] | None = None, bounded: bool = True
) -> Found:
    """Search one offer by the fast path; what a process of its own runs. sizes: of its clusters, only these."""
    space = question.on(offer)
    if sizes is not None:
        space = replace(space, axes=dict(space.axes) | {"num_gpus": tuple(sizes)})
    return search(space, question, offer, Paths(space.base), bounded=bounded)
