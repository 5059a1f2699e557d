"""The reference layer: the fast path equals the readable loop, outputs and gradients; drops follow Megatron's capacity.

Tolerances: float32 sums in another order differ by a few units in the last place; 1e-5 relative to values of order one.
Needs torch only, so that it also runs on a bare GPU machine.
"""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from reference_model.capacity import capacity_tokens  # noqa: E402
from reference_model.dispatch import combine, permute, permute_weights, plan_dispatch  # noqa: E402
from reference_model.experts import Experts, grouped_product, looped_product, row_alignment  # noqa: E402
from reference_model.layer import MoeLayer, layer_by_loops  # noqa: E402
from reference_model.routers import (  # noqa: E402
    Choice,
    GshardTop2,
    NoisyTopK,
    SigmoidTopK,
    SoftmaxTopK,
    router_logits,
)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _layer(**changes) -> MoeLayer:
    torch.manual_seed(0)
    sizes = {"hidden": 32, "width": 48, "num_experts": 8, "router": SoftmaxTopK(top_k=2)}
    return MoeLayer(**{**sizes, **changes})


def _gradients(output, leaves) -> list:
    direction = torch.randn(output.shape, generator=_generator(9)).to(output)
    return torch.autograd.grad(output, leaves, direction, allow_unused=True)


@pytest.mark.parametrize("load", [[3, 5, 2, 6], [0, 7, 0, 9], [16, 0, 0, 0], [0, 0, 1, 0]])
def test_grouped_product_equals_loop_with_gradients_and_empty_experts(load):
    x = torch.randn(sum(load) + 3, 16, generator=_generator(), requires_grad=True)  # three rows belong to nobody
    weight = torch.randn(4, 24, 16, generator=_generator(1), requires_grad=True)
    ends = torch.tensor(load).cumsum(0).to(torch.int32)
    used = int(ends[-1])
    grouped, looped = grouped_product(x, weight, ends)[:used], looped_product(x, weight, ends)[:used]
    torch.testing.assert_close(grouped, looped, **CLOSE)
    for ours, oracle in zip(_gradients(grouped, (x, weight)), _gradients(looped, (x, weight)), strict=True):
        torch.testing.assert_close(
            ours[:used] if ours.shape == x.shape else ours, oracle[:used] if ours.shape == x.shape else oracle, **CLOSE
        )


def test_a_bare_sum_can_be_differentiated_through_the_grouped_product():
    x = torch.randn(8, 16, generator=_generator(), requires_grad=True)
    weight = torch.randn(2, 24, 16, generator=_generator(1), requires_grad=True)
    grouped_product(x, weight, torch.tensor([4, 8], dtype=torch.int32)).sum().backward()
    torch.testing.assert_close(x.grad[:4], weight[0].sum(0).expand(4, -1), **CLOSE)


