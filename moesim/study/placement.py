"""The placement study: policies against each other and against the bound, replicas against memory, ageing, step time.

Legend: L MoE layers, E experts, R ranks of an expert-parallel group, S slots of all its ranks.

Every policy places the load that is expected beforehand, and is judged by the load that one step then has. Balance and
traffic come from the layouts themselves; step time and memory come from simulating the scenario with that policy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.describe.model import Router
from moesim.errors import InputError, NotModelledError, check
from moesim.metrics.step import StepResult
from moesim.placement.nodes import cross_node_tokens, renumbered
from moesim.placement.policies import POLICIES, Known, NodeAware, Policy
from moesim.placement.price import Migration, SlotBytes, moved_slots
from moesim.placement.slots import LayerPlacements
from moesim.scenario import Scenario
from moesim.seeds import stream
from moesim.study.ageing import NOT_AGED, Ageing, aged_layouts
from moesim.study.place import (
    PlacedLoad,
    expert_bytes,
    load_of,
    measured,
    migration_of,
    policy_of,
)
from moesim.study.simulate import simulate
from moesim.timeline.load import step_load
from moesim.timeline.placed import Choices, scenario_ranks, token_choices

Floats = NDArray[np.float64]
Progress = Callable[[str], None]
Row = tuple[str, str, float | str, float | str | bool, str]  # section, name, x, value, unit

BEST_POLICY = "search"
IN_ORDER = ("contiguous", "striped", "eplb", "eplb_global")  # layouts that come with the order of their GPUs
EXTRA_SLOTS = (0, 1, 2, 4)  # expert slots of a GPU beyond its even part, where nobody says which to try
LOAD_LIMITS = (0.0, 0.02, 0.05, 0.1, 0.2)  # of the search's max/mean, traded for fewer copies between nodes
GAIN = 0.005  # of the busiest GPU's load, or of a step: less is none
ROUNDING = 1e-9  # steps that differ by less are equal, such as those that wait for the host


@dataclass(frozen=True, kw_only=True)
class StepNumbers:
    """What a simulated step came to under one placement."""

    step_s: float
    tokens_per_s_per_gpu: float
    wait_s: float
    exposed_comm_s: float
    peak_bytes: float
    headroom_bytes: float
    fits: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacementPoint:
    """One policy with one number of slots. migration: from today's layout.

    cross_node_per_token_L: of each layer, copies of a token that leave its node. replica_bytes: on the fullest GPU,
    beyond its even part of one copy of each expert. step: None where moesim cannot simulate it; then reason says why.
    """

    policy: str
    num_slots: int
    placed: PlacedLoad
    cross_node_per_token_L: Floats
    migration: Migration
    replica_bytes: SlotBytes
    step: StepNumbers | None
    reason: str = ""

    @property
    def max_mean(self) -> float:
        """Load of the busiest GPU over the mean, mean over layers."""
        return float(self.placed.max_mean_L.mean())

    @property
    def worst_max_mean(self) -> float:
        """The same in the most uneven layer."""
        return float(self.placed.max_mean_L.max())

    @property
    def lower_bound(self) -> float:
        """What no layout of these slots can beat, mean over layers."""
        return float(self.placed.lower_bound_L.mean())

    @property
    def cross_node_per_token(self) -> float:
        return float(self.cross_node_per_token_L.mean())

    def to_dict(self) -> dict[str, Any]:
        """Plain values; per layer: max_mean, lower_bound, cross_node_per_token, moved_slots."""
        moved_L = self.placed.moved_slots_L
        return {
            "policy": self.policy,
            "num_slots": self.num_slots,
            "max_mean": self.max_mean,
            "lower_bound": self.lower_bound,
            "cross_node_per_token": self.cross_node_per_token,
            "max_mean_by_layer": self.placed.max_mean_L.tolist(),
            "lower_bound_by_layer": self.placed.lower_bound_L.tolist(),
            "cross_node_per_token_by_layer": self.cross_node_per_token_L.tolist(),
            "moved_slots_by_layer": None if moved_L is None else moved_L.tolist(),
            "migration": dataclasses.asdict(self.migration),
            "replica_bytes": dataclasses.asdict(self.replica_bytes),
            "step": None if self.step is None else dataclasses.asdict(self.step),
            "reason": self.reason,
        }


@dataclass(frozen=True, kw_only=True)
class TradePoint:
    """A layout that may be load_limit_fraction less even than the search's, for fewer copies between nodes."""

    load_limit_fraction: float
    num_slots: int
    max_mean: float
    cross_node_per_token: float
    num_moved_slots: int


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacementStudy:
    """What the placement notebook shows. base: the scenario's own placement, today's. by_slots: the search."""

    scenario: Scenario
    layers: tuple[int, ...]  # the model's numbers of its MoE layers
    ranks_per_node: int
    base: PlacementPoint
    by_policy: tuple[PlacementPoint, ...]
    by_slots: tuple[PlacementPoint, ...]
    trades: tuple[TradePoint, ...]  # node_aware at LOAD_LIMITS; none where all ranks share a node
    ageing: Ageing

    @property
    def num_experts(self) -> int:
        return self.base.placed.placements.num_experts

    @property
    def num_nodes(self) -> int:
        """Nodes that an expert-parallel group lies on."""
        return self.base.placed.placements.ranks.num_nodes

    @property
    def best(self) -> PlacementPoint:
        """The policy with the most even load; the first of equals."""
        return min(self.by_policy, key=lambda point: point.max_mean)

    @property
    def fastest(self) -> PlacementPoint:
        """The policy with the shortest simulated step, of equals the most even; that too where none was simulated."""
        simulated = [(point.step.step_s, point) for point in self.by_policy if point.step is not None]
        if not simulated:
            return self.best
        shortest_s = min(step_s for step_s, _ in simulated) * (1 + ROUNDING)
        return min((point for step_s, point in simulated if step_s <= shortest_s), key=lambda point: point.max_mean)

    @property
    def rearranging_helps(self) -> bool:
        """Whether any policy makes the load more even with as many slots as today."""
        return self.best.max_mean < self.base.max_mean * (1 - GAIN)

    @property
    def chosen_slots(self) -> PlacementPoint:
        """The fewest slots whose step is within GAIN of the shortest that fits; by balance where none was simulated."""
        fitting = [point for point in self.by_slots if point.step is not None and point.step.fits]
        costs = [point.step.step_s for point in fitting if point.step is not None]
        if not fitting:
            fitting, costs = list(self.by_slots), [point.max_mean for point in self.by_slots]
        return next(point for point, cost in zip(fitting, costs, strict=True) if cost <= min(costs) * (1 + GAIN))

    @property
    def after(self) -> PlacementPoint:
        """What to show beside today: the most even policy, or copies where rearranging does not help."""
        return self.best if self.rearranging_helps else self.chosen_slots

    @property
    def points(self) -> tuple[PlacementPoint, ...]:
        return (self.base, *self.by_policy, *self.by_slots)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the same for the same scenario and seed."""
        return {
            "scenario": self.scenario.to_dict(),
            "layers": list(self.layers),
            "base": self.base.to_dict(),
            "by_policy": [point.to_dict() for point in self.by_policy],
            "by_slots": [point.to_dict() for point in self.by_slots],
            "trades": [dataclasses.asdict(trade) for trade in self.trades],
            "ageing": dataclasses.asdict(self.ageing),
        }

    def rows(self) -> list[Row]:
        """One long table: section, name, x, value, unit; x is the number of slots, or the correlation."""
        rows: list[Row] = []
        for section, points in (("base", [self.base]), ("by_policy", self.by_policy), ("by_slots", self.by_slots)):
            rows += [row for point in points for row in _rows(section, point)]
        for trade in self.trades:
            for name in ("max_mean", "cross_node_per_token", "num_moved_slots"):
                rows.append(("trades", name, trade.load_limit_fraction, getattr(trade, name), "1"))
        for name, values in self.ageing.max_mean.items():
            pairs = zip(self.ageing.correlations, values, strict=True)
            rows += [("ageing", name, correlation, value, "1") for correlation, value in pairs]
        return rows


def _rows(section: str, point: PlacementPoint) -> list[Row]:
    found: dict[str, tuple[float | bool, str]] = {
        "max_mean": (point.max_mean, "1"),
        "worst_max_mean": (point.worst_max_mean, "1"),
        "lower_bound": (point.lower_bound, "1"),
        "cross_node_per_token": (point.cross_node_per_token, "1"),
        "num_moved_slots": (point.migration.num_moved_slots, "1"),
        "nvlink_bytes": (point.migration.nvlink_bytes, "B"),
        "nic_bytes": (point.migration.nic_bytes, "B"),
        "stall_s": (point.migration.stall_s, "s"),
        "replica_bytes": (point.replica_bytes.total_bytes, "B"),
    }
    if point.step is not None:
        units = {"step_s": "s", "wait_s": "s", "exposed_comm_s": "s", "tokens_per_s_per_gpu": "tokens/s", "fits": ""}
        found |= {name: (value, units.get(name, "B")) for name, value in dataclasses.asdict(point.step).items()}
    return [(section, f"{point.policy}.{name}", point.num_slots, *value) for name, value in found.items()]


def placement_study(
    scenario: Scenario,
    *,
    policies: Sequence[str] = (),
    slots: Sequence[int] = (),
    progress: Progress | None = None,
) -> PlacementStudy:
    """Place the scenario's load by each policy, with the best policy for each number of slots, and age the layouts.

    policies: names of moesim.study.place.POLICIES (none given: all that the ranks allow); slots: expert slots of all
    ranks of a group to try (none given: EXTRA_SLOTS on each GPU). Policies are compared at the scenario's own
    placement.num_slots (else one slot for each expert). progress: called with what comes next. Raises InputError and
    NotModelledError.

    >>> from moesim import Scenario
    >>> scenario = Scenario.make(model="mixtral-8x7b", cluster="h100-8x-ib400", num_gpus=64, ep=8)
    >>> placement_study(scenario, policies=("contiguous", "search")).best.policy  # doctest: +SKIP
    'search'
    """
    check(scenario.model.is_moe, "placement", "model", "must have experts to place", scenario.model.name)
    for policy in policies:
        policy_of(policy)

    def say(text: str) -> None:
        if progress is not None:
            progress(text)

    say("drawing the load")
    drawn, num_ranks = _draw(scenario), scenario.parallel.ep
    own = scenario.placement.policy
    say(f"{own}, as it is today")
    base = _point(drawn, own, drawn.today, lambda: scenario)
    # A layout that has aged is not the one that its policy would make today.
    known: dict[tuple[str, int], PlacementPoint] = {} if scenario.placement.age_steps else {(own, base.num_slots): base}

    def point(policy: str, num_slots: int) -> PlacementPoint:
        if (policy, num_slots) not in known:
            say(f"{policy}, {num_slots:,} slots")
            # The layout of the simulated step; only GPUs are renumbered, so that little moves.
            placements = drawn.placements(POLICIES[policy], num_slots)
            if policy not in IN_ORDER:
                placements = renumbered(placements, drawn.today)
            changed = partial(scenario.placed_anew, policy, num_slots)
            known[policy, num_slots] = _point(drawn, policy, placements, changed)
        return known[policy, num_slots]

    once = drawn.num_experts
    most = once * num_ranks  # every expert on every GPU
    tried = sorted(set(slots) or {once + extra * num_ranks for extra in EXTRA_SLOTS})
    asked = base.num_slots
    by_policy = tuple(point(policy, asked) for policy in dict.fromkeys(policies or possible_policies(drawn)))
    by_slots = tuple(point(BEST_POLICY, num_slots) for num_slots in tried if num_slots <= most)
    say("traffic against balance, and ageing")
    study = PlacementStudy(
        scenario=scenario,
        layers=drawn.layers,
        ranks_per_node=scenario.cluster.ranks_per_node,
        base=base,
        by_policy=by_policy,
        by_slots=by_slots,
        trades=_trades(drawn, asked),
        ageing=NOT_AGED,
    )
    num_slots = study.after.num_slots
    names = dict.fromkeys([*(point.policy for point in by_policy), BEST_POLICY])
    aged = aged_layouts(
        {name: drawn.placements(POLICIES[name], num_slots) for name in names} | {"today": drawn.today},
        drawn.load_LE,
        anew=lambda load_LE: drawn.placements(POLICIES[BEST_POLICY], num_slots, load_LE, Known()),
        rng=stream(scenario.seed, "drift"),
    )
    return dataclasses.replace(study, ageing=aged)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Drawn:
    """A scenario's load and what every point needs of it. today: the scenario's own placement."""

    scenario: Scenario
    expected_LE: Floats
    load_LE: Floats
    choices: Choices | None
    router: Router
    layers: tuple[int, ...]
    positions_by_stage: tuple[tuple[int, ...], ...]
    slot: SlotBytes
    today: LayerPlacements

    @property
    def num_experts(self) -> int:
        return int(self.load_LE.shape[1])

    def placements(
        self, policy: Policy, num_slots: int, load_LE: Floats | None = None, known: Known | None = None
    ) -> LayerPlacements:
        """The policy's layouts of the expected load, or of another one."""
        return policy(
            self.expected_LE if load_LE is None else load_LE,
            scenario_ranks(self.scenario, num_slots),
            rng=stream(self.scenario.seed, "placement"),
            known=known or self.known,
        )

    @property
    def known(self) -> Known:
        together = None if self.choices is None else self.choices.together_LEE
        return Known(num_groups=self.router.num_groups, coactivation_LEE=together)


