"""Checks that descriptions make at birth, beside those of `moesim.errors`."""

from __future__ import annotations

import math
from typing import SupportsIndex

from moesim.errors import check


def check_whole(owner: str, field: str, value: object, least: int = 1) -> None:
    """Raise InputError unless value is a whole number of at least ``least`` (True and 4.0 are not whole numbers)."""
    if type(value) is int and value >= least:  # a search asks millions of times
        return
    is_whole = isinstance(value, SupportsIndex) and not isinstance(value, bool)  # numpy's whole numbers are welcome
    check(is_whole, owner, field, "must be a whole number", value)
    assert isinstance(value, SupportsIndex)
    check(value.__index__() >= least, owner, field, f"must be at least {least}", value)


def check_number(owner: str, field: str, value: object) -> None:
    """Raise InputError unless value is a finite number."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    check(is_number, owner, field, "must be a number", value)
    assert isinstance(value, (int, float))
    check(math.isfinite(value), owner, field, "must be finite", value)


def check_choice(owner: str, field: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise InputError unless value is one of the choices."""
    good = any(value == choice and type(value) is type(choice) for choice in choices)
    check(good, owner, field, "must be " + " or ".join(map(str, choices)), value)
