"""A notebook's parameters: read from its tagged cell, checked by name and by type, made into a scenario.

papermill itself only warns about an unknown parameter and checks no type. Everything here stops instead, both before a
kernel starts (`moesim.report.runner`) and in the notebook's first cell, so that plain papermill is as strict.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesim.door import parse_as, read_json
from moesim.errors import InputError, check, near_match
from moesim.leaves import LEAVES
from moesim.scenario import Scenario

OWNER = "parameters"
MARK = "# Parameters"  # how the parameters cell begins, and the one that papermill injects after it
_KINDS: Mapping[str, Any] = {"str": str, "int": int, "float": float, "bool": bool}
_FILES = ("model", "cluster", "profile")  # parameters that may name a file


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One annotated literal of a parameters cell: ``ep: int = 64``. kind is a type that the door's parse_as knows."""

    name: str
    kind: Any
    default: Any


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a notebook was asked: a scenario, and those parameters that are no part of one."""

    scenario: Scenario
    own: Mapping[str, Any]


def notebooks_folder() -> Path:
    """Where the notebooks lie: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent / "notebooks"
    return checkout if checkout.is_dir() and (package.parent / "pyproject.toml").is_file() else package / "_notebooks"


def find_notebook(name_or_path: str | Path) -> Path:
    """The notebook of a name such as ``10_planning_report``, or of a path. Raises InputError with a near match."""
    asked = Path(name_or_path)
    if asked.suffix == ".ipynb" and asked.is_file():
        return asked
    folder = notebooks_folder()
    known = {path.stem: path for path in sorted(folder.glob("*.ipynb"))}
    if asked.name in known and asked.parent == Path():
        return known[asked.name]
    raise InputError(
        "notebook",
        "",
        "must be a notebook of moesim or a path to one",
        str(name_or_path),
        near_match(asked.stem, known),
    )


def parameters_of(notebook: Path) -> dict[str, Parameter]:
    """The parameters of a notebook file, from the cell tagged ``parameters``. Raises InputError where there is none."""
    raw = read_json(notebook)
    cells = raw.get("cells", []) if isinstance(raw, dict) else []
    tagged = [c for c in cells if isinstance(c, dict) and "parameters" in (c.get("metadata") or {}).get("tags", [])]
    check(len(tagged) == 1, str(notebook), "cells", "must hold one cell tagged parameters", len(tagged))
    return parse_cell("".join(tagged[0].get("source", "")), str(notebook))


def parse_cell(source: str, owner: str = OWNER) -> dict[str, Parameter]:
    """The typed literals of a parameters cell, in order: ``ep: int = 64``, or ``gini = None  # type: float|None``.

    The second form is for a type with None, which papermill reads in a comment only.

    >>> parse_cell("ep: int = 64")["ep"].default
    64
    """
    found: dict[str, Parameter] = {}
    try:
        statements = ast.parse(source, type_comments=True).body
    except SyntaxError as error:
        raise InputError(owner, f"line {error.lineno}", "must be Python", error.msg) from None
    for statement in statements:
        name, kind, value = _typed_line(statement, owner)
        try:
            default = ast.literal_eval(value)
        except ValueError:
            raise InputError(owner, name, "must be a literal", ast.unparse(value)) from None
        found[name] = Parameter(name=name, kind=_kind(kind, owner, name), default=default)
    return found


def _typed_line(statement: ast.stmt, owner: str) -> tuple[str, str, ast.expr]:
    """(name, type in words, value) of one line of a parameters cell."""
    match statement:
        case ast.AnnAssign(target=ast.Name(id=name), annotation=kind, value=ast.expr() as value):
            return name, ast.unparse(kind), value
        case ast.Assign(targets=[ast.Name(id=name)], value=value, type_comment=str(comment)):
            return name, comment.split()[0], value
    rule = "must hold only lines such as ep: int = 64"
    raise InputError(owner, "parameters cell", rule, ast.unparse(statement))


