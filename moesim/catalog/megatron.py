"""Megatron-LM's flags to a scenario. Names as in megatron/training/arguments.py, read 2026-11.

Of a file's flags some are *read*, some change *nothing* here (learning rates, logs, checkpoints), some are *left out*
although they change time or memory, and some are *unknown*; each list is told. What contradicts itself is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from moesim.catalog.design import model_from_design
from moesim.catalog.megatron_model import design_of, mapping_of_design, preset_like
from moesim.catalog.models import load_model
from moesim.describe.stages import held_of_text
from moesim.describe.workload import GRAPH_MODULES, Precision
from moesim.door.files import read_yaml
from moesim.door.flags import Flags
from moesim.errors import InputError, NotModelledError, check, near_match

SIZES = {  # flat name of the scenario: flag
    "tp": "tensor-model-parallel-size",
    "pp": "pipeline-model-parallel-size",
    "cp": "context-parallel-size",
    "ep": "expert-model-parallel-size",
}
CP_KINDS = {"p2p": "ring", "a2a": "alltoall", "all_gather": "allgather", "allgather": "allgather"}
ENDS = {
    "num_first_stage_layers": "decoder-first-pipeline-num-layers",
    "num_last_stage_layers": "decoder-last-pipeline-num-layers",
}
AS_LAYERS = {
    "embedding_as_layer": "account-for-embedding-in-pipeline-split",
    "loss_as_layer": "account-for-loss-in-pipeline-split",
}
VIRTUAL = ("num-layers-per-virtual-pipeline-stage", "num-virtual-stages-per-pipeline-rank")
LAYOUT = "pipeline-model-parallel-layout"
OVERLAP_FLAGS: Mapping[str, str] = {  # name of the scenario's overlap: flag
    "grad_reduce": "overlap-grad-reduce",
    "param_gather": "overlap-param-gather",
    "tensor_parallel": "tp-comm-overlap",
    "forward_backward": "overlap-moe-expert-parallel-comm",
    "weight_gradient": "delay-wgrad-compute",
    "shared_experts": "moe-shared-expert-overlap",
}
INSTANCES = "num-distributed-optimizer-instances"
FP8_RECIPES: Mapping[str, Precision] = {
    "delayed": "fp8_tensor",
    "tensorwise": "fp8_tensor",
    "blockwise": "fp8",
    "mxfp8": "mxfp8",
}
SHARDING = {"no_shard": 0, "optim": 1, "optim_grads": 2, "optim_grads_params": 3}

FLAGS_FILE = Path(__file__).parent / "megatron.yaml"


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A scenario file's mapping read from another program's file, the design of its model where no preset has it, and
    what became of every flag.
    """

    scenario: Mapping[str, Any]
    design: Mapping[str, Any] | None = None
    assumed: tuple[str, ...] = ()  # what the file does not say
    left_out: tuple[str, ...] = ()  # flags that change time or memory, and that no field says
    without_effect: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    near: Mapping[str, str] = field(default_factory=dict)  # known flags that an unknown one may mean, told as a hint


@dataclass(kw_only=True)
class _Found:
    """What is gathered while a file is read."""

    parallel: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    routing: dict[str, Any] = field(default_factory=dict)
    assumed: list[str] = field(default_factory=list)


def from_flags(flags: Flags, *, model: str | None = None, cluster: str, num_gpus: int | None = None) -> Imported:
    """The scenario that Megatron-LM's flags ask for. Raises InputError, NotModelledError.

    model: its name or file, where the flags do not describe it (or to stand over them). num_gpus: where the script does
    not say how many (nnodes, nproc-per-node, world-size).

    >>> asked = {"num-layers": ("32",), "tensor-model-parallel-size": ("2",), "seq-length": ("8192",),
    ...          "micro-batch-size": ("1",), "global-batch-size": ("64",), "use-distributed-optimizer": ()}
    >>> from_flags(Flags(owner="run.sh", values=asked), model="mixtral-8x7b", cluster="h100-8x-ib400",
    ...            num_gpus=16).scenario["parallel"]
    {'tp': 2, 'etp': 2, 'zero': 1}
    """
    found = _Found()
    name, design, layers = _model(flags, model, found)
    num_gpus = num_gpus or _world(flags)
    if num_gpus is None:
        hint = "Say it with --num-gpus."
        raise InputError(flags.owner, "--world-size", "is needed, or nnodes and nproc-per-node", None, hint)
    is_moe = "num-experts" in flags if model is None else load_model(model).is_moe
    _read_parallel(flags, found, layers, is_moe=is_moe)
    _read_train(flags, found)
    if is_moe:
        _read_routing(flags, found)
    scenario = {"schema": 1, "model": name, "cluster": cluster, "num_gpus": num_gpus}
    scenario |= {"parallel": found.parallel, "train": found.train}
    scenario |= {"routing": found.routing} if found.routing else {}
    fates = {flag: _fate(flag) for flag in flags.values}
    return Imported(
        scenario=scenario,
        design=design,
        assumed=tuple(found.assumed),
        near={flag: f". {near_match(flag, _known())}" for flag in fates if fates[flag] == "unknown" and _near(flag)},
        **{
            fate: tuple(flag for flag in fates if fates[flag] == fate)
            for fate in ("left_out", "without_effect", "unknown")
        },
    )


