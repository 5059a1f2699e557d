"""Memory over a step: on the engine's clock, and the same peak as the step's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moesim.metrics.memory import memory_by_stage
from moesim.metrics.memory_timeline import memory_timeline
from moesim.scenario import Scenario
from moesim.timeline.step import run_step

ASKED: dict[str, Any] = {
    "model": "qwen3-30b-a3b",
    "cluster": "h100-8x-ib400",
    "num_gpus": 32,
    "pp": 4,
    "ep": 8,
    "global_batch": 64,
    "profile": "datasheet",
}


@pytest.mark.parametrize(
    "changed", [{}, {"schedule": "gpipe"}, {"schedule": "zb-h1"}, {"vpp": 2}, {"moments": "bf16", "seq_len": 64}]
)
def test_the_timelines_peak_is_the_steps_and_each_operation_begins_where_the_last_left_off(
    changed: dict[str, Any],
) -> None:
    trace = run_step(Scenario.make(**ASKED | changed))
    peaks = [memory.peak_bytes for memory in memory_by_stage(trace.scenario, trace.load)]
    lines = memory_timeline(trace)
    assert [line.peak_bytes for line in lines] == pytest.approx(peaks)
    for line in lines:
        np.testing.assert_allclose(line.begin_bytes_K[1:], line.end_bytes_K[:-1])
        assert (line.peak_bytes_K >= np.maximum(line.begin_bytes_K, 0.0)).all()
        assert (np.diff(line.start_s_K) >= 0).all()
        assert (line.end_s_K[:-1] <= line.start_s_K[1:] + 1e-9).all()
        assert line.end_s_K[-1] <= trace.step_s * (1 + 1e-12)
        assert line.begin_bytes_K[0] == pytest.approx(line.end_bytes_K[-1])  # nothing is left at the end


def test_a_forward_beside_a_backward_holds_what_both_hold_and_dualpipe_every_weight_twice() -> None:
    asked = ASKED | {"popularity": "balanced", "global_batch": 128}
    alone, dual = (run_step(Scenario.make(**asked | {"schedule": name})) for name in ("1f1b", "dualpipe"))
    for trace in (alone, dual):
        peaks = [memory.peak_bytes for memory in memory_by_stage(trace.scenario, trace.load)]
        assert [line.peak_bytes for line in memory_timeline(trace)] == pytest.approx(peaks)
    stages = [memory_by_stage(trace.scenario, trace.load) for trace in (alone, dual)]
    for own, mirrored, both in zip(stages[0], reversed(stages[0]), stages[1], strict=True):
        assert both.weights_bytes == pytest.approx(own.weights_bytes + mirrored.weights_bytes)
    line = memory_timeline(dual)[0]
    starts = dict(zip(zip(line.names_K, line.chunk_K, line.micro_batch_K, strict=True), line.start_s_K, strict=True))
    assert len(set(line.start_s_K)) < len(line.start_s_K)  # pairs begin together
    assert len(starts) == 2 * 2 * 8 + 1 + sum(name == "weight_gradient" for name in line.names_K)


def test_gpipe_holds_every_micro_batch_before_its_first_backward_and_1f1b_only_as_many_as_stages_follow() -> None:
    def most(schedule: str) -> int:
        line = memory_timeline(run_step(Scenario.make(**ASKED | {"schedule": schedule, "popularity": "balanced"})))[0]
        return int(np.argmax(line.end_bytes_K))

    assert most("gpipe") == 7  # the last of 8 forwards
    assert most("1f1b") == 3


def test_a_timeline_is_a_table_of_plain_numbers() -> None:
    line = memory_timeline(run_step(Scenario.make(**ASKED)))[-1]
    rows = list(line.rows())
    assert len(rows) == 2 * 8 + 1
    assert rows[-1][2] == "optimizer"
    assert all(type(value) in (int, float, str) for row in rows for value in row)
