"""A model as Megatron-LM's flags describe it, both ways. Names as in megatron/training/arguments.py."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from moesim.catalog.models import MODEL_NAMES, load_model
from moesim.describe.model import Ffn, GroupedQueryAttention, LatentAttention, Layer, Model, MoeFfn
from moesim.door.flags import Flags, Values
from moesim.errors import InputError, NotModelledError, check

_PADDING = 1.02  # a padded vocabulary is at most so much larger than the published one
_TOKEN = re.compile(r"\[|\]|\(|\)|\*|\+|,|\d{1,6}")


def design_of(flags: Flags) -> dict[str, Any] | None:
    """The design YAML's mapping of the model that flags describe; None where they describe none.

    Raises InputError for what is missing or contradicts itself, NotModelledError for layers that a design cannot say.
    """
    if "num-layers" not in flags and "hidden-size" not in flags:
        return None
    num_layers, hidden = (_needed(flags, name) for name in ("num-layers", "hidden-size"))
    vocab = flags.whole("padded-vocab-size") or flags.whole("vocab-size") or 0
    gated = "swiglu" in flags
    default = int(4 * hidden * 2 / 3 / 64) * 64 if gated else 4 * hidden
    width = flags.whole("ffn-hidden-size", default)
    design: dict[str, Any] = {
        "schema": 1,
        "name": "imported",
        "hidden": hidden,
        "num_layers": num_layers,
        "vocab": vocab,
        "attention": _attention_design(flags),
        "tie_embeddings": "untie-embeddings-and-output-weights" not in flags,
    }
    are_moe = _pattern(flags, num_layers)
    if not all(are_moe):
        design["ffn"] = {"width": width, "gated": gated}
    if any(are_moe):
        design["moe"] = _moe_design(flags, width, gated) | _which(flags, are_moe)
        design["dense_first_layers"] = design["moe"].pop("dense_first_layers", 0)
    if flags.whole("mtp-num-layers"):
        design["num_mtp_layers"] = flags.whole("mtp-num-layers")
    return design


def preset_like(model: Model, *, vocab: int) -> str | None:
    """The preset that has these layers and this vocabulary (0: not said; padding is allowed), if there is one."""
    for name in MODEL_NAMES:
        preset = load_model(name)
        fits = not vocab or preset.vocab <= vocab <= preset.vocab * _PADDING
        if fits and preset.tie_embeddings == model.tie_embeddings and _shape(preset) == _shape(model):
            return name
    return None


def model_flags(model: Model, *, with_mtp: bool) -> tuple[dict[str, Values], list[str]]:
    """The flags that describe a model, and what of it they do not say. Raises NotModelledError."""
    attentions = {layer.attention for layer in model.layers}
    plain = {(type(a), a.num_heads, _head_dims(a)) for a in attentions}
    experts = {layer.ffn for layer in model.layers if isinstance(layer.ffn, MoeFfn)}
    dense = {layer.ffn for layer in model.layers if isinstance(layer.ffn, Ffn)}
    odd = any(layer.cross_attention is not None for layer in model.layers)
    if odd or len(plain) > 1 or len(experts) > 1 or len(dense) > 1:
        raise NotModelledError(f"export: Megatron-LM's flags do not describe {model.name}: its layers are not alike")
    attention = model.layers[0].attention
    unsaid: list[str] = []
    moe, ffn = next(iter(experts), None), next(iter(dense), None)
    block = ffn or (moe.expert if moe else None)
    assert block is not None
    flags: dict[str, Values] = {
        "num-layers": _word(len(model.layers)),
        "hidden-size": _word(model.hidden),
        "ffn-hidden-size": _word(block.width),
        "vocab-size": _word(model.vocab),
        "normalization": ("LayerNorm" if model.has_norm_bias else "RMSNorm",),
    }
    flags |= dict.fromkeys(["swiglu"] if block.gated else [], ())
    flags |= dict.fromkeys([] if model.tie_embeddings else ["untie-embeddings-and-output-weights"], ())
    flags |= {} if block.has_bias else {"disable-bias-linear": ()}
    flags |= _attention_flags(attention, unsaid)
    if len(attentions) > 1:
        unsaid.append("which layers have a sliding window")
    if moe is not None:
        flags |= _moe_flags(model, moe)
    if with_mtp and model.mtp_layers:
        flags["mtp-num-layers"] = _word(len(model.mtp_layers))
    return flags, unsaid


def _shape(model: Model) -> tuple[Any, ...]:
    """What flags say of a model's layers, without norms, biases and how scores are made."""

    def block(layer: Layer) -> tuple[Any, ...]:
        ffn = layer.ffn
        if isinstance(ffn, Ffn):
            return (ffn.width, ffn.gated)
        shared = ffn.shared.width if ffn.shared else 0
        return (ffn.num_experts, ffn.router.top_k, ffn.expert.width, ffn.expert.gated, shared)

    layers = tuple((_head_dims(a := layer.attention), a.num_heads, block(layer)) for layer in model.layers)
    return (model.hidden, layers, any(layer.cross_attention for layer in model.layers))


