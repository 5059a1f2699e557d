"""How an answer leaves: tables of 80 columns on stdout, or one JSON envelope; files written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from moesim.cli.call import Call

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of texts under a title; columns named in ``right`` are aligned right."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    right: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a verb found: the JSON envelope's parts and the tables that show it."""

    inputs: Mapping[str, Any]
    result: Mapping[str, Any]
    tables: Sequence[Table] = ()
    provenance: Sequence[Mapping[str, Any]] = ()
    warnings: Sequence[str] = ()
    exit_status: int = 0
    writes_own_files: bool = False  # --out is the verb's own business
    run: Mapping[str, Any] = field(default_factory=dict)  # what the clock says: differs from run to run


def deliver(answer: Answer, call: Call) -> None:
    """Print the answer on stdout, its warnings on stderr, and write results.json where --out says so."""
    envelope = envelope_of(call.command, answer)
    if call.out is not None and not answer.writes_own_files:
        write_results(call.out / "results.json", envelope)
    if call.as_json:
        sys.stdout.write(to_json(envelope | {"run": run_facts(call.started_s) | dict(answer.run)}) + "\n")
        return
    for table in answer.tables:
        print_table(table)
    for warning in answer.warnings:
        call.note(f"note: {warning}")


def envelope_of(command: str, answer: Answer) -> dict[str, Any]:
    """The envelope of every --json, without its ``run``: the same bytes for the same inputs and seed."""
    return {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "inputs": dict(answer.inputs),
        "result": dict(answer.result),
        "provenance": list(answer.provenance),
        "warnings": list(answer.warnings),
    }


def write_results(path: Path, envelope: Mapping[str, Any]) -> None:
    """The deterministic envelope as a file, whole or not at all."""
    from moesim.door.files import write_text_atomically

    write_text_atomically(path, to_json(envelope) + "\n")


def run_facts(started_s: float) -> dict[str, Any]:
    """What differs from run to run: duration, machine, moment, versions."""
    import platform
    from datetime import UTC, datetime

    from moesim import __version__

    return {
        "wall_s": round(time.perf_counter() - started_s, 3),
        "host": platform.node(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "moesim": __version__,
    }


def plain(value: Any) -> Any:
    """Dataclasses, arrays, paths and tuples as what JSON knows; a float that is not finite becomes null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # a NumPy array or scalar
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(value: Any) -> str:
    """Indented JSON with sorted keys in which a list of single values stands on one line."""
    return "".join(_json_parts(plain(value), 0))


def _json_parts(value: Any, depth: int) -> Iterator[str]:
    inner = "  " * (depth + 1)
    if isinstance(value, dict) and value:
        yield "{\n"
        for position, key in enumerate(sorted(value)):
            yield f"{',' + chr(10) if position else ''}{inner}{json.dumps(key)}: "
            yield from _json_parts(value[key], depth + 1)
        yield f"\n{'  ' * depth}}}"
    elif isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        yield "[\n"
        for position, item in enumerate(value):
            yield f"{',' + chr(10) if position else ''}{inner}"
            yield from _json_parts(item, depth + 1)
        yield f"\n{'  ' * depth}]"
    else:
        yield json.dumps(value, allow_nan=False)


def print_table(table: Table) -> None:
    """One table on stdout: no colour codes in a pipe, plain characters where the terminal has no others."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(highlight=False)
    shown = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_header=any(table.columns))
    for position, name in enumerate(table.columns):
        justify: Literal["right", "left"] = "right" if name in table.right else "left"
        shown.add_column(name, justify=justify, overflow="fold", no_wrap=position == 0)
    for row in table.rows:
        shown.add_row(*(Text(cell) for cell in row))
    console.print(Text(table.title, style="bold"))
    console.print(shown)
    if table.note:
        console.print(Text(table.note))


@contextmanager
def working(call: Call, text: str) -> Iterator[None]:
    """Show that something is going on, on stderr, and only on a terminal."""
    if call.verbosity < 0 or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


@contextmanager
def counting(call: Call, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Tell how many units are done: a bar with rate and time left on a terminal, elsewhere a message per tenth.

    What is yielded is told first how many were done before, which is no part of the rate, then how many more are.
    """
    if sys.stderr.isatty() and call.verbosity >= 0:
        from tqdm import tqdm

        with tqdm(total=total, unit=unit, file=sys.stderr, smoothing=0.05) as bar:
            told_before = False

            def move(num: int) -> None:
                nonlocal told_before
                if told_before:
                    bar.update(num)
                else:
                    bar.initial = bar.n = bar.last_print_n = num
                    told_before = True
                    bar.refresh()

            yield move
        return
    num_done = 0

    def tell(num: int) -> None:
        nonlocal num_done
        before, num_done = num_done, num_done + num
        if num_done * 10 // total != before * 10 // total:
            call.note(f"{num_done} of {total} {unit}s")

    yield tell


def fields_table(title: str, rows: Sequence[tuple[str, str]]) -> Table:
    """A table of names and values."""
    return Table(title=title, columns=("", ""), rows=rows)
