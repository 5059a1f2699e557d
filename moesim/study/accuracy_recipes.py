"""What a named recipe sets: completes rows of measurements that tell a run by the name of the recipe it ran.

The table (moesim/catalog/measurements/recipes.csv) holds facts of Megatron-Bridge's recipes, each with its source file:
a pattern of names, optionally of so many pipeline chunks, and what such a recipe sets. No time stands in it.
"""

from __future__ import annotations

import fnmatch
from functools import cache
from pathlib import Path

from moesim.door.records import Record, read_records

FILE = Path(__file__).parent.parent / "catalog" / "measurements" / "recipes.csv"
SETS = ("vp", "dispatcher", "recompute", "cuda_graphs", "a2a_overlap", "mtp", "layout")
_TOLD = ("overlap_and_other", "extra_config")  # a row's own words on graphs and overlap
_NOT_SAID = ("", "-")


def completed(row: Record) -> Record:
    """The row with the cells that it leaves empty filled by its recipe; one without a known recipe as it is.

    Words of the row's own about graphs and overlap count for both. Of several entries the first that names a cell wins.

    >>> completed({"recipe": "qwen3_30b_a3b_pretrain_8gpu_gb200_fp8mx_config"})["cuda_graphs"]
    'full'
    """
    recipe = row.get("recipe", "")
    if not recipe:
        return row
    filled = dict(row)
    says_more = any(row.get(column, "") not in _NOT_SAID for column in _TOLD)
    for entry in _recipes():
        if not fnmatch.fnmatchcase(recipe, entry["recipe"]):
            continue
        if entry["num_chunks"] and entry["num_chunks"] != _num_chunks(filled):
            continue
        for column in SETS:
            own_words = says_more and column in ("cuda_graphs", "a2a_overlap")
            if entry[column] and not own_words and filled.get(column, "") in _NOT_SAID:
                filled[column] = entry[column]
    return filled


def _num_chunks(row: Record) -> str:
    """pp times vp, as the table writes it; "" where they are no numbers."""
    try:
        return f"{float(row.get('pp') or 1) * float(row.get('vp') or 1):g}"
    except ValueError:
        return ""


@cache
def _recipes() -> tuple[Record, ...]:
    return read_records(FILE, needed=("recipe", "num_chunks", *SETS, "source"))
