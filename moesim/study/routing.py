"""The routing study: how uneven the load is, what it drops, what that costs; all that the routing report shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesim.metrics.memory import MemoryOverSteps, Redraw, drift_of, memory_over_steps
from moesim.metrics.step import StepResult
from moesim.routing.recorded import RecordedRouting
from moesim.scenario import Scenario
from moesim.study.balance import HISTOGRAM_EVERY, BalanceCurve, balance_over_training
from moesim.study.drops import NeededCapacity, TokenDrops, needed_capacity, token_drops
from moesim.study.recording import RecordingFacts, recording_facts
from moesim.study.routed import RoutedLoad, as_recorded, routed_base, routed_load
from moesim.study.simulate import simulate
from moesim.study.skew import CostPoint, DropCurve, cost_over_capacity, cost_over_skew, drop_curves

Progress = Callable[[str], None]
Row = tuple[str, str, float | str, float | str | bool, str]  # section, name, x, value, unit
WANTED_DROP_FRACTION = 0.01
OTHER_DROP_FRACTIONS = (0.1, 0.05, 0.01, 0.001)  # whose capacity is shown beside the wanted one's
LEARNING_RATE = 3e-4  # assumed; published runs of this size take 2e-4 to 1e-3
_UNITS = {"step_s": "s", "wait_s": "s", "tokens_per_s_per_gpu": "tokens/s", "peak_bytes": "B", "drop_fraction": "1"}


@dataclass(frozen=True, kw_only=True)
class RoutingStudy:
    """One scenario's routing; a recording is the scenario's popularity where ``moesim.study.routed.as_recorded`` can.

    memory: peaks over consecutive steps, and over steps with other favourites or under the scenario's drift.
    """

    scenario: Scenario
    load: RoutedLoad
    needed: NeededCapacity
    needed_for: tuple[NeededCapacity, ...]  # several shares, the wanted one among them, the largest first
    tokens: TokenDrops | None  # None without a capacity factor, and for a recording
    drop_curves: tuple[DropCurve, ...]
    step: StepResult
    over_skew: tuple[CostPoint, ...]
    over_capacity: tuple[CostPoint, ...]
    memory: tuple[MemoryOverSteps, ...]
    balancing: tuple[BalanceCurve, ...] = ()
    recording: RecordingFacts | None = None  # what was recorded, where the load comes from a file

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the same for the same scenario, recording and seed; the results of ``moesim route`` on top."""
        return self.load.to_dict() | {
            "needed_capacity": dataclasses.asdict(self.needed),
            "token_drops": None if self.tokens is None else dataclasses.asdict(self.tokens),
            "needed_capacity_for": [dataclasses.asdict(needed) for needed in self.needed_for],
            "drop_curves": [dataclasses.asdict(curve) for curve in self.drop_curves],
            "over_skew": [dataclasses.asdict(point) for point in self.over_skew],
            "over_capacity": [dataclasses.asdict(point) for point in self.over_capacity],
            "memory_over_steps": [memory.to_dict() for memory in self.memory],
            "balancing": [curve.to_dict() for curve in self.balancing],
            "recording": None if self.recording is None else self.recording.to_dict(),
        }

    def rows(self) -> list[Row]:
        """The study as one long table: section, name, x, value, unit; x is what the value varies over, or ""."""
        found = self.load.to_dict()
        rows: list[Row] = [
            ("route", name, "", value, "") for name, value in found.items() if isinstance(value, int | float | str)
        ]
        for layer in found["by_layer"]:
            rows += [("by_layer", name, layer["layer"], value, "") for name, value in layer.items() if name != "layer"]
        rows += [("needed_capacity", name, "", value, "1") for name, value in dataclasses.asdict(self.needed).items()]
        if self.tokens is not None:
            rows += [("token_drops", name, "", value, "") for name, value in dataclasses.asdict(self.tokens).items()]
        for curve in self.drop_curves:
            section = f"drops at gini {curve.gini:.3f}" + (" (asked)" if curve.asked else "")
            for drop in curve.points:
                rows.append((section, "drop_fraction", drop.capacity_factor, drop.drop_fraction, "1"))
                rows.append((section, "padding_fraction", drop.capacity_factor, drop.padding_fraction, "1"))
        for point in self.over_skew:
            limit = "none" if point.capacity_factor is None else f"{point.capacity_factor:g}"
            rows += _cost_rows(f"over_skew, capacity factor {limit}", point.gini, point)
        for point in self.over_capacity:
            factor = "none" if point.capacity_factor is None else point.capacity_factor
            rows += _cost_rows("over_capacity", factor, point)
        for memory in self.memory:
            section = f"memory_over_steps, {memory.redraw}"
            rows += [(section, "peak_bytes", i, peak, "B") for i, peak in enumerate(memory.peak_bytes_S)]
            rows += [
                (section, name, "", getattr(memory, name), "B") for name in ("p50_bytes", "p90_bytes", "p99_bytes")
            ]
            rows.append((section, "out_of_memory_fraction", "", memory.out_of_memory_fraction, "1"))
        for balance in self.balancing:
            section = f"balancing, {balance.policy}"
            pairs = zip(balance.steps, balance.max_vio, strict=True)
            rows += [(section, "max_vio", step, value, "1") for step, value in pairs]
            rows += [(section, name, "", getattr(balance, name), "s") for name in ("lost_s", "settled_lost_s")]
        if self.recording is not None:
            plain = self.recording.to_dict().items()
            rows += [
                ("recording", name, "", value, "") for name, value in plain if isinstance(value, int | float | str)
            ]
        return rows


