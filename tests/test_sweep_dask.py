"""Sweeps on Dask's workers: the same bytes as one process, poison told by name, refusals that say what to do."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moesim.errors import InputError
from moesim.study.sweep import sweep
from moesim.study.sweep_file import ask_points
from moesim.study.sweep_workers import dask, processes
from tests.test_cli_runs import moesim
from tests.test_sweep import BASE, POISON, seeds, write_sweep

ROOT = Path(__file__).parent.parent
HAS_DASK = importlib.util.find_spec("distributed") is not None
needs_dask = pytest.mark.skipif(not HAS_DASK, reason="distributed is not installed (the extra moesim[dask])")


@pytest.fixture(scope="module")
def scheduler_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A scheduler and four workers, started by hand as the README says."""
    folder = tmp_path_factory.mktemp("dask")
    file = str(folder / "s.json")
    quiet = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    cli = [sys.executable, "-m", "dask"]
    scheduler = [*cli, "scheduler", "--scheduler-file", file, "--port", "0", "--no-dashboard", "--host", "127.0.0.1"]
    worker = [*cli, "worker", "--scheduler-file", file, "--nworkers", "4", "--nthreads", "1", "--no-dashboard"]
    started = [
        subprocess.Popen(command, **quiet)  # type: ignore[call-overload]
        for command in (scheduler, [*worker, "--local-directory", str(folder), "--host", "127.0.0.1"])
    ]
    yield file
    for process in reversed(started):
        process.terminate()
        process.wait(timeout=30)


@needs_dask
def test_four_dask_workers_leave_the_bytes_of_one_process(tmp_path: Path, scheduler_file: str) -> None:
    asked = ask_points([{"ep": 8, "seed": seed} for seed in range(6)], BASE)
    sweep(asked, tmp_path / "one", workers=processes(1))
    sweep(asked, tmp_path / "four", workers=dask(scheduler_file=scheduler_file))
    assert (tmp_path / "four" / "results.csv").read_bytes() == (tmp_path / "one" / "results.csv").read_bytes()


@needs_dask
def test_ten_thousand_counts_by_dask_are_those_of_processes(tmp_path: Path, scheduler_file: str) -> None:
    asked = seeds(10_000)
    sweep(asked, tmp_path / "two", by="sizes", workers=processes(2))
    sweep(asked, tmp_path / "four", by="sizes", workers=dask(scheduler_file=scheduler_file))
    assert (tmp_path / "four" / "results.csv").read_bytes() == (tmp_path / "two" / "results.csv").read_bytes()


@needs_dask
def test_a_point_that_kills_dasks_workers_is_told_and_the_others_are_kept(tmp_path: Path, scheduler_file: str) -> None:
    found = sweep(seeds(8), tmp_path, by=POISON, workers=dask(scheduler_file=scheduler_file))
    assert {row["settings"]["seed"] for row in found.rows} == {0, 1, 2, 4, 6}
    assert {row["settings"]["seed"]: row["kind"] for row in found.failed} == {3: "worker", 5: "error", 7: "refused"}


@needs_dask
def test_no_scheduler_at_the_address_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moesim.study import sweep_workers

    monkeypatch.setattr(sweep_workers, "DASK_TIMEOUT_S", 1)
    file = write_sweep(tmp_path, "grid: {ep: [8]}")
    status, _, err = moesim("sweep", file, "--out", str(tmp_path / "o"), "--dask-address", "tcp://127.0.0.1:9")
    assert status == 2
    assert "--dask-address: must lead to a scheduler within 1 s; got 'tcp://127.0.0.1:9'" in err


@pytest.mark.skipif(HAS_DASK, reason="distributed is installed")
def test_without_distributed_the_extra_is_named() -> None:
    with pytest.raises(InputError, match=r"needs the package distributed.*moesim\[dask\]"), dask("tcp://h:1"):
        pass
