"""DeepSeek-V3's published GPU-hours beside their predicted range, and two ranges that nothing published can test.

No row of that run, nor any training step on H800, stands behind a constant or the model error; what its software loses
is read from kernels of its published trace. See docs/accuracy.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moesim.describe.workload import Software
from moesim.scenario import Scenario
from moesim.study.goodput import RunPlan
from moesim.study.uncertainty import UncertaintyPlan, UncertaintyStudy, uncertainty_study
from moesim.timeline.step import run_step
from moesim.units import HOUR_S

PUBLISHED_GPU_HOURS = 2_664_000  # arXiv 2412.19437 table 1: pre-training alone
NUM_SEEDS = 2  # at each of three skews: a seed moves a step of so many ranks by 1 %
# arXiv 2412.19437 sections 3.2, 3.3.3 and 4.2: parallelism, what is recomputed (RMSNorm, MLA up-projections, SwiGLU's
# output), number formats of what is kept, the weights' average on the host, sequences, tokens, and the batch that grows
# from 3,072 over 469B tokens.
DEEPSEEK_V3: Mapping[str, Any] = {
    "model": "deepseek-v3",
    "cluster": "h800-8x-ib400",
    "num_gpus": 2048,
    "pp": 16,
    "ep": 64,
    "zero": 1,
    "seq_len": 4096,
    "micro_batch": 1,
    "global_batch": 15360,
    "precision": "fp8",
    "moments": "bf16",
    "average": "host",
    "attention_output": "e5m6",
    "activation_input": "fp8",
    "schedule": "dualpipe",
    "overlap": "forward_backward",
    "dispatcher": "deepep",
    "recompute": "layernorm,mla_up_proj,moe_act",
    "mtp": True,
    "software": "deepseek",
}
DEEPSEEK_RUN = RunPlan(tokens=14.8e12, ramp_tokens=469e9, ramp_batch=3072)
# The report does not say which stage holds which of 61 layers. 15 * 4 + 1 leaves the last one room for the multi-token
# prediction layer and two heads; an even share does not, and its last stage holds the others up.
LIGHT_LAST_STAGE: Mapping[str, Any] = {"num_last_stage_layers": 1}
MIXTRAL: Mapping[str, Any] = {
    "model": "mixtral-8x7b",
    "cluster": "h100-8x-ib400",
    "num_gpus": 256,
    "pp": 4,
    "ep": 8,
    "seq_len": 4096,
    "micro_batch": 1,
    "global_batch": 1024,
}
HYPOTHETICAL: Mapping[str, Any] = {
    "model": "hypothetical-1t-a50b",
    "cluster": "b200-8x-ib400",
    "num_gpus": 2048,
    "pp": 16,
    "ep": 64,
    "seq_len": 4096,
    "micro_batch": 1,
    "global_batch": 8192,
    "precision": "fp8",
    "dispatcher": "deepep",
}


def deepseek_v3(*, light_last_stage: bool = True, **plan: Any) -> UncertaintyStudy:
    """The range of DeepSeek-V3's pre-training; plan: fields of UncertaintyPlan."""
    leaves = {**DEEPSEEK_V3, **(LIGHT_LAST_STAGE if light_last_stage else {})}
    return uncertainty_study(
        Scenario.make(**leaves), UncertaintyPlan(run=DEEPSEEK_RUN, **{"num_seeds": NUM_SEEDS} | plan)
    )


def gpu_hours_without_luck(software: Software) -> float:
    """DeepSeek-V3's pre-training as predicted alone: no ramp, no failures, no model error. kernels: nothing is
    lost beside them, and casts are Megatron-LM's.
    """
    scenario = Scenario.make(**{**DEEPSEEK_V3, **LIGHT_LAST_STAGE, "software": software})
    num_steps = DEEPSEEK_RUN.tokens / (scenario.train.global_batch * scenario.train.seq_len)
    return num_steps * run_step(scenario).step_s * scenario.cluster.num_gpus / HOUR_S


def unvalidated() -> dict[str, UncertaintyStudy]:
    """Ranges of runs that nobody published, by what they train."""
    asked = {"Mixtral 8x7B": (MIXTRAL, 2e12), "hypothetical-1t-a50b": (HYPOTHETICAL, 15e12)}
    return {
        name: uncertainty_study(
            Scenario.make(**leaves), UncertaintyPlan(run=RunPlan(tokens=tokens), num_seeds=NUM_SEEDS)
        )
        for name, (leaves, tokens) in asked.items()
    }


def band(study: UncertaintyStudy) -> tuple[float, float]:
    """(P10, P90) of GPU-hours over their P50, - 1."""
    hours = study.ranges["gpu_hours"]
    return hours.p10 / hours.p50 - 1.0, hours.p90 / hours.p50 - 1.0
