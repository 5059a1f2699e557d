"""Where experts live: layouts with replicas, policies that make them, what they cost, how far from the best they are.

Light on purpose: search and its numba kernels load when a policy is called.

- ``experts``, ``slots``: one-slot-per-expert Placement; RankSlots and LayerPlacements with replicas
- ``policies``: Contiguous, Striped, Random, ByLoad, Eplb, Search, NodeAware
- ``search``, ``nodes``: the searches themselves, the lower bound, the front of load, cross-node copies and moves
- ``splits``: which replica a sender picks; ``price``: memory, migration, staleness; ``maps``: JSON in and out
"""

from moesim.placement.experts import Placement, contiguous
from moesim.placement.slots import LayerPlacements, RankSlots, even_slots, from_placements

__all__ = ["LayerPlacements", "Placement", "RankSlots", "contiguous", "even_slots", "from_placements"]
