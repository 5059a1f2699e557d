"""Models: presets load, config.json files are read by their keys or refused by name, designs become layers."""

import json
from pathlib import Path
from typing import Any

import pytest

from moesim.catalog.hf import model_from_config
from moesim.catalog.models import MODEL_NAMES, load_model
from moesim.describe.model import GroupedQueryAttention, LatentAttention, MoeFfn
from moesim.errors import InputError, MoesimError, NotModelledError

PRESETS = Path(__file__).parent.parent / "moesim" / "catalog" / "models"
NEEDED = {
    "mixtral-8x7b": "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "num_local_experts num_experts_per_tok vocab_size",
    "deepseek-v3": "hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads "
    "kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts num_experts_per_tok "
    "first_k_dense_replace topk_group vocab_size",
    "qwen3-30b-a3b": "moe_intermediate_size head_dim num_experts num_experts_per_tok decoder_sparse_step",
    "gpt-oss-120b": "head_dim sliding_window num_local_experts",
    "switch-base-128": "d_model d_kv d_ff num_heads num_layers num_experts num_sparse_encoder_layers vocab_size",
}
DESIGN = """
schema: 1
name: mine
hidden: 1024
num_layers: 8
vocab: 32000
attention: {num_heads: 16, num_kv_heads: 4}
ffn: {width: 4096}
moe: {every: 2, num_experts: 16, top_k: 2, width: 2048, shared_width: 512}
"""


