"""The validation notebook's parameters in, its results out: results.json, results.csv and junit.xml."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesim.door import write_text_atomically
from moesim.report.export import write_study
from moesim.report.junit import junit_xml
from moesim.report.parameters import notebooks_folder
from moesim.study.validate import Design, Validation, read_design


def design_of(values: Mapping[str, Any]) -> Design:
    """The design that the notebook's parameter names: a file, or one beside the notebooks' parameter files.

    Raises InputError.
    """
    path = Path(values["design"])
    beside = notebooks_folder() / "params" / path
    return read_design(beside if not path.is_file() and beside.is_file() else path)


def write_validation(found: Validation, out_dir: str | Path) -> list[Path]:
    """Write results.json, results.csv and junit.xml, nothing where out_dir is ""; returns their paths.

    Raises InputError where the folder cannot be written.
    """
    if not str(out_dir):
        return []
    paths = write_study(
        out_dir,
        command="validate",
        inputs={"scenario": found.design.scenario.to_dict()},
        result=found.to_dict(),
        rows=[("gates", gate.name, gate.status, gate.value, gate.unit) for gate in found.gates],
        provenance=[{"part": p.part, "kind": p.kind, "source": p.source} for p in found.step.provenance],
        warnings=found.step.warnings,
    )
    paths.append(Path(out_dir) / "junit.xml")
    write_text_atomically(paths[-1], junit_xml(found))
    return paths
