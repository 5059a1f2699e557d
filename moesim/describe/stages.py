"""What each virtual stage of a pipeline holds: Megatron's layout texts, lists of layer counts, even cuts.

Virtual stages stand in order of depth: of pp*vpp, number c lies on pipeline rank c % pp. See docs/model.md#stages.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from moesim.errors import InputError, check

MAX_STAGES = 100_000  # a hostile text must not fill memory
_LETTERS = {"E": "the embedding", "t": "a layer", "m": "a multi-token-prediction layer", "L": "the loss"}
_RULE = "must read such as Et*3|(tt|)*29m|L: E the embedding, t a layer, m a multi-token-prediction layer, L the loss"


class Held(NamedTuple):
    """What one virtual stage holds of the stack, and of the multi-token-prediction layers after it."""

    num_layers: int
    num_mtp: int = 0


def held_of_text(layout: str) -> tuple[Held, ...]:
    """The virtual stages of a layout text, in order of depth. Raises InputError.

    ``|`` ends a stage; ``*n`` repeats the letter or the parenthesis before it; commas and blanks mean nothing. The text
    begins with E and ends with L, and no layer follows an m. Megatron-LM, core/transformer/
    pipeline_parallel_layer_layout.py (``--pipeline-model-parallel-layout``).

    >>> [tuple(held) for held in held_of_text("Et*3|(tt|)*2m|L")]
    [(3, 0), (2, 0), (2, 0), (0, 1), (0, 0)]
    """

    def unrolled(match: re.Match[str]) -> str:
        length = len(match[1]) * int(match[2])
        check(length <= MAX_STAGES, "parallel", "layout", f"must not exceed {MAX_STAGES} letters", layout)
        return match[1] * int(match[2])

    check(len(layout) <= MAX_STAGES, "parallel", "layout", f"must not exceed {MAX_STAGES} letters", len(layout))
    text = re.sub(r"[,\s]", "", layout)
    for repeated in (r"\(([^()]+)\)\*(\d{1,6})", r"([^()*])\*(\d{1,6})"):
        text = re.sub(repeated, unrolled, text)
    strange = sorted(set(text) - {*_LETTERS, "|"})
    check(not strange, "parallel", "layout", _RULE, layout, f"Not understood: {''.join(strange)}." if strange else "")
    letters = text.replace("|", "")
    is_whole = letters.startswith("E") and letters.endswith("L") and letters.count("E") == letters.count("L") == 1
    check(is_whole, "parallel", "layout", "must begin with its only E and end with its only L", layout)
    check("t" not in letters.partition("m")[2], "parallel", "layout", "must have no t after an m", layout)
    stages = text.split("|")
    with_mtp = [stage for stage in stages if "m" in stage]
    check(len(with_mtp) <= 1, "parallel", "layout", "must have every m in one stage", layout)
    return tuple(Held(stage.count("t"), stage.count("m")) for stage in stages)


def held_evenly(num_layers: int, pp: int, vpp: int) -> tuple[Held, ...]:
    """The stack cut into pp*vpp stages alike; where it does not divide, those at the ends are the shorter ones (last,
    first, last but one, ...), since head and embedding already weigh on them.

    A stage may be empty of layers only where it holds the embedding or the loss. Raises InputError.

    >>> [held.num_layers for held in held_evenly(5, 2, 1)]
    [3, 2]
    """
    num_chunks = pp * vpp
    rule = f"pp*vpp = {pp}*{vpp} = {num_chunks} must not exceed the model's {num_layers} layers by more than 2"
    hint = "Only the stages of embedding and loss may be empty; parallel.layout can empty others."
    check(num_chunks <= max(num_layers + 2, 1), "parallel", "pp", rule, pp, hint)
    full = -(-num_layers // num_chunks)
    sizes = [full] * num_chunks
    for i in range(full * num_chunks - num_layers):
        sizes[i // 2 if i % 2 else num_chunks - 1 - i // 2] -= 1
    return tuple(Held(size) for size in sizes)


def held_with_ends(
    num_layers: int, pp: int, vpp: int, *, first: int | None = None, last: int | None = None
) -> tuple[Held, ...]:
    """The first or the last pipeline rank holds so many layers, the others share the rest; each divides over its vpp
    virtual stages (Megatron's ``--decoder-first-pipeline-num-layers``). Raises InputError.

    >>> [held.num_layers for held in held_with_ends(61, 4, 1, last=13)]
    [16, 16, 16, 13]
    """
    given = [count for count in (first, last) if count is not None]
    rest, num_middle = num_layers - sum(given), pp - len(given)
    field = "num_first_stage_layers" if first is not None else "num_last_stage_layers"
    rule = f"leaves {rest} of {num_layers} layers for {num_middle} stages, which does not divide"
    divides = rest == 0 if num_middle == 0 else rest >= 0 and rest % num_middle == 0
    check(divides, "parallel", field, rule, given[0] if len(given) == 1 else given)
    middle = rest // num_middle if num_middle else 0
    per_rank = [middle] * pp
    if first is not None:
        per_rank[0] = first
    if last is not None:
        per_rank[-1] = last
    for count in per_rank:
        check(count % vpp == 0, "parallel", "vpp", f"must divide a stage's {count} layers", vpp)
    return tuple(Held(count // vpp) for _ in range(vpp) for count in per_rank)


def held_counting_ends(
    num_layers: int, pp: int, vpp: int, *, embedding: bool = False, loss: bool = False
) -> tuple[Held, ...]:
    """Embedding or loss take a layer's place on their stage (``--account-for-embedding-in-pipeline-split``). Raises
    InputError.

    >>> [held.num_layers for held in held_counting_ends(6, 2, 2, embedding=True, loss=True)]
    [1, 2, 2, 1]
    """
    num_places = num_layers + embedding + loss
    words = " and ".join(word for word, counts in (("embedding", embedding), ("loss", loss)) if counts)
    rule = f"pp*vpp = {pp}*{vpp} must divide the {num_layers} layers and {words}, {num_places} in all"
    check(num_places % (pp * vpp) == 0, "parallel", "pp", rule, pp)
    sizes = [num_places // (pp * vpp)] * (pp * vpp)
    sizes[0] -= embedding
    sizes[-1] -= loss
    return tuple(Held(size) for size in sizes)


def check_layout(layout: str | Sequence[int], pp: int, vpp: int) -> tuple[Held, ...]:
    """The virtual stages of a layout; there must be pp*vpp of them. Raises InputError."""
    if not isinstance(layout, str):
        whole = all(isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in layout)
        check(whole, "parallel", "layout", "must be whole numbers of layers, at least 0", layout)
    held = held_of_text(layout) if isinstance(layout, str) else tuple(Held(count) for count in layout)
    if len(held) != pp * vpp:
        rule = f"must have pp*vpp = {pp}*{vpp} = {pp * vpp} stages; it has {len(held)}"
        hint = f"With pp={pp} it needs vpp={len(held) // pp}." if len(held) % pp == 0 and held else ""
        raise InputError("parallel", "layout", rule, layout, hint)
    return held


def text_of_held(held: Sequence[Held]) -> str:
    """The layout text of virtual stages.

    >>> text_of_held([Held(3), Held(2), Held(0, 1)])
    'Et*3|t*2|mL'
    """

    def letters(letter: str, count: int) -> str:
        return letter if count == 1 else f"{letter}*{count}" if count else ""

    return "E" + "|".join(letters("t", stage.num_layers) + letters("m", stage.num_mtp) for stage in held) + "L"
