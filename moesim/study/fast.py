"""The fast path for search: a training step's time and memory, configuration by configuration, without a clock.

What configurations share is computed once: layers by their shape (fast_layers, fast_memory), stages by how the model is
cut (fast_stages). What is left for each is sums over its chunks and a recurrence over its schedule (fast_pipeline). See
docs/model.md#fast-path.

Legend: S stages, C chunks of a stage, W ways, N sampled micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.cost.device import device_cost
from moesim.cost.host import constants_of, sustained
from moesim.cost.layer import rank_tokens
from moesim.cost.memory import num_communicators
from moesim.cost.precision import recipe_of
from moesim.cost.software import software_of
from moesim.describe.schedules import WAYS, Way
from moesim.errors import MoesimError
from moesim.metrics.step import COMM_PARTS, STEP_PARTS
from moesim.scenario import Scenario
from moesim.study.fast_layers import (
    Costs,
    LayerTimes,
    end_times,
    kind_times,
    layer_times,
    load_key,
    routed_load,
    stack_kinds,
)
from moesim.study.fast_memory import (
    LayerBytes,
    end_bytes,
    kept_bytes,
    kind_bytes,
    layer_bytes,
    received_rows,
)
from moesim.study.fast_pipeline import order_of, pipeline_s, ways_of
from moesim.study.fast_stages import Split, StageCosts, split_of, stage_costs, stage_parameters
from moesim.timeline.pipeline import expected_largest
from moesim.timeline.reduction import hidden_buckets_s
from moesim.timeline.step import neighbour_send_s

Floats = NDArray[np.float64]
Changes = Mapping[str, Any]  # flat names of a scenario (LEAVES) and their values
_PARALLEL = ("tp", "pp", "vpp", "cp", "ep", "etp", "zero")
_TRAIN = ("micro_batch", "global_batch", "recompute", "schedule")
AXES = ("num_gpus", *_PARALLEL, *_TRAIN, "dispatcher")  # others start a base of their own
_FORWARD, _BACKWARD, _INPUT, _WEIGHTS = range(len(WAYS))
_Value = TypeVar("_Value")
_hidden_s = njit(cache=True)(hidden_buckets_s)


@dataclass(frozen=True, kw_only=True)
class FastStep:
    """One step. Times [s] are means over ranks, NaN where this path does not know; peak_bytes is the fullest rank's."""

    step_s: float
    tokens_per_s_per_gpu: float
    exposed_comm_s: float
    bubble_fraction: float
    wait_s: float
    peak_bytes: float
    fits: bool
    headroom_bytes: float
    parts: Mapping[str, float]  # seconds by the names of metrics.step.STEP_PARTS


@dataclass(frozen=True)
class Refused:
    """A configuration that cannot be: reason names the rule that it breaks."""

    reason: str


