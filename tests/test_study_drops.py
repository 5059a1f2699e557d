"""What a study says of drops: expected as drawn, the capacity that is needed, tokens, domains, re-routing."""

from __future__ import annotations

import pytest

from moesim.study.drops import drop_point, expected_drops_L, needed_capacity
from moesim.study.routed import routed_base, routed_load
from tests.routed_cases import scenario, under

CONVENTIONS = (
    {"kind": "megatron"},
    {"kind": "megablocks"},
    {"kind": "tutel"},
    {"kind": "gshard", "group_tokens": 256},
    {"kind": "rank_buffer"},
)
EXPECTED = [(convention, "probability") for convention in CONVENTIONS]
EXPECTED += [(convention, "reroute") for convention in CONVENTIONS if convention["kind"] != "rank_buffer"]


@pytest.mark.parametrize(("convention", "policy"), EXPECTED, ids=str)
def test_the_expected_drops_are_those_of_a_drawn_step(convention: dict[str, object], policy: str) -> None:
    asked = under(convention, drop_policy=policy)
    load, popularities = routed_load(asked)
    expected = drop_point(asked, popularities, 1.25)
    assert load.drop_fraction == pytest.approx(expected.drop_fraction, abs=4e-3)
    assert load.padding_fraction == pytest.approx(expected.padding_fraction, abs=4e-3)


@pytest.mark.parametrize("convention", CONVENTIONS, ids=lambda convention: str(convention["kind"]))
def test_the_needed_capacity_drops_as_little_as_wanted_and_a_little_less_drops_more(
    convention: dict[str, object],
) -> None:
    asked = under(convention)
    popularities = routed_base(asked).popularities
    found = needed_capacity(asked, popularities, 0.01)
    assert drop_point(asked, popularities, found.capacity_factor).drop_fraction <= 0.01
    assert drop_point(asked, popularities, 0.95 * found.capacity_factor).drop_fraction > 0.01
    assert found.worst_layer_capacity_factor >= found.capacity_factor
    at_worst = expected_drops_L(asked, popularities, found.worst_layer_capacity_factor)
    assert float(at_worst.max()) <= 0.01


def test_with_the_needed_capacity_a_drawn_step_drops_as_much_as_wanted() -> None:
    found = needed_capacity(scenario(), routed_base(scenario()).popularities, 0.02)
    load, _ = routed_load(scenario(capacity_factor=found.capacity_factor))
    assert load.drop_fraction == pytest.approx(0.02, rel=0.05)


def test_rerouting_loses_less_and_its_losses_still_add_up() -> None:
    turned_away, _ = routed_load(scenario(capacity_factor=0.8))
    taken_over, _ = routed_load(under({"kind": "megatron"}, drop_policy="reroute", capacity_factor=0.8))
    assert 0.19 < taken_over.drop_fraction < turned_away.drop_fraction  # a fifth has no room anywhere
    lost = (taken_over.drop_fraction_LE * taken_over.assigned_LE).sum()
    assert lost == pytest.approx((taken_over.assigned_LE - taken_over.kept_LE).sum())


def test_domains_with_crowded_favourites_lose_more() -> None:
    domains = [{"name": "code", "share": 0.8}, {"name": "prose", "share": 0.2}]
    asked = under({"kind": "megatron"}, popularity={"kind": "domains", "domains": domains, "gini": 0.3})
    load, _ = routed_load(asked)
    found = load.to_dict()["drop_fraction_by_domain"]
    assert set(found) == {"code", "prose"}
    assert found["code"] > found["prose"]  # the larger domain's favourites are the ones that overflow
    mean = 0.8 * found["code"] + 0.2 * found["prose"]
    assert mean == pytest.approx(load.drop_fraction, abs=5e-3)
