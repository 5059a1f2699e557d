"""On a GPU the transformer holds after its forward what the formula says; and the tool that times layers runs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")

from moesim.cost.activations import head_tensors, layer_tensors  # noqa: E402
from moesim.cost.recompute import kept_tensors  # noqa: E402
from moesim.cost.software import REFERENCE  # noqa: E402
from moesim.describe.model import Ffn, GroupedQueryAttention, Layer, Model, MoeFfn  # noqa: E402
from moesim.describe.model import Router as DescribedRouter  # noqa: E402
from moesim.describe.parallel import Parallelism  # noqa: E402
from moesim.describe.workload import Training  # noqa: E402
from reference_model import timing  # noqa: E402
from reference_model.routers import SoftmaxTopK  # noqa: E402
from reference_model.shapes import CPU_SMALL  # noqa: E402
from reference_model.transformer import MoeConfig, Recompute, TransformerConfig, build  # noqa: E402

SEQUENCES, SEQ_LEN = 4, 1024
TOKENS = SEQUENCES * SEQ_LEN
CONFIG = TransformerConfig(
    hidden=1024,
    num_layers=4,
    num_heads=16,
    num_kv_heads=4,
    head_dim=64,
    dense_width=2816,
    vocab=4096,
    moe=MoeConfig(num_experts=16, width=704, router=SoftmaxTopK(top_k=4)),
)


def _formula_bytes(recompute: Recompute) -> float:
    """What the layers keep, with the final norm's input and output, and the logits in bf16 that the model gives."""
    attention = GroupedQueryAttention(num_heads=16, num_kv_heads=4, head_dim=64)
    moe = MoeFfn(num_experts=16, expert=Ffn(width=704), router=DescribedRouter(top_k=4))
    layers = tuple(Layer(attention=attention, ffn=moe if i in CONFIG.moe_layers else Ffn(width=2816)) for i in range(4))
    model = Model(name="test", hidden=1024, vocab=4096, layers=layers)
    train = Training(recompute=recompute if isinstance(recompute, str) else ",".join(recompute))
    count = {"token": TOKENS, "assignment": TOKENS * 4}
    kept = [
        tensor
        for layer in layers
        for tensor in kept_tensors(layer_tensors(model, layer, Parallelism(), REFERENCE), layer, train, tp=1)
    ]
    norm = [tensor for tensor in head_tensors(model, Parallelism(), REFERENCE) if tensor.name.startswith("final norm")]
    return sum(count[tensor.per] * tensor.bytes for tensor in [*kept, *norm]) + 2.0 * TOKENS * 4096


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none")
@pytest.mark.parametrize("recompute", ["none", ("core_attn",), ("moe_act",), ("mlp", "moe"), "full"], ids=str)
def test_the_gpu_holds_what_the_formula_says_after_the_forward(recompute: Recompute) -> None:
    model = build(CONFIG, seed=0, recompute=recompute).to(device="cuda", dtype=torch.bfloat16)
    for layer in model.moe_layers().values():
        layer.router_weight.data = layer.router_weight.data.float()
    tokens_BS = torch.randint(4096, (SEQUENCES, SEQ_LEN), device="cuda")
    for _ in range(2):  # the second time nothing is allocated that stays (workspaces)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        logits_BSV = model(tokens_BS).logits_BSV
        held = torch.cuda.memory_allocated() - before
        logits_BSV.float().logsumexp(-1).mean().backward()
        model.zero_grad(set_to_none=True)
        del logits_BSV
    assert held == pytest.approx(_formula_bytes(recompute), rel=0.02)


def _tool() -> ModuleType:
    path = Path(__file__).parents[1] / "tools" / "time_layers.py"
    spec = importlib.util.spec_from_file_location("time_layers", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["time_layers"] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


def test_the_tool_times_a_layer_beside_its_products_and_transformers_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_CPU_ARENA_BYTES", (2**20, 2**20))
    tool = _tool()
    monkeypatch.setattr(tool, "EFFORT", timing.Effort(num_passes=1, min_samples=1, max_samples=1, budget_s=0.0))
    tiny = replace(CPU_SMALL, hidden=16, expert_width=16)
    times = tool.time_layer(tiny, 8, torch.device("cpu"))
    assert min(times.layer_s, times.grouped_s, times.dense_s) > 0
    assert (times.eager_s is None) == bool(times.why_none)
    assert "x its grouped products" in tool.line(times)
    nobody = tool.time_layer(replace(tiny, name="own"), 8, torch.device("cpu"))
    assert "no transformers block" in tool.line(nobody)


@pytest.mark.slow  # a quick calibration, at least a minute
def test_the_command_for_a_gpu_runs_whole_on_a_cpu_and_leaves_at_most_eight_files(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "tools" / "gpu_everything.sh"
    about = os.environ | {"DEVICE": "cpu", "OUT": str(tmp_path / "out"), "PYTHON": sys.executable}
    done = subprocess.run(["bash", str(script)], env=about, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    names = {path.name for path in (tmp_path / "out").iterdir()}
    texts = {"machine.txt", "tests.txt", "memory.txt", "layers.txt", "calibrate.txt", "goals.txt"}
    assert names == texts | {"layers.jsonl", "profile.json"}
    assert len(names) <= 8
    told = (tmp_path / "out" / "goals.txt").read_text()
    assert "reach 80%" in told
    assert "held out grouped" in told
