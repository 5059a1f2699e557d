"""What a recording says of itself, against counting by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moesim.describe.model import Router
from moesim.errors import InputError
from moesim.routing.histogram import recorded_histogram, write_histogram
from moesim.routing.recorded import recorded_from_array, write_recorded
from moesim.routing.routers import draw_token_sequence
from moesim.study.recording import recording_facts

EXPERTS = 8


def write(tmp_path: Path, experts_TLK: np.ndarray, name: str = "trace.npz", tokens_per_step: int | None = None) -> Path:
    recorded = recorded_from_array(experts_TLK, num_experts=EXPERTS, tokens_per_step=tokens_per_step)
    write_recorded(recorded, tmp_path / name)
    return tmp_path / name


def test_a_recording_of_four_tokens_is_counted_as_by_hand(tmp_path: Path) -> None:
    experts_TLK = np.array([[[0, 1]], [[0, 2]], [[0, 1]], [[3, 0]]])
    facts = recording_facts(write(tmp_path, experts_TLK, tokens_per_step=3), num_experts=EXPERTS, top_k=2)
    assert facts.counts_LE == ((4, 2, 1, 1, 0, 0, 0, 0),)
    assert (facts.num_tokens, facts.num_steps) == (4, 2)
    assert facts.first_repeat == 1.0  # the fourth token begins a step: it follows nobody
    assert facts.first_repeat_chance == pytest.approx((3 / 4) ** 2 + (1 / 4) ** 2)
    assert (facts.alert_steps, facts.collapse_steps) == (2, 2)
    assert (facts.active_experts, facts.pairs, facts.consistency) == ((), (), None)


def test_alerts_are_of_single_steps_not_of_their_sum(tmp_path: Path) -> None:
    """Four steps, each with another hot pair of experts: their sum is even."""
    pairs = np.array([[0, 1], [2, 3], [4, 5], [6, 7]])
    experts_TLK = np.repeat(pairs, 10, axis=0)[:, None]
    facts = recording_facts(write(tmp_path, experts_TLK, tokens_per_step=10), num_experts=EXPERTS, top_k=2)
    assert set(facts.counts_LE[0]) == {10}
    assert (facts.num_steps, facts.alert_steps, facts.collapse_steps) == (4, 4, 4)
    whole = recording_facts(write(tmp_path, experts_TLK, "whole.npz"), num_experts=EXPERTS, top_k=2)
    assert (whole.num_steps, whole.alert_steps, whole.collapse_steps) == (1, 0, 0)


def test_repetition_is_what_the_sequence_was_drawn_with(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    drawn_TK = draw_token_sequence(np.zeros(EXPERTS), Router(top_k=2), 40_000, 0.2, rng)
    facts = recording_facts(write(tmp_path, drawn_TK[:, None]), num_experts=EXPERTS, top_k=2)
    assert facts.first_repeat == pytest.approx(0.2 + 0.8 / EXPERTS, abs=0.01)
    assert facts.first_repeat_chance == pytest.approx(1 / EXPERTS, abs=0.001)
    sixteen, active = facts.active_experts[0]
    assert sixteen == 16
    assert EXPERTS * (1 - (1 - 2 / EXPERTS) ** 16) > active > EXPERTS * (1 - (1 - 2 / EXPERTS) ** 8)


def test_experts_that_go_together_are_found_and_named_by_the_models_layer(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    experts_TLK = np.stack([rng.permuted(np.tile(np.arange(EXPERTS), (2_000, 1)), axis=1)[:, :2] for _ in range(2)], 1)
    together = rng.random(2_000) < 0.2
    experts_TLK[together, 1] = [5, 3]
    recorded = recorded_from_array(experts_TLK, num_experts=EXPERTS, layers=(4, 9))
    write_recorded(recorded, tmp_path / "trace.npz")
    best = recording_facts(tmp_path / "trace.npz", num_experts=EXPERTS, top_k=2).pairs[0]
    assert (best.layer, best.experts) == (9, (3, 5))
    taken = {frozenset(pair) for pair in experts_TLK[:, 1].tolist()}
    assert frozenset({3, 5}) in taken
    count = sum({3, 5} == set(pair) for pair in experts_TLK[:, 1].tolist())
    loads = [int((experts_TLK[:, 1] == expert).sum()) for expert in (3, 5)]
    assert best.num_tokens == count
    assert best.lift == pytest.approx(count * 2_000 / (loads[0] * loads[1]))


def test_a_histogram_tells_counts_and_steps_but_no_tokens(tmp_path: Path) -> None:
    experts_TLK = np.array([[[0, 1]], [[0, 2]], [[0, 1]], [[3, 0]]])
    recorded = recorded_from_array(experts_TLK, num_experts=EXPERTS, tokens_per_step=3)
    write_histogram(recorded_histogram(recorded), tmp_path / "histogram.csv")
    facts = recording_facts(tmp_path / "histogram.csv", num_experts=EXPERTS, top_k=2)
    assert facts.counts_LE == ((4, 2, 1, 1, 0, 0, 0, 0),)
    assert (facts.num_steps, facts.alert_steps, facts.num_tokens, facts.first_repeat) == (2, 2, None, None)
    with pytest.raises(InputError, match="against: needs recordings of tokens, not histograms"):
        recording_facts(tmp_path / "histogram.csv", num_experts=EXPERTS, top_k=2, against=tmp_path / "trace.npz")


def test_consistency_tells_the_same_checkpoint_from_an_unrelated_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    draws = [rng.permuted(np.tile(np.arange(EXPERTS), (3_000, 1)), axis=1)[:, None, :2] for _ in range(2)]
    paths = [write(tmp_path, experts_TLK, f"{i}.npz") for i, experts_TLK in enumerate(draws)]
    same, other = (recording_facts(paths[0], num_experts=EXPERTS, top_k=2, against=path).consistency for path in paths)
    assert same is not None
    assert other is not None
    assert (same.overlap, same.exact, same.first) == (1.0, 1.0, 1.0)
    assert other.overlap == pytest.approx(other.chance, abs=0.02)
    assert other.chance == pytest.approx(2 / EXPERTS, abs=0.001)
    assert other.exact < 0.1
