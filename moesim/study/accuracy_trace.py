"""One overlapped pair of DeepSeek-V3's training, kernel kind by kernel kind, beside the published trace of it.

The trace (deepseek-ai/profile-data) shows a forward of four MoE layers beside a backward of four, EP64 on H800, routing
forced even, no pipeline communication. The same pair is taken from a whole simulated step under DualPipe, NICs at the
rate that DeepEP's release of that month reached on 16 and 32 ranks (libraries.yaml). Two kinds of kernel, the dense
products and what is bound by memory, give the constants of ``software: deepseek``; all others test. See
docs/accuracy.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from moesim.catalog.libraries import load_library
from moesim.catalog.step import NO_LOSS, ConstantName, StepConstants, rows_of_fit, step_constants
from moesim.cost.device import DeviceCost, device_cost
from moesim.cost.host import unfused
from moesim.cost.layer import expert_weight_gradients_s, experts_s, layer_cost, weight_gradients_s
from moesim.cost.precision import recipe_of
from moesim.describe.model import MoeFfn
from moesim.door.records import Record
from moesim.errors import check
from moesim.scenario import Scenario
from moesim.study.accuracy import AccuracyRow, Likeness, NotExpressed, Prediction
from moesim.timeline.overlap import EXCHANGES
from moesim.timeline.phases import OperationTimes
from moesim.timeline.step import run_step
from moesim.timeline.trace import Trace
from moesim.units import MILLI

LIBRARY = "deepep-v1-initial"  # public in the month of the trace
STAGE = 7  # holds four MoE layers of each direction
FIRST_MOE_LAYER = 3
# As arXiv 2412.19437 section 3.2.3 says; the trace has 64 dense products, 56 of layers and 8 up-projections again.
RECOMPUTED = "layernorm,mla_up_proj,moe_act"
BOUNDS = ("span of kernels alone", "span with Megatron's losses")
KINDS = (
    *("dispatch", "dispatch forward", "dispatch of gradients", "combine", "wait"),
    *("grouped products", "dense products", "weight gradients", "attention", "casts", "permute", "memory-bound"),
    *("exposed communication", "computing", "span", *BOUNDS),
)
FIT_ROUNDS = 3
FITTED: Mapping[str, ConstantName] = {"memory-bound": "stream_fraction", "dense products": "product_fraction"}


@dataclass(frozen=True, kw_only=True)
class TraceRow:
    """Seconds of one kind of kernel in the pair."""

    id: str
    what: str
    predicted_s: float
    measured_s: float
    source: str
    used_in_fit: bool = False

    @property
    def error_fraction(self) -> float:
        return self.predicted_s / self.measured_s - 1.0


def trace_scenario() -> Scenario:
    """DeepSeek-V3 as it was trained (arXiv 2412.19437: PP16, EP64, FP8, DualPipe), routing forced even."""
    scenario = Scenario.make(
        model="deepseek-v3",
        cluster="h800-8x-ib400",
        num_gpus=1024,
        pp=16,
        ep=64,
        global_batch=64 * 32,
        precision="fp8",
        dispatcher="deepep",
        schedule="dualpipe",
        overlap="weight_gradient",
        recompute=RECOMPUTED,
        attention_output="e5m6",
        activation_input="fp8",
        popularity="balanced",
        software="deepseek",
        profile="datasheet",
    )
    derate = load_library(LIBRARY).value("combine", "nic", "h800", "derate")
    assert derate is not None
    known = scenario.cluster.derates["nic_alltoall"]
    derates = {**scenario.cluster.derates, "nic_alltoall": replace(known, value=derate, source=LIBRARY)}
    return scenario.with_(cluster=replace(scenario.cluster, derates=derates))


def predict(row: Record, owner: str) -> list[Prediction]:
    """One kind of kernel, or why it is no prediction. Raises InputError as ``trace_rows`` does."""
    (found,) = trace_rows([row], owner)
    if found.id in BOUNDS:
        return [NotExpressed(id=found.id, reason="is a bound beside the prediction")]
    return [
        AccuracyRow(
            id=found.id,
            group=f"trace, {'wait and exposure' if found.id in ('wait', 'exposed communication') else 'kernels'}",
            predicted=found.predicted_s,
            measured=found.measured_s,
            inside_envelope=True,
            used_in_fit=found.used_in_fit,
            source=found.source,
            like=Likeness(gpu="h800", is_moe=True, crosses_nodes=True, precision="fp8"),
        )
    ]


def trace_rows(cases: Sequence[Record], owner: str = "trace.csv") -> tuple[TraceRow, ...]:
    """Every measured kind beside its prediction. Raises InputError for a kind that is not known."""
    for row in cases:
        rule = f"must be one of {', '.join(KINDS)}"
        check(row.get("id", "") in KINDS, owner, "id", rule, row.get("id", ""))
    predicted = _predicted()
    return tuple(
        TraceRow(
            id=row["id"],
            what=row["what"],
            predicted_s=predicted[row["id"]],
            measured_s=float(row["ms"]) * MILLI,
            source=row.get("source", ""),
            used_in_fit=row["id"] in rows_of_fit("deepseek"),
        )
        for row in cases
    )


@cache
def _predicted() -> Mapping[str, float]:
    """Seconds of KINDS."""
    scenario = trace_scenario()
    constants = step_constants(scenario.cluster.gpu.name, "deepseek")
    predicted = _with_starts_idle(predicted_kinds(scenario, constants), scenario, constants)
    predicted["span of kernels alone"] = predicted_pair(run_step(scenario, constants=NO_LOSS))["span"]
    predicted["span with Megatron's losses"] = predicted_pair(run_step(scenario.with_(software="megatron")))["span"]
    return predicted


def fitted_on_trace(cases: Sequence[Record]) -> Mapping[str, tuple[ConstantName, float]]:
    """What DeepSeek's kernels lose: by the kind that says so, its constant, predicted of kernels alone over measured.

    A kind's seconds do not follow its constant quite in proportion (kernels start, some wait for memory), so each is
    corrected once by what its prediction with the constant then is.
    """
    scenario, measured_s = trace_scenario(), {row["id"]: float(row["ms"]) * MILLI for row in cases}
    values = dict.fromkeys(FITTED, 1.0)
    for _ in range(FIT_ROUNDS):
        own: dict[str, Any] = {name: values[kind] for kind, name in FITTED.items()}
        constants = replace(NO_LOSS, **own)
        predicted = predicted_kinds(scenario, constants)
        values = {kind: value * predicted[kind] / measured_s[kind] for kind, value in values.items()}
    return {kind: (name, values[kind]) for kind, name in FITTED.items()}


def predicted_kinds(scenario: Scenario, constants: StepConstants) -> Mapping[str, float]:
    """Seconds by kind of kernel, those included that stand beside others: found by leaving them out, or doubling."""
    found = dict(predicted_pair(run_step(scenario, constants=constants), constants))
    device = _device(scenario)
    uncast = replace(device, recipe=replace(device.recipe, cast_reads=0, narrows_activations=False))
    without = predicted_pair(run_step(scenario, constants=constants, device=uncast))
    twice = replace(constants, stream_fraction=constants.stream_fraction / 2)
    doubled = predicted_pair(run_step(scenario, constants=twice))
    # What leaving out or doubling takes is time of the whole GPU; beside collectives the same kernels take longer.
    slowed = found["computing"] / predicted_pair(run_step(_unshared(scenario), constants=constants))["computing"]
    found["casts"] = (found["computing"] - without["computing"]) * slowed
    found["memory-bound"] = (doubled["computing"] - found["computing"]) * slowed
    others = ("grouped products", "weight gradients", "attention", "casts", "memory-bound")
    found["dense products"] = found["computing"] - sum(found[kind] for kind in others)
    return found


def _device(scenario: Scenario) -> DeviceCost:
    train = scenario.train
    return device_cost(scenario.cluster.gpu, train.precision, scenario.profile, recipe_of(train))


def _unshared(scenario: Scenario) -> Scenario:
    """The same on GPUs with so many multiprocessors that collectives take next to none of them."""
    gpu = scenario.cluster.gpu
    gpu = replace(gpu, num_sms=replace(gpu.num_sms, value=1e9))
    return scenario.with_(cluster=replace(scenario.cluster, gpu=gpu))


def _with_starts_idle(predicted: Mapping[str, float], scenario: Scenario, constants: StepConstants) -> dict[str, float]:
    """The kinds with the start of every kernel taken for standing still, as a profiler does: it sees nothing run, and
    communication that is under way as exposed.
    """
    at_once = _at_once(_device(scenario))
    starts_s = predicted["span"] - predicted_pair(run_step(scenario, constants=constants, device=at_once))["span"]
    busy_s = sum(predicted[kind] for kind in ("dispatch", "combine", "wait"))
    shown_s = starts_s * min(busy_s / predicted["span"], 1.0)
    return {
        **predicted,
        "computing": predicted["computing"] - starts_s,
        "exposed communication": predicted["exposed communication"] + shown_s,
    }


def _at_once(device: DeviceCost) -> DeviceCost:
    """A device whose kernels take no time to start."""
    wide = None if device.bf16 is None else _at_once(device.bf16)
    law, weight_law = (replace(law, start_s=0.0) for law in (device.law, device.weight_law))
    return replace(device, law=law, weight_law=weight_law, stream_start_s=0.0, bf16=wide)


def leaders_wait_s(times: OperationTimes) -> float:
    """Seconds that a rank's exchanges stand on its queue for slower ranks, in the last run of a pair, once the rank
    leads by all that its dependencies allow.

    A rank that computes faster than the slowest of its group, by however little, gets ahead from pair to pair, until
    some exchange's result comes only when it is needed. From then on every exchange of it waits as long as it leads, or
    since the one before it ended. See docs/model.md#leading-ranks.
    """
    start_P, seconds_P = times.start_PMV[:, -1, 0], times.seconds_PMV[:, -1, 0]
    end_P, places = start_P + seconds_P, range(len(times.names))
    exchanges = sorted((i for i in places if times.parts[i] in EXCHANGES), key=lambda i: start_P[i])

    def needed_s(exchange: int) -> float:
        """When its chain goes on computing."""
        after = (
            float(start_P[i])
            for i in range(exchange + 1, len(times.names))
            if times.is_backward_P[i] == times.is_backward_P[exchange]
            and times.parts[i] not in EXCHANGES
            and not times.names[i].endswith(" weights")
        )
        return next(after, float(times.duration_MB[-1, 0]))

    lead_s = min(needed_s(i) - end_P[i] for i in exchanges)
    free_s = [-np.inf, *(end_P[i] for i in exchanges)]  # when the queue is, of communication
    return float(sum(min(lead_s, start_P[i] - free) for i, free in zip(exchanges, free_s, strict=False)))


def predicted_pair(trace: Trace, constants: StepConstants = NO_LOSS) -> Mapping[str, float]:
    """Seconds by kind of kernel in the last pair of the middle stage, on its rank of median load. constants: those that
    the step was run with.
    """
    pair = next(op for op in trace.stages[STAGE].operations if op.beside_N is not None)
    times = pair.times
    device = unfused(trace.device, constants)
    shares = {way: _shares(trace, device, is_backward=way) for way in (False, True)}
    is_weights = np.array([name.endswith(" weights") for name in times.names])

    def took_s(part: str, is_backward: bool) -> float:
        """Of a part's phases, slowed as they were beside collectives; weight gradients stand apart."""
        chosen = np.array([own == part for own in times.parts]) & (times.is_backward_P == is_backward) & ~is_weights
        return float(times.seconds_PMV[chosen, -1, 0].sum())

    not_computing = ("dispatch", "combine", "wait_for_slowest")
    exposed_s = sum(float(times.part_R[part][0]) for part in not_computing) / len(pair.micro_batches_N)
    span_s = float(times.duration_MB[-1, 0])
    return {
        # Gradients on the combine's way are sent as a dispatch sends, those on the dispatch's as a combine.
        "dispatch": took_s("dispatch", False) + took_s("combine", True),
        "dispatch forward": took_s("dispatch", False),
        "dispatch of gradients": took_s("combine", True),
        "combine": took_s("combine", False) + took_s("dispatch", True),
        "grouped products": sum(took_s("experts", way) * shares[way]["experts"] for way in (False, True)),
        "weight gradients": float(times.seconds_PMV[is_weights, -1, 0].sum()),
        "attention": sum(took_s("attention", way) * shares[way]["attention"] for way in (False, True)),
        "permute": took_s("permute", False) + took_s("permute", True),
        "wait": leaders_wait_s(times),
        "exposed communication": exposed_s,
        "computing": span_s - exposed_s,
        "span": span_s,
    }


