"""The published trace of an overlapped pair beside the simulated one: whose seconds are whose."""

from __future__ import annotations

import pytest

from moesim.catalog.step import NO_LOSS
from moesim.door.records import read_records
from moesim.errors import InputError
from moesim.report.accuracy_page import trace_section
from moesim.study.accuracy import CARRIED
from moesim.study.accuracy_trace import STAGE, predicted_pair, trace_rows, trace_scenario
from moesim.timeline.step import run_step


@pytest.fixture(scope="module")
def rows():
    return trace_rows(read_records(CARRIED / "trace.csv"))


def test_the_pair_is_four_moe_layers_each_way_and_its_time_is_split_without_rest():
    trace = run_step(trace_scenario(), constants=NO_LOSS)
    pair = next(op for op in trace.stages[STAGE].operations if op.beside_N is not None)
    for is_backward in (False, True):
        layers = {
            layer
            for layer, part, way in zip(pair.times.layers, pair.times.parts, pair.times.is_backward_P, strict=True)
            if part == "experts" and way == is_backward
        }
        assert len(layers) == 4
    found = predicted_pair(trace)
    assert found["computing"] + found["exposed communication"] == pytest.approx(found["span"])
    # FP8 rows and their scales one way, BF16 rows the other, over the same ports.
    assert found["combine"] / found["dispatch"] == pytest.approx(2 / (1 + 4 / 128), rel=0.01)


def test_every_measured_kind_has_a_prediction_or_says_that_it_has_none(rows):
    assert {row.id for row in rows if row.predicted_s is None} == {"wait"}
    by_id = {row.id: row for row in rows}
    assert by_id["span"].measured_s == pytest.approx(0.129012)
    text = trace_section(rows)
    assert "points off" in text
    assert "| wait | not modelled apart | 32.6 ms |  |" in text


def test_a_kind_of_kernel_that_is_not_known_is_refused_by_name():
    with pytest.raises(InputError, match=r"trace\.csv: id: must be one of dispatch, .*; got 'nonsense'"):
        trace_rows([{"id": "nonsense", "what": "", "ms": "1", "source": ""}])
