"""Where an all-to-all's time goes: a scenario's dispatch by three algorithms, over message size and over skew.

Wires are timed by the fabric; a kernel's own start is a library's constant (catalog/libraries.yaml).

Legend: G groups, M micro-batches, L MoE layers, R ranks of an expert-parallel group, N nodes, J links.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.catalog.libraries import load_library
from moesim.cost.layer import rank_tokens
from moesim.cost.precision import RECIPES
from moesim.describe.hardware import Cluster
from moesim.errors import NotModelledError, check
from moesim.fabric.algorithms import Algorithm, Direct, Fidelity, Hierarchical, LowLatency
from moesim.fabric.each_message import topology_of_group
from moesim.fabric.nccl import BULK_START_S, LOW_SHARE, LOW_START_S
from moesim.fabric.port import link_bytes_J
from moesim.fabric.topology import PORTS, Topology
from moesim.fabric.traffic import Copies, expected_copies, node_bytes, pair_bytes
from moesim.routing.visits import visit_probabilities
from moesim.scenario import Scenario
from moesim.study.alltoall import TimedExchange, time_exchange
from moesim.timeline.load import step_load

Floats = NDArray[np.float64]
Progress = Callable[[str], None]
Row = tuple[str, str, float | str, float | str | bool, str]  # section, name, x, value, unit

OWNER = "exchange"
ALGORITHMS = ("direct", "hierarchical", "low_latency")
OF_DISPATCHER: Mapping[str, str] = MappingProxyType({"alltoall": "direct", "deepep": "hierarchical"})
TOKENS = (8, 32, 128, 512, 2048, 8192)
GINIS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
MAX_RANKS = 256  # of a group: exact solves of more take minutes


@dataclass(frozen=True, kw_only=True, eq=False)
class DispatchTraffic:
    """One micro-batch's dispatch in the layer whose busiest rank receives most, for one group.

    copies: of shape (1, 1, 1, R); token_bytes: of one copy on the wire; layer: its place in the model.
    """

    copies: Copies
    token_bytes: float
    tokens_per_rank: int
    layer: int

    @property
    def max_mean(self) -> float:
        """Copies that the busiest rank receives, over the mean rank's."""
        received_R = self.copies.visits_GMLR[0, 0, 0]
        return float(received_R.max() / received_R.mean())

    def bytes_of(self, algorithm: str, scale: float = 1.0) -> tuple[Floats, Algorithm]:
        """(bytes_RR, policy): direct and low_latency send a token once for each of its experts, hierarchical once
        to each node and from there once to each rank.
        """
        dedup = "rank" if algorithm == "hierarchical" else "none"
        bytes_RR = pair_bytes(self.copies, token_bytes=self.token_bytes * scale, dedup=dedup)[0, 0, 0]  # type: ignore[arg-type]
        if algorithm == "direct":
            return bytes_RR.astype(np.float64), Direct()
        if algorithm == "low_latency":
            return bytes_RR.astype(np.float64), LowLatency()
        once_RN = node_bytes(self.copies, token_bytes=self.token_bytes * scale)[0, 0, 0].astype(np.float64)
        return bytes_RR.astype(np.float64), Hierarchical(node_bytes_RN=once_RN)


@dataclass(frozen=True, kw_only=True)
class KernelStart:
    """Seconds that a kernel takes before its bytes move, beyond the wires' latency, by a release of a library.

    low_s: the start of NCCL's low-latency protocol, which halves the rate; the faster of the two counts.
    """

    release: str
    start_s: float
    low_s: float | None = None

    def after(self, wire_s: float) -> float:
        """Start and wires together [s].

        >>> KernelStart(release="", start_s=2e-5, low_s=5e-6).after(1e-5)
        2.5e-05
        """
        bulk_s = self.start_s + wire_s
        return bulk_s if self.low_s is None else min(bulk_s, self.low_s + wire_s / LOW_SHARE)


@dataclass(frozen=True, kw_only=True)
class ExchangePoint:
    """One dispatch by one algorithm. x: tokens per rank, or the popularity's Gini coefficient. completion_s: wires
    alone; done_s: with the kernel's start.
    """

    algorithm: str
    x: float
    max_mean: float
    done_s: float
    completion_s: float
    lower_bound_s: float
    bottleneck: str


