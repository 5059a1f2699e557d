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

from moesim.describe.schedules import WAYS, ScheduleName, make_schedule

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_FORWARD, _BACKWARD, _INPUT, _WEIGHTS = range(len(WAYS))
FULL_ROUNDS = 8  # times the depth of the pipeline: as many micro-batches are run one by one


@dataclass(frozen=True, kw_only=True, eq=False)
class Order:
    """Operations of all stages so that each stands behind what it waits for; after_O: what that is, -1 for nothing.

    Rows of what a stage has in flight, each at least once: flight_UC chunks of each kind when an operation begins.
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
    queues_SQ3 = np.array(
        [[(op.chunk, WAYS.index(op.way), op.micro_batch) for op in schedule(s, num_micro_batches)] for s in range(pp)],
        dtype=np.int64,
    )
    depth_SC = np.array([[schedule.place(s, c)[1] for c in range(schedule.num_chunks)] for s in range(pp)])
    rows_O5 = _in_order(queues_SQ3, depth_SC, num_micro_batches)
    flights_U = _flights(queues_SQ3, schedule.num_chunks)
    stage_O, chunk_O, way_O, micro_batch_O, after_O = rows_O5.T.copy()
    return Order(
        stage_O=stage_O,
        chunk_O=chunk_O,
        way_O=way_O,
        micro_batch_O=micro_batch_O,
        after_O=after_O,
        flight_stage_U=flights_U[:, 0].copy(),
        flight_chunk_U=flights_U[:, 1].copy(),
        flight_forward_U=flights_U[:, 2] == 1,
        flight_UC=flights_U[:, 3:].copy(),
    )


@njit(cache=True)
def _in_order(queues_SQ3: Ints, depth_SC: Ints, num_micro_batches: int) -> Ints:
    """Rows of Order (stage, chunk, way, micro-batch, after): stages take turns, each as far as it can go.

    queues_SQ3: chunk, way and micro-batch of each stage's operations.
    """
    num_stages, num_operations = queues_SQ3.shape[0], queues_SQ3.shape[1]
    last_depth = depth_SC.size - 1
    rows_O5 = np.empty((num_stages * num_operations, 5), dtype=np.int64)
    done = np.full((2, last_depth + 1, num_micro_batches), -1)  # is backward, depth, micro-batch: row
    at_S = np.zeros(num_stages, dtype=np.int64)
    count, before = 0, -1
    while count != before:
        before = count
        for s in range(num_stages):
            while at_S[s] < num_operations:
                chunk, way, micro_batch = queues_SQ3[s, at_S[s]]
                depth, is_backward, after = depth_SC[s, chunk], int(way != _FORWARD), -1
                if way == _FORWARD and depth > 0:
                    after = done[0, depth - 1, micro_batch]
                elif way != _FORWARD and way != _WEIGHTS:
                    after = done[0, depth, micro_batch] if depth == last_depth else done[1, depth + 1, micro_batch]
                if after < 0 and way != _WEIGHTS and not (way == _FORWARD and depth == 0):
                    break
                if way != _WEIGHTS:
                    done[is_backward, depth, micro_batch] = count
                rows_O5[count, 0], rows_O5[count, 1], rows_O5[count, 2] = s, chunk, way
                rows_O5[count, 3], rows_O5[count, 4] = micro_batch, after
                at_S[s] += 1
                count += 1
    assert count == num_stages * num_operations
    return rows_O5


@njit(cache=True)
def _flights(queues_SQ3: Ints, num_chunks: int) -> Ints:
    """Rows (stage, chunk, is forward, chunks kept of each kind) as each operation begins; in the steady phase, which
    repeats every few operations, once.
    """
    num_stages, num_operations = queues_SQ3.shape[0], queues_SQ3.shape[1]
    found_QX = np.zeros((num_operations, 3 + num_chunks), dtype=np.int64)
    kept_UX = np.zeros((num_stages * num_operations, 3 + num_chunks), dtype=np.int64)
    periods = np.array([2, 3, 2 * num_stages * num_chunks])
    count = 0
    for s in range(num_stages):
        kept_C = np.zeros(num_chunks, dtype=np.int64)
        for q in range(num_operations):
            chunk, way = queues_SQ3[s, q, 0], queues_SQ3[s, q, 1]
            found_QX[q, 0], found_QX[q, 1], found_QX[q, 2] = s, chunk, int(way == _FORWARD)
            found_QX[q, 3:] = kept_C
            repeats = False
            for period in periods:
                repeats = repeats or (q >= period and bool((found_QX[q] == found_QX[q - period]).all()))
            if not repeats:
                kept_UX[count] = found_QX[q]
                count += 1
            if way != _INPUT:
                kept_C[chunk] += 1 if way == _FORWARD else -1
    return kept_UX[:count].copy()


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
