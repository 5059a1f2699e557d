"""A step's peak of memory is what the formulas predict, within 2 %, however it recomputes; on a CPU at small sizes.

Two percent: what no formula has is there too (token ids, counts, the products' own workspaces).
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch.nn import functional  # noqa: E402

from reference_model.losses import token_loss  # noqa: E402


@pytest.fixture(scope="module")
def tool() -> Any:
    path = Path(__file__).parents[1] / "tools" / "check_memory.py"
    spec = importlib.util.spec_from_file_location("check_memory", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_memory"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("recompute", ["none", ("moe_act",), "full"], ids=str)
def test_a_layers_peak_is_what_it_keeps_and_the_gradient_of_its_activations_input(tool: Any, recompute: Any) -> None:
    peak = tool.layer_peak(tool.SMALL, recompute, torch.device("cpu"))
    assert abs(peak.error_fraction) < tool.GOAL_FRACTION, tool.line(peak)


MODULES = ("core_attn", "mla_up_proj", "mlp", "moe", "moe_act", "layernorm", "shared_experts")
FEW = [("grouped", "none"), ("grouped", ("moe",)), ("latent", MODULES), ("latent", "full")]
ALL = [(kind, option) for kind in ("grouped", "latent") for option in ("none", *((m,) for m in MODULES), "full")]


@pytest.mark.parametrize(
    ("kind", "recompute"), [*FEW, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL)], ids=str
)
def test_a_transformers_peak_is_what_the_simulator_says_of_a_stage_that_holds_it(
    tool: Any, kind: str, recompute: Any
) -> None:
    peak = tool.transformer_peak(tool.SMALL, kind, recompute, torch.device("cpu"))
    assert abs(peak.error_fraction) < tool.GOAL_FRACTION, tool.line(peak)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none")
def test_every_peak_on_a_gpu_is_within_two_percent_of_the_allocators(tool: Any) -> None:
    peaks = tool.all_peaks(tool.Sizes(), torch.device("cuda"))
    beyond = [tool.line(peak) for peak in peaks if abs(peak.error_fraction) > tool.GOAL_FRACTION]
    assert not beyond, "\n".join(beyond)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_lean_loss_is_torchs_in_value_and_gradient(dtype: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_TV = 20.0 * torch.randn(7, 50, generator=generator)
    target_T = torch.randint(50, (7,), generator=generator)
    mine, torchs = (logits_TV.to(dtype).requires_grad_() for _ in range(2))
    loss_T = token_loss(mine, target_T)
    wanted_T = functional.cross_entropy(torchs.float(), target_T, reduction="none")
    torch.testing.assert_close(loss_T, wanted_T, rtol=1e-5, atol=1e-5)
    direction_T = torch.randn(7, generator=generator)
    loss_T.backward(direction_T)
    wanted_T.backward(direction_T)
    torch.testing.assert_close(mine.grad, torchs.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
