"""Exchanges for comparison with SimGrid, made from seeds: who sends whom how much, over which fabric.

Legend: R ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from fabric_fakes import fabric
from numpy.typing import NDArray

from moesim.describe.hardware import CrossRail
from moesim.fabric.flows import Flows, flows_of, together
from moesim.fabric.topology import Topology
from moesim.seeds import stream

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One exchange over one fabric; ``pattern`` names a function of PATTERNS."""

    pattern: str
    num_ranks: int
    cross_rail: CrossRail
    oversubscription: float = 1.0
    per_node: int = 8
    slow_rank: int | None = None

    @property
    def name(self) -> str:
        spine = f"-{self.oversubscription:g}" if self.cross_rail == "spine" else ""
        nodes = "" if self.per_node == 8 else f"-nodes-of-{self.per_node}"
        slow = "" if self.slow_rank is None else "-slow"
        return f"{self.pattern}-{self.num_ranks}-{self.cross_rail}{spine}{nodes}{slow}"

    def topology(self) -> Topology:
        topology = fabric(self.num_ranks, self.per_node, self.cross_rail, self.oversubscription)
        if self.slow_rank is None:
            return topology
        rates = topology.rate_bytes_per_s_J.copy()
        rates[self.slow_rank : 4 * self.num_ranks : self.num_ranks] *= 0.4
        return replace(topology, rate_bytes_per_s_J=rates)

    def flows(self) -> Flows:
        return PATTERNS[self.pattern](self.num_ranks, stream(0, self.name))


def _uniform(num_ranks: int, rng: np.random.Generator) -> Flows:  # noqa: ARG001
    return flows_of(np.full((num_ranks, num_ranks), 1e6))


def _lognormal_RR(num_ranks: int, rng: np.random.Generator) -> Floats:
    return rng.lognormal(0.0, 1.5, (num_ranks, num_ranks)) * 1e6


def _lognormal(num_ranks: int, rng: np.random.Generator) -> Flows:
    return flows_of(_lognormal_RR(num_ranks, rng))


def _zipf(num_ranks: int, rng: np.random.Generator) -> Flows:
    popularity_R = rng.permutation(1.0 / np.arange(1, num_ranks + 1))
    return flows_of(rng.poisson(4096 * popularity_R / popularity_R.sum(), (num_ranks, num_ranks)) * 7168.0)


