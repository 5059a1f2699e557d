"""Scored rows as files for other programs and for readers: results.json, accuracy.md and its figure."""

from __future__ import annotations

import json
from pathlib import Path

from moesim.door import write_text_atomically
from moesim.report.accuracy_figures import predicted_measured
from moesim.report.accuracy_page import accuracy_section, write_section
from moesim.report.export import SCHEMA_VERSION
from moesim.study.accuracy import Accuracy


def write_accuracy(accuracy: Accuracy, out_dir: str | Path) -> list[Path]:
    """Write results.json, accuracy.md and accuracy-KIND.svg, nothing where out_dir is ""; returns their paths.

    Raises InputError where the folder cannot be written.
    """
    if not str(out_dir):
        return []
    folder, figure = Path(out_dir), f"accuracy-{accuracy.kind}.svg"
    paths = [folder / "results.json", folder / figure, folder / "accuracy.md"]
    envelope = {
        "schema_version": SCHEMA_VERSION,
        "command": "report",
        "inputs": {"kind": accuracy.kind},
        "result": accuracy.to_dict(),
        "provenance": [{"part": "measurements", "kind": "measured", "source": "named in each row"}],
        "warnings": [f"{len(accuracy.not_expressed)} rows have no prediction"] if accuracy.not_expressed else [],
    }
    text = json.dumps(envelope, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False)
    write_text_atomically(paths[0], text + "\n")
    write_text_atomically(paths[1], predicted_measured(accuracy).svg + "\n")
    write_section(paths[2], accuracy.kind, accuracy_section(accuracy, figure=figure))
    return paths
