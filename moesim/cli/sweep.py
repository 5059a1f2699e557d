"""The verb ``sweep``: many scenarios at once, on this machine's cores or on Dask's workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli.app import app
from moesim.cli.call import DONE, GATE_FAILED, Call, verb
from moesim.cli.output import Answer, Table, counting, fields_table
from moesim.errors import check

if TYPE_CHECKING:
    from moesim.study.sweep import SweepResult
    from moesim.study.sweep_workers import Workers

SHOWN = 8  # points of the best, and of those that failed
RANKED = ("tokens_per_s_per_gpu", "step_s", "memory.peak_bytes", "fits")  # results of points that have a best
EXAMPLES = (
    "Examples:",
    "moesim sweep sweep.yaml --out out/sweep",
    "moesim sweep sweep.yaml --out out/sweep --resume",
    "moesim sweep sweep.yaml --workers 8 --seed 1 --set routing.capacity_factor=1.25 --out out/other",
    "moesim sweep sweep.yaml --dask-scheduler-file scheduler.json --out out/sweep",
    "sweep.yaml: base (a scenario file's name, or what would stand in one), and grid (names to lists) or points (a "
    "list of names to values). Names: as the options of simulate (ep), or dotted (routing.popularity.cv).",
    "Files: results.jsonl while it runs, results.csv sorted by point_id at the end, failed.jsonl. Exit status 0 where "
    "every point that is a scenario has its result, 1 where one has none.",
)


@app.command(epilog="\n\n".join(EXAMPLES))
@verb(scenario=True, out_help="The sweep's folder (out/sweep).")
def sweep(
    call: Call,
    file: Annotated[
        Path, typer.Argument(metavar="SWEEP.yaml", help="Base and grid, or list of points.", show_default=False)
    ],
    by: Annotated[
        str,
        typer.Option(metavar="NAME", help="What computes a point: engine, fast, sizes, or package.module:function."),
    ] = "engine",
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Processes of this machine; by default its cores.", min=1)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what --out holds; retry what failed.")] = False,
    point_timeout_s: Annotated[
        float | None,
        typer.Option("--point-timeout", metavar="S", help="Give a point up that takes longer [s]. Local workers only."),
    ] = None,
    dask_address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Compute on the workers of this Dask scheduler.")
    ] = None,
    dask_scheduler_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The same, by the file that the scheduler wrote.")
    ] = None,
) -> Answer:
    """Compute a grid or list of scenarios: resumable, on any number of workers, the same bytes at the end."""
    from moesim.cli.question import mapping_of, typed_parameters
    from moesim.study.sweep import FAILED, RESULTS, TABLE
    from moesim.study.sweep import sweep as run_sweep
    from moesim.study.sweep_file import ask_points, base_of, read_sweep
    from moesim.study.sweep_points import function_of

    function_of(by)
    chosen = _workers(workers, point_timeout_s, dask_address, dask_scheduler_file)
    what = read_sweep(file)
    base, folder = base_of(what, file.parent)
    asked = ask_points([*what.settings()], mapping_of(call, base, typed_parameters(call)), folder)
    with counting(call, len(asked.points), "point") as progress:
        found = run_sweep(asked, call.out or Path("out/sweep"), by=by, workers=chosen, resume=resume, progress=progress)
    call.note(f"{found.num_computed} points computed, {len(found.rows) - found.num_computed} were there")
    if found.num_torn:
        call.note(f"{found.num_torn} torn lines of an earlier run were recognised; their points were computed again")
    warnings = [f"{asked.num_repeated} points repeat another and are left out"] if asked.num_repeated else []
    num_failed = len(found.failed) - found.num_refused
    return Answer(
        inputs={"sweep": str(file), "by": by, "settings": call.settings, "seed": call.seed},
        result={
            "folder": str(found.folder),
            "num_points": len(asked.points),
            "num_done": len(found.rows),
            "num_refused": found.num_refused,
            "num_failed": num_failed,
            "failed": found.failed[:SHOWN],
            "files": [str(found.folder / name) for name in (TABLE, RESULTS, FAILED)],
        },
        tables=_tables(found, len(asked.points)),
        warnings=warnings,
        exit_status=GATE_FAILED if num_failed or not found.rows else DONE,
        writes_own_files=True,
    )


def _workers(
    num: int | None, timeout_s: float | None, address: str | None, scheduler_file: Path | None
) -> AbstractContextManager[Workers]:
    from moesim.study.sweep_workers import dask, processes

    if address is None and scheduler_file is None:
        check(timeout_s is None or timeout_s > 0, "--point-timeout", "", "must be positive", timeout_s)
        return processes(num, timeout_s)
    check(address is None or scheduler_file is None, "--dask-address", "", "excludes a scheduler file", address)
    check(num is None, "--workers", "", "are Dask's own where a scheduler is named", num)
    check(timeout_s is None, "--point-timeout", "", "goes with local workers", timeout_s)
    found = scheduler_file is None or scheduler_file.is_file()
    check(found, "--dask-scheduler-file", "", "must be a file that a scheduler wrote", str(scheduler_file))
    return dask(address, str(scheduler_file) if scheduler_file else None)


def _tables(found: SweepResult, num_points: int) -> list[Table]:
    fields = [
        ("Points", f"{num_points:,}"),
        ("With a result", f"{len(found.rows):,}"),
        ("Refused (no scenario, or not modelled)", f"{found.num_refused:,}"),
        ("Failed", f"{len(found.failed) - found.num_refused:,}"),
        ("Folder", str(found.folder)),
    ]
    tables = [fields_table("Sweep", fields)]
    if found.rows and all(name in found.rows[0]["result"] for name in RANKED):
        tables.append(_best(found.rows))
    if found.failed:
        from moesim.study.sweep_file import words_of

        ours_first = sorted(found.failed, key=lambda row: row["kind"] == "refused")[:SHOWN]
        rows = [(row["kind"], words_of(row["settings"]), row["error"]) for row in ours_first]
        title = f"Without a result ({len(rows)} of {len(found.failed)}; all: failed.jsonl)"
        tables.append(Table(title=title, columns=("Kind", "Point", "Why"), rows=rows))
    return tables


def _best(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The points of most tokens per second and GPU, those that fit first."""
    from moesim.study.sweep_file import words_of
    from moesim.units import format_bytes, format_seconds

    def rank(row: Mapping[str, Any]) -> tuple[bool, float, str]:
        return not row["result"]["fits"], -row["result"]["tokens_per_s_per_gpu"], row["point_id"]

    best = sorted(rows, key=rank)[:SHOWN]
    shown = [
        (
            f"{row['result']['tokens_per_s_per_gpu']:,.0f}",
            format_seconds(row["result"]["step_s"]),
            format_bytes(row["result"]["memory.peak_bytes"]),
            "yes" if row["result"]["fits"] else "no",
            words_of(row["settings"]),
        )
        for row in best
    ]
    columns = ("Tokens/s/GPU", "Step", "Peak", "Fits", "Point")
    return Table(
        title=f"Most tokens per GPU ({len(best)} of {len(rows)})", columns=columns, rows=shown, right=columns[:3]
    )
