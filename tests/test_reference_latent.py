"""Latent attention is DeepSeek-V3's; what recomputation by modules costs is what the formulas count.

Tolerance of parity: 1e-5 of the largest entry, in float32; the two sum in another order.
"""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

torch = pytest.importorskip("torch")

from torch.utils.checkpoint import set_checkpoint_early_stop  # noqa: E402

from moesim.cost.recompute import Operation, operations_again  # noqa: E402
from moesim.describe.flops import ffn_flops, layer_flops  # noqa: E402
from moesim.describe.model import Layer, MoeFfn  # noqa: E402
from moesim.describe.workload import Training  # noqa: E402
from reference_model.attention import rotary_turns  # noqa: E402
from reference_model.discard import discard  # noqa: E402
from reference_model.flops import counted_flops  # noqa: E402
from reference_model.latent_attention import LatentAttention, LatentConfig  # noqa: E402
from reference_model.transformer import Recompute, Transformer, build  # noqa: E402
from tests.test_reference_saved_transformer import CASES, CONFIGS, SEQ_LEN, SEQUENCES, described  # noqa: E402

TOKENS = SEQUENCES * SEQ_LEN
SIZES = LatentConfig(q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=10)


def _tokens() -> torch.Tensor:
    return torch.randint(64, (SEQUENCES, SEQ_LEN), generator=torch.Generator().manual_seed(1))


@pytest.mark.hf
@pytest.mark.parametrize("q_lora_rank", [24, None])
def test_latent_attention_is_that_of_deepseek_v3_in_output_and_every_gradient(q_lora_rank: int | None) -> None:
    transformers = pytest.importorskip("transformers", minversion="5", reason="needs the extra hf")
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as published

    sizes = replace(SIZES, q_lora_rank=q_lora_rank)
    config = transformers.DeepseekV3Config(
        **asdict(sizes), hidden_size=32, num_attention_heads=4, num_key_value_heads=4, rope_interleave=False
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs = published.DeepseekV3Attention(config, layer_idx=0)
    ours = LatentAttention(hidden=32, num_heads=4, sizes=sizes, recompute_core=True, recompute_up=True)
    names = {"kv_down": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "kv_up": "kv_b_proj", "out": "o_proj"}
    names |= {"q_up": "q_proj" if q_lora_rank is None else "q_b_proj", "q_down": "q_a_proj", "q_norm": "q_a_layernorm"}
    pairs = [
        (parameter, theirs.get_parameter(f"{names[name.partition('.')[0]]}.weight"))
        for name, parameter in ours.named_parameters()
    ]
    assert len(pairs) == len(list(theirs.parameters())), "none left out"
    for mine, published_one in pairs:
        mine.data.copy_(published_one.data)
    x = torch.randn(2, 9, 32)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    rotary = published.DeepseekV3RotaryEmbedding(config)(x, torch.arange(9)[None])
    mask = torch.full((9, 9), -torch.inf).triu(1)[None, None]
    wanted, _ = theirs(inputs[0], position_embeddings=rotary, attention_mask=mask)
    output = ours(inputs[1], rotary_turns(9, 4, config.rope_parameters["rope_theta"], x.device))
    direction = torch.randn(2, 9, 32)
    wanted.backward(direction)
    output.backward(direction)
    compared = [(output, wanted), (inputs[1].grad, inputs[0].grad), *((a.grad, b.grad) for a, b in pairs)]
    for mine, published_one in compared:
        assert float((mine - published_one).detach().abs().max() / published_one.detach().abs().max()) < 1e-5


def _flops_of(layer: Layer, operation: Operation) -> float:
    """Forward FLOPs per token of what is done again; norms and activations have no product."""
    parts = layer_flops(described("latent"), layer, SEQ_LEN, full_attention=True)
    shared = 0.0 if not isinstance(layer.ffn, MoeFfn) or layer.ffn.shared is None else layer.ffn.shared
    match operation:
        case "core attention":
            return parts.attention_sequence
        case "up projections":
            sizes = CONFIGS["latent"].latent
            assert sizes is not None
            assert sizes.q_lora_rank is not None
            of_queries = sizes.q_lora_rank * sizes.qk_head_dim
            return 2.0 * 4 * (of_queries + sizes.kv_lora_rank * (sizes.qk_nope_head_dim + sizes.v_head_dim))
        case "routed experts":
            return parts.router + parts.experts
        case "shared experts":
            return ffn_flops(32, shared) if shared else 0.0
        case "dense ffn":
            return parts.dense_ffn
    return 0.0


def _step_flops(model: Transformer) -> int:
    return counted_flops(lambda: model(_tokens()).logits_BSV.sum().backward())


@pytest.mark.parametrize("recompute", [option for kind, option in CASES if kind == "latent" and option != "full"])
def test_a_backward_counts_as_many_more_flops_as_the_formulas_do_again(recompute: Recompute) -> None:
    config = CONFIGS["latent"]
    plain = _step_flops(build(config, seed=0))
    with set_checkpoint_early_stop(False):  # else a checkpoint leaves out its last product, which Megatron's does not
        again = _step_flops(build(config, seed=0, recompute=recompute))
    train = Training(recompute=recompute if isinstance(recompute, str) else ",".join(recompute))
    wanted = sum(
        _flops_of(layer, operation)
        for layer in described("latent").layers
        for operation in operations_again(layer, train)
    )
    assert again - plain == TOKENS * wanted
    assert (wanted > 0) == (recompute not in ("none", ("layernorm",)))


@pytest.mark.parametrize("kind", ["grouped", "latent"])
def test_under_autocast_what_is_made_again_has_the_same_bits(kind: str) -> None:
    everything = ("mla_up_proj", "moe_act", "layernorm", "shared_experts")
    models = [build(CONFIGS[kind], seed=0, recompute=recompute) for recompute in ("none", everything)]
    for model in models:
        with torch.autocast("cpu", torch.bfloat16):
            result = model(_tokens())
        result.logits_BSV.float().logsumexp(-1).mean().backward()
    for plain, again in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(plain.grad, again.grad)


def test_what_was_discarded_comes_back_for_a_loss_of_any_result() -> None:
    for chosen in range(2):
        x = torch.linspace(0.1, 1.0, 5, requires_grad=True)
        middle = x.exp()
        ends = [middle.square(), middle.sin()]
        discard([middle], lambda x=x: [x.exp()], before=ends)
        assert middle.untyped_storage().nbytes() == 0
        wanted = torch.autograd.grad([x.exp().square(), x.exp().sin()][chosen].sum(), x)
        ends[chosen].sum().backward()
        torch.testing.assert_close(x.grad, wanted[0])


def test_nothing_is_discarded_where_no_gradient_is_recorded() -> None:
    middle = torch.ones(4)
    discard([middle], lambda: [middle], before=[middle + 1])
    assert middle.sum() == 4
