"""Sweeps: what a file asks, poison points, resuming, the same bytes on any number of workers."""

from __future__ import annotations

import csv
import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from moesim.errors import InputError, MoesimError
from moesim.scenario import Scenario
from moesim.study.fast import fast_step
from moesim.study.simulate import simulate
from moesim.study.sweep import sweep
from moesim.study.sweep_file import Asked, SweepFile, ask_points, base_of, read_sweep
from moesim.study.sweep_points import compute
from moesim.study.sweep_workers import Processes, WorkerDiedError, Workers, processes
from tests.sweep_fakes import Inline
from tests.test_cli_runs import moesim

BASE: Mapping[str, Any] = {
    "model": "olmoe-1b-7b",
    "cluster": "h100-8x-ib400",
    "num_gpus": 16,
    "train": {"global_batch": 32, "seq_len": 512},
}
QUICK, POISON = "tests.sweep_fakes:quick", "tests.sweep_fakes:poisonous"


def seeds(num: int, first: int = 0) -> Asked:
    return ask_points([{"seed": seed} for seed in range(first, first + num)], BASE)


def kept(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# What a file asks


def test_a_grid_is_every_combination_and_a_list_of_points_is_itself() -> None:
    assert [*SweepFile(grid={"ep": (1, 2), "pp": (1, 2)}).settings()][2] == {"ep": 2, "pp": 1}
    assert [*SweepFile(points=({"ep": 8}, {"pp": 2})).settings()] == [{"ep": 8}, {"pp": 2}]
    both = [*SweepFile(points=({"ep": 8}, {"ep": 4}), grid={"seed": (0, 1)}).settings()]
    assert both == [{"ep": 8, "seed": 0}, {"ep": 8, "seed": 1}, {"ep": 4, "seed": 0}, {"ep": 4, "seed": 1}]


def test_a_point_is_the_scenario_of_the_same_options() -> None:
    settings = {
        "ep": 8,
        "capacity_factor": 1.25,
        "routing.popularity.gini": 0.3,
        "routing.popularity.kind": "lognormal",
    }
    (point,) = ask_points([settings], BASE).points
    same = Scenario.make(**BASE["train"], model=BASE["model"], cluster=BASE["cluster"], num_gpus=16, ep=8, gini=0.3)
    assert point.point_id == same.with_(capacity_factor=1.25).point_id
    assert point.scenario == same.with_(capacity_factor=1.25)


def test_a_popularity_that_is_swept_replaces_the_bases() -> None:
    base = {**BASE, "routing": {"popularity": {"kind": "lognormal", "gini": 0.3}}}
    asked = ask_points([{"popularity": "balanced"}, {"gini": 0.1}], base)
    assert asked.refused == ()
    kinds = [point.scenario.routing.popularity for point in asked.points if point.scenario]
    assert [getattr(kind, "gini", None) for kind in kinds] == [None, 0.1]


def test_points_that_are_no_scenario_keep_their_reason_and_repeats_are_left_out() -> None:
    asked = ask_points([{"ep": 8}, {"ep": 7}, {"parallel.ep": 8}], BASE)
    assert [point.scenario is None for point in asked.points] == [False, True]
    assert "ep=7 does not divide" in asked.points[1].refusal
    assert asked.num_repeated == 1


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({}, "sweep: grid|grid: must name what varies"),
        ({"grid": {"epp": [1]}}, "epp: is neither a flat name nor a.b; got 'epp'. Did you mean"),
        ({"grid": {"ep": []}}, "must be a list of at least one value"),
        ({"grid": {"ep": 8}}, "ep: must be a list"),
        ({"grid": {"ep": [8]}, "points": [{"ep": 4}]}, "stands in the grid too"),
        ({"grid": {"seed": [0] * 1001, "ep": [0] * 1001}}, "must not be more than 1000000 points"),
        ({"grids": {}}, "is an unknown key"),
    ],
)
def test_a_sweep_file_that_is_wrong_is_refused(tmp_path: Path, raw: Mapping[str, Any], words: str) -> None:
    (tmp_path / "s.yaml").write_text(json.dumps(raw))
    with pytest.raises(InputError, match=words):
        read_sweep(tmp_path / "s.yaml")


