"""What a run leaves behind: when each operation began, what filled it, and how long each rank spent on what.

Spans are columns (arrays); they are expanded only for the traced ranks and only when asked for. ``write_chrome``
writes the JSON that Perfetto and chrome://tracing open. Times are seconds from the start of the step.

Legend: P phases, M or N runs of an operation, V traced ranks of a stage, R ranks of a stage, S spans.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesim.cost.device import DeviceCost
from moesim.describe.schedules import Way
from moesim.errors import InputError
from moesim.scenario import Scenario
from moesim.timeline.load import StepLoad
from moesim.timeline.packed import PackedWork
from moesim.timeline.phases import COMM_PARTS, Floats, OperationTimes
from moesim.units import MEGA, MICRO

MAX_BYTES = int(50 * MEGA)


@dataclass(frozen=True, kw_only=True)
class OperationRun:
    """All runs of one kind of operation (a way through a chunk) on one stage: when each simulated block began each."""

    way: Way
    chunk: int
    micro_batches_N: NDArray[np.int64]
    beside_N: NDArray[np.int64] | None  # micro-batches of the backward that runs beside it
    beside: int | None = None  # its chunk
    times: OperationTimes
    start_BN: Floats
    send_s: float

    @property
    def is_backward(self) -> bool:
        return self.way != "forward"


@dataclass(frozen=True, kw_only=True)
class StageRun:
    """One pipeline stage of a finished step."""

    stage: int
    traced_R: NDArray[np.int64]  # ranks of the stage whose spans are kept; [0] is the representative, [1] the hottest
    block_of_traced: NDArray[np.int64]
    operations: tuple[OperationRun, ...]
    tail: tuple[
        tuple[str, str, float, float], ...
    ]  # name, part, start_s, seconds: reduction, optimizer, the same on all ranks
    part_R: Mapping[str, Floats]  # seconds by part and rank; sums to the step
    hidden_comm_s: float  # communication that ran behind compute


@dataclass(frozen=True, kw_only=True)
class Spans:
    """Columns of equal length S: one row per thing a rank did."""

    rank: NDArray[np.int64]
    name: NDArray[np.int64]  # index into names
    layer: NDArray[np.int64]  # -1: not of a layer
    micro_batch: NDArray[np.int64]  # -1: not of a micro-batch
    is_backward: NDArray[np.bool_]
    is_comm: NDArray[np.bool_]
    start_s: Floats
    seconds: Floats
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rank)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A finished step."""

    scenario: Scenario
    device: DeviceCost
    load: StepLoad | None  # None for a dense model
    packed: PackedWork | None  # None where sequences are not packed from documents
    step_s: float
    stages: tuple[StageRun, ...]
    ranks_per_stage: int
    num_blocks: int  # independent blocks of ranks per stage
    num_simulated_blocks: int  # 1 when all blocks were the same, so that one stands for all

    def spans(self, ranks: Sequence[int] | None = None) -> Spans:
        """The spans of the traced ranks (global rank numbers), all of them by default. Raises InputError for a rank
        not traced.
        """
        known = {int(r) + run.stage * self.ranks_per_stage for run in self.stages for r in run.traced_R}
        missing = sorted(set(ranks or ()) - known)
        if missing:
            raise InputError("trace", "ranks", f"only ranks {sorted(known)} were traced", missing)
        names: dict[str, int] = {}
        columns = [_stage_columns(run, self, set(ranks) if ranks is not None else known, names) for run in self.stages]
        merged = [np.concatenate(column) for column in zip(*columns, strict=True)]
        order = np.lexsort((merged[6], merged[0]))
        rank, name, layer, micro_batch, is_backward, is_comm, start_s, seconds = (column[order] for column in merged)
        return Spans(
            rank=rank, name=name, layer=layer, micro_batch=micro_batch, is_backward=is_backward.astype(bool),
            is_comm=is_comm.astype(bool), start_s=start_s, seconds=seconds, names=tuple(names),
        )  # fmt: skip

    def representative_ranks(self) -> list[int]:
        """Global ranks traced by default: of each stage the one of median load, then of each stage the hottest."""
        kept = [[int(rank) + run.stage * self.ranks_per_stage for rank in run.traced_R[:2]] for run in self.stages]
        return list(dict.fromkeys([ranks[0] for ranks in kept] + [ranks[-1] for ranks in kept]))

    def write_chrome(self, path: Path, *, ranks: Sequence[int] | None = None, max_bytes: int = MAX_BYTES) -> list[int]:
        """Write Chrome trace JSON of the given traced ranks, as many as fit into max_bytes in the order given;
        returns them.

        pid = rank + 1; thread ids are unique in the file and above 0; times in microseconds. Zero-length spans are
        left out.
        """
        from moesim.door.files import write_bytes_atomically

        written: list[int] = []
        parts: list[bytes] = []
        size = 0
        for rank in ranks if ranks is not None else self.representative_ranks():
            text = ",\n".join(_chrome_events(self.spans([rank]), rank, len(written))).encode()
            if written and size + len(text) > max_bytes:
                break
            written.append(rank)
            parts.append(text)
            size += len(text)
        write_bytes_atomically(path, b'{"displayTimeUnit":"ms","traceEvents":[\n' + b",\n".join(parts) + b"\n]}\n")
        return written