class FastPath:
    """Steps of a scenario under changes of its flat names; what configurations share is computed once.

    >>> base = Scenario.make(model="olmoe-1b-7b", cluster="h100-8x-ib400", num_gpus=8, ep=8, global_batch=64)
    >>> step, refused = FastPath(base)([{"ep": 4}, {"ep": 3}])
    >>> step.fits, refused.reason
    (True, 'parallel: ep: ep=3 does not divide dp*cp*tp = 8*1*1 = 8; got 3')
    """

    def __init__(self, base: Scenario) -> None:
        self.base = base
        self._paths: dict[Hashable, FastPath] = {}
        self._known: dict[Hashable, Any] = {}
        self._layers_of: dict[Hashable, tuple[LayerTimes, LayerBytes]] = {}
        gpu = base.cluster.gpu
        alone = device_cost(gpu, base.train.precision, base.profile, recipe_of(base.train))
        self._constants = constants_of(gpu, base.train, alone)
        self._device = sustained(alone, self._constants, gpu)

    def __call__(self, configurations: Iterable[Changes]) -> list[FastStep | Refused]:
        """A step, or why there is none, for each mapping of flat names to values."""
        return [self._one(changes) for changes in configurations]

    def _one(self, changes: Changes) -> FastStep | Refused:
        try:
            others = {name: value for name, value in changes.items() if name not in AXES}
            if not others:
                return self.step(self._scenario(changes))
            scenario = self.base.with_(**changes)
            key = repr(sorted(others.items()))
            if key not in self._paths:
                self._paths[key] = FastPath(scenario)
            return self._paths[key].step(scenario)
        except MoesimError as error:
            return Refused(str(error))

    def _scenario(self, changes: Changes) -> Scenario:
        """The base with some of AXES changed, checked as ever; its parts are remembered."""
        base, own = self.base, dict(changes)
        num_gpus, dispatcher = own.pop("num_gpus", None), own.pop("dispatcher", None)
        parallel = tuple((name, own[name]) for name in _PARALLEL if name in own)
        train = tuple((name, _hashable(own[name])) for name in _TRAIN if name in own)
        return replace(
            base,
            cluster=base.cluster
            if num_gpus is None
            else self._once(("cluster", num_gpus), lambda: replace(base.cluster, num_gpus=num_gpus)),
            parallel=self._once(("parallel", parallel), lambda: replace(base.parallel, **dict(parallel))),
            train=self._once(("train", train), lambda: replace(base.train, **dict(train))),
            routing=base.routing
            if dispatcher is None
            else self._once(("routing", dispatcher), lambda: replace(base.routing, dispatcher=dispatcher)),
        )

    def _once(self, key: Hashable, make: Callable[[], _Value]) -> _Value:
        if key not in self._known:
            self._known[key] = make()
        found: _Value = self._known[key]
        return found

    def step(self, scenario: Scenario) -> FastStep:
        """The step of a scenario that differs from the base in AXES alone."""
        if _asks_the_engine(scenario):
            return engine_step(scenario)
        p, train = scenario.parallel, scenario.train
        ways = tuple(WAYS[i] for i in ways_of(train.schedule))
        load = (*load_key(scenario), scenario.routing.dispatcher)
        cut = (p.pp, p.vpp)
        shared = (scenario.cluster.num_gpus, p.tp, p.cp, p.ep, p.etp, p.zero, *cut)
        times, held = self._layers(scenario, load, ways)
        split = self._once(("split", cut), lambda: split_of(scenario))
        own = self._once(("parameters", p.tp, p.ep, p.etp, cut), lambda: stage_parameters(scenario, split))
        costs = self._once(("stages", shared), lambda: stage_costs(scenario, split, own, self._device, self._constants))
        near_s, round_s = self._once(
            ("send", scenario.cluster.num_gpus, p.pp, rank_tokens(p, train)), lambda: neighbour_send_s(scenario)
        )
        step_s, parts = _seconds(scenario, times, split, costs, (near_s, round_s))
        order = order_of(train.schedule, p.pp, p.vpp, _enough(scenario))
        kept_S = kept_bytes(order, held, split.start_SC, split.end_SC, split.start_mtp_SC, split.end_mtp_SC)
        peak_bytes = _peak_bytes(scenario, costs, kept_S, held.layer_input_bytes)
        return _result(scenario, step_s, parts, peak_bytes)

    def _layers(
        self, scenario: Scenario, load: tuple[Any, ...], ways: tuple[Way, ...]
    ) -> tuple[LayerTimes, LayerBytes]:
        """Seconds and bytes of all layers. Dense ones and both ends do not depend on the load."""
        p, train, once = scenario.parallel, scenario.train, self._once
        dense = (p.tp, p.cp, train.micro_batch)
        again = (*dense, train.recompute)
        shape = (*again, ways, load)
        if shape in self._layers_of:
            return self._layers_of[shape]
        kinds = once("kinds", lambda: stack_kinds(scenario))
        is_moe = any(kind.layer.is_moe for kind in kinds)
        routed = once(("load", load), lambda: routed_load(scenario)) if is_moe else None
        rows = once(("rows", load), lambda: received_rows(scenario, routed))
        same: Costs = once(("costs", dense), dict)
        seconds, sizes = [], []
        for i, kind in enumerate(kinds):
            own, at = (routed, load) if kind.layer.is_moe else (None, ())
            seconds.append(
                once(
                    ("seconds", i, again, ways, at),
                    partial(kind_times, scenario, kind, self._device, self._constants, own, ways, same),
                )
            )
            sizes.append(once(("bytes", i, again, at), partial(kind_bytes, scenario, kind, rows[1])))
        ends = once(("ends", dense, ways), lambda: end_times(scenario, self._device, self._constants, ways))
        held = once(("end bytes", again), lambda: end_bytes(scenario))
        self._layers_of[shape] = layer_times(kinds, seconds, ends), layer_bytes(scenario, kinds, sizes, held, rows)
        return self._layers_of[shape]


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _asks_the_engine(scenario: Scenario) -> bool:
    """Whether the step holds what this path does not know."""
    train = scenario.train
    return (
        bool(set(train.overlaps) - {"grad_reduce", "param_gather"})
        or train.schedule == "dualpipe"
        or scenario.parallel.fsdp
        or train.documents is not None
        or "activations" in train.offloaded
        or bool(scenario.placement.rank_speeds)
    )


