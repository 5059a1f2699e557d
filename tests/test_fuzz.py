"""Damaged input files of every kind end in a named error: no traceback, no hang, no heap of memory, no stray file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KINDS = ("scenario", "design", "grid", "trace", "profile", "npy")


def fuzz(kind: str, num: int, folder: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzzing", kind, str(num), str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert sum(seen.values()) >= num
    assert seen.get("2", 0) > num / 10, "most damage should be noticed"


@pytest.mark.parametrize("kind", KINDS)
def test_fifty_damaged_files_are_refused_by_name_or_read(kind: str, tmp_path: Path) -> None:
    fuzz(kind, 50, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_damaged_files_are_refused_by_name_or_read(kind: str, tmp_path: Path) -> None:
    fuzz(kind, 1000, tmp_path)
