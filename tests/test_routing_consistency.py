"""Consistency of routing: closed forms of chance, small cases by hand, and plain loops as oracles."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moesim.errors import InputError
from moesim.routing.consistency import (
    active_experts_L,
    agreement,
    agreement_of,
    coactivation_EE,
    coactivation_LEE,
    domain_load_DLE,
    lift_EE,
    repetition,
    shared_experts,
    specialisation,
)
from moesim.routing.recorded import load_LE, recorded_from_array
from moesim.routing.statistics import expected_active_experts


def drawn(weights_E: np.ndarray, tokens: int, top_k: int, rng: np.random.Generator) -> np.ndarray:
    """(T, K) top-k of perturbed log weights, best first."""
    perturbed_TE = weights_E + rng.gumbel(size=(tokens, weights_E.size))
    return np.argsort(-perturbed_TE, axis=1)[:, :top_k]


def even(tokens: int, layers: int, experts: int, top_k: int, seed: int = 0) -> np.ndarray:
    """(T, L, K) experts of tokens that prefer none."""
    rng = np.random.default_rng(seed)
    return np.stack([drawn(np.zeros(experts), tokens, top_k, rng) for _ in range(layers)], axis=1)


def test_a_routing_agrees_wholly_with_itself() -> None:
    ids = even(500, 2, 16, 4)
    same = agreement(ids, ids, num_experts=16)
    assert same.overlap_L.tolist() == same.exact_L.tolist() == same.top1_L.tolist() == [1.0, 1.0]


def test_the_order_of_a_tokens_experts_matters_to_the_first_alone() -> None:
    ids = even(500, 1, 16, 4)
    turned = agreement(ids, ids[:, :, ::-1], num_experts=16)
    assert (turned.overlap_L.item(), turned.exact_L.item(), turned.top1_L.item()) == (1.0, 1.0, 0.0)


def test_unrelated_even_routings_agree_by_chance() -> None:
    num_tokens, experts, top_k = 40_000, 16, 4
    chance = agreement(
        even(num_tokens, 1, experts, top_k, 1), even(num_tokens, 1, experts, top_k, 2), num_experts=experts
    )
    # Overlap is hypergeometric: mean k/E; the same set 1 in C(16, 4); five standard errors.
    assert chance.overlap_L.item() == pytest.approx(top_k / experts, abs=5 * 0.21 / math.sqrt(num_tokens))
    assert chance.chance_L.item() == pytest.approx(top_k / experts, rel=1e-3)
    exact = 1 / math.comb(experts, top_k)
    assert chance.exact_L.item() == pytest.approx(exact, abs=5 * math.sqrt(exact / num_tokens))
    assert chance.top1_L.item() == pytest.approx(1 / experts, abs=5 * math.sqrt(1 / experts / num_tokens))


def test_chance_grows_with_the_skew_that_two_routings_share() -> None:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal(16)
    first, second = (drawn(weights, 40_000, 4, rng)[:, None] for _ in range(2))
    skewed = agreement(first, second, num_experts=16)
    assert skewed.chance_L.item() > 0.3
    assert skewed.overlap_L.item() == pytest.approx(skewed.chance_L.item(), abs=0.006)


def test_streamed_agreement_is_that_of_the_arrays_whatever_the_chunks() -> None:
    first, second = even(700, 3, 16, 4, 1), even(700, 3, 16, 4, 2)
    wanted = agreement(first, second, num_experts=16)
    recorded = recorded_from_array(first, num_experts=16)
    other = recorded_from_array(second, num_experts=16)
    pieces = type(other)(**{**vars(other), "read": lambda: (second[at : at + 33] for at in range(0, 700, 33))})
    for streamed in (agreement_of(recorded, other), agreement_of(recorded, pieces), agreement_of(pieces, recorded)):
        assert streamed.num_tokens == 700
        assert streamed.exact_L.tolist() == wanted.exact_L.tolist()
        assert streamed.overlap_L.tolist() == wanted.overlap_L.tolist()


def test_recordings_of_other_sizes_are_refused() -> None:
    first = recorded_from_array(even(10, 1, 16, 4), num_experts=16, owner="a.npy")
    second = recorded_from_array(even(11, 1, 16, 4), num_experts=16, owner="b.npy")
    with pytest.raises(InputError, match=r"b.npy: num_tokens: must be that of a.npy, 10; got 11"):
        agreement_of(first, second)


def test_shared_experts_are_those_of_sets() -> None:
    first, second = even(200, 1, 12, 5, 1)[:, 0], even(200, 1, 12, 5, 2)[:, 0]
    counted = [len(set(a) & set(b)) for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    assert shared_experts(first, second).tolist() == counted


def test_even_routing_repeats_by_the_chances_that_mixtrals_paper_states() -> None:
    repeated = repetition(even(60_000, 1, 8, 2), num_experts=8)
    assert repeated.any_chance == pytest.approx(1 - 6 / 8 * 5 / 7)
    assert repeated.first_L.item() == pytest.approx(0.125, abs=5 * 0.33 / math.sqrt(60_000))
    assert repeated.first_chance_L.item() == pytest.approx(0.125, rel=2e-3)
    assert repeated.any_L.item() == pytest.approx(repeated.any_chance, abs=5 * 0.5 / math.sqrt(60_000))


def test_sticky_tokens_repeat_as_often_as_they_stick() -> None:
    rng = np.random.default_rng(0)
    fresh = even(60_000, 1, 8, 2)[:, 0]
    stay = rng.random(60_000) < 0.15
    source = np.maximum.accumulate(np.where(stay, 0, np.arange(60_000)))
    repeated = repetition(fresh[source][:, None], num_experts=8)
    assert repeated.first_L.item() == pytest.approx(0.15 + 0.85 / 8, abs=0.008)


def test_sequences_do_not_repeat_across_their_starts() -> None:
    ids = np.array([[[0, 1]], [[0, 2]], [[0, 3]], [[5, 0]]])
    assert repetition(ids, num_experts=8).first_L.item() == pytest.approx(2 / 3)
    cut = repetition(ids, num_experts=8, starts=[0, 2])
    assert (cut.num_pairs, cut.first_L.item(), cut.any_L.item()) == (2, 0.5, 1.0)


def test_coactivation_counts_pairs_token_by_token() -> None:
    ids = even(300, 2, 10, 3)
    counted = np.zeros((2, 10, 10), dtype=int)
    for token in ids:
        for layer, chosen in enumerate(token):
            for one in chosen:
                for other in chosen:
                    counted[layer, one, other] += 1
    recorded = recorded_from_array(ids, num_experts=10)
    assert np.array_equal(coactivation_LEE(recorded), counted)
    assert np.array_equal(coactivation_EE(recorded, 1), counted[1])
    assert np.array_equal(np.diagonal(counted, axis1=1, axis2=2), load_LE(recorded))


def test_even_routing_has_the_lift_of_choices_that_exclude_each_other() -> None:
    experts, top_k, num_tokens = 10, 3, 100_000
    recorded = recorded_from_array(even(num_tokens, 1, experts, top_k), num_experts=experts)
    lift = lift_EE(coactivation_EE(recorded, 0), num_tokens=num_tokens)
    assert np.isnan(np.diagonal(lift)).all()
    wanted = experts * (top_k - 1) / (top_k * (experts - 1))
    pairs = num_tokens * top_k * (top_k - 1) / experts / (experts - 1)
    assert lift[~np.eye(experts, dtype=bool)] == pytest.approx(wanted, rel=5 / math.sqrt(pairs))


def test_experts_that_always_go_together_have_the_lift_of_their_rarity() -> None:
    ids = np.array([[[0, 1]], [[2, 3]], [[4, 5]], [[2, 4]]])
    lift = lift_EE(coactivation_EE(recorded_from_array(ids, num_experts=7), 0), num_tokens=4)
    assert (lift[0, 1], lift[2, 3], lift[0, 2]) == (4.0, 2.0, 0.0)
    assert np.isnan(lift[6]).all()


@pytest.mark.parametrize(("batch", "wanted"), [(8, 51.6), (16, 82.4), (32, 111.8), (64, 125.9)])
def test_even_routing_touches_the_distinct_experts_of_the_field_notes(batch: int, wanted: float) -> None:
    counted = active_experts_L(even(64 * 400, 1, 128, 8), batch_tokens=batch).item()
    assert expected_active_experts(128, 8, batch) == pytest.approx(wanted, abs=0.05)
    assert counted == pytest.approx(wanted, rel=0.01)


def test_active_experts_are_counted_per_batch() -> None:
    ids = np.array([[[0, 1]], [[1, 0]], [[2, 3]], [[4, 5]], [[0, 7]]])
    assert active_experts_L(ids, batch_tokens=2).tolist() == [3.0]


def test_domain_loads_add_up_to_the_load() -> None:
    ids = even(400, 2, 8, 2)
    domain = np.random.default_rng(0).integers(0, 3, 400)
    by_domain = domain_load_DLE(ids, domain, num_domains=3, num_experts=8)
    assert np.array_equal(by_domain.sum(axis=0), load_LE(recorded_from_array(ids, num_experts=8)))
    assert np.array_equal(by_domain[1], load_LE(recorded_from_array(ids[domain == 1], num_experts=8)))


def test_one_expert_for_each_domain_explains_all_of_it() -> None:
    perfect = specialisation(1000 * np.eye(4, dtype=int)[:, None])
    assert perfect.information_L.item() == pytest.approx(math.log(4))
    assert perfect.explained_fraction_L.item() == pytest.approx(1.0, abs=0.002)


def test_a_symmetric_channel_has_its_textbook_information() -> None:
    flip = 0.1
    channel = specialisation(np.array([[[9000, 1000]], [[1000, 9000]]]))
    entropy = -(flip * math.log(flip) + (1 - flip) * math.log(1 - flip))
    assert channel.information_L.item() == pytest.approx(math.log(2) - entropy)


def test_domains_that_experts_know_nothing_of_explain_nothing() -> None:
    ids = even(20_000, 1, 64, 2)
    domain = np.random.default_rng(5).integers(0, 5, 20_000)
    none = specialisation(domain_load_DLE(ids, domain, num_domains=5, num_experts=64))
    # Twice assignments times information is chi-squared with (D-1)(E-1) = 252 degrees of freedom.
    assert none.chance_L.item() == pytest.approx(252 / (2 * 40_000))
    assert none.information_L.item() == pytest.approx(none.chance_L.item(), rel=5 * math.sqrt(2 / 252))
    assert none.explained_fraction_L.item() < 0.002
    assert specialisation([[[3, 4]]]).explained_fraction_L.tolist() == [0.0]
