"""The reference layer is the published blocks' mathematics: same weights, same outputs, same gradients as transformers.

Tolerance: 1e-5 of the largest entry, in float32; the two sum in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip(
    "transformers", minversion="5", reason="needs the extra hf, with experts in one tensor"
)

from torch import Tensor, nn  # noqa: E402
from transformers.models.deepseek_v2 import modeling_deepseek_v2  # noqa: E402
from transformers.models.deepseek_v3 import modeling_deepseek_v3  # noqa: E402
from transformers.models.mixtral import modeling_mixtral  # noqa: E402
from transformers.models.olmoe import modeling_olmoe  # noqa: E402
from transformers.models.qwen3_moe import modeling_qwen3_moe  # noqa: E402
from transformers.models.switch_transformers import modeling_switch_transformers  # noqa: E402

from reference_model.layer import MoeLayer  # noqa: E402
from reference_model.losses import balance_loss, pooled_choice, router_z_loss  # noqa: E402
from reference_model.routers import SWITCH_TOP_1, SigmoidTopK, SoftmaxTopK  # noqa: E402

pytestmark = pytest.mark.hf

TOKENS, HIDDEN, WIDTH, EXPERTS = 61, 32, 48, 16


class Published(NamedTuple):
    """A published block, our layer of the same kind, and which of their parameters is which of ours.

    theirs: what to read on their side for each of ours, by its name there; several are put one under the other.
    """

    block: Callable[[], nn.Module]
    layer: dict[str, Any]
    theirs: dict[str, list[str]]


ROUTED = {
    "router_weight": ["gate.weight"],
    "experts.w_in": ["experts.gate_up_proj"],
    "experts.w_out": ["experts.down_proj"],
}
SHARED = {
    "shared.w_in.weight": ["shared_experts.gate_proj.weight", "shared_experts.up_proj.weight"],
    "shared.w_out.weight": ["shared_experts.down_proj.weight"],
}
DEEPSEEK = {
    "hidden_size": HIDDEN,
    "moe_intermediate_size": WIDTH,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 4,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "num_hidden_layers": 2,
}


def _mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=WIDTH, num_local_experts=EXPERTS, num_experts_per_tok=2
    )
    return modeling_mixtral.MixtralSparseMoeBlock(config)


def _qwen3() -> nn.Module:
    config = transformers.Qwen3MoeConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=WIDTH,
        num_experts=EXPERTS,
        num_experts_per_tok=4,
        norm_topk_prob=True,
    )
    return modeling_qwen3_moe.Qwen3MoeSparseMoeBlock(config)


def _olmoe() -> nn.Module:
    config = transformers.OlmoeConfig(
        hidden_size=HIDDEN, intermediate_size=WIDTH, num_experts=EXPERTS, num_experts_per_tok=4, norm_topk_prob=False
    )
    return modeling_olmoe.OlmoeSparseMoeBlock(config)


def _deepseek_v2(method: str = "group_limited_greedy") -> nn.Module:
    config = transformers.DeepseekV2Config(**DEEPSEEK, topk_method=method, routed_scaling_factor=16.0)
    return modeling_deepseek_v2.DeepseekV2Moe(config)


def _deepseek_v3(normalise: bool = True) -> nn.Module:
    config = transformers.DeepseekV3Config(**DEEPSEEK, norm_topk_prob=normalise, routed_scaling_factor=2.5)
    return modeling_deepseek_v3.DeepseekV3MoE(config)


def _switch(capacity: int) -> nn.Module:
    config = transformers.SwitchTransformersConfig(
        d_model=HIDDEN,
        d_ff=WIDTH,
        num_experts=EXPERTS,
        expert_capacity=capacity,
        dropout_rate=0.0,
        router_jitter_noise=0.0,
        dense_act_fn="relu",
    )
    return modeling_switch_transformers.SwitchTransformersSparseMLP(config)


GROUPS = {"top_k": 4, "num_groups": 4, "top_groups": 2}
SWITCH_WEIGHTS = {
    "router_weight": ["router.classifier.weight"],
    "experts.w_in": [f"experts.expert_{i}.wi.weight" for i in range(EXPERTS)],
    "experts.w_out": [f"experts.expert_{i}.wo.weight" for i in range(EXPERTS)],
}
PUBLISHED = {
    "mixtral": Published(_mixtral, {"router": SoftmaxTopK(top_k=2)}, ROUTED),
    "qwen3-moe": Published(_qwen3, {"router": SoftmaxTopK(top_k=4)}, ROUTED),
    "olmoe": Published(_olmoe, {"router": SoftmaxTopK(top_k=4, normalise=False)}, ROUTED),
    "deepseek-v2": Published(
        _deepseek_v2,
        {"router": SoftmaxTopK(**GROUPS, normalise=False, scale=16.0), "shared_width": 2 * WIDTH},
        ROUTED | SHARED,
    ),
    "deepseek-v2-lite": Published(
        lambda: _deepseek_v2("greedy"),
        {"router": SoftmaxTopK(top_k=4, normalise=False, scale=16.0), "shared_width": 2 * WIDTH},
        ROUTED | SHARED,
    ),
    "deepseek-v3": Published(
        _deepseek_v3, {"router": SigmoidTopK(**GROUPS, scale=2.5), "shared_width": 2 * WIDTH}, ROUTED | SHARED
    ),
    "deepseek-v3-not-normalised": Published(
        lambda: _deepseek_v3(normalise=False),
        {"router": SigmoidTopK(**GROUPS, normalise=False, scale=2.5), "shared_width": 2 * WIDTH},
        ROUTED | SHARED,
    ),
    "switch": Published(
        lambda: _switch(capacity=TOKENS), {"router": SWITCH_TOP_1, "activation": "relu"}, SWITCH_WEIGHTS
    ),
    # ceil(61 * 1 / 16 * 1.0) = 4 places for each expert, first come first served.
    "switch-with-drops": Published(
        lambda: _switch(capacity=4),
        {"router": SWITCH_TOP_1, "activation": "relu", "capacity_factor": 1.0, "drop_policy": "position"},
        SWITCH_WEIGHTS,
    ),
}


def _randomise(block: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        parameter.data.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    for name, buffer in block.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.2, generator=generator)


def _joined(tensors: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat(tensors).view(like.shape)


def _ours(published: Published, block: nn.Module) -> MoeLayer:
    layer = MoeLayer(hidden=HIDDEN, width=WIDTH, num_experts=EXPERTS, **published.layer)
    theirs, ours = dict(block.named_parameters()), dict(layer.named_parameters())
    assert set(ours) == set(published.theirs)
    assert sorted(name for names in published.theirs.values() for name in names) == sorted(theirs), "none left out"
    for name, names in published.theirs.items():
        ours[name].data.copy_(_joined([theirs[each].data for each in names], ours[name]))
    if layer.router_bias is not None:
        layer.router_bias.copy_(block.gate.e_score_correction_bias)
    return layer


def _error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_layer_equals_the_published_block_in_output_and_every_gradient(name: str) -> None:
    published = PUBLISHED[name]
    block = published.block()
    _randomise(block)
    layer = _ours(published, block)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, TOKENS, HIDDEN, generator=generator)
    direction = torch.randn(1, TOKENS, HIDDEN, generator=generator)
    x_theirs, x_ours = x.clone().requires_grad_(), x[0].clone().requires_grad_()
    output = block(x_theirs)
    result = layer(x_ours)
    assert _error(result.output_TH, output[0]) < 1e-5
    output.backward(direction)
    result.output_TH.backward(direction[0])
    assert _error(x_ours.grad, x_theirs.grad[0]) < 1e-5
    theirs = dict(block.named_parameters())
    for ours_name, ours in layer.named_parameters():
        parts = [theirs[each] for each in published.theirs[ours_name]]
        # Their loop leaves the gradient of an expert without tokens unset.
        grads = [torch.zeros_like(part) if part.grad is None else part.grad for part in parts]
        assert _error(ours.grad, _joined(grads, ours)) < 1e-5, ours_name
    if name == "switch-with-drops":
        assert int(result.plan.kept_TK.sum()) < TOKENS, "the case must drop something"


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_balance_loss_equals_transformers_in_value_and_gradient(top_k: int, num_layers: int) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = [torch.randn(TOKENS, EXPERTS, generator=generator, requires_grad=True) for _ in range(num_layers)]
    ours = balance_loss(pooled_choice([SoftmaxTopK(top_k=top_k)(layer) for layer in logits]))
    theirs = modeling_mixtral.load_balancing_loss_func(tuple(logits), EXPERTS, top_k)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    for mine, other in zip(torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-8)


def test_balance_loss_by_sequence_equals_that_of_switch() -> None:
    logits_BTE = torch.randn(3, TOKENS, EXPERTS, generator=torch.Generator().manual_seed(3), requires_grad=True)
    choice = SWITCH_TOP_1(logits_BTE.flatten(0, 1))
    ours = balance_loss(choice, num_sequences=3)
    probabilities = logits_BTE.softmax(-1)
    theirs = modeling_switch_transformers.load_balancing_loss_func(probabilities, probabilities.argmax(-1))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    (mine,), (other,) = torch.autograd.grad(ours, logits_BTE), torch.autograd.grad(theirs, logits_BTE)
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-8)


def test_router_z_loss_equals_that_of_switch() -> None:
    logits_BTE = 5 * torch.randn(3, TOKENS, EXPERTS, generator=torch.Generator().manual_seed(4))
    theirs = modeling_switch_transformers.router_z_loss_func(logits_BTE)
    torch.testing.assert_close(router_z_loss(logits_BTE.flatten(0, 1)), theirs, rtol=1e-6, atol=0)
