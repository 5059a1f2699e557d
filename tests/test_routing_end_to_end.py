"""End to end: real text through a torch MoE, its routing recorded, fed back, experts placed, the report read.

Legend: T tokens, L MoE layers, K experts per token, E experts, H hidden.

The text is Python's own library, byte by byte; the models' weights are random, their sizes those of a preset in all
that routing sees (layers, experts, experts per token) and tiny in the rest. Nothing is trained or downloaded.
"""

from __future__ import annotations

import argparse
import inspect
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moesim import Scenario, simulate
from moesim.report import routing_sentences
from moesim.routing.capacity import limit_of
from moesim.routing.drops import keep_choices
from moesim.routing.histogram import read_histogram
from moesim.routing.recorded import load_LE, read_recorded
from moesim.study.routing import RoutingStudy, routing_study
from tests.test_cli_runs import answer

torch = pytest.importorskip("torch")

from moesim.describe.workload import Megatron  # noqa: E402
from reference_model.layer import MoeLayer  # noqa: E402
from reference_model.recorder import record_layers, record_transformers  # noqa: E402
from reference_model.routers import SoftmaxTopK  # noqa: E402

LAYERS, EXPERTS, TOP_K = 16, 64, 8  # olmoe-1b-7b
STEPS, STEP_TOKENS, HIDDEN = 4, 512, 48
SIZES = {"model": "olmoe-1b-7b", "cluster": "h100-8x-ib400", "num_gpus": 16, "ep": 8, "pp": 2, "seq_len": 2048}
SIZES |= {"global_batch": 64, "micro_batch": 2}
OPTIONS = [text for name, value in SIZES.items() for text in ("--" + name.replace("_", "-"), str(value))]
FACTOR = 1.25


def text_bytes(num_bytes: int) -> Any:
    """Source text of two modules as token ids 0..255."""
    text = "".join(inspect.getsource(module) for module in (argparse, tarfile)).encode()[:num_bytes]
    assert len(text) == num_bytes
    return torch.tensor(list(text))


class TinyMoe(torch.nn.Module):
    """Byte embedding, then L times: a mean over the last tokens, and a reference MoE layer; each beside a residual."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(256, HIDDEN)
        sizes = {"hidden": HIDDEN, "width": 8, "num_experts": EXPERTS, "router": SoftmaxTopK(top_k=TOP_K)}
        kept = {"capacity_factor": FACTOR, "drop_policy": "position"}
        self.layers = torch.nn.ModuleList(MoeLayer(**sizes, **kept) for _ in range(LAYERS))

    def forward(self, ids_T: Any) -> list[Any]:
        x_TH, results = self.embedding(ids_T), []
        for layer in self.layers:
            before = [torch.nn.functional.pad(x_TH, (0, 0, i, 0))[: len(x_TH)] for i in range(1, 4)]
            x_TH = torch.nn.functional.layer_norm(x_TH + 0.3 * sum(before), (HIDDEN,))
            results.append(layer(x_TH))
            x_TH = x_TH + results[-1].output_TH
        return results


class Recorded:
    """A recording, and what the model itself counted while it ran."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "trace.npz"
        self.chosen_LE = np.zeros((LAYERS, EXPERTS), dtype=np.int64)
        self.kept_SLE = np.zeros((STEPS, LAYERS, EXPERTS), dtype=np.int64)
        model, ids = TinyMoe().eval(), text_bytes(STEPS * STEP_TOKENS)
        with torch.no_grad(), record_layers(model) as recorder:
            for step, ids_T in enumerate(ids.split(STEP_TOKENS)):
                for layer, result in enumerate(model(ids_T)):
                    for expert in result.choice.experts_TK.flatten().tolist():  # one by one, to share no counting
                        self.chosen_LE[layer, expert] += 1
                    self.kept_SLE[step, layer] = result.plan.load_E.numpy()
                recorder.end_step()
        recorder.write(self.path)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return Recorded(tmp_path_factory.mktemp("recorded"))


def even_and_recorded(recorded: Recorded, **more: Any) -> tuple[Any, Any]:
    asked = Scenario.make(**SIZES, **more)
    return simulate(asked.with_(popularity="balanced")), simulate(asked.with_(recording=str(recorded.path)))


