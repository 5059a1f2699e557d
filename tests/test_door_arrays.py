"""Outside arrays: a .npy file reads back as it was written, or is refused before it can do harm."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesim.door import (
    read_npy,
)
from tests.door_cases import mutated, outcome_of, refusal_of


def npy_bytes(array: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "array",
    [np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)), np.zeros((0, 4), dtype=">u2")],
)
def test_an_npy_file_reads_back_the_same(tmp_path: Path, array: Any) -> None:
    path = tmp_path / "a.npy"
    np.save(path, array)
    read = read_npy(path, num_dimensions=2)
    np.testing.assert_array_equal(read, array)
    assert read.dtype.isnative


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy_bytes(np.array([1.0, np.nan])), "values: must be finite; got '1 that are not, the first at [1]'"),
        (npy_bytes(np.array(["a"])), "dtype: must hold plain numbers; got '<U1'"),
        (npy_bytes(np.array([{}], dtype=object), allow_pickle=True), "dtype: must hold plain numbers; got 'object'"),
        (npy_bytes(np.arange(4.0))[:-1], "must hold the 32 bytes its header promises; got '31 bytes'"),
        (npy_bytes(np.arange(4.0)) + b"x", "must hold the 32 bytes its header promises; got '33 bytes'"),
        (npy_bytes(np.arange(4.0))[:20], "must be a .npy file of version 1 or 2"),
        (b"PK\x03\x04", "must be a .npy file of version 1 or 2"),
        (b"", "must be a .npy file of version 1 or 2"),
        (npy_bytes(np.zeros((2, 2))), "shape: must have 1 dimensions; got (2, 2)"),
    ],
)
def test_a_bad_npy_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(content)
    assert message in refusal_of(lambda: read_npy(path, num_dimensions=1))


@pytest.mark.parametrize("shape", ["(99999999999, 99999)", "(-1,)", "(2**70,)", "(9" + "9" * 400 + ",)"])
def test_an_npy_header_cannot_make_the_door_allocate(tmp_path: Path, shape: str) -> None:
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    path = tmp_path / "a.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    assert "a.npy" in refusal_of(lambda: read_npy(path))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_npy_files_read_or_are_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(data.draw(mutated(npy_bytes(np.arange(12.0).reshape(3, 4)))))
    refusal = outcome_of(lambda: read_npy(path))
    assert str(path) in str(refusal) if refusal else np.isfinite(read_npy(path)).all()
