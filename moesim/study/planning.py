"""The planning study: all that the planning report asks about one scenario, in at most about 25 simulated steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.describe.counts import Description, describe
from moesim.errors import check
from moesim.metrics.step import StepResult
from moesim.scenario import Scenario
from moesim.study.gap import Gap, explain_gap
from moesim.study.links import BreakEven, break_even
from moesim.study.simulate import simulate
from moesim.study.sizes import DropPoint, EpPoint, SizePoint, cluster_sizes, drop_curve, memory_over_ep
from moesim.study.twins import Twins, compare_twins
from moesim.timeline.load import moe_layers

Progress = Callable[[str], None]  # what comes next, in words
Row = tuple[str, str, float | str, float | str | bool, str]  # section, name, x, value, unit

_UNITS = (("_bytes_per_s", "B/s"), ("_flops_per_s_per_gpu", "FLOP/s"), ("_bytes", "B"), ("_fraction", "1"), ("_s", "s"))
_STEP_UNITS = {"tokens_per_s": "tokens/s", "tokens_per_s_per_gpu": "tokens/s", "model_flops_per_s_per_gpu": "FLOP/s"}


@dataclass(frozen=True, kw_only=True)
class PlanningStudy:
    """What the planning report shows. twins, break_even: None for a model without experts."""

    scenario: Scenario
    tokens_to_train: float
    description: Description
    step: StepResult
    twins: Twins | None
    break_even: BreakEven | None
    memory_over_ep: tuple[EpPoint, ...]
    drop_curve: tuple[DropPoint, ...]
    cluster_sizes: tuple[SizePoint, ...]
    gap: Gap

    @property
    def load_layers(self) -> tuple[int, ...]:
        """Where the rows of ``step.load_LE`` stand in the model, a trained multi-token-prediction layer at its end."""
        return moe_layers(self.scenario)

    def to_dict(self) -> dict[str, Any]:
        """Plain values with sorted keys, the same for the same scenario and seed; nothing of when or where it ran."""
        twins = None
        if self.twins is not None:
            kinds = {"dense_active": self.twins.active, "dense_total": self.twins.total}
            twins = {
                **{name: _without_load(result) for name, result in kinds.items()},
                "parameters": self.twins.parameters,
                "widths": self.twins.widths,
                "notes": self.twins.notes,
                "cost_over_active": self.twins.cost_over_active,
                "cost_over_total": self.twins.cost_over_total,
            }
        values = {
            "scenario": self.scenario.to_dict(),
            "tokens_to_train": self.tokens_to_train,
            "description": self.description.to_dict(),
            "step": self.step.to_dict(),
            "twins": twins,
            "break_even": self.break_even,
            "memory_over_ep": self.memory_over_ep,
            "drop_curve": self.drop_curve,
            "cluster_sizes": self.cluster_sizes,
            "gap": self.gap.to_dict(),
        }
        plain = _plain(values)
        assert isinstance(plain, dict)
        return plain

    def rows(self) -> list[Row]:
        """The study as one long table: section, name, x, value, unit; x is what the value varies over, or ""."""
        rows = _step_rows("step", self.step)
        if self.twins is not None:
            rows += [
                row for name in ("active", "total") for row in _step_rows(f"dense_{name}", getattr(self.twins, name))
            ]
            for name in ("cost_over_active", "cost_over_total"):
                rows.append(("twins", name, "", float(getattr(self.twins, name)), "1"))
        if self.break_even is not None:
            for name, values in sorted(self.break_even.tokens_per_s_per_gpu.items()):
                pairs = zip(self.break_even.nic_bytes_per_s, values, strict=True)
                rows += [("nic_rate", name, rate, value, "tokens/s") for rate, value in pairs]
            for name in ("total_bytes_per_s", "active_bytes_per_s"):
                rate = getattr(self.break_even, name)
                rows.append(("break_even", name, "", "none" if rate is None else rate, "B/s"))
        rows += [("gap", step.name, "", step.step_s, "s") for step in self.gap.steps]
        for point in self.memory_over_ep:
            rows += [("memory_over_ep", part, point.ep, size, "B") for part, size in point.memory.items()]
            rows.append(("memory_over_ep", "fits", point.ep, point.fits, ""))
        for drop in self.drop_curve:
            for name in ("drop_fraction", "padding_fraction"):
                rows.append(("drop_curve", name, drop.capacity_factor, getattr(drop, name), "1"))
        for size in self.cluster_sizes:
            found = dataclasses.asdict(size)
            for name, unit in (
                ("step_s", "s"),
                ("tokens_per_s", "tokens/s"),
                ("days", "days"),
                ("fits", ""),
                ("ep", ""),
            ):
                if found[name] is not None:
                    rows.append(("cluster_sizes", name, size.num_gpus, found[name], unit))
            if size.reason:
                rows.append(("cluster_sizes", "reason", size.num_gpus, size.reason, ""))
        return rows


def planning_study(scenario: Scenario, tokens_to_train: float, progress: Progress | None = None) -> PlanningStudy:
    """Simulate the scenario and all that a planner compares it with.

    tokens_to_train: of the whole training run; progress: called with what comes next before each simulation. Raises
    InputError and NotModelledError.

    >>> planning_study(scenario, 15e12).step.fits  # doctest: +SKIP
    False
    """
    check(tokens_to_train > 0, "parameters", "tokens_to_train", "must be positive", tokens_to_train)

    def say(text: str) -> None:
        if progress is not None:
            progress(text)

    say(f"{scenario.model.name} on {scenario.cluster.num_gpus:,} GPUs")
    step = simulate(scenario)
    twins = links = None
    if scenario.model.is_moe:
        say("dense twins")
        twins = compare_twins(scenario, step)
        links = break_even(scenario, twins, say)
    say("memory over expert-parallel sizes")
    memory = memory_over_ep(scenario, step)
    say("drops over capacity factors")
    drops = drop_curve(scenario)
    say("from the roofline to the step")
    gap = explain_gap(scenario)
    sizes = cluster_sizes(scenario, tokens_to_train, step, say)
    return PlanningStudy(
        scenario=scenario,
        tokens_to_train=float(tokens_to_train),
        description=describe(scenario.model, scenario.train.seq_len),
        step=step,
        twins=twins,
        break_even=links,
        memory_over_ep=tuple(memory),
        drop_curve=tuple(drops),
        cluster_sizes=tuple(sizes),
        gap=gap,
    )


def _without_load(result: StepResult) -> dict[str, Any]:
    """A twin's result without its (empty) expert load and without what it shares with the MoE's."""
    left_out = ("load_LE", "provenance", "alerts", "drop_fraction_by_layer")
    return {name: value for name, value in result.to_dict().items() if name not in left_out}


def _step_rows(section: str, result: StepResult) -> list[Row]:
    values = result.to_dict()
    rows: list[Row] = []
    for name, value in values.items():
        if isinstance(value, bool | int | float):
            rows.append((section, name, "", value, _unit(name)))
    rows += [(section, f"step_parts_s.{part}", "", seconds, "s") for part, seconds in result.step_parts_s.items()]
    rows += [(section, f"memory.{part}", "", size, "B") for part, size in result.memory.items()]
    rows += [
        (section, "drop_fraction_by_layer", i, value, "1") for i, value in enumerate(result.drop_fraction_by_layer)
    ]
    return rows


def _unit(name: str) -> str:
    if name in _STEP_UNITS:
        return _STEP_UNITS[name]
    return next((unit for ending, unit in _UNITS if name.endswith(ending)), "" if name == "fits" else "1")


def _plain(value: Any) -> Any:
    """Dataclasses, tuples and arrays as what JSON knows, keys sorted."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(value[key]) for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return _plain(value.tolist()) if isinstance(value, np.ndarray | np.generic) else value
