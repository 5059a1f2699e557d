"""Is a design sound before money is spent: named gates with limits, each passed, warned of or failed, with its fix.

A design file holds a scenario, what is to be trained, and the limits of gates; a team reviews it in git and runs it in
CI. A gate's fix is the change that, predicted, passes the gate with the largest throughput. See docs/model.md#gates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from moesim.describe.checks import check_number
from moesim.door.files import read_yaml
from moesim.door.parse import parse_as
from moesim.errors import InputError, MoesimError, check, near_match
from moesim.metrics.step import StepResult
from moesim.scenario import Scenario
from moesim.study.advice import single_changes
from moesim.study.fits import ways_to_fit
from moesim.study.goodput import UNKNOWN, GoodputStudy, RunPlan, goodput_study
from moesim.study.simulate import simulate

Progress = Callable[[str], None]
Status = Literal["pass", "warn", "fail"]
Sense = Literal["least", "most"]
MAX_TRIED = 5  # changes that are simulated for one gate
NUM_RUNS = 16


@dataclass(frozen=True, kw_only=True)
class GateRule:
    """What a gate asks: its number, which side of the limit is good, the house's own limits (None: asked for only)."""

    words: str
    sense: Sense
    unit: str
    limit: float | None
    warn: float | None = None
    needs_tokens: bool = False
    leaves: tuple[str, ...] = ()  # settings that bear on it, the likeliest to help first


# Limits without a source are this project's own judgement; a design file sets its own.
GATES: Mapping[str, GateRule] = MappingProxyType(
    {
        "memory_headroom": GateRule(
            words="free memory of the fullest GPU",
            sense="least",
            unit="of its memory",
            limit=0.02,
            warn=0.08,
            leaves=("recompute", "pp", "ep", "zero", "tp"),
        ),
        "out_of_memory": GateRule(
            words="steps that run out of memory",
            sense="most",
            unit="of all steps",
            limit=1e-3,
            warn=1e-5,
            leaves=("recompute", "policy", "pp", "ep", "zero"),
        ),
        "dropped": GateRule(
            words="assignments that are dropped", sense="most", unit="of all assignments", limit=0.05, warn=0.01
        ),
        "expert_load": GateRule(
            words="busiest expert over the mean of its layer", sense="most", unit="times", limit=6.0, warn=3.0
        ),
        "exposed_communication": GateRule(
            words="communication that nothing hides",
            sense="most",
            unit="of the step",
            limit=0.40,
            warn=0.25,
            leaves=("dispatcher", "ep", "overlap", "policy", "micro_batch"),
        ),
        "bubble": GateRule(
            words="pipeline fill and drain",
            sense="most",
            unit="of the step",
            limit=0.30,
            warn=0.15,
            leaves=("vpp", "pp"),
        ),
        "mfu": GateRule(
            words="model FLOPs over the peak",
            sense="least",
            unit="of the peak",
            limit=0.10,
            warn=0.20,
            leaves=("dispatcher", "cuda_graphs", "policy", "ep", "recompute", "vpp", "pp", "micro_batch"),
        ),
        "envelope": GateRule(
            words="things that are not modelled or not validated", sense="most", unit="reasons", limit=None, warn=0
        ),
        "goodput": GateRule(
            words="kept of all time, median",
            sense="least",
            unit="of all time",
            limit=0.80,
            warn=0.90,
            needs_tokens=True,
        ),
        "days": GateRule(
            words="days to all tokens, 9 of 10 runs", sense="most", unit="days", limit=None, needs_tokens=True
        ),
        "cost": GateRule(words="cost, 9 of 10 runs", sense="most", unit="", limit=None, needs_tokens=True),
    }
)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """A design's own limits of one gate; off: it is not asked."""

    limit: float | None = None
    warn: float | None = None
    off: bool = False

    def __post_init__(self) -> None:
        for name in ("limit", "warn"):
            if getattr(self, name) is not None:
                check_number("design.gates", name, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class _File:
    """The design file's shape."""

    scenario: str | Mapping[str, Any]
    schema: Literal[1] = 1
    name: str = ""
    tokens: float | None = None
    price_per_gpu_hour: float | None = None
    currency: str = "USD"
    fleet: str = UNKNOWN
    inspected: bool = False
    num_spares: int | None = None
    gates: Mapping[str, Limits] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Design:
    """What is to be validated: a scenario, a run (None: no tokens were named), limits by gate."""

    name: str
    scenario: Scenario
    plan: RunPlan | None
    limits: Mapping[str, Limits]


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One gate's answer. fix is "" where none is needed or none was found."""

    name: str
    status: Status
    value: float
    limit: float | None
    warn: float | None
    sense: Sense
    unit: str
    evidence: str
    fix: str = ""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """A design's gates, and the worst status among them."""

    design: Design
    gates: tuple[Gate, ...]
    step: StepResult
    run: GoodputStudy | None

    @property
    def status(self) -> Status:
        """fail where any gate failed, warn where any warned, else pass."""
        found = {gate.status for gate in self.gates}
        return next((status for status in ("fail", "warn") if status in found), "pass")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "name": self.design.name,
            "status": self.status,
            "gates": [asdict(gate) for gate in self.gates],
            "step_s": self.step.step_s,
            "tokens_per_s_per_gpu": self.step.tokens_per_s_per_gpu,
        }


