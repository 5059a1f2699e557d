"""Recorded routing in place of a popularity: in the load, in a scenario, in a study, or refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moesim import Scenario, simulate
from moesim.describe.model import Router
from moesim.describe.workload import Lognormal
from moesim.errors import InputError
from moesim.routing.histogram import write_histogram
from moesim.routing.recorded import recorded_from_array
from moesim.routing.sampler import draw_choices
from moesim.routing.statistics import gini
from moesim.study.routed import routed_load
from moesim.study.routing import routing_study
from tests.routed_cases import SMALL, scenario


def trace(num_layers: int = 16, num_experts: int = 64, top_k: int = 8) -> np.ndarray:
    """Router replay of 4,000 tokens under a made-up popularity."""
    rng = np.random.default_rng(3)
    weights_LE = rng.normal(0.0, 1.0, (num_layers, num_experts))
    return np.stack([draw_choices(w, Router(top_k=top_k), 4000, rng, engine="numpy") for w in weights_LE], axis=1)


def test_a_recording_replaces_the_popularity() -> None:
    experts_TLK = trace()
    load, popularities = routed_load(scenario(), recorded_from_array(experts_TLK, num_experts=64))
    counted_E = np.bincount(experts_TLK[:, 7].ravel(), minlength=64) / 4000
    assert np.allclose(popularities.inclusion_LE[7], counted_E)
    share_E = load.assigned_LE[7] / load.assigned_LE[7].sum()
    assert np.abs(share_E - counted_E / 8).max() < 4e-3  # of 262,144 assignments
    assert load.source == "recording"


def test_a_histogram_and_the_replay_it_was_counted_from_give_the_same_load(tmp_path: Path) -> None:
    from moesim.routing.histogram import recorded_histogram

    recorded = recorded_from_array(trace(), num_experts=64)
    write_histogram(recorded_histogram(recorded), tmp_path / "use.csv")
    from_table, _ = routed_load(scenario(), tmp_path / "use.csv")
    from_replay, _ = routed_load(scenario(), recorded)
    assert np.array_equal(from_table.assigned_LE, from_replay.assigned_LE)


def test_a_recording_is_not_levelled_by_a_scenario_of_forced_balance() -> None:
    load, popularities = routed_load(Scenario.make(**_balanced()), recorded_from_array(trace(), num_experts=64))
    assert float(gini(load.assigned_LE).mean()) == pytest.approx(
        float(gini(popularities.inclusion_LE).mean()), abs=0.01
    )


def _balanced() -> dict[str, object]:
    return {name: value for name, value in SMALL.items() if name != "gini"} | {"popularity": "balanced"}


def recorded_file(folder: Path, *, spread: float, seed: int = 3) -> Path:
    """Router replay of 4,000 tokens as a file; spread: of the experts' log popularity."""
    rng = np.random.default_rng(seed)
    weights_LE = rng.normal(0.0, spread, (16, 64))
    experts = [draw_choices(weights_E, Router(top_k=8), 4000, rng, engine="numpy") for weights_E in weights_LE]
    path = folder / f"replay-{spread:g}.npy"
    np.save(path, np.stack(experts, axis=1))
    return path


def test_a_recording_reaches_the_scenario_and_moves_time_drops_and_memory(tmp_path: Path) -> None:
    """End to end: two recordings, one mild and one wild, simulated as the scenario's popularity."""
    sizes = {"micro_batch": 8, "seq_len": 4096, "global_batch": 128, "recompute": "none"}
    mild, wild = (recorded_file(tmp_path, spread=spread) for spread in (0.1, 1.2))
    free = scenario(**sizes, capacity_factor=None)
    steps = {path: simulate(free.with_recording(path)) for path in (mild, wild)}
    assert steps[wild].gini > steps[mild].gini + 0.3
    assert steps[wild].step_s > 1.05 * steps[mild].step_s
    assert steps[wild].memory["peak_bytes"] > 1.01 * steps[mild].memory["peak_bytes"]
    assert any(item.kind == "measured" and item.source == str(wild) for item in steps[wild].provenance)
    limited = scenario(**sizes).with_recording(wild)
    assert simulate(limited).drop_fraction == pytest.approx(
        routed_load(scenario(**sizes), wild)[0].drop_fraction, abs=1e-6
    )
    assert limited.with_(gini=0.1).routing.popularity == Lognormal(gini=0.1)


def test_a_recording_written_anew_is_read_anew(tmp_path: Path) -> None:
    first = recorded_file(tmp_path, spread=0.5, seed=1)
    before = simulate(scenario().with_recording(first)).load_LE
    recorded_file(tmp_path, spread=0.5, seed=2)
    assert not np.array_equal(simulate(scenario().with_recording(first)).load_LE, before)


def test_a_scenario_file_names_a_recording_beside_it(tmp_path: Path) -> None:
    recorded_file(tmp_path, spread=0.5)
    raw = {"model": SMALL["model"], "cluster": SMALL["cluster"], "num_gpus": 16, "parallel": {"ep": 8, "pp": 2}}
    raw |= {"routing": {"popularity": {"kind": "recorded", "file": "replay-0.5.npy"}}}
    asked = Scenario.from_mapping(raw, folder=tmp_path)
    assert asked.to_dict()["routing"]["popularity"]["file"] == str(tmp_path / "replay-0.5.npy")
    assert routed_load(asked)[0].source == str(tmp_path / "replay-0.5.npy")


def test_a_study_of_a_recording_simulates_it(tmp_path: Path) -> None:
    path = recorded_file(tmp_path, spread=0.8)
    found = routing_study(scenario(), num_steps=2, recorded=path)
    asked = [point for point in found.over_skew if point.popularity == "asked"]
    assert [point.gini for point in asked] == [pytest.approx(found.load.to_dict()["gini"])] * 2
    assert found.step.drop_fraction == pytest.approx(found.load.drop_fraction, abs=1e-6)
    assert found.tokens is None


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"num_layers": 15}, "layers: must be the model's 16 MoE layers; got 15"),
        ({"top_k": 4}, "experts per token: must be the model's 8; got 4"),
    ],
)
def test_a_recording_of_another_model_is_refused(sizes: dict[str, int], words: str) -> None:
    with pytest.raises(InputError, match=words):
        routed_load(scenario(), recorded_from_array(trace(**sizes), num_experts=64))
