"""The reference model's measured peaks of memory beside those that moesim's formulas predict, in one run.

``python tools/check_memory.py --device cuda``: forward and backward of one MoE layer and of whole transformers,
for each way of recomputing; on a GPU by ``torch.cuda.max_memory_allocated``, on a CPU by what the profiler saw
allocated and freed. Weights are bf16 (of the layer alone float32 on a CPU, which makes wide copies of narrow rows),
routers float32. Needs torch and numpy.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent.parent))

from moesim.cost.activations import layer_tensors
from moesim.cost.chunks import chunk_memory
from moesim.cost.moments import layer_moments
from moesim.cost.software import REFERENCE
from moesim.describe.model import Attention, Ffn, GroupedQueryAttention, LatentAttention, Layer, Model, MoeFfn, Router
from moesim.describe.parallel import Parallelism
from moesim.describe.pipeline import Placed
from moesim.describe.workload import Training
from reference_model.devices import find_device
from reference_model.latent_attention import LatentConfig
from reference_model.layer import MoeLayer
from reference_model.layer import Recompute as LayerRecompute
from reference_model.losses import token_loss
from reference_model.routers import SoftmaxTopK
from reference_model.transformer import MoeConfig, Recompute, TransformerConfig, build

MODULES = ("core_attn", "mla_up_proj", "mlp", "moe", "moe_act", "layernorm", "shared_experts")
OPTIONS: tuple[Recompute, ...] = ("none", *((module,) for module in MODULES), MODULES, "full")
LAYER_OPTIONS: tuple[LayerRecompute, ...] = ("none", ("moe_act",), "full")
GOAL_FRACTION = 0.02


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the layer and of the transformers: wide vocabulary, since the largest moment is the head's, as in training."""

    sequences: int = 4
    seq_len: int = 2048
    hidden: int = 2048
    vocab: int = 65536
    width: int = 2560  # of an expert; wider than hidden, so that the activation's gradient is a layer's largest moment
    num_experts: int = 16
    top_k: int = 4

    @property
    def tokens(self) -> int:
        return self.sequences * self.seq_len

    @property
    def heads(self) -> int:
        return self.hidden // 128 or 1


SMALL = Sizes(sequences=4, seq_len=256, hidden=128, vocab=4096, width=192, num_experts=4, top_k=2)


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Bytes beyond what stands all the time; gradients of weights are taken away as soon as they are made."""

    what: str
    recompute: str
    predicted_bytes: float
    measured_bytes: float

    @property
    def error_fraction(self) -> float:
        return self.predicted_bytes / self.measured_bytes - 1.0


def transformer_config(sizes: Sizes, kind: str) -> TransformerConfig:
    """Four layers, every other a mixture with a shared expert; kind of attention: grouped or latent."""
    moe = MoeConfig(
        num_experts=sizes.num_experts,
        width=sizes.width,
        router=SoftmaxTopK(top_k=sizes.top_k),
        shared_width=sizes.width,
    )
    latent = LatentConfig(
        q_lora_rank=sizes.hidden // 2,
        kv_lora_rank=sizes.hidden // 4,
        qk_nope_head_dim=96,
        qk_rope_head_dim=32,
        v_head_dim=128,
    )
    return TransformerConfig(
        hidden=sizes.hidden,
        num_layers=4,
        num_heads=sizes.heads,
        num_kv_heads=sizes.heads if kind == "latent" else max(1, sizes.heads // 4),
        head_dim=128,
        dense_width=3 * sizes.hidden,
        vocab=sizes.vocab,
        moe=moe,
        latent=latent if kind == "latent" else None,
    )


def described(sizes: Sizes, config: TransformerConfig) -> Model:
    """The same model in moesim's words."""
    attention: Attention = GroupedQueryAttention(
        num_heads=config.num_heads, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim
    )
    if config.latent is not None:
        attention = LatentAttention(num_heads=config.num_heads, **asdict(config.latent))
    expert = Ffn(width=sizes.width)
    moe = MoeFfn(num_experts=sizes.num_experts, expert=expert, router=Router(top_k=sizes.top_k), shared=expert)
    dense = Ffn(width=config.dense_width)
    layers = [Layer(attention=attention, ffn=moe if i in config.moe_layers else dense) for i in range(4)]
    return Model(name="reference", hidden=sizes.hidden, vocab=sizes.vocab, layers=tuple(layers))


def _train(recompute: Recompute) -> Training:
    return Training(recompute=recompute if isinstance(recompute, str) else ",".join(recompute))


