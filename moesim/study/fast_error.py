"""How far the fast path is from the event engine, on random configurations, and how many it does in a second."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.errors import MoesimError
from moesim.scenario import Scenario
from moesim.study.fast import Changes, FastPath, FastStep, Refused, engine_step

# What is searched over by default, beside the number of GPUs.
AXES: Mapping[str, tuple[Any, ...]] = {
    "tp": (1, 2, 4, 8),
    "pp": (1, 2, 4, 8, 16),
    "vpp": (1, 2),
    "cp": (1, 2, 4),
    "ep": (1, 2, 4, 8, 16, 32, 64),
    "etp": (1, 2),
    "zero": (0, 1, 2, 3),
    "micro_batch": (1, 2, 4),
    "recompute": ("none", "full", "moe_act"),
    "dispatcher": ("alltoall", "deepep"),
}
BASES: tuple[Mapping[str, Any], ...] = (
    {"model": "deepseek-v3", "cluster": "h800-8x-ib400", "precision": "fp8", "global_batch": 256},
    {"model": "mixtral-8x7b", "cluster": "h100-8x-ib400", "global_batch": 256},
    {"model": "qwen3-30b-a3b", "cluster": "b200-8x-ib400", "global_batch": 256, "overlap": "grad_reduce,param_gather"},
    {"model": "olmoe-1b-7b", "cluster": "a100-8x-ib200", "global_batch": 256},
)
SIZES = (32, 64, 128)  # GPUs
SCHEDULES = ("1f1b", "1f1b", "gpipe", "zb-h1")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One configuration by both ways."""

    model: str
    changes: Changes
    fast: FastStep
    engine: FastStep

    @property
    def step_error(self) -> float:
        """Of the fast path's step, over the engine's."""
        return self.fast.step_s / self.engine.step_s - 1.0

    @property
    def peak_error(self) -> float:
        """Of its peak memory."""
        return self.fast.peak_bytes / self.engine.peak_bytes - 1.0


def differences(
    popularity: Mapping[str, Any], number: int, seed: int, progress: Callable[[str], None] | None = None
) -> list[Difference]:
    """So many random valid configurations of BASES by both ways.

    popularity: flat names, such as ``{"gini": 0.25}``. A configuration that one way refuses and the other does not is
    an error of ours.
    """
    rng = np.random.default_rng(seed)
    paths = [FastPath(Scenario.make(num_gpus=SIZES[0], **base, **popularity)) for base in BASES]
    found: list[Difference] = []
    for changes in _random(rng):
        path = paths[len(found) % len(paths)]
        fast, engine = path([changes])[0], _by_engine(path.base, changes)
        if isinstance(engine, Refused):
            assert fast == engine, f"{changes}: {fast}, but the engine: {engine}"
            continue
        assert isinstance(fast, FastStep), f"{changes}: {fast}, but not by the engine"
        found.append(Difference(model=path.base.model.name, changes=changes, fast=fast, engine=engine))
        if progress is not None and len(found) % 10 == 0:
            progress(f"{len(found)} of {number}")
        if len(found) == number:
            break
    return found


def _by_engine(base: Scenario, changes: Changes) -> FastStep | Refused:
    try:
        return engine_step(base.with_(**changes))
    except MoesimError as error:
        return Refused(str(error))


def _random(rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    drawn = {**AXES, "num_gpus": SIZES, "schedule": SCHEDULES}
    while True:
        yield {name: values[int(rng.integers(len(values)))] for name, values in drawn.items()}


@dataclass(frozen=True, kw_only=True)
class Rate:
    """How fast a search went: configurations asked, those that have a step, seconds."""

    num_asked: int
    num_steps: int
    wall_s: float
    cpu_s: float


def search_rate(base: Scenario, num_gpus: tuple[int, ...]) -> Rate:
    """A search over all of AXES and cluster sizes of one model; what configurations share is computed on the way."""
    names = ("num_gpus", *AXES)
    grid = [dict(zip(names, values, strict=True)) for values in itertools.product(num_gpus, *AXES.values())]
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    found = FastPath(base)(grid)
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    num_steps = sum(isinstance(step, FastStep) for step in found)
    return Rate(num_asked=len(grid), num_steps=num_steps, wall_s=wall_s, cpu_s=cpu_s)
