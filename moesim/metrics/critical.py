"""The critical path of a finished step: the operations, one after another, that its length is made of.

An operation begins when its stage has ended the one before or when its micro-batch has arrived, whichever is later;
from the last gradient reduction the path follows what was later, back to the start. See docs/model.md#critical-path.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.describe.schedules import Way
from moesim.timeline.trace import StageRun, Trace

TOLERANCE = 1e-9  # of the step, by which two clocks may differ that mean one moment


@dataclass(frozen=True, kw_only=True)
class CriticalOperation:
    """One operation on the path; seconds include handing on. micro_batches: its own, that of a backward beside it."""

    stage: int
    block: int
    way: Way
    chunk: int
    micro_batches: tuple[int, ...]
    start_s: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class CriticalPath:
    """Operations in order of time; parts_s: what the path's seconds are spent on, waiting for the slowest included,
    with the tail after the last operation; they sum to the step.
    """

    operations: tuple[CriticalOperation, ...]
    parts_s: dict[str, float]

    @property
    def seconds_by_stage(self) -> dict[int, float]:
        total: dict[int, float] = defaultdict(float)
        for op in self.operations:
            total[op.stage] += op.seconds
        return dict(sorted(total.items()))

    def to_dict(self) -> dict[str, Any]:
        return {
            "num_operations": len(self.operations),
            "num_stage_changes": sum(
                a.stage != b.stage for a, b in zip(self.operations, self.operations[1:], strict=False)
            ),
            "parts_s": self.parts_s,
            "seconds_by_stage": {str(stage): seconds for stage, seconds in self.seconds_by_stage.items()},
        }


@dataclass(frozen=True, kw_only=True)
class _Done:
    op: CriticalOperation
    shares: dict[str, float]  # of its seconds, by part

    @property
    def end_s(self) -> float:
        return self.op.start_s + self.op.seconds


def critical_path(trace: Trace) -> CriticalPath:
    """The path through a step, from its first operation to its end."""
    last_stage = max(trace.stages, key=_tail_start_s)
    done = [one for run in trace.stages for one in _operations(run)]
    ends = np.array([one.end_s for one in done])
    order = np.argsort(ends, kind="stable")
    tolerance = trace.step_s * TOLERANCE
    here = [one for one in done if one.op.stage == last_stage.stage]
    at: _Done | None = max(here, key=lambda one: one.end_s)
    path: list[_Done] = []
    while at is not None:
        path.append(at)
        at = _before(at, done, ends, order, tolerance)
    path.reverse()
    parts: dict[str, float] = defaultdict(float)
    for one in path:
        for part, share in one.shares.items():
            parts[part] += share * one.op.seconds
    for _, part, start_s, seconds in last_stage.tail:
        if start_s + seconds > path[-1].end_s:
            parts[part] += seconds
    rest_s = trace.step_s - sum(parts.values())
    parts["wait_for_slowest"] = parts.get("wait_for_slowest", 0.0) + rest_s  # for other blocks and stages, in the tail
    return CriticalPath(operations=tuple(one.op for one in path), parts_s=dict(parts))


def _tail_start_s(run: StageRun) -> float:
    _, _, start_s, seconds = run.tail[0]
    return start_s + seconds


def _operations(run: StageRun) -> list[_Done]:
    """Every operation of a stage, block by block."""
    found = []
    for op in run.operations:
        num_blocks, num_runs = op.start_BN.shape
        total = {part: float(np.mean(seconds_R)) for part, seconds_R in op.times.part_R.items()}
        whole = sum(total.values())
        inner = {part: seconds / whole for part, seconds in total.items()} if whole else {}
        micro_batches = [own_N for own_N in (op.micro_batches_N, op.beside_N) if own_N is not None]
        for block in range(num_blocks):
            for n in range(num_runs):
                own_s = float(op.times.duration_MB[n, block])
                seconds = own_s + op.send_s
                shares = {part: share * own_s / seconds for part, share in inner.items()} if seconds else {}
                if seconds:
                    shares["pipeline_send"] = op.send_s / seconds
                found.append(
                    _Done(
                        op=CriticalOperation(
                            stage=run.stage,
                            block=block,
                            way=op.way,
                            chunk=op.chunk,
                            micro_batches=tuple(int(own_N[n]) for own_N in micro_batches),
                            start_s=float(op.start_BN[block, n]),
                            seconds=seconds,
                        ),
                        shares=shares,
                    )
                )
    return found


def _before(at: _Done, done: list[_Done], ends: np.ndarray, order: np.ndarray, tolerance: float) -> _Done | None:
    """What ended when this began: its stage's operation before, else the one that sent its micro-batch."""
    if at.op.start_s <= tolerance:
        return None
    low, high = np.searchsorted(ends, [at.op.start_s - tolerance, at.op.start_s + tolerance], sorter=order)
    candidates = [done[int(i)] for i in order[low:high] if done[int(i)].op.block == at.op.block]
    candidates = [one for one in candidates if one.op.start_s < at.op.start_s - tolerance]
    own = [one for one in candidates if one.op.stage == at.op.stage]
    same = [one for one in candidates if set(one.op.micro_batches) & set(at.op.micro_batches)]
    chosen = own or same or candidates
    assert chosen, f"nothing ended when {at.op} began"
    return chosen[0]
