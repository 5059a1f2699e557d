"""What is not known exactly: each unknown as a distribution, drawn alike for every question that has it.

Legend: N draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moesim.describe.checks import check_choice, check_number
from moesim.errors import InputError, check
from moesim.seeds import stream

Floats = NDArray[np.float64]
Law = Literal["log-normal", "even", "log-even"]
LAWS: tuple[Law, ...] = ("log-normal", "even", "log-even")
_P90 = NormalDist().inv_cdf(0.9)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A positive number between low and high. log-normal: they are its P10 and P90; even, log-even: nothing lies
    beyond them.

    >>> Spread(low=2.0, high=8.0).at(0.5)
    4.0
    """

    low: float
    high: float
    law: Law = "log-normal"

    def __post_init__(self) -> None:
        check_number("range", "low", self.low)
        check_number("range", "high", self.high)
        check(0 < self.low <= self.high, "range", "", "must be LOW..HIGH, both positive", f"{self.low}..{self.high}")
        check_choice("range", "law", self.law, LAWS)

    def at(self, share: float) -> float:
        """The quantile: below it lies this share (0..1) of the draws."""
        if self.law == "even":
            return self.low + share * (self.high - self.low)
        along = share if self.law == "log-even" else 0.5 + NormalDist().inv_cdf(share) / (2.0 * _P90)
        return float(self.low * (self.high / self.low) ** along)


def spread_of(text: str, owner: str, law: Law = "log-normal") -> Spread:
    """A range as it is typed: ``2..3``, or one number that is known. Raises InputError.

    >>> spread_of("2..3", "--price").high
    3.0
    """
    low, dots, high = text.partition("..")
    try:
        return Spread(low=float(low), high=float(high if dots else low), law=law)
    except (ValueError, InputError):
        raise InputError(owner, "", "must be LOW..HIGH, or one number, positive", text) from None


@dataclass(frozen=True, kw_only=True)
class Unknown:
    """One unknown: its draws, and its P10, P50 and P90. source: where its distribution comes from."""

    name: str
    words: str
    source: str
    drawn_N: Floats
    p10: float
    p50: float
    p90: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the draws."""
        return {name: getattr(self, name) for name in ("name", "words", "source", "p10", "p50", "p90")}


def of_spread(name: str, spread: Spread, num_draws: int, seed: int, *, words: str, source: str) -> Unknown:
    """An unknown with a law of its own."""
    drawn = np.array([spread.at(float(share)) for share in shares(num_draws, seed, name)])
    p10, p50, p90 = (spread.at(share) for share in (0.1, 0.5, 0.9))
    return Unknown(name=name, words=words, source=source, drawn_N=drawn, p10=p10, p50=p50, p90=p90)


def of_sample(
    name: str, sample: Floats, num_draws: int, seed: int, *, words: str, source: str, luck: str = ""
) -> Unknown:
    """An unknown of which a sample is known: linear between the sample's own values, nothing beyond them.

    luck: what two questions must share beside the name to meet the same draws.
    """
    drawn = np.quantile(sample, shares(num_draws, seed, f"{name} {luck}".strip()))
    p10, p50, p90 = map(float, np.quantile(sample, (0.1, 0.5, 0.9)))
    return Unknown(name=name, words=words, source=source, drawn_N=drawn, p10=p10, p50=p50, p90=p90)


def of_numbers(
    name: str, ranked: Mapping[int, float], num_draws: int, seed: int, *, words: str, source: str
) -> Unknown:
    """An unknown that is one of some numbered cases, each as likely; ranked: number to what it does, so that the
    P10, P50 and P90 are the cases whose effect is that.
    """
    order = sorted(ranked, key=lambda number: ranked[number])
    places = [min(int(share * len(order)), len(order) - 1) for share in (0.1, 0.5, 0.9)]
    drawn = np.array(sorted(ranked))[(shares(num_draws, seed, name) * len(order)).astype(int)]
    p10, p50, p90 = (float(order[place]) for place in places)
    return Unknown(name=name, words=words, source=source, drawn_N=drawn.astype(float), p10=p10, p50=p50, p90=p90)


def shares(num_draws: int, seed: int, name: str) -> Floats:
    """num_draws numbers in 0..1, one in each num_draws-th of it, in an order that depends on seed and name alone."""
    rng = stream(seed, f"uncertainty {name}")
    return (rng.permutation(num_draws) + rng.random(num_draws)) / num_draws
