"""Which experts each token picks: top-k of Gumbel-perturbed log popularity, plain or inside the best groups.

Legend: T tokens, K experts per token, E experts, N expert groups.

A token adds an independent Gumbel variable to each expert's log weight and takes the k largest. Group-limited routing
first scores each group by the sum of its two largest perturbed log weights, keeps the best top_groups, and takes the k
largest inside them (the rule of DeepSeek-V3, arXiv 2412.19437 section 2.1.2, on perturbed popularity in place of a
router's score). Two implementations: a plain NumPy oracle that reads like this paragraph, and numba kernels that draw
the same law.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moesim.describe.model import Router
from moesim.errors import check

Floats = NDArray[np.float64]
Choices = NDArray[np.int16]


def draw_choices(
    log_weights_E: Floats,
    router: Router,
    num_tokens: int,
    rng: np.random.Generator,
    *,
    engine: Literal["numba", "numpy"] = "numba",
) -> Choices:
    """Experts of each token, best first.

    log_weights_E: log popularity, any offset. Returns choices_TK (int16); no expert stands twice in a row. The result
    depends on rng's state alone, not on threads; the two engines draw the same law but not the same numbers.
    Raises InputError for more experts than int16 numbers. docs/model.md#router-sample.

    >>> draw_choices(np.zeros(8), Router(top_k=2), 3, np.random.default_rng(0)).shape
    (3, 2)
    """
    num_experts = log_weights_E.size
    assert 1 <= router.top_k <= num_experts, "top_k out of range"
    most = np.iinfo(np.int16).max
    check(num_experts <= most, "moe", "num_experts", f"must not exceed {most} where tokens are drawn", num_experts)
    # Beyond this span the least weight underflows to zero and its clock never rings.
    assert float(np.ptp(log_weights_E)) < 600.0, "log weights must be finite and span less than 600"
    if engine == "numpy":
        return _draw_choices_numpy(log_weights_E, router, num_tokens, rng)
    from moesim.routing import kernels

    weights_E = np.exp(log_weights_E - log_weights_E.max())
    choices_TK = np.empty((num_tokens, router.top_k), dtype=np.int16)
    seed = rng.integers(0, 2**64, dtype=np.uint64)
    if router.top_groups == router.num_groups:
        kernels.draw_plain(weights_E, seed, choices_TK)
    else:
        kernels.draw_grouped(weights_E, router.num_groups, router.top_groups, seed, choices_TK)
    return choices_TK


def _draw_choices_numpy(log_weights_E: Floats, router: Router, num_tokens: int, rng: np.random.Generator) -> Choices:
    """The oracle: perturb every expert of every token and sort."""
    perturbed_TE = log_weights_E + rng.gumbel(size=(num_tokens, log_weights_E.size))
    if router.top_groups < router.num_groups:
        perturbed_TNS = perturbed_TE.reshape(num_tokens, router.num_groups, -1)
        score_TN = np.sort(perturbed_TNS, axis=2)[:, :, -2:].sum(axis=2)
        best_first_TN = np.argsort(-score_TN, axis=1)
        outside_TN = best_first_TN[:, router.top_groups :]
        np.put_along_axis(perturbed_TNS, outside_TN[:, :, None], -np.inf, axis=1)
    return np.argsort(-perturbed_TE, axis=1)[:, : router.top_k].astype(np.int16)


def warm() -> None:
    """Compile the kernels into numba's cache (a few seconds once; later runs load them)."""
    rng = np.random.default_rng(0)
    draw_choices(np.zeros(8), Router(top_k=2), 2, rng)
    draw_choices(np.zeros(8), Router(top_k=2, num_groups=4, top_groups=2), 2, rng)
