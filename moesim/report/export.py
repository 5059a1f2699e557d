"""A study as files for other programs: results.json, results.csv, and the step's trace for Perfetto."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moesim.door import write_text_atomically
from moesim.study.advice import Change
from moesim.study.planning import PlanningStudy
from moesim.timeline.step import run_step

SCHEMA_VERSION = 1
CSV_COLUMNS = ("section", "name", "x", "value", "unit")


def write_results(study: PlanningStudy, changes: Sequence[Change], out_dir: str | Path) -> list[Path]:
    """Write results.json, results.csv and trace.json into out_dir and return their paths; none where out_dir is "".

    The same study gives the same bytes. Raises InputError where the folder cannot be written.

    >>> write_results(study, changes, "out/report")  # doctest: +SKIP
    """
    if not str(out_dir):
        return []
    folder = Path(out_dir)
    paths = [folder / name for name in ("results.json", "results.csv", "trace.json")]
    write_text_atomically(paths[0], results_json(study, changes))
    write_text_atomically(paths[1], results_csv(study, changes))
    run_step(study.scenario).write_chrome(paths[2])
    return paths


def results_json(study: PlanningStudy, changes: Sequence[Change]) -> str:
    """The study in the envelope of every --json (without ``run``: nothing of when or where it ran)."""
    inputs = {"scenario": study.scenario.to_dict(), "tokens_to_train": study.tokens_to_train}
    envelope: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "command": "report",
        "inputs": inputs,
        "result": study.to_dict() | {"changes": [dataclasses.asdict(change) for change in changes]},
        "provenance": [dataclasses.asdict(item) for item in study.step.provenance],
        "warnings": list(study.step.warnings),
    }
    return json.dumps(envelope, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def results_csv(study: PlanningStudy, changes: Sequence[Change]) -> str:
    """The study as one long table: section, name, x, value, unit."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    writer.writerows(study.rows())
    for change in changes:
        writer.writerow(("changes", change.name, "", change.peak_bytes, "B"))
        if change.tokens_per_s_per_gpu is not None:
            writer.writerow(("changes", change.name, "", change.tokens_per_s_per_gpu, "tokens/s"))
    return text.getvalue()
