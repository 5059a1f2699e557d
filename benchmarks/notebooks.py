"""What every notebook takes, at smoke size and at its own: ``python -m benchmarks.notebooks [NAME...]``.

Each is rendered by `moesim report`, as a user does: a process and its kernel, from nothing to the page. Writes its
section of docs/speed.md where all notebooks were asked; prints it always. Processor time of the whole tree of
processes stands beside the wall's, since other work on the machine counts less in it; limits hold for an idle machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from moesim.door import read_text, write_text_atomically
from moesim.units import GIB
from moesim.warm import warm
from tests.notebook_cases import SMOKE, smoke

ROOT = Path(__file__).parent.parent
SPEED = ROOT / "docs" / "speed.md"
TITLE = "## Notebooks"
LIMITS_S = {"smoke": 10.0, "full": 90.0}
SMOKE_TOGETHER_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Run:
    """One notebook rendered once."""

    wall_s: float
    cpu_s: float
    peak_bytes: float  # of its largest process


def rendered(name: str, parameters: dict[str, object], folder: Path) -> Run:
    """Render a notebook into folder and time it."""
    given = folder / "parameters.yaml"
    given.write_text(json.dumps(parameters))
    command = [sys.executable, "-m", "moesim", "report", name, "-f", str(given), "--out", str(folder / "out"), "-q"]
    began_s = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - began_s
    if status:
        raise SystemExit(f"{name}: exit status {os.waitstatus_to_exitcode(status)}")
    return Run(wall_s=wall_s, cpu_s=usage.ru_utime + usage.ru_stime, peak_bytes=usage.ru_maxrss * 1024.0)


def measure(name: str, size: str) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        return rendered(name, smoke(name, Path(folder)) if size == "smoke" else {}, Path(folder))


def section(found: dict[str, dict[str, Run]]) -> str:
    """The section of docs/speed.md."""
    rows = [
        f"| {name} | {runs['smoke'].wall_s:.1f} | {runs['smoke'].cpu_s:.1f} | {runs['full'].wall_s:.1f} | "
        f"{runs['full'].cpu_s:.1f} | {max(run.peak_bytes for run in runs.values()) / GIB:.2f} |"
        for name, runs in found.items()
    ]
    together = [sum(getattr(runs["smoke"], what) for runs in found.values()) for what in ("wall_s", "cpu_s")]
    return f"""{TITLE}

Each rendered once by `moesim report`, kernel and page included (made by `python -m benchmarks.notebooks`). Limits:
{LIMITS_S["smoke"]:g} s at smoke size, {LIMITS_S["full"]:g} s with its own parameters; the smoke sizes together
{SMOKE_TOGETHER_S:g} s on two cores, as `make test` runs them.

| notebook | smoke [s] | its processor time [s] | full [s] | its processor time [s] | peak memory [GiB] |
|---|---|---|---|---|---|
{chr(10).join(rows)}
| all, one after the other | {together[0]:.1f} | {together[1]:.1f} | | | |
"""


def with_section(page: str, new: str) -> str:
    """A page with its section of that title replaced, or added at the end."""
    before, title, after = page.partition(f"{TITLE}\n")
    rest = after.partition("\n## ")
    return before.rstrip() + "\n\n" + new + (f"\n## {rest[2]}" if title and rest[1] else "")


def main() -> int:
    names = sys.argv[1:] or [*SMOKE]
    warm()  # a cold cache of kernels is set-up, not a notebook's time
    found = {name: {size: measure(name, size) for size in LIMITS_S} for name in names}
    print(section(found))
    if names == [*SMOKE]:
        write_text_atomically(SPEED, with_section(read_text(SPEED), section(found)))
    slow = [
        f"{name} at {size} size"
        for name, runs in found.items()
        for size, limit_s in LIMITS_S.items()
        if runs[size].wall_s > limit_s
    ]
    if sum(runs["smoke"].wall_s for runs in found.values()) > SMOKE_TOGETHER_S * 2:
        slow.append("smoke sizes together")
    if slow:
        print("over the limit: " + "; ".join(slow), file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    raise SystemExit(main())
