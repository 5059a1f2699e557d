"""torchtitan's TOML to a scenario and back. Names as in torchtitan/config/job_config.py, read 2026-11."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moesim.catalog.megatron import Imported
from moesim.catalog.models import load_model
from moesim.describe.model import Model
from moesim.describe.parallel import Parallelism
from moesim.describe.pipeline import held_by_stage
from moesim.describe.workload import Optimizer, Precision, Routing, Training
from moesim.errors import InputError, NotModelledError, check

FLAVORS = {  # of torchtitan's models: the presets that they are
    ("llama3", "8B"): "llama-3-8b",
    ("llama3", "70B"): "llama-3-70b",
    ("deepseek_v3", "671B"): "deepseek-v3",
    ("deepseek_v3", "236B"): "deepseek-v2",
    ("qwen3", "30B-A3B"): "qwen3-30b-a3b",
    ("qwen3", "235B-A22B"): "qwen3-235b-a22b",
    ("gpt_oss", "120b"): "gpt-oss-120b",
}
SCHEDULES = {"1F1B": "1f1b", "Interleaved1F1B": "1f1b", "GPipe": "gpipe"}
CONVERTED: Mapping[Precision, str] = {"mxfp8": "mx", "fp8_tensor": "float8"}  # a word of the converter's name
ROTATES = {"allgather": "allgather", "alltoall": "ring"}  # its alltoall shuffles keys and values rank by rank
_NOTHING_SECTIONS = frozenset(
    (
        *("job", "profiling", "metrics", "optimizer", "lr_scheduler", "checkpoint", "comm", "fault_tolerance"),
        *("validation", "experimental", "debug", "memory_estimation"),
    )
)
_NOTHING: Mapping[str, set[str]] = {
    "model": {"hf_assets_path", "tokenizer_path", "print_after_conversion"},
    "training": {
        "steps",
        "max_norm",
        "dataset",
        "dataset_path",
        "seed",
        "gc_freq",
        "gc_debug",
        "deterministic",
    },
    "parallelism": {"disable_loss_parallel", "enable_compiled_autograd"},
    "activation_checkpoint": set(),
}
_READ = {
    "model": {"name", "flavor", "converters"},
    "training": {"seq_len", "local_batch_size", "global_batch_size", "mixed_precision_param", "mixed_precision_reduce"}
    | {"dtype"},
    "parallelism": {
        *("data_parallel_replicate_degree", "data_parallel_shard_degree", "fsdp_reshard_after_forward"),
        *("tensor_parallel_degree", "pipeline_parallel_degree", "context_parallel_degree", "expert_parallel_degree"),
        *("expert_tensor_parallel_degree", "pipeline_parallel_schedule", "pipeline_parallel_microbatch_size"),
        *("pipeline_parallel_layers_per_stage", "pipeline_parallel_first_stage_less_layers"),
        *("pipeline_parallel_last_stage_less_layers", "module_fqns_per_model_part", "context_parallel_rotate_method"),
        "expert_parallel_comm_backend",
    },
    "activation_checkpoint": {"mode"},
}


@dataclass(frozen=True, kw_only=True)
class _Section:
    """A table of the file; its owner names file and table in refusals."""

    owner: str
    values: Mapping[str, Any]

    def whole(self, name: str, default: int, least: int = 1) -> int:
        value = self.values.get(name, default)
        good = type(value) is int and value >= least
        check(good, self.owner, name, f"must be a whole number of at least {least}", value)
        return int(value)

    def choice(self, name: str, default: str, choices: tuple[str, ...]) -> str:
        value = self.values.get(name, default)
        check(value in choices, self.owner, name, "must be one of " + ", ".join(choices), value)
        return str(value)


def from_toml(
    raw: object, owner: str, *, model: str | None = None, cluster: str, num_gpus: int | None = None
) -> Imported:
    """The scenario of a torchtitan job. Raises InputError, NotModelledError.

    model: a preset or file, where FLAVORS does not know the job's model. num_gpus: needed where the shard degree is -1.
    """
    check(isinstance(raw, Mapping), owner, "", "must be a mapping of sections", type(raw).__name__)
    assert isinstance(raw, Mapping)
    sections = {name: _Section(owner=f"{owner} [{name}]", values=_table(raw, name, owner)) for name in _READ}
    job, parallel, train = sections["model"], sections["parallelism"], sections["training"]
    known = (str(job.values.get("name")), str(job.values.get("flavor")))
    if model is None and known not in FLAVORS:
        hint = "Name the model: --model."
        raise InputError(job.owner, "flavor", "is no model that moesim carries", " ".join(known), hint)
    name = model or FLAVORS[known]
    assumed: list[str] = []
    described = load_model(name)
    degrees = _degrees(parallel, num_gpus, is_moe=described.is_moe)
    stages = _stages(parallel, described, degrees["pp"])
    sharding = _sharding(parallel, degrees)
    into: dict[str, Any] = {
        key: value for key, value in degrees.items() if value != 1 and key not in ("replicate", "shard")
    }
    into |= stages | sharding
    method = parallel.choice("context_parallel_rotate_method", "allgather", tuple(ROTATES))
    into |= {"cp_kind": ROTATES[method]} if degrees["cp"] > 1 else {}
    dp = degrees["replicate"] * degrees["shard"]
    scenario: dict[str, Any] = {
        "schema": 1,
        "model": name,
        "cluster": cluster,
        "num_gpus": dp * degrees["tp"] * degrees["cp"] * degrees["pp"],
        "parallel": into,
        "train": _train(train, parallel, sections["activation_checkpoint"], job, degrees["pp"], dp, assumed),
    }
    backend = parallel.choice("expert_parallel_comm_backend", "standard", ("standard", "deepep", "hybridep"))
    scenario |= {"routing": {"dispatcher": "deepep"}} if backend != "standard" and described.is_moe else {}
    left_out, nothing, unknown = _others(raw)
    return Imported(
        scenario=scenario, assumed=tuple(assumed), left_out=left_out, without_effect=nothing, unknown=unknown
    )


def _table(raw: Mapping[str, Any], name: str, owner: str) -> Mapping[str, Any]:
    table = raw.get(name, {})
    check(isinstance(table, Mapping), owner, name, "must be a table", table)
    assert isinstance(table, Mapping)
    return table


def _degrees(parallel: _Section, num_gpus: int | None, *, is_moe: bool) -> dict[str, int]:
    degrees = {
        name: parallel.whole(f"{word}_parallel_degree", 1)
        for name, word in (("tp", "tensor"), ("pp", "pipeline"), ("cp", "context"), ("ep", "expert"))
    }
    asked = parallel.whole("expert_tensor_parallel_degree", 1)
    degrees["etp"] = asked if degrees["ep"] > 1 else degrees["tp"] if is_moe else 1
    degrees["replicate"] = parallel.whole("data_parallel_replicate_degree", 1)
    shard = parallel.whole("data_parallel_shard_degree", -1, least=-1)
    others = degrees["tp"] * degrees["pp"] * degrees["cp"] * degrees["replicate"]
    if shard == -1:
        hint = "Say it with --num-gpus."
        if num_gpus is None:
            raise InputError(parallel.owner, "data_parallel_shard_degree", "leaves the number of GPUs open", -1, hint)
        rule = f"must be a multiple of tensor*pipeline*context*replicate = {others}"
        check(num_gpus % others == 0, "--num-gpus", "", rule, num_gpus)
        shard = num_gpus // others
    rule = f"contradicts the file's degrees, which make {others * shard}"
    check(num_gpus in (None, others * shard), "--num-gpus", "", rule, num_gpus)
    return degrees | {"shard": max(shard, 1)}


def _sharding(parallel: _Section, degrees: Mapping[str, int]) -> dict[str, Any]:
    """FSDP with zero 3, or 2 where weights are gathered once and kept (reshard never, or by default with pipelining);
    zero 0 without shards.
    """
    if degrees["shard"] == 1 and degrees["cp"] == 1:
        return {"zero": 0}
    policy = parallel.choice("fsdp_reshard_after_forward", "default", ("default", "always", "never"))
    keeps = policy == "never" or (policy == "default" and degrees["pp"] > 1)
    groups = {"replicate": degrees["replicate"]} if degrees["replicate"] > 1 else {}
    return {"zero": 2 if keeps else 3, "fsdp": True, **groups}


def _stages(parallel: _Section, model: Model, pp: int) -> dict[str, Any]:
    """vpp and layout: by module names, or by its rule of layers per stage with lighter ends."""
    named = parallel.values.get("module_fqns_per_model_part")
    if pp == 1:
        return {}
    if named:
        counts = [sum(str(item).startswith("layers.") for item in part) for part in named]
        rule = f"must have a multiple of {pp} parts"
        check(len(counts) % pp == 0, parallel.owner, "module_fqns_per_model_part", rule, len(counts))
    else:
        counts = _even_counts(parallel, len(model.layers), pp)
    return {"layout": counts} | ({"vpp": len(counts) // pp} if len(counts) > pp else {})


def _even_counts(parallel: _Section, num_layers: int, pp: int) -> list[int]:
    """Its rule: embedding and head count as so many layers, places are dealt evenly, the first stages one more."""
    schedule = parallel.choice("pipeline_parallel_schedule", "1F1B", tuple(SCHEDULES))
    first = parallel.whole("pipeline_parallel_first_stage_less_layers", 1, least=0)
    last = parallel.whole("pipeline_parallel_last_stage_less_layers", 1, least=0)
    places = num_layers + first + last
    per_stage = parallel.whole("pipeline_parallel_layers_per_stage", 0, least=0)
    num_stages = -(-places // per_stage) if per_stage else pp * (2 if schedule == "Interleaved1F1B" else 1)
    field = "pipeline_parallel_layers_per_stage"
    rule = f"gives {num_stages} stages, which {pp} ranks do not share evenly"
    check(num_stages % pp == 0, parallel.owner, field, rule, per_stage)
    counts = [places // num_stages + (i < places % num_stages) for i in range(num_stages)]
    counts[0] -= first
    counts[-1] -= last
    check(min(counts) >= 0, parallel.owner, field, "leaves a stage with less than no layer", per_stage)
    return counts


def _train(
    train: _Section, parallel: _Section, checkpoint: _Section, job: _Section, pp: int, dp: int, assumed: list[str]
) -> dict[str, Any]:
    local = train.whole("local_batch_size", 8)
    whole = train.whole("global_batch_size", -1, least=-1)
    micro = parallel.whole("pipeline_parallel_microbatch_size", 1) if pp > 1 else local
    check(local % micro == 0, train.owner, "local_batch_size", f"must be a multiple of {micro}", local)
    converters = [str(name) for name in job.values.get("converters", [])]
    formats = [form for form, word in CONVERTED.items() if any(word in name for name in converters)]
    mode = checkpoint.choice("mode", "selective", ("none", "selective", "full", "memory_budget"))
    if mode in ("selective", "memory_budget"):
        assumed.append(f"no recomputation in place of activation_checkpoint.mode {mode}")
    into: dict[str, Any] = {
        "seq_len": train.whole("seq_len", 2048),
        "micro_batch": micro,
        "global_batch": local * dp if whole == -1 else whole,
        "precision": formats[0] if formats else "bf16",
        "recompute": "full" if mode == "full" else "none",
    }
    states = {"main_weights": "none", "moments": "bf16"} if train.values.get("dtype") == "bfloat16" else {}
    states |= {"gradients": "bf16"} if train.values.get("mixed_precision_reduce") == "bfloat16" else {}
    into |= {"optimizer": states} if states else {}
    if pp > 1:
        schedule = SCHEDULES[parallel.choice("pipeline_parallel_schedule", "1F1B", tuple(SCHEDULES))]
        into |= {"schedule": schedule} if schedule != "1f1b" else {}
    return into


def _others(raw: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Keys left out, without effect, unknown."""
    left_out, nothing, unknown = [], [], []
    for section, table in raw.items():
        for key in table if isinstance(table, Mapping) else ():
            name = f"{section}.{key}"
            if key in _READ.get(section, ()):
                continue
            if section in _NOTHING_SECTIONS or key in _NOTHING.get(section, ()):
                nothing.append(name)
            elif section in ("compile", "quantize", "activation_checkpoint", "float8", "mx") or re.search(
                "async_tensor|offload|compile", key
            ):
                left_out.append(name)
            else:
                unknown.append(name)
    return tuple(left_out), tuple(nothing), tuple(unknown)


