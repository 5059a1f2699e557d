"""The runner refuses bad parameters before a kernel starts, and leaves a whole report or nothing."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import nbformat
import pytest

from moesim.cli.report import _kept_of_the_notebook
from moesim.errors import InputError, MoesimError, NotModelledError
from moesim.report import parameters, runner
from moesim.report.parameters import check_parameters, find_notebook, parameters_of, parse_cell, read_question

CELL = """# Parameters: what is asked
model: str = "mixtral-8x7b"
cluster: str = "h100-8x-ib400"
num_gpus: int = 64
ep: int = 8
gini: float = 0.25
popularity: str = "lognormal"
capacity_factor = None  # type: float|None room per expert
tokens_to_train: float = 1e12
out_dir: str = ""
"""
WORK = """
from pathlib import Path
from moesim.report.parameters import read_question
question = read_question(globals())
for name in ("results.json", "results.csv", "trace.json"):
    (Path(out_dir) / name).write_text("{}")
"""


def write_notebook(path: Path, *cells: str) -> Path:
    made = [nbformat.v4.new_code_cell(source) for source in cells]
    made[0].metadata["tags"] = ["parameters"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A small report"), *made])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)
    return path


@pytest.fixture
def notebook(tmp_path: Path) -> Path:
    return write_notebook(tmp_path / "small.ipynb", CELL, WORK)


def no_kernel(*_: Any, **__: Any) -> None:
    raise AssertionError("a kernel was started")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"modell": "x"}, "modell: is an unknown key|modell: is not a parameter"),
        ({"ep": "8"}, "ep: must be a whole number"),
        ({"ep": 8.5}, "ep: must be a whole number"),
        ({"ep": True}, "ep: must be a whole number"),
        ({"model": 7}, "model: must be a text"),
        ({"gini": float("nan")}, "gini: must be finite"),
        ({"ep": 3}, "ep=3 does not divide"),
        ({"num_gpus": 63}, "must fill whole nodes of 8"),
        ({"tokens_to_train": -1.0}, "tokens_to_train: must be positive"),
        ({"popularity": "balanced", "gini": 0.3}, "gini: is an unknown key"),
        ({"out_dir": "elsewhere"}, "out_dir: is set by whoever runs the notebook"),
        ({"model": "mixtral-8x7"}, "Did you mean mixtral-8x7b"),
    ],
)
def test_a_bad_parameter_is_refused_before_a_kernel_starts(
    notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr(runner, "_execute", no_kernel)
    with pytest.raises(InputError, match=words):
        runner.run_notebook(notebook, given, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_parameter_gets_its_near_match(notebook: Path) -> None:
    with pytest.raises(InputError, match="Did you mean num_gpus"):
        check_parameters({"num_gpu": 8}, parameters.parameters_of(notebook))


def test_null_is_accepted_only_where_the_annotation_says_so(notebook: Path) -> None:
    known = parameters.parameters_of(notebook)
    assert check_parameters({"capacity_factor": None}, known)["capacity_factor"] is None
    assert check_parameters({"capacity_factor": 2}, known)["capacity_factor"] == 2.0
    with pytest.raises(InputError, match="ep: must be a whole number"):
        check_parameters({"ep": None}, known)


def test_a_default_gini_does_not_contradict_a_popularity_without_one(notebook: Path) -> None:
    values = check_parameters({"popularity": "balanced"}, parameters.parameters_of(notebook))
    assert parameters.ask(values, ["popularity"]).scenario.routing.popularity.kind == "balanced"


@pytest.mark.parametrize(
    "line",
    [
        "ep = 64",
        "ep: int = 8 * 8",
        "ep: list = []",
        "import os",
        "ep: int | str = 3",
        "ep: int",
        "ep = 3  # type: list",
    ],
)
def test_a_parameters_cell_holds_only_annotated_literals(line: str) -> None:
    with pytest.raises(InputError):
        parse_cell(line)


def test_the_notebook_itself_refuses_what_papermill_only_warns_about() -> None:
    values = {name: p.default for name, p in parse_cell(CELL).items()}
    cells = ["", CELL, "# Parameters\nmodell = 'x'\n", "read_question(globals())"]
    with pytest.raises(InputError, match="modell: is not a parameter"):
        read_question(values | {"In": cells, "modell": "x"})
    with pytest.raises(InputError, match="ep: must be a whole number"):
        read_question(values | {"In": ["", CELL, '# Parameters\nep = "8"\n'], "ep": "8"})
    question = read_question(values | {"In": ["", CELL, "mine = 3"], "mine": 3})
    assert question.scenario.parallel.ep == 8
    assert question.own["tokens_to_train"] == 1e12


def test_running_the_parameters_cell_again_forgets_an_older_mistake() -> None:
    values = {name: p.default for name, p in parse_cell(CELL).items()}
    cells = ["", CELL + "modell: str = 'x'\n", CELL]
    assert read_question(values | {"In": cells, "modell": "x"}).scenario.model.name == "mixtral-8x7b"


def test_the_check_needs_the_parameters_cell_to_have_run() -> None:
    with pytest.raises(InputError, match="must have run before this cell"):
        read_question({"In": ["", "x = 1"]})


def test_an_unknown_notebook_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be a notebook of moesim or a path to one"):
        find_notebook(tmp_path / "absent.ipynb")


def test_a_run_leaves_the_whole_report_and_nothing_else(notebook: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    out.mkdir(parents=True)
    (out / "mine.txt").write_text("kept")
    assert runner.run_notebook(notebook, {"ep": 4}, out) == out
    assert {path.name for path in out.iterdir()} == {*runner.FILES, "mine.txt"}
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    executed = (out / "report.ipynb").read_text()
    assert "ep = 4" in executed
    assert "/.out." not in executed
    assert "<h1" in (out / "report.html").read_text()


def test_a_run_that_fails_leaves_nothing_and_says_the_users_error_in_one_line(tmp_path: Path) -> None:
    failing = 'from moesim.errors import InputError\nraise InputError("owner", "field", "must be so", 1)'
    notebook = write_notebook(tmp_path / "failing.ipynb", CELL, failing)
    with pytest.raises(MoesimError, match=r"^owner: field: must be so; got 1$"):
        runner.run_notebook(notebook, {}, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["failing.ipynb"]


def test_a_file_in_the_place_of_the_folder_is_refused(notebook: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(InputError, match="must be a folder"):
        runner.run_notebook(notebook, {}, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "a file"


def test_an_unknown_kernel_is_refused(notebook: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="kernel: must be installed"):
        runner.run_notebook(notebook, {}, tmp_path / "out", kernel="cobol")


def test_a_refusal_is_quick(notebook: Path, tmp_path: Path) -> None:
    began_s = time.perf_counter()
    with pytest.raises((InputError, NotModelledError)):
        runner.run_notebook(notebook, {"ep": 5}, tmp_path / "out")
    assert time.perf_counter() - began_s < 1.0


def test_a_report_says_what_it_takes_from_its_notebook_and_simulate_would_not() -> None:
    known = parameters_of(find_notebook("10_planning_report"))
    (told,) = _kept_of_the_notebook({"model": "mixtral-8x7b", "ep": 8}, known)
    assert "global_batch=15360 (1024)" in told
    assert "precision=fp8 (bf16)" in told
    assert "pp=16 (1)" in told
    assert " ep=" not in told
    assert _kept_of_the_notebook({"ep": 8}, known) == ()