@cache
def _patterns() -> Mapping[str, re.Pattern[str]]:
    """What an import makes of a flag, and which flags those are, in the order in which they are looked up."""
    return {fate: re.compile("|".join(names)) for fate, names in read_yaml(FLAGS_FILE).items()}


@cache
def _known() -> tuple[str, ...]:
    """The flags that are known by their whole names."""
    return tuple(name for names in read_yaml(FLAGS_FILE).values() for name in names if re.fullmatch(r"[\w-]+", name))


def _near(flag: str) -> bool:
    return near_match(flag, _known()).startswith("Did you mean")


def _fate(flag: str) -> str:
    return next((fate for fate, pattern in _patterns().items() if pattern.fullmatch(flag)), "unknown")


def _model(flags: Flags, model: str | None, found: _Found) -> tuple[str, dict[str, Any] | None, int]:
    """Name or file of the model, its design where the flags alone have it, and its layers."""
    if flags.whole("mtp-num-layers"):
        found.train["mtp"] = True
    if model is not None:
        return model, None, len(load_model(model).layers)
    design = design_of(flags)
    if design is None:
        raise InputError(flags.owner, "--num-layers", "is needed to describe the model", None, "Or name it: --model.")
    vocab = design["vocab"]
    described = model_from_design(design | {"vocab": vocab or 1}, owner=flags.owner)
    preset = preset_like(described, vocab=vocab)
    if preset is not None:
        return preset, None, len(described.layers)
    if not vocab:
        hint = "Add it to the file, or name the model: --model."
        raise InputError(flags.owner, "--vocab-size", "is needed to describe the model", None, hint)
    return "model.yaml", mapping_of_design(design, "imported"), len(described.layers)


def _world(flags: Flags) -> int | None:
    nodes, per_node = flags.whole("nnodes"), flags.whole("nproc-per-node")
    together = nodes * per_node if nodes is not None and per_node is not None else None
    whole = flags.whole("world-size")
    rule = f"contradicts nnodes * nproc-per-node = {together}"
    check(None in (together, whole) or together == whole, flags.owner, "--world-size", rule, whole)
    return whole or together


def _read_parallel(flags: Flags, found: _Found, num_layers: int, *, is_moe: bool) -> None:
    into = found.parallel
    into |= {name: flags.whole(flag) for name, flag in SIZES.items() if flag in flags}
    rule = "needs --num-experts: the model has no experts"
    check(is_moe or into.get("ep", 1) == 1, flags.owner, "--expert-model-parallel-size", rule, into.get("ep"))
    tp, pp = into.get("tp", 1), into.get("pp", 1)
    etp = flags.whole("expert-tensor-parallel-size", tp if is_moe else 1)
    into |= {"etp": etp} if is_moe and etp != 1 else {}
    if tp > 1 and "sequence-parallel" not in flags:
        found.assumed.append("sequence parallelism beside tensor parallelism: moesim knows no other")
    if "cp-comm-type" in flags:
        kinds = sorted(set(flags.values["cp-comm-type"]))
        if len(kinds) != 1 or kinds[0] not in CP_KINDS:
            raise NotModelledError(f"{flags.owner}: --cp-comm-type: {' '.join(kinds)} is not modelled")
        into |= {"cp_kind": CP_KINDS[kinds[0]]} if kinds[0] != "p2p" else {}
    _read_stages(flags, found, num_layers, pp)
    into |= _sharding(flags, pp)


