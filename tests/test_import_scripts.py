"""Command lines as people keep them: each is read into the scenario that it asks for, exported, and read again.

The scripts are this project's own; their habits (variables with defaults, arrays, continued lines, quotes, switches
with a value, case statements) are those of public ones.
"""

from __future__ import annotations

from typing import Any

import pytest

from moesim.catalog.megatron import Imported, from_flags
from moesim.catalog.megatron_bridge import flags_in_bridge, is_bridge
from moesim.catalog.megatron_export import script_of, to_flags
from moesim.door.files import parse_yaml
from moesim.door.flags import flags_of_mapping, flags_of_script
from moesim.errors import InputError, NotModelledError
from moesim.scenario import Scenario

RUN = "--seq-length 4096 --micro-batch-size 1 --global-batch-size 512 --use-distributed-optimizer --bf16"
LLAMA = """--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --group-query-attention
    --num-query-groups 8 --swiglu --vocab-size 128256 --untie-embeddings-and-output-weights --disable-bias-linear"""
V3 = """
    --num-layers 61 --hidden-size 7168 --ffn-hidden-size 18432 --num-attention-heads 128 --vocab-size 129280 \\
    --swiglu --untie-embeddings-and-output-weights --normalization RMSNorm \\
    --multi-latent-attention --q-lora-rank 1536 --kv-lora-rank 512 --qk-head-dim 128 --qk-pos-emb-head-dim 64 \\
    --v-head-dim 128 --num-experts 256 --moe-router-topk 8 --moe-ffn-hidden-size 2048 \\
    --moe-shared-expert-intermediate-size 2048 --moe-router-score-function sigmoid --moe-router-num-groups 8 \\
    --moe-router-group-topk 4 --mtp-num-layers 1 """

SCRIPTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral: arrays, defaults of variables, comments, a log behind a pipe": (
        f"""#!/usr/bin/env bash
set -euo pipefail
export NCCL_IB_SL=1 CUDA_DEVICE_MAX_CONNECTIONS=1
NODES=${{NODES:-8}}; TP=${{TP:=2}}
GPUS_PER_NODE=8
MODEL=(
  --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336   # Mistral's
  --num-attention-heads 32 --group-query-attention --num-query-groups 8
  --swiglu --vocab-size 32000 --untie-embeddings-and-output-weights --disable-bias-linear
  --num-experts 8 --moe-router-topk 2 --moe-grouped-gemm
)
# --num-experts 16
PARALLEL=(--tensor-model-parallel-size 2 --pipeline-model-parallel-size 4 --expert-model-parallel-size 8
          --expert-tensor-parallel-size 1 --sequence-parallel)
torchrun --nproc_per_node $GPUS_PER_NODE --nnodes $NODES --master_addr "$(hostname)" pretrain_gpt.py \\
   "${{MODEL[@]}}" "${{PARALLEL[@]}}" {RUN} \\
   --moe-token-dispatcher-type alltoall --moe-router-load-balancing-type aux_loss --overlap-grad-reduce 2>&1 | tee x.log
""",
        "mixtral-8x7b",
        {
            "num_gpus": 64,
            "parallel": {"tp": 2, "pp": 4, "ep": 8, "zero": 1},
            "train": {"overlap": "grad_reduce", "precision": "bf16"},
        },
    ),
    "deepseek-v3: layout, DeepEP, blockwise FP8 with narrow weights, modules": (
        f"""LAYOUT='Et*3|(tt|)*29m|L'
python -u pretrain_gpt.py {V3} --moe-layer-freq '([0]*3+[1]*58)' {RUN} --world-size 512 \\
  --pipeline-model-parallel-size 8 --pipeline-model-parallel-layout "$LAYOUT" --expert-model-parallel-size 64 \\
  --moe-token-dispatcher-type flex --moe-flex-dispatcher-backend deepep \\
  --fp8-format e4m3 --fp8-recipe blockwise --fp8-param-gather --activation-func-fp8-input-store \\
  --use-precision-aware-optimizer --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16 --main-params-dtype fp32 \\
  --recompute-granularity selective --recompute-modules mla_up_proj layernorm moe_act --moe-router-dtype fp32
""",
        "deepseek-v3",
        {
            "parallel": {"pp": 8, "vpp": 4, "layout": "Et*3|(tt|)*29m|L", "ep": 64},
            "train": {
                "precision": "fp8",
                "kept": {"activation_input": "fp8"},
                "optimizer": {"weights": "narrow", "moments": "bf16", "main_weights": "fp32"},
                "recompute": "mla_up_proj,moe_act,layernorm",
                "mtp": True,
            },
            "routing": {"dispatcher": "deepep"},
        },
    ),
    "deepseek-v3: moe-layer-freq as a spelt list, first and last stage, deepep by its older flag": (
        f"""FREQ="[0,0,0{",1" * 58}]"
torchrun --nnodes=128 --nproc-per-node=8 pretrain_gpt.py {V3} --moe-layer-freq $FREQ {RUN}\\
  --pipeline-model-parallel-size 16 --decoder-first-pipeline-num-layers 3 --decoder-last-pipeline-num-layers 2 \\
  --expert-model-parallel-size 64 --moe-token-dispatcher-type flex --moe-enable-deepep
""",
        "deepseek-v3",
        {"num_gpus": 1024, "parallel": {"num_first_stage_layers": 3, "num_last_stage_layers": 2}},
    ),
    "qwen3: kv channels, QK norm, layers per virtual stage, CUDA graphs, underscores and true": (
        f"""NPROC_PER_NODE=8
megatron sft --num_layers 48 --hidden_size 2048 --ffn_hidden_size 6144 --num_attention_heads 32 --kv_channels 128 \\
   --group_query_attention true --num_query_groups 4 --qk_layernorm true --swiglu true --vocab_size 151936 \\
   --untie_embeddings_and_output_weights true --num_experts 128 --moe_router_topk 8 --moe_ffn_hidden_size 768 \\
   --moe_grouped_gemm true --cross_entropy_loss_fusion true --finetune false --sequence_parallel false \\
   --pipeline_model_parallel_size 2 --num_layers_per_virtual_pipeline_stage 6 --expert_model_parallel_size 8 \\
   --moe_token_dispatcher_type alltoall --cuda-graph-impl transformer_engine --cuda-graph-scope attn moe_router \\
   --nnodes 4 --nproc_per_node 8 {RUN}
""",
        "qwen3-30b-a3b",
        {
            "parallel": {"pp": 2, "vpp": 4, "ep": 8},
            "train": {"fused_loss": True, "cuda_graphs": "attn,moe_router"},
        },
    ),
    "llama dense: ring context parallelism, delayed FP8, full recomputation, flags out of a case statement": (
        f"""for arg in "$@"; do
  case $arg in
    --nnodes=*) NNODES="${{arg#*=}}" ;;
    --help|-h) exit 0 ;;
  esac
done
options=" \\
    --context-parallel-size 2 --cp-comm-type p2p \\
    --tensor-model-parallel-size 4 --sequence-parallel "
options="${{options}} --fp8-format hybrid --recompute-granularity full --recompute-method uniform"
srun --label bash -c "python pretrain_gpt.py ${{options}}" {LLAMA.replace(chr(10), " ")} {RUN} \\
  --recompute-num-layers 1 --world-size 64
""",
        "llama-3-8b",
        {
            "num_gpus": 64,
            "parallel": {"tp": 4, "cp": 2},
            "train": {"precision": "fp8_tensor", "recompute": "full"},
        },
    ),
    "llama dense: FSDP2": (
        f"""accelerate-like launch {LLAMA.replace(chr(10), " ")} --use-torch-fsdp2 --world-size 16 --bf16 \\
  --seq-length 8192 --micro-batch-size 1 --global-batch-size 16 --no-gradient-accumulation-fusion
""",
        "llama-3-8b",
        {"parallel": {"zero": 3, "fsdp": True}, "train": {"seq_len": 8192}},
    ),
    "llama dense: optimizer on the host, instances, MXFP8": (
        f"""X="$Y"
python pretrain_gpt.py {LLAMA.replace(chr(10), " ")} {RUN} --world-size 32 --fp8-format e4m3 --fp8-recipe mxfp8 \\
  --fp8-param-gather --reuse-grad-buf-for-mxfp8-param-ag --num-distributed-optimizer-instances 2 \\
  --optimizer-cpu-offload --use-precision-aware-optimizer --grad-reduce-in-bf16
""",
        "llama-3-8b",
        {
            "parallel": {"replicate": 2, "zero": 1},
            "train": {
                "precision": "mxfp8",
                "offload": "optimizer",
                "optimizer": {"gradients": "bf16", "weights": "narrow", "main_weights": "fp32", "moments": "fp32"},
            },
        },
    ),
    "mixtral: capacity, padding, position drops, forced balance": (
        f"""python pretrain_gpt.py --num-layers=32 --hidden-size=4096 --ffn-hidden-size=14336 \\
  --num-attention-heads=32 \\
  --group-query-attention --num-query-groups=8 --swiglu --vocab-size=32000 --num-experts=8 --moe-router-topk=2 \\
  --untie-embeddings-and-output-weights {RUN} --world-size=32 --expert-model-parallel-size=4 \\
  --moe-token-dispatcher-type=alltoall --moe-expert-capacity-factor=1.25 --moe-pad-expert-input-to-capacity \\
  --moe-token-drop-policy=position --moe-router-force-load-balancing
""",
        "mixtral-8x7b",
        {
            "routing": {
                "capacity_factor": 1.25,
                "pad_to_capacity": True,
                "drop_policy": "position",
                "popularity": {"kind": "multinomial"},
            }
        },
    ),
}
BRIDGE = """
model:
  _target_: megatron.bridge.models.qwen.Qwen3MoEModelProvider
  num_layers: 48
  hidden_size: 2048
  ffn_hidden_size: 6144
  num_attention_heads: 32
  num_query_groups: 4
  kv_channels: 128
  qk_layernorm: true
  gated_linear_unit: true
  vocab_size: 151936
  share_embeddings_and_output_weights: false
  add_bias_linear: false
  num_moe_experts: 128
  moe_router_topk: 8
  moe_ffn_hidden_size: 768
  moe_token_dispatcher_type: flex
  moe_flex_dispatcher_backend: deepep
  tensor_model_parallel_size: 1
  pipeline_model_parallel_size: 2
  virtual_pipeline_model_parallel_size: 2
  pipeline_model_parallel_layout: [[embedding, %(thirteen)s], [%(twelve)s], [%(twelve)s], [%(eleven)s, loss]]
  expert_model_parallel_size: 8
  sequence_parallel: false
  recompute_granularity: selective
  recompute_modules: [moe_act, layernorm]
  seq_length: 4096
  activation_func: silu
train: {micro_batch_size: 1, global_batch_size: 256, train_iters: 50}
dataset: {sequence_length: 4096}
ddp: {use_distributed_optimizer: true, overlap_grad_reduce: true, grad_reduce_in_fp32: false}
mixed_precision: bf16_with_mxfp8_mixed
""" % {name: ", ".join(["decoder"] * n) for name, n in (("thirteen", 13), ("twelve", 12), ("eleven", 11))}