def read_design(path: str | Path, change: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> Design:
    """A design from its YAML file. change: laid over the scenario's mapping. Raises InputError.

    >>> read_design("design.yaml").scenario.model.name  # doctest: +SKIP
    'deepseek-v3'
    """
    owner, folder = str(path), Path(path).parent
    file = parse_as(_File, read_yaml(path), owner)
    for name in file.gates:
        check(
            name in GATES, owner, f"gates.{name}", f"must be one of {', '.join(GATES)}", name, near_match(name, GATES)
        )
    raw, beside = file.scenario, folder
    if isinstance(raw, str):
        named = Path(raw) if Path(raw).is_absolute() else folder / raw
        raw, beside = read_yaml(named), named.parent
        check(isinstance(raw, dict), str(named), "", "must be a mapping of scenario fields", type(raw).__name__)
    scenario = Scenario.from_mapping((change or dict)(dict(raw)), owner=f"{owner}: scenario", folder=beside)
    plan = None
    if file.tokens is not None:
        plan = RunPlan(
            tokens=file.tokens,
            price_per_gpu_hour=file.price_per_gpu_hour,
            currency=file.currency,
            fleet=file.fleet,
            inspected=file.inspected,
            num_spares=file.num_spares,
            num_runs=NUM_RUNS,
        )
    for name in file.gates:
        rule = "needs tokens: how much is to be trained"
        check(
            plan is not None or not GATES[name].needs_tokens or file.gates[name].off, owner, f"gates.{name}", rule, None
        )
    priced = file.price_per_gpu_hour is not None or "cost" not in file.gates
    check(priced, owner, "gates.cost", "needs price_per_gpu_hour", None)
    return Design(name=file.name or Path(path).stem, scenario=scenario, plan=plan, limits=file.gates)


def validate(design: Design, progress: Progress | None = None) -> Validation:
    """Ask every gate. Raises NotModelledError and MoesimError as a simulation does."""
    say = progress or (lambda _: None)
    say("the step")
    step = simulate(design.scenario)
    run = None
    if design.plan is not None:
        run = goodput_study(design.scenario, design.plan, say)
    fixer = _Fixer(design=design, step=step, say=say)
    gates = []
    for name, rule in GATES.items():
        limits = design.limits.get(name, Limits())
        if limits.off or (rule.needs_tokens and run is None):
            continue
        gate = _judged(name, rule, limits, step, run)
        if gate is None:
            continue
        gates.append(replace(gate, fix=fixer.fix(gate)) if gate.status in ("warn", "fail") else gate)
    return Validation(design=design, gates=tuple(gates), step=step, run=run)


def passes(value: float, limit: float | None, sense: Sense) -> bool:
    """Whether a value keeps a limit; None is none.

    >>> passes(0.2, 0.1, "least"), passes(0.2, 0.1, "most")
    (True, False)
    """
    return limit is None or (value >= limit if sense == "least" else value <= limit)


def _judged(name: str, rule: GateRule, limits: Limits, step: StepResult, run: GoodputStudy | None) -> Gate | None:
    """The gate's answer without a fix; None for one that no limit asks."""
    limit = rule.limit if limits.limit is None else limits.limit
    # A limit of one's own, without a warning of one's own, is not warned about by the house's.
    warn = limits.warn if limits.warn is not None or limits.limit is not None else rule.warn
    value, evidence = _value(name, step, run)
    if value is None or (limit is None and warn is None):
        return None
    status: Status = "pass"
    if not passes(value, limit, rule.sense):
        status = "fail"
    elif not passes(value, warn, rule.sense):
        status = "warn"
    unit = run.plan.currency if name == "cost" and run is not None else rule.unit
    return Gate(
        name=name,
        status=status,
        value=value,
        limit=limit,
        warn=warn,
        sense=rule.sense,
        unit=unit,
        evidence=f"{rule.words}{': ' + evidence if evidence else ''}",
    )


def _value(name: str, step: StepResult, run: GoodputStudy | None) -> tuple[float | None, str]:
    """(the number that a gate asks for, what stands behind it)."""
    if run is not None and name == "goodput":
        return run.goodput_fraction.p50, f"P10 to P90 {run.goodput_fraction.p10:.1%} to {run.goodput_fraction.p90:.1%}"
    if run is not None and name == "days":
        return run.days.p90, f"median {run.days.p50:,.1f}"
    if name == "cost":
        found = run.cost if run is not None else None
        return (None, "") if found is None else (found.p90, f"median {found.p50:,.0f}")
    if name == "envelope":
        reasons = step.envelope["reasons"]
        return (
            (0.0, "")
            if step.envelope["inside"]
            else (float(len(reasons)), "; ".join(str(reason).removesuffix(".") for reason in reasons))
        )
    return step_value(name, step), _step_evidence(name, step)


def step_value(name: str, step: StepResult) -> float:
    """The number of a gate that one step answers."""
    return {
        "memory_headroom": step.headroom_bytes / (step.headroom_bytes + step.memory["peak_bytes"]),
        "out_of_memory": step.out_of_memory_fraction,
        "dropped": step.drop_fraction,
        "expert_load": step.max_mean_load,
        "exposed_communication": step.exposed_comm_s / step.step_s,
        "bubble": step.bubble_fraction,
        "mfu": step.mfu,
    }[name]


def _step_evidence(name: str, step: StepResult) -> str:
    parts = step.step_parts_s
    most = max(parts, key=lambda part: parts[part])
    return {
        "memory_headroom": f"stage {max(step.memory_by_rank, key=lambda rank: rank['peak_bytes'])['stage']} is fullest",
        "out_of_memory": "over redrawn loads",
        "expert_load": f"{len(step.alerts)} experts over 3 times the mean",
        "exposed_communication": f"{parts['dispatch'] + parts['combine']:.2f} s of {step.step_s:.2f} s to and "
        "from experts",
        "mfu": f"the step's largest part is {most.replace('_', ' ')}, {parts[most] / step.step_s:.0%}",
    }.get(name, "")


@dataclass(frozen=True, kw_only=True)
class _Fixer:
    """Looks for the change that passes a gate at the largest throughput; each change is simulated once."""

    design: Design
    step: StepResult
    say: Progress
    simulated: dict[str, StepResult | None] = field(default_factory=dict)

    @cached_property
    def ways(self) -> list[tuple[dict[str, Any], str]]:
        """Remedies where memory does not suffice, the cheapest first."""
        return [(dict(way.leaves), way.words) for way in ways_to_fit(self.design.scenario, self.say)]

    def fix(self, gate: Gate) -> str:
        """The cheapest change that passes the gate, in words; "" where none was found."""
        if gate.name in ("envelope", "goodput", "days", "cost"):
            return _RUN_FIXES.get(gate.name, "")
        memory = gate.name in ("memory_headroom", "out_of_memory")
        candidates = [*(self.ways if memory else []), *changes_for(gate.name, self.design.scenario)]
        wanted = gate.limit if gate.status == "fail" else gate.warn
        better: list[tuple[float, str]] = []
        nearest: tuple[float, str] | None = None
        for leaves, words in candidates[:MAX_TRIED]:
            found = self.try_out(leaves)
            if found is None:
                continue
            value = step_value(gate.name, found)
            told = _told(leaves, words, value, gate, found.step_s / self.step.step_s - 1)
            if passes(value, wanted, gate.sense):
                better.append((-found.tokens_per_s_per_gpu, told))
            elif not math.isclose(value, gate.value, rel_tol=0.01):
                gain = value - gate.value if gate.sense == "least" else gate.value - value
                nearest = max(filter(None, (nearest, (gain, told))), key=lambda one: one[0])
        if better:
            return min(better)[1]
        return f"nothing tried suffices; nearest: {nearest[1]}" if nearest is not None and nearest[0] > 0 else ""

    def try_out(self, leaves: Mapping[str, Any]) -> StepResult | None:
        """The step with some settings changed; None where they are impossible."""
        key = repr(sorted(leaves.items()))
        if key not in self.simulated:
            self.say(f"what if {', '.join(f'{name}={value}' for name, value in leaves.items())}")
            try:
                self.simulated[key] = simulate(self.design.scenario.with_(**leaves))
            except (InputError, MoesimError):
                self.simulated[key] = None
        return self.simulated[key]


def changes_for(gate: str, scenario: Scenario) -> list[tuple[dict[str, Any], str]]:
    """Single changes that may help one gate, the likeliest first."""
    factor = scenario.routing.capacity_factor
    if gate == "dropped" and factor:
        more = [({"capacity_factor": factor * by}, "experts take more before they drop") for by in (1.25, 1.5, 2.0)]
        return [*more, ({"capacity_factor": None}, "nothing is dropped")]
    order = {name: i for i, name in enumerate(GATES[gate].leaves)}
    found = [one for one in single_changes(scenario) if one[0].keys() & order.keys()]
    return sorted(found, key=lambda one: min(order.get(name, len(order)) for name in one[0]))


_RUN_FIXES = MappingProxyType(
    {
        "goodput": "watch machines (inspected: true), hold more spares (num_spares), or use calmer machines",
        "days": "a faster step, more GPUs, or fewer tokens: moesim plan searches",
        "cost": "a faster step, a lower price, or fewer tokens: moesim plan searches",
    }
)


def _told(leaves: Mapping[str, Any], words: str, value: float, gate: Gate, slower: float) -> str:
    settings = ", ".join(f"{name}={setting}" for name, setting in leaves.items())
    shown = f"{value:.1%}" if gate.unit.startswith("of ") else f"{value:.2f}"
    return f"{settings} ({words}): {shown}, step {abs(slower):.0%} {'longer' if slower > 0 else 'shorter'}"
