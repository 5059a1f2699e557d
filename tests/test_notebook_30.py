"""The placement notebook: its parameters, that it runs whole, that its files agree with its page."""

import json
from pathlib import Path

import pytest

from moesim.errors import InputError
from moesim.report.parameters import find_notebook
from moesim.report.placement_export import read_lists
from moesim.report.runner import run_notebook
from tests.notebook_cases import SMOKE, loads_nothing, parameter_files, question_of, takes_flat_names_and

NOTEBOOK = find_notebook("30_expert_placement")
OWN = {"policies", "slots", "out_dir"}
SMALL = SMOKE["30_expert_placement"]


def test_its_parameters_are_the_scenarios_flat_names_and_its_own() -> None:
    assert takes_flat_names_and(NOTEBOOK, OWN)


@pytest.mark.parametrize("path", parameter_files(NOTEBOOK), ids=lambda path: path.stem)
def test_every_parameter_file_asks_a_valid_question(path: Path) -> None:
    read_lists(question_of(NOTEBOOK, path).own)


def test_its_lists_are_read_strictly() -> None:
    assert read_lists({"policies": " eplb , search", "slots": ""}).policies == ("eplb", "search")
    with pytest.raises(InputError, match=r"policy: is not known; got 'serch'"):
        read_lists({"policies": "serch", "slots": ""})
    for slots in ("64;80", "64,-8", "0"):
        with pytest.raises(InputError, match="slots: must be whole numbers"):
            read_lists({"policies": "", "slots": slots})


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_notebook("30_expert_placement", SMALL, tmp_path_factory.mktemp("placement") / "out", show_progress=False)


def test_it_renders_whole(rendered: Path) -> None:
    names = {"report.html", "report.ipynb", "results.json", "results.csv", "physical_to_logical.json"}
    assert {path.name for path in rendered.iterdir()} == names
    page = (rendered / "report.html").read_text()
    assert page.count("<svg") == 5
    assert page.count('class="takeaway"') >= 9
    for words in ("Where should experts live?", "How many copies?", "What does moving cost?", "olmoe-1b-7b"):
        assert words in page
    assert "Traceback" not in page
    assert loads_nothing(page)


def test_the_page_says_what_the_results_hold(rendered: Path) -> None:
    result = json.loads((rendered / "results.json").read_text())["result"]
    page = (rendered / "report.html").read_text()
    search = next(point for point in result["by_policy"] if point["policy"] == "search")
    assert f"{search['max_mean']:.3f} times the mean" in page
    assert f"{result['base']['max_mean']:.3f} today (contiguous)" in page
    rows = json.loads((rendered / "physical_to_logical.json").read_text())["physical_to_logical_map"]
    assert len(rows) == 16
    assert all(sorted(row) == list(range(64)) for row in rows)
    assert (rendered / "results.csv").read_text().startswith("section,name,x,value,unit\n")


def test_a_typo_stops_before_a_kernel_starts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"polices: is not a parameter.*Did you mean policies"):
        run_notebook("30_expert_placement", {**SMALL, "polices": "eplb"}, tmp_path / "out", show_progress=False)
