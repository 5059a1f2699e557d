"""The verbs that run something: simulate, trace, report's checks, calibrate's way out. On eight GPUs, to be quick."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from moesim.cli import app

SMALL = ["--model", "mixtral-8x7b", "--cluster", "h100-8x-ib400", "--num-gpus", "16", "--ep", "8", "--pp", "2"]
SMALL += ["--seq-len", "512", "--global-batch", "32"]
FILE = """
schema: 1
model: mixtral-8x7b
cluster: h100-8x-ib400
num_gpus: 16
parallel: {pp: 2, ep: 8}
train: {seq_len: 512, global_batch: 32}
"""


def moesim(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, list(arguments))
    return done.exit_code, done.stdout, done.stderr


def answer(*arguments: str) -> dict:
    """The JSON envelope of a call that must succeed, without its run."""
    status, out, err = moesim(*arguments, "--json")
    assert status == 0, err
    envelope = json.loads(out)
    assert set(envelope.pop("run")) >= {"wall_s", "host", "time"}
    return envelope


def test_simulate_gives_the_same_json_for_the_same_seed_and_another_for_another():
    first, second, other = (
        answer("simulate", *SMALL),
        answer("simulate", *SMALL),
        answer("simulate", *SMALL, "--seed", "7"),
    )
    assert first == second
    assert first["result"]["load_LE"] != other["result"]["load_LE"]
    assert first["inputs"]["scenario"]["seed"] == 0
    assert other["inputs"]["scenario"]["seed"] == 7
    assert {"step_s", "tokens_per_s_per_gpu", "mfu", "memory", "fits", "envelope"} <= set(first["result"])
    assert all({"part", "kind", "source"} == set(item) for item in first["provenance"])


def test_a_file_flat_options_set_and_p_say_the_same(tmp_path):
    file = tmp_path / "scenario.yaml"
    file.write_text(FILE)
    flat = answer("simulate", *SMALL, "--gini", "0.1")["inputs"]
    assert answer("simulate", str(file), "--gini", "0.1")["inputs"] == flat
    assert answer("simulate", str(file), "-p", "gini", "0.1")["inputs"] == flat
    assert answer("simulate", str(file), "--set", "gini=0.1")["inputs"] == flat
    nested = "routing.popularity={kind: lognormal, gini: 0.1}"
    assert answer("simulate", str(file), "--set", nested)["inputs"] == flat


def test_changing_the_kind_of_popularity_forgets_the_old_kinds_gini(tmp_path):
    file = tmp_path / "scenario.yaml"
    file.write_text(FILE + "routing: {popularity: {kind: lognormal, gini: 0.3}}\n")
    scenario = answer("simulate", str(file), "--popularity", "balanced")["inputs"]["scenario"]
    assert scenario["routing"]["popularity"] == {"kind": "balanced"}


def test_a_model_file_beside_the_scenario_is_found(tmp_path):
    from moesim.catalog.models import __file__ as catalog

    config = tmp_path / "mine.json"
    config.write_text((__import__("pathlib").Path(catalog).parent / "models" / "mixtral-8x7b.json").read_text())
    (tmp_path / "scenario.yaml").write_text(FILE.replace("model: mixtral-8x7b", "model: mine.json"))
    status, out, err = moesim("simulate", str(tmp_path / "scenario.yaml"))
    assert status == 0, err
    assert "Step time" in out


def test_simulate_shows_tables_of_80_columns_and_notes_on_stderr():
    status, out, err = moesim("simulate", *SMALL)
    assert status == 0
    assert "Step time" in out
    assert "experts" in out
    assert max(map(len, out.splitlines())) <= 80
    assert "moesim: note: " in err
    assert moesim("simulate", *SMALL, "-q")[2] == ""


def test_simulate_out_writes_the_same_results_each_time_and_a_trace(tmp_path):
    for name in ("a", "b"):
        assert moesim("simulate", *SMALL, "--out", str(tmp_path / name))[0] == 0
    first, second = ((tmp_path / name / "results.json").read_bytes() for name in ("a", "b"))
    assert first == second
    assert "run" not in json.loads(first)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["results.json", "trace.json"]
    events = json.loads((tmp_path / "a" / "trace.json").read_text())["traceEvents"]
    assert all(event["pid"] >= 1 and event["tid"] >= 1 for event in events)


def test_trace_writes_one_file_and_says_which_ranks(tmp_path):
    file = tmp_path / "deep" / "step.json"
    found = answer("trace", *SMALL, "--out", str(file))["result"]
    assert found["file"] == str(file)
    assert found["size_bytes"] == file.stat().st_size
    pids = {event["pid"] for event in json.loads(file.read_text())["traceEvents"]}
    assert pids == {rank + 1 for rank in found["ranks"]}
    assert found["ranks_left_out"] == []


def test_out_that_cannot_be_written_is_a_refusal(tmp_path):
    (tmp_path / "file").write_text("")
    status, _, err = moesim("simulate", *SMALL, "--out", str(tmp_path / "file" / "below"))
    assert status == 2
    assert "cannot be written" in err


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """A folder of notebooks whose planning report has a parameters cell and nothing else."""
    cell = """# Parameters
