"""Placement policies: frozen dataclasses that you call with loads and ranks; ``Policy`` is told apart by kind.

Legend: L layers, E experts, R ranks, S slots, N nodes, G groups of experts. Every call has the same form:
``policy(load_LE, ranks, rng=..., known=Known(...))`` gives LayerPlacements; what a policy does not use it ignores.
"""

# ruff: noqa: ARG002 all policies take the same call

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.errors import InputError, check
from moesim.placement.eplb import eplb_layers
from moesim.placement.groups import grouped_search
from moesim.placement.search import Effort, check_fits, checked_loads, least_max_load
from moesim.placement.slots import LayerPlacements, RankSlots

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Known:
    """What is known beyond loads: the router's expert groups, the layout that stands, which experts are used together.

    coactivation_LEE[l, e, f]: share of tokens that use both e and f in layer l (see ``nodes.coactivation_EE``).
    """

    num_groups: int = 1
    previous: LayerPlacements | None = None
    coactivation_LEE: Floats | None = None


_NOTHING = Known()


@dataclass(frozen=True, kw_only=True)
class Contiguous:
    """Experts in order over the slots; slots left over hold the first experts again. Megatron's layout."""

    kind: Literal["contiguous"] = "contiguous"

    def __call__(
        self, load_LE: ArrayLike, ranks: RankSlots, *, rng: np.random.Generator, known: Known = _NOTHING
    ) -> LayerPlacements:
        load = _checked(load_LE, ranks)
        return _same_for_all(np.arange(ranks.num_slots) % load.shape[1], load, ranks)


@dataclass(frozen=True, kw_only=True)
class Striped:
    """Expert e on rank e mod R, as far as slots go: neighbours land on different ranks. vLLM's round_robin."""

    kind: Literal["striped"] = "striped"

    def __call__(
        self, load_LE: ArrayLike, ranks: RankSlots, *, rng: np.random.Generator, known: Known = _NOTHING
    ) -> LayerPlacements:
        load = _checked(load_LE, ranks)
        # Slots in the order first slot of every rank, second slot of every rank, ...
        depth_S = np.arange(ranks.num_slots) - ranks.first_R1[ranks.rank_of_slot_S]
        expert_S = np.empty(ranks.num_slots, dtype=np.int64)
        expert_S[np.lexsort((ranks.rank_of_slot_S, depth_S))] = np.arange(ranks.num_slots) % load.shape[1]
        return _same_for_all(expert_S, load, ranks)


