"""Print what a profile measured: grouped products against the run's own roofline, layers against their products.

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

_LEAST_TOKENS = (512, 64, 1)  # per expert: the goal is 80 % of the roofline at 512 or more, 60 % at fewer


def roofline_lines(profile: dict[str, Any]) -> Iterable[str]:
    """Per product and range of tokens per expert: the least and median share of the roofline over all timed points."""
    fit = profile["fit"]
    shares: dict[tuple, list[float]] = {}
    for p in profile["points"]:
        if p["kind"] != "grouped":
            continue
        flops, moved = work(p["kind"], p["direction"], p["size"], p["width_in"], p["width_out"], fit["element_bytes"])
        ideal_s = p["num_active"] * max(float(flops) / fit["flops_per_s"], float(moved) / fit["bytes_per_s"])
        least = next(tokens for tokens in _LEAST_TOKENS if p["size"] >= tokens)
        shares.setdefault((p["width_in"], p["width_out"], p["direction"], least), []).append(ideal_s / p["median_s"])
    for (width_in, width_out, direction, least), values in sorted(shares.items()):
        middle = sorted(values)[len(values) // 2]
        yield f"{width_in:>6}x{width_out:<6} {direction:<9} m>={least:<4} least {min(values):6.1%} median {middle:6.1%}"


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


def main(path: str) -> None:
    """Print both tables of one profile."""
    profile = json.loads(Path(path).read_text(encoding="utf-8"))
    fit = profile["fit"]
    best = f"best {fit['flops_per_s'] / 1e12:.3f} TFLOP/s, {fit['bytes_per_s'] / 1e9:.1f} GB/s"
    print(f"{profile['device']['name']}: {best}")
    print(*roofline_lines(profile), *layer_lines(profile), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1])
