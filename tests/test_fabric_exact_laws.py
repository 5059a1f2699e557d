"""Laws of max-min fair finishes, by hypothesis: the solver equals plain filling; nothing is lost, gained or hurried."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import NamedTuple, get_args

import numpy as np
import pytest
from fabric_fakes import fabric, fair_rates, filled_finish_s
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moesim.describe.hardware import CrossRail
from moesim.fabric import fold_kernels
from moesim.fabric.exact import _fold, finish_s, shared_finish_s
from moesim.fabric.flows import Flows, flows_of
from moesim.fabric.sharing_kernels import finish_shared
from moesim.fabric.topology import Topology

Floats = NDArray[np.float64]


class System(NamedTuple):
    """Messages over any links: not only those that a cluster has."""

    bytes_F: Floats
    begin_F: Floats
    link_FP: NDArray[np.int32]
    rate_J: Floats


@st.composite
def systems(draw: st.DrawFn) -> System:
    """Up to 120 messages on up to 14 links; equal sizes, begins and rates are likely."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_flows, num_links = draw(st.integers(1, 120)), draw(st.integers(1, 14))
    hops = draw(st.integers(1, 4))
    link_FP = np.argsort(rng.random((num_flows, max(4, num_links))), axis=1)[:, :4].astype(np.int32)
    length_F = rng.integers(1, hops + 1, num_flows)
    link_FP[(link_FP >= num_links) | (np.arange(4) >= length_F[:, None])] = -1
    link_FP[:, 0] = np.where((link_FP < 0).all(axis=1), 0, link_FP[:, 0])
    # A route is packed: its links stand first.
    link_FP = np.take_along_axis(link_FP, np.argsort(link_FP < 0, axis=1, kind="stable"), axis=1)
    sizes = draw(st.sampled_from(["equal", "few", "lognormal"]))
    bytes_F = {
        "equal": np.full(num_flows, 1e6),
        "few": rng.integers(1, 4, num_flows) * 1e6,
        "lognormal": np.floor(rng.lognormal(14.0, 1.5, num_flows)) + 1.0,
    }[sizes]
    begins = draw(st.sampled_from(["together", "few", "spread"]))
    begin_F = {
        "together": np.zeros(num_flows),
        "few": rng.integers(0, 3, num_flows) * 1e-5,
        "spread": rng.random(num_flows) * 1e-3,
    }[begins]
    rate_J = rng.choice([1e9, 3e9, 50e9], num_links) if draw(st.booleans()) else rng.lognormal(23.0, 1.0, num_links)
    return System(bytes_F, begin_F, link_FP, rate_J)


