"""What each choice of a design costs: its axes varied one at a time beside dense twins, the hidden size fixed.

The attention, the depth, the cluster and the batch stay; what changes is the experts. Each point stands beside the two
dense models that bracket it: one of equal active, one of equal total size (``moesim.study.twins``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from moesim.describe.flops import training_flops_per_token
from moesim.describe.model import Layer, Model, MoeFfn
from moesim.describe.parameters import active_parameters, total_parameters
from moesim.errors import InputError, MoesimError, check, near_match
from moesim.metrics.step import StepResult
from moesim.scenario import Scenario
from moesim.study.quality import QualityEstimate, quality_of
from moesim.study.simulate import simulate
from moesim.study.twins import TwinKind, dense_twin, dense_twins
from moesim.units import GIGA, HOUR_S

Progress = Callable[[str], None]
Value = float | None  # None: no limit, of the capacity factor
Row = tuple[str, str, float | str, float | str | bool, str]

AXES = ("num_experts", "top_k", "expert_width", "granularity", "shared_experts", "moe_every", "capacity_factor")
_FACTORS = (0.5, 2.0)  # of what is asked, on the first four axes
_OWNER = "design axes"
NUMBERS: Mapping[str, str] = MappingProxyType(
    {
        "total_parameters": "1",
        "active_parameters": "1",
        "flops_per_token": "FLOP",
        "peak_bytes": "B",
        "comm_s": "s",
        "exposed_comm_s": "s",
        "wait_s": "s",
        "step_s": "s",
        "tokens_per_s_per_gpu": "tokens/s",
        "gpu_hours_per_billion_tokens": "h",
        "drop_fraction": "1",
    }
)


@dataclass(frozen=True, kw_only=True)
class DesignCost:
    """One model's sizes and its simulated step. flops_per_token: of training; comm_s: hidden or not [s a step]."""

    total_parameters: int
    active_parameters: int
    flops_per_token: float
    peak_bytes: float
    fits: bool
    step_s: float
    tokens_per_s_per_gpu: float
    compute_s: float
    comm_s: float
    exposed_comm_s: float
    wait_s: float
    bubble_s: float
    drop_fraction: float

    @property
    def gpu_hours_per_billion_tokens(self) -> float:
        """What a token costs before anybody names a price."""
        return GIGA / self.tokens_per_s_per_gpu / HOUR_S


@dataclass(frozen=True, kw_only=True)
class DesignPoint:
    """The design with one axis at another value, and its dense twins; cost and twins are None where it cannot be."""

    axis: str  # of AXES, or "" for the design as asked
    value: Value
    cost: DesignCost | None = None
    active: DesignCost | None = None
    total: DesignCost | None = None
    quality: QualityEstimate | None = None
    note: str = ""  # why it cannot be, or what had to change

    @property
    def name(self) -> str:
        """The change as it is typed."""
        return f"{self.axis}={value_words(self.value)}" if self.axis else "as asked"

    @property
    def costs(self) -> tuple[DesignCost, DesignCost, DesignCost]:
        """Of the MoE, its twin of equal active and its twin of equal total size; only of a point that can be."""
        assert self.cost is not None, self.note
        assert self.active is not None
        assert self.total is not None
        return self.cost, self.active, self.total


