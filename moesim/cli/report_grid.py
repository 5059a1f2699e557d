"""``moesim report --grid``: many parameter sets of one notebook, rendered in parallel, with an index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moesim.cli.call import DONE, GATE_FAILED, Call
from moesim.cli.output import Answer, Table, counting, fields_table
from moesim.errors import check


def render_reports(
    call: Call,
    notebook: str | None,
    scenario_file: str | None,
    params_file: Path | None,
    grid: Path,
    workers: int | None,
    resume: bool,
) -> Answer:
    """Check every parameter set, then render each into its folder under --out."""
    from moesim.cli.question import flat_settings, read_parameters, typed_parameters
    from moesim.cli.report import PLANNING_NOTEBOOK
    from moesim.door import parse_as, read_yaml
    from moesim.report.grid import INDEX, TABLE, ask_runs, render_grid
    from moesim.study.sweep_file import SweepFile, words_of
    from moesim.study.sweep_workers import processes

    name = notebook or PLANNING_NOTEBOOK
    is_scenario = Path(name).suffix in (".yaml", ".yml", ".json")
    rule = "takes flat parameters (base, -f, -p), no scenario file"
    check(scenario_file is None and not is_scenario, "--grid", "", rule, scenario_file or notebook)
    what = parse_as(SweepFile, read_yaml(grid), str(grid))
    based = read_parameters(grid.parent / what.base) if isinstance(what.base, str) else _beside(what.base, grid.parent)
    base = based | read_parameters(params_file) | typed_parameters(call) | flat_settings(call)
    runs = ask_runs(name, [_beside(settings, grid.parent) for settings in what.settings()], base)
    with counting(call, len(runs), "report") as progress:
        found = render_grid(
            name, runs, call.out or Path("out/reports"), workers=processes(workers), resume=resume, progress=progress
        )
    call.note(f"{found.num_rendered} reports rendered, {len(found.rows) - found.num_rendered} were there")
    files = [str(found.folder / file) for file in (INDEX, TABLE)]
    num_refused = sum(row["kind"] == "refused" for row in found.failed)
    fields = [
        ("Parameter sets", str(len(runs))),
        ("Reports", str(len(found.rows))),
        ("Refused", str(num_refused)),
        ("Failed", str(len(found.failed) - num_refused)),
        ("Index", files[0]),
    ]
    tables = [fields_table("Reports", fields)]
    if found.failed:
        rows = [(row["kind"], words_of(row["settings"]), row["error"]) for row in found.failed]
        tables.append(Table(title="Without a report", columns=("Kind", "Parameters", "Why"), rows=rows))
    return Answer(
        inputs={"notebook": name, "grid": str(grid), "base": base},
        result={"folder": str(found.folder), "files": files, "reports": found.rows, "failed": found.failed},
        tables=tables,
        exit_status=GATE_FAILED if len(found.failed) > num_refused or not found.rows else DONE,
        writes_own_files=True,
    )


def _beside(parameters: Any, folder: Path) -> dict[str, Any]:
    """Parameters with the files that they name looked up beside the grid first."""
    from moesim.cli.question import FILE_LEAVES

    near = {name: folder / parameters[name] for name in FILE_LEAVES if isinstance(parameters.get(name), str)}
    return dict(parameters) | {name: str(path) for name, path in near.items() if path.is_file()}
