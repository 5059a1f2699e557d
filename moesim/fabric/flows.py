"""Messages between ranks: who sends whom how many bytes, from when.

Legend: R ranks, F flows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.errors import InputError, check

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Flows:
    """F messages: bytes_F whole bytes from rank source_F to rank target_F, handed over at start_F [s]."""

    source_F: Ints
    target_F: Ints
    bytes_F: Floats
    start_F: Floats

    def __post_init__(self) -> None:
        shape = self.source_F.shape
        same = len(shape) == 1 and self.target_F.shape == self.bytes_F.shape == self.start_F.shape == shape
        assert same, "the four columns of flows are as long as one another"
        self._check(self.bytes_F, "bytes", "must be finite and not negative")
        hint = "An exchange waits for all its ranks: give each a start, or no bytes"
        self._check(self.start_F, "start", "must be known for every message, and not before 0 s", hint)

    def _check(self, column_F: Floats, name: str, rule: str, hint: str = "") -> None:
        bad = np.flatnonzero(~((column_F >= 0) & (column_F < np.inf)))
        if bad.size:
            pair = f"{column_F[bad[0]]:g} from rank {self.source_F[bad[0]]} to rank {self.target_F[bad[0]]}"
            raise InputError("flows", name, rule, pair + (f" and {bad.size - 1} more" if bad.size > 1 else ""), hint)

    @property
    def num_flows(self) -> int:
        return self.source_F.size


def flows_of(bytes_RR: ArrayLike, starts_RR: ArrayLike | None = None) -> Flows:
    """The messages of one exchange: bytes_RR[i, j] from rank i to rank j [bytes], handed over at starts_RR[i, j] [s].

    Bytes are rounded down; zero bytes is no message, nor is the diagonal. starts_RR: zero when None; a row of R starts
    (one each sender) is widened; NaN is allowed only where nothing is sent. In the order of the matrix, row by row.
    Raises InputError naming the ranks: a matrix that is not square; negative, NaN or infinite bytes; unknown starts.

    >>> flows_of([[5, 2.9], [0, 7]]).bytes_F.tolist()
    [2.0]
    """
    bytes_ = np.asarray(bytes_RR, np.float64)
    square = bytes_.ndim == 2 and bytes_.shape[0] == bytes_.shape[1]
    check(square, "flows", "bytes", "must be a matrix with a row and a column for each rank", bytes_.shape)
    whole_RR = np.floor(bytes_)
    np.fill_diagonal(whole_RR, 0.0)
    source_F, target_F = np.nonzero(whole_RR)
    starts = np.zeros(1) if starts_RR is None else np.asarray(starts_RR, np.float64)
    if starts.shape == (len(bytes_),):
        starts = starts[:, None]
    fits = starts_RR is None or starts.shape in (bytes_.shape, (len(bytes_), 1))
    check(fits, "flows", "starts", f"must be shaped {bytes_.shape}, or hold one for each sender", starts.shape)
    return Flows(
        source_F=source_F.astype(np.int32),
        target_F=target_F.astype(np.int32),
        bytes_F=whole_RR[source_F, target_F],
        start_F=np.broadcast_to(starts, bytes_.shape)[source_F, target_F],
    )


def together(parts: Sequence[Flows]) -> Flows:
    """Several exchanges that share the wires, as one: the flows of the first, then of the second, and so on."""
    return Flows(
        source_F=np.concatenate([part.source_F for part in parts]),
        target_F=np.concatenate([part.target_F for part in parts]),
        bytes_F=np.concatenate([part.bytes_F for part in parts]),
        start_F=np.concatenate([part.start_F for part in parts]),
    )
