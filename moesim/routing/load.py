"""How many assignments each expert gets in each micro-batch, and how many its capacity keeps.

Legend: G expert-parallel groups, M micro-batches, L MoE layers, E experts.

A layer's popularity is fixed for the step; micro-batches differ by the noise of counting. Counts of one expert are sums
of independent tokens, so for each (group, micro-batch, layer) they are drawn from the normal law with the count's true
mean and variance, conditioned on the row's sum (every token makes exactly k assignments), then made whole numbers.
Three things widen that noise or leave the row: tokens that copy their neighbour's first expert (its variance grows by
(1 + c)/(1 - c)), runs of one domain (the runs of each domain are drawn, alike for all layers), and assignments that
reach no expert (zero-compute ones, second choices not taken: one more column, drawn and left out).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.describe.workload import Balanced, Routing
from moesim.errors import check
from moesim.routing.capacity import Limit, kept_of_limit, limit_of, rerouted
from moesim.routing.popularity import Popularities

Floats32 = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertLoad:
    """Assignments per expert-parallel group, micro-batch, MoE layer and expert: chosen by routers, and kept.

    limit: what an expert (or rank) has room for, None when nothing is dropped (then kept_GMLE is assigned_GMLE itself).
    rows_GMLE: rows that experts are sent and compute: those kept, or all places where buffers are padded.
    """

    assigned_GMLE: Floats32
    kept_GMLE: Floats32
    rows_GMLE: Floats32
    limit: Limit | None

    @property
    def capacity(self) -> int | None:
        """Places per expert (or rank) and bin; None when nothing is dropped."""
        return None if self.limit is None else self.limit.places

    @property
    def padding_fraction(self) -> float:
        """Share of the rows sent and computed that hold no assignment: 0 unless buffers are padded."""
        return 1.0 - float(self.kept_GMLE.sum(dtype=np.float64) / self.rows_GMLE.sum(dtype=np.float64))

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
    rank_of_E: NDArray[np.int64] | None = None,
) -> ExpertLoad:
    """Draw the load of a step. tokens_per_rank: tokens that each of a group's num_source_ranks brings per micro-batch.

    Balanced popularity, and experts that choose tokens: every count is its expectation, not rounded. Otherwise whole
    numbers that sum, per row, to exactly tokens * k (less what reaches no expert), none above the number of tokens.
    Kept counts are the expectation over how source ranks share each count (``capacity.kept_of_limit``). Top-1 counts
    are drawn from the multinomial law itself; for larger k the normal law is off where an expert expects fewer than
    about ten assignments. rank_of_E: where experts are, for rank buffers (None: contiguous over the source ranks).
    Raises InputError for more tokens than float32 counts. docs/model.md#load.

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
    router, num_experts = popularities.router, popularities.num_experts
    shape = (num_groups, num_micro_batches, popularities.num_layers, num_experts)
    limit = limit_of(
        routing.capacity,
        capacity_factor=routing.capacity_factor,
        tokens_per_rank=tokens_per_rank,
        num_source_ranks=num_source_ranks,
        num_experts=num_experts,
        top_k=router.top_k,
        pad=routing.pad_to_capacity,
    )
    if limit is not None and limit.of == "rank" and rank_of_E is None:
        rule = f"must divide the {num_experts} experts: rank buffers need each rank's experts"
        check(num_experts % num_source_ranks == 0, "parallel", "ep*etp", rule, num_source_ranks)
        rank_of_E = np.arange(num_experts) // (num_experts // num_source_ranks)
    if router.choice == "expert_choice":
        rule = "must be null where experts choose tokens: they take no more than they have room for"
        check(routing.capacity_factor is None, "routing", "capacity_factor", rule, routing.capacity_factor)
    if isinstance(routing.popularity, Balanced) or router.choice == "expert_choice":
        each_LE = (num_tokens * popularities.inclusion_LE).astype(np.float32)
        assigned_GMLE = np.broadcast_to(each_LE, shape).copy()
        if (
            limit is not None and limit.of == "expert"
        ):  # a balanced load is alike on all source ranks: nothing is left to chance
            kept_GMLE = np.minimum(assigned_GMLE, np.float32(limit.total_places))
            return _with_rows(assigned_GMLE, kept_GMLE, limit, routing, rank_of_E)
    else:
        most = 2**24  # float32 holds whole numbers up to it exactly
        owner, field = "routing", "micro_batch*seq_len/(tp*cp)*ep*etp"
        rule = f"tokens of an expert-parallel group and micro-batch must not exceed {most}, to be counted one by one"
        check(num_tokens <= most, owner, field, rule, num_tokens, "popularity: balanced needs no counting.")
        assigned_GMLE = _draw_assigned(popularities, num_tokens, shape, rng)
    if limit is None:
        return _with_rows(assigned_GMLE, assigned_GMLE, None, routing, None)
    kept_GMLE = np.empty_like(assigned_GMLE)
    for kept_MLE, assigned_MLE in zip(kept_GMLE, assigned_GMLE, strict=True):
        kept_MLE[...] = kept_of_limit(assigned_MLE, limit, rank_of_E)
        if routing.drop_policy == "reroute":
            kept_MLE[...] = rerouted(assigned_MLE, kept_MLE, limit, next_weights(popularities))
    return _with_rows(assigned_GMLE, kept_GMLE, limit, routing, rank_of_E)


