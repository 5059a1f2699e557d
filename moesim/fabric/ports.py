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


def ports_of(cluster: Cluster, *, operation: str = "alltoall", same_rail: bool = False) -> Ports:
    """Ports of a cluster whose ranks are all alike, at the rates that an operation achieves.

    operation picks the derates nvlink_<operation> and nic_<operation> of the cluster (1.0 where it names none).
    same_rail: every message goes to a rank of its sender's rail, as with dedup ``node``. NICs slow down by what shares
    the spine (``spine_slowdown``). docs/model.md#ports.
    """
    nvlink = np.array([rate(cluster, "nvlink", operation)])
    nic = np.array([rate(cluster, "nic", operation, same_rail=same_rail)])
    return Ports(
        nvlink_out_bytes_per_s_R=nvlink,
        nvlink_in_bytes_per_s_R=nvlink,
        nic_out_bytes_per_s_R=nic,
        nic_in_bytes_per_s_R=nic,
        latency_intra_s=float(cluster.latency_intra_s),
        latency_inter_s=float(cluster.latency_inter_s),
    )


def rate(cluster: Cluster, tier: str, operation: str, *, same_rail: bool = True) -> float:
    """Achieved bytes/s of one GPU's port, per direction: line rate times the derate <tier>_<operation>, over the NIC
    less what an oversubscribed spine takes. Rings and sends stay on their rail; an even all-to-all does not.
    """
    achieved = port_rate(cluster, tier, operation)
    return achieved if tier == "nvlink" else achieved / spine_slowdown(cluster, same_rail=same_rail)


def port_rate(cluster: Cluster, tier: str, operation: str) -> float:
    """Achieved bytes/s of one GPU's port, per direction, whatever lies behind it: line rate times the derate
    <tier>_<operation>.
    """
    derate = cluster.derates.get(f"{tier}_{operation}")
    line = cluster.nvlink_bytes_per_s if tier == "nvlink" else cluster.nic_bytes_per_s
    return float(line) * (1.0 if derate is None else float(derate))


def spine_slowdown(cluster: Cluster, *, same_rail: bool) -> float:
    """How many times longer a NIC needs since up-links carry 1/oversubscription of its leaf's rate; at least 1.

    A NIC needs as long as its bytes that cross the spine do: max(1, their share * oversubscription). ``pxn``: rail
    leaves, and messages change rails inside their node, so none crosses. ``direct``: rail leaves without that hop, so
    whatever is for another rail crosses: (rails - 1)/rails of an even all-to-all. ``spine``: no rails, a leaf serves
    one node, so all that leaves a node crosses. A rail leaf is taken to reach every node of the cluster (one leaf
    group); where it does not, messages between groups cross the spine under pxn too, and this is too fast.

    >>> from moesim.catalog.hardware import load_cluster
    >>> spine_slowdown(load_cluster("h100-8x-ib400"), same_rail=False)
    1.0
    """
    rails = cluster.ranks_per_node
    between_rails = 0.0 if same_rail else (rails - 1) / rails
    share = {"pxn": 0.0, "direct": between_rails, "spine": 1.0}[cluster.cross_rail]
    return max(1.0, share * cluster.oversubscription)
