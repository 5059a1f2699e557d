"""The plan: of every configuration on every kind of cluster, the cheapest and the fastest that keep all limits.

Bounds sort out what cannot be, the fast path tells time and memory of the rest, and the event engine runs at most
MOST_FINALISTS of the best. Every part is deterministic: the same question has the same answer, on any number of
processes. See docs/model.md#plan-bounds.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any

from moesim.errors import InputError, MoesimError, check
from moesim.scenario import Scenario
from moesim.study.plan_points import Judge, Miss, PlanPoint
from moesim.study.plan_question import Offer, PlanQuestion
from moesim.study.plan_search import Found, judged, look_part, merged, parts_of, search_part, to_look_at
from moesim.study.plan_space import Space, telling

Progress = Callable[[str], None]
MOST_FINALISTS = 4


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A value of an axis that the cheapest does not have.

    best: with it. winner: the cheapest, by the fast path where best is. alone: the cheapest with this value and nothing
    else changed, by the fast path, or why that cannot be; None of a cluster.
    """

    axis: str
    value: Any
    best: PlanPoint
    winner: PlanPoint
    alone: PlanPoint | str | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The answer. cheapest, fastest: None where nothing keeps all limits; then nearest misses the least."""

    question: PlanQuestion
    cheapest: PlanPoint | None
    fastest: PlanPoint | None
    pareto: tuple[PlanPoint, ...]  # cheapest first: each is faster than all before
    rivals: tuple[Rival, ...]  # see moesim.study.plan_reasons
    untried: tuple[str, ...]  # clusters on which nothing divides
    fallen: tuple[PlanPoint, ...]  # finalists that the engine does not confirm
    nearest: PlanPoint | None
    num_evaluated: int
    num_pruned: int  # by bounds, never evaluated
    num_families: int
    num_rejected: Mapping[str, int]
    refusals: Mapping[str, int]
    num_confirmed: int
    configs_per_s: float  # evaluated in the searches, by the clock; what bounds leave out is not counted
    search_s: float


def scenario_of(question: PlanQuestion, point: PlanPoint) -> Scenario:
    """A point as a scenario of its own."""
    return question.on(offer_of(question, point)).base.with_(**point.settings)


def offer_of(question: PlanQuestion, point: PlanPoint) -> Offer:
    """The cluster that a point is on."""
    return next(offer for offer in question.offers if offer.name == point.cluster)


def confirm(question: PlanQuestion, point: PlanPoint) -> PlanPoint:
    """A point by the event engine, in a process of its own; where the engine refuses it, that is what it misses by."""
    offer = offer_of(question, point)
    try:
        return Judge(question.on(offer).base, question, offer).confirmed(point)
    except MoesimError as error:
        return replace(point, misses=(Miss(rule=str(error), value=0.0, limit=0.0, shortfall=1.0),))


def plan(question: PlanQuestion, executor: Executor, progress: Progress | None = None) -> Plan:
    """Search every offer, confirm the best, and keep what tells why the others lost.

    executor: where searches and engine runs are computed; the answer is the same on any. Raises InputError and
    NotModelledError.
    """
    say = progress or (lambda _: None)
    began_s = time.perf_counter()
    for offer in question.offers:
        question.on(offer)  # refuses what is wrong before anything runs
    found = _searched(question, executor, say, bounded=True)
    rule = "must leave a layout that divides GPUs, heads, experts, layers and batch"
    check(any(one.num_families for one in found), "plan", "axes", rule, dict(question.axes))
    if not any(not point.misses for one in found for point in one.points):
        say("nothing keeps all limits: looking for what misses them least")
        found += _searched(question, executor, say, bounded=False)
    search_s = time.perf_counter() - began_s
    refusals = sum((Counter(one.refusals) for one in found), Counter[str]())
    if not any(one.points for one in found):
        often = ", most often: " + refusals.most_common(1)[0][0] if refusals else ""
        raise InputError("plan", "axes", f"leave only what is refused{often}", dict(question.axes))
    num_evaluated = sum(one.num_evaluated for one in found)
    points = [point for one in found for point in one.points]
    feasible = [point for point in points if not point.misses]
    confirmed = _confirmed(question, executor, feasible, say)
    good = [point for point in confirmed.values() if point.is_confirmed and not point.misses]
    cheapest = min(good, key=lambda point: point.cheapness, default=None)
    fastest = min(good, key=lambda point: point.fastness, default=None)
    known = [confirmed.get(id(point), point) for point in feasible]
    missed = [point for point in [*confirmed.values(), *points] if point.misses]
    rejected: Counter[str] = Counter()
    for one in found:
        rejected.update(one.num_rejected)
    return Plan(
        question=question,
        cheapest=cheapest,
        fastest=fastest,
        pareto=pareto(point for point in known if not point.misses) if cheapest is not None else (),
        rivals=_rivals(question, executor, points, confirmed, cheapest),
        untried=tuple(offer.name for offer, one in zip(question.offers, found, strict=False) if not one.num_families),
        fallen=tuple(point for point in confirmed.values() if point.misses),
        nearest=min(missed, key=lambda point: point.nearness, default=None) if cheapest is None else None,
        num_evaluated=num_evaluated,
        num_pruned=sum(one.num_pruned for one in found),
        num_families=sum(one.num_families for one in found),
        num_rejected=dict(sorted(rejected.items())),
        refusals=dict(refusals.most_common(8)),
        num_confirmed=len(confirmed),
        configs_per_s=num_evaluated / search_s,
        search_s=search_s,
    )


def _searched(question: PlanQuestion, executor: Executor, say: Progress, *, bounded: bool) -> list[Found]:
    """Every offer's search; without bounds of its largest cluster only, where deadlines are missed least."""
    spaces: list[Space] = []
    for offer in question.offers:
        space = question.on(offer)
        sizes = space.axes["num_gpus"] if bounded else space.axes["num_gpus"][-1:]
        spaces.append(replace(space, axes=dict(space.axes) | {"num_gpus": sizes}))
    walks = [
        [executor.submit(search_part, question, offer, part.axes, bounded) for part in parts_of(space)]
        for offer, space in zip(question.offers, spaces, strict=True)
    ]
    found, looks = [], []
    for offer, space, tasks in zip(question.offers, spaces, walks, strict=True):
        walked = merged([task.result() for task in tasks])
        say(
            f"{offer.name}: {walked.num_evaluated:,} configurations evaluated, {walked.num_pruned:,} left out by bounds"
        )
        found.append(walked)
        looks.append(executor.submit(look_part, question, offer, to_look_at(space, walked)))
    return [merged([walked, others.result()]) for walked, others in zip(found, looks, strict=True)]


