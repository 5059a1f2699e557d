"""The validation notebook: it runs whole, its page says what its files say, its design is found beside it."""

import json
import re
from pathlib import Path

import pytest

from moesim.errors import InputError
from moesim.report.parameters import find_notebook
from moesim.report.runner import run_notebook
from moesim.report.validate_export import design_of
from moesim.report.validate_figures import used_share
from moesim.study.validate import Gate
from tests.notebook_cases import smoke

NOTEBOOK = find_notebook("70_validate_design")


def test_the_design_shipped_beside_the_notebooks_is_found_and_others_are_refused_by_name() -> None:
    assert design_of({"design": "70_validate_design/design.yaml"}).scenario.model.name == "qwen3-30b-a3b"
    with pytest.raises(InputError, match="nowhere"):
        design_of({"design": "nowhere.yaml"})


def test_it_runs_whole_and_its_page_says_what_its_files_say(tmp_path: Path) -> None:
    out = run_notebook(NOTEBOOK, smoke(NOTEBOOK.stem, tmp_path), tmp_path / "out", show_progress=False)
    result = json.loads((out / "results.json").read_text())["result"]
    page = re.sub(r"<[^>]+>", " ", (out / "report.html").read_text())
    failed = [gate for gate in result["gates"] if gate["status"] == "fail"]
    assert "mfu" in [gate["name"] for gate in failed]
    assert f"No: {len(failed)} of {len(result['gates'])} gates failed." in page
    assert (out / "junit.xml").read_text().count("<failure") == len(failed)


def test_a_gate_right_of_the_line_is_one_that_does_not_keep_its_limit() -> None:
    def gate(value: float, limit: float, sense: str) -> Gate:
        return Gate(
            name="mfu", status="pass", value=value, limit=limit, warn=None, sense=sense, unit="times", evidence=""
        )  # type: ignore[arg-type]

    assert used_share(gate(0.2, 0.1, "least")) == pytest.approx(0.5)
    assert used_share(gate(0.2, 0.1, "most")) == pytest.approx(2.0)
    assert used_share(gate(-0.2, 0.1, "least")) > 1e9  # memory that lacks
    assert used_share(gate(0.0, 0.0, "most")) == 0.0
