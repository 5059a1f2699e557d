"""What fits where: memory of a step by stage and over time, what recomputation and offloading trade, and skew.

Legend: L MoE layers, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moesim.cost.recompute import useful_modules
from moesim.metrics.memory import memory_over_steps
from moesim.metrics.memory_timeline import StageTimeline, memory_timeline
from moesim.metrics.step import StepResult
from moesim.metrics.summary import summarise
from moesim.scenario import Scenario
from moesim.study.fits import Leaves, WayToFit, headroom_bytes, name_of, predicted_step_s, ways_to_fit
from moesim.timeline.step import run_step

GINIS = (0.0, 0.2, 0.4, 0.6)
SAMPLED_STEPS = 8  # of one skew
Family = Literal["asked", "recompute", "offload", "both"]
Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class TradePoint:
    """Memory of the fullest GPU against time of a step, with these settings in place of those asked for."""

    family: Family
    leaves: Leaves
    peak_bytes: float
    step_s: float

    @property
    def name(self) -> str:
        """The settings as they are typed."""
        return name_of(self.leaves)


@dataclass(frozen=True, kw_only=True)
class SkewPoint:
    """The fullest GPU's peak over steps of one skew [bytes]: in half of them at most p50, in 99 of 100 at most p99."""

    gini: float
    p50_bytes: float
    p99_bytes: float


@dataclass(frozen=True, kw_only=True, eq=False)
class MemoryStudy:
    """Everything the memory notebook shows; ``to_dict`` and ``rows`` for files."""

    step: StepResult
    timeline: tuple[StageTimeline, ...]
    trades: tuple[TradePoint, ...]  # asked first
    over_skew: tuple[SkewPoint, ...]  # empty for a dense model
    ways: tuple[WayToFit, ...]  # empty where the step fits
    capacity_bytes: float

    @property
    def fullest(self) -> StageTimeline:
        """The timeline of the stage with the highest peak."""
        return max(self.timeline, key=lambda line: line.peak_bytes)

    def worth_it(self) -> tuple[TradePoint, ...]:
        """Points that no other one beats in both memory and time, the fastest first."""
        order = sorted(self.trades, key=lambda point: (point.step_s, point.peak_bytes))
        kept: list[TradePoint] = []
        for point in order:
            if not kept or point.peak_bytes < kept[-1].peak_bytes:
                kept.append(point)
        return tuple(kept)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "memory": dict(self.step.memory),
            "memory_by_rank": list(self.step.memory_by_rank),
            "fits": self.step.fits,
            "capacity_bytes": self.capacity_bytes,
            "trades": [dataclasses.asdict(point) | {"leaves": dict(point.leaves)} for point in self.trades],
            "over_skew": [dataclasses.asdict(point) for point in self.over_skew],
            "ways_to_fit": [way.to_dict() for way in self.ways],
            "timeline": [list(row) for line in self.timeline for row in line.rows()],
        }

    def rows(self) -> Iterator[tuple[str, str, Any, float, str]]:
        """One long table: section, name, x, value, unit."""
        for stage in self.step.memory_by_rank:
            for part, value in stage.items():
                if part.endswith("_bytes"):
                    yield "by_stage", part, stage["stage"], value, "B"
        for point in self.trades:
            yield "trade_memory", point.name or "as asked", point.family, point.peak_bytes, "B"
            yield "trade_time", point.name or "as asked", point.family, point.step_s, "s"
        for skew in self.over_skew:
            yield "over_skew", "p50", skew.gini, skew.p50_bytes, "B"
            yield "over_skew", "p99", skew.gini, skew.p99_bytes, "B"
        for way in self.ways:
            yield "ways_to_fit", way.name, way.cost_fraction, way.headroom_bytes, "B"


def memory_study(
    scenario: Scenario, *, ginis: Sequence[float] = GINIS, progress: Progress | None = None
) -> MemoryStudy:
    """The study of one scenario. Raises InputError.

    >>> memory_study(scenario).fullest.stage  # doctest: +SKIP
    0
    """
    say = progress or (lambda _: None)
    say("the step as asked")
    trace = run_step(scenario)
    step = summarise(trace)
    return MemoryStudy(
        step=step,
        timeline=memory_timeline(trace),
        trades=tuple(_trades(scenario, say)),
        over_skew=tuple(_over_skew(scenario, ginis, say)) if scenario.model.is_moe else (),
        ways=ways_to_fit(scenario, progress),
        capacity_bytes=scenario.cluster.gpu.memory_bytes.value,
    )


def _trades(scenario: Scenario, say: Progress) -> Iterator[TradePoint]:
    """Recomputation by each module and of all, offloading, and both."""
    modules = [{"recompute": module} for module in (*useful_modules(scenario.model), "full")]
    away = [{"offload": parts} for parts in ("optimizer", "activations", "optimizer,activations")]
    families: dict[Family, list[dict[str, str]]] = {
        "asked": [{}],
        "recompute": [{"recompute": "none"}, *modules],
        "offload": away,
        "both": [{"recompute": "full", "offload": "optimizer"}],
    }
    asked = {"recompute": scenario.train.recompute, "offload": scenario.train.offload}
    loads: dict[str, Any] = {}
    for family, choices in families.items():
        for leaves in choices:
            if leaves and leaves.items() <= asked.items():
                continue
            say(f"what {name_of(leaves) or 'the asked setting'} trades")
            changed = scenario.with_(**leaves)
            peak = scenario.cluster.gpu.memory_bytes.value - headroom_bytes(changed, loads)
            yield TradePoint(family=family, leaves=leaves, peak_bytes=peak, step_s=predicted_step_s(changed))


def _over_skew(scenario: Scenario, ginis: Sequence[float], say: Progress) -> Iterator[SkewPoint]:
    for gini in ginis:
        say(f"memory at Gini {gini:g}")
        skewed = scenario.with_(popularity="lognormal", gini=gini)
        steps = memory_over_steps(skewed, SAMPLED_STEPS)
        yield SkewPoint(gini=gini, p50_bytes=steps.p50_bytes, p99_bytes=steps.p99_bytes)
