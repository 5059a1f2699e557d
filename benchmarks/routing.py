"""Assignments drawn and counted per second of one core, over skews: ``python -m benchmarks.routing``.

E = 256, k = 8, streamed. Seconds are the thread's own processor time, the best of several runs: other work on a shared
machine slows a thread down and never speeds it up.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from moesim.describe.model import Router
from moesim.describe.popularity import Dirichlet, HotExperts, Lognormal, PowerLaw, Zipf
from moesim.routing.popularity import popularity_LE
from moesim.routing.sampler import draw_counts_streaming
from moesim.units import MEGA

NUM_EXPERTS, NUM_TOKENS, NUM_RUNS = 256, 100_000, 12
PLAIN, LIMITED = Router(top_k=8), Router(top_k=8, num_groups=8, top_groups=4)
LEAST_PLAIN, LEAST_LIMITED = 50 * MEGA, 10 * MEGA
GINIS = (0.25, 0.5, 0.7, 0.9)


def weights_by_skew(router: Router) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """(name, log_weights_LE) of one layer: equal experts, every kind of skew, hot experts by share of the weight."""
    yield "equal experts", np.zeros((1, NUM_EXPERTS))
    for kind in (Lognormal, Zipf, Dirichlet, PowerLaw):
        for gini in GINIS:
            rng = np.random.default_rng(0)
            drawn = popularity_LE(kind(gini=gini), num_layers=1, num_experts=NUM_EXPERTS, router=router, rng=rng)
            yield f"{kind.kind}, Gini {gini:g}".replace("_", " "), drawn.log_weights_LE
    rng = np.random.default_rng(0)
    hot = HotExperts(num_hot=1, share=0.12)  # of 1/k = 0.125, which is every token
    drawn = popularity_LE(hot, num_layers=1, num_experts=NUM_EXPERTS, router=router, rng=rng)
    yield "one expert that nearly every token takes", drawn.log_weights_LE
    for num_hot, share in ((1, 0.5), (4, 0.99), (8, 0.99), (16, 0.99)):
        log_weights_LE = np.zeros((1, NUM_EXPERTS))
        log_weights_LE[0, :num_hot] = np.log(share / (1.0 - share) * (NUM_EXPERTS - num_hot) / num_hot)
        yield f"{num_hot} hot with {share:g} of the weight", log_weights_LE


def assignments_per_s(router: Router, log_weights_LE: NDArray[np.float64]) -> float:
    """(token, expert) assignments drawn and counted per second of processor time, best run."""
    draw_counts_streaming(log_weights_LE, router, 1_000, np.random.default_rng(0))  # compiles, or loads, the kernels
    seconds = []
    for run in range(NUM_RUNS):
        start = time.thread_time()
        draw_counts_streaming(log_weights_LE, router, NUM_TOKENS, np.random.default_rng(run))
        seconds.append(time.thread_time() - start)
    return NUM_TOKENS * router.top_k / min(seconds)


def rows() -> list[tuple[str, float, float]]:
    """(skew, plain, group-limited): assignments per second of one core."""
    plain = {name: assignments_per_s(PLAIN, weights) for name, weights in weights_by_skew(PLAIN)}
    limited = {name: assignments_per_s(LIMITED, weights) for name, weights in weights_by_skew(LIMITED)}
    return [(name, plain[name], limited[name]) for name in plain]


def main() -> int:
    what = f"Assignments (token, expert) drawn and counted on one core [M/s]: {NUM_EXPERTS} experts, top-8"
    print(f"## Tokens drawn\n\n{what}; group-limited: in the best 4 of 8 groups.\n")
    print("| popularity | plain | group-limited |\n|---|---|---|")
    slow = []
    for name, plain, limited in rows():
        print(f"| {name} | {plain / MEGA:.0f} | {limited / MEGA:.0f} |", flush=True)
        if plain < LEAST_PLAIN or limited < LEAST_LIMITED:
            slow.append(name)
    print(f"\nAt least {LEAST_PLAIN / MEGA:.0f} and {LEAST_LIMITED / MEGA:.0f} are promised.")
    if slow:
        print("too slow: " + "; ".join(slow), file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    raise SystemExit(main())
