"""The all-to-all notebook's own parameters in, its results out: results.json and results.csv."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesim.errors import InputError
from moesim.report.export import write_study
from moesim.report.parameters import OWNER
from moesim.study.exchange import GINIS, TOKENS, ExchangeStudy


@dataclass(frozen=True, kw_only=True)
class Lists:
    """The notebook's lists, which papermill passes as texts."""

    tokens: tuple[int, ...]
    ginis: tuple[float, ...]


def read_lists(own: Mapping[str, Any]) -> Lists:
    """``tokens`` and ``ginis`` of the notebook's own parameters, their defaults where empty; InputError for others.

    >>> read_lists({"tokens": "8,64", "ginis": ""}).tokens
    (8, 64)
    """
    return Lists(
        tokens=_numbers(own, "tokens", int, 1, 1_000_000) or TOKENS,
        ginis=_numbers(own, "ginis", float, 0, 0.95) or GINIS,
    )


def _numbers(own: Mapping[str, Any], name: str, kind: type, low: float, high: float) -> tuple[Any, ...]:
    rule = f"must be numbers from {low:g} to {high:g} with commas between them, rising"
    try:
        found = tuple(kind(word) for word in own[name].split(",") if word.strip())
    except ValueError:
        raise InputError(OWNER, name, rule, own[name]) from None
    if not all(low <= number <= high for number in found) or list(found) != sorted(set(found)):
        raise InputError(OWNER, name, rule, own[name])
    return found


def write_exchange(study: ExchangeStudy, out_dir: str | Path) -> list[Path]:
    """Write results.json and results.csv, nothing where out_dir is ""; returns their paths.

    Raises InputError where the folder cannot be written.
    """
    return write_study(
        out_dir,
        command="alltoall",
        inputs={"scenario": study.scenario.to_dict()},
        result=study.to_dict(),
        rows=study.rows(),
    )
