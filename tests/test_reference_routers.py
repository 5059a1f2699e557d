"""Routers choose as their papers say: groups, bias, noise, GShard's random second, experts that choose tokens."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from reference_model.layer import MoeLayer, layer_by_loops  # noqa: E402
from reference_model.routers import (  # noqa: E402
    SWITCH_TOP_1,
    ExpertChoice,
    GshardTop2,
    NoisyTopK,
    SigmoidTopK,
    SoftmaxTopK,
    router_logits,
)


def _logits(num_tokens: int, num_experts: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))


def test_a_group_limited_token_stays_within_its_best_groups() -> None:
    logits = _logits(200, 32)
    choice = SoftmaxTopK(top_k=6, num_groups=8, top_groups=3)(logits)
    group_TK = choice.experts_TK // 4
    best_groups = logits.view(200, 8, 4).amax(-1).topk(3).indices
    for used, allowed in zip(group_TK.tolist(), best_groups.tolist(), strict=True):
        assert set(used) <= set(allowed)


def test_sigmoid_groups_rank_by_their_two_best_biased_scores() -> None:
    # Group 0 has the best single expert, group 1 the better pair; the bias then lifts group 0 again.
    logits = torch.tensor([[3.0, -9.0, 2.0, 2.0]])
    router = SigmoidTopK(top_k=2, num_groups=2, top_groups=1)
    assert sorted(router(logits).experts_TK[0].tolist()) == [2, 3]
    biased = router(logits, bias_E=torch.tensor([0.0, 0.9, 0.0, 0.0]))
    assert biased.experts_TK[0].tolist() == [0, 1], "heaviest first, whatever the bias says"
    scores = logits[0, [0, 1]].sigmoid()
    torch.testing.assert_close(biased.weights_TK[0], scores / scores.sum()), "weights know no bias"


def test_bias_changes_the_choice_but_no_weight_and_gets_no_gradient() -> None:
    logits = _logits(50, 8).requires_grad_()
    bias = torch.linspace(-0.3, 0.3, 8)
    choice = SigmoidTopK(top_k=2, normalise=False, scale=2.5)(logits, bias)
    assert not torch.equal(
        choice.experts_TK.sort().values, SigmoidTopK(top_k=2)(logits.detach()).experts_TK.sort().values
    )
    torch.testing.assert_close(choice.weights_TK, 2.5 * logits.sigmoid().gather(1, choice.experts_TK))
    torch.testing.assert_close(choice.probabilities_TE.sum(-1), torch.ones(50))


def test_switch_weighs_its_expert_by_its_probability() -> None:
    logits = _logits(20, 8)
    choice = SWITCH_TOP_1(logits)
    torch.testing.assert_close(choice.weights_TK[:, 0], logits.softmax(-1).amax(-1))


def test_noisy_logits_spread_by_the_softplus_of_the_noise_logits_and_not_at_all_in_evaluation() -> None:
    num_draws, width = 100_000, 0.7
    torch.manual_seed(0)
    logits, noise_logits = torch.zeros(num_draws, 2), torch.full((num_draws, 2), math.log(math.expm1(width)))
    logits[:, 1] = 0.5
    second_wins = (NoisyTopK(top_k=1)(logits, noise_logits).experts_TK == 1).float().mean()
    # The difference of two independent noises has sqrt(2) of their width.
    expected = 0.5 * (1 + math.erf(0.5 / (math.sqrt(2) * width) / math.sqrt(2)))
    assert abs(float(second_wins) - expected) < 4 * 0.5 / math.sqrt(num_draws)
    quiet = NoisyTopK(top_k=2)(_logits(10, 6))
    torch.testing.assert_close(quiet.weights_TK, _logits(10, 6).topk(2).values.softmax(-1))


def test_gshard_sends_the_second_expert_with_twice_its_weight_and_always_in_evaluation() -> None:
    num_tokens = 100_000
    torch.manual_seed(0)
    logits = torch.tensor([[2.0, 0.5, -9.0]]).expand(num_tokens, 3)
    second_weight = float(logits[0, :2].softmax(-1)[1])
    choice = GshardTop2()(logits)
    goes = choice.experts_TK[:, 1] >= 0
    assert abs(float(goes.float().mean()) - 2 * second_weight) < 4 * 0.5 / math.sqrt(num_tokens)
    assert bool((choice.experts_TK[:, 0] == 0).all())
    assert bool((choice.weights_TK[:, 1].where(~goes, 0.0) == 0).all())
    torch.testing.assert_close(choice.weights_TK[goes][:, 1], torch.full((int(goes.sum()),), second_weight))
    assert bool((GshardTop2()(logits, random_second=False).experts_TK[:, 1] == 1).all())


def test_each_expert_takes_the_tokens_most_probable_with_it() -> None:
    logits = _logits(40, 8)
    choice = ExpertChoice(top_k=2)(logits)
    probability = logits.softmax(-1)
    for expert in range(8):
        taken = (choice.experts_TK == expert).any(-1).nonzero()[:, 0]
        assert taken.tolist() == probability[:, expert].topk(10).indices.sort().values.tolist()
        weight = choice.weights_TK[choice.experts_TK == expert]
        torch.testing.assert_close(weight, probability[taken, expert])


ROUTERS = {
    "softmax-groups": SoftmaxTopK(top_k=3, num_groups=4, top_groups=2, scale=2.0),
    "switch": SWITCH_TOP_1,
    "sigmoid-groups": SigmoidTopK(top_k=3, num_groups=4, top_groups=2, scale=2.5),
    "noisy": NoisyTopK(top_k=2),
    "gshard": GshardTop2(),
    "expert-choice": ExpertChoice(top_k=2),
}


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
@pytest.mark.parametrize("name", list(ROUTERS))
def test_layer_with_every_router_and_activation_equals_the_loop_over_experts(name: str, activation: str) -> None:
    torch.manual_seed(0)
    factor = None if name == "expert-choice" else 0.75
    layer = MoeLayer(
        hidden=16,
        width=24,
        num_experts=8,
        router=ROUTERS[name],
        activation=activation,
        shared_width=8,
        capacity_factor=factor,
        drop_policy="slot",
    )
    if layer.router_bias is not None:
        layer.router_bias.normal_(std=0.2)
    x = torch.randn(45, 16, requires_grad=True)
    direction = torch.randn(45, 16)
    leaves = (x, *layer.parameters())
    seen = []
    for forward in (lambda: layer(x).output_TH, lambda: layer_by_loops(layer, x)):
        torch.manual_seed(7)  # random routers must draw the same twice
        output = forward()
        seen.append((output, *torch.autograd.grad(output, leaves, direction)))
    for ours, oracle in zip(*seen, strict=True):
        torch.testing.assert_close(ours, oracle, rtol=1e-5, atol=1e-5)
    assert factor is None or int(layer(x).plan.kept_TK.sum()) < x.shape[0] * layer.router.top_k


@pytest.mark.parametrize("recompute", ["moe_act", "full"])
@pytest.mark.parametrize("name", ["sigmoid-groups", "noisy", "gshard"])
def test_recomputation_replays_random_routers_and_changes_no_gradient(name: str, recompute: str) -> None:
    seen = []
    for how in ("none", recompute):
        torch.manual_seed(0)
        layer = MoeLayer(hidden=16, width=24, num_experts=8, router=ROUTERS[name], recompute=how)
        x = torch.randn(45, 16, requires_grad=True)
        result = layer(x)
        loss = result.output_TH.square().sum() + result.choice.probabilities_TE.square().sum()
        seen.append(torch.autograd.grad(loss, (x, *layer.parameters())))
    for ours, oracle in zip(*seen, strict=True):
        assert torch.equal(ours, oracle)


def test_router_product_keeps_its_gradients() -> None:
    x, weight = _logits(9, 16).requires_grad_(), _logits(4, 16, seed=1).requires_grad_()
    direction = _logits(9, 4, seed=2)
    ours = torch.autograd.grad(router_logits(x, weight), (x, weight), direction)
    plain = torch.autograd.grad(x @ weight.T, (x, weight), direction)
    for mine, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, other)
