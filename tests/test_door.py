"""The door: limits, refusals word for word, and that bytes become plain data or a refusal, never anything else."""

import io
import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesim.catalog.hardware import load_cluster
from moesim.catalog.models import load_model
from moesim.describe.workload import Balanced, Lognormal, Routing, Training
from moesim.door import (
    apply_overrides,
    parse_as,
    parse_json,
    parse_yaml,
    read_json,
    read_npy,
    read_text,
    read_yaml,
    write_bytes_atomically,
    write_text_atomically,
)
from moesim.errors import InputError, MoesimError

PRESETS = Path(__file__).parent.parent / "moesim" / "catalog"


def refusal_of(act: Callable[[], object]) -> str:
    with pytest.raises(InputError) as refusal:
        act()
    return str(refusal.value)


def outcome_of(act: Callable[[], object]) -> MoesimError | None:
    """The refusal of an act that may as well succeed; any other error escapes and fails the test."""
    try:
        act()
    except MoesimError as refusal:
        return refusal
    return None


# --- YAML and JSON -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e3", 1000.0),
        ("1e-3", 0.001),
        ("1_000", 1000),
        ("010", 10),
        (".5", 0.5),
        ("no", "no"),
        ("true", True),
        ("~", None),
        ("'8'", "8"),
        ("12:30", "12:30"),
        ("2024-12-27", "2024-12-27"),
        ("450 GB/s", "450 GB/s"),
        ("{a: [1, {b: null}]}", {"a": [1, {"b": None}]}),
        ("a:\n- 1\n-\nb: |\n  text\n", {"a": [1, None], "b": "text\n"}),
        ("a:", {"a": None}),
    ],
)
def test_yaml_is_read_as_plain_data(text: str, value: object) -> None:
    read = parse_yaml(text, "f.yaml")
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f.yaml: must not be empty; got 'no value'"),
        ("# only a comment", "f.yaml: must not be empty; got 'no value'"),
        ("a: 1\na: 2", "f.yaml: line 2: the same key stands twice; got 'a'"),
        ("a: b: c", "f.yaml: line 1: must be valid YAML"),
        ("a: &x 1\nb: *x", "f.yaml: line 2: YAML aliases are not read; got '*x'. Write the value out."),
        ("a: !!python/object/apply:os.system [ls]", "f.yaml: line 1: YAML tags are not read"),
        ("a: !!int '3'", "f.yaml: line 1: YAML tags are not read; got 'tag:yaml.org,2002:int'"),
        ("a: .nan", "f.yaml: line 1: numbers must be finite; got '.nan'"),
        ("a: -.inf", "f.yaml: line 1: numbers must be finite; got '-.inf'"),
        ("a: 1e999", "f.yaml: line 1: numbers must be finite; got '1e999'"),
        ("a: " + "9" * 5000, "f.yaml: line 1: whole numbers must fit 63 bits"),
        ("--- 1\n--- 2", "f.yaml: line 2: must hold one YAML document; got 'a second one'"),
        ("? [a]\n: 1", "f.yaml: line 1: keys must be plain texts; got 'a list or mapping as a key'"),
        ("[" * 1000, "f.yaml: line 1: must not nest deeper than 32; got 'a deeper value'"),
        ("a: \x00", "f.yaml: must be valid YAML"),
        ("a: \udcff", "f.yaml: must be valid YAML"),
    ],
)
def test_yaml_beyond_plain_data_is_refused(text: str, message: str) -> None:
    assert refusal_of(lambda: parse_yaml(text, "f.yaml")).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f.json: line 1: must be valid JSON; got 'Expecting value'"),
        ('{"a": 1,\n "a": 2}', "f.json: a: the same key stands twice; got 2"),
        ('{"a": NaN}', "f.json: numbers must be finite; got 'NaN'"),
        ('{"a": -Infinity}', "f.json: numbers must be finite; got '-Infinity'"),
        ('{"a": 1e999}', "f.json: numbers must be finite; got '1e999'"),
        ('{"a": ' + "9" * 5000 + "}", "f.json: whole numbers must fit 63 bits"),
        ("[" * 40 + "]" * 40, "f.json: must not nest deeper than 32"),
        ("[" * 200_000, "f.json: must not nest deeper than 32"),
        ('{"a": 1', "f.json: line 1: must be valid JSON"),
    ],
)
def test_json_beyond_plain_data_is_refused(text: str, message: str) -> None:
    assert refusal_of(lambda: parse_json(text, "f.json")).startswith(message)


