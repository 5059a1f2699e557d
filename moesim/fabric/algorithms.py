"""How software moves an exchange: each algorithm turns bytes between ranks into phases of messages, and is timed.

Legend: R ranks, N nodes (NVLink domains), F flows.

An algorithm is a frozen dataclass that is called with (bytes_RR, topology) and returns a `Plan`. A byte goes from its
sender to its receiver in one leg, or in two by way of a rank that forwards it. docs/model.md#algorithms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.errors import InputError, check, near_match
from moesim.fabric import exact, port
from moesim.fabric.flows import Flows, flows_of, together
from moesim.fabric.topology import Topology
from moesim.units import GIGA

Floats = NDArray[np.float64]
Ranks = NDArray[np.int64]
Fidelity = Literal["exact", "port"]

# What one SM of a communication kernel copies: DeepEP dispatch on one H200 node, 131k tokens a rank (FP8, hidden 7168,
# 4.63 remote copies a token, 7,392 bytes each), 4 to 20 SMs: 70.8 to 15.5 ms, so 15.8 down to 14.5 GB/s.
SM_BYTES_PER_S = 15.0 * GIGA


@dataclass(frozen=True, kw_only=True, eq=False)
class Phase:
    """Messages between ranks, bytes_RR. with_previous: they go along with the phase before, not after it."""

    name: str
    bytes_RR: Floats
    with_previous: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Phases in order on a topology; via_RR[i, j]: the rank that forwards what i sends j, i itself where none does.

    No pair of ranks has messages in two phases.
    """

    topology: Topology
    phases: tuple[Phase, ...]
    via_RR: Ranks

    def flows(self) -> Flows:
        """The messages of all phases."""
        return together([flows_of(phase.bytes_RR) for phase in self.phases])


@dataclass(frozen=True, kw_only=True, eq=False)
class Completion:
    """When an exchange is over. finish_RR[i, j]: when j has what i sent it, NaN where nothing was [s].

    finish_R: when each rank has sent, received and forwarded all it has to; start_R: when it came to the exchange.
    """

    plan: Plan
    finish_RR: Floats
    finish_R: Floats
    start_R: Floats

    @property
    def completion_s(self) -> float:
        return float(self.finish_R.max(initial=0.0))

    @property
    def wait_R(self) -> Floats:
        """What each rank waits for the last one to come: no wire's fault."""
        return self.start_R.max(initial=0.0) - self.start_R

    @property
    def wire_s(self) -> float:
        """From when the last rank has come to the end."""
        return max(self.completion_s - float(self.start_R.max(initial=0.0)), 0.0)


@dataclass(frozen=True, kw_only=True)
class Direct:
    """All messages at once, each on its pair's route: NCCL's all-to-all-v."""

    kind: Literal["direct"] = "direct"

    def __call__(self, bytes_RR: Floats, topology: Topology) -> Plan:
        return Plan(topology=topology, phases=(Phase(name="all at once", bytes_RR=bytes_RR),), via_RR=_itself(topology))


@dataclass(frozen=True, kw_only=True)
class Pairwise:
    """R - 1 rounds: in round k rank i sends rank i + k. A rank starts a round when it is done with the last one.

    MPI's pairwise exchange: Thakur, Rabenseifner, Gropp, IJHPCA 19 (2005).
    """

    kind: Literal["pairwise"] = "pairwise"

    def __call__(self, bytes_RR: Floats, topology: Topology) -> Plan:
        ranks_R = np.arange(topology.num_ranks)
        phases = []
        for step in range(1, topology.num_ranks):
            round_RR = np.zeros_like(bytes_RR)
            targets_R = (ranks_R + step) % topology.num_ranks
            round_RR[ranks_R, targets_R] = bytes_RR[ranks_R, targets_R]
            phases.append(Phase(name=f"round {step}", bytes_RR=round_RR))
        return Plan(topology=topology, phases=tuple(phases), via_RR=_itself(topology))


