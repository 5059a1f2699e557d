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


def ports_of(cluster: Cluster, *, operation: str = "alltoall") -> Ports:
    """Ports of a cluster whose ranks are all alike, at the rates that an operation achieves.

    operation picks the derates nvlink_<operation> and nic_<operation> of the cluster (1.0 where it names none). The
    spine: messages that cross it share up-links of 1/oversubscription the NICs' rate. With ``cross_rail: spine`` that
    is every message between different rails, (rails - 1)/rails of an even all-to-all; a NIC then needs as long as its
    spine share does, so its rate falls by max(1, share * oversubscription). With pxn and direct nothing crosses it
    (one rail's NICs meet in a leaf). docs/model.md#ports.
    """
    spine = max(1.0, _spine_share(cluster) * cluster.oversubscription)
    nvlink = np.array([rate(cluster, "nvlink", operation)])
    nic = np.array([rate(cluster, "nic", operation) / spine])
    return Ports(
        nvlink_out_bytes_per_s_R=nvlink,
        nvlink_in_bytes_per_s_R=nvlink,
        nic_out_bytes_per_s_R=nic,
        nic_in_bytes_per_s_R=nic,
        latency_intra_s=float(cluster.latency_intra_s),
        latency_inter_s=float(cluster.latency_inter_s),
    )


def rate(cluster: Cluster, tier: str, operation: str) -> float:
    """Achieved bytes/s of one GPU's port, per direction: line rate times the derate <tier>_<operation>."""
    line = cluster.nvlink_bytes_per_s if tier == "nvlink" else cluster.nic_bytes_per_s
    derate = cluster.derates.get(f"{tier}_{operation}")
    return float(line) * (1.0 if derate is None else float(derate))


def _spine_share(cluster: Cluster) -> float:
    """Share of cross-node bytes that cross the spine when ranks send alike to all rails."""
    if cluster.cross_rail != "spine" or cluster.num_gpus <= cluster.ranks_per_node:
        return 0.0
    return (cluster.ranks_per_node - 1) / cluster.ranks_per_node