def test_files_of_others_may_hold_infinity_where_nobody_asks() -> None:
    value = parse_json('{"time_step_limit": [0.0, Infinity]}', "f.json", keep_non_finite_as_text=True)
    assert value == {"time_step_limit": [0.0, "Infinity"]}


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**17), 10**17)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=100, deadline=None)
@given(plain)
def test_what_json_writes_reads_back_the_same(value: Any) -> None:
    assert parse_json(json.dumps(value), "f.json") == value


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=200))
def test_no_text_gets_past_yaml_or_json_as_anything_but_data_or_a_refusal(text: str) -> None:
    for parse in (parse_yaml, parse_json):
        refusal = outcome_of(lambda parse=parse: parse(text, "f"))
        assert refusal is None or str(refusal).startswith("f: ")


def mutated(original: bytes) -> st.SearchStrategy[bytes]:
    """The bytes with some cut out, replaced, repeated or truncated."""

    def change(edits: list[tuple[int, int, bytes]]) -> bytes:
        data = bytearray(original)
        for start, length, new in edits:
            at = start % (len(data) + 1)
            data[at : at + length] = new
        return bytes(data)

    tokens = [
        b"",
        b"\x00",
        b"\xff",
        b"-",
        b"1e999",
        b"nan",
        b"[[",
        b"{",
        b"}",
        b"*a",
        b"&a ",
        b"!!x ",
        b"\n",
        b": ",
        b'"',
    ]
    edit = st.tuples(st.integers(0, 10_000), st.integers(0, 30), st.sampled_from(tokens) | st.binary(max_size=6))
    return st.lists(edit, min_size=1, max_size=4).map(change)


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


# --- files -------------------------------------------------------------------------------------------------------


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


# --- .npy --------------------------------------------------------------------------------------------------------


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


# --- descriptions ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Wire:
    speed_bytes_per_s: float
    delay_s: float = 0.0
    buffer_bytes: int = 0
    lanes: tuple[int, ...] = ()
    ends: tuple[str, str] = ("a", "b")
    kind: Literal["copper", "glass"] = "glass"
    either: int | str = 0


@pytest.mark.parametrize(
    ("raw", "field", "value"),
    [
        ({"speed_bytes_per_s": "400 Gbit/s"}, "speed_bytes_per_s", 50e9),
        ({"speed_bytes_per_s": 5}, "speed_bytes_per_s", 5.0),
        ({"speed_bytes_per_s": 1, "delay_s": "2 us"}, "delay_s", 2e-6),
        ({"speed_bytes_per_s": 1, "buffer_bytes": "2 KiB"}, "buffer_bytes", 2048),
        ({"speed_bytes_per_s": 1, "lanes": [1, 2]}, "lanes", (1, 2)),
        ({"speed_bytes_per_s": 1, "either": "x"}, "either", "x"),
    ],
)
def test_values_become_what_the_field_says(raw: dict[str, Any], field: str, value: object) -> None:
    read = getattr(parse_as(Wire, raw, "wire"), field)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "wire: speed_bytes_per_s: is required; got []. Only these keys stand there."),
        ([], "wire: must be a mapping of names to values; got []"),
        ({"speed_byte_per_s": 1}, "wire: speed_byte_per_s: is an unknown key; got 1. Did you mean speed_bytes_per_s?"),
        ({"speed_bytes_per_s": "fast"}, "wire: speed_bytes_per_s: must be a number with a unit out of B/s, MB/s, GB/s"),
        ({"speed_bytes_per_s": "3 s"}, "wire: speed_bytes_per_s: must be a number with a unit out of B/s"),
        (
            {"speed_bytes_per_s": "5"},
            "wire: speed_bytes_per_s: must be a number; got '5'. "
            "It stands there as a text: write it without quotes and commas.",
        ),
        ({"speed_bytes_per_s": True}, "wire: speed_bytes_per_s: must be a number; got True"),
        ({"speed_bytes_per_s": float("nan")}, "wire: speed_bytes_per_s: must be finite; got nan"),
        ({"speed_bytes_per_s": 10**400}, "wire: speed_bytes_per_s: must be finite; got"),
        (
            {"speed_bytes_per_s": 1, "buffer_bytes": 1e3},
            "wire: buffer_bytes: must be a whole number; got 1000.0. Write",
        ),
        ({"speed_bytes_per_s": 1, "lanes": 3}, "wire: lanes: must be a list; got 3"),
        ({"speed_bytes_per_s": 1, "lanes": [1, "2"]}, "wire: lanes[1]: must be a whole number; got '2'"),
        ({"speed_bytes_per_s": 1, "ends": ["a"]}, "wire: ends: must be a list of 2 values; got ['a']"),
        (
            {"speed_bytes_per_s": 1, "kind": "glas"},
            "wire: kind: must be copper or glass; got 'glas'. Did you mean glass?",
        ),
        ({"speed_bytes_per_s": 1, "either": []}, "wire: either: must be a whole number or a text; got []"),
        ({1: 2, "speed_bytes_per_s": 1}, "wire: 1: is an unknown key; got 2. Keys are texts."),
    ],
)
def test_a_value_that_does_not_fit_its_field_is_refused(raw: Any, message: str) -> None:
    assert refusal_of(lambda: parse_as(Wire, raw, "wire")).startswith(message)


