"""From what was typed to a checked scenario: file, flat options, -p, --set, --seed, the later overruling."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.cli.call import Call
from moesim.errors import check, near_match

if TYPE_CHECKING:
    from moesim.scenario import Scenario

FILE_LEAVES = (
    "model",
    "cluster",
    "profile",
    "recording",
    "map",
)  # may name a file, which is looked up beside the file that names it


def scenario_of(call: Call, file: Path | None, parameters: Mapping[str, Any] | None = None) -> Scenario:
    """The scenario that a call asks for; parameters: its flat names, where they are not simply the typed ones.

    Without a file, a model, a cluster or a number of GPUs it is the default question (moesim.scenario.DEFAULTS);
    where one of them is named, sizes that are not named are 1. Raises InputError and NotModelledError.
    """
    from moesim.door.files import read_yaml
    from moesim.scenario import DEFAULTS, Scenario

    raw: dict[str, Any] = {}
    if file is not None:
        raw = read_yaml(file)
        check(isinstance(raw, dict), str(file), "", "must be a mapping of scenario fields", type(raw).__name__)
    leaves = dict(typed_parameters(call) if parameters is None else parameters)
    named = {text.partition("=")[0].strip() for text in call.settings} | set(leaves)
    if file is None and not named & {"model", "cluster", "num_gpus"}:
        leaves = dict(DEFAULTS) | leaves
    raw = mapping_of(call, raw, leaves)
    return Scenario.from_mapping(raw, owner=str(file or "scenario"), folder=file.parent if file else None)


def mapping_of(call: Call, raw: Mapping[str, Any], leaves: Mapping[str, Any]) -> dict[str, Any]:
    """A scenario file's mapping with flat names and a call's --set and --seed laid over it."""
    from moesim.leaves import overruled

    seed = {} if call.seed is None else {"seed": call.seed}
    return overruled(raw, leaves, call.settings) | seed


def typed_parameters(call: Call) -> dict[str, Any]:
    """The flat names of a call as plain values: options first, then -p."""
    from moesim.door.files import parse_yaml

    values: dict[str, Any] = {name: parse_yaml(text, _flag(name)) for name, text in call.leaves.items()}
    for text in call.parameters:
        name, equals, value = text.partition("=")
        check(bool(equals), "-p", name, "must be followed by a name and a value", text)
        values[name] = parse_yaml(value, f"-p {name}")
    return values


def read_parameters(path: Path | None) -> dict[str, Any]:
    """The flat names of a papermill parameter file (-f), none without a file; a model file beside it is found."""
    from moesim.door.files import read_yaml

    if path is None:
        return {}
    raw = read_yaml(path)
    check(isinstance(raw, dict), str(path), "", "must be a mapping of parameters", type(raw).__name__)
    near = {name: path.parent / raw[name] for name in FILE_LEAVES if isinstance(raw.get(name), str)}
    return dict(raw) | {name: str(beside) for name, beside in near.items() if beside.is_file()}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def flat_settings(call: Call) -> dict[str, Any]:
    """The --set texts and the seed of a call as flat names, for a notebook; a field without a flat name is refused."""
    from moesim.door.parse import apply_overrides
    from moesim.leaves import LEAVES

    flat_of = {".".join(path): name for name, path in LEAVES.items()}
    found: dict[str, Any] = {} if call.seed is None else {"seed": call.seed}
    for text in call.settings:
        name = text.partition("=")[0].strip()
        path = ".".join(LEAVES[name]) if name in LEAVES else name
        named = path in flat_of
        check(named, "--set", path, "has no parameter in the report", text, near_match(path, flat_of))
        found |= apply_overrides({}, [flat_of[path] + "=" + text.partition("=")[2]])
    return found


def flat_leaves(scenario: Scenario, folder: Path | None) -> dict[str, Any]:
    """A checked scenario as flat names with every default filled in, as notebooks take them.

    folder: where the scenario's file lies, for model and cluster files beside it.
    """
    from moesim.leaves import LEAVES

    filled = scenario.to_dict()
    popularity = filled["routing"]["popularity"]
    if popularity["kind"] == "recorded":
        filled["routing"] |= {"recording": popularity["file"], "popularity": {}}
    speeds = filled["placement"]["rank_speeds"]
    filled["placement"]["rank_speeds"] = ",".join(f"{rank}={speed!r}" for rank, speed in speeds.items()) or None
    for name in ("model", "cluster"):
        asked = str(scenario.raw[name])
        near = folder / asked if folder is not None else None
        filled[name] = str(near) if near is not None and near.is_file() else asked
    flat: dict[str, Any] = {}
    for name, path in LEAVES.items():
        at: Any = filled
        for key in path:
            at = at.get(key) if isinstance(at, dict) else None
        if at is not None or name == "capacity_factor":
            flat[name] = at
    return flat
