"""The memory notebook's own parameters in, its results out: results.json and results.csv."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.errors import InputError
from moesim.report.export import write_study
from moesim.report.parameters import OWNER

if TYPE_CHECKING:
    from moesim.scenario import Scenario
    from moesim.study.memory import MemoryStudy


def read_ginis(own: Mapping[str, Any]) -> tuple[float, ...]:
    """``ginis`` of the notebook's own parameters; those of the study where empty. InputError for others.

    >>> read_ginis({"ginis": "0, 0.3"})
    (0.0, 0.3)
    """
    from moesim.study.memory import GINIS

    rule = "must be at least two numbers from 0 to 0.95 with commas between them, rising"
    try:
        found = tuple(float(word) for word in own["ginis"].split(",") if word.strip()) or GINIS
    except ValueError:
        raise InputError(OWNER, "ginis", rule, own["ginis"]) from None
    if len(found) < 2 or list(found) != sorted(set(found)) or not 0 <= found[0] <= found[-1] <= 0.95:
        raise InputError(OWNER, "ginis", rule, own["ginis"])
    return found


def write_memory(scenario: Scenario, study: MemoryStudy, out_dir: str | Path) -> list[Path]:
    """Write results.json and results.csv, nothing where out_dir is ""; returns their paths.

    Raises InputError where the folder cannot be written.
    """
    return write_study(
        out_dir,
        command="report",
        inputs={"scenario": scenario.to_dict()},
        result=study.to_dict(),
        rows=study.rows(),
        warnings=study.step.warnings,
    )