@dataclass(frozen=True, kw_only=True, eq=False)
class Hierarchical:
    """Over the NIC to the sender's rail of the target's node, from there by NVLink; both tiers at once.

    DeepEP's normal kernels, and its hybrid ones on NVLink domains of 72. node_bytes_RN: what each rank sends each node
    when a token goes there once; without it nothing is deduplicated. num_sms: SMs of the kernel, which bound what a
    rank copies over NVLink; None does not. Source: github.com/deepseek-ai/DeepEP.
    """

    kind: Literal["hierarchical"] = "hierarchical"
    num_sms: int | None = None
    node_bytes_RN: Floats | None = None

    def __call__(self, bytes_RR: Floats, topology: Topology) -> Plan:
        node_R, num_ranks = _nodes(topology), topology.num_ranks
        ranks_R = np.arange(num_ranks)
        start_N = np.arange(topology.num_nodes) * topology.ranks_per_node
        size_N = np.minimum(topology.ranks_per_node, num_ranks - start_N)
        gate_RN = start_N[None, :] + (ranks_R % topology.ranks_per_node)[:, None] % size_N[None, :]
        gate_RR = gate_RN[:, node_R]
        gate_RR = np.where(node_R[:, None] == node_R[None, :], ranks_R[:, None], gate_RR)
        node_RN = self.node_bytes_RN
        if node_RN is None:
            node_RN = np.add.reduceat(bytes_RR, start_N, axis=1)
        shape = (num_ranks, topology.num_nodes)
        check(node_RN.shape == shape, "hierarchical", "node_bytes_RN", f"must be shaped {shape}", node_RN.shape)
        nic_RR, nvlink_RR = np.zeros_like(bytes_RR), np.zeros_like(bytes_RR)
        nic_RR[ranks_R[:, None], gate_RN] = np.where(node_R[:, None] == np.arange(topology.num_nodes), 0.0, node_RN)
        np.add.at(nvlink_RR, (gate_RR, ranks_R[None, :]), bytes_RR)
        np.fill_diagonal(nvlink_RR, 0.0)
        phases = (
            Phase(name="between nodes", bytes_RR=nic_RR),
            Phase(name="inside nodes", bytes_RR=nvlink_RR, with_previous=True),
        )
        # What arrives where it belongs is not forwarded.
        via_RR = np.where(gate_RR == ranks_R[None, :], ranks_R[:, None], gate_RR)
        return Plan(topology=with_sms(topology, self.num_sms), phases=phases, via_RR=via_RR)


@dataclass(frozen=True, kw_only=True)
class TwoStep:
    """First by NVLink to the sender's node's rank of the target's rail, then, all of it there, over that rail's NIC.

    Tutel's two-dimensional hierarchical all-to-all (Hwang et al., MLSys 2023): fewer and larger messages.
    """

    kind: Literal["two_step"] = "two_step"

    def __call__(self, bytes_RR: Floats, topology: Topology) -> Plan:
        node_R, num_ranks = _nodes(topology), topology.num_ranks
        ranks_R = np.arange(num_ranks)
        rail_R = ranks_R % topology.ranks_per_node
        peer_RR = (ranks_R - rail_R)[:, None] + rail_R[None, :]
        peer_RR = np.where(peer_RR < num_ranks, peer_RR, ranks_R[:, None])
        near_RR = node_R[:, None] == node_R[None, :]
        via_RR = np.where(near_RR, ranks_R[:, None], peer_RR)
        inside_RR, between_RR = np.where(near_RR, bytes_RR, 0.0), np.zeros_like(bytes_RR)
        far_RR = np.where(near_RR, 0.0, bytes_RR)
        np.add.at(inside_RR, (ranks_R[:, None], via_RR), far_RR)
        np.add.at(between_RR, (via_RR, ranks_R[None, :]), far_RR)
        np.fill_diagonal(inside_RR, 0.0)
        phases = (Phase(name="inside nodes", bytes_RR=inside_RR), Phase(name="between nodes", bytes_RR=between_RR))
        return Plan(topology=topology, phases=phases, via_RR=via_RR)


