"""Outside files in, results out. A file that breaks a rule is refused by name; a result is written whole or not at all.

YAML is read as plain data (YAML 1.2 core scalars; no tags, no anchors, one document), so that ``1e3`` is a number,
``no`` a text, and nothing in a file can run code or grow when it is read.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from moesim.errors import InputError, check, near_match
from moesim.units import GIB, MIB, format_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_TEXT_BYTES = 16 * MIB
MAX_YAML_BYTES = 1 * MIB
MAX_NPY_BYTES = 4 * GIB
MAX_DEPTH = 32  # nesting of lists and mappings; no description needs ten
MAX_INTEGER_BITS = 63

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"(true|True|TRUE)|(false|False|FALSE)")
_INT = re.compile(r"[-+]?[0-9][0-9_]*")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def read_text(path: str | Path, *, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """The text of a regular UTF-8 file of at most max_bytes; InputError otherwise."""
    try:
        return _read_bytes(path, max_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(str(path), "", "must be text in UTF-8", f"byte {error.start} that is not") from None


def read_yaml(path: str | Path, *, max_bytes: int = MAX_YAML_BYTES) -> Any:
    """The plain value of a YAML file: dict, list, str, int, float, bool or None. See `parse_yaml`."""
    return parse_yaml(read_text(path, max_bytes=max_bytes), str(path))


def read_json(path: str | Path, *, max_bytes: int = MAX_TEXT_BYTES, keep_non_finite_as_text: bool = False) -> Any:
    """The plain value of a JSON file. See `parse_json`."""
    text = read_text(path, max_bytes=max_bytes)
    return parse_json(text, str(path), keep_non_finite_as_text=keep_non_finite_as_text)


def parse_yaml(text: str, owner: str) -> Any:
    """The plain value of one YAML document. Raises InputError(owner, "line N", ...) for anything but plain data.

    Built straight from the parser's events: no recursion, no constructors, so depth and size stay bounded.

    >>> parse_yaml("{lr: 1e-3, steps: 1e3, ok: no}", "text")
    {'lr': 0.001, 'steps': 1000.0, 'ok': 'no'}
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return _build(yaml.parse(text, Loader=loader), owner)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise InputError(owner, f"line {line}", "must be valid YAML", error.problem) from None
    except (yaml.YAMLError, UnicodeError) as error:  # characters that YAML, or UTF-8, does not have
        raise InputError(owner, "", "must be valid YAML", _one_line(error)) from None


def read_toml(path: str | Path, *, max_bytes: int = MAX_YAML_BYTES) -> Any:
    """The plain value of a TOML file. Raises InputError."""
    import tomllib

    try:
        return tomllib.loads(read_text(path, max_bytes=max_bytes))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(str(path), "", "must be valid TOML", _one_line(error)) from None


def to_yaml(value: Any) -> str:
    """Plain values as YAML that `parse_yaml` reads back, keys in the order given."""
    import yaml

    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None))


def _build(events: Iterator[Any], owner: str) -> Any:
    """One Python value from the events of one document."""
    import yaml

    root: list[Any] = []
    stack: list[Any] = [root]  # open containers, outermost first
    keys: list[str | None] = [None]  # of each open mapping, the key that waits for its value
    num_documents = 0
    for event in events:
        field = f"line {event.start_mark.line + 1}"
        if isinstance(event, yaml.DocumentStartEvent):
            num_documents += 1
            check(num_documents == 1, owner, field, "must hold one YAML document", "a second one")
        elif isinstance(event, yaml.AliasEvent):
            raise InputError(owner, field, "YAML aliases are not read", f"*{event.anchor}", "Write the value out.")
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            stack.pop()
            keys.pop()
        elif isinstance(event, yaml.ScalarEvent):
            parent = stack[-1]
            if isinstance(parent, dict) and keys[-1] is None:
                check(event.value not in parent, owner, field, "the same key stands twice", event.value)
                keys[-1] = event.value
                parent[event.value] = None
                continue
            _append(stack, keys, _scalar(event, owner, field))
        elif isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            _check_untagged(event, event.implicit, owner, field)
            waiting_for_key = isinstance(stack[-1], dict) and keys[-1] is None
            check(not waiting_for_key, owner, field, "keys must be plain texts", "a list or mapping as a key")
            check(len(stack) <= MAX_DEPTH, owner, field, f"must not nest deeper than {MAX_DEPTH}", "a deeper value")
            value: Any = {} if isinstance(event, yaml.MappingStartEvent) else []
            _append(stack, keys, value)
            stack.append(value)
            keys.append(None)
    check(len(root) == 1, owner, "", "must not be empty", "no value")
    return root[0]


