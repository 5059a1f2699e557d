"""From timed points to seconds for shapes between them: interpolated *utilisation*, scored on held-out points.

utilisation = ideal time / (measured time - floor), ideal = max(flops / best rate, bytes / best bandwidth), both of
them the best that this run itself measured; floor is what an empty call takes. A product's time is the sum over its
experts, so it is linear in experts of equal load. Between two timed sizes an expert's time is linear in its tokens,
beyond the last one its utilisation stays; between counts of experts and between widths it is utilisation that is
interpolated, so a wrong ideal cancels: only its ratio between neighbours matters.

NumPy only, plain dictionaries in and out. ``moesim.cost.profile`` evaluates the same curves; a test compares both.

Legend: E experts of one product.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Point = Mapping[str, Any]
Fit = Mapping[str, Any]

MEASURED, INTERPOLATED, EXTRAPOLATED = "measured", "interpolated", "extrapolated"
_TAGS = (MEASURED, INTERPOLATED, EXTRAPOLATED)  # from best to worst
GOAL_MEDIAN_FRACTION, GOAL_P90_FRACTION = 0.06, 0.15  # of held-out errors, of each kind and direction
GOAL_NOISES = 1.5  # or so many times the noise of repeating a measurement, where that is more
_PRODUCTS = ("grouped", "dense")
_LEAST_OWN_SHARE = 0.1  # of a measured time, when the floor seems to explain nearly all of it


def is_held_out(index: int, count: int, column: int) -> bool:
    """Whether the index-th of count sizes is kept from the fit: every third, staggered by column, never an end.

    Fixed before anything is measured; the ends stay, since beyond them a curve does not interpolate.
    """
    return 0 < index < count - 1 and (index + column) % 3 == 1


def work(
    kind: str, direction: str, size: ArrayLike, width_in: int, width_out: int, element_bytes: int
) -> tuple[Floats, Floats]:
    """(FLOPs, bytes) of the ideal: each operand read once, each result written once.

    size: tokens per expert (grouped), tokens (dense, router, permute, combine), rows (activation), bytes moved (copy),
    bytes that the busiest rank sends and receives (all_to_all); any shape. A grouped product of size 0 does nothing.
    """
    m = np.asarray(size, dtype=np.float64)
    k, n, b, zero = float(width_in), float(width_out), float(element_bytes), np.zeros_like(m)
    backward = direction == "backward"
    if kind in ("grouped", "grouped_skewed", "dense"):
        # Backward: read x, weight and the result's gradient (for each of two products), write both gradients.
        moved = 2 * k * n + 2 * m * k + 2 * m * n if backward else k * n + m * k + m * n
        return (4 if backward else 2) * m * k * n, b * moved * (m > 0)
    if kind == "router":  # float32 inside; n experts
        times = 2 if backward else 1
        return 2 * times * m * k * n, times * (b * m * k + 4 * k * n + 12 * m * n)
    if kind in ("permute", "combine"):  # n experts per token: one pass over tokens and over n times as many rows
        return zero, b * m * k * (1 + n)
    if kind == "activation":
        return zero, b * m * k * (5 if backward else 3)
    assert kind in ("copy", "all_to_all", "all_to_all_skewed"), kind
    return zero, m


def fit_points(points: Sequence[Point], *, element_bytes: int) -> dict[str, Any]:
    """Curves through the points that are not held out; the held-out ones are not looked at.

    points: dictionaries with ``profile_schema.POINT_FIELDS``. Returns ``{"element_bytes", "flops_per_s", "bytes_per_s",
    "floor_s", "curves": [{"kind", "direction", "width_in", "width_out", "num_active", "sizes", "utilisations"}]}``.
    """
    used = [point for point in points if not point["held_out"]]
    floor_s = float(np.median([point["median_s"] for point in used if point["kind"] == "launch"]))
    used = [point for point in used if point["kind"] != "launch"]
    ideals = [work(p["kind"], p["direction"], p["size"], p["width_in"], p["width_out"], element_bytes) for p in used]
    seconds = [p["median_s"] for p in used]
    flops_per_s = max(
        p["num_active"] * float(flops) / s
        for p, (flops, _), s in zip(used, ideals, seconds, strict=True)
        if p["kind"] in _PRODUCTS
    )
    bytes_per_s = max(
        float(moved) / s for p, (_, moved), s in zip(used, ideals, seconds, strict=True) if p["kind"] == "copy"
    )
    curves: dict[tuple, dict[str, Any]] = {}
    for p, (flops, moved), s in sorted(zip(used, ideals, seconds, strict=True), key=lambda row: row[0]["size"]):
        own_s = max(s - floor_s, _LEAST_OWN_SHARE * s)
        ideal_s = p["num_active"] * max(float(flops) / flops_per_s, float(moved) / bytes_per_s)
        shape = {name: p[name] for name in ("kind", "direction", "width_in", "width_out", "num_active")}
        curve = curves.setdefault(tuple(shape.values()), {**shape, "sizes": [], "utilisations": []})
        curve["sizes"].append(p["size"])
        curve["utilisations"].append(ideal_s / own_s)
    return {
        "element_bytes": element_bytes,
        "flops_per_s": flops_per_s,
        "bytes_per_s": bytes_per_s,
        "floor_s": floor_s,
        "curves": [curves[key] for key in sorted(curves)],
    }


def predict(
    fit: Fit, kind: str, direction: str, size_E: ArrayLike, *, width_in: int, width_out: int = 0
) -> tuple[float, str]:
    """(seconds, tag) of one call. size_E: tokens of each expert (grouped), or the one size of any other kind.

    tag: ``measured`` (the curve went through this very shape), ``interpolated``, or ``extrapolated`` (a size, number of
    experts or width outside what was timed; the nearest utilisation is used).
    """
    size = np.atleast_1d(np.asarray(size_E, dtype=np.float64))
    size = size[size > 0]
    if size.size == 0:
        return 0.0, MEASURED
    groups = _by_widths(curve for curve in fit["curves"] if (curve["kind"], curve["direction"]) == (kind, direction))
    assert groups, f"nothing was timed for {kind} {direction}"
    weights, tag = _width_weights(list(groups), (width_in, width_out))
    utilisation = np.zeros_like(size)
    for weight, curves in zip(weights, groups.values(), strict=True):
        if weight > 0:
            own, own_tag = _utilisation(fit, curves, size)
            utilisation += weight * own
            tag = _worst(tag, own_tag)
    ideal_s = _ideal_s(fit, kind, direction, size, width_in, width_out)
    return float(fit["floor_s"] + (ideal_s / utilisation).sum()), tag


def _ideal_s(fit: Fit, kind: str, direction: str, size: ArrayLike, width_in: int, width_out: int) -> Floats:
    flops, moved = work(kind, direction, size, width_in, width_out, fit["element_bytes"])
    return np.maximum(flops / fit["flops_per_s"], moved / fit["bytes_per_s"])


def predict_layer(fit: Fit, direction: str, point: Point, num_experts: int) -> tuple[float, str]:
    """(seconds, tag) of a layer as the sum of its parts, evenly loaded. Nothing here was fitted to layers.

    num_experts: the width of the router's product.
    """
    hidden, width, top_k, tokens = point["width_in"], point["width_out"], point["top_k"], point["size"]
    load_E = np.full(point["num_active"], tokens * top_k / point["num_active"])
    parts = [
        predict(fit, "router", direction, tokens, width_in=hidden, width_out=num_experts),
        predict(fit, "permute", direction, tokens, width_in=hidden, width_out=top_k),
        predict(fit, "grouped", direction, load_E, width_in=hidden, width_out=2 * width),
        predict(fit, "activation", direction, tokens * top_k, width_in=width),
        predict(fit, "grouped", direction, load_E, width_in=width, width_out=hidden),
        predict(fit, "combine", direction, tokens, width_in=hidden, width_out=top_k),
    ]
    if direction == "backward":  # router and experts each have a gradient of the layer's input: two read, one written
        parts.append(predict(fit, "copy", "forward", 3 * tokens * hidden * fit["element_bytes"], width_in=0))
    return sum(seconds for seconds, _ in parts), _worst(*(tag for _, tag in parts))


def predict_point(fit: Fit, point: Point) -> tuple[float, str]:
    """(seconds, tag) for a timed point's own shape."""
    if point["kind"] == "layer":
        return predict_layer(fit, point["direction"], point, point["num_active"])
    kind = point["kind"].removesuffix("_skewed")
    uneven = point["tokens_per_expert"] if kind == "grouped" else None  # an exchange is as long as its busiest rank
    size = uneven or [point["size"]] * point["num_active"]
    return predict(fit, kind, point["direction"], size, width_in=point["width_in"], width_out=point["width_out"])


