"""A step's all-to-alls message by message: the fidelity ``exact`` of a scenario.

Legend: G groups, M micro-batches, L MoE layers, R ranks of a group, N nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moesim.describe.hardware import Cluster
from moesim.errors import NotModelledError
from moesim.fabric.algorithms import Algorithm, Direct, Fidelity, Hierarchical, Plan, completion
from moesim.fabric.topology import Topology, topology_of
from moesim.fabric.traffic import Copies, Dedup, Direction, node_bytes, pair_bytes

Floats = NDArray[np.float64]
Ranks = NDArray[np.int64]

MAX_EXCHANGES = 20_000  # of one direction: more would take hours


@dataclass(frozen=True, kw_only=True, eq=False)
class Backwards:
    """An algorithm the other way round: what it sends from i to j goes from j to i, over the same ranks."""

    forwards: Algorithm
    kind: str = "backwards"

    def __call__(self, bytes_RR: Floats, topology: Topology) -> Plan:
        plan = self.forwards(bytes_RR.T, topology)
        phases = tuple(replace(phase, bytes_RR=phase.bytes_RR.T) for phase in plan.phases)
        ranks_R = np.arange(topology.num_ranks)
        # Who forwards from j to i also does from i to j; where nobody does, the sender itself is named.
        itself_RR = np.repeat(ranks_R[:, None], topology.num_ranks, axis=1)
        via_RR = np.where(plan.via_RR.T == itself_RR.T, itself_RR, plan.via_RR.T)
        return Plan(topology=plan.topology, phases=phases, via_RR=via_RR)


def topology_of_group(cluster: Cluster, node_of_rank_R: Ranks, hash_seed: int = 0) -> Topology:
    """The links between the ranks of one group, at the cluster's derates.

    Raises NotModelledError where the group's ranks lie on its nodes unevenly.
    """
    size_N = np.bincount(node_of_rank_R - node_of_rank_R.min())
    num_ranks, in_node = node_of_rank_R.size, int(size_N[0])
    even = np.array_equal(node_of_rank_R - node_of_rank_R.min(), np.arange(num_ranks) // in_node)
    if not even:
        raise NotModelledError("fidelity exact: expert-parallel groups that lie on nodes unevenly are not modelled")
    whole = num_ranks if num_ranks <= in_node else -(-num_ranks // in_node) * in_node
    spine = cluster.derates.get("spine_alltoall")
    return topology_of(
        replace(cluster, ranks_per_node=in_node, num_gpus=whole),
        num_ranks,
        num_planes=cluster.num_planes,
        num_paths=cluster.num_paths,
        spine_fraction=1.0 if spine is None else float(spine),
        hash_seed=hash_seed,
    )


def exchange_finish_s(
    copies: Copies,
    topology: Topology,
    *,
    token_bytes: float,
    dedup: Dedup,
    direction: Direction = "dispatch",
    fidelity: Fidelity = "exact",
) -> Floats:
    """When each rank is done with the dispatches or combines of a step [s], shape (G, M, L, R).

    dedup ``node`` goes by way of the rank that forwards (``Hierarchical``), else every message goes ``Direct``ly.
    Raises NotModelledError for more than MAX_EXCHANGES.
    """
    shape = copies.visits_GMLR.shape
    num_exchanges = int(np.prod(shape[:-1]))
    if num_exchanges > MAX_EXCHANGES:
        what = f"{num_exchanges:,} all-to-alls of a step, more than {MAX_EXCHANGES:,}"
        raise NotModelledError(f"fidelity exact: {what}, are not timed message by message; use port")
    finish = np.zeros(shape).reshape(-1, shape[-1])
    for at, index in enumerate(np.ndindex(*shape[:-1])):
        g, m, layer = index
        one = Copies(
            assignments_GMLR=copies.assignments_GMLR[g : g + 1, m : m + 1, layer : layer + 1],
            visits_GMLR=copies.visits_GMLR[g : g + 1, m : m + 1, layer : layer + 1],
            node_visits_GMLN=copies.node_visits_GMLN[g : g + 1, m : m + 1, layer : layer + 1],
            node_of_rank_R=copies.node_of_rank_R,
        )
        policy: Algorithm = Direct()
        if dedup == "node":
            once_RN = node_bytes(one, token_bytes=token_bytes)[0, 0, 0].astype(np.float64)
            policy = Hierarchical(node_bytes_RN=once_RN)
        pairs = "none" if dedup == "none" else "rank"
        sent_RR = pair_bytes(one, token_bytes=token_bytes, dedup=pairs, direction=direction)[0, 0, 0]  # type: ignore[arg-type]
        mover = Backwards(forwards=policy) if direction == "combine" and dedup == "node" else policy
        finish[at] = completion(mover, sent_RR, topology, fidelity=fidelity).finish_R  # type: ignore[arg-type]
    return finish.reshape(shape)