def test_a_union_is_told_apart_by_kind_and_a_bare_text_names_one() -> None:
    assert parse_as(Routing, {"popularity": "balanced"}, "r").popularity == Balanced()
    raw = {"popularity": {"kind": "lognormal", "gini": 0.5}}
    assert parse_as(Routing, raw, "r").popularity == Lognormal(gini=0.5)
    assert refusal_of(lambda: parse_as(Routing, {"popularity": {"gini": 0.5}}, "r")).startswith(
        "r.popularity: kind: is required"
    )
    assert "Did you mean lognormal" in refusal_of(lambda: parse_as(Routing, {"popularity": "log-normal"}, "r"))
    assert "gini: is an unknown key" in refusal_of(
        lambda: parse_as(Routing, {"popularity": {"kind": "balanced", "gini": 0.5}}, "r")
    )


def test_a_rule_of_the_description_is_refused_with_the_files_owner() -> None:
    message = refusal_of(lambda: parse_as(Training, {"global_batch": 0}, "my.yaml.train"))
    assert message == "my.yaml.train: global_batch: must be at least 1; got 0"


@settings(max_examples=150, deadline=None)
@given(raw=st.dictionaries(st.sampled_from(sorted(Training.__dataclass_fields__)) | st.text(max_size=3), plain))
def test_any_plain_value_becomes_a_description_or_is_refused(raw: Any) -> None:
    refusal = outcome_of(lambda: parse_as(Training, raw, "train"))
    assert refusal is None or str(refusal).startswith("train: ")


# --- overrides ---------------------------------------------------------------------------------------------------


def test_overrides_set_nested_values_read_as_yaml_and_leave_the_original_alone() -> None:
    raw = {"train": {"seq_len": 4096}, "seed": 0}
    changed = apply_overrides(
        raw, ["train.seq_len=8192", "routing.capacity_factor=1.25", "seed=~", "tags=[1, a=b]", "name=a=b", "empty="]
    )
    assert changed == {
        "train": {"seq_len": 8192},
        "seed": None,
        "routing": {"capacity_factor": 1.25},
        "tags": [1, "a=b"],
        "name": "a=b",
        "empty": None,
    }
    assert raw == {"train": {"seq_len": 4096}, "seed": 0}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "--set: seed: must read key=value or group.key=value; got 'seed'"),
        ("=3", "--set: =3: must read key=value or group.key=value; got '=3'"),
        ("a..b=3", "--set: a..b=3: must read key=value or group.key=value"),
        ("seed.x=3", "--set: seed.x: cannot be set: seed is a single value, not a group; got 7"),
        ("seed={a: b: c}", "--set seed: line 1: must be valid YAML"),
        ("seed=*x", "--set seed: line 1: YAML aliases are not read"),
        (".".join("a" * 2000) + "=1", "--set: "),
        ("seed=.nan", "--set seed: line 1: numbers must be finite"),
    ],
)
def test_a_bad_override_is_refused(override: str, message: str) -> None:
    assert refusal_of(lambda: apply_overrides({"seed": 7}, [override])).startswith(message)
