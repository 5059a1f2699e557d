"""A study as files for other programs: results.json, results.csv, and the step's trace for Perfetto."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Mapping, Sequence
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
    """The study in the envelope of every --json."""
    return envelope_json(
        command="report",
        inputs={"scenario": study.scenario.to_dict(), "tokens_to_train": study.tokens_to_train},
        result=study.to_dict() | {"changes": [dataclasses.asdict(change) for change in changes]},
        provenance=[dataclasses.asdict(item) for item in study.step.provenance],
        warnings=study.step.warnings,
    )


def results_csv(study: PlanningStudy, changes: Sequence[Change]) -> str:
    """The study as one long table: section, name, x, value, unit."""
    rows: list[Sequence[Any]] = [*study.rows()]
    for change in changes:
        rows.append(("changes", change.name, "", change.peak_bytes, "B"))
        if change.tokens_per_s_per_gpu is not None:
            rows.append(("changes", change.name, "", change.tokens_per_s_per_gpu, "tokens/s"))
    return table_csv(rows)


def write_study(
    out_dir: str | Path,
    *,
    command: str,
    inputs: Mapping[str, Any],
    result: Mapping[str, Any],
    rows: Iterable[Sequence[Any]],
    provenance: Sequence[Mapping[str, Any]] = (),
    warnings: Sequence[str] = (),
) -> list[Path]:
    """Write a study's results.json and results.csv into out_dir, nothing where it is ""; returns their paths.

    rows: of CSV_COLUMNS. The same study gives the same bytes. Raises InputError where the folder cannot be written.
    """
    if not str(out_dir):
        return []
    paths = [Path(out_dir) / name for name in ("results.json", "results.csv")]
    text = envelope_json(command=command, inputs=inputs, result=result, provenance=provenance, warnings=warnings)
    write_text_atomically(paths[0], text)
    write_text_atomically(paths[1], table_csv(rows))
    return paths


def envelope_json(
    *,
    command: str,
    inputs: Mapping[str, Any],
    result: Mapping[str, Any],
    provenance: Sequence[Mapping[str, Any]] = (),
    warnings: Sequence[str] = (),
) -> str:
    """The envelope of every --json, without ``run``: nothing of when or where it ran."""
    envelope = {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "inputs": inputs,
        "result": result,
        "provenance": list(provenance),
        "warnings": list(warnings),
    }
    return json.dumps(envelope, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def table_csv(rows: Iterable[Sequence[Any]]) -> str:
    """One long table under CSV_COLUMNS."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    writer.writerows(rows)
    return text.getvalue()