def check_parameters(given: Mapping[str, Any], known: Mapping[str, Parameter]) -> dict[str, Any]:
    """Every parameter's value, given or default, of its declared type.

    Raises InputError for an unknown name (with the nearest known one) or a value of another type.
    """
    for name, value in given.items():
        if name not in known:
            raise InputError(OWNER, str(name), "is not a parameter", value, near_match(str(name), known))
    kinds = [(p.name, p.kind, dataclasses.field(default=p.default)) for p in known.values()]
    declared: type[Any] = dataclasses.make_dataclass("Parameters", kinds, frozen=True, kw_only=True)
    values = parse_as(declared, dict(given), OWNER)
    return {name: getattr(values, name) for name in known}


def ask(values: Mapping[str, Any], given: Sequence[str] = ()) -> Question:
    """The question that checked values ask. given: names that somebody set, as against those left at their default.

    Raises InputError and NotModelledError as Scenario does.
    """
    leaves = {name: value for name, value in values.items() if name in LEAVES}
    # A default that does not apply is no contradiction.
    if leaves.get("recording") is not None and "popularity" not in given:
        leaves.pop("popularity", None)
    if leaves.get("popularity") in (None, "balanced", "multinomial") and "gini" not in given:
        leaves.pop("gini", None)
    for name in _FILES:
        if name in leaves:
            leaves[name] = _locate(leaves[name])
    own = {name: value for name, value in values.items() if name not in LEAVES}
    if "tokens_to_train" in own:
        check(own["tokens_to_train"] > 0, OWNER, "tokens_to_train", "must be positive", own["tokens_to_train"])
    return Question(scenario=Scenario.make(**leaves), own=own)


def read_question(namespace: Mapping[str, Any]) -> Question:
    """The question of the running notebook, checked; call it with ``globals()`` in the cell after the parameters.

    Raises InputError for an unknown parameter or a wrong type, and whatever Scenario raises.
    """
    values, given = _values_of(namespace)
    return ask(values, given)


def read_values(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """The checked parameters of a running notebook that asks no scenario; call it as ``read_question``."""
    return _values_of(namespace)[0]


def has_scenario(known: Mapping[str, Parameter]) -> bool:
    """Whether a notebook of these parameters asks a scenario: it names a model or a cluster."""
    return bool({"model", "cluster"} & set(known))


def _values_of(namespace: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(every parameter's checked value, names that somebody set) of the cells that have run.

    The parameters cell gives names and types, papermill's injected cell what was set.
    """
    ran = [source for source in namespace.get("In", []) if source.lstrip().startswith(MARK)]
    declared = [i for i, source in enumerate(ran) if _is_declaration(source)]
    check(bool(declared), "notebook", "parameters cell", "must have run before this cell", f"{len(ran)} such cells")
    known = parse_cell(ran[declared[-1]])
    injected = {name for source in ran[declared[-1] + 1 :] for name in _assigned(source)}
    set_here = {name for name, p in known.items() if name in namespace and namespace[name] != p.default}
    given = {name: namespace[name] for name in (*known, *injected) if name in namespace}
    return check_parameters(given, known), sorted(injected | set_here)


def _is_declaration(source: str) -> bool:
    return any(isinstance(statement, ast.AnnAssign) for statement in ast.parse(source).body)


def _assigned(source: str) -> list[str]:
    return [
        t.id for s in ast.parse(source).body if isinstance(s, ast.Assign) for t in s.targets if isinstance(t, ast.Name)
    ]


def _kind(words: str, owner: str, name: str) -> Any:
    """The type that words such as ``float|None`` name."""
    parts = [part.strip() for part in words.split("|")]
    kinds = [_KINDS[part] for part in parts if part in _KINDS]
    known = len(kinds) == 1 and set(parts) <= {*_KINDS, "None"}
    check(known, owner, name, "must be typed as str, int, float or bool, perhaps |None", words)
    return kinds[0] | None if "None" in parts else kinds[0]


def _locate(name: Any) -> Any:
    """A file beside the notebooks' parameter files where a name is no file from here, so the examples run anywhere."""
    if isinstance(name, str) and name.endswith((".yaml", ".json")) and not Path(name).is_file():
        beside = notebooks_folder() / "params" / name
        if beside.is_file():
            return str(beside)
    return name
