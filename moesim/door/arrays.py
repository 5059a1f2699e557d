"""Large arrays a few rows at a time: .npy, .npz and safetensors, in and out, so that a file larger than memory works.

A file's headers are checked before anything is allocated; no pickle is ever loaded. Rows are read from the file into
fresh memory instead of being mapped, so that a limit on address space holds and a file that shrinks is an error, not a
crash.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from moesim.door.files import _npy_header, _one_line, _open_regular, parse_json
from moesim.errors import InputError, check, near_match
from moesim.units import MIB

CHUNK_BYTES = 8 * MIB
MAX_HEADER_BYTES = 16 * MIB
MAX_DIMENSIONS = 8
MAX_MEMBERS = 1000
SUFFIXES = (".npy", ".npz", ".safetensors")
# safetensors' names of the element types that NumPy has; the others (BF16, F8_...) are listed as raw bytes.
_SAFE_DTYPES: Mapping[str, str] = MappingProxyType(
    {"I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "U8": "u1", "U16": "<u2", "U32": "<u4", "U64": "<u8"}
    | {"F16": "<f2", "F32": "<f4", "F64": "<f8", "BOOL": "?"}
)
_SAFE_OTHERS: Mapping[str, int] = MappingProxyType({"BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8})


@dataclass(frozen=True, kw_only=True, eq=False)
class ArrayStream:
    """One array of a file: its shape and dtype are known and fit the file; its rows are read on demand."""

    owner: str
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    open_data: Callable[[], contextlib.AbstractContextManager[IO[bytes]]]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, max_rows: int | None = None) -> Iterator[NDArray[Any]]:
        """Blocks of at most max_rows rows of the first axis, in order (None: about CHUNK_BYTES); InputError if short.

        >>> [block.shape for block in open_arrays("trace.npy")[""].rows(1000)]  # doctest: +SKIP
        """
        assert self.shape, "a scalar has no rows"
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        block_rows = max_rows or max(1, CHUNK_BYTES // max(row_bytes, 1))
        with self.open_data() as file:
            for first in range(0, self.shape[0], block_rows):
                num_rows = min(block_rows, self.shape[0] - first)
                content = _read_exactly(file, num_rows * row_bytes, self.owner, self.name)
                block: NDArray[Any] = np.frombuffer(content, dtype=self.dtype)
                yield block.reshape(num_rows, *self.shape[1:]).astype(self.dtype.newbyteorder("="), copy=False)
            if isinstance(file, zipfile.ZipExtFile):
                file.read(1)  # past the last byte a member's checksum is compared

    def read(self, *, max_bytes: int = CHUNK_BYTES) -> NDArray[Any]:
        """The whole array, which must be small."""
        check(self.num_bytes <= max_bytes, self.owner, self.name, f"must not exceed {max_bytes} bytes", self.shape)
        with self.open_data() as file:
            content = _read_exactly(file, self.num_bytes, self.owner, self.name)
        return np.frombuffer(content, dtype=self.dtype).reshape(self.shape).astype(self.dtype.newbyteorder("="))


@dataclass(frozen=True, kw_only=True, eq=False)
class ArrayFile:
    """The arrays of one file by name ("" for that of a .npy), and its texts (safetensors' metadata)."""

    owner: str
    arrays: Mapping[str, ArrayStream]
    metadata: Mapping[str, str]

    def __getitem__(self, name: str) -> ArrayStream:
        hint = near_match(name, self.arrays)
        check(name in self.arrays, self.owner, name, "must be an array of the file", sorted(self.arrays), hint)
        return self.arrays[name]


def open_arrays(path: str | Path) -> ArrayFile:
    """What a .npy, .npz or .safetensors file holds, every header checked, no data read yet. Raises InputError."""
    owner = str(path)
    readers = {".npy": _open_npy, ".npz": _open_npz, ".safetensors": _open_safetensors}
    suffix = Path(path).suffix.lower()
    check(suffix in readers, owner, "", "must end in " + ", ".join(SUFFIXES), suffix)
    return readers[suffix](path, owner)


def _open_npy(path: str | Path, owner: str) -> ArrayFile:
    with _open_regular(path) as file:
        shape, dtype = _header(file, owner, "")
        start = file.tell()
        held = os.fstat(file.fileno()).st_size - start

    @contextlib.contextmanager
    def data() -> Iterator[IO[bytes]]:
        with _open_regular(path) as file:
            file.seek(start)
            yield file

    stream = ArrayStream(owner=owner, name="", shape=shape, dtype=dtype, open_data=data)
    rule = f"must hold the {stream.num_bytes} bytes its header promises"
    check(held == stream.num_bytes, owner, "", rule, f"{held} bytes")
    return ArrayFile(owner=owner, arrays={"": stream}, metadata={})


def _open_npz(path: str | Path, owner: str) -> ArrayFile:
    arrays: dict[str, ArrayStream] = {}
    with _open_regular(path) as file, _zip_faults(owner), zipfile.ZipFile(file) as archive:
        num_members = len(archive.infolist())
        check(num_members <= MAX_MEMBERS, owner, "", f"must not hold more than {MAX_MEMBERS} arrays", num_members)
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            check(info.filename.endswith(".npy"), owner, info.filename, "must be a .npy member", "another kind of file")
            check(name not in arrays, owner, name, "the same array stands twice", info.filename)
            check(not info.flag_bits & 1, owner, name, "must not be encrypted", "an encrypted member")
            known = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            check(known, owner, name, "must be stored or deflated", f"compression {info.compress_type}")
            with archive.open(info) as member:
                shape, dtype = _header(member, owner, name)
                start = member.tell()
            stream = ArrayStream(
                owner=owner, name=name, shape=shape, dtype=dtype, open_data=_member_opener(path, owner, info, start)
            )
            held = info.file_size - start
            rule = f"must hold the {stream.num_bytes} bytes its header promises"
            check(held == stream.num_bytes, owner, name, rule, f"{held} bytes")
            arrays[name] = stream
    return ArrayFile(owner=owner, arrays=arrays, metadata={})


def _member_opener(
    path: str | Path, owner: str, info: zipfile.ZipInfo, start: int
) -> Callable[[], contextlib.AbstractContextManager[IO[bytes]]]:
    @contextlib.contextmanager
    def data() -> Iterator[IO[bytes]]:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(_open_regular(path))
            stack.enter_context(_zip_faults(owner))
            archive = stack.enter_context(zipfile.ZipFile(file))
            member = stack.enter_context(archive.open(info.filename))
            _read_exactly(member, start, owner, info.filename)
            yield member

    return data


@contextlib.contextmanager
def _zip_faults(owner: str) -> Iterator[None]:
    """Whatever the parser of a hostile archive raises (RuntimeError: an unknown feature), the file is at fault."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError) as error:
        raise InputError(owner, "", "must be a sound .npz archive", _one_line(error)) from None


def _header(file: IO[bytes], owner: str, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """(shape, dtype) of a .npy header; rows must lie one after the other."""
    shape, fortran, dtype = _npy_header(file, owner)  # type: ignore[arg-type]
    check(not dtype.hasobject, owner, name or "dtype", "must hold plain numbers", str(dtype))
    _check_shape(shape, owner, name)
    is_rows = not fortran or sum(size > 1 for size in shape) <= 1
    hint = "Save numpy.ascontiguousarray of it."
    check(is_rows, owner, name or "order", "must be stored row by row (C order)", "Fortran order", hint)
    return shape, dtype


def _check_shape(shape: tuple[int, ...], owner: str, name: str) -> None:
    good = len(shape) <= MAX_DIMENSIONS and all(type(size) is int and 0 <= size < 2**62 for size in shape)
    rule = f"must be at most {MAX_DIMENSIONS} sizes, none negative"
    check(good, owner, f"{name}.shape".lstrip("."), rule, shape)


def _open_safetensors(path: str | Path, owner: str) -> ArrayFile:
    """The format is one little-endian length, a JSON header, then the tensors' bytes without gaps."""
    with _open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        check(len(start) == 8, owner, "", "must start with the length of its header", f"{len(start)} bytes")
        header_bytes = int.from_bytes(start, "little")
        rule = f"must not exceed {MAX_HEADER_BYTES} bytes nor the file"
        check(header_bytes <= min(MAX_HEADER_BYTES, size - 8), owner, "header length", rule, header_bytes)
        try:
            text = file.read(header_bytes).decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(owner, "header", "must be UTF-8", f"byte {error.start} that is not") from None
    header = parse_json(text, owner)
    check(isinstance(header, dict), owner, "header", "must be a JSON mapping", header)
    metadata = header.pop("__metadata__", {})
    plain = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    check(plain, owner, "__metadata__", "must map names to texts", metadata)
    arrays: dict[str, ArrayStream] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        shape, dtype, (begin, end) = _safe_entry(entry, owner, name)
        spans.append((begin, end, name))
        arrays[name] = ArrayStream(
            owner=owner, name=name, shape=shape, dtype=dtype, open_data=_opener_at(path, 8 + header_bytes + begin)
        )
        rule = f"must span the {arrays[name].num_bytes} bytes of its shape"
        check(end - begin == arrays[name].num_bytes, owner, f"{name}.data_offsets", rule, [begin, end])
    reached = 0
    for begin, end, name in sorted(spans):
        rule = f"must follow the tensor before it, at byte {reached}"
        check(begin == reached, owner, f"{name}.data_offsets", rule, [begin, end])
        reached = end
    held = size - 8 - header_bytes
    check(reached == held, owner, "", f"must hold the {reached} bytes its header promises", f"{held} bytes")
    return ArrayFile(owner=owner, arrays=arrays, metadata=metadata)


def _safe_entry(entry: object, owner: str, name: str) -> tuple[tuple[int, ...], np.dtype[Any], tuple[int, int]]:
    keys = {"dtype", "shape", "data_offsets"}
    check(isinstance(entry, dict) and set(entry) == keys, owner, name, f"must hold {sorted(keys)}", entry)
    assert isinstance(entry, dict)
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    is_known = isinstance(kind, str) and (kind in _SAFE_DTYPES or kind in _SAFE_OTHERS)
    check(is_known, owner, f"{name}.dtype", "must be one of " + ", ".join([*_SAFE_DTYPES, *_SAFE_OTHERS]), kind)
    dtype = np.dtype(_SAFE_DTYPES[kind]) if kind in _SAFE_DTYPES else np.dtype(f"V{_SAFE_OTHERS[kind]}")
    check(isinstance(shape, list), owner, f"{name}.shape", "must be a list of sizes", shape)
    _check_shape(tuple(shape), owner, name)
    is_span = isinstance(offsets, list) and len(offsets) == 2 and all(type(at) is int and at >= 0 for at in offsets)
    check(is_span, owner, f"{name}.data_offsets", "must be two byte positions", offsets)
    return tuple(shape), dtype, (offsets[0], offsets[1])


def _opener_at(path: str | Path, start: int) -> Callable[[], contextlib.AbstractContextManager[IO[bytes]]]:
    @contextlib.contextmanager
    def data() -> Iterator[IO[bytes]]:
        with _open_regular(path) as file:
            file.seek(start)
            yield file

    return data


def _read_exactly(file: IO[bytes], num_bytes: int, owner: str, name: str) -> bytes:
    content = file.read(num_bytes)
    got = f"{len(content)} of {num_bytes} bytes"
    check(len(content) == num_bytes, owner, name, "was cut short while it was read", got)
    return content


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write whole or not at all: it takes its name when the block ends well. InputError where it cannot."""
    target = Path(path)
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with beside.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(str(path), "", "cannot be written", error.strerror or _one_line(error)) from None


def write_array(
    path: str | Path,
    blocks: Iterable[NDArray[Any]],
    *,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    beside: Mapping[str, NDArray[Any]] = MappingProxyType({}),
) -> None:
    """Write an array block by block to a .npy, .npz or .safetensors file, whole or not at all.

    blocks: rows in order, of the given shape and dtype together. beside: small arrays of whole numbers that travel with
    it: further members of a .npz, JSON texts in safetensors' metadata; a .npy has no place for them.
    """
    suffix = Path(path).suffix.lower()
    check(suffix in SUFFIXES, str(path), "", "must end in " + ", ".join(SUFFIXES), suffix)
    dtype = np.dtype(dtype).newbyteorder("<")
    num_bytes = math.prod(shape) * dtype.itemsize
    with atomic_file(path) as file:
        if suffix == ".npz":
            with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    _write_npy(member, blocks, shape, dtype)
                for other, values in beside.items():
                    with archive.open(f"{other}.npy", "w") as member:
                        _write_npy(member, [np.asarray(values)], np.shape(values), np.asarray(values).dtype)
            return
        if suffix == ".npy":
            _write_npy(file, blocks, shape, dtype)
            return
        codes = {np.dtype(code): kind for kind, code in _SAFE_DTYPES.items()}
        header: dict[str, Any] = {name: {"dtype": codes[dtype], "shape": shape, "data_offsets": [0, num_bytes]}}
        if beside:
            header["__metadata__"] = {
                other: json.dumps(np.asarray(values).tolist()) for other, values in beside.items()
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight bytes
        file.write(len(text).to_bytes(8, "little") + text)
        _write_blocks(file, blocks, shape, dtype)


def _write_npy(file: IO[bytes], blocks: Iterable[NDArray[Any]], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    from numpy.lib import format as npy_format

    descr = npy_format.dtype_to_descr(dtype)
    npy_format.write_array_header_1_0(file, {"shape": shape, "fortran_order": False, "descr": descr})  # type: ignore[arg-type]
    _write_blocks(file, blocks, shape, dtype)


def _write_blocks(
    file: IO[bytes], blocks: Iterable[NDArray[Any]], shape: tuple[int, ...], dtype: np.dtype[Any]
) -> None:
    num_values = 0
    for block in blocks:
        num_values += block.size
        file.write(np.ascontiguousarray(block, dtype=dtype).tobytes())
    assert num_values == math.prod(shape), "blocks must fill the shape that was announced"