def _read_stages(flags: Flags, found: _Found, num_layers: int, pp: int) -> None:
    into = found.parallel
    into |= {name: flags.whole(flag) for name, flag in ENDS.items() if flag in flags}
    into |= {name: True for name, flag in AS_LAYERS.items() if flag in flags}
    ways = [flag for flag in (*VIRTUAL, LAYOUT) if flag in flags]
    rule = f"cannot stand beside --{ways[-1]}" if ways else ""
    check(len(ways) <= 1, flags.owner, f"--{ways[0]}" if ways else "", rule, ways)
    if LAYOUT in flags:
        text = flags.one(LAYOUT) or ""
        into["layout"], num_stages = text, len(held_of_text(text))
        check(num_stages % pp == 0, flags.owner, f"--{LAYOUT}", f"must have a multiple of {pp} stages", num_stages)
        into |= {"vpp": num_stages // pp} if num_stages > pp else {}
    elif VIRTUAL[1] in flags:
        into["vpp"] = flags.whole(VIRTUAL[1])
    elif VIRTUAL[0] in flags:
        count, places = flags.whole(VIRTUAL[0]) or 0, num_layers + sum(flag in flags for flag in AS_LAYERS.values())
        rule = f"must divide the {places} layers of {pp} stages"
        check(count > 0 and places % (pp * count) == 0, flags.owner, f"--{VIRTUAL[0]}", rule, count)
        into["vpp"] = places // (pp * count)


def _sharding(flags: Flags, pp: int) -> dict[str, Any]:
    """zero, whether FSDP2 does it, and how many groups of replicas each hold all shards."""
    strategy = flags.one("data-parallel-sharding-strategy")
    known = strategy is None or strategy in SHARDING
    check(known, flags.owner, "--data-parallel-sharding-strategy", f"must be one of {', '.join(SHARDING)}", strategy)
    if "use-torch-fsdp2" in flags:
        check(pp == 1, flags.owner, "--use-torch-fsdp2", "cannot stand beside pipeline parallelism", pp)
        rule = "cannot stand beside --use-distributed-optimizer"
        check("use-distributed-optimizer" not in flags, flags.owner, "--use-torch-fsdp2", rule, True)
        return {"zero": 3, "fsdp": True}
    zero = int("use-distributed-optimizer" in flags)
    if "use-megatron-fsdp" in flags and strategy is not None:
        zero = SHARDING[strategy]
    groups = flags.whole(INSTANCES, 1)
    return {"zero": zero, **({"replicate": groups} if zero and groups != 1 else {})}


def _read_train(flags: Flags, found: _Found) -> None:
    into = found.train
    for name, flag in (
        ("seq_len", "seq-length"),
        ("micro_batch", "micro-batch-size"),
        ("global_batch", "global-batch-size"),
    ):
        if flag not in flags:
            raise InputError(flags.owner, f"--{flag}", "is needed", None)
        into[name] = flags.whole(flag)
    if "fp16" in flags:
        check("bf16" not in flags, flags.owner, "--fp16", "cannot stand beside --bf16", True)
        found.assumed.append("BF16 in place of FP16: the same bytes and rates")
    optimizer = flags.one("optimizer") or "adam"
    if optimizer != "adam":
        found.assumed.append(f"Adam's states in place of those of {optimizer}")
    into["precision"] = _precision(flags, found)
    recompute = _recompute(flags)
    into |= {"recompute": recompute} if recompute != "none" else {}
    overlaps = [name for name, flag in OVERLAP_FLAGS.items() if flag in flags]
    into |= {"overlap": ",".join(overlaps)} if overlaps else {}
    into |= {"fused_loss": True} if "cross-entropy-loss-fusion" in flags else {}
    states = _optimizer(flags)
    into |= {"optimizer": states} if states else {}
    if "activation-func-fp8-input-store" in flags:
        into["kept"] = {"activation_input": "fp8"}
    if "optimizer-cpu-offload" in flags:
        whole = flags.one("optimizer-offload-fraction") or "1.0"
        if not re.fullmatch(r"1(\.0*)?", whole):
            raise NotModelledError(f"{flags.owner}: --optimizer-offload-fraction: {whole}, a part, is not modelled")
        into["offload"] = "optimizer"
        found.assumed.append("states that stream to the GPU for their update in place of an update on the host")
    graphs = _graphs(flags)
    into |= {"cuda_graphs": graphs} if graphs else {}


def _graphs(flags: Flags) -> str:
    """The modules that CUDA graphs hold, where the flags name them."""
    scopes = [name for value in flags.values.get("cuda-graph-scope", ()) for name in value.split(",")]
    if flags.one("cuda-graph-impl") in (None, "none") or not scopes:
        return ""
    if any("full" in scope for scope in scopes):
        return "full"
    unknown = [scope for scope in scopes if scope not in GRAPH_MODULES]
    if unknown:
        raise NotModelledError(f"{flags.owner}: --cuda-graph-scope: {' '.join(unknown)} is not modelled")
    return ",".join(scopes)


def _optimizer(flags: Flags) -> dict[str, str]:
    """Number formats of gradients and states, where they are not fp32."""
    states = {"gradients": "bf16"} if "grad-reduce-in-bf16" in flags else {}
    gathers = {"fp8-param-gather": "fp8-format", "fp4-param": "fp4-format", "fp4-param-gather": "fp4-format"}
    states |= {"weights": "narrow"} if any(f in flags and needed in flags for f, needed in gathers.items()) else {}
    if "use-precision-aware-optimizer" not in flags:
        return states
    rule = "must be one of fp32, bf16, fp8"
    moments = {flags.one(f"exp-avg{end}-dtype") or "fp32" for end in ("", "-sq")}
    if len(moments) > 1 or not moments <= {"fp32", "bf16", "fp8"}:
        raise InputError(flags.owner, "--exp-avg-dtype", f"{rule}, the same as --exp-avg-sq-dtype", sorted(moments))
    main = flags.one("main-params-dtype") or "fp32"
    if main != "fp32":
        raise NotModelledError(f"{flags.owner}: --main-params-dtype: {main} is not modelled")
    # Megatron keeps only the bits that a bf16 weight lacks; a narrow one has none of them.
    main = "remainder" if "weights" not in states else "fp32"
    return states | {"main_weights": main, "moments": moments.pop()}


def _precision(flags: Flags, found: _Found) -> str:
    """The narrowest that the flags name."""
    recipe, is_fp4 = flags.one("fp8-recipe") or "delayed", "fp4-format" in flags
    given = "fp8-format" in flags or is_fp4
    check("fp8-recipe" not in flags or given, flags.owner, "--fp8-recipe", "needs --fp8-format", recipe)
    if not given:
        return "bf16"
    if is_fp4:
        return "nvfp4"
    if recipe not in FP8_RECIPES:
        raise NotModelledError(f"{flags.owner}: --fp8-recipe: {recipe} is not modelled; {', '.join(FP8_RECIPES)} are")
    if recipe == "delayed":
        found.assumed.append("scales from each tensor's own largest element in place of delayed ones")
    return FP8_RECIPES[recipe]


def _recompute(flags: Flags) -> str:
    granularity = flags.one("recompute-granularity")
    modules = flags.values.get("recompute-modules", ())
    method, count = flags.one("recompute-method"), flags.whole("recompute-num-layers")
    if granularity == "full":
        check(not modules, flags.owner, "--recompute-modules", "needs --recompute-granularity selective", modules)
        if method == "block" and count == 0:
            return "none"
        if method == "block" or (count or 1) != 1:
            what = "full recomputation of some layers, or of several at once"
            raise NotModelledError(f"{flags.owner}: --recompute-num-layers: {what}, is not modelled")
        return "full"
    extra = ("moe",) if "moe-layer-recompute" in flags else ()
    if granularity == "selective" or "recompute-activations" in flags:
        return ",".join((*(modules or ("core_attn",)), *extra))
    check(granularity is None, flags.owner, "--recompute-granularity", "must be full or selective", granularity)
    check(not modules, flags.owner, "--recompute-modules", "needs --recompute-granularity selective", " ".join(modules))
    return ",".join(extra) or "none"


def _read_routing(flags: Flags, found: _Found) -> None:
    into = found.routing
    dispatcher = flags.one("moe-token-dispatcher-type") or "allgather"
    known = dispatcher in ("allgather", "alltoall", "flex")
    check(known, flags.owner, "--moe-token-dispatcher-type", "must be allgather, alltoall or flex", dispatcher)
    if dispatcher == "allgather":
        found.assumed.append("dispatcher alltoall in place of allgather, which is not modelled")
    rule = "needs --moe-token-dispatcher-type flex"
    for flag in ("moe-enable-deepep", "moe-flex-dispatcher-backend"):
        check(flag not in flags or dispatcher == "flex", flags.owner, f"--{flag}", rule, dispatcher)
    if dispatcher == "flex":
        into["dispatcher"] = "deepep"
    factor = flags.one("moe-expert-capacity-factor")
    if factor is not None:
        good = re.fullmatch(r"\d*\.?\d+", factor) is not None
        check(good, flags.owner, "--moe-expert-capacity-factor", "must be a number", factor)
        into["capacity_factor"] = float(factor)
    if "moe-pad-expert-input-to-capacity" in flags:
        check(factor is not None, flags.owner, "--moe-pad-expert-input-to-capacity", "needs a capacity factor", True)
        into["pad_to_capacity"] = True
    policy = flags.one("moe-token-drop-policy") or "probs"
    check(policy in ("probs", "position"), flags.owner, "--moe-token-drop-policy", "must be probs or position", policy)
    into |= {"drop_policy": "position"} if policy == "position" else {}
    if "moe-router-force-load-balancing" in flags:
        into["popularity"] = {"kind": "multinomial"}
