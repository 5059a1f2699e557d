"""The placement notebook's own parameters in, its results out: results.json, results.csv, the best layout as a map."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesim.errors import InputError
from moesim.placement.maps import save_map
from moesim.report.export import write_study
from moesim.report.parameters import OWNER
from moesim.study.place import policy_of
from moesim.study.placement import PlacementStudy


@dataclass(frozen=True, kw_only=True)
class Lists:
    """The notebook's lists, which papermill passes as texts."""

    policies: tuple[str, ...]
    slots: tuple[int, ...]


def read_lists(own: Mapping[str, Any]) -> Lists:
    """``policies`` and ``slots`` of the notebook's own parameters; InputError for an unknown policy or no number.

    >>> read_lists({"policies": "contiguous, search", "slots": "8,16"}).slots
    (8, 16)
    """
    policies = tuple(word.strip() for word in own["policies"].split(",") if word.strip())
    for policy in policies:
        policy_of(policy)
    words = [word.strip() for word in own["slots"].split(",") if word.strip()]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise InputError(OWNER, "slots", "must be whole numbers with commas between them", own["slots"])
    return Lists(policies=policies, slots=tuple(int(word) for word in words))


def write_placement(study: PlacementStudy, out_dir: str | Path) -> list[Path]:
    """Write results.json, results.csv and physical_to_logical.json, the fastest policy's layout; returns their paths.

    Nothing is written where out_dir is "". The same study gives the same bytes. Raises InputError where the folder
    cannot be written.
    """
    if not str(out_dir):
        return []
    paths = write_study(
        out_dir,
        command="place",
        inputs={"scenario": study.scenario.to_dict()},
        result=study.to_dict(),
        rows=study.rows(),
    )
    paths.append(Path(out_dir) / "physical_to_logical.json")
    save_map(paths[-1], study.fastest.placed.placements)
    return paths
