"""Plain values into frozen descriptions, strictly: what is wrong is named with its place, its rule and the value got.

A description is a dataclass; its type hints are the schema. No coercion but three that lose nothing: a whole number
where a float is wanted, a list where a tuple is, a quantity such as "450 GB/s" where the field's name carries a unit.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from moesim.door.files import MAX_DEPTH, parse_yaml
from moesim.errors import InputError, check, near_match
from moesim.units import parse_quantity

T = TypeVar("T")
_DIMENSIONS = ("bytes_per_s", "flops_per_s", "bytes", "w", "s")  # longest first: bytes_per_s ends in s too
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_NUMERIC = re.compile(r"\s*[-+]?(\d[\d_,]*\.?\d*|\.\d+)([eE][-+]?\d+)?\s*")
_EXPECTED = {str: "must be a text", bool: "must be true or false", type(None): "must be null"}


def parse_as(kind: type[T], raw: object, owner: str) -> T:
    """raw as the dataclass ``kind``; every failure is an InputError saying owner, field, rule, value got.

    raw: what read_yaml or read_json gives. A union of dataclasses is told apart by ``kind``; a bare text names one.

    >>> from moesim.describe.workload import Training
    >>> parse_as(Training, {"seq_len": 8192}, "scenario.train").seq_len
    8192
    """
    return typing.cast(T, _dataclass(kind, raw, owner))


@contextlib.contextmanager
def refusals_of(owner: str) -> Iterator[None]:
    """Refusals inside name ``owner``: a description knows its rule, not in which file it stands."""
    try:
        yield
    except InputError as error:
        raise InputError(owner, error.field, error.rule, error.got, error.hint) from None


def _dataclass(kind: type, raw: object, owner: str) -> object:
    if isinstance(raw, kind):
        return raw
    check(isinstance(raw, Mapping), owner, "", "must be a mapping of names to values", raw)
    assert isinstance(raw, Mapping)
    hints = _type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    for key, value in raw.items():
        if key not in fields:
            hint = near_match(key, fields) if isinstance(key, str) else "Keys are texts."
            raise InputError(owner, str(key), "is an unknown key", value, hint)
    values = {}
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if name in raw:
            values[name] = _convert(hints[name], raw[name], owner, name)
        elif required:
            raise InputError(owner, name, "is required", sorted(map(str, raw)), "Only these keys stand there.")
    with refusals_of(owner):
        return kind(**values)


@functools.cache
def _type_hints(kind: type) -> Mapping[str, Any]:
    """Once for each class: the texts of annotations are compiled, which takes longer than reading a description."""
    return typing.get_type_hints(kind)


def _convert(kind: Any, raw: object, owner: str, field: str) -> Any:
    """raw as the type ``kind``, or InputError(owner, field, ...)."""
    origin = get_origin(kind)
    if origin is typing.Annotated:
        return _convert(get_args(kind)[0], raw, owner, field)
    if kind is Any or kind is object:
        return raw
    if origin is Literal:
        return _literal(get_args(kind), raw, owner, field)
    if origin in (Union, types.UnionType):
        return _union(get_args(kind), raw, owner, field)
    if origin in (tuple, list):
        return _sequence(kind, raw, owner, field)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        check(isinstance(raw, Mapping), owner, field, "must be a mapping of names to values", raw)
        assert isinstance(raw, Mapping)
        for key in raw:
            check(isinstance(key, str), owner, field, "keys must be texts", key)
        inner = get_args(kind)[1]
        return {key: _convert(inner, value, f"{owner}.{field}", key) for key, value in raw.items()}
    if dataclasses.is_dataclass(kind):
        return _dataclass(typing.cast(type, kind), raw, f"{owner}.{field}")
    if kind in (int, float):
        return _number(kind, raw, owner, field)
    assert kind in _EXPECTED, f"parse_as does not know the type {kind} of {owner}.{field}"
    check(type(raw) is kind, owner, field, _EXPECTED[kind], raw)
    return raw


def _number(kind: type, raw: object, owner: str, field: str) -> float:
    """An int or float; a text with a unit where the field's name ends in one."""
    wanted = "must be a whole number" if kind is int else "must be a number"
    dimension = next((suffix for suffix in _DIMENSIONS if field.endswith("_" + suffix)), None)
    if isinstance(raw, str) and dimension and not _NUMERIC.fullmatch(raw):
        try:
            value = parse_quantity(raw, dimension)
        except ValueError as error:
            raise InputError(owner, field, f"must be {error}", raw) from None
        check(math.isfinite(value), owner, field, "must be finite", raw)
        return round(value) if kind is int else value
    if isinstance(raw, str) and _NUMERIC.fullmatch(raw):
        raise InputError(owner, field, wanted, raw, "It stands there as a text: write it without quotes and commas.")
    check(isinstance(raw, (int, float)) and not isinstance(raw, bool), owner, field, wanted, raw)
    assert isinstance(raw, (int, float))
    if kind is int:
        whole = isinstance(raw, float) and math.isfinite(raw) and raw.is_integer()
        check(isinstance(raw, int), owner, field, wanted, raw, f"Write {raw:.0f}." if whole else "")
        return raw
    try:
        value = float(raw)
    except OverflowError:
        raise InputError(owner, field, "must be finite", raw) from None
    check(math.isfinite(value), owner, field, "must be finite", raw)
    return value


