"""Saved tensors of a layer: closed forms and who divides what."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moesim.cost.activations import head_tensors, layer_input, layer_tensors, placeholder_gradient_bytes
from moesim.cost.moments import layer_moments
from moesim.cost.software import MEGATRON
from moesim.describe.model import Ffn, GroupedQueryAttention, LatentAttention, Layer, Model, MoeFfn, Router
from moesim.describe.parallel import Parallelism

H = 8192
GQA = GroupedQueryAttention(num_heads=64, num_kv_heads=8, head_dim=128)
LLAMA = Layer(attention=GQA, ffn=Ffn(width=28672))
EXPERT = Ffn(width=2048)
MOE = Layer(attention=GQA, ffn=MoeFfn(num_experts=64, expert=EXPERT, router=Router(top_k=6), shared=Ffn(width=4096)))
MODEL = Model(name="model", hidden=H, vocab=128256, layers=(LLAMA, MOE))


WHOLE = Parallelism()


def per(unit: str, layer: Layer, parallel: Parallelism = WHOLE) -> float:
    return sum(tensor.bytes for tensor in layer_tensors(MODEL, layer, parallel) if tensor.per == unit)


def test_a_llama_layer_keeps_six_hidden_two_widths_of_three_and_its_queries_keys_values() -> None:
    # four norm tensors, queries and attention output (H each), keys and values (H / 8 each), gate, up and their product
    elements = 6 * H + 2 * H / 8 + 3 * 28672
    assert per("token", LLAMA) == 2 * elements + 4 * 64


def test_every_tensor_is_divided_by_tp() -> None:
    assert per("token", LLAMA, Parallelism(tp=8)) == per("token", LLAMA) / 8
    assert per("token", MOE, Parallelism(tp=8)) == per("token", MOE) / 8


def test_routed_tensors_are_divided_by_etp_only_in_their_width_and_never_by_ep() -> None:
    assert per("assignment", MOE) == 2 * (H + 3 * 2048) + 4
    assert per("assignment", MOE, Parallelism(ep=64)) == per("assignment", MOE)
    assert per("assignment", MOE, Parallelism(etp=2)) == 2 * (H + 3 * 1024) + 4


def test_latent_attention_keeps_full_heads_and_both_latents() -> None:
    latent = LatentAttention(
        num_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    )
    layer = replace(LLAMA, attention=latent)
    heads = 128 * (192 + 192 + 128 + 128)
    norms = 4 * H
    assert per("token", layer) == 2 * (norms + 2 * 1536 + 2 * 512 + 64 + heads + 3 * 28672) + 4 * 128


def test_cross_attention_adds_its_own_norm_tensors_queries_keys_values_and_output() -> None:
    decoder = replace(LLAMA, cross_attention=GQA)
    assert per("token", decoder) - per("token", LLAMA) == 2 * (4 * H + 2 * H / 8) + 4 * 64


def test_context_parallelism_by_all_to_all_keeps_the_attention_output_twice() -> None:
    extra = per("token", LLAMA, Parallelism(cp=2, cp_kind="alltoall")) - per("token", LLAMA)
    assert extra == 2 * H
    assert per("token", LLAMA, Parallelism(cp=2)) == per("token", LLAMA)


def test_the_unfused_loss_holds_fp32_logits_beside_their_bf16_gradient() -> None:
    def logits_bytes(fused: bool) -> float:
        tensors = head_tensors(MODEL, Parallelism(), replace(MEGATRON, fused_cross_entropy=fused))
        return sum(tensor.bytes for tensor in tensors if "logit" in tensor.name)

    assert logits_bytes(fused=True) == 2 * MODEL.vocab
    assert logits_bytes(fused=False) == 6 * MODEL.vocab


def test_placeholder_gradients_are_counted_once_per_weight_shape() -> None:
    once = placeholder_gradient_bytes(MODEL, (LLAMA,), Parallelism())
    assert placeholder_gradient_bytes(MODEL, (LLAMA,) * 12, Parallelism()) == once
    assert once == 2 * (H * (H + 2 * 1024) + H * H + 3 * H * 28672)


def test_every_tensor_says_why_it_is_kept_and_the_layer_input_comes_first() -> None:
    tensors = layer_tensors(MODEL, MOE, Parallelism())
    assert all(tensor.why and tensor.elements > 0 for tensor in tensors)
    assert tensors[0] == layer_input(MODEL, Parallelism())
    assert len({tensor.name for tensor in tensors}) == len(tensors)


def test_send_buffers_grow_with_top_k_and_receive_buffers_with_what_arrives() -> None:
    combine = next(moment for moment in layer_moments(MODEL, MOE, Parallelism()) if moment.name == "combine")
    assert combine.dispatch_token_bytes == pytest.approx(6 * H * 2)
    assert combine.dispatch_assignment_bytes == H * 2


def test_inputs_of_products_are_kept_as_cast_and_what_others_keep_stays_bf16() -> None:
    wide = {tensor.name: tensor.bytes for tensor in layer_tensors(MODEL, MOE, WHOLE)}
    narrow = {tensor.name: tensor.bytes for tensor in layer_tensors(MODEL, MOE, WHOLE, precision="mxfp8")}
    each = (1 + 1 / 32) / 2  # of BF16, a block's scale included
    for name in ("attention norm output", "expert input", "expert activation output", "shared activation output"):
        assert narrow[name] == pytest.approx(each * wide[name])
    for name in ("layer input", "queries", "attention output", "ffn norm output", "expert activation input"):
        assert narrow[name] == wide[name]
    assert narrow["shared input"] == pytest.approx(each * wide["ffn norm output"])  # beside the router's
    dense = {tensor.name: tensor.bytes for tensor in layer_tensors(MODEL, LLAMA, WHOLE, precision="mxfp8")}
    assert dense["ffn norm output"] == pytest.approx(each * 2 * H)
