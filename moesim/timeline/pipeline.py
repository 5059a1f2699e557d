"""The clock: SimPy processes, one per stage and block of ranks, that run their operations in order and wait for one
another.

A process waits, holds and notes when; every duration is computed before. The last stage turns a micro-batch round.
After its last backward a stage's blocks meet for the gradient reduction, then all stages meet for the gradient norm,
then the optimizer runs. See docs/model.md#pipeline.

Legend: B blocks of a stage that are simulated, M micro-batches, C chunks of all stages in order of depth.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray

from moesim.errors import MoesimError
from moesim.timeline.schedule import Operation

Floats = NDArray[np.float64]
Schedule = Callable[[int, int], Sequence[Operation]]


class DeadlockError(MoesimError):
    """Nothing can go on, yet some processes wait: names them and what they wait for."""


@dataclass(frozen=True, kw_only=True)
class StageWork:
    """What one stage does, in seconds."""

    forward_CBM: Floats  # (vpp, B, M)
    backward_CBM: Floats
    forward_send_C: Floats  # (vpp,) to hand a chunk's output to the next chunk; 0 where it stays or ends
    backward_send_C: Floats
    reduce_s: float  # gradient reduction, already less what overlaps
    optimizer_s: float
    gather_s: float  # updated weights back to all replicas


@dataclass(frozen=True, kw_only=True)
class StageClock:
    """When one stage did it."""

    forward_start_CBM: Floats
    backward_start_CBM: Floats
    bubble_B: Floats  # waiting for a micro-batch, and at the end for other stages
    block_wait_B: Floats  # waiting for other blocks at the gradient reduction
    reduce_start_s: float
    optimizer_start_s: float


def run_pipeline(stages: Sequence[StageWork], schedule: Schedule) -> tuple[float, list[StageClock]]:
    """Run one step; returns its length [s] and each stage's clock. Raises DeadlockError naming stages and blocks that
    wait in vain.
    """
    vpp, num_blocks, num_micro_batches = stages[0].forward_CBM.shape
    run = _Run(stages, num_blocks, num_micro_batches, vpp)
    processes = [
        run.env.process(run.stage_process(stage, block, schedule(stage, num_micro_batches)))
        for stage in range(len(stages))
        for block in range(num_blocks)
    ]
    run.env.run()
    stuck = [
        (i, waits) for i, (process, waits) in enumerate(zip(processes, run.waits_for, strict=True)) if process.is_alive
    ]
    if stuck:
        told = "; ".join(f"stage {i // num_blocks} block {i % num_blocks} waits for {waits}" for i, waits in stuck[:8])
        raise DeadlockError(
            f"the step cannot go on: {told}" + (f"; and {len(stuck) - 8} more" if len(stuck) > 8 else "")
        )
    clocks = [
        StageClock(
            forward_start_CBM=run.start[s, 0],
            backward_start_CBM=run.start[s, 1],
            bubble_B=run.bubble[s],
            block_wait_B=run.block_wait[s],
            reduce_start_s=run.reduce_start[s],
            optimizer_start_s=run.optimizer_start,
        )
        for s in range(len(stages))
    ]
    return run.end, clocks


class _Run:
    """State of one run: the environment, the meeting points, the notes."""

    def __init__(self, stages: Sequence[StageWork], num_blocks: int, num_micro_batches: int, vpp: int) -> None:
        self.env = simpy.Environment()
        self.stages, self.num_blocks, self.vpp = stages, num_blocks, vpp
        self.arrived: dict[tuple[bool, int, int, int], simpy.Event] = {}
        self.reduce_meeting = [_Meeting(self.env, num_blocks) for _ in stages]
        self.norm_meeting = _Meeting(self.env, num_blocks * len(stages))
        self.end_meeting = _Meeting(self.env, num_blocks * len(stages))
        self.start = np.zeros((len(stages), 2, vpp, num_blocks, num_micro_batches))
        self.bubble = np.zeros((len(stages), num_blocks))
        self.block_wait = np.zeros((len(stages), num_blocks))
        self.reduce_start = [0.0] * len(stages)
        self.optimizer_start = self.end = 0.0
        self.waits_for = [""] * (len(stages) * num_blocks)

    def event(self, is_backward: bool, depth: int, block: int, micro_batch: int) -> simpy.Event:
        """The arrival of a micro-batch at the chunk of that depth (0..pp*vpp-1)."""
        key = (is_backward, depth, block, micro_batch)
        if key not in self.arrived:
            self.arrived[key] = self.env.event()
        return self.arrived[key]

    def stage_process(
        self, stage: int, block: int, operations: Sequence[Operation]
    ) -> Generator[simpy.Event, Any, None]:
        env, work, pp = self.env, self.stages[stage], len(self.stages)
        me, last = stage * self.num_blocks + block, pp * self.vpp - 1
        for op in operations:
            depth = op.chunk * pp + stage
            if op.is_backward or depth > 0:
                kind = "backward" if op.is_backward else "forward"
                self.waits_for[me] = f"the {kind} of micro-batch {op.micro_batch} at chunk {depth}"
                asked = env.now
                yield self.event(op.is_backward, depth, block, op.micro_batch)
                self.bubble[stage, block] += env.now - asked
            self.start[stage, int(op.is_backward), op.chunk, block, op.micro_batch] = env.now
            seconds = (work.backward_CBM if op.is_backward else work.forward_CBM)[op.chunk, block, op.micro_batch]
            send_s = (work.backward_send_C if op.is_backward else work.forward_send_C)[op.chunk]
            yield env.timeout(seconds + send_s)
            onward = depth - 1 if op.is_backward else depth + 1
            if not op.is_backward and depth == last:
                self.event(True, depth, block, op.micro_batch).succeed()
            elif 0 <= onward <= last:
                self.event(op.is_backward, onward, block, op.micro_batch).succeed()
        yield from self.finish(stage, block, me)

    def finish(self, stage: int, block: int, me: int) -> Generator[simpy.Event, Any, None]:
        """Gradient reduction over the stage's blocks, the gradient norm over all, the optimizer, the weights back."""
        env, work = self.env, self.stages[stage]
        self.waits_for[me] = "the other blocks of its stage at the gradient reduction"
        asked = env.now
        yield self.reduce_meeting[stage].join()
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
