"""The recorder: what the model routed is what moesim reads, from the reference layer and from transformers' models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from moesim.routing.consistency import agreement_of  # noqa: E402
from moesim.routing.histogram import recorded_histogram  # noqa: E402
from moesim.routing.recorded import load_LE, read_recorded  # noqa: E402
from reference_model.expert_parallel import ExpertParallelMoe, Placement  # noqa: E402
from reference_model.layer import MoeLayer  # noqa: E402
from reference_model.ranks import run_on_ranks  # noqa: E402
from reference_model.recorder import chosen_experts, record_layers, record_transformers  # noqa: E402
from reference_model.routers import GshardTop2, SoftmaxTopK  # noqa: E402

EXPERTS, TOP_K = 8, 2


def two_layers(top_k: int = TOP_K) -> Any:
    """A model of two reference layers, one after the other."""
    torch.manual_seed(0)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = {"hidden": 16, "width": 24, "num_experts": EXPERTS}
            self.layers = torch.nn.ModuleList(MoeLayer(router=SoftmaxTopK(top_k=top_k), **sizes) for _ in range(2))

        def forward(self, x_TH: Any) -> list[Any]:
            results = []
            for layer in self.layers:
                results.append(layer(x_TH))
                x_TH = x_TH + results[-1].output_TH
            return results

    return Model()


def test_what_the_reference_layers_routed_is_what_moesim_reads(tmp_path: Path) -> None:
    model = two_layers()
    loads = []
    with record_layers(model) as recorder:
        for step, num_tokens in enumerate((50, 70)):
            results = model(torch.randn(num_tokens, 16, generator=torch.Generator().manual_seed(step)))
            recorder.end_step()
            loads.append([result.plan.load_E.tolist() for result in results])  # counted by the layer's own dispatch
    recorder.write(tmp_path / "trace.npz")
    recorded = read_recorded(tmp_path / "trace.npz")
    assert (recorded.num_experts, recorded.top_k, recorded.layers) == (EXPERTS, TOP_K, (0, 1))
    assert recorded_histogram(recorded).tokens_SLE.tolist() == loads
    recorder.write(tmp_path / "trace.npy")
    assert np.array_equal(load_LE(read_recorded(tmp_path / "trace.npy", num_experts=EXPERTS)), np.sum(loads, axis=0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trace.npy", "trace.npz"]


def test_choices_are_recorded_before_capacity_drops_them() -> None:
    torch.manual_seed(0)
    layer = MoeLayer(hidden=16, width=24, num_experts=EXPERTS, router=SoftmaxTopK(top_k=TOP_K), capacity_factor=0.5)
    with record_layers(layer) as recorder:
        result = layer(torch.randn(64, 16))
        ids = recorder.end_step()
    assert int(result.plan.load_E.sum()) < 64 * TOP_K == ids.size


def test_the_same_input_twice_routes_the_same(tmp_path: Path) -> None:
    model = two_layers()
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    for name in ("a.npz", "b.npz"):
        with record_layers(model) as recorder:
            model(x)
            recorder.end_step()
        recorder.write(tmp_path / name)
    same = agreement_of(read_recorded(tmp_path / "a.npz"), read_recorded(tmp_path / "b.npz"))
    assert same.exact_L.tolist() == [1.0, 1.0]


def test_masked_tokens_are_left_out() -> None:
    model = two_layers()
    x = torch.randn(6, 16)
    keep = torch.tensor([[1, 1, 0], [1, 0, 0]])
    with record_layers(model) as recorder:
        model(x)
        whole = recorder.end_step()
        model(x)
        assert np.array_equal(recorder.end_step(keep=keep), whole[[0, 1, 3]])
        model(x)
        with pytest.raises(ValueError, match="keep has 3 entries for 6 tokens"):
            recorder.end_step(keep=keep[0])


def test_steps_that_were_not_closed_or_not_run_are_errors() -> None:
    model = two_layers()
    with record_layers(model) as recorder:
        with pytest.raises(ValueError, match=r"layers \[0, 1\] did not run in this step"):
            recorder.end_step()
        model(torch.randn(4, 16))
        with pytest.raises(ValueError, match="layer 0 ran twice in a step: call end_step"):
            model(torch.randn(4, 16))
    with pytest.raises(ValueError, match="no MoE layer"), record_layers(torch.nn.Linear(2, 2)):
        pass
    with pytest.raises(ValueError, match=r"ends in \.npz or \.npy"):
        recorder.write("trace.pt")


def test_tokens_with_fewer_experts_are_refused_and_gshard_records_in_eval_mode() -> None:
    torch.manual_seed(0)
    layer = MoeLayer(hidden=16, width=24, num_experts=EXPERTS, router=GshardTop2())
    with record_layers(layer) as recorder:
        with pytest.raises(ValueError, match=r"layer 0 gave some tokens fewer than 2 experts.*in eval mode"):
            layer.train()(torch.randn(64, 16))
        layer.eval()(torch.randn(64, 16))
        assert recorder.end_step().min() >= 0


def test_a_layer_that_is_recomputed_is_recorded_once() -> None:
    torch.manual_seed(0)
    layer = MoeLayer(hidden=16, width=24, num_experts=EXPERTS, router=SoftmaxTopK(top_k=TOP_K), recompute="full")
    with record_layers(layer) as recorder:
        layer(torch.randn(8, 16, requires_grad=True)).output_TH.sum().backward()
        assert recorder.end_step().shape == (8, 1, TOP_K)


def test_hooks_are_gone_after_recording() -> None:
    model = two_layers()
    with record_layers(model) as recorder:
        model(torch.randn(4, 16))
        recorder.end_step()
    model(torch.randn(4, 16))
    assert len(recorder.steps) == 1
    assert not any(layer._forward_hooks for layer in model.layers)


def test_ids_are_ordered_by_weight_and_unknown_outputs_are_refused() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]])
    ids, weights = torch.tensor([[2, 1]]), torch.tensor([[0.2, 0.8]])
    assert chosen_experts((logits, weights, ids), num_experts=4, top_k=2).tolist() == [[1, 2]]
    assert chosen_experts((ids, weights), num_experts=4, top_k=2).tolist() == [[1, 2]]
    assert chosen_experts(logits, num_experts=4, top_k=2).tolist() == [[1, 2]]
    with pytest.raises(ValueError, match="one tensor of ids"):
        chosen_experts((logits, weights), num_experts=4, top_k=2)
    with pytest.raises(ValueError, match="a router's logits are"):
        chosen_experts(logits[:, :3], num_experts=4, top_k=2)


TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2} | {
    "vocab_size": 64,
    "intermediate_size": 48,
    "num_experts_per_tok": TOP_K,
}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": EXPERTS},
    "qwen3_moe": {"num_experts": EXPERTS, "moe_intermediate_size": 24, "head_dim": 8, "mlp_only_layers": [1]},
    "olmoe": {"num_experts": EXPERTS},
}
LAYERS = {"mixtral": (0, 1, 2), "qwen3_moe": (0, 2), "olmoe": (0, 1, 2)}


def tiny(kind: str, **changes: Any) -> Any:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**TINY, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, weight in model.named_parameters():  # some routers start at zero, where all experts tie
        if name.endswith(("gate.weight", "router.weight")):
            torch.nn.init.normal_(weight, std=1.0)
    return model


@pytest.mark.hf
@pytest.mark.parametrize("kind", sorted(MODELS))
def test_a_transformers_model_is_recorded_as_its_router_logits_say(tmp_path: Path, kind: str) -> None:
    model = tiny(kind, **MODELS[kind])
    tokens = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, 6:] = 0
    with torch.no_grad(), record_transformers(model) as recorder:
        logits = model(tokens, attention_mask=mask, output_router_logits=True).router_logits
        recorder.end_step(keep=mask)
    recorder.write(tmp_path / "trace.npz")
    recorded = read_recorded(tmp_path / "trace.npz")
    assert (recorded.num_experts, recorded.layers, recorded.num_tokens) == (EXPERTS, LAYERS[kind], 15)
    wanted = np.stack(
        [chosen_experts(layer, num_experts=EXPERTS, top_k=TOP_K).numpy() for layer in logits if layer is not None],
        axis=1,
    )
    assert np.array_equal(next(recorded.chunks()).experts_TLK, wanted[mask.reshape(-1).bool().numpy()])
    assert (load_LE(recorded) > 0).sum() > 2 * TOP_K  # experts differ between tokens: nothing was constant


@pytest.mark.hf
def test_a_group_limited_router_is_recorded_by_its_own_ids() -> None:
    changes = {"n_routed_experts": EXPERTS, "n_group": 4, "topk_group": 1, "first_k_dense_replace": 1} | {
        "moe_intermediate_size": 24,
        "n_shared_experts": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    }
    model = tiny("deepseek_v3", **changes)
    with torch.no_grad(), record_transformers(model) as recorder:
        model(torch.randint(64, (1, 40), generator=torch.Generator().manual_seed(0)))
        ids = recorder.end_step()
    assert recorder.layers == (1, 2)
    # One group of two experts is allowed: a token's two choices are the group, which plain top-2 would often break.
    assert np.array_equal(ids[:, :, 0] // 2, ids[:, :, 1] // 2)


@pytest.mark.hf
def test_a_dense_transformers_model_has_nothing_to_record() -> None:
    with pytest.raises(ValueError, match="not a Mixture-of-Experts model"), record_transformers(tiny("llama")):
        pass


def _recorded_by_rank(counts: list[int]) -> torch.Tensor:
    torch.manual_seed(0)
    layer = MoeLayer(hidden=16, width=8, num_experts=4, router=SoftmaxTopK(top_k=2))
    x = torch.randn(sum(counts), 16)
    rank = torch.distributed.get_rank()
    group = torch.nn.Sequential(ExpertParallelMoe(layer, Placement.of([2, 0, 3, 1], num_ranks=len(counts))))
    with record_layers(group) as recorder:
        group(x.split(counts)[rank])
        recorder.end_step()
    return torch.from_numpy(recorder.experts_TLK)


def test_ranks_of_a_layer_together_record_what_the_layer_in_one_process_chooses() -> None:
    by_rank = run_on_ranks(_recorded_by_rank, 2, [5, 3])
    assert [len(part) for part in by_rank] == [5, 3]
    torch.manual_seed(0)
    layer = MoeLayer(hidden=16, width=8, num_experts=4, router=SoftmaxTopK(top_k=2))
    with record_layers(layer) as recorder:
        layer(torch.randn(8, 16))
        recorder.end_step()
    assert torch.cat(by_rank).tolist() == recorder.experts_TLK.tolist()