def read(text: str) -> Imported:
    return from_flags(flags_of_script(text, "run.sh"), cluster="h100-8x-ib400")


def within(wanted: Any, found: Any) -> None:
    """Every value that is wanted, at its place."""
    if not isinstance(wanted, dict):
        assert found == wanted
        return
    for name, value in wanted.items():
        within(value, found[name])


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_read_into_the_run_that_it_asks_for(name: str) -> None:
    text, model, wanted = SCRIPTS[name]
    found = read(text)
    assert (found.unknown, found.design) == ((), None)
    scenario = Scenario.from_mapping(found.scenario)
    assert scenario.model.name == model
    within(wanted, scenario.to_dict())


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_was_read_is_exported_to_flags_that_read_the_same(name: str) -> None:
    found = read(SCRIPTS[name][0])
    scenario = Scenario.from_mapping(found.scenario)
    parts = (scenario.model, scenario.parallel, scenario.train, scenario.routing)
    exported = to_flags(*parts, scenario.cluster.num_gpus)
    again = read(script_of(exported, "again"))
    assert (again.unknown, again.left_out) == ((), ())
    assert Scenario.from_mapping(again.scenario) == scenario


def test_a_bridge_configuration_is_read_by_its_own_names() -> None:
    raw = parse_yaml(BRIDGE, "recipe.yaml")
    assert is_bridge(raw)
    flags = flags_of_mapping(flags_in_bridge(raw, "recipe.yaml"), "recipe.yaml")
    found = from_flags(flags, cluster="b200-8x-ib400", num_gpus=64)
    assert (found.unknown, found.design, found.scenario["model"]) == ((), None, "qwen3-30b-a3b")
    scenario = Scenario.from_mapping(found.scenario)
    wanted = {
        "parallel": {"pp": 2, "vpp": 2, "ep": 8, "layout": "Et*13|t*12|t*12|t*11L", "zero": 1},
        "train": {
            "precision": "mxfp8",
            "recompute": "moe_act,layernorm",
            "overlap": "grad_reduce",
            "optimizer": {"gradients": "bf16"},
            "global_batch": 256,
        },
        "routing": {"dispatcher": "deepep"},
    }
    within(wanted, scenario.to_dict())


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"mixed_precision": "fp6_mixed"}, "must be bf16_mixed or name one of nvfp4"),
        ({"model": {"pipeline_model_parallel_layout": [["embedding", "encoder"]]}}, "must be lists of embedding"),
    ],
)
def test_a_bridge_configuration_that_means_nothing_is_refused(section: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        flags_in_bridge(section, "recipe.yaml")


def test_an_unknown_flag_is_told_with_those_that_it_may_mean() -> None:
    text = SCRIPTS["mixtral: capacity, padding, position drops, forced balance"][0]
    found = read(text.replace("--world-size=32", "--world-size=32 --moe-router-topkk 2 --zzz-zzz"))
    assert found.unknown == ("moe-router-topkk", "zzz-zzz")
    assert "moe-router-topk" in found.near["moe-router-topkk"]
    assert "zzz-zzz" not in found.near


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            "--fp8-format hybrid --fp8-recipe custom",
            "custom is not modelled; delayed, tensorwise, blockwise, mxfp8 are",
        ),
        ("--cuda-graph-impl local --cuda-graph-scope mamba", "--cuda-graph-scope: mamba is not modelled"),
        ("--optimizer-cpu-offload --optimizer-offload-fraction 0.5", "0.5, a part, is not modelled"),
        ("--optimizer-cpu-offload --optimizer-offload-fraction some", "some, a part, is not modelled"),
    ],
)
def test_what_is_not_modelled_is_refused_by_name(flags: str, said: str) -> None:
    with pytest.raises(NotModelledError, match=said):
        read(f"python pretrain_gpt.py {LLAMA.replace(chr(10), ' ')} {RUN} --world-size 8 {flags}")


def test_a_name_that_is_a_number_is_an_unknown_flag_like_another() -> None:
    raw = parse_yaml("{1: 2, section: {3: true}}", "args.yaml")
    assert flags_of_mapping(raw, "args.yaml").values == {"1": ("2",), "3": ()}
