"""Tables of texts with a header: each row a mapping from column to cell, as measurement files have them."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moesim.door.files import _one_line, _open_regular, read_text
from moesim.door.rows import _pyarrow
from moesim.errors import InputError, check, near_match
from moesim.units import KILO

Record = Mapping[str, str]
MAX_RECORDS = int(100 * KILO)


def read_records(path: str | Path, *, needed: Sequence[str] = ()) -> tuple[Record, ...]:
    """The rows of a CSV file with a header; cells are texts without outer blanks, "" where there is nothing.

    needed: columns that must be there. Raises InputError (file, line or column).

    >>> read_records("cases.csv", needed=("id",))[0]["id"]  # doctest: +SKIP
    'deepep_v1_normal_dispatch_8'
    """
    owner = str(path)
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        for name in needed:
            check(name in header, owner, "header", f"must have the column {name}", header, near_match(name, header))
        check(len(set(header)) == len(header), owner, "header", "must name each column once", header)
        rows: list[Record] = []
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            line = f"line {reader.line_num}"
            check(len(cells) == len(header), owner, line, f"must have {len(header)} cells", len(cells))
            check(len(rows) < MAX_RECORDS, owner, line, f"must not be beyond row {MAX_RECORDS}", len(rows) + 1)
            rows.append(dict(zip(header, (cell.strip() for cell in cells), strict=True)))
    except csv.Error as error:
        raise InputError(owner, f"line {reader.line_num}", "must be valid CSV", _one_line(error)) from None
    return tuple(rows)


def number_of(row: Record, column: str, owner: str) -> float | None:
    """A cell as a number; None where it is empty. Raises InputError.

    >>> number_of({"ep": "8.0"}, "ep", "cases.csv: a")
    8.0
    """
    text = row.get(column, "")
    if text in ("", "-"):
        return None
    try:
        value = float(text)
    except ValueError:
        raise InputError(owner, column, "must be a number", text) from None
    check(value == value and abs(value) < float("inf"), owner, column, "must be finite", text)
    return value


def read_parquet_columns(path: str | Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a parquet file, these columns only, as plain values. Raises InputError; needs pyarrow."""
    owner = str(path)
    parquet = _pyarrow(owner, "pyarrow.parquet")
    _open_regular(path).close()
    try:
        table = parquet.read_table(path, columns=list(columns))
    except (OSError, ValueError, TypeError) as error:  # pyarrow's own errors derive from these
        raise InputError(owner, "", "must be a sound parquet file", _one_line(error)) from None
    for name in columns:
        check(name in table.column_names, owner, name, "must be a column", table.column_names)
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows
