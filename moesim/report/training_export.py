"""A training study as files for other programs: results.json and results.csv."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from moesim.door import write_text_atomically
from moesim.report.export import CSV_COLUMNS, SCHEMA_VERSION
from moesim.study.training import TrainingStudy


def write_training(study: TrainingStudy, out_dir: str | Path) -> list[Path]:
    """Write results.json and results.csv of the recorded runs; none where out_dir is "". Live runs are not in them.

    The same runs give the same bytes. Raises InputError where the folder cannot be written.
    """
    if not str(out_dir):
        return []
    folder = Path(out_dir)
    paths = [folder / name for name in ("results.json", "results.csv")]
    facts = study.facts
    made = f"{facts['date']}, torch {facts['torch']}"
    envelope = {
        "schema_version": SCHEMA_VERSION,
        "command": "report",
        "inputs": {"config": facts["config"], "text": facts["text"]},
        "result": study.to_dict(),
        "provenance": [{"part": "training runs", "kind": "measured", "source": f"reference_model, {made}"}],
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