def score(fit: Fit, points: Iterable[Point]) -> list[dict[str, Any]]:
    """The fit's error on the held-out points, per kind and direction, beside the noise of repeating the measurement.

    Rows of ``profile_schema.ERROR_FIELDS``: error = predicted / measured - 1; median and 90th percentile are of its
    absolute value, bias is its median. Noise is the median of repeat_noise_fraction over the points.
    """
    held: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        if point["held_out"]:
            held.setdefault((point["kind"], point["direction"]), []).append(point)
    return [_error_row(fit, kind, direction, group) for (kind, direction), group in sorted(held.items())]


def _error_row(fit: Fit, kind: str, direction: str, points: list[Point]) -> dict[str, Any]:
    errors = np.array([predict_point(fit, point)[0] / point["median_s"] - 1.0 for point in points])
    return {
        "kind": kind,
        "direction": direction,
        "num_points": len(points),
        "median_fraction": float(np.median(np.abs(errors))),
        "p90_fraction": float(np.quantile(np.abs(errors), 0.9)),
        "bias_fraction": float(np.median(errors)),
        "noise_fraction": float(np.median([repeat_noise_fraction(point) for point in points])),
    }


def is_within_goal(row: Mapping[str, Any]) -> bool:
    """Whether a kind's held-out error (a row of ``score``) is as small as is hoped for: the constants above."""
    goal = max(GOAL_MEDIAN_FRACTION, GOAL_NOISES * row["noise_fraction"])
    return row["median_fraction"] <= goal and row["p90_fraction"] <= GOAL_P90_FRACTION