def _draw(scenario: Scenario) -> _Drawn:
    drawn = step_load(scenario)
    assert drawn is not None, "a model without experts has nothing to place"
    return _Drawn(
        scenario=scenario,
        expected_LE=drawn.popularities.inclusion_LE,
        load_LE=load_of(drawn),
        choices=token_choices(drawn.popularities, stream(scenario.seed, "tokens")),
        router=drawn.moe.router,
        layers=drawn.layers,
        positions_by_stage=drawn.positions_by_stage,
        slot=expert_bytes(scenario),
        today=drawn.placed.layers,
    )


def possible_policies(drawn: _Drawn) -> list[str]:
    """All policies, without those that need more nodes, groups that nodes divide, or GPUs that are alike. by_load is
    EPLB's global one.
    """
    nodes, groups = drawn.today.ranks.num_nodes, drawn.router.num_groups
    left_out = {"eplb_global"}
    if not drawn.today.ranks.are_alike:
        left_out |= {"eplb", "search_hierarchical"}
    if nodes == 1 or groups % nodes:
        left_out.add("search_hierarchical")
    if nodes == 1 or drawn.choices is None:
        left_out.add("node_aware")
    return [name for name in POLICIES if name not in left_out]


def _point(drawn: _Drawn, policy: str, placements: LayerPlacements, changed: Callable[[], Scenario]) -> PlacementPoint:
    """Everything about one layout. changed: makes the scenario that has it."""
    num_slots = placements.ranks.num_slots
    placed = measured(policy, placements, drawn.load_LE, previous=drawn.today, choices=drawn.choices)
    layers_of_rank = max(len(positions) for positions in drawn.positions_by_stage)
    extra = (num_slots - drawn.num_experts) / placements.ranks.num_ranks * layers_of_rank
    step, reason = _step(changed)
    tokens_L = np.maximum(drawn.load_LE.sum(axis=1), 1e-300) / drawn.router.top_k
    return PlacementPoint(
        policy=policy,
        num_slots=num_slots,
        placed=placed,
        cross_node_per_token_L=placed.cross_node_tokens_L / tokens_L,
        migration=migration_of(drawn.scenario, drawn.today, placements),
        replica_bytes=SlotBytes(**{name: size * extra for name, size in dataclasses.asdict(drawn.slot).items()}),
        step=step,
        reason=reason,
    )


