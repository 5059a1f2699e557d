"""Memory over a step: what each stage's fullest GPU holds when an operation begins, at its worst moment and when it
ends, on the engine's own clock.

Legend: K operations of a stage in order, the optimizer step the last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.metrics.memory import profile_of
from moesim.timeline.trace import StageRun, Trace

Floats = NDArray[np.floating]
Key = tuple[str, int, int]  # way, chunk, micro-batch


@dataclass(frozen=True, kw_only=True, eq=False)
class StageTimeline:
    """Bytes that a stage's fullest GPU holds over a step, all parts together; times are seconds from its start."""

    stage: int
    rank: int
    names_K: tuple[str, ...]  # forward, backward, input_gradient, weight_gradient; optimizer
    chunk_K: NDArray[np.int64]  # -1: the optimizer
    micro_batch_K: NDArray[np.int64]
    start_s_K: Floats
    end_s_K: Floats
    begin_bytes_K: Floats
    peak_bytes_K: Floats
    end_bytes_K: Floats

    @property
    def peak_bytes(self) -> float:
        return float(self.peak_bytes_K.max())

    def rows(self) -> Iterator[tuple[int, int, str, int, int, float, float, float, float, float]]:
        """For a table: stage, rank, operation, chunk, micro-batch, start, end, bytes at begin, at most, at the end."""
        numbers = (self.start_s_K, self.end_s_K, self.begin_bytes_K, self.peak_bytes_K, self.end_bytes_K)
        places = zip(self.names_K, self.chunk_K, self.micro_batch_K, *numbers, strict=True)
        for name, chunk, micro_batch, *values in places:
            start_s, end_s, begin, peak, end = (float(value) for value in values)
            yield self.stage, self.rank, name, int(chunk), int(micro_batch), start_s, end_s, begin, peak, end


def memory_timeline(trace: Trace) -> tuple[StageTimeline, ...]:
    """One timeline for each stage, of its rank with the highest peak. docs/model.md#memory.

    >>> memory_timeline(run_step(scenario))[0].peak_bytes  # doctest: +SKIP
    76243906560.0
    """
    return tuple(_of_stage(trace, run) for run in trace.stages)


def _of_stage(trace: Trace, run: StageRun) -> StageTimeline:
    profile = profile_of(trace.scenario, trace.load, run.stage)
    _, group, rank = profile.fullest()
    global_rank = int(profile.ranks_GR[group, rank])
    layout = trace.scenario.layout
    block = (global_rank - int(layout.stage_ranks(run.stage)[0])) // layout.block_size
    start_of, end_of = _clock(run, min(block, trace.num_simulated_blocks - 1))
    keys = [(op.way, op.chunk, op.micro_batch) for op in profile.operations]
    live_K = profile.live_KGRP[:, group, rank].sum(axis=-1)
    peak_K = profile.peak_KGRP[:, group, rank].sum(axis=-1)
    begin_K = np.asarray(profile.held_bytes(live_K))
    last = float(profile.held_bytes(0.0))
    updating = float(profile.held_bytes(0.0, profile.static.update_bytes))
    update = next((start, start + seconds) for name, _, start, seconds in run.tail if name == "optimizer")
    return StageTimeline(
        stage=run.stage,
        rank=global_rank,
        names_K=(*(way for way, _, _ in keys), "optimizer"),
        chunk_K=np.array([*(chunk for _, chunk, _ in keys), -1]),
        micro_batch_K=np.array([*(micro_batch for _, _, micro_batch in keys), -1]),
        start_s_K=np.array([*(start_of[key] for key in keys), update[0]]),
        end_s_K=np.array([*(end_of[key] for key in keys), update[1]]),
        begin_bytes_K=np.append(begin_K, last),
        peak_bytes_K=np.append(np.maximum(np.asarray(profile.held_bytes(peak_K)), begin_K), updating),
        end_bytes_K=np.append(begin_K[1:], (last, last)),
    )


def _clock(run: StageRun, block: int) -> tuple[dict[Key, float], dict[Key, float]]:
    """When a block of the stage began and ended each operation."""
    start_of: dict[Key, float] = {}
    end_of: dict[Key, float] = {}
    for op in run.operations:
        durations_B = op.times.duration_MB
        own = min(block, durations_B.shape[1] - 1)
        for n, micro_batch in enumerate(op.micro_batches_N):
            key: Key = (op.way, op.chunk, int(micro_batch))
            start_of[key] = float(op.start_BN[block, n])
            end_of[key] = start_of[key] + float(durations_B[n, own])
            if op.beside is not None and op.beside_N is not None:
                partner: Key = ("backward", op.beside, int(op.beside_N[n]))
                start_of[partner], end_of[partner] = start_of[key], end_of[key]
    return start_of, end_of
