"""The placement study: bounds, prices, ageing, and that its memory is the memory that the simulated step then has."""

import dataclasses
import json

import numpy as np
import pytest

from moesim.door import write_text_atomically
from moesim.errors import InputError
from moesim.placement import LayerPlacements, even_slots
from moesim.placement.nodes import cross_node_tokens
from moesim.placement.policies import POLICIES
from moesim.report import placement_figures
from moesim.routing.popularity import popularity_LE
from moesim.scenario import Scenario
from moesim.seeds import stream
from moesim.study.ageing import drifted
from moesim.study.place import expert_bytes, place_load, slots_of_map
from moesim.study.placement import PlacementStudy, placement_study
from moesim.study.simulate import simulate
from moesim.timeline.load import step_load
from moesim.timeline.placed import scenario_ranks, token_choices

SMALL = {"model": "olmoe-1b-7b", "cluster": "h100-8x-ib400", "num_gpus": 32, "ep": 16, "pp": 2, "seq_len": 512}
SMALL |= {"global_batch": 32, "gini": 0.3, "cuda_graphs": "full"}  # small steps would wait for the host alone


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    return Scenario.make(**SMALL)


@pytest.fixture(scope="module")
def study(scenario: Scenario) -> PlacementStudy:
    return placement_study(scenario, slots=(64, 80))


def test_no_layout_beats_its_bound_and_no_load_is_lost(study: PlacementStudy) -> None:
    for point in study.points:
        assert (point.placed.max_mean_L >= point.placed.lower_bound_L).all()
        assert point.placed.rank_loads_LR.sum(axis=1) == pytest.approx(point.placed.load_LE.sum(axis=1))


def test_the_base_is_the_scenarios_own_placement_and_nothing_moves_from_it(study: PlacementStudy) -> None:
    load_LE = study.base.placed.load_LE
    by_hand = load_LE.reshape(16, 16, 4).sum(axis=2)
    assert study.base.policy == "contiguous"
    assert study.base.placed.rank_loads_LR == pytest.approx(by_hand)
    assert study.base.max_mean == pytest.approx((by_hand.max(axis=1) / by_hand.mean(axis=1)).mean())
    assert study.base.migration.num_moved_slots == 0
    assert study.base.migration.stall_s == 0


def test_every_policy_that_the_ranks_allow_is_placed_and_simulated(study: PlacementStudy) -> None:
    names = [point.policy for point in study.by_policy]
    assert names == [name for name in POLICIES if name not in ("eplb_global", "search_hierarchical")]
    assert all(point.step is not None for point in study.by_policy), [point.reason for point in study.by_policy]
    assert study.best.max_mean < study.base.max_mean
    assert study.fastest.step.step_s < study.base.step.step_s


def test_the_base_step_is_the_scenarios_own(study: PlacementStudy, scenario: Scenario) -> None:
    assert study.base.step.step_s == simulate(scenario).step_s


def test_the_layouts_judged_are_those_of_the_simulated_steps(study: PlacementStudy, scenario: Scenario) -> None:
    for point in study.by_policy:
        drawn = step_load(scenario.with_(policy=point.policy, num_slots=point.num_slots))
        simulated = drawn.placed.layers
        load_LE = point.placed.load_LE
        assert simulated.max_mean(load_LE) == pytest.approx(point.placed.max_mean_L), point.policy
        choices = token_choices(drawn.popularities, stream(scenario.seed, "tokens"))
        crossing_L = cross_node_tokens(simulated, choices.counted_LTK)
        assert crossing_L == pytest.approx(point.cross_node_per_token_L), point.policy


def test_copies_price_exactly_the_memory_that_the_simulated_step_grows_by(
    study: PlacementStudy, scenario: Scenario
) -> None:
    alone, more = (simulate(scenario.with_(policy="search", num_slots=slots)).memory for slots in (64, 80))
    price = study.by_slots[1].replica_bytes
    for part in ("weights_bytes", "gradients_bytes", "optimizer_bytes"):
        assert more[part] - alone[part] == pytest.approx(getattr(price, part)), part
    assert study.by_slots[0].replica_bytes.total_bytes == 0


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_an_experts_bytes_follow_the_zero_stage(scenario: Scenario, zero: int) -> None:
    parameters = 3 * 2048 * 1024  # OLMoE: hidden 2048, expert width 1024, three matrices
    found = expert_bytes(scenario.with_(zero=zero, num_gpus=64))
    assert found.weights_bytes == 2 * parameters
    assert found.gradients_bytes == 4 * parameters / (2 if zero >= 2 else 1)
    assert found.optimizer_bytes == 12 * parameters / (2 if zero >= 1 else 1)


def test_node_aware_trades_balance_for_copies(study: PlacementStudy) -> None:
    search = next(point for point in study.by_policy if point.policy == "search")
    assert study.num_nodes == 2
    assert min(trade.cross_node_per_token for trade in study.trades) < search.cross_node_per_token
    loosest = study.trades[-1]
    assert loosest.max_mean <= search.max_mean * (1 + loosest.load_limit_fraction) * 1.02  # judged by what came