def _literal(choices: tuple[Any, ...], raw: object, owner: str, field: str) -> Any:
    if any(raw == choice and type(raw) is type(choice) for choice in choices):
        return raw
    rule = "must be " + " or ".join(str(choice) for choice in choices)
    hint = near_match(raw, map(str, choices)) if isinstance(raw, str) else ""
    raise InputError(owner, field, rule, raw, hint if hint.startswith("Did you mean") else "")


def _union(members: tuple[Any, ...], raw: object, owner: str, field: str) -> Any:
    """A member of a union: null, a dataclass by its kind, or the first plain type that takes the value."""
    if raw is None and type(None) in members:
        return None
    members = tuple(member for member in members if member is not type(None))
    if len(members) == 1:
        return _convert(members[0], raw, owner, field)
    classes = {_kind_of(m): typing.cast(type, m) for m in members if dataclasses.is_dataclass(m)}
    if any(isinstance(raw, member) for member in classes.values()):
        return raw
    texts_allowed = any(member is str or get_origin(member) is Literal for member in members)
    if classes and isinstance(raw, str) and not texts_allowed:
        raw = {"kind": raw}
    if classes and isinstance(raw, Mapping):
        if len(classes) > 1 or "kind" in raw:
            check("kind" in raw, f"{owner}.{field}", "kind", "is required", raw, "One of " + ", ".join(sorted(classes)))
            _literal(tuple(classes), raw["kind"], f"{owner}.{field}", "kind")
            return _dataclass(classes[raw["kind"]], raw, f"{owner}.{field}")
        return _dataclass(next(iter(classes.values())), raw, f"{owner}.{field}")
    refusals = []
    for member in (member for member in members if not dataclasses.is_dataclass(member)):
        try:
            return _convert(member, raw, owner, field)
        except InputError as error:
            refusals.append(error)
    check(bool(refusals), f"{owner}.{field}", "", "must be a mapping of names to values", raw)
    rule = " or ".join(dict.fromkeys(error.rule.removeprefix("must be ") for error in refusals))
    raise InputError(owner, field, f"must be {rule}", raw, refusals[-1].hint)


def _kind_of(member: Any) -> str:
    """The word that tells a dataclass apart inside a union: the default of its field ``kind``."""
    return str(next((f.default for f in dataclasses.fields(member) if f.name == "kind"), member.__name__))


def _sequence(kind: Any, raw: object, owner: str, field: str) -> Any:
    check(isinstance(raw, (list, tuple)), owner, field, "must be a list", raw)
    assert isinstance(raw, (list, tuple))
    origin, inner = get_origin(kind), get_args(kind)
    if origin is tuple and inner[-1] is not Ellipsis:
        check(len(raw) == len(inner), owner, field, f"must be a list of {len(inner)} values", raw)
        kinds: tuple[Any, ...] = inner
    else:
        kinds = (inner[0],) * len(raw)
    items = [_convert(k, value, owner, f"{field}[{i}]") for i, (k, value) in enumerate(zip(kinds, raw, strict=True))]
    return tuple(items) if origin is tuple else items


def apply_overrides(raw: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of raw with each ``a.b=c`` set; values read as YAML scalars or flow lists.

    Raises InputError when an override is not of that form or would set a key inside a value that holds none.

    >>> apply_overrides({"train": {"seq_len": 4096}}, ["train.seq_len=8192", "seed=1"])
    {'train': {'seq_len': 8192}, 'seed': 1}
    """
    result = copy.deepcopy(dict(raw))
    for text in overrides:
        path, equals, value_text = text.partition("=")
        keys = [key.strip() for key in path.split(".")]
        well_formed = bool(equals) and all(_KEY.fullmatch(key) for key in keys)
        check(well_formed, "--set", text, "must read key=value or group.key=value", text)
        check(len(keys) <= MAX_DEPTH, "--set", path, f"must not nest deeper than {MAX_DEPTH}", len(keys))
        value = parse_yaml(value_text, f"--set {path}") if value_text.strip() else None
        group = result
        for depth, key in enumerate(keys[:-1]):
            if group.get(key) is None:
                group[key] = {}
            rule = f"cannot be set: {'.'.join(keys[: depth + 1])} is a single value, not a group"
            check(isinstance(group[key], dict), "--set", path, rule, group[key])
            group = group[key]
        group[keys[-1]] = value
    return result
