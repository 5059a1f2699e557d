"""How fast the fabric's exact mode is, how it grows, and how SimGrid does on the same messages.

    python -m benchmarks.fabric                            moesim alone (half a minute)
    python -m benchmarks.fabric --simgrid PREFIX           beside a SimGrid installed there, such as 4.1
    python -m benchmarks.fabric --simgrid-binary PATH      tests/goldens/fabric/simgrid_flows.cpp built by yourself
    python -m benchmarks.fabric --draw                     also draws docs/figures/exact-growth.svg

Processor seconds, the best of several runs: other work on a shared machine slows a run down and never speeds it up.
moesim's hold routes, folding and solving; SimGrid's only its engine's run, once.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import runpy
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesim.catalog.hardware import load_cluster
from moesim.describe.hardware import CrossRail
from moesim.fabric.exact import finish_s, warm
from moesim.fabric.flows import Flows, flows_of
from moesim.fabric.topology import Topology, topology_of
from moesim.seeds import stream
from moesim.units import GIB, MEGA

ROOT = Path(__file__).parent.parent
FIGURE = ROOT / "docs" / "figures" / "exact-growth.svg"
SIGMA = 1.0  # of the skewed exchanges' lognormal bytes
MOST_BYTES = GIB


@dataclass(frozen=True, kw_only=True)
class Case:
    """One exchange of h100-8x-ib400: 1 MB for each pair, exactly (uniform) or on a lognormal's average (skewed)."""

    num_ranks: int
    skewed: bool
    cross_rail: CrossRail = "pxn"
    limit_s: float | None = None
    least_ratio: float | None = None  # SimGrid's seconds over ours; None: SimGrid takes minutes, left out
    num_runs: int = 3

    def topology(self) -> Topology:
        cluster = dataclasses.replace(
            load_cluster("h100-8x-ib400", num_gpus=max(8, self.num_ranks)),
            cross_rail=self.cross_rail,
            oversubscription=2.0 if self.cross_rail == "spine" else 1.0,
        )
        return topology_of(cluster, self.num_ranks, operation=None)

    def flows(self) -> Flows:
        shape = (self.num_ranks, self.num_ranks)
        if not self.skewed:
            return flows_of(np.full(shape, MEGA))
        return flows_of(stream(0, "fabric benchmark").lognormal(0.0, SIGMA, shape) * MEGA)


