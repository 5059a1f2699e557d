"""Plain data become descriptions, or are refused by owner, field and rule; overrides."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.describe.workload import Balanced, Lognormal, Routing, Training
from moesim.door import (
    apply_overrides,
    parse_as,
)
from tests.door_cases import outcome_of, plain, refusal_of


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
    assert refusal is None or str(refusal).startswith(("train: ", "train."))  # or a group of it: train.optimizer


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
