"""Other programs' files to scenarios and back: flags read from scripts, round trips of random scenarios, refusals."""

from __future__ import annotations

import dataclasses
import itertools
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from moesim.catalog.design import model_from_design
from moesim.catalog.megatron import Imported, from_flags
from moesim.catalog.megatron_export import script_of, to_flags
from moesim.catalog.megatron_model import design_of, model_flags
from moesim.catalog.models import MODEL_NAMES, load_model
from moesim.catalog.torchtitan import FLAVORS, from_toml, to_toml
from moesim.cli import app
from moesim.cost.recompute import useful_modules
from moesim.describe.pipeline import held_by_stage
from moesim.door.files import parse_yaml, to_yaml
from moesim.door.flags import Flags, flags_of_mapping, flags_of_script
from moesim.errors import InputError, NotModelledError
from moesim.scenario import Scenario

SCRIPT = r"""#!/bin/bash
export CUDA_DEVICE_MAX_CONNECTIONS=1
TP=${TP:-2}          # may come from outside
NUM_LAYERS=16
GPUS_PER_NODE=8
HIDDEN=$((128 * 16))
LR="1e-4"
if [ "$CP" -gt 1 ]; then echo more; fi
DISTRIBUTED_ARGS="--nproc_per_node $GPUS_PER_NODE --nnodes ${NNODES}"
MODEL_ARGS=(
    --num-layers $NUM_LAYERS   # of them
    --hidden-size ${HIDDEN}
    --num-attention-heads 16
    # --ffn-hidden-size 1
    --moe-layer-freq "([0]*$((NUM_LAYERS - 14))+[1]*14)*1"
    --num-experts=64
    --moe-router-topk 8 --moe-ffn-hidden-size 1024
    --ffn-hidden-size 4096
    --swiglu
    --vocab-size 50304
)
torchrun ${DISTRIBUTED_ARGS} pretrain_gpt.py \
    ${MODEL_ARGS[@]} \
    --tensor-model-parallel-size $TP --sequence-parallel \
    --expert-model-parallel-size 4 \
    --expert-tensor-parallel-size 1 \
    --seq-length 4096 --micro-batch-size 2 \
    --global-batch-size 64 --lr $LR \
    --recompute-granularity selective --recompute-modules moe_act layernorm \
    --moe-token-dispatcher-type alltoall --tp-comm-overlap-cfg x.yaml --brand-new-flag 7 \
    --use-distributed-optimizer --overlap-grad-reduce --bf16 > log.txt 2>&1
"""


def imported(script: str = SCRIPT, defined: dict[str, str] | None = None, **options: Any) -> Imported:
    flags = flags_of_script(script, "run.sh", {"NNODES": "2"} if defined is None else defined)
    return from_flags(flags, **{"cluster": "h100-8x-ib400"} | options)


def test_a_script_is_read_as_the_shell_would_have_it() -> None:
    found = imported()
    assert found.scenario == {
        "schema": 1,
        "model": "model.yaml",
        "cluster": "h100-8x-ib400",
        "num_gpus": 16,
        "parallel": {"tp": 2, "ep": 4, "zero": 1},
        "train": {
            "seq_len": 4096,
            "micro_batch": 2,
            "global_batch": 64,
            "precision": "bf16",
            "recompute": "moe_act,layernorm",
            "overlap": "grad_reduce",
        },
    }
    assert found.design is not None
    assert found.design["dense_first_layers"] == 2
    assert found.left_out == ("tp-comm-overlap-cfg",)
    assert found.unknown == ("brand-new-flag",)
    assert found.without_effect == ("lr",)
    model = model_from_design(dict(found.design), owner="model.yaml")
    assert (model.hidden, len(model.moe_layers), model.layers[0].attention.num_heads) == (2048, 14, 16)


def test_what_the_script_leaves_open_can_be_defined() -> None:
    assert imported(defined={"NNODES": "4", "TP": "8"}).scenario["num_gpus"] == 32
    with pytest.raises(InputError, match=r"--nnodes: must be a whole number; got '\$\{NNODES\}'. Say it with --define"):
        imported(defined={})


