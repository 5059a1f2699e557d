"""A Hugging Face ``config.json`` as a Model. A needed key that is missing is refused by name, never guessed.

What the file does not say because the modelling code fixes it stands in `moesim.catalog.families`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from moesim.catalog.families import FAMILIES, NOT_MODELLED, NOT_MODELLED_KEYS, UNKNOWN_FAMILY, Family
from moesim.describe.model import (
    Attention,
    Ffn,
    GroupedQueryAttention,
    LatentAttention,
    Layer,
    Model,
    MoeFfn,
    Router,
    Scoring,
)
from moesim.door import parse_as, refusals_of
from moesim.errors import InputError, NotModelledError, check

T = TypeVar("T")
MAX_LAYERS = 2000  # far above any model; a hostile file must not fill memory
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
TOP_K = ("num_experts_per_tok", "moe_topk", "num_experts_per_token")
SHARED_COUNT = ("n_shared_experts", "num_shared_experts")
_ABOUT_EXPERTS = re.compile(r"expert|moe|router|shared_")
_READ = {*EXPERTS, *TOP_K, *SHARED_COUNT, "moe_intermediate_size", "shared_expert_intermediate_size"}
_READ |= {"moe_layer_freq", "moe_layers", "interleave_moe_layer_step", "router_bias"}
_NO_SIZES = re.compile(r"aux|loss|jitter|logits|dtype|_scal|capacity|z_coef|_quant|implementation|_fp8|token_drop")
_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
_GATED = {"silu", "swish", "swiglu", "geglu"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """The values of one config.json with the owner that refusals name. A null value is an absent one."""

    values: Mapping[str, Any]
    owner: str

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def first(self, *names: str) -> str | None:
        """The first of the names that the config has."""
        return next((name for name in names if self.has(name)), None)

    def need(self, *names: str) -> str:
        """The first of the names that the config has, or InputError naming what is missing."""
        found = self.first(*names)
        if found is None:
            raise InputError(self.owner, " or ".join(names), "is needed and missing", None, "It is never guessed.")
        return found

    def whole(self, *names: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of at least ``least``; needed unless a default is given."""
        name = self.first(*names) if default is not None else self.need(*names)
        if name is None:
            return cast(int, default)
        value = self.values[name]
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        check(is_whole, self.owner, name, "must be a whole number", value)
        check(value >= least, self.owner, name, f"must be at least {least}", value)
        return int(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.values[name] if self.has(name) else default
        check(isinstance(value, bool), self.owner, name, "must be true or false", value)
        return bool(value)

    def text(self, name: str, default: str) -> str:
        value = self.values[name] if self.has(name) else default
        check(isinstance(value, str), self.owner, name, "must be a text", value)
        return str(value)

    def items(self, name: str, kind: type[T]) -> list[T] | None:
        """A list of whole numbers or texts, or None when absent."""
        if not self.has(name):
            return None
        value = self.values[name]
        good = isinstance(value, list) and all(type(item) is kind for item in value)
        check(good, self.owner, name, f"must be a list of {'texts' if kind is str else 'whole numbers'}", value)
        return list(value)


def model_from_config(raw: object, *, name: str, owner: str) -> Model:
    """The Model that a ``config.json`` describes.

    raw: the file's plain value; owner: its path, for refusals. A ``text_config`` inside is read in its place.
    Raises InputError for a missing or impossible key, NotModelledError for layers that moesim does not model.
    """
    check(isinstance(raw, Mapping), owner, "", "must be a mapping of names to values", raw)
    values: dict[str, Any] = dict(cast(Mapping[str, Any], raw))
    header = values.pop("_moesim", {})
    text = values.pop("text_config", None)
    if text is not None:
        check(isinstance(text, Mapping), owner, "text_config", "must be a mapping of names to values", text)
        outer = {key: values[key] for key in ("tie_word_embeddings",) if key in values}
        values = {**outer, **text}
    config = Config(values=values, owner=owner)
    _refuse_what_is_not_modelled(config, name)
    with refusals_of(owner):
        if config.text("model_type", "") == "switch_transformers":
            from moesim.catalog.switch import switch_model

            model = switch_model(config, name=name)
        else:
            model = _decoder_model(config, name=name)
    if text is not None:
        model = dataclasses.replace(model, notes=(*model.notes, "only the text model of a multimodal config is read"))
    return _with_header(model, header, owner)


def _with_header(model: Model, header: object, owner: str) -> Model:
    """The model with the facts of a preset's header: where its config stands, how its publisher counts."""
    facts = parse_as(Header, header, f"{owner}._moesim")
    return dataclasses.replace(
        model,
        source=facts.source or owner,
        active_includes_input_embedding=facts.active_includes_input_embedding,
        notes=model.notes + facts.notes,
    )


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a preset's ``_moesim`` mapping may say."""

    source: str = ""
    date: str = ""
    active_includes_input_embedding: bool = True
    notes: tuple[str, ...] = ()


def _refuse_what_is_not_modelled(config: Config, name: str) -> None:
    model_type = config.text("model_type", "")
    reason = NOT_MODELLED.get(model_type)
    for key in config.values:
        reason = reason or next(
            (why for prefix, why in NOT_MODELLED_KEYS.items() if key.startswith(prefix) and config.has(key)), None
        )
    others = sorted(set(config.items("layer_types", str) or ()) - _LAYER_TYPES)
    if others:
        reason = reason or f"layers of type {', '.join(others)}"
    if config.flag("is_encoder_decoder", False) and model_type != "switch_transformers":
        reason = reason or "an encoder-decoder other than Switch"
    if reason:
        raise NotModelledError(f"{config.owner}: {name} ({model_type or 'no model_type'}) has {reason}: not modelled")


def _decoder_model(config: Config, *, name: str) -> Model:
    """A decoder-only transformer."""
    model_type = config.text("model_type", "")
    family = FAMILIES.get(model_type, UNKNOWN_FAMILY)
    if not family.is_known:
        _refuse_unread_expert_keys(config)
    hidden = config.whole("hidden_size")
    num_layers = config.whole("num_hidden_layers")
    check(num_layers <= MAX_LAYERS, config.owner, "num_hidden_layers", f"must not exceed {MAX_LAYERS}", num_layers)
    are_moe = _moe_layers(config, family, num_layers)
    dense = _dense_ffn(config, family) if not all(are_moe) else None
    moe = _moe_ffn(config, family) if any(are_moe) else None
    windows = _windows(config, family, num_layers)
    attention = {window: _attention(config, family, hidden, window) for window in set(windows)}
    layers = tuple(
        Layer(attention=attention[window], ffn=cast(Any, moe if is_moe else dense), num_norms=family.num_norms)
        for is_moe, window in zip(are_moe, windows, strict=True)
    )
    if config.has("tie_word_embeddings") or family.is_known:
        tied = config.flag("tie_word_embeddings", family.ties_embeddings)
    else:
        tied = config.flag(config.need("tie_word_embeddings"), False)
    num_mtp = config.whole("num_nextn_predict_layers", default=0, least=0)
    check(num_mtp <= MAX_LAYERS, config.owner, "num_nextn_predict_layers", f"must not exceed {MAX_LAYERS}", num_mtp)
    vocab = config.whole("vocab_size")
    unknown = f"model_type {model_type or 'missing'} is not one moesim knows: read by its keys as a pre-norm decoder; "
    return Model(
        name=name,
        hidden=hidden,
        vocab=vocab,
        layers=layers,
        mtp_layers=(layers[-1],) * num_mtp,
        tie_embeddings=tied,
        has_norm_bias=family.norm_bias,
        num_extra_parameters=vocab if config.flag("lm_head_bias", False) else 0,
        notes=() if family.is_known else (unknown + "norm and bias vectors may be missing from the counts",),
    )


def _refuse_unread_expert_keys(config: Config) -> None:
    """An unknown family with keys about experts that are not read would pass for a dense model: refuse by name."""
    for key, value in config.values.items():
        unread = _ABOUT_EXPERTS.search(key) and key not in _READ and not _NO_SIZES.search(key)
        about_sizes = isinstance(value, (int, list, dict)) and not isinstance(value, bool)
        if unread and about_sizes:
            raise InputError(config.owner, key, "is a key about experts that moesim does not read", value)


def _moe_layers(config: Config, family: Family, num_layers: int) -> list[bool]:
    """For each layer, whether its feed-forward is a mixture of experts."""
    if family.is_moe is False or (family.is_moe is None and not config.first(*EXPERTS)):
        return [False] * num_layers
    if config.whole(*EXPERTS, least=0) == 0:
        return [False] * num_layers
    positions = range(num_layers)
    rule = family.layer_rule
    if rule == "every":
        return [True] * num_layers
    if rule == "first_k" or (rule == "by_keys" and config.first("first_k_dense_replace", "moe_layer_freq")):
        return _first_k(config, family, num_layers)
    if rule == "interleave" or (rule == "by_keys" and config.first("interleave_moe_layer_step", "moe_layers")):
        if listed := config.items("moe_layers", int):
            return [i in listed for i in positions]
        step = config.whole("interleave_moe_layer_step")
        return [(i + 1) % step == 0 for i in positions]
    if rule == "sparse_step" or config.first("decoder_sparse_step", "mlp_only_layers"):
        dense_only = config.items("mlp_only_layers", int) or []
        step = (
            config.whole("decoder_sparse_step") if family.is_known else config.whole("decoder_sparse_step", default=1)
        )
        return [i not in dense_only and (i + 1) % step == 0 for i in positions]
    return [True] * num_layers


def _first_k(config: Config, family: Family, num_layers: int) -> list[bool]:
    """DeepSeek's rule: dense up to first_k_dense_replace, then every moe_layer_freq-th layer (or a list of 0 and 1)."""
    frequency = config.values.get("moe_layer_freq")
    if isinstance(frequency, list):
        listed = config.items("moe_layer_freq", int) or []
        rule = f"must hold {num_layers} zeros and ones"
        good = len(listed) == num_layers and set(listed) <= {0, 1}
        check(good, config.owner, "moe_layer_freq", rule, frequency)
        return [bool(flag) for flag in listed]
    first = (
        config.whole("first_k_dense_replace", least=0)
        if family.is_known
        else config.whole("first_k_dense_replace", default=0, least=0)
    )
    step = config.whole("moe_layer_freq", default=1)
    return [i >= first and i % step == 0 for i in range(num_layers)]


def _dense_ffn(config: Config, family: Family) -> Ffn:
    width = config.whole("intermediate_size_mlp", "intermediate_size")
    return Ffn(width=width, gated=_is_gated(config, family), has_bias=config.flag("mlp_bias", False))


def _is_gated(config: Config, family: Family) -> bool:
    if family.is_known:
        return family.gated
    activation = config.text(config.need("hidden_act", "hidden_activation", "activation_function"), "").lower()
    return activation in _GATED or config.flag("is_gated_act", False)


def _moe_ffn(config: Config, family: Family) -> MoeFfn:
    """The MoE block, the same in every MoE layer."""
    num_experts = config.whole(*EXPERTS)
    if family.needs_moe_width:
        width = config.whole("moe_intermediate_size")
    else:
        width = config.whole("moe_intermediate_size", "intermediate_size")
    gated = _is_gated(config, family)
    expert = Ffn(width=width, gated=gated, has_bias=family.expert_bias)
    shared_width = config.whole("shared_expert_intermediate_size", default=0, least=0)
    if family.shared == "one":
        shared_width = width
    elif shared_width == 0:
        shared_width = config.whole(*SHARED_COUNT, default=0, least=0) * width
    return MoeFfn(
        num_experts=num_experts,
        expert=expert,
        router=_router(config, family),
        shared=Ffn(width=shared_width, gated=gated) if shared_width else None,
        has_shared_gate=family.shared_gate and shared_width > 0,
    )


def _router(config: Config, family: Family) -> Router:
    scoring = config.text("scoring_func", family.scoring)
    check(scoring in ("softmax", "sigmoid"), config.owner, "scoring_func", "must be softmax or sigmoid", scoring)
    method = config.text("topk_method", "")
    grouped = method != "greedy" and config.has("n_group")
    return Router(
        top_k=config.whole(*TOP_K),
        scoring=cast(Scoring, scoring),
        normalise_top_k=config.flag("norm_topk_prob", family.normalise_top_k),
        num_groups=config.whole("n_group") if grouped else 1,
        top_groups=config.whole("topk_group") if grouped else 1,
        # DeepSeek-V2 ranks a group by its best expert, V3 (noaux_tc) by the sum of its best two.
        group_score="max" if method == "group_limited_greedy" else "top2_sum",
        has_score_bias=method == "noaux_tc" or (not method and family.score_bias),
        has_linear_bias=family.router_bias,
    )


def _windows(config: Config, family: Family, num_layers: int) -> list[int | None]:
    """For each layer, how many tokens a query looks back; None: all."""
    types = config.items("layer_types", str)
    if types is not None:
        check(len(types) == num_layers, config.owner, "layer_types", f"must name {num_layers} layers", len(types))
        window = config.whole("sliding_window") if "sliding_attention" in types else None
        chunk = config.whole("attention_chunk_size") if "chunked_attention" in types else None
        by_type = {"full_attention": None, "sliding_attention": window, "chunked_attention": chunk}
        return [by_type[kind] for kind in types]
    uses_window = config.flag("use_sliding_window", family.reads_windows)
    if uses_window and config.has("sliding_window"):
        return [config.whole("sliding_window")] * num_layers
    return [None] * num_layers


def _attention(config: Config, family: Family, hidden: int, window: int | None) -> Attention:
    num_heads = config.whole("num_attention_heads")
    bias = config.flag("attention_bias", False)
    if config.has("kv_lora_rank"):
        return LatentAttention(
            num_heads=num_heads,
            q_lora_rank=config.whole("q_lora_rank") if config.has("q_lora_rank") else None,
            kv_lora_rank=config.whole("kv_lora_rank"),
            qk_nope_head_dim=config.whole("qk_nope_head_dim"),
            qk_rope_head_dim=config.whole("qk_rope_head_dim"),
            v_head_dim=config.whole("v_head_dim"),
            has_bias=bias,
        )
    check("q_lora_rank" not in config.values, config.owner, "kv_lora_rank", "is needed and missing", None)
    if config.has("head_dim") or family.needs_head_dim:
        head_dim = config.whole("head_dim")
    else:
        rule = f"must divide hidden_size={hidden} where head_dim is not given"
        check(hidden % num_heads == 0, config.owner, "num_attention_heads", rule, num_heads)
        head_dim = hidden // num_heads
    qkv_bias = config.flag("qkv_bias", True) if family is FAMILIES["qwen2_moe"] else family.qkv_bias
    return GroupedQueryAttention(
        num_heads=num_heads,
        num_kv_heads=config.whole("num_key_value_heads"),
        head_dim=head_dim,
        qkv_bias=bias if qkv_bias is None else qkv_bias,
        output_bias=bias if family.output_bias is None else family.output_bias,
        qk_norm="head" if _has_qk_norm_flag(config, family) else family.qk_norm,
        sliding_window=window,
        has_sinks=family.has_sinks,
    )


def _has_qk_norm_flag(config: Config, family: Family) -> bool:
    """use_qk_norm adds weights, except in Llama 4, whose norm has none."""
    return family is not FAMILIES["llama4_text"] and config.flag("use_qk_norm", False)
