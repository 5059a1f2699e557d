"""The pipeline's clock against closed forms, and its refusal to hang."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.timeline.pipeline import DeadlockError, StageWork, run_pipeline
from moesim.timeline.schedule import OneForwardOneBackward, Operation


def work(forward_s, backward_s, *, vpp=1, num_blocks=1, num_micro_batches=1, send_s=0.0, tail=(0.0, 0.0, 0.0)):
    shape = (vpp, num_blocks, num_micro_batches)
    sends = np.full(vpp, send_s)
    return StageWork(
        forward_CBM=np.broadcast_to(forward_s, shape),
        backward_CBM=np.broadcast_to(backward_s, shape),
        forward_send_C=sends,
        backward_send_C=sends,
        reduce_s=tail[0],
        optimizer_s=tail[1],
        gather_s=tail[2],
    )


@settings(max_examples=30, deadline=None)
@given(pp=st.integers(1, 8), rounds=st.integers(1, 4))
def test_balanced_1f1b_takes_the_closed_form_of_its_bubble(pp, rounds):
    num_micro_batches = pp * rounds
    stages = [work(1.0, 2.0, num_micro_batches=num_micro_batches) for _ in range(pp)]
    step_s, clocks = run_pipeline(stages, OneForwardOneBackward(pp=pp))
    assert step_s == pytest.approx((num_micro_batches + pp - 1) * 3.0)
    assert [clock.bubble_B[0] for clock in clocks] == pytest.approx([(pp - 1) * 3.0] * pp)


@pytest.mark.parametrize(("pp", "vpp", "rounds"), [(2, 2, 1), (4, 2, 2), (4, 3, 3), (8, 2, 4)])
def test_interleaving_divides_the_bubble_by_the_virtual_stages(pp, vpp, rounds):
    num_micro_batches = pp * rounds
    stages = [work(1.0 / vpp, 2.0 / vpp, vpp=vpp, num_micro_batches=num_micro_batches) for _ in range(pp)]
    step_s, _ = run_pipeline(stages, OneForwardOneBackward(pp=pp, vpp=vpp))
    assert step_s == pytest.approx(num_micro_batches * 3.0 + (pp - 1) * 3.0 / vpp)


def test_every_micro_batch_passes_every_chunk_once_each_way():
    for pp, vpp, num_micro_batches in ((4, 1, 6), (4, 2, 8), (3, 3, 6)):
        for stage in range(pp):
            operations = OneForwardOneBackward(pp=pp, vpp=vpp)(stage, num_micro_batches)
            assert sorted(operations) == sorted(
                Operation(b, c, m) for b in (False, True) for c in range(vpp) for m in range(num_micro_batches)
            )


def test_a_slow_micro_batch_on_one_stage_delays_the_whole_step():
    even = [work(1.0, 2.0, num_micro_batches=8) for _ in range(4)]
    slow = np.ones((1, 1, 8))
    slow[0, 0, 3] = 5.0
    uneven = [work(slow if s == 2 else 1.0, 2.0, num_micro_batches=8) for s in range(4)]
    schedule = OneForwardOneBackward(pp=4)
    assert run_pipeline(uneven, schedule)[0] > run_pipeline(even, schedule)[0] + 3.9


def test_blocks_meet_only_at_the_gradient_reduction():
    forward = np.ones((1, 2, 4))
    forward[0, 1] = 2.0
    stages = [work(forward, 2.0, num_blocks=2, num_micro_batches=4, tail=(0.5, 0.25, 0.125)) for _ in range(2)]
    step_s, clocks = run_pipeline(stages, OneForwardOneBackward(pp=2))
    assert clocks[0].block_wait_B[0] == pytest.approx(5.0)
    assert clocks[0].block_wait_B[1] == 0.0
    assert step_s == pytest.approx((4 + 1) * 4.0 + 0.875)


def test_a_schedule_that_cannot_proceed_names_who_waits_for_what():
    def wrong(stage: int, num_micro_batches: int) -> list[Operation]:
        operations = OneForwardOneBackward(pp=2)(stage, num_micro_batches)
        return operations[::-1] if stage == 1 else operations

    with pytest.raises(
        DeadlockError, match=r"stage 0 block 0 waits for the backward of micro-batch 0.*stage 1 block 0"
    ):
        run_pipeline([work(1.0, 2.0, num_micro_batches=3)] * 2, wrong)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), pp=st.integers(1, 5), num_micro_batches=st.integers(1, 9))
def test_a_step_lies_between_its_busiest_stage_and_everything_in_a_row(seed, pp, num_micro_batches):
    rng = np.random.default_rng(seed)
    stages = [
        work(
            rng.random((1, 1, num_micro_batches)),
            rng.random((1, 1, num_micro_batches)),
            num_micro_batches=num_micro_batches,
            send_s=0.1,
        )
        for _ in range(pp)
    ]
    step_s, _ = run_pipeline(stages, OneForwardOneBackward(pp=pp))
    own = [float(s.forward_CBM.sum() + s.backward_CBM.sum()) + 0.2 * num_micro_batches for s in stages]
    assert max(own) - 1e-9 <= step_s <= sum(own) + 1e-9
