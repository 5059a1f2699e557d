"""How uneven a load is: Gini, entropy, spread, the hottest and the dead experts. Pure NumPy over the last axis.

Legend: L layers, E experts; ``load_..E`` is any array whose last axis runs over experts (or ranks). Loads need not be
normalised: assignments, tokens or probabilities serve alike. A row without any load has no statistic and is our error.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

ALERT_RATIO = 3.0  # an expert that takes over 3x the mean is worth an alert (a planning convention, not a law)
COLLAPSE_SHARE = 0.5  # of the way from an even share of tokens to all of them: a collapse (a convention too)
DEAD_SHARE_OF_MEAN = 0.01  # an expert below a hundredth of the mean no longer learns (a convention too)


def _checked(load_E: ArrayLike) -> Floats:
    load = np.asarray(load_E, dtype=np.float64)
    assert load.ndim >= 1, "a load needs an axis of experts"
    assert bool((load >= 0).all()), "a load is non-negative"
    assert bool((load.sum(axis=-1) > 0).all()), "a load is not all zero"
    return load


def gini(load_E: ArrayLike) -> Floats:
    """Gini coefficient of each row: 0 all equal, (E-1)/E when one expert takes all.

    Mean absolute difference over twice the mean, by the sorted formula. Shape: the input's without its last axis.

    >>> round(float(gini([0, 0, 0, 1])), 3)
    0.75
    """
    load = np.sort(_checked(load_E), axis=-1)
    size = load.shape[-1]
    signed_position_E = 2.0 * np.arange(1, size + 1) - size - 1
    return np.asarray((load @ signed_position_E) / (size * load.sum(axis=-1)))


def entropy(load_E: ArrayLike, *, normalised: bool = False) -> Floats:
    """Shannon entropy of each row's shares [nats]; normalised divides by ln E (1: even; E = 1 counts as even).

    >>> round(float(entropy([1, 1, 1, 1], normalised=True)), 6)
    1.0
    """
    load = _checked(load_E)
    share = load / load.sum(axis=-1, keepdims=True)
    nats = -(share * np.log(np.where(share > 0, share, 1.0))).sum(axis=-1)
    if not normalised:
        return np.asarray(nats)
    size = load.shape[-1]
    return np.asarray(nats / np.log(size)) if size > 1 else np.ones_like(nats)


def cv(load_E: ArrayLike) -> Floats:
    """Coefficient of variation of each row: standard deviation (over all E, not E-1) over mean."""
    load = _checked(load_E)
    return np.asarray(load.std(axis=-1) / load.mean(axis=-1))


def max_mean(load_E: ArrayLike) -> Floats:
    """Largest load over mean load of each row: the factor by which a barrier waits for the hottest."""
    load = _checked(load_E)
    return np.asarray(load.max(axis=-1) / load.mean(axis=-1))


def max_vio(load_E: ArrayLike) -> Floats:
    """Maximal violation, max/mean - 1, of loss-free balancing (arXiv 2408.15664, section 4.1)."""
    return np.asarray(max_mean(load_E) - 1.0)


def max_vio_global(load_SLE: ArrayLike) -> float:
    """MaxVio of the load summed over steps, mean over layers: lasting imbalance (arXiv 2408.15664, section 4.1)."""
    load = _checked(load_SLE)
    assert load.ndim == 3, "steps, layers, experts"
    return float(max_vio(load.sum(axis=0)).mean())


def max_vio_batch(load_SLE: ArrayLike) -> float:
    """MaxVio of each step's load, mean over steps and layers: what every batch waits for; at least the global one."""
    load = _checked(load_SLE)
    assert load.ndim == 3, "steps, layers, experts"
    return float(max_vio(load).mean())


def num_active_experts(load_E: ArrayLike) -> NDArray[np.int64]:
    """Experts with any load, per row."""
    return np.asarray((_checked(load_E) > 0).sum(axis=-1), dtype=np.int64)


def expected_active_experts(num_experts: int, top_k: int, num_tokens: float) -> float:
    """Distinct experts that num_tokens tokens touch when routing is uniform: E (1 - (1 - k/E)^tokens).

    >>> round(expected_active_experts(128, 8, 16), 1)
    82.4
    """
    return num_experts * (1.0 - (1.0 - top_k / num_experts) ** num_tokens)


