"""Slow GPUs by rank: their computing takes longer, others wait, and a search that knows them gives them less."""

import numpy as np
import pytest

from moesim.errors import InputError
from moesim.metrics.summary import summarise
from moesim.scenario import Scenario
from moesim.timeline.load import step_load
from moesim.timeline.step import run_step
from tests.test_cli_runs import answer, moesim

SIZES = {"model": "olmoe-1b-7b", "cluster": "h100-8x-ib400", "num_gpus": 32, "ep": 8, "pp": 2, "seq_len": 4096}
SIZES |= {"global_batch": 64, "gini": 0.2, "micro_batch": 2}


def scenario(**changes: object) -> Scenario:
    return Scenario.make(**SIZES | changes)


def test_ranks_are_named_one_by_one_or_in_a_row_in_files_and_options() -> None:
    asked = scenario(rank_speeds="3=0.8,8-15=0.5")
    assert asked.placement.rank_speeds == {"3": 0.8, "8-15": 0.5}
    assert asked.speed_of_rank[[2, 3, 8, 15, 16]].tolist() == [1.0, 0.8, 0.5, 0.5, 1.0]
    raw = scenario().to_dict()
    file = raw | {"cluster": SIZES["cluster"], "placement": raw["placement"] | {"rank_speeds": {3: 0.8, "8-15": 0.5}}}
    assert (Scenario.from_mapping(file).speed_of_rank == asked.speed_of_rank).all()
    assert (scenario(rank_speeds=None).speed_of_rank == 1.0).all()
    assert scenario().point_id != asked.point_id


def test_a_slow_gpu_computes_longer_and_the_others_of_its_block_wait() -> None:
    alike = run_step(scenario(popularity="lognormal"))
    slow = run_step(scenario(popularity="lognormal", rank_speeds="5=0.5"))
    for part in ("attention", "experts", "router"):
        before, after = alike.stages[0].part_R[part], slow.stages[0].part_R[part]
        assert after[5] == pytest.approx(2.0 * before[5]), part
        assert np.delete(after, 5) == pytest.approx(np.delete(before, 5)), part
    for part in ("dispatch", "combine"):
        assert slow.stages[0].part_R[part] == pytest.approx(alike.stages[0].part_R[part]), part
    waits = slow.stages[0].part_R["wait_for_slowest"] - alike.stages[0].part_R["wait_for_slowest"]
    assert (np.delete(waits[:8], 5) > 0).all()
    assert slow.step_s > 1.1 * alike.step_s
    for rank in range(16):
        parts = sum(float(np.broadcast_to(seconds, 16)[rank]) for seconds in slow.stages[0].part_R.values())
        assert parts == pytest.approx(slow.step_s), "every rank's parts still sum to the step"


def test_a_search_that_knows_the_slow_gpu_gives_it_less_and_the_step_is_shorter() -> None:
    blind, knowing = scenario(rank_speeds="5=0.6"), scenario(rank_speeds="5=0.6", policy="search", num_slots=80)
    fair = scenario(policy="search", num_slots=80)
    load_LR = step_load(knowing).placed.layers.rank_loads(step_load(knowing).load.kept_GMLE.sum(axis=(0, 1)))
    share_R = (load_LR / load_LR.mean(axis=1, keepdims=True)).mean(axis=0)
    assert share_R[5] == pytest.approx(0.6 / 7.6 * 8, abs=0.03), "what evens the times of the ranks out"
    waits = {name: summarise(run_step(asked)) for name, asked in (("blind", blind), ("knows", knowing))}
    assert waits["knows"].step_s < waits["blind"].step_s
    usual = summarise(run_step(fair)).step_parts_s["experts"]
    assert usual < waits["knows"].step_parts_s["experts"], "the slow one's part is done by slower means and by others"


def test_speeds_reach_the_command_line_and_nonsense_is_refused() -> None:
    options = [text for name, value in SIZES.items() for text in ("--" + name.replace("_", "-"), str(value))]
    slow = answer("simulate", *options, "--rank-speeds", "5=0.5")
    assert slow["inputs"]["scenario"]["placement"]["rank_speeds"] == {"5": 0.5}
    assert slow["result"]["step_s"] > answer("simulate", *options)["result"]["step_s"]
    for text, words in (
        ("32=0.5", "must be ranks in 0..31, such as 3 or 8-15"),
        ("a=0.5", "must be ranks in 0..31"),
        ("3", "or read such as 3=0.8,8-15=0.5"),
        ("3=slow", "or read such as 3=0.8"),
        ("3=0", "must be positive"),
        ("1-4=0.5,3=0.4", "names a rank that another entry names"),
    ):
        status, out, err = moesim("simulate", *options, "--rank-speeds", text)
        assert (status, out) == (2, ""), err
        assert words in err
        assert len(err.splitlines()) == 1


def test_a_policy_that_knows_no_speeds_says_so() -> None:
    with pytest.raises(InputError, match=r"eplb: ranks: must all have the same slots and speed"):
        run_step(scenario(policy="eplb", rank_speeds="5=0.5"))
