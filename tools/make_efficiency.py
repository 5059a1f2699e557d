"""Fit how fast matrix products, streams and attention kernels are on each GPU; write moesim/catalog/efficiency.yaml.

Run from the repository: python tools/make_efficiency.py. Needs the extra ``measured``. Half of the pairs (columns,
reduced) of a table are fitted, the other half scores the fit; what the score was stands in the file beside each law.
What no table holds is typed below with its source. docs/decisions/product-shape.md tells what was tried.

Legend: N rows of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesim.catalog.hardware import load_gpu
from moesim.catalog.measured import SOURCE, SYSTEMS, tables
from moesim.catalog.silicon import NEWEST, ProductTable, product_table
from moesim.cost.device import EFFICIENCY_FILE, ProductLaw, device_cost
from moesim.describe.hardware import Gpu
from moesim.door import write_text_atomically
from moesim.door.records import read_parquet_columns
from moesim.seeds import stream
from moesim.units import BYTES_PER_ELEMENT, MICRO, MILLI

Floats = NDArray[np.float64]
MOST_ROWS = 3000
LENGTHS = (2048, 4096, 8192)
HEAD = """\
# What a GPU achieves of its peaks. Made by tools/make_efficiency.py, which tells how; moesim/cost/device.py says what
# each number means. Products: utilisation of the dense peak for endless shapes, reduce_overhead (start and end of a
# tile as extra reduced elements), memory_utilisation of the memory rate, start_us of one kernel. kind: measured on this
# very GPU, or assumed.
schema: 2
"""
BLOCKWISE = (
    "shape fitted on the 18 dense FP8 rows of the DeepGEMM@55ab91f README (H800), scored on its grouped rows; "
    "utilisation: MAMF 1402.6 of 1979 TFLOP/s, stas00/ml-engineering@744d01e"
)
BACKWARD = (
    "rate of the backward over that of the forward, 0.45 of the peak over 0.55, causal, head dim 128, 4k tokens on "
    "H100, read off the figures of FlashAttention-3, arXiv 2407.08608"
)
BLOCK_NUMBERS = "utilisation: 0.709, reduce_overhead: 512, memory_utilisation: 0.80, start_us: 2.0"
TYPED_PRODUCTS = f"""\
  fp8_block:  # activations scaled by 1x128 tiles, weights by 128x128 blocks
    h800: {{{BLOCK_NUMBERS}, kind: measured, source: "{BLOCKWISE}", date: 2025-03-25}}
"""
# FP8 weight gradients summed in float32 on an H800: (columns of the input, of the gradient, tokens) and TFLOP/s, of
# DeepGEMM's first kernels for them (1D1D: both operands scaled along the tokens).
WEIGHT_GRADIENTS = (
    ((7168, 2112, 4096), 920),
    ((1536, 24576, 4096), 986),
    ((512, 32768, 4096), 878),
    ((16384, 7168, 4096), 994),
    ((7168, 4096, 4096), 942),
    ((2048, 7168, 4096), 920),
    ((7168, 2112, 8192), 1052),
    ((1536, 24576, 8192), 1092),
    ((512, 32768, 8192), 1014),
)
WEIGHT_SOURCE = (
    "fitted on 9 dense rows of deepseek-ai/DeepGEMM pull request 95 (H800), scored on its grouped rows; memory and "
    "start as fp8_block"
)
WEIGHT_SOURCE_2024 = (
    "fp8_block_weights over 1.2: those beat DeepSeek's CUTLASS kernels of before by about 20 %, deepseek-ai/DeepGEMM "
    "pull request 95"
)
TYPED_ATTENTION = f"""\
  backward_share: {{value: 0.82, unit: fraction, kind: assumed, source: "{BACKWARD}", date: 2024-07-11}}
