"""The self-check: loads become works of ranks, predictions and errors follow from numbers, the verb shows them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from moesim.cli import app
from moesim.cli.selfcheck import doubts
from moesim.cost.profile import Curve, TimedShapes, load_profile
from moesim.errors import InputError
from moesim.routing.suite import BURST_STEPS, SKEWS
from moesim.study.selfcheck import (
    NUM_RANKS,
    CheckedCase,
    check_cases,
    group_cases,
    score_cases,
    suite_cases,
    whole_counts,
)
from moesim.study.selfcheck_work import GroupWork, RankWork, predict_work, work_flops

torch = pytest.importorskip("torch")

from reference_model import timing  # noqa: E402
from reference_model.calibrate import calibrate, ranks_at_hand  # noqa: E402
from reference_model.fit import predict_layer  # noqa: E402
from reference_model.rank_share import RankShare, chosen_experts, steered_tokens, time_shares  # noqa: E402
from reference_model.shapes import LayerShapes  # noqa: E402
from reference_model.timing import Arena, Effort  # noqa: E402

CPU = torch.device("cpu")
TINY = LayerShapes(
    name="tiny",
    hidden=16,
    expert_width=16,
    num_experts=8,
    top_k=2,
    active_experts=(1, 2),
    layer_experts=8,
    max_tokens=32,
    max_rows=64,
)
ONCE = Effort(num_passes=2, min_samples=1, max_samples=2, budget_s=1e-5, num_warmups=1, num_extra_passes=0)


@pytest.fixture(autouse=True)
def _small_arena(monkeypatch):
    monkeypatch.setattr(timing, "_CPU_ARENA_BYTES", (2**20, 2**20))
    monkeypatch.setattr(timing, "_STIRRED_BYTES", 4)


@pytest.fixture(scope="module")
def shipped():
    profile = load_profile("cpu-xeon-2-threads")
    return profile, profile.shapes[0], suite_cases(profile.shapes[0])


@given(st.lists(st.floats(0, 100), min_size=1, max_size=16))
def test_whole_counts_keep_the_sum_and_move_no_load_by_one_or_more(loads):
    load_E = np.array(loads)
    load_E[0] += np.ceil(load_E.sum()) - load_E.sum()
    count_E = np.array(whole_counts(load_E))
    assert count_E.sum() == round(load_E.sum())
    assert np.abs(count_E - load_E).max() < 1 + 1e-6


def test_the_suite_has_every_case_at_two_sizes_and_no_expert_gets_more_rows_than_were_timed(shipped):
    _, shapes, cases = shipped
    assert [case.name for case in cases] == 2 * list(SKEWS)
    assert {case.tokens_per_rank for case in cases} == {16, 256}
    works = [work for case in cases for work in case.works]
    assert max(work.received_L[0] for work in works) == shapes.max_tokens
    assert all(sum(work.sent_E) == work.num_tokens * shapes.top_k for work in works)
    assert all(max(work.sent_E) <= work.num_tokens for work in works)
    steps = {case.name: len(case.works_by_step) for case in cases}
    assert (steps["balanced"], steps["rotating_hotspot"], steps["burst"]) == (1, NUM_RANKS, BURST_STEPS)


def test_a_ranks_prediction_is_that_of_the_layer_where_it_has_all_experts_evenly_loaded(shipped):
    profile, shapes, _ = shipped
    fit = json.loads(json.dumps(profile.fit, default=vars))
    work = RankWork(num_tokens=256, sent_E=(64,) * 8, received_L=(64,) * 8)
    point = {"width_in": shapes.hidden, "width_out": shapes.expert_width, "top_k": 2, "size": 256, "num_active": 8}
    seconds, tag = predict_layer(fit, "forward", point, 8)
    assert predict_work(work, profile, shapes) == (pytest.approx(seconds), tag)


def test_errors_follow_from_the_ratios_and_a_perfect_prediction_has_none(shipped):
    profile, shapes, cases = shipped
    passes = [{work: [predict_work(work, profile, shapes)[0]] * 2 for work in case.works} for case in cases]
    checked = check_cases(cases, passes, profile, shapes)
    found = {case.name: case for case in checked if case.tokens_per_rank == 256}
    assert (found["balanced"].predicted_ratio, found["balanced"].flops_ratio) == (1.0, 1.0)
    assert found["hot_rank"].flops_ratio == pytest.approx(2.0, abs=0.01)  # half of all rows in a quarter of the ranks
    assert found["zero_expert_rank"].flops_ratio == pytest.approx(4 / 3, abs=0.02)
    assert found["rotating_hotspot"].predicted_s == pytest.approx(found["hot_rank"].predicted_s)
    burst = (BURST_STEPS - 1 + found["hot_rank"].predicted_ratio) / BURST_STEPS
    assert found["burst"].predicted_ratio == pytest.approx(burst)
    assert {case.noise_fraction for case in checked} == {0.0}
    score = score_cases(checked)
    assert score.median_error_fraction == 0.0
    skewed = [case.measured_ratio for case in checked if case.measured_ratio > 1.15]
    assert score.num_cases == len(skewed) > 0
    assert score.median_error_answering_1_fraction == pytest.approx(np.median([1 - 1 / ratio for ratio in skewed]))


def test_a_case_takes_its_slowest_rank_in_its_least_disturbed_pass(shipped):
    profile, shapes, cases = shipped
    balanced, hot = (next(case for case in cases if case.name == name) for name in ("balanced", "hot_rank"))
    hottest, *others = sorted(hot.works, key=lambda work: -sum(work.received_L))
    passes = [{balanced.works[0]: [1.0, 1.0]}, {hottest: [2.2, 2.0, 5.0], **{work: [1.0, 9.0] for work in others}}]
    case = check_cases([balanced, hot], passes, profile, shapes)[1]
    assert (case.measured_s, case.measured_ratio, case.noise_fraction) == (2.0, 2.0, pytest.approx(3.5))


@pytest.fixture(scope="module")
def timed_by_two_ranks(shipped):
    """The shipped profile as if two ranks had timed it at once: exchanges at 1 GB/s, rows sorted as tokens are."""
    profile, shapes, _ = shipped
    ideal_s, sizes = 1 / profile.fit.bytes_per_s, (256, 2**26)
    plain = {"direction": "forward", "width_in": 0, "num_active": 1, "sizes": sizes}
    exchange = Curve(kind="all_to_all", width_out=2, utilisations=(ideal_s / 1e-9,) * 2, **plain)
    sorts = [
        replace(curve, width_out=1)
        for curve in profile.fit.curves
        if curve.kind in ("permute", "combine") and curve.direction == "forward"
    ]
    fit = replace(profile.fit, curves=(*profile.fit.curves, *sorts, exchange))
    return replace(profile, fit=fit), shapes


def test_a_group_sends_what_its_ranks_experts_do_not_hold_and_keeps_the_rest():
    work = GroupWork(sent_SE=((3, 1, 0, 2), (0, 0, 5, 1)))
    assert work.rows_RR().tolist() == [[4, 2], [0, 6]]
    ranks = work.of_ranks(top_k=2)
    assert [rank.received_L for rank in ranks] == [(3, 1), (5, 3)]
    assert [rank.num_tokens for rank in ranks] == [3, 3]


def test_a_hot_rank_of_two_takes_three_quarters_and_an_empty_one_nothing(timed_by_two_ranks):
    _, shapes = timed_by_two_ranks
    cases = {case.name: case for case in group_cases(shapes, num_ranks=2, quick=True)}
    share = {
        name: np.array(case.works_by_step[0][0].sent_SE).sum(axis=0).reshape(2, -1).sum(axis=1) / 2048
        for name, case in cases.items()
    }
    assert share["hot_rank"].tolist() == [0.75, 0.25]
    assert share["zero_expert_rank"].tolist() == [1.0, 0.0]
    assert {len(work) for case in cases.values() for work in case.works_by_step} == {1}


def test_a_groups_time_is_each_stage_by_its_slowest_rank_with_the_exchanges_between(timed_by_two_ranks):
    profile, shapes = timed_by_two_ranks
    lone = GroupWork(sent_SE=((128,) * 4 + (0,) * 4, (0,) * 4 + (128,) * 4))  # nothing leaves its rank
    sent = GroupWork(sent_SE=((0,) * 4 + (128,) * 4, (128,) * 4 + (0,) * 4))  # everything does
    part_s, (alone_s, _) = profile.part_s, predict_work(lone.of_ranks(2)[0], profile, shapes)
    sorting_s = sum(part_s(kind, [512], width_in=512, width_out=1).seconds for kind in ("permute", "combine"))
    row_bytes = 512 * 512 * 4
    moves = [(2 * row_bytes, row_bytes), (2 * 4 * 8, 4 * 8), (2 * 4 * 512, 4 * 512), (2 * row_bytes, row_bytes)]
    floor_s = profile.launch_s
    for work, leaves in ((lone, False), (sent, True)):
        # Counts of rows always go both ways; the rest stays, and is copied, or goes.
        wire_s = sum(
            floor_s
            + 1e-9 * (through if leaves or through == 64 else 1)
            + float(profile.memory_s(2 * kept if not leaves or through == 64 else 0).seconds)
            for through, kept in moves
        )
        assert predict_work(work, profile, shapes)[0] == pytest.approx(alone_s + float(sorting_s) + wire_s, rel=1e-9)
    hot = GroupWork(sent_SE=((256, 256) + (0,) * 6, (256, 256) + (0,) * 6))
    assert predict_work(hot, profile, shapes)[0] > predict_work(sent, profile, shapes)[0]
    assert work_flops(hot, shapes) == pytest.approx(2 * work_flops(sent, shapes), rel=0.01)


def test_cases_as_fast_as_the_balanced_one_are_not_scored():
    plain = {"name": "burst", "tokens_per_rank": 4, "noise_fraction": 0.0, "tag": "measured", "flops": 1.0}
    case = CheckedCase(**plain, predicted_s=1.0, measured_s=1.0, predicted_ratio=1.5, measured_ratio=2.0, flops_ratio=1)
    score = score_cases([case, replace(case, measured_ratio=1.1)])
    assert (score.num_cases, score.median_error_fraction) == (1, 0.25)
    assert (score.median_error_answering_1_fraction, score.median_error_flops_only_fraction) == (0.5, 0.5)
    assert score_cases([]).median_error_fraction is None


def test_the_layers_own_router_picks_the_experts_that_the_load_asks_for():
    sent_E = (6, 1, 3, 0, 2, 0, 0, 0)
    share = RankShare((sent_E, (5, 0)), TINY, Arena(CPU, torch.float32, 2**20))
    choice, _ = share.layer.choose(steered_tokens(share.chosen_TE, TINY.hidden, share.arena))
    assert tuple(share.layer.plan(choice).load_E.tolist()) == sent_E
    rows_QH, output_TH = share.prepare()()
    assert (rows_QH.shape, output_TH.shape) == ((5, 16), (6, 16))


@pytest.mark.parametrize("sent_E", [(3, 0), (2, 1), (4, 1, 1)])
def test_loads_that_no_tokens_can_make_are_refused(sent_E):
    with pytest.raises(ValueError, match="no top-2 choices"):
        chosen_experts(sent_E, top_k=2)


def test_shares_that_disagree_are_timed_again(monkeypatch):
    times = iter([1.0, 5.0, 1.02])
    monkeypatch.setattr("reference_model.rank_share.sample_times_s", lambda *_: [next(times)])
    more = replace(ONCE, num_extra_passes=3)
    assert time_shares([((2, 2), (2,))], TINY, CPU, more, lambda *_: None) == [[1.0, 5.0, 1.02]]


def moesim(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["selfcheck", *map(str, arguments)])
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def tiny_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("reference_model.calibrate.ranks_at_hand", lambda _: 1)  # no exchanges: they want processes
    path = tmp_path / "tiny.json"
    calibrate("cpu", TINY, quick=True, out_path=path, progress=lambda *_: None, effort=ONCE)
    return path


def test_the_verb_runs_the_suite_and_says_predicted_beside_measured(tiny_profile, tmp_path, monkeypatch):
    monkeypatch.setattr("reference_model.rank_share.QUICK", ONCE)
    status, out, err = moesim("--quick", "--profile", tiny_profile, "--json", "--out", tmp_path / "out")
    assert status == 0, err
    result = json.loads(out)["result"]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["result"] == result
    cases = {case["name"]: case for case in result["cases"]}
    assert tuple(cases) == SKEWS
    balanced = cases["balanced"]
    for case in cases.values():
        assert case["predicted_ratio"] == pytest.approx(case["predicted_s"] / balanced["predicted_s"])
        assert case["measured_ratio"] == pytest.approx(case["measured_s"] / balanced["measured_s"])
        assert min(case["predicted_s"], case["measured_s"]) > 0
    assert result["score"]["num_cases"] == sum(case["measured_ratio"] > 1.15 for case in cases.values())
    assert "running" in err
    status, out, _ = moesim("--quick", "--profile", tiny_profile)
    assert status == 0
    assert max(map(len, out.splitlines())) <= 80
    assert all(name in out for name in (*SKEWS, "Answering 1.0", "FLOPs only", "Repeat noise"))


def test_without_a_profile_the_small_layer_is_calibrated_first(tmp_path, monkeypatch):
    monkeypatch.setattr("reference_model.calibrate.ranks_at_hand", lambda _: 1)
    monkeypatch.setattr("reference_model.shapes.CPU_SMALL", TINY)
    monkeypatch.setattr("reference_model.calibrate.QUICK", ONCE)
    monkeypatch.setattr("reference_model.rank_share.QUICK", ONCE)
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    status, out, err = moesim("--quick", "--json", "--threads", 1, "--out", tmp_path)
    assert status == 0, err
    assert threads == [1]
    found = json.loads(out)["result"]
    assert (found["calibrated_here"], found["layer"]["name"]) == (True, "tiny")
    assert load_profile(str(tmp_path / "profile.json")).shapes[0].active_experts == (1, 2)


def test_wrong_devices_and_profiles_are_refused_in_one_line(tiny_profile):
    other = tiny_profile.with_name("other.json")
    name = json.loads(tiny_profile.read_text())["device"]["name"]
    other.write_text(tiny_profile.read_text().replace(json.dumps(name), '"Another CPU"'))
    for arguments, words in [
        (("--device", "tpu"), "--device: must be auto, cuda or cpu"),
        (("--profile", other), "device: must be the one to check"),
        (("--profile", "cpu-xeon"), "must be a shipped profile or a path to one"),
    ]:
        status, out, err = moesim(*arguments)
        assert (status, out, len(err.splitlines())) == (2, "", 1)
        assert words in err


@pytest.mark.skipif(ranks_at_hand(CPU) < 2, reason="needs two cores; this machine has one")
def test_two_ranks_at_once_are_checked_against_a_profile_that_two_ranks_timed(tmp_path, tiny_profile, monkeypatch):
    monkeypatch.setattr("reference_model.rank_share.QUICK", ONCE)
    monkeypatch.setattr("reference_model.calibrate.ranks_at_hand", ranks_at_hand)
    status, _, err = moesim("--quick", "--ranks", 2, "--profile", tiny_profile)
    assert (status, "num_ranks: must be 2" in err, "calibrate --ranks 2" in err) == (2, True, True)
    path = tmp_path / "two.json"
    calibrate("cpu", TINY, quick=True, out_path=path, progress=lambda *_: None, effort=ONCE, num_ranks=2)
    status, out, err = moesim("--quick", "--ranks", 2, "--profile", path, "--json")
    assert status == 0, err
    result = json.loads(out)["result"]
    cases = {case["name"]: case for case in result["cases"]}
    assert tuple(cases) == SKEWS
    errors = [abs(case["predicted_s"] / case["measured_s"] - 1) for case in cases.values()]
    assert result["score"]["median_seconds_error_fraction"] == pytest.approx(np.median(errors))


def test_experts_that_do_not_divide_among_the_ranks_are_refused():
    shapes = TimedShapes(**{**vars(TINY), "layer_experts": 6})
    with pytest.raises(InputError, match="must divide num_experts=6"):
        suite_cases(shapes)


def test_a_layer_far_slower_or_noisier_than_its_calibration_is_told_of():
    plain = {"name": "balanced", "tokens_per_rank": 4, "tag": "measured", "flops": 1.0, "predicted_s": 1.0}
    calm = CheckedCase(**plain, measured_s=1.1, noise_fraction=0.02)
    skewed = replace(calm, name="hot_rank", measured_ratio=2.0)
    assert doubts([calm, skewed], score_cases([calm, skewed])) == []
    busy = replace(calm, measured_s=2.0, noise_fraction=0.5)
    told = doubts([busy], score_cases([busy]))
    assert ["disagree by 50%" in told[0], "2.0 times" in told[1], "nothing to score" in told[2]] == [True] * 3
