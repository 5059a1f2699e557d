"""What messages between ranks pass: links with a rate, and the links of each pair's route.

Legend: R ranks, F flows, J links, Q rails (a rank's position on its node), P links of a route (padded with -1).

Links, in this order: nvlink_out, nvlink_in, nic_out, nic_in, one of each per rank; with ``spine`` then leaf_up and
leaf_down, ordered by rail, plane and path. docs/model.md#topology.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.describe.checks import check_choice, check_number, check_whole
from moesim.describe.hardware import Cluster, CrossRail
from moesim.errors import check
from moesim.fabric.ports import rate

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]
Ranks = NDArray[np.int64]

PORTS = ("nvlink_out", "nvlink_in", "nic_out", "nic_in")
ROUTE_LINKS = 4  # the longest route: over NVLink to another rail's NIC, or by NIC, leaf up, leaf down, NIC


class Routes(NamedTuple):
    """The links that each flow passes (F, P), -1 where its route is shorter, and its latency [s] (F,)."""

    link_FP: Ints
    latency_F: Floats


@dataclass(frozen=True, kw_only=True, eq=False)
class Topology:
    """Links between num_ranks ranks, consecutive ones on nodes of ranks_per_node.

    cross_rail: ``pxn`` a message for another rail hops by NVLink to the rank of that rail, whose NIC sends it; where
    the sender's node has no such rank, and always with ``direct``, the sender's own NIC sends it; ``spine`` as direct,
    through the links of the two rails' leaves. num_planes: each NIC is that many ports, each on a fabric of its own;
    num_paths: links from a leaf to the spine, per plane. A pair of ranks uses one plane and one path, drawn by a hash
    of the pair and ``hash_seed``. rate_bytes_per_s_J may hold zeros (a dead link) and infinities.
    """

    num_ranks: int
    ranks_per_node: int
    cross_rail: CrossRail
    rate_bytes_per_s_J: Floats
    latency_intra_s: float
    latency_inter_s: float
    num_planes: int = 1
    num_paths: int = 1
    hash_seed: int = 0
    extra_latency_s_R: Floats | None = None  # added to every message that a rank sends

    def __post_init__(self) -> None:
        for name in ("num_ranks", "ranks_per_node", "num_planes", "num_paths"):
            check_whole("topology", name, getattr(self, name))
        check_choice("topology", "cross_rail", self.cross_rail, get_args(CrossRail))
        for name in ("latency_intra_s", "latency_inter_s"):
            check_number("topology", name, getattr(self, name))
            check(getattr(self, name) >= 0, "topology", name, "must not be negative", getattr(self, name))
        rates, num_links = self.rate_bytes_per_s_J, self.first_leaf_down + self._num_leaf_links
        check(
            rates.shape == (num_links,), "topology", "rate_bytes_per_s_J", f"must hold {num_links} links", rates.shape
        )
        bad = np.flatnonzero(~(rates >= 0))
        check(bad.size == 0, "topology", "rate_bytes_per_s_J", "must not be negative or NaN", self.names(bad))
        extra = self.extra_latency_s_R
        if extra is not None:
            check(
                extra.shape == (self.num_ranks,),
                "topology",
                "extra_latency_s_R",
                "must hold one each rank",
                extra.shape,
            )
            check(bool((extra >= 0).all()), "topology", "extra_latency_s_R", "must not be negative", extra.tolist())

    @property
    def num_nodes(self) -> int:
        return math.ceil(self.num_ranks / self.ranks_per_node)

    @property
    def _num_leaf_links(self) -> int:
        return self.ranks_per_node * self.num_planes * self.num_paths if self.cross_rail == "spine" else 0

    @property
    def first_leaf_up(self) -> int:
        """The first leaf_up link; NICs' links come before, num_planes of each."""
        return self.num_ranks * (2 + 2 * self.num_planes)

    @property
    def first_leaf_down(self) -> int:
        return self.first_leaf_up + self._num_leaf_links

    def nvlink_out(self, rank: Ranks) -> Ranks:
        return rank

    def nvlink_in(self, rank: Ranks) -> Ranks:
        return rank + self.num_ranks

    def nic_out(self, rank: Ranks, plane: Ranks) -> Ranks:
        return rank * self.num_planes + plane + 2 * self.num_ranks

    def nic_in(self, rank: Ranks, plane: Ranks) -> Ranks:
        return rank * self.num_planes + plane + (2 + self.num_planes) * self.num_ranks

    def link_name(self, link: int) -> str:
        """A link in words: ``nic_out of rank 12``, ``leaf_up of rail 3``; plane and path where there are several."""
        assert 0 <= link < self.rate_bytes_per_s_J.size, link
        plane = path = 0
        if link < 2 * self.num_ranks:
            port, rank = divmod(link, self.num_ranks)
            return f"{PORTS[port]} of rank {rank}"
        if link < self.first_leaf_up:
            port, inside = divmod(link - 2 * self.num_ranks, self.num_ranks * self.num_planes)
            rank, plane = divmod(inside, self.num_planes)
            name = f"{PORTS[2 + port]} of rank {rank}"
        else:
            down, inside = divmod(link - self.first_leaf_up, self._num_leaf_links)
            rail, inside = divmod(inside, self.num_planes * self.num_paths)
            plane, path = divmod(inside, self.num_paths)
            name = f"{'leaf_down' if down else 'leaf_up'} of rail {rail}"
        name += f", plane {plane}" if self.num_planes > 1 else ""
        return name + (f", path {path}" if self.num_paths > 1 and link >= self.first_leaf_up else "")

    def names(self, links: ArrayLike, at_most: int = 4) -> str:
        """The names of some links, the first few of many."""
        found = np.asarray(links).ravel()
        text = ", ".join(self.link_name(int(link)) for link in found[:at_most])
        return text + (f" and {found.size - at_most} more" if found.size > at_most else "")

    def routes(self, source_F: ArrayLike, target_F: ArrayLike) -> Routes:
        """The route of each message from a source rank to another, target rank. Raises InputError for unknown ranks.

        >>> from moesim.catalog.hardware import load_cluster
        >>> topology = topology_of(load_cluster("h100-8x-ib400"), 16)
        >>> [topology.link_name(link) for link in topology.routes([0], [9]).link_FP[0]]
        ['nvlink_out of rank 0', 'nvlink_in of rank 1', 'nic_out of rank 1', 'nic_in of rank 9']
        """
        source, target = np.asarray(source_F, np.int64), np.asarray(target_F, np.int64)
        for name, ranks in (("source", source), ("target", target)):
            strange = np.unique(ranks[(ranks < 0) | (ranks >= self.num_ranks)])
            rule = f"must be one of the topology's {self.num_ranks} ranks"
            check(strange.size == 0, "flows", name, rule, strange.tolist())
        here = np.unique(source[source == target])
        check(here.size == 0, "flows", "target", "must differ from source: a local copy crosses no link", here.tolist())

        node, rail = source // self.ranks_per_node, source % self.ranks_per_node
        target_rail = target % self.ranks_per_node
        same_node, same_rail = node == target // self.ranks_per_node, rail == target_rail
        plane, path = self._hashed(source, target)
        carrier = source  # the rank whose NIC sends
        hops = np.zeros_like(same_node)
        if self.cross_rail == "pxn":
            peer = node * self.ranks_per_node + target_rail
            hops = ~same_node & ~same_rail & (peer < self.num_ranks)
            carrier = np.where(hops, peer, source)
        climbs = ~same_node & ~same_rail & (self.cross_rail == "spine")
        leaf = plane * self.num_paths + path
        per_rail = self.num_planes * self.num_paths

        link_FP = np.full((source.size, ROUTE_LINKS), -1, np.int32)
        link_FP[:, 0] = np.where(same_node | hops, self.nvlink_out(source), self.nic_out(source, plane))
        link_FP[:, 1] = np.where(same_node, self.nvlink_in(target), self.nic_in(target, plane))
        link_FP[hops, 1] = self.nvlink_in(carrier)[hops]
        link_FP[hops, 2] = self.nic_out(carrier, plane)[hops]
        link_FP[hops, 3] = self.nic_in(target, plane)[hops]
        link_FP[climbs, 1] = (self.first_leaf_up + rail * per_rail + leaf)[climbs]
        link_FP[climbs, 2] = (self.first_leaf_down + target_rail * per_rail + leaf)[climbs]
        link_FP[climbs, 3] = self.nic_in(target, plane)[climbs]

        latency_F = np.where(same_node, self.latency_intra_s, self.latency_inter_s + self.latency_intra_s * hops)
        if self.extra_latency_s_R is not None:
            latency_F = latency_F + self.extra_latency_s_R[source]
        return Routes(link_FP=link_FP, latency_F=latency_F)

    def _hashed(
        self, source: NDArray[np.int64], target: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(plane, path) of each pair: what a switch's hash of a message's header decides."""
        if self.num_planes == self.num_paths == 1:
            return np.zeros_like(source), np.zeros_like(source)
        mixed = (source * self.num_ranks + target).astype(np.uint64)
        mixed += np.array([self.hash_seed], np.uint64) * np.uint64(_GOLDEN)  # arrays wrap, scalars warn
        for shift, factor in _SPLITMIX:
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        mixed ^= mixed >> np.uint64(31)
        drawn = (mixed % np.uint64(self.num_planes * self.num_paths)).astype(np.int64)
        return drawn // self.num_paths, drawn % self.num_paths

    def jittered(
        self, rng: np.random.Generator, *, rate_spread: float = 0.0, latency_spread_s: float = 0.0
    ) -> Topology:
        """This topology with links and ranks that differ.

        Rates are divided by exp(|z|·rate_spread), z standard normal per link: links fall short of their rate, never
        exceed it. Each rank's messages start later by an exponential draw of mean latency_spread_s [s].
        """
        slowdown_J = np.exp(np.abs(rng.standard_normal(self.rate_bytes_per_s_J.size)) * rate_spread)
        extra = np.zeros(self.num_ranks) if self.extra_latency_s_R is None else self.extra_latency_s_R
        return replace(
            self,
            rate_bytes_per_s_J=self.rate_bytes_per_s_J / slowdown_J,
            extra_latency_s_R=extra + rng.exponential(latency_spread_s, self.num_ranks),
        )


_GOLDEN = 0x9E3779B97F4A7C15  # constants of splitmix64 (Steele, Lea, Flood, OOPSLA 2014)
_SPLITMIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def topology_of(
    cluster: Cluster,
    num_ranks: int,
    *,
    operation: str | None = "alltoall",
    slow: Mapping[int, float] | None = None,
    num_planes: int = 1,
    num_paths: int = 1,
    spine_fraction: float = 1.0,
    hash_seed: int = 0,
) -> Topology:
    """The links between the first num_ranks ranks of a cluster.

    operation: whose derates NVLink and NICs run at; None is line rate. slow: what fraction of their rate the ports of
    a rank reach, by rank (0 is a dead rank). A leaf's up-links together carry the NICs of the num_ranks ranks on its
    rail over the cluster's oversubscription; spine_fraction is what adaptive routing (or a hash) leaves of that.
    num_planes and num_paths: see Topology. Raises InputError. docs/model.md#topology.

    >>> from moesim.catalog.hardware import load_cluster
    >>> topology_of(load_cluster("h800-8x-ib400"), 64, slow={3: 0.5}).link_name(131)
    'nic_out of rank 3'
    """
    check_whole("topology", "num_ranks", num_ranks)
    for name, number in (("num_planes", num_planes), ("num_paths", num_paths)):
        check_whole("topology", name, number)
    check_number("topology", "spine_fraction", spine_fraction)
    check(spine_fraction >= 0, "topology", "spine_fraction", "must not be negative", spine_fraction)
    speed_R = np.ones(num_ranks)
    for rank, fraction in (slow or {}).items():
        check(0 <= rank < num_ranks, "topology", "slow", f"must name ranks below {num_ranks}", rank)
        check_number("topology", f"slow of rank {rank}", fraction)
        check(fraction >= 0, "topology", f"slow of rank {rank}", "must not be negative", fraction)
        speed_R[rank] = fraction
    if operation is None:
        nvlink, nic = float(cluster.nvlink_bytes_per_s), float(cluster.nic_bytes_per_s)
    else:
        nvlink, nic = rate(cluster, "nvlink", operation), rate(cluster, "nic", operation)
    nic_R = np.repeat(speed_R * nic / num_planes, num_planes)
    rates = [speed_R * nvlink, speed_R * nvlink, nic_R, nic_R]
    if cluster.cross_rail == "spine":
        num_nodes = math.ceil(num_ranks / cluster.ranks_per_node)
        leaf = num_nodes * nic / cluster.oversubscription * spine_fraction / (num_planes * num_paths)
        rates.append(np.full(2 * cluster.ranks_per_node * num_planes * num_paths, leaf))
    return Topology(
        num_ranks=num_ranks,
        ranks_per_node=cluster.ranks_per_node,
        cross_rail=cluster.cross_rail,
        rate_bytes_per_s_J=np.concatenate(rates),
        latency_intra_s=float(cluster.latency_intra_s),
        latency_inter_s=float(cluster.latency_inter_s),
        num_planes=num_planes,
        num_paths=num_paths,
        hash_seed=hash_seed,
    )
