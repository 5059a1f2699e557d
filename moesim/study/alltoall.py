"""One exchange on a cluster: when it is over, what bounds it, where the time goes.

Legend: R ranks, J links.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.describe.hardware import Cluster
from moesim.errors import check
from moesim.fabric.algorithms import Algorithm, Completion, Fidelity, algorithm_of, completion
from moesim.fabric.port import busiest_link, link_bytes_J
from moesim.fabric.topology import Topology, topology_of
from moesim.seeds import stream

Floats = NDArray[np.float64]

OWNER = "alltoall"
LISTED_LINKS = 12
TIERS = ("nvlink", "nic", "spine")


@dataclass(frozen=True, kw_only=True)
class LinkLoad:
    """What a link carries, and how long it needs for it at its rate."""

    link: str
    carried_bytes: float
    busy_s: float


@dataclass(frozen=True, kw_only=True, eq=False)
class TimedExchange:
    """An exchange timed. lower_bound_s: the busiest link at its rate, without latency; bottleneck: that link."""

    algorithm: str
    fidelity: Fidelity
    completed: Completion
    num_messages: int
    total_bytes: float
    lower_bound_s: float
    bottleneck: str
    busiest: tuple[LinkLoad, ...]

    def to_dict(self) -> dict[str, Any]:
        """What ``moesim alltoall --json`` prints as its result."""
        done = self.completed
        return {
            "completion_s": done.completion_s,
            "lower_bound_s": self.lower_bound_s,
            "bottleneck": self.bottleneck,
            "wire_s": done.wire_s,
            "wait_s": float(done.wait_R.max(initial=0.0)),
            "wait_mean_s": float(done.wait_R.mean()),
            "num_messages": self.num_messages,
            "total_bytes": self.total_bytes,
            "rank_finish_s": done.finish_R.tolist(),
            "phases": [phase.name for phase in done.plan.phases],
            "busiest_links": [
                {"link": load.link, "carried_bytes": load.carried_bytes, "busy_s": load.busy_s} for load in self.busiest
            ],
        }


def fabric_of(
    cluster: Cluster,
    num_ranks: int,
    *,
    line_rate: bool = False,
    slow: Mapping[int, float] | None = None,
    rate_spread: float = 0.0,
    latency_spread_s: float = 0.0,
    seed: int = 0,
) -> Topology:
    """The links between a cluster's first num_ranks ranks.

    Rates are derated as the cluster's own file says; where it says nothing they are the line rates, unlike inside a
    step, which assumes some. line_rate: no derates at all. slow: share of its rate that a rank's ports reach, by rank.
    rate_spread, latency_spread_s: jitter, see ``Topology.jittered``. Raises InputError.
    """
    fits = num_ranks <= cluster.num_gpus
    hint = "Name a larger cluster, or --set num_gpus=N"
    check(
        fits,
        OWNER,
        "bytes",
        f"must be between no more ranks than the cluster's {cluster.num_gpus} GPUs",
        num_ranks,
        hint,
    )
    for name, value in (("rate_spread", rate_spread), ("latency_spread_s", latency_spread_s)):
        check(0 <= value < np.inf, OWNER, name, "must be 0 or positive", value)
    stated = {} if line_rate else stated_derates(cluster)
    spine = stated.get("spine_alltoall", 1.0)
    topology = topology_of(
        replace(cluster, derates={name: cluster.derates[name] for name in stated}),
        num_ranks,
        slow=slow,
        num_planes=cluster.num_planes,
        num_paths=cluster.num_paths,
        spine_fraction=spine,
        hash_seed=seed,
    )
    if rate_spread or latency_spread_s:
        jitter = stream(seed, "fabric jitter")
        topology = topology.jittered(jitter, rate_spread=rate_spread, latency_spread_s=latency_spread_s)
    return topology


def stated_derates(cluster: Cluster) -> dict[str, float]:
    """An all-to-all's derates that the cluster's own file gives, by name; none that moesim would assume."""
    names = [f"{tier}_alltoall" for tier in TIERS]
    return {
        name: float(cluster.derates[name])
        for name in names
        if name in cluster.derates and not cluster.derates[name].source.startswith("default:")
    }


def time_exchange(
    bytes_RR: ArrayLike,
    topology: Topology,
    *,
    algorithm: str | Algorithm = "direct",
    fidelity: Fidelity = "exact",
    starts: ArrayLike | None = None,
) -> TimedExchange:
    """Time an exchange: bytes_RR[i, j] from rank i to rank j [bytes], handed over at starts [s] (0 when None).

    Raises InputError naming ranks and links.

    >>> from moesim.catalog.hardware import load_cluster
    >>> uniform = np.full((16, 16), 1e6)
    >>> time_exchange(uniform, fabric_of(load_cluster("h800-8x-ib400"), 16)).bottleneck
    'nic_out of rank 0'
    """
    policy = algorithm_of(algorithm) if isinstance(algorithm, str) else algorithm
    completed = completion(policy, bytes_RR, topology, fidelity=fidelity, starts=starts)
    flows, fabric = completed.plan.flows(), completed.plan.topology
    bound_s, link = busiest_link(flows, fabric)
    sent_RR = np.isfinite(completed.finish_RR)
    return TimedExchange(
        algorithm=policy.kind if not isinstance(algorithm, str) else algorithm,
        fidelity=fidelity,
        completed=completed,
        num_messages=int(sent_RR.sum()),
        total_bytes=float(np.floor(np.asarray(bytes_RR, np.float64))[sent_RR].sum()),
        lower_bound_s=bound_s,
        bottleneck=fabric.link_name(link) if flows.num_flows else "",
        busiest=_busiest(link_bytes_J(flows, fabric), fabric),
    )


def _busiest(carried_J: Floats, topology: Topology) -> tuple[LinkLoad, ...]:
    """The links that need longest, longest first."""
    with np.errstate(divide="ignore", invalid="ignore"):
        busy_J = np.where(carried_J > 0, carried_J / topology.rate_bytes_per_s_J, 0.0)
    order = np.argsort(-busy_J, kind="stable")[:LISTED_LINKS].tolist()
    return tuple(
        LinkLoad(link=topology.link_name(link), carried_bytes=float(carried_J[link]), busy_s=float(busy_J[link]))
        for link in order
        if carried_J[link] > 0
    )
