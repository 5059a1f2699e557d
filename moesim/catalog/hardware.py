"""GPUs and clusters by name or from a user's file. Files may say ``450 GB/s``; here it becomes SI with its source.

A number in a file is ``{value, unit, kind, source, date}``, or a bare text such as ``450 GB/s`` in a user's file: then
its kind is assumed and its source the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

from moesim.describe.hardware import Cluster, Gpu, NumberKind, Sourced
from moesim.door import apply_overrides, parse_as, read_yaml, refusals_of
from moesim.errors import InputError, check, near_match
from moesim.units import parse_quantity

GPU_NAMES = ("a100-80gb", "h100-sxm", "h800", "h200", "b200", "gb200", "gb300")
CLUSTER_NAMES = (
    "a100-8x-ib200",
    "h100-8x-ib400",
    "h100-8x-roce400",
    "h800-8x-ib400",
    "h200-8x-ib400",
    "b200-8x-ib400",
    "gb200-nvl72",
    "gb300-nvl72",
)
# Files hold the catalog's own name of each derate; unknown ones are refused so that a misspelt one is not ignored.
DERATE_NAMES = (
    "nvlink_alltoall",
    "nvlink_allgather",
    "nvlink_reducescatter",
    "nvlink_allreduce",
    "nic_alltoall",
    "nic_allreduce",
    "spine_alltoall",  # what hashing or adaptive routing leaves of a leaf's up-links
)

_CATALOG = Path(__file__).parent
_SI_UNITS = {"bytes": "B", "bytes_per_s": "B/s", "s": "s", "flops_per_s": "FLOP/s", "w": "W"}
_PLAIN_UNITS = ("count", "fraction")
Dimension = Literal["bytes", "bytes_per_s", "s", "flops_per_s", "w", "count", "fraction"]


@dataclass(frozen=True, kw_only=True)
class _Number:
    """A number as a catalog file writes it."""

    value: float
    unit: str
    kind: NumberKind
    source: str
    date: str


@dataclass(frozen=True, kw_only=True)
class _GpuFile:
    """The keys of a GPU file, or of the mapping ``gpu`` in a cluster file."""

    name: str
    memory: Any
    memory_bandwidth: Any
    peak: Mapping[str, Any]
    nvlink: Any
    tdp: Any
    num_sms: Any
    calibration_name: str = ""
    host_link: Any = None


@dataclass(frozen=True, kw_only=True)
class _ClusterFile:
    """The keys of a cluster file."""

    gpu: str | Mapping[str, Any]
    num_gpus: int
    ranks_per_node: int
    nic: Any
    nvlink: Any = None
    latency_intra: Any = None
    latency_inter: Any = None
    name: str = ""
    schema: Literal[1] = 1
    cross_rail: Literal["pxn", "direct", "spine"] = "pxn"
    oversubscription: float = 1.0
    num_planes: int = 1
    num_paths: int = 1
    derates: Mapping[str, Any] = field(default_factory=dict)


def load_gpu(name_or_mapping: str | Mapping[str, Any], owner: str = "gpu") -> Gpu:
    """A GPU of the catalog by name, or one described by a mapping with the keys of a GPU file. Raises InputError.

    >>> load_gpu("h800").nvlink_bytes_per_s.unit
    'B/s'
    """
    if isinstance(name_or_mapping, str):
        known = name_or_mapping in GPU_NAMES
        check(known, owner, "gpu", "is not a known GPU", name_or_mapping, near_match(name_or_mapping, GPU_NAMES))
        return _catalog_gpu(name_or_mapping)
    return _gpu(name_or_mapping, owner, source=owner)


@cache
def _catalog_gpu(name: str) -> Gpu:
    path = _CATALOG / "gpus" / f"{name}.yaml"
    return _gpu(read_yaml(path), f"gpus/{name}.yaml", source="")


def _gpu(raw: object, owner: str, source: str) -> Gpu:
    file = parse_as(_GpuFile, raw, owner)
    peaks = {key: sourced(value, "flops_per_s", f"{owner}.peak", key, source) for key, value in file.peak.items()}
    values: dict[str, Any] = {
        "name": file.name,
        "memory_bytes": sourced(file.memory, "bytes", owner, "memory", source),
        "memory_bytes_per_s": sourced(file.memory_bandwidth, "bytes_per_s", owner, "memory_bandwidth", source),
        "peak_flops_per_s": peaks,
        "nvlink_bytes_per_s": sourced(file.nvlink, "bytes_per_s", owner, "nvlink", source),
        "tdp_w": sourced(file.tdp, "w", owner, "tdp", source),
        "num_sms": sourced(file.num_sms, "count", owner, "num_sms", source),
        "host_bytes_per_s": sourced(
            _defaults()["host_link"] if file.host_link is None else file.host_link,
            "bytes_per_s",
            owner,
            "host_link",
            source,
        ),
        "calibration_name": file.calibration_name,
    }
    with refusals_of(owner):
        return Gpu(**values)


def load_cluster(name_or_path: str | Path, num_gpus: int | None = None, *, changes: Sequence[str] = ()) -> Cluster:
    """A cluster of the catalog by name, or a user's YAML file by path; num_gpus replaces the file's count.

    changes: settings that replace or add keys of the file, such as ``oversubscription=2``. Raises InputError for an
    unknown name (with the nearest one), a bad file, or GPUs that do not fill whole nodes.

    >>> load_cluster("h800-8x-ib400", num_gpus=256).num_gpus
    256
    """
    text = str(name_or_path)
    if num_gpus is not None:
        whole = isinstance(num_gpus, int) and not isinstance(num_gpus, bool)
        check(
            whole, f"cluster {text}" if text in CLUSTER_NAMES else text, "num_gpus", "must be a whole number", num_gpus
        )
    return _preset(text, num_gpus) if text in CLUSTER_NAMES and not changes else _from_file(text, num_gpus, changes)


@cache
def _preset(name: str, num_gpus: int | None) -> Cluster:
    """A preset of the catalog; clusters are immutable, so one copy serves all."""
    return _from_file(name, num_gpus, ())


def _from_file(text: str, num_gpus: int | None, changes: Sequence[str]) -> Cluster:
    if text in CLUSTER_NAMES:
        path, owner, source = _CATALOG / "clusters" / f"{text}.yaml", f"cluster {text}", ""
    else:
        looks_like_path = "/" in text or text.endswith((".yaml", ".yml")) or Path(text).is_file()
        hint = near_match(text, CLUSTER_NAMES)
        check(looks_like_path, "cluster", "name", "is neither a known cluster nor a file", text, hint)
        path, owner, source = Path(text), text, text
    raw = read_yaml(path)
    if changes:
        check(isinstance(raw, dict), owner, "", "must be a mapping of the cluster's fields", type(raw).__name__)
        raw, source = apply_overrides(raw, changes), source or "--set"
    file = parse_as(_ClusterFile, raw, owner)
    return _cluster(file, owner, source, file.num_gpus if num_gpus is None else num_gpus, path.stem)


def _cluster(file: _ClusterFile, owner: str, source: str, num_gpus: int, default_name: str) -> Cluster:
    defaults = _defaults()
    gpu = load_gpu(file.gpu, f"{owner}: gpu" if isinstance(file.gpu, Mapping) else owner)
    for key, value in file.derates.items():
        check(key in DERATE_NAMES, f"{owner}.derates", key, "is an unknown key", value, near_match(key, DERATE_NAMES))
    derates = {}
    for key in DERATE_NAMES:
        derates[key] = sourced(
            file.derates.get(key, defaults["derates"][key]), "fraction", f"{owner}.derates", key, source
        )
        check(0 < derates[key].value <= 1, f"{owner}.derates", key, "must lie in 0..1", derates[key].value)

    def rate(value: object, name: str) -> Sourced:
        return sourced(value, "bytes_per_s", owner, name, source)

    def latency(value: object, name: str) -> Sourced:
        return sourced(defaults[name] if value is None else value, "s", owner, name, source)

    values: dict[str, Any] = {
        "name": file.name or default_name,
        "gpu": gpu,
        "num_gpus": num_gpus,
        "ranks_per_node": file.ranks_per_node,
        "nvlink_bytes_per_s": gpu.nvlink_bytes_per_s if file.nvlink is None else rate(file.nvlink, "nvlink"),
        "nic_bytes_per_s": rate(file.nic, "nic"),
        "latency_intra_s": latency(file.latency_intra, "latency_intra"),
        "latency_inter_s": latency(file.latency_inter, "latency_inter"),
        "cross_rail": file.cross_rail,
        "oversubscription": file.oversubscription,
        "num_planes": file.num_planes,
        "num_paths": file.num_paths,
        "derates": derates,
    }
    with refusals_of(owner):
        return Cluster(**values)


@cache
def _defaults() -> dict[str, Any]:
    defaults: dict[str, Any] = read_yaml(_CATALOG / "cluster_defaults.yaml")
    return defaults


def sourced(raw: object, dimension: Dimension, owner: str, name: str, source: str) -> Sourced:
    """A number of a file in SI with its pedigree.

    raw: ``{value, unit, kind, source, date}``; or, where ``source`` names a user's file, a bare quantity or number.
    Raises InputError.
    """
    if isinstance(raw, Mapping):
        number = parse_as(_Number, raw, f"{owner}.{name}")
        value = _to_si(number.value, number.unit, dimension, f"{owner}.{name}")
        return _checked(value, dimension, owner, name, number.kind, number.source, number.date)
    assert source, f"{owner}: {name} of the catalog has no source"
    if dimension in _PLAIN_UNITS:
        plain = isinstance(raw, (int, float)) and not isinstance(raw, bool)
        check(plain, owner, name, "must be a number", raw)
        assert isinstance(raw, (int, float))
        return _checked(float(raw), dimension, owner, name, "assumed", source, "")
    check(isinstance(raw, str), owner, name, f"must be a quantity with its unit, such as {_EXAMPLES[dimension]}", raw)
    try:
        value = parse_quantity(str(raw), dimension)
    except ValueError as error:
        raise InputError(owner, name, f"must be {error}", raw) from None
    return _checked(value, dimension, owner, name, "assumed", source, "")


_EXAMPLES = {"bytes": "80 GiB", "bytes_per_s": "450 GB/s", "s": "2 us", "flops_per_s": "989 TFLOP/s", "w": "700 W"}


def _to_si(value: float, unit: str, dimension: str, owner: str) -> float:
    if dimension in _PLAIN_UNITS:
        check(unit == dimension, owner, "unit", f"must be {dimension}", unit)
        return value
    try:
        return value * parse_quantity(f"1 {unit}", dimension)
    except ValueError as error:
        raise InputError(owner, "unit", f"must be {str(error).removeprefix('a number with ')}", unit) from None


def _checked(value: float, dimension: str, owner: str, name: str, kind: NumberKind, source: str, date: str) -> Sourced:
    if name.startswith("latency"):
        check(value >= 0, owner, name, "must not be negative", value)
    else:
        check(value > 0 and value < float("inf"), owner, name, "must be positive and finite", value)
    return Sourced(value=value, unit=_SI_UNITS.get(dimension, dimension), kind=kind, source=source, date=date)


def sourced_numbers(description: Gpu | Cluster) -> dict[str, Sourced]:
    """Every number of a GPU or cluster with its pedigree, by dotted name: what a report prints as provenance."""
    found: dict[str, Sourced] = {}
    for item in fields(description):
        value = getattr(description, item.name)
        if isinstance(value, Sourced):
            found[item.name] = value
        elif isinstance(value, Gpu):
            found |= {f"gpu.{name}": number for name, number in sourced_numbers(value).items()}
        elif isinstance(value, Mapping):
            found |= {f"{item.name}.{name}": number for name, number in value.items()}
    return found