@pytest.mark.parametrize("capacity_factor", [None, 1.0, 0.5, 0.1])
@pytest.mark.parametrize("policy", ["probability", "position"])
@pytest.mark.parametrize("shared_width", [0, 24])
def test_layer_equals_the_loop_over_experts_in_outputs_and_every_gradient(capacity_factor, policy, shared_width):
    layer = _layer(capacity_factor=capacity_factor, drop_policy=policy, shared_width=shared_width)
    x = torch.randn(53, 32, generator=_generator(2), requires_grad=True)
    leaves = (x, *layer.parameters())
    output, oracle = layer(x).output_TH, layer_by_loops(layer, x)
    torch.testing.assert_close(output, oracle, **CLOSE)
    for ours, theirs in zip(_gradients(output, leaves), _gradients(oracle, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_layer_with_most_experts_empty_equals_the_loop():
    layer = _layer(num_experts=64)
    x = torch.randn(3, 32, generator=_generator(3), requires_grad=True)
    assert int((layer(x).plan.load_E == 0).sum()) >= 58
    leaves = (x, *layer.parameters())
    for ours, theirs in zip(
        _gradients(layer(x).output_TH, leaves), _gradients(layer_by_loops(layer, x), leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("capacity", [None, 4])
def test_padding_rows_to_the_gpu_kernels_alignment_changes_no_output_and_no_gradient(capacity):
    torch.manual_seed(0)
    experts = Experts(num_experts=8, hidden=32, width=48)
    x = torch.randn(29, 32, generator=_generator(4), requires_grad=True)
    logits = torch.randn(29, 8, generator=_generator(5), requires_grad=True)
    leaves = (x, logits, experts.w_in, experts.w_out)
    seen = []
    for alignment in (1, 8):
        choice = SoftmaxTopK(top_k=3)(logits)
        plan = plan_dispatch(choice, num_experts=8, capacity=capacity, alignment=alignment)
        assert bool((plan.ends_E % alignment == 0).all())
        assert int(plan.ends_E[-1]) <= plan.token_P.shape[0]
        rows = experts(permute(x, plan), plan.ends_E, permute_weights(choice.weights_TK, plan))
        owned = torch.arange(rows.shape[0]) < plan.ends_E[-1]
        rows = torch.where(owned[:, None], rows, math.nan)  # what stands behind the last row must reach nobody
        output = combine(rows, plan)
        seen.append((output, *_gradients(output, leaves)))
    for plain, padded in zip(*seen, strict=True):
        torch.testing.assert_close(plain, padded, **CLOSE)


def test_capacity_is_megatrons_per_source_rank_formula():
    for num_tokens, top_k, num_experts, factor in [
        (4096, 8, 256, 1.0),
        (100, 2, 8, 1.25),
        (7, 1, 64, 1.0),
        (1000, 3, 7, 1.1),
    ]:
        assert capacity_tokens(num_tokens, top_k, num_experts, factor) == math.ceil(
            num_tokens * top_k / num_experts * factor
        )
    assert capacity_tokens(64, 2, 2, 10.0) == 64, "an expert can never get more than every token once"
    assert capacity_tokens(64, 2, 8, None) == 64


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0, 1.5, 4.0])
def test_no_expert_exceeds_its_capacity_and_only_overfull_experts_drop(factor):
    choice = SoftmaxTopK(top_k=2)(torch.randn(200, 8, generator=_generator(6)) + torch.linspace(0, 3, 8))
    capacity = capacity_tokens(200, 2, 8, factor)
    plan = plan_dispatch(choice, num_experts=8, capacity=capacity)
    demand = torch.bincount(choice.experts_TK.reshape(-1), minlength=8)
    torch.testing.assert_close(plan.load_E, demand.clamp(max=capacity))
    assert int(plan.kept_TK.sum()) == int(demand.clamp(max=capacity).sum())
    rows = plan.row_TK[plan.kept_TK]
    assert rows.unique().numel() == rows.numel(), "two copies share a row"


def test_policy_probability_keeps_the_most_probable_and_position_the_first():
    weights = torch.tensor([[0.5], [0.9], [0.7], [0.8]])
    choice = Choice(weights, torch.zeros(4, 1, dtype=torch.int64), weights)
    kept = {
        policy: plan_dispatch(choice, num_experts=2, capacity=2, policy=policy).kept_TK[:, 0].tolist()
        for policy in ("probability", "position")
    }
    assert kept == {"probability": [False, True, False, True], "position": [True, True, False, False]}


def test_a_dropped_copy_adds_nothing_and_gets_no_gradient():
    weights = torch.tensor([[0.5], [0.9]], requires_grad=True)
    choice = Choice(weights, torch.zeros(2, 1, dtype=torch.int64), weights)
    plan = plan_dispatch(choice, num_experts=1, capacity=1)
    x = torch.randn(2, 4, generator=_generator(), requires_grad=True)
    output = combine(permute(x, plan) * permute_weights(weights, plan)[:, None], plan)
    torch.testing.assert_close(output, torch.stack([torch.zeros(4), 0.9 * x[1]]))
    grad_x, grad_weights = _gradients(output, (x, weights))
    assert bool((grad_x[0] == 0).all())
    assert float(grad_weights[0, 0]) == 0.0


def test_router_works_in_float32_for_bf16_tokens_and_under_autocast():
    x = torch.randn(16, 64, generator=_generator(), dtype=torch.float32).to(torch.bfloat16)
    weight = torch.randn(8, 64, generator=_generator(1))
    exact = x.double() @ weight.double().T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = router_logits(x, weight)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-4)
    layer = _layer(dtype=torch.bfloat16)
    assert layer.router_weight.dtype == torch.float32
    choice = layer(torch.randn(4, 32).to(torch.bfloat16)).choice
    assert choice.weights_TK.dtype == choice.probabilities_TE.dtype == torch.float32


def test_normalised_weights_are_the_softmax_over_the_chosen_logits():
    logits = torch.randn(10, 6, generator=_generator())
    choice = SoftmaxTopK(top_k=2)(logits)
    torch.testing.assert_close(choice.weights_TK, logits.gather(1, choice.experts_TK).softmax(-1))
    plain = SoftmaxTopK(top_k=2, normalise=False)(logits)
    torch.testing.assert_close(plain.weights_TK, logits.softmax(-1).topk(2).values)


def test_gradients_agree_with_finite_differences():
    layer = _layer(hidden=8, width=8, num_experts=4, path="loop").double()
    x = torch.randn(5, 8, generator=_generator(7), dtype=torch.float64, requires_grad=True)
    # The router computes in float32, so its own gradient is only as exact as that: hold the choice fixed here.
    choice = layer(x).choice
    weights = choice.weights_TK.detach().double().requires_grad_()
    plan = plan_dispatch(choice, num_experts=4, alignment=4)

    def moe(x, weights):
        return combine(layer.experts(permute(x, plan), plan.ends_E, permute_weights(weights, plan)), plan)

    assert torch.autograd.gradcheck(moe, (x, weights))


def _norm_error(ours, oracle) -> float:
    return float((ours.float() - oracle.float()).norm() / oracle.float().norm())


@pytest.mark.parametrize("capacity_factor", [None, 0.5])
def test_bf16_layer_equals_the_loop_over_experts_to_the_precision_of_bf16(capacity_factor):
    layer = _layer(dtype=torch.bfloat16, capacity_factor=capacity_factor, shared_width=24)
    assert layer.experts.path() == "grouped"
    x = torch.randn(53, 32, generator=_generator(2)).bfloat16().requires_grad_()
    leaves = (x, *layer.parameters())
    output, oracle = layer(x).output_TH, layer_by_loops(layer, x)
    assert output.dtype == torch.bfloat16
    for ours, theirs in zip((output, *_gradients(output, leaves)), (oracle, *_gradients(oracle, leaves)), strict=True):
        # bf16 keeps 8 bits: a unit in the last place of each entry, rounded in other places.
        assert _norm_error(ours.detach(), theirs.detach()) < 2**-7


def test_autocast_runs_experts_in_bf16_and_the_router_and_all_gradients_in_float32():
    layer = _layer()
    x = torch.randn(53, 32, generator=_generator(2), requires_grad=True)
    leaves = (x, *layer.parameters())
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = layer(x)
    assert result.output_TH.dtype == torch.bfloat16
    torch.testing.assert_close(result.choice.weights_TK, exact.choice.weights_TK, rtol=0, atol=0)
    grads = _gradients(result.output_TH, leaves)
    assert {grad.dtype for grad in grads} == {torch.float32}
    for ours, theirs in zip(grads, _gradients(exact.output_TH, leaves), strict=True):
        assert _norm_error(ours, theirs) < 2**-6


def test_bf16_rows_are_summed_in_float32():
    num_choices = 8
    experts = torch.arange(num_choices)[None]
    choice = Choice(torch.ones(1, num_choices), experts, torch.full((1, num_choices), 1 / num_choices))
    plan = plan_dispatch(choice, num_experts=num_choices)
    rows = torch.full((num_choices, 16), 2**-9, dtype=torch.bfloat16)
    rows[0] = 1.0  # beside which bf16 drops 2**-9 each time, but not seven of them together
    total = combine(rows, plan)
    assert bool((total == torch.tensor(1 + 7 * 2**-9).bfloat16()).all())
    assert float(total[0, 0]) > 1.0


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("capacity_factor", [None, 0.5])
def test_bf16_on_the_gpu_equals_the_loop_with_padding_and_empty_experts(capacity_factor):
    torch.manual_seed(0)
    layer = MoeLayer(
        hidden=256,
        width=384,
        num_experts=64,
        router=SoftmaxTopK(top_k=4),
        capacity_factor=capacity_factor,
        device="cuda",
        dtype=torch.bfloat16,
    )
    assert layer.experts.path() == "grouped"
    assert row_alignment(torch.device("cuda"), torch.bfloat16) == 8
    x = torch.randn(301, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    leaves = (x, *layer.parameters())
    output, oracle = layer(x).output_TH, layer_by_loops(layer, x)
    grads, oracle_grads = _gradients(output, leaves), _gradients(oracle, leaves)
    for ours, theirs in zip((output, *grads), (oracle, *oracle_grads), strict=True):
        assert _norm_error(ours.detach(), theirs.detach()) < 2e-2  # bf16 keeps 8 bits, summed in another order


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("recompute", ["none", ("moe_act",)], ids=str)
@pytest.mark.parametrize(
    "router",
    [SoftmaxTopK(top_k=2), SigmoidTopK(top_k=2, num_groups=4, top_groups=2), NoisyTopK(top_k=2), GshardTop2()],
    ids=lambda router: router.kind,
)
def test_the_layer_never_waits_for_the_gpu(router, recompute):
    layer = MoeLayer(
        hidden=256,
        width=384,
        num_experts=8,
        router=router,
        shared_width=128,
        capacity_factor=1.0,
        recompute=recompute,
        device="cuda",
        dtype=torch.bfloat16,
    )
    x = torch.randn(512, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer(x).output_TH.sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).output_TH.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
