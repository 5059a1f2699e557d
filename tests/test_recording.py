"""A recorded routing as a scenario's popularity, by its flat name: file, options, -p, parameter files, notebooks."""

from pathlib import Path

import numpy as np
import pytest

from moesim.describe.model import Router
from moesim.describe.workload import Lognormal, Recorded
from moesim.errors import InputError
from moesim.report.parameters import ask, check_parameters, find_notebook, parameters_of
from moesim.report.runner import run_notebook
from moesim.routing.sampler import draw_choices
from moesim.scenario import Scenario
from moesim.study.routed import routed_load
from moesim.study.simulate import simulate
from tests.test_cli_runs import answer, moesim

SIZES = {"model": "olmoe-1b-7b", "cluster": "h100-8x-ib400", "num_gpus": 16, "ep": 8, "pp": 2, "seq_len": 512}
SIZES |= {"global_batch": 32}
OPTIONS = [text for name, value in SIZES.items() for text in ("--" + name.replace("_", "-"), str(value))]
FILE = """
model: olmoe-1b-7b
cluster: h100-8x-ib400
num_gpus: 16
parallel: {pp: 2, ep: 8}
train: {seq_len: 512, global_batch: 32}
"""
NOTEBOOKS = ("10_planning_report", "20_routing_and_drops", "30_expert_placement")


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Router replay of 2,000 tokens through OLMoE's 16 layers of 64 experts, wilder than any default."""
    rng = np.random.default_rng(3)
    weights_LE = rng.normal(0.0, 1.2, (16, 64))
    drawn = [draw_choices(weights_E, Router(top_k=8), 2000, rng, engine="numpy") for weights_E in weights_LE]
    path = tmp_path_factory.mktemp("trace") / "trace.npy"
    np.save(path, np.stack(drawn, axis=1))
    return path


def test_the_flat_name_is_the_recorded_popularity(trace: Path) -> None:
    asked = Scenario.make(**SIZES, recording=str(trace))
    assert asked.routing.popularity == Recorded(file=str(trace))
    assert simulate(asked).load_LE == pytest.approx(simulate(Scenario.make(**SIZES).with_recording(trace)).load_LE)
    assert asked.with_(gini=0.1).routing.popularity == Lognormal(gini=0.1)
    assert Scenario.make(**SIZES, gini=0.4).with_(recording=str(trace)) == asked
    assert asked.with_(recording=None).routing.popularity == Lognormal()


def test_every_way_of_asking_for_it_asks_the_same(trace: Path, tmp_path: Path) -> None:
    said = {
        "plain": FILE,
        "recorded": FILE + f"routing: {{recording: {trace}}}\n",
        "skewed": FILE + "routing: {popularity: {kind: zipf, gini: 0.4}}\n",
    }
    files = {name: tmp_path / f"{name}.yaml" for name in said}
    for name, file in files.items():
        file.write_text(said[name])
    ways = [
        [str(files["recorded"])],
        [str(files["plain"]), "--recording", str(trace)],
        [str(files["skewed"]), "--recording", str(trace)],
        [str(files["skewed"]), "--set", f"routing.recording={trace}"],
        [*OPTIONS, "-p", "recording", str(trace)],
        [*OPTIONS, "--set", f"recording={trace}"],
    ]
    found = [answer("route", *way) for way in ways]
    for other in found:
        assert other["inputs"]["scenario"]["routing"]["popularity"] == {"kind": "recorded", "file": str(trace)}
        assert other["result"] == found[0]["result"]
    assert found[0]["result"]["source"] == str(trace)
    assert answer("route", str(files["recorded"]), "--gini", "0.1")["result"]["gini"] == pytest.approx(0.1, abs=0.02)
    assert found[0]["result"]["gini"] > 0.4


def test_a_recording_moves_the_step_and_the_placement_from_the_command_line(trace: Path) -> None:
    drawn, recorded = (answer("simulate", *OPTIONS, *more)["result"] for more in ([], ["--recording", str(trace)]))
    assert recorded["gini"] > drawn["gini"] + 0.2
    assert recorded["step_s"] > drawn["step_s"]
    placed = answer("place", *OPTIONS, "--recording", str(trace))["result"]
    assert np.mean(placed["max_mean"]) < np.mean(placed["contiguous_max_mean"])


def test_a_recording_beside_the_file_that_names_it_is_found(trace: Path) -> None:
    (trace.parent / "scenario.yaml").write_text(FILE + "routing: {recording: trace.npy}\n")
    asked = Scenario.from_file(trace.parent / "scenario.yaml")
    assert asked.routing.popularity == Recorded(file=str(trace))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--recording", "nowhere.npy"], "nowhere.npy: recording: must exist"),
        (["--recording", "TRACE", "--gini", "0.3"], "recording: stands in place of a popularity: give one of them"),
        (["--recording", "TRACE", "--popularity", "zipf"], "recording: stands in place of a popularity"),
        (["--recording", "."], "recording: must be a file"),
        (["--set", "routing.recording=3"], "file: must be a text; got 3"),
        (["--recording", "TRACE", "--model", "mixtral-8x7b"], "TRACE"),
    ],
)
def test_a_wrong_recording_is_refused_by_name(trace: Path, more: list[str], words: str) -> None:
    more = [text.replace("TRACE", str(trace)) for text in more]
    status, out, err = moesim("simulate", *OPTIONS, *more)
    assert (status, out) == (2, ""), err
    assert words.replace("TRACE", str(trace)) in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_notebook_takes_it_in_place_of_its_default_popularity(trace: Path, name: str) -> None:
    known = parameters_of(find_notebook(name))
    given = SIZES | {"recording": str(trace)}
    assert ask(check_parameters(given, known), sorted(given)).scenario.routing.popularity == Recorded(file=str(trace))
    both = given | {"gini": 0.3}
    with pytest.raises(InputError, match="recording: stands in place of a popularity"):
        ask(check_parameters(both, known), sorted(both))


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_notebook_runs_on_a_recording(trace: Path, tmp_path: Path, name: str) -> None:
    quick = {"20_routing_and_drops": {"num_steps": 2, "training_steps": 0}, "30_expert_placement": {"slots": "64,80"}}
    given = SIZES | quick.get(name, {}) | {"precision": "bf16", "recording": str(trace)}
    page = (run_notebook(name, given, tmp_path / "out", show_progress=False) / "report.html").read_text()
    assert f"as recorded in {trace}" in page
    assert "Traceback" not in page


def test_the_report_of_a_scenario_file_hands_the_recording_over(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: dict[str, object] = {}
    monkeypatch.setattr("moesim.report.runner.run_notebook", lambda _name, given, _out, **_: heard.update(given))
    (tmp_path / "scenario.yaml").write_text(FILE + f"routing: {{recording: {trace}}}\n")
    status, _, err = moesim("report", str(tmp_path / "scenario.yaml"))
    assert status == 0, err
    assert heard["recording"] == str(trace)
    assert not heard.keys() & {"popularity", "gini"}


def test_the_recorded_step_is_the_routed_one(trace: Path) -> None:
    asked = Scenario.make(**SIZES, recording=str(trace))
    assert routed_load(asked)[0].load_LE == pytest.approx(simulate(asked).load_LE, abs=1e-9)
