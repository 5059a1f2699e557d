"""Runs a notebook by papermill, strictly: bad parameters stop before a kernel starts; output is whole or absent."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moesim.door import read_json, write_text_atomically
from moesim.errors import InputError, MoesimError, check
from moesim.report.parameters import OWNER, ask, check_parameters, find_notebook, has_scenario, parameters_of

NOTEBOOK, PAGE = "report.ipynb", "report.html"
FILES = (PAGE, NOTEBOOK, "results.json", "results.csv", "trace.json")
_USERS_ERRORS = ("InputError", "NotModelledError", "MoesimError")


def run_notebook(
    name_or_path: str | Path,
    parameters: Mapping[str, Any],
    out_dir: str | Path,
    kernel: str = "python3",
    show_progress: bool | None = None,
) -> Path:
    """Run a notebook with parameters and leave report.html, report.ipynb and its results in out_dir; returns out_dir.

    parameters: flat names (moesim.leaves.LEAVES, the notebook's own); others keep the notebook's defaults.
    show_progress: a bar on stderr; by default only on a terminal. Everything is made in a folder beside out_dir and
    moved in at the end, so a failure leaves out_dir as it was. Raises InputError and NotModelledError, both before a
    kernel starts.

    >>> run_notebook("10_planning_report", {"model": "mixtral-8x7b", "ep": 8}, "out/report")  # doctest: +SKIP
    """
    notebook, out = find_notebook(name_or_path), Path(out_dir)
    known = parameters_of(notebook)
    check(
        "out_dir" not in parameters, OWNER, "out_dir", "is set by whoever runs the notebook", parameters.get("out_dir")
    )
    values = check_parameters(parameters, known)
    if has_scenario(known):
        ask(values, sorted(parameters))
    with _work_folder(out) as work:
        given = dict(parameters) | ({"out_dir": str(work)} if "out_dir" in known else {})
        _execute(
            notebook, work / NOTEBOOK, given, kernel, sys.stderr.isatty() if show_progress is None else show_progress
        )
        _rename_output(work, out)
        from moesim.report.page import write_page

        write_page(work / NOTEBOOK, work / PAGE)
        for made in sorted(work.iterdir()):
            os.replace(made, out / made.name)
    return out


@contextlib.contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """A folder beside out, on the same disk, gone afterwards; out itself exists once the body needs it."""
    check(not out.exists() or out.is_dir(), str(out), "", "must be a folder, or not exist yet", "a file")
    is_new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name or 'report'}.", dir=out.resolve().parent))
    except OSError as error:
        raise InputError(str(out), "", "cannot be written", error.strerror) from None
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if is_new and not any(out.iterdir()):
            out.rmdir()


def _execute(notebook: Path, target: Path, parameters: Mapping[str, Any], kernel: str, show_progress: bool) -> None:
    """papermill's run, quiet; an error that the notebook's user can mend comes out as such."""
    with _without("rfc3987_syntax"):  # jsonschema would compile a grammar for a format that no notebook's schema names
        import papermill
    from jupyter_client.kernelspec import NoSuchKernel
    from papermill.exceptions import PapermillExecutionError

    try:
        papermill.execute_notebook(
            str(notebook),
            str(target),
            parameters=dict(parameters),
            kernel_name=kernel,
            progress_bar=show_progress,
            log_output=False,
            extra_arguments=["--log-level=ERROR"],  # of the kernel, whose start-up notices are no business of a reader
        )
    except PapermillExecutionError as error:
        if error.ename in _USERS_ERRORS:
            raise MoesimError(error.evalue) from None
        raise
    except NoSuchKernel:
        raise InputError("notebook", "kernel", "must be installed", kernel, "See jupyter kernelspec list.") from None


@contextlib.contextmanager
def _without(package: str) -> Iterator[None]:
    """An optional package of somebody's is not there until the block ends: 0.8 s less to wait for a report."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]  # so Python spells "cannot be imported"
    try:
        yield
    finally:
        del sys.modules[package]


def _rename_output(work: Path, out: Path) -> None:
    """Say the folder that was asked for where the executed notebook says the temporary one."""
    text = (work / NOTEBOOK).read_text(encoding="utf-8")
    write_text_atomically(work / NOTEBOOK, text.replace(str(work), str(out)))
    assert isinstance(read_json(work / NOTEBOOK), dict)