def _enough(scenario: Scenario) -> int:
    """Micro-batches of which each stage holds as many at once as in the whole step."""
    pp, vpp, number = scenario.parallel.pp, scenario.parallel.vpp, scenario.num_micro_batches
    if scenario.train.schedule == "gpipe":
        return number
    return min(number, 2 * pp if vpp == 1 else 4 * pp)


def _seconds(
    scenario: Scenario, times: LayerTimes, split: Split, costs: StageCosts, send: tuple[float, float]
) -> tuple[float, dict[str, float]]:
    """The step and its parts."""
    p, number = scenario.parallel, scenario.num_micro_batches
    ways = ways_of(scenario.train.schedule)
    takes_SCWN, sent_s = _takes(scenario, times, split, costs, send)
    late_SCN = _late(times, split)
    takes_SCWN[:, :, _WEIGHTS] += late_SCN
    casts_SC = _between(times.casts_upto_L, split)
    reduce_S, gather_S = _shown(scenario, times, split, costs, takes_SCWN, casts_SC)
    reduced_s = pipeline_s(scenario.train.schedule, p.vpp, number, takes_SCWN, casts_SC, reduce_S)
    busiest = int(takes_SCWN[:, :, list(ways)].sum(axis=(1, 2, 3)).argmax())
    variance = float(_between(times.variance_upto_L, split)[busiest].sum())
    late_s = expected_largest(scenario.layout.num_blocks) * math.sqrt(number * variance)
    step_s = reduced_s + late_s + float((costs.optimizer_S + costs.host_S + gather_S).max())
    each = number / p.pp
    parts = dict.fromkeys(STEP_PARTS, 0.0)
    for part, seconds in times.parts_s.items():
        parts[part] += seconds * each
    for part, seconds in times.casts_parts_s.items():
        parts[part] += seconds / p.pp
    sharding_s = 2 * float(costs.weight_gather_SC.sum()) + float(costs.gradient_scatter_SC.sum())
    parts["wait_for_slowest"] += late_s + float(late_SCN.mean(axis=-1).sum()) * each
    parts["pipeline_send"] += sent_s * each
    parts["gradient_reduction"] += float((reduce_S + gather_S).mean()) + sharding_s * each
    parts["optimizer"] += float(costs.optimizer_S.mean())
    parts["host_transfer"] += float(costs.host_S.mean())
    parts["pipeline_bubble"] = step_s - sum(parts.values())
    return step_s, parts


def _between(upto: Floats, split: Split) -> Floats:
    """(..., S, C) sums over the layers of each chunk, from sums over all layers before each."""
    found = upto[..., split.end_SC] - upto[..., split.start_SC]
    if split.end_mtp_SC.any():
        found = found + upto[..., split.end_mtp_SC] - upto[..., split.start_mtp_SC]
    return np.asarray(found)


def _late(times: LayerTimes, split: Split) -> Floats:
    """(S, C, N) by how much weight gradients of a chunk take longer on the slowest rank than on the mean."""
    if times.late_upto_NXL is None:
        return np.zeros((*split.start_SC.shape, 1))
    return np.moveaxis(_between(times.late_upto_NXL, split).max(axis=1), 0, -1)


def _takes(
    scenario: Scenario, times: LayerTimes, split: Split, costs: StageCosts, send: tuple[float, float]
) -> tuple[Floats, float]:
    """takes_SCWN of the pipeline, and the seconds that all stages' chunks send in one micro-batch."""
    p = scenario.parallel
    takes_SCWN = np.ascontiguousarray(np.moveaxis(_between(times.upto_WNL, split), (2, 3), (0, 1)))
    takes_SCWN[0, 0] += times.embedding_W[:, None]
    takes_SCWN[-1, -1] += times.head_W[:, None]
    if scenario.parallel.zero >= 2:
        takes_SCWN[:, :, :_WEIGHTS] += costs.weight_gather_SC[:, :, None, None]
        after = _WEIGHTS if scenario.train.schedule == "zb-h1" else _BACKWARD
        takes_SCWN[:, :, after] += costs.gradient_scatter_SC[:, :, None]
    if p.pp == 1 and p.vpp == 1:
        return takes_SCWN, 0.0
    forward_SC = np.full((p.pp, p.vpp), send[0])
    backward_SC = forward_SC.copy()
    forward_SC[-1], backward_SC[0] = send[1], send[1]
    forward_SC[-1, -1], backward_SC[0, 0] = 0.0, 0.0
    takes_SCWN[:, :, _FORWARD] += forward_SC[:, :, None]
    takes_SCWN[:, :, _BACKWARD] += backward_SC[:, :, None]
    takes_SCWN[:, :, _INPUT] += backward_SC[:, :, None]
    return takes_SCWN, float(forward_SC.sum() + backward_SC.sum())


