"""A calibration study as files for other programs: results.json and results.csv."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from moesim.door import write_text_atomically
from moesim.report.export import CSV_COLUMNS, SCHEMA_VERSION
from moesim.study.calibration import CalibrationStudy


def write_calibration(study: CalibrationStudy, out_dir: str | Path) -> list[Path]:
    """Write results.json and results.csv, nothing where out_dir is ""; returns their paths.

    Raises InputError where the folder cannot be written.
    """
    if not str(out_dir):
        return []
    paths = [Path(out_dir) / name for name in ("results.json", "results.csv")]
    profile = study.profile
    source = f"{profile.device}, {profile.date}"
    envelope = {
        "schema_version": SCHEMA_VERSION,
        "command": "report",
        "inputs": {"profile": profile.name},
        "result": study.to_dict(),
        "provenance": [{"part": "points", "kind": "measured", "source": source}],
        "warnings": list(profile.notes),
    }
    text = json.dumps(envelope, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False)
    write_text_atomically(paths[0], text + "\n")
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    writer.writerows(study.rows())
    write_text_atomically(paths[1], table.getvalue())
    return paths
