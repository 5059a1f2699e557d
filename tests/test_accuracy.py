"""``moesim accuracy``: rows, summary, the page's sections, the scores that results ask, and the verb itself."""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path

import pytest
from test_memory_b200 import deepseek_v3_of_four_layers, llama

import moesim.catalog.scores as catalog_scores
from moesim.catalog.scores import Likeness, cases_like, scores
from moesim.cli import app
from moesim.errors import InputError
from moesim.metrics.scored import accuracy_statement, accuracy_warning
from moesim.report.accuracy_figures import predicted_measured
from moesim.report.accuracy_page import accuracy_section, write_section
from moesim.scenario import Scenario
from moesim.study.accuracy import (
    WITH_SCORES,
    Accuracy,
    Kind,
    NotExpressed,
    carried_cases,
    read_cases,
    score,
    summarise_errors,
)
from moesim.study.accuracy_cases import catalog_model
from moesim.study.accuracy_training import express, predict, step_s

ROOT = Path(__file__).parent.parent


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        app([*arguments])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def row_of(name: str) -> dict[str, str]:
    return dict(next(row for row in carried_cases("training") if row["id"] == name))


@pytest.fixture(scope="module")
def carried() -> dict[Kind, Accuracy]:
    return {kind: score(kind, carried_cases(kind), kind) for kind in WITH_SCORES}


def test_the_committed_scores_are_those_of_the_carried_rows(carried: dict[Kind, Accuracy]) -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "make_accuracy.py"))
    again = [line.split(",") for line in tool["score_lines"](list(carried.values()))]
    committed = [line.split(",") for line in (ROOT / "moesim" / "catalog" / "scores.csv").read_text().splitlines()]
    at = again[0].index("predicted_s")
    assert [cells[:at] + cells[at + 1 :] for cells in again] == [cells[:at] + cells[at + 1 :] for cells in committed]
    for now, then in zip(again[1:], committed[1:], strict=True):
        told = f"the prediction of {now[1]} has moved: python tools/make_accuracy.py"
        assert float(now[at]) == pytest.approx(float(then[at]), rel=0.01), told


def test_no_carried_row_is_dropped_silently(carried: dict[Kind, Accuracy]) -> None:
    for kind, found in carried.items():
        per_row = 2 if kind == "layer" else 1
        assert len(found.rows) + len(found.not_expressed) == per_row * len(carried_cases(kind))
        assert all(row.reason for row in found.not_expressed)


def test_the_worst_row_comes_first_and_a_row_outside_the_envelope_says_why(carried: dict[Kind, Accuracy]) -> None:
    found = carried["training"]
    errors = [abs(row.error_fraction) for row in found.rows]
    assert errors == sorted(errors, reverse=True)
    assert all(bool(row.reasons) != row.inside_envelope for row in found.rows)


def test_a_summary_is_median_ninetieth_percentile_bias_and_worst_of_the_tested_rows(
    carried: dict[Kind, Accuracy],
) -> None:
    found = carried["layer"]
    errors = sorted(abs(row.error_fraction) for row in found.rows)
    part = found.summary()["tested"]
    assert part["num_rows"] == 12
    assert part["median_absolute_error"] == pytest.approx((errors[5] + errors[6]) / 2)
    assert abs(part["worst_error"]) == errors[-1]
    assert part["mean_error"] == pytest.approx(sum(row.error_fraction for row in found.rows) / 12)
    assert found.summary()["used_in_fit"] is None


def test_models_cut_to_some_layers_are_those_of_the_memory_tests() -> None:
    dense = catalog_model(row_of("simumax_llama3_405b_l4_tp1_pp2_dp4_mbc4_cef"), "row")
    assert dense.layers == llama("405b", 1).layers
    assert catalog_model(row_of("simumax_llama3_70b_l12_tp1_pp2_dp4_mbc4_cef"), "row").layers == llama("70b", 1).layers
    moe = catalog_model(row_of("simumax_deepseekv3_l4_tp1_ep8_pp1_dp8_mbc4_cef"), "row")
    ours = deepseek_v3_of_four_layers()
    assert [layer.attention for layer in moe.layers] == [layer.attention for layer in ours.layers]
    assert [getattr(layer.ffn, "num_experts", 0) for layer in moe.layers] == [0, 256, 256, 256]
    assert not moe.mtp_layers


