"""Memory of one step stage by stage, and over many steps whose routing differs.

Legend: G expert-parallel groups, M micro-batches, L MoE layers, E experts, S steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moesim.cost.memory import RankMemory, StageProfile, fullest_of, stage_profile
from moesim.describe.schedules import make_schedule
from moesim.describe.workload import Balanced, Recorded, Training
from moesim.errors import check
from moesim.routing.popularity import Popularities, popularity_LE
from moesim.scenario import Scenario
from moesim.seeds import stream
from moesim.timeline.load import StepLoad, redrawn, step_load

Floats = NDArray[np.float64]
Progress = Callable[[str], None]
Redraw = Literal["counts", "favourites", "drift"]
SAMPLED_STEPS = 16  # for one simulated step; a chance of 1 % is read off their law, not counted
MOST_COUNTS = 300_000  # drawn of a sampled step, over groups, micro-batches, layers and experts
PLACED_BLINDLY = ("contiguous", "striped", "random", "map")  # policies that do not look at the load
_VARYING = ("peak_bytes", "activations_bytes", "dispatch_bytes")
_EULER = 0.5772156649015329


@dataclass(frozen=True, kw_only=True)
class MemoryOverSteps:
    """Memory of the fullest GPU in each of S steps [bytes]: all of it, and of it activations and dispatch buffers; and
    what a GPU holds.

    redraw: what differs between steps. The chance beyond what was sampled is read off a Gumbel law with the samples'
    mean and variance: each sample is the largest of many ranks, micro-batches and layers.
    """

    redraw: Redraw
    peak_bytes_S: tuple[float, ...]
    activations_bytes_S: tuple[float, ...]
    dispatch_bytes_S: tuple[float, ...]
    capacity_bytes: float

    @property
    def p50_bytes(self) -> float:
        return float(np.quantile(self.peak_bytes_S, 0.5))

    @property
    def p90_bytes(self) -> float:
        return float(np.quantile(self.peak_bytes_S, 0.9))

    @property
    def p99_bytes(self) -> float:
        """The peak that 99 of 100 steps stay under: the fitted law's, or the samples' where that is higher."""
        place, scale = self._gumbel
        return max(place - scale * math.log(-math.log(0.99)), float(np.quantile(self.peak_bytes_S, 0.99)))

    @property
    def out_of_memory_fraction(self) -> float:
        """Probability that a step needs more than a GPU holds."""
        place, scale = self._gumbel
        if scale == 0.0:
            return float(place > self.capacity_bytes)
        # Far above capacity exp overflows to inf, which is certainty.
        exponent = min((place - self.capacity_bytes) / scale, 700.0)
        return -math.expm1(-math.exp(exponent))

    @property
    def fits_at_p99(self) -> bool:
        return self.p99_bytes <= self.capacity_bytes

    @property
    def _gumbel(self) -> tuple[float, float]:
        """(mode, scale) of the Gumbel law with the samples' mean and variance."""
        peaks_S = np.array(self.peak_bytes_S)
        scale = float(peaks_S.std(ddof=1)) * math.sqrt(6.0) / math.pi if peaks_S.size > 1 else 0.0
        return float(peaks_S.mean()) - _EULER * scale, scale

    def to_dict(self) -> dict[str, object]:
        """Plain values: the samples and what follows from them."""
        names = ("p50_bytes", "p90_bytes", "p99_bytes", "out_of_memory_fraction", "fits_at_p99")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in names}

    def quantiles(self) -> dict[str, dict[str, float]]:
        """P50, P90 and P99 of the whole and of its two parts that routing moves [bytes]; the whole's P99 as above."""
        shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
        found = {
            name: {word: float(np.quantile(getattr(self, f"{name}_S"), share)) for word, share in shares.items()}
            for name in _VARYING
        }
        found["peak_bytes"]["p99"] = self.p99_bytes
        return found