model: str = "deepseek-v3"
cluster: str = "h800-8x-ib400"
num_gpus: int = 2048
pp: int = 16
ep: int = 64
seq_len: int = 4096
global_batch: int = 1024
capacity_factor: float | None = 1.25
popularity: str = "lognormal"
gini: float = 0.25
seed: int = 0
tokens_to_train: float = 1e12
"""
    cells = [{"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": cell, "outputs": [], "id": "a"}]
    folder = tmp_path / "notebooks"
    folder.mkdir()
    (folder / "10_planning_report.ipynb").write_text(
        json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    )
    monkeypatch.setattr("moesim.report.parameters.notebooks_folder", lambda: folder)


@pytest.mark.usefixtures("notebook")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--etp", "2", "--ep", "4"], "parameters: etp: is not a parameter; got 2"),
        (["--set", "routing.popularity.cv=0.5"], "--set: routing.popularity.cv: has no parameter in the report"),
        (["-p", "epp", "8"], "parameters: epp: is not a parameter; got 8. Did you mean"),
        (["-p", "ep", "x"], "ep: must be a whole number; got 'x'"),
        (["-p", "tokens_to_train", "lots"], "tokens_to_train: must be a number; got 'lots'"),
        (["-f", "nowhere.yaml"], "nowhere.yaml: must exist"),
        (["--ep", "3"], "ep=3 does not divide"),
    ],
)
def test_report_refuses_before_a_kernel_starts(tmp_path, arguments, words, monkeypatch):
    monkeypatch.setattr("moesim.report.runner._execute", lambda *_: pytest.fail("a kernel was started"))
    status, out, err = moesim("report", *SMALL, *arguments, "--out", str(tmp_path / "out"))
    assert (status, out) == (2, ""), err
    assert words in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("notebook")
def test_report_hands_the_notebook_what_was_named_and_no_more(tmp_path, monkeypatch):
    heard = {}

    def fake(_name, parameters, out_dir, **_):
        heard.update(parameters)
        return out_dir

    monkeypatch.setattr("moesim.report.runner.run_notebook", fake)
    (tmp_path / "params.yaml").write_text("model: mixtral-8x7b\ncluster: h100-8x-ib400\nnum_gpus: 16\npp: 1\nep: 4\n")
    status, _, err = moesim("report", "-f", str(tmp_path / "params.yaml"), "-p", "ep", "8", "--seed", "3")
    assert status == 0, err
    asked = {"model": "mixtral-8x7b", "cluster": "h100-8x-ib400", "num_gpus": 16, "pp": 1, "ep": 8, "seed": 3}
    assert heard == asked, "the rest keeps the notebook's defaults"


@pytest.mark.usefixtures("notebook")
def test_report_of_a_scenario_file_hands_over_the_whole_scenario(tmp_path, monkeypatch):
    heard = {}
    monkeypatch.setattr(
        "moesim.report.runner.run_notebook", lambda _name, parameters, _out, **_: heard.update(parameters)
    )
    (tmp_path / "scenario.yaml").write_text(FILE)
    status, _, err = moesim("report", str(tmp_path / "scenario.yaml"), "--gini", "0.1", "-p", "tokens_to_train", "2e12")
    assert status == 0, err
    wanted = {"model": "mixtral-8x7b", "pp": 2, "ep": 8, "global_batch": 32, "capacity_factor": None, "gini": 0.1}
    assert wanted | {"tokens_to_train": 2e12} == {name: heard[name] for name in (*wanted, "tokens_to_train")}


@pytest.mark.usefixtures("notebook")
def test_a_scenario_file_that_says_more_than_the_notebook_can_is_refused(tmp_path):
    file = tmp_path / "scenario.yaml"
    file.write_text(FILE.replace("ep: 8}", "ep: 4, etp: 2}"))
    status, _, err = moesim("report", str(file))
    assert status == 2
    assert "report: parallel: says more than the notebook's parameters can" in err


def test_calibrate_refuses_an_unknown_device_without_loading_torch():
    code = "import sys; from moesim.cli import app\ntry: app(['calibrate', '--device', 'tpu'])\n"
    code += "except SystemExit as done: print(done.code, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "2 False"
    assert "must be auto, cuda or cpu; got 'tpu'" in done.stderr


def test_calibrate_shows_what_it_wrote_and_how_well_the_fit_predicts(tmp_path, monkeypatch):
    """The timing itself is the reference model's business; here a stand-in for it."""
    import reference_model.calibrate

    error = {"kind": "grouped", "direction": "forward", "num_points": 4, "median_fraction": 0.03, "p90_fraction": 0.1}
    profile = {
        "device": {"name": "A CPU", "torch_version": "2.13"},
        "named_model": ["cpu-small"],
        "date": "2026-01-01",
        "points": [{}] * 12,
        "errors": [error | {"bias_fraction": -0.01, "noise_fraction": 0.24}],
        "notes": ["Measured on a CPU."],
    }

    def stand_in(device, shapes, quick, out_path, progress, *, num_ranks):
        assert (device, shapes, quick, out_path, num_ranks) == ("cpu", None, True, tmp_path / "p.json", 1)
        progress(12, 12, "done")
        return profile

    monkeypatch.setattr(reference_model.calibrate, "calibrate", stand_in)
    status, out, err = moesim("calibrate", "--device", "cpu", "--quick", "--out", str(tmp_path / "p.json"))
    assert status == 0, err
    assert "A CPU" in out
    assert "3.0%" in out
    assert "24.0%" in out, "the noise stands beside the error, so that neither is read alone"
    assert "moesim: timed 12 of 12 cases" in err
    assert "moesim: note: Measured on a CPU." in err
    found = answer("calibrate", "--device", "cpu", "--quick", "--out", str(tmp_path / "p.json"))
    assert found["provenance"] == [{"part": "profile", "kind": "measured", "source": "A CPU, 2026-01-01"}]
    assert "points" not in found["result"]


def test_calibrate_says_in_one_line_that_a_device_is_not_there(monkeypatch):
    import reference_model.calibrate

    def refuse(*_, **__):
        raise ValueError("device: must be one that is there; got 'cuda'")

    monkeypatch.setattr(reference_model.calibrate, "calibrate", refuse)
    status, out, err = moesim("calibrate", "--device", "cuda")
    assert (status, out) == (2, "")
    assert err == "moesim: error: calibrate: device: must be one that is there; got 'cuda'\n"


def test_calibrate_refuses_a_dense_model():
    status, _, err = moesim("calibrate", "--model", "llama-3-8b")
    assert status == 2
    assert "must have MoE layers to time; got 'llama-3-8b'" in err
