"""A Megatron-Bridge configuration (YAML by sections) as the flags of Megatron-LM that mean the same.

Names as in megatron.bridge's ConfigContainer and megatron.core's TransformerConfig, read 2026-11.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moesim.describe.stages import Held, text_of_held
from moesim.errors import InputError, check

SECTIONS = ("model", "train", "ddp", "optimizer", "dataset", "mixed_precision", "comm_overlap", "dist")
RENAMED = {
    "num_moe_experts": "num-experts",
    "num_layers_in_first_pipeline_stage": "decoder-first-pipeline-num-layers",
    "num_layers_in_last_pipeline_stage": "decoder-last-pipeline-num-layers",
    "virtual_pipeline_model_parallel_size": "num-virtual-stages-per-pipeline-rank",
    "gated_linear_unit": "swiglu",
    "sequence_length": "seq-length",
    "fp8": "fp8-format",
    "fp4": "fp4-format",
    "qk_pos_emb_head_dim": "qk-pos-emb-head-dim",
    "cuda_graph_modules": "cuda-graph-scope",
}
SWITCHED = {  # what false means, where Megatron-LM has a flag for it
    "share_embeddings_and_output_weights": "untie-embeddings-and-output-weights",
    "add_bias_linear": "disable-bias-linear",
    "grad_reduce_in_fp32": "grad-reduce-in-bf16",
}
RECIPES = {  # by what the name of a mixed_precision preset holds, the narrowest first
    "nvfp4": {"fp4-format": "e2m1"},
    "mxfp8": {"fp8-format": "e4m3", "fp8-recipe": "mxfp8"},
    "subchannel": {"fp8-format": "e4m3", "fp8-recipe": "blockwise"},
    "current_scaling": {"fp8-format": "hybrid", "fp8-recipe": "tensorwise"},
    "delayed_scaling": {"fp8-format": "hybrid", "fp8-recipe": "delayed"},
}
_LETTERS = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"}


def is_bridge(raw: object) -> bool:
    """Whether a mapping is a Megatron-Bridge configuration: a model section by TransformerConfig's names."""
    model = raw.get("model") if isinstance(raw, Mapping) else None
    return isinstance(model, Mapping) and any("_" in str(name) for name in model)


def flags_in_bridge(raw: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """The same sections by Megatron-LM's flags, without what names a class (``_target_``). Raises InputError.

    >>> flags_in_bridge({"model": {"num_moe_experts": 8, "add_bias_linear": False}}, "x.yaml")
    {'model': {'num-experts': 8, 'disable-bias-linear': True}}
    """
    found: dict[str, Any] = {}
    for section, values in raw.items():
        if section == "mixed_precision" and isinstance(values, str):
            found[section] = {"bf16": True} | _recipe(values, owner)
        elif isinstance(values, Mapping):
            found[section] = _renamed(values, owner)
        else:
            found[section] = values
    return found


def _recipe(name: str, owner: str) -> dict[str, str]:
    if name in ("bf16_mixed", "bf16"):
        return {}
    for word, flags in RECIPES.items():
        if word in name:
            return flags
    rule = "must be bf16_mixed or name one of " + ", ".join(RECIPES)
    raise InputError(owner, "mixed_precision", rule, name)


def _renamed(values: Mapping[str, Any], owner: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if str(name).startswith("_"):
            continue
        if isinstance(value, Mapping):
            found[name] = _renamed(value, owner)
        elif name in SWITCHED:
            found |= {SWITCHED[name]: True} if value is False else {}
        elif name == "pipeline_model_parallel_layout" and isinstance(value, list):
            found["pipeline-model-parallel-layout"] = _layout(value, owner)
        elif name == "moe_layer_freq" and isinstance(value, list):
            found["moe-layer-freq"] = "[" + ",".join(map(str, value)) + "]"
        else:
            found[RENAMED.get(name, str(name))] = value
    if "pipeline-model-parallel-layout" in found:  # says how many virtual stages there are
        found.pop(RENAMED["virtual_pipeline_model_parallel_size"], None)
    grouped = found.get("num_query_groups")
    return found | ({"group-query-attention": True} if grouped and grouped != found.get("num_attention_heads") else {})


def _layout(stages: list[Any], owner: str) -> str:
    """Megatron's layout text of lists of words: embedding, decoder, mtp, loss."""
    held = []
    for stage in stages:
        words = stage if isinstance(stage, list) else [stage]
        rule = "must be lists of " + ", ".join(_LETTERS)
        check(all(word in _LETTERS for word in words), owner, "pipeline_model_parallel_layout", rule, stage)
        held.append(Held(words.count("decoder"), words.count("mtp")))
    return text_of_held(held)
