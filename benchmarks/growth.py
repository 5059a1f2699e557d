"""How a step's simulation grows with the cluster: processor seconds and memory of whole commands, and their figure.

Prints the section of docs/speed.md, writes docs/figures/growth.svg. Processor time, since other work counts less in it.
The batch grows with the GPUs, 120 micro-batches on every replica. Exit status 1 where a limit breaks: 16,384 GPUs at
most 1.5 times 2,048, both within 10 s and 1.5 GiB.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

from moesim.report.style import COLOURS, finish, headline, house_style, light_grid, new_figure
from moesim.units import GIB

ROOT = Path(__file__).parent.parent
NUM_GPUS = (1024, 2048, 4096, 8192, 16384, 32768)
NUM_RUNS = 2
LIMIT_S, LIMIT_BYTES, LIMIT_RATIO = 10.0, 1.5 * GIB, 1.5


def measure(num_gpus: int) -> tuple[float, float]:
    """Median processor seconds after one warm-up, and resident bytes, of one command."""
    command = [sys.executable, "-m", "moesim", "simulate", "--model", "deepseek-v3", "--cluster", "h800-8x-ib400"]
    command += ["--num-gpus", str(num_gpus), "--pp", "16", "--ep", "64", "--global-batch", str(num_gpus // 16 * 120)]
    seconds, peak = [], 0.0
    for i in range(NUM_RUNS + 1):
        process = subprocess.Popen([*command, "--json"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0, num_gpus
        peak = usage.ru_maxrss * 1024.0
        if i:
            seconds.append(usage.ru_utime + usage.ru_stime)
    return statistics.median(seconds), peak


def main() -> int:
    found = {num_gpus: measure(num_gpus) for num_gpus in NUM_GPUS}
    ratio = found[16384][0] / found[2048][0]
    with house_style():
        figure = new_figure(7.0, 3.4)
        axes = figure.subplots()
        headline(figure, f"Eight times the GPUs take {ratio:.2f} times as long to simulate")
        axes.plot(NUM_GPUS, [found[n][0] for n in NUM_GPUS], marker="o", color=COLOURS["attention"])
        axes.set_xscale("log", base=2)
        axes.set_xticks(NUM_GPUS, [f"{n:,}" for n in NUM_GPUS])
        axes.set(ylim=(0, None), xlabel="GPUs", ylabel="processor time [s]")
        light_grid(axes, "y")
        picture = finish(figure, f"Processor seconds of moesim simulate over GPUs; ratio {ratio:.2f}.")
    (ROOT / "docs" / "figures" / "growth.svg").write_text(picture.svg + "\n")
    print("## Growth with the cluster\n")
    print("![Processor seconds over GPUs](figures/growth.svg)\n")
    print("`moesim simulate`, DeepSeek-V3, PP16, EP64, 120 micro-batches on each of num_gpus/1,024 replicas (made by")
    print("`python -m benchmarks.growth`; four replicas are simulated, the slowest of all is expected from them).\n")
    print("| GPUs | processor [s] | times 2,048 GPUs | peak memory [GiB] |\n|---|---|---|---|")
    for num_gpus, (took_s, peak) in found.items():
        print(f"| {num_gpus:,} | {took_s:.2f} | {took_s / found[2048][0]:.2f} | {peak / GIB:.2f} |")
    within = all(took_s <= LIMIT_S and peak <= LIMIT_BYTES for took_s, peak in (found[2048], found[16384]))
    return 0 if within and ratio <= LIMIT_RATIO else 1


if __name__ == "__main__":
    raise SystemExit(main())
