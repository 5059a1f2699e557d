"""The accuracy notebook: parameters, that it runs on a user's own rows, what its sentences and figures say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from moesim.errors import InputError
from moesim.report import accuracy_figures, accuracy_sentences, accuracy_tables
from moesim.report.parameters import find_notebook, parameters_of
from moesim.report.runner import run_notebook
from moesim.study.accuracy import Accuracy, Kind, asked_cases, carried_cases, rows_by_part, score
from tests.notebook_cases import FEW_ROWS, smoke

NOTEBOOK = find_notebook("60_accuracy")


@pytest.fixture(scope="module")
def found() -> Accuracy:
    rows = [row for row in carried_cases("training") if any(part in row["id"] for part in FEW_ROWS)]
    return score("training", rows, "few")


def test_its_parameters_are_kind_cases_and_folder() -> None:
    assert set(parameters_of(NOTEBOOK)) == {"kind", "cases", "out_dir"}


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(InputError, match="kind: must be one of dispatch, layer, training"):
        asked_cases("", "trainig")


def test_parts_add_up_to_the_prediction_and_name_the_row(found: Accuracy) -> None:
    for row in found.rows:
        assert sum(row.parts_s.values()) == pytest.approx(row.predicted)
    by_part = rows_by_part(found)
    assert [row.id for row in by_part["host"] if "moonlight" in row.id]
    assert sum(len(rows) for rows in by_part.values()) == len(found.tested)


def test_a_left_out_row_has_the_error_that_the_catalog_tells(found: Accuracy) -> None:
    assert len(found.left_out) == len(found.rows)
    for row, left_out in zip(found.rows, found.left_out, strict=True):
        expected = row.error_fraction if row.left_out_error is None else row.left_out_error
        assert left_out.error_fraction == pytest.approx(expected)


def test_figures_and_tables_name_every_row_that_they_show(found: Accuracy) -> None:
    made = accuracy_figures.made_of(found)
    assert all(row.id in made.svg for row in found.tested)
    assert all(row.group in accuracy_figures.by_release(found).svg for row in found.rows)
    assert found.rows[0].id in accuracy_tables.worst(found).as_raw_html()


@pytest.mark.parametrize(("kind", "word"), [("layer", "time"), ("memory", "peak")])
def test_rows_that_say_no_parts_are_told_in_words_of_their_kind(kind: Kind, word: str) -> None:
    found = score(kind, carried_cases(kind), kind)
    assert "not told apart" in str(accuracy_figures.made_of(found))
    assert "No part" in str(accuracy_sentences.about_parts(found))
    assert f"of the measured {word}, nine in ten" in str(accuracy_sentences.about_errors(found))
    assert f"of the measured {word}" in accuracy_figures.predicted_measured(found).alt


def test_its_sentences_tell_the_summary(found: Accuracy) -> None:
    told = found.summary()["tested"]
    assert f"half within {told['median_absolute_error']:.1%}" in str(accuracy_sentences.about_errors(found))
    assert re.search(r"\d+ of \d+ \(\d+%\)", str(accuracy_sentences.about_envelope(found)))


def test_it_runs_whole_on_rows_of_one_s_own(tmp_path: Path) -> None:
    rows = [row for row in carried_cases("training") if any(part in row["id"] for part in FEW_ROWS)]
    page = run_notebook(NOTEBOOK, smoke(NOTEBOOK.stem, tmp_path), tmp_path / "page")
    result = json.loads((page / "results.json").read_text())["result"]
    assert {row["id"] for row in result["rows"]} == {row["id"] for row in rows if "XS" not in row["id"]}
