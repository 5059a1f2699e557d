"""The dense twins of an MoE: what the same attention, depth and hidden size cost without experts.

Two comparisons bracket the truth: a dense model of equal active size does the same arithmetic per token (and learns
less), one of equal total size holds as many parameters (and does far more arithmetic).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from moesim.cost.recompute import useful_modules
from moesim.describe.model import Ffn, Layer, Model, MoeFfn
from moesim.describe.parameters import ffn_parameters, layer_parameters, total_parameters
from moesim.errors import InputError, check
from moesim.metrics.step import StepResult
from moesim.scenario import Scenario
from moesim.study.simulate import simulate
from moesim.study.sizes import rank_memories
from moesim.units import format_bytes

TwinKind = Literal["active", "total"]
WIDTH_MULTIPLE = 64  # of each tensor-parallel slice, so that the twin's products have the shapes that GPUs like


@dataclass(frozen=True, kw_only=True)
class Twins:
    """An MoE and its dense twins, each simulated for one step on the same cluster with the same batch."""

    moe: StepResult
    active: StepResult
    total: StepResult
    parameters: Mapping[str, int]  # total parameters of moe, active, total
    widths: Mapping[str, int]  # of the block that takes an MoE layer's place, in the first such layer
    notes: tuple[str, ...]

    @property
    def cost_over_active(self) -> float:
        """GPU time per token of the MoE over that of the equal-active twin: the price of routing, traffic and skew."""
        return self.active.tokens_per_s_per_gpu / self.moe.tokens_per_s_per_gpu

    @property
    def cost_over_total(self) -> float:
        """GPU time per token of the MoE over that of the equal-total twin: below 1 the MoE is the cheaper one."""
        return self.total.tokens_per_s_per_gpu / self.moe.tokens_per_s_per_gpu


def dense_twins(scenario: Scenario) -> dict[TwinKind, Scenario]:
    """The scenario with its dense twins instead of the MoE: ``{"active": ..., "total": ...}``.

    Expert parallelism becomes 1; cluster, pp, cp, ZeRO stage and batch stay. Where the twin does not fit in the asked
    layout it is cut over more tensor-parallel ranks, up to a node, and as a last resort recomputes: the first of these
    that fits. If none does it keeps the asked layout. Raises InputError for a model that is dense already.

    >>> dense_twins(scenario)["total"].model.is_moe  # doctest: +SKIP
    False
    """
    kinds: tuple[TwinKind, ...] = ("active", "total")
    twins = {}
    for kind in kinds:
        model = dense_twin(scenario, kind)
        kept = [module for module in scenario.train.recomputed_modules if module in useful_modules(model)]
        recompute = scenario.train.recompute if not scenario.train.recomputed_modules else ",".join(kept) or "none"
        twins[kind] = _cut_to_fit(scenario.with_(model=model, ep=1, etp=1, recompute=recompute))
    return twins


def _cut_to_fit(twin: Scenario) -> Scenario:
    """The twin, or the first layout of more tensor parallelism (then with recomputation) that fits its GPUs."""
    most = twin.cluster.ranks_per_node
    sizes = [tp for tp in (1, 2, 4, 8, 16, 32, 64) if twin.parallel.tp <= tp <= most]
    recomputes = dict.fromkeys((twin.train.recompute, "full"))
    for recompute, tp in itertools.product(recomputes, sizes):
        try:
            cut = twin.with_(tp=tp, recompute=recompute)
        except InputError:  # does not divide heads, sequence or batch
            continue
        if max(memory.peak_bytes for memory in rank_memories(cut)) <= cut.cluster.gpu.memory_bytes.value:
            return cut
    return twin


def dense_twin(scenario: Scenario, kind: TwinKind) -> Model:
    """The model with each MoE layer replaced by one feed-forward block of as many active, or total, parameters.

    Router and shared experts count towards that size. The width is rounded to a multiple of 64 * tp (never below one).
    """
    model = scenario.model
    check(model.is_moe, "model", "layers", "must have MoE layers to have a dense twin", model.name)
    multiple = WIDTH_MULTIPLE * scenario.parallel.tp

    def without_experts(layer: Layer) -> Layer:
        if not isinstance(layer.ffn, MoeFfn):
            return layer
        return dataclasses.replace(layer, ffn=_dense_block(model, layer, layer.ffn, kind, multiple))

    return dataclasses.replace(
        model,
        name=f"{model.name}-dense-{kind}",
        layers=tuple(without_experts(layer) for layer in model.layers),
        mtp_layers=tuple(without_experts(layer) for layer in model.mtp_layers),
        source=f"made from {model.name}: each MoE layer is one block of equal {kind} size",
        hypothetical=True,
        notes=(),
    )


def compare_twins(scenario: Scenario, moe: StepResult | None = None) -> Twins:
    """Simulate the MoE (unless its result is given) and both twins."""
    asked = dense_twins(scenario)
    results = {kind: simulate(twin) for kind, twin in asked.items()}
    models = {"moe": scenario.model} | {kind: twin.model for kind, twin in asked.items()}
    first = scenario.model.moe_layers[0]
    blocks = {kind: twin.model.layers[first].ffn for kind, twin in asked.items()}
    return Twins(
        moe=moe or simulate(scenario),
        active=results["active"],
        total=results["total"],
        parameters={name: total_parameters(model) for name, model in models.items()},
        widths={kind: block.width for kind, block in blocks.items() if isinstance(block, Ffn)},
        notes=tuple(note for kind, result in results.items() for note in _notes(kind, result, scenario, asked[kind])),
    )


def _notes(kind: str, result: StepResult, scenario: Scenario, twin: Scenario) -> list[str]:
    if result.fits:
        changed = [f"tp={twin.parallel.tp}"] if twin.parallel.tp != scenario.parallel.tp else []
        changed += ["full recomputation"] if twin.train.recompute == "full" != scenario.train.recompute else []
        return (
            [f"The dense twin of equal {kind} size runs with {' and '.join(changed)}, so that it fits."]
            if changed
            else []
        )
    excess = format_bytes(-result.headroom_bytes)
    return [
        f"The dense twin of equal {kind} size needs {excess} more than a GPU has in this layout; "
        "its time is that of GPUs with enough memory, so a lower bound."
    ]


def _dense_block(model: Model, layer: Layer, moe: MoeFfn, kind: TwinKind, multiple: int) -> Ffn:
    """The dense block with the parameters of a layer's MoE block, to the nearest multiple of its width."""
    counts = layer_parameters(model, layer)
    experts = counts.active_experts if kind == "active" else counts.experts
    wanted = experts + counts.router + counts.shared_experts
    thin, wide = (ffn_parameters(model.hidden, dataclasses.replace(moe.expert, width=n * multiple)) for n in (1, 2))
    return dataclasses.replace(moe.expert, width=multiple * max(1, 1 + round((wanted - thin) / (wide - thin))))
