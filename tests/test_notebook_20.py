"""The routing notebook: parameters, figures and sentences from a study, the rendered page, its files."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from moesim import Scenario
from moesim.describe.popularity import popularity_words
from moesim.door import read_yaml
from moesim.leaves import LEAVES
from moesim.report import load_figures, routing_figures, routing_sentences, routing_tables
from moesim.report.parameters import ask, check_parameters, find_notebook, notebooks_folder, parameters_of
from moesim.report.routing_export import routing_json, write_routing
from moesim.report.runner import run_notebook
from moesim.study.routed import routed_load
from moesim.study.routing import RoutingStudy, routing_study
from tests.notebook_cases import SMOKE, loads_nothing

NOTEBOOK = find_notebook("20_routing_and_drops")
PARAMETER_FILES = sorted((notebooks_folder() / "params" / "20_routing_and_drops").glob("*.yaml"))
OWN = {"wanted_drop", "num_steps", "training_steps", "learning_rate", "histogram_every", "out_dir"}
SMALL = {name: value for name, value in SMOKE[NOTEBOOK.stem].items() if name not in OWN}


@pytest.fixture(scope="module")
def study() -> RoutingStudy:
    scenario = Scenario.make(**SMALL, capacity_factor=1.25)
    return routing_study(scenario, num_steps=4, training_steps=200)


def test_parameters_are_the_scenarios_flat_names_and_the_notebooks_own() -> None:
    assert set(parameters_of(NOTEBOOK)) == {*LEAVES} | OWN


def test_the_default_question_is_valid_and_drops_something() -> None:
    known = parameters_of(NOTEBOOK)
    question = ask(check_parameters({}, known))
    assert question.scenario.routing.capacity_factor is not None
    assert set(question.own) == OWN


@pytest.mark.parametrize("path", PARAMETER_FILES, ids=lambda path: path.stem)
def test_every_parameter_file_asks_a_valid_question(path: Path) -> None:
    given = read_yaml(path)
    question = ask(check_parameters(given, parameters_of(NOTEBOOK)), sorted(given))
    assert question.scenario.cluster.num_gpus == given["num_gpus"]


def test_any_skewed_popularity_takes_the_notebooks_gini() -> None:
    known = parameters_of(NOTEBOOK)
    for kind in ("lognormal", "zipf", "dirichlet"):
        asked = ask(check_parameters({"popularity": kind}, known), ["popularity"]).scenario.routing.popularity
        assert "Gini 0.25" in popularity_words(asked)
    assert ask(check_parameters({"popularity": "balanced"}, known), ["popularity"]).scenario.routing.popularity


def test_figures_say_the_studys_numbers(study: RoutingStudy) -> None:
    drops = routing_figures.drop_family(study)
    assert f"a capacity factor of {study.needed.capacity_factor:.2f}" in drops.alt
    assert drops.svg.count("Gini ") >= 4
    where = routing_figures.drops_where(study)
    worst = study.load.layers[int(study.load.drop_fraction_L.argmax())]
    assert where.alt.startswith(f"Layer {worst} drops most")
    cost = routing_figures.cost_over_skew(study)
    dropless = [point for point in study.over_skew if point.capacity_factor is None]
    assert f"{dropless[-1].step_s / dropless[0].step_s:.2f} times as long" in cost.alt
    assert "a GPU holds" in cost.svg
    assert "none" in routing_figures.cost_over_capacity(study).svg
    assert "no balancing" in routing_figures.balancing(study.balancing).svg
    assert load_figures.load_map(study.load, study.load.layers).svg


def test_the_memory_figure_says_it_where_a_step_in_a_hundred_does_not_fit(study: RoutingStudy) -> None:
    small = [dataclasses.replace(m, capacity_bytes=m.p50_bytes) for m in study.memory]
    tight = dataclasses.replace(study, memory=tuple(small))
    assert routing_figures.memory_over_steps(tight).alt.startswith("One step in 100 needs over")
    assert routing_sentences.about_memory(tight).tone == "bad"
    assert routing_figures.memory_over_steps(study).alt.startswith("In 99 of 100 steps")
    assert routing_sentences.about_memory(study).tone == "good"


def test_memory_that_routing_does_not_move_is_said_to_stand(study: RoutingStudy) -> None:
    still = [dataclasses.replace(m, peak_bytes_S=(m.p50_bytes,) * 3) for m in study.memory]
    text = routing_sentences.about_memory(dataclasses.replace(study, memory=tuple(still))).text
    assert "the peak does not move" in text
    assert routing_figures.memory_over_steps(dataclasses.replace(study, memory=tuple(still))).svg


def test_the_first_page_answers_its_four_questions(study: RoutingStudy) -> None:
    page = routing_sentences.verdict(study)
    assert [sentence.question for sentence in page.sentences] == [
        "How uneven is the load?",
        "What does it drop?",
        "What does it cost in time?",
        "What does it cost in memory?",
    ]
    drops = page.sentences[1].text
    assert f"drops {study.load.drop_fraction:.1%} of all assignments" in drops
    assert f"takes a factor of {study.needed.capacity_factor:.2f}" in drops


def test_a_limit_costs_more_time_per_assignment_kept_or_says_otherwise(study: RoutingStudy) -> None:
    first, free = study.over_capacity[0], study.over_capacity[-1]
    change = first.step_s / (1 - first.drop_fraction) / free.step_s - 1
    text = routing_sentences.about_capacity(study).text
    assert f"{abs(change):.1%} {'more' if change > 0 else 'less'} time" in text


def test_experts_used_by_over_half_of_all_tokens_are_no_good_news() -> None:
    asked = {"model": "mixtral-8x7b", "cluster": "h100-8x-ib400", "num_gpus": 64, "pp": 4, "ep": 8, "global_batch": 64}
    found = routed_load(Scenario.make(**asked, gini=0.4))[0].to_dict()
    assert len(found["collapsed_experts"]) > 1
    words = routing_sentences.collapse_in_words(len(found["collapsed_experts"]))
    assert "are each used by over half of all tokens" in words
    assert routing_sentences.collapse_in_words(1).startswith("One expert is used")


def test_tables_name_the_busiest_expert_first(study: RoutingStudy) -> None:
    html = routing_tables.crowded(study).as_raw_html()
    ratio_LE = study.load.load_LE * study.load.num_experts
    layer, expert = (int(i) for i in np.unravel_index(int(ratio_LE.argmax()), ratio_LE.shape))
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", html)
    assert cells[:3] == [str(study.load.layers[layer]), str(expert), f"{ratio_LE.max():.2f} ×"]
    for table in (routing_tables.layers, routing_tables.needed, routing_tables.over_skew):
        assert "gt_table" in table(study).as_raw_html()


def test_a_question_without_drops_or_balancing_gets_its_sentences() -> None:
    dropless = routing_study(Scenario.make(**SMALL), num_steps=2)
    assert routing_sentences.about_drops(dropless).text.startswith("Nothing: without a capacity factor")
    assert "nothing is lost anywhere" in routing_sentences.about_where(dropless).text
    assert "not asked for" in routing_sentences.about_balancing(dropless).text
    assert routing_figures.cost_over_skew(dropless).svg
    even = routing_study(
        Scenario.make(**{k: v for k, v in SMALL.items() if k != "gini"}, popularity="balanced"), num_steps=2
    )
    assert "skew costs nothing here" in routing_sentences.about_skew(even).text


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("routing") / "out"
    return run_notebook(NOTEBOOK, SMOKE[NOTEBOOK.stem], folder, show_progress=False)


def test_the_notebook_renders_whole(rendered: Path) -> None:
    page = (rendered / "report.html").read_text()
    assert page.count("<svg") == 8
    assert page.count('class="takeaway"') == 13
    assert "Traceback" not in page
    assert "<script" not in page
    assert loads_nothing(page)


def test_its_files_are_the_studys_byte_for_byte(rendered: Path, study: RoutingStudy, tmp_path: Path) -> None:
    assert (rendered / "results.json").read_text() == routing_json(study)
    write_routing(study, tmp_path)
    for name in ("results.csv", "histogram.csv"):
        assert (rendered / name).read_bytes() == (tmp_path / name).read_bytes()
    assert write_routing(study, "") == []
    with (rendered / "results.csv").open() as file:
        sections = {row["section"] for row in csv.DictReader(file)}
    assert {"route", "by_layer", "needed_capacity", "over_capacity", "balancing, loss_free"} <= sections
    assert json.loads((rendered / "results.json").read_text())["command"] == "report"
