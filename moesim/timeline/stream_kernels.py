"""Two queues on every GPU: kernels that compute, and kernels that communicate while the others run.

Each queue runs its phases in program order. A phase also waits for one of the other queue (``after_P``), a collective
for the last of its ranks. From its launch until its end, waiting included, a collective holds a share of the GPU's
multiprocessors, and what computes meanwhile runs that much slower. See docs/model.md#overlap.

Legend: P phases in program order, M runs, R ranks, V traced ranks, C computing phases.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@njit(cache=True)
def run_streams(
    seconds_PMR: Floats,
    is_comm_P: NDArray[np.bool_],
    after_P: Ints,
    ranks_in_step_P: Ints,
    sm_share_P: Floats,
    traced_V: Ints,
) -> tuple[Floats, Floats, Floats, Floats, Floats, Floats]:
    """Every phase of every run: (end_MR, busy_PR, exposed_PR, wait_R, start_PMV, length_PMV), in seconds.

    busy: what a phase took in its queue, summed over runs (of a collective: on the wire); exposed: of a collective,
    while nothing was computed; wait: nothing was computed, nothing of the own on the wire.
    """
    num_phases, num_runs, num_ranks = seconds_PMR.shape
    computing_C = np.flatnonzero(~is_comm_P)
    end_MR = np.zeros((num_runs, num_ranks))
    busy_PR, exposed_PR = np.zeros((num_phases, num_ranks)), np.zeros((num_phases, num_ranks))
    wait_R = np.zeros(num_ranks)
    start_PMV = np.zeros((num_phases, num_runs, traced_V.size))
    length_PMV = np.zeros((num_phases, num_runs, traced_V.size))
    for m in range(num_runs):
        start_PR, end_PR = np.zeros((num_phases, num_ranks)), np.full((num_phases, num_ranks), -1.0)
        clock_R, left_R = np.zeros(num_ranks), np.full(num_ranks, -1.0)
        head_R = np.zeros(num_ranks, dtype=np.int64)
        state = (clock_R, left_R, head_R, start_PR, end_PR)
        for p in range(num_phases):
            if not is_comm_P[p]:
                continue
            group = ranks_in_step_P[p]
            needed = after_P[p]
            for first in range(0, num_ranks, group):
                begin = 0.0
                for r in range(first, first + group):
                    if needed >= 0 and not is_comm_P[needed]:
                        _compute(r, np.inf, needed, 1.0, computing_C, is_comm_P, after_P, seconds_PMR[:, m], state)
                    begin = max(begin, clock_R[r])
                for r in range(first, first + group):
                    rate = 1.0 - sm_share_P[p]
                    idle = _compute(r, begin, -1, rate, computing_C, is_comm_P, after_P, seconds_PMR[:, m], state)
                    wait_R[r] += idle
                    start_PR[p, r] = begin
                    end_PR[p, r] = begin + seconds_PMR[p, m, r]
                    idle = _compute(
                        r, end_PR[p, r], -1, rate, computing_C, is_comm_P, after_P, seconds_PMR[:, m], state
                    )
                    exposed_PR[p, r] += idle
        for r in range(num_ranks):
            _compute(r, np.inf, computing_C[-1], 1.0, computing_C, is_comm_P, after_P, seconds_PMR[:, m], state)
            end_MR[m, r] = clock_R[r]
        busy_PR += end_PR - start_PR
        for v in range(traced_V.size):
            start_PMV[:, m, v] = start_PR[:, traced_V[v]]
            length_PMV[:, m, v] = end_PR[:, traced_V[v]] - start_PR[:, traced_V[v]]
    return end_MR, busy_PR, exposed_PR, wait_R, start_PMV, length_PMV


@njit(cache=True)
def _compute(
    r: int,
    until: float,
    last: int,
    rate: float,
    computing_C: Ints,
    is_comm_P: NDArray[np.bool_],
    after_P: Ints,
    seconds_PR: Floats,
    state: tuple[Floats, Floats, Ints, Floats, Floats],
) -> float:
    """Run rank r's computing queue at a rate until a time, or until phase ``last`` is done; returns the seconds in
    which it stood still.
    """
    clock_R, left_R, head_R, start_PR, end_PR = state
    idle = 0.0
    while head_R[r] < computing_C.size and clock_R[r] < until:
        if last >= 0 and end_PR[last, r] >= 0.0:
            return idle
        p = computing_C[head_R[r]]
        if left_R[r] < 0.0:
            needed = after_P[p]
            if needed >= 0 and is_comm_P[needed]:
                if end_PR[needed, r] < 0.0:
                    break  # it waits for a collective that is not yet launched
                ready = min(end_PR[needed, r], until)
                if ready > clock_R[r]:
                    idle += ready - clock_R[r]
                    clock_R[r] = ready
                if end_PR[needed, r] > until:
                    return idle
            start_PR[p, r] = clock_R[r]
            left_R[r] = seconds_PR[p, r]
        done = clock_R[r] + left_R[r] / rate
        if done > until:
            left_R[r] -= (until - clock_R[r]) * rate
            clock_R[r] = until
            return idle
        clock_R[r], end_PR[p, r], left_R[r] = done, done, -1.0
        head_R[r] += 1
    if until < np.inf and clock_R[r] < until:
        idle += until - clock_R[r]
        clock_R[r] = until
    return idle


def warm() -> None:
    """Compile the kernels."""
    run_streams(
        np.ones((2, 1, 2)),
        np.array([False, True]),
        np.array([-1, 0]),
        np.array([1, 2]),
        np.zeros(2),
        np.array([0]),
    )
