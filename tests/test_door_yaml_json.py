"""YAML and JSON: plain data or a refusal word for word, never anything else."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.door import (
    parse_json,
    parse_yaml,
)
from tests.door_cases import outcome_of, plain, refusal_of


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
