"""The published trace of an overlapped pair beside the simulated one: whose seconds are whose."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesim.catalog.step import NO_LOSS
from moesim.cost.device import DeviceCost, device_cost
from moesim.cost.layer import again_s, experts_s, layer_cost
from moesim.cost.precision import recipe_of
from moesim.door.records import read_records
from moesim.errors import InputError
from moesim.report.accuracy_page import trace_section
from moesim.study.accuracy import CARRIED
from moesim.study.accuracy_trace import (
    FIRST_MOE_LAYER,
    STAGE,
    leaders_wait_s,
    predicted_pair,
    trace_rows,
    trace_scenario,
)
from moesim.timeline.overlap import Program, beside, lay_out_program
from moesim.timeline.phases import Phase
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


def test_every_measured_kind_has_a_prediction_and_its_parts_sum(rows):
    by_id = {row.id: row for row in rows}
    assert by_id["span"].measured_s == pytest.approx(0.129012)
    both = by_id["dispatch forward"], by_id["dispatch of gradients"]
    assert sum(row.predicted_s for row in both) == pytest.approx(by_id["dispatch"].predicted_s)
    assert sum(row.measured_s for row in both) == pytest.approx(by_id["dispatch"].measured_s)
    # Kernels start while communication runs; dependencies expose none of it.
    idle_s = by_id["span"].predicted_s - by_id["computing"].predicted_s
    assert 0 < by_id["exposed communication"].predicted_s < idle_s
    assert "points off" in trace_section(rows)


def test_a_kind_of_kernel_that_is_not_known_is_refused_by_name():
    with pytest.raises(InputError, match=r"trace\.csv: id: must be one of dispatch, .*; got 'nonsense'"):
        trace_rows([{"id": "nonsense", "what": "", "ms": "1", "source": ""}])


def test_a_faster_rank_comes_to_wait_as_long_as_its_lead_can_be():
    """Forty pairs in a row on a slow rank and one 1 % faster, against the rule on one pair of the slow rank."""

    def compute(seconds, **more):
        return Phase(name="x", part="experts", layer=0, seconds=seconds, **more)

    def exchange(name, seconds, **more):
        return Phase(name=name, part=name, layer=0, seconds=seconds, ranks_in_step=2, **more)

    backward = {"is_backward": True}
    pair = beside(
        [compute(1.0, **backward), exchange("combine", 0.5, **backward), compute(2.0, **backward)],
        [compute(1.3), exchange("dispatch", 1.2), compute(2.5)],
    )
    number, size = 40, len(pair.phases)
    after = [-1 if k < 0 else k + size * i for i in range(number) for k in pair.after_P]
    speeds = np.array([[1.0, 1 / 1.01]])
    phases = [replace(one, seconds=one.seconds * (1.0 if one.is_comm else speeds)) for one in pair.phases]
    once, often = (
        lay_out_program(program, num_runs=1, num_ranks=2, block_size=2, traced=np.arange(2), sm_share=0.0)
        for program in (pair, Program(phases=tuple(phases * number), after_P=tuple(after)))
    )
    ready_P, free, waited = np.zeros(len(after)), 0.0, 0.0
    start_P, end_P = often.start_PMV[:, 0, 1], (often.start_PMV + often.seconds_PMV)[:, 0, 1]
    for p, needed in enumerate(after):
        if often.parts[p] in ("dispatch", "combine"):
            ready_P[p] = max(end_P[needed], free)
            waited += (start_P[p] - ready_P[p]) * (p >= len(after) - size)
            free = end_P[p]
    assert leaders_wait_s(once) == pytest.approx(waited, rel=0.03)  # speeds differ by 1 %
    assert waited > 0.5


def test_a_layer_casts_in_as_many_kernels_as_in_the_trace_of_like_sizes(monkeypatch):
    """272 kernels of four layers, forward and backward, on the computing stream: median 27, most 322 us, mean 57."""
    scenario, moved = trace_scenario(), []
    model, parallel, train = scenario.model, scenario.parallel, scenario.train
    device = device_cost(scenario.cluster.gpu, train.precision, scenario.profile, recipe_of(train))
    layer = model.layers[FIRST_MOE_LAYER]

    def noted(_device, casts, elements_E):
        elements = np.asarray(elements_E, dtype=float)
        for cast in casts:
            apart = elements if cast.by_expert else elements.sum(axis=-1, keepdims=True)
            moved.extend((apart * cast.element_bytes).ravel())
        return np.zeros(elements.shape[:-1])

    monkeypatch.setattr(DeviceCost, "casts_s", noted)
    layer_cost(model, layer, parallel=parallel, train=train, device=device)
    again_s(model, layer, "up projections", parallel=parallel, train=train, device=device)
    on = {"parallel": parallel, "device": device, "dispatcher": "deepep"}
    for backward in (False, True):
        experts_s(model, layer.ffn, np.full(4, 8192.0), backward=backward, **on)
    seconds = np.array([float(device.stream_s(each)) for each in moved])
    slowed = 1 / (1 - 20 / 132)  # where all of them ran beside collectives
    print(len(moved), f"{seconds.min():.1e} {np.median(seconds):.1e} {seconds.mean():.1e} {seconds.max():.1e}")
    assert len(moved) == 272 / 4
    assert seconds.min() < 4e-6
    assert np.median(seconds) <= 36e-6
    assert np.median(seconds) * slowed >= 27e-6
    assert 0.8 * 57e-6 < seconds.mean() * slowed < 57e-6
    assert 0.8 * 322e-6 < seconds.max() * slowed < 322e-6