def memory_by_stage(scenario: Scenario, load: StepLoad | None, train: Training | None = None) -> list[RankMemory]:
    """The worst rank's memory of each stage under a load, replicas included.

    train: the scenario's own by default; another where the load is a sample of fewer micro-batches.
    """
    return [fullest_of(profile_of(scenario, load, stage, train)) for stage in range(scenario.parallel.pp)]


def profile_of(scenario: Scenario, load: StepLoad | None, stage: int, train: Training | None = None) -> StageProfile:
    """Memory of one stage's ranks, operation by operation. train: as for ``memory_by_stage``."""
    return stage_profile(
        scenario.model,
        scenario.parallel,
        scenario.layout,
        train or scenario.train,
        stage=stage,
        received_GMLR=None if load is None else load.received_GMLR(stage),
        expert_copies=scenario.expert_copies,
        dispatcher=scenario.routing.dispatcher,
    )


def expected_redraw(scenario: Scenario) -> Redraw:
    """What is taken to differ between this scenario's steps where nobody says: its drift, where it has one; which
    experts are popular, where nobody knows that beforehand; chance alone, where a recording says it, or where experts
    are placed by their load (other favourites would be placed as well).
    """
    if drift_of(scenario) is not None:
        return "drift"
    is_known = isinstance(scenario.routing.popularity, Balanced | Recorded)
    return "counts" if is_known or scenario.placement.policy not in PLACED_BLINDLY else "favourites"


def memory_over_steps(
    scenario: Scenario,
    num_steps: int = SAMPLED_STEPS,
    *,
    redraw: Redraw = "favourites",
    base: StepLoad | None = None,
    own: RankMemory | None = None,
    progress: Progress | None = None,
) -> MemoryOverSteps:
    """Memory of the fullest GPU over num_steps steps, each with its own routing; no clock runs.

    redraw: ``counts`` draws each step's tokens anew under one popularity, as in consecutive steps; ``favourites`` also
    hands the same popularities to other experts of each layer (groups of a group-limited router stay together), as a
    long run or another seed may: nobody knows beforehand which experts will be popular. ``drift`` lets the scenario's
    own popularity drift by its correlation.drift_steps from one sampled step to the next. base, own: the step's load
    and its fullest GPU, where they are known. A step of more than MOST_COUNTS counts is sampled by some of its groups
    and micro-batches; what the whole of the scenario's own step needs beyond such a part of it is added to each.
    A dense model, or forced balance, is alike in all steps. Raises InputError. docs/model.md#memory-over-steps.
    """
    check(num_steps >= 2, "parameters", "num_steps", "must be at least 2", num_steps)
    drift_steps = drift_of(scenario)
    rule = "must be given for memory under drift"
    check(redraw != "drift" or drift_steps is not None, "routing.popularity.correlation", "drift_steps", rule, None)
    start = step_load(scenario) if base is None else base
    own = own or fullest(scenario, start)
    found, rest = [own], dict.fromkeys(_VARYING, 0.0)
    if start is not None and not (isinstance(scenario.routing.popularity, Balanced) and start.popularities.is_uniform):
        part = start.first(*_part(scenario, start))
        train = _training_of(scenario, part)
        of_part = fullest(scenario, part, train)
        rest = {name: getattr(own, name) - getattr(of_part, name) for name in _VARYING}
        found = []
        rng = stream(scenario.seed, f"memory over steps: {redraw}")
        for number in range(num_steps):
            if number % 8 == 0 and progress is not None:
                progress(f"memory, {redraw} of step {number + 1} of {num_steps}")
            popularities = part.popularities
            if redraw == "favourites":
                popularities = other_favourites(popularities, rng)
            elif drift_steps is not None and redraw == "drift":
                later = scenario.placement.age_steps + number * math.ceil(drift_steps)
                popularities = _drifted(scenario, part, later)
            found.append(fullest(scenario, redrawn(scenario, part, popularities, rng), train))
    return MemoryOverSteps(
        redraw=redraw,
        capacity_bytes=scenario.cluster.gpu.memory_bytes.value,
        **{f"{name}_S": tuple(getattr(memory, name) + rest[name] for memory in found) for name in _VARYING},
    )