def test_a_training_row_becomes_the_scenario_that_it_describes() -> None:
    scenario, reasons = express(row_of("mcore_paper_qwen235_h100"), "row")
    p = scenario.parallel
    assert (p.tp, p.pp, p.vpp, p.ep, p.etp, scenario.cluster.num_gpus) == (2, 8, 4, 32, 1, 256)
    assert (scenario.train.global_batch, scenario.routing.dispatcher) == (2048, "deepep")
    assert scenario.routing.popularity.kind == "balanced"
    assert scenario.train.recompute == "moe_act,layernorm"
    assert (scenario.train.overlap, scenario.train.cuda_graphs) == (
        "forward_backward",
        "attn,moe_router,moe_preprocess",
    )
    assert not reasons


def test_runs_on_racks_of_72_that_do_not_fill_them_use_64_gpus_of_each() -> None:
    scenario, _ = express(row_of("mcore_paper_dsv3_gb200_bf16"), "row")
    assert (scenario.cluster.num_gpus, scenario.cluster.ranks_per_node) == (256, 64)


def test_a_step_is_told_in_seconds_milliseconds_or_tokens() -> None:
    base = {"gbs": "32", "seq_len": "4096", "n_gpus": "8"}
    assert step_s(base | {"step_time_s": "0.6"}, "row") == 0.6
    assert step_s(base | {"real_step_ms": "600"}, "row") == pytest.approx(0.6)
    assert step_s(base | {"tokens_per_s_per_gpu": "16384"}, "row") == pytest.approx(1.0)
    with pytest.raises(InputError, match="step_time_s: must be given"):
        step_s(base, "row")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"config_complete": "partial"}, "config_complete must be full"),
        ({"model": "MoE-XS"}, "model must name a known model"),
        ({"gpu": "TPUv3"}, "gpu must begin with"),
        ({"mbs": ""}, "mbs must be a positive number"),
        ({"gbs": "1e6", "mbs": "1"}, "gbs must make at most"),
        ({"step_time_s": "0"}, "step_time_s must be a positive number"),
        ({"hidden": "1e30", "ep": "1e30"}, "ep must be a positive number up to 1e+09"),
        ({"ep": "7"}, "ep "),
        ({"n_layers": "99"}, "n_layers must not exceed"),
        ({"seq_len": "4096.5"}, "seq_len must be a whole number"),
    ],
)
def test_a_training_row_that_cannot_be_expressed_is_listed_with_its_reason(
    changes: dict[str, str], reason: str
) -> None:
    (found,) = predict(row_of("simumax_deepseekv3_l4_tp1_ep8_pp1_dp8_mbc4_cef") | changes, "row")
    assert isinstance(found, NotExpressed)
    assert found.reason.startswith(reason)


def test_rows_like_a_question_share_its_gpu_where_there_are_enough() -> None:
    dense = cases_like(Likeness(gpu="b200", is_moe=False, crosses_nodes=False, precision="bf16"))
    assert dense is not None
    alike = [s for s in scores() if s.like.gpu == "b200" and not s.like.is_moe and s.kind == "training"]
    assert dense.num_rows == sum(not s.used_in_fit for s in alike) < len(alike)
    moe = cases_like(Likeness(gpu="b200", is_moe=True, crosses_nodes=False, precision="bf16"))
    assert moe is not None
    assert moe.shared.startswith("any model, b200")
    nowhere = cases_like(Likeness(gpu="my-gpu", is_moe=True, crosses_nodes=True, precision="bf16"))
    assert nowhere is not None
    assert not nowhere.same_gpu


def test_rows_of_a_fit_say_nothing_about_rows_to_come() -> None:
    across = Likeness(gpu="h200", is_moe=True, crosses_nodes=True, precision="bf16")
    found = cases_like(across, kind="dispatch")
    alike = [score for score in scores() if score.kind == "dispatch" and score.like == across]
    assert found is not None
    assert found.num_rows == sum(not score.used_in_fit for score in alike) < len(alike)


def test_a_result_is_warned_about_where_measured_steps_on_its_gpu_were_far_off(monkeypatch: pytest.MonkeyPatch) -> None:
    b200 = Scenario.make(model="llama-3-70b", cluster="b200-8x-ib400", num_gpus=8, tp=8, global_batch=8)
    assert accuracy_warning(b200) == ""
    assert accuracy_statement(b200).startswith(
        "Cases like this (dense, b200, within a node, bf16): 23 rows, median error"
    )
    slower = tuple(dataclasses.replace(score, measured_s=1.3 * score.measured_s) for score in scores())
    monkeypatch.setattr(catalog_scores, "scores", lambda: slower)
    assert accuracy_warning(b200) == accuracy_statement(b200) != ""
    h800 = b200.with_(cluster="h800-8x-ib400", num_gpus=8)
    assert accuracy_warning(h800) == ""
    assert "any GPU" in accuracy_statement(h800)