def test_a_mapping_of_arguments_says_the_same_as_flags() -> None:
    raw = {
        "ENV_VARS": {"TP": 2},
        "MODEL_ARGS": {"--num-layers": 32, "--swiglu": True, "--fp8-format": None, "untie": False},
        "tensor_model_parallel_size": "$TP",
        "recompute-modules": ["moe_act", "mlp"],
    }
    assert flags_of_mapping(raw, "args.yaml").values == {
        "num-layers": ("32",),
        "swiglu": (),
        "tensor-model-parallel-size": ("2",),
        "recompute-modules": ("moe_act", "mlp"),
    }


@pytest.mark.parametrize("name", [name for name in MODEL_NAMES if not name.startswith("switch")])
def test_every_preset_but_switch_is_known_again_by_its_flags(name: str) -> None:
    flags, _ = model_flags(load_model(name), with_mtp=False)
    asked = flags | {"seq-length": ("4096",), "micro-batch-size": ("1",), "global-batch-size": ("8",)}
    without_vocab = {flag: values for flag, values in asked.items() if flag != "vocab-size"}
    for values in (asked, without_vocab):
        found = from_flags(Flags(owner="x", values=values), cluster="h100-8x-ib400", num_gpus=8)
        assert (found.scenario["model"], found.design) == (name, None)


def test_what_megatron_cannot_build_is_not_exported() -> None:
    with pytest.raises(NotModelledError, match="do not describe switch-base-128: its layers are not alike"):
        model_flags(load_model("switch-base-128"), with_mtp=False)


@st.composite
def scenarios(draw: st.DrawFn, *, for_titan: bool = False) -> Scenario:
    """A random valid scenario, as far as the file's words reach."""
    model = draw(
        st.sampled_from(sorted(FLAVORS.values()) if for_titan else ["mixtral-8x7b", "deepseek-v3", "llama-3-8b"])
    )
    described = load_model(model)
    moe = described.is_moe
    pp, vpp = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2]))
    vpp = vpp if pp > 2 else 1
    tp, cp = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2]))
    ep = draw(st.sampled_from([2, 4])) if moe else 1
    etp = draw(st.sampled_from([1, tp] if for_titan else [1, 2])) if moe else 1
    dp = draw(st.sampled_from([8, 16]))
    micro, rounds = draw(st.sampled_from([1, 2])), draw(st.sampled_from([4, 8]))
    mtp = bool(described.mtp_layers) and not for_titan and draw(st.booleans())
    leaves: dict[str, Any] = {"tp": tp, "pp": pp, "vpp": vpp, "cp": cp, "ep": ep, "etp": etp, "mtp": mtp}
    leaves |= {"zero": draw(st.sampled_from([*([0] if cp == 1 else []), 2, 3] if for_titan else [0, 1, 2, 3]))}
    leaves |= {"fsdp": True} if for_titan and leaves["zero"] else {}
    even = dp * cp * tp // (ep * etp) % 2 == 0
    leaves |= (
        {"replicate": draw(st.sampled_from([1, 2] if even else [1]))} if leaves["zero"] == 1 or "fsdp" in leaves else {}
    )
    leaves |= {"gradients": draw(st.sampled_from(["fp32", "bf16"]))}
    leaves |= {
        "micro_batch": micro,
        "global_batch": dp * micro * rounds,
        "seq_len": draw(st.sampled_from([4096, 8192])),
    }
    kinds = ["ring", "allgather"] if for_titan else ["ring", "alltoall", "allgather"]
    leaves |= {"cp_kind": draw(st.sampled_from(kinds))} if cp > 1 else {}
    leaves |= {"precision": draw(st.sampled_from(["bf16", "mxfp8", "fp8_tensor"] if for_titan else ["bf16", "fp8"]))}
    if draw(st.booleans()) and pp > 1:
        cuts = sorted(
            draw(st.lists(st.integers(0, len(described.layers)), min_size=pp * vpp - 1, max_size=pp * vpp - 1))
        )
        ends = [0, *cuts, len(described.layers)]
        leaves["layout"] = [b - a for a, b in itertools.pairwise(ends)]
    modules = useful_modules(described)
    some = st.lists(st.sampled_from(modules), min_size=1, unique=True).map(tuple)
    leaves["recompute"] = draw(
        st.sampled_from(["none", "full"]) if for_titan else st.one_of(st.sampled_from(["none", "full"]), some)
    )
    overlaps = ["none", "grad_reduce", "grad_reduce,param_gather,tensor_parallel"]
    leaves |= {} if for_titan else {"overlap": draw(st.sampled_from(overlaps))}
    if moe and not for_titan:
        leaves |= {"capacity_factor": draw(st.sampled_from([None, 1.0, 1.25]))}
        leaves |= (
            {"drop_policy": draw(st.sampled_from(["probability", "position"]))} if leaves["capacity_factor"] else {}
        )
        leaves |= {"popularity": "multinomial"}
    leaves |= {"dispatcher": draw(st.sampled_from(["alltoall", "deepep"]))} if moe else {}
    return Scenario.make(model=model, cluster="h100-8x-ib400", num_gpus=dp * tp * cp * pp, **leaves)


