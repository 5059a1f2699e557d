"""The search of one kind of cluster: bounds first, then the fast path along every family's staircase.

A cluster's space is searched in NUM_PARTS parts, by expert-parallel size, however many processes there are; then the
best of all parts is looked at with every other dispatcher and placement.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from moesim.errors import MoesimError
from moesim.scenario import Scenario
from moesim.study.fast import AXES as FAST_AXES
from moesim.study.fast import FastPath, FastStep, Refused
from moesim.study.plan_points import Judge, PlanPoint
from moesim.study.plan_question import Offer, PlanQuestion
from moesim.study.plan_space import LeastStep, Leaves, Space, StaticBytes, telling
from moesim.units import DAY_S

NUM_PARTS = 3  # of a cluster's space
CHUNK = 2048  # families that take their steps down the staircase together
NUM_NEAR = 16  # of what memory's bound sorts out, so many of the nearest are looked at where nothing else is left


class Fast(Protocol):
    """Steps, or why there are none, of configurations: `moesim.study.fast.FastPath`, or a test's own."""

    def __call__(self, configurations: Iterable[Leaves]) -> list[FastStep | Refused]: ...


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search of one cluster's space, or of a part of it, kept.

    points: the best of every value of every axis that keep all limits, or where there is none the nearest to it, the
    nearest of all first.
    """

    points: tuple[PlanPoint, ...]
    num_evaluated: int
    num_pruned: int  # by bounds: families, or steps that were never evaluated
    num_rejected: Mapping[str, int]  # by rule; those of bounds are num_pruned
    num_families: int
    refusals: Mapping[str, int]  # of the fast path, by reason
    near_memory: tuple[Leaves, ...]  # of what memory's bound sorted out, the nearest to fitting


def merged(parts: Sequence[Found]) -> Found:
    """Several searches of one cluster as one."""
    best: dict[tuple[str, Any], PlanPoint] = {}
    rejected: Counter[str] = Counter()
    refusals: Counter[str] = Counter()
    for part in parts:
        for point in part.points:
            _keep(best, point)
        rejected.update(part.num_rejected)
        refusals.update(part.refusals)
    return Found(
        points=_nearest_first(best),
        num_evaluated=sum(part.num_evaluated for part in parts),
        num_pruned=sum(part.num_pruned for part in parts),
        num_rejected=dict(sorted(rejected.items())),
        num_families=sum(part.num_families for part in parts),
        refusals=dict(refusals.most_common(8)),
        near_memory=tuple(leaves for part in parts for leaves in part.near_memory),
    )


def parts_of(space: Space) -> list[Space]:
    """A space cut by its expert-parallel sizes, large and small ones in each part."""
    sizes = space.axes["ep"]
    cuts = [sizes[n::NUM_PARTS] for n in range(NUM_PARTS)]
    return [replace(space, axes=dict(space.axes) | {"ep": cut}) for cut in cuts if cut]


def search(space: Space, question: PlanQuestion, offer: Offer, fast: Fast, *, bounded: bool = True) -> Found:
    """Walk every family down its staircase: a larger micro-batch while memory suffices, else more recomputation or more
    sharding.

    bounded: leave out what bounds say cannot keep a limit, or cannot be better than what is kept. Memory never falls
    with the micro-batch nor rises with recomputation and ZeRO stage (from 1 on); time never falls with these two.
    """
    search = _Search(space, question, offer, fast, bounded)
    families = space.families()
    while chunk := list(itertools.islice(families, CHUNK)):
        search.walk(chunk)
    return search.found()


def look(space: Space, question: PlanQuestion, offer: Offer, fast: Fast, configurations: Sequence[Leaves]) -> Found:
    """Evaluate these configurations, whatever bounds say."""
    search = _Search(space, question, offer, fast, bounded=False)
    search.evaluate(configurations)
    return search.found()


def to_look_at(space: Space, found: Found) -> list[Leaves]:
    """What is left once all parts are searched: the best with every other dispatcher and placement; where nothing was
    evaluated at all, what memory's bound sorted out by least.
    """
    if not found.points:
        static = StaticBytes(space.base)
        return sorted(found.near_memory, key=lambda leaves: (static(leaves), str(leaves)))[:NUM_NEAR]
    return [other for point in found.points for other in space.others(point.settings)]


class _Place(NamedTuple):
    """Where a family stands on its staircase: indices into the axes. spreads: memory failed here before, so that the
    next ZeRO stage is under way already.
    """

    family: dict[str, Any]
    zero: int
    micro_batch: int = 0
    recompute: int = 0
    spreads: bool = False


class _Search:
    """The running state of one search."""

    def __init__(self, space: Space, question: PlanQuestion, offer: Offer, fast: Fast, bounded: bool) -> None:
        self._space, self._fast, self._bounded, self._limits = space, fast, bounded, question.limits
        self._static, self._least = StaticBytes(space.base), LeastStep(space.base)
        self._judge = Judge(space.base, question, offer)
        self._best: dict[tuple[str, Any], PlanPoint] = {}
        self._rejected: Counter[str] = Counter()
        self._refusals: Counter[str] = Counter()
        self._near_memory: list[tuple[float, str, Leaves]] = []
        self._num_evaluated = self._num_pruned = self._num_families = 0

    def walk(self, families: Sequence[dict[str, Any]]) -> None:
        """Steps of many families at once: each call of the fast path takes the next step of every one."""
        self._num_families += len(families)
        places = [place for family in families for place in self._first_places(family)]
        while places:
            asked = [(at, leaves) for at in places if (leaves := self._next(at)) is not None]
            outcomes = self.evaluate([leaves for _, leaves in asked])
            places = []
            for (place, leaves), point in zip(asked, outcomes, strict=True):
                at = place._replace(micro_batch=self._space.axes["micro_batch"].index(leaves["micro_batch"]))
                lacks = point is not None and any(miss.rule == "memory" for miss in point.misses)
                if point is None or not lacks or self._is_beaten(at, point):
                    places.append(at._replace(micro_batch=at.micro_batch + 1))
                    continue
                places.append(at._replace(recompute=at.recompute + 1, spreads=True))
                if not at.spreads:
                    places += self._more_sharded(at)

    def evaluate(self, configurations: Sequence[Leaves]) -> list[PlanPoint | None]:
        """Each one's point, kept where it is the best of any value; None where the fast path refuses it."""
        steps = self._fast(configurations) if configurations else []
        self._num_evaluated += len(steps)
        points: list[PlanPoint | None] = []
        for leaves, step in zip(configurations, steps, strict=True):
            if isinstance(step, Refused):
                self._refusals[step.reason] += 1
                self._rejected["refused"] += 1
                points.append(None)
                continue
            point = self._judge(leaves, step)
            for miss in point.misses[:1]:
                self._rejected[miss.rule] += 1
            _keep(self._best, point)
            points.append(point)
        return points

    def found(self) -> Found:
        """What was kept."""
        return Found(
            points=_nearest_first(self._best),
            num_evaluated=self._num_evaluated,
            num_pruned=self._num_pruned,
            num_rejected=dict(sorted(self._rejected.items())),
            num_families=self._num_families,
            refusals=dict(self._refusals.most_common(8)),
            near_memory=tuple(leaves for _, _, leaves in sorted(self._near_memory)[:NUM_NEAR]),
        )

    def _first_places(self, family: dict[str, Any]) -> list[_Place]:
        """Where a family's staircase begins; nowhere if its weights alone are too much."""
        zeros = self._space.axes["zero"]
        firsts = {self._fitting_zero(family, zeros.index(zero)) for zero in self._space.first_zeros}
        found = [_Place(family, zero) for zero in sorted(zero for zero in firsts if zero is not None)]
        if not found:
            self._leave_out("memory (bound)")
            last = {name: self._space.axes[name][-1] for name in ("zero", "recompute")}
            leaves = family | last | {"micro_batch": self._space.axes["micro_batch"][0]}
            self._near_memory.append((self._static(leaves), str(family), leaves))
            if len(self._near_memory) > 64 * NUM_NEAR:
                self._near_memory = sorted(self._near_memory)[:NUM_NEAR]
        return found

    def _more_sharded(self, place: _Place) -> list[_Place]:
        """The same place of the next ZeRO stage that every family is not tried with anyway."""
        zero = self._fitting_zero(place.family, place.zero + 1)
        if zero is None or self._space.axes["zero"][zero] in self._space.first_zeros:
            return []
        return [place._replace(zero=zero)]

    def _fitting_zero(self, family: dict[str, Any], first: int) -> int | None:
        """The first ZeRO stage from this one on with which weights, gradients and optimizer leave memory free."""
        zeros, available_bytes = self._space.axes["zero"], self._judge.available_bytes
        fits = (at for at in range(first, len(zeros)) if self._static(family | {"zero": zeros[at]}) <= available_bytes)
        return next(fits, None)

    def _next(self, place: _Place) -> Leaves | None:
        """The configuration at a place of a family's staircase, or the next one that divides; None at its end."""
        family, micro_batch = place.family, place.micro_batch
        zeros, sizes, kinds = (self._space.axes[name] for name in ("zero", "micro_batch", "recompute"))
        while micro_batch < len(sizes) and not self._space.takes_micro_batch(family, sizes[micro_batch]):
            micro_batch += 1
        if micro_batch == len(sizes) or place.recompute == len(kinds):
            return None
        leaves = family | {
            "zero": zeros[place.zero],
            "micro_batch": sizes[micro_batch],
            "recompute": kinds[place.recompute],
        }
        if self._bounded and (rule := self._hopeless(leaves)):
            self._leave_out(rule)
            return None
        return leaves

    def _is_beaten(self, place: _Place, point: PlanPoint) -> bool:
        """Whether more recomputation or sharding, which lacks no memory but is no faster, cannot become the best of any
        value.
        """
        least = max((miss.shortfall for miss in point.misses if miss.rule != "memory"), default=0.0)
        floor = (least, point.price, point.days)
        keys = [(name, value) for name, value in telling(point.settings).items() if name not in ("zero", "recompute")]
        for name, at in (("zero", place.zero), ("recompute", place.recompute)):
            keys += [(name, value) for value in self._space.axes[name][at + 1 :]]
        if any(key not in self._best or self._best[key].nearness[:3] > floor for key in keys):
            return False
        self._leave_out("slower (bound)")
        return True

    def _leave_out(self, rule: str) -> None:
        self._rejected[rule] += 1
        self._num_pruned += 1

    def _hopeless(self, leaves: Leaves) -> str:
        """The limit that not even arithmetic at the GPUs' peak keeps, or that it cannot beat what was found."""
        days, price = self._judge.days_and_price(self._least(leaves), leaves["num_gpus"])
        limits = self._limits
        if limits.deadline_s is not None and days * DAY_S > limits.deadline_s:
            return "deadline (bound)"
        if limits.budget is not None and price > limits.budget:
            return "budget (bound)"
        best = self._best.get(("num_gpus", leaves["num_gpus"]))
        if best is not None and not best.misses and best.days <= days:
            return "slower (bound)"
        return ""