@dataclass(frozen=True, kw_only=True)
class LowLatency:
    """One-sided writes by the sender's own NIC, no rank forwards: DeepEP's low-latency kernels.

    Its bytes are to be given without deduplication per node. Source: github.com/deepseek-ai/DeepEP.
    """

    kind: Literal["low_latency"] = "low_latency"

    def __call__(self, bytes_RR: Floats, topology: Topology) -> Plan:
        own = replace(topology, cross_rail="direct") if topology.cross_rail == "pxn" else topology
        return Plan(topology=own, phases=(Phase(name="one-sided", bytes_RR=bytes_RR),), via_RR=_itself(topology))


@dataclass(frozen=True, kw_only=True, eq=False)
class AllGather:
    """Every rank sends all its tokens to all ranks, which keep what they need: Megatron's all-gather dispatcher.

    brought_bytes_R: each rank's tokens; without it the most that it sends to one rank, the least it can be.
    """

    kind: Literal["allgather"] = "allgather"
    brought_bytes_R: Floats | None = None

    def __call__(self, bytes_RR: Floats, topology: Topology) -> Plan:
        most_R = np.where(np.eye(len(bytes_RR), dtype=bool), 0.0, bytes_RR).max(axis=1, initial=0.0)
        brought_R = most_R if self.brought_bytes_R is None else np.asarray(self.brought_bytes_R, np.float64)
        enough = brought_R.shape == most_R.shape and bool((brought_R >= most_R).all())
        check(enough, "allgather", "brought_bytes_R", "must hold at least what each rank sends to one", brought_R.shape)
        gathered_RR = np.repeat(brought_R[:, None], len(bytes_RR), axis=1)
        np.fill_diagonal(gathered_RR, 0.0)
        return Plan(topology=topology, phases=(Phase(name="gather", bytes_RR=gathered_RR),), via_RR=_itself(topology))


Algorithm = Direct | Pairwise | Hierarchical | TwoStep | LowLatency | AllGather
ALGORITHMS: Mapping[str, Algorithm] = MappingProxyType(
    {
        "direct": Direct(),
        "pairwise": Pairwise(),
        "hierarchical": Hierarchical(),
        "two_step": TwoStep(),
        "low_latency": LowLatency(),
        "allgather": AllGather(),
        "hybrid": Hierarchical(),
    }
)


def algorithm_of(name: str) -> Algorithm:
    """The algorithm of a name. Raises InputError, with the nearest name, for an unknown one."""
    if name not in ALGORITHMS:
        raise InputError("alltoall", "algorithm", "is not known", name, near_match(name, ALGORITHMS))
    return ALGORITHMS[name]


def completion(
    algorithm: Algorithm,
    bytes_RR: ArrayLike,
    topology: Topology,
    *,
    fidelity: Fidelity = "port",
    starts: ArrayLike | None = None,
) -> Completion:
    """Time an exchange moved by an algorithm.

    bytes_RR: what rank i sends rank j [bytes]; starts: when each rank begins, (R,), or hands over each message, (R, R)
    with NaN where there is none [s]. Where there are several phases, a rank begins with its first message's start, and
    a phase when the one before is over for it. Raises InputError naming ranks and links.

    >>> from moesim.catalog.hardware import load_cluster
    >>> from moesim.fabric.topology import topology_of
    >>> topology = topology_of(load_cluster("h800-8x-ib400"), 16)
    >>> uniform = np.full((16, 16), 1e6)
    >>> completion(Direct(), uniform, topology).completion_s < completion(TwoStep(), uniform, topology).completion_s
    True
    """
    sent = flows_of(bytes_RR, starts)
    check(len(np.asarray(bytes_RR)) == topology.num_ranks, "alltoall", "bytes", "must match the topology's ranks", None)
    start_R = _starts_of_ranks(sent, topology.num_ranks)
    whole_RR = np.zeros((topology.num_ranks, topology.num_ranks))
    whole_RR[sent.source_F, sent.target_F] = sent.bytes_F
    plan = algorithm(whole_RR, topology)
    leg_RR = _legs(plan, sent, start_R, fidelity)
    finish_RR = _pairs(plan, whole_RR, leg_RR)
    known_RR = np.fmax(np.nan_to_num(leg_RR), np.nan_to_num(finish_RR))
    finish_R = np.maximum(known_RR.max(axis=0, initial=0.0), known_RR.max(axis=1, initial=0.0))
    return Completion(plan=plan, finish_RR=finish_RR, finish_R=finish_R, start_R=start_R)


