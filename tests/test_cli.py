"""The command line: exit statuses, error texts, JSON envelope, help. No test here simulates a large cluster."""

import json
import os
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from moesim.cli import app
from moesim.cli.call import LEAF_NAMES, join_parameters
from moesim.cli.output import Answer, Table, print_table, to_json
from moesim.leaves import LEAVES
from moesim.scenario import Scenario

SMALL = ["--model", "mixtral-8x7b", "--cluster", "h100-8x-ib400", "--num-gpus", "8", "--ep", "8"]
SMALL += ["--seq-len", "512", "--global-batch", "8"]


def moesim(*arguments: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of one call."""
    done = CliRunner().invoke(app, list(arguments))
    return done.exit_code, done.stdout, done.stderr


def refusal(*arguments: str) -> str:
    """The one error line of a call that must end with status 2, print nothing on stdout and show no traceback."""
    status, out, err = moesim(*arguments)
    lines = err.strip().splitlines()
    assert (status, out) == (2, ""), err
    assert len(lines) == 1, err
    assert lines[0].startswith("moesim: error: ")
    assert "Traceback" not in err
    return lines[0]


def test_the_scenario_options_are_exactly_the_leaves_of_a_scenario():
    assert set(LEAF_NAMES) | {"seed"} == set(LEAVES)


def test_an_unknown_verb_names_its_neighbour():
    assert "verb: is not known; got 'simulat'. Did you mean simulate?" in refusal("simulat")


def test_an_unknown_option_is_one_line():
    assert "--quiik" in refusal("gpus", "--quiik")


def test_an_unknown_model_names_its_neighbour():
    assert "deepseek-v3" in refusal("describe", "deepsek-v3")


def test_an_unknown_cluster_names_its_neighbour():
    assert "h100-8x-ib400" in refusal(
        "simulate", "--model", "mixtral-8x7b", "--cluster", "h100-8x-ib40", "--num-gpus", "8"
    )


def test_an_expert_parallel_size_that_does_not_divide_says_so():
    text = refusal("simulate", "--num-gpus", "96", "--model", "deepseek-v3", "--cluster", "h800-8x-ib400", "--ep", "64")
    assert "ep=64 does not divide dp*cp*tp = 96*1*1 = 96" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ep", "x"], "parallel: ep: must be a whole number; got 'x'"),
        (["--ep", "1.5"], "parallel: ep: must be a whole number; got 1.5"),
        (["--ep", "-8"], "parallel: ep: must be at least 1; got -8"),
        (["--capacity-factor", ".nan"], "numbers must be finite; got '.nan'"),
        (["--capacity-factor", "nan"], "capacity_factor: must be a number; got 'nan'"),
        (["--set", "parallel.epp=8"], "parallel: epp: is an unknown key; got 8. Did you mean pp or ep"),
        (["--set", "nonsense"], "--set: nonsense: must read key=value"),
        (["--precision", "fp7"], "must be bf16 or fp8 or fp8_tensor or mxfp8 or nvfp4; got 'fp7'. Did you mean fp8"),
        (["--seed", "one"], "--seed: must be a whole number; got 'one'"),
        (["--seed", "-1"], "seed: must be at least 0; got -1"),
        (["-p", "epp", "8"], "parameters: epp: is not a parameter; got 8. Did you mean pp or ep"),
        (["-p", "ep"], "-p: ep: must be followed by a name and a value"),
        (["--model", "llama-3-8b", "--ep", "8"], "must be 1, since llama-3-8b is dense; got 8"),
        (["--set", "placement.num_slots=12"], "must be a multiple of num_ranks"),
    ],
)
def test_bad_values_are_refused_by_name(arguments, words):
    assert words in refusal("simulate", *SMALL, *arguments)


def test_a_missing_scenario_file_is_refused_with_its_neighbour(tmp_path):
    (tmp_path / "scenario.yaml").write_text("model: mixtral-8x7b\n")
    assert "must exist; got 'no such file'. Did you mean scenario.yaml?" in refusal(
        "simulate", f"{tmp_path}/scenaro.yaml"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [deepseek", "must be valid YAML"),
        ("- a\n- b\n", "must be a mapping"),
        ("", "must not be empty"),
        ("model: !!python/object/apply:os.system [ls]\ncluster: x\n", "YAML tags are not read"),
        ("model: mixtral-8x7b\n", "cluster: is required"),
        (
            "modle: mixtral-8x7b\ncluster: h100-8x-ib400\n",
            "modle: is an unknown key; got 'mixtral-8x7b'. Did you mean model",
        ),
    ],
)
def test_a_bad_scenario_file_is_refused_by_name(tmp_path, text, words):
    file = tmp_path / "scenario.yaml"
    file.write_text(text)
    line = refusal("simulate", str(file))
    assert words in line
    assert "scenario.yaml" in line


def test_bad_trace_ranks_are_refused_before_anything_runs():
    for ranks in ("8", "a", "3-1", "", "0,,1"):
        assert "must be representative, or ranks below 8" in refusal("trace", *SMALL, "--trace-ranks", ranks)


def test_a_refused_call_writes_nothing(tmp_path):
    refusal("simulate", *SMALL, "--ep", "3", "--out", str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_crash_of_ours_is_status_3_and_shows_its_traceback_only_with_v(monkeypatch):
    def crash(*_):
        raise ZeroDivisionError("boom")

    monkeypatch.setattr("moesim.catalog.hardware.load_gpu", crash)
    status, out, err = moesim("gpus")
    assert (status, out) == (3, "")
    assert "internal error" in err
    assert "-v" in err
    assert "Traceback" not in err
    status, _, err = moesim("gpus", "-v")
    assert status == 3
    assert "Traceback" in err


def test_an_interrupt_is_status_130(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("moesim.catalog.hardware.load_gpu", interrupt)
    status, _, err = moesim("gpus")
    assert status == 130
    assert err == "" or "interrupted" in err


def test_version_and_help_end_with_status_0():
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", moesim("--version")[1])
    assert moesim("simulate", "--version")[:2] == moesim("--version")[:2]
    status, out, err = moesim()
    assert (status, err) == (0, "")
    assert "simulate" in out
    for verb in ("models", "gpus", "clusters", "describe", "simulate", "calibrate", "selfcheck", "report", "trace"):
        status, out, _ = moesim(verb, "--help")
        assert status == 0
        assert "Examples:" in out
        assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("verb", ["models", "gpus", "clusters"])
def test_lists_are_tables_of_80_columns_and_the_same_json_each_time(verb):
    status, table, err = moesim(verb)
    assert (status, err) == (0, "")
    assert max(map(len, table.splitlines())) <= 80
    first, second = (json.loads(moesim(verb, "--json")[1]) for _ in range(2))
    assert set(first) == {"schema_version", "command", "inputs", "result", "provenance", "warnings", "run"}
    first.pop("run"), second.pop("run")
    assert first == second
    assert all(entry["name"] in table for entry in first["result"][verb])


def test_every_hardware_number_in_json_carries_its_source():
    gpus = json.loads(moesim("gpus", "--json")[1])["result"]["gpus"]
    for gpu in gpus:
        for number in (gpu["memory_bytes"], gpu["tdp_w"], *gpu["peak_flops_per_s"].values()):
            assert {"value", "unit", "kind", "source", "date"} == set(number)


def test_a_wrong_call_from_the_shell_ends_with_status_2_and_one_line():
    done = subprocess.run([sys.executable, "-m", "moesim", "describe", "mixtral-8x7c"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "mixtral-8x7b" in done.stderr


def test_output_into_a_closed_pipe_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m moesim gpus --json | head -c 1", shell=True, capture_output=True, text=True
    )
    assert done.stderr == ""


def test_help_and_import_come_at_once():
    def best_of_three_s(*arguments: str) -> float:
        """Processor time of the child, which other work on the machine moves little."""
        times = []
        for _ in range(3):
            before = os.times()
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            after = os.times()
            times.append(sum(after[2:4]) - sum(before[2:4]))  # of children: user, system
        return min(times)

    assert best_of_three_s("-m", "moesim", "--help") < 0.5
    assert best_of_three_s("-c", "import moesim") < 0.3  # 0.02 s on an idle machine; the interpreter starts in the rest


def test_importing_the_command_line_loads_no_heavy_library():
    heavy = "{'torch', 'numpy', 'numba', 'pandas', 'matplotlib', 'seaborn', 'simpy', 'papermill'}"
    code = f"import sys, moesim.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_public_names_are_loaded_on_demand():
    import moesim as package

    assert package.Scenario is Scenario
    assert callable(package.describe)
    with pytest.raises(AttributeError, match="no attribute 'simualte'"):
        package.simualte  # noqa: B018


def test_papermill_parameters_become_one_word():
    assert join_parameters(["report", "-p", "ep", "-8", "-p", "a=1", "-p"]) == [
        "report",
        "-p",
        "ep=-8",
        "-p",
        "a=1",
        "-p",
    ]


def test_json_keeps_number_lists_on_one_line_and_nothing_that_is_not_json():
    text = to_json({"b": [1.5, float("nan")], "a": {"x": (1, 2)}, "c": [{"d": []}]})
    assert json.loads(text) == {"a": {"x": [1, 2]}, "b": [1.5, None], "c": [{"d": []}]}
    assert '"b": [1.5, null]' in text


def test_a_table_shows_brackets_as_they_are(capsys):
    print_table(Table(title="[bold]", columns=("a",), rows=[("[red]x[/red]",)]))
    assert "[red]x[/red]" in capsys.readouterr().out


def test_an_answer_needs_no_more_than_inputs_and_result():
    assert Answer(inputs={}, result={}).exit_status == 0
