"""What a Hugging Face model_type fixes in code and its config.json does not say.

Read off the public modelling code of each family (transformers 5); the tests compare the counts with transformers.
A model_type that is not here is read by its keys alone, with a note; see `moesim.catalog.hf`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from moesim.describe.model import Scoring


@dataclass(frozen=True, kw_only=True)
class Family:
    """The fixed traits of one model_type. None: the config says."""

    is_moe: bool | None = None  # True: the number of experts is needed
    layer_rule: Literal["every", "first_k", "sparse_step", "interleave", "by_keys"] = "by_keys"
    needs_moe_width: bool = False  # moe_intermediate_size is needed; intermediate_size is the dense layers'
    shared: Literal["by_keys", "one"] = "by_keys"  # one: a shared expert as wide as a routed one
    needs_head_dim: bool = False  # head_dim is not hidden/num_heads when it is absent
    qkv_bias: bool | None = None
    output_bias: bool | None = None
    qk_norm: Literal["none", "head", "full"] = "none"
    has_sinks: bool = False
    gated: bool = True
    num_norms: int = 2
    norm_bias: bool = False
    expert_bias: bool = False
    router_bias: bool = False
    scoring: Scoring = "softmax"
    normalise_top_k: bool = True
    score_bias: bool = False
    shared_gate: bool = False
    ties_embeddings: bool = False  # where the config does not say
    reads_windows: bool = (
        True  # False: a sliding_window key is ignored unless layer_types or use_sliding_window says so
    )
    is_known: bool = True


_MLA = Family(is_moe=True, layer_rule="first_k", needs_moe_width=True, scoring="sigmoid", score_bias=True)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family(is_moe=False),
        "mistral": Family(is_moe=False),
        "qwen2": Family(is_moe=False, qkv_bias=True, output_bias=False, reads_windows=False),
        "qwen3": Family(is_moe=False, qk_norm="head", needs_head_dim=True, reads_windows=False),
        "mixtral": Family(is_moe=True, layer_rule="every"),
        "deepseek_v2": Family(is_moe=True, layer_rule="first_k", needs_moe_width=True, normalise_top_k=False),
        "deepseek_v3": _MLA,
        "kimi_k2": _MLA,
        "qwen2_moe": Family(
            is_moe=True,
            layer_rule="sparse_step",
            needs_moe_width=True,
            output_bias=False,
            shared_gate=True,
            normalise_top_k=False,
            reads_windows=False,
        ),
        "qwen3_moe": Family(
            is_moe=True,
            layer_rule="sparse_step",
            needs_moe_width=True,
            needs_head_dim=True,
            qk_norm="head",
            normalise_top_k=False,
            reads_windows=False,
        ),
        "olmoe": Family(is_moe=True, layer_rule="every", qk_norm="full", normalise_top_k=False),
        "gpt_oss": Family(
            is_moe=True,
            layer_rule="every",
            needs_head_dim=True,
            qkv_bias=True,
            output_bias=True,
            has_sinks=True,
            expert_bias=True,
            router_bias=True,
        ),
        "phimoe": Family(is_moe=True, layer_rule="every", norm_bias=True, normalise_top_k=False),
        "granitemoe": Family(is_moe=True, layer_rule="every"),
        "llama4_text": Family(
            is_moe=True, layer_rule="interleave", shared="one", scoring="sigmoid", normalise_top_k=False
        ),
        "glm4_moe": Family(
            is_moe=True,
            layer_rule="first_k",
            needs_moe_width=True,
            output_bias=False,
            scoring="sigmoid",
            score_bias=True,
        ),
        "dots1": Family(
            is_moe=True,
            layer_rule="first_k",
            needs_moe_width=True,
            qk_norm="head",
            scoring="sigmoid",
            score_bias=True,
            reads_windows=False,
        ),
        # xai-org/grok-1 model.py: norms before and after both blocks, embedding tied to the head
        "grok-1": Family(is_moe=True, layer_rule="every", num_norms=4, ties_embeddings=True),
    }
)
UNKNOWN_FAMILY = Family(is_known=False)

# Families whose layers are not (all) softmax attention: counts and times would be wrong.
_NOT_MODELLED_TYPES = {
    "state-space or recurrent layers": """
        bamba falcon_h1 falcon_mamba granitemoehybrid hymba jamba mamba mamba2 nemotron_h plamo2 recurrent_gemma
        rwkv rwkv5 rwkv6 rwkv7 xlstm zamba zamba2""",
    "linear attention layers": """
        bailing_hybrid kimi_linear minimax minimax_m1 minimax_text_01 olmo_hybrid qwen3_next qwen3_5 qwen3_5_moe
        qwen3_5_text qwen3_5_moe_text""",
    "convolution layers": "lfm2 lfm2_moe",
    "sparse attention chosen by an indexer": "deepseek_v32 deepseek_v4 glm_moe_dsa",
}
# Beginnings of keys that only such layers have, for a model_type that is not listed.
_NOT_MODELLED_KEYS = {
    "state-space or recurrent layers": """
        mamba_ ssm_ state_size d_state attn_layer_period attn_layer_offset hybrid_override_pattern rwkv_
        attn_type_list time_step_rank""",
    "linear attention layers": "linear_attn_ linear_num_ linear_key_head_dim linear_conv_ full_attention_interval",
    "convolution layers": "conv_L_cache",
    "sparse attention chosen by an indexer": "index_topk index_n_heads",
}


def _reason_by_name(names_by_reason: Mapping[str, str]) -> Mapping[str, str]:
    return MappingProxyType({name: reason for reason, names in names_by_reason.items() for name in names.split()})


NOT_MODELLED = _reason_by_name(_NOT_MODELLED_TYPES)
NOT_MODELLED_KEYS = _reason_by_name(_NOT_MODELLED_KEYS)