def next_weights(popularities: Popularities) -> NDArray[np.float64]:
    """(L, E) how likely a token turns to each expert after its own k: weight times the share of tokens without it."""
    weights_LE = np.exp(popularities.log_weights_LE - popularities.log_weights_LE.max(axis=1, keepdims=True))
    return weights_LE * (1.0 - popularities.inclusion_LE)


def _with_rows(
    assigned_GMLE: Floats32,
    kept_GMLE: Floats32,
    limit: Limit | None,
    routing: Routing,
    rank_of_E: NDArray[np.int64] | None,
) -> ExpertLoad:
    rows_GMLE = kept_GMLE
    if routing.pad_to_capacity and limit is not None:
        places_E = np.full(kept_GMLE.shape[-1], limit.total_places, dtype=np.float32)
        if limit.of == "rank":  # a rank's rows belong to its experts in equal parts
            assert rank_of_E is not None
            places_E /= np.bincount(rank_of_E)[rank_of_E]
        rows_GMLE = np.broadcast_to(places_E, kept_GMLE.shape).copy()
    return ExpertLoad(assigned_GMLE=assigned_GMLE, kept_GMLE=kept_GMLE, rows_GMLE=rows_GMLE, limit=limit)


def _draw_assigned(
    popularities: Popularities, num_tokens: int, shape: tuple[int, int, int, int], rng: np.random.Generator
) -> Floats32:
    """Whole counts of every (group, micro-batch, layer, expert)."""
    top_k, nowhere_L = popularities.router.top_k, popularities.nowhere_L
    inclusion_LE = popularities.inclusion_LE
    parts, repeat_L = popularities.domains, popularities.repeat_L
    if nowhere_L is not None:
        inclusion_LE = np.concatenate([inclusion_LE, nowhere_L[:, None]], axis=1)
    wide = (*shape[:3], inclusion_LE.shape[1])
    if top_k == 1 and repeat_L is None and parts is None:
        share_LE = inclusion_LE / inclusion_LE.sum(axis=1, keepdims=True)
        counts_GMLE = rng.multinomial(num_tokens, share_LE, size=shape[:3]).astype(np.float32)
        return np.ascontiguousarray(counts_GMLE[..., : shape[3]])
    most_E = np.full(inclusion_LE.shape[1], float(num_tokens))
    # A token uses an expert once; of zero-compute experts as many as there are, or k.
    variance_LE = num_tokens * inclusion_LE * (1.0 - np.minimum(inclusion_LE, 1.0))
    if nowhere_L is not None:
        num_zero = popularities.router.num_zero_experts
        most_E[-1] = num_tokens * min(top_k, max(num_zero, 1))
        # Zero-compute experts among a token's k vary as draws without replacement do; a second choice falls or not.
        share_L, total = nowhere_L / top_k, shape[3] + num_zero
        drawn_L = top_k * share_L * (1.0 - share_L) * (total - top_k) / max(total - 1, 1)
        variance_LE[:, -1] = num_tokens * (drawn_L if num_zero else nowhere_L * (1.0 - nowhere_L))
    if repeat_L is not None:
        variance_LE[:, : shape[3]] += num_tokens * _variance_of_copying(popularities)
    mean_GMLE = None
    if parts is not None:
        tokens_GMD = _tokens_of_domains(parts.share_D, parts.run_tokens, num_tokens, shape[:2], rng)
        mean_GMLE = np.tensordot(tokens_GMD, parts.inclusion_DLE, axes=1)
        within_LE = np.tensordot(parts.share_D, parts.inclusion_DLE * (1.0 - parts.inclusion_DLE), axes=1)
        variance_LE[:, : shape[3]] += num_tokens * within_LE - num_tokens * (
            popularities.inclusion_LE * (1.0 - popularities.inclusion_LE)
        )
        if nowhere_L is not None:
            left_GML1 = num_tokens * top_k - mean_GMLE.sum(axis=-1, keepdims=True)
            mean_GMLE = np.concatenate([mean_GMLE, left_GML1], axis=-1)
    counts_GMLE = _draw_counts(num_tokens * inclusion_LE, variance_LE, most_E, wide, rng, mean_GMLE)
    return np.ascontiguousarray(counts_GMLE[..., : shape[3]])


