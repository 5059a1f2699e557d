"""Kinds of popularity, what they are given by, what they remember; routers beyond plain top-k."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from moesim.describe.model import Router
from moesim.describe.popularity import measure_of, popularity_words
from moesim.describe.workload import (
    Correlation,
    Dirichlet,
    Domain,
    DomainMixture,
    HotExperts,
    Lognormal,
    Multinomial,
    Popularity,
    PowerLaw,
    Routing,
    Zipf,
)
from moesim.door.parse import parse_as
from moesim.errors import InputError
from moesim.placement import Placement, contiguous
from moesim.routing.popularity import Popularities, popularity_LE
from moesim.routing.routers import draw_expert_choice, draw_token_sequence, expert_choice_tokens
from moesim.routing.sampler import draw_choices, draw_counts_streaming
from moesim.routing.shapes import drifted
from moesim.routing.statistics import cv, gini, max_mean
from moesim.routing.visits import visit_probabilities

PLAIN, LIMITED = Router(top_k=4), Router(top_k=4, num_groups=8, top_groups=4)
TEXTS = (Domain(name="code", share=0.5), Domain(name="prose", share=0.3), Domain(name="numbers", share=0.2))
STATISTICS = {"gini": gini, "cv": cv, "max_mean": max_mean}


def drawn(popularity: Popularity, router: Router, *, layers: int = 6, experts: int = 64, step: int = 0) -> Popularities:
    rng = np.random.default_rng(17)
    return popularity_LE(popularity, num_layers=layers, num_experts=experts, router=router, rng=rng, step=step)


@pytest.mark.parametrize(
    ("popularity", "gini_noted", "max_noted", "drop_noted"),
    [
        (Multinomial(), 0.01, 1.06, 0.0),
        (Lognormal(sigma=0.5), 0.29, 4.3, 0.13),
        (Lognormal(sigma=1.0), 0.52, 7.2, 0.32),
        (Zipf(exponent=1.0), 0.63, 25.0, 0.46),
    ],
)
def test_the_field_notes_table_of_balance_statistics(
    popularity: Popularity, gini_noted: float, max_noted: float, drop_noted: float
) -> None:
    """E=256, k=8, 65k tokens. Each row of the notes is one draw: it must lie within the spread of 24 draws of ours.

    Beside that spread stand the notes' rounding, and 2 % for Zipf, whose weights are no draw.
    """
    router, num_tokens = Router(top_k=8), 65_536
    found = drawn(popularity, router, layers=24, experts=256)
    counts = draw_counts_streaming(found.log_weights_LE, router, num_tokens, np.random.default_rng(0))
    drop = 1 - np.minimum(counts, 1.25 * num_tokens * 8 / 256).sum(axis=1) / counts.sum(axis=1)
    for seen, noted, rounding in (
        (gini(counts), gini_noted, 0.005),
        (max_mean(counts), max_noted, 0.02 * max_noted),
        (drop, drop_noted, 0.005),
    ):
        assert seen.min() - rounding <= noted <= seen.max() + rounding
        assert seen.max() - seen.min() < 0.12 or noted > 1  # a spread that could fail to hold the noted value


@pytest.mark.parametrize(
    ("kind", "own"), [(Lognormal, "sigma"), (Dirichlet, "concentration"), (Zipf, "exponent"), (PowerLaw, "exponent")]
)
@pytest.mark.parametrize(("measure", "wanted"), [("gini", 0.3), ("cv", 0.6), ("max_mean", 2.5)])
@pytest.mark.parametrize("router", [PLAIN, LIMITED])
def test_every_kind_has_the_statistic_it_was_given_by(
    kind: type, own: str, measure: str, wanted: float, router: Router
) -> None:
    found = drawn(kind(**{measure: wanted}), router)
    assert STATISTICS[measure](found.inclusion_LE).mean() == pytest.approx(wanted, rel=0.02)
    assert found.inclusion_LE.sum(axis=1) == pytest.approx(np.full(6, 4.0))
    assert getattr(kind(**{measure: wanted}), own) is None


@pytest.mark.parametrize("router", [PLAIN, LIMITED])
@pytest.mark.parametrize("place", ["random", "first"])
def test_hot_experts_take_their_share_and_the_others_are_equal(router: Router, place: str) -> None:
    found = drawn(HotExperts(num_hot=8, share=0.4, place=place), router)  # type: ignore[arg-type]
    hottest_first = -np.sort(-found.inclusion_LE, axis=1)
    assert hottest_first[:, :8].sum(axis=1).mean() / 4 == pytest.approx(0.4, abs=0.01)
    assert np.unique(found.log_weights_LE).size == 2
    assert (found.log_weights_LE[:, :8] > 0).all() == (place == "first")


def test_own_parameters_mean_what_their_laws_say() -> None:
    zipf = drawn(Zipf(exponent=1.3), PLAIN).log_weights_LE
    assert -np.sort(-zipf, axis=1)[0] == pytest.approx(-1.3 * np.log(np.arange(1, 65)))
    heavy = drawn(PowerLaw(exponent=3.0), PLAIN, layers=500).log_weights_LE
    # P(w > x) = x**-2 for density x**-3: log w is exponential with mean 1/2 (32,000 draws).
    assert heavy.mean() == pytest.approx(0.5, abs=0.012)
    assert (heavy > 1.0).mean() == pytest.approx(math.exp(-2.0), abs=0.008)
    cut = np.exp(drawn(PowerLaw(exponent=1.0, span=100.0), PLAIN, layers=500).log_weights_LE)
    assert (cut < 10.0).mean() == pytest.approx(0.5, abs=0.012)  # log-uniform on 1..100
    assert 1.0 <= cut.min() < cut.max() <= 100.0
    flat = np.exp(drawn(Dirichlet(concentration=2.5), PLAIN, layers=500).log_weights_LE)
    # Gamma law of shape 2.5: mean and variance 2.5, up to a common factor; 32,000 draws.
    assert flat.std() / flat.mean() == pytest.approx(1 / math.sqrt(2.5), rel=0.025)
    tiny = drawn(Dirichlet(concentration=0.1), Router(top_k=1), layers=500).inclusion_LE
    # Shares of a symmetric Dirichlet law have variance (E-1)/(E**2 (E a + 1)).
    assert tiny.var() == pytest.approx(63 / (64**2 * (6.4 + 1)), rel=0.06)


@pytest.mark.parametrize("kind", [Lognormal(gini=0.3), Zipf(gini=0.3), Dirichlet(gini=0.3)])
def test_layers_are_as_alike_as_asked(kind: Popularity) -> None:
    for wanted in (0.0, 0.5, 1.0):
        alike = type(kind)(gini=0.3, correlation=Correlation(layers=wanted))  # type: ignore[call-arg]
        weights_LE = drawn(alike, PLAIN, layers=12, experts=256).log_weights_LE
        between = np.corrcoef(weights_LE)[~np.eye(12, dtype=bool)].mean()
        # Correlation of the normals; heavy-tailed marginals of one Gaussian copula lose a little of it.
        assert between == pytest.approx(wanted, abs=0.1)


def test_drift_forgets_in_its_correlation_time_and_keeps_the_skew() -> None:
    drifting = Lognormal(gini=0.3, correlation=Correlation(drift_steps=100.0))
    steps = (0, 1, 37, 100, 300, 1_000_000)
    found = [drawn(drifting, PLAIN, layers=12, experts=256, step=step) for step in steps]
    start = found[0].log_weights_LE.ravel()
    for step, later in zip(steps, found, strict=True):
        seen = np.corrcoef(start, later.log_weights_LE.ravel())[0, 1]
        assert seen == pytest.approx(math.exp(-step / 100.0), abs=4 / math.sqrt(start.size))
        assert gini(later.inclusion_LE).mean() == pytest.approx(0.3, abs=0.002)
    near, next_to_it = found[2].log_weights_LE, drawn(drifting, PLAIN, layers=12, experts=256, step=38).log_weights_LE
    assert np.corrcoef(near.ravel(), next_to_it.ravel())[0, 1] == pytest.approx(math.exp(-1 / 100), abs=0.002)
    still = drawn(Lognormal(gini=0.3), PLAIN, layers=12, experts=256)
    assert np.array_equal(still.log_weights_LE, found[0].log_weights_LE)


def test_any_two_positions_of_the_walk_correlate_as_the_walk_says() -> None:
    def draw(rng: np.random.Generator) -> NDArray[np.float64]:
        return rng.standard_normal(40_000)

    start = np.random.default_rng(0).standard_normal(40_000)
    walk = {step: drifted(start, step, 7.0, 5, draw) for step in (1, 3, 5, 6, 8, 13)}
    for early in walk:
        for late in walk:
            seen = np.mean(walk[early] * walk[late])
            assert seen == pytest.approx(math.exp(-abs(late - early) / 7.0), abs=5 / math.sqrt(40_000))


@pytest.mark.parametrize("router", [PLAIN, LIMITED])
def test_a_domain_mixture_is_the_mixture_of_its_domains_loads_and_visits(router: Router) -> None:
    found = drawn(DomainMixture(domains=TEXTS, gini=0.25), router)
    parts = found.domains
    assert parts is not None
    assert parts.names == ("code", "prose", "numbers")
    assert np.tensordot(parts.share_D, parts.inclusion_DLE, axes=1) == pytest.approx(found.inclusion_LE)
    assert gini(found.inclusion_LE).mean() == pytest.approx(0.25, abs=0.01)
    assert gini(parts.inclusion_DLE).mean() > 0.3  # favourites differ, so the mixture is more even than its parts
    placement = contiguous(64, 8)
    visits = visit_probabilities(found, placement).rank_visits_LR[0]
    rng, seen = np.random.default_rng(3), np.zeros(8)
    for share, weights_LE in zip(parts.share_D, parts.log_weights_DLE, strict=True):
        choices = draw_choices(weights_LE[0], router, 20_000, rng)
        seen += share * np.array([(placement.expert_to_rank_E[choices] == r).any(axis=1).mean() for r in range(8)])
    assert visits == pytest.approx(seen, abs=0.03 if router is LIMITED else 0.015)  # pools have 8,192 tokens


def test_domains_that_overlap_wholly_are_one() -> None:
    parts = drawn(DomainMixture(domains=TEXTS, gini=0.25, overlap=1.0), PLAIN).domains
    assert parts is not None
    assert parts.inclusion_DLE[0] == pytest.approx(parts.inclusion_DLE[2])


@pytest.mark.parametrize("router", [Router(top_k=2), Router(top_k=2, num_groups=4, top_groups=2)])
def test_first_experts_repeat_as_often_as_asked_and_each_token_keeps_its_law(router: Router) -> None:
    # Mixtral, layer 15: 28 % where chance is 12.5 %.
    found = drawn(Multinomial(correlation=Correlation(first_repeat=0.28)), router, layers=1, experts=8)
    assert found.repeat_L is not None
    choices = draw_token_sequence(np.zeros(8), router, 60_000, float(found.repeat_L[0]), np.random.default_rng(1))
    assert (choices[1:, 0] == choices[:-1, 0]).mean() == pytest.approx(0.28, abs=0.008)
    assert all(len(set(row)) == 2 for row in choices[:2_000].tolist())
    skewed = drawn(Lognormal(gini=0.2, correlation=Correlation(first_repeat=0.4)), router, layers=1, experts=8)
    assert skewed.repeat_L is not None
    assert skewed.first_LE is not None
    sequence = draw_token_sequence(
        skewed.log_weights_LE[0], router, 200_000, float(skewed.repeat_L[0]), np.random.default_rng(2)
    )
    assert (sequence[1:, 0] == sequence[:-1, 0]).mean() == pytest.approx(0.4, abs=0.01)
    assert np.bincount(sequence.ravel(), minlength=8) / 200_000 == pytest.approx(
        skewed.inclusion_LE[0], abs=0.02
    )  # 4 x pool noise
    assert np.bincount(sequence[:, 0], minlength=8) / 200_000 == pytest.approx(skewed.first_LE[0], abs=0.015)


def test_random_seconds_are_counted_and_visited_as_they_are_drawn() -> None:
    router = Router(top_k=2, choice="random_second")
    for popularity in (Multinomial(), Lognormal(gini=0.4)):
        found = drawn(popularity, router, layers=1, experts=16)
        choices = draw_choices(found.log_weights_LE[0], router, 100_000, np.random.default_rng(4))
        seen = np.bincount(choices[choices >= 0], minlength=16) / 100_000
        assert found.inclusion_LE[0] == pytest.approx(seen, abs=4 * 0.5 / math.sqrt(100_000))
        assert found.nowhere_L is not None
        assert found.nowhere_L[0] == pytest.approx((choices < 0).mean() * 2, abs=0.007)
        placement = contiguous(16, 4)
        ranks = np.append(placement.expert_to_rank_E, -1)[choices]
        visited = np.array([(ranks == r).any(axis=1).mean() for r in range(4)])
        assert visit_probabilities(found, placement).rank_visits_LR[0] == pytest.approx(visited, abs=0.007)


def test_two_experts_keep_a_random_second_half_of_the_time_when_equal() -> None:
    found = drawn(Multinomial(), Router(top_k=2, choice="random_second"), layers=1, experts=2)
    assert found.inclusion_LE[0] == pytest.approx([0.75, 0.75])


def test_zero_compute_experts_take_assignments_and_nobody_visits_them() -> None:
    router = Router(top_k=6, num_zero_experts=32)
    equal = drawn(Multinomial(), router, layers=1, experts=64)
    assert equal.inclusion_LE == pytest.approx(np.full((1, 64), 6 / 96))
    assert equal.nowhere_L == pytest.approx(np.array([2.0]))
    found = drawn(Lognormal(gini=0.3), router, layers=1, experts=64)
    assert gini(found.inclusion_LE).mean() == pytest.approx(0.3, abs=0.001)
    assert found.zero_log_weights_LZ is not None
    all_weights = np.concatenate([found.log_weights_LE[0], found.zero_log_weights_LZ[0]])
    choices = draw_choices(all_weights, router, 50_000, np.random.default_rng(6))
    placement = contiguous(64, 8)
    ranks = np.append(placement.expert_to_rank_E, np.full(32, -1))[choices]
    visited = np.array([(ranks == r).any(axis=1).mean() for r in range(8)])
    assert visit_probabilities(found, placement).rank_visits_LR[0] == pytest.approx(visited, abs=0.01)
    assert (choices >= 64).sum() / 50_000 == pytest.approx(found.nowhere_L[0], abs=0.03)  # type: ignore[index]


def test_experts_that_choose_are_evenly_loaded_whatever_the_popularity() -> None:
    router = Router(top_k=2, choice="expert_choice")
    log_weights = 1.5 * np.random.default_rng(0).standard_normal(16)
    tokens_EC, score_TE = expert_choice_tokens(log_weights, router, 640, np.random.default_rng(1))
    assert tokens_EC.shape == (16, 80)
    for expert in range(16):  # brute force: no token left out scores higher than one taken
        left_out = np.setdiff1d(np.arange(640), tokens_EC[expert])
        assert score_TE[tokens_EC[expert], expert].min() >= score_TE[left_out, expert].max()
    choices = draw_expert_choice(log_weights, router, 640, np.random.default_rng(1))
    assert np.array_equal(np.bincount(choices[choices >= 0]), np.full(16, 80))
    per_token = (choices >= 0).sum(axis=1)
    assert per_token.mean() == 2.0
    assert per_token.min() == 0
    assert per_token.max() > 2
    found = drawn(Lognormal(gini=0.4), router, layers=2, experts=16)
    assert np.array_equal(found.inclusion_LE, np.full((2, 16), 2 / 16))
    visits = visit_probabilities(found, contiguous(16, 16)).rank_visits_LR
    assert visits == pytest.approx(np.full((2, 16), 2 / 16))


def test_a_hot_rank_is_hot_experts_in_one_place() -> None:
    spread = drawn(HotExperts(num_hot=8, share=0.5), PLAIN, layers=3)
    packed = drawn(HotExperts(num_hot=8, share=0.5, place="first"), PLAIN, layers=3)
    eight_ranks = contiguous(64, 8)
    assert eight_ranks.rank_loads(packed.inclusion_LE)[:, 0] / 4 == pytest.approx(0.5, abs=0.001)
    assert eight_ranks.rank_loads(spread.inclusion_LE).max() / 4 < 0.4
    assert isinstance(eight_ranks, Placement)


@pytest.mark.parametrize("share_at", [(8, 0.625), (16, 0.562), (32, 0.531), (64, 0.5)])
def test_the_group_limited_tie_trap_of_a_strided_one_hot_load(share_at: tuple[int, float]) -> None:
    """A "balanced" load of eight scores of 1 a token, 32 experts apart, so that every expert has its turn.

    They lie one to a group: all groups tie, the four of lowest id win, four of the eight wanted experts are outside,
    and the four places left tie at 0 and go to experts 0 to 3. Realised, rank 0 takes half of all or more.
    """
    ranks, share = share_at
    hot = np.arange(8) * 32
    num_tokens = 32
    scores_TE = np.zeros((num_tokens, 256))
    for token in range(num_tokens):
        scores_TE[token, (hot + token) % 256] = 1.0
    scores_TNS = scores_TE.reshape(num_tokens, 8, 32)
    group_TN = np.sort(scores_TNS, axis=2)[:, :, -2:].sum(axis=2)
    best_TN = np.argsort(-group_TN, axis=1, kind="stable")[:, :4]
    inside = np.zeros((num_tokens, 8, 1), dtype=bool)
    np.put_along_axis(inside, best_TN[:, :, None], True, axis=1)
    masked = np.where(inside, scores_TNS, -1.0).reshape(num_tokens, 256)
    choices = np.argsort(-masked, axis=1, kind="stable")[:, :8]
    load_R = contiguous(256, ranks).rank_loads(np.bincount(choices.ravel(), minlength=256).astype(float))
    assert load_R[0] / load_R.sum() == pytest.approx(share, abs=0.0006)
    assert max_mean(load_R) > 4  # far from balanced


def test_a_measure_must_be_one_and_reachable() -> None:
    with pytest.raises(InputError, match="zipf: takes exactly one of gini, cv, max_mean, exponent; got"):
        Zipf(gini=0.2, cv=0.3)
    with pytest.raises(InputError, match="takes exactly one of"):
        Dirichlet()
    with pytest.raises(InputError, match=r"max_mean: must stay below E/k = 16 \(top-4 of 64 experts\); got 17"):
        drawn(Zipf(max_mean=17.0), PLAIN)
    with pytest.raises(InputError, match=r"share: must stay below num_hot/k = 0\.5"):
        drawn(HotExperts(num_hot=2, share=0.6), PLAIN)
    with pytest.raises(InputError, match="shares must sum to 1"):
        DomainMixture(domains=TEXTS[:2], gini=0.2)
    with pytest.raises(InputError, match=r"first_repeat: must be at least 0\.125"):
        drawn(Multinomial(correlation=Correlation(first_repeat=0.1)), Router(top_k=2), experts=8)
    with pytest.raises(InputError, match="span: needs an exponent"):
        PowerLaw(gini=0.3, span=50.0)
    with pytest.raises(InputError, match="choice: takes no groups"):
        Router(top_k=2, choice="expert_choice", num_groups=2)


def test_scenario_files_name_every_kind() -> None:
    texts = [{"name": "code", "share": 0.5}, {"name": "prose", "share": 0.5}]
    raw: list[dict[str, object]] = [
        {"kind": "zipf", "max_mean": 4},
        {"kind": "dirichlet", "cv": 0.5, "correlation": {"layers": 0.3, "drift_steps": 1000}},
        {"kind": "power_law", "exponent": 1.2, "span": 6553.6},
        {"kind": "hot_experts", "num_hot": 4, "share": 0.3},
        {"kind": "domains", "domains": texts, "gini": 0.2, "run_tokens": 4096},
        {"kind": "lognormal"},
    ]
    kinds = [parse_as(Routing, {"popularity": entry}, "scenario.routing").popularity for entry in raw]
    assert [kind.kind for kind in kinds] == [entry["kind"] for entry in raw]
    assert len({hash(kind) for kind in kinds}) == len(kinds)
    assert measure_of(kinds[1]) == ("cv", 0.5)  # type: ignore[arg-type]
    assert measure_of(kinds[-1]) == ("gini", 0.25)  # type: ignore[arg-type]
    assert popularity_words(kinds[3]) == "hot experts popularity with share 0.3"
