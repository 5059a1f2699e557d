"""Words of the training report: variants, differences, spreads over seeds, and what titles say of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from moesim.study.training import Comparison, Spread

if TYPE_CHECKING:
    from moesim.study.training import PrecisionRow, TrainingStudy

VARIANT_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "dense": "dense",
        "auxiliary": "auxiliary loss",
        "bias": "loss-free bias",
        "noisy": "noisy top-k",
        "none": "no balancing",
    }
)


def words_of(variant: str) -> str:
    """A variant for a reader."""
    return VARIANT_WORDS.get(variant, variant)


def signed(value: float) -> str:
    """A difference with its sign, a true minus.

    >>> signed(-0.0123)
    '−0.012'
    """
    return f"{value:+.3f}".replace("-", "−")


def gain_title(gain: Comparison) -> str:
    """What the comparison shows, as far as the seeds agree.

    >>> gain_title(Comparison(first="a", other="b", difference=Spread(mean=-0.02, low=-0.03, high=-0.01, num_seeds=3),
    ...     difference_by_domain={}, match_fraction=None, num_matching=0))
    'At equal active FLOPs the MoE ends 0.020 nats per byte below the dense model, in every seed'
    """
    d = gain.difference
    if d.high < 0.0:
        return f"At equal active FLOPs the MoE ends {-d.mean:.3f} nats per byte below the dense model, in every seed"
    if d.low > 0.0:
        return f"At equal active FLOPs the MoE ends {d.mean:.3f} nats per byte above the dense model, in every seed"
    return (
        f"At equal active FLOPs the seeds disagree: the MoE ends {signed(d.low)} to {signed(d.high)} nats per byte "
        "from the dense model"
    )


def collapse_title(study: TrainingStudy) -> str:
    """What became of the experts of the top-1 runs that nothing balances."""
    load = next((load for load in study.collapse if load.variant == "none"), study.collapse[0])
    seeds = len(load.num_collapsed_N)
    fallen = int(((load.num_collapsed_N > 0) | (load.num_dead_NS[:, -1] > 0)).sum())
    how = f"with {words_of(load.variant)}"
    if not fallen:
        share = load.busiest_share_NS[:, -1].max()
        return (
            f"Top-1 {how} did not collapse in any of {seeds} seeds: no expert ends with over {share:.0%} of the tokens"
        )
    dead, most = int(load.num_dead_NS[:, -1].max()), load.busiest_share_NS[:, -1].max()
    return (
        f"Top-1 {how} loses experts in {fallen} of {seeds} seeds: up to {dead} of {load.num_experts} end under 1% of "
        f"the mean, the busiest takes up to {most:.0%} of a layer's tokens"
    )


def flips_title(rows: Sequence[PrecisionRow]) -> str:
    """The most that half precision in the router flips, beside the most with a float32 router."""
    most = {
        in_float32: max((row.flipped.mean for row in rows if row.router_in_float32 == in_float32), default=None)
        for in_float32 in (False, True)
    }
    told = [
        f"{words} {flipped:.2%}"
        for words, flipped in (("half precision in the router", most[False]), ("float32 in it", most[True]))
        if flipped is not None
    ]
    return f"Tokens sent to other experts than in float64: with {', with '.join(told)} at most"


def row_words(row: PrecisionRow) -> str:
    """One way of computing, for a reader."""
    router = "float32" if row.router_in_float32 else row.precision
    return f"{row.precision}, {router} router, {'with' if row.z_loss else 'no'} z-loss"


def told_spread(value: Spread, digits: int = 3) -> str:
    """Mean and extremes over seeds."""
    return f"{value.mean:.{digits}f} ({value.low:.{digits}f} to {value.high:.{digits}f})"
