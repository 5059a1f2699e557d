"""Sweeps under kill -9, of workers and parent, at random moments: nothing lost, nothing twice, the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from moesim.study.sweep import sweep
from moesim.study.sweep_file import ask_points
from moesim.study.sweep_workers import processes
from tests.test_sweep import BASE, kept

ROOT = Path(__file__).parent.parent
STEADY = "tests.sweep_fakes:steady"


def workers_of(parent: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in parent.children():
        try:
            found += [child] if "spawn_main" in " ".join(child.cmdline()) else []
        except psutil.Error:  # gone meanwhile
            continue
    return found


def run_killed(start: Callable[[], subprocess.Popen[bytes]], rng: np.random.Generator, usual_s: float) -> list[str]:
    """Run and kill twice: each time two workers, then the parent, at random moments of the work, which takes usual_s.

    Returns what was killed.
    """
    killed: list[str] = []
    for _ in range(2):
        run = start()
        parent = psutil.Process(run.pid)
        while run.poll() is None and not workers_of(parent):
            time.sleep(0.05)
        for _ in range(2):
            time.sleep(rng.uniform(0, usual_s / 3))
            workers = workers_of(parent) if run.poll() is None else []
            if workers:
                workers[rng.integers(len(workers))].kill()
                killed.append("worker")
        time.sleep(rng.uniform(0, usual_s / 3))
        orphans = workers_of(parent) if run.poll() is None else []
        if run.poll() is None:
            killed.append("parent")
        run.kill()
        run.wait()
        _, alive = psutil.wait_procs(orphans, timeout=20)
        assert not alive, "workers outlive their parent"
    return killed


def repeat_kills(folder: Path, num_points: int, repetitions: int, by: str, usual_s: float) -> list[str]:
    settings = [{"seed": seed} for seed in range(num_points)]
    (folder / "s.yaml").write_text(json.dumps({"base": BASE, "grid": {"seed": [*range(num_points)]}}))
    whole = folder / "whole"
    sweep(ask_points(settings, BASE), whole, by=by, workers=processes(2))
    rng = np.random.default_rng(num_points)
    killed: list[str] = []
    for repetition in range(repetitions):
        out = folder / f"killed-{repetition}"
        command = [sys.executable, "-m", "moesim", "sweep", str(folder / "s.yaml"), "--out", str(out), "--by", by]
        command += ["--workers", "2", "--resume", "-q"]

        def start(command: list[str] = command) -> subprocess.Popen[bytes]:
            return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

        killed += run_killed(start, rng, usual_s)
        run = start()
        _, err = run.communicate(timeout=300)
        assert run.returncode == 0, err
        names = [record["point_id"] for record in kept(out)]
        assert len(names) == len(set(names)) == num_points
        assert (out / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()
        assert (out / "failed.jsonl").read_bytes() == b""
    return killed


def test_a_sweep_that_is_killed_again_and_again_ends_with_the_same_bytes(tmp_path: Path) -> None:
    killed = repeat_kills(tmp_path, num_points=600, repetitions=1, by=STEADY, usual_s=1.5)
    assert {"worker", "parent"} <= set(killed)


@pytest.mark.slow
def test_ten_thousand_points_killed_twenty_times_lose_nothing_and_repeat_nothing(tmp_path: Path) -> None:
    killed = repeat_kills(tmp_path, num_points=10_000, repetitions=20, by="sizes", usual_s=4.0)
    assert killed.count("parent") >= 20
    assert killed.count("worker") >= 20
