"""A training study as files for other programs: results.json and results.csv."""

from __future__ import annotations

from pathlib import Path

from moesim.report.export import write_study
from moesim.study.training import TrainingStudy


def write_training(study: TrainingStudy, out_dir: str | Path) -> list[Path]:
    """Write results.json and results.csv of the recorded runs; none where out_dir is "". Live runs are not in them.

    The same runs give the same bytes. Raises InputError where the folder cannot be written.
    """
    facts = study.facts
    made = f"{facts['date']}, torch {facts['torch']}"
    return write_study(
        out_dir,
        command="report",
        inputs={"config": facts["config"], "text": facts["text"]},
        result=study.to_dict(),
        rows=study.rows(),
        provenance=[{"part": "training runs", "kind": "measured", "source": f"reference_model, {made}"}],
    )
