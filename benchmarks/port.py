"""Time the fabric's port mode, batched and alone: ``python -m benchmarks.port``.

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
from moesim.fabric.patterns import PATTERNS, pattern_RR
from moesim.fabric.port import finish_s, port_finish_s
from moesim.study.port_error import even_fabric
from moesim.units import MEGA, MILLI

LIMIT_S = {64: 0.1 * MILLI, 1024: 30 * MILLI}  # one matrix, batched, over the patterns


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
        all_s = []
        for pattern in PATTERNS if num_ranks == 64 else ("uniform", "hot_receivers", "lognormal"):
            bytes_BRR = [pattern_RR(pattern, num_ranks, 8, rng) * MEGA for _ in range(batch)]
            seconds = seconds_of(partial(port_finish_s, np.array(bytes_BRR, np.float32), topology))
            all_s.append(statistics.median(seconds) / batch)
            alone = "-"
            if num_ranks == 64:
                flows = flows_of(bytes_BRR[0])
                alone = f"{statistics.median(seconds_of(partial(finish_s, flows, topology))) / MILLI:.1f}"
            times = f"{all_s[-1] / MILLI:.3f} | {seconds[0] / batch / MILLI:.3f} | {LIMIT_S[num_ranks] / MILLI:g}"
            rows.append(f"| {num_ranks:,} | {pattern.replace('_', ' ')} | {times} | {alone} |")
        if statistics.fmean(all_s) > LIMIT_S[num_ranks]:
            broken.append(f"{num_ranks} ranks")
        rows.append(
            f"| {num_ranks:,} | *mean* | {statistics.fmean(all_s) / MILLI:.3f} | | {LIMIT_S[num_ranks] / MILLI:g} | |"
        )
    print("## Exchanges in port mode\n")
    print("Processor time of one core, median and fastest of 15; a shared machine can double it.")
    print("Batched: per matrix, 64 ranks in batches of 100 draws of sigma 1, the doubtful ones settled by rounds; the")
    print("limit is on the mean. Alone: rounds of shares, one exchange.\n")
    print("| ranks | pattern | batched [ms] | fastest [ms] | limit [ms] | alone [ms] |")
    print("|---|---|---|---|---|---|")
    print("\n".join(rows))
    if broken:
        print("over the limit: " + "; ".join(broken), file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
