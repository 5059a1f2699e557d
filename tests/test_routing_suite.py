"""The named skews: what each one is hot in, and what all of them keep."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.errors import InputError
from moesim.placement import contiguous
from moesim.routing.suite import SKEWS, Skew, skew_load

SIZES = {"tokens_per_rank": 64, "num_source_ranks": 4, "num_experts": 32, "num_ranks": 8, "top_k": 2}


@pytest.mark.parametrize("skew", SKEWS)
@pytest.mark.parametrize("step", [0, 5])
def test_every_skew_keeps_the_assignments_and_gives_no_expert_a_token_twice(skew: Skew, step: int) -> None:
    load_SE = skew_load(skew, **SIZES, step=step)
    assert load_SE.sum() == pytest.approx(4 * 64 * 2)
    tokens_S = load_SE.sum(axis=1) / 2
    assert (load_SE <= tokens_S[:, None] + 1e-9).all()


def test_hot_ranks_are_hot_where_their_names_say() -> None:
    ranks = contiguous(32, 8)

    def rank_shares(skew: Skew, step: int = 0) -> list[float]:
        load_E = skew_load(skew, **SIZES, step=step).sum(axis=0)
        return (ranks.rank_loads(load_E) / load_E.sum()).round(6).tolist()

    assert rank_shares("hot_rank")[0] == 0.5
    assert rank_shares("rotating_hotspot", step=3)[3] == 0.5
    assert rank_shares("rotating_hotspot", step=11)[3] == 0.5
    assert rank_shares("burst", step=8)[0] == 0.5
    assert rank_shares("burst", step=9) == [0.125] * 8
    assert rank_shares("spread_hot_experts") == [0.125] * 8  # hot experts, even ranks
    assert rank_shares("zero_expert_rank")[7] == 0.0
    spread = skew_load("spread_hot_experts", **SIZES).sum(axis=0)
    assert spread[::4].sum() / spread.sum() == pytest.approx(0.5)
    hot = skew_load("hot_expert_set", **SIZES).sum(axis=0)
    assert hot[:2].sum() / hot.sum() == pytest.approx(0.5)


def test_ragged_sources_bring_unequal_tokens_to_equal_experts() -> None:
    load_SE = skew_load("ragged_source", **SIZES)
    assert load_SE.sum(axis=1).tolist() == pytest.approx([32.0, 96.0, 160.0, 224.0])
    assert np.ptp(load_SE.sum(axis=0)) == pytest.approx(0.0)


def test_an_unknown_skew_is_refused_with_its_neighbour() -> None:
    with pytest.raises(InputError, match=r"is not in the skew suite; got 'hot_rnk'\. Did you mean hot_rank"):
        skew_load("hot_rnk", **SIZES)  # type: ignore[arg-type]
