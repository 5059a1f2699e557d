"""How many assignments each expert gets in each micro-batch, and how many its capacity keeps.

Legend: G expert-parallel groups, M micro-batches, L MoE layers, E experts.

A layer's popularity is fixed for the step; micro-batches differ by the noise of counting. Counts of one expert are sums
of independent tokens, so for each (group, micro-batch, layer) they are drawn from the normal law with the count's true
mean and variance, conditioned on the row's sum (every token makes exactly k assignments), then made whole numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.describe.workload import Balanced, Routing
from moesim.errors import check
from moesim.routing.capacity import kept_of_count, megatron_capacity
from moesim.routing.popularity import Popularities

Floats32 = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertLoad:
    """Assignments per expert-parallel group, micro-batch, MoE layer and expert: chosen by routers, and kept.

    capacity: places per expert and source rank, None when nothing is dropped (then kept_GMLE is assigned_GMLE itself).
    """

    assigned_GMLE: Floats32
    kept_GMLE: Floats32
    capacity: int | None

    @property
    def drop_fraction(self) -> float:
        """Dropped share of all assignments."""
        return 1.0 - float(self.kept_GMLE.sum(dtype=np.float64) / self.assigned_GMLE.sum(dtype=np.float64))

    @property
    def drop_fraction_L(self) -> NDArray[np.float64]:
        """Dropped share of each layer's assignments."""
        kept_L = self.kept_GMLE.sum(axis=(0, 1, 3), dtype=np.float64)
        return 1.0 - kept_L / self.assigned_GMLE.sum(axis=(0, 1, 3), dtype=np.float64)


def draw_load(
    popularities: Popularities,
    routing: Routing,
    *,
    tokens_per_rank: int,
    num_source_ranks: int,
    num_groups: int,
    num_micro_batches: int,
    rng: np.random.Generator,
) -> ExpertLoad:
    """Draw the load of a step. tokens_per_rank: tokens that each of a group's num_source_ranks brings per micro-batch.

    Balanced popularity: every count is its expectation, not rounded. Otherwise whole numbers that sum, per row, to
    exactly tokens * k, none above the number of tokens. Kept counts are the expectation over how the source ranks
    share each count (``capacity.kept_of_count``). Top-1 counts are drawn from the multinomial law itself; for larger
    k the normal law is off where an expert expects fewer than about ten assignments. Raises InputError for more tokens
    than float32 counts. docs/model.md#load.

    >>> from moesim.describe.model import Router
    >>> from moesim.routing.popularity import popularity_LE
    >>> rng = np.random.default_rng(0)
    >>> drawn = popularity_LE(Routing().popularity, num_layers=2, num_experts=16, router=Router(top_k=2), rng=rng)
    >>> sizes = {"tokens_per_rank": 512, "num_source_ranks": 4, "num_groups": 1, "num_micro_batches": 3}
    >>> load = draw_load(drawn, Routing(), **sizes, rng=rng)
    >>> load.assigned_GMLE.sum(axis=-1).tolist()[0][0]
    [4096.0, 4096.0]
    """
    num_tokens = tokens_per_rank * num_source_ranks
    top_k, num_experts = popularities.router.top_k, popularities.num_experts
    shape = (num_groups, num_micro_batches, popularities.num_layers, num_experts)
    capacity = megatron_capacity(
        tokens_per_rank=tokens_per_rank, top_k=top_k, num_experts=num_experts, capacity_factor=routing.capacity_factor
    )
    if isinstance(routing.popularity, Balanced):
        each = num_tokens * top_k / num_experts
        kept_each = each if capacity is None else min(each, float(capacity * num_source_ranks))
        return ExpertLoad(
            assigned_GMLE=np.full(shape, each, np.float32),
            kept_GMLE=np.full(shape, kept_each, np.float32),
            capacity=capacity,
        )
    most = 2**24  # float32 holds whole numbers up to it exactly
    owner, field = "routing", "micro_batch*seq_len/(tp*cp)*ep*etp"
    rule = f"tokens of an expert-parallel group and micro-batch must not exceed {most}, to be counted one by one"
    check(num_tokens <= most, owner, field, rule, num_tokens, "popularity: balanced needs no counting.")
    if top_k == 1:
        share_LE = popularities.inclusion_LE / popularities.inclusion_LE.sum(axis=1, keepdims=True)
        assigned_GMLE = rng.multinomial(num_tokens, share_LE, size=shape[:3]).astype(np.float32)
    else:
        assigned_GMLE = _draw_counts(popularities.inclusion_LE, num_tokens, shape, rng)
    if capacity is None:
        return ExpertLoad(assigned_GMLE=assigned_GMLE, kept_GMLE=assigned_GMLE, capacity=None)
    # Counts are whole numbers: one look-up table serves all of them, ten times faster than interpolating each.
    kept_of_whole_count = kept_of_count(
        np.arange(int(assigned_GMLE.max()) + 1, dtype=np.float32),
        capacity=capacity,
        tokens_per_rank=tokens_per_rank,
        num_source_ranks=num_source_ranks,
    )
    kept_GMLE = np.empty_like(assigned_GMLE)
    for kept_MLE, assigned_MLE in zip(kept_GMLE, assigned_GMLE, strict=True):
        np.take(kept_of_whole_count, assigned_MLE.astype(np.int32), out=kept_MLE)
    return ExpertLoad(assigned_GMLE=assigned_GMLE, kept_GMLE=kept_GMLE, capacity=capacity)