def test_where_no_point_is_a_scenario_the_first_reason_is_told() -> None:
    with pytest.raises(MoesimError, match=r"none of 2 points can be computed; the first: .*ep=7 does not divide"):
        ask_points([{"ep": 7}, {"ep": 9}], BASE)


def test_a_base_file_and_the_files_that_it_names_are_found_beside_the_sweep(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("gpu: h100-sxm\nnum_gpus: 16\nranks_per_node: 8\nnic: 50 GB/s\n")
    (tmp_path / "base.yaml").write_text(json.dumps({**BASE, "cluster": "c.yaml"}))
    (tmp_path / "s.yaml").write_text("base: base.yaml\ngrid: {ep: [8]}\n")
    what = read_sweep(tmp_path / "s.yaml")
    asked = ask_points([*what.settings()], *base_of(what, tmp_path))
    assert list(asked.sha256_of_files) == [str(tmp_path / "c.yaml")]


def test_two_designs_of_one_name_are_refused_since_results_go_by_name(tmp_path: Path) -> None:
    for folder, nic in (("a", 50), ("b", 25)):
        (tmp_path / folder).mkdir()
        text = f"gpu: h100-sxm\nnum_gpus: 16\nranks_per_node: 8\nnic: {nic} GB/s\n"
        (tmp_path / folder / "c.yaml").write_text(text)
    with pytest.raises(InputError, match="another design or cluster of the same name"):
        ask_points([{"cluster": "a/c.yaml"}, {"cluster": "b/c.yaml"}], BASE, tmp_path)


# What comes out


def test_a_points_numbers_are_simulates_and_another_seed_gives_others(tmp_path: Path) -> None:
    graphs = {"ep": 8, "cuda_graphs": "full"}  # without, steps this small wait for the host, whatever the seed
    asked = ask_points([graphs | {"seed": 0}, graphs | {"seed": 1}], BASE)
    found = sweep(asked, tmp_path / "out", workers=processes(1))
    by_seed = {row["settings"]["seed"]: row["result"] for row in found.rows}
    for point in asked.points:
        assert point.scenario is not None
        step = simulate(point.scenario)
        result = by_seed[point.settings["seed"]]
        assert (result["step_s"], result["memory.peak_bytes"]) == (step.step_s, step.memory["peak_bytes"])
    assert by_seed[0]["step_s"] != by_seed[1]["step_s"]


def test_one_worker_and_three_leave_the_same_bytes_sorted_by_point(tmp_path: Path) -> None:
    for num in (1, 3):
        sweep(seeds(300), tmp_path / str(num), by=QUICK, workers=processes(num))
    assert (tmp_path / "1" / "results.csv").read_bytes() == (tmp_path / "3" / "results.csv").read_bytes()
    names = [row["point_id"] for row in table(tmp_path / "3")]
    assert names == sorted(names)
    assert len(set(names)) == 300
    assert {point.point_id for point in seeds(300).points} == set(names)


def test_a_fast_points_numbers_are_the_same_alone_and_in_any_company() -> None:
    sizes = [{"ep": ep, "pp": pp, "micro_batch": m} for ep in (4, 8) for pp in (1, 2) for m in (1, 2)]
    others = [{}, {"gini": 0.4}, {"capacity_factor": 1.0, "dispatcher": "deepep"}, {"num_gpus": 32, "global_batch": 64}]
    asked = ask_points([size | other for size in sizes for other in others], BASE)
    scenarios = [point.scenario for point in asked.points if point.scenario is not None]
    alone = [fast_step(scenario) for scenario in scenarios]
    together = compute("fast", scenarios)[0]
    assert len(alone) == 32
    for step, outcome in zip(alone, together, strict=True):
        numbers = outcome["result"]["step_s"], outcome["result"]["memory.peak_bytes"]
        assert numbers == (step.step_s, step.peak_bytes)
    assert {*together[0]["result"]} <= {*compute("engine", scenarios[:1])[0][0]["result"]}, "one name for one number"


def test_poison_points_lose_nothing_else_and_are_told_by_name(tmp_path: Path) -> None:
    found = sweep(seeds(12), tmp_path, by=POISON, workers=processes(2, timeout_s=1.5))
    assert {row["settings"]["seed"] for row in found.rows} == {0, 1, 2, 4, 6, 8, 10, 11}
    why = {row["settings"]["seed"]: (row["kind"], row["error"]) for row in found.failed}
    assert why == {
        3: ("worker", "its worker was killed by SIGKILL"),
        5: ("error", "ZeroDivisionError: five"),
        7: ("refused", "seven is not modelled"),
        9: ("worker", "took longer than 1.5 s"),
    }
    told = [json.loads(line) for line in (tmp_path / "failed.jsonl").read_text().splitlines()]
    assert [row["point_id"] for row in told] == sorted(row["point_id"] for row in found.failed)


def test_points_that_failed_are_tried_again_when_resuming_and_told_once(tmp_path: Path) -> None:
    for resume in (False, True):
        found = sweep(seeds(4, first=4), tmp_path, by=POISON, workers=processes(1), resume=resume)
        assert found.num_computed == (0 if resume else 2)
        told = [json.loads(line)["kind"] for line in (tmp_path / "failed.jsonl").read_text().splitlines()]
        assert sorted(told) == ["error", "refused"]


def test_resuming_computes_what_is_left_and_what_was_torn(tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    sweep(seeds(40), whole, by=QUICK, workers=processes(1))
    sweep(seeds(30), part, by=QUICK, workers=processes(1))
    text = (part / "results.jsonl").read_bytes()
    (part / "results.jsonl").write_bytes(text[:-20])
    found = sweep(seeds(40), part, by=QUICK, workers=processes(1), resume=True)
    assert (found.num_computed, found.num_torn) == (11, 1)
    assert (part / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()
    assert len(kept(part)) == 40


def test_a_folder_with_a_sweep_is_resumed_or_refused_never_mixed(tmp_path: Path) -> None:
    sweep(seeds(3), tmp_path, by=QUICK, workers=processes(1))
    with pytest.raises(InputError, match="must not hold a sweep already"):
        sweep(seeds(3), tmp_path, by=QUICK)
    with pytest.raises(InputError, match="by: must be as when the sweep began"):
        sweep(seeds(3), tmp_path, by="sizes", resume=True)


def test_a_file_that_changed_since_the_sweep_began_is_refused(tmp_path: Path) -> None:
    def asked(nic: int) -> Asked:
        (tmp_path / "c.yaml").write_text(f"gpu: h100-sxm\nnum_gpus: 16\nranks_per_node: 8\nnic: {nic} GB/s\n")
        return ask_points([{"ep": 8}], {**BASE, "cluster": "c.yaml"}, tmp_path)

    sweep(asked(50), tmp_path / "out", by="sizes", workers=processes(1))
    with pytest.raises(InputError, match=r"c\.yaml: must be as when the sweep began"):
        sweep(asked(25), tmp_path / "out", by="sizes", workers=processes(1), resume=True)


# The workers


def test_a_worker_that_is_killed_fails_its_own_task_and_is_replaced() -> None:
    executor = Processes(2)
    try:
        waiting = executor.submit(time.sleep, 60)
        other = executor.submit(os.getpid).result(timeout=20)
        (sleeper,) = {*executor.process_ids()} - {other}
        os.kill(sleeper, signal.SIGKILL)
        with pytest.raises(WorkerDiedError, match="killed by SIGKILL"):
            waiting.result(timeout=10)
        assert [executor.submit(abs, -i).result(timeout=20) for i in range(6)] == [*range(6)]
    finally:
        executor.shutdown(cancel_futures=True)
    assert executor.process_ids() == []


def test_what_a_task_raises_is_its_futures_and_its_worker_lives_on() -> None:
    executor = Processes(1)
    try:
        with pytest.raises(ValueError, match="invalid literal"):
            executor.submit(int, "x").result()
        (before,) = executor.process_ids()
        with pytest.raises(Exception, match="pickle"):
            executor.submit(lambda: 1).result()
        assert executor.submit(abs, -2).result() == 2
        assert executor.process_ids() == [before]
        assert psutil.Process(before).is_running()
    finally:
        executor.shutdown()


def test_any_executor_will_do_and_quick_points_travel_together(tmp_path: Path) -> None:
    import contextlib

    executor = Inline()
    told: list[int] = []
    workers = contextlib.nullcontext(Workers(executor=executor, num_workers=1, max_attempts=1))
    found = sweep(seeds(200), tmp_path, by=QUICK, workers=workers, progress=told.append)
    assert len(found.rows) == sum(told) == sum(executor.sizes) == 200
    assert executor.sizes[0] == 1
    assert max(executor.sizes) > 8


def test_a_disk_that_fills_stops_the_sweep_by_name_and_keeps_what_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moesim.door.journal import Journal

    real = Journal.append

    def full(self: Journal, records: Sequence[Mapping[str, Any]]) -> None:
        if self.path.name == "results.jsonl" and self._num_bytes > 500:
            raise InputError(str(self.path), "", "cannot be written", "No space left on device")
        real(self, records)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", full)
        with pytest.raises(InputError, match="No space left"):
            sweep(seeds(60), tmp_path, by=QUICK, workers=processes(2))
    num_kept = len(kept(tmp_path))
    assert 0 < num_kept < 60
    assert sweep(seeds(60), tmp_path, by=QUICK, workers=processes(2), resume=True).num_computed == 60 - num_kept
    assert len(kept(tmp_path)) == 60


# The verb


def write_sweep(folder: Path, text: str) -> str:
    (folder / "s.yaml").write_text("base: " + json.dumps(BASE) + "\n" + text)
    return str(folder / "s.yaml")


def test_the_verb_writes_the_table_and_ends_with_0_though_points_are_refused(tmp_path: Path) -> None:
    file = write_sweep(tmp_path, "grid: {ep: [7, 8], seed: [0, 1]}")
    status, out, err = moesim("sweep", file, "--by", "sizes", "--workers", "1", "--out", str(tmp_path / "o"), "--json")
    result = json.loads(out)["result"]
    assert (status, result["num_done"], result["num_refused"], result["num_failed"]) == (0, 2, 2, 0), err
    assert {row["ep"] for row in table(tmp_path / "o")} == {"8"}
    again, same, _ = moesim("sweep", file, "--by", "sizes", "--out", str(tmp_path / "o"), "--json", "--resume")
    assert again == 0
    assert json.loads(same)["result"] == result


@pytest.mark.parametrize("by", ["fast", "engine"])
def test_the_verb_shows_the_best_points_whatever_computes_them(tmp_path: Path, by: str) -> None:
    file = write_sweep(tmp_path, "grid: {ep: [4, 8]}")
    status, out, err = moesim("sweep", file, "--by", by, "--workers", "1", "--out", str(tmp_path / "o"))
    assert status == 0, err
    assert "Most tokens per GPU (2 of 2)" in out


def test_the_verb_ends_with_1_where_a_point_failed(tmp_path: Path) -> None:
    file = write_sweep(tmp_path, "grid: {seed: [4, 5]}")
    status, out, _ = moesim("sweep", file, "--by", POISON, "--workers", "1", "--out", str(tmp_path / "o"))
    assert status == 1
    assert "ZeroDivisionError: five" in " ".join(out.split())


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (
            "--by engin",
            "--by: must be engine, fast, sizes, or package.module:function; got 'engin'. Did you mean engine?",
        ),
        ("--by nowhere:f", "must be a function that can be imported"),
        ("--workers 2 --dask-address tcp://localhost:1", "--workers: are Dask's own"),
        ("--dask-scheduler-file nope.json", "must be a file that a scheduler wrote"),
        ("--set train.epp=3", "none of 1 points can be computed; the first: scenario.train: epp: is an unknown key"),
    ],
)
def test_nonsense_is_refused_before_anything_is_written(tmp_path: Path, typed: str, words: str) -> None:
    file = write_sweep(tmp_path, "grid: {ep: [8]}")
    status, out, err = moesim("sweep", file, "--out", str(tmp_path / "o"), *typed.split())
    assert (status, out) == (2, "")
    assert words in err
    assert not (tmp_path / "o").exists()