def test_one_node_has_no_traffic_between_nodes_and_no_trades() -> None:
    one = Scenario.make(**SMALL | {"num_gpus": 8, "ep": 8, "pp": 1, "global_batch": 8})
    found = placement_study(one, policies=("search",), slots=(64,))
    assert found.trades == ()
    assert found.best.cross_node_per_token == 0


def test_a_layout_ages_towards_chance_and_a_fresh_one_does_not(study: PlacementStudy) -> None:
    ageing = study.ageing.max_mean
    assert ageing["search"][0] < ageing["search"][4] < ageing["search"][-1]
    assert max(ageing["fresh"]) < min(ageing["today"])


def test_with_one_expert_on_each_gpu_rearranging_cannot_help_and_copies_can() -> None:
    one_each = Scenario.make(**SMALL | {"model": "mixtral-8x7b", "num_gpus": 8, "ep": 8, "pp": 1, "global_batch": 8})
    found = placement_study(one_each, policies=("contiguous", "eplb", "search"))
    assert not found.rearranging_helps
    assert found.best.max_mean == pytest.approx(found.base.max_mean)
    assert found.best.lower_bound == pytest.approx(found.base.max_mean)
    assert found.after.num_slots > 8
    assert found.after.max_mean < 0.8 * found.base.max_mean
    assert found.ageing.num_slots == found.after.num_slots


def test_a_drifting_load_keeps_its_total_and_has_the_correlation_asked_for() -> None:
    load_LE = np.random.default_rng(0).lognormal(0.0, 0.7, (4, 4096))
    loads = drifted(load_LE, [1.0, 0.8, 0.0], np.random.default_rng(1))
    assert loads[0] == pytest.approx(load_LE)
    assert loads.sum(axis=2) == pytest.approx(np.tile(load_LE.sum(axis=1), (3, 1)))
    for i, wanted in enumerate([1.0, 0.8, 0.0]):
        found = np.corrcoef(np.log(loads[i]).ravel(), np.log(load_LE).ravel())[0, 1]
        assert found == pytest.approx(wanted, abs=0.05)
    assert np.log(loads[1]).std() == pytest.approx(np.log(load_LE).std(), rel=0.05)


def test_an_expert_without_load_ages_without_harm() -> None:
    loads = drifted(np.array([[0.0, 1.0, 3.0, 2.0]]), [0.9, 0.0], np.random.default_rng(0))
    assert np.isfinite(loads).all()
    assert loads.sum(axis=2) == pytest.approx(6.0)


def test_a_map_of_ones_own_is_what_the_others_are_compared_with(scenario: Scenario, tmp_path) -> None:  # type: ignore[no-untyped-def]
    rows = np.tile(np.arange(64)[::-1], (16, 1)).tolist()
    write_text_atomically(tmp_path / "map.json", json.dumps({"physical_to_logical_map": rows}))
    own = scenario.with_(policy="map", map=str(tmp_path / "map.json"))
    found = placement_study(own, policies=("contiguous", "search"), slots=(64,))
    assert found.base.policy == "map"
    assert found.base.placed.placements.physical_to_logical_LS.tolist() == rows
    assert found.by_policy[0].migration.num_moved_slots == 16 * 64
    assert found.by_policy[0].max_mean == pytest.approx(found.base.max_mean)


def test_the_same_question_gives_the_same_results(scenario: Scenario) -> None:
    first, second = (placement_study(scenario, policies=("random", "search"), slots=(80,)) for _ in range(2))
    assert json.dumps(first.to_dict(), sort_keys=True) == json.dumps(second.to_dict(), sort_keys=True)
    assert first.rows() == second.rows()
    sections = {row[0] for row in first.rows()}
    assert sections == {"base", "by_policy", "by_slots", "trades", "ageing"}


def test_what_comes_next_is_said(scenario: Scenario) -> None:
    said: list[str] = []
    placement_study(scenario, policies=("search",), slots=(64,), progress=said.append)
    assert said[:3] == ["drawing the load", "contiguous, as it is today", "search, 64 slots"]


def test_an_unknown_policy_and_a_dense_model_are_refused_by_name(scenario: Scenario) -> None:
    with pytest.raises(InputError, match=r"policy: is not known; got 'serch'. Did you mean search"):
        placement_study(scenario, policies=("serch",))
    dense = Scenario.make(model="llama-3-8b", cluster="h100-8x-ib400", num_gpus=8, tp=8, global_batch=8)
    with pytest.raises(InputError, match="must have experts to place"):
        placement_study(dense)


def test_slots_that_do_not_divide_are_refused_by_name(scenario: Scenario) -> None:
    with pytest.raises(InputError, match=r"num_slots: must be a multiple of num_ranks=16; got 70"):
        placement_study(scenario, policies=("search",), slots=(70,))


