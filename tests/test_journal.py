"""Journals: whole records on disk, torn ones recognised, a full disk told and undone."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from moesim.door.journal import Journal, held_folder, open_journal, read_journal, sha256_of_file
from moesim.errors import InputError

RECORDS = [{"name": "a", "x": 0.1}, {"name": "ü", "x": None}]


def written(path: Path) -> Path:
    with open_journal(path)[0] as journal:
        journal.append(RECORDS)
    return path


def test_what_is_appended_is_read_back_in_order_and_appending_goes_on(tmp_path: Path) -> None:
    path = written(tmp_path / "new" / "j.jsonl")
    journal, records, num_torn = open_journal(path)
    journal.append([{"name": "b"}])
    journal.close()
    assert (records, num_torn) == (RECORDS, 0)
    assert read_journal(path) == ([*RECORDS, {"name": "b"}], 0)


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_file_cut_at_any_byte_gives_its_whole_records_and_none_else(tmp_path: Path, cut: int) -> None:
    path = written(tmp_path / "j.jsonl")
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    journal, records, num_torn = open_journal(path)
    journal.append([{"name": "after"}])
    journal.close()
    assert records == RECORDS[: whole[:-cut].count(b"\n")]
    assert num_torn == (not whole[:-cut].endswith(b"\n") and whole[:-cut] != b"")
    assert read_journal(path) == ([*records, {"name": "after"}], 0)


@pytest.mark.parametrize("garbage", [b"\0" * 40 + b"\n", b'{"x": NaN\n', b"[1]\n", b"\xff\n", b"[" * 5000 + b"\n"])
def test_a_line_that_is_no_record_is_left_out_and_the_others_stay(tmp_path: Path, garbage: bytes) -> None:
    path = written(tmp_path / "j.jsonl")
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + garbage + second)
    journal, records, num_torn = open_journal(path)
    journal.close()
    assert (records, num_torn) == (RECORDS, 1)
    assert path.read_bytes() == first + second


def test_a_full_disk_is_told_and_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "j.jsonl")
    journal, _, _ = open_journal(path)

    class Full:
        """A file on a disk that has room for five more bytes."""

        def __init__(self, file: object) -> None:
            self.file, self.left = file, 5

        def write(self, text: memoryview) -> int:
            if not self.left:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            num, self.left = self.file.write(text[: self.left]), 0  # type: ignore[attr-defined]
            return num

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

    monkeypatch.setattr(journal, "_file", Full(journal._file))
    with pytest.raises(InputError, match="cannot be written; got 'No space left on device'"):
        journal.append([{"name": "lost"}])
    journal.close()
    assert read_journal(path) == (RECORDS, 0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_the_systems_own_full_device_is_refused_by_name(tmp_path: Path) -> None:
    import io

    journal = Journal(tmp_path / "j.jsonl", io.FileIO("/dev/full", "w"))
    with pytest.raises(InputError, match=r"j\.jsonl: cannot be written; got 'No space left on device'"):
        journal.append(RECORDS)


def test_a_folder_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    with held_folder(tmp_path / "f"), pytest.raises(InputError, match="one run at a time"), held_folder(tmp_path / "f"):
        pass
    with held_folder(tmp_path / "f"):
        pass


def test_a_file_where_a_folder_should_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(InputError, match="must be a folder"), held_folder(tmp_path / "f"):
        pass


def test_sha256_of_a_file_is_hashlibs(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256_of_file(tmp_path / "f").startswith("ba7816bf8f01cfea")