def _step(changed: Callable[[], Scenario]) -> tuple[StepNumbers | None, str]:
    """The simulated step of the scenario that changed makes, or why there is none."""
    try:
        return step_numbers(simulate(changed())), ""
    except (InputError, NotModelledError) as error:
        return None, str(error)


def step_numbers(result: StepResult) -> StepNumbers:
    """Of a simulated step, what a placement changes."""
    return StepNumbers(
        step_s=float(result.step_s),
        tokens_per_s_per_gpu=float(result.tokens_per_s_per_gpu),
        wait_s=float(result.wait_s),
        exposed_comm_s=float(result.exposed_comm_s),
        peak_bytes=float(result.memory["peak_bytes"]),
        headroom_bytes=float(result.headroom_bytes),
        fits=bool(result.fits),
    )


def _trades(drawn: _Drawn, num_slots: int) -> tuple[TradePoint, ...]:
    """node_aware at each of LOAD_LIMITS."""
    if drawn.today.ranks.num_nodes == 1 or drawn.choices is None:
        return ()
    points = []
    for limit in LOAD_LIMITS:
        placements = renumbered(drawn.placements(NodeAware(load_limit_fraction=limit), num_slots), drawn.today)
        crossing_L = cross_node_tokens(placements, drawn.choices.counted_LTK)
        points.append(
            TradePoint(
                load_limit_fraction=limit,
                num_slots=num_slots,
                max_mean=float(placements.max_mean(drawn.load_LE).mean()),
                cross_node_per_token=float(crossing_L.mean()),
                num_moved_slots=int(moved_slots(drawn.today, placements).sum()),
            )
        )
    return tuple(points)
