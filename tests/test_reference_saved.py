"""The formulas of memory and FLOPs equal what autograd keeps and what torch's counter counts, for the MoE layer."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from moesim.cost.activations import SavedTensor, layer_tensors  # noqa: E402
from moesim.cost.recompute import kept_tensors  # noqa: E402
from moesim.cost.software import MEGATRON, REFERENCE, Framework  # noqa: E402
from moesim.describe.flops import layer_flops  # noqa: E402
from moesim.describe.model import Ffn, GroupedQueryAttention, Layer, Model, MoeFfn  # noqa: E402
from moesim.describe.model import Router as DescribedRouter  # noqa: E402
from moesim.describe.parallel import Parallelism  # noqa: E402
from moesim.describe.workload import Training  # noqa: E402
from reference_model import experts  # noqa: E402
from reference_model.experts import activate  # noqa: E402
from reference_model.flops import flop_counter  # noqa: E402
from reference_model.layer import FeedForward, MoeLayer  # noqa: E402
from reference_model.ranks import run_on_ranks  # noqa: E402
from reference_model.routers import SWITCH_TOP_1, SigmoidTopK, SoftmaxTopK  # noqa: E402
from reference_model.saved import recording_saved  # noqa: E402
from tests.test_reference_expert_parallel import saved_on_each_rank  # noqa: E402

TOKENS, HIDDEN, WIDTH, SHARED, EXPERTS = 64, 32, 48, 40, 16
ATTENTION = GroupedQueryAttention(num_heads=4, num_kv_heads=4, head_dim=8)  # not looked at here
ENDS_BYTES = 4 * EXPERTS  # where each expert's rows end, int32: per layer, not per token, so no formula has it
PARTS, FLOATS = {"dispatch", "experts", "shared"}, {"torch.bfloat16", "torch.float32"}
ROUTERS = {
    "mixtral": (SoftmaxTopK(top_k=2), DescribedRouter(top_k=2)),
    "olmoe": (SoftmaxTopK(top_k=4, normalise=False), DescribedRouter(top_k=4, normalise_top_k=False)),
    "deepseek-v3": (
        SigmoidTopK(top_k=4, num_groups=4, top_groups=2, scale=2.5),
        DescribedRouter(top_k=4, scoring="sigmoid", num_groups=4, top_groups=2),
    ),
}


def _described(router: DescribedRouter, gated: bool = True) -> tuple[Model, Layer]:
    expert, shared = Ffn(width=WIDTH, gated=gated), Ffn(width=SHARED, gated=gated)
    ffn = MoeFfn(num_experts=EXPERTS, expert=expert, router=router, shared=shared)
    layer = Layer(attention=ATTENTION, ffn=ffn)
    return Model(name="test", hidden=HIDDEN, vocab=64, layers=(layer,)), layer


def _formula(router: DescribedRouter, software: Framework) -> list[SavedTensor]:
    """Of the block alone: without the attention, and without the input of the norm that comes before it."""
    tensors = layer_tensors(*_described(router), Parallelism(), software)
    return [tensor for tensor in tensors if tensor.part != "attention" and tensor.name != "ffn block input"]


def _bytes(tensors: list[SavedTensor], top_k: int) -> float:
    count = {"token": TOKENS, "assignment": TOKENS * top_k}
    return sum(count[tensor.per] * tensor.bytes for tensor in tensors)


def _kept(router: Any, **changes: Any) -> Any:
    torch.manual_seed(0)
    layer = MoeLayer(
        hidden=HIDDEN,
        width=WIDTH,
        num_experts=EXPERTS,
        router=router,
        shared_width=SHARED,
        dtype=torch.bfloat16,
        **changes,
    )
    x = torch.randn(TOKENS, HIDDEN).bfloat16().requires_grad_()
    with recording_saved(besides=layer.parameters()) as saved:
        result = layer(x)
    result.output_TH.sum().backward()
    return saved


@pytest.mark.parametrize("name", list(ROUTERS))
def test_what_the_layer_keeps_is_the_formula_to_the_byte(name: str) -> None:
    router, described = ROUTERS[name]
    assert _kept(router).num_bytes == _bytes(_formula(described, REFERENCE), router.top_k) + ENDS_BYTES


@pytest.mark.parametrize("name", list(ROUTERS))
def test_recomputing_the_activation_keeps_all_but_its_output_and_full_recomputation_the_input_alone(name: str) -> None:
    router, described = ROUTERS[name]
    tensors = _formula(described, REFERENCE)
    layer = _described(described)[1]
    less = list(kept_tensors(tuple(tensors), layer, Training(recompute="moe_act"), tp=1))
    assert [tensor.name for tensor in tensors if tensor not in less] == ["expert activation output"]
    assert _kept(router, recompute=("moe_act",)).num_bytes == _bytes(less, router.top_k) + ENDS_BYTES
    assert _kept(router, recompute="full").num_bytes == TOKENS * HIDDEN * 2


@pytest.mark.parametrize("path", ["grouped", "loop"])
def test_the_recomputed_activation_is_really_freed(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs: list[torch.UntypedStorage] = []

    def watched(*arguments: Any) -> torch.Tensor:
        active = activate(*arguments)
        outputs.append(active.untyped_storage())
        return active

    monkeypatch.setattr(experts, "activate", watched)
    for recompute, freed in (("none", False), (("moe_act",), True)):
        layer = MoeLayer(
            hidden=HIDDEN, width=WIDTH, num_experts=EXPERTS, router=SWITCH_TOP_1, recompute=recompute, path=path
        )
        result = layer(torch.randn(TOKENS, HIDDEN, requires_grad=True))
        assert (outputs[-1].nbytes() == 0) == freed
        result.output_TH.sum().backward()
    assert len(outputs) > 2, "the backward must compute it again"


def test_every_large_tensor_that_megatron_keeps_is_kept_in_the_same_shape() -> None:
    """All but the router's own records: Megatron's span all experts, ours the chosen ones."""
    router, described = ROUTERS["deepseek-v3"]
    elements = {torch.bfloat16: 2, torch.float32: 4}
    kept = Counter(storage.num_bytes for storage in _kept(router).storages if storage.dtype in elements)
    count = {"token": TOKENS, "assignment": TOKENS * router.top_k}
    records = {"router probabilities", "routing map", "permute map"}
    wanted = Counter(
        int(count[tensor.per] * tensor.bytes) for tensor in _formula(described, MEGATRON) if tensor.name not in records
    )
    assert wanted.total() == 8
    assert wanted <= kept


def test_a_rank_keeps_routed_tensors_for_the_assignments_it_receives_however_many_ranks_share_them() -> None:
    router, described = ROUTERS["mixtral"]
    counts, changes = [72, 24], {"dtype": torch.bfloat16, "router": router}
    by_rank = run_on_ranks(saved_on_each_rank, 2, counts, 1.0, changes)
    received = [rows for rows, _ in by_rank]
    assert sum(received) == sum(counts) * router.top_k
    assert max(received) > 1.3 * min(received), "the case must be skewed"
    expert, shared = Ffn(width=48), Ffn(width=16)
    layer = Layer(attention=ATTENTION, ffn=MoeFfn(num_experts=8, expert=expert, router=described, shared=shared))
    model = Model(name="test", hidden=32, vocab=64, layers=(layer,))
    tensors = [
        tensor
        for tensor in layer_tensors(model, layer, Parallelism(ep=2), REFERENCE)
        if tensor.part in PARTS and tensor.element_bytes < 8
    ]
    assert {tensor.per for tensor in tensors} == {"token", "assignment"}
    for num_tokens, (num_received, kept) in zip(counts, by_rank, strict=True):
        count = {"token": num_tokens, "assignment": num_received}
        wanted = Counter(int(count[tensor.per] * tensor.bytes) for tensor in tensors)
        assert wanted <= Counter(num_bytes for dtype, num_bytes in kept if dtype in FLOATS)
        whole = sum(num_bytes for dtype, num_bytes in kept if dtype in FLOATS)
        # Beside them: the layer's input, router scores, weights and their sums.
        assert whole == sum(wanted.elements()) + num_tokens * (2 * 32 + 4 * 8 + 4 * (router.top_k + 1))


def test_a_dense_block_keeps_its_input_the_activations_input_and_its_output() -> None:
    block = FeedForward(hidden=HIDDEN, width=WIDTH, dtype=torch.bfloat16)
    x = torch.randn(TOKENS, HIDDEN).bfloat16().requires_grad_()
    with recording_saved(besides=block.parameters()) as saved:
        block(x)
    assert saved.num_bytes == TOKENS * 2 * (HIDDEN + 3 * WIDTH)


def test_a_view_counts_as_its_storage_once_and_a_parameter_not_at_all() -> None:
    x, weight = torch.ones(6, 4, requires_grad=True), torch.ones(4, requires_grad=True)
    with recording_saved(besides=[weight]) as saved:
        y = x.exp()
        (y[:2] * weight + y[2:4] * y[4:]).sum()
    assert [storage.num_bytes for storage in saved.storages] == [6 * 4 * 4]


@pytest.mark.parametrize("path", ["grouped", "loop"])
@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_flops_of_formula_and_counter_are_equal_forward_and_backward(activation: str, path: str) -> None:
    router, described = (SWITCH_TOP_1, DescribedRouter(top_k=1)) if activation == "relu" else ROUTERS["deepseek-v3"]
    layer = MoeLayer(
        hidden=HIDDEN,
        width=WIDTH,
        num_experts=EXPERTS,
        router=router,
        activation=activation,
        shared_width=SHARED,
        path=path,
    )
    x = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    with flop_counter() as forward:
        output = layer(x).output_TH
    with flop_counter() as backward:
        output.sum().backward()
    per_token = layer_flops(*_described(described, gated=activation == "swiglu"), seq_len=TOKENS)
    expected = TOKENS * (per_token.router + per_token.experts + per_token.shared_experts)
    assert forward.get_total_flops() == expected
    assert backward.get_total_flops() == 2 * expected
