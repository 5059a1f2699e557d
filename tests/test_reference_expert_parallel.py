"""Expert parallelism over real processes equals the layer in one process: bit for bit forward, 1e-6 in gradients.

Ranks hold 16 tokens or more where bits are compared: the BLAS takes other kernels for products of very few rows.
"""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from reference_model.capacity import capacity_tokens, place_in_expert  # noqa: E402
from reference_model.dispatch import combine, permute, permute_weights, plan_dispatch  # noqa: E402
from reference_model.expert_parallel import (  # noqa: E402
    PHASES,
    ExpertParallelMoe,
    PhaseClock,
    Placement,
    phase_table,
)
from reference_model.layer import MoeLayer  # noqa: E402
from reference_model.ranks import run_on_ranks  # noqa: E402
from reference_model.routers import NOBODY, SWITCH_TOP_1, SigmoidTopK, SoftmaxTopK  # noqa: E402
from reference_model.saved import recording_saved  # noqa: E402

HIDDEN, EXPERTS = 32, 8
CONTIGUOUS = tuple(range(EXPERTS))
SHUFFLED = (5, 2, 7, 0, 3, 6, 1, 4)
REPLICATED = (0, 1, 2, 0, 3, 0, 4, 5, 6, 0, 7, 2)  # expert 0 in four slots, expert 2 in two


def _layer(changes: dict[str, Any]) -> MoeLayer:
    torch.manual_seed(0)
    sizes = {"hidden": HIDDEN, "width": 48, "num_experts": EXPERTS, "router": SoftmaxTopK(top_k=2), "shared_width": 16}
    return MoeLayer(**{**sizes, **changes})


def _tokens(counts: list[int], skew: float = 0.0) -> list[torch.Tensor]:
    """Every rank's tokens; skew pulls all of them towards the first expert's router weight."""
    generator = torch.Generator().manual_seed(1)
    pull = skew * _layer({}).router_weight[0].detach()
    return [torch.randn(count, HIDDEN, generator=generator) + pull for count in counts]


def on_each_rank(
    placements: list[tuple[int, ...]], counts: list[int], skew: float, changes: dict[str, Any]
) -> list[dict[str, Any]]:
    """One result per placement, of this rank."""
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    results = []
    for slots in placements:
        layer = ExpertParallelMoe(_layer(changes), Placement.of(slots, num_ranks=num_ranks))
        x = _tokens(counts, skew)[rank].requires_grad_()
        result = layer(x)
        result.output_TH.square().sum().backward()
        layer.reduce_gradients()
        grads = {name: parameter.grad for name, parameter in layer.layer.named_parameters()}
        results.append({"output": result.output_TH.detach(), "x": x.grad, "load": result.plan.load_E, **grads})
    return results


