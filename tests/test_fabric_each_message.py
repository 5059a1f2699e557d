"""A step's all-to-alls message by message, against the closed forms of the busiest ports."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import moesim.fabric.each_message as each_message
from moesim.errors import NotModelledError
from moesim.fabric.algorithms import Hierarchical
from moesim.fabric.each_message import Backwards, topology_of_group
from moesim.fabric.patterns import pattern_RR
from moesim.scenario import Scenario
from moesim.study.port_error import even_fabric
from moesim.study.simulate import simulate

SMALL = {
    "model": "olmoe-1b-7b",
    "cluster": "h100-8x-ib400",
    "num_gpus": 32,
    "pp": 2,
    "ep": 16,
    "seq_len": 2048,
    "global_batch": 32,
    "precision": "bf16",
    "gini": 0.3,
}


@pytest.mark.parametrize("dispatcher", ["alltoall", "deepep"])
def test_both_fidelities_of_a_scenario_agree_within_the_stated_error(dispatcher: str) -> None:
    asked = SMALL | {"dispatcher": dispatcher}
    port, exact = (simulate(Scenario.make(**asked, fidelity=name)) for name in ("port", "exact"))
    assert exact.step_s == pytest.approx(port.step_s, rel=0.02)
    assert exact.step_s > port.step_s * (1 - 1e-4)
    port, exact = (simulate(Scenario.make(**asked, cuda_graphs="full", fidelity=name)) for name in ("port", "exact"))
    exchanged = [step.step_parts_s["dispatch"] + step.step_parts_s["combine"] for step in (port, exact)]
    waited = [step.step_parts_s["wait_for_slowest"] for step in (port, exact)]
    assert exchanged[1] > exchanged[0], "in exact a rank also waits inside the exchange, for ports of its partners"
    assert exchanged[1] + waited[1] == pytest.approx(exchanged[0] + waited[0], rel=0.03)


def test_a_combine_is_its_dispatch_the_other_way_round() -> None:
    bytes_RR = pattern_RR("lognormal", 16, 8, np.random.default_rng(0)) * 1e6
    there = Hierarchical()(bytes_RR.T, even_fabric(16, 8))
    back = Backwards(forwards=Hierarchical())(bytes_RR, even_fabric(16, 8))
    for one, other in zip(there.phases, back.phases, strict=True):
        assert np.array_equal(one.bytes_RR.T, other.bytes_RR)
    legs_RR = sum(phase.bytes_RR for phase in back.phases)
    for source, target in np.argwhere(bytes_RR >= 1):
        via = back.via_RR[source, target]
        assert legs_RR[via, target] > 0
        assert via == source or legs_RR[source, via] > 0


def test_what_would_take_hours_and_uneven_groups_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(each_message, "MAX_EXCHANGES", 3)
    with pytest.raises(NotModelledError, match="more than 3, are not timed message by message; use port"):
        simulate(Scenario.make(**SMALL, fidelity="exact"))
    cluster = dataclasses.replace(Scenario.make(**SMALL).cluster)
    with pytest.raises(NotModelledError, match="lie on nodes unevenly"):
        topology_of_group(cluster, np.array([0, 0, 1, 1, 1]))