@dataclass(frozen=True, kw_only=True)
class Random:
    """A random permutation in each layer; slots left over hold experts drawn without repetition."""

    kind: Literal["random"] = "random"

    def __call__(
        self, load_LE: ArrayLike, ranks: RankSlots, *, rng: np.random.Generator, known: Known = _NOTHING
    ) -> LayerPlacements:
        load = _checked(load_LE, ranks)
        experts = load.shape[1]
        rounds = -(-ranks.num_slots // experts)
        rows = []
        for _ in range(load.shape[0]):
            filled = np.concatenate([rng.permutation(experts) for _ in range(rounds)])[: ranks.num_slots]
            rows.append(rng.permutation(filled))
        return LayerPlacements(physical_to_logical_LS=np.stack(rows), num_experts=experts, ranks=ranks)


@dataclass(frozen=True, kw_only=True)
class ByLoad:
    """Greedy replica counts, then heaviest first onto the rank that is soonest done (LPT); no search after it."""

    kind: Literal["by_load"] = "by_load"

    def __call__(
        self, load_LE: ArrayLike, ranks: RankSlots, *, rng: np.random.Generator, known: Known = _NOTHING
    ) -> LayerPlacements:
        from moesim.placement.start_kernels import greedy_counts, pack

        load = _checked(load_LE, ranks)
        expert_LS = np.empty((load.shape[0], ranks.num_slots), dtype=np.int64)
        count_E, share_E = np.empty(load.shape[1], dtype=np.int64), np.empty(load.shape[1])
        load_R = np.empty(ranks.num_ranks)
        for layer, load_E in enumerate(load):
            greedy_counts(load_E, ranks.num_slots, count_E, share_E)
            order_E = np.argsort(-load_E, kind="stable")
            pack(share_E, count_E, ranks.first_R1, 1.0 / ranks.speed_R, order_E, expert_LS[layer], load_R)
        return LayerPlacements(physical_to_logical_LS=expert_LS, num_experts=load.shape[1], ranks=ranks)


@dataclass(frozen=True, kw_only=True)
class Eplb:
    """DeepSeek's public balancer. ``hierarchical`` keeps the router's groups on one node where the nodes divide them;
    otherwise it falls back to global, as the original does. Raises InputError for unlike ranks: it knows none."""

    kind: Literal["eplb"] = "eplb"
    hierarchical: bool = False

    def __call__(
        self, load_LE: ArrayLike, ranks: RankSlots, *, rng: np.random.Generator, known: Known = _NOTHING
    ) -> LayerPlacements:
        load = _checked(load_LE, ranks)
        check(ranks.are_alike, "placement.eplb", "ranks", "must all have the same slots and speed", "unlike ranks")
        nodes, groups = (ranks.num_nodes, known.num_groups) if self.hierarchical else (1, 1)
        expert_LS = eplb_layers(load, ranks.num_slots, ranks.num_ranks, num_nodes=nodes, num_groups=groups)
        return LayerPlacements(physical_to_logical_LS=expert_LS, num_experts=load.shape[1], ranks=ranks)


@dataclass(frozen=True, kw_only=True)
class Search:
    """The least time of the slowest rank; ``hierarchical`` keeps each of the router's groups on one node.

    Where a layout stands already (known.previous), ranks and nodes are renumbered to move few slots.
    """

    kind: Literal["search"] = "search"
    hierarchical: bool = False
    effort: Effort = field(default_factory=Effort)

    def __call__(
        self, load_LE: ArrayLike, ranks: RankSlots, *, rng: np.random.Generator, known: Known = _NOTHING
    ) -> LayerPlacements:
        load = _checked(load_LE, ranks)
        if self.hierarchical:
            placed = grouped_search(load, ranks, known.num_groups, rng=rng, effort=self.effort)
        else:
            placed = least_max_load(load, ranks, rng=rng, effort=self.effort)
        if known.previous is None:
            return placed
        from moesim.placement.nodes import renumbered

        return renumbered(placed, known.previous)


@dataclass(frozen=True, kw_only=True)
class NodeAware:
    """Experts used together share a node, and few slots move, while the slowest rank stays within load_limit_fraction
    of the load search's. Needs known.coactivation_LEE; move_weight counts where known.previous is given."""

    kind: Literal["node_aware"] = "node_aware"
    load_limit_fraction: float = 0.02
    cross_weight: float = 1.0
    move_weight: float = 0.0
    num_steps: int = 100_000
    effort: Effort = field(default_factory=Effort)

    def __post_init__(self) -> None:
        for name in ("load_limit_fraction", "cross_weight", "move_weight", "num_steps"):
            check(getattr(self, name) >= 0, "placement.node_aware", name, "must not be negative", getattr(self, name))

    def __call__(
        self, load_LE: ArrayLike, ranks: RankSlots, *, rng: np.random.Generator, known: Known = _NOTHING
    ) -> LayerPlacements:
        from moesim.placement.nodes import fewer_crossings

        if known.coactivation_LEE is None:
            rule = "is needed: which experts are used together, from drawn or recorded choices"
            raise InputError("placement.node_aware", "coactivation", rule, None)
        start = Search(effort=self.effort)(load_LE, ranks, rng=rng, known=known)
        return fewer_crossings(
            start,
            load_LE,
            known.coactivation_LEE,
            max_mean_limit_L=start.max_mean(load_LE) * (1.0 + self.load_limit_fraction),
            rng=rng,
            previous=known.previous,
            cross_weight=self.cross_weight,
            move_weight=self.move_weight,
            num_steps=self.num_steps,
        )


Policy = Contiguous | Striped | Random | ByLoad | Eplb | Search | NodeAware
POLICIES: Mapping[str, Policy] = MappingProxyType(
    {
        "contiguous": Contiguous(),
        "striped": Striped(),
        "random": Random(),
        "by_load": ByLoad(),
        "eplb": Eplb(hierarchical=True),  # global where the nodes do not divide the groups, as the original
        "eplb_global": Eplb(),
        "search": Search(),
        "search_hierarchical": Search(hierarchical=True),
        "node_aware": NodeAware(),
    }
)


def _checked(load_LE: ArrayLike, ranks: RankSlots) -> Floats:
    load = checked_loads(load_LE)
    check_fits(load.shape[1], ranks)
    return load


def _same_for_all(expert_S: Whole, load_LE: Floats, ranks: RankSlots) -> LayerPlacements:
    expert_LS = np.broadcast_to(expert_S, (load_LE.shape[0], ranks.num_slots))
    return LayerPlacements(physical_to_logical_LS=expert_LS, num_experts=load_LE.shape[1], ranks=ranks)
