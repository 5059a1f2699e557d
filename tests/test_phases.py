"""Barriers inside an operation: everybody waits for the slowest, and no second is lost or counted twice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.timeline.phases import Phase, lay_out


def lay(phases, num_micro_batches=1, num_ranks=4, block_size=4):
    return lay_out(
        phases,
        num_runs=num_micro_batches,
        num_ranks=num_ranks,
        block_size=block_size,
        traced=np.arange(num_ranks),
    )


def test_a_collective_starts_when_its_slowest_rank_arrives():
    times = lay(
        [
            Phase(name="experts", part="experts", layer=0, seconds=np.array([[1.0, 2.0, 3.0, 4.0]])),
            Phase(name="combine", part="combine", layer=0, seconds=1.0, ranks_in_step=2),
        ]
    )
    assert times.start_PMV[1, 0].tolist() == [2.0, 2.0, 4.0, 4.0]
    assert times.duration_MB.tolist() == [[5.0]]
    assert times.part_R["wait_for_slowest"].tolist() == [3.0, 2.0, 1.0, 0.0]


def test_ranks_of_different_blocks_do_not_wait_for_each_other():
    slow_first = Phase(name="experts", part="experts", layer=0, seconds=np.array([[9.0, 1.0, 1.0, 1.0]]))
    times = lay([slow_first], block_size=2)
    assert times.duration_MB.tolist() == [[9.0, 1.0]]


def test_the_host_goes_on_issuing_a_layer_while_its_rank_waits_and_no_further() -> None:
    def layer(seconds):
        return [
            Phase(name="experts", part="experts", layer=0, seconds=np.array([seconds])),
            Phase(name="combine", part="combine", layer=0, seconds=1.0, ranks_in_step=2),
            # The host needs 4 s to issue a layer: what the rank's own phases do not cover.
            Phase(name="issue", part="host", layer=0, seconds=np.maximum(3.0 - np.array([seconds]), 0.0), issue_s=4.0),
        ]

    times = lay(layer([1.0, 2.5, 1.0, 1.0]), block_size=2)
    # Rank 0 waits 1.5 of its 2 s: both ranks of the pair are done when their hosts are, at 4; so are ranks 2 and 3.
    assert times.duration_MB.tolist() == [[4.0, 4.0]]
    assert times.part_R["host"].tolist() == [0.5, 0.5, 2.0, 2.0]
    # Rank 0 waits long and is bound by nothing; what it waited does not help the next layer.
    assert lay([*layer([1.0, 9.0, 1.0, 1.0]), *layer([1.0, 1.0, 1.0, 1.0])], block_size=2).duration_MB.tolist() == [
        [14.0, 8.0]
    ]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_phases=st.integers(1, 6), num_micro_batches=st.integers(1, 4))
def test_every_ranks_parts_sum_to_the_time_its_block_is_busy(seed, num_phases, num_micro_batches):
    rng = np.random.default_rng(seed)
    phases = [
        Phase(
            name="x",
            part=rng.choice(["experts", "dispatch"]),
            layer=0,
            seconds=rng.random((num_micro_batches, 8)),
            ranks_in_step=int(rng.choice([1, 2, 4])),
        )
        for _ in range(num_phases)
    ]
    times = lay(phases, num_micro_batches, num_ranks=8, block_size=4)
    total_R = sum(times.part_R.values())
    assert total_R == pytest.approx(np.repeat(times.duration_MB.sum(axis=0), 4))
    assert min(part_R.min() for part_R in times.part_R.values()) >= 0
    slowest = sum(phase.seconds.max(axis=1) for phase in phases)
    assert (times.duration_MB <= slowest[:, None] + 1e-12).all()


def two_operations_s(seed, tp, ep):
    """Seconds of two operations of a block, each laid out alone, and of both as one."""
    rng, block = np.random.default_rng(seed), int(np.lcm(tp, ep))

    def operation():
        return [
            Phase(name="tensor parallel", part="attention", layer=0, seconds=0.1, ranks_in_step=tp),
            Phase(name="dispatch", part="dispatch", layer=0, seconds=rng.random((1, block)), ranks_in_step=ep),
            Phase(name="experts", part="experts", layer=0, seconds=rng.random((1, block))),
        ]

    first, second = operation(), operation()
    alone = [lay(phases, num_ranks=block, block_size=block).duration_MB[0, 0] for phases in (first, second)]
    return sum(alone), lay([*first, *second], num_ranks=block, block_size=block).duration_MB[0, 0]


@pytest.mark.parametrize(("tp", "ep"), [(1, 8), (2, 8), (4, 4), (8, 2)])
def test_aligning_a_block_after_each_operation_loses_nothing_where_a_collective_joins_it_all(tp, ep):
    for seed in range(20):
        apart, together = two_operations_s(seed, tp, ep)
        assert apart == pytest.approx(together)


def test_it_is_an_upper_bound_where_no_collective_joins_the_block():
    times = [two_operations_s(seed, 2, 3) for seed in range(20)]
    assert all(apart >= together - 1e-12 for apart, together in times)
    assert any(apart > 1.01 * together for apart, together in times)
