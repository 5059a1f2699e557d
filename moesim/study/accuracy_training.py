"""Whole training steps, predicted from a row of a measurement table.

A row must name model, GPU, counts, parallel sizes, batch and a step time, or it is listed as not expressed. Where the
run did something that moesim does not model (overlapped all-to-alls), the row is predicted without it and
lies outside the envelope, with the reason.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from moesim.catalog.hardware import load_cluster
from moesim.catalog.step import left_out_errors, rows_of_fit
from moesim.describe.hardware import Cluster
from moesim.describe.model import Model
from moesim.describe.workload import GRAPH_MODULES, MODULES, Precision
from moesim.door.records import Record
from moesim.errors import InputError, MoesimError
from moesim.metrics.scored import step_likeness
from moesim.metrics.step import COMM_PARTS
from moesim.metrics.summary import step_parts
from moesim.scenario import Scenario
from moesim.study.accuracy import AccuracyRow, NotExpressed, Prediction
from moesim.study.accuracy_cases import catalog_gpu, catalog_model, default_cluster, given, number, whole
from moesim.study.accuracy_recipes import completed
from moesim.timeline.step import run_step
from moesim.timeline.trace import Trace
from moesim.units import MILLI

RACK_SHARE = 64
PARTS = ("kernels", "communication", "host", "others")
MOST_MICRO_BATCHES = 4096  # of a replica: eight times the most that was ever published
PRECISIONS: tuple[tuple[str, Precision], ...] = (
    (r"nvfp4", "nvfp4"),
    (r"mxfp8|fp8mx", "mxfp8"),
    (r"fp8.*(block|subchannel)|fp8sc", "fp8"),
    (r"fp8", "fp8_tensor"),
)
MODULE_WORDS = {"norm": "layernorm", "act": "moe_act"}  # the ModelZoo's words for Megatron's modules
NO_RECOMPUTE = ("", "none", "[]", "see yaml")


def predict(row: Record, owner: str) -> list[Prediction]:
    """The step of one row, or why there is no prediction."""
    name = row.get("id", "?")
    try:
        scenario, reasons = express(row, owner)
        measured_s = step_s(row, owner)
        trace = run_step(scenario)
    except InputError as error:
        return [NotExpressed(id=name, reason=f"{error.field} {error.rule}: {error.got}")]
    except MoesimError as error:
        return [NotExpressed(id=name, reason=str(error))]
    kind = "MoE" if scenario.model.is_moe else "dense"
    return [
        AccuracyRow(
            id=name,
            group=f"{release_of(row)}, {scenario.cluster.gpu.name}, {kind}",
            predicted=trace.step_s,
            measured=measured_s,
            inside_envelope=not reasons,
            used_in_fit=name in rows_of_fit(),
            source=row.get("source", ""),
            reasons=reasons,
            like=step_likeness(scenario),
            parts_s=_parts_s(trace),
            left_out_error=left_out_errors().get(name),
        )
    ]


def _parts_s(trace: Trace) -> dict[str, float]:
    """Mean seconds of a rank by what it does: kernels, communication, waiting for its host, waiting for others."""
    parts = step_parts(trace)
    waits = {"host": "host", "wait_for_slowest": "others", "pipeline_bubble": "others"}
    found = dict.fromkeys(PARTS, 0.0)
    for name, seconds in parts.items():
        found[waits.get(name, "communication" if name in COMM_PARTS else "kernels")] += seconds
    return found


def release_of(row: Record) -> str:
    """The software that the row ran, by its release: rows of one belong together."""
    told = row.get("software") or row.get("framework") or "Megatron-Bridge card"
    return told.split(" + ")[0]


def express(row: Record, owner: str) -> tuple[Scenario, tuple[str, ...]]:
    """The row's scenario, and what the run did that it does not say. Raises InputError and NotModelledError."""
    row = completed(row)
    told = row.get("config_complete") or "full"
    if not told.startswith("full"):
        raise InputError(owner, "config_complete", "must be full", told)
    if re.search(r"parallelism\)|in repo", told):
        raise InputError(owner, "config_complete", "must be full in the row itself", told)
    model, gpu = catalog_model(row, owner), catalog_gpu(row, owner)
    num_gpus, tp, pp = (whole(row, name, owner) for name in ("n_gpus", "tp", "pp"))
    ep = whole(row, "ep", owner, default=1) if model.is_moe else 1
    leaves: dict[str, Any] = {
        "tp": tp,
        "pp": pp,
        "vpp": whole(row, "vp", owner, default=1),
        "cp": whole(row, "cp", owner, default=1),
        # SimuMax's launcher exchanges heads (--cp-comm-type a2a); Megatron's own default is the ring.
        "cp_kind": "alltoall" if "SimuMax" in row.get("source", "") else "ring",
        "ep": ep,
        "etp": whole(row, "etp", owner, default=_default_etp(num_gpus, tp, pp, ep)) if model.is_moe else 1,
        "zero": 1,
        "seq_len": whole(row, "seq_len", owner),
        "micro_batch": whole(row, "mbs", owner),
        "global_batch": whole(row, "gbs", owner),
        "precision": _precision(row),
        "recompute": _recompute(row) or "none",
        "cuda_graphs": _cuda_graphs(row),
        "overlap": _overlap(row),
        "mtp": bool(model.mtp_layers) and row.get("mtp") == "1",
        "dispatcher": "deepep" if re.search("deepep|hybridep", row.get("dispatcher", "").lower()) else "alltoall",
    }
    leaves |= _layout(row, len(model.layers), leaves["pp"] * leaves["vpp"])
    if model.is_moe and not row.get("routing", "").startswith("natural"):
        leaves["popularity"] = "balanced"
    cluster = _cluster(gpu, num_gpus)
    base = Scenario.make(model="llama-3-8b", cluster="h100-8x-ib400", num_gpus=8)  # all of it is replaced
    scenario = base.with_(model=model, cluster=cluster, **leaves)
    if scenario.num_micro_batches > MOST_MICRO_BATCHES:
        raise InputError(owner, "gbs", f"must make at most {MOST_MICRO_BATCHES} micro-batches", leaves["global_batch"])
    return scenario, outside_envelope(row, model)


