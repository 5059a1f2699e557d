"""Time whole MoE layers against their grouped products, the dense rate, and transformers' blocks, in one run.

``python tools/time_layers.py --device cuda --model mixtral-8x7b --tokens 4096 16384``; forward only, bf16 on a GPU,
float32 on a CPU. Needs torch and numpy; without transformers 5 its blocks are left out, and the line says so.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from reference_model.cases import Case, prepare_case
from reference_model.devices import find_device
from reference_model.layer import MoeLayer
from reference_model.routers import SigmoidTopK, SoftmaxTopK
from reference_model.shapes import NAMED_SHAPES, LayerShapes
from reference_model.timing import Arena, Call, Effort, arena_bytes, sample_times_s

EFFORT = Effort(num_passes=1, min_samples=10, max_samples=30, budget_s=0.2, num_warmups=5)
_MANY_TOKENS = 16384
BLOCKS = {  # module and block of transformers, its configuration
    "mixtral-8x7b": ("mixtral", "MixtralSparseMoeBlock", "MixtralConfig"),
    "qwen3-30b-a3b": ("qwen3_moe", "Qwen3MoeSparseMoeBlock", "Qwen3MoeConfig"),
    "deepseek-v3": ("deepseek_v3", "DeepseekV3MoE", "DeepseekV3Config"),
    "cpu-small": ("mixtral", "MixtralSparseMoeBlock", "MixtralConfig"),
}


@dataclass(frozen=True, kw_only=True)
class Times:
    """Median seconds of one layer's forward and of what it is compared with; None: not there."""

    model: str
    tokens: int
    num_experts: int
    layer_s: float
    grouped_s: float  # its two grouped products, evenly loaded
    dense_s: float  # two dense products of as many rows, experts or not
    eager_s: float | None
    grouped_mm_s: float | None
    why_none: str


def time_layer(shape: LayerShapes, tokens: int, device: torch.device) -> Times:
    """The layer of these sizes with its layer_experts experts, on this many tokens."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden, width, count, rows = shape.hidden, shape.expert_width, shape.layer_experts, tokens * shape.top_k
    weights = 3 * count * hidden * width * dtype.itemsize
    arena = Arena(device, dtype, arena_bytes(device, weights // 2 + 4 * rows * max(hidden, 2 * width)))

    def median_s(prepare: Callable[[], Call]) -> float:
        return float(np.median(sample_times_s(prepare, device, EFFORT)))

    def product_s(kind: str, size: int, active: int, width_in: int, width_out: int) -> float:
        case = Case(kind=kind, size=size, num_active=active, width_in=width_in, width_out=width_out)
        return median_s(prepare_case(case, arena))

    pairs = ((hidden, 2 * width), (width, hidden))
    grouped_s = sum(product_s("grouped", -(-rows // count), count, i, o) for i, o in pairs)
    dense_s = sum(product_s("dense", rows, 1, i, o) for i, o in pairs)
    sigmoid = shape.name == "deepseek-v3"
    router = SigmoidTopK(top_k=shape.top_k, num_groups=8, top_groups=4) if sigmoid else SoftmaxTopK(top_k=shape.top_k)
    layer = MoeLayer(
        hidden=hidden,
        width=width,
        num_experts=count,
        router=router,
        shared_width=width if sigmoid else 0,
        device=device,
        dtype=dtype,
    )
    whole = (tokens, hidden)
    layer_s = median_s(_forward(lambda x_TH: layer(x_TH).output_TH, whole, arena))
    eager_s, grouped_mm_s, why = None, None, ""
    try:
        eager, grouped = (_block(shape, name).to(device=device, dtype=dtype) for name in ("eager", "grouped_mm"))
        eager_s = median_s(_forward(lambda x_TH: eager(x_TH[None]), whole, arena))
        grouped_mm_s = median_s(_forward(lambda x_TH: grouped(x_TH[None]), whole, arena))
    except (ImportError, AttributeError, KeyError) as error:
        why = f"no transformers block: {error}"
    return Times(
        model=shape.name,
        tokens=tokens,
        num_experts=count,
        layer_s=layer_s,
        grouped_s=grouped_s,
        dense_s=dense_s,
        eager_s=eager_s,
        grouped_mm_s=grouped_mm_s,
        why_none=why,
    )


def _forward(run: Callable[[torch.Tensor], Any], size: tuple[int, int], arena: Arena) -> Callable[[], Call]:
    def prepare() -> Call:
        x_TH = arena.take(*size)
        return torch.no_grad()(lambda: run(x_TH))

    return prepare


def _block(shape: LayerShapes, implementation: str) -> torch.nn.Module:
    """transformers' block of the same sizes, its weights small and random."""
    module_name, block_name, config_name = BLOCKS[shape.name]
    transformers = importlib.import_module("transformers")
    module = importlib.import_module(f"transformers.models.{module_name}.modeling_{module_name}")
    sizes = {"hidden_size": shape.hidden, "num_experts_per_tok": shape.top_k, "num_hidden_layers": 1}
    if module_name == "mixtral":
        sizes |= {"intermediate_size": shape.expert_width, "num_local_experts": shape.layer_experts}
    elif module_name == "qwen3_moe":
        sizes |= {"moe_intermediate_size": shape.expert_width, "num_experts": shape.layer_experts}
    else:
        sizes |= {"moe_intermediate_size": shape.expert_width, "n_routed_experts": shape.layer_experts}
        sizes |= {"n_group": 8, "topk_group": 4, "n_shared_experts": 1}
    config = getattr(transformers, config_name)(**sizes)
    config._experts_implementation = implementation
    block: torch.nn.Module = getattr(module, block_name)(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return block


def goal(tokens: int) -> float:
    """At most so many times its grouped products a whole layer's forward is to take."""
    return 1.25 if tokens >= _MANY_TOKENS else 1.6


def line(times: Times) -> str:
    """One line for a reader."""
    products = f"{times.layer_s / times.grouped_s:.2f} x its grouped products (goal {goal(times.tokens):g})"
    rate = f"{times.dense_s / times.grouped_s:.0%} of the dense rate"
    told = f"{times.model:<14} {times.tokens:>6} tokens {times.num_experts:>3} experts: "
    told += f"layer {times.layer_s * 1e3:8.3f} ms = {products}, which run at {rate}"
    if times.eager_s is None or times.grouped_mm_s is None:
        return f"{told}; {times.why_none}"
    eager, grouped = times.eager_s / times.layer_s, times.grouped_mm_s / times.layer_s
    return f"{told}; transformers eager {eager:.2f} x (goal 3), grouped_mm {grouped:.2f} x (1.15) as long"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--model", action="append", choices=sorted(NAMED_SHAPES), required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--out", type=Path, help="append each result as a JSON line")
    asked = parser.parse_args()
    device = find_device(asked.device)
    for model in asked.model:
        for tokens in asked.tokens:
            times = time_layer(NAMED_SHAPES[model], tokens, device)
            print(line(times), flush=True)
            if asked.out is not None:
                with asked.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(times)) + "\n")


if __name__ == "__main__":
    main()
