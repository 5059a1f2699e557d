"""The memory notebook: its parameters, that it runs whole, that its files agree with its page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moesim.errors import InputError
from moesim.report import memory_figures
from moesim.report.memory_export import read_ginis
from moesim.report.memory_sentences import about_fit, about_skew, verdict
from moesim.report.parameters import find_notebook
from moesim.report.runner import run_notebook
from moesim.scenario import Scenario
from moesim.study.memory import MemoryStudy, memory_study
from tests.notebook_cases import SMOKE, loads_nothing, parameter_files, question_of, takes_flat_names_and

NOTEBOOK = find_notebook("12_memory")
OWN = {"ginis", "out_dir"}
SMALL = {name: value for name, value in SMOKE[NOTEBOOK.stem].items() if name not in OWN} | {"profile": "datasheet"}


@pytest.fixture(scope="module")
def study() -> MemoryStudy:
    return memory_study(Scenario.make(**SMALL), ginis=(0.0, 0.4))


def test_its_parameters_are_the_scenarios_flat_names_and_its_own() -> None:
    assert takes_flat_names_and(NOTEBOOK, OWN)


@pytest.mark.parametrize("path", parameter_files(NOTEBOOK), ids=lambda path: path.stem)
def test_every_parameter_file_asks_a_valid_question(path: Path) -> None:
    read_ginis(question_of(NOTEBOOK, path).own)


@pytest.mark.parametrize("ginis", ["0.4", "0.4,0.2", "0,1", "0;0.2"])
def test_its_list_of_skews_is_read_strictly(ginis: str) -> None:
    with pytest.raises(InputError, match="ginis: must be at least two numbers"):
        read_ginis({"ginis": ginis})


def test_what_recomputes_or_offloads_trades_memory_for_time(study: MemoryStudy) -> None:
    asked = study.trades[0]
    assert asked.leaves == {}
    named = {point.name: point for point in study.trades}
    assert named["recompute=full"].peak_bytes < asked.peak_bytes
    assert named["recompute=full"].step_s > 1.1 * asked.step_s
    assert named["offload=optimizer"].peak_bytes < asked.peak_bytes
    worth = study.worth_it()
    assert [point.step_s for point in worth] == sorted(point.step_s for point in worth)
    peaks = [point.peak_bytes for point in worth]
    assert peaks == sorted(peaks, reverse=True)


def test_a_study_that_fits_says_so_and_one_that_does_not_says_what_would(study: MemoryStudy) -> None:
    assert about_fit(study).text.startswith("Yes: the fullest GPU needs")
    tight = Scenario.make(**SMALL | {"micro_batch": 16, "pp": 1, "seq_len": 4096, "num_gpus": 8, "global_batch": 128})
    lacking = memory_study(tight, ginis=(0.0, 0.4))
    assert not lacking.step.fits
    assert lacking.ways
    assert lacking.ways[0].name in about_fit(lacking).text


def test_more_skew_needs_more(study: MemoryStudy) -> None:
    assert study.over_skew[1].p99_bytes > study.over_skew[0].p99_bytes
    assert "more than at Gini 0." in about_skew(study).text


def test_a_dense_model_has_no_skew() -> None:
    dense = {"model": "llama-3-8b", "cluster": "h100-8x-ib400", "num_gpus": 8, "global_batch": 8, "pp": 2}
    scenario = Scenario.make(**dense)
    told = memory_study(scenario)
    assert told.over_skew == ()
    assert len(verdict(scenario, told).sentences) == 4


def test_figures_say_in_words_what_they_show(study: MemoryStudy) -> None:
    assert "Peak of the fullest GPU by stage: stage 0" in memory_figures.timeline(study).alt
    assert "recompute=full" in memory_figures.trades(study).alt
    assert "Gini 0.4" in memory_figures.over_skew(study).alt


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_notebook(NOTEBOOK, SMOKE[NOTEBOOK.stem], tmp_path_factory.mktemp("memory") / "out", show_progress=False)


def test_it_renders_whole(rendered: Path) -> None:
    assert {path.name for path in rendered.iterdir()} == {"report.html", "report.ipynb", "results.json", "results.csv"}
    page = (rendered / "report.html").read_text()
    assert page.count("<svg") == 4
    for words in ("Does it fit?", "What trades memory for time?", "olmoe-1b-7b"):
        assert words in page
    assert "Traceback" not in page
    assert loads_nothing(page)


def test_the_page_says_what_the_results_hold(rendered: Path) -> None:
    result = json.loads((rendered / "results.json").read_text())["result"]
    assert result["fits"]
    assert len(result["timeline"]) == 2 * (2 * 4 + 1)
    assert (rendered / "results.csv").read_text().startswith("section,name,x,value,unit\n")
