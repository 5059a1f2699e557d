"""From a trace to the numbers of ``moesim simulate``.

Legend: G expert-parallel groups, M micro-batches, L MoE layers, E experts, R ranks of a stage.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from moesim.catalog.step import rows_of_fit
from moesim.cost.device import Provenance
from moesim.cost.memory import RankMemory
from moesim.cost.precision import RECIPES
from moesim.cost.software import MEGATRON
from moesim.describe.flops import BACKWARD_OVER_FORWARD, layer_flops, training_flops_per_token
from moesim.describe.hardware import Sourced
from moesim.describe.pipeline import trained_layers
from moesim.describe.popularity import popularity_words
from moesim.describe.workload import Recorded
from moesim.fabric.ports import spine_slowdown
from moesim.metrics.memory import MemoryOverSteps, expected_redraw, memory_by_stage, memory_over_steps
from moesim.metrics.scored import accuracy_statement, accuracy_warning
from moesim.metrics.step import COMM_PARTS, MEMORY_PARTS, STEP_PARTS, StepResult
from moesim.routing.statistics import entropy, gini, load_alerts, max_mean
from moesim.scenario import Scenario
from moesim.timeline.packed import PackedWork
from moesim.timeline.step import run_step
from moesim.timeline.trace import Trace

_COMPUTE_PARTS = tuple(part for part in STEP_PARTS if part not in (*COMM_PARTS, "wait_for_slowest", "pipeline_bubble"))
RISK = 0.01  # chance of running out of memory that is worth a warning
_IN_WORDS = {
    "attention": "attention compute",
    "dense_ffn": "dense and shared feed-forward compute",
    "router": "router compute",
    "permute": "permuting tokens (memory bandwidth)",
    "experts": "expert compute",
    "embedding_head": "embedding, head and loss",
    "recompute": "recomputing activations",
    "tensor_parallel_comm": "tensor- and context-parallel communication",
    "all_to_all": "the all-to-alls of dispatch and combine",
    "pipeline_send": "sending activations between stages",
    "gradient_reduction": "gradient reduction",
    "optimizer": "the optimizer step",
    "host_transfer": "the link to the host's memory",
    "host": "the host, which issues operations slower than the GPU does them",
    "wait_for_slowest": "waiting for the most loaded rank",
    "pipeline_bubble": "the pipeline bubble",
}


def summarise(trace: Trace) -> StepResult:
    """All of a step's headline numbers. Times are means over ranks; memory is the worst rank's."""
    scenario, step_s = trace.scenario, trace.step_s
    num_gpus = scenario.cluster.num_gpus
    parts = step_parts(trace)
    tokens = scenario.train.global_batch * scenario.train.seq_len
    peak = scenario.cluster.gpu.peak_flops_per_s[RECIPES[scenario.train.precision].peak].value
    flops, flops_full = (
        tokens
        * training_flops_per_token(
            scenario.model, scenario.train.seq_len, full_attention=full, with_mtp=scenario.train.mtp
        )
        for full in (False, True)
    )
    if trace.packed is not None:
        flops -= tokens * _packed_away(trace.packed, scenario)
    memories = memory_by_stage(scenario, trace.load)
    worst = max(memories, key=lambda memory: memory.peak_bytes)
    headroom = scenario.cluster.gpu.memory_bytes.value - worst.peak_bytes
    over_steps = memory_over_steps(scenario, redraw=expected_redraw(scenario), base=trace.load, own=worst)
    load_LE, drops_L = _load(trace)
    alerts = load_alerts(load_LE) if load_LE.size else ()
    layer_numbers = trace.load.layers if trace.load is not None else ()
    dropped = float(drops_L.mean()) if drops_L.size else 0.0
    return StepResult(
        scenario=scenario.to_dict(),
        step_s=step_s,
        tokens_per_s=tokens / step_s,
        tokens_per_s_per_gpu=tokens / step_s / num_gpus,
        kept_assignment_fraction=1.0 - dropped,
        drop_fraction=dropped,
        mfu=flops / (step_s * num_gpus * peak),
        mfu_full_attention=flops_full / (step_s * num_gpus * peak),
        model_flops_per_s_per_gpu=flops / step_s / num_gpus,
        compute_s=sum(parts[part] for part in _COMPUTE_PARTS),
        exposed_comm_s=sum(parts[part] for part in COMM_PARTS),
        hidden_comm_s=float(np.mean([run.hidden_comm_s for run in trace.stages])),
        wait_s=parts["wait_for_slowest"],
        bubble_fraction=parts["pipeline_bubble"] / step_s,
        max_mean_load=float(max_mean(load_LE).max()) if load_LE.size else 1.0,
        gini=float(gini(load_LE).mean()) if load_LE.size else 0.0,
        entropy=float(entropy(load_LE, normalised=True).mean()) if load_LE.size else 1.0,
        # A step like this one has happened: the law of 16 others may not say that it hardly ever does.
        memory=_plain(worst) | {"peak_p99_bytes": max(over_steps.p99_bytes, worst.peak_bytes)},
        memory_by_rank=[
            {"stage": memory.stage, "rank": memory.rank, "moment": memory.moment} | _plain(memory)
            for memory in memories
        ],
        fits=headroom >= 0,
        headroom_bytes=headroom,
        out_of_memory_fraction=over_steps.out_of_memory_fraction,
        memory_over_steps={"redraw": over_steps.redraw, "num_steps": len(over_steps.peak_bytes_S)}
        | over_steps.quantiles(),
        envelope={"inside": False, "reasons": _envelope(trace)},
        step_parts_s=parts,
        load_LE=load_LE,
        alerts=[
            {"layer": layer_numbers[alert.layer], "expert": alert.expert, "ratio": alert.ratio} for alert in alerts
        ],
        drop_fraction_by_layer=drops_L.tolist(),
        binds=binds(parts, step_s),
        provenance=(*trace.device.provenance, *_cluster_provenance(scenario), *_memory_provenance()),
        warnings=_warnings(trace, headroom, over_steps),
        packing=_packing(trace),
    )


def _packing(trace: Trace) -> dict[str, float] | None:
    """What packed documents do to the step: shares of attention, and the time that their unevenness costs."""
    if trace.packed is None:
        return None
    even_s = run_step(trace.scenario, packed=trace.packed.evened()).step_s
    return trace.packed.numbers() | {"step_even_s": even_s, "imbalance_s": trace.step_s - even_s}


def _packed_away(packed: PackedWork, scenario: Scenario) -> float:
    """FLOPs a trained token needs less, since it sees its own document only."""
    model, train = scenario.model, scenario.train
    layers = Counter(trained_layers(model, train))
    saved = (
        count * layer_flops(model, layer, train.seq_len).attention_sequence * (1 - packed.mean(layer))
        for layer, count in layers.items()
    )
    return (1 + BACKWARD_OVER_FORWARD) * sum(saved)


def step_parts(trace: Trace) -> dict[str, float]:
    """Mean seconds over all ranks in each of STEP_PARTS; they sum to the step."""
    return {part: float(np.mean([np.mean(run.part_R.get(part, 0.0)) for run in trace.stages])) for part in STEP_PARTS}


def binds(parts: dict[str, float], step_s: float) -> str:
    """What takes the most of the step, in words with its share."""
    shares = {part: seconds for part, seconds in parts.items() if part not in ("dispatch", "combine")}
    shares["all_to_all"] = parts["dispatch"] + parts["combine"]
    largest = max(shares, key=lambda part: shares[part])
    return f"{_IN_WORDS[largest]} ({shares[largest] / step_s:.0%} of the step)"


def _plain(memory: RankMemory) -> dict[str, float]:
    return {part: float(getattr(memory, part)) for part in (*MEMORY_PARTS, "peak_bytes")}


def _load(trace: Trace) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Shares of each layer's assignments by expert before drops, and the dropped fraction by layer."""
    if trace.load is None:
        return np.zeros((0, 0)), np.zeros(0)
    assigned_LE = trace.load.load.assigned_GMLE.sum(axis=(0, 1), dtype=np.float64)
    kept_L = trace.load.load.kept_GMLE.sum(axis=(0, 1, 3), dtype=np.float64)
    total_L = assigned_LE.sum(axis=1)
    return assigned_LE / total_L[:, None], np.maximum(1.0 - kept_L / total_L, 0.0)


