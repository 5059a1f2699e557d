"""NCCL inside a node: closed forms at both ends of the sizes, and what a collective can never do."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from moesim.catalog.hardware import load_gpu
from moesim.errors import InputError
from moesim.fabric.nccl import BULK_START_S, LOW_HOP_S, LOW_START_S, Collective, NcclRates, nccl_s
from moesim.units import GIB, KIB, MIB

H100 = load_gpu("h100-sxm")
LINE = 450e9
RATES = NcclRates(derate=0.8, latency_factor=2.0)
COLLECTIVES: tuple[Collective, ...] = ("alltoall", "all_gather", "reduce_scatter", "all_reduce")


def test_a_tiny_all_gather_is_the_start_and_a_hop_per_other_rank() -> None:
    expected = 2.0 * (LOW_START_S + 7 * LOW_HOP_S)
    assert nccl_s("all_gather", 8, 8, H100, RATES) == pytest.approx(expected, rel=1e-4)


def test_a_tiny_all_to_all_takes_one_hop_on_any_number_of_ranks() -> None:
    assert nccl_s("alltoall", 8, 8, H100, RATES) == pytest.approx(
        float(nccl_s("alltoall", 2, 8, H100, RATES)), rel=1e-4
    )


def test_a_large_all_reduce_in_the_switches_moves_one_and_an_eighth_of_the_tensor_through_each_port() -> None:
    seconds = nccl_s("all_reduce", 8, 4 * GIB, H100, RATES)
    assert seconds == pytest.approx(2.0 * BULK_START_S + 9 / 8 * 4 * GIB / (0.8 * LINE), rel=1e-9)


def test_without_switch_reduction_or_between_two_ranks_an_all_reduce_is_a_ring() -> None:
    ring = 2.0 * BULK_START_S + 2 * 7 / 8 * 4 * GIB / (0.8 * LINE)
    assert nccl_s("all_reduce", 8, 4 * GIB, H100, RATES, in_switch_reduction=False) == pytest.approx(ring, rel=1e-9)
    pair = 2.0 * BULK_START_S + 4 * GIB / (0.8 * LINE)
    assert nccl_s("all_reduce", 2, 4 * GIB, H100, RATES) == pytest.approx(pair, rel=1e-9)


def test_a_large_all_gather_copies_the_own_part_through_memory() -> None:
    wire = 2.0 * BULK_START_S + 7 / 8 * GIB / (0.8 * LINE)
    copy = GIB / 8 / (0.4 * float(H100.memory_bytes_per_s))
    assert nccl_s("all_gather", 8, GIB, H100, RATES) == pytest.approx(wire + copy, rel=1e-9)


@pytest.mark.parametrize("collective", COLLECTIVES)
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_more_bytes_never_take_less_time_and_never_beat_the_line_rate(collective: Collective, num_ranks: int) -> None:
    num_bytes = np.geomspace(512, 2 * GIB, 40)
    seconds = nccl_s(collective, num_ranks, num_bytes, H100, RATES)
    assert (np.diff(seconds) > 0).all()
    assert (seconds > (num_ranks - 1) / num_ranks * num_bytes / LINE).all()


def test_one_rank_or_no_bytes_take_no_time() -> None:
    assert nccl_s("all_gather", 1, MIB, H100, RATES) == 0.0
    assert nccl_s("all_gather", 8, 0, H100, RATES) == 0.0


def test_twice_the_link_halves_the_wire_part_only() -> None:
    fast = dataclasses.replace(H100, nvlink_bytes_per_s=dataclasses.replace(H100.nvlink_bytes_per_s, value=2 * LINE))
    slow_s, fast_s = (float(nccl_s("all_reduce", 8, GIB, gpu, RATES)) for gpu in (H100, fast))
    assert slow_s - fast_s == pytest.approx(9 / 16 * GIB / (0.8 * LINE), rel=1e-9)
    assert fast_s - 2.0 * BULK_START_S == pytest.approx(slow_s - fast_s, rel=1e-9)


def test_an_unknown_collective_and_impossible_rates_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="must be one of alltoall"):
        nccl_s("broadcast", 8, KIB, H100, RATES)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="derate: must lie in"):
        NcclRates(derate=1.1, latency_factor=1.0)
    with pytest.raises(InputError, match="latency_factor: must be positive"):
        NcclRates(derate=0.5, latency_factor=0.0)
