"""How software moves an exchange: bytes conserved, closed forms, who wins where.

Legend: R ranks.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from moesim.errors import InputError
from moesim.fabric.algorithms import (
    ALGORITHMS,
    AllGather,
    Direct,
    Fidelity,
    Hierarchical,
    LowLatency,
    Pairwise,
    TwoStep,
    algorithm_of,
    completion,
    with_sms,
)
from moesim.fabric.patterns import pattern_RR
from moesim.study.port_error import (
    LATENCY_INTER_S,
    LATENCY_INTRA_S,
    NIC_BYTES_PER_S,
    NVLINK_BYTES_PER_S,
    even_fabric,
)
from moesim.units import GIGA

MB = 1e6
EXACT_NAMES = ("direct", "pairwise", "hierarchical", "two_step", "low_latency")


def uneven(num_ranks: int = 20, seed: int = 0) -> np.ndarray:
    return np.floor(pattern_RR("lognormal", num_ranks, 8, np.random.default_rng(seed)) * MB)


@pytest.mark.parametrize("num_ranks", [16, 20])  # 20: the last node is half full
@pytest.mark.parametrize("name", EXACT_NAMES)
def test_every_byte_arrives_once_and_what_a_rank_forwards_it_has_received(name: str, num_ranks: int) -> None:
    bytes_RR = uneven(num_ranks)
    plan = algorithm_of(name)(bytes_RR, even_fabric(num_ranks, 8))
    legs_RR = sum(phase.bytes_RR for phase in plan.phases)
    assert not np.diag(legs_RR).any()
    # In minus out is what stays: what the rank receives less what it brings.
    stays_R = legs_RR.sum(axis=0) - legs_RR.sum(axis=1)
    assert stays_R == pytest.approx(bytes_RR.sum(axis=0) - bytes_RR.sum(axis=1))
    used = [phase.bytes_RR > 0 for phase in plan.phases]
    assert sum(used).max() <= 1, "no pair has messages in two phases"
    nodes = np.arange(num_ranks) // 8
    crossing = nodes[:, None] != nodes[None, :]
    assert legs_RR[crossing].sum() == pytest.approx(bytes_RR[crossing].sum()), "each byte crosses nodes once"


@pytest.mark.parametrize("fidelity", ["exact", "port"])
@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_every_algorithm_finishes_every_message_in_both_fidelities(name: str, fidelity: Fidelity) -> None:
    bytes_RR = uneven()
    found = completion(algorithm_of(name), bytes_RR, even_fabric(20, 8), fidelity=fidelity)
    assert np.array_equal(np.isfinite(found.finish_RR), bytes_RR > 0)
    assert found.completion_s >= np.nanmax(found.finish_RR)
    assert (found.finish_R > LATENCY_INTRA_S).all()


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_both_fidelities_agree_on_every_algorithm(name: str) -> None:
    bytes_RR, topology = uneven(16), even_fabric(16, 8)
    fast, true = (
        completion(algorithm_of(name), bytes_RR, topology, fidelity=fidelity) for fidelity in ("port", "exact")
    )
    assert fast.completion_s == pytest.approx(true.completion_s, rel=0.02)


def test_pairwise_rounds_of_equal_bytes_add_up() -> None:
    uniform = np.full((8, 8), MB)
    found = completion(Pairwise(), uniform, even_fabric(8, 8))
    assert found.completion_s == pytest.approx(7 * (LATENCY_INTRA_S + MB / NVLINK_BYTES_PER_S))
    assert completion(Direct(), uniform, even_fabric(8, 8)).completion_s < found.completion_s


def test_hierarchical_sends_a_token_once_to_a_node_and_on_from_there() -> None:
    topology = even_fabric(16, 8)
    bytes_RR = np.zeros((16, 16))
    bytes_RR[0, 8:] = MB  # one token batch that all ranks of the other node want
    once = np.zeros((16, 2))
    once[0, 1] = MB
    found = completion(Hierarchical(node_bytes_RN=once), bytes_RR, topology)
    nic_s = LATENCY_INTER_S + MB / NIC_BYTES_PER_S
    assert found.finish_RR[0, 8] == pytest.approx(nic_s)
    assert found.finish_RR[0, 9:] == pytest.approx(np.full(7, nic_s + LATENCY_INTRA_S))
    naive = completion(Hierarchical(), bytes_RR, topology)
    assert naive.completion_s == pytest.approx(LATENCY_INTER_S + 8 * MB / NIC_BYTES_PER_S + LATENCY_INTRA_S)


def test_two_steps_wait_for_each_other_and_hierarchical_ones_do_not() -> None:
    bytes_RR = np.full((32, 32), 4 * MB)
    topology = even_fabric(32, 8)
    two, one = (completion(algorithm, bytes_RR, topology).completion_s for algorithm in (TwoStep(), Hierarchical()))
    between_s = 24 * 4 * MB / NIC_BYTES_PER_S
    assert two > one
    assert two == pytest.approx(between_s + 28 * 4 * MB / NVLINK_BYTES_PER_S + LATENCY_INTRA_S + LATENCY_INTER_S)
    # rounds may let a message begin a little late
    assert one == pytest.approx(between_s + LATENCY_INTER_S + LATENCY_INTRA_S, rel=2e-3)


def test_low_latency_never_hops_by_nvlink() -> None:
    bytes_RR = np.zeros((16, 16))
    bytes_RR[0, 9] = 64
    near, far = (completion(algorithm, bytes_RR, even_fabric(16, 8)) for algorithm in (LowLatency(), Direct()))
    assert near.completion_s == pytest.approx(LATENCY_INTER_S + 64 / NIC_BYTES_PER_S)
    assert far.completion_s == pytest.approx(near.completion_s + LATENCY_INTRA_S)


def test_an_all_gather_brings_everything_everywhere() -> None:
    bytes_RR = np.zeros((8, 8))
    bytes_RR[0, 1] = MB
    found = completion(AllGather(brought_bytes_R=np.full(8, 2 * MB)), bytes_RR, even_fabric(8, 8))
    assert found.completion_s == pytest.approx(LATENCY_INTRA_S + 14 * MB / NVLINK_BYTES_PER_S)
    with pytest.raises(InputError, match="must hold at least what each rank sends to one"):
        completion(AllGather(brought_bytes_R=np.zeros(8)), bytes_RR, even_fabric(8, 8))


def test_dispatch_time_falls_with_sms_as_measured_on_one_h200_node() -> None:
    """Field notes: 131k tokens, 4 to 24 SMs; the wire at its all-to-all derate of 0.7 takes over at 21."""
    tokens, copies, row_bytes = 131072, 4.63 / 7, 7168 * (1 + 4 / 128)
    bytes_RR = np.full((8, 8), tokens * copies * row_bytes)
    topology = even_fabric(8, 8)
    achieved = dataclasses.replace(topology, rate_bytes_per_s_J=topology.rate_bytes_per_s_J * 0.7)
    for num_sms, measured_ms in {4: 70.8, 8: 36.4, 12: 24.7, 16: 18.8, 20: 15.5, 24: 14.6}.items():
        found = completion(Hierarchical(num_sms=num_sms), bytes_RR, achieved)
        assert 1000.0 * found.completion_s == pytest.approx(measured_ms, rel=0.06)
    assert with_sms(topology, None) is topology
    assert with_sms(topology, 2).rate_bytes_per_s_J[0] == 30 * GIGA


def test_wait_for_a_late_rank_is_told_apart_from_wire_time() -> None:
    uniform, topology = np.full((8, 8), MB), even_fabric(8, 8)
    alone = completion(Direct(), uniform, topology)
    late = completion(Direct(), uniform, topology, starts=np.eye(8)[3] * 0.01)
    assert late.wait_R == pytest.approx(0.01 - np.eye(8)[3] * 0.01)
    assert late.wire_s == pytest.approx(alone.completion_s, rel=1e-6)
    assert late.completion_s == pytest.approx(0.01 + alone.completion_s, rel=1e-6)


def test_starts_of_single_messages_are_kept_where_there_is_one_phase() -> None:
    bytes_RR = np.zeros((16, 16))
    bytes_RR[0, 8] = bytes_RR[0, 16 - 8 + 1] = MB
    starts_RR = np.full((16, 16), np.nan)
    starts_RR[0, 8], starts_RR[0, 9] = 0.0, 1.0
    found = completion(LowLatency(), bytes_RR, even_fabric(16, 8), starts=starts_RR)
    seconds = LATENCY_INTER_S + MB / NIC_BYTES_PER_S
    assert found.finish_RR[0, [8, 9]] == pytest.approx([seconds, 1 + seconds])


def test_an_unknown_algorithm_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match="Did you mean hierarchical"):
        algorithm_of("hierachical")
