"""How many configurations a second the fast path does in a search of one model on one cluster:
``python -m benchmarks.search``.

Nothing is known when the search begins: what configurations share is computed on the way. Prints a section of
docs/speed.md; processor time, since other work counts less in it.
"""

from __future__ import annotations

import sys

from moesim.scenario import Scenario
from moesim.study import fast
from moesim.study.fast_error import AXES, search_rate

LIMIT = 2000.0  # configurations a second, promised
SIZES = (512,)
SEARCHES = {
    "deepseek-v3": {"cluster": "h800-8x-ib400", "pp": 16, "ep": 32, "global_batch": 3840, "precision": "fp8"},
    "mixtral-8x7b": {"cluster": "h100-8x-ib400", "ep": 8, "global_batch": 3840},
}


def main() -> None:
    """Print the table; exit status 1 where a search is slower than promised."""
    fast.warm()
    names = [*sys.argv[1:]] or [*SEARCHES]
    slow = False
    print("## Search by the fast path\n")
    print(f"All combinations of {', '.join(AXES)} on {SIZES[0]} GPUs, from nothing known; made by")
    print("`python -m benchmarks.search`. Limit: 2,000 configurations with a step a second of one core.\n")
    print("| model | combinations | refused | steps | processor [s] | steps a second | combinations a second |")
    print("|---|---|---|---|---|---|---|")
    for name in names:
        base = Scenario.make(model=name, num_gpus=SIZES[0], **SEARCHES[name])
        rate = search_rate(base, SIZES)
        refused, steps_per_s = rate.num_asked - rate.num_steps, rate.num_steps / rate.cpu_s
        slow = slow or steps_per_s < LIMIT
        print(
            f"| {name} | {rate.num_asked:,} | {refused:,} | {rate.num_steps:,} | {rate.cpu_s:.1f} | "
            f"{steps_per_s:,.0f} | {rate.num_asked / rate.cpu_s:,.0f} |"
        )
    raise SystemExit(1 if slow else 0)


if __name__ == "__main__":
    main()