UNIFORM = [
    Case(num_ranks=64, skewed=False, least_ratio=5.0, num_runs=20),
    Case(num_ranks=128, skewed=False, least_ratio=5.0, num_runs=10),
    Case(num_ranks=256, skewed=False, least_ratio=5.0, num_runs=10),
    Case(num_ranks=512, skewed=False, num_runs=5),
    Case(num_ranks=1024, skewed=False, least_ratio=10.0),
]
SKEWED = [
    Case(num_ranks=16, skewed=True, least_ratio=5.0, num_runs=20),
    Case(num_ranks=32, skewed=True, least_ratio=5.0, num_runs=20),
    Case(num_ranks=64, skewed=True, least_ratio=10.0, num_runs=5),
    Case(num_ranks=128, skewed=True, limit_s=1.0),
    Case(num_ranks=256, skewed=True, limit_s=8.0, num_runs=1),
]
OTHERS = [
    Case(num_ranks=64, skewed=True, cross_rail="direct", least_ratio=5.0),
    Case(num_ranks=64, skewed=True, cross_rail="spine", least_ratio=5.0),
    Case(num_ranks=128, skewed=True, cross_rail="direct", limit_s=1.0),
    Case(num_ranks=128, skewed=True, cross_rail="spine", limit_s=1.0),
    Case(num_ranks=256, skewed=True, cross_rail="direct", limit_s=8.0, num_runs=1),
    Case(num_ranks=256, skewed=True, cross_rail="spine", limit_s=8.0, num_runs=1),
]
Simgrid = Callable[[Flows, Topology], tuple[int, float, Any]]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A case's processor seconds; SimGrid's where it was asked."""

    case: Case
    num_flows: int
    exact_s: float
    simgrid_s: float | None

    @property
    def broken(self) -> bool:
        """Whether it breaks a limit that the project promises."""
        late = self.case.limit_s is not None and self.exact_s > self.case.limit_s
        least = self.case.least_ratio
        return late or (self.simgrid_s is not None and least is not None and self.simgrid_s < least * self.exact_s)

    def __str__(self) -> str:
        case = self.case
        theirs, ratio = "", ""
        if self.simgrid_s is not None:
            theirs, ratio = f"{self.simgrid_s:.3g}", f"{self.simgrid_s / self.exact_s:.0f}"
        kind = "skewed" if case.skewed else "uniform"
        fabric = "spine 2:1" if case.cross_rail == "spine" else case.cross_rail
        return (
            f"| {kind} | {case.num_ranks:,} | {fabric} | {self.num_flows:,} | {self.exact_s:.3g} | {theirs} | {ratio} |"
        )


def measured(case: Case, simgrid: Simgrid | None) -> Row:
    """The best of the case's runs, and SimGrid's only one."""
    flows, topology = case.flows(), case.topology()
    seconds = []
    for _ in range(case.num_runs):
        start = time.process_time()
        finish_s(flows, topology)
        seconds.append(time.process_time() - start)
    theirs = simgrid(flows, topology)[1] if simgrid is not None and case.least_ratio is not None else None
    return Row(case=case, num_flows=flows.num_flows, exact_s=min(seconds), simgrid_s=theirs)


def rows(simgrid: Simgrid | None = None) -> list[Row]:
    """Every case, measured."""
    warm()
    return [measured(case, simgrid) for case in (*UNIFORM, *SKEWED, *OTHERS)]


def exponent(found: list[Row], by: Callable[[Row], float]) -> float:
    """x of seconds ~ size**x, by least squares on logarithms."""
    return float(np.polyfit(np.log([by(row) for row in found]), np.log([row.exact_s for row in found]), 1)[0])


def growth(found: list[Row]) -> list[tuple[str, list[Row], float, float]]:
    """(kind, rows, exponent over ranks, exponent over messages) of exchanges over PXN."""
    parts = []
    for kind, cases in (("uniform", UNIFORM), ("skewed", SKEWED)):
        part = [row for row in found if row.case in cases]
        parts.append((kind, part, exponent(part, lambda r: r.case.num_ranks), exponent(part, lambda r: r.num_flows)))
    return parts


def draw(found: list[Row]) -> None:
    """Seconds over messages, both axes logarithmic, into FIGURE."""
    from moesim.report.style import COLOURS, finish, headline, house_style, new_figure

    with house_style():
        figure = new_figure(7.0, 4.0)
        axes = figure.subplots()
        for (kind, part, _, power), colour in zip(growth(found), ("compute", "moe"), strict=True):
            sizes, seconds = [row.num_flows for row in part], [row.exact_s for row in part]
            axes.loglog(sizes, seconds, "o-", color=COLOURS[colour], label=f"{kind}: messages$^{{{power:.2f}}}$")
            asked = [(row.num_flows, row.simgrid_s) for row in part if row.simgrid_s is not None]
            if asked:
                label = f"{kind}, SimGrid"
                axes.loglog(*zip(*asked, strict=True), "s:", color=COLOURS[colour], alpha=0.6, label=label)
        axes.set_xlabel("messages")
        axes.set_ylabel("processor seconds")
        axes.legend()
        headline(figure, "Exact finishes: symmetry makes uniform exchanges cheap, skewed ones grow with the messages")
    text = finish(figure, "Seconds of the exact mode over the number of messages").svg
    FIGURE.write_text(text.replace("<svg ", '<svg style="background:white" ', 1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simgrid", metavar="PREFIX")
    parser.add_argument("--simgrid-binary", metavar="PATH", type=Path)
    parser.add_argument("--draw", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        simgrid, version = None, ""
        if options.simgrid or options.simgrid_binary:
            make = runpy.run_path(str(ROOT / "tests" / "goldens" / "fabric" / "make.py"))
            binary = options.simgrid_binary or make["build"](Path(folder), options.simgrid)
            tiny = Case(num_ranks=8, skewed=False)
            number = make["run_simgrid"](binary, tiny.flows(), tiny.topology())[0]
            version = f" {number // 10000}.{number // 100 % 100}"

            def simgrid(flows: Flows, topology: Topology) -> tuple[int, float, Any]:
                return make["run_simgrid"](binary, flows, topology)  # type: ignore[no-any-return]

        found = rows(simgrid)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"## Exchanges in exact mode\n\nProcessor seconds on one core; skewed: lognormal bytes, sigma {SIGMA:g}.\n")
    print(f"| bytes | ranks | rails | messages | exact [s] | SimGrid{version} [s] | ratio |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(map(str, found)))
    print(f"\nPeak memory of the whole run: {peak / GIB:.2f} GiB.")
    for kind, _, ranks, messages in growth(found):
        print(f"{kind.capitalize()} over PXN: seconds grow as ranks^{ranks:.2f}, messages^{messages:.2f}.")
    if options.draw:
        draw(found)
        print(f"\n![Growth of exact mode](figures/{FIGURE.name})")
    broken = [row for row in found if row.broken]
    if broken or peak > MOST_BYTES:
        print("over the limit:", *broken, f"{peak / GIB:.2f} GiB", sep="\n", file=sys.stderr)
    return 1 if broken or peak > MOST_BYTES else 0


if __name__ == "__main__":
    raise SystemExit(main())
