"""One MoE layer alone, predicted from a row of a measurement table: forward and backward, attention left out."""

from __future__ import annotations

import re

import numpy as np

from moesim.catalog.step import NO_LOSS
from moesim.describe.model import Ffn, GroupedQueryAttention, Layer, Model, MoeFfn, Router
from moesim.door.records import Record
from moesim.errors import InputError
from moesim.scenario import Scenario
from moesim.study.accuracy import AccuracyRow, Likeness, NotExpressed, Prediction
from moesim.study.accuracy_cases import catalog_gpu, default_cluster, given, whole
from moesim.timeline.phases import OperationTimes
from moesim.timeline.step import run_step
from moesim.units import MILLI

PARTS = ("router", "permute", "dispatch", "experts", "combine")
TOLD = {"forward": "forward_ms", "backward": "backward_ms"}


def predict(row: Record, owner: str) -> list[Prediction]:
    """Forward and backward of one row, or why there is no prediction."""
    name = row.get("case") or row.get("id") or "?"
    try:
        scenario = express(row, owner)
        measured = {way: given(row, column, owner) for way, column in TOLD.items()}
    except InputError as error:
        return [NotExpressed(id=name, reason=f"{error.field} {error.rule}: {error.got}")]
    reasons = outside_envelope(scenario)
    operations = run_step(scenario, constants=NO_LOSS).stages[0].operations
    times = {"backward" if run.is_backward else "forward": run.times for run in operations}
    rows: list[Prediction] = []
    for way, measured_ms in measured.items():
        if measured_ms is None:
            rows.append(NotExpressed(id=f"{name} {way}", reason=f"{TOLD[way]} is empty"))
            continue
        rows.append(
            AccuracyRow(
                id=f"{name} {way}",
                group=f"MoE layer {way}, {scenario.train.precision}",
                predicted=_layer_s(times[way]),
                measured=measured_ms * MILLI,
                inside_envelope=not reasons,
                used_in_fit=False,
                source=row.get("source", ""),
                reasons=reasons,
                like=Likeness(
                    gpu=scenario.cluster.gpu.name,
                    is_moe=True,
                    crosses_nodes=scenario.parallel.ep > scenario.cluster.ranks_per_node,
                    precision=scenario.train.precision,
                ),
            )
        )
    return rows


def _layer_s(times: OperationTimes) -> float:
    """Seconds of one pass without casts of weights: a run's later iterations take those that its first one made."""
    parts_s = sum(float(times.part_R[part].mean()) for part in PARTS if part in times.part_R)
    is_cast = np.array(
        [name == "cast weights" and part in PARTS for name, part in zip(times.names, times.parts, strict=True)]
    )
    return parts_s - float(times.seconds_PMV[is_cast].sum(axis=(0, 1)).mean())


def express(row: Record, owner: str) -> Scenario:
    """A model of this one layer on the row's ranks, routing forced even. Raises InputError naming the column."""
    gpu, ranks = catalog_gpu(row, owner), whole(row, "ep", owner)
    if not row.get("routing", "").startswith("forced"):
        raise InputError(owner, "routing", "must be forced even: another load is not said", row.get("routing", ""))
    moe = MoeFfn(
        num_experts=whole(row, "n_experts", owner),
        expert=Ffn(width=whole(row, "moe_ffn", owner)),
        router=_router(row, owner),
    )
    attention = GroupedQueryAttention(num_heads=8, num_kv_heads=8, head_dim=64)  # has no part in what is compared
    layers = (Layer(attention=attention, ffn=moe),)
    model = Model(name=row.get("case", "layer"), hidden=whole(row, "hidden", owner), vocab=1024, layers=layers)
    precision = "fp8" if row.get("precision", "").lower().startswith("fp8") else "bf16"
    dispatcher = "deepep" if row.get("dispatcher", "").lower() == "deepep" else "alltoall"
    base = Scenario.make(
        model="llama-3-8b",
        cluster=default_cluster(gpu),
        num_gpus=ranks,
        global_batch=ranks,
        popularity="balanced",
        seq_len=whole(row, "tokens_per_rank", owner),
        precision=precision,
        dispatcher=dispatcher,
    )
    return base.with_(model=model, ep=ranks)


def _router(row: Record, owner: str) -> Router:
    """Top-k of all experts, or of the best groups where the row says so: forced balance draws scores at random, and
    the groups' limit still holds. Megatron-LM core/transformer/moe/router.py.
    """
    top_k = whole(row, "topk", owner)
    limit = re.search(r"(\d+) groups/top-(\d+) groups", row.get("router", ""))
    if limit is None:
        return Router(top_k=top_k)
    return Router(top_k=top_k, num_groups=int(limit[1]), top_groups=int(limit[2]))


def outside_envelope(scenario: Scenario) -> tuple[str, ...]:
    """Why a layer lies outside what the model covers; a function of its configuration alone."""
    reasons = []
    if scenario.parallel.ep > scenario.cluster.ranks_per_node:
        reasons.append("no layer across nodes has been scored")
    return tuple(reasons)