def _draw_counts(
    inclusion_LE: NDArray[np.float64], num_tokens: int, shape: tuple[int, int, int, int], rng: np.random.Generator
) -> Floats32:
    """Whole counts around num_tokens * inclusion, rows summing to num_tokens * k; group by group to bound memory."""
    mean_LE = num_tokens * inclusion_LE
    row_sum_L = np.round(mean_LE.sum(axis=1))
    raw_variance_LE = _variance_before_conditioning(num_tokens * inclusion_LE * (1.0 - inclusion_LE))
    share_LE = raw_variance_LE / np.maximum(raw_variance_LE.sum(axis=1, keepdims=True), 1e-30)
    deviation_LE = np.sqrt(raw_variance_LE).astype(np.float32)
    counts_GMLE = np.empty(shape, np.float32)
    for noise_MLE in counts_GMLE:
        rng.standard_normal(dtype=np.float32, out=noise_MLE)
        noise_MLE *= deviation_LE
        noise_MLE -= noise_MLE.sum(axis=-1, keepdims=True) * share_LE.astype(np.float32)
        noise_MLE += mean_LE.astype(np.float32)
        np.clip(noise_MLE, 0.0, float(num_tokens), out=noise_MLE)
        _round_to_sum(noise_MLE, row_sum_L, float(num_tokens))
    return counts_GMLE


def _variance_before_conditioning(variance_LE: NDArray[np.float64]) -> NDArray[np.float64]:
    """Variances d of independent normals that, conditioned on their sum, have variances v: d - d*d/sum(d) = v.

    Fixed point as for Hajek's conditional Poisson sampling; rows with fewer than three varying experts have no such d
    for unequal v and stay near it.
    """
    raw_LE = variance_LE.copy()
    for _ in range(50):
        share_LE = raw_LE / np.maximum(raw_LE.sum(axis=1, keepdims=True), 1e-30)
        raw_LE = variance_LE / np.maximum(1.0 - share_LE, 0.5)
    return raw_LE


def _round_to_sum(counts_MLE: Floats32, row_sum_L: NDArray[np.float64], most: float) -> None:
    """Round in place so that each row sums to row_sum exactly and stays within 0..most.

    Cumulative sums are rounded instead of counts: each count moves by less than one, none gains by its position.
    """
    excess_ML = row_sum_L - counts_MLE.sum(axis=-1, dtype=np.float64)
    counts = counts_MLE.astype(np.float64)
    counts *= (row_sum_L / (row_sum_L - excess_ML))[..., None]
    np.cumsum(counts, axis=-1, out=counts)
    np.rint(counts, out=counts)
    counts[..., 1:] -= counts[..., :-1].copy()
    np.clip(counts, 0.0, most, out=counts)
    counts_MLE[...] = counts
    # Scaling can push a saturated expert over the number of tokens: hand the rest to the next most loaded.
    for m, layer in np.argwhere(counts.sum(axis=-1) != row_sum_L):
        row_E = counts[m, layer]
        short = row_sum_L[layer] - row_E.sum()
        while short > 0:
            room_E = most - row_E
            taker = int(np.argmax(np.where(room_E > 0, row_E, -1.0)))
            given = min(short, float(room_E[taker]))
            row_E[taker] += given
            short -= given
        counts_MLE[m, layer] = row_E
