"""Peak memory of measured runs, and of single MoE layers, predicted from rows of a table.

A row's peak is torch's max_memory_allocated of its fullest rank. Number formats, loss and dispatcher are taken from the
row, which has them from its run's recipe; nothing is fitted.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moesim.catalog.hardware import load_cluster
from moesim.cost.activations import layer_tensors, workspace_bytes
from moesim.cost.moments import Moment, forward_moments, layer_moments
from moesim.cost.precision import LAYOUTS, RECIPES
from moesim.cost.software import MEGATRON
from moesim.describe.model import Ffn, GroupedQueryAttention, Layer, Model, MoeFfn, Router
from moesim.describe.parallel import Parallelism
from moesim.describe.workload import BYTES_OF, Dispatcher, Precision
from moesim.door.records import Record
from moesim.errors import InputError
from moesim.metrics.memory import memory_by_stage
from moesim.scenario import Scenario
from moesim.study.accuracy import AccuracyRow, Likeness, NotExpressed, Prediction
from moesim.study.accuracy_cases import catalog_gpu, catalog_model, default_cluster, given, number, whole
from moesim.study.accuracy_training import express as express_step
from moesim.timeline.load import step_load
from moesim.units import GIB, MILLI, parse_quantity

FORMATS = ("gradients", "main_weights", "moments")
VOCAB_MULTIPLE = 128  # Megatron-LM's --make-vocab-size-divisible-by, times tp
# A layer out of Megatron-LM's own test: experts without a gate, the activation apart from the product with its weight.
LAYER_TEST = dataclasses.replace(MEGATRON, fused_activation=False, placeholder_gradients=False)
ROUTED = ("router", "dispatch", "experts")


@dataclass(frozen=True, kw_only=True)
class MemoryRow:
    """One measured peak and its predictions [bytes]; SimuMax's as published, None where it published none.

    simumax_step_s: its published step time [s], for the same run.
    """

    id: str
    group: str
    predicted_bytes: float
    measured_bytes: float
    moment: str
    simumax_bytes: float | None
    simumax_step_s: float | None
    source: str

    @property
    def error_fraction(self) -> float:
        return self.predicted_bytes / self.measured_bytes - 1.0

    @property
    def simumax_error_fraction(self) -> float | None:
        return None if self.simumax_bytes is None else self.simumax_bytes / self.measured_bytes - 1.0


def memory_rows(records: Sequence[Record], owner: str) -> tuple[MemoryRow, ...]:
    """Every row of a table predicted, in its order. Raises InputError naming the row and the column.

    >>> from moesim.study.accuracy import CARRIED
    >>> from moesim.door.records import read_records
    >>> rows = memory_rows(read_records(CARRIED / "memory.csv")[:1], "memory.csv")
    >>> abs(rows[0].error_fraction) < 0.01
    True
    """
    return tuple(_row(record, f"{owner}: {record.get('id', '?')}") for record in records)


def predict(row: Record, owner: str) -> list[Prediction]:
    """One row, or why there is no prediction."""
    row = as_carried(row)
    reasons = () if _tells_formats(row) else ("formats of gradients and states are not said: Megatron-LM's",)
    try:
        found, gpu = _row(row, owner), catalog_gpu(row, owner)
        ranks = max(whole(row, "n_gpus", owner, default=1), whole(row, "ep", owner, default=1))
    except InputError as error:
        return [NotExpressed(id=row["id"], reason=f"{error.field} {error.rule}: {error.got}")]
    return [
        AccuracyRow(
            id=found.id,
            group=found.group,
            predicted=found.predicted_bytes,
            measured=found.measured_bytes,
            unit="bytes",
            inside_envelope=not reasons,
            reasons=reasons,
            used_in_fit=False,
            source=found.source,
            like=Likeness(
                gpu=gpu,
                is_moe="MoE" in found.group,
                crosses_nodes=ranks > load_cluster(default_cluster(gpu)).ranks_per_node,
                precision="fp8" if "fp8" in row.get("precision", "").lower() else "bf16",
            ),
        )
    ]


# Where published tables tell a peak, and in what unit; of several ranks the fullest counts.
PEAK_COLUMNS = (
    ("max_alloc_mb_per_rank", "MiB"),
    ("real_peak_alloc_gib", "GiB"),
    ("peak_alloc_gib", "GiB"),
    ("max_allocated_GiB", "GiB"),
    ("peak_mem_gb", "GB"),
)


def as_carried(record: Record) -> Record:
    """A row of a published table in the columns that moesim's own has; its own rows as they are.

    >>> as_carried({"case": "a", "max_allocated_GiB": "3.2", "router": "sigmoid, 8 groups/top-4 groups"})["n_groups"]
    '8'
    """
    told = dict(record) | {"id": record.get("id") or record.get("case", "?")}
    if record.get("peak"):
        return told
    for column, unit in PEAK_COLUMNS:
        peaks = [float(text) for text in re.findall(r"\d+(?:\.\d+)?", record.get(column, "").split("(")[0])]
        if peaks:
            told |= {"peak": str(max(peaks)), "peak_unit": unit}
            break
    if groups := re.search(r"(\d+) groups/top-(\d+) groups", record.get("router", "")):
        told |= {"n_groups": groups[1], "top_groups": groups[2]}
    if "deepep" in record.get("dispatcher", "").lower():
        told["dispatcher"] = "deepep"
    return told


def _tells_formats(record: Record) -> bool:
    """Whether the row says in what formats gradients and the optimizer's states lie; a layer alone has none."""
    is_layer = bool(record.get("tokens_per_rank"))
    return is_layer or bool(record.get("gradients")) or "grads" in record.get("precision", "")