def _variance_of_copying(popularities: Popularities) -> NDArray[np.float64]:
    """(L, E) variance per token that copied first experts add to a count.

    First choices are a chain whose correlation falls as c**lag: their variance grows by 2c/(1 - c) of itself. A first
    choice f moves the chance that expert e is used from (p_e - s_e)/(1 - s_e) (another is first) to 1 (e is).
    """
    assert popularities.repeat_L is not None
    assert popularities.first_LE is not None
    first_LE, copy_L1 = popularities.first_LE, popularities.repeat_L[:, None]
    otherwise_LE = (popularities.inclusion_LE - first_LE) / np.maximum(1.0 - first_LE, 1e-12)
    moved_LE = first_LE * (1.0 - first_LE) * (1.0 - otherwise_LE) ** 2
    return 2.0 * copy_L1 / (1.0 - copy_L1) * moved_LE


def _tokens_of_domains(
    share_D: NDArray[np.float64], run_tokens: int, num_tokens: int, shape: tuple[int, int], rng: np.random.Generator
) -> NDArray[np.float64]:
    """tokens_GMD: a micro-batch is whole runs of one domain each, and a shorter one at its end."""
    tokens_GMD = run_tokens * rng.multinomial(num_tokens // run_tokens, share_D, size=shape).astype(np.float64)
    rest = num_tokens % run_tokens
    if rest:
        tokens_GMD += rest * rng.multinomial(1, share_D, size=shape)
    return tokens_GMD


def _draw_counts(
    mean_LE: NDArray[np.float64],
    variance_LE: NDArray[np.float64],
    most_E: NDArray[np.float64],
    shape: tuple[int, int, int, int],
    rng: np.random.Generator,
    mean_GMLE: NDArray[np.float64] | None = None,
) -> Floats32:
    """Whole counts of these means and variances, 0..most, rows keeping their sum; group by group to bound memory.

    mean_GMLE: means that differ between micro-batches.
    """
    row_sum_L = np.round(mean_LE.sum(axis=1))
    raw_variance_LE = _variance_before_conditioning(variance_LE)
    share_LE = raw_variance_LE / np.maximum(raw_variance_LE.sum(axis=1, keepdims=True), 1e-30)
    deviation_LE = np.sqrt(raw_variance_LE).astype(np.float32)
    counts_GMLE = np.empty(shape, np.float32)
    for group, noise_MLE in enumerate(counts_GMLE):
        rng.standard_normal(dtype=np.float32, out=noise_MLE)
        noise_MLE *= deviation_LE
        noise_MLE -= noise_MLE.sum(axis=-1, keepdims=True) * share_LE.astype(np.float32)
        noise_MLE += (mean_LE if mean_GMLE is None else mean_GMLE[group]).astype(np.float32)
        np.clip(noise_MLE, 0.0, most_E.astype(np.float32), out=noise_MLE)
        _round_to_sum(noise_MLE, row_sum_L, most_E)
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


def _round_to_sum(counts_MLE: Floats32, row_sum_L: NDArray[np.float64], most_E: NDArray[np.float64]) -> None:
    """Round in place so that each row sums to row_sum exactly and stays within 0..most_E.

    Cumulative sums are rounded instead of counts: each count moves by less than one, none gains by its position.
    """
    excess_ML = row_sum_L - counts_MLE.sum(axis=-1, dtype=np.float64)
    counts = counts_MLE.astype(np.float64)
    counts *= (row_sum_L / (row_sum_L - excess_ML))[..., None]
    np.cumsum(counts, axis=-1, out=counts)
    np.rint(counts, out=counts)
    counts[..., 1:] -= counts[..., :-1].copy()
    np.clip(counts, 0.0, most_E, out=counts)
    counts_MLE[...] = counts
    # Scaling can push a saturated expert over the number of tokens: hand the rest to the next most loaded.
    for m, layer in np.argwhere(counts.sum(axis=-1) != row_sum_L):
        row_E = counts[m, layer]
        short = row_sum_L[layer] - row_E.sum()
        while short > 0:
            room_E = most_E - row_E
            taker = int(np.argmax(np.where(room_E > 0, row_E, -1.0)))
            given = min(short, float(room_E[taker]))
            row_E[taker] += given
            short -= given
        counts_MLE[m, layer] = row_E