def config_of(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((PRESETS / f"{name}.json").read_text())
    return config


def read(config: dict[str, Any]) -> Any:
    return model_from_config(config, name="m", owner="config.json")


def moe_of(name: str) -> MoeFfn:
    model = load_model(name)
    ffn = model.layers[model.moe_layers[0]].ffn
    assert isinstance(ffn, MoeFfn)
    return ffn


def test_every_preset_loads_and_names_its_source() -> None:
    assert {path.stem for path in PRESETS.iterdir()} == set(MODEL_NAMES)
    for name in MODEL_NAMES:
        model = load_model(name)
        assert model.name == name
        assert "huggingface.co" in model.source or "github.com" in model.source or model.hypothetical


def test_only_the_design_nobody_published_is_hypothetical() -> None:
    assert [name for name in MODEL_NAMES if load_model(name).hypothetical] == ["hypothetical-1t-a50b"]


def test_deepseek_v3_has_three_dense_layers_groups_shared_expert_and_an_mtp_layer() -> None:
    model, moe = load_model("deepseek-v3"), moe_of("deepseek-v3")
    assert model.moe_layers == tuple(range(3, 61))
    assert (moe.num_experts, moe.router.top_k, moe.router.num_groups, moe.router.top_groups) == (256, 8, 8, 4)
    assert (moe.router.scoring, moe.router.has_score_bias) == ("sigmoid", True)
    assert moe.shared is not None
    assert moe.shared.width == 2048
    assert isinstance(model.layers[0].attention, LatentAttention)
    assert len(model.mtp_layers) == 1
    assert model.mtp_layers[0].is_moe


def test_gpt_oss_alternates_windows_and_full_attention() -> None:
    attentions = [layer.attention for layer in load_model("gpt-oss-120b").layers]
    windows = [a.sliding_window for a in attentions if isinstance(a, GroupedQueryAttention)]
    assert windows == [128, None] * 18


def test_switch_is_an_encoder_and_a_decoder_with_cross_attention_and_every_second_block_sparse() -> None:
    model = load_model("switch-base-128")
    assert [layer.cross_attention is not None for layer in model.layers] == [False] * 12 + [True] * 12
    assert model.moe_layers == tuple(range(1, 24, 2))
    assert moe_of("switch-base-128").expert.gated is False


@pytest.mark.parametrize(
    ("changes", "moe_layers"),
    [
        ({"decoder_sparse_step": 2}, (1, 3, 5)),
        ({"decoder_sparse_step": 1, "mlp_only_layers": [0, 4]}, (1, 2, 3, 5)),
        ({"decoder_sparse_step": 3, "mlp_only_layers": [2]}, (5,)),
    ],
)
def test_sparse_step_and_mlp_only_layers_place_the_moe_layers(changes: dict[str, Any], moe_layers: Any) -> None:
    assert read(config_of("qwen3-30b-a3b") | {"num_hidden_layers": 6} | changes).moe_layers == moe_layers


@pytest.mark.parametrize(
    ("changes", "moe_layers"),
    [
        ({"first_k_dense_replace": 2, "moe_layer_freq": 2}, (2, 4)),
        ({"first_k_dense_replace": 0}, (0, 1, 2, 3, 4, 5)),
        ({"moe_layer_freq": [0, 1, 1, 0, 0, 1]}, (1, 2, 5)),
    ],
)
def test_dense_first_layers_and_layer_frequency_place_the_moe_layers(changes: dict[str, Any], moe_layers: Any) -> None:
    assert read(config_of("deepseek-v3") | {"num_hidden_layers": 6} | changes).moe_layers == moe_layers


def test_interleaved_layers_of_a_nested_text_config_are_read_with_their_shared_expert() -> None:
    text = config_of("mixtral-8x7b") | {
        "model_type": "llama4_text",
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 16384,
        "num_hidden_layers": 4,
    }
    del text["_moesim"], text["tie_word_embeddings"]
    model = read({"model_type": "llama4", "text_config": text, "tie_word_embeddings": True, "vision_config": {}})
    assert model.moe_layers == (1, 3)
    assert model.tie_embeddings
    assert model.notes == ("only the text model of a multimodal config is read",)
    moe = model.layers[1].ffn
    assert (moe.expert.width, moe.shared.width, model.layers[0].ffn.width) == (14336, 14336, 16384)


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in NEEDED.items() for key in keys.split()])
def test_a_missing_needed_key_is_refused_by_name(name: str, key: str) -> None:
    config = config_of(name)
    del config[key]
    with pytest.raises(InputError) as refusal:
        read(config)
    assert key in refusal.value.field
    assert "needed and missing" in refusal.value.rule


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": -1}, "hidden_size: must be at least 1; got -1"),
        ({"hidden_size": "4096"}, "hidden_size: must be a whole number; got '4096'"),
        ({"hidden_size": 4096.5}, "hidden_size: must be a whole number; got 4096.5"),
        ({"hidden_size": 4097}, "num_attention_heads: must divide hidden_size=4097"),
        ({"num_key_value_heads": 5}, "num_kv_heads: must divide num_heads=32; got 5"),
        ({"num_experts_per_tok": 9}, "top_k: must not exceed num_experts=8; got 9"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: must not exceed 2000"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings: must be true or false; got 'no'"),
        ({"layer_types": ["full_attention"]}, "layer_types: must name 32 layers; got 1"),
        ({"text_config": 3}, "text_config: must be a mapping of names to values; got 3"),
        ({"_moesim": {"sources": ""}}, "sources: is an unknown key"),
    ],
)
def test_an_impossible_value_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refusal:
        read(config_of("mixtral-8x7b") | changes)
    assert message in str(refusal.value)
    assert str(refusal.value).startswith("config.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "jamba"},
        {"model_type": "qwen3_next"},
        {"model_type": "new_hybrid", "mamba_d_state": 16},
        {"model_type": "new_hybrid", "layer_types": ["full_attention", "linear_attention"] * 16},
        {"model_type": "t5", "is_encoder_decoder": True},
        {"model_type": "deepseek_v32"},
    ],
)
def test_layers_that_are_not_modelled_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(NotModelledError, match="not modelled"):
        read(config_of("mixtral-8x7b") | changes)


def test_a_hybrid_whose_config_holds_infinity_is_refused_as_not_modelled(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "bamba", "time_step_limit": [0.0, Infinity]}')
    with pytest.raises(NotModelledError, match=r"state-space or recurrent layers: not modelled"):
        load_model(path)
    path.write_text(json.dumps(config_of("mixtral-8x7b")).replace("4096", "Infinity"))
    with pytest.raises(InputError, match="hidden_size: must be a whole number; got 'Infinity'"):
        load_model(path)