def _stage_columns(run: StageRun, trace: Trace, wanted: set[int], names: dict[str, int]) -> list[NDArray[np.generic]]:
    offset = run.stage * trace.ranks_per_stage
    keep_V = np.array([int(r) + offset in wanted for r in run.traced_R], dtype=bool)
    ranks_V = run.traced_R[keep_V] + offset
    columns: list[list[NDArray[np.generic]]] = [[] for _ in range(8)]
    for op in run.operations:
        times = op.times
        shape = (*times.start_PMV.shape[:2], len(ranks_V))
        began_MV = op.start_BN[np.minimum(run.block_of_traced[keep_V], op.start_BN.shape[0] - 1)].T
        name_P = np.array([names.setdefault(name, len(names)) for name in times.names], dtype=np.int64)
        values = (
            np.broadcast_to(ranks_V, shape),
            np.broadcast_to(name_P[:, None, None], shape),
            np.broadcast_to(np.array(times.layers, dtype=np.int64)[:, None, None], shape),
            np.broadcast_to(_micro_batches(op)[:, :, None], shape),
            np.broadcast_to(times.is_backward_P[:, None, None], shape),
            np.broadcast_to(np.array([part in COMM_PARTS for part in times.parts])[:, None, None], shape),
            began_MV + times.start_PMV[:, :, keep_V],
            times.seconds_PMV[:, :, keep_V],
        )
        for column, value in zip(columns, values, strict=True):
            column.append(np.ascontiguousarray(value).ravel())
        if op.send_s:
            ended_MV = began_MV + times.duration_MB[:, run.block_of_traced[keep_V]]
            _append_sends(columns, names, ranks_V, op, ended_MV)
    for name, part, start_s, seconds in run.tail:
        index, n = names.setdefault(name, len(names)), len(ranks_V)
        tail = (
            ranks_V,
            np.full(n, index),
            np.full(n, -1),
            np.full(n, -1),
            np.full(n, False),
            np.full(n, part in COMM_PARTS),
            np.full(n, start_s),
            np.full(n, seconds),
        )
        for column, value in zip(columns, tail, strict=True):
            column.append(value)
    return [np.concatenate(column) for column in columns]


def _micro_batches(op: OperationRun) -> NDArray[np.int64]:
    """(P, N): whose micro-batch a phase of a run is."""
    own_N = op.micro_batches_N
    beside_N = own_N if op.beside_N is None else op.beside_N
    return np.where(op.times.is_backward_P[:, None], beside_N, own_N)


def _append_sends(
    columns: list[list[NDArray[np.generic]]],
    names: dict[str, int],
    ranks_V: NDArray[np.int64],
    op: OperationRun,
    ended_MV: Floats,
) -> None:
    """One span for each time a rank handed a micro-batch to the neighbouring stage."""
    shape = ended_MV.shape
    values = (
        np.broadcast_to(ranks_V, shape),
        np.full(shape, names.setdefault("send to next stage", len(names))),
        np.full(shape, -1),
        np.broadcast_to(op.micro_batches_N[:, None], shape),
        np.full(shape, op.is_backward),
        np.full(shape, True),
        ended_MV,
        np.full(shape, op.send_s),
    )
    for column, value in zip(columns, values, strict=True):
        column.append(np.ascontiguousarray(value).ravel())


def _chrome_events(spans: Spans, rank: int, position: int) -> Iterator[str]:
    """Events of one rank: two threads (what computes, what communicates), whose ids no other rank of the file has."""
    pid, first_tid = rank + 1, 2 * position + 1
    yield json.dumps(
        {"ph": "M", "name": "process_name", "pid": pid, "tid": first_tid, "args": {"name": f"rank {rank}"}}
    )
    for tid, title in ((first_tid, "computing"), (first_tid + 1, "communication")):
        yield json.dumps({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": title}})
    labels = [json.dumps(name) for name in spans.names]
    rows = zip(spans.name.tolist(), spans.layer.tolist(), spans.micro_batch.tolist(), spans.is_backward.tolist(),
               spans.is_comm.tolist(),
               (spans.start_s / MICRO).tolist(), (spans.seconds / MICRO).tolist(), strict=True)  # fmt: skip
    for name, layer, micro_batch, is_backward, is_comm, start_us, us in rows:
        if us <= 0:
            continue
        tid = first_tid + is_comm
        way = "backward" if is_backward else "forward"
        args = f',"args":{{"layer":{layer},"micro_batch":{micro_batch},"way":"{way}"}}' if micro_batch >= 0 else ""
        yield f'{{"ph":"X","name":{labels[name]},"pid":{pid},"tid":{tid},"ts":{start_us:.3f},"dur":{us:.3f}{args}}}'