def _shown(
    scenario: Scenario, times: LayerTimes, split: Split, costs: StageCosts, takes_SCWN: Floats, casts_SC: Floats
) -> tuple[Floats, Floats]:
    """What shows of reducing gradients and of gathering weights on each stage."""
    shown = {"grad_reduce": costs.reduce_S, "param_gather": costs.gather_S}
    last = _WEIGHTS if scenario.train.schedule == "zb-h1" else _BACKWARD
    counts_SC = np.maximum(split.num_layers_SC, 1)
    for name, way in (("grad_reduce", last), ("param_gather", _FORWARD)):
        if name not in scenario.train.overlaps:
            continue
        pass_S = takes_SCWN[:, 0, way].mean(axis=-1) + (casts_SC[:, 0] if way == _FORWARD else 0.0)
        wires_S = _between(times.exchange_upto_WL, split)[way, :, 0]
        free_S = np.maximum(1.0 - wires_S / np.maximum(pass_S, 1e-30), 0.0)
        hidden = [
            _hidden_s(float(total), float(own), float(free), int(counts.sum()), int(counts[0]))
            if total and own
            else 0.0
            for total, own, free, counts in zip(shown[name], pass_S, free_S, counts_SC, strict=True)
        ]
        shown[name] = shown[name] - np.array(hidden)
    return shown["grad_reduce"], shown["param_gather"]


def _peak_bytes(scenario: Scenario, costs: StageCosts, kept_S: Floats, layer_input_bytes: float) -> float:
    """The fullest stage's, in a pass or while the optimizer runs."""
    software = software_of(scenario.train)
    received_S = np.full(kept_S.size, layer_input_bytes)
    received_S[0] = 0.0
    allocated_S = costs.standing_bytes_S + received_S + np.maximum(kept_S, costs.update_bytes_S)
    communicators = num_communicators(scenario.parallel, scenario.layout)
    return (
        float(allocated_S.max()) * (1.0 + software.allocator_reserve_fraction.value)
        + communicators * software.nccl_bytes_per_communicator.value
        + software.context_bytes.value
    )


def _result(scenario: Scenario, step_s: float, parts: Mapping[str, float], peak_bytes: float) -> FastStep:
    headroom_bytes = scenario.cluster.gpu.memory_bytes.value - peak_bytes
    tokens = scenario.train.global_batch * scenario.train.seq_len
    return FastStep(
        step_s=step_s,
        tokens_per_s_per_gpu=tokens / step_s / scenario.cluster.num_gpus,
        exposed_comm_s=sum(parts[part] for part in COMM_PARTS),
        bubble_fraction=parts["pipeline_bubble"] / step_s,
        wait_s=parts["wait_for_slowest"],
        peak_bytes=peak_bytes,
        fits=headroom_bytes >= 0,
        headroom_bytes=headroom_bytes,
        parts=parts,
    )


def fast_step(scenario: Scenario) -> FastStep:
    """One scenario's step by the fast path; a search shares more with one FastPath. Raises InputError."""
    return FastPath(scenario).step(scenario)


def engine_step(scenario: Scenario) -> FastStep:
    """A step by the event engine, in the fast path's terms."""
    from moesim.metrics.memory import fullest
    from moesim.metrics.summary import step_parts
    from moesim.timeline.step import run_step

    trace = run_step(scenario)
    return _result(scenario, trace.step_s, step_parts(trace), fullest(scenario, trace.load).peak_bytes)


def warm() -> None:
    """Compile the kernels of this path into their cache."""
    base = Scenario.make(
        model="olmoe-1b-7b", cluster="h100-8x-ib400", num_gpus=8, ep=8, global_batch=64, overlap="grad_reduce"
    )
    FastPath(base)([{"pp": 2, "ep": 4}])
