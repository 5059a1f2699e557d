"""What tables of measurements have in common: GPUs by their many names, whole numbers, models cut to some layers."""

from __future__ import annotations

import dataclasses
import re

from moesim.catalog.models import load_model
from moesim.describe.model import Ffn, GroupedQueryAttention, Layer, Model, MoeFfn
from moesim.door.records import Record, number_of
from moesim.errors import InputError
from moesim.units import GIGA, MEGA

# What a table calls a GPU, the longest first, the catalog's name, and the cluster whose links it has.
GPUS = (
    ("gb300", "gb300", "gb300-nvl72"),
    ("gb200", "gb200", "gb200-nvl72"),
    ("b200", "b200", "b200-8x-ib400"),
    ("h800", "h800", "h800-8x-ib400"),
    ("h200", "h200", "h200-8x-ib400"),
    ("h100", "h100-sxm", "h100-8x-ib400"),
    ("a100", "a100-80gb", "a100-8x-ib200"),
    ("sm100", "b200", "b200-8x-ib400"),
    ("sm90", "h100-sxm", "h100-8x-ib400"),
)
MOST_WHOLE = int(MEGA)
MOST = GIGA  # of any cell: a slip must not fill memory
MODELS = (
    (r"deepseek-?v3", "deepseek-v3"),
    (r"deepseek v3", "deepseek-v3"),
    (r"deepseek-?v2", "deepseek-v2"),
    (r"qwen3-235b", "qwen3-235b-a22b"),
    (r"qwen3[- ](moe )?30b", "qwen3-30b-a3b"),
    (r"gpt-oss-120b", "gpt-oss-120b"),
    (r"moonlight-16b", "moonlight-16b-a3b"),
    (r"mixtral[- ]8x7b", "mixtral-8x7b"),
    (r"mixtral[- ]8x22b", "mixtral-8x22b"),
    (r"grok-1", "grok-1"),
    (r"kimi[- ]?k2", "kimi-k2"),
    (r"olmoe", "olmoe-1b-7b"),
    (r"llama[-_ ]?3(\.\d)?[-_ ]?70b", "llama-3-70b"),
    (r"llama[-_ ]?3(\.\d)?[-_ ]?8b", "llama-3-8b"),
)


def catalog_gpu(row: Record, owner: str) -> str:
    """The catalog's name of the row's GPU. Raises InputError."""
    words = row.get("gpu", "").lower().removeprefix("dgx-")
    found = next((name for word, name, _ in GPUS if words.startswith(word)), None)
    if found is None:
        raise InputError(owner, "gpu", "must begin with the name of a known GPU", row.get("gpu", ""))
    return found


def default_cluster(gpu: str) -> str:
    """The catalog's cluster of a GPU.

    >>> default_cluster("b200")
    'b200-8x-ib400'
    """
    return next(cluster for _, name, cluster in GPUS if name == gpu)


def number(row: Record, column: str, owner: str) -> float:
    """A positive number. Raises InputError naming the column."""
    value = number_of(row, column, owner)
    if value is None or not 0 < value <= MOST:
        raise InputError(owner, column, f"must be a positive number up to {MOST:.0e}", row.get(column, ""))
    return value


def given(row: Record, column: str, owner: str) -> float | None:
    """A positive number, or None where the cell is empty. Raises InputError naming the column."""
    return None if number_of(row, column, owner) is None else number(row, column, owner)


def whole(row: Record, column: str, owner: str, default: int | None = None) -> int:
    """A positive whole number; default where the cell is empty. Raises InputError naming the column."""
    if default is not None and number_of(row, column, owner) is None:
        return default
    value = number(row, column, owner)
    if not value.is_integer() or value > MOST_WHOLE:
        raise InputError(owner, column, f"must be a whole number up to {MOST_WHOLE}", value)
    return int(value)


def catalog_model(row: Record, owner: str) -> Model:
    """The model that the row's words name, cut to its layers where it says so. Raises InputError."""
    words = row.get("model", "").lower()
    if words.startswith("llama3_405b"):
        model = _llama_405b()
    else:
        name = next((name for pattern, name in MODELS if re.match(pattern, words)), None)
        if name is None:
            raise InputError(owner, "model", "must name a known model", row.get("model", ""))
        model = load_model(name)
    num_layers = whole(row, "n_layers", owner, default=len(model.layers))
    if num_layers > len(model.layers):
        raise InputError(owner, "n_layers", f"must not exceed the model's {len(model.layers)}", num_layers)
    if num_layers == len(model.layers):
        return model
    is_moe = [isinstance(layer.ffn, MoeFfn) for layer in model.layers]
    default_dense = sum(not moe for moe in is_moe)
    num_dense = whole(row, "dense_layers", owner, default=default_dense) if model.is_moe else num_layers
    dense = [layer for layer, moe in zip(model.layers, is_moe, strict=True) if not moe][:num_dense]
    experts = [layer for layer, moe in zip(model.layers, is_moe, strict=True) if moe][: num_layers - len(dense)]
    return dataclasses.replace(model, layers=(*dense, *experts), mtp_layers=())


def _llama_405b() -> Model:
    """With 16 key-value heads, as the launcher of the runs on 8 B200 has it (MooreThreads/SimuMax@4dcaae5)."""
    attention = GroupedQueryAttention(num_heads=128, num_kv_heads=16, head_dim=128)
    layers = (Layer(attention=attention, ffn=Ffn(width=53248)),) * 126
    return Model(name="llama-3-405b", hidden=16384, vocab=128256, layers=layers)
