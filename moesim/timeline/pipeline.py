"""The clock: SimPy processes, one per stage and block of ranks, that run their operations in order and wait for one
another.

A process waits, holds and notes when; every duration is computed before. The last chunk of a line turns a micro-batch
round. After its last backward a stage's blocks meet for the gradient reduction, then all stages meet for the gradient
norm, then the optimizer runs. See docs/model.md#pipeline.

Legend: B blocks of a stage that are simulated, M micro-batches of a line, C chunks of a stage.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Protocol

import numpy as np
import simpy
from numpy.typing import NDArray

from moesim.describe.schedules import WAYS, Operation, Way
from moesim.errors import MoesimError

Floats = NDArray[np.float64]


class Order(Protocol):
    """What the clock asks of a schedule; num_chunks of a stage, num_lines through the pipeline."""

    @property
    def num_chunks(self) -> int: ...
    @property
    def num_lines(self) -> int: ...
    def __call__(self, stage: int, num_micro_batches: int) -> Sequence[Operation]: ...
    def place(self, stage: int, chunk: int) -> tuple[int, int]: ...


class DeadlockError(MoesimError):
    """Nothing can go on, yet some processes wait: names them and what they wait for."""


@dataclass(frozen=True, kw_only=True)
class StageWork:
    """What one stage does, in seconds."""

    seconds_CBM: Mapping[Way, Floats]  # of each way in which it runs alone
    pair_CBM: Floats | None = None  # of a forward with the backward beside it, by the forward's chunk and micro-batch
    forward_send_C: Floats  # (C,) to hand a chunk's output to the next chunk; 0 where it stays or ends
    backward_send_C: Floats
    reduce_s: float  # gradient reduction, already less what overlaps
    optimizer_s: float
    gather_s: float  # updated weights back to all replicas

    def takes_s(self, op: Operation, block: int) -> float:
        """How long an operation keeps a block."""
        if op.beside is None:
            return float(self.seconds_CBM[op.way][op.chunk, block, op.micro_batch])
        assert self.pair_CBM is not None
        return float(self.pair_CBM[op.chunk, block, op.micro_batch])

    def send_s(self, op: Operation) -> float:
        """How long handing on what an operation made takes; both ways at once where a forward ran beside a backward."""
        own = 0.0
        if op.way == "forward":
            own = float(self.forward_send_C[op.chunk])
        elif op.way != "weight_gradient":
            own = float(self.backward_send_C[op.chunk])
        return own if op.beside is None else max(own, self.send_s(op.beside))


@dataclass(frozen=True, kw_only=True)
class StageClock:
    """When one stage did it."""

    start_CBM: Mapping[Way, Floats]  # 0 where a micro-batch takes no such way
    send_s: float  # that a block spent handing on
    bubble_B: Floats  # waiting for a micro-batch, and at the end for other stages
    block_wait_B: Floats  # waiting for other blocks at the gradient reduction
    reduce_start_s: float
    optimizer_start_s: float


def run_pipeline(
    stages: Sequence[StageWork],
    schedule: Order,
    num_replicas: int | None = None,
    name: Callable[[int, int], str] = "stage {} block {}".format,
) -> tuple[float, list[StageClock]]:
    """Run one step; returns its length [s] and each stage's clock. Raises DeadlockError naming stages and blocks that
    wait in vain.

    num_replicas: how many blocks a stage has of which those simulated are a sample; None: these are all. name: of a
    stage and a block, for an error's words.
    """
    num_chunks, num_blocks, num_micro_batches = next(iter(stages[0].seconds_CBM.values())).shape
    assert num_chunks == schedule.num_chunks
    run = _Run(stages, schedule, num_blocks, num_micro_batches)
    run.num_replicas = num_replicas or num_blocks
    operations = [schedule(stage, num_micro_batches * schedule.num_lines) for stage in range(len(stages))]
    processes = [
        run.env.process(run.stage_process(stage, block, operations[stage]))
        for stage in range(len(stages))
        for block in range(num_blocks)
    ]
    run.env.run()
    stuck = [
        (i, waits) for i, (process, waits) in enumerate(zip(processes, run.waits_for, strict=True)) if process.is_alive
    ]
    if stuck:
        told = "; ".join(f"{name(*divmod(i, num_blocks))} waits for {waits}" for i, waits in stuck[:8])
        raise DeadlockError(
            f"the step cannot go on: {told}" + (f"; and {len(stuck) - 8} more" if len(stuck) > 8 else "")
        )
    clocks = [
        StageClock(
            start_CBM=dict(zip(WAYS, run.start[s], strict=True)),
            send_s=sum(stages[s].send_s(op) for op in operations[s]),
            bubble_B=run.bubble[s],
            block_wait_B=run.block_wait[s],
            reduce_start_s=run.reduce_start[s],
            optimizer_start_s=run.optimizer_start,
        )
        for s in range(len(stages))
    ]
    return run.end, clocks


def expected_latest_s(ended_B: Floats, num_replicas: int) -> float:
    """When the slowest of num_replicas is expected, of which ended_B are a sample: normal, at Blom's quantile.

    See docs/model.md#representatives.

    >>> expected_latest_s(np.array([1.0, 1.0]), 16)
    1.0
    """
    latest = float(ended_B.max())
    if ended_B.size in (1, num_replicas):
        return latest
    return max(latest, float(ended_B.mean() + expected_largest(num_replicas) * ended_B.std(ddof=1)))


def expected_largest(number: int) -> float:
    """The expected largest of so many standard normal numbers. Blom 1958.

    >>> round(expected_largest(8), 2)
    1.43
    """
    return NormalDist().inv_cdf((number - 0.375) / (number + 0.25)) if number > 1 else 0.0


class _Run:
    """State of one run: the environment, the meeting points, the notes."""

    def __init__(self, stages: Sequence[StageWork], schedule: Order, num_blocks: int, num_micro_batches: int) -> None:
        self.env = simpy.Environment()
        self.stages, self.num_blocks, num_chunks = stages, num_blocks, schedule.num_chunks
        self.num_replicas = num_blocks
        self.places = [[schedule.place(s, c) for c in range(num_chunks)] for s in range(len(stages))]
        self.last_depth = len(stages) * num_chunks // schedule.num_lines - 1
        self.arrived: dict[tuple[bool, int, int, int, int], simpy.Event] = {}
        self.reduce_meeting = [_Meeting(self.env, num_blocks) for _ in stages]
        self.norm_meeting = _Meeting(self.env, num_blocks * len(stages))
        self.end_meeting = _Meeting(self.env, num_blocks * len(stages))
        self.start = np.zeros((len(stages), len(WAYS), num_chunks, num_blocks, num_micro_batches))
        self.bubble = np.zeros((len(stages), num_blocks))
        self.block_wait = np.zeros((len(stages), num_blocks))
        self.ended = np.zeros((len(stages), num_blocks))  # last operations
        self.reduce_start = [0.0] * len(stages)
        self.optimizer_start = self.end = 0.0
        self.waits_for = [""] * (len(stages) * num_blocks)

    def event(self, is_backward: bool, line: int, depth: int, block: int, micro_batch: int) -> simpy.Event:
        """The arrival of a micro-batch at the chunk of that depth."""
        key = (is_backward, line, depth, block, micro_batch)
        if key not in self.arrived:
            self.arrived[key] = self.env.event()
        return self.arrived[key]

    def stage_process(
        self, stage: int, block: int, operations: Sequence[Operation]
    ) -> Generator[simpy.Event, Any, None]:
        env, work = self.env, self.stages[stage]
        me = stage * self.num_blocks + block
        for op in operations:
            both = (op,) if op.beside is None else (op, op.beside)
            for part in both:
                line, depth = self.places[stage][part.chunk]
                is_backward = part.way != "forward"
                if part.way == "weight_gradient" or not (is_backward or depth > 0):
                    continue
                word = "backward" if is_backward else "forward"
                self.waits_for[me] = f"the {word} of micro-batch {part.micro_batch} at chunk {depth}" + (
                    f" of line {line}" if line else ""
                )
                asked = env.now
                yield self.event(is_backward, line, depth, block, part.micro_batch)
                self.bubble[stage, block] += env.now - asked
            for part in both:
                self.start[stage, WAYS.index(part.way), part.chunk, block, part.micro_batch] = env.now
            yield env.timeout(work.takes_s(op, block) + work.send_s(op))
            for part in both:
                self.hand_on(part, *self.places[stage][part.chunk], block)
        yield from self.finish(stage, block, me)

    def hand_on(self, op: Operation, line: int, depth: int, block: int) -> None:
        """What an operation made arrives where it is awaited."""
        if op.way == "weight_gradient":
            return
        is_backward = op.way != "forward"
        onward = depth - 1 if is_backward else depth + 1
        if not is_backward and depth == self.last_depth:
            self.event(True, line, depth, block, op.micro_batch).succeed()
        elif 0 <= onward <= self.last_depth:
            self.event(is_backward, line, onward, block, op.micro_batch).succeed()

    def finish(self, stage: int, block: int, me: int) -> Generator[simpy.Event, Any, None]:
        """Gradient reduction over the stage's blocks, the gradient norm over all, the optimizer, the weights back."""
        env, work = self.env, self.stages[stage]
        self.waits_for[me] = "the other blocks of its stage at the gradient reduction"
        asked = self.ended[stage, block] = env.now
        yield self.reduce_meeting[stage].join()
        yield env.timeout(max(expected_latest_s(self.ended[stage], self.num_replicas) - env.now, 0.0))
        self.block_wait[stage, block] = env.now - asked
        self.reduce_start[stage] = env.now
        yield env.timeout(work.reduce_s)
        self.waits_for[me] = "the other stages at the gradient norm"
        asked = env.now
        yield self.norm_meeting.join()
        self.bubble[stage, block] += env.now - asked
        self.optimizer_start = env.now
        yield env.timeout(work.optimizer_s + work.gather_s)
        asked = env.now
        yield self.end_meeting.join()
        self.bubble[stage, block] += env.now - asked
        self.end = env.now


class _Meeting:
    """A barrier of a known number of processes."""

    def __init__(self, env: simpy.Environment, size: int) -> None:
        self.missing, self.all_here = size, env.event()

    def join(self) -> simpy.Event:
        self.missing -= 1
        if self.missing == 0:
            self.all_here.succeed()
        return self.all_here
