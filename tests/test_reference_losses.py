"""Balancing losses are least where load is even, push towards it, and the loss-free bias evens a skewed router out."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from reference_model.capacity import expert_counts, place_in_expert  # noqa: E402
from reference_model.losses import balance_loss, importance_loss, router_z_loss, update_bias_  # noqa: E402
from reference_model.routers import Choice, GshardTop2, SigmoidTopK, SoftmaxTopK  # noqa: E402


def _skewed_logits(num_tokens: int = 4000, num_experts: int = 8) -> torch.Tensor:
    noise = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(0))
    return noise + torch.linspace(0.0, 1.5, num_experts)


@pytest.mark.parametrize("top_k", [1, 2])
def test_balance_loss_is_k_when_even_e_when_one_expert_takes_all_and_one_per_choice(top_k: int) -> None:
    even = torch.eye(8).repeat(4, 1) * 1e-3  # each expert is the first of as many tokens
    even = even + 0.5 * even.roll(1, dims=1)
    assert float(balance_loss(SoftmaxTopK(top_k=top_k)(even))) == pytest.approx(top_k, rel=1e-3)
    assert float(balance_loss(SoftmaxTopK(top_k=top_k)(even), per_choice=True)) == pytest.approx(1.0, rel=1e-3)
    collapsed = torch.zeros(32, 8)
    collapsed[:, 3] = 100.0
    assert float(balance_loss(SoftmaxTopK(top_k=1)(collapsed))) == pytest.approx(8.0)


@pytest.mark.parametrize("loss", [balance_loss, importance_loss])
def test_a_step_down_the_loss_makes_the_busiest_expert_less_busy(loss) -> None:
    logits, router = _skewed_logits(), SoftmaxTopK(top_k=2)
    shift = torch.zeros(8, requires_grad=True)
    for _ in range(20):
        (grad,) = torch.autograd.grad(loss(router(logits + shift)), shift)
        shift = (shift - 0.3 * grad).detach().requires_grad_()
    before, after = (expert_counts(router(logits + by).experts_TK, 8).max() for by in (0.0, shift))
    assert float(after) < 0.9 * float(before)


def test_balance_loss_counts_choices_that_were_not_made_for_nobody() -> None:
    torch.manual_seed(0)
    choice = GshardTop2()(_skewed_logits(100))
    made = choice.experts_TK[choice.experts_TK >= 0]
    share = torch.bincount(made, minlength=8) / 100
    expected = 8 * (share * choice.probabilities_TE.mean(0)).sum()
    torch.testing.assert_close(balance_loss(choice), expected)


def test_sequences_are_balanced_each_by_itself() -> None:
    logits = _skewed_logits(60)
    router = SoftmaxTopK(top_k=2)
    apart = torch.stack([balance_loss(router(part)) for part in logits.split(20)]).mean()
    torch.testing.assert_close(balance_loss(router(logits), num_sequences=3), apart)


def test_z_loss_is_the_mean_square_of_the_log_partition_and_grows_with_a_shift() -> None:
    logits = _skewed_logits(10)
    by_hand = (logits.exp().sum(-1).log() ** 2).mean()
    torch.testing.assert_close(router_z_loss(logits), by_hand)
    assert float(router_z_loss(logits + 3)) > float(router_z_loss(logits))


def test_bias_update_moves_each_expert_by_the_sign_of_what_it_lacks() -> None:
    bias = torch.zeros(4)
    update_bias_(bias, torch.tensor([4, 2, 6, 4]), rate=0.01)
    torch.testing.assert_close(bias, torch.tensor([0.0, 0.01, -0.01, 0.0]))


def test_bias_updates_even_out_a_skewed_router() -> None:
    logits, router, bias = _skewed_logits(), SigmoidTopK(top_k=2), torch.zeros(8)
    violation = []
    for _ in range(300):
        counts = expert_counts(router(logits, bias).experts_TK, 8)
        violation.append(float(counts.max() / counts.double().mean() - 1))
        update_bias_(bias, counts, rate=0.002)
    assert violation[0] > 0.5
    assert violation[-1] < 0.05


def test_slots_fill_first_choices_before_any_second_one() -> None:
    experts = torch.tensor([[1, 0], [0, 1], [0, -1], [1, 0]])
    choice = Choice(torch.ones(4, 2), experts, torch.full((4, 2), 0.5))
    place = place_in_expert(choice, 2, "slot")
    assert place[experts >= 0].tolist() == [0, 2, 0, 2, 1, 1, 3]
    assert place_in_expert(choice, 2, "position")[experts >= 0].tolist() == [0, 0, 1, 1, 2, 2, 3]