def _cluster_provenance(scenario: Scenario) -> list[Provenance]:
    cluster = scenario.cluster
    numbers: dict[str, Sourced] = {
        "GPU memory": cluster.gpu.memory_bytes,
        "NVLink rate": cluster.nvlink_bytes_per_s,
        "NIC rate": cluster.nic_bytes_per_s,
        "latency in the node": cluster.latency_intra_s,
        "latency between nodes": cluster.latency_inter_s,
    } | {f"derate {name}": value for name, value in cluster.derates.items()}
    if scenario.train.offloaded:
        numbers["link to the host's memory"] = cluster.gpu.host_bytes_per_s
    told = [Provenance(part=part, kind=number.kind, source=number.source) for part, number in numbers.items()]
    if scenario.placement.rank_speeds:
        source = f"placement.rank_speeds of the scenario: {dict(scenario.placement.rank_speeds)}"
        told.append(Provenance(part="speeds of single GPUs", kind="assumed", source=source))
    popularity = scenario.routing.popularity
    if not scenario.model.is_moe:
        return told
    if isinstance(popularity, Recorded):
        return [*told, Provenance(part="expert popularity", kind="measured", source=popularity.file)]
    skew = f"routing.popularity of the scenario: {popularity_words(popularity)}"
    return [*told, Provenance(part="expert popularity", kind="assumed", source=skew)]


def _memory_provenance() -> list[Provenance]:
    """The numbers that memory takes from the software, not from the model."""
    numbers = {
        "memory: CUDA context": MEGATRON.context_bytes,
        "memory: NCCL buffers of a communicator": MEGATRON.nccl_bytes_per_communicator,
        "memory: allocator reserve": MEGATRON.allocator_reserve_fraction,
        "memory: product workspaces": MEGATRON.product_workspace_bytes,
        "memory: grouped product workspaces": MEGATRON.grouped_workspace_bytes,
    }
    return [Provenance(part=part, kind=number.kind, source=number.source) for part, number in numbers.items()]


