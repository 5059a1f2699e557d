"""The sizing notebook: its parameters, kinds and sizes as whole steps have them, that its files agree with its page."""

import json
import re
from pathlib import Path

import papermill
import pytest

from moesim.errors import InputError
from moesim.leaves import LEAVES
from moesim.report.parameters import ask, check_parameters, find_notebook, parameters_of
from moesim.report.runner import run_notebook
from moesim.report.sizing_export import read_kinds
from moesim.report.sizing_sentences import verdict
from moesim.scenario import Scenario
from moesim.study.goodput import RunPlan
from moesim.study.sizing import SizingStudy, sizing_study
from moesim.timeline.step import run_step
from tests.notebook_cases import OLMOE_ON_16, SMOKE

NOTEBOOK = find_notebook("40_cluster_sizing")
OWN = {"tokens_to_train", "clusters", "sizes", "prices", "currency", "deadline_days", "gini_is_known", "out_dir"}


@pytest.fixture(scope="module")
def study() -> SizingStudy:
    # NVL72: 16 GPUs fill no rack; 24 cannot hold 8 experts' ranks twice over.
    return sizing_study(Scenario.make(**OLMOE_ON_16), RunPlan(tokens=1e12), clusters=["gb200-nvl72"], sizes=[8, 16, 24])


def test_its_parameters_are_the_scenarios_flat_names_and_its_own() -> None:
    assert set(parameters_of(NOTEBOOK)) == {*LEAVES, *OWN}
    assert set(papermill.inspect_notebook(NOTEBOOK)) == {*LEAVES, *OWN}
    own = ask(check_parameters({}, parameters_of(NOTEBOOK))).own
    assert read_kinds(own).clusters == ("h200-8x-ib400", "b200-8x-ib400")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sizes": "64,32"}, "sizes: must be numbers of GPUs"),
        ({"sizes": "x"}, "sizes: must be numbers of GPUs"),
        ({"prices": "h801:2"}, r"prices: must be GPU:PRICE.*h800"),
        ({"prices": "h800:3..2"}, r"prices: h800: must be LOW\.\.HIGH"),
    ],
)
def test_lists_are_read_strictly(changes: dict[str, str], told: str) -> None:
    with pytest.raises(InputError, match=told):
        read_kinds({"clusters": "", "sizes": "", "prices": ""} | changes)


def test_every_kind_and_size_is_the_engines_step_or_says_why_not(study: SizingStudy) -> None:
    assert [(p.cluster, p.num_gpus) for p in study.points] == [
        (kind, size) for kind in ("h100-8x-ib400", "gb200-nvl72") for size in (8, 16, 24)
    ]
    for point in study.points:
        if point.step_s is None:
            assert point.reason
            continue
        assert point.days is not None
        assert point.gpu_hours is not None
        assert point.gpu_hours.p50 == pytest.approx(point.days.p50 * 24 * point.num_gpus)
    asked = next(point for point in study.points if point.num_gpus == 16)
    assert asked.step_s == pytest.approx(run_step(study.scenario).step_s, rel=0.01)
    assert study.fastest is not None
    assert study.fastest.days == min((p.days for p in study.fitting if p.days), key=lambda found: found.p50)


def test_a_deadline_that_none_meets_is_said(study: SizingStudy) -> None:
    late = SizingStudy(scenario=study.scenario, run=study.run, deadline_days=0.5, points=study.points)
    assert late.cheapest is None
    assert "None is done within 0.5 days" in str(verdict(late).sentences[0])


def test_it_runs_whole_and_its_files_agree_with_its_page(tmp_path: Path) -> None:
    out = run_notebook(NOTEBOOK, SMOKE[NOTEBOOK.stem], tmp_path / "out", show_progress=False)
    result = json.loads((out / "results.json").read_text())["result"]
    page = re.sub(r"<[^>]+>", " ", (out / "report.html").read_text())
    for point in result["points"]:
        assert f"{point['days']['p10']:,.0f} to {point['days']['p90']:,.0f}" in page
        assert point["cost"]["p50"] > 0
    assert "take the least money" in page
    rows = (out / "results.csv").read_text().splitlines()
    assert f"h100-8x-ib400,days_p50,8,{result['points'][0]['days']['p50']},days" in rows
