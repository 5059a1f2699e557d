"""What a layout costs: memory of its slots, moving to it, and how it ages when the load drifts.

Legend: L layers, E experts, R ranks, S slots, N nodes, D steps of drift.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.describe.checks import check_number
from moesim.describe.workload import Optimizer
from moesim.errors import check
from moesim.placement.slots import LayerPlacements

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class SlotBytes:
    """Memory of one slot of one layer [bytes]: an expert's weights, and what training adds."""

    weights_bytes: float
    gradients_bytes: float = 0.0
    optimizer_bytes: float = 0.0

    def __post_init__(self) -> None:
        for name in ("weights_bytes", "gradients_bytes", "optimizer_bytes"):
            check_number("placement.slot", name, getattr(self, name))
            check(getattr(self, name) >= 0, "placement.slot", name, "must not be negative", getattr(self, name))

    @property
    def total_bytes(self) -> float:
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes


def slot_bytes(
    parameters: float, *, weight_bytes: float = 2.0, optimizer: Optimizer | None = None, optimizer_shards: int = 1
) -> SlotBytes:
    """Memory of one expert of ``parameters`` parameters.

    weight_bytes: per parameter (2 for BF16). optimizer: in training, its number formats; adds gradients, which replicas
    must also all-reduce, and Adam's states over optimizer_shards ranks (1: each replica keeps its own).

    >>> slot_bytes(1000, optimizer=Optimizer()).total_bytes
    18000.0
    """
    check(optimizer_shards >= 1, "placement.slot", "optimizer_shards", "must be at least 1", optimizer_shards)
    return SlotBytes(
        weights_bytes=parameters * weight_bytes,
        gradients_bytes=0.0 if optimizer is None else parameters * optimizer.gradient_bytes,
        optimizer_bytes=0.0 if optimizer is None else parameters * optimizer.state_bytes / optimizer_shards,
    )


def held_bytes_R(placed: LayerPlacements, slot: SlotBytes) -> Floats:
    """(R,) memory of the experts that each rank holds over all layers [bytes]; a slot costs whether or not it helps."""
    return np.asarray(placed.num_layers * placed.ranks.num_slots_R * slot.total_bytes, dtype=np.float64)


def moved_slots(previous: LayerPlacements, new: LayerPlacements) -> Whole:
    """(L,) experts that a rank holds in ``new`` and held in no slot in ``previous``: weights that must travel.

    A second slot of an expert on the same rank is copied in place and does not count. Raises InputError unless both
    have the same layers, experts and ranks.
    """
    return (_arrivals_LRE(previous, new)).sum(axis=(1, 2))


@dataclass(frozen=True, kw_only=True)
class Migration:
    """Moving from one layout to another: slots, bytes by wire, and seconds when nothing overlaps it."""

    num_moved_slots: int
    nvlink_bytes: float
    nic_bytes: float
    stall_s: float


def migration(
    previous: LayerPlacements,
    new: LayerPlacements,
    slot: SlotBytes,
    *,
    nic_bytes_per_s: float,
    nvlink_bytes_per_s: float,
    with_state: bool = False,
) -> Migration:
    """What moving costs. Weights travel, with_state also the optimizer's states (gradients start afresh).

    Each arriving expert is read from the ranks that held it, evenly from those of its node if there are any, else
    evenly from all. The stall is the busiest port's: the most that any rank sends or receives over NIC or NVLink, over
    that wire's rate [bytes/s, per direction]; all layers move at once and compute waits. A lower bound of a real one.
    """
    for name, rate in (("nic_bytes_per_s", nic_bytes_per_s), ("nvlink_bytes_per_s", nvlink_bytes_per_s)):
        check(rate > 0, "placement.migration", name, "must be positive", rate)
    arrivals_LRE = _arrivals_LRE(previous, new)
    each_bytes = slot.weights_bytes + (slot.optimizer_bytes if with_state else 0.0)
    nodes, num_ranks = new.ranks.node_of_rank_R, new.ranks.num_ranks
    sent = {"nvlink": np.zeros(num_ranks), "nic": np.zeros(num_ranks)}
    received = {"nvlink": np.zeros(num_ranks), "nic": np.zeros(num_ranks)}
    held_LRE = previous.held_LRE > 0
    for layer, rank, expert in np.argwhere(arrivals_LRE).tolist():
        holders = np.flatnonzero(held_LRE[layer, :, expert])
        near = holders[nodes[holders] == nodes[rank]]
        wire, sources = ("nvlink", near) if near.size else ("nic", holders)
        received[wire][rank] += each_bytes
        sent[wire][sources] += each_bytes / sources.size
    rates = {"nvlink": nvlink_bytes_per_s, "nic": nic_bytes_per_s}
    stall_s = max(max(float(sent[w].max()), float(received[w].max())) / rates[w] for w in rates)
    return Migration(
        num_moved_slots=int(arrivals_LRE.sum()),
        nvlink_bytes=float(received["nvlink"].sum()),
        nic_bytes=float(received["nic"].sum()),
        stall_s=stall_s,
    )


def staleness(placed: LayerPlacements, load_DLE: ArrayLike) -> Floats:
    """(D, L) max/mean of a layout that stays while the load goes on: load_DLE[d] is the load of step d.

    >>> from moesim.placement.slots import even_slots
    >>> placed = LayerPlacements(physical_to_logical_LS=[[0, 1]], num_experts=2, ranks=even_slots(2, 2))
    >>> staleness(placed, [[[1.0, 1.0]], [[3.0, 1.0]]]).tolist()
    [[1.0], [1.5]]
    """
    load = np.asarray(load_DLE, dtype=np.float64)
    assert load.ndim == 3, "the drifting load is steps x layers x experts"
    return np.stack([placed.max_mean(load_LE) for load_LE in load])


def _arrivals_LRE(previous: LayerPlacements, new: LayerPlacements) -> NDArray[np.bool_]:
    before, after = previous.held_LRE, new.held_LRE
    rule = f"must have layers, ranks and experts {after.shape}"
    check(before.shape == after.shape, "placement", "previous", rule, before.shape)
    return (after > 0) & (before == 0)