def _append(stack: list[Any], keys: list[str | None], value: Any) -> None:
    if isinstance(stack[-1], dict):
        stack[-1][keys[-1]] = value
        keys[-1] = None
    else:
        stack[-1].append(value)


def _check_untagged(event: Any, implicit: bool, owner: str, field: str) -> None:
    check(implicit or event.tag in (None, "!"), owner, field, "YAML tags are not read", event.tag)


def _scalar(event: Any, owner: str, field: str) -> Any:
    """A scalar by YAML 1.2's core rules, except that .inf and .nan are refused and long integers too."""
    text: str = event.value
    _check_untagged(event, any(event.implicit), owner, field)
    if not event.implicit[0] or event.style not in (None, ""):
        return text
    if _NULL.fullmatch(text):
        return None
    if truth := _BOOL.fullmatch(text):
        return truth[1] is not None
    if _INT.fullmatch(text):
        return _integer(text.replace("_", ""), owner, field)
    if _NOT_FINITE.fullmatch(text):
        raise InputError(owner, field, "numbers must be finite", text)
    if _FLOAT.fullmatch(text):
        return _finite(text.replace("_", ""), owner, field)
    return text


def _integer(text: str, owner: str, field: str) -> int:
    check(len(text) <= 20, owner, field, f"whole numbers must fit {MAX_INTEGER_BITS} bits", text)
    value = int(text)
    check(value.bit_length() <= MAX_INTEGER_BITS, owner, field, f"whole numbers must fit {MAX_INTEGER_BITS} bits", text)
    return value


def _finite(text: str, owner: str, field: str) -> float:
    value = float(text)
    check(math.isfinite(value), owner, field, "numbers must be finite", text)
    return value


def parse_json(text: str, owner: str, *, keep_non_finite_as_text: bool = False) -> Any:
    """The plain value of a JSON text. Raises InputError for bad JSON, duplicate keys, NaN, infinities, deep nesting.

    keep_non_finite_as_text: for files of others that hold ``Infinity`` under keys nobody asks for; it becomes a text.
    """

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value: dict[str, Any] = {}
        for key, item in pairs:
            check(key not in value, owner, key, "the same key stands twice", item)
            value[key] = item
        return value

    def non_finite(constant: str) -> str:
        check(keep_non_finite_as_text, owner, "", "numbers must be finite", constant)
        return constant

    try:
        value = json.loads(
            text,
            object_pairs_hook=no_duplicates,
            parse_constant=non_finite,
            parse_int=lambda digits: _integer(digits, owner, ""),
            parse_float=lambda digits: _finite(digits, owner, ""),
        )
    except json.JSONDecodeError as error:
        raise InputError(owner, f"line {error.lineno}", "must be valid JSON", error.msg) from None
    except RecursionError:
        raise InputError(owner, "", f"must not nest deeper than {MAX_DEPTH}", "a deeper value") from None
    level, depth = [value], 0
    while level := [child for item in level for child in _children(item)]:
        depth += 1
        check(depth <= MAX_DEPTH, owner, "", f"must not nest deeper than {MAX_DEPTH}", "a deeper value")
    return value


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def read_npy(
    path: str | Path,
    *,
    num_dimensions: int | None = None,
    allowed_kinds: str = "iuf",
    max_bytes: int = MAX_NPY_BYTES,
    allow_nan: bool = False,
) -> NDArray[Any]:
    """The array of a .npy file: no pickles, finite numbers only, its header checked before anything is allocated.

    allowed_kinds: numpy's dtype letters (i whole, u unsigned, f floating, b truth values). allow_nan: NaN may stand
    where there is no value. Raises InputError.

    >>> read_npy("loads.npy", num_dimensions=2)  # doctest: +SKIP
    """
    import numpy as np

    owner = str(path)
    file = _open_regular(path)
    with file:
        shape, fortran, dtype = _npy_header(file, owner)
        check(
            dtype.kind in allowed_kinds and not dtype.hasobject, owner, "dtype", "must hold plain numbers", str(dtype)
        )
        if num_dimensions is not None:
            check(len(shape) == num_dimensions, owner, "shape", f"must have {num_dimensions} dimensions", shape)
        check(all(size >= 0 for size in shape), owner, "shape", "must not be negative", shape)
        num_bytes = math.prod(shape) * dtype.itemsize
        check(num_bytes <= max_bytes, owner, "shape", f"must not exceed {format_bytes(max_bytes)}", shape)
        held = os.fstat(file.fileno()).st_size - file.tell()
        check(held == num_bytes, owner, "", f"must hold the {num_bytes} bytes its header promises", f"{held} bytes")
        flat: NDArray[Any] = np.frombuffer(file.read(num_bytes), dtype=dtype)
    check(flat.size == math.prod(shape), owner, "", "was cut short while it was read", f"{flat.size} numbers")
    array = flat.reshape(shape, order="F" if fortran else "C").astype(dtype.newbyteorder("="))
    if dtype.kind == "f":
        bad = np.argwhere(np.isinf(array) if allow_nan else ~np.isfinite(array))
        check(len(bad) == 0, owner, "values", "must be finite", f"{len(bad)} that are not, the first at {_first(bad)}")
    return array


