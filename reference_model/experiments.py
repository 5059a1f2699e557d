"""The named experiments behind notebook 50: each a few variants of one training run, each variant with three seeds.

    python -m reference_model.experiments quality

writes the runs under reference_model/runs; finished ones are left alone, one that was killed goes on. Every variant
differs from its neighbour in one thing only, all see the same batches, and a token costs all the same FLOPs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from reference_model.losses import BALANCE_WEIGHT, Z_WEIGHT
from reference_model.routers import SWITCH_TOP_1, NoisyTopK, Router, SoftmaxTopK
from reference_model.runs import RECORDED, Run, read_run
from reference_model.train import CHECKPOINT, Precision, TrainConfig, small_config, train

SEEDS = (0, 1, 2)
NUM_STEPS = 1000
RATE = 1e-2
BIAS_RATE = 0.001
PRECISION_STEPS = 150
FLOAT16_LOSS_SCALE = 1024.0


def quality() -> dict[str, TrainConfig]:
    """Dense against MoE at equal active FLOPs, and the MoE under each way of balancing its load."""
    return {
        "dense": small_config(dense=True, **_shared()),
        "auxiliary": _moe(SoftmaxTopK(top_k=2), balance_weight=BALANCE_WEIGHT, routing_every=NUM_STEPS // 5),
        "bias": _moe(SoftmaxTopK(top_k=2, bias=True), bias_rate=BIAS_RATE),
        "noisy": _moe(NoisyTopK(top_k=2)),
        "none": _moe(SoftmaxTopK(top_k=2)),
    }


def collapse() -> dict[str, TrainConfig]:
    """One expert per token, twice as wide, with nothing that balances; and the same with the auxiliary loss."""
    return {
        "none": _moe(SWITCH_TOP_1, width=128, z_weight=0.0),
        "auxiliary": _moe(SWITCH_TOP_1, width=128, z_weight=0.0, balance_weight=BALANCE_WEIGHT),
    }


def precision() -> dict[str, TrainConfig]:
    """Half precision: the router's product in float32 or in half, with and without the z-loss; float16 without only.

    Short runs: on a CPU a step in half precision takes several times one in float32.
    """
    ways: tuple[tuple[Precision, float], ...] = (("bfloat16", Z_WEIGHT), ("bfloat16", 0.0), ("float16", 0.0))
    return {
        f"{name}-{'float32' if in_float32 else 'half'}-router-{'z' if z_weight else 'no-z'}": _moe(
            SoftmaxTopK(top_k=2),
            router_in_float32=in_float32,
            balance_weight=BALANCE_WEIGHT,
            z_weight=z_weight,
            precision=name,
            loss_scale=FLOAT16_LOSS_SCALE if name == "float16" else 1.0,
            num_steps=PRECISION_STEPS,
            num_sequences=6,
            evaluate_every=PRECISION_STEPS // 5,
        )
        for name, z_weight in ways
        for in_float32 in (True, False)
    }


EXPERIMENTS: Mapping[str, Callable[[], dict[str, TrainConfig]]] = {
    "quality": quality,
    "collapse": collapse,
    "precision": precision,
}


def _shared() -> dict[str, Any]:
    return {
        "num_steps": NUM_STEPS,
        "learning_rate": RATE,
        "log_every": 20,
        "evaluate_every": NUM_STEPS // 10,
        "histogram_every": NUM_STEPS // 20,
        "checkpoint_every": 100,
    }


def _moe(
    router: Router, *, width: int = 64, router_in_float32: bool = True, balance_weight: float = 0.0, **changes: Any
) -> TrainConfig:
    """The small MoE with another router and no balancing unless asked for."""
    config = small_config(**(_shared() | {"balance_weight": balance_weight} | changes))
    assert config.model.moe is not None
    moe = dataclasses.replace(config.model.moe, router=router, width=width, router_in_float32=router_in_float32)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))


def run_experiment(
    name: str, folder: Path | str = RECORDED, *, seeds: Iterable[int] = SEEDS, say: Callable[[str], None] = print
) -> None:
    """Train what is missing of an experiment, seed by seed so that a part of it is already a comparison."""
    for seed in seeds:
        for variant, config in EXPERIMENTS[name]().items():
            place = Path(folder) / name / f"{variant}-s{seed}"
            if _is_finished(place, config):
                continue
            train(config, place, seed=seed)
            (place / CHECKPOINT).unlink()
            run = read_run(place)
            say(f"{place}: {run.facts['wall_s']} s, held-out loss {run.heldout['loss'][-1]:.4f}")


def _is_finished(place: Path, config: TrainConfig) -> bool:
    try:
        facts = read_run(place).facts
    except FileNotFoundError:
        return False
    same = facts["config"] == json.loads(json.dumps(config.written()))
    return same and facts["steps_done"] == config.num_steps


def run_live(
    folder: Path | str,
    *,
    num_steps: int,
    variants: Sequence[str] = ("dense", "auxiliary"),
    seed: int = SEEDS[0],
    progress: Callable[[str, int], None] | None = None,
) -> dict[str, Run]:
    """The first steps of some quality runs once more, here and now: same configuration, seed and batches.

    On one thread, as they were recorded: products this small gain nothing from more.
    progress: called with the variant's name and each finished step.
    """
    runs: dict[str, Run] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for variant in variants:
            config = dataclasses.replace(quality()[variant], evaluate_every=max(1, num_steps // 4), routing_every=0)
            place = Path(folder) / f"{variant}-s{seed}"
            note = (lambda step, _loss, variant=variant: progress(variant, step)) if progress else None
            train(config, place, seed=seed, stop_after=num_steps, progress=note)
            runs[variant] = read_run(place)
    finally:
        torch.set_num_threads(threads)
    return runs


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: trains an experiment's runs, or those of all."""
    parser = argparse.ArgumentParser(prog="python -m reference_model.experiments", description=main.__doc__)
    parser.add_argument("name", choices=[*EXPERIMENTS, "all"])
    parser.add_argument("--folder", default=str(RECORDED))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the sums of one thread, whatever else the machine does
    for name in EXPERIMENTS if asked.name == "all" else [asked.name]:
        run_experiment(name, asked.folder, seeds=asked.seeds)


if __name__ == "__main__":
    main()
