"""Max-min fair finishes against closed forms, laws, and progressive filling written plainly."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from fabric_fakes import INTER_S, INTRA_S, NIC, NVLINK, fabric
from numpy.typing import ArrayLike

from moesim.catalog.hardware import load_cluster
from moesim.errors import InputError
from moesim.fabric.exact import finish_s
from moesim.fabric.flows import Flows, flows_of, together
from moesim.fabric.topology import Topology, topology_of


def sent(num_ranks: int, messages: dict[tuple[int, int], float]) -> Flows:
    bytes_RR = np.zeros((num_ranks, num_ranks))
    for pair, num_bytes in messages.items():
        bytes_RR[pair] = num_bytes
    return flows_of(bytes_RR)


def route_names(topology: Topology, source: int, target: int) -> list[str]:
    return [topology.link_name(link) for link in topology.routes([source], [target]).link_FP[0] if link >= 0]


def test_a_message_within_a_node_passes_two_nvlink_ports_and_pays_the_short_latency() -> None:
    topology = fabric()
    assert route_names(topology, 3, 5) == ["nvlink_out of rank 3", "nvlink_in of rank 5"]
    assert topology.routes([3], [5]).latency_F.tolist() == [INTRA_S]


def test_pxn_hops_to_the_rank_on_the_targets_rail_and_pays_both_latencies() -> None:
    topology = fabric()
    hop = ["nvlink_out of rank 3", "nvlink_in of rank 5", "nic_out of rank 5", "nic_in of rank 13"]
    assert route_names(topology, 3, 13) == hop
    assert route_names(topology, 3, 11) == ["nic_out of rank 3", "nic_in of rank 11"]
    np.testing.assert_allclose(topology.routes([3, 3], [13, 11]).latency_F, [INTRA_S + INTER_S, INTER_S])


def test_pxn_sends_by_its_own_nic_where_its_node_has_no_rank_on_that_rail() -> None:
    topology = fabric(num_ranks=12)
    assert route_names(topology, 8, 5) == ["nic_out of rank 8", "nic_in of rank 5"]
    assert topology.routes([8], [5]).latency_F.tolist() == [INTER_S]


def test_direct_passes_no_leaf_and_spine_passes_the_leaves_of_both_rails() -> None:
    assert route_names(fabric(cross_rail="direct"), 3, 13) == ["nic_out of rank 3", "nic_in of rank 13"]
    spine = fabric(cross_rail="spine")
    up_and_down = ["nic_out of rank 3", "leaf_up of rail 3", "leaf_down of rail 5", "nic_in of rank 13"]
    assert route_names(spine, 3, 13) == up_and_down
    assert route_names(spine, 3, 11) == ["nic_out of rank 3", "nic_in of rank 11"]


def test_planes_and_paths_hash_each_pair_to_one_port_and_one_up_link() -> None:
    cluster = dataclasses.replace(load_cluster("h100-8x-ib400", num_gpus=64), cross_rail="spine")
    topology = topology_of(cluster, 64, operation=None, num_planes=2, num_paths=4)
    sources, targets = np.nonzero(~np.eye(64, dtype=bool))
    first, again = topology.routes(sources, targets), topology.routes(sources[::-1], targets[::-1])
    np.testing.assert_array_equal(first.link_FP, again.link_FP[::-1])
    other = dataclasses.replace(topology, hash_seed=1).routes(sources, targets)
    assert 0.5 < (first.link_FP != other.link_FP).any(axis=1).mean() < 1.0
    leaves = first.link_FP[(first.link_FP >= topology.first_leaf_up)]
    used = np.bincount(leaves - topology.first_leaf_up, minlength=2 * 8 * 2 * 4)
    assert used.min() > 0
    assert topology.link_name(topology.first_leaf_up) == "leaf_up of rail 0, plane 0, path 0"
    np.testing.assert_allclose(topology.rate_bytes_per_s_J.sum(), 64 * (2 * 450e9 + 4 * 50e9))


def test_a_slow_ranks_ports_run_at_its_fraction_and_derates_come_from_the_cluster() -> None:
    cluster = load_cluster("h800-8x-ib400")
    topology = topology_of(cluster, 16, slow={3: 0.5})
    rate_by_name = {topology.link_name(link): rate for link, rate in enumerate(topology.rate_bytes_per_s_J)}
    assert rate_by_name["nic_out of rank 3"] == rate_by_name["nic_out of rank 2"] / 2
    assert rate_by_name["nic_in of rank 2"] == 50e9 * float(cluster.derates["nic_alltoall"])


def test_jitter_slows_links_and_never_speeds_them_up() -> None:
    topology = fabric()
    uneven = topology.jittered(np.random.default_rng(0), rate_spread=0.1, latency_spread_s=1e-6)
    assert (uneven.rate_bytes_per_s_J < topology.rate_bytes_per_s_J).all()
    assert uneven.routes([0], [1]).latency_F[0] > INTRA_S


def test_bytes_are_rounded_down_and_the_diagonal_and_zeros_are_no_message() -> None:
    flows = flows_of([[9, 2.9, 0.5], [0, 9, 1e6], [3, 0, 9]])
    assert flows.source_F.tolist() == [0, 1, 2]
    assert flows.target_F.tolist() == [1, 2, 0]
    assert flows.bytes_F.tolist() == [2.0, 1e6, 3.0]


@pytest.mark.parametrize(
    ("bytes_RR", "names"),
    [
        ([[0, 1, 2]], ["matrix with a row and a column for each rank"]),
        ([[0, -1], [1, 0]], ["-1 from rank 0 to rank 1"]),
        ([[0, 1], [float("nan"), 0]], ["nan from rank 1 to rank 0"]),
        ([[0, float("inf")], [float("inf"), 0]], ["inf from rank 0 to rank 1 and 1 more"]),
    ],
)
def test_impossible_matrices_are_refused_by_rank(bytes_RR: ArrayLike, names: list[str]) -> None:
    with pytest.raises(InputError) as refused:
        flows_of(bytes_RR)
    assert all(name in str(refused.value) for name in names)


def test_a_missing_participant_is_refused_by_rank() -> None:
    with pytest.raises(InputError, match="nan from rank 2 to rank 0 and 2 more"):
        flows_of(np.ones((4, 4)), [0.0, 0.0, np.nan, 0.0])
    with pytest.raises(InputError, match="must be one of the topology's 16 ranks"):
        finish_s(sent(24, {(0, 20): 1e6}), fabric(16))


def test_a_dead_link_on_a_used_path_is_refused_by_link_and_ranks_and_an_unused_one_is_not() -> None:
    topology = topology_of(load_cluster("h100-8x-ib400"), 16, slow={3: 0.0})
    with pytest.raises(InputError, match=r"nvlink_out of rank 3.*the first from rank 3 to rank 4"):
        finish_s(sent(16, {(0, 1): 1e6, (3, 4): 1e6}), topology)
    assert np.isfinite(finish_s(sent(16, {(0, 1): 1e6}), topology)).all()


def test_one_message_takes_its_latency_and_its_bytes_over_the_narrowest_link() -> None:
    np.testing.assert_allclose(finish_s(sent(16, {(0, 1): 9e6}), fabric()), [INTRA_S + 9e6 / NVLINK], rtol=1e-12)
    np.testing.assert_allclose(finish_s(sent(16, {(0, 8): 9e6}), fabric()), [INTER_S + 9e6 / NIC], rtol=1e-12)


def test_two_messages_on_a_link_share_it_until_the_shorter_is_done() -> None:
    finish = finish_s(sent(16, {(0, 8): 1e8, (8, 1): 5e7, (0, 9): 3e8}), fabric(cross_rail="direct"))
    np.testing.assert_allclose(finish, [INTER_S + 2e8 / NIC, INTER_S + 4e8 / NIC, INTER_S + 5e7 / NIC], rtol=1e-12)


def test_an_incast_takes_all_bytes_over_the_receivers_port() -> None:
    flows = sent(16, {(i, 8): 1e7 for i in range(8)})
    np.testing.assert_allclose(finish_s(flows, fabric(cross_rail="direct")), INTER_S + 8e7 / NIC, rtol=1e-12)


def test_a_uniform_exchange_takes_the_busiest_ports_bytes_over_its_rate() -> None:
    node = finish_s(flows_of(np.full((8, 8), 1e8)), fabric(8))
    np.testing.assert_allclose(node, INTRA_S + 7e8 / NVLINK, rtol=1e-12)
    two = finish_s(flows_of(np.full((16, 16), 1e8)), fabric(16, cross_rail="direct"))
    np.testing.assert_allclose(two.max(), INTER_S + 8e8 / NIC, rtol=1e-12)


def test_one_rank_alone_exchanges_nothing() -> None:
    assert finish_s(flows_of([[5e6]]), fabric(1)).shape == (0,)


def test_infinite_links_leave_the_latencies() -> None:
    topology = dataclasses.replace(fabric(), rate_bytes_per_s_J=np.full(64, np.inf))
    np.testing.assert_allclose(finish_s(sent(16, {(0, 1): 1e9, (0, 9): 1e9}), topology), [2e-6, 7e-6], rtol=1e-12)


def test_messages_without_bytes_arrive_at_once() -> None:
    flows = Flows(
        source_F=np.array([0, 0], np.int32),
        target_F=np.array([1, 1], np.int32),
        bytes_F=np.array([0.0, 9e6]),
        start_F=np.array([1e-3, 0.0]),
    )
    np.testing.assert_allclose(finish_s(flows, fabric()), [1e-3 + INTRA_S, INTRA_S + 9e6 / NVLINK], rtol=1e-12)


def test_a_later_message_shares_from_its_start_on() -> None:
    early, late = sent(16, {(0, 8): 1e8}), flows_of(sent_matrix := np.eye(16, k=8) * 1e8, np.full(16, 1e-3))
    assert late.bytes_F.size == np.count_nonzero(sent_matrix)
    alone = finish_s(early, fabric())[0]
    finish = finish_s(together([early, late]), fabric())
    # 50 MB of the first are gone after 1 ms; the other 50 MB share the NIC, then the late one has it alone.
    np.testing.assert_allclose(finish[0], INTER_S + 3e-3, rtol=1e-9)
    np.testing.assert_allclose(finish[1], INTER_S + 4e-3, rtol=1e-9)
    np.testing.assert_allclose(finish[2:], INTER_S + 1e-3 + 1e8 / NIC, rtol=1e-9)
    assert finish[0] > alone