def in_one_process(counts: list[int], skew: float, changes: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The same by the plain layer on all tokens; each source rank's drops are marked in the choice beforehand."""
    layer, x = _layer(changes), torch.cat(_tokens(counts, skew)).requires_grad_()
    choice, _ = layer.choose(x)
    shares = [type(choice)(*parts) for parts in zip(*(part.split(counts) for part in choice), strict=True)]
    kept = [_kept_of_rank(layer, share) for share in shares]
    choice = choice._replace(experts_TK=choice.experts_TK.where(torch.cat(kept), NOBODY))
    plan = plan_dispatch(choice, num_experts=EXPERTS)
    rows = layer.experts(permute(x, plan), plan.ends_E, permute_weights(choice.weights_TK, plan))
    output = combine(rows, plan)
    if layer.shared is not None:
        output = output + layer.shared(x)
    output.square().sum().backward()
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {
        "output": output.detach(),
        "x": x.grad,
        "wanted": plan.load_E,
        "dropped": int((~torch.cat(kept)).sum()),
        **grads,
    }


def _kept_of_rank(layer: MoeLayer, choice: Any) -> torch.Tensor:
    num_tokens, top_k = choice.experts_TK.shape
    places = capacity_tokens(num_tokens, top_k, EXPERTS, layer.capacity_factor)
    policy = layer.drop_policy if places < num_tokens else None
    return place_in_expert(choice, EXPERTS, policy) < places


def _error(ours: torch.Tensor, oracle: torch.Tensor) -> float:
    return float((ours - oracle).abs().max() / oracle.abs().max())


def _assert_equal(ranks: list[dict[str, Any]], oracle: dict[str, Any], slots: tuple[int, ...]) -> None:
    output, x_grad = (torch.cat([rank[name] for rank in ranks]) for name in ("output", "x"))
    if len(set(slots)) == len(slots):
        assert torch.equal(output, oracle["output"]), "the forward must be equal bit for bit"
    assert _error(output, oracle["output"]) < 1e-6
    assert _error(x_grad, oracle["x"]) < 1e-6
    for name in ("experts.w_in", "experts.w_out"):
        by_slot = torch.cat([rank[name] for rank in ranks])
        # Replicas all hold the whole gradient of their expert.
        assert _error(by_slot, oracle[name][list(slots)]) < 1e-6, name
    for name in ("router_weight", *(name for name in oracle if name.startswith("shared"))):
        for rank in ranks:
            assert _error(rank[name], oracle[name]) < 1e-6, name


CASES = {
    "dropless": {},
    "drops-by-probability": {"capacity_factor": 0.6},
    "drops-by-position": {"capacity_factor": 0.6, "drop_policy": "position", "shared_width": 0},
    "sigmoid": {"router": SigmoidTopK(top_k=3, num_groups=4, top_groups=2)},
    "switch": {"router": SWITCH_TOP_1, "activation": "relu", "capacity_factor": 1.0, "drop_policy": "position"},
    "loop": {"path": "loop"},
    "recomputed": {"recompute": ("moe_act",)},
}


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("name", list(CASES))
def test_ranks_together_equal_the_layer_in_one_process(name: str, num_ranks: int) -> None:
    counts, changes = [96 // num_ranks] * num_ranks, CASES[name]
    placements = [CONTIGUOUS, SHUFFLED, REPLICATED]
    by_rank = run_on_ranks(on_each_rank, num_ranks, placements, counts, 0.0, changes)
    oracle = in_one_process(counts, 0.0, changes)
    assert (oracle["dropped"] > 0) == ("capacity_factor" in changes)
    for slots, ranks in zip(placements, zip(*by_rank, strict=True), strict=True):
        _assert_equal(list(ranks), oracle, slots)


@pytest.mark.slow  # a checkpoint imports torch's compiler, in every process: seconds
@pytest.mark.parametrize("recompute", ["full", ("moe_act", "shared_experts")], ids=str)
def test_ranks_recompute_whole_layers_with_their_exchanges_or_parts_of_them(recompute: Any) -> None:
    by_rank = run_on_ranks(on_each_rank, 2, [REPLICATED], [48, 48], 0.0, {"recompute": recompute})
    _assert_equal([rank[0] for rank in by_rank], in_one_process([48, 48], 0.0, {}), REPLICATED)


def _bf16_output(slots: tuple[int, ...]) -> torch.Tensor:
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    layer = ExpertParallelMoe(_layer({"dtype": torch.bfloat16}), Placement.of(slots, num_ranks=num_ranks))
    return layer(_tokens([48, 48])[rank].bfloat16()).output_TH.detach()


def test_bf16_rows_travel_too() -> None:
    together = torch.cat(run_on_ranks(_bf16_output, 2, SHUFFLED))
    oracle = _layer({"dtype": torch.bfloat16})(torch.cat(_tokens([48, 48])).bfloat16()).output_TH
    # A unit in the last place of bf16, where a product of other rows may round the other way.
    torch.testing.assert_close(together, oracle, rtol=2**-7, atol=2**-7)


def test_uneven_tokens_and_ranks_that_receive_or_send_nothing_change_no_result() -> None:
    # All tokens go to experts of rank 0; rank 1 has none of its own.
    counts, changes = [40, 0, 17, 39], {"router": SWITCH_TOP_1}
    by_rank = run_on_ranks(on_each_rank, 4, [CONTIGUOUS], counts, 40.0, changes)
    (ranks,) = zip(*by_rank, strict=True)
    load = torch.stack([rank["load"] for rank in ranks])
    assert load.sum(1).tolist() == counts
    assert load[:, 2:].sum() == 0, "the case must leave ranks without rows"
    _assert_equal(list(ranks), in_one_process(counts, 40.0, changes), CONTIGUOUS)


def test_replicas_share_the_tokens_of_their_expert_evenly() -> None:
    by_rank = run_on_ranks(on_each_rank, 2, [REPLICATED], [48, 48], 0.0, {})
    load_S = sum(rank[0]["load"] for rank in by_rank)
    shares = load_S[[slot for slot, expert in enumerate(REPLICATED) if expert == 0]]
    assert int(shares.sum()) > 8
    assert int(shares.max() - shares.min()) <= 2, "each of two source ranks deals to them in turn"


def saved_on_each_rank(counts: list[int], skew: float, changes: dict[str, Any]) -> tuple[int, list[tuple[str, int]]]:
    """(rows received, (precision, bytes) of every storage kept for the backward) of this rank."""
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    layer = ExpertParallelMoe(_layer(changes), Placement.of(CONTIGUOUS, num_ranks=num_ranks))
    x = _tokens(counts, skew)[rank].to(layer.layer.experts.w_in.dtype).requires_grad_()
    with recording_saved(besides=layer.parameters()) as saved:
        result = layer(x)
    load_S = result.plan.load_E.clone()
    torch.distributed.all_reduce(load_S)
    result.output_TH.sum().backward()
    held = layer.placement.slots_of_rank(rank)
    return int(load_S[list(held)].sum()), [(str(kept.dtype), kept.num_bytes) for kept in saved.storages]


def _timed() -> tuple[list[dict[str, float]], float]:
    rank = torch.distributed.get_rank()
    layer = ExpertParallelMoe(_layer({}), Placement.of(CONTIGUOUS, num_ranks=2))
    clock, x = PhaseClock(device=torch.device("cpu")), _tokens([400, 40])[rank]
    with torch.no_grad():
        layer(x)
        layer(x, clock)
    return phase_table(clock), sum(clock.seconds.values())


def test_every_rank_sees_every_ranks_phases_and_the_idle_rank_its_wait() -> None:
    (table, total_s), (same_table, _) = run_on_ranks(_timed, 2)
    assert table == same_table
    for row in table:
        assert tuple(row) == PHASES
        assert all(seconds >= 0.0 for seconds in row.values())
        assert min(row["router"], row["dispatch_wire"], row["experts"]) > 0.0
    assert sum(table[0].values()) == pytest.approx(total_s)


@pytest.mark.parametrize(
    ("slots", "num_ranks", "says"),
    [((0, 1, 2), 2, "3 slots do not divide among 2 ranks"), ((0, 2), 1, "every expert from 0 to 2 needs a slot")],
)
def test_a_placement_that_cannot_be_is_refused(slots: tuple[int, ...], num_ranks: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Placement.of(slots, num_ranks=num_ranks)


def _fails_on_rank_one() -> None:
    if torch.distributed.get_rank() == 1:
        raise RuntimeError("rank one gave up")
    torch.distributed.barrier()


def test_an_error_on_one_rank_ends_all_of_them_and_is_raised_here() -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 of 2:[\s\S]*rank one gave up"):
        run_on_ranks(_fails_on_rank_one, 2, limit_s=30.0)


def _on_the_gpu() -> tuple[torch.Tensor, torch.Tensor, list[dict[str, float]]]:
    num_ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    changes = {"hidden": 128, "width": 256, "device": "cuda", "dtype": torch.bfloat16}
    layer = ExpertParallelMoe(_layer(changes), Placement.of(SHUFFLED, num_ranks=num_ranks))
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(num_ranks, 96, 128, device="cuda", generator=generator).bfloat16()
    clock = PhaseClock(device=torch.device("cuda"))
    ours = layer(x[rank], clock).output_TH
    return ours.detach().cpu(), _layer(changes)(x[rank]).output_TH.detach().cpu(), phase_table(clock)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none")
def test_ranks_with_a_gpu_each_exchange_by_nccl() -> None:
    num_ranks = max(count for count in (1, 2, 4, 8) if count <= torch.cuda.device_count())
    for ours, oracle, table in run_on_ranks(_on_the_gpu, num_ranks, backend="nccl"):
        torch.testing.assert_close(ours, oracle, rtol=2**-6, atol=2**-6)
        assert all(row["experts"] > 0.0 for row in table)