def _row(record: Record, owner: str) -> MemoryRow:
    record = as_carried(record)
    is_layer = bool(record.get("tokens_per_rank"))
    predicted, moment, kind = _layer(record, owner) if is_layer else _step(record, owner)
    simumax_gib = given(record, "simumax_peak_gib", owner)
    simumax_ms = given(record, "simumax_step_ms", owner)
    return MemoryRow(
        id=record["id"],
        group=kind,
        predicted_bytes=predicted,
        measured_bytes=_peak_bytes(record, owner),
        moment=moment,
        simumax_bytes=None if simumax_gib is None else simumax_gib * GIB,
        simumax_step_s=None if simumax_ms is None else simumax_ms * MILLI,
        source=record.get("source", ""),
    )


def _peak_bytes(record: Record, owner: str) -> float:
    try:
        return parse_quantity(f"{number(record, 'peak', owner)} {record.get('peak_unit', '')}", "bytes")
    except ValueError as error:
        raise InputError(owner, "peak_unit", f"must be {error}", record.get("peak_unit", "")) from None


def _step(record: Record, owner: str) -> tuple[float, str, str]:
    """(peak of the fullest rank [bytes], its moment, group) of a training run."""
    scenario = express(record, owner)
    memories = memory_by_stage(scenario, step_load(scenario))
    fullest = max(memories, key=lambda memory: memory.allocated_bytes)
    kind = "MoE" if scenario.model.is_moe else "dense"
    return fullest.allocated_bytes, fullest.moment, f"training step, {scenario.cluster.gpu.name}, {kind}"


def express(record: Record, owner: str) -> Scenario:
    """The row's run, routing even. Raises InputError naming the column.

    Rows of published tables are read as their step times are; formats and the loss are Megatron-LM's defaults there.
    """
    if "fused_loss" not in record:
        scenario, _ = express_step(record, owner)
        model = _padded(scenario.model, scenario.parallel.tp)
        return scenario.with_(model=model, popularity="balanced", fused_loss=True)
    tp, cp = (whole(record, name, owner, default=1) for name in ("tp", "cp"))
    model = _padded(catalog_model(record, owner), tp)
    recompute = record.get("recompute", "")
    leaves: dict[str, Any] = {name: record[name] for name in FORMATS if record.get(name)}
    if cp > 1:
        leaves["cp_kind"] = record.get("cp_kind") or "ring"
    base = Scenario.make(
        model="llama-3-8b",
        cluster=default_cluster(catalog_gpu(record, owner)),
        num_gpus=whole(record, "n_gpus", owner),
    )
    return base.with_(
        model=model,
        tp=tp,
        pp=whole(record, "pp", owner),
        cp=cp,
        ep=whole(record, "ep", owner, default=1),
        popularity="balanced",
        seq_len=whole(record, "seq_len", owner),
        micro_batch=whole(record, "mbs", owner),
        global_batch=whole(record, "gbs", owner),
        recompute="none" if recompute in ("", "[]", "none") else recompute,
        fused_loss=record.get("fused_loss") == "true",
        **leaves,
    )