def repeat_noise_fraction(point: Point) -> float:
    """How far the two least disturbed passes over this point disagree, relative to the least; 0 with one pass."""
    least, *others = sorted(point["pass_medians_s"])
    return others[0] / least - 1.0 if others else 0.0


def _by_widths(curves: Iterable[Mapping[str, Any]]) -> dict[tuple[int, int], list[Mapping[str, Any]]]:
    groups: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for curve in curves:
        groups.setdefault((curve["width_in"], curve["width_out"]), []).append(curve)
    return {widths: sorted(groups[widths], key=lambda curve: curve["num_active"]) for widths in sorted(groups)}


def _width_weights(known: Sequence[tuple[int, int]], wanted: tuple[int, int]) -> tuple[list[float], str]:
    """How much each timed pair of widths counts: the very pair alone, else by inverse squared distance in logs."""
    if wanted in known:
        return [float(pair == wanted) for pair in known], MEASURED
    logs = np.log2(np.maximum(np.array(known, dtype=np.float64), 1.0))
    target = np.log2(np.maximum(np.array(wanted, dtype=np.float64), 1.0))
    inverse = 1.0 / ((logs - target) ** 2).sum(axis=1)
    inside = bool(((logs.min(axis=0) <= target) & (target <= logs.max(axis=0))).all())
    return list(inverse / inverse.sum()), INTERPOLATED if inside else EXTRAPOLATED


def _of_curve(fit: Fit, curve: Mapping[str, Any], size_E: Floats) -> Floats:
    """Utilisation along a curve: time linear in size between two timed sizes, beyond them the nearest utilisation."""
    sizes = np.asarray(curve["sizes"], dtype=np.float64)
    within_E = np.clip(size_E, sizes[0], sizes[-1])
    ideal_s, ideal_E_s = (
        _ideal_s(fit, curve["kind"], curve["direction"], at, curve["width_in"], curve["width_out"])
        for at in (sizes, within_E)
    )
    return ideal_E_s / np.interp(within_E, sizes, ideal_s / np.asarray(curve["utilisations"]))


def _utilisation(fit: Fit, curves: list[Mapping[str, Any]], size_E: Floats) -> tuple[Floats, str]:
    """Utilisation per expert from one pair of widths' columns, linear between columns in the log of active experts."""
    columns = np.array([curve["num_active"] for curve in curves], dtype=np.float64)
    column = np.interp(np.log2(size_E.size), np.log2(columns), np.arange(columns.size))
    low = int(np.floor(column))
    high, share = min(low + 1, columns.size - 1), column - low
    used = [curves[low]] if share == 0 else [curves[low], curves[high]]
    values = [_of_curve(fit, curve, size_E) for curve in used]
    utilisation = values[0] if share == 0 else (1 - share) * values[0] + share * values[1]
    outside = not columns[0] <= size_E.size <= columns[-1]
    outside |= any(size_E.min() < curve["sizes"][0] or size_E.max() > curve["sizes"][-1] for curve in used)
    if outside:
        return utilisation, EXTRAPOLATED
    even = bool((size_E == size_E[0]).all())  # a skewed load was not measured, even if each of its sizes was
    exact = share == 0 and even and float(size_E[0]) in used[0]["sizes"]
    return utilisation, MEASURED if exact else INTERPOLATED


def _worst(*tags: str) -> str:
    return max(tags, key=_TAGS.index)
