"""Rows of outside files, a block at a time: JSON lines, and tables of whole numbers as CSV or parquet.

Parquet needs pyarrow, which moesim does not require: without it such a file is refused by name.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.door.arrays import atomic_file
from moesim.door.files import _one_line, _open_regular, parse_json
from moesim.errors import InputError, check, near_match
from moesim.units import MIB, PETA

MAX_LINE_BYTES = 64 * MIB
MAX_NUMBER = int(PETA)  # so that sums of many cells stay whole
TABLE_SUFFIXES = (".csv", ".parquet")
_BLOCK_BYTES = MIB // 4
_BLOCK_ROWS = 65536


def json_lines(path: str | Path, *, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[tuple[int, Any]]:
    """(line number from 1, plain value) of each line of a JSON-lines file; blank lines are skipped.

    Raises InputError(path, "line N", ...) for what is not JSON within the door's limits.
    """
    with _open_regular(path) as file:
        number = 0
        while line := file.readline(max_line_bytes + 1):
            number += 1
            owner = f"{path}: line {number}"
            check(len(line) <= max_line_bytes, owner, "", f"must not exceed {max_line_bytes} bytes", "a longer line")
            if not line.strip():
                continue
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(owner, "", "must be text in UTF-8", f"byte {error.start} that is not") from None
            yield number, parse_json(text.rstrip(), owner)


def write_lines(path: str | Path, lines: Iterable[str]) -> None:
    """Write lines of text, each ended by a newline, whole or not at all."""
    with atomic_file(path) as file:
        for line in lines:
            file.write(line.encode("utf-8") + b"\n")


def table_blocks(path: str | Path, columns: Sequence[str]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """(number of its first row, block of shape (rows, columns)) of a table of whole numbers, none negative.

    CSV: a header naming exactly these columns in any order, then digits. Parquet: these columns, of a whole type,
    without nulls. Raises InputError.
    """
    suffix = Path(path).suffix.lower()
    check(suffix in TABLE_SUFFIXES, str(path), "", "must end in " + " or ".join(TABLE_SUFFIXES), suffix)
    return _csv_blocks(path, columns) if suffix == ".csv" else _parquet_blocks(path, columns)


def _csv_blocks(path: str | Path, columns: Sequence[str]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    owner = str(path)
    number = r"[ \t]*+[0-9]{1,15}+[ \t]*+"  # possessive: a block's match keeps no way back, so no memory
    row = re.compile(",".join([number] * len(columns)) + r"\r?\n")
    block_of_rows = re.compile(f"(?:{row.pattern})*+")
    with _open_regular(path) as file:
        order = _csv_order(file.readline(_BLOCK_BYTES), owner, columns)
        first = 0
        while lines := file.readlines(_BLOCK_BYTES):
            if not lines[-1].endswith(b"\n"):
                lines[-1] += b"\n"
            text = b"".join(lines).decode("utf-8", errors="replace")
            if block_of_rows.fullmatch(text) is None:
                at, bad = next((i, line) for i, line in enumerate(text.split("\n")) if not row.fullmatch(line + "\n"))
                rule = f"must be {len(columns)} whole numbers below 1e15, none negative"
                raise InputError(owner, f"line {first + at + 2}", rule, bad.strip())
            flat = np.fromstring(text.replace("\r\n", "\n").replace("\n", ","), dtype=np.int64, sep=",")
            yield first, flat.reshape(-1, len(columns))[:, order]
            first += len(lines)


def _csv_order(header: bytes, owner: str, columns: Sequence[str]) -> list[int]:
    """Where each wanted column stands."""
    names = [name.strip().strip('"') for name in header.decode("utf-8-sig", errors="replace").split(",")]
    for name in names:
        rule = "must be a column out of " + ", ".join(columns)
        check(name in columns, owner, "header", rule, name, near_match(name, columns))
    check(len(set(names)) == len(columns) == len(names), owner, "header", "must name " + ", ".join(columns), names)
    return [names.index(column) for column in columns]


def _parquet_blocks(path: str | Path, columns: Sequence[str]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    owner = str(path)
    parquet = _pyarrow(owner, "pyarrow.parquet")
    _open_regular(path).close()
    try:
        with parquet.ParquetFile(path) as file:
            names = set(file.schema_arrow.names)
            for column in columns:
                check(column in names, owner, column, "must be a column", sorted(names))
            first = 0
            for batch in file.iter_batches(batch_size=_BLOCK_ROWS, columns=list(columns)):
                yield first, _whole_columns(batch, columns, owner, first)
                first += batch.num_rows
    except (OSError, ValueError, TypeError) as error:  # pyarrow's own errors derive from these
        raise InputError(owner, "", "must be a sound parquet file", _one_line(error)) from None


def _whole_columns(batch: Any, columns: Sequence[str], owner: str, first: int) -> NDArray[np.int64]:
    block = np.empty((batch.num_rows, len(columns)), dtype=np.int64)
    for i, column in enumerate(columns):
        values = batch.column(column)
        check(values.null_count == 0, owner, column, "must not hold nulls", f"{values.null_count} nulls")
        numbers = values.to_numpy(zero_copy_only=False)
        check(numbers.dtype.kind in "iu", owner, column, "must hold whole numbers", str(values.type))
        bad = np.flatnonzero((numbers < 0) | (numbers >= MAX_NUMBER))
        if bad.size:
            rule = "must hold whole numbers below 1e15, none negative"
            raise InputError(owner, f"row {first + int(bad[0])}", rule, f"{column} {numbers[bad[0]]}")
        block[:, i] = numbers
    return block


def write_table(path: str | Path, columns: Sequence[str], blocks: Iterable[NDArray[np.int64]]) -> None:
    """Write blocks of rows (rows, columns) as CSV or parquet, by the path's ending, whole or not at all."""
    owner, suffix = str(path), Path(path).suffix.lower()
    check(suffix in TABLE_SUFFIXES, owner, "", "must end in " + " or ".join(TABLE_SUFFIXES), suffix)
    if suffix == ".csv":
        rows = ("\n".join(",".join(map(str, row)) for row in block.tolist()) for block in blocks if len(block))
        write_lines(path, (text for part in ([",".join(columns)], rows) for text in part))
        return
    arrow, parquet = _pyarrow(owner, "pyarrow"), _pyarrow(owner, "pyarrow.parquet")
    schema = arrow.schema([(column, arrow.int64()) for column in columns])
    with atomic_file(path) as file, parquet.ParquetWriter(file, schema) as writer:
        for block in blocks:
            arrays = [arrow.array(np.ascontiguousarray(block[:, i])) for i in range(len(columns))]
            writer.write_batch(arrow.record_batch(arrays, schema=schema))


def _pyarrow(owner: str, name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        rule = "parquet needs the package pyarrow"
        raise InputError(
            owner, "", rule, "it is not installed", "Install the extra moesim[parquet], or use CSV."
        ) from None
