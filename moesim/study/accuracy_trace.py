"""One overlapped pair of DeepSeek-V3's training, kernel kind by kernel kind, beside the published trace of it.

The trace (deepseek-ai/profile-data) shows a forward of four MoE layers beside a backward of four, EP64 on H800, routing
forced even, no pipeline communication. The same pair is taken from a whole simulated step under DualPipe. Nothing is
fitted to it: kernels alone at the efficiencies of the device, NICs at the rate that DeepEP's release of that month
reached on 16 and 32 ranks (libraries.yaml). What steps of Megatron-LM lose on other GPUs is left out, since the trace
is of another framework; the span with these losses stands beside. See docs/accuracy.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moesim.catalog.libraries import load_library
from moesim.catalog.step import NO_LOSS
from moesim.cost.device import device_cost
from moesim.cost.layer import expert_weight_gradients_s, experts_s, layer_cost, weight_gradients_s
from moesim.describe.model import MoeFfn
from moesim.door.records import Record
from moesim.errors import check
from moesim.scenario import Scenario
from moesim.timeline.step import run_step
from moesim.timeline.trace import Trace
from moesim.units import MILLI

LIBRARY = "deepep-v1-initial"  # public in the month of the trace
STAGE = 7  # holds four MoE layers of each direction
FIRST_MOE_LAYER = 3
NOT_MODELLED = ("wait",)  # for other ranks, where routing is even


@dataclass(frozen=True, kw_only=True)
class TraceRow:
    """Seconds of one kind of kernel in the pair; predicted None: not modelled apart."""

    id: str
    what: str
    predicted_s: float | None
    measured_s: float
    source: str

    @property
    def error_fraction(self) -> float | None:
        return None if self.predicted_s is None else self.predicted_s / self.measured_s - 1.0


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
        popularity="balanced",
        profile="datasheet",
    )
    derate = load_library(LIBRARY).value("combine", "nic", "h800", "derate")
    assert derate is not None
    known = scenario.cluster.derates["nic_alltoall"]
    derates = {**scenario.cluster.derates, "nic_alltoall": replace(known, value=derate, source=LIBRARY)}
    return scenario.with_(cluster=replace(scenario.cluster, derates=derates))


def trace_rows(cases: Sequence[Record], owner: str = "trace.csv") -> tuple[TraceRow, ...]:
    """Every measured kind beside its prediction. Raises InputError for a kind that is not known."""
    scenario = trace_scenario()
    predicted = dict(predicted_pair(run_step(scenario, constants=NO_LOSS)))
    predicted["span with Megatron's losses"] = predicted_pair(run_step(scenario))["span"]
    device = device_cost(scenario.cluster.gpu, scenario.train.precision, scenario.profile)
    uncast = replace(device, recipe=replace(device.recipe, cast_reads=0))
    without = predicted_pair(run_step(scenario, constants=NO_LOSS, device=uncast))
    casts_s = predicted["computing"] - without["computing"]  # which stand beside the products that need them
    predicted["casts"] = casts_s
    rows = []
    for row in cases:
        known = (*predicted, *NOT_MODELLED)
        check(row.get("id", "") in known, owner, "id", f"must be one of {', '.join(known)}", row.get("id", ""))
        rows.append(
            TraceRow(
                id=row["id"],
                what=row["what"],
                predicted_s=predicted.get(row["id"]),
                measured_s=float(row["ms"]) * MILLI,
                source=row["source"],
            )
        )
    return tuple(rows)


def predicted_pair(trace: Trace) -> Mapping[str, float]:
    """Seconds by kind of kernel in the last pair of the middle stage, on its rank of median load."""
    pair = next(op for op in trace.stages[STAGE].operations if op.beside_N is not None)
    times = pair.times
    shares = {way: _shares(trace, is_backward=way) for way in (False, True)}
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
        "combine": took_s("combine", False) + took_s("dispatch", True),
        "grouped products": sum(took_s("experts", way) * shares[way]["experts"] for way in (False, True)),
        "weight gradients": float(times.seconds_PMV[is_weights, -1, 0].sum()),
        "attention": sum(took_s("attention", way) * shares[way]["attention"] for way in (False, True)),
        "permute": took_s("permute", False) + took_s("permute", True),
        "exposed communication": exposed_s,
        "computing": span_s - exposed_s,
        "span": span_s,
    }


def _shares(trace: Trace, *, is_backward: bool) -> Mapping[str, float]:
    """Of a part's seconds without weight gradients: what the kernels take that the trace tells apart."""
    scenario, device, layer = trace.scenario, trace.device, trace.scenario.model.layers[FIRST_MOE_LAYER]
    moe, model, parallel, train = layer.ffn, scenario.model, scenario.parallel, scenario.train
    assert isinstance(moe, MoeFfn)
    assert trace.load is not None
    rows_E = trace.load.rows_GMLRE[0, 0, 0, 0]  # of any rank and layer: all are alike
    cost = layer_cost(model, layer, parallel=parallel, train=train, device=device)
    one_pass = cost.backward if is_backward else cost.forward
    attention_s, _ = weight_gradients_s(model, layer, parallel=parallel, train=train, device=device)
    weights = float(expert_weight_gradients_s(model, moe, rows_E, parallel=parallel, device=device))
    whole = float(experts_s(model, moe, rows_E, parallel=parallel, device=device, backward=is_backward))
    products = sum(
        float(device.grouped_s(rows_E, *(shape[::-1] if is_backward else shape)))
        for shape in ((model.hidden, 2 * moe.expert.width), (moe.expert.width, model.hidden))
    )
    return {
        "attention": one_pass.core_attention_s / (one_pass.attention_s - attention_s * is_backward),
        "experts": products / (whole - weights * is_backward),
    }