def _keep(best: dict[tuple[str, Any], PlanPoint], point: PlanPoint) -> None:
    """Where a point is the nearest of any value of any axis so far, it is that."""
    for key in telling(point.settings).items():
        if key not in best or point.nearness < best[key].nearness:
            best[key] = point


def _nearest_first(best: Mapping[tuple[str, Any], PlanPoint]) -> tuple[PlanPoint, ...]:
    return tuple(sorted({id(point): point for point in best.values()}.values(), key=lambda point: point.nearness))


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


def search_part(question: PlanQuestion, offer: Offer, axes: Leaves, bounded: bool = True) -> Found:
    """Search a part of an offer's space by the fast path; what a process of its own runs. axes: the part's."""
    space = replace(question.on(offer), axes=axes)
    return search(space, question, offer, Paths(space.base), bounded=bounded)


def look_part(question: PlanQuestion, offer: Offer, configurations: Sequence[Leaves]) -> Found:
    """Evaluate some configurations of an offer by the fast path; what a process of its own runs."""
    space = question.on(offer)
    return look(space, question, offer, Paths(space.base), configurations)


def judged(question: PlanQuestion, offer: Offer, configurations: Sequence[Leaves]) -> list[PlanPoint | str]:
    """Each configuration of an offer by the fast path: its point, or why there is none."""
    base = question.on(offer).base
    judge, steps = Judge(base, question, offer), Paths(base)(configurations)
    pairs = zip(configurations, steps, strict=True)
    return [step.reason if isinstance(step, Refused) else judge(leaves, step) for leaves, step in pairs]
