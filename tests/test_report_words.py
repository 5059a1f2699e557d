"""Sentences and tables say what the results say: fits or not, what binds, what to change, where numbers came from."""

from __future__ import annotations

import dataclasses
import re

import pytest
from report_fakes import step_result

from moesim.catalog.step import NAMES
from moesim.metrics.part_words import STEP_CONSTANTS
from moesim.report import sentences, tables
from moesim.report.sentences import first_page
from moesim.scenario import Scenario
from moesim.study.advice import Change, changes
from moesim.study.planning import PlanningStudy, planning_study
from moesim.units import GIB

TOKENS = 1e11


@pytest.fixture(scope="module")
def study() -> PlanningStudy:
    scenario = Scenario.make(
        model="olmoe-1b-7b", cluster="h100-8x-ib400", num_gpus=16, pp=2, ep=8, seq_len=1024, global_batch=32
    )
    return planning_study(scenario, TOKENS)


@pytest.fixture(scope="module")
def options(study: PlanningStudy) -> list[Change]:
    return changes(study.scenario)


@pytest.fixture(scope="module")
def dense() -> PlanningStudy:
    scenario = Scenario.make(
        model="llama-3-8b", cluster="h100-8x-ib400", num_gpus=16, pp=2, seq_len=1024, global_batch=32
    )
    return planning_study(scenario, TOKENS)


def too_large(study: PlanningStudy) -> PlanningStudy:
    step = study.step
    over = step.memory["peak_bytes"] - 10 * GIB
    return dataclasses.replace(
        study, step=dataclasses.replace(step, fits=False, headroom_bytes=over - step.memory["peak_bytes"])
    )


def test_the_first_page_answers_the_planners_questions(study: PlanningStudy, options: list[Change]) -> None:
    page = first_page(study, options)
    starts = ("Does it fit? Yes", "How fast", "What binds?", "Is a mixture", "What to change", "How sure")
    assert len(page) == len(starts)
    for sentence, start in zip(page, starts, strict=True):
        assert sentence.startswith(start)
        assert re.search(r"\d", sentence)
    assert f"{study.step.tokens_per_s_per_gpu:,.0f} tokens/s per GPU" in page[1]
    assert "100B tokens take" in page[1]


def test_what_does_not_fit_says_by_how_much_and_what_would(study: PlanningStudy, options: list[Change]) -> None:
    page = first_page(too_large(study), options)
    assert page[0].startswith("Does it fit? No.")
    assert "10.0 GiB more than its" in page[0]
    assert f"To make it fit: {options[0].name}" in page[4]


def test_where_nothing_helps_the_nearest_change_is_named(study: PlanningStudy, options: list[Change]) -> None:
    short = [
        dataclasses.replace(option, headroom_bytes=-(i + 1.0) * GIB, tokens_per_s_per_gpu=None)
        for i, option in enumerate(options)
    ]
    assert f"The nearest, {options[0].name}, is 1.0 GiB short" in first_page(too_large(study), short)[4]
    assert "GPUs with more memory" in first_page(too_large(study), [])[4]


def test_the_fastest_change_that_fits_comes_first(options: list[Change]) -> None:
    speeds = [option.tokens_per_s_per_gpu for option in options if option.tokens_per_s_per_gpu is not None]
    assert len(speeds) > 2
    assert speeds == sorted(speeds, reverse=True)
    assert all(option.fits for option in options[: len(speeds)])


def test_more_memory_is_free_when_activations_are_recomputed(study: PlanningStudy, options: list[Change]) -> None:
    recompute = next(option for option in options if option.leaves == {"recompute": "full"})
    assert recompute.headroom_bytes > study.step.headroom_bytes


def test_a_dense_model_gets_a_report_without_experts(dense: PlanningStudy) -> None:
    assert len(first_page(dense, changes(dense.scenario))) == 5
    for about in (sentences.about_twins, sentences.about_break_even, sentences.about_load, sentences.about_drops):
        assert "no experts" in about(dense).text
    assert "This model" in tables.headline(dense.step, dense.twins).as_raw_html()


