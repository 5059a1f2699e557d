"""What would make it fit: remedies one at a time, then two together, ranked by what they cost in time.

Every remedy is predicted: memory first, on a small sample of the step, then the time of those that fit. Modules to
recompute are taken in the order of the time that a saved byte costs, as predicted for this model on this GPU.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moesim.cost.recompute import useful_modules
from moesim.describe.workload import Training
from moesim.errors import InputError, MoesimError
from moesim.metrics.memory import memory_by_stage, micro_batches_to_fill
from moesim.scenario import Scenario
from moesim.timeline.load import StepLoad, step_load
from moesim.timeline.step import run_step

Leaves = Mapping[str, Any]
Progress = Callable[[str], None]
Loads = dict[str, StepLoad | None]
MOST_TOLD = 6
NUM_PAIRED = 5  # remedies that are tried two at a time, where none suffices alone
ALONE_SUFFICE = 2  # of these, pairs are not looked for
RECOMPUTE_ALL = "activations are made again in the backward pass instead of kept"
SOME_MODULES = "some parts of a layer are made again instead of kept, the cheapest first, until the rest fits"


@dataclass(frozen=True, kw_only=True)
class WayToFit:
    """A remedy, what the fullest GPU has left with it [bytes], and the step's time with it over the asked one's - 1,
    each for as many tokens.
    """

    leaves: Leaves  # flat names, as Scenario.with_ takes them
    words: str
    headroom_bytes: float
    cost_fraction: float

    @property
    def name(self) -> str:
        """The settings as they are typed: ``zero=3, micro_batch=1``."""
        return name_of(self.leaves)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "settings": dict(self.leaves),
            "words": self.words,
            "headroom_bytes": self.headroom_bytes,
            "cost_fraction": self.cost_fraction,
        }


def name_of(leaves: Leaves) -> str:
    """Settings as they are typed.

    >>> name_of({"zero": 3, "recompute": "full"})
    'zero=3, recompute=full'
    """
    return ", ".join(f"{leaf}={value}" for leaf, value in leaves.items())


def ways_to_fit(scenario: Scenario, progress: Progress | None = None) -> tuple[WayToFit, ...]:
    """The remedies with which a step fits, the cheapest in time first, at most MOST_TOLD; empty where none helps, or
    none is needed. Memory is that of a sample with one expert-parallel group and one fill of the pipeline's, time
    that of one fill and what each further round adds.

    >>> ways_to_fit(scenario)[0].name  # doctest: +SKIP
    'recompute=moe_act'
    """
    loads: Loads = {}
    if headroom_bytes(scenario, loads) >= 0:
        return ()
    asked_s = predicted_step_s(scenario)
    tried = with_headroom(scenario, [*module_choices(scenario, asked_s, loads), *remedies(scenario)], loads)
    fitting = [one for one in tried if one[2] >= 0]
    if len(fitting) < ALONE_SUFFICE:
        fitting += [one for one in with_headroom(scenario, list(_pairs(tried)), loads) if one[2] >= 0]
    found = []
    for leaves, words, headroom in sorted(fitting, key=lambda one: len(one[0]))[: 2 * MOST_TOLD]:
        if progress is not None:
            progress(f"what would make it fit: {name_of(leaves)}")
        cost = predicted_step_s(scenario.with_(**leaves)) / asked_s - 1.0
        found.append(WayToFit(leaves=leaves, words=words, headroom_bytes=headroom, cost_fraction=cost))
    return tuple(sorted(found, key=lambda way: (way.cost_fraction, -way.headroom_bytes))[:MOST_TOLD])


def remedies(scenario: Scenario) -> list[tuple[Leaves, str]]:
    """Settings that lower memory, one at a time, with what each means; some may be impossible here."""
    p, train = scenario.parallel, scenario.train
    found: list[tuple[Leaves, str]] = []
    if train.recompute != "full":
        found.append(({"recompute": "full"}, RECOMPUTE_ALL))
    shared = {1: "optimizer states", 2: "gradients too", 3: "weights too"}
    found += [
        ({"zero": stage}, f"replicas share out {words}, and exchange them") for stage, words in shared.items()
        if stage > p.zero
    ]  # fmt: skip
    if not train.fused_loss:
        found.append(({"fused_loss": True}, "the loss keeps no fp32 logits"))
    for offload in ("optimizer", "activations", "optimizer,activations"):
        if set(offload.split(",")) > set(train.offloaded):
            found.append(({"offload": offload}, f"{offload.replace(',', ' and ')} in the host's memory"))
    if train.optimizer.moments == "fp32":
        lean = {"gradients": "bf16", "main_weights": "remainder", "moments": "bf16"}
        found.append((lean, "gradients and the optimizer's averages in 2 bytes: other numbers, not only less memory"))
    if train.precision != "bf16" and train.optimizer.weights == "bf16" and train.optimizer.main_weights == "fp32":
        found.append(({"weights": "narrow"}, "layers' weights stand in the products' format alone"))
    if train.kept.activation_input == "bf16":
        words = "what activations take in waits for the backward in 8 bits: other numbers, not only less memory"
        found.append(({"activation_input": "fp8"}, words))
    if train.micro_batch > 1:
        found.append(({"micro_batch": train.micro_batch // 2}, "fewer tokens at a time, more often"))
    found.append(({"pp": p.pp * 2}, "more pipeline stages with fewer layers each"))
    found.append(({"tp": p.tp * 2}, "layers are cut over more GPUs, which then exchange activations"))
    found.append(({"cp": p.cp * 2}, "sequences are cut over more GPUs, which then exchange keys and values"))
    if scenario.model.is_moe:
        found.append(({"ep": p.ep * 2}, "more GPUs share the experts, so each holds fewer"))
    return found


def module_choices(
    scenario: Scenario, asked_s: float | None = None, loads: Loads | None = None
) -> list[tuple[Leaves, str]]:
    """The fewest modules to recompute with which the step fits, taken in the order of their predicted time for a saved
    byte; none where all of them are too few, or it fits already. asked_s: the step's predicted time, where known.
    """
    loads = {} if loads is None else loads
    free = headroom_bytes(scenario, loads)
    if free >= 0 or scenario.train.recompute == "full":
        return []
    base_s = predicted_step_s(scenario) if asked_s is None else asked_s
    chosen: list[str] = list(scenario.train.recomputed_modules)
    costs = []
    for module in useful_modules(scenario.model):
        if module in chosen:
            continue
        alone = scenario.with_(recompute=",".join([*chosen, module]))
        saved = headroom_bytes(alone, loads) - free
        if saved > 0:
            costs.append((max(predicted_step_s(alone) - base_s, 0.0) / saved, module))
    for _, module in sorted(costs):
        if module == "moe":  # which holds two of the others
            chosen = [name for name in chosen if name not in ("moe_act", "shared_experts")]
        chosen.append(module)
        leaves = {"recompute": Training(recompute=tuple(chosen)).recompute}
        if headroom_bytes(scenario.with_(**leaves), loads) >= 0:
            return [(leaves, SOME_MODULES)]
    return []


def with_headroom(
    scenario: Scenario, candidates: Sequence[tuple[Leaves, str]], loads: Loads | None = None
) -> list[tuple[Leaves, str, float]]:
    """Each candidate that is possible with the fullest GPU's free memory [bytes], negative where it does not fit."""
    loads = {} if loads is None else loads
    found = []
    for leaves, words in candidates:
        try:
            found.append((leaves, words, headroom_bytes(scenario.with_(**leaves), loads)))
        except MoesimError:  # does not divide, or is not modelled
            continue
    return found


