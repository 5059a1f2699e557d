"""The names that scripts rely on: every key promised of simulate, route and place stands in the JSON, with sense."""

import math
import re
from pathlib import Path

import numpy as np
import pytest

from tests.test_cli_runs import answer

SMALL = ["--model", "olmoe-1b-7b", "--cluster", "h100-8x-ib400", "--num-gpus", "16", "--ep", "8", "--pp", "2"]
SMALL += ["--seq-len", "512", "--global-batch", "32", "--gini", "0.4", "--capacity-factor", "1.25"]
# As promised: names in order, {...} what a mapping holds, [{...}] what each of a list's mappings holds.
SIMULATE = """
step_s, tokens_per_s, tokens_per_s_per_gpu, kept_assignment_fraction, drop_fraction, mfu, mfu_full_attention,
model_flops_per_s_per_gpu, compute_s, exposed_comm_s, hidden_comm_s, wait_s, bubble_fraction, max_mean_load, gini,
memory{weights_bytes, gradients_bytes, optimizer_bytes, activations_bytes, dispatch_bytes, comm_bytes, reserved_bytes,
peak_bytes, peak_p99_bytes}, memory_by_rank[{stage, rank, weights_bytes, gradients_bytes, optimizer_bytes,
activations_bytes, dispatch_bytes, comm_bytes, reserved_bytes, peak_bytes}], fits, headroom_bytes,
envelope{inside, reasons}
"""
ROUTE = """
gini, entropy, cv, max_mean, max_vio, num_active_experts, drop_fraction, drop_fraction_by_layer, padding_fraction,
alerts[{layer, expert, ratio}]
"""
PLACE_LAYER = "max_mean, lower_bound, rank_loads, cross_node_tokens, moved_slots, physical_to_logical"


def missing(promised: str, result: dict) -> list[str]:
    """The promised names that are not in a result, or hold nothing where they must hold something."""
    lost = []
    for name, kind, inner in re.findall(r"(\w+)(?:(\{|\[\{)([^}]*)\})?", promised):
        value = result.get(name)
        if name not in result or value is None:
            lost.append(name)
        elif inner:
            for item in value if kind == "[{" else [value]:
                lost += [f"{name}.{key}" for key in re.findall(r"\w+", inner) if item.get(key) is None]
            lost += [name] if kind == "[{" and not value else []
    return lost


def test_a_missing_name_is_found() -> None:
    assert missing("a, b{c, d}, e[{f}]", {"a": 1, "b": {"c": 2}, "e": []}) == ["b.d", "e"]
    assert missing("a, b{c}, e[{f}]", {"a": 0, "b": {"c": False}, "e": [{"f": 1}]}) == []


@pytest.fixture(scope="module")
def simulated() -> dict:
    return answer("simulate", *SMALL)["result"]


def test_simulate_keeps_its_promises(simulated: dict) -> None:
    assert missing(SIMULATE, simulated) == []
    numbers = [value for value in simulated.values() if isinstance(value, float)]
    assert all(map(math.isfinite, numbers))
    assert simulated["kept_assignment_fraction"] + simulated["drop_fraction"] == pytest.approx(1.0)
    memory = simulated["memory"]
    parts = sum(size for name, size in memory.items() if not name.startswith("peak"))
    assert memory["peak_bytes"] == pytest.approx(parts)
    assert memory["peak_p99_bytes"] >= memory["peak_bytes"]
    assert {stage["stage"] for stage in simulated["memory_by_rank"]} == {0, 1}
    assert memory["peak_bytes"] == max(stage["peak_bytes"] for stage in simulated["memory_by_rank"])


def test_route_keeps_its_promises() -> None:
    routed = answer("route", *SMALL, "--set", "routing.pad_to_capacity=true", "--gini", "0.6")["result"]
    assert missing(ROUTE, routed) == []
    assert len(routed["drop_fraction_by_layer"]) == 16
    assert 0.0 < routed["padding_fraction"] < 1.0
    assert routed["max_vio"] == pytest.approx(routed["max_mean"] - 1.0)


def test_place_keeps_its_promises(tmp_path: Path) -> None:
    np.save(tmp_path / "loads.npy", np.random.default_rng(0).lognormal(0.0, 1.0, (3, 16)))
    options = ["--loads", str(tmp_path / "loads.npy"), "--num-gpus", "4", "--num-nodes", "2", "--num-groups", "4"]
    options += ["--num-slots", "20"]
    answer("place", *options, "--policy", "contiguous", "--out", str(tmp_path / "old"))
    new = answer("place", *options, "--previous", str(tmp_path / "old" / "physical_to_logical.json"))["result"]
    for layer in new["layers"]:
        assert missing(PLACE_LAYER, layer) == []
        assert layer["max_mean"] >= layer["lower_bound"] >= 1.0
        assert len(layer["rank_loads"]) == 4
        assert len(layer["physical_to_logical"]) == 20
    assert missing(PLACE_LAYER, new) == [], "the same, by column"
    assert sum(new["moved_slots"]) > 0