def test_an_unknown_model_type_is_read_by_its_keys_and_says_so() -> None:
    config = config_of("mixtral-8x7b") | {"model_type": "brand_new"}
    model = read(config)
    assert model.layers == load_model("mixtral-8x7b").layers
    assert "brand_new is not one moesim knows" in model.notes[0]
    del config["tie_word_embeddings"]
    with pytest.raises(InputError, match="tie_word_embeddings: is needed and missing"):
        read(config)


def test_an_unknown_model_type_with_unread_expert_keys_does_not_pass_for_a_dense_model() -> None:
    config = config_of("llama-3-8b") | {"model_type": "brand_new", "moe_num_experts": 64, "moe_k": 6}
    with pytest.raises(InputError, match="moe_num_experts: is a key about experts that moesim does not read"):
        read(config)


def test_a_plain_activation_of_an_unknown_model_type_makes_a_block_of_two_matrices() -> None:
    config = config_of("llama-3-8b") | {"model_type": "brand_new", "hidden_act": "gelu"}
    assert read(config).layers[0].ffn.gated is False


def test_paths_of_a_config_a_folder_and_a_design_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_of("olmoe-1b-7b")))
    assert load_model(folder).name == "my-model"
    assert load_model(folder / "config.json").layers == load_model("olmoe-1b-7b").layers
    (tmp_path / "mine.yaml").write_text(DESIGN)
    model = load_model(tmp_path / "mine.yaml")
    assert (model.name, model.moe_layers, model.hypothetical) == ("mine", (1, 3, 5, 7), True)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("hidden: 1024", "hiden: 1024", "hiden: is an unknown key; got 1024. Did you mean hidden?"),
        ("hidden: 1024", "hidden: 0", "hidden: must be at least 1; got 0"),
        ("num_layers: 8", "num_layers: 0", "num_layers: must lie in 1..2000; got 0"),
        ("ffn: {width: 4096}", "", "ffn: is needed: some layers are dense"),
        ("top_k: 2", "top_k: 17", "top_k: must not exceed num_experts=16; got 17"),
        ("every: 2", "every: 9", "moe.every: must leave at least one MoE layer; got 9"),
        ("every: 2", "every: 2, offset: 2", "offset: must lie in 0..1; got 2"),
        ("num_heads: 16", "num_heads: 17", "attention.num_heads: must divide hidden=1024"),
        ("num_kv_heads: 4", "num_kv_heads: 3", "num_kv_heads: must divide num_heads=16; got 3"),
        ("num_kv_heads: 4", "kind: mqa", "kind: must be gqa or mla; got 'mqa'"),
        ("schema: 1", "schema: 2", "schema: must be 1; got 2"),
        ("num_experts: 16", "num_experts: lots", "num_experts: must be a whole number; got 'lots'"),
    ],
)
def test_a_bad_design_is_refused_by_name(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in DESIGN
    path = tmp_path / "mine.yaml"
    path.write_text(DESIGN.replace(old, new))
    with pytest.raises(InputError) as refusal:
        load_model(path)
    assert message in str(refusal.value)
    assert str(path) in str(refusal.value)


def test_a_design_offset_moves_the_moe_layer_and_dense_first_layers_stay_dense(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(DESIGN.replace("every: 2", "every: 3, offset: 0") + "dense_first_layers: 1\n")
    assert load_model(path).moe_layers == (3, 6)


def test_unknown_names_get_a_near_match() -> None:
    with pytest.raises(InputError, match="Did you mean deepseek-v3"):
        load_model("deepsek-v3")
    with pytest.raises(InputError, match="must exist"):
        load_model("nowhere/config.json")


@pytest.mark.parametrize("name", sorted(NEEDED))
def test_no_wrong_value_of_any_key_escapes_as_a_traceback(name: str) -> None:
    """Each key in turn takes hostile values: the config still reads, or is refused as the user's error."""
    config = config_of(name)
    for key in config:
        for value in (None, True, -1, 0, 1.5, 10**18, "x", [], [[]], {}, ["x"], {"a": 1}):
            try:
                read(config | {key: value})
            except MoesimError:
                continue