def test_takeaways_quote_the_results(study: PlanningStudy) -> None:
    assert f"Gini {study.step.gini:.2f}" in sentences.about_load(study).text
    assert study.step.binds in sentences.about_step(study).text
    assert "16 GPUs need" in sentences.about_sizes(study).text


def test_tables_are_whole_and_the_same_each_time(study: PlanningStudy, options: list[Change]) -> None:
    def made() -> dict[str, str]:
        found = {
            "question": tables.question(study.scenario),
            "headline": tables.headline(study.step, study.twins),
            "changes": tables.changes(options, study.step),
            "sizes": tables.sizes(study.cluster_sizes, TOKENS, 16),
            "provenance": tables.provenance(study.step),
            "limits": tables.not_modelled(study.step),
        }
        return {name: table.as_raw_html() for name, table in found.items()}

    shown = made()
    assert shown == made()
    assert all(item.kind in shown["provenance"] for item in study.step.provenance)
    assert all(f"{point.num_gpus:,}" in shown["sizes"] for point in study.cluster_sizes)
    assert all(option.name in shown["changes"] for option in options)
    assert not any(re.search(r"https?://|@import", text) for text in shown.values())


def test_keeping_activations_is_simulated_even_where_it_leaves_least_memory(study: PlanningStudy) -> None:
    options = changes(study.scenario.with_(recompute="full"))
    kept = next(option for option in options if option.leaves == {"recompute": "none"})
    assert kept.tokens_per_s_per_gpu is not None
    assert kept.tokens_per_s_per_gpu > study.step.tokens_per_s_per_gpu * 0.99


def test_what_was_asked_names_placement_copies_dispatcher_and_slow_gpus() -> None:
    sizes = {"model": "olmoe-1b-7b", "cluster": "h100-8x-ib400", "num_gpus": 16, "ep": 8}
    usual = tables.question(Scenario.make(**sizes)).as_raw_html()
    assert "contiguous, one slot for each expert" in usual
    assert "a token travels once for each of its experts" in usual
    assert "Unlike GPUs" not in usual
    changed = {"policy": "search", "num_slots": 80, "split": "nearest", "dispatcher": "deepep", "rank_speeds": "3=0.8"}
    page = tables.question(Scenario.make(**sizes, **changed)).as_raw_html()
    for words in ("search, 80 slots for experts and their copies", "serve the senders next to them", "3 at 0.8 ×"):
        assert words in page
    assert "once to each node" in page


def test_the_first_page_says_what_other_steps_need_where_routing_moves_it() -> None:
    step = step_result()
    held = step.memory | {"peak_p99_bytes": step.memory["peak_bytes"]}
    assert "99 of 100" not in str(sentences._fit(dataclasses.replace(step, memory=held)))
    risky = dataclasses.replace(step, out_of_memory_fraction=0.08)
    assert "99 of 100 stay under" in str(sentences._fit(risky))
    assert "8.0% of steps do not fit" in str(sentences._fit(risky))
    assert sentences._fit(risky).tone == "bad"


def test_a_scenario_placed_in_order_is_advised_to_place_by_load_and_one_placed_so_is_not() -> None:
    sizes = {"model": "olmoe-1b-7b", "cluster": "h100-8x-ib400", "num_gpus": 16, "ep": 8, "global_batch": 64}
    found = changes(Scenario.make(**sizes, gini=0.4))
    placed = next(change for change in found if change.name == "policy=search")
    assert placed.tokens_per_s_per_gpu > 0
    for other in ({"policy": "search", "gini": 0.4}, {"popularity": "balanced"}):
        assert "policy=search" not in [change.name for change in changes(Scenario.make(**sizes, **other))]


def test_every_constant_of_a_step_has_words_in_the_table_of_sources() -> None:
    assert set(STEP_CONSTANTS) == set(NAMES)
