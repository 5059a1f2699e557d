"""Scored rows as files for other programs and for readers: results.json, accuracy.md and its figure."""

from __future__ import annotations

from pathlib import Path

from moesim.door import write_text_atomically
from moesim.report.accuracy_figures import predicted_measured
from moesim.report.accuracy_page import accuracy_section, write_section
from moesim.report.export import envelope_json
from moesim.study.accuracy import Accuracy


def write_accuracy(accuracy: Accuracy, out_dir: str | Path) -> list[Path]:
    """Write results.json, accuracy.md and accuracy-KIND.svg, nothing where out_dir is ""; returns their paths.

    Raises InputError where the folder cannot be written.
    """
    if not str(out_dir):
        return []
    text = envelope_json(
        command="report",
        inputs={"kind": accuracy.kind},
        result=accuracy.to_dict(),
        provenance=[{"part": "measurements", "kind": "measured", "source": "named in each row"}],
        warnings=[f"{len(accuracy.not_expressed)} rows have no prediction"] if accuracy.not_expressed else [],
    )
    path = Path(out_dir) / "results.json"
    write_text_atomically(path, text)
    return [path, *write_pages(accuracy, Path(out_dir))]


def write_pages(accuracy: Accuracy, folder: Path) -> list[Path]:
    """Write accuracy-KIND.svg and accuracy.md; nothing where no row could be predicted.

    Raises InputError where the folder cannot be written.
    """
    if not accuracy.rows:
        return []
    figure = f"accuracy-{accuracy.kind}.svg"
    paths = [folder / figure, folder / "accuracy.md"]
    write_text_atomically(paths[0], predicted_measured(accuracy).svg + "\n")
    write_section(paths[1], accuracy.kind, accuracy_section(accuracy, figure=figure))
    return paths
