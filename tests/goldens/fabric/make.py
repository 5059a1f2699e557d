"""Run SimGrid on the cases of tests/fabric_cases.py and keep its finishes: simgrid.npz beside this file.

    python tests/goldens/fabric/make.py                         Debian's libsimgrid-dev and g++
    python tests/goldens/fabric/make.py --simgrid PREFIX        a SimGrid built or installed elsewhere, such as 4.1
    python tests/goldens/fabric/make.py --binary PATH           simgrid_flows.cpp built by yourself

Of each case: every message's finish (float32: seven digits) up to 4,096 messages, else a seeded sample of them; the
last finish in full. The largest differences from moesim over *all* messages are printed. Takes some minutes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent.parent.parent)]

from fabric_cases import CASES, Case  # noqa: E402

from moesim.fabric.exact import finish_s  # noqa: E402
from moesim.fabric.flows import Flows  # noqa: E402
from moesim.fabric.topology import Topology  # noqa: E402
from moesim.seeds import stream  # noqa: E402

Floats = NDArray[np.float64]
GOLDEN = HERE / "simgrid.npz"
MOST_KEPT = 4096
SAMPLE = 1500
# SimGrid's plain fluid model: no TCP window, no cross traffic; times told apart from 1e-12 s on.
SETTINGS = ["network/model:CM02", "network/TCP-gamma:0", "network/crosstraffic:0", "contexts/stack-size:64"]
PRECISION = {3: "surf/precision:1e-12", 4: "precision/timing:1e-12"}


def build(folder: Path, simgrid: str | None = None) -> Path:
    """simgrid_flows.cpp, compiled. Raises CalledProcessError where there is no compiler or no SimGrid."""
    binary = folder / "simgrid_flows"
    where = [] if simgrid is None else [f"-I{simgrid}/include", f"-L{simgrid}/lib", f"-Wl,-rpath,{simgrid}/lib"]
    command = [
        "g++",
        "-O1",
        "-w",
        "-std=c++17",
        str(HERE / "simgrid_flows.cpp"),
        "-o",
        str(binary),
        *where,
        "-lsimgrid",
    ]
    subprocess.run(command, check=True, capture_output=True)
    return binary


def run_simgrid(binary: Path, flows: Flows, topology: Topology) -> tuple[int, float, Floats]:
    """(SimGrid's version, processor seconds that it ran, finish of each flow [s])."""
    routes = topology.routes(flows.source_F, flows.target_F)
    begin_F = flows.start_F + routes.latency_F
    last_F = (routes.link_FP >= 0).sum(axis=1) - 1
    down_F = np.take_along_axis(routes.link_FP, last_F[:, None], axis=1)
    up_FP = np.where(np.arange(routes.link_FP.shape[1]) < last_F[:, None], routes.link_FP, -1)
    ups, up_F = np.unique(up_FP, axis=0, return_inverse=True)
    downs, down_F = np.unique(down_F, axis=0, return_inverse=True)
    lines = [str(topology.rate_bytes_per_s_J.size), " ".join(map(repr, topology.rate_bytes_per_s_J.tolist()))]
    for ways in (ups, downs):
        lines.append(str(len(ways)))
        for way in ways.tolist():
            links = [link for link in way if link >= 0]
            lines.append(" ".join(map(str, [len(links), *links])))
    lines.append(str(flows.num_flows))
    columns = begin_F.tolist(), flows.bytes_F.tolist(), up_F.ravel().tolist(), down_F.ravel().tolist()
    lines += [" ".join(map(repr, row)) for row in zip(*columns, strict=True)]
    version = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False).stdout
    settings = [*SETTINGS, PRECISION[4 if "4." in version else 3], "maxmin/precision:1e-9"]
    arguments = [f"--cfg={setting}" for setting in settings] + ["--log=root.thres:error"]
    done = subprocess.run([binary, *arguments], input="\n".join(lines), capture_output=True, text=True, check=True)
    first, *finishes = done.stdout.splitlines()
    number, took = first.split()
    return int(number), float(took), np.array(finishes, np.float64)


def kept(case: Case, num_flows: int) -> NDArray[np.int64]:
    """Which messages of a case the golden file holds."""
    if num_flows <= MOST_KEPT:
        return np.arange(num_flows)
    return np.sort(stream(0, f"sample of {case.name}").permutation(num_flows)[:SAMPLE])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simgrid", metavar="PREFIX")
    parser.add_argument("--binary", type=Path)
    options = parser.parse_args()
    arrays: dict[str, NDArray[np.generic]] = {}
    with tempfile.TemporaryDirectory() as folder:
        binary = options.binary or build(Path(folder), options.simgrid)
        for case in CASES:
            flows, topology = case.flows(), case.topology()
            version, took, finish_F = run_simgrid(binary, flows, topology)
            exact_F = finish_s(flows, topology)
            worst, last = np.abs(exact_F / finish_F - 1).max(), abs(exact_F.max() / finish_F.max() - 1)
            print(f"{case.name:36s} {flows.num_flows:6d} messages {took:8.2f} s  {worst:8.1e} {last:8.1e}", flush=True)
            arrays[f"{case.name}/finish_s"] = finish_F[kept(case, flows.num_flows)].astype(np.float32)
            arrays[f"{case.name}/last_s"] = finish_F.max()
            arrays["simgrid_version"] = np.int64(version)
    np.savez_compressed(GOLDEN, **arrays)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
