"""Laws of capacity: counts drop what tokens drop, more room never drops more, a wanted drop has its factor."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.describe.model import Router
from moesim.describe.workload import (
    Capacity,
    Gshard,
    Lognormal,
    Megablocks,
    Megatron,
    Routing,
)
from moesim.errors import InputError
from moesim.routing.capacity import (
    Limit,
    capacity_factor_for_drop,
    expected_drop_L,
    expected_kept_LE,
)
from moesim.routing.drops import drop_surface, keep_choices
from moesim.routing.load import draw_load
from moesim.routing.sampler import draw_choices
from tests.capacity_cases import (
    CONVENTIONS,
    EXPERTS,
    RANK_OF_E,
    SIZES,
    SOURCES,
    TOKENS,
    TOP_K,
    limit_at,
    popularities_of,
)


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
