"""A profile's predictions beside an independent measurement of the same kind of GPU: the tables of the extra measured.

``python tools/compare_profile.py PROFILE.json --gpu h200``; bf16 products, and balanced MoE blocks (two grouped
products and the activation, in TensorRT-LLM with what it does around them) of the sizes that the profile timed. Ratios
are predicted over measured; nothing is fitted. Needs the extras measured and parquet.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from moesim.catalog.measured import SYSTEMS, tables
from moesim.catalog.silicon import NEWEST, product_table
from moesim.cost.profile import Profile, TimedShapes, load_profile
from moesim.door.records import read_parquet_columns
from moesim.units import MILLI

Ratio = tuple[str, float]  # a group's name, predicted over measured
_BLOCK = ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size", "latency")


def dense_ratios(profile: Profile, gpu: str) -> Iterator[Ratio]:
    """Of every product whose widths the profile has between those that it timed."""
    table = product_table(gpu, "bf16")
    for m, n, k, seconds in zip(table.m_N, table.n_N, table.k_N, table.seconds_N, strict=True):
        timed = profile.dense_product_s(m, n, k)
        if timed.tag != "extrapolated":
            yield f"dense {'>= 512' if m >= 512 else '< 512'} rows", float(timed.seconds) / seconds


def block_ratios(profile: Profile, gpu: str) -> Iterator[Ratio]:
    """Of balanced blocks on one rank, every expert of a rank with the same whole number of tokens."""
    path = tables() / SYSTEMS[gpu] / "moe" / NEWEST / "moe_perf.parquet"
    of_sizes = {(shape.hidden, shape.expert_width): shape for shape in profile.shapes}
    for row in read_parquet_columns(path, ("moe_dtype", "distribution", *_BLOCK)):
        shape = of_sizes.get((row["hidden_size"], row["inter_size"]))
        whole = row["moe_tp_size"] == 1 and (row["moe_dtype"], row["distribution"]) == ("bfloat16", "balanced")
        if shape is None or not whole or row["num_tokens"] * row["topk"] % row["num_experts"]:
            continue
        load = row["num_tokens"] * row["topk"] // row["num_experts"]
        predicted_s = block_s(profile, shape, np.full(row["num_experts"] // row["moe_ep_size"], load))
        if predicted_s is not None:
            name = f"{shape.name} block, {'>= 512' if load >= 512 else '< 512'} tokens an expert"
            yield name, predicted_s / (row["latency"] * MILLI)


def block_s(profile: Profile, shape: TimedShapes, load_E: np.ndarray) -> float | None:
    """Two grouped products and the activation; None where some of it lies outside what was timed."""
    hidden, width = shape.hidden, shape.expert_width
    parts = [
        profile.grouped_product_s(load_E, hidden, 2 * width),
        profile.part_s("activation", [load_E.sum()], width_in=width),
        profile.grouped_product_s(load_E, width, hidden),
    ]
    if any(part.tag == "extrapolated" for part in parts):
        return None
    return sum(float(part.seconds) for part in parts)


def lines(ratios: list[Ratio]) -> Iterator[str]:
    """Per group the median ratio and the quarter on either side."""
    for group in sorted({name for name, _ in ratios}):
        values = np.array([ratio for name, ratio in ratios if name == group])
        low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
        yield f"{group:<48} {len(values):>6} rows  predicted/measured {middle:5.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("profile", type=Path)
    parser.add_argument("--gpu", choices=sorted(SYSTEMS), default="h200")
    asked = parser.parse_args()
    profile = load_profile(str(asked.profile))
    ratios = [*dense_ratios(profile, asked.gpu), *block_ratios(profile, asked.gpu)]
    print(*(lines(ratios) if ratios else ["no row of the tables lies within what this profile timed"]), sep="\n")


if __name__ == "__main__":
    main()
