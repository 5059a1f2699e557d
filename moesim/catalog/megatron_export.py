"""A scenario to Megatron-LM's flags. Names as in megatron/training/arguments.py, read 2026-11."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from moesim.catalog.megatron import (
    AS_LAYERS,
    CP_KINDS,
    ENDS,
    INSTANCES,
    LAYOUT,
    OVERLAP_FLAGS,
    SHARDING,
    SIZES,
    VIRTUAL,
)
from moesim.catalog.megatron_model import model_flags
from moesim.describe.model import Model
from moesim.describe.parallel import Parallelism
from moesim.describe.pipeline import held_by_stage
from moesim.describe.stages import text_of_held
from moesim.describe.workload import MODULES, Multinomial, Optimizer, Routing, Training
from moesim.door.flags import Values


@dataclass(frozen=True, kw_only=True)
class Exported:
    """Flags of a scenario by section, and what of it they do not say."""

    sections: Mapping[str, Mapping[str, Values]]
    unsaid: tuple[str, ...] = ()


def to_flags(model: Model, parallel: Parallelism, train: Training, routing: Routing, num_gpus: int) -> Exported:
    """The flags that ask Megatron-LM for this run, and what of it none says. Raises NotModelledError.

    Where layers do not divide, or a layout is a list of counts, the flags say an explicit layout.
    """
    p, unsaid = parallel, []
    described, not_described = model_flags(model, with_mtp=train.mtp)
    unsaid += not_described
    layout: dict[str, Values] = {flag: (str(getattr(p, name)),) for name, flag in SIZES.items() if getattr(p, name) > 1}
    layout |= {"expert-tensor-parallel-size": (str(p.etp),)} if model.is_moe and p.tp * p.etp > 1 else {}
    layout |= {"sequence-parallel": ()} if p.tp > 1 else {}
    if p.cp > 1:
        layout["cp-comm-type"] = (next(flag for flag, kind in CP_KINDS.items() if kind == p.cp_kind),)
    layout |= _stage_flags(model, p, train)
    layout |= {INSTANCES: (str(p.replicate),)} if p.replicate > 1 and not p.fsdp else {}
    says_fsdp = p.fsdp and p.zero == 3 and p.pp == 1
    unsaid += ["parallel.fsdp"] if p.fsdp and not says_fsdp else []
    unsaid += [f"parallel.replicate: {p.replicate}"] if p.fsdp and p.replicate > 1 else []
    if says_fsdp:
        layout["use-torch-fsdp2"] = ()
    elif p.zero == 1:
        layout["use-distributed-optimizer"] = ()
    elif p.zero:
        strategy = next(name for name, stage in SHARDING.items() if stage == p.zero)
        layout |= {"use-megatron-fsdp": (), "data-parallel-sharding-strategy": (strategy,)}
        layout["use-distributed-optimizer"] = ()
    training: dict[str, Values] = {
        "seq-length": (str(train.seq_len),),
        "max-position-embeddings": (str(train.seq_len),),
        "micro-batch-size": (str(train.micro_batch),),
        "global-batch-size": (str(train.global_batch),),
        "bf16": (),
    }
    training |= _precision_flags(train.precision) | _recompute_flags(train)
    training |= {OVERLAP_FLAGS[name]: () for name in train.overlaps if name in OVERLAP_FLAGS}
    unsaid += [f"train.overlap: {name}" for name in train.overlaps if name not in OVERLAP_FLAGS]
    training |= {"cross-entropy-loss-fusion": ()} if train.fused_loss else {}
    training |= _optimizer_flags(train.optimizer, unsaid)
    training |= {"optimizer-cpu-offload": ()} if "optimizer" in train.offloaded else {}
    unsaid += ["train.offload: activations"] if "activations" in train.offloaded else []
    training |= {"activation-func-fp8-input-store": ()} if train.kept.activation_input == "fp8" else {}
    if train.kept.attention_output != "bf16":
        unsaid.append(f"train.kept.attention_output: {train.kept.attention_output}")
    unsaid += ["train.documents"] if train.documents is not None else []
    if train.cuda_graphs != "none":
        scope = train.graphed_modules or ("full_iteration",)
        training |= {"cuda-graph-impl": ("local" if train.cuda_graphs == "full" else "transformer_engine",)}
        training["cuda-graph-scope"] = tuple(scope)
    if train.schedule != "1f1b":
        unsaid.append(f"train.schedule: {train.schedule}")
    sections = {"MODEL": described, "PARALLEL": layout, "TRAINING": training}
    if model.is_moe:
        sections["MOE"] = _routing_flags(routing, unsaid)
    per_node = next(n for n in (8, 4, 2, 1) if num_gpus % n == 0)
    sections["TORCHRUN"] = {"nnodes": (str(num_gpus // per_node),), "nproc-per-node": (str(per_node),)}
    return Exported(sections=sections, unsaid=tuple(unsaid))


def _stage_flags(model: Model, p: Parallelism, train: Training) -> dict[str, Values]:
    held = held_by_stage(len(model.layers), p, len(model.mtp_layers) if train.mtp else 0)
    ends = {flag: (str(getattr(p, name)),) for name, flag in ENDS.items() if getattr(p, name) is not None}
    as_layers: dict[str, Values] = {flag: () for name, flag in AS_LAYERS.items() if getattr(p, name)}
    even = len({stage.num_layers for stage in held}) == 1
    if (p.pp > 1 and p.layout is not None) or not (ends or as_layers or even):
        return {LAYOUT: (p.layout if isinstance(p.layout, str) else text_of_held(held),)}
    return ends | as_layers | ({VIRTUAL[1]: (str(p.vpp),)} if p.vpp > 1 else {})


def _precision_flags(precision: str) -> dict[str, Values]:
    if precision == "bf16":
        return {}
    if precision == "nvfp4":
        return {"fp4-format": ("e2m1",)}
    recipe = {"fp8_tensor": "tensorwise", "fp8": "blockwise"}.get(precision, precision)
    return {"fp8-format": ("hybrid",), "fp8-recipe": (recipe,)}


def _recompute_flags(train: Training) -> dict[str, Values]:
    if train.recompute == "none":
        return {}
    if train.recompute == "full":
        return {
            "recompute-granularity": ("full",),
            "recompute-method": ("uniform",),
            "recompute-num-layers": ("1",),
        }
    named = tuple(module for module in MODULES if module in train.recomputed_modules)
    return {"recompute-granularity": ("selective",), "recompute-modules": named}


def _optimizer_flags(optimizer: Optimizer, unsaid: list[str]) -> dict[str, Values]:
    flags: dict[str, Values] = {"grad-reduce-in-bf16": ()} if optimizer.gradients == "bf16" else {}
    flags |= {"fp8-param-gather": ()} if optimizer.weights == "narrow" else {}
    unsaid += [f"train.optimizer.average: {optimizer.average}"] if optimizer.average != "none" else []
    is_lean = optimizer.moments != "fp32" and optimizer.weights == "narrow" and optimizer.main_weights == "fp32"
    if optimizer.main_weights == "remainder" or is_lean:
        kept = (optimizer.moments,)
        return flags | {"use-precision-aware-optimizer": (), "exp-avg-dtype": kept, "exp-avg-sq-dtype": kept}
    if optimizer.main_weights != "fp32" or optimizer.moments != "fp32":
        unsaid.append(f"train.optimizer: main weights in {optimizer.main_weights}, moments in {optimizer.moments}")
    return flags


def _routing_flags(routing: Routing, unsaid: list[str]) -> dict[str, Values]:
    flags: dict[str, Values] = {"moe-token-dispatcher-type": ("alltoall",)}
    if routing.dispatcher == "deepep":
        flags = {"moe-token-dispatcher-type": ("flex",), "moe-enable-deepep": ()}
    if routing.capacity_factor is not None:
        flags["moe-expert-capacity-factor"] = (repr(routing.capacity_factor),)
        flags |= {"moe-pad-expert-input-to-capacity": ()} if routing.pad_to_capacity else {}
        if routing.drop_policy in ("probability", "position"):
            flags["moe-token-drop-policy"] = ("probs" if routing.drop_policy == "probability" else "position",)
        else:
            unsaid.append(f"routing.drop_policy: {routing.drop_policy}")
        if routing.capacity.kind != "megatron":
            unsaid.append(f"routing.capacity: {routing.capacity.kind}")
    if isinstance(routing.popularity, Multinomial):
        flags["moe-router-force-load-balancing"] = ()
    else:
        unsaid.append("routing.popularity: which experts tokens prefer is the data's and the router's doing")
    return flags


def script_of(exported: Exported, title: str) -> str:
    """The flags as a shell script's arrays, and a line that runs them."""
    lines = ["#!/bin/bash", f"# {title}"]
    lines += [f"# Not said by flags: {what}." for what in exported.unsaid]
    for name, flags in exported.sections.items():
        lines += ["", f"{name}_ARGS=("]
        lines += ["    " + " ".join((f"--{flag}", *map(_quoted, values))) for flag, values in flags.items()]
        lines += [")"]
    arrays = {name: f'"${{{name}_ARGS[@]}}"' for name in exported.sections}
    torchrun = arrays.pop("TORCHRUN")
    lines += ["", " ".join(("torchrun", torchrun, "pretrain_gpt.py", *arrays.values(), '"$@"'))]
    return "\n".join(lines) + "\n"


def _quoted(value: str) -> str:
    return value if re.fullmatch(r"[\w.,:/+-]+", value) else f"'{value}'"