def _hot_receiver(num_ranks: int, rng: np.random.Generator) -> Flows:
    bytes_RR = rng.uniform(0.5e6, 1.5e6, (num_ranks, num_ranks))
    bytes_RR[:, num_ranks // 3] *= 20.0
    return flows_of(bytes_RR)


def _hot_node(num_ranks: int, rng: np.random.Generator) -> Flows:
    bytes_RR = rng.uniform(0.5e6, 1.5e6, (num_ranks, num_ranks))
    bytes_RR[:, 8:16] *= 8.0
    return flows_of(bytes_RR)


def _ragged_source(num_ranks: int, rng: np.random.Generator) -> Flows:
    tokens_R = rng.integers(0, 4096, num_ranks)
    return flows_of(rng.multinomial(tokens_R, np.full(num_ranks, 1.0 / num_ranks)) * 14336.0)


def _empty_rows(num_ranks: int, rng: np.random.Generator) -> Flows:
    bytes_RR = _lognormal_RR(num_ranks, rng)
    bytes_RR[rng.permutation(num_ranks)[: num_ranks // 4]] = 0.0
    bytes_RR[:, rng.permutation(num_ranks)[: num_ranks // 8]] = 0.0
    return flows_of(bytes_RR)


def _near_equal(num_ranks: int, rng: np.random.Generator) -> Flows:
    return flows_of(10_000_000.0 + rng.integers(0, 100, (num_ranks, num_ranks)))


def _staggered(num_ranks: int, rng: np.random.Generator) -> Flows:
    return flows_of(_lognormal_RR(num_ranks, rng), rng.exponential(2e-4, num_ranks))


def _overlapping(num_ranks: int, rng: np.random.Generator) -> Flows:
    """A skewed all-to-all, the steps of a ring on each rail's ranks from 0.1 ms on, and two sends."""
    ring_RR = np.zeros((num_ranks, num_ranks))
    ranks = np.arange(num_ranks)
    ring_RR[ranks, (ranks + 8) % num_ranks] = 2e7
    sends_RR = np.zeros((num_ranks, num_ranks))
    sends_RR[0, num_ranks - 1] = sends_RR[1, num_ranks - 2] = 5e7
    exchange = flows_of(_lognormal_RR(num_ranks, rng))
    return together([exchange, flows_of(ring_RR, np.full(num_ranks, 1e-4)), flows_of(sends_RR)])


PATTERNS: dict[str, Callable[[int, np.random.Generator], Flows]] = {
    "uniform": _uniform,
    "lognormal": _lognormal,
    "zipf": _zipf,
    "hot-receiver": _hot_receiver,
    "hot-node": _hot_node,
    "ragged-source": _ragged_source,
    "empty-rows": _empty_rows,
    "near-equal": _near_equal,
    "staggered": _staggered,
    "overlapping": _overlapping,
}

CASES = [
    Case(pattern="uniform", num_ranks=8, cross_rail="pxn"),
    Case(pattern="uniform", num_ranks=16, cross_rail="pxn"),
    Case(pattern="uniform", num_ranks=64, cross_rail="direct"),
    Case(pattern="uniform", num_ranks=128, cross_rail="spine", oversubscription=2.0),
    Case(pattern="lognormal", num_ranks=8, cross_rail="pxn"),
    Case(pattern="lognormal", num_ranks=16, cross_rail="pxn"),
    Case(pattern="lognormal", num_ranks=32, cross_rail="direct"),
    Case(pattern="lognormal", num_ranks=32, cross_rail="pxn", per_node=4),
    Case(pattern="lognormal", num_ranks=12, cross_rail="pxn"),
    Case(pattern="lognormal", num_ranks=64, cross_rail="pxn"),
    Case(pattern="lognormal", num_ranks=64, cross_rail="spine", oversubscription=2.0),
    Case(pattern="lognormal", num_ranks=128, cross_rail="pxn"),
    Case(pattern="lognormal", num_ranks=32, cross_rail="pxn", slow_rank=5),
    Case(pattern="zipf", num_ranks=32, cross_rail="pxn"),
    Case(pattern="zipf", num_ranks=64, cross_rail="spine", oversubscription=2.0),
    Case(pattern="zipf", num_ranks=128, cross_rail="direct"),
    Case(pattern="hot-receiver", num_ranks=16, cross_rail="direct"),
    Case(pattern="hot-receiver", num_ranks=64, cross_rail="pxn"),
    Case(pattern="hot-node", num_ranks=32, cross_rail="spine", oversubscription=4.0),
    Case(pattern="hot-node", num_ranks=64, cross_rail="pxn"),
    Case(pattern="ragged-source", num_ranks=32, cross_rail="pxn"),
    Case(pattern="ragged-source", num_ranks=64, cross_rail="spine", oversubscription=2.0),
    Case(pattern="empty-rows", num_ranks=24, cross_rail="pxn"),
    Case(pattern="empty-rows", num_ranks=64, cross_rail="direct"),
    Case(pattern="near-equal", num_ranks=16, cross_rail="pxn"),
    Case(pattern="near-equal", num_ranks=32, cross_rail="spine", oversubscription=2.0),
    Case(pattern="staggered", num_ranks=16, cross_rail="pxn"),
    Case(pattern="staggered", num_ranks=64, cross_rail="spine", oversubscription=2.0),
    Case(pattern="overlapping", num_ranks=32, cross_rail="pxn"),
    Case(pattern="overlapping", num_ranks=64, cross_rail="spine", oversubscription=2.0),
]
