"""Exact finishes against a foreign simulator: SimGrid's fluid links, kept as goldens and run live where installed."""

from __future__ import annotations

import runpy
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from fabric_cases import CASES, Case

from moesim.fabric.exact import finish_s
from moesim.fabric.flows import Flows
from moesim.fabric.topology import Topology

FABRIC = Path(__file__).parent / "goldens" / "fabric"
# SimGrid differs by 1e-14 (by 1e-8 on near-equal messages, which it merges); goldens are kept to seven digits.
EACH, LAST = 1e-6, 1e-9
LIVE = ["uniform-16-pxn", "lognormal-32-direct", "hot-node-32-spine-4", "staggered-16-pxn", "overlapping-32-pxn"]


@pytest.fixture(scope="module")
def make() -> dict[str, object]:
    return runpy.run_path(str(FABRIC / "make.py"))


@pytest.fixture(scope="module")
def goldens() -> dict[str, np.ndarray]:
    with np.load(FABRIC / "simgrid.npz") as file:
        return dict(file)


def busiest_link_s(flows: Flows, topology: Topology) -> float:
    link_FP = topology.routes(flows.source_F, flows.target_F).link_FP
    on_FP = link_FP >= 0
    load_J = np.bincount(link_FP[on_FP], np.broadcast_to(flows.bytes_F[:, None], on_FP.shape)[on_FP])
    return float((load_J / topology.rate_bytes_per_s_J[: load_J.size]).max())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_finish_equals_simgrids(case: Case, goldens: dict[str, np.ndarray], make: dict[str, object]) -> None:
    finish_F = finish_s(case.flows(), case.topology())
    kept = make["kept"](case, finish_F.size)  # type: ignore[operator]
    np.testing.assert_allclose(finish_F[kept], goldens[f"{case.name}/finish_s"], rtol=EACH)
    np.testing.assert_allclose(finish_F.max(), goldens[f"{case.name}/last_s"], rtol=LAST)


def test_the_goldens_are_simgrid_4_1s_and_cover_every_pattern_and_fabric(goldens: dict[str, np.ndarray]) -> None:
    assert int(goldens["simgrid_version"]) == 40100
    assert len(CASES) >= 24
    assert {case.num_ranks for case in CASES} >= {8, 16, 32, 64, 128}
    assert {case.cross_rail for case in CASES} == {"pxn", "direct", "spine"}


def test_with_an_oversubscribed_spine_the_last_ends_several_per_cent_after_the_busiest_link() -> None:
    """The comparison is of more than the busiest link: fair sharing leaves that link idle at times."""
    excess = {
        case.name: float(finish_s(case.flows(), case.topology()).max() / busiest_link_s(case.flows(), case.topology()))
        for case in CASES
        if case.oversubscription > 1 and case.pattern in ("lognormal", "zipf", "staggered", "overlapping")
    }
    assert max(excess.values()) > 1.05, excess
    assert min(excess.values()) > 1.0, excess


@pytest.fixture(scope="module")
def simgrid(tmp_path_factory: pytest.TempPathFactory, make: dict[str, object]) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("no g++: SimGrid's side cannot be built")
    try:
        return make["build"](tmp_path_factory.mktemp("simgrid"))  # type: ignore[operator,no-any-return]
    except subprocess.CalledProcessError:
        pytest.skip("SimGrid is not installed (Debian: libsimgrid-dev)")


@pytest.mark.parametrize("name", LIVE)
def test_every_finish_equals_the_installed_simgrids(name: str, simgrid: Path, make: dict[str, object]) -> None:
    (case,) = (case for case in CASES if case.name == name)
    flows, topology = case.flows(), case.topology()
    _, _, theirs_F = make["run_simgrid"](simgrid, flows, topology)  # type: ignore[operator]
    np.testing.assert_allclose(finish_s(flows, topology), theirs_F, rtol=EACH)
    np.testing.assert_allclose(finish_s(flows, topology).max(), theirs_F.max(), rtol=LAST)
