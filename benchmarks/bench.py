"""Time what users wait for, each in a process of its own, and write docs/speed.md: ``make bench``.

Shared machines are noisy: each figure is the median of several runs, with the fastest and the slowest beside it.
Limits are those that the project promises; the script fails when a median breaks one. Options are handed on to
``benchmarks.fabric`` (``--simgrid PREFIX``).
"""

from __future__ import annotations

import datetime
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from moesim.units import GIB

ROOT = Path(__file__).parent.parent
DEEPSEEK = ["--model", "deepseek-v3", "--cluster", "h800-8x-ib400", "--num-gpus", "2048", "--pp", "16", "--ep", "64"]
DEEPSEEK += ["--global-batch", "15360"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One command, how often to run it, and what it may take."""

    name: str
    command: list[str]
    num_runs: int
    limit_s: float
    limit_bytes: float | None = None


def cases(out: str) -> list[Case]:
    moesim = [sys.executable, "-m", "moesim"]
    return [
        Case(name="`import moesim`", command=[sys.executable, "-c", "import moesim"], num_runs=7, limit_s=0.5),
        Case(name="`moesim --help`", command=[*moesim, "--help"], num_runs=7, limit_s=0.5),
        Case(
            name="`moesim simulate`, DeepSeek-V3 on 2,048 H800, PP16, EP64, 120 micro-batches",
            command=[*moesim, "simulate", *DEEPSEEK, "--json"],
            num_runs=5,
            limit_s=10.0,
            limit_bytes=1.5 * GIB,
        ),
        Case(
            name="`moesim report`, the default planning report",
            command=[*moesim, "report", "--out", out],
            num_runs=3,
            limit_s=60.0,
            limit_bytes=1.5 * GIB,
        ),
    ]


def measure(case: Case) -> tuple[list[float], float]:
    """Wall seconds of each run after one warm-up, and the largest resident size of any process of it [bytes]."""
    walls = []
    for i in range(case.num_runs + 1):
        start = time.perf_counter()
        done = subprocess.run(case.command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
        if done.returncode:
            raise SystemExit(f"{case.name}: exit status {done.returncode}\n{done.stderr.decode()}")
        if i:
            walls.append(time.perf_counter() - start)
    scale = 1 if sys.platform == "darwin" else 1024
    return walls, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * scale


def main() -> int:
    rows, broken = [], []
    with tempfile.TemporaryDirectory() as out:
        for case in cases(str(Path(out) / "report")):
            walls, peak = measure(case)
            median = statistics.median(walls)
            spread = f"{min(walls):.2f}-{max(walls):.2f}"
            rows.append(f"| {case.name} | {median:.2f} | {spread} | {case.limit_s:g} | {peak / GIB:.2f} |")
            print(rows[-1], flush=True)
            if median > case.limit_s or (case.limit_bytes is not None and peak > case.limit_bytes):
                broken.append(case.name)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    text = f"""# Speed

Made by `make bench` on {datetime.date.today()}: {machine}.
Median wall seconds of whole processes after one warm-up; the largest process's memory so far stands beside it.

| what | median [s] | fastest-slowest [s] | limit [s] | peak memory [GiB] |
|---|---|---|---|---|
""" + "\n".join(rows)
    drawn = subprocess.run([sys.executable, "-m", "benchmarks.routing"], cwd=ROOT, stdout=subprocess.PIPE, check=False)
    text += "\n\n" + drawn.stdout.decode().strip()
    if drawn.returncode:
        broken.append("tokens drawn")
    exact = subprocess.run(
        [sys.executable, "-m", "benchmarks.fabric", "--draw", *sys.argv[1:]],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=False,
    )
    text += "\n\n" + exact.stdout.decode().strip()
    if exact.returncode:
        broken.append("exchanges in exact mode")
    port = subprocess.run([sys.executable, "-m", "benchmarks.port"], cwd=ROOT, stdout=subprocess.PIPE, check=False)
    text += "\n\n" + port.stdout.decode().strip()
    if port.returncode:
        broken.append("exchanges in port mode")
    growth = subprocess.run([sys.executable, "-m", "benchmarks.growth"], cwd=ROOT, stdout=subprocess.PIPE, check=False)
    text += "\n\n" + growth.stdout.decode().strip()
    if growth.returncode:
        broken.append("growth with the cluster")
    search = subprocess.run([sys.executable, "-m", "benchmarks.search"], cwd=ROOT, stdout=subprocess.PIPE, check=False)
    text += "\n\n" + search.stdout.decode().strip()
    if search.returncode:
        broken.append("search by the fast path")
    (ROOT / "docs" / "speed.md").write_text(text + "\n")
    notebooks = subprocess.run(  # adds its own section
        [sys.executable, "-m", "benchmarks.notebooks"], cwd=ROOT, stdout=subprocess.DEVNULL, check=False
    )
    if notebooks.returncode:
        broken.append("notebooks")
    if broken:
        print("over the limit: " + "; ".join(broken), file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
