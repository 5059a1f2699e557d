"""Text to train on that needs no download: sources as code, licences and manuals as prose, generated tables.

Tokens are bytes; byte 0 stands between documents. A document is held out or not by its name, the same everywhere; what
the documents are depends on the Python and the packages installed, which is why a corpus carries a fingerprint.

Legend: B sequences, S tokens of a sequence.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Document = tuple[str, str]  # name, text

DOMAINS = ("code", "prose", "tables")
VOCAB = 256
HELDOUT_SHARE = 10  # one document in so many
MIN_DOCUMENT = 400  # characters
_PROSE_NAMES = ("license", "licence", "copying", "notice", "metadata", "readme", "authors")
_TABLE_SEED = 20240229
_BATCH_STREAM = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Byte tokens by domain, in the order of DOMAINS; fingerprint: of every byte of it, 16 hexadecimal digits."""

    train: tuple[Bytes, ...]
    heldout: tuple[Bytes, ...]
    fingerprint: str


@functools.cache
def build_corpus(max_bytes: int = 1_500_000) -> Corpus:
    """The corpus of this Python installation, each domain up to max_bytes of documents.

    Raises ValueError where that leaves a domain without a held-out document.

    >>> [part.dtype.name for part in build_corpus().train]
    ['uint8', 'uint8', 'uint8']
    """
    sides: dict[bool, list[Bytes]] = {False: [], True: []}
    for documents in (code_documents(), prose_documents(), table_documents()):
        chosen = list(_up_to(documents, max_bytes))
        for heldout, parts in sides.items():
            texts = [text.encode() + b"\0" for name, text in chosen if is_held_out(name) == heldout]
            parts.append(np.frombuffer(b"".join(texts), dtype=np.uint8))
    for name, held in zip(DOMAINS, sides[True], strict=True):
        if not held.size:
            raise ValueError(f"{max_bytes} bytes leave no held-out document of {name}; take more")
    digest = hashlib.sha256()
    for part in (*sides[False], *sides[True]):
        digest.update(part.tobytes())
    return Corpus(train=tuple(sides[False]), heldout=tuple(sides[True]), fingerprint=digest.hexdigest()[:16])


def is_held_out(name: str) -> bool:
    """Whether the document of this name is kept from training."""
    return _draw(name, "held out") % HELDOUT_SHARE == 0


def code_documents() -> Iterator[Document]:
    """Sources of the standard library, its tests left out."""
    folder = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}
    paths = {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*.py")
        if not left_out & set(path.relative_to(folder).parts)
    }
    for name in _shuffled(paths):
        yield f"code/{name}", paths[name].read_text("utf-8", "replace")


def prose_documents() -> Iterator[Document]:
    """Python's own manual pages, and licences, notices and descriptions of the installed packages.

    A paragraph that stood in an earlier document is left out: the same licence comes with many packages, and must not
    be both trained on and held out.
    """
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    texts = {f"prose/manual/{name}": text for name, text in topics.items()}
    for package in importlib.metadata.distributions():
        for file in package.files or []:
            path = Path(str(file.locate()))
            is_info = any(part.endswith((".dist-info", ".egg-info")) for part in file.parts)
            if is_info and file.name.lower().startswith(_PROSE_NAMES) and path.is_file():
                texts[f"prose/{file.as_posix()}"] = path.read_text("utf-8", "replace")
    seen: set[str] = set()
    for name in _shuffled(texts):
        paragraphs = texts[name].replace("\r\n", "\n").split("\n\n")
        keys = ["".join(paragraph.lower().split()) for paragraph in paragraphs]
        fresh = [text for text, key in zip(paragraphs, keys, strict=True) if key not in seen]
        seen.update(keys)
        yield name, "\n\n".join(fresh)


def table_documents(num_documents: int = 400) -> Iterator[Document]:
    """Tables of numbers: sums, squares, walks, timed readings; as columns, comma-separated, or marked down."""
    for number in range(num_documents):
        rng = np.random.default_rng([_TABLE_SEED, number])
        num_rows, start, step = int(rng.integers(60, 160)), int(rng.integers(1, 900)), int(rng.integers(1, 12))
        index = start + step * np.arange(num_rows)
        other = rng.integers(1, 1000, num_rows)
        columns: dict[str, NDArray[Any]] = (
            {"a": index, "b": other, "a+b": index + other},
            {"n": index, "n*n": index**2, "n*7": 7 * index},
            {"step": index, "price": 100 + rng.normal(0, 0.5, num_rows).cumsum().round(2)},
            {"time": index, "load": other % 97, "share": (other / 1000).round(3)},
        )[number % 4]
        yield f"tables/{number:04d}", _table(columns, ("columns", "comma", "pipe")[number % 3])


def _table(columns: dict[str, NDArray[Any]], form: str) -> str:
    rows = [list(columns), *([str(value) for value in row] for row in zip(*columns.values(), strict=True))]
    if form == "comma":
        return "\n".join(",".join(row) for row in rows)
    if form == "pipe":
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join("".join(f"{cell:>10}" for cell in row) for row in rows)


def _draw(name: str, purpose: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{purpose}: {name}".encode()).digest()[:8], "big")


def _shuffled(names: Iterable[str]) -> list[str]:
    """An order that depends on the names alone, so that a part of the documents is a fair sample of all."""
    return sorted(names, key=lambda name: _draw(name, "order"))


def _up_to(documents: Iterable[Document], max_bytes: int) -> Iterator[Document]:
    """Documents that are long enough, until their bytes are spent."""
    left = max_bytes
    for name, text in documents:
        clean = text.replace("\0", "")
        size = len(clean.encode())
        if len(clean) >= MIN_DOCUMENT and size <= left:
            left -= size
            yield name, clean


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Sequences of one token more than they train on; domain_B says what each is of, as a place in DOMAINS."""

    tokens_BS: NDArray[np.int64]
    domain_B: NDArray[np.int64]


def train_batch(corpus: Corpus, *, seed: int, step: int, num_sequences: int, seq_len: int) -> Batch:
    """The batch of one step, a function of seed and step alone: any step can be repeated. Domains take turns."""
    rng = np.random.default_rng([seed, _BATCH_STREAM, step])
    domain_B = (step * num_sequences + np.arange(num_sequences)) % len(DOMAINS)
    starts = [int(rng.integers(corpus.train[domain].size - seq_len)) for domain in domain_B]
    return _cut(corpus.train, domain_B, starts, seq_len)


def heldout_batch(corpus: Corpus, *, sequences_per_domain: int, seq_len: int) -> Batch:
    """The same held-out sequences for every run: evenly spaced, domain after domain."""
    domain_B = np.repeat(np.arange(len(DOMAINS)), sequences_per_domain)
    starts: list[int] = []
    for part in corpus.heldout:
        starts += np.linspace(0, part.size - seq_len - 1, sequences_per_domain).astype(int).tolist()
    return _cut(corpus.heldout, domain_B, starts, seq_len)


def _cut(parts: tuple[Bytes, ...], domain_B: NDArray[np.int64], starts: list[int], seq_len: int) -> Batch:
    rows = [parts[domain][start : start + seq_len + 1] for domain, start in zip(domain_B.tolist(), starts, strict=True)]
    return Batch(tokens_BS=np.stack(rows).astype(np.int64), domain_B=domain_B)
