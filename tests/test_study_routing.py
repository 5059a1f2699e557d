"""The routing study: realised load, drops, the capacity that is needed, what skew costs, memory over steps."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from moesim import Scenario, simulate
from moesim.describe.model import Router
from moesim.describe.workload import Lognormal
from moesim.errors import InputError
from moesim.metrics.memory import MemoryOverSteps, memory_over_steps, other_favourites
from moesim.routing.histogram import write_histogram
from moesim.routing.popularity import popularity_LE
from moesim.routing.recorded import recorded_from_array
from moesim.routing.sampler import draw_choices
from moesim.routing.statistics import gini
from moesim.seeds import stream
from moesim.study.balance import balance_over_training
from moesim.study.drops import drop_point, expected_drops_L, needed_capacity, token_drops
from moesim.study.routed import RoutedLoad, routed_base, routed_load
from moesim.study.routing import RoutingStudy, routing_study
from moesim.study.skew import cost_over_capacity, cost_over_skew
from moesim.timeline.load import redrawn

SMALL = {
    "model": "olmoe-1b-7b",
    "cluster": "h100-8x-ib400",
    "num_gpus": 16,
    "pp": 2,
    "ep": 8,
    "seq_len": 1024,
    "global_batch": 32,
    "gini": 0.3,
    "capacity_factor": 1.25,
    "recompute": "full",
}


def scenario(**changes: object) -> Scenario:
    return Scenario.make(**SMALL | changes)


@pytest.fixture(scope="module")
def study() -> RoutingStudy:
    return routing_study(scenario(), num_steps=6)


def test_the_realised_load_is_the_one_that_the_step_is_simulated_with() -> None:
    load, popularities = routed_load(scenario())
    step = simulate(scenario())
    found = load.to_dict()
    assert np.allclose(found["load_LE"], step.load_LE)
    assert found["gini"] == pytest.approx(step.gini)
    assert found["max_mean"] == pytest.approx(step.max_mean_load)
    assert found["drop_fraction"] == pytest.approx(step.drop_fraction, abs=1e-6)
    assert found["drop_fraction_by_layer"] == pytest.approx(step.drop_fraction_by_layer)
    assert found["alerts"] == step.alerts
    assert np.allclose(popularities.inclusion_LE.sum(axis=1), 8)


def test_every_token_makes_k_assignments_in_every_layer() -> None:
    load, _ = routed_load(scenario())
    assert load.assigned_LE.sum(axis=1).tolist() == [32 * 1024 * 8] * 16
    assert load.assigned_LR.sum(axis=1).tolist() == [32 * 1024 * 8] * 16


def test_drops_by_expert_by_rank_and_by_layer_are_one_and_the_same_loss() -> None:
    load, _ = routed_load(scenario())
    lost = (load.drop_fraction_LE * load.assigned_LE).sum()
    assert lost > 0
    assert (load.drop_fraction_LR * load.assigned_LR).sum() == pytest.approx(lost)
    assert (load.tokens_lost_L * load.top_k).sum() == pytest.approx(lost)
    assert load.drop_fraction == pytest.approx(lost / load.assigned_LE.sum())


def hand_made() -> RoutedLoad:
    """One layer of four experts on two ranks; the first one overflows, the last gets nothing."""
    assigned_LE, kept_LE = np.array([[12.0, 3.0, 1.0, 0.0]]), np.array([[6.0, 3.0, 1.0, 0.0]])
    return RoutedLoad(
        layers=(5,),
        top_k=2,
        assigned_LE=assigned_LE,
        kept_LE=kept_LE,
        assigned_LR=assigned_LE.reshape(1, 2, 2).sum(axis=2),
        kept_LR=kept_LE.reshape(1, 2, 2).sum(axis=2),
        places=40.0,
        busiest_L=np.array([1.8]),
    )


def test_a_load_made_by_hand_gives_what_can_be_counted_by_hand() -> None:
    found = hand_made().to_dict()
    assert found["drop_fraction"] == pytest.approx(6 / 16)
    assert found["drop_fraction_by_expert"] == [[0.5, 0.0, 0.0, 0.0]]
    assert found["drop_fraction_by_rank"] == [[pytest.approx(6 / 15), 0.0]]
    assert found["tokens_lost_per_step"] == 3.0
    assert found["padding_fraction"] == pytest.approx(30 / 40)
    assert (found["max_mean"], found["max_vio"], found["num_active_experts"]) == (3.0, 2.0, 3)
    assert found["dead_experts"] == [{"layer": 5, "expert": 3}]
    assert found["alerts"] == []  # three times the mean is not over it
    assert found["collapsed_experts"] == [{"layer": 5, "expert": 0, "ratio": 3.0}]  # 12 of the 8 tokens' 16 choices
    assert found["by_layer"][0]["rank_max_mean"] == pytest.approx(9 / 5)


def test_an_alert_names_the_models_layer() -> None:
    crowded = dataclasses.replace(hand_made(), assigned_LE=np.array([[14.0, 1.0, 1.0, 0.0]]))
    assert crowded.to_dict()["alerts"] == [{"layer": 5, "expert": 0, "ratio": 3.5}]


def test_without_a_capacity_factor_nothing_is_dropped_and_nothing_padded() -> None:
    load, _ = routed_load(scenario(capacity_factor=None))
    assert (load.drop_fraction, load.padding_fraction, load.places) == (0.0, 0.0, None)


def test_a_dense_model_has_nothing_to_route() -> None:
    dense = Scenario.make(model="llama-3-8b", cluster="h100-8x-ib400", num_gpus=8, global_batch=8)
    with pytest.raises(InputError, match="must have experts to route to; got 'llama-3-8b'"):
        routed_load(dense)


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


def test_more_skew_drops_more_at_every_capacity_factor(study: RoutingStudy) -> None:
    table = np.array([[point.drop_fraction for point in curve.points] for curve in study.drop_curves])
    assert [curve.asked for curve in study.drop_curves].count(True) == 1
    assert (np.diff(table, axis=0) >= -1e-9).all()
    assert (np.diff(table, axis=1) <= 1e-9).all()


def test_the_asked_curve_agrees_with_the_drawn_step(study: RoutingStudy) -> None:
    asked = next(curve for curve in study.drop_curves if curve.asked)
    at_asked = next(point for point in asked.points if point.capacity_factor == 1.25)
    assert at_asked.drop_fraction == pytest.approx(study.load.drop_fraction, abs=2e-3)
    assert at_asked.padding_fraction == pytest.approx(study.load.padding_fraction, abs=2e-3)


CONVENTIONS = (
    {"kind": "megatron"},
    {"kind": "megablocks"},
    {"kind": "tutel"},
    {"kind": "gshard", "group_tokens": 256},
    {"kind": "rank_buffer"},
)


def under(convention: dict[str, object], **routing: object) -> Scenario:
    """The small scenario with a capacity convention and other fields of its routing."""
    asked = scenario()
    raw = {name: value for name, value in asked.to_dict().items() if name != "routing"}
    popularity = {"kind": "lognormal", "gini": 0.3}
    kept = {"popularity": popularity, "capacity": convention, "capacity_factor": 1.25} | routing
    return Scenario.from_mapping(raw | {"cluster": SMALL["cluster"], "routing": kept})


EXPECTED = [(convention, "probability") for convention in CONVENTIONS]
EXPECTED += [(convention, "reroute") for convention in CONVENTIONS if convention["kind"] != "rank_buffer"]


@pytest.mark.parametrize(("convention", "policy"), EXPECTED, ids=str)
def test_the_expected_drops_are_those_of_a_drawn_step(convention: dict[str, object], policy: str) -> None:
    asked = under(convention, drop_policy=policy)
    load, popularities = routed_load(asked)
    expected = drop_point(asked, popularities, 1.25)
    assert load.drop_fraction == pytest.approx(expected.drop_fraction, abs=4e-3)
    assert load.padding_fraction == pytest.approx(expected.padding_fraction, abs=4e-3)


@pytest.mark.parametrize("convention", CONVENTIONS, ids=lambda convention: str(convention["kind"]))
def test_the_needed_capacity_drops_as_little_as_wanted_and_a_little_less_drops_more(
    convention: dict[str, object],
) -> None:
    asked = under(convention)
    popularities = routed_base(asked).popularities
    found = needed_capacity(asked, popularities, 0.01)
    assert drop_point(asked, popularities, found.capacity_factor).drop_fraction <= 0.01
    assert drop_point(asked, popularities, 0.95 * found.capacity_factor).drop_fraction > 0.01
    assert found.worst_layer_capacity_factor >= found.capacity_factor
    at_worst = expected_drops_L(asked, popularities, found.worst_layer_capacity_factor)
    assert float(at_worst.max()) <= 0.01


def test_with_the_needed_capacity_a_drawn_step_drops_as_much_as_wanted() -> None:
    found = needed_capacity(scenario(), routed_base(scenario()).popularities, 0.02)
    load, _ = routed_load(scenario(capacity_factor=found.capacity_factor))
    assert load.drop_fraction == pytest.approx(0.02, rel=0.05)


def test_rerouting_loses_less_and_its_losses_still_add_up() -> None:
    turned_away, _ = routed_load(scenario(capacity_factor=0.8))
    taken_over, _ = routed_load(under({"kind": "megatron"}, drop_policy="reroute", capacity_factor=0.8))
    assert 0.19 < taken_over.drop_fraction < turned_away.drop_fraction  # a fifth has no room anywhere
    lost = (taken_over.drop_fraction_LE * taken_over.assigned_LE).sum()
    assert lost == pytest.approx((taken_over.assigned_LE - taken_over.kept_LE).sum())


def test_single_tokens_lose_what_the_counts_say(study: RoutingStudy) -> None:
    tokens = study.tokens
    assert tokens is not None
    assert tokens.num_tokens == 8 * 1024
    assert tokens.drop_fraction == pytest.approx(study.load.drop_fraction, abs=0.01)
    assert tokens.drop_fraction < tokens.hurt_fraction < 8 * tokens.drop_fraction
    assert tokens.lost_fraction < 0.01 * tokens.hurt_fraction  # eight experts rarely are full all at once
    assert token_drops(scenario(capacity_factor=None), routed_base(scenario()).popularities) is None


def test_domains_with_crowded_favourites_lose_more() -> None:
    domains = [{"name": "code", "share": 0.8}, {"name": "prose", "share": 0.2}]
    asked = under({"kind": "megatron"}, popularity={"kind": "domains", "domains": domains, "gini": 0.3})
    load, _ = routed_load(asked)
    found = load.to_dict()["drop_fraction_by_domain"]
    assert set(found) == {"code", "prose"}
    assert found["code"] > found["prose"]  # the larger domain's favourites are the ones that overflow
    mean = 0.8 * found["code"] + 0.2 * found["prose"]
    assert mean == pytest.approx(load.drop_fraction, abs=5e-3)


def test_a_share_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match=r"wanted_drop_fraction: must be at least 0, and below 1; got 1.5"):
        routing_study(scenario(), wanted_drop_fraction=1.5)


def test_without_drops_skew_costs_time_and_waiting() -> None:
    points = [p for p in cost_over_skew(scenario(), ginis=(0.1, 0.6)) if p.capacity_factor is None]
    assert [p.popularity for p in points] == ["balanced", "lognormal", "asked", "lognormal"]
    assert (np.diff([p.step_s for p in points]) > 0).all()
    assert (np.diff([p.wait_s for p in points]) > 0).all()


def test_a_capacity_buys_time_for_drops(study: RoutingStudy) -> None:
    assert study.over_capacity[-1].capacity_factor is None
    assert (np.diff([p.step_s for p in study.over_capacity]) > 0).all()
    assert (np.diff([p.drop_fraction for p in study.over_capacity]) < 0).all()


def test_a_known_step_is_not_simulated_again(study: RoutingStudy) -> None:
    said: list[str] = []
    found = cost_over_capacity(scenario(), factors=(1.25, 2.0), step=study.step, progress=said.append)
    assert said == ["step, capacity factor 2"]
    assert found[0].step_s == study.step.step_s


def test_other_favourites_keep_the_skew_and_the_routers_groups() -> None:
    rng = np.random.default_rng(0)
    router = Router(top_k=4, num_groups=4, top_groups=2)
    drawn = popularity_LE(Lognormal(gini=0.3), num_layers=3, num_experts=32, router=router, rng=rng)
    other = other_favourites(drawn, rng)
    assert not np.array_equal(other.inclusion_LE, drawn.inclusion_LE)
    for before, after in zip(drawn.inclusion_LE, other.inclusion_LE, strict=True):
        groups = {tuple(sorted(group)) for group in before.reshape(4, 8).tolist()}
        assert {tuple(sorted(group)) for group in after.reshape(4, 8).tolist()} == groups


def test_memory_over_steps_has_the_simulated_step_in_its_range() -> None:
    asked = scenario(capacity_factor=None, micro_batch=8, seq_len=4096, global_batch=128, recompute="none")
    found = memory_over_steps(asked, 12, redraw="counts")
    peak = simulate(asked).memory["peak_bytes"]
    assert len(set(found.peak_bytes_S)) > 1
    spread = max(found.peak_bytes_S) - min(found.peak_bytes_S)
    assert min(found.peak_bytes_S) - spread <= peak <= max(found.peak_bytes_S) + spread


def test_other_favourites_spread_memory_further_than_counting_does() -> None:
    asked = scenario(capacity_factor=None, micro_batch=8, seq_len=4096, global_batch=128, recompute="none", gini=0.6)
    counts, favourites = (memory_over_steps(asked, 12, redraw=redraw) for redraw in ("counts", "favourites"))
    assert np.std(favourites.peak_bytes_S) > 3 * np.std(counts.peak_bytes_S)


def test_drift_spreads_memory_too_and_is_refused_where_nothing_drifts() -> None:
    sizes = {"capacity_factor": None, "micro_batch": 8, "seq_len": 4096, "global_batch": 128, "recompute": "none"}
    asked = scenario(**sizes)
    with pytest.raises(InputError, match="drift_steps: must be given for memory under drift"):
        memory_over_steps(asked, 3, redraw="drift")
    raw = asked.to_dict()
    raw["routing"]["popularity"] = {"kind": "lognormal", "gini": 0.3, "correlation": {"drift_steps": 50}}
    raw |= {"cluster": SMALL["cluster"]}
    drifting = Scenario.from_mapping(raw)
    found = memory_over_steps(drifting, 6, redraw="drift")
    counts = memory_over_steps(drifting, 6, redraw="counts")
    assert np.std(found.peak_bytes_S) > 3 * np.std(counts.peak_bytes_S)


def test_the_same_seed_gives_the_same_memory_and_another_seed_another() -> None:
    asked = scenario(capacity_factor=None, micro_batch=8, seq_len=4096, global_batch=128, recompute="none")
    first, again = memory_over_steps(asked, 3), memory_over_steps(asked, 3)
    assert first == again
    assert memory_over_steps(asked.with_(seed=1), 3) != first


def test_the_chance_of_running_out_is_that_of_largest_values() -> None:
    """Maxima of 1,000 normal draws: P99 and the share over a limit, estimated from 64 of 20,000 samples."""
    rng = np.random.default_rng(5)
    samples = rng.standard_normal((20_000, 1000)).max(axis=1) + 100.0
    limit = float(np.quantile(samples, 0.95))
    parts = samples[: 100 * 64].reshape(100, 64).tolist()
    estimates = [
        MemoryOverSteps(
            redraw="counts", peak_bytes_S=tuple(part), activations_bytes_S=(), dispatch_bytes_S=(), capacity_bytes=limit
        )
        for part in parts
    ]
    true_p99 = float(np.quantile(samples, 0.99))
    assert np.median([e.p99_bytes for e in estimates]) == pytest.approx(true_p99, abs=0.15)
    assert np.median([e.out_of_memory_fraction for e in estimates]) == pytest.approx(0.05, abs=0.015)


def test_a_peak_that_never_changes_is_certain_to_fit_or_not() -> None:
    for capacity, chance in ((81.0, 0.0), (79.0, 1.0)):
        found = MemoryOverSteps(
            redraw="counts",
            peak_bytes_S=(80.0,) * 3,
            activations_bytes_S=(),
            dispatch_bytes_S=(),
            capacity_bytes=capacity,
        )
        assert (found.p99_bytes, found.out_of_memory_fraction, found.fits_at_p99) == (80.0, chance, not chance)


def test_balancing_evens_the_scenarios_own_skew_out_and_costs_less_wait() -> None:
    curves = {
        curve.policy: curve
        for curve in balance_over_training(scenario(global_batch=1024), num_steps=1500, learning_rate=1e-3)
    }
    load, _ = routed_load(scenario())
    noisy = curves.pop("noisy_gating")  # noise evens out at once what the loss then holds
    assert noisy.max_vio[0] < curves["none"].max_vio[0]
    assert noisy.final_max_vio < curves["aux_loss"].final_max_vio
    first = [curve.max_vio[0] for curve in curves.values()]
    drawn = np.mean([row["max_vio"] for row in load.by_layer()])
    assert np.allclose(first, drawn, rtol=0.35)  # another draw of the same law, over 4 layers
    ends = [curves[name].final_max_vio for name in ("loss_free", "aux_loss", "none")]
    assert ends == sorted(ends)
    assert curves["loss_free"].steps_until_balanced is not None
    assert curves["none"].steps_until_balanced is None
    assert curves["loss_free"].lost_s < curves["aux_loss"].lost_s < curves["none"].lost_s


def test_a_redrawn_step_with_the_same_popularity_and_stream_is_the_step_itself() -> None:
    for asked in (scenario(), under({"kind": "megatron"}, pad_to_capacity=True), under({"kind": "rank_buffer"})):
        base = routed_base(asked)
        again = redrawn(asked, base, base.popularities, stream(asked.seed, "load"))
        assert np.array_equal(again.load.assigned_GMLE, base.load.assigned_GMLE)
        assert np.array_equal(again.kept_GMLS, base.kept_GMLS)
        assert np.array_equal(again.rows_GMLS, base.rows_GMLS)


def test_the_study_is_plain_values_and_a_table(study: RoutingStudy) -> None:
    plain = json.loads(json.dumps(study.to_dict(), allow_nan=False))
    assert plain["needed_capacity"]["wanted_drop_fraction"] == 0.01
    rows = study.rows()
    assert all(len(row) == 5 for row in rows)
    assert {row[0] for row in rows} >= {"route", "by_layer", "needed_capacity", "over_capacity"}
