"""Natural against forced-balanced routing: measured slowdowns of pairs of runs beside what a default skew predicts.

Run from the repository: python tools/make_skew_pairs.py. Writes the section ``skew`` of docs/accuracy.md.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesim.report.accuracy_page import write_section
from moesim.scenario import Scenario
from moesim.study.accuracy import carried_cases
from moesim.study.accuracy_training import express
from moesim.timeline.step import run_step

PAGE = Path(__file__).parent.parent / "docs" / "accuracy.md"
GINIS = np.linspace(0.10, 0.38, 15)  # of real text on five models (routing_and_drops.csv); every draw as likely
WIDER = np.linspace(0.10, 0.70, 7)
# Row that is expressed, what it needs besides, measured times natural over forced, and where that is from.
PAIRS = (
    ("mbridge_ab_qwen30b_hybridep_off", {}, 30.28955 / 24.7138, "step times, same recipe without overlap"),
    (
        "modelzoo_qwen235_long_16384_forced",
        {"mbs": "1"},
        295 / 237,
        "model TFLOP/s of the pair; micro-batch taken as 1",
    ),
    (
        "modelzoo_qwen235_long_65536_forced",
        {"mbs": "1"},
        368 / 320,
        "model TFLOP/s of the pair; micro-batch taken as 1",
    ),
)


def slowdowns(balanced: Scenario, ginis: NDArray[np.float64]) -> list[float]:
    """Predicted step with each Gini, a seed of its own, over the balanced one."""
    even_s = run_step(balanced).step_s
    asked = [balanced.with_(popularity="lognormal", gini=float(g), seed=i) for i, g in enumerate(ginis)]
    return [run_step(scenario).step_s / even_s for scenario in asked]


def section() -> str:
    lines = [
        "## Natural routing against forced balance",
        "",
        f"Made by `tools/make_skew_pairs.py`: lognormal popularity, {len(GINIS)} Gini coefficients from {GINIS[0]:.2f} "
        f"to {GINIS[-1]:.2f}, a seed each; natural routing differs from the balanced run in nothing else. Nothing "
        "is fitted to skew.",
        "",
        "| pair | measured | predicted P10 to P90 | band | inside | Gini that would give it |",
        "|---|---|---|---|---|---|",
    ]
    rows = {row["id"]: row for row in carried_cases("training")}
    for name, more, measured, how in PAIRS:
        scenario, _ = express(rows[name] | more, name)
        low, high = np.quantile(slowdowns(scenario, GINIS), [0.1, 0.9])
        needed = np.interp(measured, slowdowns(scenario, WIDER), WIDER)
        inside = "yes" if low <= measured <= high else "no"
        band = f"{low:.2f} to {high:.2f} | {100 * (high - low):.0f} points"
        lines.append(f"| `{name}` ({how}) | {measured:.2f} | {band} | {inside} | {needed:.2f} |")
    lines += [
        "",
        "The last column is the Gini at which the engine would give what was measured. Both pairs of one release ask "
        "for the same, although their sequences differ fourfold in length: what it makes of a skew agrees with them, "
        "but their skew is beyond what was measured on real text. Nobody published the load of these runs, which "
        "may be benchmarks of an untrained router; moesim's default stays that of real text.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    text = section()
    print(text)
    write_section(PAGE, "skew", text)
