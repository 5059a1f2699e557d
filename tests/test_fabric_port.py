"""The fabric's fast fidelity against closed forms, laws, and exact max-min fairness.

Legend: R ranks.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moesim.describe.hardware import CrossRail
from moesim.errors import InputError
from moesim.fabric import exact, port
from moesim.fabric.flows import Flows, flows_of, together
from moesim.fabric.patterns import PATTERNS, pattern_RR
from moesim.fabric.port import busiest_link, contended_finish_s, finish_s, only_ports_bind, port_finish_s, rank_finish_s
from moesim.fabric.round_kernels import rounds_between_ports
from moesim.study.port_error import (
    LATENCY_INTER_S,
    LATENCY_INTRA_S,
    NIC_BYTES_PER_S,
    NVLINK_BYTES_PER_S,
    even_fabric,
    port_cases,
    port_errors,
    summarise_errors,
)

Floats = NDArray[np.float64]
MB = 1e6
# of the batched form: sizes are single precision, sums over some tens of messages
ROUNDING = 2e-6


def sent(num_ranks: int, messages: dict[tuple[int, int], float]) -> Floats:
    bytes_RR = np.zeros((num_ranks, num_ranks))
    for pair, num_bytes in messages.items():
        bytes_RR[pair] = num_bytes
    return bytes_RR


def both(bytes_RR: Floats) -> list[Floats]:
    """Each rank's finish by shares of ports and by rounds."""
    topology = even_fabric(len(bytes_RR), 8)
    flows = flows_of(bytes_RR)
    return [port_finish_s(bytes_RR, topology), rank_finish_s(flows, finish_s(flows, topology), len(bytes_RR))]


@pytest.mark.parametrize(
    ("messages", "rank", "seconds"),
    [
        ({(3, 5): MB}, 5, LATENCY_INTRA_S + MB / NVLINK_BYTES_PER_S),
        ({(3, 11): MB}, 3, LATENCY_INTER_S + MB / NIC_BYTES_PER_S),
        ({(3, 13): MB}, 13, LATENCY_INTER_S + LATENCY_INTRA_S + MB / NIC_BYTES_PER_S),
        ({(0, 8): MB, (8, 0): MB}, 0, LATENCY_INTER_S + MB / NIC_BYTES_PER_S),
        # the smaller of two on one NIC is done when the other has moved as much
        ({(0, 8): MB, (0, 16): 3 * MB}, 8, LATENCY_INTER_S + 2 * MB / NIC_BYTES_PER_S),
        ({(0, 8): MB, (0, 16): 3 * MB}, 16, LATENCY_INTER_S + 4 * MB / NIC_BYTES_PER_S),
        ({(sender, 7): MB for sender in range(7)}, 7, LATENCY_INTRA_S + 7 * MB / NVLINK_BYTES_PER_S),
        ({(sender, 7): MB for sender in range(7)}, 2, LATENCY_INTRA_S + 7 * MB / NVLINK_BYTES_PER_S),
    ],
)
def test_simple_exchanges_end_when_arithmetic_says(
    messages: dict[tuple[int, int], float], rank: int, seconds: float
) -> None:
    for finish_R in both(sent(24, messages)):
        assert finish_R[rank] == pytest.approx(seconds, rel=ROUNDING)


def test_uniform_exchange_on_one_node_is_its_port_and_idle_ranks_are_done_at_once() -> None:
    uniform = np.full((8, 8), MB)
    for finish_R in both(uniform):
        assert finish_R == pytest.approx(np.full(8, LATENCY_INTRA_S + 7 * MB / NVLINK_BYTES_PER_S), rel=ROUNDING)
    for finish_R in both(sent(24, {(0, 8): MB})):
        assert (finish_R[[1, 7, 9, 23]] == 0).all()


def test_one_rank_or_no_bytes_take_no_time_and_less_than_a_byte_is_no_message() -> None:
    assert port_finish_s(np.full((1, 1), MB), even_fabric(1, 8)).tolist() == [0.0]
    for finish_R in both(np.zeros((16, 16))):
        assert not finish_R.any()
    for finish_R in both(np.full((16, 16), 0.99)):
        assert not finish_R.any()