def _envelope(trace: Trace) -> list[str]:
    """What this run leaves out, in sentences: each a reason not to take its step time for a measurement."""
    scenario = trace.scenario
    model, train = scenario.model, scenario.train
    losses = {
        "megatron": f"Some constants of a step are fitted on {len(rows_of_fit())} measured ones.",
        "deepseek": "What a step loses beside its kernels is read from DeepSeek's published trace.",
        "kernels": "Kernels alone: nothing is lost beside them, a bound that no run reaches.",
    }
    reasons = [f"{losses[train.software]} {accuracy_statement(scenario)} All scores: docs/accuracy.md."]
    if trace.device.profile is not None:
        reasons = [
            f"Products are timed on this device; what a whole step loses beside them (clocks under power, its host) is "
            f"left out. {accuracy_statement(scenario)} All scores: docs/accuracy.md."
        ]
    if scenario.parallel.ep > 1:
        if set(train.overlaps) <= {"grad_reduce", "tensor_parallel"} and train.schedule != "dualpipe":
            reasons += ["Nothing computes beside the all-to-alls, as asked; train.overlap names what may."]
        if scenario.fidelity == "port":
            reasons += ["In an all-to-all every rank's time is that of its busiest port."]
    if RECIPES[train.precision].cast_reads:
        reasons += [
            f"{train.precision}: products run at that rate and casts around them are counted, router and head stay in "
            "BF16; memory keeps the BF16 weights beside their casts, unless optimizer.weights is narrow."
        ]
    if model.mtp_layers and not train.mtp:
        reasons += [
            f"Multi-token prediction of {model.name} ({_layers(len(model.mtp_layers))}) is not trained here (mtp: true "
            "adds it)."
        ]
    if scenario.parallel.fsdp:
        reasons += [
            "FSDP gathers and scatters hide behind computing as far as that lasts; replicas do not wait for each other "
            "in them, and no measured run tests it."
        ]
    elif scenario.parallel.zero >= 2:
        reasons += ["ZeRO-2 and ZeRO-3 collectives are fully exposed, and replicas do not wait for each other in them."]
    if scenario.parallel.cp > 1 and scenario.parallel.cp_kind != "alltoall":
        kind = scenario.parallel.cp_kind
        reasons += [f"Context parallelism by {kind} has no measured run whose memory is known to compare with."]
    if train.documents is not None:
        reasons += ["Packed documents make attention cheaper and uneven as counted; no measured run tests it."]
    if train.offloaded:
        reasons += ["Offloading has the host link to itself at its full rate, and no measured run to compare with."]
    if "forward_backward" in train.overlaps or train.schedule == "dualpipe":
        reasons += ["Handing micro-batches to the neighbouring stage is not overlapped."]
    if any(layer.cross_attention is not None for layer in model.layers):
        reasons += ["Encoder and decoder are given the same number of tokens."]
    return reasons


def _layers(number: int) -> str:
    return "1 layer" if number == 1 else f"{number} layers"


def _warnings(trace: Trace, headroom: float, over_steps: MemoryOverSteps) -> tuple[str, ...]:
    told = []
    if headroom < 0:
        told.append(
            f"does not fit: the worst rank needs {-headroom:,.0f} bytes more than {trace.scenario.cluster.gpu.name} has"
        )
    elif over_steps.out_of_memory_fraction > RISK:
        told.append(
            f"fits in this step, but {over_steps.out_of_memory_fraction:.1%} of steps need more than a GPU has: 99 of "
            f"100 stay under {over_steps.p99_bytes:,.0f} bytes"
        )
    if any(item.kind == "assumed" and item.part == "product efficiency" for item in trace.device.provenance):
        told.append("product efficiency is assumed, not measured, for this GPU")
    if off := accuracy_warning(trace.scenario):
        told.append(off)
    if unused := _oversubscription_unused(trace.scenario):
        told.append(unused)
    return tuple(told)


def _oversubscription_unused(scenario: Scenario) -> str:
    """Why an oversubscribed spine does not slow the all-to-alls; empty where it does, or where there is none."""
    cluster, in_step = scenario.cluster, scenario.parallel.ep * scenario.parallel.etp
    if cluster.oversubscription <= 1.0 or scenario.parallel.ep == 1:
        return ""
    told = f"oversubscription {cluster.oversubscription:g} does not slow this scenario's all-to-alls: "
    if cluster.ranks_per_node % in_step == 0:
        return told + "they stay inside the NVLink domain"
    if cluster.cross_rail == "direct":
        return told + "cross_rail: direct is a fabric without an inner bottleneck; cross_rail: spine has one"
    num_rails = 1 if scenario.routing.dispatcher == "deepep" else min(in_step, cluster.ranks_per_node)
    if spine_slowdown(cluster, num_rails) > 1.0:
        return ""
    return told + (
        f"with cross_rail: {cluster.cross_rail} and dispatcher: {scenario.routing.dispatcher} their messages stay on a "
        "rail's leaf, which is taken to reach every node, or the up-links suffice for the rest"
    )