def test_a_section_is_replaced_whole_and_the_others_stay(tmp_path: Path) -> None:
    page = tmp_path / "accuracy.md"
    write_section(page, "port", "## Port\none")
    write_section(page, "layer", "## Layer\nlayer")
    write_section(page, "port", "## Port\ntwo \\1")
    text = page.read_text()
    assert "one" not in text
    assert text.index("two \\1") < text.index("## Layer")
    assert text.count("begin -->") == 2


def test_the_page_names_worst_rows_groups_and_rows_without_a_prediction(carried: dict[Kind, Accuracy]) -> None:
    found = carried["training"]
    text = accuracy_section(found, figure="x.svg")
    assert f"`{found.rows[0].id}`" in text
    assert all(group.name in text for group in found.groups())
    assert all(row.id in text for row in found.not_expressed)


def test_the_page_in_docs_was_made_from_these_scores() -> None:
    text = (ROOT / "docs" / "accuracy.md").read_text()
    for kind in WITH_SCORES:
        rows = [score for score in scores() if score.kind == kind]
        assert f"\n{len(rows)} rows, " in text, kind


def test_the_figure_tells_the_same_numbers_as_the_summary(carried: dict[Kind, Accuracy]) -> None:
    found = carried["layer"]
    picture = predicted_measured(found)
    whole = summarise_errors("tested", found.tested)
    assert f"within {whole.median:.0%}" in picture.alt
    assert found.rows[0].id in picture.svg


def test_the_verb_prints_rows_and_summary_as_json_and_writes_page_and_figure(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "scored"
    status, text, _ = run(capsys, "accuracy", "--kind", "layer", "--json", "--out", str(out))
    result = json.loads(text)["result"]
    assert status == 0
    keys = {"id", "predicted", "measured", "error_fraction", "inside_envelope", "used_in_fit"}
    assert all(keys <= set(row) for row in result["rows"])
    assert result["summary"]["num_rows"] == 12
    assert {path.name for path in out.iterdir()} == {"results.json", "accuracy.md", "accuracy-layer.svg"}


@pytest.mark.parametrize(("kind", "unit"), [("memory", "bytes"), ("trace", "s")])
def test_the_verb_scores_peaks_and_the_trace_too(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str, unit: str
) -> None:
    status, text, _ = run(capsys, "accuracy", "--kind", kind, "--json", "--out", str(tmp_path))
    rows = json.loads(text)["result"]["rows"]
    assert status == 0
    assert {row["unit"] for row in rows} == {unit}
    assert len(rows) + len(json.loads(text)["result"]["not_expressed"]) == len(carried_cases(kind))  # type: ignore[arg-type]
    assert f"| `{rows[0]['id']}` |" in (tmp_path / "accuracy.md").read_text()


def test_the_verb_scores_a_table_of_one_s_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table = tmp_path / "mine.csv"
    row = row_of("simumax_llama3_70b_l12_tp8_pp1_dp1_mbc4_cef") | {"id": "mine"}
    table.write_text(",".join(row) + "\n" + ",".join(f'"{value}"' for value in row.values()) + "\n")
    status, text, _ = run(capsys, "accuracy", "--kind", "training", "--cases", str(table))
    assert status == 0
    assert "mine" in text


def test_bad_tables_and_options_are_one_named_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table = tmp_path / "bad.csv"
    table.write_text("id,model\na,b\n")
    status, _, err = run(capsys, "accuracy", "--cases", str(table))
    assert status == 2
    assert err.startswith(f"moesim: error: {table}: header: must have the column gpu; got ['id', 'model']")
    assert run(capsys, "accuracy", "--kind", "serving")[0] == 2
    assert run(capsys, "accuracy", "--kind", "layer", "--measured")[0] == 2
    assert run(capsys, "accuracy", "--cases", str(tmp_path / "none.csv"))[0] == 2
    table.write_text("id,model,gpu\na,b\n")
    with pytest.raises(InputError, match="line 2: must have 3 cells"):
        read_cases(table, "training")
    table.write_text("id,model,gpu\na,b,c,\n")
    with pytest.raises(InputError, match="line 2: must have 3 cells"):
        read_cases(table, "training")
