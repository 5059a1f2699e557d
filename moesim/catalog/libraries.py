"""What communication libraries achieve, by release: derates, latencies and rates per SM, each with the rows behind it.

``libraries.yaml`` holds one entry per (library, operations, tiers), fitted and written by tools/make_libraries.py. A
value that it does not give is the cluster's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from moesim.catalog.hardware import sourced
from moesim.describe.hardware import Sourced
from moesim.door import parse_as, read_yaml
from moesim.errors import check, near_match

Tier = Literal["nvlink", "nic", "sm", "nccl"]
ValueName = Literal["derate", "latency", "bytes_per_s"]
_FILE = Path(__file__).parent / "libraries.yaml"


@dataclass(frozen=True, kw_only=True)
class LibraryRate:
    """What a library's operations achieve on some tiers: what share of the link, after which start.

    derate: of the line rate (nvlink, nic, nccl). latency: seconds before the first byte (nvlink, nic); nccl: the factor
    on its tuner's latencies. bytes_per_s: what one SM moves (sm). gpus: this GPU's links only; empty: any.
    """

    library: str
    operations: tuple[str, ...]
    tiers: tuple[Tier, ...]
    fitted_on: str
    gpus: tuple[str, ...] = ()
    derate: Sourced | None = None
    latency: Sourced | None = None
    bytes_per_s: Sourced | None = None

    @property
    def num_constants(self) -> int:
        """Values that were fitted; those that stand for a published figure do not count."""
        return sum(value is not None for value in (self.derate, self.latency, self.bytes_per_s))


@dataclass(frozen=True, kw_only=True)
class Library:
    """A release of a communication library. uses_nvlink False: even copies inside a node go over the NICs."""

    name: str
    title: str
    kind: Literal["throughput", "low_latency", "nccl"]
    uses_nvlink: bool
    rates: tuple[LibraryRate, ...]

    def value(self, operation: str, tier: Tier, gpu: str, name: ValueName) -> float | None:
        """What an operation reaches on a tier of a GPU, or None where the cluster's own number holds."""
        fits = (
            getattr(rate, name)
            for rate in self.rates
            if tier in rate.tiers and operation in rate.operations and (not rate.gpus or gpu in rate.gpus)
        )
        found = next((value for value in fits if value is not None), None)
        return None if found is None else float(found)


@dataclass(frozen=True, kw_only=True)
class _RateFile:
    operations: tuple[str, ...]
    tiers: tuple[Tier, ...]
    fitted_on: str
    gpus: tuple[str, ...] = ()
    derate: Any = None
    latency: Any = None
    bytes_per_s: Any = None


@dataclass(frozen=True, kw_only=True)
class _LibraryFile:
    name: str
    title: str
    kind: Literal["throughput", "low_latency", "nccl"]
    uses_nvlink: bool = True
    rates: tuple[_RateFile, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _File:
    schema: Literal[1]
    libraries: tuple[_LibraryFile, ...]


@cache
def libraries() -> Mapping[str, Library]:
    """Every library release of the catalog, by name.

    >>> libraries()["deepep-v1"].kind
    'throughput'
    """
    file = parse_as(_File, read_yaml(_FILE), "libraries.yaml")
    return {entry.name: _library(entry) for entry in file.libraries}


def load_library(name: str) -> Library:
    """A library by name. Raises InputError with the nearest name."""
    known = libraries()
    check(name in known, "library", "name", "is not a known library", name, near_match(name, known))
    return known[name]


def _library(entry: _LibraryFile) -> Library:
    return Library(
        name=entry.name,
        title=entry.title,
        kind=entry.kind,
        uses_nvlink=entry.uses_nvlink,
        rates=tuple(_rate(entry.name, rate) for rate in entry.rates),
    )


def _rate(library: str, file: _RateFile) -> LibraryRate:
    owner = f"libraries.yaml: {library}.{'+'.join(file.tiers)}"

    def value(raw: object, dimension: Any, name: str) -> Sourced | None:
        return None if raw is None else sourced(raw, dimension, owner, name, "")

    return LibraryRate(
        library=library,
        operations=file.operations,
        tiers=file.tiers,
        fitted_on=file.fitted_on,
        gpus=file.gpus,
        derate=value(file.derate, "fraction", "derate"),
        latency=value(file.latency, "count" if "nccl" in file.tiers else "s", "latency"),
        bytes_per_s=value(file.bytes_per_s, "bytes_per_s", "bytes_per_s"),
    )
