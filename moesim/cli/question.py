"""From what was typed to a checked scenario: file, flat options, -p, --set, --seed, the later overruling."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.cli.call import Call
from moesim.errors import InputError, check, near_match

if TYPE_CHECKING:
    from moesim.scenario import Scenario


def scenario_of(call: Call, file: Path | None, parameters: Mapping[str, Any] | None = None) -> Scenario:
    """The scenario that a call asks for; parameters: its flat names, where they are not simply the typed ones.

    Without a file, a model, a cluster or a number of GPUs it is the default question (moesim.scenario.DEFAULTS);
    where one of them is named, sizes that are not named are 1. Raises InputError and NotModelledError.
    """
    from moesim.door.files import read_yaml
    from moesim.door.parse import apply_overrides
    from moesim.scenario import DEFAULTS, LEAVES, Scenario, merge, nest

    raw: dict[str, Any] = {}
    if file is not None:
        raw = read_yaml(file)
        check(isinstance(raw, dict), str(file), "", "must be a mapping of scenario fields", type(raw).__name__)
    leaves = dict(typed_parameters(call) if parameters is None else parameters)
    settings = [_dotted(text, LEAVES) for text in call.settings]
    named = {text.partition("=")[0].strip() for text in settings} | set(leaves)
    if file is None and not named & {"model", "cluster", "num_gpus"}:
        leaves = dict(DEFAULTS) | leaves
    if "popularity" in leaves:
        raw = merge(raw, {"routing": {"popularity": None}})
    raw = apply_overrides(merge(raw, nest(leaves)), settings)
    _name_the_lognormal(raw)
    if call.seed is not None:
        raw["seed"] = call.seed
    return Scenario.from_mapping(raw, owner=str(file or "scenario"), folder=file.parent if file else None)


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
    """The flat names of a papermill parameter file (-f); none without a file."""
    from moesim.door.files import read_yaml

    if path is None:
        return {}
    raw = read_yaml(path)
    check(isinstance(raw, dict), str(path), "", "must be a mapping of parameters", type(raw).__name__)
    return dict(raw)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _dotted(text: str, leaves: Mapping[str, tuple[str, ...]]) -> str:
    """A --set text with a flat name (ep=32) spelt as the file nests it (parallel.ep=32)."""
    name, equals, value = text.partition("=")
    if "." in name or name.strip() not in leaves:
        return text
    return ".".join(leaves[name.strip()]) + equals + value


def _name_the_lognormal(raw: dict[str, Any]) -> None:
    """A Gini coefficient given without a kind means the lognormal, the only kind that has one."""
    routing = raw.get("routing")
    popularity = routing.get("popularity") if isinstance(routing, dict) else None
    if isinstance(routing, dict) and isinstance(popularity, dict) and "kind" not in popularity and "gini" in popularity:
        routing["popularity"] = {"kind": "lognormal"} | popularity


def split_parameters(values: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(scenario leaves, the notebook's own parameters) of flat names; an unknown name is refused with a near match."""
    from moesim.scenario import LEAVES

    for name, value in values.items():
        if name not in LEAVES and name not in own:
            raise InputError("parameters", name, "is not a parameter", value, near_match(name, [*LEAVES, *own]))
    return {n: v for n, v in values.items() if n in LEAVES}, {n: v for n, v in values.items() if n in own}


def flat_leaves(scenario: Scenario, folder: Path | None) -> dict[str, Any]:
    """A checked scenario as flat names with every default filled in, as notebooks take them.

    folder: where the scenario's file lies, for model and cluster files beside it.
    """
    from moesim.scenario import LEAVES

    filled = scenario.to_dict()
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
