"""The goodput notebook: its parameters, that it runs whole, that its files agree with its page."""

import json
import re
from pathlib import Path

import papermill
import pytest

from moesim.errors import InputError
from moesim.leaves import LEAVES
from moesim.report.goodput_export import plan_of
from moesim.report.parameters import ask, check_parameters, find_notebook, parameters_of
from moesim.report.runner import run_notebook
from tests.notebook_cases import SMOKE

NOTEBOOK = find_notebook("45_goodput_and_cost")


def test_its_parameters_are_the_scenarios_flat_names_and_its_own() -> None:
    known = parameters_of(NOTEBOOK)
    assert set(LEAVES) <= set(known)
    assert set(papermill.inspect_notebook(NOTEBOOK)) == set(known)
    own = ask(check_parameters({}, known)).own
    assert plan_of(own).tokens == 14.8e12
    with pytest.raises(InputError, match="checkpoint_interval_s: must be positive"):
        plan_of({**own, "checkpoint_interval_min": -5.0})


def test_it_runs_whole_and_its_files_agree_with_its_page(tmp_path: Path) -> None:
    out = run_notebook(NOTEBOOK, SMOKE[NOTEBOOK.stem], tmp_path / "out", show_progress=False)
    result = json.loads((out / "results.json").read_text())["result"]
    page = re.sub(r"<[^>]+>", " ", (out / "report.html").read_text())
    days = result["days"]
    assert f"{days['p50']:,.1f} days in the median, {days['p10']:,.1f} to {days['p90']:,.1f} in eight of ten" in page
    assert "a price that you gave" in page
    rows = (out / "results.csv").read_text().splitlines()
    assert f"run,days,p50,{days['p50']},days" in rows
    assert sum(result["parts_fraction"].values()) == pytest.approx(1)
