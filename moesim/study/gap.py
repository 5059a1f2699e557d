"""Why a step is slower than the roofline: the same engine run again and again, with one thing added each time.

roofline: every kernel at the datasheet's rates, links that take no time, routing even. kernels: at measured rates.
host: what a step loses besides (power, issuing). balanced: links as they are. skewed: routing as asked, experts in
order. placed: experts placed as asked. Each step's excess over the one before is what the added thing costs. See
docs/model.md#gap.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

from moesim.catalog.step import NO_LOSS
from moesim.cost.device import AttentionRate, DeviceCost, device_cost
from moesim.cost.precision import recipe_of
from moesim.describe.hardware import Cluster, Gpu
from moesim.metrics.critical import CriticalPath, critical_path
from moesim.metrics.summary import step_parts
from moesim.scenario import Scenario
from moesim.timeline.step import run_step
from moesim.timeline.trace import Trace

WORDS = {
    "roofline": "kernels at the datasheet's rates, free links, even routing",
    "kernels": "kernels at measured rates",
    "host": "power limits, and a host that issues every operation",
    "balanced": "links as they are",
    "skewed": "routing as asked, experts in order",
    "placed": "experts placed as asked",
}
FREE = 1e12  # times faster links


@dataclass(frozen=True, kw_only=True)
class GapStep:
    """One run of the waterfall. layer_s: seconds of the representative ranks in each layer's phases, all micro-batches,
    both ways.
    """

    name: str
    step_s: float
    parts_s: dict[str, float]
    layer_s: dict[int, float]

    @property
    def words(self) -> str:
        return WORDS[self.name]


@dataclass(frozen=True, kw_only=True)
class Gap:
    """The waterfall, from roofline to the step that was asked for, and the critical path of the last."""

    steps: tuple[GapStep, ...]
    path: CriticalPath

    @property
    def added_s(self) -> dict[str, float]:
        """What each thing adds [s]; the first is the roofline itself; they sum to the step."""
        before = [0.0, *(step.step_s for step in self.steps[:-1])]
        return {step.name: step.step_s - earlier for step, earlier in zip(self.steps, before, strict=True)}

    def to_dict(self) -> dict[str, Any]:
        return {
            "steps": [
                {
                    "name": step.name,
                    "words": step.words,
                    "step_s": step.step_s,
                    "added_s": self.added_s[step.name],
                    "parts_s": step.parts_s,
                    "layer_s": {str(layer): seconds for layer, seconds in step.layer_s.items()},
                }
                for step in self.steps
            ],
            "critical_path": self.path.to_dict(),
        }


def explain_gap(scenario: Scenario) -> Gap:
    """The waterfall of a scenario: four to six simulated steps. Raises InputError and NotModelledError.

    >>> explain_gap(scenario).added_s["skewed"]  # doctest: +SKIP
    1.93
    """
    gpu, precision = scenario.cluster.gpu, scenario.train.precision
    measured = device_cost(gpu, precision, scenario.profile, recipe_of(scenario.train))
    plain = scenario.placed_anew("contiguous", None) if scenario.model.is_moe else scenario
    even = plain.with_(popularity="balanced") if scenario.model.is_moe else scenario
    free = even.with_(cluster=_free_links(even.cluster))
    traces = {
        "roofline": run_step(free, constants=NO_LOSS, device=roofline(measured, gpu, precision)),
        "kernels": run_step(free, constants=NO_LOSS),
        "host": run_step(free),
        "balanced": run_step(even),
    }
    if scenario.model.is_moe:
        traces["skewed"] = run_step(plain)
        if plain.placement != scenario.placement:
            traces["placed"] = run_step(scenario)
    steps = tuple(
        GapStep(name=name, step_s=trace.step_s, parts_s=step_parts(trace), layer_s=_layer_s(trace))
        for name, trace in traces.items()
    )
    return Gap(steps=steps, path=critical_path(list(traces.values())[-1]))


def roofline(device: DeviceCost, gpu: Gpu, precision: str) -> DeviceCost:
    """A device whose kernels all reach the datasheet's rates and start at once."""
    law = replace(device.law, utilisation=1.0, reduce_overhead=0.0, memory_utilisation=1.0, start_s=0.0, tile_rows=1)
    peak = gpu.peak_flops_per_s["bf16"].value
    attention = {dims: AttentionRate(endless_flops_per_s=peak, half_keys=0.0) for dims in device.attention_by_dims}
    return replace(
        device,
        peak_flops_per_s=gpu.peak_flops_per_s[precision].value,
        law=law,
        weight_law=law,
        memory_bytes_per_s=gpu.memory_bytes_per_s.value,
        stream_bytes_per_s=gpu.memory_bytes_per_s.value,
        stream_start_s=0.0,
        attention_by_dims=attention,
        attention_backward_share=1.0,
        profile=None,
        silicon=None,
        bf16=None if device.bf16 is None else roofline(device.bf16, gpu, "bf16"),
    )


def _free_links(cluster: Cluster) -> Cluster:
    rates = ("nvlink_bytes_per_s", "nic_bytes_per_s")
    faster = {name: replace(getattr(cluster, name), value=getattr(cluster, name).value * FREE) for name in rates}
    at_once = {name: replace(getattr(cluster, name), value=0.0) for name in ("latency_intra_s", "latency_inter_s")}
    return replace(cluster, **faster, **at_once)


def _layer_s(trace: Trace) -> dict[int, float]:
    """Seconds in each layer's phases on the first traced rank of its stage."""
    total: dict[int, float] = defaultdict(float)
    for run in trace.stages:
        for op in run.operations:
            of_phase = op.times.seconds_PMV[:, :, 0].sum(axis=1)
            for layer, seconds in zip(op.times.layers, of_phase, strict=True):
                if layer >= 0:
                    total[layer] += float(seconds)
    return dict(sorted(total.items()))