"""


def sizes_of_training(table: ProductTable) -> ProductTable:
    """The rows with sizes that training has."""
    return table.pick((table.n_N >= 512) & (table.n_N <= 20_000) & (table.k_N >= 512) & (table.k_N <= 20_000))


def fit(table: ProductTable, peak: float, memory: float, element_bytes: float) -> tuple[ProductLaw, Floats]:
    """The law fitted on half of the pairs (columns, reduced), and its errors on the other half."""
    rng = stream(0, "make_efficiency")
    if len(table.m_N) > MOST_ROWS:
        table = table.pick(np.sort(rng.choice(len(table.m_N), MOST_ROWS, replace=False)))
    pairs, pair_N = np.unique(np.stack([table.n_N, table.k_N]), axis=1, return_inverse=True)
    fitted_N = (rng.permutation(pairs.shape[1]) < pairs.shape[1] // 2)[pair_N.ravel()]
    train, rest = table.pick(fitted_N), table.pick(~fitted_N)

    def law(at: Floats) -> ProductLaw:
        utilisation, overhead, share, start = np.exp(at)
        share = min(share, 1.0)
        return ProductLaw(
            utilisation=utilisation, reduce_overhead=overhead, memory_utilisation=share, start_s=start * MICRO
        )

    def loss(at: Floats) -> float:
        error = np.log(
            law(at).product_s(train.m_N, train.n_N, train.k_N, peak, memory, element_bytes) / train.seconds_N
        )
        return float(np.mean(np.sqrt(error**2 + 0.05**2)))

    starts = [np.log([0.8, 200.0, 0.8, 3.0]), np.log([0.6, 30.0, 0.7, 5.0])]
    best = min((descend(loss, at, np.array([0.1, 0.4, 0.1, 0.4])) for at in starts), key=loss)
    return law(best), law(best).product_s(
        rest.m_N, rest.n_N, rest.k_N, peak, memory, element_bytes
    ) / rest.seconds_N - 1.0


def descend(loss: Callable[[Floats], float], at: Floats, step: Floats) -> Floats:
    """Coordinate descent with steps that halve: four parameters need no more."""
    found = loss(at)
    for _ in range(6):
        moved = True
        while moved:
            moved = False
            for i in range(len(at)):
                for sign in (1.0, -1.0):
                    trial = at.copy()
                    trial[i] += sign * step[i]
                    if (value := loss(trial)) < found - 1e-7:
                        at, found, moved = trial, value, True
                        break
        step = step / 2
    return at


def product_line(gpu: Gpu, kernels: str) -> str:
    """The file's line of a GPU and format."""
    table = product_table(gpu.name, kernels)
    peak, memory = gpu.peak_flops_per_s[kernels].value, gpu.memory_bytes_per_s.value
    law, errors = fit(sizes_of_training(table), peak, memory, BYTES_PER_ELEMENT[kernels])
    score = f"median {np.median(np.abs(errors)):.1%}, 90th percentile {np.quantile(np.abs(errors), 0.9):.1%}"
    print(gpu.name, kernels, law, score, f"bias {np.median(errors):+.1%}", flush=True)
    numbers = (
        f"utilisation: {law.utilisation:.3f}, reduce_overhead: {law.reduce_overhead:.0f}, "
        f"memory_utilisation: {law.memory_utilisation:.3f}, start_us: {law.start_s / MICRO:.1f}"
    )
    source = f"{table.source}; on pairs (columns, reduced) not fitted: {score}"
    return f'    {gpu.name}: {{{numbers}, kind: measured, source: "{source}", date: 2026-11}}'


def weight_gradient_lines() -> str:
    """The file's lines of blockwise FP8 weight gradients: utilisation and a tile's overhead fitted, all else as typed
    for blockwise products.
    """
    gpu = load_gpu("h800")

    def loss(at: Floats) -> float:
        law = ProductLaw(
            utilisation=np.exp(at[0]), reduce_overhead=np.exp(at[1]), memory_utilisation=0.8, start_s=2.0 * MICRO
        )
        device = replace(device_cost(gpu, "fp8", "datasheet"), weight_law=law)
        return float(
            sum(
                np.log(float(device.weight_gradient_s([m], k, n)) * tflops * 1e12 / (2.0 * m * k * n)) ** 2
                for (k, n, m), tflops in WEIGHT_GRADIENTS
            )
        )

    starts = [np.log([0.7, 500.0]), np.log([0.6, 1000.0])]
    utilisation, overhead = np.exp(min((descend(loss, at, np.array([0.1, 0.4])) for at in starts), key=loss))
    lines = ""
    for name, comment, share, source in (
        (
            "fp8_block_weights",
            "weight gradients of the same: both operands scaled along the tokens",
            1.0,
            WEIGHT_SOURCE,
        ),
        ("fp8_block_weights_2024", "DeepSeek's own kernels before those", 1.2, WEIGHT_SOURCE_2024),
    ):
        numbers = f"utilisation: {utilisation / share:.3f}, reduce_overhead: {overhead:.0f}"
        told = f'memory_utilisation: 0.80, start_us: 2.0, kind: measured, source: "{source}", date: 2025-05-06'
        lines += f"  {name}:  # {comment}\n    h800: {{{numbers}, {told}}}\n"
    print(lines, flush=True)
    return lines