def _cost_rows(section: str, x: float | str, point: CostPoint) -> list[Row]:
    return [(section, name, x, getattr(point, name), unit) for name, unit in _UNITS.items()]


def routing_study(
    scenario: Scenario,
    *,
    wanted_drop_fraction: float = WANTED_DROP_FRACTION,
    num_steps: int = 32,
    training_steps: int = 0,
    learning_rate: float = LEARNING_RATE,
    histogram_every: int = HISTOGRAM_EVERY,
    step: StepResult | None = None,
    progress: Progress | None = None,
    recorded: str | Path | RecordedRouting | None = None,
) -> RoutingStudy:
    """Route a step and find what its skew costs: about 20 simulated steps, and num_steps drawn ones for memory.

    training_steps, learning_rate, histogram_every: of balancing over training (0 steps: left out); step: the scenario's
    own result, where it is known; progress: called with what comes next; recorded: routing that somebody recorded (see
    ``moesim.study.routed.routed_load``). Raises InputError and NotModelledError.

    >>> routing_study(scenario).needed.capacity_factor  # doctest: +SKIP
    2.18
    """

    def say(text: str) -> None:
        if progress is not None:
            progress(text)

    say("routing one step")
    scenario, recorded = as_recorded(scenario, recorded)
    load, popularities = routed_load(scenario, recorded)
    # Before anything long, since it refuses a share that is none.
    shares = sorted({wanted_drop_fraction, *OTHER_DROP_FRACTIONS}, reverse=True)
    needed = {share: needed_capacity(scenario, popularities, share) for share in shares}
    say("drops token by token")
    # Tokens are drawn anew, so a recording's own togetherness would be lost on them.
    tokens = token_drops(scenario, popularities) if load.source == "popularity" else None
    own = step
    if own is None:
        say("simulating the step")
        own = simulate(scenario)
    base = routed_base(scenario)
    balancing: list[BalanceCurve] = []
    if training_steps:
        balancing = balance_over_training(
            scenario,
            num_steps=training_steps,
            learning_rate=learning_rate,
            histogram_every=histogram_every,
            progress=progress,
        )
    redraws: tuple[Redraw, ...] = ("counts", "favourites" if drift_of(scenario) is None else "drift")
    return RoutingStudy(
        scenario=scenario,
        load=load,
        needed=needed[wanted_drop_fraction],
        needed_for=tuple(needed.values()),
        tokens=tokens,
        drop_curves=tuple(drop_curves(scenario, popularities, progress=progress)),
        step=own,
        over_skew=tuple(cost_over_skew(scenario, step=own, progress=progress)),
        over_capacity=tuple(cost_over_capacity(scenario, step=own, progress=progress)),
        memory=tuple(
            memory_over_steps(scenario, num_steps, redraw=redraw, base=base, progress=progress) for redraw in redraws
        ),
        balancing=tuple(balancing),
        recording=facts_of(load),
    )


def facts_of(load: RoutedLoad, against: str | Path | None = None) -> RecordingFacts | None:
    """What the load's recording says of itself; None where the load is drawn, or its recording was handed over open."""
    if load.source == "popularity" or not Path(load.source).is_file():
        return None
    return recording_facts(load.source, num_experts=load.num_experts, top_k=load.top_k, against=against)