def test_a_token_crosses_nodes_as_often_as_brute_force_says(scenario: Scenario) -> None:
    router = dataclasses.replace(scenario.model.layers[0].ffn.router, top_k=2)  # type: ignore[union-attr]
    drawn = popularity_LE(
        scenario.routing.popularity, num_layers=1, num_experts=8, router=router, rng=stream(0, "popularity")
    )
    choices = token_choices(drawn, stream(0, "tokens"))
    ranks = even_slots(8, 4, num_nodes=2)
    placed = place_load(drawn.inclusion_LE, ranks, policy="search", choices=choices, rng=stream(0, "placement"))
    node_of_E = np.empty(8, dtype=int)
    node_of_E[placed.placements.physical_to_logical_LS[0]] = np.arange(8) // 4
    nodes_TK = node_of_E[choices.counted_LTK[0]]
    crossing = np.mean([len({*nodes} - {source}) for nodes in nodes_TK.tolist() for source in (0, 1)])
    assert placed.cross_node_tokens_L[0] == pytest.approx(crossing)  # inclusion: one token's


def test_the_slots_of_a_map_are_read_from_any_form(scenario: Scenario) -> None:
    ranks = scenario_ranks(scenario, 64)
    devices = [{"device_id": r, "device_expert": [0] * 5} for r in range(16)]
    forms = [
        ({"physical_to_logical_map": [[0] * 80] * 2}, 80),
        ({"physical_to_logical": [0] * 96}, 96),
        ({"expert_to_rank": [0] * 64}, 64),
        ({"layer_list": [{"layer_id": 0, "device_list": devices}]}, 80),
        ({"physical_to_logical_map": [[0] * 81]}, 64),
        ({"layer_list": [{"device_list": [3]}]}, 64),
        ([1, 2], 64),
    ]
    assert [slots_of_map(raw, ranks, 64).num_slots for raw, _ in forms] == [slots for _, slots in forms]


def test_a_search_keeps_what_stands_where_it_can() -> None:
    load_LE = np.random.default_rng(3).random((3, 32))
    ranks = even_slots(32, 8, num_nodes=2)
    rng = np.random.default_rng(0)
    first = place_load(load_LE, ranks, policy="search", rng=rng)
    shuffled = first.placements.physical_to_logical_LS.reshape(3, 8, 4)[:, [4, 5, 6, 7, 0, 1, 2, 3]].reshape(3, 32)
    previous = LayerPlacements(physical_to_logical_LS=shuffled, num_experts=32, ranks=ranks)
    again = place_load(load_LE, ranks, policy="search", previous=previous, rng=np.random.default_rng(0))
    assert again.moved_slots_L.tolist() == [0, 0, 0]


def test_a_slow_gpu_leaves_out_policies_that_know_no_speeds_and_the_search_wins(scenario: Scenario) -> None:
    slow = placement_study(scenario.with_(rank_speeds="5=0.6"), slots=(64,))
    names = [point.policy for point in slow.by_policy]
    assert "search" in names
    assert not {"eplb", "search_hierarchical"} & set(names)
    assert slow.best.max_mean < slow.base.max_mean
    assert slow.fastest.step.step_s < slow.base.step.step_s


def test_titles_do_not_sell_rounding_as_a_difference(study: PlacementStudy) -> None:
    first, even = study.by_slots[0], dataclasses.replace(study.by_slots[0].placed, max_mean_L=np.full(16, 1.001))
    alike = dataclasses.replace(study, by_slots=tuple(dataclasses.replace(first, placed=even) for _ in range(2)))
    assert placement_figures.redundancy_title(alike) == (
        "Copies have nothing to even out: the busiest GPU gets 1.00 times the mean without"
    )
    quick = dataclasses.replace(
        first, placed=even, step=dataclasses.replace(first.step, step_s=0.9 * first.step.step_s)
    )
    near = dataclasses.replace(alike, by_slots=(alike.by_slots[0], quick))
    assert placement_figures.redundancy_title(near).endswith("a step is 10% shorter with 64 slots")
    copies_L = np.full(16, 2.0)
    points = {
        name: tuple(dataclasses.replace(point, cross_node_per_token_L=copies_L) for point in getattr(study, name))
        for name in ("by_policy", "by_slots")
    }
    base = dataclasses.replace(study.base, cross_node_per_token_L=copies_L)
    still = dataclasses.replace(study, base=base, trades=(), **points)
    assert placement_figures.front(still).alt.startswith("No layout changes the traffic by 1%: 2.00 copies of a token")
    *others, last = points["by_policy"]
    fewer = (*others, dataclasses.replace(last, cross_node_per_token_L=copies_L / 2))
    alt = placement_figures.front(dataclasses.replace(still, by_policy=fewer)).alt
    assert alt.startswith("Least traffic: 1.00 copies of a token leave its node")
