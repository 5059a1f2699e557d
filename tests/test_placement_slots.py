"""Slots, replica choice, prices and maps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moesim.describe.workload import Optimizer
from moesim.errors import InputError
from moesim.placement import LayerPlacements, Placement, RankSlots, contiguous, even_slots, from_placements
from moesim.placement.maps import load_map, map_text, parse_map, save_map
from moesim.placement.price import (
    SlotBytes,
    held_bytes_R,
    migration,
    moved_slots,
    slot_bytes,
    staleness,
)
from moesim.placement.splits import Even, LeastLoaded, Nearest, Split, Uneven, level_fill, share_by_sender_NEN

RANKS = even_slots(8, 4, num_nodes=2)
PLACED = LayerPlacements(
    physical_to_logical_LS=[[0, 1, 2, 3, 0, 4, 0, 5], [0, 1, 2, 3, 4, 5, 5, 5]], num_experts=6, ranks=RANKS
)
LOAD = np.array([[9.0, 1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 1.0, 1.0, 1.0, 1.0, 6.0]])


def test_loads_go_evenly_over_replicas() -> None:
    assert PLACED.num_replicas_LE.tolist() == [[3, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 3]]
    assert PLACED.rank_loads(LOAD).tolist() == [[4.0, 5.0, 7.0, 8.0], [2.0, 2.0, 3.0, 4.0]]
    assert PLACED.rank_loads(LOAD[None])[0] == pytest.approx(PLACED.rank_loads(LOAD))  # any leading axes
    assert PLACED.max_mean(LOAD).tolist() == pytest.approx([8 / 6, 4 / 2.75])
    assert PLACED.slots_of(0) == [[0, 4, 6], [1], [2], [3], [5], [7]]
    assert PLACED.logical_to_physical_LEX()[0, :2].tolist() == [[0, 4, 6], [1, -1, -1]]


def test_a_layout_that_misses_an_expert_or_names_none_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"physical_to_logical\[0\]: must hold every expert; got 'no slot for expert 1'"
    ):
        LayerPlacements(physical_to_logical_LS=[[0, 0, 2, 3]], num_experts=4, ranks=even_slots(4, 2))
    with pytest.raises(InputError, match=r"physical_to_logical\[0\]\[3\]: must name experts 0\.\.3; got 4"):
        LayerPlacements(physical_to_logical_LS=[[0, 1, 2, 4]], num_experts=4, ranks=even_slots(4, 2))
    with pytest.raises(InputError, match="must have 4 slots in each layer"):
        LayerPlacements(physical_to_logical_LS=[[0, 1, 2]], num_experts=3, ranks=even_slots(4, 2))


def test_slots_that_do_not_divide_are_refused_with_the_nearest_that_do() -> None:
    with pytest.raises(InputError, match=r"num_slots: must be a multiple of num_ranks=32; got 260. Nearest: 256, 288"):
        even_slots(260, 32)


def test_one_slot_placements_come_back_as_they_went() -> None:
    mixed = Placement(expert_to_rank_E=np.array([1, 0, 1, 0]), num_ranks=2)
    layers = from_placements([contiguous(4, 2), mixed])
    assert layers.layer(1).expert_to_rank_E.tolist() == [1, 0, 1, 0]
    load = np.array([[1.0, 2.0, 3.0, 4.0]] * 2)
    assert layers.rank_loads(load).tolist() == [[3.0, 7.0], mixed.rank_loads(load[0]).tolist()]
    with pytest.raises(InputError, match="must hold each expert once; got '3 replicas"):
        PLACED.layer(0)


@pytest.mark.parametrize("split", [Even(), Nearest(), LeastLoaded(), Uneven()], ids=str)
def test_every_split_serves_all_of_every_expert_where_it_lives(split: Split) -> None:
    share = split(PLACED, LOAD)
    assert share.sum(axis=2) == pytest.approx(np.ones((2, 6)))
    assert (share[np.swapaxes(PLACED.held_LRE, 1, 2) == 0] == 0).all()
    by_sender = share_by_sender_NEN(PLACED, split, LOAD, 0)
    assert by_sender.sum(axis=2) == pytest.approx(np.ones((2, 6)))
    on_node = share[0].reshape(6, 2, 2).sum(axis=2)
    assert by_sender.mean(axis=0) == pytest.approx(on_node)  # both nodes send the same


def test_the_nearest_replica_is_the_own_ranks_then_the_own_nodes() -> None:
    # Expert 0 of layer 0 lives on ranks 0, 2, 3: rank 1 uses its node's only one.
    assert Nearest()(PLACED, LOAD)[0, 0].tolist() == [0.5, 0.0, 0.25, 0.25]
    assert Nearest(sent_R=(0.0, 1.0, 0.0, 0.0))(PLACED, LOAD)[0, 0].tolist() == [1.0, 0.0, 0.0, 0.0]
    # Expert 5 of layer 1 has one slot on rank 2 and two on rank 3; node 0 splits by slots.
    assert Nearest()(PLACED, LOAD)[1, 5] == pytest.approx([0, 0, 0.25 + 0.5 / 3, 0.25 + 1 / 3])


def test_level_fill_is_water_filling() -> None:
    assert level_fill(np.array([0.0, 2.0, 9.0]), np.ones(3), 4.0).tolist() == [3.0, 1.0, 0.0]
    assert level_fill(np.array([0.0, 0.0]), np.array([1.0, 3.0]), 4.0).tolist() == [1.0, 3.0]
    assert level_fill(np.array([5.0, 7.0]), np.ones(2), 0.0).tolist() == [0.0, 0.0]


def test_uneven_weights_reach_the_least_maximum_of_a_case_solved_by_hand() -> None:
    # Ranks hold {0,1} and {0,2}: loads 4, 1, 3 balance when rank 0 takes 3 of expert 0's 4.
    placed = LayerPlacements(physical_to_logical_LS=[[0, 1, 0, 2]], num_experts=3, ranks=even_slots(4, 2))
    share = Uneven()(placed, [[4.0, 1.0, 3.0]])
    assert share[0, 0] == pytest.approx([0.75, 0.25])
    assert placed.max_mean([[4.0, 1.0, 3.0]], share_LER=share)[0] == pytest.approx(1.0)
    assert placed.max_mean([[4.0, 1.0, 3.0]])[0] == pytest.approx(5 / 4)


def test_uneven_weights_are_never_worse_than_the_other_splits() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        row = np.concatenate((rng.permutation(10), rng.integers(0, 10, 6)))
        placed = LayerPlacements(physical_to_logical_LS=row[None], num_experts=10, ranks=even_slots(16, 4, num_nodes=2))
        load = rng.lognormal(0, 1, (1, 10))
        best = placed.max_mean(load, share_LER=Uneven()(placed, load))[0]
        for split in (Even(), Nearest(), LeastLoaded()):
            assert best <= placed.max_mean(load, share_LER=split(placed, load))[0] * (1 + 1e-6)


def test_a_slot_costs_weights_and_in_training_gradients_and_optimizer() -> None:
    assert slot_bytes(100).total_bytes == 200
    assert slot_bytes(100, optimizer=Optimizer()) == SlotBytes(
        weights_bytes=200, gradients_bytes=400, optimizer_bytes=1200
    )
    assert slot_bytes(100, optimizer=Optimizer(), optimizer_shards=4).optimizer_bytes == 300
    assert held_bytes_R(PLACED, slot_bytes(100)).tolist() == [800.0] * 4  # 2 layers x 2 slots x 200


def test_migration_reads_from_the_own_node_first_and_stalls_by_the_busiest_port() -> None:
    before = LayerPlacements(physical_to_logical_LS=[[0, 1, 2, 3]], num_experts=4, ranks=even_slots(4, 4, num_nodes=2))
    after = LayerPlacements(physical_to_logical_LS=[[1, 0, 3, 2]], num_experts=4, ranks=before.ranks)
    cost = migration(before, after, SlotBytes(weights_bytes=10), nic_bytes_per_s=1, nvlink_bytes_per_s=5)
    assert (cost.num_moved_slots, cost.nvlink_bytes, cost.nic_bytes, cost.stall_s) == (4, 40, 0, 2)
    crossed = LayerPlacements(physical_to_logical_LS=[[2, 1, 0, 3]], num_experts=4, ranks=before.ranks)
    cost = migration(before, crossed, SlotBytes(weights_bytes=10), nic_bytes_per_s=1, nvlink_bytes_per_s=5)
    assert (cost.num_moved_slots, cost.nvlink_bytes, cost.nic_bytes, cost.stall_s) == (2, 0, 20, 10)
    state = SlotBytes(weights_bytes=10, optimizer_bytes=30)
    assert migration(before, crossed, state, nic_bytes_per_s=1, nvlink_bytes_per_s=5, with_state=True).stall_s == 40


def test_slots_swapped_inside_a_rank_do_not_move() -> None:
    turned = LayerPlacements(
        physical_to_logical_LS=PLACED.physical_to_logical_LS.reshape(2, 4, 2)[:, :, ::-1].reshape(2, 8),
        num_experts=6,
        ranks=RANKS,
    )
    assert moved_slots(PLACED, turned).tolist() == [0, 0]
    with pytest.raises(InputError, match="previous: must have layers, ranks and experts"):
        moved_slots(from_placements([contiguous(4, 2)]), PLACED)


def test_a_layout_ages_as_the_load_drifts() -> None:
    placed = from_placements([contiguous(4, 2)])
    assert staleness(placed, [[[1.0, 1, 1, 1]], [[2.0, 2, 1, 1]], [[4.0, 0, 0, 0]]]).tolist() == pytest.approx(
        np.array([[1.0], [4 / 3], [2.0]])
    )


@pytest.mark.parametrize("form", ["physical_to_logical_map", "layer_list"])
def test_maps_come_back_as_they_went(form: str, tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    save_map(path, PLACED, form=form)  # type: ignore[arg-type]
    again = load_map(path, num_layers=2, num_experts=6, ranks=RANKS)
    assert again.physical_to_logical_LS.tolist() == PLACED.physical_to_logical_LS.tolist()


def test_expert_to_rank_comes_back_as_it_went_and_one_row_stands_for_all_layers() -> None:
    ranks = even_slots(4, 2)
    placed = parse_map({"expert_to_rank": [1, 0, 1, 0]}, "m", num_layers=3, num_experts=4, ranks=ranks)
    assert json.loads(map_text(placed, form="expert_to_rank")) == {"expert_to_rank": [[1, 0, 1, 0]] * 3}
    assert placed.physical_to_logical_LS.tolist() == [[1, 3, 0, 2]] * 3


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([1], r"m\.json: must be a mapping"),
        ({"map": [0]}, "must hold exactly one of physical_to_logical_map"),
        ({"physical_to_logical_map": [[0, 1, 2]]}, r"m\.json: physical_to_logical_map\[0\]: must have 4 slots; got 3"),
        ({"physical_to_logical_map": [[0, 1, 2, 9]]}, r"\[0\]\[3\]: must name experts 0\.\.2; got 9"),
        ({"physical_to_logical_map": [[0, 1, 1, 0]]}, r"each of the 3 experts; got 'no slot for expert 2'"),
        ({"physical_to_logical_map": [[0, 0, 1, 2]]}, "must hold no expert twice on a rank; got 'expert 0 on rank 0'"),
        ({"physical_to_logical_map": [[0, 1, 2, 0]] * 2}, "must have 1 layers; got 2"),
        ({"physical_to_logical_map": [[0, 1, 2, 0.5]]}, "must be a list of whole numbers"),
        ({"physical_to_logical_map": []}, "must be a non-empty list"),
        ({"expert_to_rank": [0, 1]}, r"expert_to_rank\[0\]: must have 3 experts; got 2"),
        ({"expert_to_rank": [0, 1, 5]}, r"must name ranks 0\.\.1; got 5"),
        ({"expert_to_rank": [0, 1, 1]}, "must put 2 experts on rank 0; got 1"),
        ({"layer_list": [{"layer_id": 1, "device_list": []}]}, r"layer_list\[1\]\.device_list: must be a non-empty"),
        (
            {"layer_list": [{"layer_id": 0, "device_list": [{"device_id": 0, "device_expert": [0, 1]}]}]},
            "must have 2 devices",
        ),
    ],
)
def test_a_bad_map_is_refused_by_name(raw: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_map(raw, "m.json", num_layers=1, num_experts=3, ranks=even_slots(4, 2), allow_duplicates=False)


def test_unlike_ranks_are_checked_at_birth() -> None:
    with pytest.raises(InputError, match=r"placement\.ranks: speed: must be positive"):
        RankSlots(num_slots_R=[1, 1], speed_R=[1, 0], node_of_rank_R=[0, 0])
    with pytest.raises(InputError, match="must number the nodes"):
        RankSlots(num_slots_R=[1, 1], speed_R=[1, 1], node_of_rank_R=[0, 2])
