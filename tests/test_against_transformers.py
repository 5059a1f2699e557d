"""Parameter counts to the last one against what transformers builds on the meta device."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moesim.catalog.hf import model_from_config
from moesim.catalog.models import load_model
from moesim.describe.counts import total_parameters

pytestmark = pytest.mark.hf
transformers = pytest.importorskip("transformers", reason="needs the extra hf")
torch = pytest.importorskip("torch")

PRESETS = Path(__file__).parent.parent / "moesim" / "catalog" / "models"
REAL = (
    "mixtral-8x7b",
    "mixtral-8x22b",
    "deepseek-v2",
    "deepseek-v3",
    "switch-base-128",
    "switch-c-2048",
    "qwen3-30b-a3b",
    "qwen3-235b-a22b",
    "gpt-oss-120b",
    "olmoe-1b-7b",
    "kimi-k2",
    "moonlight-16b-a3b",
    "llama-3-8b",
)
# One Python module per expert makes the whole of Switch-C take 15 s: the same shapes with fewer layers and experts.
FEWER = {
    "switch-c-2048": dict.fromkeys(
        ("num_layers", "num_decoder_layers", "num_sparse_encoder_layers", "num_sparse_decoder_layers"), 2
    )
    | {"num_experts": 128}
}
SMALL = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2} | {
    "vocab_size": 128,
    "tie_word_embeddings": False,
    "intermediate_size": 96,
    "attention_bias": True,
}
# Families without a preset, small but with every switch that changes a shape turned on.
VARIANTS: dict[str, dict[str, Any]] = {
    "qwen2_moe": {
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 72,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "head_dim": 16,
    },
    "glm4_moe": {
        "moe_intermediate_size": 40,
        "n_routed_experts": 6,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "use_qk_norm": True,
        "head_dim": 16,
    },
    "dots1": {
        "moe_intermediate_size": 40,
        "n_routed_experts": 6,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 2,
        "n_group": 1,
        "topk_group": 1,
        "head_dim": 8,
        "layer_types": ["full_attention"] * 4,
    },
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "lm_head_bias": True},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": True},
    "llama4_text": {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 160,
        "head_dim": 8,
        "use_qk_norm": True,
        "attention_chunk_size": 32,
    },
    "deepseek_v2": {
        "num_key_value_heads": 8,
        "moe_intermediate_size": 40,
        "n_routed_experts": 6,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 24,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
    },
    "qwen3": {"head_dim": 16},
    "qwen2": {"tie_word_embeddings": True},
}


@pytest.fixture(autouse=True)
def meta_device() -> Iterator[None]:
    with torch.device("meta"):
        yield


def built_parameters(config: dict[str, Any]) -> int:
    """Parameters of the model that transformers instantiates from a config.json's values, shared tensors once."""
    values = {key: value for key, value in config.items() if key != "_moesim"}
    if values["model_type"] == "kimi_k2":  # the same code under another name
        values["model_type"] = "deepseek_v3"
    parsed = transformers.AutoConfig.for_model(**values)
    is_switch = values["model_type"] == "switch_transformers"
    build = transformers.AutoModelForSeq2SeqLM if is_switch else transformers.AutoModelForCausalLM
    model = build.from_config(parsed)
    model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", REAL)
def test_a_preset_counts_what_transformers_builds(name: str) -> None:
    config = json.loads((PRESETS / f"{name}.json").read_text()) | FEWER.get(name, {})
    model = load_model(name) if name not in FEWER else model_from_config(config, name=name, owner="config.json")
    assert total_parameters(model) == built_parameters(config)


@pytest.mark.parametrize("model_type", VARIANTS)
def test_a_family_counts_what_transformers_builds_with_its_switches_on(model_type: str) -> None:
    config = SMALL | {"model_type": model_type} | VARIANTS[model_type]
    model = model_from_config(config, name=model_type, owner="config.json")
    assert total_parameters(model) == built_parameters(config)
