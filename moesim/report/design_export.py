"""The design notebook's own parameters in, its results out: results.json and results.csv."""

from __future__ import annotations

from pathlib import Path

from moesim.errors import InputError, check, near_match
from moesim.report.export import write_study
from moesim.report.parameters import OWNER
from moesim.study.design_axes import AXES, DesignStudy, Value
from moesim.study.quality import SOURCE, TOKENS


def read_axes(text: str) -> dict[str, tuple[Value, ...]] | None:
    """What to try by axis, from a text such as ``top_k=2,4; capacity_factor=none,1.25``; None where it is empty.

    Raises InputError for an unknown axis and for what is no number.

    >>> read_axes("top_k=2,4; capacity_factor=none,1.25")
    {'top_k': (2.0, 4.0), 'capacity_factor': (None, 1.25)}
    """
    rule = "must read such as num_experts=64,128; capacity_factor=none,1.25"
    tried: dict[str, tuple[Value, ...]] = {}
    for item in filter(None, (part.strip() for part in text.split(";"))):
        axis, _, listed = (part.strip() for part in item.partition("="))
        check(axis in AXES, OWNER, "axes", "names no axis", axis, near_match(axis, AXES))
        try:
            values = tuple(None if word.strip() == "none" else float(word) for word in listed.split(","))
        except ValueError:
            raise InputError(OWNER, "axes", rule, item) from None
        check(all(value is not None or axis == "capacity_factor" for value in values), OWNER, "axes", rule, item)
        check(axis not in tried, OWNER, "axes", "must name an axis once", axis)
        tried[axis] = values
    return tried or None


def write_design(study: DesignStudy, out_dir: str | Path) -> list[Path]:
    """Write results.json and results.csv, nothing where out_dir is ""; returns their paths.

    Raises InputError where the folder cannot be written.
    """
    estimate = [{"part": "quality", "kind": "estimate", "source": f"{SOURCE}, after {TOKENS:g} tokens"}]
    return write_study(
        out_dir,
        command="design",
        inputs={"scenario": study.scenario.to_dict()},
        result=study.to_dict(),
        rows=study.rows(),
        provenance=estimate if study.asked.quality is not None else [],
        warnings=[f"{point.name}: {point.note}" for point in study.points if point.note],
    )
