"""Seconds that collectives take alone: all-to-all by its busiest port, rings by closed forms, one message.

Legend: R ranks of an expert-parallel group, n ranks of a collective, p of them on one node, B bytes of the whole
tensor.

Ports run at the rates after the cluster's derates (``ports``). Contention with other collectives is the caller's.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.describe.hardware import Cluster
from moesim.fabric.ports import Ports, rate
from moesim.fabric.traffic import PortBytes

Floats = NDArray[np.floating]
Reduction = Literal["ring", "tree", "nvls"]


def alltoall_finish_s(port_bytes: PortBytes, ports: Ports) -> Floats:
    """When each rank is done with an all-to-all [s], shape (..., R): its own busiest port, plus that tier's latency.

    NVLink and NIC run side by side, out and in as well; a tier without bytes costs nothing. Within 0.03-1.5 % of
    max-min sharing for the last rank on a non-blocking fabric (field study); too low where a spine is oversubscribed
    and pairs uneven. docs/model.md#busiest-port.
    """
    nvlink_s = np.maximum(
        port_bytes.nvlink_out / ports.nvlink_out_bytes_per_s_R, port_bytes.nvlink_in / ports.nvlink_in_bytes_per_s_R
    )
    nic_s = np.maximum(port_bytes.nic_out / ports.nic_out_bytes_per_s_R, port_bytes.nic_in / ports.nic_in_bytes_per_s_R)
    uses_nvlink = (port_bytes.nvlink_out > 0) | (port_bytes.nvlink_in > 0)
    uses_nic = (port_bytes.nic_out > 0) | (port_bytes.nic_in > 0)
    return np.maximum(
        np.where(uses_nvlink, nvlink_s + ports.latency_intra_s, 0.0),
        np.where(uses_nic, nic_s + ports.latency_inter_s, 0.0),
    )


def alltoall_s(port_bytes: PortBytes, ports: Ports) -> Floats:
    """When the last rank is done [s], shape (...)."""
    return alltoall_finish_s(port_bytes, ports).max(axis=-1)


def even_alltoall_s(group_size: int, ranks_per_node_in_group: int, num_bytes: ArrayLike, cluster: Cluster) -> Floats:
    """All-to-all in which each rank hands 1/n of its num_bytes to each of n ranks, itself included [s].

    NVLink and NIC run side by side, as in ``alltoall_finish_s``. docs/model.md#context-parallelism.
    """
    whole_bytes, in_node = np.asarray(num_bytes, dtype=np.float64), ranks_per_node_in_group
    near_s = (in_node - 1) / group_size * whole_bytes / rate(cluster, "nvlink", "alltoall")
    far_s = (group_size - in_node) / group_size * whole_bytes / rate(cluster, "nic", "alltoall")
    near_s = near_s + float(cluster.latency_intra_s) * (in_node > 1)
    far_s = far_s + float(cluster.latency_inter_s) * (group_size > in_node)
    return np.where(whole_bytes > 0, np.maximum(near_s, far_s), 0.0)


def allgather_s(group_size: int, ranks_per_node_in_group: int, num_bytes: ArrayLike, cluster: Cluster) -> Floats:
    """All-gather of num_bytes in total (each rank brings 1/n of it) [s].

    Ring inside the node and, between nodes, one ring per position in the node, each over its own NIC; the two tiers
    in a row: (N-1)/N * B/p over the NIC, then (p-1)/p * B over NVLink, N = n/p, and one latency per hop. Source: ring
    costs of Thakur, Rabenseifner, Gropp (IJHPCA 19, 2005); the two tiers of BlueConnect (Cho et al., MLSys 2019),
    unpipelined, so an upper bound: a pipelined one takes the longer tier. docs/model.md#ring.
    """
    return _ring_s(group_size, ranks_per_node_in_group, num_bytes, cluster, "allgather")


def reduce_scatter_s(group_size: int, ranks_per_node_in_group: int, num_bytes: ArrayLike, cluster: Cluster) -> Floats:
    """Reduce-scatter of num_bytes per rank (each keeps 1/n of the sum) [s]: as allgather_s, the other way round."""
    return _ring_s(group_size, ranks_per_node_in_group, num_bytes, cluster, "reducescatter")


def allreduce_s(
    group_size: int,
    ranks_per_node_in_group: int,
    num_bytes: ArrayLike,
    cluster: Cluster,
    algorithm: Reduction = "ring",
) -> Floats:
    """All-reduce of num_bytes per rank (every rank keeps the whole sum) [s].

    ``ring``: a reduce-scatter, then an all-gather, both at the all-reduce's own derate. ``tree``: between nodes two
    binary trees, each for half of the bytes: few hops, all bytes twice through every NIC (Sanders, Speck, Träff,
    Parallel Computing 35, 2009; NCCL 2.4). ``nvls``: as tree, and NVLink's switches reduce inside the node: (1 + 1/p) B
    through every port instead of 2 (p-1)/p B (NCCL 2.17). docs/model.md#ring.
    """
    if algorithm == "ring":
        return 2.0 * _ring_s(group_size, ranks_per_node_in_group, num_bytes, cluster, "allreduce")
    in_node = ranks_per_node_in_group
    assert 1 <= in_node <= group_size, "a node holds between one and all ranks of the group"
    whole_bytes = np.asarray(num_bytes, dtype=np.float64)
    nodes = math.ceil(group_size / in_node)
    seconds = np.zeros_like(whole_bytes)
    if in_node > 1 and algorithm == "nvls":
        seconds = seconds + (1 + 1 / in_node) * whole_bytes / rate(cluster, "nvlink", "allreduce")
        seconds = seconds + 2 * float(cluster.latency_intra_s)
    elif in_node > 1:
        seconds = seconds + 2.0 * _ring_s(in_node, in_node, whole_bytes, cluster, "allreduce")
    if nodes > 1:
        seconds = seconds + 2 * whole_bytes / in_node / rate(cluster, "nic", "allreduce")
        seconds = seconds + 2 * math.ceil(math.log2(nodes)) * float(cluster.latency_inter_s)
    return np.where(whole_bytes > 0, seconds, 0.0)


def _ring_s(group_size: int, in_node: int, num_bytes: ArrayLike, cluster: Cluster, operation: str) -> Floats:
    assert 1 <= in_node <= group_size, "a node holds between one and all ranks of the group"
    whole_bytes = np.asarray(num_bytes, dtype=np.float64)
    nodes = math.ceil(group_size / in_node)
    seconds = np.zeros_like(whole_bytes)
    if in_node > 1:
        seconds = seconds + (in_node - 1) / in_node * whole_bytes / rate(cluster, "nvlink", operation)
        seconds = seconds + (in_node - 1) * float(cluster.latency_intra_s)
    if nodes > 1:
        # The catalog has one derate for ring collectives over NICs, named after the all-reduce.
        seconds = seconds + (nodes - 1) / nodes * whole_bytes / in_node / rate(cluster, "nic", "allreduce")
        seconds = seconds + (nodes - 1) * float(cluster.latency_inter_s)
    return np.where(whole_bytes > 0, seconds, 0.0)


def send_s(num_bytes: ArrayLike, same_node: bool, cluster: Cluster) -> Floats:
    """One message from a rank to another [s]: latency plus bytes over the rate; nothing to send takes no time.

    The rate is the all-to-all's achieved one: a pipeline send is, like it, a point-to-point copy.
    """
    message_bytes = np.asarray(num_bytes, dtype=np.float64)
    tier, latency = ("nvlink", cluster.latency_intra_s) if same_node else ("nic", cluster.latency_inter_s)
    seconds = float(latency) + message_bytes / rate(cluster, tier, "alltoall")
    return np.where(message_bytes > 0, seconds, 0.0)
