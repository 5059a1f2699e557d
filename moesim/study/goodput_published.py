"""What published clusters met, predicted from other clusters' rates: interruptions, lost time, effective time.

Nothing is fitted: Llama-3's own rate is left out of its prediction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from moesim.catalog.failures import checkpoint_facts, default_operations, fleet_names, load_fleet, mean_time_between_s
from moesim.describe.reliability import Checkpoints
from moesim.seeds import stream
from moesim.study.goodput import HOST_LINK_BYTES_PER_S, Range, best_interval_s, drawn_fleet
from moesim.timeline.failures import run_with_failures
from moesim.units import DAY_S, GIGA

LLAMA = "llama-3-16k-h100"
LLAMA_GPUS, LLAMA_DAYS, LLAMA_PARAMETERS = 16384, 54, 405 * GIGA
LLAMA_UNEXPECTED, LLAMA_PLANNED, LLAMA_EFFECTIVE = 419, 47, 0.90  # arXiv 2407.21783 section 3.3.4
META_GPUS, META_MINUTES = 98_000, 18.0  # arXiv 2602.00277: mean time between failures


@dataclass(frozen=True, kw_only=True)
class LlamaCheck:
    """Llama-3's 54 days on 16,384 GPUs, from the other clusters' rates."""

    interruptions: Range
    inspected: bool  # machines are watched, so that failures are known within a minute or so
    effective_fraction: Range
    lost_per_failure_s: Range
    checkpoints: Checkpoints


def check_llama(*, inspected: bool, num_runs: int = 200, seed: int = 0) -> LlamaCheck:
    """Interruptions, effective time and lost time per failure of Llama-3's run, each P10, P50 and P90 over runs.

    Checkpoints are asynchronous, every best interval for the median rate of the other clusters.
    """
    fleets = [load_fleet(name, inspected=inspected) for name in fleet_names() if name != LLAMA]
    operations = replace(default_operations(LLAMA_GPUS, num_spares=20), planned_per_day=LLAMA_PLANNED / LLAMA_DAYS)
    facts = checkpoint_facts()
    size_bytes = LLAMA_PARAMETERS * facts.bytes_per_parameter.value
    shape = Checkpoints(
        interval_s=1.0,
        stall_s=size_bytes / LLAMA_GPUS / HOST_LINK_BYTES_PER_S,
        write_s=size_bytes / facts.write_bytes_per_s.value,
    )
    middle = float(np.exp(np.mean([np.log(fleet.per_gpu_hour.value) for fleet in fleets])))
    checkpoints = replace(shape, interval_s=best_interval_s(shape, operations, fleets[-1], middle, LLAMA_GPUS))
    counts, effective, lost_s = [], [], []
    for i in range(num_runs):
        rng = stream(seed, f"published run {i}")
        fleet, rate = drawn_fleet(fleets, *rng.random(2))
        run = run_with_failures(
            LLAMA_EFFECTIVE * LLAMA_DAYS * DAY_S,
            num_gpus=LLAMA_GPUS,
            fleet=fleet,
            checkpoints=checkpoints,
            operations=operations,
            rng=rng,
            rate_factor=rate / fleet.per_gpu_hour.value,
        )
        # Counted over 54 days, whatever the run took.
        counts.append(float(rng.poisson(LLAMA_DAYS * DAY_S / mean_time_between_s(rate, LLAMA_GPUS))))
        effective.append(run.goodput_fraction)
        unplanned_s = run.total_s - run.seconds["training"] - run.seconds["planned"] - run.seconds["slow"]
        lost_s.append((unplanned_s - run.seconds["checkpoint"]) / max(run.num_failures, 1))
    return LlamaCheck(
        interruptions=Range.of(counts),
        inspected=inspected,
        effective_fraction=Range.of(effective),
        lost_per_failure_s=Range.of(lost_s),
        checkpoints=checkpoints,
    )


def meta_minutes() -> float:
    """Mean minutes between failures of 98,000 GPUs by the rate of the same owner's 32,768: proportional, no more."""
    return mean_time_between_s(load_fleet("meta-32k-h100").per_gpu_hour.value, META_GPUS) / 60.0