def _precision(row: Record) -> Precision:
    """The recipe that the row's words name. FP8 without another word was one scale a tensor before blocks existed."""
    words = row.get("precision", "").lower()
    for pattern, precision in PRECISIONS:
        if re.search(pattern, words):
            return precision
    return "bf16"


def _cluster(gpu: str, num_gpus: int) -> Cluster:
    """The GPU's cluster of this size. Runs on several racks of 72 that do not fill them use 64 GPUs of each."""
    name = default_cluster(gpu)
    rack = load_cluster(name).ranks_per_node
    if num_gpus <= rack or num_gpus % rack == 0 or num_gpus % RACK_SHARE:
        return load_cluster(name, num_gpus)
    return dataclasses.replace(load_cluster(name), num_gpus=num_gpus, ranks_per_node=RACK_SHARE)


def _recompute(row: Record) -> str | None:
    """none, full or Megatron's modules as the scenario takes them; None where the row says something else."""
    told = row.get("recompute", "").split(" (")[0]
    if told in NO_RECOMPUTE:
        return "none"
    names = [MODULE_WORDS.get(name.strip(), name.strip()) for name in told.split(",")]
    return ",".join(names) if names == ["full"] or set(names) <= set(MODULES) else None


def _layout(row: Record, num_layers: int, num_chunks: int) -> dict[str, Any]:
    """Where the layers lie: as the row says; else, since Megatron's rules must divide them, with embedding and loss
    counted as layers where that is what divides.
    """
    if row.get("layout"):
        return {"layout": row["layout"]}
    if num_layers % num_chunks and (num_layers + 2) % num_chunks == 0:
        return {"embedding_as_layer": True, "loss_as_layer": True}
    return {}


def _overlap(row: Record) -> str:
    """What the row says that ran beside computing, as the scenario takes it."""
    told = f"{row.get('overlap_and_other', '')} {row.get('extra_config', '')}"
    names = []
    if re.search(r"TP comm overlap on|ub_tp", told):
        names.append("tensor_parallel")
    if row.get("a2a_overlap") or re.search(r"A2A overlap ON", told):
        names.append("forward_backward")
    if row.get("a2a_overlap") == "with weight gradients":
        names.append("weight_gradient")
    return ",".join(names) or "none"


def _cuda_graphs(row: Record) -> str:
    """none, full, or the modules that the row says CUDA graphs hold."""
    told = f"{row.get('cuda_graphs', '')} {row.get('overlap_and_other', '')} {row.get('extra_config', '')}"
    if row.get("cuda_graphs"):
        return row["cuda_graphs"]
    found = re.search(r"(?:CUDA|TE) graphs ([a-z_]+(?:[,+][a-z_]+)*)", told)
    names = re.split("[,+]", found[1]) if found else []
    return ",".join(name for name in names if name in GRAPH_MODULES) or "none"


def _default_etp(num_gpus: int, tp: int, pp: int, ep: int) -> int:
    """Megatron's default is the tensor-parallel size; where experts then do not fit, it must have been 1."""
    return tp if num_gpus % (tp * ep * pp) == 0 else 1


def step_s(row: Record, owner: str) -> float:
    """The measured step [s]: told in seconds or milliseconds, or by tokens per second and GPU. Raises InputError."""
    if (told_s := given(row, "step_time_s", owner)) is not None:
        return told_s
    if (told_ms := given(row, "real_step_ms", owner)) is not None:
        return told_ms * MILLI
    tokens_per_s = given(row, "tokens_per_s_per_gpu", owner)
    if tokens_per_s is None:
        raise InputError(owner, "step_time_s", "must be given, or tokens_per_s_per_gpu", "neither")
    tokens = number(row, "gbs", owner) * number(row, "seq_len", owner)
    return tokens / tokens_per_s / number(row, "n_gpus", owner)


def outside_envelope(row: Record, model: Model) -> tuple[str, ...]:
    """What the run did that its scenario leaves out; a function of the configuration alone."""
    reasons = []
    if _recompute(row) is None:
        reasons.append(f"recomputation is told in other words than Megatron's: {row['recompute']}")
    if row.get("fsdp"):
        reasons.append("fully sharded data parallelism is predicted as ZeRO-1")
    if model.is_moe and not row.get("routing"):
        reasons.append("routing is not said; taken as even")
    if model.is_moe and row.get("routing", "").startswith("natural"):
        reasons.append("the natural load is not known; taken as moesim's default skew")
    if model.mtp_layers and row.get("mtp") != "1":
        reasons.append("whether the multi-token-prediction layer was trained is not said; left out")
    return tuple(reasons)