def to_toml(
    model: Model, parallel: Parallelism, train: Training, routing: Routing, num_gpus: int
) -> tuple[str, tuple[str, ...]]:
    """A torchtitan job as TOML, and what of the run it does not say. Raises NotModelledError for another model."""
    known = {preset: key for key, preset in FLAVORS.items()}
    if model.name not in known:
        raise NotModelledError(f"export: torchtitan has no model {model.name}; it has {', '.join(known)}")
    p, unsaid = parallel, list[str]()
    dp = p.rank_layout(num_gpus).dp
    values: dict[str, dict[str, Any]] = {"model": dict(zip(("name", "flavor"), known[model.name], strict=True))}
    if train.precision in CONVERTED:
        values["model"]["converters"] = [f"quantize.linear.{CONVERTED[train.precision]}"]
    local = train.micro_batch if p.pp == 1 else train.global_batch // dp
    values["training"] = {"seq_len": train.seq_len, "local_batch_size": local, "global_batch_size": train.global_batch}
    values["training"] |= _formats(train.optimizer, unsaid)
    values["parallelism"] = {
        "data_parallel_replicate_degree": p.replicate if p.zero >= 2 else dp,
        "data_parallel_shard_degree": dp // p.replicate if p.zero >= 2 else 1,
        "fsdp_reshard_after_forward": "always" if p.zero == 3 else "never",
        "tensor_parallel_degree": p.tp,
        "pipeline_parallel_degree": p.pp,
        "context_parallel_degree": p.cp,
        "expert_parallel_degree": p.ep,
    }
    if p.zero >= 2 and not p.fsdp:
        unsaid.append(f"parallel.fsdp: false; torchtitan shards by FSDP2, not as ZeRO-{p.zero}")
    if p.zero == 0 and p.cp > 1:
        unsaid.append("parallel.zero: 0; torchtitan shards over context-parallel ranks")
    if p.zero >= 2 and dp * p.cp == 1:
        unsaid.append(f"parallel.zero: {p.zero}, of one replica")
    values["parallelism"] |= _pipeline_values(model, p, train) if p.pp > 1 else {}
    if p.ep > 1:
        values["parallelism"]["expert_tensor_parallel_degree"] = p.etp
        values["parallelism"] |= {"expert_parallel_comm_backend": "deepep"} if routing.dispatcher == "deepep" else {}
    elif model.is_moe and p.etp != p.tp:
        unsaid.append(f"parallel.etp: {p.etp} without expert parallelism")
    if p.cp > 1:
        rotates = next((word for word, kind in ROTATES.items() if kind == p.cp_kind), None)
        values["parallelism"] |= {"context_parallel_rotate_method": rotates} if rotates else {}
        unsaid += [] if rotates else [f"parallel.cp_kind: {p.cp_kind}"]
    values["activation_checkpoint"] = {"mode": "full" if train.recompute == "full" else "none"}
    unsaid += [f"parallel.zero: {p.zero}, gradients reduced without sharding"] if p.zero == 1 else []
    unsaid += [f"train.recompute: {train.recompute}"] if train.recompute not in ("none", "full") else []
    unsaid += [f"train.precision: {train.precision}"] if train.precision not in ("bf16", *CONVERTED) else []
    unsaid += [f"train.schedule: {train.schedule}"] if train.schedule not in SCHEDULES.values() else []
    unsaid += ["train.mtp"] if train.mtp else []
    unsaid += [f"train.offload: {train.offload}"] if train.offload != "none" else []
    unsaid += [f"train.overlap: {train.overlap}"] if train.overlap != "none" else []
    unsaid += ["routing.capacity_factor"] if routing.capacity_factor is not None else []
    lines = [f"# Not said: {what}." for what in unsaid]
    for section, table in values.items():
        lines += ["", f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    return "\n".join(lines).lstrip() + "\n", tuple(unsaid)


def _formats(optimizer: Optimizer, unsaid: list[str]) -> dict[str, str]:
    """The dtypes that the job's training table can say of gradients and states."""
    lean = (optimizer.main_weights, optimizer.moments) == ("none", "bf16")
    if not lean and (optimizer.main_weights, optimizer.moments) != ("fp32", "fp32"):
        unsaid.append(f"train.optimizer: main_weights {optimizer.main_weights}, moments {optimizer.moments}")
    reduced = {"mixed_precision_reduce": "bfloat16"} if optimizer.gradients == "bf16" else {}
    return ({"dtype": "bfloat16"} if lean else {}) | reduced


def _pipeline_values(model: Model, p: Parallelism, train: Training) -> dict[str, Any]:
    """Schedule and stages, module by module."""
    parts: list[list[str]] = []
    start = 0
    for held in held_by_stage(len(model.layers), p, len(model.mtp_layers) if train.mtp else 0):
        parts.append([f"layers.{i}" for i in range(start, start + held.num_layers)])
        start += held.num_layers
    parts[0].insert(0, "tok_embeddings")
    parts[-1] += ["norm", "output"]
    schedule = "GPipe" if train.schedule == "gpipe" else "Interleaved1F1B" if p.vpp > 1 else "1F1B"
    return {
        "pipeline_parallel_schedule": schedule,
        "pipeline_parallel_microbatch_size": train.micro_batch,
        "module_fqns_per_model_part": parts,
    }
