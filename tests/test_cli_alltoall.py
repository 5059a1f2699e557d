"""The verb alltoall: what it prints and writes, and what it refuses. Small on purpose."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from moesim.catalog.hardware import load_cluster
from moesim.cli import app
from moesim.describe.hardware import Cluster
from moesim.study.alltoall import fabric_of, time_exchange

CLUSTER = """
gpu: h100-sxm
num_gpus: 64
ranks_per_node: 8
nvlink: 450 GB/s
nic: 50 GB/s
latency_intra: 2us
latency_inter: 5us
cross_rail: pxn
"""
MB = 1e6


def moesim(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["alltoall", *map(str, arguments)])
    return done.exit_code, done.stdout, done.stderr


def answer(*arguments: object) -> dict:
    status, out, err = moesim(*arguments, "--json")
    assert status == 0, err
    envelope = json.loads(out)
    assert envelope.pop("run")["wall_s"] >= 0
    return envelope


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    return tmp_path / "cluster.yaml"


@pytest.fixture
def sizes(tmp_path: Path) -> Path:
    np.save(tmp_path / "sizes.npy", np.full((16, 16), 1_000_000))
    return tmp_path / "sizes.npy"


@pytest.mark.parametrize("fidelity", ["exact", "port"])
def test_a_uniform_exchange_takes_the_nics_bytes_at_the_files_own_rate(
    cluster: Path, sizes: Path, fidelity: str
) -> None:
    envelope = answer("--bytes", sizes, "--cluster", cluster, "--fidelity", fidelity)
    result = envelope["result"]
    assert result["lower_bound_s"] == pytest.approx(8 * MB / 50e9)
    assert result["bottleneck"] == "nic_out of rank 0"
    assert result["completion_s"] == pytest.approx(8 * MB / 50e9 + 5e-6, rel=0.002)
    assert result["num_messages"] == 16 * 15
    assert result["total_bytes"] == 16 * 15 * MB
    assert envelope["warnings"] == ["the cluster's file has no derates: links run at line rate"]
    again = answer("--bytes", sizes, "--cluster", cluster, "--fidelity", fidelity)
    assert again == envelope


def test_a_presets_derates_hold_unless_line_rate_is_asked_for(sizes: Path) -> None:
    derated = answer("--bytes", sizes, "--cluster", "h800-8x-ib400")
    line = answer("--bytes", sizes, "--cluster", "h800-8x-ib400", "--line-rate")
    assert derated["result"]["lower_bound_s"] == pytest.approx(line["result"]["lower_bound_s"] / 0.89)
    assert derated["warnings"] == []
    assert "derate nic_alltoall" in {number["part"] for number in derated["provenance"]}


def test_starts_come_in_and_finishes_go_out_with_nan_where_there_is_no_message(cluster: Path, tmp_path: Path) -> None:
    bytes_RR, starts_RR = np.zeros((16, 16)), np.full((16, 16), np.nan)
    bytes_RR[[0, 0], [8, 3]] = MB
    starts_RR[[0, 0], [8, 3]] = [1e-3, 0.0]
    np.save(tmp_path / "few.npy", bytes_RR)
    np.save(tmp_path / "starts.npy", starts_RR)
    out = tmp_path / "finish.npy"
    result = answer(
        "--bytes", tmp_path / "few.npy", "--cluster", cluster, "--starts", tmp_path / "starts.npy", "--finish", out
    )["result"]
    finish_RR = np.load(out)
    assert finish_RR[0, 8] == pytest.approx(1e-3 + 5e-6 + MB / 50e9)
    assert finish_RR[0, 3] == pytest.approx(2e-6 + MB / 450e9)
    assert np.isnan(finish_RR).sum() == 16 * 16 - 2
    assert result["completion_s"] == finish_RR[0, 8]


def test_what_late_starts_add_is_told_over_the_bound_and_never_negative(sizes: Path, tmp_path: Path) -> None:
    starts_RR = np.zeros((16, 16))
    starts_RR[5] = 1e-3
    np.save(tmp_path / "starts.npy", starts_RR)
    status, out, _ = moesim("--bytes", sizes, "--cluster", "h800-8x-ib400", "--starts", tmp_path / "starts.npy")
    assert status == 0
    told = re.search(r"this\s+takes\s+(-?[0-9.]+)%\s+longer", out)
    assert told is not None
    assert float(told[1]) >= 0


def test_a_slow_rank_an_oversubscribed_spine_and_jitter_take_longer_and_seeds_repeat(
    cluster: Path, sizes: Path
) -> None:
    def seconds(*more: object) -> float:
        return answer("--bytes", sizes, "--cluster", cluster, *more)["result"]["completion_s"]

    alone = seconds()
    assert seconds("--slow", "3=0.5") > 1.5 * alone
    assert seconds("--set", "cross_rail=spine", "--set", "oversubscription=4") > 1.5 * alone
    jitter = ("--rate-jitter", "0.1", "--latency-jitter", "3us", "--seed")
    assert seconds(*jitter, "1") == seconds(*jitter, "1") != seconds(*jitter, "2")
    assert seconds(*jitter, "1") > alone


def test_an_oversubscribed_spine_slows_its_leaves_and_not_the_nics(cluster: Path, tmp_path: Path) -> None:
    bytes_RR = np.zeros((16, 16))
    bytes_RR[0, 9] = MB
    np.save(tmp_path / "one.npy", bytes_RR)
    spine = ("--bytes", tmp_path / "one.npy", "--cluster", cluster, "--set", "cross_rail=spine", "--set")
    for oversubscription, seconds in (
        (2, MB / 50e9),
        (4, MB / 25e9),
    ):  # two nodes: a leaf has 2 NICs / oversubscription
        result = answer(*spine, f"oversubscription={oversubscription}")["result"]
        assert result["completion_s"] == pytest.approx(5e-6 + seconds)


def test_hashed_paths_collide_and_cost_time(cluster: Path, sizes: Path) -> None:
    spine = ("--set", "cross_rail=spine", "--bytes", sizes, "--cluster", cluster)
    ideal, hashed = (answer(*spine, *more)["result"] for more in ((), ("--set", "num_paths=4")))
    assert hashed["completion_s"] > 1.1 * ideal["completion_s"]
    assert "path" in hashed["bottleneck"]


def test_the_tables_name_the_busiest_link(cluster: Path, sizes: Path) -> None:
    status, out, _ = moesim("--bytes", sizes, "--cluster", cluster, "--algorithm", "hierarchical", "--num-sms", 20)
    assert status == 0
    assert "Busiest links" in out
    assert "nic_out of rank 0" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--bytes: is required"),
        (("--algorithm", "derect"), "Did you mean direct?"),
        (("--fidelity", "fast"), "--fidelity: must be exact or port"),
        (("--slow", "3"), "--slow: must be a rank and a share"),
        (("--slow", "99=0.5"), "must name ranks below 16; got 99"),
        (("--slow", "3=0"), "nvlink_in of rank 3: must have a rate above 0"),
        (("--set", "num_gpus=8"), "must be between no more ranks than the cluster's 8 GPUs; got 16"),
        (("--latency-jitter", "3"), "--latency-jitter: must be a number with a unit"),
        (("--num-sms", "4"), "--num-sms: goes with --algorithm hierarchical"),
        (("--finish", "finish.txt"), "--finish: must end in .npy"),
        (("--set", "oversub=2"), "Did you mean oversubscription?"),
    ],
)
def test_wrong_input_is_refused_in_one_line_with_status_2(
    cluster: Path, sizes: Path, arguments: tuple[str, ...], words: str
) -> None:
    given = ("--bytes", sizes) if arguments else ()
    status, out, err = moesim(*given, "--cluster", cluster, *arguments)
    assert (status, out) == (2, "")
    assert len(err.strip().splitlines()) == 1
    assert words in err


@pytest.mark.parametrize(
    ("bytes_RR", "words"),
    [
        (np.ones((2, 3)), "as many rows as columns"),
        (np.array([[0.0, -1.0], [1.0, 0.0]]), "-1 from rank 0 to rank 1"),
        (np.array([[0.0, np.nan], [1.0, 0.0]]), "must be finite"),
        (np.array([["a", "b"], ["c", "d"]]), "must hold plain numbers"),
    ],
)
def test_a_matrix_that_is_none_is_refused(cluster: Path, tmp_path: Path, bytes_RR: np.ndarray, words: str) -> None:
    np.save(tmp_path / "bad.npy", bytes_RR)
    status, out, err = moesim("--bytes", tmp_path / "bad.npy", "--cluster", cluster)
    assert (status, out) == (2, "")
    assert words in err


def test_a_message_without_a_start_is_refused_by_its_ranks(cluster: Path, sizes: Path, tmp_path: Path) -> None:
    starts_RR = np.zeros((16, 16))
    starts_RR[4, 7] = np.nan
    np.save(tmp_path / "starts.npy", starts_RR)
    status, _, err = moesim("--bytes", sizes, "--cluster", cluster, "--starts", tmp_path / "starts.npy")
    assert status == 2
    assert "from rank 4 to rank 7" in err


def test_hashed_paths_of_roce_collide_by_seed_where_adaptive_routing_loses_only_its_derate() -> None:
    adaptive = load_cluster("h100-8x-roce400")
    hashed = load_cluster("h100-8x-roce400", changes=["num_paths=8", "derates.spine_alltoall=1"])
    rank = np.arange(64)
    one_message = np.zeros((64, 64))
    one_message[rank, (rank + 9) % 64] = 100e6  # to the next node's next rail
    even = np.full((64, 64), 1e6)

    def seconds(cluster: Cluster, bytes_RR: NDArray[np.float64], seed: int = 0) -> float:
        return time_exchange(bytes_RR, fabric_of(cluster, 64, seed=seed)).completed.completion_s

    nic_s = 100e6 / (50e9 * float(adaptive.derates["nic_alltoall"]))
    assert seconds(adaptive, one_message) == pytest.approx(nic_s / 0.95, rel=0.01)
    by_seed = [seconds(hashed, one_message, seed) for seed in range(6)]
    assert all(1.9 * nic_s < found < 4.1 * nic_s for found in by_seed)
    assert len({round(found / nic_s) for found in by_seed}) > 1
    assert seconds(hashed, even) < 1.3 * seconds(adaptive, even)
