"""Damaged input files of every kind end in a named error: no traceback, no hang, no heap of memory, no stray file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Files of each kind: 180 in `make test`, 6,000 with the slow ones.
FEW = {"scenario": 30, "design": 30, "grid": 30, "trace": 30, "profile": 30, "npy": 30}
MANY = {"scenario": 1000, "design": 1000, "grid": 1000, "trace": 1000, "profile": 1000, "npy": 1000}


def fuzz(kind: str, num: int, folder: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzzing", kind, str(num), str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert sum(seen.values()) >= num
    assert seen.get("2", 0) > 0, "some damage must be noticed"


@pytest.mark.parametrize("kind", FEW)
def test_damaged_files_are_refused_by_name_or_read(kind: str, tmp_path: Path) -> None:
    fuzz(kind, FEW[kind], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MANY)
def test_very_many_damaged_files_are_refused_by_name_or_read(kind: str, tmp_path: Path) -> None:
    fuzz(kind, MANY[kind], tmp_path)
