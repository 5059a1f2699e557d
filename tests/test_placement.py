"""Maps from experts to ranks."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.errors import InputError
from moesim.placement import Placement, contiguous


def test_contiguous_placement_gives_each_rank_its_run_of_experts() -> None:
    assert contiguous(12, 3).expert_to_rank_E.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_a_size_that_does_not_divide_is_refused_with_the_nearest_that_do() -> None:
    with pytest.raises(
        InputError, match=r"parallel: ep: must divide the model's num_experts=256; got 48. Nearest that do: 32, 64"
    ):
        contiguous(256, 48)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ([0, 1, 4], r"must lie in 0\.\.3; got \[0, 1, 4\]"),
        ([0, -1], "must lie in"),
        ([], "non-empty"),
        ([0.5, 1.0], "whole rank numbers"),
    ],
)
def test_an_impossible_map_is_refused(experts: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Placement(expert_to_rank_E=np.array(experts), num_ranks=4)


def test_rank_loads_add_up_the_experts_of_each_rank_for_any_map() -> None:
    rng = np.random.default_rng(0)
    load_MLE = rng.random((3, 2, 12))
    maps = [
        np.arange(12) // 3,
        rng.permutation(np.arange(12) % 4),
        rng.integers(0, 3, 12),
    ]  # even, shuffled, rank 3 empty
    for expert_to_rank in maps:
        loads = Placement(expert_to_rank_E=expert_to_rank, num_ranks=4).rank_loads(load_MLE)
        expected = np.stack([load_MLE[..., expert_to_rank == r].sum(axis=-1) for r in range(4)], axis=-1)
        assert loads == pytest.approx(expected)


def test_permuting_expert_ids_together_with_their_map_changes_no_rank_load() -> None:
    rng = np.random.default_rng(1)
    load_E, order = rng.random(16), rng.permutation(16)
    before = contiguous(16, 4)
    after = Placement(expert_to_rank_E=before.expert_to_rank_E[order], num_ranks=4)
    assert after.rank_loads(load_E[order]) == pytest.approx(before.rank_loads(load_E))


def test_uniform_load_ties_all_even_placements() -> None:
    shuffled = np.random.default_rng(2).permutation(np.arange(64) % 8)
    assert Placement(expert_to_rank_E=shuffled, num_ranks=8).rank_loads(np.ones(64)).tolist() == [8.0] * 8


def test_one_expert_per_rank_makes_rearranging_a_permutation() -> None:
    load_E = np.random.default_rng(3).random(8)
    moved = Placement(expert_to_rank_E=np.random.default_rng(4).permutation(8), num_ranks=8)
    assert np.sort(moved.rank_loads(load_E)) == pytest.approx(np.sort(load_E))


def test_the_map_of_a_placement_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="read-only"):
        contiguous(4, 2).expert_to_rank_E[0] = 1
