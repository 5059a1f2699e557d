"""The verb place: EPLB's README example, what it writes and reads back, what it refuses. Small on purpose."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from moesim.cli import app
from moesim.placement.policies import POLICIES

# github.com/deepseek-ai/EPLB, README: 12 experts, 16 slots, 4 groups, 2 nodes, 8 GPUs.
README_LOADS = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
README_MAP = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]
SIZES = ["--num-gpus", "8", "--num-nodes", "2", "--num-slots", "16", "--num-groups", "4"]
SCENARIO = ["--model", "olmoe-1b-7b", "--cluster", "h100-8x-ib400", "--num-gpus", "16", "--ep", "16"]
SCENARIO += ["--seq-len", "512", "--global-batch", "32"]


def moesim(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, list(arguments))
    return done.exit_code, done.stdout, done.stderr


def answer(*arguments: str) -> dict:
    status, out, err = moesim(*arguments, "--json")
    assert status == 0, err
    envelope = json.loads(out)
    assert envelope.pop("run")["wall_s"] >= 0
    return envelope


def refusal(*arguments: str) -> str:
    """The one error line of a call that must end with status 2 and print nothing on stdout."""
    status, out, err = moesim(*arguments)
    assert (status, out) == (2, ""), err
    assert len(err.strip().splitlines()) == 1, err
    return err


@pytest.fixture
def loads(tmp_path: Path) -> str:
    np.save(tmp_path / "loads.npy", np.array(README_LOADS))
    return str(tmp_path / "loads.npy")


def test_eplb_answers_its_readme_example_slot_for_slot(loads):
    result = answer("place", "--loads", loads, *SIZES, "--policy", "eplb")["result"]
    assert result["physical_to_logical"] == README_MAP
    assert result["max_mean"] == pytest.approx([1.2081, 1.2422], abs=5e-5)
    row = result["layers"][1]
    assert {"max_mean", "lower_bound", "rank_loads", "cross_node_tokens", "moved_slots", "physical_to_logical"} < set(
        row
    )
    assert row["physical_to_logical"] == README_MAP[1]
    assert sum(row["rank_loads"]) == pytest.approx(sum(README_LOADS[1]))
    assert row["max_mean"] == pytest.approx(max(row["rank_loads"]) / np.mean(row["rank_loads"]))


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "node_aware"])
def test_no_policy_beats_the_bound_and_every_expert_has_a_slot(loads, policy):
    result = answer("place", "--loads", loads, *SIZES, "--policy", policy)["result"]
    for row in result["layers"]:
        assert row["max_mean"] >= row["lower_bound"] >= 1.0
        assert set(row["physical_to_logical"]) == set(range(12))


def test_the_search_is_the_default_and_as_good_as_the_optimum_of_the_readme(loads):
    envelope = answer("place", "--loads", loads, *SIZES)
    assert envelope["inputs"]["policy"] == "search"
    assert np.mean(envelope["result"]["max_mean"]) == pytest.approx(1.1218, abs=5e-5)
    assert envelope == answer("place", "--loads", loads, *SIZES)


def test_what_it_writes_it_reads_back_and_then_nothing_moves(loads, tmp_path):
    out = tmp_path / "out"
    first = answer("place", "--loads", loads, *SIZES, "--policy", "eplb", "--out", str(out))["result"]
    assert json.loads((out / "physical_to_logical.json").read_text()) == {"physical_to_logical_map": README_MAP}
    assert json.loads((out / "results.json").read_text())["result"] == first
    assert first["moved_slots"] == [None, None]
    for name in ("physical_to_logical.json", "expert_map.json"):
        again = answer("place", "--loads", loads, *SIZES, "--policy", "eplb", "--previous", str(out / name))["result"]
        assert again["moved_slots"] == [0, 0]
        measured = answer("place", "--loads", loads, *SIZES, "--map", str(out / name))
        assert measured["inputs"]["policy"] == "map"
        assert measured["result"]["max_mean"] == first["max_mean"]


def test_a_map_for_vllm_names_a_rank_for_each_expert_where_none_has_replicas(loads, tmp_path):
    sizes = ["--num-gpus", "4", "--policy", "eplb", "--out", str(tmp_path / "out")]
    result = answer("place", "--loads", loads, *sizes)["result"]
    ranks = json.loads((tmp_path / "out" / "expert_to_rank.json").read_text())["expert_to_rank"]
    for layer, row in enumerate(result["physical_to_logical"]):
        assert [ranks[layer][expert] for expert in row] == [slot // 3 for slot in range(12)]


def test_a_previous_placement_may_have_had_fewer_slots(loads, tmp_path):
    answer("place", "--loads", loads, "--num-gpus", "4", "--policy", "contiguous", "--out", str(tmp_path / "old"))
    previous = ["--previous", str(tmp_path / "old" / "expert_to_rank.json")]
    result = answer("place", "--loads", loads, "--num-gpus", "4", "--num-slots", "16", *previous)["result"]
    assert all(4 <= moved <= 16 for moved in result["moved_slots"])


def test_a_scenario_draws_its_own_load():
    result = answer("place", *SCENARIO, "--num-slots", "80", "--gini", "0.3")["result"]
    assert len(result["layers"]) == 16
    assert len(result["physical_to_logical"][0]) == 80
    assert np.mean(result["max_mean"]) < np.mean(result["contiguous_max_mean"])
    assert all(0 < tokens < sum(row["rank_loads"]) for row in result["layers"] for tokens in [row["cross_node_tokens"]])


def test_node_aware_sends_fewer_tokens_between_nodes_for_a_little_more_load():
    even, aware = (
        answer("place", *SCENARIO, "--gini", "0.3", "--policy", policy) for policy in ("search", "node_aware")
    )
    tokens, load = (
        [np.mean(found["result"][name]) for found in (even, aware)] for name in ("cross_node_tokens", "max_mean")
    )
    assert tokens[1] < tokens[0]
    assert load[0] <= load[1] <= load[0] * 1.02 + 1e-9


def test_a_table_shows_the_bound_and_what_contiguous_placement_would_give(loads):
    status, out, _ = moesim("place", "--loads", loads, "--num-gpus", "4", "--policy", "search")
    assert status == 0
    for words in ("Busiest GPU over the mean", "No layout can beat", "Contiguous, no replicas"):
        assert words in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--num-gpus", "8", "--num-slots", "17"],
            "--num-slots: must be a multiple of the 8 GPUs; got 17. Nearest: 16, 24",
        ),
        (["--num-gpus", "8", "--num-slots", "4"], "--num-slots: must be at least the number of experts, 12; got 4"),
        (["--num-gpus", "8", "--num-slots", "800"], "must not exceed every expert on every GPU, 96"),
        (["--num-gpus", "8", "--policy", "serch"], "policy: is not known; got 'serch'. Did you mean search?"),
        (["--num-gpus", "8", "--policy", "node_aware"], "node_aware: coactivation: is needed"),
        (["--num-gpus", "8", "--num-groups", "5"], "--num-groups: must divide the 12 experts"),
        (["--num-gpus", "8", "--num-nodes", "3"], "num_nodes: must divide num_ranks=8"),
        (["--num-gpus", "0"], "--num-gpus"),
        ([], "--num-gpus: is required with --loads"),
        (["--num-gpus", "8", "--ep", "8"], "--loads: stands without a scenario"),
        (["--num-gpus", "8", "--policy", "eplb", "--map", "x.json"], "--map: says where experts go"),
        (["--num-gpus", "8", "--previous", "none.json"], "none.json: must exist"),
    ],
)
def test_impossible_sizes_are_refused_by_name(loads, options, words):
    assert words in refusal("place", "--loads", loads, *options)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.ones(12), "shape: must have 2 dimensions"),
        (np.array([[1.0, -2.0]]), "values: must not be negative; got -2.0"),
        (np.array([[1.0, np.nan]]), "values: must be finite"),
        (np.ones((0, 12)), "shape: must be layers x experts"),
        (np.array([[1e308, 1e308]]), "must sum to a finite number"),
        (np.array([[True, False]]), "must hold plain numbers"),
    ],
)
def test_what_is_no_load_is_refused_by_name(tmp_path, array, words):
    np.save(tmp_path / "bad.npy", array)
    assert words in refusal("place", "--loads", str(tmp_path / "bad.npy"), "--num-gpus", "2")


def test_a_map_that_lacks_an_expert_is_refused_with_its_place(loads, tmp_path):
    rows = [list(range(12)), [0, *range(11)]]
    (tmp_path / "map.json").write_text(json.dumps({"physical_to_logical_map": rows}))
    text = refusal("place", "--loads", loads, "--num-gpus", "4", "--map", str(tmp_path / "map.json"))
    assert "physical_to_logical_map[1]: must hold each of the 12 experts; got 'no slot for expert 11'" in text


def test_a_dense_model_has_nothing_to_place():
    assert "must have experts to place" in refusal(
        "place", "--model", "llama-3-8b", "--cluster", "h100-8x-ib400", "--num-gpus", "8"
    )
