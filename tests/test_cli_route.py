"""The verb ``route``: result names, envelope, files, refusals."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from moesim.cli import app

SMALL = ["--model", "olmoe-1b-7b", "--cluster", "h100-8x-ib400", "--num-gpus", "16", "--ep", "8", "--pp", "2"]
SMALL += ["--seq-len", "512", "--global-batch", "32", "--capacity-factor", "1.25", "--gini", "0.4"]
NAMES = {"gini", "entropy", "cv", "max_mean", "max_vio", "num_active_experts", "drop_fraction"}
NAMES |= {"drop_fraction_by_layer", "padding_fraction", "alerts"}


def moesim(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, list(arguments))
    return done.exit_code, done.stdout, done.stderr


def answer(*arguments: str) -> dict[str, Any]:
    """The JSON envelope of a call that must succeed, without its run."""
    status, out, err = moesim("route", *arguments, "--json")
    assert status == 0, err
    envelope = json.loads(out)
    envelope.pop("run")
    assert isinstance(envelope, dict)
    return envelope


def test_route_gives_the_promised_names_and_the_same_bytes_for_the_same_seed() -> None:
    first, again, other = answer(*SMALL), answer(*SMALL), answer(*SMALL, "--seed", "1")
    assert first == again != other
    found = first["result"]
    assert set(found) >= NAMES
    assert found["gini"] == pytest.approx(0.4, abs=0.01)
    assert found["max_vio"] == pytest.approx(found["max_mean"] - 1)
    assert len(found["drop_fraction_by_layer"]) == 16
    assert np.mean(found["drop_fraction_by_layer"]) == pytest.approx(found["drop_fraction"], abs=1e-6)
    assert all(set(alert) == {"layer", "expert", "ratio"} and alert["ratio"] > 3 for alert in found["alerts"])
    assert first["provenance"][0]["kind"] == "assumed"


@pytest.mark.parametrize(
    ("asked", "name", "value"),
    [
        (["--popularity", "zipf", "--gini", "0.5"], "gini", 0.5),
        (["--set", "routing.popularity={kind: dirichlet, cv: 0.7}"], "cv", 0.7),
        (["--set", "routing.popularity.cv=0.7"], "cv", 0.7),
        (["--popularity", "multinomial"], "gini", 0.02),
    ],
)
def test_skew_is_asked_for_by_what_people_measure(asked: list[str], name: str, value: float) -> None:
    without_gini = SMALL[: SMALL.index("--gini")]
    assert answer(*without_gini, *asked)["result"][name] == pytest.approx(value, abs=0.02)


def test_route_and_simulate_drop_the_same() -> None:
    simulated = json.loads(moesim("simulate", *SMALL, "--json")[1])["result"]
    routed = answer(*SMALL)["result"]
    assert routed["drop_fraction"] == pytest.approx(simulated["drop_fraction"], abs=1e-6)
    assert routed["alerts"] == simulated["alerts"]


def test_the_histogram_written_feeds_back_as_a_recording(tmp_path: Path) -> None:
    drawn = answer(*SMALL, "--out", str(tmp_path))
    assert json.loads((tmp_path / "results.json").read_text()) == drawn
    with (tmp_path / "histogram.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16 * 64
    assert sum(int(row["tokens"]) for row in rows) == 32 * 512 * 8 * 16
    recorded = answer(*SMALL, "--recorded", str(tmp_path / "histogram.csv"))
    assert recorded["provenance"] == [
        {"part": "expert load", "kind": "measured", "source": str(tmp_path / "histogram.csv")}
    ]
    assert recorded["result"]["gini"] == pytest.approx(drawn["result"]["gini"], abs=0.01)
    assert recorded["result"]["drop_fraction"] == pytest.approx(drawn["result"]["drop_fraction"], abs=0.005)


def test_a_replay_of_drawn_tokens_feeds_back_too(tmp_path: Path) -> None:
    drawn = answer(*SMALL, "--replay", "20000", "--out", str(tmp_path))["result"]
    experts_TLK = np.load(tmp_path / "routed_experts.npy")
    assert experts_TLK.shape == (20000, 16, 8)
    recorded = answer(*SMALL, "--recorded", str(tmp_path / "routed_experts.npy"))["result"]
    assert recorded["gini"] == pytest.approx(drawn["gini"], abs=0.01)
    assert np.abs(np.array(recorded["load_LE"]) - np.array(drawn["load_LE"])).max() < 4e-3  # shares of 1/64


def test_a_replay_array_is_a_recording(tmp_path: Path) -> None:
    """Every token takes the first eight experts: they alone are active, at eight times the mean."""
    path = tmp_path / "replay.npy"
    np.save(path, np.broadcast_to(np.arange(8, dtype=np.int16), (100, 16, 8)).copy())
    found = answer(*SMALL, "--recorded", str(path))["result"]
    assert found["num_active_experts"] == 8
    assert found["max_mean"] == pytest.approx(8.0)
    assert len(found["alerts"]) == 16 * 8
    assert len(found["dead_experts"]) == 16 * 56
    assert found["drop_fraction"] == pytest.approx(1 - 80 / 512)  # ceil(512 * 8 / 64 * 1.25) places for 512 tokens


def test_full_adds_what_skew_costs() -> None:
    small = [*SMALL, "--full"]
    status, out, err = moesim("route", *small)
    assert status == 0, err
    assert "Step time and memory over skew" in out
    assert "Out of memory" in out
    assert max(len(line) for line in out.splitlines()) <= 80


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recorded", "nowhere.npy"], "nowhere.npy"),
        (["--recorded", "trace.txt"], "must end in .npy, .npz, .safetensors, .jsonl"),
        (["--wanted-drop", "1.5"], "--wanted-drop"),
        (["--replay", "10"], "--replay: needs a folder to write into (--out), or a file (--write); got 10"),
        (["--capacity-factor", "-1"], "capacity_factor: must be positive"),
    ],
)
def test_a_wrong_option_is_one_line(arguments: list[str], words: str) -> None:
    status, out, err = moesim("route", *SMALL, *arguments)
    assert (status, out) == (2, "")
    assert words in err
    assert len(err.strip().splitlines()) == 1


def test_a_dense_model_is_refused() -> None:
    status, _, err = moesim("route", "--model", "llama-3-8b", "--cluster", "h100-8x-ib400", "--num-gpus", "8")
    assert status == 2
    assert "must have experts to route to; got 'llama-3-8b'" in err


def test_report_runs_the_notebook_that_is_named(tmp_path: Path) -> None:
    quick = ["-p", "num_steps", "2", "-p", "training_steps", "0", "--micro-batch", "1"]
    arguments = ["report", "20_routing_and_drops", *SMALL, *quick, "--out", str(tmp_path / "report"), "--json", "-q"]
    status, out, err = moesim(*arguments)
    assert status == 0, err
    found = json.loads(out)
    assert found["inputs"]["notebook"] == "20_routing_and_drops"
    names = [Path(name).name for name in found["result"]["files"]]
    assert names == ["report.html", "report.ipynb", "results.json", "results.csv", "histogram.csv"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["20_routing_and_drop"], "Did you mean 20_routing_and_drops"),
        (["20_routing_and_drops", "-p", "wanted_drops", "0.1"], "Did you mean wanted_drop?"),
        (["a.yaml", "b.yaml"], "SCENARIO: must be one file, after a notebook's name; got 'b.yaml'"),
        (["20_routing_and_drops", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_report_refuses_by_name(arguments: list[str], words: str) -> None:
    status, out, err = moesim("report", *arguments)
    assert (status, out) == (2, "")
    assert words in err


def test_what_was_recorded_is_told_beside_what_is_planned_from_it(tmp_path: Path) -> None:
    paths = [tmp_path / f"{seed}.npy" for seed in (0, 1)]
    for seed, path in enumerate(paths):
        rng = np.random.default_rng(seed)
        np.save(path, np.argsort(rng.random((300, 16, 64)), axis=2)[:, :, :8].astype(np.int16))
    status, out, err = moesim("route", *SMALL, "--recorded", str(paths[0]), "--against", str(paths[1]))
    assert status == 0, err
    assert "What was recorded" in out
    assert "Active experts of 16 tokens" in out
    found = answer(*SMALL, "--recorded", str(paths[0]), "--against", str(paths[1]))["result"]["recording"]
    assert found["num_tokens"] == 300
    assert found["consistency"]["overlap"] == pytest.approx(found["consistency"]["chance"], abs=0.01)
    assert answer(*SMALL)["result"]["recording"] is None
    status, _, err = moesim("route", *SMALL, "--against", str(paths[1]))
    assert (status, err.count("\n")) == (2, 1)
    assert "--against: needs a recording beside it" in err


def test_routing_is_written_in_every_form_and_reads_back(tmp_path: Path) -> None:
    """Drawn once, then converted from form to form: the same counts to the last assignment."""
    files = [tmp_path / f"drawn.{form}" for form in ("npz", "safetensors", "jsonl", "npy", "csv")]
    answer(*SMALL, "--replay", "500", "--write", str(files[0]))
    counts = answer(*SMALL, "--recorded", str(files[0]))["result"]["recording"]["counts_LE"]
    assert np.sum(counts) == 500 * 16 * 8
    for source, target in itertools.pairwise(files):
        answer(*SMALL, "--recorded", str(source), "--write", str(target))
        assert answer(*SMALL, "--recorded", str(target))["result"]["recording"]["counts_LE"] == counts
    status, _, err = moesim("route", *SMALL, "--recorded", str(files[-1]), "--write", str(tmp_path / "back.npz"))
    assert status == 2
    assert "back.npz: must end in .csv or .parquet where a histogram was recorded" in err
    assert not (tmp_path / "back.npz").exists()


def test_balancing_over_training_is_told_with_histograms_every_so_many_steps(tmp_path: Path) -> None:
    more = ["--training-steps", "60", "--learning-rate", "1e-3", "--histogram-every", "25", "--out", str(tmp_path)]
    found = answer(*SMALL, *more)["result"]["balancing"]
    assert [curve["policy"] for curve in found] == ["none", "aux_loss", "loss_free", "noisy_gating"]
    for curve in found:
        with (tmp_path / f"balancing_{curve['policy']}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert sorted({int(row["step"]) for row in rows}) == [0, 25, 50]
        batch = sum(int(row["tokens"]) for row in rows if row["step"] == "25" and row["layer"] == "0")
        assert batch == pytest.approx(32 * 512 * 8, abs=64)  # each expert's count is rounded
    assert answer(*SMALL)["result"]["balancing"] == []