def test_infinite_bandwidth_leaves_the_latency() -> None:
    topology = even_fabric(16, 8)
    fast = dataclasses.replace(topology, rate_bytes_per_s_J=np.full_like(topology.rate_bytes_per_s_J, np.inf))
    flows = flows_of(np.full((16, 16), MB))
    expected = topology.routes(flows.source_F, flows.target_F).latency_F
    assert finish_s(flows, fast) == pytest.approx(expected)
    assert port_finish_s(np.full((16, 16), MB), fast) == pytest.approx(np.full(16, LATENCY_INTER_S + LATENCY_INTRA_S))


@pytest.mark.parametrize("num_ranks", [12, 20])  # the last node is half full
def test_many_matrices_at_once_are_each_as_alone_whatever_the_leading_axes(num_ranks: int) -> None:
    rng, topology = np.random.default_rng(3), even_fabric(num_ranks, 8)
    bytes_ = np.stack([pattern_RR(kind, num_ranks, 8, rng) * MB for kind in PATTERNS])
    together_BR = port_finish_s(bytes_, topology)
    assert (together_BR == np.stack([port_finish_s(one, topology) for one in bytes_])).all()
    assert (port_finish_s(bytes_[::-1], topology) == together_BR[::-1]).all()
    assert (port_finish_s(bytes_.reshape(2, 5, num_ranks, num_ranks), topology).reshape(10, -1) == together_BR).all()


def test_where_a_spine_is_oversubscribed_many_matrices_are_timed_as_each_alone() -> None:
    rng = np.random.default_rng(3)
    bytes_ = np.stack([pattern_RR(kind, 20, 8, rng) * MB for kind in PATTERNS[:6]])
    spine = even_fabric(20, 8, "spine", 2.0)
    alone = [rank_finish_s(flows_of(one), finish_s(flows_of(one), spine), 20) for one in bytes_]
    assert port_finish_s(bytes_, spine) == pytest.approx(np.stack(alone))