def _padded(model: Model, tp: int) -> Model:
    """With Megatron's table of words: the tokenizer adds an end of text, tensor-parallel ranks take equal parts."""
    multiple = VOCAB_MULTIPLE * tp
    return dataclasses.replace(model, vocab=-(-(model.vocab + 1) // multiple) * multiple)


def _layer(record: Record, owner: str) -> tuple[float, str, str]:
    """(peak [bytes], its moment, group) of one MoE layer alone, forward and backward in turn."""
    ep, tokens = whole(record, "ep", owner), whole(record, "tokens_per_rank", owner)
    router = Router(
        top_k=whole(record, "topk", owner),
        num_groups=whole(record, "n_groups", owner, default=1),
        top_groups=whole(record, "top_groups", owner, default=1),
    )
    expert = Ffn(width=whole(record, "moe_ffn", owner), gated=False)
    ffn = MoeFfn(num_experts=whole(record, "n_experts", owner), expert=expert, router=router)
    attention = GroupedQueryAttention(num_heads=8, num_kv_heads=8, head_dim=64)  # has no part in the layer alone
    layer = Layer(attention=attention, ffn=ffn)
    model = Model(name="layer", hidden=whole(record, "hidden", owner), vocab=1024, layers=(layer,))
    dispatcher: Dispatcher = "deepep" if record.get("dispatcher", "").lower() == "deepep" else "alltoall"
    precision: Precision = "fp8" if "fp8" in record.get("precision", "").lower() else "bf16"
    peak, moment = layer_alone_bytes(
        model, Parallelism(ep=ep), tokens=tokens, dispatcher=dispatcher, precision=precision
    )
    return peak, moment, f"MoE layer, {precision.upper()}"


def layer_alone_bytes(
    model: Model,
    parallel: Parallelism,
    *,
    tokens: int,
    dispatcher: Dispatcher = "alltoall",
    precision: Precision = "bf16",
) -> tuple[float, str]:
    """(peak [bytes], its moment) of a model's first layer, a MoE layer, run alone over and over with even routing.

    In the forward the input, and the output and its gradient of the run before, are there; in the backward half of the
    weights' BF16 gradients at the activation, none before it.
    """
    layer = model.layers[0]
    assert isinstance(layer.ffn, MoeFfn)
    rows = tokens * layer.ffn.router.top_k
    in_and_out = model.hidden * BYTES_OF["bf16"] * tokens
    products = 2 * model.hidden * layer.ffn.expert.width * layer.ffn.num_experts / parallel.ep * BYTES_OF["bf16"]
    router = model.hidden * layer.ffn.num_experts * BYTES_OF["bf16"]
    kept = [tensor for tensor in layer_tensors(model, layer, parallel, LAYER_TEST, precision) if tensor.part in ROUTED]
    saved = sum(tensor.bytes * (tokens if tensor.per == "token" else rows) for tensor in kept)
    casts = 0.0 if precision == "bf16" else LAYOUTS * RECIPES[precision].operand_bytes * products / BYTES_OF["bf16"]
    standing = products + router + saved + workspace_bytes((layer,), LAYER_TEST) + 3 * in_and_out

    def at(moment: Moment) -> float:
        return standing + casts + sum(moment.per_token) * tokens + sum(moment.per_assignment) * rows

    forward = forward_moments(model, layer, parallel, dispatcher, RECIPES[precision])
    found = [(at(moment), f"forward: {moment.name}") for moment in forward]
    for moment in layer_moments(model, layer, parallel, dispatcher, LAYER_TEST, RECIPES[precision]):
        second = moment.name == "activation"  # the second product's gradient is there, its cast weights are gone
        gradients = (products - casts) / 2 if second else 0.0
        found.append((at(moment) - in_and_out + gradients, f"backward: {moment.name}"))
    return max(found)
