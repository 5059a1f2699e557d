"""How many GPUs of which kind: days, GPU-hours and cost over kinds and sizes, with ranges, and what binds at each.

The engine runs one step for each kind and size; how far it may be off is drawn once for each kind, at the size asked
for, and taken for the kind's other sizes. See docs/model.md#uncertainty.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.catalog.hardware import load_cluster
from moesim.describe.hardware import Cluster
from moesim.errors import MoesimError
from moesim.metrics.memory import fullest
from moesim.metrics.step import COMM_PARTS
from moesim.metrics.summary import binds, step_parts
from moesim.scenario import Scenario
from moesim.study.goodput import Range, RunPlan
from moesim.study.sizes import SizePoint, scenario_on
from moesim.study.uncertainty import SAMPLED_FILLS, UncertaintyPlan, goodput_over_rates, uncertainty_study, with_fills
from moesim.study.uncertainty_inputs import Spread
from moesim.timeline.step import run_step
from moesim.units import DAY_S, HOUR_S

Progress = Callable[[str], None]
Floats = NDArray[np.float64]
RATIOS = (0.5, 1.0, 2.0)
NUM_SEEDS = 1  # at each of three skews: a seed moves a step of many ranks by 1 %
GROUPS = ("arithmetic", "waiting for the host", "communication", "waiting for the slowest GPU", "pipeline bubble")


@dataclass(frozen=True, kw_only=True)
class SizedRun:
    """One kind and size. Numbers are None where it is impossible; reason says why, or what had to change."""

    cluster: str
    gpu: str
    num_gpus: int
    ep: int
    reason: str = ""
    step_s: float | None = None  # as predicted
    parts_s: Mapping[str, float] | None = None  # by GROUPS, summing to the step
    binds: str = ""
    peak_bytes: float | None = None
    memory_bytes: float | None = None
    days: Range | None = None
    gpu_hours: Range | None = None
    cost: Range | None = None
    model_error_told: str = ""

    @property
    def fits(self) -> bool:
        """Whether it can be, and its fullest GPU holds what it must."""
        return self.peak_bytes is not None and self.memory_bytes is not None and self.peak_bytes <= self.memory_bytes

    @property
    def name(self) -> str:
        return f"{self.num_gpus:,} × {self.gpu}"


@dataclass(frozen=True, kw_only=True)
class SizingStudy:
    """Kinds and sizes in the order asked for."""

    scenario: Scenario
    run: RunPlan
    deadline_days: float | None
    points: tuple[SizedRun, ...]

    @property
    def fitting(self) -> tuple[SizedRun, ...]:
        """Those that fit."""
        return tuple(point for point in self.points if point.fits)

    @property
    def in_time(self) -> tuple[SizedRun, ...]:
        """Those that fit and are done by the deadline in nine of ten draws; all that fit where there is none."""
        limit = self.deadline_days
        return tuple(p for p in self.fitting if limit is None or (p.days is not None and p.days.p90 <= limit))

    @property
    def cheapest(self) -> SizedRun | None:
        """Of those in time: the least cost where all of them are priced, else the fewest GPU-hours."""
        priced = all(point.cost is not None for point in self.in_time)
        return min(self.in_time, key=lambda p: _middle(p.cost if priced else p.gpu_hours), default=None)

    @property
    def fastest(self) -> SizedRun | None:
        return min(self.fitting, key=lambda p: _middle(p.days), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        chosen = {"cheapest": self.cheapest, "fastest": self.fastest}
        return {
            "points": [asdict(point) | {"fits": point.fits} for point in self.points],
            "deadline_days": self.deadline_days,
        } | {name: None if p is None else {"cluster": p.cluster, "num_gpus": p.num_gpus} for name, p in chosen.items()}

    def rows(self) -> list[tuple[str, str, float | str, float | str, str]]:
        """The study as one long table: section, name, GPUs, value, unit."""
        found: list[tuple[str, str, float | str, float | str, str]] = []
        for point in self.points:
            if point.step_s is None or point.peak_bytes is None:
                continue
            found.append((point.cluster, "step_s", point.num_gpus, point.step_s, "s"))
            found.append((point.cluster, "peak_bytes", point.num_gpus, point.peak_bytes, "bytes"))
            units = {"days": "days", "gpu_hours": "h", "cost": self.run.currency}
            for name, unit in units.items():
                ranged = getattr(point, name)
                if ranged is not None:
                    found += [
                        (point.cluster, f"{name}_{q}", point.num_gpus, value, unit)
                        for q, value in asdict(ranged).items()
                    ]
        return found


def sizing_study(
    scenario: Scenario,
    run: RunPlan,
    *,
    clusters: Sequence[str] = (),
    sizes: Sequence[int] = (),
    prices: Mapping[str, Spread] | None = None,
    deadline_days: float | None = None,
    gini_is_known: bool = True,
    progress: Progress | None = None,
) -> SizingStudy:
    """One run on every kind and size: its days, GPU-hours and cost as ranges, whether it fits, what binds.

    clusters: besides the scenario's own; sizes: numbers of GPUs, by default RATIOS of the scenario's. prices: of a GPU
    for an hour, by the GPU's name. A kind or size that cannot be says why. Raises InputError for an unknown cluster.
    """
    say = progress or (lambda _: None)
    asked = scenario.cluster
    kinds = [asked, *(load_cluster(name) for name in dict.fromkeys(clusters) if name != asked.name)]
    counts = sizes or [round(asked.num_gpus * ratio) for ratio in RATIOS]
    points = []
    for kind in kinds:
        price = (prices or {}).get(kind.gpu.name)
        plan = UncertaintyPlan(run=run, price_per_gpu_hour=price, num_seeds=NUM_SEEDS)
        points += _of_kind(scenario, kind, counts, replace(plan, gini=None) if gini_is_known else plan, say)
    return SizingStudy(scenario=scenario, run=run, deadline_days=deadline_days, points=tuple(points))


@dataclass(frozen=True, kw_only=True)
class _Drawn:
    """What was drawn for one kind: a step's time over the predicted one, failures per GPU and hour, price."""

    factor: Floats
    failures: Floats
    price: Floats | None
    told: str


