"""Notebooks are thin, equal to their text twins, without outputs, and run strictly."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import papermill
import pytest
from papermill.exceptions import PapermillExecutionError

from moesim.door import read_yaml
from moesim.leaves import LEAVES
from moesim.report.export import results_json
from moesim.report.parameters import ask, check_parameters, find_notebook, notebooks_folder, parameters_of
from moesim.report.runner import FILES, run_notebook
from moesim.scenario import DEFAULTS, Scenario
from moesim.study.advice import changes
from moesim.study.planning import planning_study
from tests.notebook_cases import SMOKE, loads_nothing

NOTEBOOKS = sorted(notebooks_folder().glob("*.ipynb"))
PARAMETER_FILES = sorted(p for p in (notebooks_folder() / "params").glob("*.yaml") if not p.stem.endswith("-model"))
PLANNING = find_notebook("10_planning_report")
SMALL = SMOKE[PLANNING.stem]


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def comparable(notebook: Any) -> list[tuple[str, str, list[str]]]:
    return [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in notebook.cells]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_equals_its_text_twin(path: Path) -> None:
    assert comparable(read(path)) == comparable(jupytext.read(path.with_suffix(".py"))), "run tools/make_notebooks.py"


def test_every_notebook_has_a_smoke_size() -> None:
    assert set(SMOKE) == {path.stem for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_lies_in_git_without_outputs(path: Path) -> None:
    for cell in read(path).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_defines_nothing_and_converts_no_units(path: Path) -> None:
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    work = "\n".join(cell.source for cell in cells if "parameters" not in cell.metadata.get("tags", []))
    assert not re.search(r"^\s*(def|class|lambda)\b", work, flags=re.M)
    assert not re.search(r"[*/]\s*(1e\d|10\*\*|2\*\*|1024|1000)", work)
    assert "assert " in cells[-1].source


def test_parameters_are_the_scenarios_flat_names_and_the_reports_own() -> None:
    assert set(parameters_of(PLANNING)) == {*LEAVES, "tokens_to_train", "out_dir"}


def test_the_default_question_is_the_scenarios() -> None:
    known = parameters_of(PLANNING)
    assert {name: known[name].default for name in DEFAULTS} == dict(DEFAULTS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_simulates_as_a_scenario_does_of_which_only_the_question_is_told(path: Path) -> None:
    known, scenario = parameters_of(path), Scenario.make(**DEFAULTS)
    for name in {"fidelity", "replicas", "seed"} & set(known):
        assert known[name].default == getattr(scenario, name)


def test_papermill_knows_every_parameter_too() -> None:
    assert set(papermill.inspect_notebook(PLANNING)) == set(parameters_of(PLANNING))


@pytest.mark.parametrize("path", PARAMETER_FILES, ids=lambda path: path.stem)
def test_every_parameter_file_asks_a_valid_question(path: Path) -> None:
    given = read_yaml(path)
    question = ask(check_parameters(given, parameters_of(PLANNING)), sorted(given))
    assert question.scenario.cluster.num_gpus == given["num_gpus"]


def test_plain_papermill_stops_at_an_unknown_parameter(tmp_path: Path) -> None:
    with pytest.raises(PapermillExecutionError, match=r"num_gpu: is not a parameter.*Did you mean num_gpus"):
        papermill.execute_notebook(
            PLANNING, tmp_path / "out.ipynb", {"num_gpu": 8}, kernel_name="python3", progress_bar=False
        )


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_notebook("10_planning_report", SMALL, tmp_path_factory.mktemp("report") / "out", show_progress=False)


def test_the_planning_report_renders_whole(rendered: Path) -> None:
    assert {path.name for path in rendered.iterdir()} == set(FILES)
    page = (rendered / "report.html").read_text()
    assert page.count("<svg") == 10
    for words in ("Does it fit?", "How fast is it?", "What binds?", "What to change first?", "olmoe-1b-7b"):
        assert words in page
    assert "Traceback" not in page


def test_the_rendered_page_fetches_nothing(rendered: Path) -> None:
    page = (rendered / "report.html").read_text()
    assert loads_nothing(page)
    assert not re.search(r"@import|url\((?!#)", page)
    assert "<script" not in page


def test_the_trace_opens_in_perfetto(rendered: Path) -> None:
    events = json.loads((rendered / "trace.json").read_text())["traceEvents"]
    assert any(event["ph"] == "X" for event in events)


def test_another_process_finds_the_same_results_byte_for_byte(rendered: Path) -> None:
    question = ask(check_parameters(SMALL, parameters_of(PLANNING)), sorted(SMALL))
    study = planning_study(question.scenario, question.own["tokens_to_train"])
    assert results_json(study, changes(question.scenario)) == (rendered / "results.json").read_text()


def test_results_name_the_question_and_nothing_of_the_run(rendered: Path) -> None:
    results = json.loads((rendered / "results.json").read_text())
    assert results["inputs"]["scenario"]["model"] == "olmoe-1b-7b"
    assert sum(results["result"]["step"]["step_parts_s"].values()) == pytest.approx(results["result"]["step"]["step_s"])
    assert "run" not in results
    assert str(rendered) not in (rendered / "results.json").read_text()
