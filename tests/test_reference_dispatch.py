"""Laws of permute and combine, for any routing: who gets a row, that nothing is lost, and whose backward is whose."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from reference_model.dispatch import Plan, combine, permute, permute_weights, plan_dispatch  # noqa: E402
from reference_model.layer import MoeLayer  # noqa: E402
from reference_model.routers import NOBODY, Choice, SoftmaxTopK  # noqa: E402

ROUTINGS = st.fixed_dictionaries(
    {
        "num_tokens": st.integers(1, 40),
        "num_experts": st.integers(1, 12),
        "wanted_top_k": st.integers(1, 4),
        "skew": st.floats(0.0, 3.0),
        "left_out": st.floats(0.0, 0.5),
        "capacity": st.one_of(st.none(), st.integers(1, 40)),
        "policy": st.sampled_from(["probability", "position", "slot"]),
        "alignment": st.sampled_from([1, 8]),
        "seed": st.integers(0, 2**31),
    }
)


def _routing(
    *, num_tokens: int, num_experts: int, wanted_top_k: int, skew: float, left_out: float, seed: int, **how
) -> tuple[Choice, Plan]:
    """A choice in which some copies go to nobody, and its plan."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, generator=generator) + skew * torch.arange(num_experts)
    choice = SoftmaxTopK(top_k=min(wanted_top_k, num_experts))(logits)
    missing = torch.rand(choice.experts_TK.shape, generator=generator) < left_out
    missing[0, 0] = False  # somebody goes somewhere
    choice = choice._replace(experts_TK=choice.experts_TK.masked_fill(missing, NOBODY))
    return choice, plan_dispatch(choice, num_experts=num_experts, **how)


@settings(max_examples=60, deadline=None)
@given(routing=ROUTINGS)
def test_every_kept_copy_has_one_row_among_those_of_its_expert(routing) -> None:
    choice, plan = _routing(**routing)
    kept, experts = plan.kept_TK, choice.experts_TK
    demand = torch.bincount(experts[experts >= 0], minlength=routing["num_experts"])
    limit = routing["num_tokens"] if routing["capacity"] is None else routing["capacity"]
    torch.testing.assert_close(plan.load_E, demand.clamp(max=limit))
    assert not kept[experts < 0].any()
    assert bool((plan.ends_E % routing["alignment"] == 0).all())
    rows = plan.row_TK[kept]
    assert rows.unique().numel() == rows.numel() == int(plan.load_E.sum())
    ends = plan.ends_E.long()
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    assert bool(((rows >= starts[experts[kept]]) & (rows < starts[experts[kept]] + plan.load_E[experts[kept]])).all())
    # The way back: each of these rows names its copy, every other row names none.
    copies = torch.arange(experts.numel()).view_as(experts)
    assert torch.equal(plan.copy_P[rows], copies[kept])
    assert int((plan.copy_P < experts.numel()).sum()) == rows.numel()


@settings(max_examples=60, deadline=None)
@given(routing=ROUTINGS)
def test_permute_and_combine_are_each_others_transpose_and_weights_find_their_rows(routing) -> None:
    choice, plan = _routing(**routing)
    owned = plan.copy_P < choice.experts_TK.numel()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(choice.experts_TK.shape[0], 4, dtype=torch.float64, generator=generator)
    y = torch.randn(owned.numel(), 4, dtype=torch.float64, generator=generator) * owned[:, None]
    torch.testing.assert_close((permute(x, plan) * y).sum(), (x * combine(y, plan)).sum())
    weight_P = permute_weights(choice.weights_TK, plan)
    assert bool((weight_P[~owned] == 0).all())
    summed = combine(permute(torch.ones(x.shape[0], 1), plan) * weight_P[:, None], plan)[:, 0]
    torch.testing.assert_close(summed, (choice.weights_TK * plan.kept_TK).sum(1))


@pytest.mark.parametrize("capacity_factor", [None, 0.7])
def test_renumbering_the_experts_changes_nothing(capacity_factor: float | None) -> None:
    torch.manual_seed(0)
    sizes = {"hidden": 16, "width": 24, "num_experts": 8, "router": SoftmaxTopK(top_k=2)}
    layer, renumbered = (MoeLayer(**sizes, capacity_factor=capacity_factor) for _ in range(2))
    order = torch.randperm(8)
    for name in ("router_weight", "experts.w_in", "experts.w_out"):
        renumbered.get_parameter(name).data.copy_(layer.get_parameter(name).data[order])
    x = torch.randn(40, 16)
    torch.testing.assert_close(renumbered(x).output_TH, layer(x).output_TH)


def test_an_endless_capacity_factor_drops_nothing() -> None:
    torch.manual_seed(0)
    sizes = {"hidden": 16, "width": 24, "num_experts": 8, "router": SoftmaxTopK(top_k=2)}
    layer = MoeLayer(**sizes, capacity_factor=100.0)
    x = torch.randn(40, 16)
    bounded = layer(x)
    layer.capacity_factor = None
    assert bool(bounded.plan.kept_TK.all())
    assert torch.equal(bounded.output_TH, layer(x).output_TH)