def test_real_text_leaves_experts_uneven(recorded: Recorded) -> None:
    assert recorded.chosen_LE.sum() == STEPS * STEP_TOKENS * LAYERS * TOP_K
    ratio_LE = recorded.chosen_LE / recorded.chosen_LE.mean(axis=1, keepdims=True)
    assert ratio_LE.max(axis=1).min() > 2.0
    dropped = 1 - recorded.kept_SLE.sum() / recorded.chosen_LE.sum()
    assert dropped > 0.1


def test_moesim_reports_the_models_own_counts_token_for_token(recorded: Recorded, tmp_path: Path) -> None:
    out = ["--recorded", str(recorded.path), "--out", str(tmp_path)]
    found = answer("route", *OPTIONS, *out)["result"]
    assert found["recording"]["counts_LE"] == recorded.chosen_LE.tolist()
    assert found["recording"]["num_tokens"] == STEPS * STEP_TOKENS
    assert found["recording"]["num_steps"] == STEPS
    # Text repeats itself, so routing does.
    assert found["recording"]["first_repeat"] > found["recording"]["first_repeat_chance"]
    # The step that is planned from it is drawn: far more tokens, each expert's share within sampling of the recorded.
    share_LE = recorded.chosen_LE / recorded.chosen_LE.sum(axis=1, keepdims=True)
    tokens = SIZES["global_batch"] * SIZES["seq_len"]  # type: ignore[operator]
    spread_LE = np.sqrt(share_LE * TOP_K / tokens) / TOP_K + 2e-6
    assert (np.abs(np.array(found["load_LE"]) - share_LE) / spread_LE).max() < 5.0
    drawn = read_histogram(tmp_path / "histogram.csv", num_experts=EXPERTS)
    assert drawn.load_LE.sum() == tokens * TOP_K * LAYERS


def test_moesim_drops_the_copies_that_the_model_dropped(recorded: Recorded) -> None:
    limit = limit_of(
        Megatron(),
        capacity_factor=FACTOR,
        tokens_per_rank=STEP_TOKENS,
        num_source_ranks=1,
        num_experts=EXPERTS,
        top_k=TOP_K,
    )
    experts_TLK = np.concatenate([chunk.experts_TLK for chunk in read_recorded(recorded.path).chunks()])
    for step, step_TLK in enumerate(np.split(experts_TLK, STEPS)):
        for layer in range(LAYERS):
            served = keep_choices(np.ascontiguousarray(step_TLK[:, layer]), limit, "position")
            kept_E = np.bincount(served[served >= 0], minlength=EXPERTS)
            assert np.array_equal(kept_E, recorded.kept_SLE[step, layer])


def test_recorded_skew_lengthens_the_step_and_raises_its_memory(recorded: Recorded) -> None:
    even, skewed = even_and_recorded(recorded)
    assert skewed.step_s > 1.05 * even.step_s
    assert skewed.wait_s > even.wait_s
    assert skewed.memory["peak_bytes"] > 1.01 * even.memory["peak_bytes"]
    assert skewed.drop_fraction == even.drop_fraction == 0.0


def test_a_capacity_factor_trades_time_and_memory_for_drops_only_where_load_is_uneven(recorded: Recorded) -> None:
    even, skewed = even_and_recorded(recorded, capacity_factor=FACTOR)
    _, dropless = even_and_recorded(recorded)
    assert even.drop_fraction == 0.0
    # The model dropped by position in batches of 512 tokens; a planned rank brings 4,096 at the same factor.
    own = 1 - recorded.kept_SLE.sum() / recorded.chosen_LE.sum()
    assert skewed.drop_fraction == pytest.approx(own, abs=0.05)
    assert skewed.step_s < dropless.step_s
    assert skewed.memory["peak_bytes"] < dropless.memory["peak_bytes"]