def with_sms(topology: Topology, num_sms: int | None) -> Topology:
    """The topology when a kernel of so many SMs moves the bytes: NVLink ports no faster than these SMs copy.

    docs/model.md#algorithms.
    """
    if num_sms is None:
        return topology
    check(num_sms > 0, "algorithm", "num_sms", "must be positive", num_sms)
    rate_J = topology.rate_bytes_per_s_J.copy()
    nvlink = slice(0, 2 * topology.num_ranks)
    rate_J[nvlink] = np.minimum(rate_J[nvlink], num_sms * SM_BYTES_PER_S)
    return replace(topology, rate_bytes_per_s_J=rate_J)


def _legs(plan: Plan, sent: Flows, start_R: Floats, fidelity: Fidelity) -> Floats:
    """(R, R) when each leg's last byte arrives, NaN where there is no leg."""
    leg_RR = np.full(plan.via_RR.shape, np.nan)
    finish = exact.finish_s if fidelity == "exact" else port.finish_s
    ready_R = start_R.copy()
    for group in _groups(plan.phases):
        if len(plan.phases) == 1 and np.array_equal(flows_of(group[0].bytes_RR).bytes_F, sent.bytes_F):
            flows = sent  # each message at its own start
        else:
            flows = together([flows_of(phase.bytes_RR, ready_R) for phase in group])
        finish_F = finish(flows, plan.topology)
        leg_RR[flows.source_F, flows.target_F] = finish_F
        ready_R = np.maximum(ready_R, port.rank_finish_s(flows, finish_F, len(ready_R)))
    return leg_RR


def _pairs(plan: Plan, bytes_RR: Floats, leg_RR: Floats) -> Floats:
    """(R, R) when each pair's last byte is where it belongs: after its last leg, and a hop after its first one."""
    targets_R = np.arange(len(bytes_RR))[None, :]
    sources_R = targets_R.T
    last_RR, first_RR = leg_RR[plan.via_RR, targets_R], leg_RR[sources_R, plan.via_RR]
    forwarded_RR = plan.via_RR != sources_R
    both_RR = np.fmax(last_RR, first_RR + plan.topology.latency_intra_s)
    return np.where(bytes_RR > 0, np.where(forwarded_RR, both_RR, last_RR), np.nan)


def _groups(phases: Sequence[Phase]) -> list[list[Phase]]:
    groups: list[list[Phase]] = []
    for phase in phases:
        if phase.with_previous:
            groups[-1].append(phase)
        else:
            groups.append([phase])
    return groups


def _starts_of_ranks(sent: Flows, num_ranks: int) -> Floats:
    """(R,) when each rank first hands something over, 0 for one that sends nothing."""
    start_R = np.full(num_ranks, np.inf)
    np.minimum.at(start_R, sent.source_F, sent.start_F)
    return np.where(np.isfinite(start_R), start_R, 0.0)


def _itself(topology: Topology) -> Ranks:
    return np.repeat(np.arange(topology.num_ranks)[:, None], topology.num_ranks, axis=1)


def _nodes(topology: Topology) -> Ranks:
    return np.arange(topology.num_ranks) // topology.ranks_per_node
