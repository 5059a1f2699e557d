"""The design notebook and its study: axes, twins, the scaling law, that it runs whole, that its files agree."""

import json
import math
import re
from pathlib import Path

import papermill
import pytest

from moesim.catalog.design import model_from_design
from moesim.describe.parameters import active_parameters, total_parameters
from moesim.errors import InputError
from moesim.leaves import LEAVES
from moesim.report.design_export import read_axes
from moesim.report.parameters import find_notebook, parameters_of
from moesim.report.runner import run_notebook
from moesim.scenario import Scenario
from moesim.study.design_axes import AXES, default_values, design_study, first_moe, varied_model, varied_scenario
from moesim.study.quality import PARAMETERS, quality_of, routed_loss
from tests.notebook_cases import OLMOE_ON_16, SMOKE

NOTEBOOK = find_notebook("25_dense_vs_moe")
OWN = {"axes", "scaling_law", "price_per_gpu_hour", "currency", "out_dir"}
DESIGN = {
    "name": "my-moe",
    "hidden": 1024,
    "num_layers": 8,
    "vocab": 32000,
    "attention": {"num_heads": 16},
    "ffn": {"width": 4096, "gated": False},
    "moe": {"every": 2, "num_experts": 64, "top_k": 1, "width": 4096, "gated": False},
}


def small(**leaves: object) -> Scenario:
    return Scenario.make(**{**OLMOE_ON_16, **leaves})


def test_its_parameters_are_the_scenarios_flat_names_and_its_own() -> None:
    assert set(parameters_of(NOTEBOOK)) == {*LEAVES, *OWN}
    assert set(papermill.inspect_notebook(NOTEBOOK)) == {*LEAVES, *OWN}


def test_axes_are_read_strictly() -> None:
    assert read_axes("") is None
    assert read_axes(" top_k = 2, 4 ;capacity_factor=none,1.25;") == {
        "top_k": (2, 4),
        "capacity_factor": (None, 1.25),
    }
    for text, words in (
        ("topk=2", "names no axis"),
        ("top_k=two", "must read such as"),
        ("top_k=none", "must read such as"),
        ("top_k=2; top_k=4", "once"),
    ):
        with pytest.raises(InputError, match=words):
            read_axes(text)


@pytest.mark.parametrize("axis", [axis for axis in AXES if axis != "capacity_factor"])
def test_an_axis_changes_what_it_names_and_keeps_hidden_size_attention_and_depth(axis: str) -> None:
    scenario = small()
    for value in default_values(scenario)[axis]:
        model = varied_model(scenario, axis, value)
        assert (model.hidden, len(model.layers)) == (scenario.model.hidden, len(scenario.model.layers))
        assert {layer.attention for layer in model.layers} == {layer.attention for layer in scenario.model.layers}
        moe, was = first_moe(model), first_moe(scenario.model)
        changed = {
            "num_experts": moe.num_experts != was.num_experts,
            "top_k": moe.router.top_k != was.router.top_k,
            "expert_width": moe.expert.width != was.expert.width,
            "shared_experts": moe.shared != was.shared,
            "moe_every": len(model.moe_layers) != len(scenario.model.moe_layers),
        }
        several = {"num_experts", "top_k", "expert_width"} if axis == "granularity" else {axis}
        still = value == (0 if axis == "shared_experts" else None)
        assert {name for name, is_changed in changed.items() if is_changed} == (set() if still else several)


def test_finer_experts_and_fewer_moe_layers_keep_the_active_size_within_two_percent() -> None:
    scenario = small()
    for axis, value in (("granularity", 2.0), ("granularity", 0.5), ("moe_every", 2)):
        model = varied_model(scenario, axis, value)
        assert active_parameters(model) == pytest.approx(active_parameters(scenario.model), rel=0.02)
    finer = varied_model(scenario, "granularity", 2.0)
    assert total_parameters(finer) == pytest.approx(total_parameters(scenario.model), rel=0.02)


def test_expert_parallelism_is_halved_where_it_divides_the_experts_no_more() -> None:
    varied, note = varied_scenario(small(), "num_experts", 36)
    assert varied.parallel.ep == 4
    assert "ep=4" in note


