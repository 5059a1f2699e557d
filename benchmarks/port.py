"""Time the fabric's port mode: shares of ports in batches and alone, rounds of shares: ``python -m benchmarks.port``.

Prints a section of docs/speed.md; exit status 1 where a median breaks a limit.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from moesim.fabric.flows import flows_of
from moesim.fabric.patterns import pattern_RR
from moesim.fabric.port import finish_s, port_finish_s
from moesim.study.port_error import even_fabric
from moesim.units import MEGA, MILLI

LIMIT_S = {64: 0.1 * MILLI, 1024: 30 * MILLI}  # one matrix, batched
PATTERNS = ("uniform", "hot_receivers", "lognormal")


def seconds_of(work: Callable[[], object], num_runs: int = 15) -> list[float]:
    """Processor seconds of each run after one warm-up, rising: other work counts less than in wall time."""
    work()
    seconds = []
    for _ in range(num_runs):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return sorted(seconds)


def main() -> int:
    """Print the table."""
    rng, broken, rows = np.random.default_rng(0), [], []
    for num_ranks, batch in ((64, 100), (1024, 1)):
        topology = even_fabric(num_ranks, 8)
        for pattern in PATTERNS:
            bytes_RR = pattern_RR(pattern, num_ranks, 8, rng) * MEGA
            many = np.repeat(bytes_RR[None].astype(np.float32), batch, axis=0)
            seconds = seconds_of(partial(port_finish_s, many, topology))
            each_s, best_s = statistics.median(seconds) / batch, seconds[0] / batch
            if each_s > LIMIT_S[num_ranks]:
                broken.append(f"{num_ranks} ranks, {pattern}")
            alone = "-"
            if num_ranks == 64:
                flows = flows_of(bytes_RR)
                alone = f"{statistics.median(seconds_of(partial(finish_s, flows, topology))) / MILLI:.1f}"
            name = pattern.replace("_", " ")
            times = f"{each_s / MILLI:.3f} | {best_s / MILLI:.3f} | {LIMIT_S[num_ranks] / MILLI:g}"
            rows.append(f"| {num_ranks:,} | {name} | {times} | {alone} |")
    print("## Exchanges in port mode\n")
    print("Processor time of one core, median and fastest of 15; a shared machine can double it.")
    print("Shares of ports: per matrix, 64 ranks in batches of 100. Rounds: one exchange alone.\n")
    print("| ranks | pattern | shares of ports [ms] | fastest [ms] | limit [ms] | rounds of shares [ms] |")
    print("|---|---|---|---|---|---|")
    print("\n".join(rows))
    if broken:
        print("over the limit: " + "; ".join(broken), file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