def _of_kind(
    scenario: Scenario, kind: Cluster, counts: Sequence[int], plan: UncertaintyPlan, say: Progress
) -> list[SizedRun]:
    """All sizes of one kind."""
    candidates = {num: scenario_on(scenario, num, kind) for num in counts}
    possible = [one for one in candidates.values() if isinstance(one, Scenario)]
    drawn: _Drawn | None = None
    points = []
    for num, candidate in candidates.items():
        if isinstance(candidate, SizePoint):
            points.append(_impossible(kind, num, candidate.ep, candidate.reason))
            continue
        try:
            if drawn is None:  # at the size nearest to the one asked for
                nearest = min(possible, key=lambda one: abs(one.cluster.num_gpus - scenario.cluster.num_gpus))
                drawn = _drawn(nearest, plan, lambda text: say(f"{kind.gpu.name}: {text}"))
            say(f"{num:,} × {kind.gpu.name}")
            points.append(_sized(scenario, candidate, plan, drawn))
        except MoesimError as error:
            points.append(_impossible(kind, num, candidate.parallel.ep, str(error)))
    return points


def _impossible(kind: Cluster, num_gpus: int, ep: int, reason: str) -> SizedRun:
    return SizedRun(cluster=kind.name, gpu=kind.gpu.name, num_gpus=num_gpus, ep=ep, reason=reason)


def _drawn(scenario: Scenario, plan: UncertaintyPlan, say: Progress) -> _Drawn:
    """How far a step may be off, from one with few micro-batches; the rest of the plan does not depend on them."""
    study = uncertainty_study(with_fills(scenario, SAMPLED_FILLS), plan, say)
    values = {unknown.name: unknown.drawn_N for unknown in study.unknowns}
    return _Drawn(
        factor=study.drawn_N["step_s"] / study.step.step_s,
        failures=values["failures"],
        price=values.get("price"),
        told=study.told,
    )


def _sized(asked: Scenario, scenario: Scenario, plan: UncertaintyPlan, drawn: _Drawn) -> SizedRun:
    """One size of a kind: its own step, its kind's draws."""
    assert plan.run is not None
    parts, peak_bytes = _parts_and_peak(scenario)
    step_s, cluster = sum(parts.values()), scenario.cluster
    communication = sum(parts[part] for part in COMM_PARTS)
    waiting, bubble = parts["wait_for_slowest"], parts["pipeline_bubble"]
    arithmetic = step_s - parts["host"] - communication - waiting - bubble
    groups = (arithmetic, parts["host"], communication, waiting, bubble)
    num_steps = plan.run.tokens / (scenario.train.global_batch * scenario.train.seq_len)
    total_s = num_steps * step_s * drawn.factor / goodput_over_rates(scenario, plan)(drawn.failures)
    gpu_hours = total_s / HOUR_S * cluster.num_gpus
    was, ep = asked.parallel.ep, scenario.parallel.ep
    return SizedRun(
        cluster=cluster.name,
        gpu=cluster.gpu.name,
        num_gpus=cluster.num_gpus,
        ep=ep,
        reason="" if ep == was else f"ep={ep}, since ep={was} does not divide this cluster's ranks per stage",
        step_s=step_s,
        parts_s=dict(zip(GROUPS, groups, strict=True)),
        binds=binds(parts, step_s),
        peak_bytes=peak_bytes,
        memory_bytes=cluster.gpu.memory_bytes.value,
        days=Range.of(total_s / DAY_S),
        gpu_hours=Range.of(gpu_hours),
        cost=None if drawn.price is None else Range.of(gpu_hours * drawn.price),
        model_error_told=drawn.told,
    )


def _parts_and_peak(scenario: Scenario) -> tuple[dict[str, float], float]:
    """Seconds of a step by part, summing to it, and bytes of its fullest GPU.

    Of a step with more than three fills of its pipeline only two are run, with one and with two fills: each further
    fill takes what the second does.
    """
    one, two = (with_fills(scenario, fills) for fills in (1, 2))
    of_one, of_two, rest = one.num_micro_batches, two.num_micro_batches, scenario.num_micro_batches
    last = scenario if rest <= of_one + of_two else two
    trace = run_step(last)
    parts, peak_bytes = step_parts(trace), float(fullest(last, trace.load).peak_bytes)
    if last is two:
        first, fills = step_parts(run_step(one)), (rest - of_two) / (of_two - of_one)
        parts = {part: seconds + fills * (seconds - first[part]) for part, seconds in parts.items()}
    return parts, peak_bytes


def _middle(found: Range | None) -> float:
    assert found is not None
    return found.p50
