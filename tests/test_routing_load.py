"""Expert counts and dropped assignments against tokens drawn one by one."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from moesim.describe.model import Router
from moesim.describe.workload import (
    Balanced,
    Correlation,
    Domain,
    DomainMixture,
    Lognormal,
    Multinomial,
    Popularity,
    Routing,
)
from moesim.errors import InputError
from moesim.routing.capacity import drop_curve, expected_kept_fraction, kept_of_count, megatron_capacity
from moesim.routing.load import ExpertLoad, _tokens_of_domains, draw_load
from moesim.routing.popularity import Popularities, popularity_LE
from moesim.routing.routers import draw_token_sequence
from moesim.routing.sampler import draw_choices

TOKENS, SOURCES, EXPERTS, TOP_K = 64, 8, 16, 3


def popularities_of(
    popularity: Popularity, *, layers: int = 1, experts: int = EXPERTS, top_k: int = TOP_K
) -> Popularities:
    rng = np.random.default_rng(21)
    return popularity_LE(popularity, num_layers=layers, num_experts=experts, router=Router(top_k=top_k), rng=rng)


def load_of(
    routing: Routing, popularities: Popularities, *, micro_batches: int = 400, tokens: int = TOKENS, seed: int = 3
) -> ExpertLoad:
    return draw_load(
        popularities,
        routing,
        tokens_per_rank=tokens,
        num_source_ranks=SOURCES,
        num_groups=1,
        num_micro_batches=micro_batches,
        rng=np.random.default_rng(seed),
    )


def counts_token_by_token(popularities: Popularities, micro_batches: int, seed: int = 4) -> NDArray[np.int64]:
    """counts_MSE: assignments of each source rank to each expert, every token drawn by the sampler."""
    router, experts = popularities.router, popularities.num_experts
    num_tokens = micro_batches * SOURCES * TOKENS
    choices = draw_choices(popularities.log_weights_LE[0], router, num_tokens, np.random.default_rng(seed))
    batch = np.repeat(np.arange(micro_batches * SOURCES), TOKENS * router.top_k)
    flat = np.bincount(batch * experts + choices.ravel(), minlength=micro_batches * SOURCES * experts)
    return flat.reshape(micro_batches, SOURCES, experts)


@pytest.mark.parametrize("gini", [0.2, 0.5])
def test_counts_have_the_mean_and_spread_of_tokens_drawn_one_by_one(gini: float) -> None:
    popularities = popularities_of(Lognormal(gini=gini))
    fast = load_of(Routing(popularity=Lognormal(gini=gini)), popularities, micro_batches=3000).assigned_GMLE[0, :, 0]
    slow = counts_token_by_token(popularities, 3000).sum(axis=1)
    deviation = slow.std(axis=0)
    assert np.abs(fast.mean(axis=0) - slow.mean(axis=0)).max() < 5 * (deviation * np.sqrt(2 / 3000)).max()
    # The standard deviation of 3000 draws is known to 1.3 %; the rounding to whole numbers adds 1/12 to a variance.
    assert fast.std(axis=0) == pytest.approx(deviation, rel=0.08, abs=0.3)


def test_equal_experts_vary_as_the_law_of_top_k_choices_says() -> None:
    popularities = popularities_of(Multinomial(), experts=8, top_k=2)
    counts = (
        load_of(Routing(popularity=Multinomial()), popularities, micro_batches=4000)
        .assigned_GMLE[0, :, 0]
        .astype(np.float64)
    )
    inclusion, num_tokens = 2 / 8, TOKENS * SOURCES
    assert counts.var() == pytest.approx(num_tokens * inclusion * (1 - inclusion), rel=0.05)
    covariance = np.cov(counts.T)
    off_diagonal = covariance[~np.eye(8, dtype=bool)]
    assert off_diagonal.mean() == pytest.approx(-num_tokens * inclusion * (1 - inclusion) / 7, rel=0.05)


def test_top_1_counts_are_multinomial() -> None:
    popularities = popularities_of(Lognormal(gini=0.4), experts=32, top_k=1)
    counts = load_of(Routing(), popularities, micro_batches=4000, tokens=8).assigned_GMLE[0, :, 0].astype(np.float64)
    share = popularities.inclusion_LE[0]
    assert counts.mean(axis=0) == pytest.approx(64 * share, abs=5 * np.sqrt(64 * share.max() / 4000))
    assert counts.var(axis=0) == pytest.approx(64 * share * (1 - share), rel=0.2)


@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize("gini", [0.0, 0.3, 0.7])
def test_every_row_sums_to_tokens_times_k_and_no_expert_takes_a_token_twice(top_k: int, gini: float) -> None:
    popularities = popularities_of(Lognormal(gini=gini), layers=3, experts=64, top_k=top_k)
    counts = load_of(Routing(popularity=Lognormal(gini=gini)), popularities, micro_batches=50).assigned_GMLE
    assert np.array_equal(counts.sum(axis=-1), np.full((1, 50, 3), TOKENS * SOURCES * top_k, dtype=np.float32))
    assert counts.min() >= 0
    assert counts.max() <= TOKENS * SOURCES
    assert np.array_equal(counts, np.rint(counts))


def test_rows_stay_exact_when_experts_are_saturated() -> None:
    popularities = popularities_of(Lognormal(gini=0.7), experts=8, top_k=2)
    counts = load_of(Routing(), popularities, micro_batches=500, tokens=3).assigned_GMLE
    assert np.array_equal(counts.sum(axis=-1), np.full((1, 500, 1), 3 * SOURCES * 2, dtype=np.float32))
    assert counts.max() <= 3 * SOURCES
    everybody = popularities_of(Multinomial(), experts=4, top_k=4)
    assert np.array_equal(load_of(Routing(), everybody).assigned_GMLE, np.full((1, 400, 1, 4), TOKENS * SOURCES))


def test_balanced_counts_are_the_expectation_and_not_rounded() -> None:
    popularities = popularities_of(Balanced(), experts=10, top_k=3)
    load = load_of(Routing(popularity=Balanced()), popularities, micro_batches=2, tokens=33)
    assert np.array_equal(load.assigned_GMLE, np.full((1, 2, 1, 10), np.float32(33 * SOURCES * 0.3)))
    assert load.drop_fraction == 0.0


def test_balanced_counts_drop_only_below_a_capacity_factor_of_one() -> None:
    popularities = popularities_of(Balanced(), experts=8, top_k=2)
    at_one = load_of(Routing(popularity=Balanced(), capacity_factor=1.0), popularities)
    at_half = load_of(Routing(popularity=Balanced(), capacity_factor=0.5), popularities)
    assert at_one.drop_fraction == 0.0
    assert at_half.drop_fraction == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("tokens", "factor", "capacity"),
    [(4096, 1.25, 160), (4096, 1.0, 128), (100, 1.0, 4), (8, 1.0, 1), (4096, 32.0, None)],
)
def test_megatron_capacity_is_ceil_of_the_mean_times_the_factor_per_source_rank(
    tokens: int, factor: float, capacity: int | None
) -> None:
    assert megatron_capacity(tokens_per_rank=tokens, top_k=8, num_experts=256, capacity_factor=factor) == capacity


def test_no_factor_means_no_capacity() -> None:
    assert megatron_capacity(tokens_per_rank=64, top_k=2, num_experts=8, capacity_factor=None) is None


@pytest.mark.parametrize("gini", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("factor", [0.75, 1.0, 1.5])
def test_drops_agree_with_capping_every_source_rank_token_by_token(gini: float, factor: float) -> None:
    popularities = popularities_of(Lognormal(gini=gini))
    routing = Routing(popularity=Lognormal(gini=gini), capacity_factor=factor)
    load = load_of(routing, popularities, micro_batches=1500)
    counts_MSE = counts_token_by_token(popularities, 1500)
    capacity = megatron_capacity(tokens_per_rank=TOKENS, top_k=TOP_K, num_experts=EXPERTS, capacity_factor=factor)
    assert capacity is not None
    dropped = 1 - np.minimum(counts_MSE, capacity).sum() / counts_MSE.sum()
    # 1500 micro-batches of 1536 assignments: the share is known to about 0.0005.
    assert load.drop_fraction == pytest.approx(dropped, abs=0.003)
    closed = 1 - expected_kept_fraction(popularities.inclusion_LE, capacity=capacity, tokens_per_rank=TOKENS)
    assert closed[0] == pytest.approx(dropped, abs=0.003)
    assert load.drop_fraction_L[0] == pytest.approx(load.drop_fraction)


def test_kept_of_a_known_count_agrees_with_dealing_it_to_source_ranks() -> None:
    rng = np.random.default_rng(0)
    for count in (60, 120, 200):
        dealt = rng.multivariate_hypergeometric([TOKENS] * SOURCES, count, size=40_000)
        expected = np.minimum(dealt, 16).sum(axis=1).mean()
        kept = kept_of_count(np.array([float(count)]), capacity=16, tokens_per_rank=TOKENS, num_source_ranks=SOURCES)
        assert kept[0] == pytest.approx(expected, abs=0.1)


def test_one_source_rank_keeps_the_lesser_of_count_and_capacity() -> None:
    kept = kept_of_count(np.array([3.0, 10.0, 17.0]), capacity=10, tokens_per_rank=64, num_source_ranks=1)
    assert kept.tolist() == [3.0, 10.0, 10.0]


def test_kept_never_exceeds_assigned_nor_the_places_there_are() -> None:
    routing = Routing(popularity=Lognormal(gini=0.5), capacity_factor=1.0)
    load = load_of(routing, popularities_of(routing.popularity))
    assert load.capacity == 12
    assert (load.kept_GMLE <= load.assigned_GMLE * (1 + 1e-6)).all()
    assert load.kept_GMLE.max() <= 12 * SOURCES * (1 + 1e-6)


def test_drops_fall_with_the_capacity_factor_and_vanish_for_a_large_one() -> None:
    popularities = popularities_of(Lognormal(gini=0.3), layers=4, experts=64, top_k=6)
    drops = drop_curve(popularities.inclusion_LE, [0.5, 1.0, 1.25, 2.0, 4.0, 64.0], tokens_per_rank=512, top_k=6)
    assert (np.diff(drops) < 0).all()
    assert drops[0] > 0.5
    assert drops[-1] == 0.0


def test_a_uniform_drop_curve_is_the_tail_of_a_binomial() -> None:
    from math import comb

    tail = sum(max(n - 8, 0) * comb(32, n) * 0.25**n * 0.75 ** (32 - n) for n in range(33)) / 8
    assert drop_curve(np.full((1, 8), 0.25), [1.0], tokens_per_rank=32, top_k=2)[0] == pytest.approx(tail, abs=1e-4)


def test_lognormal_popularity_drops_as_the_field_notes_tell() -> None:
    # E=256, k=8, Gini .29: 13 % dropped at factor 1.25; Gini .52: 32 % (field notes, section 3, one draw each).
    for gini, dropped in ((0.29, 0.13), (0.52, 0.32)):
        popularities = popularities_of(Lognormal(gini=gini), layers=8, experts=256, top_k=8)
        drops = drop_curve(popularities.inclusion_LE, [1.25], tokens_per_rank=65536, top_k=8)
        assert drops[0] == pytest.approx(dropped, abs=0.025)


def test_the_same_seed_gives_the_same_load() -> None:
    popularities = popularities_of(Lognormal())
    first, again, other = (load_of(Routing(capacity_factor=1.0), popularities, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.kept_GMLE, again.kept_GMLE)
    assert not np.array_equal(first.kept_GMLE, other.kept_GMLE)


def test_more_tokens_than_float32_counts_are_refused_by_name() -> None:
    popularities = popularities_of(Multinomial())
    with pytest.raises(InputError, match=r"routing: micro_batch\*seq_len.* must not exceed 16777216.*; got 16777224"):
        load_of(Routing(popularity=Multinomial()), popularities, micro_batches=1, tokens=2**21 + 1)


def spread_of(counts: NDArray[np.floating], row: int = 0) -> NDArray[np.floating]:
    return counts[:, row].astype(np.float64).std(axis=0)


def test_tokens_that_copy_their_neighbour_widen_counts_as_drawn_sequences_do() -> None:
    popularity = Lognormal(gini=0.2, correlation=Correlation(first_repeat=0.5))
    popularities = popularities_of(popularity, experts=8, top_k=2)
    assert popularities.repeat_L is not None
    fast = load_of(Routing(popularity=popularity), popularities, micro_batches=3000).assigned_GMLE[0]
    per_batch = TOKENS * SOURCES
    sequence = draw_token_sequence(
        popularities.log_weights_LE[0],
        popularities.router,
        1500 * per_batch,
        float(popularities.repeat_L[0]),
        np.random.default_rng(1),
    )
    flat = np.repeat(np.arange(1500) * 8, per_batch * 2) + sequence.ravel()
    slow = np.bincount(flat, minlength=1500 * 8).reshape(1500, 1, 8)
    assert fast.mean(axis=(0, 1)) == pytest.approx(slow.mean(axis=(0, 1)), rel=0.02)
    # The standard deviation of 1500 draws is known to 1.8 %; what a first choice does to others is averaged.
    assert spread_of(fast) == pytest.approx(spread_of(slow), rel=0.1)
    independent = load_of(Routing(), popularities_of(Lognormal(gini=0.2), experts=8, top_k=2), micro_batches=3000)
    assert (spread_of(fast) > 1.15 * spread_of(independent.assigned_GMLE[0])).all()


def test_runs_of_one_domain_widen_counts_alike_in_all_layers_and_leave_their_means() -> None:
    texts = (Domain(name="code", share=0.5), Domain(name="prose", share=0.5))
    loads = {}
    for run_tokens in (1, 64):
        mixture = DomainMixture(domains=texts, gini=0.25, run_tokens=run_tokens)
        popularities = popularities_of(mixture, layers=2)
        loads[run_tokens] = load_of(Routing(popularity=mixture), popularities, micro_batches=3000).assigned_GMLE[0]
    mixed, in_runs = loads[1], loads[64]
    assert in_runs.mean(axis=0) == pytest.approx(mixed.mean(axis=0), rel=0.05)
    parts = popularities.domains
    assert parts is not None
    # Variance of a run: tokens of one domain, then which domain each of the 8 runs is.
    within = TOKENS * SOURCES * (parts.inclusion_DLE * (1 - parts.inclusion_DLE)).mean(axis=0)
    between = 8 * 64**2 * parts.inclusion_DLE.var(axis=0)
    assert spread_of(in_runs) == pytest.approx(np.sqrt(within + between)[0], rel=0.08)
    whole = popularities.inclusion_LE[0]
    assert spread_of(mixed) == pytest.approx(np.sqrt(TOKENS * SOURCES * whole * (1 - whole)), rel=0.08)
    assert np.array_equal(in_runs.sum(axis=-1), np.full((3000, 2), TOKENS * SOURCES * TOP_K))
    code_heavy = in_runs[:, 0] @ (parts.inclusion_DLE[0, 0] - parts.inclusion_DLE[1, 0])
    same_in_layer_1 = in_runs[:, 1] @ (parts.inclusion_DLE[0, 1] - parts.inclusion_DLE[1, 1])
    assert np.corrcoef(code_heavy, same_in_layer_1)[0, 1] > 0.8


def test_domains_share_out_all_tokens_of_a_micro_batch_though_the_last_run_be_short() -> None:
    tokens_GMD = _tokens_of_domains(np.array([0.25, 0.75]), 100, 512, (2, 500), np.random.default_rng(0))
    assert np.array_equal(tokens_GMD.sum(axis=-1), np.full((2, 500), 512.0))
    assert tokens_GMD[..., 0].mean() == pytest.approx(128.0, abs=4 * 100 * np.sqrt(5 * 0.25 * 0.75 / 1000))
    assert set(np.unique(tokens_GMD % 100)) == {0.0, 12.0}


@pytest.mark.parametrize(
    "router",
    [Router(top_k=2, choice="random_second"), Router(top_k=6, num_zero_experts=8), Router(top_k=1, num_zero_experts=4)],
)
def test_assignments_that_reach_nobody_leave_the_rows_as_drawn_tokens_do(router: Router) -> None:
    popularity = Lognormal(gini=0.2)
    popularities = popularity_LE(
        popularity, num_layers=1, num_experts=EXPERTS, router=router, rng=np.random.default_rng(2)
    )
    counts = load_of(Routing(popularity=popularity), popularities, micro_batches=2000).assigned_GMLE[0, :, 0]
    weights = popularities.log_weights_LE[0]
    if popularities.zero_log_weights_LZ is not None:
        weights = np.concatenate([weights, popularities.zero_log_weights_LZ[0]])
    per_batch = TOKENS * SOURCES
    choices = draw_choices(weights, router, 2000 * per_batch, np.random.default_rng(1)).reshape(2000, -1)
    reached = ((choices >= 0) & (choices < EXPERTS)).sum(axis=1)
    assert counts.shape == (2000, EXPERTS)
    assert counts.sum(axis=1).mean() == pytest.approx(reached.mean(), rel=0.005)
    assert counts.sum(axis=1).std() == pytest.approx(reached.std(), rel=0.07)  # 4 x 1.6 %
    first = (choices == 0).sum(axis=1)
    assert counts[:, 0].mean() == pytest.approx(first.mean(), rel=0.03)
    assert counts[:, 0].std() == pytest.approx(first.std(), rel=0.1)


def test_experts_that_choose_are_loaded_evenly_in_every_micro_batch() -> None:
    router = Router(top_k=2, choice="expert_choice")
    popularities = popularity_LE(
        Lognormal(gini=0.3), num_layers=2, num_experts=EXPERTS, router=router, rng=np.random.default_rng(2)
    )
    load = load_of(Routing(), popularities, micro_batches=3)
    assert np.array_equal(load.assigned_GMLE, np.full((1, 3, 2, EXPERTS), TOKENS * SOURCES * 2 / EXPERTS))
    with pytest.raises(InputError, match="capacity_factor: must be null where experts choose tokens"):
        load_of(Routing(capacity_factor=1.0), popularities)
