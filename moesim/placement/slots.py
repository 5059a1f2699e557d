"""Slots and who fills them: the ranks' slots, and for each layer the expert of every slot, replicas included.

Legend: L layers, E experts, R ranks, S slots (all ranks' slots in a row, rank after rank), X most replicas of one
expert. A slot holds one replica: the weights of one expert. ``load_..LE`` ends in layers and experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.errors import InputError, check
from moesim.placement.experts import Placement

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]


def _frozen(values: ArrayLike, dtype: type) -> NDArray:
    array: NDArray = np.array(values, dtype=dtype)
    array.setflags(write=False)
    return array


def _as_whole(values: ArrayLike, owner: str, field: str) -> Whole:
    array = np.asarray(values)
    if array.size == 0 or array.dtype.kind not in "iu":
        raise InputError(owner, field, "must be whole numbers", array.tolist())
    return _frozen(array, np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class RankSlots:
    """What the ranks offer: slots of each, relative speed (1 is the reference GPU), and the node each stands in.

    A rank's time is its load over its speed. Slots may be unequal, for GPUs of unlike memory; all of them are filled.
    """

    num_slots_R: Whole
    speed_R: Floats
    node_of_rank_R: Whole

    def __post_init__(self) -> None:
        owner = "placement.ranks"
        slots_R = _as_whole(self.num_slots_R, owner, "num_slots")
        check(bool((slots_R >= 0).all()), owner, "num_slots", "must not be negative", slots_R.tolist())
        check(int(slots_R.sum()) > 0, owner, "num_slots", "must not all be zero", slots_R.tolist())
        speed_R = _frozen(self.speed_R, np.float64)
        check(speed_R.shape == slots_R.shape, owner, "speed", f"must be {slots_R.size} numbers", speed_R.tolist())
        fine = bool(np.isfinite(speed_R).all() and (speed_R > 0).all())
        check(fine, owner, "speed", "must be positive", speed_R.tolist())
        node_R = _as_whole(self.node_of_rank_R, owner, "node_of_rank")
        check(node_R.shape == slots_R.shape, owner, "node_of_rank", f"must be {slots_R.size} numbers", node_R.tolist())
        nodes = np.unique(node_R)
        dense = bool((nodes == np.arange(nodes.size)).all())
        check(dense, owner, "node_of_rank", "must number the nodes 0, 1, ... without gaps", nodes.tolist())
        for name, value in (("num_slots_R", slots_R), ("speed_R", speed_R), ("node_of_rank_R", node_R)):
            object.__setattr__(self, name, value)

    @property
    def num_ranks(self) -> int:
        return int(self.num_slots_R.size)

    @property
    def num_slots(self) -> int:
        return int(self.num_slots_R.sum())

    @property
    def num_nodes(self) -> int:
        return int(self.node_of_rank_R.max()) + 1

    @property
    def first_R1(self) -> Whole:
        """(R + 1,) the first slot of each rank, then S."""
        return np.concatenate(([0], np.cumsum(self.num_slots_R)))

    @property
    def rank_of_slot_S(self) -> Whole:
        return np.repeat(np.arange(self.num_ranks), self.num_slots_R)

    @property
    def are_alike(self) -> bool:
        """Whether all ranks have the same slots and speed."""
        return bool(np.ptp(self.num_slots_R) == 0 and np.ptp(self.speed_R) == 0)


def even_slots(num_slots: int, num_ranks: int, *, num_nodes: int = 1, speed_R: ArrayLike | None = None) -> RankSlots:
    """num_slots over num_ranks ranks in num_nodes nodes, the same for each. Raises InputError when they do not divide.

    >>> even_slots(16, 8, num_nodes=2).num_slots_R.tolist()
    [2, 2, 2, 2, 2, 2, 2, 2]
    """
    owner = "placement"
    check(num_ranks >= 1, owner, "num_ranks", "must be at least 1", num_ranks)
    check(
        num_slots >= num_ranks and num_slots % num_ranks == 0,
        owner,
        "num_slots",
        f"must be a multiple of num_ranks={num_ranks}",
        num_slots,
        f"Nearest: {max(1, num_slots // num_ranks) * num_ranks}, {(num_slots // num_ranks + 1) * num_ranks}.",
    )
    check(
        num_nodes >= 1 and num_ranks % num_nodes == 0,
        owner,
        "num_nodes",
        f"must divide num_ranks={num_ranks}",
        num_nodes,
    )
    return RankSlots(
        num_slots_R=np.full(num_ranks, num_slots // num_ranks),
        speed_R=np.ones(num_ranks) if speed_R is None else np.asarray(speed_R, dtype=np.float64),
        node_of_rank_R=np.arange(num_ranks) // (num_ranks // num_nodes),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerPlacements:
    """physical_to_logical_LS[l, s] is the expert in slot s of layer l; each expert stands in one slot or more.

    >>> placed = LayerPlacements(physical_to_logical_LS=[[0, 1, 2, 0]], num_experts=3, ranks=even_slots(4, 2))
    >>> placed.rank_loads([[6.0, 1.0, 2.0]]).tolist()  # expert 0 has two replicas
    [[4.0, 5.0]]
    """

    physical_to_logical_LS: Whole
    num_experts: int
    ranks: RankSlots

    def __post_init__(self) -> None:
        owner, field = "placement", "physical_to_logical"
        expert_LS = np.asarray(self.physical_to_logical_LS)
        check(expert_LS.ndim == 2 and expert_LS.shape[0] > 0, owner, field, "must be layers x slots", expert_LS.shape)
        expert_LS = _as_whole(expert_LS, owner, field)
        rule = f"must have {self.ranks.num_slots} slots in each layer"
        check(expert_LS.shape[1] == self.ranks.num_slots, owner, field, rule, expert_LS.shape)
        if expert_LS.min() < 0 or expert_LS.max() >= self.num_experts:
            layer, slot = np.argwhere((expert_LS < 0) | (expert_LS >= self.num_experts))[0].tolist()
            rule = f"must name experts 0..{self.num_experts - 1}"
            raise InputError(owner, f"{field}[{layer}][{slot}]", rule, int(expert_LS[layer, slot]))
        object.__setattr__(self, "physical_to_logical_LS", expert_LS)
        num_replicas_LE = self.num_replicas_LE
        if num_replicas_LE.min() == 0:
            layer, expert = np.argwhere(num_replicas_LE == 0)[0].tolist()
            raise InputError(owner, f"{field}[{layer}]", "must hold every expert", f"no slot for expert {expert}")

    @property
    def num_layers(self) -> int:
        return int(self.physical_to_logical_LS.shape[0])

    @property
    def num_replicas_LE(self) -> Whole:
        """(L, E) slots of each expert."""
        return _count(self.physical_to_logical_LS, self.num_experts)

    @property
    def held_LRE(self) -> Whole:
        """(L, R, E) how many of a rank's slots hold the expert."""
        cell_LS = self.ranks.rank_of_slot_S * self.num_experts + self.physical_to_logical_LS
        held = _count(cell_LS, self.ranks.num_ranks * self.num_experts)
        return held.reshape(self.num_layers, self.ranks.num_ranks, self.num_experts)

    @property
    def share_LER(self) -> Floats:
        """(L, E, R) share of expert e's load that rank r serves when replicas share evenly; rows sum to 1."""
        return np.swapaxes(self.held_LRE, 1, 2) / self.num_replicas_LE[:, :, None]

    def slots_of(self, layer: int) -> list[list[int]]:
        """Of each expert of a layer, the slots that hold it."""
        by_expert: list[list[int]] = [[] for _ in range(self.num_experts)]
        for slot, expert in enumerate(self.physical_to_logical_LS[layer].tolist()):
            by_expert[expert].append(slot)
        return by_expert

    def logical_to_physical_LEX(self) -> Whole:
        """(L, E, X) the slots of each expert, padded with -1: the inverse map as EPLB and SGLang keep it."""
        most = int(self.num_replicas_LE.max())
        slots_LEX = np.full((self.num_layers, self.num_experts, most), -1, dtype=np.int64)
        for layer in range(self.num_layers):
            for expert, slots in enumerate(self.slots_of(layer)):
                slots_LEX[layer, expert, : len(slots)] = slots
        return slots_LEX

    def slot_loads(self, load_LE: ArrayLike) -> Floats:
        """(L, S) load of each slot when replicas share evenly."""
        share_LE = np.asarray(load_LE, dtype=np.float64) / self.num_replicas_LE
        return np.take_along_axis(share_LE, self.physical_to_logical_LS, axis=1)

    def rank_loads(self, load_LE: ArrayLike, *, share_LER: Floats | None = None) -> Floats:
        """load_..LE as load_..LR: by ``share_LER`` (see ``splits``), or evenly over an expert's replicas."""
        load = np.asarray(load_LE, dtype=np.float64)
        expected = (self.num_layers, self.num_experts)
        assert load.shape[-2:] == expected, f"the load ends in (layers, experts) = {expected}"
        if share_LER is None and load.ndim == 2:
            filled = np.flatnonzero(self.ranks.num_slots_R)
            load_LR = np.zeros((self.num_layers, self.ranks.num_ranks))
            load_LR[:, filled] = np.add.reduceat(self.slot_loads(load), self.ranks.first_R1[filled], axis=1)
            return load_LR
        return np.einsum("...le,ler->...lr", load, self.share_LER if share_LER is None else share_LER)

    def max_mean(self, load_LE: ArrayLike, *, share_LER: Floats | None = None) -> Floats:
        """(..., L) time of the slowest rank over the time a perfect split would take; 1 is balanced."""
        load_LR = self.rank_loads(load_LE, share_LER=share_LER)
        total = load_LR.sum(axis=-1)
        worst = (load_LR / self.ranks.speed_R).max(axis=-1) * self.ranks.speed_R.sum()
        return np.where(total > 0, worst / np.where(total > 0, total, 1.0), 1.0)

    def layer(self, layer: int) -> Placement:
        """One layer as a Placement; InputError where an expert has more than one slot."""
        most = int(self.num_replicas_LE[layer].max())
        check(most == 1, "placement", f"layer {layer}", "must hold each expert once", f"{most} replicas of one expert")
        expert_to_rank_E = np.empty(self.num_experts, dtype=np.int64)
        expert_to_rank_E[self.physical_to_logical_LS[layer]] = self.ranks.rank_of_slot_S
        return Placement(expert_to_rank_E=expert_to_rank_E, num_ranks=self.ranks.num_ranks)