@dataclass(frozen=True, kw_only=True)
class DesignStudy:
    """The asked design, its variations, and where each axis stands in what was asked."""

    scenario: Scenario
    asked: DesignPoint
    asked_values: Mapping[str, Value]
    points: tuple[DesignPoint, ...]
    price_per_gpu_hour: float | None
    currency: str

    @property
    def possible(self) -> tuple[DesignPoint, ...]:
        """The variations that could be simulated."""
        return tuple(point for point in self.points if point.cost is not None)

    def on(self, axis: str) -> tuple[DesignPoint, ...]:
        """The simulated points of one axis with the asked one among them, least value first, no limit last."""
        asked = dataclasses.replace(self.asked, axis=axis, value=self.asked_values[axis])
        found = [asked, *(point for point in self.possible if point.axis == axis)]
        return tuple(sorted(found, key=lambda point: float("inf") if point.value is None else point.value))

    def spread_of(self, axis: str) -> float:
        """How many times what the cheapest point of an axis costs its dearest does."""
        hours = [point.costs[0].gpu_hours_per_billion_tokens for point in self.on(axis)]
        return max(hours) / min(hours)

    def money_per_billion_tokens(self, cost: DesignCost) -> float | None:
        """In the currency named; None without a price."""
        price = self.price_per_gpu_hour
        return None if price is None else price * cost.gpu_hours_per_billion_tokens

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the same for the same scenario and seed."""
        return {
            "asked_values": dict(self.asked_values),
            "price_per_gpu_hour": self.price_per_gpu_hour,
            "currency": self.currency,
            "points": [{"name": point.name, **dataclasses.asdict(point)} for point in (self.asked, *self.points)],
        }

    def rows(self) -> list[Row]:
        """One long table: section (moe, dense_active, dense_total), axis.number, value of the axis, value, unit."""
        rows: list[Row] = []
        for point in (self.asked, *self.possible):
            x = "" if not point.axis else value_words(point.value)
            for section, cost in zip(("moe", "dense_active", "dense_total"), point.costs, strict=True):
                axis = point.axis or "asked"
                rows += [(section, f"{axis}.{name}", x, getattr(cost, name), unit) for name, unit in NUMBERS.items()]
                rows.append((section, f"{axis}.fits", x, cost.fits, ""))
                money = self.money_per_billion_tokens(cost)
                if money is not None:
                    rows.append((section, f"{axis}.cost_per_billion_tokens", x, money, self.currency))
            if point.quality is not None and point.quality.loss is not None:
                rows.append(("quality_estimate", f"{point.axis or 'asked'}.loss", x, point.quality.loss, "nats/token"))
        return rows


def value_words(value: Value) -> str:
    """A value of an axis as it is typed.

    >>> value_words(None), value_words(64.0)
    ('none', '64')
    """
    return "none" if value is None else f"{value:g}"


def design_study(
    scenario: Scenario,
    *,
    values: Mapping[str, Sequence[Value]] | None = None,
    price_per_gpu_hour: float | None = None,
    currency: str = "USD",
    with_quality: bool = False,
    progress: Progress | None = None,
) -> DesignStudy:
    """Vary a scenario's model along AXES, one at a time, and simulate each point and its dense twins.

    values: what to try by axis (none given: halves and doubles, see ``default_values``); with_quality: ask the scaling
    law of ``moesim.study.quality``, too. A point that the scenario refuses says why. Raises InputError.

    >>> design_study(scenario, values={"top_k": [1, 2]}).possible[0].name  # doctest: +SKIP
    'top_k=1'
    """
    check(scenario.model.is_moe, _OWNER, "model", "must have MoE layers", scenario.model.name)
    price = price_per_gpu_hour
    check(price is None or price > 0, _OWNER, "price_per_gpu_hour", "must be positive", price)
    known = asked_values(scenario)
    tried = default_values(scenario) if values is None else values
    for axis in tried:
        check(axis in AXES, _OWNER, axis, "is not an axis", axis, near_match(axis, AXES))
    twins: dict[tuple[Layer, ...], DesignCost] = {}

    def point(axis: str, value: Value) -> DesignPoint:
        if progress is not None:
            progress(f"{axis} {value_words(value)}" if axis else scenario.model.name)
        try:
            varied, note = varied_scenario(scenario, axis, value) if axis else (scenario, "")
            cost = design_cost(varied, simulate(varied))
            beside = {kind: _twin_cost(twin, twins) for kind, twin in dense_twins(varied).items()}
        except MoesimError as error:
            return DesignPoint(axis=axis, value=value, note=str(error))
        quality = quality_of(varied.model) if with_quality else None
        return DesignPoint(axis=axis, value=value, cost=cost, quality=quality, note=note, **_by_kind(beside))

    asked = point("", None)
    if asked.cost is None:
        simulate(scenario)  # says why, as every other verb does
    points = tuple(point(axis, value) for axis, wanted in tried.items() for value in wanted if value != known[axis])
    return DesignStudy(
        scenario=scenario,
        asked=asked,
        asked_values=known,
        points=points,
        price_per_gpu_hour=price,
        currency=currency,
    )


def asked_values(scenario: Scenario) -> dict[str, Value]:
    """Where the scenario stands on each axis, by its first MoE layer."""
    moe = first_moe(scenario.model)
    return {
        "num_experts": moe.num_experts,
        "top_k": moe.router.top_k,
        "expert_width": moe.expert.width,
        "granularity": 1.0,
        "shared_experts": 0 if moe.shared is None else moe.shared.width / moe.expert.width,
        "moe_every": 1,
        "capacity_factor": scenario.routing.capacity_factor,
    }


def default_values(scenario: Scenario) -> dict[str, tuple[Value, ...]]:
    """Half and double of what is asked; no, one or two shared experts; every, every second or fourth MoE layer kept."""
    known = asked_values(scenario)
    tried: dict[str, tuple[Value, ...]] = {}
    for axis in AXES[:3]:
        asked = known[axis]
        assert asked is not None
        tried[axis] = tuple(asked * factor for factor in _FACTORS if (asked * factor) % 1 == 0)
    tried["granularity"] = _FACTORS
    tried["shared_experts"] = (0, 1, 2)
    tried["moe_every"] = (2, 4)
    tried["capacity_factor"] = (None, 1.0, 1.25, 1.5)
    return tried


def first_moe(model: Model) -> MoeFfn:
    """The block of the first MoE layer."""
    ffn = model.layers[model.moe_layers[0]].ffn
    assert isinstance(ffn, MoeFfn)
    return ffn


def varied_scenario(scenario: Scenario, axis: str, value: Value) -> tuple[Scenario, str]:
    """The scenario with one axis at a value, and what else had to change. Raises InputError where it cannot be."""
    if axis == "capacity_factor":
        return scenario.with_(capacity_factor=value), ""
    if value is None or value < 0 or (axis != "granularity" and axis != "shared_experts" and value % 1):
        raise InputError(_OWNER, axis, "must be a whole number", value_words(value))
    model = varied_model(scenario, axis, value)
    ep = asked_ep = scenario.parallel.ep
    while ep > 1 and ep % 2 == 0 and first_moe(model).num_experts % ep:
        ep //= 2
    note = "" if ep == asked_ep else f"ep={ep}, since ep={asked_ep} does not divide its experts"
    return scenario.with_(model=model, ep=ep), note


def varied_model(scenario: Scenario, axis: str, value: float) -> Model:
    """The scenario's model with every MoE layer changed alike; hidden size, attention and depth stay.

    ``granularity`` g cuts each expert into g: g times as many experts, g times as many of them used, each 1/g as wide.
    ``moe_every`` n keeps each n-th MoE layer; a block of equal active size takes the place of the others.
    """
    model = scenario.model
    if axis == "moe_every":
        dense = dense_twin(scenario, "active").layers
        left_out = {layer for i, layer in enumerate(model.moe_layers, start=1) if i % value}
        rule = f"must not exceed the {len(model.moe_layers)} MoE layers"
        check(len(left_out) < len(model.moe_layers), _OWNER, axis, rule, value_words(value))
        layers = tuple(dense[i] if i in left_out else layer for i, layer in enumerate(model.layers))
    else:
        layers = tuple(_with_experts(layer, axis, value) for layer in model.layers)
    return dataclasses.replace(
        model,
        name=f"{model.name}-{axis}-{value:g}",
        layers=layers,
        mtp_layers=tuple(_with_experts(layer, axis, value) for layer in model.mtp_layers),
        source=f"made from {model.name}: {axis}={value:g}",
        hypothetical=True,
        notes=(),
    )


def _with_experts(layer: Layer, axis: str, value: float) -> Layer:
    moe = layer.ffn
    if not isinstance(moe, MoeFfn) or axis == "moe_every":
        return layer
    expert, router = moe.expert, moe.router
    if axis == "shared_experts":
        width = _whole(axis, value * expert.width)
        shared = dataclasses.replace(expert, width=width) if width else None
        changed = dataclasses.replace(moe, shared=shared, has_shared_gate=moe.has_shared_gate and shared is not None)
        return dataclasses.replace(layer, ffn=changed)
    factor = value if axis == "granularity" else 1.0
    check(factor > 0, _OWNER, axis, "must be positive", value)
    wanted = {
        "num_experts": factor * moe.num_experts,
        "top_k": factor * router.top_k,
        "expert_width": expert.width / factor,
    } | ({axis: value} if axis != "granularity" else {})
    counts = {name: _whole(axis, number) for name, number in wanted.items()}
    changed = dataclasses.replace(
        moe,
        num_experts=counts["num_experts"],
        expert=dataclasses.replace(expert, width=counts["expert_width"]),
        router=dataclasses.replace(router, top_k=counts["top_k"]),
    )
    return dataclasses.replace(layer, ffn=changed)


def _whole(axis: str, number: float) -> int:
    check(number % 1 == 0, _OWNER, axis, "must leave whole experts of whole width", number)
    return int(number)


def design_cost(scenario: Scenario, result: StepResult) -> DesignCost:
    """A simulated scenario in the study's terms."""
    model = scenario.model
    return DesignCost(
        total_parameters=total_parameters(model),
        active_parameters=active_parameters(model),
        flops_per_token=training_flops_per_token(model, scenario.train.seq_len),
        peak_bytes=float(result.memory["peak_bytes"]),
        fits=bool(result.fits),
        step_s=float(result.step_s),
        tokens_per_s_per_gpu=float(result.tokens_per_s_per_gpu),
        compute_s=float(result.compute_s),
        comm_s=float(result.exposed_comm_s + result.hidden_comm_s),
        exposed_comm_s=float(result.exposed_comm_s),
        wait_s=float(result.wait_s),
        bubble_s=float(result.bubble_fraction * result.step_s),
        drop_fraction=float(result.drop_fraction),
    )


def _twin_cost(twin: Scenario, known: dict[tuple[Layer, ...], DesignCost]) -> DesignCost:
    """The twin's cost, simulated once for each stack of layers."""
    if twin.model.layers not in known:
        known[twin.model.layers] = design_cost(twin, simulate(twin))
    return known[twin.model.layers]


def _by_kind(costs: Mapping[TwinKind, DesignCost]) -> dict[str, DesignCost]:
    return {str(kind): cost for kind, cost in costs.items()}