def stream_line(gpu: Gpu) -> str:
    """The largest casts reach this share of the memory rate; the smallest take the start."""
    path = tables() / SYSTEMS[gpu.name] / "quantize" / NEWEST / "scale_matrix_perf.parquet"
    rows = read_parquet_columns(path, ("m", "k", "latency"))
    moved, seconds = (
        np.array(c) for c in zip(*((3.0 * r["m"] * r["k"], r["latency"] * MILLI) for r in rows), strict=True)
    )
    share = np.median((moved / seconds)[moved > 5e8]) / gpu.memory_bytes_per_s.value
    start_s = np.median(seconds[moved < 1e6])
    source = f"{SOURCE}, {SYSTEMS[gpu.name]}/quantize/{NEWEST}, scale_matrix: medians above 0.5 GB and below 1 MB"
    numbers = f"utilisation: {share:.3f}, start_us: {start_s / MICRO:.1f}"
    return f'    {gpu.name}: {{{numbers}, kind: measured, source: "{source}", date: 2026-11}}'


ATTENTION = {  # gpu -> releases of grouped-query and latent attention: the fastest kernels that a table has
    "a100-80gb": ("sglang/0.5.10", "trtllm/1.0.0"),
    "h100-sxm": ("sglang/0.5.14", NEWEST),
    "h200": ("sglang/0.5.14", NEWEST),
    **dict.fromkeys(("b200", "gb200", "gb300"), ("sglang/0.5.14", "sglang/0.5.14")),
}


def attention_line(gpu: Gpu) -> str:
    """Utilisation for endless sequences by head size, and the keys seen at which half of it is reached."""
    plain, latent = ATTENTION[gpu.name]
    folder = tables() / SYSTEMS[gpu.name]
    windowed = () if gpu.name == "a100-80gb" else ("window_size",)  # that table has no sliding windows
    names = ("batch_size", "isl", "num_heads", "latency")
    rows = read_parquet_columns(
        folder / "attention" / plain / "context_attention_perf.parquet",
        (*names, "head_dim", "attn_dtype", "kv_cache_dtype", *windowed),
    )
    whole = [r for r in rows if r["attn_dtype"] == r["kv_cache_dtype"] == "bfloat16" and not r.get("window_size")]
    mla = read_parquet_columns(folder / "mla" / latent / "context_mla_perf.parquet", (*names, "kv_cache_dtype"))
    cases = {dims: [r for r in whole if 2 * r["head_dim"] == dims] for dims in (128, 256)}
    cases[320] = [r for r in mla if r["kv_cache_dtype"] == "bfloat16"]
    found = {dims: attention_curve(of, dims, gpu) for dims, of in cases.items() if of}
    known = ", ".join(f"{dims}: [{u:.3f}, {half:.0f}]" for dims, (u, half) in found.items())
    source = (
        f"{SOURCE}, {SYSTEMS[gpu.name]}: attention/{plain} (head sizes 64 and 128), mla/{latent} (192 and 128); "
        "prefill, causal, 2k to 8k tokens, 64 sequences times heads and more"
    )
    print(gpu.name, found, flush=True)
    return f'    {gpu.name}: {{by_dims: {{{known}}}, kind: measured, source: "{source}", date: 2026-11}}'


def attention_curve(rows: list[dict[str, float]], dims: int, gpu: Gpu) -> tuple[float, float]:
    """(utilisation, keys): time per FLOP is a line in 1/keys seen; fitted through the medians of three lengths."""
    peak = gpu.peak_flops_per_s["bf16"].value
    inverse = []
    for length in LENGTHS:
        at = [r for r in rows if r["isl"] == length and r["batch_size"] * r["num_heads"] >= 64]
        flops = [2.0 * r["batch_size"] * r["num_heads"] * dims * length * length / 2 for r in at]
        inverse.append(np.median([r["latency"] * MILLI * peak / f for r, f in zip(at, flops, strict=True)]))
    slope, least = np.polyfit(2.0 / np.array(LENGTHS), inverse, 1, w=1.0 / np.array(inverse))
    return 1.0 / least, slope / least


def section(lines: Mapping[str, list[str]]) -> str:
    return "".join(f"  {name}:\n" + "\n".join(of) + "\n" for name, of in lines.items())


if __name__ == "__main__":
    measured = [load_gpu(name) for name in SYSTEMS]
    eight_bits = [gpu for gpu in measured if "fp8" in gpu.peak_flops_per_s]
    four_bits = [gpu for gpu in measured if "nvfp4" in gpu.peak_flops_per_s]
    products = section(
        {
            "bf16": [product_line(gpu, "bf16") for gpu in measured],
            "fp8": [product_line(gpu, "fp8") for gpu in eight_bits],
            "nvfp4": [product_line(gpu, "nvfp4") for gpu in four_bits],
        }
    )
    typed = f"{TYPED_PRODUCTS}{weight_gradient_lines()}"
    streams = section({"stream": [stream_line(gpu) for gpu in eight_bits]})
    attention = section({"forward": [attention_line(gpu) for gpu in measured]})
    text = f"{HEAD}products:\n{products}{typed}memory:\n{streams}attention:\n{attention}{TYPED_ATTENTION}"
    write_text_atomically(Path(EFFICIENCY_FILE), text)