def _shares(trace: Trace, device: DeviceCost, *, is_backward: bool) -> Mapping[str, float]:
    """Of a part's seconds without weight gradients: what the kernels take that the trace tells apart."""
    scenario, layer = trace.scenario, trace.scenario.model.layers[FIRST_MOE_LAYER]
    moe, model, parallel, train = layer.ffn, scenario.model, scenario.parallel, scenario.train
    assert isinstance(moe, MoeFfn)
    assert trace.load is not None
    rows_E = trace.load.rows_GMLRE[0, 0, 0, 0]  # of any rank and layer: all are alike
    cost = layer_cost(model, layer, parallel=parallel, train=train, device=device)
    one_pass = cost.backward if is_backward else cost.forward
    attention_s, _ = weight_gradients_s(model, layer, parallel=parallel, train=train, device=device)
    weights = float(expert_weight_gradients_s(model, moe, rows_E, parallel=parallel, device=device))
    whole = float(
        experts_s(
            model,
            moe,
            rows_E,
            parallel=parallel,
            device=device,
            backward=is_backward,
            dispatcher=scenario.routing.dispatcher,
        )
    )
    products = sum(
        float(device.grouped_s(rows_E, *(shape[::-1] if is_backward else shape)))
        for shape in ((model.hidden, 2 * moe.expert.width), (moe.expert.width, model.hidden))
    )
    return {
        "attention": one_pass.core_attention_s / (one_pass.attention_s - attention_s * is_backward),
        "experts": products / (whole - weights * is_backward),
    }
