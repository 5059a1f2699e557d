"""A pipeline's clock without processes: a schedule as rows of numbers, run by a recurrence.

An operation begins when its stage is done with the one before and what it needs has arrived. Durations repeat every few
micro-batches, so a long step settles into a period: it is run for some periods and drawn out over the rest. See
docs/model.md#fast-path.

Legend: O operations of all stages, S stages, C chunks of a stage, W ways (describe.schedules.WAYS), N sampled
micro-batches, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.describe.schedules import WAYS, Operation, Schedule, ScheduleName, make_schedule

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
FULL_ROUNDS = 8  # times the depth of the pipeline: as many micro-batches are run one by one


@dataclass(frozen=True, kw_only=True, eq=False)
class Order:
    """Operations of all stages so that each stands behind what it waits for; after_O: what that is, -1 for nothing.

    unique rows of what a stage has in flight: flight_UC chunks of each kind when an operation of a stage begins.
    """

    stage_O: Ints
    chunk_O: Ints
    way_O: Ints
    micro_batch_O: Ints
    after_O: Ints
    flight_stage_U: Ints
    flight_chunk_U: Ints
    flight_forward_U: NDArray[np.bool_]
    flight_UC: Ints


@lru_cache(maxsize=4096)
def order_of(name: ScheduleName, pp: int, vpp: int, num_micro_batches: int) -> Order:
    """The order of a schedule of one line (not DualPipe, no pairs)."""
    schedule = make_schedule(name, pp=pp, vpp=vpp)
    assert schedule.num_lines == 1
    queues = [schedule(stage, num_micro_batches) for stage in range(pp)]
    last_depth = pp * schedule.num_chunks - 1
    done: dict[tuple[bool, int, int], int] = {}  # is backward, depth, micro-batch: row
    at = [0] * pp
    rows: list[tuple[int, ...]] = []
    moved = True
    while moved:
        moved = False
        for stage, queue in enumerate(queues):
            while at[stage] < len(queue):
                op = queue[at[stage]]
                needed = _needed(schedule, stage, op, last_depth)
                if needed is not None and needed not in done:
                    break
                is_backward, depth = op.way != "forward", schedule.place(stage, op.chunk)[1]
                if op.way != "weight_gradient":
                    done[is_backward, depth, op.micro_batch] = len(rows)
                after = -1 if needed is None else done[needed]
                rows.append((stage, op.chunk, WAYS.index(op.way), op.micro_batch, after))
                at[stage] += 1
                moved = True
    assert all(reached == len(queue) for reached, queue in zip(at, queues, strict=True))
    columns = np.array(rows, dtype=np.int64).T.copy()
    flights = dict.fromkeys(
        flight for stage, queue in enumerate(queues) for flight in _flights(stage, queue, schedule.num_chunks)
    )
    return Order(
        stage_O=columns[0],
        chunk_O=columns[1],
        way_O=columns[2],
        micro_batch_O=columns[3],
        after_O=columns[4],
        flight_stage_U=np.array([flight[0] for flight in flights], dtype=np.int64),
        flight_chunk_U=np.array([flight[1] for flight in flights], dtype=np.int64),
        flight_forward_U=np.array([flight[2] for flight in flights], dtype=bool),
        flight_UC=np.array([flight[3:] for flight in flights], dtype=np.int64),
    )


def _needed(schedule: Schedule, stage: int, op: Operation, last_depth: int) -> tuple[bool, int, int] | None:
    """Which pass an operation waits for: is backward, depth, micro-batch."""
    depth = schedule.place(stage, op.chunk)[1]
    if op.way == "weight_gradient" or (op.way == "forward" and depth == 0):
        return None
    if op.way == "forward":
        return False, depth - 1, op.micro_batch
    return (False, depth, op.micro_batch) if depth == last_depth else (True, depth + 1, op.micro_batch)


def _flights(stage: int, queue: list[Operation], num_chunks: int) -> list[tuple[int, ...]]:
    """(stage, chunk, is forward, chunks kept of each kind) as each operation begins."""
    kept, found = [0] * num_chunks, []
    for op in queue:
        found.append((stage, op.chunk, int(op.way == "forward"), *kept))
        if op.way != "input_gradient":
            kept[op.chunk] += 1 if op.way == "forward" else -1
    return found


def pipeline_s(
    name: ScheduleName, vpp: int, num_micro_batches: int, takes_SCWN: Floats, casts_SC: Floats, reduce_S: Floats
) -> float:
    """Seconds until all stages have reduced their gradients.

    takes_SCWN: each way through a chunk, sending on included, micro-batch by sampled micro-batch; casts_SC: what the
    first forward takes longer.
    """
    pp, _, _, num_samples = takes_SCWN.shape
    if pp == 1 and vpp == 1:
        ways = ways_of(name)
        whole, rest = divmod(num_micro_batches, num_samples)
        each_N = takes_SCWN[0, 0][list(ways)].sum(axis=0)
        return float(whole * each_N.sum() + each_N[:rest].sum() + casts_SC[0, 0] + reduce_S[0])
    period = int(np.lcm(pp if vpp > 1 else 1, num_samples))
    most = FULL_ROUNDS * pp + 2 * period
    if num_micro_batches <= most:
        return run_order(order_of(name, pp, vpp, num_micro_batches), takes_SCWN, casts_SC, reduce_S)
    short = num_micro_batches - -(-(num_micro_batches - FULL_ROUNDS * pp - period) // period) * period
    short_s, longer_s = (
        run_order(order_of(name, pp, vpp, number), takes_SCWN, casts_SC, reduce_S) for number in (short, short + period)
    )
    return short_s + (num_micro_batches - short) // period * (longer_s - short_s)


def ways_of(name: ScheduleName) -> tuple[int, ...]:
    """Indices of the ways that a schedule takes."""
    names = ("forward", "input_gradient", "weight_gradient") if name == "zb-h1" else ("forward", "backward")
    return tuple(WAYS.index(way) for way in names)


def run_order(order: Order, takes_SCWN: Floats, casts_SC: Floats, reduce_S: Floats) -> float:
    """Seconds until all stages have reduced their gradients, operation by operation."""
    return float(
        _last_s(
            order.stage_O,
            order.chunk_O,
            order.way_O,
            order.micro_batch_O,
            order.after_O,
            takes_SCWN,
            casts_SC,
            reduce_S,
        )
    )


@njit(cache=True)
def _last_s(
    stage_O: Ints,
    chunk_O: Ints,
    way_O: Ints,
    micro_batch_O: Ints,
    after_O: Ints,
    takes_SCWN: Floats,
    casts_SC: Floats,
    reduce_S: Floats,
) -> float:
    num_samples = takes_SCWN.shape[3]
    clock_S = np.zeros(takes_SCWN.shape[0])
    end_O = np.empty(stage_O.size)
    for o in range(stage_O.size):
        s, c, w, m = stage_O[o], chunk_O[o], way_O[o], micro_batch_O[o]
        begin = clock_S[s]
        if after_O[o] >= 0:
            begin = max(begin, end_O[after_O[o]])
        takes = takes_SCWN[s, c, w, m % num_samples]
        if w == 0 and m == 0:
            takes += casts_SC[s, c]
        end_O[o] = clock_S[s] = begin + takes
    return (clock_S + reduce_S).max()