def fullest(scenario: Scenario, load: StepLoad | None, train: Training | None = None) -> RankMemory:
    """Memory of the fullest rank of any stage under a step's load. train: as for ``memory_by_stage``."""
    return max(memory_by_stage(scenario, load, train), key=lambda memory: memory.peak_bytes)


def _part(scenario: Scenario, load: StepLoad) -> tuple[int, int]:
    """(groups, micro-batches) that a sampled step is drawn with: whole fills of the pipeline, at least one."""
    num_groups, num_micro_batches, num_layers, num_experts = load.load.assigned_GMLE.shape
    each, filled = num_layers * num_experts, micro_batches_to_fill(scenario)
    fills = MOST_COUNTS // (num_groups * each * filled)
    num_micro_batches = min(num_micro_batches, max(fills, 1) * filled)
    return min(num_groups, max(MOST_COUNTS // (num_micro_batches * each), 1)), num_micro_batches


def micro_batches_to_fill(scenario: Scenario) -> int:
    """Micro-batches of one fill of the pipeline, from both ends where the schedule has two lines."""
    p = scenario.parallel
    return p.pp * make_schedule(scenario.train.schedule, pp=p.pp, vpp=p.vpp).num_lines


def _training_of(scenario: Scenario, part: StepLoad) -> Training:
    """The scenario's training with as many micro-batches as a part of its step has."""
    per_round = scenario.train.micro_batch * scenario.layout.dp
    return dataclasses.replace(scenario.train, global_batch=per_round * part.load.assigned_GMLE.shape[1])


def drift_of(scenario: Scenario) -> float | None:
    """Steps after which the scenario's popularity has forgotten most of itself; None where it stays."""
    popularity = scenario.routing.popularity
    return None if isinstance(popularity, Balanced | Recorded) else popularity.correlation.drift_steps


def _drifted(scenario: Scenario, base: StepLoad, step: int) -> Popularities:
    """The scenario's popularity as it is at a later step."""
    return popularity_LE(
        scenario.routing.popularity,
        num_layers=len(base.layers),
        num_experts=base.moe.num_experts,
        router=base.moe.router,
        rng=stream(scenario.seed, "popularity"),
        step=step,
    )


def other_favourites(popularities: Popularities, rng: np.random.Generator) -> Popularities:
    """The same popularities on other experts: each layer's are shuffled, groups as wholes and inside themselves.

    The skew stays exactly what it was; drawn tokens (the pool) do not follow and are left out.
    """
    groups = popularities.router.num_groups
    num_layers, num_experts = popularities.inclusion_LE.shape
    size = num_experts // groups
    inside_LNS = rng.permuted(np.broadcast_to(np.arange(size), (num_layers, groups, size)), axis=-1)
    group_LN = rng.permuted(np.broadcast_to(np.arange(groups), (num_layers, groups)), axis=-1)
    order_LE = (group_LN[:, :, None] * size + inside_LNS).reshape(num_layers, num_experts)

    def shuffled(values: Floats) -> Floats:
        return np.take_along_axis(values, np.broadcast_to(order_LE, values.shape), axis=-1)

    domains, first_LE = popularities.domains, popularities.first_LE
    if domains is not None:
        domains = dataclasses.replace(
            domains,
            log_weights_DLE=shuffled(domains.log_weights_DLE),
            inclusion_DLE=shuffled(domains.inclusion_DLE),
        )
    return dataclasses.replace(
        popularities,
        log_weights_LE=shuffled(popularities.log_weights_LE),
        inclusion_LE=shuffled(popularities.inclusion_LE),
        pool_LTK=None,
        domains=domains,
        first_LE=None if first_LE is None else shuffled(first_LE),
    )
