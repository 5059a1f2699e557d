"""How far the fabric's ``port`` is from ``exact``: seeded exchanges on fabrics of several kinds, error by error.

Legend: R ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.describe.hardware import CrossRail
from moesim.fabric import exact, port
from moesim.fabric.flows import Flows, flows_of, together
from moesim.fabric.patterns import PATTERNS, pattern_RR
from moesim.fabric.topology import Topology
from moesim.seeds import stream
from moesim.units import GIGA, MICRO

Floats = NDArray[np.float64]

SIZES = ((8, 8), (16, 8), (16, 4), (24, 8), (32, 8), (32, 4), (64, 8))  # ranks, ranks of a node
FABRICS: tuple[tuple[CrossRail, float], ...] = (("pxn", 1), ("direct", 1), ("spine", 1), ("spine", 2), ("spine", 4))
SKEWS = (0.3, 0.6, 1.0)
BYTES_PER_RANK = (1e6, 3e8)  # drawn evenly by their logarithm
NVLINK_BYTES_PER_S, NIC_BYTES_PER_S = 450 * GIGA, 50 * GIGA
LATENCY_INTRA_S, LATENCY_INTER_S = 2 * MICRO, 5 * MICRO


@dataclass(frozen=True, kw_only=True, eq=False)
class PortCase:
    """One exchange, or two that meet, on a fabric."""

    pattern: str
    topology: Topology
    oversubscription: float
    exchanges: tuple[Flows, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class PortError:
    """Relative errors of one case: of each exchange's last message, and of each rank's own last message.

    batched: by port_finish_s, for many matrices at once, instead of message by message.
    """

    case: PortCase
    makespan: Floats
    rank: Floats
    batched: bool = False

    @property
    def group(self) -> str:
        """Which row of the table it belongs to."""
        if len(self.case.exchanges) > 1:
            return "two exchanges at once"
        fabric = "oversubscribed spine" if self.case.oversubscription > 1 else "non-blocking"
        return fabric + (", batched" if self.batched else "")


@dataclass(frozen=True, kw_only=True)
class PortErrorSummary:
    """Relative errors over the cases of a group: sizes, except the two worst, which keep their sign."""

    group: str
    num_cases: int
    makespan_median: float
    makespan_lowest: float
    makespan_highest: float
    rank_median: float
    rank_p95: float
    rank_worst: float


def even_fabric(
    num_ranks: int, ranks_per_node: int, cross_rail: CrossRail = "pxn", oversubscription: float = 1.0
) -> Topology:
    """NVLink of 450 GB/s and a NIC of 50 GB/s per rank and direction, 2 and 5 us."""
    num_nodes = -(-num_ranks // ranks_per_node)
    rates = [np.full(2 * num_ranks, NVLINK_BYTES_PER_S), np.full(2 * num_ranks, NIC_BYTES_PER_S)]
    if cross_rail == "spine":
        rates.append(np.full(2 * ranks_per_node, num_nodes * NIC_BYTES_PER_S / oversubscription))
    return Topology(
        num_ranks=num_ranks,
        ranks_per_node=ranks_per_node,
        cross_rail=cross_rail,
        rate_bytes_per_s_J=np.concatenate(rates),
        latency_intra_s=LATENCY_INTRA_S,
        latency_inter_s=LATENCY_INTER_S,
    )


def port_cases(num_cases: int, seed: int = 0, *, at_once: int = 1) -> Iterator[PortCase]:
    """Patterns in turn, sizes, fabrics, skews and bytes drawn; at_once: exchanges that meet, the later ones start
    while the first still runs.
    """
    rng = stream(seed, f"port cases, {at_once} at once")
    for number in range(num_cases):
        pattern = PATTERNS[number % len(PATTERNS)]
        num_ranks, per_node = SIZES[rng.integers(len(SIZES))]
        cross_rail, oversubscription = FABRICS[rng.integers(len(FABRICS))]
        topology = even_fabric(num_ranks, per_node, cross_rail, oversubscription)
        exchanges: list[Flows] = []
        for turn in range(at_once):
            kind = pattern if turn == 0 else PATTERNS[rng.integers(len(PATTERNS))]
            weight_RR = pattern_RR(kind, num_ranks, per_node, rng, float(rng.choice(SKEWS)))
            low, high = np.log(BYTES_PER_RANK)
            bytes_RR = weight_RR / (num_ranks - 1) * np.exp(rng.uniform(low, high))
            start_s = rng.uniform(0.0, 0.8) * port.busiest_link(exchanges[0], topology)[0] if turn else 0.0
            exchanges.append(flows_of(bytes_RR, np.full(num_ranks, start_s)))
        if all(flows.num_flows for flows in exchanges):
            yield PortCase(
                pattern=pattern,
                topology=topology,
                oversubscription=oversubscription,
                exchanges=tuple(exchanges),
            )


def port_errors(case: PortCase) -> list[PortError]:
    """Time a case in both fidelities: message by message, and where shares of ports serve, batched."""
    topology, num_ranks = case.topology, case.topology.num_ranks
    cuts = np.cumsum([flows.num_flows for flows in case.exchanges])[:-1]
    true = np.split(exact.finish_s(together(case.exchanges), topology), cuts)
    found = port.contended_finish_s(case.exchanges, topology)
    pairs = list(zip(case.exchanges, found, true, strict=True))
    true_R = [port.rank_finish_s(flows, asked_F, num_ranks) for flows, _, asked_F in pairs]
    found_R = [port.rank_finish_s(flows, found_F, num_ranks) for flows, found_F, _ in pairs]
    errors = [_error(case, found_R, true_R, batched=False)]
    if len(pairs) == 1 and port.only_ports_bind(topology):
        flows = case.exchanges[0]
        bytes_RR = np.zeros((num_ranks, num_ranks))
        bytes_RR[flows.source_F, flows.target_F] = flows.bytes_F
        errors.append(_error(case, [port.port_finish_s(bytes_RR, topology)], true_R, batched=True))
    return errors


def _error(case: PortCase, found_R: Sequence[Floats], true_R: Sequence[Floats], *, batched: bool) -> PortError:
    pairs = list(zip(found_R, true_R, strict=True))
    return PortError(
        case=case,
        makespan=np.array([found.max() / true.max() - 1 for found, true in pairs]),
        rank=np.concatenate([found[true > 0] / true[true > 0] - 1 for found, true in pairs]),
        batched=batched,
    )


def summarise_errors(errors: Sequence[PortError]) -> list[PortErrorSummary]:
    """One summary for each group, in the order of their first case."""
    groups: dict[str, list[PortError]] = {}
    for error in errors:
        groups.setdefault(error.group, []).append(error)
    return [_summary(group, members) for group, members in groups.items()]


def _summary(group: str, members: Sequence[PortError]) -> PortErrorSummary:
    makespan = np.concatenate([error.makespan for error in members])
    rank = np.abs(np.concatenate([error.rank for error in members]))
    return PortErrorSummary(
        group=group,
        num_cases=len(members),
        makespan_median=float(np.median(np.abs(makespan))),
        makespan_lowest=float(makespan.min()),
        makespan_highest=float(makespan.max()),
        rank_median=float(np.median(rank)),
        rank_p95=float(np.quantile(rank, 0.95)),
        rank_worst=float(rank.max()),
    )


def worst_cases(errors: Sequence[PortError], count: int = 3) -> list[dict[str, Any]]:
    """The cases whose last message is furthest off, for a reader."""
    worst = sorted(errors, key=lambda error: -float(np.abs(error.makespan).max()))[:count]
    return [
        {
            "pattern": error.case.pattern,
            "ranks": error.case.topology.num_ranks,
            "per_node": error.case.topology.ranks_per_node,
            "cross_rail": error.case.topology.cross_rail,
            "oversubscription": error.case.oversubscription,
            "error": float(error.makespan[np.abs(error.makespan).argmax()]),
        }
        for error in worst
    ]
