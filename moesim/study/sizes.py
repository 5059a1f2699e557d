"""Expert-parallel sizes, cluster sizes, capacity factors: tables of what fits, how long it takes, what is dropped."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moesim.cost.memory import RankMemory
from moesim.describe.hardware import Cluster
from moesim.errors import InputError, MoesimError
from moesim.metrics.memory import memory_by_stage
from moesim.metrics.step import MEMORY_PARTS, StepResult
from moesim.scenario import Scenario
from moesim.study.drops import FEW_DROPS, DropPoint, drop_point, needed_capacity
from moesim.study.simulate import simulate
from moesim.timeline.load import step_load
from moesim.units import DAY_S

MAX_GROUPS = 8
CLUSTER_RATIOS = (0.25, 0.5, 1.0, 2.0, 4.0)
CAPACITY_FACTORS = (0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)


@dataclass(frozen=True, kw_only=True)
class EpPoint:
    """Memory of the fullest rank at one expert-parallel size [bytes]."""

    ep: int
    memory: Mapping[str, float]  # MEMORY_PARTS and peak_bytes
    fits: bool
    headroom_bytes: float


@dataclass(frozen=True, kw_only=True)
class SizePoint:
    """Training on num_gpus GPUs: how long, or why not. Numbers are None where the scenario is impossible."""

    num_gpus: int
    ep: int
    step_s: float | None = None
    tokens_per_s: float | None = None
    tokens_per_s_per_gpu: float | None = None
    days: float | None = None  # to the tokens asked for, without interruptions
    fits: bool | None = None
    headroom_bytes: float | None = None
    reason: str = ""  # why it is impossible, or what had to change


def rank_memories(scenario: Scenario) -> list[RankMemory]:
    """The worst rank of each stage under a sample of the scenario's load; no clock runs.

    The sample holds at most MAX_GROUPS expert-parallel groups, and micro-batches to fill the pipeline twice over: a
    step has more of both, so its own hottest rank (``simulate``) may hold slightly more.
    """
    sample = _sample(scenario)
    batch = scenario.train.micro_batch * scenario.layout.dp * sample.num_micro_batches
    train = dataclasses.replace(scenario.train, global_batch=batch)
    return memory_by_stage(scenario, step_load(sample), train)


def _sample(scenario: Scenario) -> Scenario:
    """The scenario with fewer replicas and micro-batches, where it can do with fewer."""
    parallel, cluster = scenario.parallel, scenario.cluster
    num_groups, num_gpus = scenario.layout.edp, cluster.num_gpus
    while num_groups > MAX_GROUPS and num_groups % 2 == 0:
        num_groups, num_gpus = num_groups // 2, num_gpus // 2
    num_micro_batches = min(scenario.num_micro_batches, 2 * parallel.pp * parallel.vpp)
    dp = num_gpus // (parallel.tp * parallel.cp * parallel.pp)
    batch = scenario.train.micro_batch * dp * num_micro_batches
    try:
        return scenario.with_(cluster=dataclasses.replace(cluster, num_gpus=num_gpus), global_batch=batch)
    except InputError:  # so few GPUs fill no whole nodes, or no whole replica
        return scenario


def memory_over_ep(scenario: Scenario, step: StepResult | None = None) -> list[EpPoint]:
    """Memory at each expert-parallel size: powers of two that divide experts and ranks per stage, and the asked one.

    step: the asked scenario's own result, for the point at its size; the others are sampled (see rank_memories).
    """
    asked = scenario.parallel.ep
    sizes = {asked} | {2**n for n in range(scenario.layout.ranks_per_stage.bit_length())}
    capacity_bytes = scenario.cluster.gpu.memory_bytes.value
    points = []
    for ep in sorted(sizes):
        try:
            candidate = scenario if ep == asked else scenario.with_(ep=ep)
        except InputError:  # does not divide the experts, or the ranks of a stage
            continue
        if ep == asked and step is not None:
            memory = {part: step.memory[part] for part in (*MEMORY_PARTS, "peak_bytes")}
        else:
            worst = max(rank_memories(candidate), key=lambda memory: memory.peak_bytes)
            memory = {part: float(getattr(worst, part)) for part in (*MEMORY_PARTS, "peak_bytes")}
        headroom = capacity_bytes - memory["peak_bytes"]
        points.append(EpPoint(ep=ep, memory=memory, fits=headroom >= 0, headroom_bytes=headroom))
    return points


def cluster_sizes(
    scenario: Scenario,
    tokens_to_train: float,
    step: StepResult | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[SizePoint]:
    """A quarter to four times the GPUs with the same model, cut and global batch.

    Where the asked expert-parallel size does not divide the smaller cluster's ranks it is halved until it does, and the
    point says so; where nothing works, the point carries the reason of the size asked for.
    """
    points = []
    for ratio in CLUSTER_RATIOS:
        num_gpus = round(scenario.cluster.num_gpus * ratio)
        candidate = scenario_on(scenario, num_gpus)
        if isinstance(candidate, SizePoint):
            points.append(candidate)
            continue
        if progress is not None and not (ratio == 1.0 and step is not None):
            progress(f"{num_gpus:,} GPUs")
        result = step if ratio == 1.0 and step is not None else simulate(candidate)
        was, ep = scenario.parallel.ep, candidate.parallel.ep
        points.append(
            SizePoint(
                num_gpus=num_gpus,
                ep=ep,
                step_s=float(result.step_s),
                tokens_per_s=float(result.tokens_per_s),
                tokens_per_s_per_gpu=float(result.tokens_per_s_per_gpu),
                days=float(tokens_to_train / result.tokens_per_s / DAY_S),
                fits=bool(result.fits),
                headroom_bytes=float(result.headroom_bytes),
                reason="" if ep == was else f"ep={ep}, since ep={was} does not divide this cluster's ranks per stage",
            )
        )
    return points


def scenario_on(scenario: Scenario, num_gpus: int, cluster: Cluster | None = None) -> Scenario | SizePoint:
    """The scenario on another number of GPUs, of another cluster where one is given, with ep halved as often as it
    must be; or why there is none.
    """
    ep, refusal = scenario.parallel.ep, ""
    while ep >= 1:
        try:
            sized = dataclasses.replace(cluster or scenario.cluster, num_gpus=num_gpus)
            return scenario.with_(cluster=sized, ep=ep)
        except MoesimError as error:
            refusal = refusal or str(error)
        if ep % 2:
            break
        ep //= 2
    return SizePoint(num_gpus=num_gpus, ep=scenario.parallel.ep, reason=refusal)


def drop_curve(scenario: Scenario, factors: Sequence[float] = CAPACITY_FACTORS) -> list[DropPoint]:
    """Expected drops and padding over capacity factors, under the scenario's popularity; mean over the MoE layers.

    Among them stand the factor asked for and the least one, rounded up to 0.01, that drops at most FEW_DROPS.
    """
    load = step_load(scenario)
    if load is None:
        return []
    asked = scenario.routing.capacity_factor
    try:
        enough = needed_capacity(scenario, load.popularities, FEW_DROPS).capacity_factor
    except InputError:  # no factor reaches it
        least: set[float] = set()
    else:
        least = {math.ceil(100 * enough + 1e-9) / 100}
    wanted = sorted({*factors, *least, *([asked] if asked else [])})
    return [drop_point(scenario, load.popularities, factor) for factor in wanted]