def test_few_large_messages_on_late_ports_are_settled_by_rounds_and_the_rest_keep_their_shares(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    topology = even_fabric(64, 8, "pxn")
    even = pattern_RR("routed", 64, 8, np.random.default_rng(2)) * MB
    lumpy = pattern_RR("lognormal", 64, 8, np.random.default_rng(29)) * MB
    found = port_finish_s(np.stack([even, lumpy]), topology).max(axis=1)
    monkeypatch.setattr(port, "MOST_FLOWS_IN_ROUNDS", 0)  # shares of ports alone
    shares = port_finish_s(np.stack([even, lumpy]), topology).max(axis=1)
    true = [exact.finish_s(flows_of(one), topology).max() for one in (even, lumpy)]
    assert found[0] == shares[0] == pytest.approx(true[0], rel=1e-3)
    assert shares[1] < 0.98 * true[1]
    assert found[1] == pytest.approx(true[1], rel=0.01)


@pytest.mark.parametrize("cross_rail", ["pxn", "direct"])
@pytest.mark.parametrize("pattern", ["lognormal", "ragged_source", "empty_rows"])
def test_rounds_between_ports_agree_with_exact(pattern: str, cross_rail: CrossRail) -> None:
    topology = even_fabric(20, 8, cross_rail)  # the last node is half full
    bytes_RR = np.floor(pattern_RR(pattern, 20, 8, np.random.default_rng(5)) * 100 * MB)
    flows = flows_of(bytes_RR)
    true_R = rank_finish_s(flows, exact.finish_s(flows, topology), 20)
    finish_R = np.zeros(20)
    rate_2R = topology.rate_bytes_per_s_J[40:80].reshape(2, 20).astype(np.float32)
    first_2R = np.full((2, 20), LATENCY_INTER_S)
    sizes_RR = bytes_RR.astype(np.float32)
    rounds_between_ports(sizes_RR, 8, cross_rail == "pxn", False, rate_2R, first_2R, finish_R)
    sends_R = true_R > 0
    assert finish_R.max() == pytest.approx(true_R.max(), rel=0.01)
    assert np.median(np.abs(finish_R[sends_R] / true_R[sends_R] - 1)) < 0.01


@pytest.mark.parametrize("cross_rail", ["pxn", "direct"])
@pytest.mark.parametrize("pattern", ["lognormal", "routed", "hot_node"])
def test_messages_of_a_large_exchange_agree_with_the_batched_form(
    pattern: str, cross_rail: CrossRail, monkeypatch: pytest.MonkeyPatch
) -> None:
    topology = even_fabric(32, 8, cross_rail)
    bytes_RR = pattern_RR(pattern, 32, 8, np.random.default_rng(1)) * MB
    flows = flows_of(bytes_RR)
    monkeypatch.setattr(port, "MOST_FLOWS_IN_ROUNDS", 0)
    finish_R = rank_finish_s(flows, finish_s(flows, topology), 32)
    assert finish_R == pytest.approx(port_finish_s(bytes_RR, topology), rel=1e-5)


def test_port_is_within_its_stated_error_of_exact() -> None:
    _check_errors(num_single=60, num_meeting=20, seed=1)


@pytest.mark.slow
def test_port_is_within_its_stated_error_of_exact_on_other_seeds() -> None:
    _check_errors(num_single=300, num_meeting=100, seed=2)


def _check_errors(num_single: int, num_meeting: int, seed: int) -> None:
    cases = [*port_cases(num_single, seed), *port_cases(num_meeting, seed, at_once=2)]
    found = {row.group: row for row in summarise_errors([error for case in cases for error in port_errors(case)])}
    worst = {"non-blocking": 0.02, "non-blocking, batched": 0.02, "oversubscribed spine": 0.1}
    assert set(found) == {*worst, "two exchanges at once"}
    for group, limit in worst.items():
        assert found[group].makespan_median <= 0.005, group
        assert -limit <= found[group].makespan_lowest <= found[group].makespan_highest <= limit, group
        assert found[group].rank_p95 <= 0.05, group
    assert found["two exchanges at once"].makespan_median <= 0.1
    assert found["two exchanges at once"].rank_p95 <= 0.1


@given(
    seed=st.integers(0, 10**6),
    pattern=st.sampled_from(PATTERNS),
    cross_rail=st.sampled_from(["pxn", "direct", "spine"]),
    oversubscription=st.sampled_from([1.0, 3.0]),
)
@settings(max_examples=40, deadline=None)
def test_never_below_the_busiest_link_nor_above_all_in_a_row_and_scale_free(
    seed: int, pattern: str, cross_rail: CrossRail, oversubscription: float
) -> None:
    rng = np.random.default_rng(seed)
    topology = even_fabric(16, 4, cross_rail, oversubscription)
    free = dataclasses.replace(topology, latency_intra_s=0.0, latency_inter_s=0.0)
    bytes_RR = np.floor(pattern_RR(pattern, 16, 4, rng) * MB)
    flows = flows_of(bytes_RR)
    bound_s, _ = busiest_link(flows, free)
    in_a_row_s = sum(
        max(one / free.rate_bytes_per_s_J[link] for link in links if link >= 0)
        for one, links in zip(flows.bytes_F, free.routes(flows.source_F, flows.target_F).link_FP.tolist(), strict=True)
    )
    finish_F = finish_s(flows, free)
    for last_s in (finish_F.max(initial=0.0), port_finish_s(bytes_RR, free).max()):
        assert bound_s * (1 - ROUNDING) <= last_s <= in_a_row_s * (1 + 1e-6)
    faster = dataclasses.replace(free, rate_bytes_per_s_J=free.rate_bytes_per_s_J * 8)
    assert finish_s(flows, faster) == pytest.approx(finish_F / 8, rel=1e-6)
    shuffled = rng.permutation(flows.num_flows)
    columns = {name: getattr(flows, name)[shuffled] for name in ("source_F", "target_F", "bytes_F", "start_F")}
    assert finish_s(Flows(**columns), free) == pytest.approx(finish_F[shuffled], rel=1e-6)


def test_two_exchanges_share_a_nic_message_by_message() -> None:
    topology = even_fabric(16, 8)
    all_to_all = flows_of(sent(16, {(0, 8): 4 * MB}))
    send = flows_of(sent(16, {(0, 8): MB}))
    long_F, short_F = contended_finish_s([all_to_all, send], topology)
    assert short_F == pytest.approx([LATENCY_INTER_S + 2 * MB / NIC_BYTES_PER_S])
    assert long_F == pytest.approx([LATENCY_INTER_S + 5 * MB / NIC_BYTES_PER_S])
    later = flows_of(sent(16, {(0, 8): MB}), np.full(16, 10 * MB / NIC_BYTES_PER_S))
    alone_F, late_F = contended_finish_s([all_to_all, later], topology)
    assert alone_F == pytest.approx([LATENCY_INTER_S + 4 * MB / NIC_BYTES_PER_S])
    assert late_F == pytest.approx([LATENCY_INTER_S + 11 * MB / NIC_BYTES_PER_S])


def test_starts_delay_what_a_rank_sends() -> None:
    topology = even_fabric(16, 8)
    finish_R = port_finish_s(sent(16, {(0, 8): MB, (1, 9): MB}), topology, starts=np.eye(16)[1])
    assert finish_R[8] == pytest.approx(LATENCY_INTER_S + MB / NIC_BYTES_PER_S)
    assert finish_R[9] == pytest.approx(1 + LATENCY_INTER_S + MB / NIC_BYTES_PER_S)


def test_a_dead_link_that_is_used_is_named_and_one_that_is_not_is_no_matter() -> None:
    topology = even_fabric(16, 8)
    rate_J = topology.rate_bytes_per_s_J.copy()
    rate_J[2 * 16 + 3] = 0.0  # nic_out of rank 3
    broken = dataclasses.replace(topology, rate_bytes_per_s_J=rate_J)
    inside = np.kron(np.eye(2), np.full((8, 8), MB))
    assert port_finish_s(inside, broken).max() < 1
    with pytest.raises(InputError, match="nic_out of rank 3"):
        port_finish_s(np.full((2, 16, 16), MB), broken)
    with pytest.raises(InputError, match="nic_out of rank 3"):
        finish_s(flows_of(np.full((16, 16), MB)), broken)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_impossible_bytes_are_refused_by_their_ranks(bad: float) -> None:
    with pytest.raises(InputError, match="from rank 4 to rank 2"):
        port_finish_s(sent(8, {(4, 2): bad}), even_fabric(8, 8))


def test_a_matrix_of_another_size_is_refused() -> None:
    with pytest.raises(InputError, match=r"must be shaped \(\.\.\., 16, 16\); got \(8, 8\)"):
        port_finish_s(np.ones((8, 8)), even_fabric(16, 8))


def test_rounds_serve_where_links_inside_the_network_can_be_full() -> None:
    assert only_ports_bind(even_fabric(32, 8))
    assert only_ports_bind(even_fabric(32, 8, "spine"))
    assert not only_ports_bind(even_fabric(32, 8, "spine", 1.5))
    jittered = even_fabric(32, 8).jittered(np.random.default_rng(0), latency_spread_s=1e-6)
    assert not only_ports_bind(jittered)


def test_the_busiest_link_is_named_with_its_seconds() -> None:
    topology = even_fabric(16, 8)
    flows = together([flows_of(sent(16, {(0, 8): MB, (1, 8): 2 * MB})), flows_of(sent(16, {(2, 3): MB}))])
    seconds, link = busiest_link(flows, topology)
    assert topology.link_name(link) in ("nic_in of rank 8", "nic_out of rank 0")
    assert seconds == pytest.approx(3 * MB / NIC_BYTES_PER_S)


def test_an_unknown_pattern_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match="Did you mean hot_receiver"):
        pattern_RR("hot_reciever", 8, 8, np.random.default_rng(0))