def _confirmed(
    question: PlanQuestion, executor: Executor, feasible: Sequence[PlanPoint], say: Progress
) -> dict[int, PlanPoint]:
    """The finalists by the engine, by the id of the fast path's point.

    The cheapest and the fastest are run; where the engine has them dearer, slower or breaking a limit, the next best
    are, MOST_FINALISTS at most.
    """
    confirmed: dict[int, PlanPoint] = {}
    while len(confirmed) < MOST_FINALISTS:
        told = [(confirmed.get(id(point), point), point) for point in feasible]
        alive = [pair for pair in told if not pair[0].misses]
        if not alive:
            break
        first = (min(alive, key=lambda pair: pair[0].cheapness)[1], min(alive, key=lambda pair: pair[0].fastness)[1])
        wanted = [point for point in {id(point): point for point in first}.values() if id(point) not in confirmed]
        if not wanted:
            break
        wanted = wanted[: MOST_FINALISTS - len(confirmed)]
        say(f"{len(wanted)} of the best by the event engine")
        runs = [(point, executor.submit(confirm, question, point)) for point in wanted]
        confirmed |= {id(point): run.result() for point, run in runs}
    return confirmed


def pareto(points: Iterable[PlanPoint]) -> tuple[PlanPoint, ...]:
    """Those that no other beats in both price and days, the cheapest first."""
    front: list[PlanPoint] = []
    for point in sorted(points, key=lambda point: point.cheapness):
        if not front or point.days < front[-1].days:
            front.append(point)
    return tuple(front)


def _rivals(
    question: PlanQuestion,
    executor: Executor,
    points: Sequence[PlanPoint],
    confirmed: Mapping[int, PlanPoint],
    cheapest: PlanPoint | None,
) -> tuple[Rival, ...]:
    """For each value that the cheapest does not have, of each axis on its cluster, and of the clusters, the best with
    it. points: by the fast path.
    """
    if cheapest is None:
        return ()
    winner: dict[str, Any] = {"cluster": cheapest.cluster, **cheapest.settings}
    by_fast = next(point for point in points if confirmed.get(id(point)) is cheapest)
    best: dict[tuple[str, Any], PlanPoint] = {}
    for fast in points:
        point = confirmed.get(id(fast), fast)
        for name, value in {"cluster": point.cluster, **telling(point.settings)}.items():
            if name != "cluster" and point.cluster != cheapest.cluster:
                continue
            key = name, value
            if value != winner[name] and (key not in best or point.nearness < best[key].nearness):
                best[key] = point
    changed = [key for key in best if key[0] != "cluster"]
    tried = [dict(cheapest.settings) | {name: value} for name, value in changed]
    alone = executor.submit(judged, question, offer_of(question, cheapest), tried).result()
    of_key = dict(zip(changed, alone, strict=True))
    rivals = []
    for (name, value), known in best.items():
        own, point = of_key.get((name, value)), known
        if isinstance(own, PlanPoint) and own.nearness < known.nearness:
            point = own  # bounds left it out, which the search may do with all but the best
        against = cheapest if point.is_confirmed else by_fast
        rivals.append(Rival(axis=name, value=value, best=point, winner=against, alone=own))
    return tuple(rivals)
