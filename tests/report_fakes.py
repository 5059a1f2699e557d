"""Small made-up results for the tests of figures, tables and sentences. Never shipped, never shown to a user."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from moesim.metrics.step import STEP_PARTS, Provenance, StepResult
from moesim.study.sizes import DropPoint, EpPoint
from moesim.study.twins import Twins
from moesim.units import GIB


def memory(scale: float = 1.0) -> dict[str, float]:
    sizes = {"weights": 12, "gradients": 12, "optimizer": 9, "activations": 21, "dispatch": 3, "comm": 2, "reserved": 3}
    parts = {f"{name}_bytes": size * scale * GIB for name, size in sizes.items()}
    return parts | {"peak_bytes": sum(parts.values()), "peak_p99_bytes": sum(parts.values()) + GIB}


def step_result(*, scale: float = 1.0, num_layers: int = 4, num_experts: int = 16, **changes: Any) -> StepResult:
    shares = dict(zip(STEP_PARTS, np.linspace(0.02, 0.11, len(STEP_PARTS)), strict=True))
    step_s = sum(shares.values())
    load_LE = np.random.default_rng(1).lognormal(0.0, 0.6, (num_layers, num_experts))
    load_LE /= load_LE.sum(axis=1, keepdims=True)
    ratio_LE = load_LE * num_experts
    held = memory(scale)
    result = StepResult(
        scenario={"model": "fake", "cluster": "fake", "num_gpus": 16},
        step_s=step_s,
        tokens_per_s=1e5,
        tokens_per_s_per_gpu=1500.0,
        kept_assignment_fraction=1.0,
        drop_fraction=0.0,
        mfu=0.31,
        mfu_full_attention=0.33,
        model_flops_per_s_per_gpu=3e14,
        compute_s=0.5,
        exposed_comm_s=0.3,
        hidden_comm_s=0.04,
        wait_s=shares["wait_for_slowest"],
        bubble_fraction=0.1,
        max_mean_load=float(ratio_LE.max()),
        gini=0.28,
        entropy=0.95,
        memory=held,
        memory_by_rank=[{"stage": s, "rank": 4 * s, **memory(scale * (1 - 0.05 * s))} for s in range(4)],
        fits=held["peak_bytes"] <= 80 * GIB,
        headroom_bytes=80 * GIB - held["peak_bytes"],
        out_of_memory_fraction=0.0,
        memory_over_steps={"redraw": "counts", "num_steps": 16},
        envelope={"inside": False, "reasons": ["FP8 products are not calibrated"]},
        step_parts_s=shares,
        load_LE=load_LE,
        alerts=[
            {"layer": int(layer), "expert": int(expert), "ratio": float(ratio_LE[layer, expert])}
            for layer, expert in np.argwhere(ratio_LE > 3.0)
        ],
        drop_fraction_by_layer=[0.0] * num_layers,
        binds="waiting for the slowest GPU",
        provenance=(Provenance(part="experts", kind="assumed", source="a <made-up> number"),),
        warnings=(),
    )
    return dataclasses.replace(result, **changes)


def twins(moe: StepResult, active: StepResult, total: StepResult) -> Twins:
    counts = {"moe": 47, "active": 13, "total": 47}
    return Twins(moe=moe, active=active, total=total, parameters=counts, widths={}, notes=())


def drops() -> list[DropPoint]:
    shares = ((1.0, 0.11, 0.11), (2.0, 0.004, 0.5))
    return [DropPoint(capacity_factor=f, drop_fraction=d, padding_fraction=p) for f, d, p in shares]


def ep_points() -> list[EpPoint]:
    points = []
    for ep in (1, 2, 4, 8, 16, 32):
        held = {part: size * (0.6 + 3 / ep) for part, size in memory().items()}
        headroom = 80 * GIB - held["peak_bytes"]
        points.append(EpPoint(ep=ep, memory=held, fits=headroom >= 0, headroom_bytes=headroom))
    return points
