"""The only way in: every outside file is read here, within limits, and becomes plain checked values or descriptions."""

from moesim.door.files import (
    parse_json,
    parse_yaml,
    read_json,
    read_npy,
    read_text,
    read_yaml,
    write_bytes_atomically,
    write_text_atomically,
)
from moesim.door.parse import apply_overrides, parse_as, refusals_of

__all__ = [
    "apply_overrides",
    "parse_as",
    "parse_json",
    "parse_yaml",
    "read_json",
    "read_npy",
    "read_text",
    "read_yaml",
    "refusals_of",
    "write_bytes_atomically",
    "write_text_atomically",
]
