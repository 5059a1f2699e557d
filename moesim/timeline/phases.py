"""A stage's operations laid out rank by rank: who computes how long, who waits for whom, before any clock runs.

All runs of an operation (one for each micro-batch that takes this way) are computed at once. Within one operation the
ranks of a block start together: each operation ends with the slowest rank of its block. Where one of tp*cp and ep*etp
divides the other, nothing is lost by it: until the first collective that joins the whole block its ranks have the same
work. Otherwise no collective joins the block at once, ranks are held back too early, and the times are an upper bound
(docs/decisions/one-process-per-block.md).

Legend: P phases of an operation, M its runs, R ranks of one stage in rank order (expert-tensor fastest, then
expert-parallel, then expert-data-parallel), B blocks of R (ranks that must synchronise), V traced ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
# Of a phase, on wires.
COMM_PARTS = ("tensor_parallel_comm", "dispatch", "combine", "gradient_reduction", "host_transfer")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One step of an operation. seconds broadcasts to (M, R); ranks_in_step > 1: that many consecutive ranks wait for
    each other first.

    weights_s: those of its seconds that make weight gradients, for which no later phase waits. products_s: those that a
    tensor-parallel collective could hide behind. issue_s: what the host needs to issue a layer, on the phase that ends
    it: its seconds are those beyond the layer's own, of which lay_out takes what a rank waited in the layer. aside: no
    later phase waits for it. back: it waits for the phase that stands so many places before it in line. These two
    matter where phases run beside one another (overlap.py).
    """

    name: str
    part: str  # one of metrics.step.STEP_PARTS
    layer: int
    seconds: Floats | float
    ranks_in_step: int = 1
    is_backward: bool = False
    weights_s: Floats | float = 0.0
    products_s: float = 0.0
    issue_s: float = 0.0
    aside: bool = False
    back: int = 1

    @property
    def is_comm(self) -> bool:
        return self.part in COMM_PARTS

    def without_weights(self) -> Phase:
        """A phase of the backward that leaves its weight gradients for later."""
        return replace(self, seconds=self.seconds - self.weights_s, weights_s=0.0)

    def weights_alone(self) -> Phase:
        """What it left."""
        return replace(self, name=f"{self.name} weights", seconds=self.weights_s, weights_s=0.0)

    def of_runs(self, micro_batches: NDArray[np.int64]) -> Phase:
        """The phase of some of the micro-batches that it was written for."""
        return replace(self, seconds=_rows(self.seconds, micro_batches), weights_s=_rows(self.weights_s, micro_batches))


@dataclass(frozen=True, kw_only=True)
class OperationTimes:
    """An operation's times on one stage, run by run."""

    names: tuple[str, ...]
    parts: tuple[str, ...]
    layers: tuple[int, ...]
    is_backward_P: NDArray[np.bool_]
    duration_MB: Floats  # how long the block is busy
    part_R: Mapping[str, Floats]  # seconds by part and rank, summed over runs; with wait_for_slowest sums to duration
    hidden_comm_R: Floats  # seconds of collectives while something was computed, summed over runs
    start_PMV: Floats  # of the traced ranks, from the start of the operation
    seconds_PMV: Floats


def lay_out(
    phases: Sequence[Phase], *, num_runs: int, num_ranks: int, block_size: int, traced: NDArray[np.int64]
) -> OperationTimes:
    """Run the phases on every rank's own clock and meet where collectives demand it.

    traced: (V,) ranks of the stage whose spans are kept. See docs/model.md#barriers.
    """
    clock: Floats = np.zeros((num_runs, num_ranks))
    waited: Floats = np.zeros((num_runs, num_ranks))  # since the layer began: its host went on issuing
    part_R: dict[str, Floats] = {"wait_for_slowest": np.zeros(num_ranks)}
    starts, lengths = [], []
    for phase in phases:
        if phase.ranks_in_step > 1:
            ready = slowest_of(clock, phase.ranks_in_step)
            part_R["wait_for_slowest"] += (ready - clock).sum(axis=0)
            waited = waited + (ready - clock)
            clock = ready
        seconds = np.broadcast_to(np.asarray(phase.seconds, dtype=np.float64), clock.shape)
        if phase.issue_s:
            seconds = np.maximum(seconds - waited, 0.0)
            waited = np.zeros((num_runs, num_ranks))
        starts.append(clock[:, traced])
        lengths.append(seconds[:, traced])
        clock = clock + seconds
        part_R[phase.part] = part_R.get(phase.part, 0.0) + seconds.sum(axis=0)
    end = slowest_of(clock, block_size)
    part_R["wait_for_slowest"] += (end - clock).sum(axis=0)
    shape = (len(phases), num_runs, len(traced))
    return OperationTimes(
        names=tuple(phase.name for phase in phases),
        parts=tuple(phase.part for phase in phases),
        layers=tuple(phase.layer for phase in phases),
        is_backward_P=np.array([phase.is_backward for phase in phases], dtype=bool),
        duration_MB=end[:, ::block_size].copy(),
        part_R=part_R,
        hidden_comm_R=np.zeros(num_ranks),
        start_PMV=np.array(starts).reshape(shape),
        seconds_PMV=np.array(lengths).reshape(shape),
    )


def slowest_of(clock_MR: Floats, group_size: int) -> Floats:
    """Every rank's clock set to the latest of its group of consecutive ranks."""
    num_runs, num_ranks = clock_MR.shape
    groups = clock_MR.reshape(num_runs, num_ranks // group_size, group_size)
    return np.repeat(groups.max(axis=-1), group_size, axis=-1).reshape(clock_MR.shape)


def _rows(seconds: Floats | float, micro_batches: NDArray[np.int64]) -> Floats | float:
    """Seconds of some micro-batches; what does not depend on them stays."""
    if isinstance(seconds, np.ndarray) and seconds.ndim == 2 and seconds.shape[0] > 1:
        return seconds[micro_batches]
    return seconds