def transformer_peak(sizes: Sizes, kind: str, recompute: Recompute, device: torch.device) -> Peak:
    """One step of a transformer; predicted as a pipeline stage that holds all of it."""
    config = transformer_config(sizes, kind)
    tokens_BS = torch.randint(sizes.vocab, (sizes.sequences, sizes.seq_len), device=device)
    model = build(config, seed=0, recompute=recompute).to(device=device, dtype=torch.bfloat16)
    for layer in model.moe_layers().values():
        layer.router_weight.data = layer.router_weight.data.float()

    def step() -> None:
        logits_BSV = model(tokens_BS).logits_BSV
        loss_T = token_loss(logits_BSV.flatten(0, 1), tokens_BS.flatten().roll(-1))
        del logits_BSV
        loss_T.mean().backward()

    _take_gradients(model)
    said = described(sizes, config)
    moe_of = {layer: i for i, layer in enumerate(config.moe_layers)}
    chunk = tuple(Placed(layer=layer, moe_index=moe_of.get(i, -1)) for i, layer in enumerate(said.layers))
    received_GMLR = np.full((1, 1, len(moe_of), 1), float(sizes.tokens * sizes.top_k))
    memory = chunk_memory(
        *(said, Parallelism(), _train(recompute), REFERENCE, "alltoall", chunk, received_GMLR, float(sizes.tokens)),
        has_head=True,
        has_embedding=True,
    )
    forward, backward = (float(worst.excess_GMRP.sum()) for worst in memory.worst)
    predicted = max(forward, float(memory.kept_GMRP.sum()) + backward)
    what = f"transformer, {kind} attention"
    return Peak(what=what, recompute=str(recompute), predicted_bytes=predicted, measured_bytes=peak_bytes(step, device))


def layer_peak(sizes: Sizes, recompute: LayerRecompute, device: torch.device) -> Peak:
    """Forward and backward of one MoE layer: what it keeps, what its largest moment adds, and no more.

    Without a shared expert, whose backward comes first and frees what the formulas count until the layer's end.
    """
    moe = transformer_config(sizes, "grouped").moe
    assert moe is not None
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layer = MoeLayer(
        hidden=sizes.hidden,
        width=moe.width,
        num_experts=moe.num_experts,
        router=moe.router,
        recompute=recompute,
        device=device,
        dtype=dtype,
    )
    x_TH = torch.randn(sizes.tokens, sizes.hidden, device=device, dtype=dtype, requires_grad=True)
    grad_TH = torch.randn_like(x_TH)

    def step() -> None:
        layer(x_TH).output_TH.backward(grad_TH)
        x_TH.grad = None

    _take_gradients(layer)
    model = described(sizes, transformer_config(sizes, "grouped"))
    described_layer = model.layers[-1]
    count = {"token": sizes.tokens, "assignment": sizes.tokens * sizes.top_k}
    tensors = layer_tensors(model, described_layer, Parallelism(), REFERENCE)
    inside = tuple(
        t
        for t in tensors
        if t.part not in ("attention", "shared") and t.name not in ("ffn block input", "ffn norm output")
    )
    # Input and gradient of the output stand all the time, the output is new; what is recomputed is there again by then.
    wider = dtype.itemsize / 2  # formulas say BF16; float32 tensors are what they are
    saved = sum(count[t.per] * t.bytes * (wider if t.element_bytes == 2 else 1.0) for t in inside)
    moments = layer_moments(model, described_layer, Parallelism(), software=REFERENCE)
    most = max(count["assignment"] * moment.assignment_bytes for moment in moments)
    predicted = saved + most * wider + x_TH.nbytes
    measured = peak_bytes(step, device)
    return Peak(what="layer", recompute=str(recompute), predicted_bytes=predicted, measured_bytes=measured)


def _take_gradients(module: torch.nn.Module) -> None:
    """As an optimizer does that steps within the backward: standing gradients are known, and hide the rest."""
    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(lambda taken: setattr(taken, "grad", None))


def peak_bytes(step: Callable[[], None], device: torch.device) -> float:
    """Most bytes that the step had allocated at once beyond what was there before it, the second time it runs."""
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    kineto = profiled.profiler.kineto_results
    changes = sorted((e.start_ns(), e.nbytes()) for e in kineto.events() if e.name() == "[memory]")
    return float(np.cumsum([num_bytes for _, num_bytes in changes]).max())


def all_peaks(sizes: Sizes, device: torch.device) -> list[Peak]:
    """Every layer and transformer, every way of recomputing."""
    peaks = [layer_peak(sizes, option, device) for option in LAYER_OPTIONS]
    for kind in ("grouped", "latent"):
        has = [option for option in OPTIONS if kind == "latent" or option != ("mla_up_proj",)]
        peaks += [transformer_peak(sizes, kind, option, device) for option in has]
    return peaks


def line(peak: Peak) -> str:
    """One line for a reader."""
    numbers = f"predicted {peak.predicted_bytes / 1e6:9.1f} MB, measured {peak.measured_bytes / 1e6:9.1f} MB"
    verdict = "ok" if abs(peak.error_fraction) <= GOAL_FRACTION else f"beyond {GOAL_FRACTION:.0%}"
    name = peak.recompute if len(peak.recompute) < 30 else "all modules"
    return f"{peak.what:<30} {name:<20} {numbers} {peak.error_fraction:+6.2%} {verdict}"


def main() -> int:
    """The command line; the status tells whether every peak is as near as is hoped for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--small", action="store_true", help="sizes that a CPU does in seconds")
    parser.add_argument("--out", type=Path, help="write each result as a JSON line")
    asked = parser.parse_args()
    peaks = all_peaks(SMALL if asked.small else Sizes(), find_device(asked.device))
    print(*map(line, peaks), sep="\n")
    if asked.out is not None:
        asked.out.write_text("".join(json.dumps(asdict(peak)) + "\n" for peak in peaks), encoding="utf-8")
    return int(any(abs(peak.error_fraction) > GOAL_FRACTION for peak in peaks))


if __name__ == "__main__":
    sys.exit(main())