@dataclass(frozen=True, kw_only=True)
class LoadAlert:
    """One expert that takes ratio times its layer's mean load."""

    layer: int
    expert: int
    ratio: float


def load_alerts(load_LE: ArrayLike, *, ratio: float = ALERT_RATIO) -> tuple[LoadAlert, ...]:
    """Every (layer, expert) above ratio times its layer's mean, hottest first.

    >>> load_alerts([[1, 1, 1, 1, 12]], ratio=3)
    (LoadAlert(layer=0, expert=4, ratio=3.75),)
    """
    load = np.atleast_2d(_checked(load_LE))
    relative_LE = load / load.mean(axis=-1, keepdims=True)
    layers, experts = np.nonzero(relative_LE > ratio)
    hottest_first = np.argsort(-relative_LE[layers, experts], kind="stable")
    pairs = zip(layers[hottest_first].tolist(), experts[hottest_first].tolist(), strict=True)
    return tuple(LoadAlert(layer=i, expert=e, ratio=float(relative_LE[i, e])) for i, e in pairs)


def dead_experts(load_LE: ArrayLike, *, share_of_mean: float = 0.0) -> tuple[tuple[int, int], ...]:
    """(layer, expert) of every expert with at most share_of_mean times its layer's mean load (0: no load at all)."""
    load = np.atleast_2d(_checked(load_LE))
    layers, experts = np.nonzero(load <= share_of_mean * load.mean(axis=-1, keepdims=True))
    return tuple(zip(layers.tolist(), experts.tolist(), strict=True))


def collapse_from(top_k: int, num_experts: int, share: float = COLLAPSE_SHARE) -> float:
    """The share of all tokens beyond which an expert has taken over: so far from its even share, k/E, to all tokens.

    Few experts of which a token takes several are used by many tokens each: of Mixtral's 8, two a token, every one by
    a quarter when all is even. docs/model.md#load-statistics.

    >>> collapse_from(1, 256), collapse_from(2, 8)
    (0.501953125, 0.625)
    """
    even = top_k / num_experts
    return even + share * (1.0 - even)


def collapse_alerts(load_LE: ArrayLike, *, top_k: int = 1, share: float = COLLAPSE_SHARE) -> tuple[LoadAlert, ...]:
    """Every (layer, expert) that more tokens use than ``collapse_from`` allows, hottest first.

    A token makes top_k assignments and uses an expert once, so an expert's share of tokens is top_k times its share of
    assignments. ratio is over the mean load, as in load_alerts.

    >>> collapse_alerts([[1, 1, 1, 1, 12]])
    (LoadAlert(layer=0, expert=4, ratio=3.75),)
    """
    load = np.atleast_2d(_checked(load_LE))
    num_experts = load.shape[1]
    return load_alerts(load, ratio=collapse_from(top_k, num_experts, share) * num_experts / top_k)


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadStatistics:
    """All statistics of a load, layer by layer, and the experts that stand out.

    hot: over three times the mean; collapsed: taken over, by ``collapse_from``; dead: below a hundredth of the mean.
    """

    gini_L: Floats
    entropy_L: Floats  # 1: even
    cv_L: Floats
    max_mean_L: Floats
    max_vio_L: Floats
    num_active_L: NDArray[np.int64]
    hot: tuple[LoadAlert, ...]
    collapsed: tuple[LoadAlert, ...]
    dead: tuple[tuple[int, int], ...]


def load_statistics(
    load_LE: ArrayLike,
    *,
    top_k: int = 1,
    hot_ratio: float = ALERT_RATIO,
    collapse_share: float = COLLAPSE_SHARE,
    dead_share_of_mean: float = DEAD_SHARE_OF_MEAN,
) -> LoadStatistics:
    """The statistics of load_LE (assignments of each expert); top_k makes shares of assignments shares of tokens.

    >>> load_statistics([[5, 5, 5, 5]]).max_mean_L
    array([1.])
    """
    load = np.atleast_2d(_checked(load_LE))
    return LoadStatistics(
        gini_L=gini(load),
        entropy_L=entropy(load, normalised=True),
        cv_L=cv(load),
        max_mean_L=max_mean(load),
        max_vio_L=max_vio(load),
        num_active_L=num_active_experts(load),
        hot=load_alerts(load, ratio=hot_ratio),
        collapsed=collapse_alerts(load, top_k=top_k, share=collapse_share),
        dead=dead_experts(load, share_of_mean=dead_share_of_mean),
    )
