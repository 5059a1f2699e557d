"""A calibration profile looked at: every timed point beside what the profile itself predicts for it.

See docs/model.md#calibrated-products.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.cost.profile import CurveKind, Direction, HeldOutError, Point, PointKind, Profile, Tag, Timed

GOAL_MEDIAN_FRACTION, GOAL_P90_FRACTION = 0.06, 0.15  # of held-out errors, of each kind and direction
GOAL_NOISES = 1.5  # or so many times the noise of repeating a measurement, where that is more
_TAGS: tuple[Tag, ...] = ("measured", "interpolated", "extrapolated")  # from best to worst


@dataclass(frozen=True, kw_only=True)
class PredictedPoint:
    """A timed point and what the profile says of its shape; parts_s: of a whole layer, what it is the sum of."""

    point: Point
    predicted_s: float
    tag: Tag
    parts_s: dict[str, float]

    @property
    def error_fraction(self) -> float:
        """predicted / measured - 1."""
        return self.predicted_s / self.point.median_s - 1.0


@dataclass(frozen=True, kw_only=True)
class CalibrationStudy:
    """A profile and its points, predicted."""

    profile: Profile
    points: tuple[PredictedPoint, ...]

    def of(self, kind: PointKind, direction: Direction) -> tuple[PredictedPoint, ...]:
        """The points of a kind, by size."""
        mine = [p for p in self.points if (p.point.kind, p.point.direction) == (kind, direction)]
        return tuple(sorted(mine, key=lambda p: (p.point.num_active, p.point.size)))

    @property
    def beyond_goal(self) -> tuple[HeldOutError, ...]:
        """Kinds whose held-out errors are larger than is hoped for."""
        return tuple(row for row in self.profile.errors if not is_within_goal(row))

    def to_dict(self) -> dict[str, Any]:
        """The device, the errors, and every point with its prediction, as plain values."""
        points = [
            {**dataclasses.asdict(p.point), "predicted_s": p.predicted_s, "tag": p.tag, "parts_s": p.parts_s}
            for p in self.points
        ]
        about = {"device": dataclasses.asdict(self.profile.device), "notes": list(self.profile.notes)}
        return {**about, "errors": [dataclasses.asdict(row) for row in self.profile.errors], "points": points}

    def rows(self) -> Iterator[tuple[str, str, float, float, str]]:
        """(section, name, x, value, unit) of errors and points."""
        for row in self.profile.errors:
            for name in ("median_fraction", "p90_fraction", "bias_fraction", "noise_fraction"):
                yield "held_out_error", f"{row.kind} {row.direction} {name}", row.num_points, getattr(row, name), "1"
        for p in self.points:
            name = f"{p.point.kind} {p.point.direction} {p.point.width_in}x{p.point.width_out} a{p.point.num_active}"
            yield "measured", name, p.point.size, p.point.median_s, "s"
            yield "predicted", name, p.point.size, p.predicted_s, "s"


def is_within_goal(row: HeldOutError) -> bool:
    """Whether held-out errors of a kind are as small as is hoped for: the constants above."""
    goal = max(GOAL_MEDIAN_FRACTION, GOAL_NOISES * row.noise_fraction)
    return row.median_fraction <= goal and row.p90_fraction <= GOAL_P90_FRACTION


def calibration_study(profile: Profile) -> CalibrationStudy:
    """Every point of a profile predicted from its curves; the empty call, which is their floor, stands for itself.

    >>> from moesim.cost.profile import load_profile
    >>> study = calibration_study(load_profile("cpu-xeon-2-threads"))
    >>> max(abs(p.error_fraction) for p in study.of("grouped", "forward") if not p.point.held_out) < 1e-6
    True
    """
    return CalibrationStudy(profile=profile, points=tuple(_predicted(profile, point) for point in profile.points))


def _predicted(profile: Profile, point: Point) -> PredictedPoint:
    if point.kind == "launch":
        return PredictedPoint(point=point, predicted_s=profile.launch_s, tag="measured", parts_s={})
    if point.kind == "layer":
        parts = layer_parts(profile, point)
        tag = max((timed.tag for timed in parts.values()), key=_TAGS.index)
        parts_s = {name: float(timed.seconds) for name, timed in parts.items()}
        return PredictedPoint(point=point, predicted_s=sum(parts_s.values()), tag=tag, parts_s=parts_s)
    kind: CurveKind = (
        "grouped"
        if point.kind == "grouped_skewed"
        else "all_to_all"
        if point.kind == "all_to_all_skewed"
        else point.kind
    )
    uneven = point.tokens_per_expert if kind == "grouped" else None  # an exchange is as long as its busiest rank
    sizes = uneven or (point.size,) * point.num_active
    widths = {"width_in": point.width_in, "width_out": point.width_out}
    timed = profile.part_s(kind, sizes, direction=point.direction, **widths)
    return PredictedPoint(point=point, predicted_s=float(timed.seconds), tag=timed.tag, parts_s={})


def layer_parts(profile: Profile, layer: Point) -> dict[str, Timed]:
    """What a whole evenly loaded layer is the sum of: nothing here was fitted to layers."""
    hidden, width, tokens, num_experts = layer.width_in, layer.width_out, layer.size, layer.num_active
    load_E = np.full(num_experts, tokens * layer.top_k / num_experts)
    calls: dict[str, tuple[CurveKind, Any, int, int]] = {
        "router": ("router", [tokens], hidden, num_experts),
        "permute": ("permute", [tokens], hidden, layer.top_k),
        "first product": ("grouped", load_E, hidden, 2 * width),
        "activation": ("activation", [tokens * layer.top_k], width, 0),
        "second product": ("grouped", load_E, width, hidden),
        "combine": ("combine", [tokens], hidden, layer.top_k),
    }
    parts = {
        name: profile.part_s(kind, size, width_in=width_in, width_out=width_out, direction=layer.direction)
        for name, (kind, size, width_in, width_out) in calls.items()
    }
    if layer.direction == "backward":  # of the layer's input, by router and by experts: two read, one written
        num_bytes = 3 * tokens * hidden * profile.fit.element_bytes
        parts["sum of gradients"] = profile.part_s("copy", [num_bytes], width_in=0, width_out=0, direction="forward")
    return parts
