"""The goodput notebook's own parameters in, its results out: results.json and results.csv."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesim.catalog.failures import sources
from moesim.door import write_text_atomically
from moesim.report.export import CSV_COLUMNS, SCHEMA_VERSION
from moesim.study.goodput import GoodputStudy, RunPlan
from moesim.units import GIGA, MINUTE_S


def plan_of(own: Mapping[str, Any]) -> RunPlan:
    """The run that the notebook's own parameters ask for. Raises InputError."""
    minutes, rate = own["checkpoint_interval_min"], own["checkpoint_gb_per_s"]
    return RunPlan(
        tokens=own["tokens_to_train"],
        fleet=own["fleet"],
        inspected=own["inspected"],
        num_spares=own["num_spares"],
        checkpoint_interval_s=None if minutes is None else minutes * MINUTE_S,
        checkpoint_write_bytes_per_s=None if rate is None else rate * GIGA,
        checkpoint_async=own["checkpoint_async"],
        ramp_tokens=own["ramp_tokens"],
        ramp_batch=own["ramp_batch"],
        price_per_gpu_hour=own["price_per_gpu_hour"],
        currency=own["currency"],
        pue=own["pue"],
        num_runs=own["num_runs"],
    )


def write_goodput(study: GoodputStudy, out_dir: str | Path) -> list[Path]:
    """Write results.json and results.csv, nothing where out_dir is ""; returns their paths.

    Raises InputError where the folder cannot be written.
    """
    if not str(out_dir):
        return []
    paths = [Path(out_dir) / name for name in ("results.json", "results.csv")]
    envelope = {
        "schema_version": SCHEMA_VERSION,
        "command": "goodput",
        "inputs": {"scenario": study.scenario.to_dict()},
        "result": study.to_dict(),
        "provenance": [{"part": part, "kind": kind, "source": source} for part, kind, source in sources()],
        "warnings": [],
    }
    text = json.dumps(envelope, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False)
    write_text_atomically(paths[0], text + "\n")
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    writer.writerows(study.rows())
    write_text_atomically(paths[1], table.getvalue())
    return paths
