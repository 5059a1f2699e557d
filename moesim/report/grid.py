"""A notebook over many parameter sets: each a report in its own folder, and an index that compares and links them.

Needs no terminal, so cron and CI can run it; resumable, since a report is in its folder whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesim.door import read_json, write_text_atomically
from moesim.door.journal import Journal, held_folder, open_journal, sha256_of_file
from moesim.errors import MoesimError, check
from moesim.report.index_page import index_of
from moesim.report.parameters import ask, check_parameters, find_notebook, has_scenario, parameters_of
from moesim.report.runner import PAGE, run_notebook
from moesim.study.sweep import Outcome, run_points, table_of
from moesim.study.sweep_file import words_of
from moesim.study.sweep_workers import Workers, processes

INDEX, TABLE, DONE = "index.html", "index.csv", "reports.jsonl"
MAX_NAME = 60  # characters of a folder's name before its hash
_STEP_NUMBERS = (
    *("step_s", "tokens_per_s_per_gpu", "mfu", "fits", "headroom_bytes", "exposed_comm_s", "wait_s"),
    *("bubble_fraction", "max_mean_load", "drop_fraction", "binds"),
)
MAX_NUMBERS = 10  # of a result without a step


@dataclass(frozen=True, kw_only=True)
class Run:
    """One parameter set of a notebook, or why it is refused."""

    report_id: str  # sha256 of the notebook and every parameter's value
    name: str  # of its folder
    settings: Mapping[str, Any]
    parameters: Mapping[str, Any]
    refusal: str = ""


@dataclass(frozen=True, kw_only=True)
class Reports:
    """What a grid came to, in the grid's order."""

    folder: Path
    rows: tuple[Mapping[str, Any], ...]  # report_id, name, settings, result (headline numbers)
    failed: tuple[Mapping[str, Any], ...]  # settings, kind, error
    num_rendered: int  # by this run; the others were there


def ask_runs(notebook: str, settings: Sequence[Mapping[str, Any]], base: Mapping[str, Any]) -> list[Run]:
    """Check each parameter set, base with settings laid over it. One that is no scenario keeps the reason.

    Raises InputError for a name that is no parameter, or a value of another type.
    """
    path = find_notebook(notebook)
    known, sha256 = parameters_of(path), sha256_of_file(path)
    found: dict[str, Run] = {}
    for named in settings:
        parameters = dict(base) | dict(named)
        check("out_dir" not in parameters, "grid", "out_dir", "is set by whoever runs the notebook", "a value")
        values, refusal = check_parameters(parameters, known), ""
        try:
            if has_scenario(known):
                ask(values, sorted(parameters))
        except MoesimError as error:
            refusal = str(error)
        report_id = hashlib.sha256(json.dumps([sha256, values], sort_keys=True).encode()).hexdigest()
        words = re.sub(r"[^A-Za-z0-9.=_-]+", "-", words_of(named).replace(" ", "_"))[:MAX_NAME].strip("-.")
        name = f"{words}-{report_id[:8]}"
        found.setdefault(
            report_id, Run(report_id=report_id, name=name, settings=named, parameters=parameters, refusal=refusal)
        )
    return [*found.values()]


