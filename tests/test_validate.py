"""Gates of a design: each limit decides, fixes pass what they claim, files are read strictly, CI gets its XML."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import yaml

from moesim.errors import InputError
from moesim.report.junit import junit_xml
from moesim.scenario import Scenario
from moesim.study.differences import differences, differing_settings
from moesim.study.simulate import simulate
from moesim.study.validate import GATES, Validation, read_design, step_value, validate

SCENARIO: dict[str, Any] = {
    "model": "olmoe-1b-7b",
    "cluster": "h100-8x-ib400",
    "num_gpus": 16,
    "parallel": {"pp": 2, "ep": 8},
    "train": {"seq_len": 1024, "global_batch": 64},
    "routing": {"capacity_factor": 1.0},
}


def design_file(folder: Path, **fields: Any) -> Path:
    path = folder / "design.yaml"
    path.write_text(yaml.safe_dump({"schema": 1, "scenario": SCENARIO} | fields))
    return path


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Validation:
    folder = tmp_path_factory.mktemp("design")
    gates = {"mfu": {"limit": 0.001}, "cost": {"limit": 1.0}, "bubble": {"off": True}, "days": {"limit": 1e6}}
    return validate(read_design(design_file(folder, tokens=1e11, price_per_gpu_hour=2.0, gates=gates)))


def test_each_gate_is_judged_by_its_own_limit(found: Validation) -> None:
    by_name = {gate.name: gate for gate in found.gates}
    assert set(by_name) == set(GATES) - {"bubble"}
    assert by_name["mfu"].status == "pass"  # its own limit, and no warning of the house's beside it
    assert by_name["mfu"].warn is None
    assert by_name["cost"].status == "fail"
    assert by_name["days"].status == "pass"
    assert by_name["dropped"].status == "fail"
    assert found.status == "fail"
    for name in ("memory_headroom", "dropped", "exposed_communication"):
        assert by_name[name].value == step_value(name, found.step)


def test_a_fix_does_what_it_says(found: Validation) -> None:
    gate = next(gate for gate in found.gates if gate.name == "dropped")
    name, value = gate.fix.split(" ")[0].split("=")
    fixed = simulate(found.design.scenario.with_(**{name: None if value == "None" else float(value)}))
    assert gate.limit is not None
    assert fixed.drop_fraction <= gate.limit
    assert f"{fixed.drop_fraction:.1%}" in gate.fix
    assert f"step {abs(fixed.step_s / found.step.step_s - 1):.0%}" in gate.fix


def test_ci_reads_the_gates(found: Validation) -> None:
    suite = ElementTree.fromstring(junit_xml(found))
    failed = {case.get("name") for case in suite if case.find("failure") is not None}
    assert failed == {gate.name for gate in found.gates if gate.status == "fail"}
    assert suite.get("failures") == str(len(failed))
    assert suite.get("tests") == str(len(found.gates))
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["status"] == "fail"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"gates": {"mfo": {"limit": 1}}}, "must be one of memory_headroom, .*Did you mean mfu"),
        ({"gates": {"goodput": {"limit": 0.9}}}, "gates.goodput: needs tokens"),
        ({"tokens": 1e9, "gates": {"cost": {"limit": 5}}}, "gates.cost: needs price_per_gpu_hour"),
        ({"gates": {"mfu": {"limit": "high"}}}, "limit: must be"),
        ({"tokens": -1}, "tokens: must be positive"),
        ({"scenario": "nowhere.yaml"}, "nowhere.yaml"),
        ({"scenario": {**SCENARIO, "parallel": {"ep": 7}}}, "ep=7 does not divide"),
        ({"scenaro": {}}, "scenaro"),
    ],
)
def test_nonsense_is_refused_by_name(tmp_path: Path, fields: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        read_design(design_file(tmp_path, **fields))


def test_a_scenario_may_lie_beside_its_design(tmp_path: Path) -> None:
    (tmp_path / "scenario.yaml").write_text(yaml.safe_dump(SCENARIO))
    assert read_design(design_file(tmp_path, scenario="scenario.yaml")).scenario == Scenario.from_mapping(SCENARIO)


def test_a_difference_is_due_to_what_differs() -> None:
    first = Scenario.from_mapping(SCENARIO)
    second = first.with_(capacity_factor=2.0, ep=4)
    told = differences(first, second)
    assert {s.name for s in told.settings} == {"routing.capacity_factor", "parallel.ep"}
    drops = next(result for result in told.results if result.name == "drop_fraction")
    assert drops.change_fraction is not None
    assert drops.change_fraction < 0
    same = differences(first, first)
    assert same.settings == ()
    assert all(result.first == result.second for result in (*same.results, *same.parts))
    steps = [sum(getattr(part, side) for part in told.parts) for side in ("first", "second")]
    assert steps == pytest.approx([told.results[0].first, told.results[0].second])


def test_settings_of_one_side_alone_are_told() -> None:
    assert [(s.first, s.second) for s in differing_settings({"a": {"b": 1}}, {"a": {"c": 2}})] == [(1, None), (None, 2)]


def test_the_verbs_say_by_exit_status_what_ci_must_know(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from moesim.cli import app

    path = design_file(tmp_path, gates={name: {"off": True} for name in GATES if not GATES[name].needs_tokens})
    runner = CliRunner()
    assert runner.invoke(app, ["validate", str(path)]).exit_code == 0
    fails = design_file(tmp_path, gates={"mfu": {"limit": 0.99}, "dropped": {"off": True}})
    result = runner.invoke(app, ["validate", str(fails), "--json", "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert (tmp_path / "out" / "junit.xml").is_file()
    assert json.loads(result.stdout)["result"]["status"] == "fail"
    result = runner.invoke(app, ["diff", str(path), str(path), "--set", "parallel.ep=4", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["result"]["settings"] == []