def same(first: Scenario, second: Scenario) -> None:
    """Two scenarios ask for the same run; a layout may be told in other words."""
    assert first.model == second.model
    assert first.cluster == second.cluster
    assert first.train == second.train
    assert first.routing == second.routing
    num_mtp = len(first.model.mtp_layers) if first.train.mtp else 0
    held = [held_by_stage(len(s.model.layers), s.parallel, num_mtp) for s in (first, second)]
    assert held[0] == held[1]
    told = {"layout": None, "cp_kind": "ring", "num_first_stage_layers": None, "num_last_stage_layers": None}
    own, other = (dataclasses.replace(s.parallel, **told) for s in (first, second))
    assert own == other
    assert first.parallel.cp == 1 or first.parallel.cp_kind == second.parallel.cp_kind


@settings(max_examples=60, deadline=None)
@given(scenario=scenarios())
def test_a_scenario_survives_megatrons_flags(scenario: Scenario) -> None:
    parts = (scenario.model, scenario.parallel, scenario.train, scenario.routing)
    script = script_of(to_flags(*parts, scenario.cluster.num_gpus), "test")
    found = from_flags(flags_of_script(script, "run.sh"), cluster="h100-8x-ib400")
    assert found.design is None
    assert found.unknown == found.left_out == ()
    same(scenario, Scenario.from_mapping(parse_yaml(to_yaml(dict(found.scenario)), "x")))


