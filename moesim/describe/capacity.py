"""How many assignments an expert, or a rank, has room for: the conventions of five frameworks, told apart by ``kind``.

T tokens of a source rank and micro-batch, k experts per token, E experts, S source ranks, CF the capacity factor.
``moesim.routing.capacity.limit_of`` computes the places; here stands what a convention leaves open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moesim.describe.checks import check_whole

_OWNER = "routing.capacity"


@dataclass(frozen=True, kw_only=True)
class Megatron:
    """ceil(T*k/E*CF) places of each expert for each source rank; no drop when that reaches T."""

    kind: Literal["megatron"] = "megatron"


@dataclass(frozen=True, kw_only=True)
class Megablocks:
    """int(CF*k*T*S/E) places of each expert for all source ranks together; 0 means no limit (dropless)."""

    kind: Literal["megablocks"] = "megablocks"


@dataclass(frozen=True, kw_only=True)
class Tutel:
    """k*int(CF*ceil(T/E)) places of each expert for each source rank; all first choices go before all second ones."""

    kind: Literal["tutel"] = "tutel"


@dataclass(frozen=True, kw_only=True)
class Gshard:
    """int(n*CF/E) places of each expert for each group of n tokens, at least min_places (GShard, Switch, ST-MoE).

    group_tokens None: a source rank's tokens are one group. k is not in it: factor 2 of a top-2 router is as much room
    as factor 1 elsewhere. First choices go before second ones.
    """

    group_tokens: int | None = None
    min_places: int = 4
    kind: Literal["gshard"] = "gshard"

    def __post_init__(self) -> None:
        if self.group_tokens is not None:
            check_whole(_OWNER, "group_tokens", self.group_tokens)
        check_whole(_OWNER, "min_places", self.min_places, least=0)


@dataclass(frozen=True, kw_only=True)
class RankBuffer:
    """int(T*k*CF) rows, rounded up to align_rows, that a rank receives for all its experts (HybridEP's budget)."""

    align_rows: int = 1
    kind: Literal["rank_buffer"] = "rank_buffer"

    def __post_init__(self) -> None:
        check_whole(_OWNER, "align_rows", self.align_rows)


Capacity = Megatron | Megablocks | Tutel | Gshard | RankBuffer
