"""What the small transformer keeps for its backward: the formulas' sum over layers and head, however it recomputes."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

torch = pytest.importorskip("torch")

from torch.nn import functional  # noqa: E402

from moesim.cost.activations import head_tensors, layer_tensors  # noqa: E402
from moesim.cost.recompute import kept_tensors  # noqa: E402
from moesim.cost.software import REFERENCE  # noqa: E402
from moesim.describe.model import Ffn, GroupedQueryAttention, LatentAttention, Layer, Model, MoeFfn  # noqa: E402
from moesim.describe.model import Router as DescribedRouter  # noqa: E402
from moesim.describe.parallel import Parallelism  # noqa: E402
from moesim.describe.workload import Training  # noqa: E402
from reference_model.latent_attention import LatentConfig  # noqa: E402
from reference_model.norm import RmsNorm  # noqa: E402
from reference_model.routers import SoftmaxTopK  # noqa: E402
from reference_model.saved import recording_saved  # noqa: E402
from reference_model.transformer import MoeConfig, Recompute, Transformer, TransformerConfig, build  # noqa: E402

SEQUENCES, SEQ_LEN, EXPERTS, TOP_K = 2, 32, 16, 2
TOKENS = SEQUENCES * SEQ_LEN
MOE = MoeConfig(num_experts=EXPERTS, width=24, router=SoftmaxTopK(top_k=TOP_K), shared_width=40)
CONFIG = TransformerConfig(
    hidden=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, dense_width=48, vocab=64, moe=MOE
)
LATENT = LatentConfig(q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=12)
CONFIGS = {
    "grouped": CONFIG,
    "latent": replace(CONFIG, num_kv_heads=4, head_dim=12, latent=LATENT),
    "direct": replace(CONFIG, num_kv_heads=4, head_dim=12, latent=replace(LATENT, q_lora_rank=None)),
}
OPTIONS: dict[str, list[Recompute]] = {
    "grouped": [
        "none",
        *[("core_attn",), ("mlp",), ("moe",), ("moe_act",), ("layernorm",), ("shared_experts",)],
        *[("core_attn", "mlp", "moe"), ("core_attn", "moe_act"), ("layernorm", "moe")],
        *[("core_attn", "mlp", "moe_act", "layernorm", "shared_experts")],
        "full",
    ],
    "latent": [
        "none",
        *[("mla_up_proj",), ("layernorm",), ("core_attn", "mla_up_proj"), ("layernorm", "mla_up_proj")],
        *[("core_attn", "mla_up_proj", "mlp", "moe_act", "layernorm", "shared_experts")],
        "full",
    ],
    "direct": ["none", ("mla_up_proj",), ("core_attn", "mla_up_proj", "layernorm")],
}
CASES = [(kind, option) for kind, options in OPTIONS.items() for option in options]


def _half(kind: str, recompute: Recompute) -> Transformer:
    """The model in bf16, but for its routers' weights."""
    model = build(CONFIGS[kind], seed=0, recompute=recompute).to(torch.bfloat16)
    for layer in model.moe_layers().values():
        layer.router_weight.data = layer.router_weight.data.float()
    return model


def described(kind: str) -> Model:
    latent, attention = CONFIGS[kind].latent, GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=8)
    if latent is not None:
        attention = LatentAttention(num_heads=4, **asdict(latent))
    moe = MoeFfn(num_experts=EXPERTS, expert=Ffn(width=24), router=DescribedRouter(top_k=TOP_K), shared=Ffn(width=40))
    layers = [Layer(attention=attention, ffn=moe if i in CONFIG.moe_layers else Ffn(width=48)) for i in range(4)]
    return Model(name="test", hidden=32, vocab=64, layers=tuple(layers))


def _formula(kind: str, recompute: Recompute) -> float:
    model = described(kind)
    train = Training(recompute=recompute if isinstance(recompute, str) else ",".join(recompute))
    count = {"token": TOKENS, "assignment": TOKENS * TOP_K}
    layers = [
        tensor
        for layer in model.layers
        for tensor in kept_tensors(layer_tensors(model, layer, Parallelism(), REFERENCE), layer, train, tp=1)
    ]
    # A gradient is not kept from the forward.
    head = [tensor for tensor in head_tensors(model, Parallelism(), REFERENCE) if tensor.name != "logit gradients"]
    return sum(count[tensor.per] * tensor.bytes for tensor in [*layers, *head])


def _beside_the_formulas(kind: str, recompute: Recompute) -> int:
    """Small things that no formula has: token ids of embedding and loss, turns of positions, ends of experts' rows, and
    the number that a mean divides by."""
    experts_run = recompute != "full" and "moe" not in recompute
    ends = 4 * EXPERTS * len(CONFIG.moe_layers) if experts_run else 0
    latent = CONFIGS[kind].latent
    turned = CONFIG.head_dim if latent is None else latent.qk_rope_head_dim
    return 2 * 8 * TOKENS + 8 * SEQ_LEN * turned // 2 + 4 + ends


@pytest.mark.parametrize(("kind", "recompute"), CASES, ids=str)
def test_what_the_transformer_keeps_is_the_formula_to_the_byte_and_its_gradients_do_not_change(
    kind: str, recompute: Recompute
) -> None:
    model, tokens_BS = (
        _half(kind, recompute),
        torch.randint(64, (SEQUENCES, SEQ_LEN), generator=torch.Generator().manual_seed(1)),
    )
    with recording_saved(besides=model.parameters()) as saved:
        logits_BSV = model(tokens_BS).logits_BSV
        loss = functional.cross_entropy(logits_BSV.flatten(0, 1).float(), tokens_BS.flatten().roll(-1))
    assert saved.num_bytes == _formula(kind, recompute) + _beside_the_formulas(kind, recompute)
    loss.backward()
    plain = _half(kind, "none")
    functional.cross_entropy(plain(tokens_BS).logits_BSV.flatten(0, 1).float(), tokens_BS.flatten().roll(-1)).backward()
    for (name, ours), (_, wanted) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(ours.grad, wanted.grad), name


@pytest.mark.parametrize("kind", ["grouped", "latent"])
def test_more_recomputation_keeps_less(kind: str) -> None:
    kept = [_formula(kind, option) for option in OPTIONS[kind]]
    assert kept[0] == max(kept)
    assert kept[-1] == min(kept)
    assert len(set(kept)) == len(kept), "every option differs in what it keeps"


def test_the_norm_is_torchs_forward_and_backward() -> None:
    torch.manual_seed(0)
    ours, theirs = RmsNorm(24), torch.nn.RMSNorm(24, eps=1e-6)
    with torch.no_grad():
        ours.weight.copy_(torch.randn(24))
        theirs.weight.copy_(ours.weight)
    x = torch.randn(5, 7, 24)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    grad = torch.randn(5, 7, 24)
    for norm, at in zip((ours, theirs), inputs, strict=True):
        norm(at).backward(grad)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-5, atol=1e-6)