def _head_dims(attention: GroupedQueryAttention | LatentAttention) -> tuple[int | None, ...]:
    if isinstance(attention, GroupedQueryAttention):
        return (attention.num_kv_heads, attention.head_dim)
    a = attention
    return (a.q_lora_rank, a.kv_lora_rank, a.qk_nope_head_dim, a.qk_rope_head_dim, a.v_head_dim)


def _word(number: int) -> Values:
    return (str(number),)


def _needed(flags: Flags, name: str) -> int:
    value = flags.whole(name)
    if value is None or value < 1:
        raise InputError(flags.owner, f"--{name}", "is needed to describe the model", value, "Or name it: --model.")
    return value


def _attention_design(flags: Flags) -> dict[str, Any]:
    heads, hidden = _needed(flags, "num-attention-heads"), _needed(flags, "hidden-size")
    grouped = "group-query-attention" in flags
    if "multi-latent-attention" in flags:
        rule = "cannot stand beside --multi-latent-attention"
        check(not grouped, flags.owner, "--group-query-attention", rule, True)
        return {
            "kind": "mla",
            "num_heads": heads,
            "q_lora_rank": flags.whole("q-lora-rank"),
            "kv_lora_rank": flags.whole("kv-lora-rank", 32),
            "qk_nope_head_dim": flags.whole("qk-head-dim", 128),
            "qk_rope_head_dim": flags.whole("qk-pos-emb-head-dim", 64),
            "v_head_dim": flags.whole("v-head-dim", 128),
        }
    design: dict[str, Any] = {"kind": "gqa", "num_heads": heads}
    design["num_kv_heads"] = flags.whole("num-query-groups", 1) if grouped else heads
    design["head_dim"] = flags.whole("kv-channels", hidden // heads)
    design["qkv_bias"] = "add-qkv-bias" in flags
    design["qk_norm"] = "head" if "qk-layernorm" in flags else "none"
    if "window-size" in flags:
        window = re.findall(r"\d+", " ".join(flags.values["window-size"]))
        check(bool(window), flags.owner, "--window-size", "must hold a number", flags.values["window-size"])
        design["sliding_window"] = int(window[0]) + 1
    return design


def _moe_design(flags: Flags, width: int | None, gated: bool) -> dict[str, Any]:
    groups = flags.whole("moe-router-num-groups", 1) or 1
    return {
        "num_experts": _needed(flags, "num-experts"),
        "top_k": flags.whole("moe-router-topk", 2),
        "width": flags.whole("moe-ffn-hidden-size", width),
        "shared_width": flags.whole("moe-shared-expert-intermediate-size", 0),
        "gated": gated,
        "scoring": flags.one("moe-router-score-function") or "softmax",
        "num_groups": groups,
        "top_groups": (flags.whole("moe-router-group-topk", 1) or 1) if groups > 1 else 1,
    }


def _pattern(flags: Flags, num_layers: int) -> list[bool]:
    """Which layers are MoE, by --moe-layer-freq: every n-th from the first, or a list expression."""
    if "num-experts" not in flags:
        return [False] * num_layers
    text = (flags.one("moe-layer-freq") or "1").strip()
    if text.isdecimal():
        every = int(text)
        check(every >= 1, flags.owner, "--moe-layer-freq", "must be at least 1", every)
        return [i % every == 0 for i in range(num_layers)]
    pattern = _list_value(text, flags.owner)
    rule = f"must say 0 or 1 for each of {num_layers} layers"
    good = len(pattern) == num_layers and set(pattern) <= {0, 1}
    check(good, flags.owner, "--moe-layer-freq", rule, text)
    return [bool(value) for value in pattern]


def _list_value(text: str, owner: str) -> list[int]:
    """The value of a list expression such as ``([0]*3+[1]*58)*1``: lists, sums, repetitions, parentheses."""
    tokens, rule = _TOKEN.findall(text), "must be a number or a list such as ([0]*3+[1]*58)"
    check("".join(tokens) == re.sub(r"\s", "", text), owner, "--moe-layer-freq", rule, text)

    def refuse() -> InputError:
        return InputError(owner, "--moe-layer-freq", rule, text)

    def take(wanted: str) -> None:
        if not tokens or tokens.pop(0) != wanted:
            raise refuse()

    def atom(depth: int) -> list[int]:
        if depth > 20 or not tokens:
            raise refuse()
        items: list[int] = []
        if tokens[0] == "(":
            tokens.pop(0)
            items = total(depth + 1)
            take(")")
        else:
            take("[")
            while tokens and tokens[0].isdecimal():
                items.append(int(tokens.pop(0)))
                if tokens and tokens[0] == ",":
                    tokens.pop(0)
            take("]")
        while tokens and tokens[0] == "*":
            tokens.pop(0)
            if not tokens or not tokens[0].isdecimal() or len(items) * int(tokens[0]) > 10_000:
                raise refuse()
            items = items * int(tokens.pop(0))
        return items

    def total(depth: int) -> list[int]:
        items = atom(depth)
        while tokens and tokens[0] == "+":
            tokens.pop(0)
            items = items + atom(depth)
        return items

    value = total(0)
    if tokens:
        raise refuse()
    return value


def _which(flags: Flags, are_moe: list[bool]) -> dict[str, int]:
    """The design's words for a pattern of MoE layers: dense ones first, then one in every few."""
    at = [i for i, is_moe in enumerate(are_moe) if is_moe]
    every = at[1] - at[0] if len(at) > 1 else len(are_moe)
    offset = at[0] % every
    for first in (at[0] if every == 1 else max(at[0] - every + 1, 0), 0):
        if [i >= first and i % every == offset for i in range(len(are_moe))] == are_moe:
            return {"every": every, "offset": offset, "dense_first_layers": first}
    raise NotModelledError(f"{flags.owner}: --moe-layer-freq: MoE layers at uneven distances are not modelled")


def _attention_flags(attention: GroupedQueryAttention | LatentAttention, unsaid: list[str]) -> dict[str, Values]:
    flags: dict[str, Values] = {"num-attention-heads": _word(attention.num_heads)}
    if isinstance(attention, LatentAttention):
        flags["multi-latent-attention"] = ()
        flags |= {} if attention.q_lora_rank is None else {"q-lora-rank": _word(attention.q_lora_rank)}
        flags["kv-lora-rank"] = _word(attention.kv_lora_rank)
        flags["qk-head-dim"] = _word(attention.qk_nope_head_dim)
        flags["qk-pos-emb-head-dim"] = _word(attention.qk_rope_head_dim)
        flags["v-head-dim"] = _word(attention.v_head_dim)
        return flags
    flags["kv-channels"] = _word(attention.head_dim)
    if attention.num_kv_heads < attention.num_heads:
        flags |= {"group-query-attention": (), "num-query-groups": _word(attention.num_kv_heads)}
    flags |= {"add-qkv-bias": ()} if attention.qkv_bias else {}
    flags |= {"qk-layernorm": ()} if attention.qk_norm != "none" else {}
    if attention.qk_norm == "full":
        unsaid.append("that queries and keys are normalised over all heads, not head by head")
    if attention.sliding_window is not None:
        flags["window-size"] = (f"({attention.sliding_window - 1},0)",)
    if attention.has_sinks:
        unsaid.append("sink logits")
    return flags


def _moe_flags(model: Model, moe: MoeFfn) -> dict[str, Values]:
    router = moe.router
    flags: dict[str, Values] = {
        "num-experts": _word(moe.num_experts),
        "moe-ffn-hidden-size": _word(moe.expert.width),
        "moe-router-topk": _word(router.top_k),
        "moe-router-score-function": (router.scoring,),
        "moe-grouped-gemm": (),
    }
    if len(model.moe_layers) < len(model.layers):
        flags["moe-layer-freq"] = (_pattern_text([layer.is_moe for layer in model.layers]),)
    if moe.shared is not None:
        flags["moe-shared-expert-intermediate-size"] = _word(moe.shared.width)
    if router.num_groups > 1:
        flags["moe-router-num-groups"] = _word(router.num_groups)
        flags["moe-router-group-topk"] = _word(router.top_groups)
    return flags | ({"moe-router-enable-expert-bias": ()} if router.has_score_bias else {})


def _pattern_text(are_moe: list[bool]) -> str:
    """([0]*3+[1]*58) of a pattern: runs of alike layers."""
    runs: list[list[int]] = []
    for is_moe in are_moe:
        if runs and runs[-1][0] == is_moe:
            runs[-1][1] += 1
        else:
            runs.append([int(is_moe), 1])
    return "(" + "+".join(f"[{value}]*{count}" for value, count in runs) + ")"


def mapping_of_design(design: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A design under another name, absent values left out."""
    return {key: value for key, value in dict(design).items() if value is not None} | {"name": name}
