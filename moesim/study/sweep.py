"""Sweeps: any number of scenarios on any number of workers, resumable, the same bytes at the end.

While it runs, results.jsonl grows by whole points that are on disk. results.csv is made of it at the end, sorted by
point, so it depends neither on the number of workers nor on how often the sweep was killed.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from moesim.door.files import read_json, write_bytes_atomically, write_text_atomically
from moesim.door.journal import Journal, held_folder, line_of, open_journal
from moesim.errors import check
from moesim.study.sweep_file import Asked, Point
from moesim.study.sweep_points import compute, function_of, versions
from moesim.study.sweep_workers import TookTooLongError, Workers, processes

RESULTS, TABLE, FAILED, ABOUT = "results.jsonl", "results.csv", "failed.jsonl", "sweep.json"
TASK_S = 0.25  # tasks are made of so many points that one takes about this long
MAX_TASK_POINTS = 256
TASKS_PER_WORKER = 2  # handed in at a time: one at work, one waiting

P = TypeVar("P")
Outcome = Mapping[str, Any]  # "result", or "kind" and "error"
Submit = Callable[[Sequence[P]], Future[tuple[list[dict[str, Any]], float]]]  # outcomes, seconds taken
Keep = Callable[[Sequence[tuple[P, Outcome]]], None]


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """What a sweep came to. rows and failed are sorted by point_id."""

    folder: Path
    rows: tuple[Mapping[str, Any], ...]  # point_id, settings, result
    failed: tuple[Mapping[str, Any], ...]  # point_id, settings, kind (refused, error or worker), error
    num_computed: int  # by this run; the others were there
    num_torn: int  # lines that an earlier run left half-written, computed again

    @property
    def num_refused(self) -> int:
        """Points that are no scenario, or not modelled."""
        return sum(row["kind"] == "refused" for row in self.failed)


def sweep(
    asked: Asked,
    out: str | Path,
    *,
    by: str = "engine",
    workers: contextlib.AbstractContextManager[Workers] | None = None,
    resume: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> SweepResult:
    """Compute every point into the folder out: results.jsonl as it grows, results.csv and failed.jsonl at the end.

    by: what computes a point, as `moesim.study.sweep_points.function_of` names it. workers: by default processes of
    this machine. resume: go on in a folder that holds a part; points that failed are tried again. progress is told how
    many points are done since it was last told. Raises InputError where the folder holds another sweep, or the disk
    refuses; what was finished by then is kept.

    >>> sweep(ask_points([{"ep": 8}, {"ep": 16}], base), "out/sweep").rows[0]["result"]["step_s"]  # doctest: +SKIP
    """
    function_of(by)
    folder = Path(out)
    with held_folder(folder):
        _claim(folder, asked, by, resume)
        journal, records, num_torn = open_journal(folder / RESULTS)
        with journal:
            done = {record["point_id"]: record for record in records}
            left = [p for p in asked.points if p.scenario is not None and p.point_id not in done]
            progress(len(asked.points) - len(left))
            failed = [_failure(p, {"kind": "refused", "error": p.refusal}) for p in asked.refused]
            if left:
                found = _compute(left, by, workers or processes(), journal, folder, failed, progress)
                done |= {record["point_id"]: record for record in found}
        rows = [done[p.point_id] | {"settings": dict(p.settings)} for p in asked.points if p.point_id in done]
        rows.sort(key=lambda row: row["point_id"])
        failed.sort(key=lambda row: row["point_id"])
        write_bytes_atomically(folder / FAILED, b"".join(line_of(row) for row in failed))
        write_text_atomically(folder / TABLE, table_of(rows))
    num_computed = len(left) + len(asked.refused) - len(failed)
    return SweepResult(
        folder=folder, rows=tuple(rows), failed=tuple(failed), num_computed=num_computed, num_torn=num_torn
    )


def _claim(folder: Path, asked: Asked, by: str, resume: bool) -> None:
    """Say in the folder what makes its numbers, or find that it holds numbers made alike. Takes away the old table."""
    about = {"schema_version": 1, "by": by, "versions": versions(), "sha256_of_files": dict(asked.sha256_of_files)}
    if (folder / ABOUT).exists():
        hint = "--resume goes on with it; another --out begins anew."
        check(resume, str(folder), "", "must not hold a sweep already", ABOUT, hint)
        there = read_json(folder / ABOUT)
        check(isinstance(there, dict), str(folder / ABOUT), "", "must be a mapping", there)
        for name in ("by", "versions"):
            rule = f"must be as when the sweep began, {there.get(name)}"
            check(there.get(name) == about[name], str(folder / ABOUT), name, rule, about[name], "Take another --out.")
        old = there.get("sha256_of_files", {})
        for file, sha256 in asked.sha256_of_files.items():
            rule, hint = "must be as when the sweep began", "Take another --out."
            check(old.get(file, sha256) == sha256, file, "", rule, "a file that has changed", hint)
        about["sha256_of_files"] = old | about["sha256_of_files"]
    else:
        for name in (RESULTS, TABLE, FAILED):
            check(not (folder / name).exists(), str(folder), "", "must not hold other results", name)
    (folder / TABLE).unlink(missing_ok=True)
    write_text_atomically(folder / ABOUT, json.dumps(about, indent=1, sort_keys=True) + "\n")


def _compute(
    points: Sequence[Point],
    by: str,
    workers: contextlib.AbstractContextManager[Workers],
    journal: Journal,
    folder: Path,
    failed: list[dict[str, Any]],
    progress: Callable[[int], None],
) -> list[dict[str, Any]]:
    """Compute points, keep each where it belongs as soon as it is known; returns the new records."""
    new: list[dict[str, Any]] = []
    (folder / FAILED).unlink(missing_ok=True)  # of an earlier run; the points that failed are among these
    with open_journal(folder / FAILED)[0] as failures, workers as ready:

        def keep(outcomes: Sequence[tuple[Point, Outcome]]) -> None:
            records = [
                {"point_id": p.point_id, "settings": dict(p.settings), "result": o["result"]}
                for p, o in outcomes
                if "result" in o
            ]
            refusals = [_failure(p, o) for p, o in outcomes if "result" not in o]
            if records:
                journal.append(records)
            if refusals:
                failures.append(refusals)
            new.extend(records)
            failed.extend(refusals)
            progress(len(outcomes))

        def submit(task: Sequence[Point]) -> Future[tuple[list[dict[str, Any]], float]]:
            return ready.executor.submit(compute, by, [p.scenario for p in task if p.scenario is not None])

        run_points(points, submit, ready, keep)
    return new


def _failure(point: Point, outcome: Outcome) -> dict[str, Any]:
    return {
        "point_id": point.point_id,
        "settings": dict(point.settings),
        "kind": outcome["kind"],
        "error": outcome["error"],
    }


def run_points(points: Sequence[P], submit: Submit[P], workers: Workers, keep: Keep[P]) -> None:
    """Compute points on workers; keep is told the outcomes as they come, each point once.

    submit hands a task of some points to the workers' executor; the task itself raises nothing. A task whose worker
    dies is taken apart into single points; a single point whose worker dies max_attempts times, or takes too long once,
    is given up as kind ``worker``. Quick points travel many to a task.
    """
    waiting = deque(points)
    alone: deque[tuple[P, int]] = deque()  # whose worker died in company, or alone so many times
    running: dict[Future[Any], tuple[list[P], int]] = {}
    size = 1

    def next_task() -> tuple[list[P], int] | None:
        """Points to hand in now, and how many deaths count against them; -1: the first in company is forgiven."""
        if alone and (not workers.blames_company or not (waiting or running)):
            point, num_deaths = alone.popleft()
            return [point], num_deaths
        forgiven = -1 if workers.blames_company else 0
        return ([waiting.popleft() for _ in range(min(size, len(waiting)))], forgiven) if waiting else None

    while waiting or alone or running:
        while len(running) < workers.num_workers * TASKS_PER_WORKER and (next_one := next_task()):
            task, num_deaths = next_one
            running[submit(task)] = task, num_deaths
        known: list[tuple[P, Outcome]] = []
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            task, num_deaths = running.pop(future)
            try:
                outcomes, took_s = future.result()
            except Exception as error:  # tasks raise nothing: whatever comes, the worker or the way to it is gone
                workers.check_reachable()
                if len(task) > 1:
                    alone.extend((point, 0) for point in task)
                elif num_deaths + 1 < workers.max_attempts and not isinstance(error, TookTooLongError):
                    alone.append((task[0], num_deaths + 1))
                else:
                    known.append((task[0], {"kind": "worker", "error": str(error) or type(error).__name__}))
            else:
                known.extend(zip(task, outcomes, strict=True))
                fitting = int(len(task) * TASK_S / max(took_s, TASK_S / MAX_TASK_POINTS))
                size = min(max(1, fitting), MAX_TASK_POINTS, 2 * size)
        if known:
            keep(known)


def table_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV: point_id, the settings as asked, the results. A result named as a setting is ``result.NAME``."""
    settings = list(dict.fromkeys(name for row in rows for name in row["settings"]))
    results = list(dict.fromkeys(name for row in rows for name in row["result"]))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    titles = [f"result.{name}" if name in (*settings, "point_id") else name for name in results]
    writer.writerow(["point_id", *settings, *titles])
    for row in rows:
        cells = [_cell(row["settings"].get(name)) for name in settings] + [_cell(row["result"].get(n)) for n in results]
        writer.writerow([row["point_id"], *cells])
    return text.getvalue()


def _cell(value: Any) -> str:
    """A value as JSON spells it; texts as they are, None as nothing."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, sort_keys=True)
