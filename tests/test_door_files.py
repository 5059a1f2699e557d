"""Files at the door: what is no regular file is refused, what is written is whole, damage is named."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesim.catalog.hardware import load_cluster
from moesim.catalog.models import load_model
from moesim.door import (
    read_json,
    read_text,
    read_yaml,
    write_bytes_atomically,
    write_text_atomically,
)
from tests.door_cases import mutated, outcome_of, refusal_of

PRESETS = Path(__file__).parent.parent / "moesim" / "catalog"
CLUSTER = (PRESETS / "clusters" / "h800-8x-ib400.yaml").read_bytes()
CONFIG = (PRESETS / "models" / "deepseek-v3.json").read_bytes()
DESIGN = (PRESETS / "models" / "hypothetical-1t-a50b.yaml").read_bytes()
LOADS: list[tuple[str, bytes, Callable[[Path], object]]] = [
    ("cluster.yaml", CLUSTER, load_cluster),
    ("config.json", CONFIG, load_model),
    ("design.yaml", DESIGN, load_model),
]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize(("name", "original", "load"), LOADS, ids=[name for name, *_ in LOADS])
def test_mutated_files_load_or_are_refused(
    tmp_path: Path, data: st.DataObject, name: str, original: bytes, load: Callable[[Path], object]
) -> None:
    path = tmp_path / name
    path.write_bytes(data.draw(mutated(original)))
    refusal = outcome_of(lambda: load(path))
    assert refusal is None or name in str(refusal)


def test_a_file_that_is_missing_a_folder_or_a_device_is_refused(tmp_path: Path) -> None:
    (tmp_path / "scenario.yaml").write_text("a: 1")
    missing = refusal_of(lambda: read_yaml(tmp_path / "scenrio.yaml"))
    assert missing.endswith("scenrio.yaml: must exist; got 'no such file'. Did you mean scenario.yaml?")
    assert refusal_of(lambda: read_text(tmp_path / "x" / "y")).endswith("Its folder does not exist.")
    assert refusal_of(lambda: read_text(tmp_path)).endswith("must be a regular file; got 'a folder'")
    assert refusal_of(lambda: read_text("/dev/zero")).endswith("must be a regular file; got 'a pipe or device'")
    assert "must be a path" in refusal_of(lambda: read_text("a\x00b"))
    assert "must be readable" in refusal_of(lambda: read_text("a" * 5000))


def test_a_pipe_is_refused_before_opening_it_could_block(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    texts: list[str] = []
    thread = threading.Thread(target=lambda: texts.append(refusal_of(lambda: read_yaml(pipe))), daemon=True)
    thread.start()
    thread.join(timeout=5)
    assert texts
    assert "must be a regular file" in texts[0]


def test_a_file_that_is_too_large_or_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_bytes(b"[" + b" " * 100 + b"]")
    assert refusal_of(lambda: read_json(path, max_bytes=50)).endswith("must not exceed 50 B; got 'a larger file'")
    path.write_bytes(b'{"a": "\xff"}')
    assert refusal_of(lambda: read_json(path)).endswith("must be text in UTF-8; got 'byte 7 that is not'")
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(path) == {"a": 1}


def test_a_written_file_is_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "new" / "results.json"
    write_text_atomically(target, "ä")
    write_bytes_atomically(target, b"second")
    assert target.read_bytes() == b"second"
    assert [path.name for path in target.parent.iterdir()] == ["results.json"]


def test_a_write_that_fails_keeps_the_old_file_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "results.json"
    write_text_atomically(target, "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    message = refusal_of(lambda: write_text_atomically(target, "new"))
    assert message.endswith("results.json: cannot be written; got 'No space left on device'")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_target_that_is_a_folder_or_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refusal_of(lambda: write_text_atomically(tmp_path / "file" / "x", ""))
    (tmp_path / "folder").mkdir()
    assert "cannot be written" in refusal_of(lambda: write_text_atomically(tmp_path / "folder", ""))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
