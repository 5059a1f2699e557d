"""The sizing notebook's own parameters in, its results out: results.json and results.csv."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesim.catalog.hardware import GPU_NAMES
from moesim.errors import InputError, near_match
from moesim.report.export import write_study
from moesim.report.parameters import OWNER
from moesim.study.sizing import SizingStudy
from moesim.study.uncertainty_inputs import Spread, spread_of

CLUSTERS = ("h200-8x-ib400", "b200-8x-ib400")


@dataclass(frozen=True, kw_only=True)
class Kinds:
    """The notebook's lists, which papermill passes as texts."""

    clusters: tuple[str, ...]
    sizes: tuple[int, ...]
    prices: Mapping[str, Spread]


def read_kinds(own: Mapping[str, Any]) -> Kinds:
    """``clusters``, ``sizes`` and ``prices`` of the notebook's own parameters; InputError for what they cannot be.

    >>> read_kinds({"clusters": "none", "sizes": "512,1024", "prices": "h800:1.5..2"}).sizes
    (512, 1024)
    """
    words = tuple(word.strip() for word in own["clusters"].split(",") if word.strip())
    prices = {}
    for text in own["prices"].split(","):
        name, colon, price = (part.strip() for part in text.partition(":"))
        if not text.strip():
            continue
        if not colon or name not in GPU_NAMES:
            raise InputError(
                OWNER, "prices", "must be GPU:PRICE, with commas between", text, near_match(name, GPU_NAMES)
            )
        prices[name] = spread_of(price, f"{OWNER}: prices: {name}")
    return Kinds(clusters=() if words == ("none",) else words or CLUSTERS, sizes=_sizes(own["sizes"]), prices=prices)


def _sizes(text: str) -> tuple[int, ...]:
    rule = "must be numbers of GPUs with commas between them, rising"
    try:
        found = tuple(int(word) for word in text.split(",") if word.strip())
    except ValueError:
        raise InputError(OWNER, "sizes", rule, text) from None
    if list(found) != sorted(set(found)) or any(size < 1 for size in found):
        raise InputError(OWNER, "sizes", rule, text)
    return found


def write_sizing(study: SizingStudy, out_dir: str | Path) -> list[Path]:
    """Write results.json and results.csv, nothing where out_dir is ""; returns their paths.

    Raises InputError where the folder cannot be written.
    """
    return write_study(
        out_dir,
        command="cluster_sizing",
        inputs={"scenario": study.scenario.to_dict()},
        result=study.to_dict(),
        rows=study.rows(),
        warnings=[f"{point.name}: {point.reason}" for point in study.points if point.reason],
    )
