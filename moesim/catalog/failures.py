"""What interrupted published training runs, how often, and how long they took to go on (``failures.yaml``)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from moesim.describe.hardware import Sourced
from moesim.describe.reliability import FailureKind, Fleet, Operations
from moesim.door import parse_as, read_yaml
from moesim.errors import check, near_match
from moesim.units import GIGA, HOUR_S

_FILE = Path(__file__).parent / "failures.yaml"
_WORDS = {
    "fraction": "slow by",
    "per_gpu_hour": "how often",
    "bytes_per_parameter": "bytes of a parameter",
    "write_bytes_per_s": "rate of storage",
}
_SI = {"1/h": 1.0, "s": 1.0, "fraction": 1.0, "bytes": 1.0, "GB/s": GIGA}


@dataclass(frozen=True, kw_only=True)
class CheckpointFacts:
    """What a checkpoint holds and how fast storage takes it, where nobody says otherwise."""

    bytes_per_parameter: Sourced
    write_bytes_per_s: Sourced  # of the whole job


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = read_yaml(_FILE)
    return table


def _number(raw: Any) -> Sourced:
    found = parse_as(Sourced, {**raw, "date": str(raw["date"])}, "failures.yaml")
    return Sourced(
        value=found.value * _SI[found.unit],
        unit="B/s" if found.unit == "GB/s" else found.unit,
        kind=found.kind,
        source=found.source,
        date=found.date,
    )


def fleet_names() -> tuple[str, ...]:
    """The clusters whose rates are known.

    >>> fleet_names()
    ('rsc-1-a100', 'meta-32k-h100', 'llama-3-16k-h100')
    """
    return tuple(_table()["fleets"])


def load_fleet(name: str, *, inspected: bool = False) -> Fleet:
    """One cluster's rate and kinds. inspected: machines are watched, so that failures are known sooner.

    Raises InputError with a near match.
    """
    table = _table()
    known = table["fleets"]
    check(name in known, "goodput", "fleet", f"must be one of {', '.join(known)}", name, near_match(name, known))
    raw, timeout_s = known[name], float(table["detection"]["timeout"]["value"])
    total = sum(raw["shares"].values())
    kinds = tuple(
        FailureKind(
            name=kind,
            share=share / total,
            detection_s=float(table["kinds"][kind]["inspected_s"]) if inspected else timeout_s,
            needs_server=table["kinds"][kind]["needs_server"],
        )
        for kind, share in raw["shares"].items()
    )
    return Fleet(name=name, title=raw["title"], per_gpu_hour=_number(raw["per_gpu_hour"]), kinds=kinds)


def restart_s(num_gpus: int) -> float:
    """Seconds from knowing of a failure to the first step, for a job of so many GPUs.

    >>> restart_s(2048), restart_s(43000)
    (200.0, 450.0)
    """
    raw = _table()["restart"]
    gpus, seconds = np.array(raw["num_gpus"], dtype=float), np.array(raw["seconds"], dtype=float)
    if num_gpus > gpus[-1]:
        slope = (seconds[-1] - seconds[-2]) / (gpus[-1] - gpus[-2])
        return float(seconds[-1] + slope * (num_gpus - gpus[-1]))
    return float(np.interp(num_gpus, gpus, seconds))


def default_operations(num_gpus: int, num_spares: int = 0) -> Operations:
    """How a job of so many GPUs is run where nobody says otherwise."""
    table = _table()
    slow = table["slow_servers"]
    return Operations(
        restart_s=restart_s(num_gpus),
        num_spares=num_spares,
        swap_s=_number(table["swap"]).value,
        repair_s=_number(table["repair"]).value,
        slow_per_gpu_hour=_number(slow["per_gpu_hour"]).value,
        slow_fraction=_number(slow["fraction"]).value,
        slow_detection_s=_number(slow["detection"]).value,
    )


def checkpoint_facts() -> CheckpointFacts:
    """Bytes of a checkpoint and the storage's rate, with their sources."""
    raw = _table()["checkpoint"]
    return CheckpointFacts(
        bytes_per_parameter=_number(raw["bytes_per_parameter"]), write_bytes_per_s=_number(raw["write_bytes_per_s"])
    )


def sources() -> list[tuple[str, str, str]]:
    """(part, kind, source) of every default that a goodput estimate rests on."""
    table = _table()
    found = [
        *[(f"failures of {fleet['title']}", fleet["per_gpu_hour"]) for fleet in table["fleets"].values()],
        ("restart", table["restart"]),
        *[(f"detection: {name}", raw) for name, raw in table["detection"].items()],
        *[(f"slow servers: {_WORDS.get(name, name)}", raw) for name, raw in table["slow_servers"].items()],
        *[(f"checkpoint: {_WORDS[name]}", raw) for name, raw in table["checkpoint"].items()],
        ("repair", table["repair"]),
        ("swap", table["swap"]),
    ]
    return [(part, raw["kind"], raw["source"]) for part, raw in found]


def mean_time_between_s(rate_per_gpu_hour: float, num_gpus: int) -> float:
    """Mean seconds between interruptions of a job of so many GPUs.

    >>> round(mean_time_between_s(1.973e-5, 16384) / 3600, 2)
    3.09
    """
    return HOUR_S / (rate_per_gpu_hour * num_gpus)
