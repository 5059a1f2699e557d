"""Journals: JSON lines that grow while a long run works, and outlast kill -9, a torn write and a full disk.

A line counts once its batch is on disk (fsync). What a killed writer leaves half-written is recognised when the journal
is opened again, and left out. One writer at a time holds the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moesim.door.files import _one_line, _open_regular, write_bytes_atomically
from moesim.errors import InputError, check
from moesim.units import MIB

MAX_JOURNAL_LINE_BYTES = 16 * MIB


class Journal:
    """An open journal. Make it with `open_journal`; close it, or use it as a context."""

    def __init__(self, path: Path, file: io.FileIO) -> None:
        self.path, self._file, self._num_bytes = path, file, file.seek(0, os.SEEK_END)

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write records, one line each, and return when they are on disk; all of them or none.

        Raises InputError where the disk refuses (full, read-only): the journal is then as it was before the call.
        """
        lines = b"".join(line_of(record) for record in records)
        try:
            left = memoryview(lines)
            while left:
                left = left[self._file.write(left) :]  # a disk that fills takes a part, and refuses the next
            os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._num_bytes)
            raise InputError(str(self.path), "", "cannot be written", error.strerror or _one_line(error)) from None
        self._num_bytes += len(lines)

    def close(self) -> None:
        """Give the file back."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def line_of(record: Mapping[str, Any]) -> bytes:
    """A record as its line: keys in their order, finite numbers, a newline at the end."""
    return json.dumps(record, allow_nan=False, ensure_ascii=False).encode() + b"\n"


def open_journal(path: str | Path) -> tuple[Journal, list[dict[str, Any]], int]:
    """(journal to append to, the records it holds, how many of its lines are torn).

    Torn lines (not JSON, or without their newline) are removed from the file first. Raises InputError where the file
    cannot be read or written.

    >>> journal, records, num_torn = open_journal("out/results.jsonl")  # doctest: +SKIP
    """
    target = Path(path)
    records, num_torn = read_journal(target) if target.exists() else ([], 0)
    if num_torn:
        write_bytes_atomically(target, b"".join(line_of(record) for record in records))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = io.FileIO(target, "a")
        _sync_folder(target.parent)  # so that the file's name outlasts a power loss too
    except OSError as error:
        raise InputError(str(target), "", "cannot be written", error.strerror or _one_line(error)) from None
    return Journal(target, file), records, num_torn


def read_journal(path: str | Path) -> tuple[list[dict[str, Any]], int]:
    """(records, number of torn lines) of a journal, open or closed."""
    records: list[dict[str, Any]] = []
    num_torn = 0
    with _open_regular(path) as file:
        while line := file.readline(MAX_JOURNAL_LINE_BYTES):
            record = _record(line)
            if record is None:
                num_torn += 1
            else:
                records.append(record)
    return records, num_torn


def _record(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def held_folder(folder: str | Path) -> Iterator[None]:
    """Hold a folder against a second writer until the block ends, or its process dies. Made where it is missing.

    Raises InputError where somebody else holds it, or it cannot be made.
    """
    path = Path(folder)
    check(not path.exists() or path.is_dir(), str(path), "", "must be a folder, or not exist yet", "a file")
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise InputError(str(path), "", "cannot be written", error.strerror or _one_line(error)) from None
    try:
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(str(path), "", "must be written by one run at a time", "another is at work") from None
        except (ImportError, OSError):  # a file system, or a platform, without locks
            pass
        yield
    finally:
        os.close(handle)


def sha256_of_file(path: str | Path) -> str:
    """The sha256 of a file's bytes. Raises InputError where it cannot be read."""
    found = hashlib.sha256()
    with _open_regular(path) as file:
        while block := file.read(MIB):
            found.update(block)
    return found.hexdigest()
