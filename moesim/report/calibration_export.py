"""A calibration study as files for other programs: results.json and results.csv."""

from __future__ import annotations

from pathlib import Path

from moesim.report.export import write_study
from moesim.study.calibration import CalibrationStudy


def write_calibration(study: CalibrationStudy, out_dir: str | Path) -> list[Path]:
    """Write results.json and results.csv, nothing where out_dir is ""; returns their paths.

    Raises InputError where the folder cannot be written.
    """
    profile = study.profile
    source = f"{profile.device}, {profile.date}"
    return write_study(
        out_dir,
        command="report",
        inputs={"profile": profile.name},
        result=study.to_dict(),
        rows=study.rows(),
        provenance=[{"part": "points", "kind": "measured", "source": source}],
        warnings=profile.notes,
    )