def render_grid(
    notebook: str,
    runs: Sequence[Run],
    out: str | Path,
    *,
    workers: AbstractContextManager[Workers] | None = None,
    resume: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> Reports:
    """Render each run into out/NAME, several at a time, then index.html and index.csv over all of them.

    resume: keep the reports that are there whole. A run that fails leaves no folder and stands in the index with its
    reason. Raises InputError where out holds reports and resume is not said, or where it cannot be written.
    """
    folder = Path(out)
    with held_folder(folder):
        hint = "--resume keeps what is there; or take another --out."
        check(resume or not (folder / DONE).exists(), str(folder), "", "must not hold reports already", DONE, hint)
        for left_over in folder.glob(".*-????????.*"):  # of reports that were killed
            shutil.rmtree(left_over, ignore_errors=True)
        journal, records, _ = open_journal(folder / DONE)
        there = {record["report_id"]: record for record in records if (folder / record["name"] / PAGE).is_file()}
        left = [run for run in runs if not run.refusal and run.report_id not in there]
        failed = [_failure(run, {"kind": "refused", "error": run.refusal}) for run in runs if run.refusal]
        progress(len(runs) - len(left))
        with journal:
            if left:
                new, lost = _render(notebook, left, folder, workers or processes(), journal, progress)
                there |= {record["report_id"]: record for record in new}
                failed += lost
        rows = [there[run.report_id] | {"settings": dict(run.settings)} for run in runs if run.report_id in there]
        table = table_of([{"point_id": row["report_id"], **row} for row in rows])
        write_text_atomically(folder / TABLE, table.replace("point_id", "report_id", 1))
        write_text_atomically(folder / INDEX, index_of(find_notebook(notebook).stem, rows, failed))
    num_rendered = sum(run.report_id in there for run in left)
    return Reports(folder=folder, rows=tuple(rows), failed=tuple(failed), num_rendered=num_rendered)


def _render(
    notebook: str,
    runs: Sequence[Run],
    folder: Path,
    workers: AbstractContextManager[Workers],
    journal: Journal,
    progress: Callable[[int], None],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(records of reports made, failures); a record is on disk once its report is whole."""
    new: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []

    def keep(outcomes: Sequence[tuple[Run, Outcome]]) -> None:
        records = [
            {"report_id": run.report_id, "name": run.name, "settings": dict(run.settings), "result": outcome["result"]}
            for run, outcome in outcomes
            if "result" in outcome
        ]
        journal.append(records)
        new.extend(records)
        failed.extend(_failure(run, outcome) for run, outcome in outcomes if "result" not in outcome)
        progress(len(outcomes))

    with workers as ready:

        def submit(task: Sequence[Run]) -> Future[tuple[list[dict[str, Any]], float]]:
            return ready.executor.submit(render, notebook, [(run.parameters, folder / run.name) for run in task])

        run_points(runs, submit, ready, keep)
    return new, failed


def _failure(run: Run, outcome: Outcome) -> dict[str, Any]:
    return {"settings": dict(run.settings), "kind": outcome["kind"], "error": outcome["error"]}


def render(notebook: str, runs: Sequence[tuple[Mapping[str, Any], Path]]) -> tuple[list[dict[str, Any]], float]:
    """Render reports in a worker: for each its headline numbers, or why there is none; seconds for all."""
    began_s = time.perf_counter()
    return [_render_one(notebook, parameters, out) for parameters, out in runs], time.perf_counter() - began_s


def _render_one(notebook: str, parameters: Mapping[str, Any], out: Path) -> dict[str, Any]:
    try:
        run_notebook(notebook, parameters, out, show_progress=False)
        return {"result": headline_of(out / "results.json")}
    except MoesimError as error:
        return {"kind": "refused", "error": str(error)}
    except Exception as error:  # a cell's failure is its own report's, while the others go on
        told = getattr(error, "evalue", None) or str(error)
        return {"kind": "error", "error": f"{getattr(error, 'ename', type(error).__name__)}: {told}"}


def headline_of(results: Path) -> dict[str, Any]:
    """The numbers of a report's results.json that an index compares: those of its step, or else its single numbers."""
    if not results.is_file():
        return {}
    envelope = read_json(results)
    found = envelope.get("result") if isinstance(envelope, dict) else None
    if not isinstance(found, dict):
        return {}
    step = found.get("step")
    if isinstance(step, dict):
        peak = step.get("memory", {}).get("peak_bytes")
        return {name: step[name] for name in _STEP_NUMBERS if name in step} | {"peak_bytes": peak}
    single = {name: value for name, value in found.items() if isinstance(value, (bool, int, float))}
    return dict([*single.items()][:MAX_NUMBERS])
