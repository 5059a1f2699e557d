"""Balance over training: how fast each balancing policy evens this model's load out, and what the wait costs.

Legend: T training steps, L MoE layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from moesim.describe.workload import Balanced
from moesim.metrics.step import StepResult
from moesim.routing.balancing import (
    AuxiliaryLoss,
    Balancing,
    LossFreeBias,
    NoBalancing,
    NoisyGating,
    TrainingSetting,
    early_cost,
    simulate_balancing,
)
from moesim.routing.histogram import Histogram
from moesim.routing.statistics import gini
from moesim.scenario import Scenario
from moesim.seeds import stream
from moesim.study.routed import routed_base
from moesim.study.simulate import simulate

# Noise alone holds nothing back, so it has the auxiliary loss beside it.
POLICIES: tuple[Balancing, ...] = (NoBalancing(), AuxiliaryLoss(), LossFreeBias(), NoisyGating(weight=0.01))
FIRST_HOURS = 24.0
MAX_LAYERS = 4  # simulated; layers do not act on one another, so more only narrow the mean
MAX_POINTS = 400  # of a curve
HISTOGRAM_EVERY = 1000  # steps


@dataclass(frozen=True, kw_only=True)
class BalanceCurve:
    """MaxVio (busiest expert over the mean, less 1; mean over layers) during training under one policy.

    steps_until_balanced: None where it never stays under 0.1. histogram: expert usage of single batches, every so many
    steps, of the layers that were simulated (numbered from 0). lost_s: training time that imbalance costs in the first
    hours against perfect balance; settled_lost_s: of that what never goes away.
    """

    policy: str
    steps: tuple[int, ...]
    max_vio: tuple[float, ...]
    final_max_vio: float
    steps_until_balanced: int | None
    num_collapsed: int
    first_collapse_step: int | None
    first_hours: float
    first_hours_steps: int
    lost_s: float
    settled_lost_s: float
    histogram: Histogram | None = field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the histogram has a file of its own."""
        found = asdict(replace(self, histogram=None))
        del found["histogram"]
        return found


def balance_over_training(
    scenario: Scenario,
    *,
    num_steps: int,
    learning_rate: float,
    balanced: StepResult | None = None,
    policies: tuple[Balancing, ...] = POLICIES,
    histogram_every: int = HISTOGRAM_EVERY,
    progress: Callable[[str], None] | None = None,
) -> list[BalanceCurve]:
    """Simulate the scenario's first num_steps training steps under each policy, from its own skew on.

    balanced: the scenario's step under forced balance and without drops, where it is known: its share of expert and
    all-to-all time is what imbalance stretches. Raises InputError. docs/model.md#balancing.
    """
    base = routed_base(scenario)
    if balanced is None:
        balanced = simulate(scenario.with_(popularity="balanced", capacity_factor=None))
    stretched_s = sum(balanced.step_parts_s[part] for part in ("experts", "dispatch", "combine"))
    even = isinstance(scenario.routing.popularity, Balanced)
    skew = 0.0 if even else float(gini(base.popularities.inclusion_LE).mean())
    setting = TrainingSetting(
        num_experts=base.moe.num_experts,
        top_k=base.moe.router.top_k,
        num_layers=min(len(base.layers), MAX_LAYERS),
        num_steps=num_steps,
        sequences_per_batch=scenario.train.global_batch,
        seq_len=scenario.train.seq_len,
        learning_rate=learning_rate,
        # The lognormal law whose Gini is the load's: Gini = 2 Phi(spread / sqrt 2) - 1.
        initial_spread=math.sqrt(2.0) * NormalDist().inv_cdf((1.0 + skew) / 2.0),
        num_ranks=scenario.parallel.ep,
    )
    curves = []
    for policy in policies:
        if progress is not None:
            progress(f"balance over {num_steps:,} steps: {policy.kind.replace('_', ' ')}")
        rng = stream(scenario.seed, "balancing")
        run = simulate_balancing(policy, setting, rng=rng, histogram_every=histogram_every)
        cost = early_cost(
            run,
            hours=FIRST_HOURS,
            balanced_step_s=float(balanced.step_s),
            expert_fraction=stretched_s / float(balanced.step_s),
        )
        shown = np.unique(np.linspace(0, num_steps - 1, min(num_steps, MAX_POINTS)).astype(int))
        mean_T = run.max_vio_TL.mean(axis=1, dtype=np.float64)
        curves.append(
            BalanceCurve(
                policy=policy.kind,
                steps=tuple(shown.tolist()),
                max_vio=tuple(mean_T[shown].tolist()),
                final_max_vio=run.final_max_vio,
                steps_until_balanced=run.steps_until_balanced(),
                num_collapsed=len(run.collapses),
                first_collapse_step=run.collapses[0].step if run.collapses else None,
                first_hours=FIRST_HOURS,
                first_hours_steps=cost.num_steps,
                lost_s=cost.lost_s,
                settled_lost_s=cost.settled_lost_s,
                histogram=run.histogram,
            )
        )
    return curves
