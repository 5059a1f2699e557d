"""From the roofline to the step: each added thing costs, layers and path add up, and the path is one of waiting."""

from __future__ import annotations

import itertools
import json

import pytest
from typer.testing import CliRunner

from moesim.cli import app
from moesim.metrics.critical import critical_path
from moesim.report.gap_figures import about_gap, waterfall
from moesim.scenario import Scenario
from moesim.study.gap import explain_gap
from moesim.timeline.step import run_step

SMALL = {
    "model": "qwen3-30b-a3b",
    "cluster": "h100-8x-ib400",
    "num_gpus": 32,
    "ep": 16,
    "pp": 2,
    "global_batch": 128,
    "gini": 0.3,
}


@pytest.fixture(scope="module")
def gap():
    return explain_gap(Scenario.make(**SMALL, policy="eplb"))


def test_each_added_thing_costs_and_placing_by_load_gives_some_of_the_skew_back(gap):
    assert [step.name for step in gap.steps] == ["roofline", "kernels", "host", "balanced", "skewed", "placed"]
    added = gap.added_s
    assert sum(added.values()) == pytest.approx(gap.steps[-1].step_s)
    assert all(added[name] > 0 for name in ("roofline", "kernels", "host", "balanced", "skewed"))
    assert -added["skewed"] < added["placed"] < 0
    assert gap.steps[-1].step_s == run_step(Scenario.make(**SMALL, policy="eplb")).step_s


def test_free_links_leave_no_communication_and_even_routing_no_wait(gap):
    for step in gap.steps[:3]:
        assert step.parts_s["dispatch"] + step.parts_s["gradient_reduction"] < 1e-6 * step.step_s
    for step in gap.steps[:4]:
        assert step.parts_s["wait_for_slowest"] < 1e-6 * step.step_s


def test_every_layer_has_its_seconds_in_every_run(gap):
    for step in gap.steps:
        assert len(step.layer_s) == 48
        assert max(step.layer_s.values()) < step.step_s
    first, last = gap.steps[0].layer_s, gap.steps[-1].layer_s
    assert all(last[layer] > first[layer] for layer in first)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"pp": 4, "ep": 8, "schedule": "zb-h1"},
        {"schedule": "gpipe", "overlap": "grad_reduce"},
        {"pp": 4, "ep": 8, "vpp": 2, "overlap": "forward_backward"},
        {"schedule": "dualpipe"},
        {"pp": 1, "ep": 8},
    ],
    ids=str,
)
def test_operations_of_the_critical_path_follow_one_another_from_start_to_end(asked):
    trace = run_step(Scenario.make(**SMALL | asked))
    path = critical_path(trace)
    assert path.operations[0].start_s == pytest.approx(0.0, abs=1e-9)
    for one, after in itertools.pairwise(path.operations):
        assert after.start_s == pytest.approx(one.start_s + one.seconds, rel=1e-9)
        shared = set(one.micro_batches) & set(after.micro_batches)
        assert (one.stage, one.block) == (after.stage, after.block) or shared
    assert sum(path.parts_s.values()) == pytest.approx(trace.step_s)
    assert path.parts_s["wait_for_slowest"] >= 0
    assert "pipeline_bubble" not in path.parts_s


def test_the_verb_tells_the_gap_where_asked():
    arguments = ["simulate", "--json", "--gap"]
    for name, value in (SMALL | {"num_gpus": 16, "pp": 1}).items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    done = CliRunner().invoke(app, arguments)
    told = json.loads(done.stdout)["result"]
    assert [step["name"] for step in told["gap"]["steps"]] == ["roofline", "kernels", "host", "balanced", "skewed"]
    assert told["gap"]["steps"][-1]["step_s"] == told["step_s"]
    assert told["gap"]["critical_path"]["num_operations"] == 16


def test_the_report_shows_the_waterfall_and_says_what_costs_most(gap):
    picture = waterfall(gap)
    ratio = gap.steps[-1].step_s / gap.steps[0].step_s
    assert picture.alt.startswith(f"The step takes {ratio:.1f} times the roofline")
    costs = {step.words: gap.added_s[step.name] for step in gap.steps[1:]}
    assert max(costs, key=costs.get) in about_gap(gap).text
