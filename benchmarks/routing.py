"""Assignments drawn per second on one core, plain and group-limited: ``python -m benchmarks.routing``.

E = 256, k = 8; the best of several runs, since other work on the machine only ever slows one down.
"""

from __future__ import annotations

import sys
import time

import numpy as np

from moesim.describe.model import Router
from moesim.routing.sampler import draw_counts_streaming
from moesim.units import MEGA

NUM_EXPERTS, NUM_TOKENS, NUM_RUNS = 256, 400_000, 7
CASES = (
    ("plain top-8", Router(top_k=8), 50 * MEGA),
    ("top-8 in the best 4 of 8 groups", Router(top_k=8, num_groups=8, top_groups=4), 10 * MEGA),
)


def assignments_per_s(router: Router, sigma: float) -> float:
    """(token, expert) assignments drawn and counted per second, best run."""
    log_weights_LE = sigma * np.random.default_rng(0).standard_normal((1, NUM_EXPERTS))
    draw_counts_streaming(log_weights_LE, router, 1_000, np.random.default_rng(0))  # compiles, or loads, the kernels
    walls = []
    for run in range(NUM_RUNS):
        start = time.perf_counter()
        draw_counts_streaming(log_weights_LE, router, NUM_TOKENS, np.random.default_rng(run))
        walls.append(time.perf_counter() - start)
    return NUM_TOKENS * router.top_k / min(walls)


def main() -> int:
    slow = []
    for sigma in (0.0, 0.5, 1.0):
        for name, router, least in CASES:
            rate = assignments_per_s(router, sigma)
            print(f"{name}, lognormal sigma {sigma:g}: {rate / MEGA:.0f} M assignments/s (at least {least / MEGA:.0f})")
            if rate < least:
                slow.append(f"{name}, sigma {sigma:g}")
    if slow:
        print("too slow: " + "; ".join(slow), file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    raise SystemExit(main())
