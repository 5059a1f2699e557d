"""The small transformer: its sizes are moesim's, its FLOPs those that torch counts, its attention what it says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import moesim  # noqa: E402
from reference_model.attention import Attention, rotary_turns, rotate  # noqa: E402
from reference_model.flops import counted_flops  # noqa: E402
from reference_model.latent_attention import LatentConfig  # noqa: E402
from reference_model.routers import NoisyTopK, SoftmaxTopK  # noqa: E402
from reference_model.transformer import (  # noqa: E402
    MoeConfig,
    Transformer,
    TransformerConfig,
    active_parameters,
    build,
    equal_flops_width,
    forward_flops_per_token,
    parameters_by_part,
)

MOE = MoeConfig(num_experts=6, width=24, router=SoftmaxTopK(top_k=2))
CONFIG = TransformerConfig(
    hidden=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=12, dense_width=40, vocab=50, moe=MOE
)
DENSE = dataclasses.replace(CONFIG, moe=None)
SHARED = dataclasses.replace(CONFIG, moe=dataclasses.replace(MOE, shared_width=16, every=1))
SIZES = LatentConfig(q_lora_rank=20, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=10)
LATENT = dataclasses.replace(SHARED, num_kv_heads=4, latent=SIZES)
DIRECT = dataclasses.replace(LATENT, latent=dataclasses.replace(SIZES, q_lora_rank=None))
SEQ_LEN = 20


def described(config: TransformerConfig, folder: Path) -> Any:
    """What moesim says of the same design."""
    path = folder / "design.json"
    path.write_text(json.dumps(config.design("small")))
    return moesim.describe(moesim.load_model(str(path)), seq_len=SEQ_LEN)


@pytest.mark.parametrize(
    "config", [CONFIG, DENSE, SHARED, LATENT, DIRECT], ids=["moe", "dense", "shared", "latent", "direct"]
)
def test_its_parameters_and_flops_are_those_that_moesim_describes(config: TransformerConfig, tmp_path: Path) -> None:
    said = described(config, tmp_path)
    held = parameters_by_part(Transformer(config))
    assert held == {part: count for part, count in said.parameters_by_part.items() if count}
    assert active_parameters(config) == said.active_parameters
    assert forward_flops_per_token(config, SEQ_LEN) == said.flops_per_token_forward
    assert forward_flops_per_token(config, SEQ_LEN, full_attention=True) == said.flops_per_token_forward_full_attention
    assert said.num_moe_layers == len(config.moe_layers)


@pytest.mark.parametrize(
    "config", [CONFIG, DENSE, SHARED, LATENT, DIRECT], ids=["moe", "dense", "shared", "latent", "direct"]
)
def test_its_flops_are_those_that_torch_counts(config: TransformerConfig) -> None:
    model = build(config, seed=0)
    tokens_BS = torch.randint(config.vocab, (3, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    forward = forward_flops_per_token(config, SEQ_LEN, full_attention=True) * tokens_BS.numel()
    assert counted_flops(lambda: model(tokens_BS)) == forward
    assert counted_flops(lambda: model(tokens_BS).logits_BSV.sum().backward()) == 3 * forward


def test_a_dense_twin_of_equal_width_costs_exactly_as_many_flops() -> None:
    config = dataclasses.replace(CONFIG, dense_width=equal_flops_width(MOE))
    twin = dataclasses.replace(config, moe=None)
    assert forward_flops_per_token(config, SEQ_LEN) == forward_flops_per_token(twin, SEQ_LEN)
    assert active_parameters(config) == active_parameters(twin)


def test_every_other_layer_is_a_mixture_unless_told_otherwise() -> None:
    assert CONFIG.moe_layers == (1, 3)
    assert tuple(build(CONFIG, seed=0).moe_layers()) == (1, 3)
    assert SHARED.moe_layers == (0, 1, 2, 3)
    assert DENSE.moe_layers == ()


def test_attention_is_the_textbooks_sum_over_earlier_tokens() -> None:
    torch.manual_seed(0)
    attention = Attention(hidden=32, num_heads=4, num_kv_heads=2, head_dim=CONFIG.head_dim)
    x_BSH = torch.randn(2, 7, CONFIG.hidden)
    turns_S = rotary_turns(7, CONFIG.head_dim, CONFIG.rope_theta, x_BSH.device)
    heads = attention.qkv(x_BSH).unflatten(-1, (8, CONFIG.head_dim))
    wanted = torch.zeros(2, 7, 4, CONFIG.head_dim)
    for head in range(4):
        q = rotate(heads[:, :, head], turns_S)
        k, v = rotate(heads[:, :, 4 + head // 2], turns_S), heads[:, :, 6 + head // 2]
        for place in range(7):
            scores = (k[:, : place + 1] @ q[:, place, :, None])[..., 0] / CONFIG.head_dim**0.5
            wanted[:, place, head] = (scores.softmax(-1)[..., None] * v[:, : place + 1]).sum(1)
    torch.testing.assert_close(attention(x_BSH, turns_S), attention.out(wanted.flatten(2)), rtol=1e-5, atol=1e-6)


def test_turned_products_depend_on_the_distance_of_positions_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(12).expand(30, 12), torch.randn(12).expand(30, 12)
    turns_S = rotary_turns(30, 12, 10_000.0, q.device)
    scores = rotate(q, turns_S) @ rotate(k, turns_S).T
    torch.testing.assert_close(scores[5, 2], scores[25, 22])
    assert not torch.isclose(scores[5, 2], scores[5, 4])


def test_no_token_sees_a_later_one() -> None:
    model = build(CONFIG, seed=0).eval()
    tokens = torch.randint(50, (1, 12), generator=torch.Generator().manual_seed(0))
    later = tokens.clone()
    later[0, 8:] = 0
    torch.testing.assert_close(model(tokens).logits_BSV[:, :8], model(later).logits_BSV[:, :8])


def test_weights_come_from_the_seed_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = build(CONFIG, seed=1), build(CONFIG, seed=1), build(CONFIG, seed=2)
    assert torch.rand(1) == expected
    assert torch.equal(first.head.weight, again.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_half_precision_keeps_the_weights_and_the_routers_arithmetic_in_float32() -> None:
    tokens = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(0))
    exact = build(CONFIG, seed=0)
    rounded = build(dataclasses.replace(CONFIG, moe=dataclasses.replace(MOE, router_in_float32=False)), seed=0)
    logits = {}
    for name, model in (("float32", exact), ("half", rounded)):
        with torch.autocast("cpu", torch.bfloat16):
            result = model(tokens)
        assert result.logits_BSV.dtype == torch.bfloat16
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        result.logits_BSV.float().sum().backward()
        logits[name] = result.moe[1].logits_TE
        assert logits[name].dtype == torch.float32
    assert not torch.equal(logits["float32"], logits["float32"].bfloat16().float())
    assert torch.equal(logits["half"], logits["half"].bfloat16().float())


def test_a_noisy_routers_second_weight_counts_as_router() -> None:
    noisy = dataclasses.replace(CONFIG, moe=dataclasses.replace(MOE, router=NoisyTopK(top_k=2)))
    assert parameters_by_part(Transformer(noisy))["router"] == 2 * parameters_by_part(Transformer(CONFIG))["router"]
