"""What a rank's ports carry per second: NVLink and NIC, out and in, after measured derates.

Legend: R ranks of one expert-parallel group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.describe.hardware import Cluster
from moesim.errors import check

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Ports:
    """Rates of every rank's four ports [bytes/s], shape (R,) or (1,) when all ranks are alike, and latencies [s]."""

    nvlink_out_bytes_per_s_R: Floats
    nvlink_in_bytes_per_s_R: Floats
    nic_out_bytes_per_s_R: Floats
    nic_in_bytes_per_s_R: Floats
    latency_intra_s: float
    latency_inter_s: float

    def __post_init__(self) -> None:
        for tier in ("nvlink_out", "nvlink_in", "nic_out", "nic_in"):
            rates_R = getattr(self, f"{tier}_bytes_per_s_R")
            check(bool((rates_R > 0).all()), "ports", tier, "must have a positive rate on every rank", rates_R.tolist())


def ports_of(cluster: Cluster, *, operation: str = "alltoall", num_rails: int | None = None) -> Ports:
    """Ports of a cluster whose ranks are all alike, at the rates that an operation achieves.

    operation picks the derates nvlink_<operation> and nic_<operation> of the cluster (1.0 where it names none).
    num_rails: over how many rails a rank spreads its messages (None: all of a node's; 1: its own, as with dedup
    ``node``). NICs slow down by what crosses the spine (``spine_slowdown``). docs/model.md#ports.
    """
    slowdown = spine_slowdown(cluster, num_rails or cluster.ranks_per_node)
    nvlink = np.array([rate(cluster, "nvlink", operation)])
    nic = np.array([rate(cluster, "nic", operation) / slowdown])
    return Ports(
        nvlink_out_bytes_per_s_R=nvlink,
        nvlink_in_bytes_per_s_R=nvlink,
        nic_out_bytes_per_s_R=nic,
        nic_in_bytes_per_s_R=nic,
        latency_intra_s=float(cluster.latency_intra_s),
        latency_inter_s=float(cluster.latency_inter_s),
    )


def rate(cluster: Cluster, tier: str, operation: str) -> float:
    """Achieved bytes/s of one GPU's port, per direction, whatever lies behind it: line rate times the derate
    <tier>_<operation>.
    """
    derate = cluster.derates.get(f"{tier}_{operation}")
    line = cluster.nvlink_bytes_per_s if tier == "nvlink" else cluster.nic_bytes_per_s
    return float(line) * (1.0 if derate is None else float(derate))


def spine_slowdown(cluster: Cluster, num_rails: int) -> float:
    """How many times longer a NIC needs for bytes spread evenly over num_rails rails, its own among them; at least 1.

    Only ``cross_rail: spine`` sends messages for another rail, (num_rails - 1)/num_rails of them, through leaves whose
    up-links carry the NICs' rate / oversubscription, as ``topology`` routes them; ``pxn`` changes rails inside a node,
    and ``direct`` has no inner bottleneck. A rail's leaf is taken to reach every node of the cluster; where it does
    not, messages between groups of nodes cross the spine too, and this is too fast.

    >>> from moesim.catalog.hardware import load_cluster
    >>> spine_slowdown(load_cluster("h100-8x-ib400"), num_rails=8)
    1.0
    """
    if cluster.cross_rail != "spine":
        return 1.0
    left = cluster.derates.get("spine_alltoall")
    up_links = (1.0 if left is None else float(left)) / cluster.oversubscription
    return max(1.0, (num_rails - 1) / num_rails / up_links)
