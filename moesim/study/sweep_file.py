"""What a sweep asks: a base scenario, and the points around it, as a grid or a list; each checked before any runs."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moesim.door.files import read_yaml
from moesim.door.journal import sha256_of_file
from moesim.door.parse import parse_as
from moesim.errors import InputError, MoesimError, check, near_match
from moesim.leaves import LEAVES, overruled
from moesim.scenario import Scenario
from moesim.units import MEGA

MAX_POINTS = int(MEGA)
GROUPS = ("parallel", "train", "routing", "placement")  # what a dotted name may begin with


@dataclass(frozen=True, kw_only=True)
class SweepFile:
    """A sweep file's shape. Names are flat (``ep``) or dotted (``routing.popularity.cv``), as with --set."""

    schema: Literal[1] = 1
    base: str | Mapping[str, Any] = field(default_factory=dict)  # a scenario file, or what would stand in one
    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # every combination of these values
    points: tuple[Mapping[str, Any], ...] = ()  # these settings, one by one; beside a grid: the grid for each

    def __post_init__(self) -> None:
        check(bool(self.grid or self.points), "sweep", "grid", "must name what varies (or give points)", "nothing")
        for name, values in self.grid.items():
            check(len(values) > 0, "sweep.grid", name, "must be a list of at least one value", list(values))
        for settings in self.points:
            for name in settings.keys() & self.grid.keys():
                raise InputError("sweep.points", name, "stands in the grid too: give it in one of them", settings[name])
        num = math.prod(len(values) for values in self.grid.values()) * max(len(self.points), 1)
        check(num <= MAX_POINTS, "sweep", "grid", f"must not be more than {MAX_POINTS} points", num)

    def settings(self) -> Iterator[dict[str, Any]]:
        """The settings of each point, in the file's order, the last axis fastest.

        >>> [*SweepFile(grid={"ep": (8, 16), "pp": (1, 2)}).settings()][1]
        {'ep': 8, 'pp': 2}
        """
        for listed in self.points or ({},):
            for values in itertools.product(*self.grid.values()):
                yield dict(listed) | dict(zip(self.grid, values, strict=True))


@dataclass(frozen=True, kw_only=True)
class Point:
    """One scenario of a sweep, or why it is none."""

    point_id: str  # sha256 of the canonical scenario; of what was asked, where that is refused
    settings: Mapping[str, Any]  # what sets it apart from the base, as the file spells it
    scenario: Scenario | None
    refusal: str = ""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A sweep's points, each once, and the files that they were read from."""

    points: tuple[Point, ...]
    num_repeated: int  # points that are another's scenario, left out
    sha256_of_files: Mapping[str, str]

    @property
    def refused(self) -> tuple[Point, ...]:
        return tuple(point for point in self.points if point.scenario is None)


def read_sweep(path: str | Path) -> SweepFile:
    """A sweep from its YAML file. Raises InputError."""
    sweep = parse_as(SweepFile, read_yaml(path), str(path))
    for name in dict.fromkeys([*sweep.grid, *(name for settings in sweep.points for name in settings)]):
        known = name in LEAVES or name.partition(".")[0] in GROUPS
        check(known, str(path), name, "is neither a flat name nor a.b", name, near_match(name, LEAVES))
    return sweep


def base_of(sweep: SweepFile, folder: Path) -> tuple[dict[str, Any], Path]:
    """(the base scenario's mapping, the folder where files that it names lie)."""
    raw, found = base_mapping(sweep.base, folder)
    assert found is not None
    return raw, found


def base_mapping(base: str | Mapping[str, Any], folder: Path | None) -> tuple[dict[str, Any], Path | None]:
    """(a base scenario's mapping, the folder of files that it names): base is that mapping, or a scenario file's name,
    looked up in folder first.
    """
    if not isinstance(base, str):
        return dict(base), folder
    near = folder / base if folder is not None else Path(base)
    file = near if near.is_file() else Path(base)
    raw = read_yaml(file)
    check(isinstance(raw, dict), str(file), "", "must be a mapping of scenario fields", type(raw).__name__)
    return raw, file.parent


def ask_points(settings: Sequence[Mapping[str, Any]], base: Mapping[str, Any], folder: Path | None = None) -> Asked:
    """Check every point. One that is refused keeps its place, with the reason; InputError where all are.

    base: a scenario file's mapping. folder: where files that it names are looked up first.

    >>> ask_points([{"ep": 8}, {"ep": 7}], {"model": "mixtral-8x7b", "cluster": "h100-8x-ib400"}).refused[0].settings
    {'ep': 7}
    """
    found: dict[str, Point] = {}
    files: dict[str, str] = {}
    num_repeated = 0
    for named in settings:
        point = _ask(named, base, folder, files)
        same = found.setdefault(point.point_id, point)
        if same is point:
            continue
        num_repeated += 1
        rule = "is another design or cluster of the same name: name them apart, since results go by name"
        check(same.scenario == point.scenario, "sweep", words_of(point.settings), rule, words_of(same.settings))
    points = tuple(found.values())
    if all(point.scenario is None for point in points):
        raise MoesimError(f"none of {len(points)} points can be computed; the first: {points[0].refusal}")
    return Asked(points=points, num_repeated=num_repeated, sha256_of_files=files)


def _ask(named: Mapping[str, Any], base: Mapping[str, Any], folder: Path | None, files: dict[str, str]) -> Point:
    dotted = [f"{name}={json.dumps(value)}" for name, value in named.items() if name not in LEAVES]
    raw = overruled(base, {name: value for name, value in named.items() if name in LEAVES}, dotted)
    try:
        scenario = Scenario.from_mapping(raw, folder=folder)
    except MoesimError as error:
        name = hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()
        return Point(point_id=name, settings=named, scenario=None, refusal=str(error))
    for file in _files_of(scenario, folder):
        if file not in files:
            files[file] = sha256_of_file(file)
    return Point(point_id=scenario.point_id, settings=named, scenario=scenario)


def _files_of(scenario: Scenario, folder: Path | None) -> Iterator[str]:
    """The files that a scenario was read from, and will be: of these a point_id knows the name only."""
    raw, recorded = scenario.raw, getattr(scenario.routing.popularity, "file", None)
    for name in (raw["model"], raw["cluster"], scenario.profile, scenario.placement.map, recorded):
        for path in (folder / str(name) if folder is not None else Path(str(name)), Path(str(name))):
            path = path / "config.json" if path.is_dir() else path
            if name is not None and path.is_file():
                yield str(path)
                break


def words_of(settings: Mapping[str, Any]) -> str:
    """A point's settings in one line.

    >>> words_of({"ep": 8, "capacity_factor": None})
    'ep=8 capacity_factor=null'
    """
    spelt = ((name, value if isinstance(value, str) else json.dumps(value)) for name, value in settings.items())
    return " ".join(f"{name}={value}" for name, value in spelt) or "the base"