@dataclass(frozen=True, kw_only=True, eq=False)
class ExchangeStudy:
    """A scenario's dispatch: exact and port by algorithm, and sweeps in port."""

    scenario: Scenario
    traffic: DispatchTraffic
    topology: Topology
    starts: Mapping[str, KernelStart]
    exact: Mapping[str, TimedExchange]
    port: Mapping[str, TimedExchange]
    over_size: tuple[ExchangePoint, ...]
    over_skew: tuple[ExchangePoint, ...]

    @property
    def own(self) -> str:
        """The algorithm of the scenario's dispatcher."""
        return OF_DISPATCHER[self.scenario.routing.dispatcher]

    def done_s(self, algorithm: str) -> float:
        """Kernel's start and wires, by exact [s]."""
        return self.starts[algorithm].after(self.exact[algorithm].completed.completion_s)

    @property
    def fastest(self) -> str:
        """Of the three, by exact, with their kernels' starts."""
        return min(ALGORITHMS, key=self.done_s)

    def port_busy_s(self, algorithm: str) -> dict[str, Floats]:
        """Seconds that each rank's ports are busy at their rate, (R,) by port, planes together."""
        plan = self.exact[algorithm].completed.plan
        num_ranks, planes = plan.topology.num_ranks, plan.topology.num_planes
        with np.errstate(invalid="ignore"):
            busy_J = link_bytes_J(plan.flows(), plan.topology) / plan.topology.rate_bytes_per_s_J
        nvlink, nic = busy_J[: 2 * num_ranks].reshape(2, -1), busy_J[2 * num_ranks : plan.topology.first_leaf_up]
        nic_R = nic.reshape(2, num_ranks, planes).max(axis=-1)
        return dict(zip(PORTS, (*nvlink, *nic_R), strict=True))

    def algorithm_of_size(self) -> list[tuple[int, str]]:
        """(tokens per rank, fastest algorithm) for each size."""
        sizes = sorted({point.x for point in self.over_size})
        points = [[point for point in self.over_size if point.x == size] for size in sizes]
        return [(int(size), min(at, key=lambda p: p.done_s).algorithm) for size, at in zip(sizes, points, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """The results file's ``result``."""
        return {
            "layer": self.traffic.layer,
            "tokens_per_rank": self.traffic.tokens_per_rank,
            "max_mean": self.traffic.max_mean,
            "own_algorithm": self.own,
            "fastest_algorithm": self.fastest,
            "starts": {name: start.__dict__ for name, start in self.starts.items()},
            "exact": {name: timed.to_dict() for name, timed in self.exact.items()},
            "port": {name: timed.to_dict() for name, timed in self.port.items()},
            "over_size": [point.__dict__ for point in self.over_size],
            "over_skew": [point.__dict__ for point in self.over_skew],
        }

    def rows(self) -> list[Row]:
        """The results as rows of a table."""
        rows: list[Row] = []
        for fidelity, found in (("exact", self.exact), ("port", self.port)):
            for name, timed in found.items():
                rows.append((fidelity, name, self.traffic.tokens_per_rank, timed.completed.completion_s, "s"))
        for section, points in (("over_size", self.over_size), ("over_skew", self.over_skew)):
            rows += [(section, point.algorithm, point.x, point.done_s, "s") for point in points]
        return rows


def exchange_study(
    scenario: Scenario,
    *,
    tokens: Sequence[int] = TOKENS,
    ginis: Sequence[float] = GINIS,
    progress: Progress = lambda _: None,
) -> ExchangeStudy:
    """Time a scenario's dispatch in both fidelities, then over tokens per rank and over skew (lognormal) in port.

    Raises NotModelledError for a dense model, one rank, and groups that do not fill nodes evenly.
    """
    progress("the scenario's own dispatch")
    traffic = dispatch_traffic(scenario)
    topology = topology_of_group(scenario.cluster, traffic.copies.node_of_rank_R, scenario.seed)
    starts = kernel_starts(scenario.cluster, topology.num_nodes > 1, scenario.train.precision)
    found: dict[Fidelity, dict[str, TimedExchange]] = {"exact": {}, "port": {}}
    for fidelity, by_name in found.items():
        for name in ALGORITHMS:
            by_name[name] = _timed(traffic, topology, name, fidelity)
    over_size = []
    for count in tokens:
        progress(f"{count:,} tokens per GPU")
        for name in ALGORITHMS:
            timed = _timed(traffic, topology, name, "port", count / traffic.tokens_per_rank)
            over_size.append(_point(timed, starts[name], float(count), traffic))
    over_skew = []
    for gini in ginis:
        progress(f"skew {gini:g}")
        skewed = scenario.with_(popularity="lognormal", gini=gini) if gini else scenario.with_(popularity="balanced")
        other = dispatch_traffic(skewed)
        over_skew += [_point(_timed(other, topology, name, "port"), starts[name], gini, other) for name in ALGORITHMS]
    return ExchangeStudy(
        scenario=scenario,
        traffic=traffic,
        topology=topology,
        starts=starts,
        exact=found["exact"],
        port=found["port"],
        over_size=tuple(over_size),
        over_skew=tuple(over_skew),
    )


def kernel_starts(cluster: Cluster, crosses_nodes: bool, precision: str) -> dict[str, KernelStart]:
    """The start of each algorithm's kernel: NCCL for direct, DeepEP's two kinds (one release, fitted on H200) else.

    A GPU on whose links NCCL was not fitted starts as NCCL's own tuner has it.

    >>> from moesim.catalog.hardware import load_cluster
    >>> round(kernel_starts(load_cluster("h100-8x-ib400"), True, "bf16")["hierarchical"].start_s, 7)
    3.65e-05
    """
    gpu = cluster.gpu.name
    nccl = load_library("nccl-2.27" if gpu.startswith("a100") else "nccl-2.29")
    factor = nccl.value("alltoall", "nccl", gpu, "latency") or 1.0
    starts = {"direct": KernelStart(release=nccl.title, start_s=factor * BULK_START_S, low_s=factor * LOW_START_S)}
    own_s = float(cluster.latency_inter_s if crosses_nodes else cluster.latency_intra_s)  # a fitted start holds it
    for name, release in (("hierarchical", "deepep-sglang-0.5.6"), ("low_latency", "deepep-sglang-0.5.6-low-latency")):
        library = load_library(release)
        fitted_s = library.value(f"dispatch_{precision}", "nic" if crosses_nodes else "nvlink", gpu, "latency")
        assert fitted_s is not None, release
        starts[name] = KernelStart(release=library.title, start_s=max(fitted_s - own_s, 0.0))
    return starts


def dispatch_traffic(scenario: Scenario) -> DispatchTraffic:
    """The forward dispatch of a scenario's first group and micro-batch, in the layer with the busiest rank."""
    parallel, train = scenario.parallel, scenario.train
    if not scenario.model.is_moe or parallel.ep == 1:
        raise NotModelledError("exchange: a model without experts, or with all of them on each GPU, exchanges nothing")
    check(parallel.ep <= MAX_RANKS, OWNER, "ep", f"must not exceed {MAX_RANKS} here", parallel.ep)
    # A step with as few micro-batches as its pipeline allows has the same first one.
    few = min(scenario.num_micro_batches, parallel.pp)
    slim = scenario.with_(global_batch=train.global_batch // scenario.num_micro_batches * few)
    drawn = step_load(slim)
    assert drawn is not None
    first, placed = drawn.first(1, 1), drawn.placed
    stage = next(at for at, held in enumerate(drawn.positions_by_stage) if held)
    ranks_R = scenario.layout.stage_ranks(stage).reshape(-1, parallel.ep, parallel.etp)[0, :, 0]
    node_R = np.unique(ranks_R // scenario.cluster.ranks_per_node, return_inverse=True)[1]
    tokens = int(rank_tokens(parallel, train))
    copies = expected_copies(
        first.kept_GMLS,
        popularities=placed.popularities,
        visits=visit_probabilities(placed.popularities, placed.rank_of_slot, node_R),
        placement=placed.rank_of_slot,
        tokens_per_rank=tokens,
        num_source_ranks=parallel.ep * parallel.etp,
    )
    at = int(copies.visits_GMLR[0, 0].max(axis=-1).argmax())
    one = Copies(
        assignments_GMLR=copies.assignments_GMLR[:, :, at : at + 1],
        visits_GMLR=copies.visits_GMLR[:, :, at : at + 1],
        node_visits_GMLN=copies.node_visits_GMLN[:, :, at : at + 1],
        node_of_rank_R=node_R,
    )
    element_bytes = RECIPES[train.precision].dispatch_element_bytes(scenario.routing.dispatcher)
    return DispatchTraffic(
        copies=one,
        token_bytes=scenario.model.hidden * element_bytes,
        tokens_per_rank=tokens,
        layer=drawn.layers[at],
    )


def _timed(
    traffic: DispatchTraffic, topology: Topology, name: str, fidelity: Fidelity, scale: float = 1.0
) -> TimedExchange:
    bytes_RR, policy = traffic.bytes_of(name, scale)
    return time_exchange(bytes_RR, topology, algorithm=policy, fidelity=fidelity)


def _point(timed: TimedExchange, start: KernelStart, x: float, traffic: DispatchTraffic) -> ExchangePoint:
    return ExchangePoint(
        algorithm=timed.algorithm,
        x=x,
        max_mean=traffic.max_mean,
        done_s=start.after(timed.completed.completion_s),
        completion_s=timed.completed.completion_s,
        lower_bound_s=timed.lower_bound_s,
        bottleneck=timed.bottleneck,
    )
