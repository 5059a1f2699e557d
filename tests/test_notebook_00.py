"""The tour: its parameters, that it runs whole in seconds, that its files agree with its page, that its links lead."""

import json
import re
from pathlib import Path

import nbformat
import papermill

from moesim.leaves import LEAVES
from moesim.report.parameters import find_notebook, notebooks_folder, parameters_of
from moesim.report.runner import run_notebook
from tests.notebook_cases import SMOKE

NOTEBOOK = find_notebook("00_tour")
OWN = {"tokens_to_train", "price_per_gpu_hour", "out_dir"}


def test_its_parameters_are_the_scenarios_flat_names_and_its_own() -> None:
    assert set(parameters_of(NOTEBOOK)) == {*LEAVES, *OWN}
    assert set(papermill.inspect_notebook(NOTEBOOK)) == {*LEAVES, *OWN}


def test_its_links_lead_to_notebooks() -> None:
    text = "\n".join(cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells)
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) >= 7
    for link in links:
        assert (notebooks_folder() / link).is_file(), link


def test_it_runs_whole_and_its_files_agree_with_its_page(tmp_path: Path) -> None:
    out = run_notebook(NOTEBOOK, SMOKE[NOTEBOOK.stem], tmp_path / "out", show_progress=False)
    result = json.loads((out / "results.json").read_text())["result"]
    html = (out / "report.html").read_text()
    page = re.sub(r"<[^>]+>", " ", html)
    assert html.count("<svg") == 5
    assert f"{result['step']['tokens_per_s_per_gpu']:,.0f} tokens per second and GPU" in page
    assert f"{result['run']['days']['p10']:,.0f} to {result['run']['days']['p90']:,.0f} days" in page
    assert "at 2 a GPU-hour" in page
    assert result["fits"] is (result["step"]["headroom_bytes"] >= 0)
    rows = (out / "results.csv").read_text().splitlines()
    assert f"placed,step_s,,{result['placed']['step_s']},s" in rows
