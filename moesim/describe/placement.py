"""How experts are asked to be placed: the scenario file's ``placement``, checked at birth.

A policy's name only; what each does stands in moesim/placement.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moesim.errors import check

PolicyName = Literal[
    "contiguous",
    "striped",
    "random",
    "by_load",
    "eplb",
    "eplb_global",
    "search",
    "search_hierarchical",
    "node_aware",
    "map",
]
SplitName = Literal["even", "nearest", "least_loaded", "uneven"]


@dataclass(frozen=True, kw_only=True)
class PlacementChoice:
    """How experts are placed, and how a sender chooses among the replicas of one."""

    policy: PolicyName = "contiguous"
    num_slots: int | None = None  # slots of an expert-parallel group, the same on each rank; null: one for each expert
    map: str | None = None  # a file of physical_to_logical or expert_to_rank, for policy: map
    split: SplitName = "even"  # which replica a sender takes; of one replica each there is no choice
    age_steps: int = 0  # steps since experts were placed: a drifting popularity has moved on by then
    # GPUs that compute slower than the others (or faster), by global rank or ranks such as 8-15: speed over theirs.
    rank_speeds: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rule = "must name a file where policy is map, and only there"
        check((self.policy == "map") == (self.map is not None), "scenario.placement", "map", rule, self.map)
        slots = self.num_slots
        check(slots is None or slots >= 1, "scenario.placement", "num_slots", "must be at least 1", slots)
        for name, speed in self.rank_speeds.items():
            check(
                speed > 0, "scenario.placement.rank_speeds", name, "must be positive: a speed over the others'", speed
            )

    def speed_of_rank(self, num_gpus: int) -> NDArray[np.float64]:
        """1 but for the ranks named. Raises InputError for ranks that are none, or named twice."""
        speed_of_rank, named = np.ones(num_gpus), np.zeros(num_gpus, dtype=bool)
        owner, rule = "scenario.placement.rank_speeds", f"must be ranks in 0..{num_gpus - 1}, such as 3 or 8-15"
        for name, speed in self.rank_speeds.items():
            first, _, last = name.partition("-")
            check(first.isdecimal() and (last or first).isdecimal(), owner, name, rule, name)
            low, high = int(first), int(last or first)
            check(low <= high < num_gpus, owner, name, rule, name)
            check(not named[low : high + 1].any(), owner, name, "names a rank that another entry names", name)
            speed_of_rank[low : high + 1] = speed
            named[low : high + 1] = True
        return speed_of_rank
