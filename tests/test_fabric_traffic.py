"""Bytes through ports: against the full byte matrix, the field notes' vectors, and laws."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from moesim.catalog.hardware import load_cluster
from moesim.describe.model import Router
from moesim.describe.workload import Balanced, Lognormal, Multinomial, Popularity, Routing
from moesim.fabric.algorithms import Hierarchical
from moesim.fabric.port import link_bytes_J
from moesim.fabric.topology import topology_of
from moesim.fabric.traffic import (
    Copies,
    CrossRail,
    Dedup,
    PortBytes,
    combine_ports,
    dispatch_ports,
    expected_copies,
    node_bytes,
    pair_bytes,
    rails,
)
from moesim.placement import Placement, contiguous
from moesim.routing.load import ExpertLoad, draw_load
from moesim.routing.popularity import Popularities, popularity_LE
from moesim.routing.sampler import draw_choices
from moesim.routing.visits import visit_probabilities

TOKENS = 4096
HIDDEN_BYTES = 7168.0  # hidden 7168 in FP8
UNEVEN_NODES = np.array([5, 5, 5, 2, 2, 9, 9, 9])


def setting(
    popularity: Popularity,
    *,
    ranks: int,
    experts: int = 256,
    router: Router = Router(top_k=8),  # noqa: B008 (frozen)
    node_of_rank: NDArray[np.int64] | None = None,
    placement: Placement | None = None,
    capacity_factor: float | None = None,
) -> tuple[Copies, Popularities, ExpertLoad]:
    rng = np.random.default_rng(17)
    popularities = popularity_LE(popularity, num_layers=2, num_experts=experts, router=router, rng=rng)
    placement = contiguous(experts, ranks) if placement is None else placement
    load = draw_load(
        popularities,
        Routing(popularity=popularity, capacity_factor=capacity_factor),
        tokens_per_rank=TOKENS,
        num_source_ranks=ranks,
        num_groups=2,
        num_micro_batches=3,
        rng=rng,
    )
    nodes = np.arange(ranks) // 8 if node_of_rank is None else node_of_rank
    copies = expected_copies(
        load.kept_GMLE,
        popularities=popularities,
        visits=visit_probabilities(popularities, placement, nodes),
        placement=placement,
        tokens_per_rank=TOKENS,
        num_source_ranks=ranks,
    )
    return copies, popularities, load


def routed_port_bytes(bytes_RR: NDArray[np.float64], nodes: NDArray[np.int64], cross_rail: CrossRail) -> PortBytes:
    """The plain referee: send every pair's bytes along its route, port by port."""
    size = nodes.size
    rail = rails(nodes)
    at = {(int(nodes[r]), int(rail[r])): r for r in range(size)}
    nvlink_out, nvlink_in, nic_out, nic_in = (np.zeros(size) for _ in range(4))
    for i in range(size):
        for j in range(size):
            if i == j:
                continue
            if nodes[i] == nodes[j]:
                nvlink_out[i] += bytes_RR[i, j]
                nvlink_in[j] += bytes_RR[i, j]
                continue
            carrier = at.get((int(nodes[i]), int(rail[j])), i) if cross_rail == "pxn" else i
            if carrier != i:
                nvlink_out[i] += bytes_RR[i, j]
                nvlink_in[carrier] += bytes_RR[i, j]
            nic_out[carrier] += bytes_RR[i, j]
            nic_in[j] += bytes_RR[i, j]
    return PortBytes(nvlink_out=nvlink_out, nvlink_in=nvlink_in, nic_out=nic_out, nic_in=nic_in)


