"""Placement search against EPLB and its lower bound: 61 layers x 256 experts, 8 to 320 GPUs, 0 to 64 extra slots.

    python benchmarks/placement.py                     the table (about two minutes)
    python benchmarks/placement.py --quick             the two settings whose times are published
    python benchmarks/placement.py --eplb PATH         time DeepSeek's own eplb.py (a file of yours) in the same run

Columns: excess over the lower bound (median and worst layer), max/mean relative to EPLB's global policy (mean and worst
layer; 1 is a tie), milliseconds for 61 layers on one thread, and how many times longer EPLB takes: the NumPy write-up
of its algorithm in moesim.placement.eplb, and with --eplb its own code.
"""

from __future__ import annotations

import argparse
import importlib.util
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moesim.placement.eplb import eplb_layers
from moesim.placement.search import least_max_load, lower_bounds
from moesim.placement.slots import LayerPlacements, RankSlots, even_slots

LAYERS, EXPERTS = 61, 256
RANKS = (8, 16, 24, 32, 36, 40, 48, 64, 72, 80, 96, 128, 144, 160, 256, 288, 320)
SLOTS = (256, 264, 272, 288, 304, 320)
PUBLISHED = ((288, 32), (320, 64))  # EPLB's own code, one thread: 0.74 s and 1.25 s
LOADS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "uniform": lambda rng: np.ones((LAYERS, EXPERTS)),  # noqa: ARG005
    "random": lambda rng: rng.random((LAYERS, EXPERTS)),
    "lognormal": lambda rng: rng.lognormal(0.0, 1.0, (LAYERS, EXPERTS)),
    "dirichlet": lambda rng: rng.dirichlet(np.full(EXPERTS, 0.5), LAYERS),
    "zipf": lambda rng: np.stack([rng.permutation(1.0 / np.arange(1, EXPERTS + 1)) for _ in range(LAYERS)]),
}


def seconds(call: Callable[[], Any], repeats: int = 1) -> tuple[float, Any]:
    """(fastest wall time, last result)."""
    walls, result = [], None
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        walls.append(time.perf_counter() - start)
    return min(walls), result


def own_code(path: str | None) -> Callable[[np.ndarray, RankSlots], Any] | None:
    """DeepSeek's rebalance_experts from a user's file, on one thread."""
    if path is None:
        return None
    import torch

    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("own_eplb", Path(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda load, ranks: module.rebalance_experts(torch.tensor(load), ranks.num_slots, 1, 1, ranks.num_ranks)[0]


def row(kind: str, load: np.ndarray, ranks: RankSlots, rng: np.random.Generator, own: Any) -> tuple[str, np.ndarray]:
    """(a line of the table, excess over the bound by layer)."""
    search_s, placed = seconds(lambda: least_max_load(load, ranks, rng=rng), repeats=2)
    eplb_s, expert_LS = seconds(lambda: eplb_layers(load, ranks.num_slots, ranks.num_ranks))
    baseline = LayerPlacements(physical_to_logical_LS=expert_LS, num_experts=EXPERTS, ranks=ranks).max_mean(load)
    found = placed.max_mean(load)
    excess = found / lower_bounds(load, ranks, reached_L=found) - 1
    ratio = found / baseline
    cells = [
        f"{ranks.num_slots:5d} {ranks.num_ranks:5d} {ranks.num_slots // ranks.num_ranks:5d}  {kind:10s}",
        f"{np.median(excess):9.3%} {excess.max():9.3%} {ratio.mean():9.4f} {ratio.max():9.4f}",
        f"{1e3 * search_s:9.1f} {eplb_s / search_s:9.1f}",
    ]
    if own is not None:
        own_s, own_LS = seconds(lambda: own(load, ranks))
        own_max = LayerPlacements(physical_to_logical_LS=own_LS.numpy(), num_experts=EXPERTS, ranks=ranks).max_mean(
            load
        )
        cells.append(f"{own_s / search_s:9.1f} {(found / own_max).max():9.4f}")
    return " ".join(cells), excess


def settings(quick: bool) -> Iterator[tuple[int, int]]:
    for num_slots in SLOTS:
        for num_ranks in RANKS:
            if num_slots % num_ranks == 0 and (not quick or (num_slots, num_ranks) in PUBLISHED):
                yield num_slots, num_ranks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--eplb", metavar="PATH")
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    seed, own = secrets.randbits(32) if options.seed is None else options.seed, own_code(options.eplb)
    rng = np.random.default_rng(seed)
    least_max_load(rng.random((1, 64)), even_slots(72, 8), rng=rng)  # compile
    lower_bounds(rng.random((1, 64)), even_slots(72, 8))
    print(f"seed {seed}; {LAYERS} layers x {EXPERTS} experts; times on one thread")
    head = f"{'slots':>5} {'GPUs':>5} {'each':>5}  {'load':10} {'excess':>9} {'worst':>9} {'to EPLB':>9} {'worst':>9}"
    print(f"{head} {'ms':>9} {'x NumPy':>9}" + (f" {'x own':>9} {'to own':>9}" if own else ""))
    by_size: dict[str, list[np.ndarray]] = {}
    for num_slots, num_ranks in settings(options.quick):
        for kind, draw in LOADS.items():
            line, excess = row(kind, draw(rng), even_slots(num_slots, num_ranks), rng, own)
            print(line, flush=True)
            each = num_slots // num_ranks
            by_size.setdefault("4 or more" if each >= 4 else str(each), []).append(excess)
    for size, parts in sorted(by_size.items()):
        joined = np.concatenate(parts)
        over = (joined > 0.02).mean()
        print(
            f"{size} slots a GPU: excess median {np.median(joined):.3%}, worst {joined.max():.2%}, over 2 %: {over:.2%}"
        )


if __name__ == "__main__":
    main()