@settings(max_examples=60, deadline=None)
@given(scenario=scenarios(for_titan=True))
def test_a_scenario_survives_torchtitans_toml(scenario: Scenario) -> None:
    parts = (scenario.model, scenario.parallel, scenario.train, scenario.routing)
    text, unsaid = to_toml(*parts, scenario.cluster.num_gpus)
    assert unsaid == ()
    found = from_toml(tomllib.loads(text), "job.toml", cluster="h100-8x-ib400", num_gpus=scenario.cluster.num_gpus)
    assert found.unknown == found.left_out == found.assumed == ()
    same(scenario, Scenario.from_mapping(found.scenario))


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 4), st.integers(0, 6), st.integers(1, 16)),
    shared=st.booleans(),
    latent=st.booleans(),
)
def test_a_design_survives_megatrons_flags(sizes: tuple[int, int, int, int], shared: bool, latent: bool) -> None:
    num_layers, every, first, num_experts = sizes
    design: dict[str, Any] = {"name": "imported", "hidden": 256, "num_layers": num_layers, "vocab": 1000}
    design["attention"] = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 48, "qkv_bias": True, "qk_norm": "head"}
    if latent:
        names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        design["attention"] = {"num_heads": 8, "q_lora_rank": None} | dict.fromkeys(names, 32)
    design |= {"ffn": {"width": 640}, "dense_first_layers": min(first, num_layers)}
    moe = {"num_experts": num_experts, "top_k": 1, "width": 96, "every": every, "shared_width": 64 * shared}
    with_experts = any(i >= design["dense_first_layers"] and i % every == every - 1 for i in range(num_layers))
    design |= {"moe": moe} if with_experts else {}
    model = model_from_design(design, owner="x")
    flags, _ = model_flags(model, with_mtp=False)
    again = design_of(Flags(owner="x", values=flags))
    assert again is not None
    assert model_from_design(again, owner="x").layers == model.layers


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--fp16", "--fp16: cannot stand beside --bf16"),
        ("--multi-latent-attention --group-query-attention", "cannot stand beside --multi-latent-attention"),
        ("--num-virtual-stages-per-pipeline-rank 2 --pipeline-model-parallel-layout EtL", "cannot stand beside"),
        ("--recompute-method block --recompute-granularity full", "stands twice with different values"),
        ("--moe-enable-deepep", "needs --moe-token-dispatcher-type flex"),
        ("--seq-length 8192", "stands twice with different values.*got '4096 and 8192'"),
        ("--fp8-recipe mxfp8", "needs --fp8-format"),
        ("--use-torch-fsdp2", "cannot stand beside --use-distributed-optimizer"),
        ("--moe-pad-expert-input-to-capacity", "needs a capacity factor"),
        ("--data-parallel-sharding-strategy all", "must be one of no_shard, optim"),
        ("--num-layers-per-virtual-pipeline-stage 3", "must divide the 16 layers of 1 stages"),
        ("--world-size 8", r"contradicts nnodes \* nproc-per-node = 16"),
        ("--ffn-hidden-size", "stands twice"),
    ],
)
def test_flags_that_contradict_are_refused(extra: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        imported(SCRIPT.replace("--bf16 >", f"--bf16 {extra} >"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--cp", "--cp-comm-type a2a+p2p --cp"), r"--cp-comm-type: a2a\+p2p is not modelled"),
        (("selective --recompute-modules moe_act layernorm", "full --recompute-num-layers 2"), "of several at once"),
        (("([0]*$((NUM_LAYERS - 14))+[1]*14)*1", "[1]*3+[0]*2+[1]*11"), "at uneven distances are not modelled"),
    ],
)
def test_what_is_not_modelled_is_said(change: tuple[str, str], message: str) -> None:
    script = SCRIPT.replace("--bf16", "--cp 1 --bf16").replace(*change)
    with pytest.raises(NotModelledError, match=message):
        imported(script)


@pytest.mark.parametrize("text", ["[1]*", "([0]*3", "1+[1]", "__import__('os')", "[0]*99999+[1]", "[[1]]"])
def test_a_pattern_that_is_no_list_is_refused_not_run(text: str) -> None:
    with pytest.raises(InputError, match="moe-layer-freq"):
        imported(SCRIPT.replace("([0]*$((NUM_LAYERS - 14))+[1]*14)*1", text))


def test_virtual_stages_told_by_their_layers_count_embedding_and_loss_where_flags_say_so() -> None:
    tail = "--pipeline-model-parallel-size 3 --num-layers-per-virtual-pipeline-stage 3 --bf16 "
    tail += "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split"
    found = imported(SCRIPT.replace("--bf16", tail), num_gpus=48)
    assert found.scenario["parallel"]["vpp"] == 2
    assert found.scenario["parallel"]["embedding_as_layer"]


def test_torchtitans_own_rule_of_stages_makes_the_ends_lighter() -> None:
    job = {
        "model": {"name": "llama3", "flavor": "8B"},
        "training": {"seq_len": 8192, "local_batch_size": 8},
        "parallelism": {"pipeline_parallel_degree": 4, "pipeline_parallel_schedule": "Interleaved1F1B"},
        "activation_checkpoint": {"mode": "selective", "selective_ac_option": "op"},
        "optimizer": {"lr": 1e-4},
        "compile": {"enable": True},
        "parallelisms": {"x": 1},
    }
    found = from_toml(job, "job.toml", cluster="h100-8x-ib400", num_gpus=32)
    assert found.scenario["parallel"] == {
        "pp": 4,
        "vpp": 2,
        "layout": [4, 5, 4, 4, 4, 4, 4, 3],
        "zero": 2,
        "fsdp": True,
    }
    assert found.scenario["train"]["global_batch"] == 64
    assert found.left_out == ("activation_checkpoint.selective_ac_option", "compile.enable")
    assert found.unknown == ("parallelisms.x",)
    assert "selective" in found.assumed[0]


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("model", {"flavor": "9B"}, "is no model that moesim carries; got 'llama3 9B'. Name the model: --model."),
        ("parallelism", {"tensor_parallel_degree": 0}, "must be a whole number of at least 1"),
        ("parallelism", {"tensor_parallel_degree": 3}, "must be a multiple of .* = 3"),
        ("parallelism", {"data_parallel_shard_degree": 4}, "contradicts the file's degrees, which make 4"),
        ("parallelism", {"context_parallel_rotate_method": "ring"}, "must be one of allgather, alltoall"),
        ("activation_checkpoint", {"mode": "all"}, "must be one of none, selective, full"),
    ],
)
def test_a_job_that_makes_no_sense_is_refused(section: str, values: dict[str, Any], message: str) -> None:
    job: dict[str, dict[str, Any]] = {"model": {"name": "llama3", "flavor": "8B"}, "parallelism": {}}
    job[section] = job.get(section, {}) | values
    with pytest.raises(InputError, match=message):
        from_toml(job, "job.toml", cluster="h100-8x-ib400", num_gpus=8)


