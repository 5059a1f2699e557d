"""Many reports at once: each whole in its folder, an index that compares and links, resumable, no terminal needed."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from moesim.errors import InputError
from moesim.report.grid import ask_runs, headline_of, render_grid
from moesim.report.index_page import index_of
from moesim.study.sweep_workers import processes
from tests.test_report_runner import CELL, write_notebook

ROOT = Path(__file__).parent.parent
WORK = """
import json
from pathlib import Path
from moesim.report.parameters import read_question
question = read_question(globals())
assert gini < 0.4, "too uneven for this notebook"
step = {"step_s": 2.0 - gini, "fits": True, "binds": "waiting", "memory": {"peak_bytes": 8e9}}
(Path(out_dir) / "results.json").write_text(json.dumps({"result": {"step": step}}))
"""


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_notebook(tmp_path_factory.mktemp("notebook") / "small.ipynb", CELL, WORK))


def test_a_grid_runs_without_a_terminal_links_every_report_and_goes_on(notebook: str, tmp_path: Path) -> None:
    """Two good sets, one that is no scenario, one whose notebook fails; then the same again with --resume."""
    (tmp_path / "g.yaml").write_text("base: {ep: 8}\npoints: [{gini: 0.1}, {gini: 0.3}, {ep: 3}, {gini: 0.5}]\n")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "moesim", "report", notebook, "--grid", str(tmp_path / "g.yaml")]
    command += ["--out", str(out), "--workers", "2", "--json"]

    def run(*more: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [*command, *more], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
        )
        return done.returncode, done.stdout, done.stderr

    status, text, err = run()
    assert status == 1, err  # a notebook failed
    result = json.loads(text)["result"]
    assert [row["settings"] for row in result["reports"]] == [{"gini": 0.1}, {"gini": 0.3}]
    why = {json.dumps(row["settings"]): (row["kind"], row["error"]) for row in result["failed"]}
    assert "ep=3 does not divide" in why['{"ep": 3}'][1]
    assert why['{"gini": 0.5}'] == ("error", "AssertionError: too uneven for this notebook")
    page = (out / "index.html").read_text()
    for row in result["reports"]:
        assert (out / row["name"] / "report.html").is_file()
        assert f'href="{row["name"]}/report.html"' in page
    assert "<td class='best'>1.70 s</td>" in page
    assert {path.name for path in out.iterdir() if path.is_dir()} == {row["name"] for row in result["reports"]}
    with (out / "index.csv").open(newline="") as file:
        assert [row["step_s"] for row in csv.DictReader(file)] == ["1.9", "1.7"]
    assert run()[0] == 2
    made = {path: path.stat().st_mtime_ns for path in out.glob("*/report.html")}
    status, text, err = run("--resume")
    assert json.loads(text)["result"] == result
    assert "0 reports rendered, 2 were there" in err
    assert made == {path: path.stat().st_mtime_ns for path in out.glob("*/report.html")}


def test_a_report_that_is_gone_is_rendered_again_and_left_overs_go(notebook: str, tmp_path: Path) -> None:
    runs = ask_runs(notebook, [{"gini": 0.1}], {})
    first = render_grid(notebook, runs, tmp_path, workers=processes(1))
    (tmp_path / runs[0].name / "report.html").unlink()
    (tmp_path / f".{runs[0].name}.x1y2").mkdir()
    again = render_grid(notebook, runs, tmp_path, workers=processes(1), resume=True)
    assert (first.num_rendered, again.num_rendered) == (1, 1)
    assert again.rows == first.rows
    assert not [*tmp_path.glob(".*")]


def test_parameter_sets_are_named_by_their_values_and_by_the_notebook(notebook: str, tmp_path: Path) -> None:
    one, same, other = (
        ask_runs(notebook, [{"gini": gini}], base)[0] for gini, base in ((0.1, {}), (0.1, {}), (0.2, {}))
    )
    assert one.report_id == same.report_id != other.report_id
    assert one.name == f"gini=0.1-{one.report_id[:8]}"
    changed = write_notebook(tmp_path / "small.ipynb", CELL, WORK + "\n# changed")
    assert ask_runs(str(changed), [{"gini": 0.1}], {})[0].report_id != one.report_id
    (odd,) = ask_runs(notebook, [{"model": "../../x"}], {})
    assert "/" not in odd.name
    assert odd.refusal


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"modell": "x"}, "modell: is not a parameter"),
        ({"ep": "8"}, "must be a whole number"),
        ({"out_dir": "x"}, "is set"),
    ],
)
def test_a_parameter_that_the_notebook_does_not_have_is_refused(notebook: str, settings: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        ask_runs(notebook, [settings], {})


def test_an_index_escapes_what_it_shows_and_names_no_best_where_all_are_alike() -> None:
    row = {"name": "a&b", "settings": {"model": "<x>"}, "result": {"step_s": 1.0, "drop_fraction": None}}
    page = index_of("<t>", [row, row], [{"settings": {"ep": 3}, "kind": "error", "error": "<b>"}])
    assert "<x>" not in page
    assert "&lt;x&gt;" in page
    assert "<td class='reason'>&lt;b&gt;</td>" in page
    assert 'href="a&amp;b/report.html"' in page
    assert "class='best'" not in page


def test_the_headline_is_the_steps_or_the_single_numbers(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    assert headline_of(file) == {}
    file.write_text(json.dumps({"result": {"b": 2, "a": 1.5, "list": [1], "text": "x"}}))
    assert headline_of(file) == {"b": 2, "a": 1.5}
    file.write_text("{}")
    assert headline_of(file) == {}
