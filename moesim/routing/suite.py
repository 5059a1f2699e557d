"""The skew suite: named loads of one micro-batch, by source rank and expert, for testing what copes with which skew.

Legend: S source ranks, E experts, R ranks that hold experts, contiguously.

Names from a Megatron-LM proposal (field notes of this project). Loads are expectations, not rounded.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from moesim.errors import InputError, check, near_match

Floats = NDArray[np.float64]
Skew = Literal[
    "balanced",
    "hot_expert_set",
    "hot_rank",
    "spread_hot_experts",
    "ragged_source",
    "zero_expert_rank",
    "rotating_hotspot",
    "burst",
]
SKEWS: tuple[Skew, ...] = get_args(Skew)
HOT_EXPERTS_PART = 16  # hot_expert_set: one expert in so many is hot
BURST_STEPS = 8  # burst: one step in so many


def skew_load(
    skew: Skew,
    *,
    tokens_per_rank: int,
    num_source_ranks: int,
    num_experts: int,
    num_ranks: int,
    top_k: int,
    hot_share: float = 0.5,
    step: int = 0,
) -> Floats:
    """assigned_SE: assignments that each source rank makes to each expert; all sum to S*T*k.

    hot_expert_set: the first experts (one in 16) take hot_share of all assignments; hot_rank: rank 0's experts do;
    spread_hot_experts: the first expert of every rank. ragged_source: rank s brings tokens in proportion to 2s + 1.
    zero_expert_rank: nobody wants the last rank. rotating_hotspot: the hot rank is the step's number; burst: every
    eighth step is rank 0's, the others are balanced. Where hot experts would get a token twice they take every token
    once, and the rest goes to the others. Raises InputError for an unknown name or ranks that do not divide experts.

    >>> load = skew_load("hot_rank", tokens_per_rank=64, num_source_ranks=4, num_experts=16, num_ranks=4, top_k=2)
    >>> float(load[:, :4].sum() / load.sum())
    0.5
    """
    if skew not in SKEWS:
        raise InputError("skew", "name", "is not in the skew suite", skew, near_match(str(skew), SKEWS))
    check(num_experts % num_ranks == 0, "skew", "num_ranks", f"must divide num_experts={num_experts}", num_ranks)
    check(0.0 < hot_share < 1.0, "skew", "hot_share", "must lie in 0..1", hot_share)
    rank_of_E = np.arange(num_experts) // (num_experts // num_ranks)
    hot_of = {
        "hot_expert_set": np.arange(num_experts) < max(1, num_experts // HOT_EXPERTS_PART),
        "hot_rank": rank_of_E == 0,
        "spread_hot_experts": np.arange(num_experts) % (num_experts // num_ranks) == 0,
        "rotating_hotspot": rank_of_E == step % num_ranks,
        "burst": (rank_of_E == 0) & (step % BURST_STEPS == 0),
    }
    hot_E = hot_of.get(skew, np.zeros(num_experts, dtype=bool))
    inclusion_E = np.full(num_experts, top_k / num_experts)
    if skew == "zero_expert_rank":
        wanted_E = rank_of_E < num_ranks - 1
        check(bool(top_k <= wanted_E.sum()), "skew", "num_ranks", f"must leave top_k={top_k} experts", num_ranks)
        inclusion_E = np.where(wanted_E, top_k / max(int(wanted_E.sum()), 1), 0.0)
    elif hot_E.any() and not hot_E.all():
        hot = min(hot_share * top_k, float(hot_E.sum()))  # a token uses an expert once
        inclusion_E = np.where(hot_E, hot / hot_E.sum(), (top_k - hot) / (~hot_E).sum())
    tokens_S = np.full(num_source_ranks, float(tokens_per_rank))
    if skew == "ragged_source":
        tokens_S *= (2.0 * np.arange(num_source_ranks) + 1.0) / num_source_ranks
    return tokens_S[:, None] * inclusion_E
