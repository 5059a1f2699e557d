"""Weeks of training as a coarse clock: work, checkpoints, failures that throw it back, repairs, slow servers.

One SimPy process is the job; failures, planned stops and slow servers are processes that interrupt it. No step is
simulated: the job holds until the next thing happens, and its work is counted in seconds of undisturbed training.
Failures may strike at any time, also while the job recovers; then recovery begins anew. See docs/model.md#goodput.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy

from moesim.describe.reliability import Checkpoints, FailureKind, Fleet, Operations
from moesim.errors import MoesimError
from moesim.units import DAY_S, HOUR_S

RUN_PARTS = ("training", "repeated", "slow", "checkpoint", "detection", "spare", "restart", "planned")
GIVE_UP = 20  # times the undisturbed work: nobody waits for such a run

Cut = FailureKind | str | None
Events = Generator[simpy.Event, Any, Cut]


@dataclass(frozen=True, kw_only=True)
class Outage:
    """One unexpected interruption: when, of what kind, work thrown away, and when training went on."""

    start_s: float
    kind: str
    lost_s: float
    end_s: float


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """How a run went. seconds: by RUN_PARTS, summing to total_s; training is work that was kept."""

    total_s: float
    seconds: Mapping[str, float]
    failures: Mapping[str, int]  # unexpected interruptions by kind, those during recovery included
    num_planned: int
    outages: tuple[Outage, ...]

    @property
    def goodput_fraction(self) -> float:
        """Kept work over all time."""
        return self.seconds["training"] / self.total_s

    @property
    def num_failures(self) -> int:
        """Unexpected interruptions."""
        return sum(self.failures.values())


def run_with_failures(
    work_s: float,
    *,
    num_gpus: int,
    fleet: Fleet,
    checkpoints: Checkpoints,
    operations: Operations,
    rng: np.random.Generator,
    rate_factor: float = 1.0,
) -> RunOutcome:
    """Run work_s seconds of undisturbed training on num_gpus GPUs to its end.

    rate_factor: on the fleet's rate. The times at which machines fail depend on rng alone, so runs that differ in their
    checkpoints meet the same failures. Raises MoesimError where failures leave no time to work.

    >>> from moesim.catalog.failures import default_operations, load_fleet
    >>> checkpoints = Checkpoints(interval_s=1800, stall_s=30, write_s=30)
    >>> outcome = run_with_failures(
    ...     86400.0, num_gpus=16384, fleet=load_fleet("llama-3-16k-h100"), checkpoints=checkpoints,
    ...     operations=default_operations(16384, num_spares=20), rng=np.random.default_rng(0))
    >>> 0.5 < outcome.goodput_fraction < 1
    True
    """
    job = _Job(work_s, num_gpus, fleet, checkpoints, operations, rng, rate_factor)
    job.env.run(until=job.process)
    if job.done_s < work_s - _TINY_S:
        mean_s = HOUR_S / (fleet.per_gpu_hour.value * rate_factor * num_gpus)
        raise MoesimError(
            f"the run does not end: after {job.env.now / DAY_S:,.0f} days {job.done_s / work_s:.1%} of its work is "
            f"done; a failure comes every {mean_s:,.0f} s, and a checkpoint every {checkpoints.interval_s:,.0f} s"
        )
    return RunOutcome(
        total_s=float(job.env.now),
        seconds=dict(job.seconds),
        failures=dict(job.failures),
        num_planned=job.num_planned,
        outages=tuple(job.outages),
    )


_TINY_S = 1e-6
_PLANNED, _SPEED = "planned", "speed"


class _Job:
    """State of one run: the clock, what is done and what of it is safe, servers in reserve, the books."""

    def __init__(
        self,
        work_s: float,
        num_gpus: int,
        fleet: Fleet,
        checkpoints: Checkpoints,
        operations: Operations,
        rng: np.random.Generator,
        rate_factor: float,
    ) -> None:
        self.env = simpy.Environment()
        self.work_s, self.checkpoints, self.operations, self.fleet = work_s, checkpoints, operations, fleet
        self.done_s = self.safe_s = self.unsaved_s = 0.0
        self.writing: list[tuple[float, float]] = []  # (safe from, work) of checkpoints under way
        self.is_training = self.is_slow = False
        self.num_spares, self.num_missing, self.num_planned = operations.num_spares, 0, 0
        self.repaired = self.env.event()
        self.seconds = dict.fromkeys(RUN_PARTS, 0.0)
        self.failures: Counter[str] = Counter()
        self.outages: list[Outage] = []
        self.process = self.env.process(self.job())
        failing, slowing, planning = rng.spawn(3)
        self.env.process(self.fail(failing, HOUR_S / (fleet.per_gpu_hour.value * rate_factor * num_gpus)))
        if operations.slow_per_gpu_hour and operations.slow_fraction:
            self.env.process(self.turn_slow(slowing, HOUR_S / (operations.slow_per_gpu_hour * num_gpus)))
        if operations.planned_per_day:
            self.env.process(self.plan(planning, DAY_S / operations.planned_per_day))

    @property
    def is_hopeless(self) -> bool:
        """Whether the run has taken far too long already."""
        return bool(self.env.now > GIVE_UP * self.work_s)

    # What happens to the job.

    def fail(self, rng: np.random.Generator, mean_s: float) -> Generator[simpy.Event, Any, None]:
        """Machines fail at random; which kind of failure is drawn by its share."""
        until = np.cumsum([kind.share for kind in self.fleet.kinds])
        while True:
            yield self.env.timeout(rng.exponential(mean_s))
            which = min(int(np.searchsorted(until, rng.random())), len(until) - 1)
            self.interrupt(self.fleet.kinds[which])

    def turn_slow(self, rng: np.random.Generator, mean_s: float) -> Generator[simpy.Event, Any, None]:
        """A server turns slow, is found after a while, and is swapped in a planned stop."""
        while True:
            yield self.env.timeout(rng.exponential(mean_s))
            self.is_slow = True
            self.interrupt(_SPEED)
            yield self.env.timeout(self.operations.slow_detection_s)
            self.is_slow = False
            self.interrupt(_PLANNED)

    def plan(self, rng: np.random.Generator, mean_s: float) -> Generator[simpy.Event, Any, None]:
        """Planned stops; one that falls into a recovery is done with it."""
        while True:
            yield self.env.timeout(rng.exponential(mean_s))
            self.interrupt(_PLANNED)

    def interrupt(self, cause: FailureKind | str) -> None:
        """Tell the job; what is no failure matters only while it trains."""
        if self.process.is_alive and (self.is_training or isinstance(cause, FailureKind)):
            self.process.interrupt(cause)

    def repair(self) -> Generator[simpy.Event, Any, None]:
        """A failed server comes back as a spare."""
        yield self.env.timeout(self.operations.repair_s)
        self.num_spares += 1
        self.repaired.succeed()
        self.repaired = self.env.event()

    # What the job does.

    def job(self) -> Generator[simpy.Event, Any, None]:
        while self.done_s < self.work_s - _TINY_S and not self.is_hopeless:
            cut = yield from self.train()
            if cut == _PLANNED:
                cut = yield from self.stop_as_planned()
            if isinstance(cut, FailureKind):
                yield from self.recover(cut)

    def train(self) -> Events:
        """Work, with checkpoints, until the work is done or something cuts in; returns what did.

        One wait spans any number of checkpoints: what was done when it ends follows from the clock.
        """
        began, cut = self.env.now, None
        slowdown = 1.0 + (self.operations.slow_fraction if self.is_slow else 0.0)
        first_s = (self.checkpoints.interval_s - self.unsaved_s) * slowdown  # until the first checkpoint begins
        cycle_s = self.checkpoints.interval_s * slowdown + self.checkpoints.stall_s
        left_s = self.work_s - self.done_s
        num_checkpoints = math.ceil(max(left_s - first_s / slowdown, 0.0) / self.checkpoints.interval_s - _TINY_S)
        self.is_training = True
        try:
            yield self.env.timeout(left_s * slowdown + num_checkpoints * self.checkpoints.stall_s)
        except simpy.Interrupt as interrupt:
            cut = interrupt.cause
        self.is_training = False
        passed_s = self.env.now - began
        num_begun = 0 if passed_s < first_s else 1 + math.floor((passed_s - first_s) / cycle_s)
        if cut is None:
            num_begun = min(num_begun, num_checkpoints)
        since_s = passed_s - (first_s + (num_begun - 1) * cycle_s) if num_begun else 0.0  # of the last one begun
        stalled_s = max(num_begun - 1, 0) * self.checkpoints.stall_s
        stalled_s += min(since_s, self.checkpoints.stall_s) if num_begun else 0.0
        self.note_checkpoints(began + first_s, cycle_s, num_begun)
        work_s = (passed_s - stalled_s) / slowdown
        self.unsaved_s = (
            (since_s - min(since_s, self.checkpoints.stall_s)) / slowdown if num_begun else (self.unsaved_s + work_s)
        )
        self.done_s += work_s
        self.seconds["training"] += work_s
        self.seconds["slow"] += passed_s - stalled_s - work_s
        self.seconds["checkpoint"] += stalled_s
        return cut

    def note_checkpoints(self, first_at_s: float, cycle_s: float, num_begun: int) -> None:
        """Checkpoints that began at first_at_s and every cycle_s since: what of them is safe by now, what not yet."""
        self.settle()
        work_s = self.done_s + self.checkpoints.interval_s - self.unsaved_s  # of the first
        safe_for_s = self.env.now - first_at_s - self.checkpoints.write_s
        num_safe = min(num_begun, max(math.floor(safe_for_s / cycle_s) + 1, 0)) if num_begun else 0
        if num_safe:
            self.safe_s = work_s + (num_safe - 1) * self.checkpoints.interval_s
            self.writing.clear()
        for i in range(num_safe, num_begun):
            safe_at_s = first_at_s + i * cycle_s + self.checkpoints.write_s
            self.writing.append((safe_at_s, work_s + i * self.checkpoints.interval_s))

    def stop_as_planned(self) -> Events:
        """Save first, then stop: nothing is lost but time."""
        self.num_planned += 1
        cut = yield from self.hold("planned", self.checkpoints.write_s)
        if cut is None:
            self.safe_s, self.unsaved_s, self.writing = self.done_s, 0.0, []
            cut = yield from self.hold("planned", self.operations.restart_s)
        return cut

    def recover(self, cut: Cut) -> Generator[simpy.Event, Any, None]:
        """Back to the last safe checkpoint: notice, swap, restart; from the start where another failure cuts in."""
        while isinstance(cut, FailureKind) and not self.is_hopeless:
            began, kind = self.env.now, cut
            lost_s = self.throw_back()
            self.failures[kind.name] += 1
            if kind.needs_server:
                self.num_missing += 1
                self.env.process(self.repair())
            cut = yield from self.hold("detection", kind.detection_s)
            if cut is None:
                cut = yield from self.swap()
            if cut is None:
                cut = yield from self.hold("restart", self.operations.restart_s)
            self.outages.append(Outage(start_s=began, kind=kind.name, lost_s=lost_s, end_s=self.env.now))

    def throw_back(self) -> float:
        """Forget what is not safe; returns how much work that was [s]."""
        self.settle()
        lost_s = self.done_s - self.safe_s
        self.seconds["training"] -= lost_s
        self.seconds["repeated"] += lost_s
        self.done_s, self.unsaved_s, self.writing = self.safe_s, 0.0, []
        return lost_s

    def settle(self) -> None:
        """Checkpoints that are written by now are safe."""
        while self.writing and self.writing[0][0] <= self.env.now:
            self.safe_s = self.writing.pop(0)[1]

    def swap(self) -> Events:
        """Bring spares in for the servers that left; without one, wait for a repair."""
        while self.num_missing:
            if self.num_spares:
                self.num_spares -= 1
                self.num_missing -= 1
                cut = yield from self.hold("spare", self.operations.swap_s)
            else:
                cut = yield from self.hold("spare", self.repaired)
            if cut is not None:
                return cut
        return None

    def hold(self, part: str, what: float | simpy.Event) -> Events:
        """Let time pass and book it; returns the failure that cut in."""
        began, cut = self.env.now, None
        try:
            yield what if isinstance(what, simpy.Event) else self.env.timeout(what)
        except simpy.Interrupt as interrupt:
            cut = interrupt.cause
        self.seconds[part] += self.env.now - began
        return cut
