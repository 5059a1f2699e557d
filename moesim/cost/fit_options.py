"""What would make a run fit: each change is evaluated through ``stage_memory``, not guessed.

Legend: G expert-parallel groups, M micro-batches, L MoE layers of a stage, R expert-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moesim.cost.activations import MEGATRON, Software
from moesim.cost.memory import RankMemory, stage_memory
from moesim.describe.model import Model, MoeFfn
from moesim.describe.parallel import Parallelism
from moesim.describe.pipeline import stage_chunks
from moesim.describe.workload import Training
from moesim.errors import InputError

Floats = NDArray[np.float64]
Change = Mapping[str, int | str]

# From the cheapest in step time to the dearest; the order in which a planner should try them.
_IN_ORDER: tuple[tuple[str, str], ...] = (
    ("zero1", "shard the optimizer over data-parallel ranks: no more bytes than the all-reduce it replaces"),
    ("micro_batch", "halve the micro-batch: smaller products, no more FLOPs"),
    ("ep", "spread the experts over twice as many ranks: the all-to-all reaches further"),
    ("pp", "cut the stack into twice as many stages: a longer pipeline bubble"),
    ("recompute", "recompute each layer in the backward pass: a third more FLOPs, least memory for activations"),
    ("tp", "split products over twice as many ranks: two gathers and scatters per layer on the critical path"),
    ("zero2", "shard the gradients too: a reduce-scatter for every micro-batch"),
    ("zero3", "shard the weights too: every micro-batch gathers every layer"),
)


@dataclass(frozen=True, kw_only=True)
class FitOption:
    """One change: what to set, in words and as scenario leaves; what it saves on the worst rank; does it then fit."""

    text: str
    changes: Change
    saved_bytes: float
    peak_bytes: float
    fits: bool


def what_to_change(
    model: Model,
    parallel: Parallelism,
    num_gpus: int,
    train: Training,
    *,
    received_by_stage: Sequence[Floats | None],
    capacity_bytes: float,
    software: Software = MEGATRON,
) -> list[FitOption]:
    """Options that lower the worst rank's peak, cheapest in step time first (the order of ``_IN_ORDER``).

    received_by_stage: the received_GMLR of each stage, of which the hottest rank's share over balance is kept; options
    are evaluated with that share on every MoE layer. Options that break a rule of the description are left out. When
    no single one fits, a last option joins them in that order until it does (or all are used).
    """
    skew = hot_share(model, parallel, train, received_by_stage)

    def peak_bytes(changes: Change) -> float:
        changed = _apply(parallel, train, changes)
        return worst_stage(model, *changed, num_gpus, skew=skew, software=software).peak_bytes

    now = peak_bytes({})
    options: list[FitOption] = []
    joined: dict[str, int | str] = {}
    joined_texts: list[str] = []
    joined_peak = now
    for name, text in _IN_ORDER:
        changes = _change(name, parallel, train, model)
        if changes is None:
            continue
        try:
            peak = peak_bytes(changes)
        except InputError:
            continue
        if peak < now:
            options.append(_option(text, changes, now, peak, capacity_bytes))
        if joined_peak > capacity_bytes:
            try:
                together = peak_bytes(joined | dict(changes))
            except InputError:
                continue
            if together < joined_peak:
                joined, joined_peak = joined | dict(changes), together
                joined_texts.append(text.split(":")[0])
    if len(joined_texts) > 1 and not any(option.fits for option in options):
        options.append(_option("together: " + "; ".join(joined_texts), joined, now, joined_peak, capacity_bytes))
    return options


def hot_share(
    model: Model, parallel: Parallelism, train: Training, received_by_stage: Sequence[Floats | None]
) -> float:
    """The hottest rank's received assignments over the balanced number, averaged over layers and micro-batches."""
    balanced = _balanced(model, parallel, train)
    arrays = [received for received in received_by_stage if received is not None and received.size]
    if not arrays or balanced == 0:
        return 1.0
    return max(float(received.mean(axis=(1, 2)).max()) for received in arrays) / balanced


