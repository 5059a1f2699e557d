"""A small routing that the tests of capacity share: sizes, all conventions, all drop policies."""

from __future__ import annotations

import numpy as np

from moesim.describe.model import Router
from moesim.describe.workload import (
    Capacity,
    DropPolicy,
    Gshard,
    Megablocks,
    Megatron,
    Popularity,
    RankBuffer,
    Tutel,
)
from moesim.routing.capacity import Limit, limit_of
from moesim.routing.popularity import Popularities, popularity_LE

TOKENS, SOURCES, EXPERTS, TOP_K = 48, 4, 16, 3
SIZES = {"tokens_per_rank": TOKENS, "num_source_ranks": SOURCES}
RANK_OF_E = np.arange(EXPERTS) // 4
CONVENTIONS = (Megatron(), Megablocks(), Tutel(), Gshard(group_tokens=24), RankBuffer())
ALL_POLICIES: tuple[DropPolicy, ...] = ("probability", "position", "random", "reroute")


def popularities_of(popularity: Popularity, *, layers: int = 1, router: Router | None = None) -> Popularities:
    router = router or Router(top_k=TOP_K)
    rng = np.random.default_rng(21)
    return popularity_LE(popularity, num_layers=layers, num_experts=EXPERTS, router=router, rng=rng)


def limit_at(capacity: Capacity, factor: float | None, *, pad: bool = False) -> Limit | None:
    return limit_of(capacity, capacity_factor=factor, num_experts=EXPERTS, top_k=TOP_K, pad=pad, **SIZES)
