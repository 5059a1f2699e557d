"""How much attention packed sequences need: documents one after another, cut where a sequence ends.

A query sees its own document only, so a sequence of pieces l_i needs as much of causal attention as sum l_i^2 over
seq_len^2, its *share*. See docs/model.md#packed-documents.

Legend: N sequences, P pieces of documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesim.describe.documents import OWNER, Documents, HistogramLengths
from moesim.door.records import number_of, read_records
from moesim.errors import check
from moesim.units import TERA

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]
_MOST_DRAWN = 50_000_000  # documents of one step


def draw_pieces(
    documents: Documents, num_sequences: int, seq_len: int, rng: np.random.Generator
) -> tuple[Whole, Whole]:
    """(length of each piece, the sequence that it lies in) of num_sequences sequences packed without gaps.

    Documents stand one after another in random order and are cut where a sequence ends; the rest begins the next.
    Raises InputError for a histogram that is none, or documents so short that a step has too many.
    """
    draw, mean_tokens = _law(documents)
    total = num_sequences * seq_len
    rule = f"make more than {_MOST_DRAWN:,} documents in a step"
    check(total / mean_tokens < _MOST_DRAWN, OWNER, "", rule, f"{mean_tokens:.1f} tokens each")
    ends: list[Whole] = []
    reached = 0
    while reached < total:
        lengths = draw(math.ceil((total - reached) / mean_tokens * 1.05) + 16, rng)
        ends.append(reached + np.cumsum(lengths))
        reached = int(ends[-1][-1])
    cuts = np.arange(1, num_sequences + 1, dtype=np.int64) * seq_len
    edges = np.union1d(np.concatenate(ends), cuts)
    edges = edges[edges <= total]
    return np.diff(edges, prepend=0), (edges - 1) // seq_len


def shares(pieces_P: Whole, sequence_P: Whole, num_sequences: int, seq_len: int, window: int | None = None) -> Floats:
    """(N,) attention of each sequence over that of one document of seq_len tokens; window: tokens a query looks back.

    >>> shares(np.array([4, 2, 2]), np.array([0, 1, 1]), 2, 4).tolist()
    [1.0, 0.5]
    """
    seen_P = _seen(pieces_P, window)
    return np.bincount(sequence_P, weights=seen_P, minlength=num_sequences) / float(
        _seen(np.array([seq_len]), window)[0]
    )


def _seen(lengths: Whole, window: int | None) -> Floats:
    """Keys that all queries of a document see, twice over: the square of its length, less what a window cuts off."""
    whole = lengths.astype(np.float64)
    seen = whole if window is None else np.minimum(whole, window)
    return 2 * whole * seen - seen**2


def _law(documents: Documents) -> tuple[Callable[[int, np.random.Generator], Whole], float]:
    """How to draw lengths, and their mean."""
    if isinstance(documents, HistogramLengths):
        lengths, chances = _histogram(documents.file)
        mean_tokens = float(lengths @ chances)
        return lambda count, rng: rng.choice(lengths, size=count, p=chances), mean_tokens
    median, sigma, most = documents.median_tokens, documents.sigma, documents.max_tokens or math.inf

    def draw(count: int, rng: np.random.Generator) -> Whole:
        drawn = np.ceil(np.minimum(median * np.exp(sigma * rng.standard_normal(count)), most))
        return np.maximum(np.minimum(drawn, TERA), 1).astype(np.int64)

    # E[min(X, max)] of a lognormal X.
    normal = _normal_below
    cut = (math.log(most / median) / sigma) if sigma and most < math.inf else math.inf
    if sigma == 0.0:
        return draw, max(min(median, most), 1.0)
    below = median * math.exp(sigma**2 / 2) * normal(cut - sigma)
    return draw, max(below + (most * (1 - normal(cut)) if most < math.inf else 0.0), 1.0)


def _normal_below(x: float) -> float:
    """Probability that a standard normal variable is below x."""
    return 0.5 * (1.0 + math.erf(x / math.sqrt(2.0)))


def _histogram(file: str) -> tuple[Whole, Floats]:
    rows = read_records(Path(file), needed=("length_tokens", "count"))
    check(bool(rows), file, "", "must hold a row", "none")
    numbers = []
    for line, row in enumerate(rows, 2):
        length, count = (number_of(row, name, f"{file}: row {line}") for name in ("length_tokens", "count"))
        is_whole = length is not None and length >= 1 and length == int(length)
        check(is_whole, file, f"row {line}", "length_tokens must be a whole number of at least 1", length)
        check(count is not None and count >= 0, file, f"row {line}", "count must be at least 0", count)
        numbers.append((length, count))
    lengths, counts = (np.array(column, dtype=np.float64) for column in zip(*numbers, strict=True))
    check(counts.sum() > 0, file, "count", "must not all be 0", 0)
    return lengths.astype(np.int64), counts / counts.sum()