def worst_stage(
    model: Model,
    parallel: Parallelism,
    train: Training,
    num_gpus: int,
    *,
    skew: float = 1.0,
    software: Software = MEGATRON,
) -> RankMemory:
    """Memory of the stage that needs most when the hottest rank always receives skew times the balanced load."""
    layout = parallel.layout(num_gpus)
    _check_experts(model, parallel)
    num_micro_batches = train.num_micro_batches(layout.dp)
    # the peak is reached once the pipeline is full: more micro-batches of the same load change nothing
    num_counted = min(num_micro_batches, 2 * parallel.pp * parallel.vpp)
    short = replace(train, global_batch=num_counted * train.micro_batch * layout.dp)
    received = skew * _balanced(model, parallel, train)
    memories = []
    for stage in range(parallel.pp):
        chunks = stage_chunks(model, parallel, train, stage)
        num_moe = sum(item.layer.is_moe for chunk in chunks for item in chunk)
        array = np.full((1, num_counted, num_moe, 1), received) if num_moe else None
        memories.append(
            stage_memory(model, parallel, layout, short, stage=stage, received_GMLR=array, software=software)
        )
    return max(memories, key=lambda memory: memory.peak_bytes)


def _balanced(model: Model, parallel: Parallelism, train: Training) -> float:
    """Assignments an expert-parallel rank receives in one micro-batch and layer when all experts are equally loaded.

    An expert-parallel group of ep*etp ranks holds that many shares of a sequence-parallel rank's tokens.
    """
    layer = next((layer.ffn for layer in model.layers if isinstance(layer.ffn, MoeFfn)), None)
    if layer is None:
        return 0.0
    tokens = train.micro_batch * train.seq_len / parallel.cp / parallel.tp
    return tokens * layer.router.top_k * parallel.etp


def _check_experts(model: Model, parallel: Parallelism) -> None:
    for layer in model.layers:
        if isinstance(layer.ffn, MoeFfn) and layer.ffn.num_experts % parallel.ep:
            rule = f"must divide the {layer.ffn.num_experts} experts"
            raise InputError("parallel", "ep", rule, parallel.ep)


def _change(name: str, parallel: Parallelism, train: Training, model: Model) -> Change | None:
    """The leaves that one option sets, or None where it is set already or cannot be."""
    heads = min(getattr(layer.attention, "num_kv_heads", layer.attention.num_heads) for layer in model.layers)
    changes: dict[str, Change | None] = {
        "zero1": {"zero": 1} if parallel.zero < 1 else None,
        "zero2": {"zero": 2} if parallel.zero < 2 else None,
        "zero3": {"zero": 3} if parallel.zero < 3 else None,
        "micro_batch": {"micro_batch": train.micro_batch // 2} if train.micro_batch % 2 == 0 else None,
        "ep": {"ep": 2 * parallel.ep} if model.is_moe else None,
        "pp": {"pp": 2 * parallel.pp},
        "tp": {"tp": 2 * parallel.tp} if heads % (2 * parallel.tp) == 0 else None,
        "recompute": {"recompute": "full"} if train.recompute == "none" else None,
    }
    return changes[name]


def _apply(parallel: Parallelism, train: Training, changes: Change) -> tuple[Parallelism, Training]:
    of_train = {name: value for name, value in changes.items() if name in ("micro_batch", "recompute")}
    of_parallel = {name: value for name, value in changes.items() if name not in of_train}
    return replace(parallel, **of_parallel), replace(train, **of_train)  # type: ignore[arg-type]


def _option(text: str, changes: Change, now: float, peak: float, capacity_bytes: float) -> FitOption:
    values = ", ".join(f"{name}={value}" for name, value in changes.items())
    fits = peak <= capacity_bytes
    return FitOption(text=f"{values}: {text}", changes=changes, saved_bytes=now - peak, peak_bytes=peak, fits=fits)
