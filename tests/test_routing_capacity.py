"""Capacity conventions and drop policies: vectors, brute force token by token, and counts against tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moesim.describe.model import Router
from moesim.describe.workload import (
    Capacity,
    Domain,
    DomainMixture,
    DropPolicy,
    Gshard,
    Lognormal,
    Megablocks,
    Megatron,
    Multinomial,
    Popularity,
    RankBuffer,
    Routing,
    Tutel,
)
from moesim.door.parse import parse_as
from moesim.errors import InputError
from moesim.routing.capacity import (
    Limit,
    capacity_factor_for_drop,
    expected_drop_L,
    expected_kept_LE,
    kept_of_limit,
    limit_of,
    rerouted,
)
from moesim.routing.drops import drop_by_domain, drop_surface, keep_choices, keep_token_by_token, sample_drops
from moesim.routing.load import draw_load, next_weights
from moesim.routing.popularity import Popularities, popularity_LE
from moesim.routing.routers import draw_preferences
from moesim.routing.sampler import draw_choices

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


@pytest.mark.parametrize(
    ("capacity", "factor", "tokens", "sources", "experts", "top_k", "places", "bins"),
    [
        # Megatron: ceil(T*k/E*CF) per source rank.
        (Megatron(), 1.25, 4096, 64, 256, 8, 160, 64),
        (Megatron(), 1.0, 100, 4, 16, 3, 19, 4),
        # MegaBlocks: int(CF*k*T*world/E) for all ranks together.
        (Megablocks(), 1.25, 4096, 64, 256, 8, 10_240, 1),
        (Megablocks(), 1.1, 100, 4, 16, 3, 82, 1),
        # Tutel: k*int(CF*ceil(T/E)); rounds before multiplying.
        (Tutel(), 1.25, 4096, 64, 256, 8, 160, 64),
        (Tutel(), 1.25, 100, 4, 16, 3, 24, 4),
        # GShard: int(n*CF/E) per group of tokens, without k, at least 4.
        (Gshard(group_tokens=1024), 2.0, 4096, 8, 64, 2, 32, 32),
        (Gshard(), 1.0, 128, 2, 64, 2, 4, 2),
        # HybridEP: int(T*k*CF) rows of a rank.
        (RankBuffer(), 1.1, 4096, 32, 512, 22, 99_123, 1),
        (RankBuffer(align_rows=128), 1.1, 4096, 32, 512, 22, 99_200, 1),
    ],
)
def test_places_of_every_convention(
    capacity: Capacity, factor: float, tokens: int, sources: int, experts: int, top_k: int, places: int, bins: int
) -> None:
    limit = limit_of(
        capacity,
        capacity_factor=factor,
        tokens_per_rank=tokens,
        num_source_ranks=sources,
        num_experts=experts,
        top_k=top_k,
    )
    assert limit is not None
    assert (limit.places, limit.num_bins) == (places, bins)
    assert limit.bin_tokens * limit.num_bins == tokens * sources


def test_what_drops_nothing_has_no_limit() -> None:
    assert limit_at(Megablocks(), 0.0) is None
    assert limit_at(Megablocks(), 0.001) is None  # int() makes it 0, which MegaBlocks reads as no limit
    assert limit_at(Megatron(), None) is None
    for capacity in CONVENTIONS:
        assert limit_at(capacity, 100.0) is None
    padded = limit_at(Megatron(), 100.0, pad=True)
    assert padded is not None
    assert padded.places == 900  # padding fills what the formula says, needed or not
    small = limit_at(Gshard(group_tokens=24), 100.0, pad=True)
    assert small is not None
    assert small.places == 24  # a group's expert never has more places than the group has tokens
    with pytest.raises(InputError, match=r"group_tokens: must divide the 48 tokens of a source rank; got 32"):
        limit_at(Gshard(group_tokens=32), 1.0)


def served_by_hand(
    choices: NDArray[np.int16], capacity: Capacity, factor: float, scores: NDArray[np.float64] | None
) -> NDArray[np.bool_]:
    """Kept assignments by each convention's own words, expert by expert, without moesim's Limit."""
    num_tokens, kept = choices.shape[0], np.zeros(choices.shape, dtype=bool)
    if isinstance(capacity, RankBuffer):
        for rank in range(4):
            mine = np.argwhere(choices // 4 == rank)
            if scores is not None:
                mine = mine[np.argsort(-scores[tuple(mine.T)], kind="stable")]
            kept[tuple(mine[: int(TOKENS * TOP_K * factor)].T)] = True
        return kept
    sizes = {"megatron": TOKENS, "megablocks": TOKENS * SOURCES, "tutel": TOKENS, "gshard": 24}
    places = {
        "megatron": math.ceil(TOKENS * TOP_K / EXPERTS * factor),
        "megablocks": int(factor * TOP_K * TOKENS * SOURCES / EXPERTS),
        "tutel": TOP_K * int(factor * math.ceil(TOKENS / EXPERTS)),
        "gshard": max(int(24 * factor / EXPERTS), 4),
    }[capacity.kind]
    for start in range(0, num_tokens, sizes[capacity.kind]):
        for expert in range(EXPERTS):
            mine = np.argwhere(choices[start : start + sizes[capacity.kind]] == expert)
            mine[:, 0] += start
            if capacity.kind in ("tutel", "gshard"):
                mine = mine[np.argsort(mine[:, 1], kind="stable")]
            if scores is not None:
                mine = mine[np.argsort(-scores[tuple(mine.T)], kind="stable")]
            kept[tuple(mine[:places].T)] = True
    return kept


@pytest.mark.parametrize("capacity", CONVENTIONS)
@pytest.mark.parametrize("policy", ["position", "probability"])
@pytest.mark.parametrize("factor", [0.7, 1.0, 1.5])
def test_each_convention_keeps_what_brute_force_by_its_own_words_keeps(
    capacity: Capacity, policy: DropPolicy, factor: float
) -> None:
    log_weights = 0.8 * np.random.default_rng(0).standard_normal(EXPERTS)
    order, scores = draw_preferences(
        log_weights, Router(top_k=TOP_K), TOKENS * SOURCES, np.random.default_rng(1), num_preferences=TOP_K
    )
    served = keep_choices(order, limit_at(capacity, factor), policy, score_TK=scores, rank_of_E=RANK_OF_E)
    expected = served_by_hand(order, capacity, factor, scores if policy == "probability" else None)
    assert np.array_equal(served >= 0, expected)
    assert np.array_equal(served[expected], order[expected])


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    policy=st.sampled_from(ALL_POLICIES),
    convention=st.sampled_from(CONVENTIONS),
    factor=st.floats(0.2, 2.5),
    skew=st.floats(0.0, 3.0),
    holes=st.booleans(),
)
def test_arrays_keep_what_the_token_by_token_oracle_keeps(
    seed: int, policy: DropPolicy, convention: Capacity, factor: float, skew: float, holes: bool
) -> None:
    if policy == "reroute" and isinstance(convention, RankBuffer):
        policy = "position"
    rng = np.random.default_rng(seed)
    order, scores = draw_preferences(
        skew * rng.standard_normal(EXPERTS), Router(top_k=TOP_K), TOKENS * SOURCES, rng, num_preferences=EXPERTS
    )
    choices = order[:, :TOP_K].copy()
    if holes:
        choices[rng.random(choices.shape) < 0.2] = -1
    limit = limit_at(convention, factor)
    served = [
        keep(
            choices,
            limit,
            policy,
            score_TK=scores[:, :TOP_K],
            order_TM=order if policy == "reroute" else None,
            rank_of_E=RANK_OF_E,
            rng=np.random.default_rng(seed),
        )
        for keep in (keep_token_by_token, keep_choices)
    ]
    assert np.array_equal(served[0], served[1])
    if limit is not None and limit.of == "expert":
        for start in range(0, TOKENS * SOURCES, limit.bin_tokens):
            inside = served[1][start : start + limit.bin_tokens]
            assert np.bincount(inside[inside >= 0], minlength=EXPERTS).max() <= limit.places
    assert not ((choices < 0) & (served[1] >= 0)).any()
    rows = np.sort(served[1], axis=1)
    assert not ((rows[:, 1:] == rows[:, :-1]) & (rows[:, 1:] >= 0)).any()  # nobody is served by one expert twice


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("gini", [0.0, 0.35])
@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
def test_counts_drop_what_tokens_drop(convention: Capacity, gini: float, factor: float) -> None:
    popularities = popularities_of(Lognormal(gini=gini))
    routing = Routing(
        popularity=Lognormal(gini=gini), capacity=convention, capacity_factor=factor, drop_policy="position"
    )
    limit = limit_at(convention, factor)
    assert limit is not None
    rng, dropped = np.random.default_rng(2), []
    for _ in range(150):
        choices = draw_choices(popularities.log_weights_LE[0], Router(top_k=TOP_K), TOKENS * SOURCES, rng)
        dropped.append((keep_choices(choices, limit, "position", rank_of_E=RANK_OF_E) < 0).mean())
    error = 4 * np.std(dropped) / math.sqrt(150) + 0.004  # sampling, and counts rounded to whole numbers
    load = draw_load(popularities, routing, **SIZES, num_groups=1, num_micro_batches=600, rng=np.random.default_rng(3))
    assert load.drop_fraction == pytest.approx(np.mean(dropped), abs=error)
    closed = expected_drop_L(popularities.inclusion_LE, limit, RANK_OF_E)[0]
    # That a token's experts differ narrows a rank's count, which the closed form leaves out.
    assert closed == pytest.approx(np.mean(dropped), abs=error + (0.012 if limit.of == "rank" else 0.0))


@pytest.mark.parametrize("gini", [0.15, 0.4])
@pytest.mark.parametrize("factor", [0.8, 1.0, 1.3])
@pytest.mark.parametrize("convention", [Megablocks(), Megatron()])
def test_counts_reroute_as_tokens_do(convention: Capacity, gini: float, factor: float) -> None:
    """Served by each expert after re-routing: water-filling takes all bins to fill alike and lists to be endless."""
    popularities = popularities_of(Lognormal(gini=gini))
    limit = limit_at(convention, factor)
    assert limit is not None
    rng, served_E, count_E = np.random.default_rng(5), np.zeros(EXPERTS), np.zeros(EXPERTS)
    rounds = 60
    for _ in range(rounds):
        order, _ = draw_preferences(
            popularities.log_weights_LE[0],
            Router(top_k=TOP_K),
            TOKENS * SOURCES,
            rng,
            num_preferences=EXPERTS,
        )
        choices = order[:, :TOP_K]
        served = keep_choices(choices, limit, "reroute", order_TM=order)
        served_E += np.bincount(served[served >= 0], minlength=EXPERTS) / rounds
        count_E += np.bincount(choices.ravel(), minlength=EXPERTS) / rounds
    kept_E = kept_of_limit(count_E, limit)
    filled = rerouted(count_E, kept_E, limit, next_weights(popularities)[0])
    assert filled.sum() == pytest.approx(served_E.sum(), rel=0.03)
    assert np.abs(filled - served_E).max() < 0.12 * count_E.mean()
    without = kept_E.sum() / count_E.sum()
    assert filled.sum() / count_E.sum() > without
    if factor >= 1.0:
        assert filled.sum() == pytest.approx(count_E.sum())


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), factor=st.floats(0.1, 3.0), convention=st.sampled_from(CONVENTIONS))
def test_more_capacity_never_drops_more_and_enough_drops_nothing(
    seed: int, factor: float, convention: Capacity
) -> None:
    rng = np.random.default_rng(seed)
    inclusion = popularities_of(Lognormal(gini=float(rng.uniform(0.0, 0.6)))).inclusion_LE
    less, more, enough = (
        float(expected_drop_L(inclusion, limit_at(convention, f), RANK_OF_E)[0]) for f in (factor, 1.3 * factor, 50.0)
    )
    if limit_at(convention, factor) is not None:
        assert more <= less + 1e-9
    assert enough == 0.0
    assert 0.0 <= less <= 1.0  # Tutel has no place at all where CF*ceil(T/E) is below 1


def test_permuting_experts_permutes_what_they_keep() -> None:
    inclusion = popularities_of(Lognormal(gini=0.4)).inclusion_LE
    order = np.random.default_rng(1).permutation(EXPERTS)
    for convention in CONVENTIONS:
        limit = limit_at(convention, 1.0)
        kept = expected_kept_LE(inclusion, limit, RANK_OF_E)
        assert expected_kept_LE(inclusion[:, order], limit, RANK_OF_E[order]) == pytest.approx(kept[:, order])


def test_a_binomial_of_many_tokens_is_capped_as_the_normal_law_says() -> None:
    inclusion = np.array([[0.030, 0.0312, 0.0325]])
    exact, normal = (
        expected_kept_LE(inclusion, Limit(places=tokens // 32, bin_tokens=tokens, num_bins=1))
        for tokens in (32_768, 32_800)
    )
    assert normal == pytest.approx(exact, abs=2e-4)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("wanted", [0.0, 0.01, 0.2])
def test_the_capacity_for_a_wanted_drop_is_enough_and_no_more(convention: Capacity, wanted: float) -> None:
    inclusion = popularities_of(Lognormal(gini=0.3), layers=3).inclusion_LE
    factor = capacity_factor_for_drop(inclusion, wanted, convention, **SIZES, top_k=TOP_K, rank_of_E=RANK_OF_E)
    drop = expected_drop_L(inclusion, limit_at(convention, factor), RANK_OF_E).mean()
    assert drop <= wanted + 1e-9
    less = limit_at(convention, 0.99 * factor)
    if wanted > 0 and not (isinstance(convention, Gshard) and less == limit_at(convention, factor)):
        assert expected_drop_L(inclusion, less, RANK_OF_E).mean() > wanted or less == limit_at(convention, factor)
    worst = capacity_factor_for_drop(
        inclusion, wanted, convention, **SIZES, top_k=TOP_K, rank_of_E=RANK_OF_E, worst_layer=True
    )
    assert worst >= factor * 0.998


def test_the_capacity_that_the_worst_layer_needs_is_the_worst_layers_own() -> None:
    even, skewed = (popularities_of(Lognormal(gini=gini)).inclusion_LE for gini in (0.05, 0.5))
    sizes = {**SIZES, "top_k": TOP_K}
    both = np.concatenate([even, skewed])
    worst = capacity_factor_for_drop(both, 0.02, Megablocks(), **sizes, worst_layer=True)
    mean = capacity_factor_for_drop(both, 0.02, Megablocks(), **sizes)
    assert worst == pytest.approx(capacity_factor_for_drop(skewed, 0.02, Megablocks(), **sizes), rel=2e-3)
    assert capacity_factor_for_drop(even, 0.02, Megablocks(), **sizes) < mean < worst


def test_a_wanted_drop_below_zero_is_refused() -> None:
    with pytest.raises(InputError, match=r"wanted_drop_fraction: must lie in 0\.\.1"):
        capacity_factor_for_drop(np.full((1, 4), 0.25), -0.1, Megatron(), **SIZES, top_k=1)


@pytest.mark.parametrize("policy", ALL_POLICIES)
def test_a_report_of_drawn_tokens_adds_up(policy: DropPolicy) -> None:
    texts = (Domain(name="code", share=0.6), Domain(name="prose", share=0.4))
    mixture = DomainMixture(domains=texts, gini=0.3, run_tokens=16)
    popularities = popularities_of(mixture, layers=2)
    routing = Routing(popularity=mixture, capacity_factor=0.9, drop_policy=policy)
    report = sample_drops(popularities, routing, tokens_per_rank=1024, num_source_ranks=4, rng=np.random.default_rng(8))
    assert np.array_equal(report.assigned_LE.sum(axis=1), np.full(2, 4096 * TOP_K))
    assert np.array_equal(report.kept_LE.sum(axis=1) + report.lost_LE.sum(axis=1), report.assigned_LE.sum(axis=1))
    assert report.drop_fraction == pytest.approx(report.drop_fraction_L.mean())
    weights = report.assigned_LE.reshape(2, 4, 4).sum(axis=2)
    assert (report.drop_fraction_LR * weights).sum() == pytest.approx(report.lost_LE.sum())
    assert (report.tokens_lost_L <= report.tokens_hurt_L).all()
    assert (report.tokens_hurt_L <= report.lost_LE.sum(axis=1)).all()
    assert report.drop_fraction_LD is not None
    assert report.drop_fraction_LD.shape == (2, 2)
    assert report.places == math.ceil(1024 * TOP_K / EXPERTS * 0.9) * 4 * EXPERTS
    assert report.padding_fraction_L == pytest.approx(1 - report.kept_LE.sum(axis=1) / report.places)
    if policy == "reroute":  # only full buffers leave anybody out
        assert report.drop_fraction < 0.12
    else:
        assert report.drop_fraction > 0.15
        by_counts = drop_by_domain(popularities, report.drop_fraction_LE)
        assert report.drop_fraction_LD == pytest.approx(by_counts, abs=0.03)  # the last runs, position's order


def test_policies_drop_the_same_number_of_other_tokens() -> None:
    popularities = popularities_of(Lognormal(gini=0.4))
    reports = {}
    for policy in ALL_POLICIES[:3]:
        routing = Routing(popularity=Lognormal(gini=0.4), capacity_factor=1.0, drop_policy=policy)
        reports[policy] = sample_drops(
            popularities, routing, tokens_per_rank=4096, num_source_ranks=2, rng=np.random.default_rng(4)
        )
    drops = [report.drop_fraction for report in reports.values()]
    assert max(drops) - min(drops) < 0.01
    # Switch-like position drops whole stretches at the end of a rank, so more tokens lose everything than at random.
    assert reports["position"].tokens_lost_L[0] > reports["random"].tokens_lost_L[0]


def test_padded_buffers_are_computed_full() -> None:
    popularities = popularities_of(Multinomial())
    sizes = {**SIZES, "num_groups": 1, "num_micro_batches": 20}
    loads = [
        draw_load(
            popularities,
            Routing(popularity=Multinomial(), capacity_factor=1.5, pad_to_capacity=pad, capacity=capacity),
            **sizes,
            rng=np.random.default_rng(3),
        )
        for pad, capacity in ((False, Megatron()), (True, Megatron()), (True, RankBuffer()))
    ]
    assert np.array_equal(loads[0].kept_GMLE, loads[1].kept_GMLE)
    assert np.array_equal(loads[0].rows_GMLE, loads[0].kept_GMLE)
    assert loads[0].padding_fraction == 0.0
    assert np.array_equal(loads[1].rows_GMLE, np.full((1, 20, 1, EXPERTS), 14 * SOURCES))
    assert loads[1].padding_fraction == pytest.approx(1 - loads[1].kept_GMLE.mean() / 56)
    assert loads[2].rows_GMLE.sum(axis=-1) == pytest.approx(np.full((1, 20, 1), 216 * 4))


def test_scenario_files_name_conventions_and_policies() -> None:
    raw = {
        "capacity_factor": 1.25,
        "capacity": {"kind": "gshard", "group_tokens": 1024},
        "drop_policy": "reroute",
        "pad_to_capacity": True,
    }
    routing = parse_as(Routing, raw, "scenario.routing")
    assert routing.capacity == Gshard(group_tokens=1024)
    assert parse_as(Routing, {"capacity": "tutel"}, "scenario.routing").capacity == Tutel()
    assert parse_as(Routing, {"capacity": "megablocks", "capacity_factor": 0}, "s").capacity_factor == 0
    with pytest.raises(InputError, match="capacity_factor: must be positive, or null for dropless; got 0"):
        Routing(capacity_factor=0.0)
    with pytest.raises(InputError, match="pad_to_capacity: needs a capacity_factor"):
        Routing(pad_to_capacity=True)
    with pytest.raises(InputError, match="turns nobody to another expert"):
        Routing(capacity_factor=1.0, capacity=RankBuffer(), drop_policy="reroute")


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_drops_rise_with_skew_and_fall_with_capacity(convention: Capacity) -> None:
    drop_GF = drop_surface(
        [0.0, 0.2, 0.4, 0.6],
        [0.8, 1.0, 1.5, 2.5],
        convention,
        num_layers=2,
        num_experts=EXPERTS,
        router=Router(top_k=2),
        tokens_per_rank=480,
        num_source_ranks=4,
        seed=1,
        rank_of_E=RANK_OF_E,
    )
    assert (np.diff(drop_GF, axis=0) >= -1e-9).all()
    assert (np.diff(drop_GF, axis=1) <= 1e-9).all()
    assert drop_GF[-1, 0] > drop_GF[0, -1]


def test_random_seconds_explain_why_st_moe_drops_less_than_two_experts_a_token_must() -> None:
    """ST-MoE (arXiv 2202.08906 table 5, auxiliary loss on): 10.6 / 0.3 / 0 % at factors 0.75 / 1.25 / 2.0.

    At 0.75 two experts for every token would drop a quarter at least. Routers that keep the second at random do not;
    the Gini of 0.06 is set by the first figure, the other two follow. The group size is assumed.
    """
    popularity = Lognormal(gini=0.06)
    drops = {}
    for router in (Router(top_k=2), Router(top_k=2, choice="random_second")):
        rng = np.random.default_rng(0)
        drawn = popularity_LE(popularity, num_layers=4, num_experts=32, router=router, rng=rng)
        for factor in (0.75, 1.25, 2.0):
            # The paper's factor is of 2T/E places; GShard's convention leaves the 2 to its user.
            routing = Routing(
                popularity=popularity,
                capacity=Gshard(group_tokens=1024),
                capacity_factor=2 * factor,
                drop_policy="position",
            )
            report = sample_drops(
                drawn, routing, tokens_per_rank=1024, num_source_ranks=8, rng=np.random.default_rng(1)
            )
            drops[router.choice, factor] = 100 * report.drop_fraction
    assert drops["top_k", 0.75] > 25.0
    assert drops["random_second", 0.75] == pytest.approx(10.6, abs=0.6)
    assert drops["random_second", 1.25] == pytest.approx(0.3, abs=0.35)
    assert drops["random_second", 2.0] == 0.0


def test_zero_experts_have_no_buffer_to_overflow_and_cost_no_token_anything() -> None:
    router = Router(top_k=1, num_zero_experts=8)
    popularities = popularities_of(Lognormal(gini=0.3), router=router)
    assert popularities.nowhere_L is not None
    routing = Routing(popularity=Lognormal(gini=0.3), capacity_factor=0.5, drop_policy="position")
    report = sample_drops(popularities, routing, tokens_per_rank=2048, num_source_ranks=4, rng=np.random.default_rng(3))
    assert report.assigned_LE.shape == (1, EXPERTS)
    nowhere = 8192 - report.assigned_LE.sum()
    assert nowhere == pytest.approx(8192 * popularities.nowhere_L[0], abs=5 * math.sqrt(8192) / 2)
    assert nowhere > 1000
    # With one expert a token, whoever loses any loses all; who chose a zero expert loses nothing.
    assert report.tokens_lost_L[0] == report.tokens_hurt_L[0] == report.lost_LE.sum() > 0


def test_who_a_token_turns_to_next_is_drawn_by_the_weights_of_those_it_does_not_use() -> None:
    popularities = popularities_of(Lognormal(gini=0.4))
    order, _ = draw_preferences(
        popularities.log_weights_LE[0],
        Router(top_k=TOP_K),
        40_000,
        np.random.default_rng(6),
        num_preferences=TOP_K + 1,
    )
    seen_E = np.bincount(order[:, TOP_K], minlength=EXPERTS) / 40_000
    weights_E = next_weights(popularities)[0]
    # Taking weight and use as independent is off by half a point of a hundred here; the bare weights by four.
    assert np.abs(weights_E / weights_E.sum() - seen_E).max() < 0.012


def test_preferences_keep_random_seconds_as_often_as_choices_do() -> None:
    router = Router(top_k=2, choice="random_second")
    log_weights = 0.6 * np.random.default_rng(2).standard_normal(EXPERTS)
    order, _ = draw_preferences(log_weights, router, 40_000, np.random.default_rng(3), num_preferences=2)
    drawn = draw_choices(log_weights, router, 40_000, np.random.default_rng(4))
    kept = [(choices[:, 1] >= 0).mean() for choices in (order, drawn)]
    assert kept[0] == pytest.approx(kept[1], abs=4 * math.sqrt(0.5 / 40_000))