def test_placing_the_recorded_experts_wins_time_and_memory_back(recorded: Recorded, tmp_path: Path) -> None:
    even, contiguous = even_and_recorded(recorded)
    asked = ["--recording", str(recorded.path)]
    found = answer("place", *OPTIONS, *asked, "--policy", "search", "--out", str(tmp_path))["result"]
    assert np.mean(found["max_mean"]) < 0.9 * np.mean(found["contiguous_max_mean"])
    assert (np.array(found["max_mean"]) >= np.array(found["lower_bound"]) - 1e-9).all()
    placed = answer("simulate", *OPTIONS, *asked, "--set", "placement.policy=search")["result"]
    assert even.step_s < placed["step_s"] < contiguous.step_s
    assert placed["memory"]["peak_bytes"] < contiguous.memory["peak_bytes"]
    assert placed["gini"] == pytest.approx(contiguous.gini, abs=1e-6)  # experts moved; who is popular did not


@pytest.fixture(scope="module")
def study(recorded: Recorded) -> RoutingStudy:
    asked = Scenario.make(**SIZES, capacity_factor=FACTOR, recording=str(recorded.path))
    return routing_study(asked, num_steps=2)


def test_the_report_tells_it(recorded: Recorded, study: RoutingStudy) -> None:
    even = next(p for p in study.over_skew if p.popularity == "balanced" and p.capacity_factor is None)
    asked = {p.capacity_factor: p for p in study.over_skew if p.popularity == "asked"}
    assert asked[None].step_s > even.step_s
    assert asked[None].peak_bytes > even.peak_bytes
    assert asked[FACTOR].drop_fraction > 0.1 > even.drop_fraction == 0.0
    longer = asked[None].step_s / even.step_s - 1
    assert f"makes the step {longer:.1%} longer than even routing" in routing_sentences.about_skew(study).text
    assert f"drops {study.load.drop_fraction:.1%} of all" in routing_sentences.about_drops(study).text
    said = routing_sentences.about_recording(study).text
    assert said.startswith(f"4 steps were recorded, {STEPS * STEP_TOKENS:,} tokens")
    assert study.recording is not None
    assert study.recording.counts_LE == tuple(tuple(row) for row in recorded.chosen_LE.tolist())
    assert str(recorded.path) in routing_sentences.verdict(study).subject


@pytest.mark.hf
def test_a_hugging_face_models_router_logits_plan_its_preset(tmp_path: Path) -> None:
    """A Mixtral of random weights with the preset's 32 layers of 8 experts, top-2, and 32 hidden numbers."""
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "mixtral",
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        vocab_size=256,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, weight in model.named_parameters():
        if name.endswith("gate.weight"):
            torch.nn.init.normal_(weight, std=1.0)
    ids = text_bytes(4 * 128).reshape(4, 128)
    with torch.no_grad(), record_transformers(model) as recorder:
        logits = model(ids, output_router_logits=True).router_logits
        recorder.end_step()
    recorder.write(tmp_path / "mixtral.npz")
    counts_LE = _counts_of_logits(logits)
    assert np.array_equal(load_LE(read_recorded(tmp_path / "mixtral.npz")), counts_LE)
    sizes = ["--model", "mixtral-8x7b", "--cluster", "h100-8x-ib400", "--num-gpus", "32", "--ep", "8", "--pp", "4"]
    sizes += ["--seq-len", "1024", "--global-batch", "64", "--recompute", "full"]
    asked = [*sizes, "--recording", str(tmp_path / "mixtral.npz")]
    found = answer("route", *asked)["result"]
    assert found["recording"]["counts_LE"] == counts_LE.tolist()
    even = answer("simulate", *sizes, "--popularity", "balanced")["result"]
    skewed = answer("simulate", *asked)["result"]
    assert skewed["step_s"] > even["step_s"]
    assert skewed["max_mean_load"] == pytest.approx(
        float((counts_LE.max(axis=1) / counts_LE.mean(axis=1)).max()), rel=0.05
    )


def _counts_of_logits(logits: Any) -> NDArray[np.int64]:
    """Counts of the top two of each layer's logits, by sorting."""
    best = [np.argsort(-layer_TE.float().numpy(), axis=1, kind="stable")[:, :2].ravel().tolist() for layer_TE in logits]
    return np.array([[row.count(expert) for expert in range(8)] for row in best])