def _pairs(tried: Sequence[tuple[Leaves, str, float]]) -> Iterator[tuple[Leaves, str]]:
    """Two remedies at once, of those that free the most."""
    best = sorted(tried, key=lambda one: -one[2])[:NUM_PAIRED]
    for (first, why, _), (second, also, _) in itertools.combinations(best, 2):
        if not first.keys() & second.keys():
            yield {**first, **second}, f"{why}; {also}"


def headroom_bytes(scenario: Scenario, loads: Loads | None = None) -> float:
    """Free memory of the fullest GPU under a small sample of the step's load [bytes]; negative where it does not fit.

    loads: what was drawn before, added to; remedies that leave the load as it is share one.
    """
    sample = _one_group(scenario)
    raw = sample.to_dict()
    shape = raw["train"] | dict.fromkeys(("recompute", "offload", "optimizer", "kept", "fused_loss"))
    key = json.dumps(raw | {"train": shape, "parallel": raw["parallel"] | {"zero": 0}}, sort_keys=True)
    loads = {} if loads is None else loads
    if key not in loads:
        loads[key] = step_load(sample)
    batch = scenario.train.micro_batch * scenario.layout.dp * sample.num_micro_batches
    train = dataclasses.replace(scenario.train, global_batch=batch)
    peak = max(memory.peak_bytes for memory in memory_by_stage(scenario, loads[key], train))
    return scenario.cluster.gpu.memory_bytes.value - peak


def predicted_step_s(scenario: Scenario) -> float:
    """Seconds of a step from one with a single fill of its pipeline: every further round of micro-batches takes what
    the busiest stage does for it.
    """
    filled = _micro_batches(scenario)
    batch = scenario.train.micro_batch * scenario.layout.dp * filled
    trace = run_step(scenario.with_(cluster=scenario.cluster, global_batch=batch))
    busy_s = max(
        sum(float(op.times.duration_MB.max(axis=1).sum()) + op.send_s * filled for op in run.operations) / filled
        for run in trace.stages
    )
    return trace.step_s + (scenario.num_micro_batches - filled) * busy_s


def _micro_batches(scenario: Scenario) -> int:
    """One fill of the pipeline: as many as a stage can hold."""
    return min(scenario.num_micro_batches, micro_batches_to_fill(scenario) * scenario.parallel.vpp)


def _one_group(scenario: Scenario) -> Scenario:
    """The scenario with one expert-parallel group where it can do with it, and one fill of its pipeline."""
    parallel, cluster = scenario.parallel, scenario.cluster
    num_groups, num_gpus = scenario.layout.edp, cluster.num_gpus
    per_replica = parallel.tp * parallel.cp * parallel.pp
    for groups in range(1, num_groups + 1):
        fewer = num_gpus // num_groups * groups
        if num_groups % groups or fewer % per_replica:
            continue
        batch = scenario.train.micro_batch * (fewer // per_replica) * _micro_batches(scenario)
        try:
            return scenario.with_(cluster=dataclasses.replace(cluster, num_gpus=fewer), global_batch=batch)
        except InputError:  # so few GPUs fill no whole nodes, or no whole replica
            continue
    raise AssertionError("all groups together are the scenario itself")