def from_placements(layers: Sequence[Placement], *, node_of_rank_R: ArrayLike | None = None) -> LayerPlacements:
    """One-slot-per-expert placements, one for each layer, as LayerPlacements.

    Raises InputError unless all layers fill the ranks alike.
    """
    num_ranks, counts_R = layers[0].num_ranks, layers[0].num_experts_R
    for i, layer in enumerate(layers):
        alike = layer.num_ranks == num_ranks and np.array_equal(layer.num_experts_R, counts_R)
        check(alike, "placement", f"layer {i}", "must fill the ranks as layer 0 does", layer.num_experts_R.tolist())
    nodes = np.zeros(num_ranks, dtype=np.int64) if node_of_rank_R is None else np.asarray(node_of_rank_R)
    ranks = RankSlots(num_slots_R=counts_R, speed_R=np.ones(num_ranks), node_of_rank_R=nodes)
    expert_LS = np.stack([np.argsort(layer.expert_to_rank_E, kind="stable") for layer in layers])
    return LayerPlacements(physical_to_logical_LS=expert_LS, num_experts=layers[0].num_experts, ranks=ranks)


def _count(id_LS: Whole, num_ids: int) -> Whole:
    """(L, num_ids) how often each id stands in each row."""
    num_layers = id_LS.shape[0]
    flat = (np.arange(num_layers)[:, None] * num_ids + id_LS).reshape(-1)
    return np.bincount(flat, minlength=num_layers * num_ids).reshape(num_layers, num_ids)
