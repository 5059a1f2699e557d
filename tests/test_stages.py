"""Where layers lie on pipeline stages: layouts, rules, and that memory and step take them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.catalog.models import load_model
from moesim.cost.static import outer_parameters, static_memory
from moesim.describe.parallel import Parallelism
from moesim.describe.pipeline import held_by_stage, mtp_stage, stage_chunks
from moesim.describe.stages import Held, held_of_text
from moesim.describe.workload import Training
from moesim.errors import InputError
from moesim.metrics.memory import memory_by_stage
from moesim.scenario import Scenario
from moesim.timeline.load import step_load
from moesim.timeline.step import run_step
from moesim.timeline.trace import StageRun

SMALL: dict[str, Any] = {
    "model": "olmoe-1b-7b",
    "cluster": "h100-8x-ib400",
    "num_gpus": 16,
    "ep": 4,
    "seq_len": 1024,
    "global_batch": 32,
}


def counts(num_layers: int, **parallel: Any) -> list[int]:
    return [held.num_layers for held in held_by_stage(num_layers, Parallelism(**parallel))]


@settings(max_examples=60, deadline=None)
@given(num_layers=st.integers(1, 100), pp=st.integers(1, 16), vpp=st.integers(1, 4))
def test_even_stages_hold_every_layer_and_differ_by_at_most_one_per_chunk(num_layers: int, pp: int, vpp: int) -> None:
    if pp * vpp > num_layers + 2:
        with pytest.raises(InputError, match="by more than 2"):
            counts(num_layers, pp=pp, vpp=vpp)
        return
    sizes = counts(num_layers, pp=pp, vpp=vpp)
    assert sum(sizes) == num_layers
    assert min(sizes[1:-1], default=1) >= 1
    if pp * vpp <= num_layers:
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1 + (len(sizes) == 1)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=12), num_mtp=st.integers(0, 2))
def test_a_layout_spelt_letter_by_letter_is_its_counts(sizes: list[int], num_mtp: int) -> None:
    text = "E" + "|".join("t" * size for size in sizes) + "m" * num_mtp + "L"
    held = held_of_text(text)
    assert [stage.num_layers for stage in held] == sizes
    assert [stage.num_mtp for stage in held] == [0] * (len(sizes) - 1) + [num_mtp]
    repeated = "E" + "|".join(f"t*{size}" if size else "" for size in sizes) + "m" * num_mtp + "L"
    assert held_of_text(repeated) == held


def test_deepseeks_published_layout_puts_the_mtp_layer_before_the_loss() -> None:
    held = held_of_text("Et*3|(tt|)*29,m|L")
    assert held[0] == Held(3)
    assert held[1:30] == (Held(2),) * 29
    assert held[30:] == (Held(0, 1), Held(0))
    assert sum(stage.num_layers for stage in held) == 61


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("tt|ttL", "must begin with its only E and end with its only L"),
        ("Ett|ttLt", "must begin with its only E and end with its only L"),
        ("Ettm|ttL", "must have no t after an m"),
        ("Ettttm|mL", "must have every m in one stage"),
        ("Ettx|ttL", "Not understood: x"),
        ("E((t|)*2)*2L", "Not understood"),
        ("Et*999999999|L", "Not understood|must not exceed"),
        ("Et*999999|t*9L", "must not exceed 100000 letters"),
        ("", "must begin with its only E"),
    ],
)
def test_a_layout_that_means_nothing_is_refused(layout: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Parallelism(pp=2, layout=layout)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"pp": 4, "layout": "Ett|ttL"}, r"must have pp\*vpp = 4\*1 = 4 stages; it has 2"),
        ({"pp": 2, "layout": "Et|t|t|tL"}, "With pp=2 it needs vpp=2."),
        ({"pp": 2, "layout": (1, -1)}, "must be whole numbers of layers, at least 0"),
        ({"num_first_stage_layers": 3}, "needs pp of at least 2"),
        ({"pp": 2, "num_first_stage_layers": 3, "loss_as_layer": True}, "cannot stand beside loss_as_layer"),
        ({"pp": 2, "embedding_as_layer": True, "layout": (2, 2)}, "cannot stand beside layout"),
    ],
)
def test_rules_that_contradict_are_refused(parallel: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Parallelism(**parallel)


def test_counts_of_the_ends_leave_the_rest_to_the_others() -> None:
    assert counts(61, pp=4, num_last_stage_layers=13) == [16, 16, 16, 13]
    assert counts(61, pp=8, num_first_stage_layers=7, num_last_stage_layers=6) == [7, *[8] * 6, 6]
    assert counts(12, pp=2, vpp=2, num_first_stage_layers=8) == [4, 2, 4, 2]
    with pytest.raises(InputError, match="leaves 50 of 61 layers for 3 stages, which does not divide"):
        counts(61, pp=4, num_first_stage_layers=11)
    with pytest.raises(InputError, match="must divide a stage's 3 layers"):
        counts(9, pp=3, vpp=2, num_first_stage_layers=3)


def test_94_layers_fill_96_chunks_where_embedding_and_loss_take_a_layers_place() -> None:
    asked = counts(94, pp=32, vpp=3, embedding_as_layer=True, loss_as_layer=True)
    assert asked == [0, *[1] * 94, 0]
    assert counts(94, pp=32, vpp=3) == asked
    with pytest.raises(InputError, match=r"must divide the 94 layers and embedding, 95 in all"):
        counts(94, pp=32, vpp=3, embedding_as_layer=True)


def test_layouts_that_say_the_same_give_the_same_step_and_memory() -> None:
    even = Scenario.make(**SMALL, pp=4)
    listed = even.with_(layout=[4, 4, 4, 4])
    text = even.with_(layout="E(tttt|)*3ttttL")
    steps = [run_step(scenario).step_s for scenario in (even, listed, text)]
    assert steps[0] == steps[1] == steps[2]
    memories = [memory_by_stage(scenario, step_load(scenario)) for scenario in (even, listed, text)]
    assert memories[0] == memories[1] == memories[2]


def test_a_lopsided_layout_is_slower_and_its_fullest_stage_fuller() -> None:
    even, lopsided = (Scenario.make(**SMALL, pp=4, layout=layout) for layout in ((4, 4, 4, 4), (1, 7, 7, 1)))
    assert run_step(lopsided).step_s > 1.2 * run_step(even).step_s
    own, other = (memory_by_stage(s, step_load(s)) for s in (even, lopsided))
    assert other[1].weights_bytes == pytest.approx(7 / 4 * own[1].weights_bytes)
    assert other[0].peak_bytes < own[0].peak_bytes


def test_chunks_without_layers_run_and_hold_only_what_lies_there() -> None:
    scenario = Scenario.make(**SMALL, pp=4, vpp=2, layout="E|t*3|t*3|t*3||t*3|t*4|L", overlap="grad_reduce")
    trace = run_step(scenario)
    assert np.isfinite(trace.step_s)
    assert trace.step_s > 0
    memories = memory_by_stage(scenario, step_load(scenario))
    model = scenario.model
    assert memories[0].weights_bytes == 2 * model.vocab * model.hidden
    chunks = stage_chunks(model, scenario.parallel, scenario.train, 0)
    assert chunks == ((), ())
    for v in range(5):  # not the embedding's
        alone = Scenario.make(**SMALL, pp=2, layout=[16, 0], zero=v % 4)
        assert run_step(alone).step_s > 0


def test_layers_keep_their_order_over_the_chunks_of_a_layout() -> None:
    model = load_model("deepseek-v3")
    parallel = Parallelism(pp=16, vpp=2, layout="Et*3|(tt|)*29m|L")
    train = Training(mtp=True)
    stages = [stage_chunks(model, parallel, train, stage) for stage in range(16)]
    by_depth = [placed.number for v in range(2) for stage in stages for placed in stage[v]]
    assert by_depth == list(range(62))
    assert mtp_stage(model, parallel, train) == 14
    assert [placed.is_mtp for placed in stages[14][1]] == [True]


def test_the_stage_of_the_mtp_layer_looks_tokens_up_again() -> None:
    model, train = load_model("deepseek-v3"), Training(mtp=True)
    apart = Parallelism(pp=16, vpp=2, layout="Et*3|(tt|)*29m|L")
    table = model.vocab * model.hidden
    tables = [outer_parameters(model, apart, train, stage) // table for stage in range(16)]
    assert tables == [1, *[0] * 13, 1, 1]
    at_the_end = Parallelism(pp=16)
    assert outer_parameters(model, at_the_end, train, 15) // table == 2


def test_no_layout_changes_what_all_stages_hold_together() -> None:
    model, train = load_model("olmoe-1b-7b"), Training()
    sums = []
    for layout in (None, (16, 0), (0, 16), (5, 11)):
        parallel = Parallelism(pp=2, layout=layout, zero=0)
        layout_of_ranks = parallel.rank_layout(2)
        memories = [static_memory(model, parallel, layout_of_ranks, train, stage=stage) for stage in range(2)]
        sums.append(sum(memory.weights_bytes + memory.optimizer_bytes for memory in memories))
    assert max(sums) == pytest.approx(min(sums), rel=1e-12)


def test_a_layout_must_hold_the_models_layers_and_its_trained_mtp_layers() -> None:
    with pytest.raises(InputError, match="must hold the model's 16 layers; got 15"):
        Scenario.make(**SMALL, pp=2, layout=[8, 7])
    with pytest.raises(InputError, match="must hold the 0 multi-token-prediction layers"):
        Scenario.make(**SMALL, pp=2, layout="Et*8|t*8mL")


def test_deepseeks_layout_relieves_the_last_stage_of_its_mtp_layer() -> None:
    at_the_end = Scenario.make(
        model="deepseek-v3", cluster="h800-8x-ib400", num_gpus=256, pp=16, vpp=2, ep=16, global_batch=512, mtp=True
    )
    apart = at_the_end.with_(layout="Et*3|(tt|)*29m|L")
    for scenario, mtp_layer_on in ((at_the_end, 15), (apart, 14)):
        held = [index for index, run in enumerate(run_step(scenario).stages) if "join next token" in names(run)]
        assert held == [mtp_layer_on]
    last, relieved = (memory_by_stage(s, step_load(s))[15] for s in (at_the_end, apart))
    assert relieved.weights_bytes < 0.6 * last.weights_bytes
    assert relieved.peak_bytes < last.peak_bytes


def names(run: StageRun) -> set[str]:
    return {name for operation in run.operations for name in operation.times.names}
