"""Collectives of the ranks that share attention: a layer's tensor- and context-parallel group, seconds alone.

Legend: M micro-batches, R ranks of the stage.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.catalog.libraries import load_library
from moesim.cost.layer import LayerCost
from moesim.fabric.collectives import allgather_s, even_alltoall_s, send_s
from moesim.fabric.nccl import NcclRates, nccl_s
from moesim.fabric.ports import rate
from moesim.scenario import Scenario

Floats = NDArray[np.floating]
NCCL_RELEASE = "nccl-2.29"  # whose start of a collective counts, on the GPUs that it was timed on


def gather_s(group_size: int, stride: int, num_bytes: float, scenario: Scenario) -> float:
    """Seconds to gather num_bytes over group_size ranks that lie stride apart: inside one NVLink domain as NCCL's
    protocols do, at the cluster's derate; a ring of rings elsewhere.
    """
    if group_size == 1:
        return 0.0
    cluster = scenario.cluster
    in_node = max(min(group_size, cluster.ranks_per_node // stride), 1)
    factor = load_library(NCCL_RELEASE).value("all_gather", "nccl", cluster.gpu.name, "latency")
    if in_node < group_size or factor is None:
        return float(allgather_s(group_size, in_node, num_bytes, cluster))
    derate = rate(cluster, "nvlink", "allgather") / float(cluster.gpu.nvlink_bytes_per_s)
    rates = NcclRates(derate=min(derate, 1.0), latency_factor=factor)
    return float(nccl_s("all_gather", group_size, num_bytes, cluster.gpu, rates))


def context_s(
    scenario: Scenario, cost: LayerCost, core_attention_s: Floats | float, *, is_backward: bool
) -> Floats | float:
    """Seconds (M, R) by which one pass of attention is longer for its context-parallel exchange; core_attention_s: of
    its scores and weighted values, behind which a ring hides. See docs/model.md#context-parallelism.
    """
    parallel, cluster = scenario.parallel, scenario.cluster
    # Keys and values travel once forward; backward they and their gradients do.
    rounds = 2 if is_backward else 1
    if parallel.cp_kind == "allgather":
        return rounds * gather_s(parallel.cp, parallel.tp, cost.cp_bytes, scenario)
    in_node = max(min(parallel.cp, cluster.ranks_per_node // parallel.tp), 1)
    if parallel.cp_kind == "alltoall":
        return sum(
            float(even_alltoall_s(parallel.cp, in_node, num_bytes, cluster)) for num_bytes in cost.cp_exchange_bytes
        )
    hop_s = float(send_s(rounds * cost.cp_bytes / parallel.cp, in_node == parallel.cp, cluster))
    return (parallel.cp - 1) * np.maximum(hop_s - core_attention_s / parallel.cp, 0.0)
