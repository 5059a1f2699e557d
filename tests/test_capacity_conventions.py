"""Capacity conventions: their places by each library's own words, against brute force token by token."""

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
    DropPolicy,
    Gshard,
    Megablocks,
    Megatron,
    Multinomial,
    RankBuffer,
    Routing,
    Tutel,
)
from moesim.door.parse import parse_as
from moesim.errors import InputError
from moesim.routing.capacity import (
    limit_of,
)
from moesim.routing.drops import keep_choices, keep_token_by_token
from moesim.routing.load import draw_load
from moesim.routing.routers import draw_preferences
from tests.capacity_cases import (
    ALL_POLICIES,
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