def test_what_cannot_be_says_why_and_stops_nothing_else() -> None:
    study = design_study(small(), values={"top_k": (4, 128), "expert_width": (0.5,)})
    assert [point.name for point in study.possible] == ["top_k=4"]
    assert "must not exceed" in study.points[1].note
    assert "whole" in study.points[2].note


def test_a_design_file_is_varied_as_a_preset_is_and_its_twins_bracket_it() -> None:
    scenario = small().with_(model=model_from_design(DESIGN, owner="my.yaml"))
    study = design_study(scenario, values={"num_experts": (128,)}, price_per_gpu_hour=2.0)
    for point in (study.asked, *study.possible):
        moe, active, total = point.costs
        assert active.flops_per_token == pytest.approx(moe.flops_per_token, rel=0.02)
        assert active.total_parameters < moe.total_parameters == pytest.approx(total.total_parameters, rel=0.02)
        assert active.gpu_hours_per_billion_tokens < total.gpu_hours_per_billion_tokens
        assert study.money_per_billion_tokens(moe) == pytest.approx(
            2e9 * scenario.cluster.num_gpus * moe.step_s / (32 * 512) / 3600
        )
    assert study.possible[0].costs[0].total_parameters > study.asked.costs[0].total_parameters


def test_the_scaling_law_equals_its_published_dense_line_and_cutoff() -> None:
    # Table 3 of arXiv 2202.01169: dense models alone follow (3.568e13 / N)**0.078; both fits agree within 3 %.
    for parameters in (55e6, 370e6, 1.3e9):
        assert routed_loss(parameters, 1) == pytest.approx((3.568e13 / parameters) ** 0.078, rel=0.03)
    losses = [routed_loss(370e6, experts) for experts in (1, 2, 8, 64, 512)]
    assert losses == sorted(losses, reverse=True)
    # Beyond about 10**12 parameters (c log N = -b; 937e9 by the paper's unrounded fit) routing helps no more.
    assert routed_loss(1e12, 512) == pytest.approx(routed_loss(1e12, 2), rel=1e-9)


def test_the_scaling_law_speaks_of_what_it_was_fitted_on_only() -> None:
    inside = quality_of(model_from_design(DESIGN, owner="my.yaml"))
    assert inside.loss is not None
    assert inside.dense_loss is not None
    assert 2 < inside.loss < inside.dense_loss < 4
    for change, reason in (
        ({"top_k": 2}, "a token uses 2 experts"),
        ({"num_experts": 1024}, "1,024 experts"),
        ({"every": 1}, "8 of 8 layers"),
        ({"shared_width": 64}, "shared"),
    ):
        outside = quality_of(model_from_design({**DESIGN, "moe": {**DESIGN["moe"], **change}}, owner="my.yaml"))
        assert outside.loss is None
        assert any(reason in words for words in outside.outside)
    wide = quality_of(model_from_design({**DESIGN, "hidden": 8192}, owner="my.yaml"))
    assert any("active parameters" in words for words in wide.outside)
    assert math.isclose(PARAMETERS[1], 1.3e9)


def test_a_dense_model_has_no_design_axes() -> None:
    with pytest.raises(InputError, match="must have MoE layers"):
        design_study(Scenario.make(model="llama-3-8b", cluster="h100-8x-ib400", num_gpus=8))


def test_it_runs_whole_and_its_files_agree_with_its_page(tmp_path: Path) -> None:
    out = run_notebook(NOTEBOOK, SMOKE[NOTEBOOK.stem], tmp_path / "out", show_progress=False)
    result = json.loads((out / "results.json").read_text())["result"]
    page = re.sub(r"<[^>]+>", " ", (out / "report.html").read_text())
    asked = result["points"][0]
    hours = 1e9 / asked["cost"]["tokens_per_s_per_gpu"] / 3600
    assert f"{2 * hours:,.4g} USD ({hours:,.4g} GPU-hours)" in page
    assert "no design lies in its range" in page
    assert "a token uses 8 experts, not 1" in page
    rows = (out / "results.csv").read_text().splitlines()
    assert f"moe,top_k.step_s,4,{result['points'][1]['cost']['step_s']},s" in rows
    assert (out / "report.html").read_text().count("<svg") == 3
