"""The all-to-all notebook: its parameters, that it runs whole, that its files agree with its page."""

import json
from pathlib import Path

import pytest

from moesim.catalog.hardware import load_cluster
from moesim.catalog.libraries import load_library
from moesim.errors import InputError, NotModelledError
from moesim.fabric.nccl import BULK_START_S
from moesim.report.alltoall_export import read_lists
from moesim.report.alltoall_sentences import about_size
from moesim.report.parameters import find_notebook
from moesim.report.runner import run_notebook
from moesim.scenario import Scenario
from moesim.study.exchange import ALGORITHMS, dispatch_traffic, exchange_study, kernel_starts
from tests.notebook_cases import OLMOE_ON_32, SMOKE, loads_nothing, parameter_files, question_of, takes_flat_names_and

NOTEBOOK = find_notebook("35_all_to_all")
OWN = {"tokens", "ginis", "out_dir"}
SMALL = OLMOE_ON_32


def test_its_parameters_are_the_scenarios_flat_names_and_its_own() -> None:
    assert takes_flat_names_and(NOTEBOOK, OWN)


@pytest.mark.parametrize("path", parameter_files(NOTEBOOK), ids=lambda path: path.stem)
def test_every_parameter_file_asks_a_valid_question(path: Path) -> None:
    read_lists(question_of(NOTEBOOK, path).own)


def test_its_lists_are_read_strictly() -> None:
    assert read_lists({"tokens": " 8 , 64", "ginis": "0,0.5"}).ginis == (0.0, 0.5)
    for tokens in ("8;64", "0,8", "64,8", "8,8"):
        with pytest.raises(InputError, match="tokens: must be numbers from 1"):
            read_lists({"tokens": tokens, "ginis": ""})
    with pytest.raises(InputError, match=r"ginis: must be numbers from 0 to 0\.95"):
        read_lists({"tokens": "", "ginis": "1"})


def test_inside_a_node_only_the_kernels_starts_tell_ways_of_sending_apart() -> None:
    study = exchange_study(
        Scenario.make(**{**SMALL, "model": "mixtral-8x7b", "ep": 8}), tokens=(16, 512), ginis=(0.0, 0.4)
    )
    wires = {name: study.exact[name].completed.completion_s for name in ALGORITHMS}
    assert max(wires.values()) == pytest.approx(min(wires.values()), rel=0.02)
    said = about_size(study).text
    assert "0% less" not in said
    assert "Inside one node all three use the same NVLink ports" in said


def test_small_messages_wait_for_kernels_and_large_ones_for_wires() -> None:
    study = exchange_study(Scenario.make(**SMALL), tokens=(1, 65536), ginis=(0.0, 0.4))
    for point in study.over_size:
        share = 1 - point.completion_s / point.done_s
        assert share > 0.5 if point.x == 1 else share < 0.1, point
    assert study.algorithm_of_size()[0][1] != "hierarchical"  # the longest start of the three
    assert study.algorithm_of_size()[1][1] == "hierarchical"  # the fewest bytes
    for name in ALGORITHMS:
        assert study.done_s(name) > study.exact[name].completed.completion_s


def test_starts_are_those_of_the_catalogs_libraries() -> None:
    h800, h200 = (load_cluster(name) for name in ("h800-8x-ib400", "h200-8x-ib400"))
    starts = kernel_starts(h200, True, "bf16")
    deepep = load_library("deepep-sglang-0.5.6").value("dispatch_bf16", "nic", "h200", "latency")
    assert starts["hierarchical"].start_s == pytest.approx(deepep - float(h200.latency_inter_s))
    assert starts["low_latency"].start_s < starts["hierarchical"].start_s
    assert kernel_starts(h200, False, "bf16")["low_latency"].start_s < starts["low_latency"].start_s
    factor = load_library("nccl-2.29").value("alltoall", "nccl", "h200", "latency")
    assert starts["direct"].start_s == pytest.approx(factor * BULK_START_S)
    assert kernel_starts(h800, True, "fp8")["direct"].start_s == BULK_START_S  # not fitted there: the tuner's own


def test_the_study_counts_bytes_as_a_step_does_and_once_to_each_node_is_least() -> None:
    scenario = Scenario.make(**SMALL, dispatcher="deepep")
    study = exchange_study(scenario, tokens=(16, 512), ginis=(0.0, 0.4))
    assert study.own == "hierarchical"
    bytes_of = {name: study.port_busy_s(name)["nic_in"].sum() for name in ALGORITHMS}
    assert bytes_of["hierarchical"] < bytes_of["direct"] == pytest.approx(bytes_of["low_latency"])
    for name in ALGORITHMS:
        seconds = [point.completion_s for point in study.over_skew if point.algorithm == name]
        assert seconds[0] < seconds[1]
        exact, port = study.exact[name].completed, study.port[name].completed
        assert port.completion_s == pytest.approx(exact.completion_s, rel=0.02)


def test_what_exchanges_nothing_is_refused() -> None:
    with pytest.raises(NotModelledError, match="exchanges nothing"):
        dispatch_traffic(Scenario.make(**SMALL | {"ep": 1}))


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_notebook(
        "35_all_to_all", SMOKE["35_all_to_all"], tmp_path_factory.mktemp("exchange") / "out", show_progress=False
    )


def test_it_renders_whole(rendered: Path) -> None:
    assert {path.name for path in rendered.iterdir()} == {"report.html", "report.ipynb", "results.json", "results.csv"}
    page = (rendered / "report.html").read_text()
    assert page.count("<svg") == 4
    assert page.count('class="takeaway"') >= 8
    for words in ("What does skew cost?", "Which algorithm?", "olmoe-1b-7b", "The busiest port is NIC"):
        assert words in page
    assert "Traceback" not in page
    assert loads_nothing(page)


def test_the_page_says_what_the_results_hold(rendered: Path) -> None:
    result = json.loads((rendered / "results.json").read_text())["result"]
    page = (rendered / "report.html").read_text()
    assert f"{result['max_mean']:.2f} times the mean" in page
    assert [point["x"] for point in result["over_size"]] == [size for size in (16, 128, 1024) for _ in ALGORITHMS]
    assert result["exact"]["direct"]["lower_bound_s"] <= result["exact"]["direct"]["completion_s"]
    assert (rendered / "results.csv").read_text().startswith("section,name,x,value,unit\n")


def test_a_typo_stops_before_a_kernel_starts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gini_s: is not a parameter.*Did you mean"):
        run_notebook("35_all_to_all", SMALL | {"gini_s": "0"}, tmp_path / "out", show_progress=False)
