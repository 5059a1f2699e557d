"""The calibration notebook: every point beside its prediction, held-out errors against the goal, rendered whole."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from moesim.cost.profile import HeldOutError, load_profile
from moesim.errors import InputError
from moesim.report import calibration_figures, calibration_sentences, calibration_tables
from moesim.report.parameters import find_notebook, parameters_of
from moesim.report.runner import run_notebook
from moesim.study.calibration import CalibrationStudy, calibration_study, is_within_goal
from reference_model import fit as fitting
from tests.notebook_cases import SMOKE, loads_nothing

NAME = "15_calibration"
PROFILE = "cpu-xeon-2-threads"


@pytest.fixture(scope="module")
def study() -> CalibrationStudy:
    return calibration_study(load_profile(PROFILE))


def test_held_out_errors_of_the_points_are_those_that_the_profile_states(study: CalibrationStudy) -> None:
    for row in study.profile.errors:
        errors = [p.error_fraction for p in study.of(row.kind, row.direction) if p.point.held_out]
        assert len(errors) == row.num_points
        assert np.median(np.abs(errors)) == pytest.approx(row.median_fraction, rel=1e-9)
        assert np.median(errors) == pytest.approx(row.bias_fraction, rel=1e-9)


def test_a_layers_parts_add_up_to_its_prediction(study: CalibrationStudy) -> None:
    layers = study.of("layer", "backward")
    assert layers
    for layer in layers:
        assert sum(layer.parts_s.values()) == pytest.approx(layer.predicted_s)
        assert layer.parts_s["first product"] > layer.parts_s["second product"] > layer.parts_s["combine"]
        assert set(layer.parts_s) == set(calibration_figures._PARTS), "each part has its colour"


def _row(median: float, p90: float, noise: float) -> HeldOutError:
    numbers = {"median_fraction": median, "p90_fraction": p90, "bias_fraction": 0.0, "noise_fraction": noise}
    return HeldOutError(kind="dense", direction="forward", num_points=3, **numbers)


@pytest.mark.parametrize(
    ("median", "p90", "noise", "within"),
    [(0.06, 0.15, 0.0, True), (0.07, 0.1, 0.0, False), (0.07, 0.1, 0.05, True), (0.01, 0.16, 0.2, False)],
)
def test_the_goal_is_the_larger_of_six_percent_and_one_and_a_half_times_the_noise(
    median: float, p90: float, noise: float, within: bool
) -> None:
    row = _row(median, p90, noise)
    assert is_within_goal(row) == within
    assert fitting.is_within_goal(dataclasses.asdict(row)) == within, "both packages say the same"


def test_figures_and_sentences_say_the_profiles_numbers(study: CalibrationStudy) -> None:
    beyond = study.beyond_goal
    inside = f"{len(study.profile.errors) - len(beyond)} of {len(study.profile.errors)} kinds"
    assert inside in calibration_figures.residuals(study).alt
    text = calibration_sentences.about_errors(study).text
    assert inside in text
    assert all(f"{row.median_fraction:.1%}" in text for row in beyond)
    layer = next(row for row in study.profile.errors if (row.kind, row.direction) == ("layer", "backward"))
    signed = float(np.median([point.error_fraction for point in study.of("layer", "backward")]))
    assert abs(signed) <= layer.p90_fraction
    told = f"backward {abs(signed):.1%} too {'short' if signed < 0 else 'long'}"
    assert told in calibration_sentences.about_layers(study).text
    for figure in (calibration_figures.products, calibration_figures.parts, calibration_figures.layers):
        assert "<svg" in figure(study).svg
    assert "gt_table" in calibration_tables.errors(study).as_raw_html()
    calm = dataclasses.replace(
        study, profile=dataclasses.replace(study.profile, errors=(_row(0.01, 0.02, 0.0),), points=study.profile.points)
    )
    assert calibration_sentences.about_errors(calm).tone == "good"


def test_the_notebook_renders_whole(tmp_path: Path) -> None:
    out = run_notebook(NAME, SMOKE[NAME], tmp_path / "out", show_progress=False)
    assert {path.name for path in out.iterdir()} == {"report.html", "report.ipynb", "results.json", "results.csv"}
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 4
    assert "Traceback" not in page
    assert loads_nothing(page)
    result = json.loads((out / "results.json").read_text())["result"]
    assert len(result["points"]) == len(load_profile(PROFILE).points)


def test_its_parameters_are_checked_before_it_runs(tmp_path: Path) -> None:
    assert set(parameters_of(find_notebook(NAME))) == {"profile", "out_dir"}
    with pytest.raises(InputError, match=r"profil: is not a parameter.*Did you mean profile"):
        run_notebook(NAME, {"profil": "x"}, tmp_path / "out", show_progress=False)
