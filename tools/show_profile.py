"""Print what a profile measured: grouped products against the run's own roofline, layers against their products, and
the fit's held-out errors, each beside its goal.

``python tools/show_profile.py PROFILE.json``; needs numpy only.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from reference_model.fit import predict, work

_GOALS = {512: 0.8, 64: 0.6, 1: 0.6}  # tokens of an expert from which on, share of the roofline
_GOAL_ERROR_FRACTION = 0.05  # median, held out


def dense_flops_per_s(profile: dict[str, Any]) -> float:
    """The best rate of a dense product in this run."""
    rates = (
        float(work("dense", p["direction"], p["size"], p["width_in"], p["width_out"], 1)[0]) / p["median_s"]
        for p in profile["points"]
        if p["kind"] == "dense"
    )
    return max(rates)


def roofline_lines(profile: dict[str, Any]) -> Iterable[str]:
    """Per product and range of tokens per expert: share of min(dense rate, memory roofline) over all points."""
    fit, dense = profile["fit"], dense_flops_per_s(profile)
    shares: dict[tuple, list[float]] = {}
    for p in profile["points"]:
        if p["kind"] != "grouped":
            continue
        flops, moved = work(p["kind"], p["direction"], p["size"], p["width_in"], p["width_out"], fit["element_bytes"])
        ideal_s = p["num_active"] * max(float(flops) / dense, float(moved) / fit["bytes_per_s"])
        least = next(tokens for tokens in _GOALS if p["size"] >= tokens)
        shares.setdefault((p["width_in"], p["width_out"], p["direction"], least), []).append(ideal_s / p["median_s"])
    for (width_in, width_out, direction, least), values in sorted(shares.items()):
        middle = sorted(values)[len(values) // 2]
        within = sum(value >= _GOALS[least] for value in values)
        told = f"least {min(values):6.1%} median {middle:6.1%}; {within} of {len(values)} reach {_GOALS[least]:.0%}"
        yield f"{width_in:>6}x{width_out:<6} {direction:<9} m>={least:<4} {told}"


def layer_lines(profile: dict[str, Any]) -> Iterable[str]:
    """Per timed layer: its time over the sum of its two grouped products, evenly loaded."""
    fit = profile["fit"]
    for p in profile["points"]:
        if p["kind"] == "layer":
            hidden, width, count = p["width_in"], p["width_out"], p["num_active"]
            load = [p["size"] * p["top_k"] / count] * count
            products = [(hidden, 2 * width), (width, hidden)]
            grouped_s = sum(
                predict(fit, "grouped", p["direction"], load, width_in=i, width_out=o)[0] for i, o in products
            )
            sizes = f"{hidden:>6}x{width:<6} {count:>3} experts {p['direction']:<9} {p['size']:>6} tokens"
            yield f"{sizes} {p['median_s'] * 1e3:9.3f} ms = {p['median_s'] / grouped_s:.2f} x its grouped products"


def error_lines(profile: dict[str, Any]) -> Iterable[str]:
    """Per kind and direction the fit's error on points that it never saw."""
    for row in profile["errors"]:
        verdict = "ok" if row["median_fraction"] <= _GOAL_ERROR_FRACTION else f"beyond {_GOAL_ERROR_FRACTION:.0%}"
        numbers = f"{row['num_points']:>4} points, median {row['median_fraction']:6.1%}, nine in ten within"
        yield f"held out {row['kind']:<18} {row['direction']:<9} {numbers} {row['p90_fraction']:6.1%} {verdict}"


def main(path: str) -> None:
    """Print the tables of one profile."""
    profile = json.loads(Path(path).read_text(encoding="utf-8"))
    fit = profile["fit"]
    rates = f"dense {dense_flops_per_s(profile) / 1e12:.3f}, best {fit['flops_per_s'] / 1e12:.3f} TFLOP/s"
    best = f"{rates}, {fit['bytes_per_s'] / 1e9:.1f} GB/s"
    print(f"{profile['device']['name']}: {best}")
    print(*roofline_lines(profile), *layer_lines(profile), *error_lines(profile), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1])