@st.composite
def exchanges(draw: st.DrawFn) -> tuple[Flows, Topology]:
    """An exchange between 2 to 12 ranks on a fabric of any kind, with its topology."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_ranks = draw(st.integers(2, 12))
    shape = (num_ranks, num_ranks)
    bytes_RR = {
        "uniform": np.full(shape, 1e6),
        "shifts": 1e6 * (1.0 + (np.arange(num_ranks)[None, :] - np.arange(num_ranks)[:, None]) % num_ranks % 3),
        "lognormal": rng.lognormal(14.0, 1.0, shape),
        "sparse": rng.lognormal(14.0, 1.0, shape) * (rng.random(shape) < 0.3),
        "near equal": 1e7 + rng.integers(0, 5, shape),
    }[draw(st.sampled_from(["uniform", "shifts", "lognormal", "sparse", "near equal"]))]
    starts_RR = rng.random(shape) * 1e-4 if draw(st.booleans()) else None
    topology = fabric(
        num_ranks,
        draw(st.sampled_from([1, 2, 4, 8])),
        draw(st.sampled_from(["pxn", "direct", "spine"])),
        draw(st.sampled_from([1.0, 2.0, 4.0])),
    )
    if draw(st.booleans()):
        topology = topology.jittered(rng, rate_spread=0.2)
    return flows_of(bytes_RR, starts_RR), topology


@settings(max_examples=300, deadline=None)
@given(systems())
def test_the_solver_equals_plain_filling_on_any_links(system: System) -> None:
    np.testing.assert_allclose(shared_finish_s(*system), filled_finish_s(*system), rtol=1e-9)


@settings(max_examples=300, deadline=None)
@given(systems())
def test_ranked_links_give_the_finishes_of_filling_anew_on_any_links(system: System) -> None:
    by_way = []
    for most_pairs in (0, 10**9):  # no set counts as dense, every set does
        finish_F = np.empty(system.bytes_F.size)
        finish_shared(*system[:3], np.empty((0, 0)), system.rate_J, finish_F, most_pairs)
        by_way.append(finish_F)
    np.testing.assert_allclose(*by_way, rtol=1e-9)


@pytest.mark.parametrize("cross_rail", get_args(CrossRail))
def test_ranked_links_give_the_finishes_of_filling_anew_between_many_ranks(cross_rail: CrossRail) -> None:
    topology = fabric(48, 8, cross_rail, 2.0)
    rng = np.random.default_rng(5)
    flows = flows_of(rng.lognormal(14.0, 1.0, (48, 48)), rng.random((48, 48)) * 1e-4)
    routes = topology.routes(flows.source_F, flows.target_F)
    by_way = []
    for most_pairs in (0, 10**9):
        finish_F = np.empty(flows.num_flows)
        begin_F, rate_J = flows.start_F + routes.latency_F, topology.rate_bytes_per_s_J
        finish_shared(flows.bytes_F, begin_F, routes.link_FP, np.empty((0, 0)), rate_J, finish_F, most_pairs)
        by_way.append(finish_F)
    np.testing.assert_allclose(*by_way, rtol=1e-10)


@settings(max_examples=150, deadline=None)
@given(exchanges())
def test_the_solver_equals_plain_filling_on_every_kind_of_fabric(exchange: tuple[Flows, Topology]) -> None:
    flows, topology = exchange
    routes = topology.routes(flows.source_F, flows.target_F)
    plain = filled_finish_s(
        flows.bytes_F,
        flows.start_F + routes.latency_F,
        routes.link_FP,
        topology.rate_bytes_per_s_J,
    )
    np.testing.assert_allclose(finish_s(flows, topology), plain, rtol=1e-9)


@settings(max_examples=60, deadline=None)
@given(systems())
def test_between_events_links_hold_what_passes_and_everyone_has_a_full_link_until_all_bytes_arrived(
    system: System,
) -> None:
    """Conservation and capacity: the finishes say who moves when; fair speeds at those times must carry each message's
    bytes exactly, within every link's rate, each message held by a full link on which none is faster.
    """
    bytes_F, begin_F, link_FP, rate_J = system
    finish_F = shared_finish_s(*system)
    carried_F = np.zeros_like(bytes_F)
    events = np.unique(np.concatenate([begin_F, finish_F]))
    for since, until in itertools.pairwise(events):
        if until - since <= 1e-12 * until:
            continue
        middle = 0.5 * (since + until)
        moving_F = (begin_F <= middle) & (middle < finish_F)
        speed_F = fair_rates(moving_F, link_FP, rate_J)
        load_J = np.zeros(rate_J.size)
        fastest_J = np.zeros(rate_J.size)
        for hop in range(link_FP.shape[1]):
            on = moving_F & (link_FP[:, hop] >= 0)
            np.add.at(load_J, link_FP[on, hop], speed_F[on])
            np.maximum.at(fastest_J, link_FP[on, hop], speed_F[on])
        assert (load_J <= rate_J * (1 + 1e-9)).all()
        full_J = load_J >= rate_J * (1 - 1e-9)
        holds_FP = (link_FP >= 0) & full_J[link_FP] & (speed_F[:, None] >= fastest_J[link_FP] * (1 - 1e-9))
        assert holds_FP[moving_F].any(axis=1).all()
        carried_F += speed_F * (until - since)
    # Intervals of rounding's length are skipped; a message's bytes in them are lost from this sum.
    np.testing.assert_allclose(carried_F, bytes_F, rtol=1e-7)


@settings(max_examples=60, deadline=None)
@given(systems(), st.randoms(use_true_random=False))
def test_the_order_of_messages_changes_nothing(system: System, source: random.Random) -> None:
    order = np.arange(system.bytes_F.size)
    source.shuffle(order)
    shuffled = system._replace(
        bytes_F=system.bytes_F[order], begin_F=system.begin_F[order], link_FP=system.link_FP[order]
    )
    np.testing.assert_allclose(shared_finish_s(*shuffled), shared_finish_s(*system)[order], rtol=1e-9)


@settings(max_examples=60, deadline=None)
@given(systems(), st.floats(0.01, 100.0))
def test_links_that_are_all_c_times_faster_take_a_cth_of_the_time(system: System, factor: float) -> None:
    faster = system._replace(rate_J=system.rate_J * factor, begin_F=system.begin_F / factor)
    np.testing.assert_allclose(shared_finish_s(*faster) * factor, shared_finish_s(*system), rtol=1e-9)


@settings(max_examples=60, deadline=None)
@given(systems())
def test_the_last_is_never_before_the_busiest_link_nor_after_all_in_a_row(system: System) -> None:
    bytes_F, begin_F, link_FP, rate_J = system
    finish_F = shared_finish_s(*system)
    narrowest_F = np.where(link_FP >= 0, rate_J[link_FP], np.inf).min(axis=1)
    assert (finish_F >= (begin_F + bytes_F / narrowest_F) * (1 - 1e-9)).all()
    assert finish_F.max() <= (begin_F.max() + (bytes_F / narrowest_F).sum()) * (1 + 1e-9)
    for link in range(rate_J.size):
        on = (link_FP == link).any(axis=1)
        if on.any():
            assert finish_F[on].max() >= (begin_F[on].min() + bytes_F[on].sum() / rate_J[link]) * (1 - 1e-9)


@pytest.mark.parametrize("cross_rail", get_args(CrossRail))
@pytest.mark.parametrize("pattern", ["uniform", "ring distance", "one slow node"])
def test_symmetric_exchanges_fold_to_a_few_messages_with_the_same_finishes(cross_rail: CrossRail, pattern: str) -> None:
    topology = fabric(32, 4, cross_rail, 2.0)
    node = np.arange(32) // 4
    bytes_RR = np.full((32, 32), 1e6)
    if pattern == "ring distance":
        bytes_RR *= 1 + (node[:, None] - node[None, :]) % 8
    if pattern == "one slow node":
        rates = topology.rate_bytes_per_s_J.copy()
        rates[:4] /= 2
        topology = dataclasses.replace(topology, rate_bytes_per_s_J=rates)
    flows = flows_of(bytes_RR)
    routes = topology.routes(flows.source_F, flows.target_F)
    system = flows.bytes_F, flows.start_F + routes.latency_F, routes.link_FP, topology.rate_bytes_per_s_J
    fold = _fold(*system)
    assert fold is not None
    assert fold.first_I.size <= flows.num_flows / 20
    np.testing.assert_allclose(finish_s(flows, topology), filled_finish_s(*system), rtol=1e-9)


def test_colours_that_are_not_equitable_are_found_out() -> None:
    topology = fabric(16, 4)
    flows = flows_of(np.full((16, 16), 1e6))
    routes = topology.routes(flows.source_F, flows.target_F)
    begin_F = flows.start_F + routes.latency_F
    system = flows.bytes_F, begin_F, routes.link_FP, topology.rate_bytes_per_s_J
    fold = _fold(*system)
    assert fold is not None
    of_links = fold_kernels.messages_of_links(routes.link_FP, 64)
    colour_J = np.repeat([0, 1, 2, 3], 16).astype(np.int32)
    first_K = np.arange(0, 64, 16)
    assert fold_kernels.is_equitable(*system, fold.colour_F, fold.first_I, colour_J, first_K, *of_links)
    merged_F = np.zeros_like(fold.colour_F)  # messages over NVLink and over NICs as one
    assert not fold_kernels.is_equitable(*system, merged_F, np.zeros(1, np.int64), colour_J, first_K, *of_links)
    one_link = np.zeros_like(colour_J)  # all links as one
    assert not fold_kernels.is_equitable(
        *system, fold.colour_F, fold.first_I, one_link, np.zeros(1, np.int64), *of_links
    )
    slower = topology.rate_bytes_per_s_J.copy()
    slower[40] /= 2
    assert not fold_kernels.is_equitable(*system[:3], slower, fold.colour_F, fold.first_I, colour_J, first_K, *of_links)