def moesim(*arguments: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of one call."""
    done = CliRunner().invoke(app, list(arguments))
    return done.exit_code, done.stdout, done.stderr


def test_the_verbs_hand_a_scenario_to_one_another(tmp_path: Path) -> None:
    asked = ("--model", "mixtral-8x7b", "--cluster", "h100-8x-ib400", "--num-gpus", "32", "--ep", "8")
    for form, file, verb in (("megatron", "pretrain.sh", "import-megatron"), ("torchtitan", "job.toml", "")):
        status, out, err = moesim("export", *asked, "--format", form, "--out", str(tmp_path))
        assert (status, form == "torchtitan") in ((0, False), (2, True)), err
        assert form == "megatron" or "torchtitan has no model mixtral-8x7b" in err
        if verb:
            assert (tmp_path / file).read_text() == out
            status, out, err = moesim(verb, str(tmp_path / file), "--json")
            result = json.loads(out)
            assert result["command"] == verb
            assert result["result"]["scenario"]["parallel"] == {"ep": 8, "zero": 1}
    assert moesim("export", *asked, "--format", "scenario", "--out", str(tmp_path))[0] == 0
    told = Scenario.from_file(tmp_path / "scenario.yaml")
    assert told == Scenario.make(model="mixtral-8x7b", cluster="h100-8x-ib400", num_gpus=32, ep=8)


def test_a_model_that_no_preset_has_is_written_beside_its_scenario(tmp_path: Path) -> None:
    script = tmp_path / "run.sh"
    script.write_text(SCRIPT)
    defined = ("--define", "NNODES=2")
    status, out, err = moesim("import-megatron", str(script), *defined)
    assert (status, out) == (2, "")
    assert "--out: is needed: no preset has the model" in err
    assert moesim("import-megatron", str(script), *defined, "--out", str(tmp_path))[0] == 0
    scenario = Scenario.from_file(tmp_path / "scenario.yaml")
    assert (len(scenario.model.layers), scenario.parallel.tp) == (16, 2)


def test_a_script_whose_sizes_do_not_fit_is_refused_in_its_own_name(tmp_path: Path) -> None:
    script = tmp_path / "run.sh"
    script.write_text(SCRIPT.replace("--expert-model-parallel-size 4", "--expert-model-parallel-size 48"))
    status, out, err = moesim("import-megatron", str(script), "--define", "NNODES=2")
    assert (status, out) == (2, "")
    assert "ep=48 does not divide" in err
    empty = tmp_path / "empty.sh"
    empty.write_text("echo nothing\n")
    assert "must hold flags such as --num-layers 32" in moesim("import-megatron", str(empty))[2]