@pytest.mark.parametrize("cross_rail", ["pxn", "direct"])
@pytest.mark.parametrize("nodes", [np.arange(8) // 4, UNEVEN_NODES, np.zeros(8, dtype=np.int64), np.arange(8)])
@pytest.mark.parametrize("dedup", ["none", "rank"])
def test_port_sums_equal_those_of_the_full_byte_matrix(
    cross_rail: CrossRail, nodes: NDArray[np.int64], dedup: Dedup
) -> None:
    copies, _, _ = setting(Lognormal(gini=0.4), ranks=8, experts=32, router=Router(top_k=4), node_of_rank=nodes)
    received_R = (copies.assignments_GMLR if dedup == "none" else copies.visits_GMLR)[1, 2, 1].astype(np.float64)
    matrix_RR = np.tile(received_R, (8, 1)) * HIDDEN_BYTES
    dispatch = dispatch_ports(copies, token_bytes=HIDDEN_BYTES, dedup=dedup, cross_rail=cross_rail)
    combine = combine_ports(copies, token_bytes=2 * HIDDEN_BYTES, dedup=dedup, cross_rail=cross_rail)
    for fast, slow in (
        (dispatch, routed_port_bytes(matrix_RR, nodes, cross_rail)),
        (combine, routed_port_bytes(2 * matrix_RR.T, nodes, cross_rail)),
    ):
        for port in ("nvlink_out", "nvlink_in", "nic_out", "nic_in"):
            # float32 sums of up to 64 terms
            assert getattr(fast, port)[1, 2, 1] == pytest.approx(getattr(slow, port), rel=1e-5, abs=1.0)


@pytest.mark.parametrize("nodes", [np.arange(8) // 4, UNEVEN_NODES])
def test_node_deduplicated_port_sums_equal_forwarding_token_by_token(nodes: NDArray[np.int64]) -> None:
    router, tokens = Router(top_k=4), 400
    popularities = popularity_LE(
        Multinomial(), num_layers=1, num_experts=32, router=router, rng=np.random.default_rng(0)
    )
    placement, dense = contiguous(32, 8), np.unique(nodes, return_inverse=True)[1]
    rail, size = rails(nodes), np.bincount(dense)
    rank_at = {(int(dense[r]), int(rail[r])): r for r in range(8)}
    nvlink_out, nvlink_in, nic_out, nic_in = (np.zeros(8) for _ in range(4))
    visits, node_visits = np.zeros(8), np.zeros(dense.max() + 1)
    choices = draw_choices(np.zeros(32), router, tokens, np.random.default_rng(1))
    for source in range(8):  # every source sends the same tokens, as the closed form's expectation does
        for row in choices:
            targets = set(placement.expert_to_rank_E[row].tolist())
            for node in {int(dense[t]) for t in targets}:
                gate = source
                if node != dense[source]:
                    gate = rank_at[node, int(rail[source]) % int(size[node])]
                    nic_out[source] += 1
                    nic_in[gate] += 1
                for target in targets:
                    if dense[target] == node and target != gate:
                        nvlink_out[gate] += 1
                        nvlink_in[target] += 1
    for row in choices:
        ranks = np.unique(placement.expert_to_rank_E[row])
        visits[ranks] += 1
        node_visits[np.unique(dense[ranks])] += 1
    copies = Copies(assignments_GMLR=visits, visits_GMLR=visits, node_visits_GMLN=node_visits, node_of_rank_R=dense)
    assert popularities.is_uniform
    ports = dispatch_ports(copies, token_bytes=1.0, dedup="node")
    assert ports.nic_out == pytest.approx(nic_out, rel=1e-6)
    assert ports.nic_in == pytest.approx(nic_in, rel=1e-6)
    assert ports.nvlink_out == pytest.approx(nvlink_out, rel=1e-6)
    assert ports.nvlink_in == pytest.approx(nvlink_in, rel=1e-6)
    back = combine_ports(copies, token_bytes=2.0, dedup="node")
    assert back.nic_in == pytest.approx(2 * nic_out, rel=1e-6)
    assert back.nvlink_out == pytest.approx(2 * nvlink_in, rel=1e-6)


@pytest.mark.parametrize(("ranks", "deduplicated", "naive"), [(64, 136e6, 206e6), (32, 80e6, 176e6)])
def test_cross_node_bytes_of_a_dispatch_match_the_field_notes(ranks: int, deduplicated: float, naive: float) -> None:
    copies, _, _ = setting(Balanced(), ranks=ranks)
    per_node = dispatch_ports(copies, token_bytes=HIDDEN_BYTES, dedup="node").nic_out
    per_assignment = dispatch_ports(copies, token_bytes=HIDDEN_BYTES, dedup="none").nic_out
    assert per_node.max() == pytest.approx(deduplicated, rel=0.006)  # the notes print whole MB
    assert per_assignment.max() == pytest.approx(naive, rel=0.003)
    assert np.ptp(per_node) / per_node.max() < 1e-5


def test_deduplication_never_adds_cross_node_bytes() -> None:
    copies, _, _ = setting(Lognormal(gini=0.3), ranks=64)
    sums = [dispatch_ports(copies, token_bytes=1.0, dedup=dedup).nic_out.sum() for dedup in ("none", "rank", "node")]
    assert sums[0] > sums[1] > sums[2]


@pytest.mark.parametrize("dedup", ["none", "rank", "node"])
def test_one_rank_has_no_traffic(dedup: Dedup) -> None:
    copies, _, _ = setting(Lognormal(gini=0.3), ranks=1, experts=8, router=Router(top_k=2))
    for ports in (
        dispatch_ports(copies, token_bytes=1.0, dedup=dedup),
        combine_ports(copies, token_bytes=1.0, dedup=dedup),
    ):
        for port in (ports.nvlink_out, ports.nvlink_in, ports.nic_out, ports.nic_in):
            assert not port.any()


@pytest.mark.parametrize("dedup", ["none", "rank", "node"])
def test_one_node_uses_no_nic_and_one_rank_per_node_no_nvlink(dedup: Dedup) -> None:
    near, _, _ = setting(Lognormal(gini=0.3), ranks=8, node_of_rank=np.zeros(8, dtype=np.int64))
    far, _, _ = setting(Lognormal(gini=0.3), ranks=8, node_of_rank=np.arange(8))
    for function in (dispatch_ports, combine_ports):
        assert not function(near, token_bytes=1.0, dedup=dedup).nic_out.any()
        assert not function(near, token_bytes=1.0, dedup=dedup).nic_in.any()
        assert not function(far, token_bytes=1.0, dedup=dedup).nvlink_out.any()
        assert not function(far, token_bytes=1.0, dedup=dedup).nvlink_in.any()


@pytest.mark.parametrize("cross_rail", ["pxn", "direct"])
@pytest.mark.parametrize("dedup", ["none", "rank", "node"])
@pytest.mark.parametrize("nodes", [np.arange(8) // 4, UNEVEN_NODES])
def test_bytes_sent_are_bytes_received_on_each_tier(
    cross_rail: CrossRail, dedup: Dedup, nodes: NDArray[np.int64]
) -> None:
    copies, _, _ = setting(Lognormal(gini=0.5), ranks=8, experts=64, node_of_rank=nodes, capacity_factor=1.0)
    for function in (dispatch_ports, combine_ports):
        ports = function(copies, token_bytes=HIDDEN_BYTES, dedup=dedup, cross_rail=cross_rail)
        assert ports.nvlink_out.sum(axis=-1) == pytest.approx(ports.nvlink_in.sum(axis=-1), rel=1e-5)
        assert ports.nic_out.sum(axis=-1) == pytest.approx(ports.nic_in.sum(axis=-1), rel=1e-5)


def test_assignments_sent_are_tokens_times_k_less_the_dropped() -> None:
    copies, _, load = setting(Lognormal(gini=0.4), ranks=16, capacity_factor=1.0)
    sent = copies.assignments_GMLR.sum(dtype=np.float64)
    assert 0.05 < load.drop_fraction < 0.5
    assert sent == pytest.approx(2 * 3 * 2 * TOKENS * 8 * (1 - load.drop_fraction), rel=1e-6)


def test_combine_is_the_dispatch_with_directions_swapped_where_no_rank_forwards() -> None:
    copies, _, _ = setting(Lognormal(gini=0.4), ranks=16)
    out = dispatch_ports(copies, token_bytes=1.0, cross_rail="direct")
    back = combine_ports(copies, token_bytes=2.0, cross_rail="direct")
    assert back.nic_out == pytest.approx(2 * out.nic_in, rel=1e-5)
    assert back.nvlink_in == pytest.approx(2 * out.nvlink_out, rel=1e-5)


def test_a_rank_with_more_load_than_expected_is_visited_more_but_by_no_more_tokens_than_there_are() -> None:
    copies, popularities, _ = setting(Balanced(), ranks=2, experts=8, router=Router(top_k=2))
    placement = contiguous(8, 2)
    visits = visit_probabilities(popularities, placement)
    even = np.full((1, 1, 2, 8), TOKENS * 2 * 2 / 8, dtype=np.float32)
    hot = even * np.array([1.9, 1.9, 1.9, 1.9, 0.1, 0.1, 0.1, 0.1], dtype=np.float32)
    sizes = {"tokens_per_rank": TOKENS, "num_source_ranks": 2}
    for load, low, high in ((even, 0.7857, 0.7858), (hot, 0.93, 1.0)):  # 1 - C(4,2)/C(8,2) = 11/14
        scaled = expected_copies(load, popularities=popularities, visits=visits, placement=placement, **sizes)
        assert low * TOKENS <= scaled.visits_GMLR[0, 0, 0, 0] <= high * TOKENS
    assert copies.visits_GMLR.max() <= TOKENS


def test_uniform_load_ties_all_even_placements() -> None:
    shuffled = Placement(expert_to_rank_E=np.random.default_rng(6).permutation(np.arange(256) % 32), num_ranks=32)
    plain, _, _ = setting(Balanced(), ranks=32)
    mixed, _, _ = setting(Balanced(), ranks=32, placement=shuffled)
    for dedup in ("none", "rank", "node"):
        one, other = (dispatch_ports(copies, token_bytes=1.0, dedup=dedup) for copies in (plain, mixed))  # type: ignore[arg-type]
        assert one.nic_out == pytest.approx(other.nic_out, rel=1e-5)
        assert one.nvlink_in == pytest.approx(other.nvlink_in, rel=1e-5)


@pytest.mark.parametrize("dedup", ["none", "rank"])
@pytest.mark.parametrize("cross_rail", ["pxn", "direct"])
def test_the_explicit_matrix_has_the_closed_forms_port_sums_and_its_transpose_is_the_combine(
    dedup: Dedup, cross_rail: CrossRail
) -> None:
    copies, _, _ = setting(Lognormal(gini=0.4), ranks=16, experts=64, router=Router(top_k=4))
    for direction, closed in (("dispatch", dispatch_ports), ("combine", combine_ports)):
        matrix = pair_bytes(copies, token_bytes=HIDDEN_BYTES, dedup=dedup, direction=direction)  # type: ignore[arg-type]
        slow = routed_port_bytes(matrix[1, 2, 0].astype(np.float64), copies.node_of_rank_R, cross_rail)
        fast = closed(copies, token_bytes=HIDDEN_BYTES, dedup=dedup, cross_rail=cross_rail)
        for port in ("nvlink_out", "nvlink_in", "nic_out", "nic_in"):
            assert getattr(fast, port)[1, 2, 0] == pytest.approx(getattr(slow, port), rel=1e-5, abs=1.0)
    dispatch = pair_bytes(copies, token_bytes=1.0, dedup=dedup)
    assert np.array_equal(
        pair_bytes(copies, token_bytes=1.0, dedup=dedup, direction="combine").swapaxes(-1, -2), dispatch
    )


def test_the_phases_of_a_hierarchical_dispatch_have_the_closed_forms_port_sums() -> None:
    copies, _, _ = setting(Lognormal(gini=0.4), ranks=16, experts=64, router=Router(top_k=4))
    topology = topology_of(load_cluster("h100-8x-ib400"), 16, operation=None)
    sent = pair_bytes(copies, token_bytes=HIDDEN_BYTES)[1, 2, 0].astype(np.float64)
    once = node_bytes(copies, token_bytes=HIDDEN_BYTES)[1, 2, 0].astype(np.float64)
    carried = link_bytes_J(Hierarchical(node_bytes_RN=once)(sent, topology).flows(), topology).reshape(4, 16)
    closed = dispatch_ports(copies, token_bytes=HIDDEN_BYTES, dedup="node")
    for at, port in enumerate(("nvlink_out", "nvlink_in", "nic_out", "nic_in")):
        assert carried[at] == pytest.approx(getattr(closed, port)[1, 2, 0], rel=1e-5, abs=32)  # flows are whole bytes
