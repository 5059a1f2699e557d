"""Balance over training time: how popular each expert is while training pushes it apart and a policy pulls it together.

Legend: T steps, L MoE layers, E experts, S snapshots.

A layer's state is one preference per expert, in the units of a token's own noise: a token takes the top k of
preference + Gumbel, so inclusion = 1 - exp(-exp(x) t) with t such that inclusions sum to k (the limit of many experts).
Load f is inclusion over k/E. One step changes a preference by

    drift * normal + reinforcement * (f - 1)  [- pull * weight * E P (f - sum P f), the auxiliary loss's gradient]

with P the softmax of the preferences. The loss-free policy leaves preferences alone and moves a bias by
+- update_rate, which counts as bias / gate_scale in the token's units. Every policy sees the batch's load, which
differs from the popularity by the batch's mixture of texts. docs/model.md#balancing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moesim.describe.checks import check_number, check_whole
from moesim.errors import check
from moesim.routing.histogram import Histogram
from moesim.routing.statistics import collapse_from
from moesim.units import HOUR_S

Floats = NDArray[np.float64]
_BLOCK_STEPS = 256
_GUMBEL_SD = math.pi / math.sqrt(6.0)
BALANCED_MAX_VIO = 0.1  # called balanced below this MaxVio (a planning convention; loss-free training reaches 0.04)
DEAD_SHARE_OF_MEAN = 0.01


@dataclass(frozen=True, kw_only=True)
class NoBalancing:
    """Preferences drift and reinforce themselves."""

    kind: Literal["none"] = "none"


@dataclass(frozen=True, kw_only=True)
class AuxiliaryLoss:
    """weight * E * sum of F P, added to the loss (Switch Transformer, arXiv 2101.03961 section 2.2; 0.01 there)."""

    weight: float = 0.01
    kind: Literal["aux_loss"] = "aux_loss"

    def __post_init__(self) -> None:
        _check_not_negative("balancing", "weight", self.weight)


@dataclass(frozen=True, kw_only=True)
class LossFreeBias:
    """After each step a bias moves by update_rate towards the mean load, by sign (arXiv 2408.15664, algorithm 1)."""

    update_rate: float = 0.001
    kind: Literal["loss_free"] = "loss_free"

    def __post_init__(self) -> None:
        _check_not_negative("balancing", "update_rate", self.update_rate)


@dataclass(frozen=True, kw_only=True)
class NoisyGating:
    """Normal noise on the logits (arXiv 1701.06538, section 2.1), in units of preference, and a loss beside it.

    Noise softens the load; without a loss (weight 0) nothing pulls preferences back.
    """

    noise: float = 1.0
    weight: float = 0.0
    kind: Literal["noisy_gating"] = "noisy_gating"

    def __post_init__(self) -> None:
        _check_not_negative("balancing", "noise", self.noise)
        _check_not_negative("balancing", "weight", self.weight)


Balancing = NoBalancing | AuxiliaryLoss | LossFreeBias | NoisyGating


def _check_not_negative(owner: str, field: str, value: object) -> None:
    check_number(owner, field, value)
    assert isinstance(value, int | float)
    check(value >= 0, owner, field, "must not be negative", value)


@dataclass(frozen=True, kw_only=True)
class Dynamics:
    """What drives preferences, per step at learning_rate and batch_tokens; see FITTED for where the numbers come from.

    drift: spread of a step's random change; reinforcement: a taken expert learns more and is taken more; pull: change
    per unit of weight and of load; gate_scale: score that equals one unit of preference; sequence_noise: how far one
    sequence's preferences lie from the corpus's. A step's drift is gradient noise, so it goes with the learning rate
    over the root of the batch; pull and reinforcement are gradients, so they go with the learning rate.
    """

    drift: float
    reinforcement: float
    pull: float
    gate_scale: float
    sequence_noise: float
    learning_rate: float
    batch_tokens: float

    def __post_init__(self) -> None:
        for name in ("drift", "reinforcement", "pull", "sequence_noise"):
            _check_not_negative("dynamics", name, getattr(self, name))
        for name in ("gate_scale", "learning_rate", "batch_tokens"):
            check_number("dynamics", name, getattr(self, name))
            check(getattr(self, name) > 0, "dynamics", name, "must be positive", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class TrainingSetting:
    """The run whose balance is asked for. initial_spread: of preferences at step 0 (0.5 is a Gini of about 0.25).

    num_ranks: ranks that share a layer's experts, neighbours together (None: one expert each).
    """

    num_experts: int
    top_k: int
    num_layers: int
    num_steps: int
    sequences_per_batch: int
    seq_len: int
    learning_rate: float
    initial_spread: float = 0.5
    num_ranks: int | None = None

    def __post_init__(self) -> None:
        owner = "balancing"
        for name in ("num_experts", "top_k", "num_layers", "num_steps", "sequences_per_batch", "seq_len"):
            check_whole(owner, name, getattr(self, name))
        rule = f"must be below num_experts={self.num_experts}"
        check(self.top_k < self.num_experts, owner, "top_k", rule, self.top_k)
        check_number(owner, "learning_rate", self.learning_rate)
        check(self.learning_rate > 0, owner, "learning_rate", "must be positive", self.learning_rate)
        _check_not_negative(owner, "initial_spread", self.initial_spread)
        if self.num_ranks is not None:
            check_whole(owner, "num_ranks", self.num_ranks)
            rule = f"must divide num_experts={self.num_experts}"
            check(self.num_experts % self.num_ranks == 0, owner, "num_ranks", rule, self.num_ranks)

    @property
    def batch_tokens(self) -> int:
        return self.sequences_per_batch * self.seq_len


@dataclass(frozen=True, kw_only=True)
class Collapse:
    """An expert that took over (``statistics.collapse_from``), or died (under 1 % of the mean), and when first."""

    step: int
    layer: int
    expert: int
    what: Literal["took over", "died"]


@dataclass(frozen=True, kw_only=True, eq=False)
class BalancingRun:
    """A simulated training run.

    max_vio_TL: maximal violation of the popularity after each step (MaxVio_global); rank_max_mean_TL: the busiest
    rank's load over the mean in each step's own batch, which is what the step waits for; histogram: assignments of one
    batch every histogram_every steps; collapses: in the order of their steps.
    """

    setting: TrainingSetting
    policy: Balancing
    max_vio_TL: NDArray[np.float32]
    rank_max_mean_TL: NDArray[np.float32]
    histogram: Histogram
    collapses: tuple[Collapse, ...]

    @property
    def final_max_vio(self) -> float:
        """MaxVio_global, mean over layers, over the last tenth of the run (a single step's value is noisy)."""
        return float(self.max_vio_TL[-max(1, len(self.max_vio_TL) // 10) :].mean(dtype=np.float64))

    def steps_until_balanced(self, max_vio: float = BALANCED_MAX_VIO) -> int | None:
        """First step from which the mean over layers of MaxVio stays at or below max_vio; None if it never does."""
        above_T = self.max_vio_TL.mean(axis=1, dtype=np.float64) > max_vio
        if not above_T.any():
            return 0
        after = int(np.flatnonzero(above_T)[-1]) + 1
        return after if after < len(above_T) else None


@dataclass(frozen=True, kw_only=True)
class EarlyCost:
    """What imbalance costs in the first steps [s]: lost against perfect balance, and of that what never goes away."""

    num_steps: int
    mean_max_mean: float
    lost_s: float
    settled_lost_s: float


def early_cost(run: BalancingRun, *, hours: float, balanced_step_s: float, expert_fraction: float) -> EarlyCost:
    """Time lost to imbalance in the first hours of a run, when a balanced step takes balanced_step_s.

    expert_fraction: the share of the balanced step that waits for the busiest rank (expert compute and all-to-all); a
    step is longer by expert_fraction * (max/mean - 1), layers being alike. The settled part is the last tenth's.
    """
    step_s_T = balanced_step_s * (1.0 + expert_fraction * (run.rank_max_mean_TL.mean(axis=1, dtype=np.float64) - 1.0))
    num_steps = int(np.searchsorted(np.cumsum(step_s_T), hours * HOUR_S, side="right"))
    num_steps = max(1, num_steps)
    early = float(run.rank_max_mean_TL[:num_steps].mean(dtype=np.float64))
    settled = float(run.rank_max_mean_TL[-max(1, len(run.rank_max_mean_TL) // 10) :].mean(dtype=np.float64))
    waiting_s = num_steps * balanced_step_s * expert_fraction
    return EarlyCost(
        num_steps=num_steps,
        mean_max_mean=early,
        lost_s=waiting_s * (early - 1.0),
        settled_lost_s=waiting_s * (min(settled, early) - 1.0),
    )


def simulate_balancing(
    policy: Balancing,
    setting: TrainingSetting,
    *,
    rng: np.random.Generator,
    dynamics: Dynamics | None = None,
    histogram_every: int = 1000,
) -> BalancingRun:
    """Run the dynamics for setting.num_steps steps. dynamics None: FITTED.

    >>> setting = TrainingSetting(num_experts=8, top_k=2, num_layers=1, num_steps=2000, sequences_per_batch=256,
    ...                           seq_len=4096, learning_rate=1e-3)
    >>> run = simulate_balancing(LossFreeBias(), setting, rng=np.random.default_rng(0))
    >>> bool(run.final_max_vio < run.max_vio_TL[0].mean())
    True
    """
    from moesim.routing import balancing_kernel

    check_whole("balancing", "histogram_every", histogram_every)
    forces = FITTED if dynamics is None else dynamics
    speed = setting.learning_rate / forces.learning_rate
    drift = forces.drift * speed * math.sqrt(forces.batch_tokens / setting.batch_tokens)
    weight = policy.weight if isinstance(policy, AuxiliaryLoss | NoisyGating) else 0.0
    noise = policy.noise if isinstance(policy, NoisyGating) else 0.0
    even = setting.top_k / setting.num_experts
    counting = (1.0 - even) / (setting.batch_tokens * even)
    batch_sd = math.sqrt(forces.sequence_noise**2 / setting.sequences_per_batch + counting)
    shape_LE = (setting.num_layers, setting.num_experts)
    # Streams of their own: how steps are cut into blocks changes no draw.
    start_rng, drift_rng, batch_rng = rng.spawn(3)
    preference_LE = setting.initial_spread * start_rng.standard_normal(shape_LE)
    bias_LE, inclusion_LE = np.zeros(shape_LE), np.zeros(shape_LE)
    time_L2 = np.zeros((setting.num_layers, 2))
    takeover_LE, dead_LE = np.full(shape_LE, -1, dtype=np.int64), np.full(shape_LE, -1, dtype=np.int64)
    max_vio_TL = np.empty((setting.num_steps, setting.num_layers), dtype=np.float32)
    rank_max_mean_TL = np.empty_like(max_vio_TL)
    steps, shots = [], []
    first = 0
    while first < setting.num_steps:
        to_snapshot = 1 if first % histogram_every == 0 else histogram_every - first % histogram_every
        size = min(_BLOCK_STEPS, to_snapshot, setting.num_steps - first)
        balancing_kernel.advance(
            preference_LE,
            bias_LE,
            time_L2,
            drift * drift_rng.standard_normal((size, *shape_LE), dtype=np.float32),
            batch_sd * batch_rng.standard_normal((size, *shape_LE), dtype=np.float32),
            first,
            float(setting.top_k),
            1.0 / math.sqrt(1.0 + (noise / _GUMBEL_SD) ** 2),
            forces.reinforcement * speed,
            forces.pull * speed * weight,
            policy.update_rate if isinstance(policy, LossFreeBias) else 0.0,
            forces.gate_scale,
            setting.num_ranks or setting.num_experts,
            collapse_from(setting.top_k, setting.num_experts),
            DEAD_SHARE_OF_MEAN * even,
            max_vio_TL[first : first + size],
            rank_max_mean_TL[first : first + size],
            takeover_LE,
            dead_LE,
            inclusion_LE,
        )
        if first % histogram_every == 0:
            steps.append(first)
            shots.append(np.rint(inclusion_LE * setting.batch_tokens).astype(np.int64))
        first += size
    return BalancingRun(
        setting=setting,
        policy=policy,
        max_vio_TL=max_vio_TL,
        rank_max_mean_TL=rank_max_mean_TL,
        histogram=Histogram(
            steps_S=np.array(steps), layers=tuple(range(setting.num_layers)), tokens_SLE=np.stack(shots)
        ),
        collapses=_collapses(takeover_LE, dead_LE),
    )


def _collapses(takeover_LE: NDArray[np.int64], dead_LE: NDArray[np.int64]) -> tuple[Collapse, ...]:
    found = []
    for step_LE, what in ((takeover_LE, "took over"), (dead_LE, "died")):
        layers, experts = np.nonzero(step_LE >= 0)
        for layer, expert in zip(layers.tolist(), experts.tolist(), strict=True):
            found.append(Collapse(step=int(step_LE[layer, expert]), layer=layer, expert=expert, what=what))  # type: ignore[arg-type]
    return tuple(sorted(found, key=lambda one: (one.step, one.layer, one.expert)))


def fit_dynamics(
    assumed: Dynamics,
    setting: TrainingSetting,
    *,
    loss_free: LossFreeBias,
    loss_free_max_vio: float,
    aux_loss: AuxiliaryLoss,
    aux_loss_max_vio: float,
    seed: int = 0,
) -> Dynamics:
    """assumed with drift and pull solved so that a run ends at two measured MaxVio_global, one after the other.

    The loss-free run fixes the drift (pull has no part in it); the auxiliary loss then fixes the pull. The same random
    numbers serve every trial, so that bisection sees a smooth function.
    """

    def ends_at(policy: Balancing, forces: Dynamics) -> float:
        run = simulate_balancing(policy, setting, rng=np.random.default_rng(seed), dynamics=forces)
        return run.final_max_vio

    low, high = 1e-5, 0.1
    for _ in range(12):
        middle = math.sqrt(low * high)
        too_far = ends_at(loss_free, replace(assumed, drift=middle)) > loss_free_max_vio
        low, high = (low, middle) if too_far else (middle, high)
    drifting = replace(assumed, drift=math.sqrt(low * high))
    low, high = 1e-3, 1e2
    for _ in range(14):
        middle = math.sqrt(low * high)
        too_far = ends_at(aux_loss, replace(drifting, pull=middle)) > aux_loss_max_vio
        low, high = (middle, high) if too_far else (low, middle)
    return replace(drifting, pull=math.sqrt(low * high))


# Fitted, by fit_dynamics, on two published numbers of one case (1B model, 64 routed experts, top-6, 42,000 steps of
# 1152 x 2048 tokens; arXiv 2408.15664 table 2): drift on MaxVio_global 0.04 with the loss-free bias, pull on 0.72 with
# the auxiliary loss at weight 0.001 (only pull * weight is identified; that weight and the learning rate of 1e-3 are
# remembered from the paper, not read again). sequence_noise from its MaxVio_batch of about 0.1, read off a figure.
# Assumed, without a measurement: gate_scale (a sigmoid score spreads by about 0.2 among tokens, a Gumbel variable by
# 1.28) and reinforcement (imbalance grows e-fold in 10,000 steps if nothing holds it).
# The 3B case took no part in the fit, but is a weak test: its batch and learning rate are remembered, and the answer
# hangs on them; whoever chose how drift and pull scale had seen both published numbers. Auxiliary loss, published 0.52:
# 0.51 with both as remembered (1728, 7.8e-4), 0.57 and 0.61 with one of them, 0.70 with those of the 1B case. Without
# the loss, published 0.04: 0.030, 0.033, 0.036, 0.040. docs/decisions/balancing-from-one-case.md.
FITTED = Dynamics(
    drift=0.0059,
    reinforcement=1e-4,
    pull=0.30,
    gate_scale=0.16,
    sequence_noise=1.29,
    learning_rate=1e-3,
    batch_tokens=1152 * 2048,
)
