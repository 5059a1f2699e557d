"""Named shapes of an exchange, drawn by seed: what to try a fabric with.

Legend: R ranks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.errors import InputError, near_match

Floats = NDArray[np.float64]

PATTERNS = (
    "uniform",
    "near_equal",
    "lognormal",
    "zipf",
    "hot_receivers",
    "hot_receiver",
    "hot_node",
    "ragged_source",
    "empty_rows",
    "routed",
)
HOT_RECEIVER, HOT_NODE = 8.0, 4.0  # times what the others get
TOKENS, EXPERTS_PER_RANK, TOP_K = 512, 4, 8  # of the pattern "routed"


def pattern_RR(
    pattern: str, num_ranks: int, ranks_per_node: int, rng: np.random.Generator, skew: float = 1.0
) -> Floats:
    """What rank i sends rank j, relative: (R, R), zero on the diagonal, 1 on average elsewhere.

    pattern: one of PATTERNS. skew: sigma of lognormal pairs, of lognormal receivers (``hot_receivers``), of senders
    (``ragged_source``) and of the experts' popularity (``routed``), exponent of ``zipf`` receivers; the others have
    none. ``routed``: each rank's tokens pick distinct experts, and go once to each of their ranks. Raises InputError.

    >>> pattern_RR("uniform", 3, 8, np.random.default_rng(0)).tolist()
    [[0.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 0.0]]
    """
    shape = (num_ranks, num_ranks)
    weight_RR = np.ones(shape)
    match pattern:
        case "uniform":
            pass
        case "near_equal":
            weight_RR += 1e-3 * rng.random(shape)
        case "lognormal":
            weight_RR = rng.lognormal(0.0, skew, shape)
        case "zipf":
            weight_RR *= rng.permutation(1.0 / np.arange(1, num_ranks + 1) ** skew)
        case "hot_receivers":
            weight_RR = rng.lognormal(0.0, 0.1, shape) * rng.lognormal(0.0, skew, num_ranks)
        case "hot_receiver":
            weight_RR[:, rng.integers(num_ranks)] = HOT_RECEIVER
        case "hot_node":
            nodes_R = np.arange(num_ranks) // ranks_per_node
            weight_RR[:, nodes_R == rng.choice(nodes_R)] = HOT_NODE
        case "ragged_source":
            weight_RR *= rng.lognormal(0.0, skew, num_ranks)[:, None]
        case "empty_rows":
            weight_RR = rng.lognormal(0.0, 0.5, shape)
            weight_RR[rng.random(num_ranks) < 0.3] = 0.0
        case "routed":
            weight_RR = _routed_RR(num_ranks, skew, rng)
        case _:
            raise InputError("pattern", "", "is not known", pattern, near_match(pattern, PATTERNS))
    np.fill_diagonal(weight_RR, 0.0)
    total = weight_RR.sum()
    return weight_RR * (num_ranks * (num_ranks - 1) / total) if total > 0 else weight_RR


def _routed_RR(num_ranks: int, skew: float, rng: np.random.Generator) -> Floats:
    num_experts = EXPERTS_PER_RANK * num_ranks
    top_k = min(TOP_K, num_experts)
    popularity_E = rng.normal(0.0, skew, num_experts)
    sent_RR = np.zeros((num_ranks, num_ranks))
    for source in range(num_ranks):
        keys_TE = popularity_E + rng.gumbel(size=(TOKENS, num_experts))
        ranks_TK = np.argpartition(-keys_TE, top_k - 1, axis=1)[:, :top_k] // EXPERTS_PER_RANK
        visits_TR = np.zeros((TOKENS, num_ranks), bool)
        visits_TR[np.arange(TOKENS)[:, None], ranks_TK] = True
        sent_RR[source] = visits_TR.sum(axis=0)
    return sent_RR
