"""What the door's tests share: what an act is refused with, plain values, damaged bytes."""

from collections.abc import Callable

import pytest
from hypothesis import strategies as st

from moesim.errors import InputError, MoesimError


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


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**17), 10**17)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


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
