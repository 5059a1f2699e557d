"""What a plan is asked: tokens, limits, which clusters at which price, and which settings it may choose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moesim.describe.checks import check_number, check_whole
from moesim.door.files import read_yaml
from moesim.door.parse import parse_as
from moesim.errors import check, near_match
from moesim.leaves import LEAVES
from moesim.scenario import Scenario
from moesim.study.plan_space import Space, space_of

# What a plan may vary: what it chooses by itself, and what it takes as it is given.
AXES = (
    *("num_gpus", "tp", "cp", "pp", "ep", "etp", "zero", "vpp", "dispatcher", "policy", "capacity_factor"),
    *("micro_batch", "recompute", "schedule", "overlap", "cp_kind", "layout", "num_first_stage_layers"),
    *("num_last_stage_layers", "embedding_as_layer", "loss_as_layer"),
)


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A kind of cluster that may be had: its preset or file, up to how many GPUs, at what price."""

    name: str
    price_per_gpu_hour: float | None = None
    max_gpus: int | None = None

    def __post_init__(self) -> None:
        if self.price_per_gpu_hour is not None:
            check_number("plan.clusters", "price_per_gpu_hour", self.price_per_gpu_hour)
            price = self.price_per_gpu_hour
            check(price > 0, "plan.clusters", "price_per_gpu_hour", "must be positive", price)
        if self.max_gpus is not None:
            check_whole("plan.clusters", "max_gpus", self.max_gpus)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a plan must keep. None: no limit."""

    deadline_s: float | None = None
    budget: float | None = None  # in the prices' currency
    memory_headroom_fraction: float = 0.05  # of a GPU's memory, free on the fullest one
    drop_fraction: float | None = None  # of assignments, at most
    mfu: float | None = None  # at least

    def __post_init__(self) -> None:
        for name in ("deadline_s", "budget", "memory_headroom_fraction", "drop_fraction", "mfu"):
            value = getattr(self, name)
            if value is not None:
                check_number("plan.limits", name, value)
        for name in ("deadline_s", "budget"):
            value = getattr(self, name)
            check(value is None or value > 0, "plan.limits", name, "must be positive", value)
        for name in ("memory_headroom_fraction", "drop_fraction", "mfu"):
            value = getattr(self, name)
            check(value is None or 0 <= value < 1, "plan.limits", name, "must lie in 0..1, below 1", value)


@dataclass(frozen=True, kw_only=True)
class PlanQuestion:
    """What is to be trained, on what, within which limits.

    base: model, batch, routing and whatever else no configuration changes, as a scenario file's mapping without a
    cluster. axes: values of the settings that are given or widened; the others are `plan_space`'s.
    """

    base: Mapping[str, Any]
    tokens: float
    offers: tuple[Offer, ...]
    max_gpus: int
    min_gpus: int = 1
    axes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    currency: str = "USD"
    folder: Path | None = None  # where files that base and offers name are looked up first

    def __post_init__(self) -> None:
        for name in self.axes:
            rule = "is no setting that a plan can vary"
            check(name in AXES, "plan.axes", name, rule, name, near_match(name, AXES))
        check_number("plan", "tokens", self.tokens)
        check(self.tokens > 0, "plan", "tokens", "must be positive", self.tokens)
        check(len(self.offers) > 0, "plan", "clusters", "must name at least one cluster", [])
        names = [offer.name for offer in self.offers]
        check(len(set(names)) == len(names), "plan", "clusters", "must not name one twice", names)
        check_whole("plan", "max_gpus", self.max_gpus)
        check_whole("plan", "min_gpus", self.min_gpus)
        rule = "must not exceed max_gpus"
        check(self.min_gpus <= self.max_gpus, "plan", "min_gpus", rule, self.min_gpus, f"It is {self.max_gpus}.")
        unpriced = [offer.name for offer in self.offers if offer.price_per_gpu_hour is None]
        rule = "must be given for every cluster or for none: a price is compared with prices"
        check(len(unpriced) in (0, len(names)), "plan", "price", rule, f"none for {', '.join(unpriced)}")
        check(self.is_priced or self.limits.budget is None, "plan", "budget", "needs prices", self.limits.budget)

    @property
    def is_priced(self) -> bool:
        return all(offer.price_per_gpu_hour is not None for offer in self.offers)

    def on(self, offer: Offer) -> Space:
        """The space of one offer. Raises InputError and NotModelledError."""
        raw = dict(self.base) | {"cluster": offer.name, "num_gpus": 1}
        parallel = raw.get("parallel")
        if isinstance(parallel, Mapping) and parallel.get("fsdp"):  # which stage 1, a scenario's default, is none of
            raw["parallel"] = dict(parallel) | {"zero": 3}
        base = Scenario.from_mapping(raw, owner="plan", folder=self.folder)
        most = min(self.max_gpus, offer.max_gpus or self.max_gpus)
        drops = bool(self.limits.drop_fraction) and base.routing.capacity_factor is None
        return space_of(base, min_gpus=self.min_gpus, max_gpus=most, asked=self.axes, drops=drops)


@dataclass(frozen=True, kw_only=True)
class PlanFile:
    """A plan file's shape. What it leaves out, options of the command may give."""

    schema: Literal[1] = 1
    base: str | Mapping[str, Any] = field(default_factory=dict)  # a scenario file, or what would stand in one
    tokens: float | None = None
    clusters: tuple[Any, ...] = ()  # names, or mappings with the fields of Offer
    max_gpus: int | None = None
    min_gpus: int = 1
    axes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    currency: str = "USD"

    @property
    def offers(self) -> tuple[Offer, ...]:
        """Raises InputError."""
        return tuple(
            Offer(name=item) if isinstance(item, str) else parse_as(Offer, item, "plan.clusters")
            for item in self.clusters
        )


def read_plan(path: str | Path) -> PlanFile:
    """A plan from its YAML file. Raises InputError."""
    return parse_as(PlanFile, read_yaml(path), str(path))


def without_axes(raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[Any, ...]]]:
    """A scenario file's mapping without the settings that a plan may vary, and these as axes of one value.

    >>> without_axes({"model": "olmoe-1b-7b", "parallel": {"ep": 8}})
    ({'model': 'olmoe-1b-7b', 'parallel': {}}, {'ep': (8,)})
    """
    kept = {name: dict(value) if isinstance(value, Mapping) else value for name, value in raw.items()}
    axes: dict[str, tuple[Any, ...]] = {}
    for name in AXES:
        *groups, last = LEAVES[name]
        at: Any = kept
        for group in groups:
            at = at.get(group) if isinstance(at, dict) else None
        if isinstance(at, dict) and last in at:
            value = at.pop(last)
            axes[name] = (tuple(value) if isinstance(value, list) else value,)
    return kept, axes