def _first(positions: NDArray[Any]) -> list[int]:
    return [int(i) for i in positions[0]] if len(positions) else []


def _npy_header(file: BinaryIO, owner: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """(shape, Fortran order, dtype) that a .npy header states."""
    from numpy.lib import format as npy_format

    readers = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}
    try:
        return readers[npy_format.read_magic(file)](file)
    except Exception as error:  # a foreign parser of hostile bytes: whatever it raises, the file is at fault
        raise InputError(owner, "", "must be a .npy file of version 1 or 2", _one_line(error)) from None


def write_text_atomically(path: str | Path, text: str) -> None:
    """Write a whole UTF-8 text or nothing: into a file beside it, then renamed. Raises InputError where it cannot."""
    write_bytes_atomically(path, text.encode("utf-8"))


def write_bytes_atomically(path: str | Path, content: bytes) -> None:
    """Write a whole file or nothing: into a file beside it, then renamed. Raises InputError where it cannot."""
    target = Path(path)
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with beside.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(str(path), "", "cannot be written", error.strerror or _one_line(error)) from None


def _read_bytes(path: str | Path, max_bytes: int) -> bytes:
    with _open_regular(path) as file:
        content = file.read(max_bytes + 1)
    check(len(content) <= max_bytes, str(path), "", f"must not exceed {format_bytes(max_bytes)}", "a larger file")
    return content


def _open_regular(path: str | Path) -> BinaryIO:
    """An open regular file; a folder, pipe or device is refused before opening it could block."""
    owner = str(path)
    try:
        mode = os.stat(path).st_mode
        check(stat.S_ISREG(mode), owner, "", "must be a regular file", _file_kind(mode))
        return open(path, "rb")
    except FileNotFoundError:
        raise InputError(owner, "", "must exist", "no such file", _sibling(Path(path))) from None
    except OSError as error:
        raise InputError(owner, "", "must be readable", error.strerror or _one_line(error)) from None
    except ValueError as error:  # a path with a null byte
        raise InputError(owner, "", "must be a path", _one_line(error)) from None


def _file_kind(mode: int) -> str:
    return "a folder" if stat.S_ISDIR(mode) else "a pipe or device"


def _sibling(path: Path) -> str:
    """A hint naming files of a like name in the same folder, if any."""
    try:
        names = [name for name in os.listdir(path.parent) if not name.startswith(".")]
    except OSError:
        return "Its folder does not exist." if not path.parent.is_dir() else ""
    hint = near_match(path.name, names)
    return hint if hint.startswith("Did you mean") else ""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
