"""Two scenarios side by side: which settings differ, and what that does to a step, to memory and to each part of it.

Both meet the same luck (a seed's streams are named), so a difference is due to what differs. See docs/model.md#gates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moesim.metrics.step import STEP_PARTS, StepResult
from moesim.scenario import Scenario
from moesim.study.simulate import simulate

HEADLINES: Mapping[str, str] = {
    "step_s": "s",
    "tokens_per_s_per_gpu": "tokens/s",
    "mfu": "1",
    "exposed_comm_s": "s",
    "wait_s": "s",
    "bubble_fraction": "1",
    "drop_fraction": "1",
    "max_mean_load": "1",
}
NOTHING = 1e-12


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting that differs, by its dotted name; None where a file has none."""

    name: str
    first: Any
    second: Any


@dataclass(frozen=True, kw_only=True)
class Result:
    """One number of both steps."""

    name: str
    unit: str
    first: float
    second: float

    @property
    def change_fraction(self) -> float | None:
        """Second over first - 1; None where the first is nothing."""
        return self.second / self.first - 1 if abs(self.first) > NOTHING else None


@dataclass(frozen=True, kw_only=True)
class Differences:
    """What differs between two scenarios, and between their steps; parts that neither has are left out."""

    settings: tuple[Setting, ...]
    results: tuple[Result, ...]
    parts: tuple[Result, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        plain = [
            {"name": r.name, "unit": r.unit, "first": r.first, "second": r.second, "change_fraction": r.change_fraction}
            for r in (*self.results, *self.parts)
        ]
        settings = [{"name": s.name, "first": s.first, "second": s.second} for s in self.settings]
        return {"settings": settings, "results": plain}


def differences(first: Scenario, second: Scenario) -> Differences:
    """Settings and steps of two scenarios. Raises NotModelledError as a simulation does."""
    return differences_of(first, simulate(first), second, simulate(second))


def differences_of(first: Scenario, before: StepResult, second: Scenario, after: StepResult) -> Differences:
    """As differences, of steps that are known."""
    peaks = [step.memory["peak_bytes"] for step in (before, after)]
    results = [
        Result(name=name, unit=unit, first=float(getattr(before, name)), second=float(getattr(after, name)))
        for name, unit in HEADLINES.items()
    ]
    results.append(Result(name="peak_bytes", unit="B", first=peaks[0], second=peaks[1]))
    parts = [
        Result(name=part, unit="s", first=before.step_parts_s.get(part, 0.0), second=after.step_parts_s.get(part, 0.0))
        for part in STEP_PARTS
    ]
    return Differences(
        settings=tuple(differing_settings(first.to_dict(), second.to_dict())),
        results=tuple(results),
        parts=tuple(part for part in parts if max(part.first, part.second) > NOTHING),
    )


def differing_settings(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Setting]:
    """Leaves of two nested mappings that differ, by dotted name.

    >>> differing_settings({"parallel": {"ep": 8}, "seed": 0}, {"parallel": {"ep": 16}, "seed": 0})
    [Setting(name='parallel.ep', first=8, second=16)]
    """
    left, right = dict(_leaves(first)), dict(_leaves(second))
    names = [*left, *(name for name in right if name not in left)]
    return [
        Setting(name=name, first=left.get(name), second=right.get(name))
        for name in names
        if left.get(name) != right.get(name)
    ]


def _leaves(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
