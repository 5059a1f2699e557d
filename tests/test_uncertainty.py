"""How sure a prediction is: laws of the draws, ranges, what matters, two scenarios under the same luck."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moesim.errors import InputError
from moesim.scenario import Scenario
from moesim.study.goodput import RunPlan, step_factors
from moesim.study.simulate import simulate
from moesim.study.uncertainty import UncertaintyPlan, UncertaintyStudy, compare, uncertainty_study
from moesim.study.uncertainty_inputs import Spread, shares, spread_of
from moesim.study.uncertainty_published import PUBLISHED_GPU_HOURS, band, deepseek_v3, gpu_hours_without_luck

SMALL = Scenario.make(
    model="olmoe-1b-7b",
    cluster="h100-8x-ib400",
    num_gpus=16,
    pp=2,
    ep=8,
    seq_len=1024,
    global_batch=128,
    cuda_graphs="full",  # a small step would wait for the host alone
)
PLAN = UncertaintyPlan(
    run=RunPlan(tokens=1e12, currency="EUR"), price_per_gpu_hour=Spread(low=2.0, high=3.0), num_seeds=2
)


@pytest.fixture(scope="module")
def study() -> UncertaintyStudy:
    return uncertainty_study(SMALL, PLAN)


@pytest.mark.parametrize("law", ["log-normal", "even", "log-even"])
def test_a_spread_is_its_law(law: str) -> None:
    spread = Spread(low=2.0, high=8.0, law=law)  # type: ignore[arg-type]
    drawn = [spread.at(share) for share in shares(2000, 0, "x")]
    if law == "log-normal":
        assert np.quantile(drawn, (0.1, 0.5, 0.9)) == pytest.approx([2, 4, 8], rel=0.01)
    else:
        assert 2 <= min(drawn) < 2.02 < 7.9 < max(drawn) <= 8
        assert np.median(drawn) == pytest.approx(5 if law == "even" else 4, rel=0.01)


def test_draws_cover_every_part_of_0_to_1_once_and_depend_on_seed_and_name_alone() -> None:
    drawn = shares(100, 3, "gini")
    assert sorted((drawn * 100).astype(int)) == list(range(100))
    assert np.array_equal(drawn, shares(100, 3, "gini"))
    assert not np.array_equal(drawn, shares(100, 3, "nic"))
    assert not np.array_equal(drawn, shares(100, 4, "gini"))


@pytest.mark.parametrize("text", ["3..2", "-1..2", "two", "", "1..nan", "0"])
def test_a_range_that_is_none_is_refused_by_name(text: str) -> None:
    with pytest.raises(InputError, match=r"--price: must be LOW\.\.HIGH"):
        spread_of(text, "--price")


def test_ranges_of_a_draw_are_of_one_draw(study: UncertaintyStudy) -> None:
    drawn = study.drawn_N
    assert drawn["tokens_per_s_per_gpu"] * drawn["step_s"] == pytest.approx(128 * 1024 / 16)
    assert drawn["mfu"] * drawn["step_s"] == pytest.approx(study.step.mfu * study.step.step_s)
    assert drawn["gpu_hours"] == pytest.approx(drawn["days"] * 24 * 16)
    price = drawn["cost"] / drawn["gpu_hours"]
    assert np.quantile(price, (0.1, 0.9)) == pytest.approx([2, 3], rel=0.02)
    for found in study.ranges.values():
        assert 0 < found.p10 <= found.p50 <= found.p90


def test_with_nothing_unknown_it_is_the_simulated_step() -> None:
    sure = UncertaintyPlan(gini=None, nic=None, model_error=False, num_seeds=1, num_draws=10)
    found = uncertainty_study(SMALL, sure)
    step = simulate(SMALL)
    for name, value in (("step_s", step.step_s), ("mfu", step.mfu), ("peak_bytes", step.memory["peak_bytes"])):
        assert (found.ranges[name].p10, found.ranges[name].p90) == pytest.approx((value, value))
    assert found.unknowns == ()


def test_model_error_is_measured_over_predicted_of_steps_like_it() -> None:
    only = UncertaintyPlan(gini=None, nic=None, num_seeds=1)
    found = uncertainty_study(SMALL, only)
    factors, told = step_factors(SMALL)
    ratios = found.drawn_N["step_s"] / found.step.step_s
    assert np.quantile(ratios, (0.1, 0.5, 0.9)) == pytest.approx(np.quantile(factors, (0.1, 0.5, 0.9)), rel=0.01)
    assert factors.min() <= ratios.min() <= ratios.max() <= factors.max()
    assert found.told == told


def test_each_bar_moves_one_unknown_alone(study: UncertaintyStudy) -> None:
    bars = {bar.unknown: bar for bar in study.tornado("step_s")}
    factors, _ = step_factors(SMALL)
    low, high = np.quantile(factors, (0.1, 0.9))
    assert bars["model error"].at_p90 / bars["model error"].at_p10 == pytest.approx(high / low)
    assert bars["gini"].at_p90 > bars["gini"].at_p10  # more skew, more waiting
    assert bars["routing"].at_p90 > bars["routing"].at_p10  # seeds differ, the slower one counts as P90
    assert bars["nic"].at_p90 < bars["nic"].at_p10
    assert bars["price"].width == bars["failures"].width == 0
    assert study.tornado("cost")[0].width == max(bar.width for bar in study.tornado("cost"))


def test_the_skew_comes_from_the_engine() -> None:
    ends = [simulate(SMALL.with_(gini=gini)).step_s for gini in (0.128, 0.352)]
    sure = UncertaintyPlan(nic=None, model_error=False, num_seeds=1)
    bars = {bar.unknown: bar for bar in uncertainty_study(SMALL, sure).tornado("step_s")}
    assert bars["gini"].at_p90 / bars["gini"].at_p10 == pytest.approx(ends[1] / ends[0], rel=0.06)


def test_a_scenario_against_itself_is_the_same_and_against_a_slower_one_always_better(study: UncertaintyStudy) -> None:
    for pair in compare(study, study):
        assert (pair.ratio.p10, pair.ratio.p90, pair.second_better_fraction) == (1, 1, 0)
    slower = uncertainty_study(SMALL.with_(recompute="full"), PLAN)
    pairs = {pair.metric: pair for pair in compare(study, slower)}
    assert pairs["step_s"].ratio.p10 > 1.1
    assert pairs["days"].second_better_fraction == pairs["mfu"].second_better_fraction == 0
    assert pairs["peak_bytes"].second_better_fraction == 1
    # Each alone is far wider than the two compared: common luck cancels.
    alone = study.ranges["step_s"]
    ratio = pairs["step_s"].ratio
    assert ratio.p90 / ratio.p10 < 0.5 * (alone.p90 / alone.p10) + 0.5
    with pytest.raises(InputError, match="seed: must be the same in both"):
        compare(study, uncertainty_study(SMALL.with_(seed=1), replace(PLAN, num_draws=10)))


def test_a_dense_model_has_no_skew_and_one_node_no_network() -> None:
    dense = Scenario.make(model="llama-3-8b", cluster="h100-8x-ib400", num_gpus=8, tp=2, seq_len=1024, global_batch=16)
    assert [unknown.name for unknown in uncertainty_study(dense).unknowns] == ["model error"]


def test_the_verb_answers_the_same_bytes_twice_and_knows_whether_a_skew_was_given(tmp_path: Path) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(
        "model: olmoe-1b-7b\ncluster: h100-8x-ib400\nnum_gpus: 8\nparallel: {ep: 8}\ntrain: {global_batch: 16}\n"
    )
    asked = ["uncertainty", str(file), "--tokens", "1e11", "--price", "2..3", "--seeds", "1", "--draws", "50", "--json"]

    def ask(*more: str) -> dict[str, object]:
        run = subprocess.run([sys.executable, "-m", "moesim", *asked, *more], capture_output=True, check=True)
        answer: dict[str, object] = json.loads(run.stdout)
        del answer["run"]
        return answer

    def names(answer: dict[str, object]) -> set[str]:
        result = answer["result"]
        assert isinstance(result, dict)
        return {unknown["name"] for unknown in result["unknowns"]}

    first = ask()
    assert first == ask()
    assert {"gini", "price"} <= names(first)
    assert "gini" not in names(ask("--gini", "0.3"))


@pytest.mark.slow
def test_deepseek_v3s_published_gpu_hours_lie_inside_the_predicted_range() -> None:
    found = deepseek_v3(num_seeds=1)
    low, high = band(found)
    assert -0.25 < low < 0 < high < 0.25
    hours = found.ranges["gpu_hours"]
    assert hours.p10 < PUBLISHED_GPU_HOURS < hours.p90
    assert gpu_hours_without_luck("kernels") < hours.p50 < gpu_hours_without_luck("megatron")
