"""Histograms of expert use: they read back the same, every malformed table is refused by name, none is held whole."""

from __future__ import annotations

import importlib.util
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from moesim.describe.model import Router
from moesim.placement import contiguous
from moesim.routing.histogram import (
    Histogram,
    histogram_load,
    histogram_popularities,
    histogram_steps,
    read_histogram,
    recorded_histogram,
    write_histogram,
)
from moesim.routing.reach import reach_of_sets
from moesim.routing.recorded import load_LE, recorded_from_array
from moesim.routing.visits import visit_probabilities
from tests.test_routing_recorded import refusal_of, replay

HAS_PYARROW = importlib.util.find_spec("pyarrow") is not None
needs_pyarrow = pytest.mark.skipif(not HAS_PYARROW, reason="parquet needs pyarrow, which is not installed")


def test_the_histogram_by_steps_adds_up_to_the_load_whatever_the_chunks() -> None:
    ids = replay()
    recorded = recorded_from_array(ids, num_experts=8, tokens_per_step=7)
    histogram = recorded_histogram(recorded)
    assert histogram.tokens_SLE.shape == (9, 3, 8)
    assert np.array_equal(histogram.load_LE, load_LE(recorded))
    for step in range(9):
        part = recorded_from_array(ids[7 * step : 7 * step + 7], num_experts=8)
        assert np.array_equal(histogram.tokens_SLE[step], load_LE(part))


def test_a_histogram_too_large_for_memory_is_refused() -> None:
    many = recorded_from_array(np.zeros((6000, 1, 1), dtype=int), num_experts=100_000, tokens_per_step=1)
    assert "must fit in 4.0 GiB" in refusal_of(lambda: recorded_histogram(many))


@pytest.mark.parametrize("form", [".csv", pytest.param(".parquet", marks=needs_pyarrow)])
def test_a_histogram_reads_back_the_same(tmp_path: Path, form: str) -> None:
    tokens = np.random.default_rng(0).integers(0, 9, size=(4, 2, 5))
    path = tmp_path / f"use{form}"
    write_histogram(Histogram(steps_S=np.array([0, 1000, 2000, 3000]), layers=(3, 7), tokens_SLE=tokens), path)
    back = read_histogram(path, num_experts=5)
    assert (back.steps_S.tolist(), back.layers) == ([0, 1000, 2000, 3000], (3, 7))
    assert np.array_equal(back.tokens_SLE, tokens)
    layers, load = histogram_load(path, num_experts=5)
    assert layers == (3, 7)
    assert np.array_equal(load, tokens.sum(axis=0))


def test_a_histogram_may_leave_out_zeros_and_order_its_columns_and_rows_as_it_likes(tmp_path: Path) -> None:
    path = tmp_path / "use.csv"
    path.write_text("expert,tokens,step,layer\r\n2,5,0,1\r\n0,3,0,1\r\n1, 4 ,6,0")
    histogram = read_histogram(path, num_experts=3)
    assert histogram.steps_S.tolist() == [0, 6]
    assert histogram.tokens_SLE.tolist() == [[[0, 0, 0], [3, 0, 5]], [[0, 4, 0], [0, 0, 0]]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "header: must be a column out of step, layer, expert, tokens; got ''"),
        ("step,layer,expert\n", "header: must name step, layer, expert, tokens"),
        ("step,layer,expert,token\n", "got 'token'. Did you mean tokens?"),
        ("step,layer,expert,tokens,tokens\n", "header: must name step"),
        ("step,layer,expert,tokens\n", "must hold at least one row"),
        ("step,layer,expert,tokens\n0,0,0,1\n0,0,1,nan\n", "line 3: must be 4 whole numbers below 1e15, none negative"),
        ("step,layer,expert,tokens\n0,0,0,1.5\n", "line 2: must be 4 whole numbers"),
        ("step,layer,expert,tokens\n0,0,0,-1\n", "line 2: must be 4 whole numbers"),
        ("step,layer,expert,tokens\n0,0,0\n", "line 2: must be 4 whole numbers"),
        ("step,layer,expert,tokens\n0,0,0,1,2\n", "line 2: must be 4 whole numbers"),
        ("step,layer,expert,tokens\n0,0,0,1\n\n", "line 3: must be 4 whole numbers"),
        ("step,layer,expert,tokens\n0,0,4,1\n", "row 1: expert must lie in 0..3; got 4"),
        ("step,layer,expert,tokens\n0,10000,0,1\n", "row 1: layer must lie in 0..9999; got 10000"),
        ("step,layer,expert,tokens\n5,0,0,1\n4,0,0,1\n", "row 2: must not come before the step of the row above"),
        ("step,layer,expert,tokens\n5,0,0,1\n5,0,0,1\n", "step 5: each layer and expert stands once in a step"),
    ],
)
def test_a_malformed_histogram_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "use.csv"
    path.write_text(text)
    assert message in refusal_of(lambda: read_histogram(path, num_experts=4))


def test_a_histogram_is_read_a_step_at_a_time_whatever_the_blocks(tmp_path: Path) -> None:
    path = tmp_path / "use.csv"
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 1000, size=(1500, 4, 64))  # 384,000 rows, 5 MB: several blocks
    write_histogram(Histogram(steps_S=np.arange(1500), layers=(0, 1, 2, 3), tokens_SLE=tokens), path)
    tracemalloc.start()
    try:
        for (step, by_layer), wanted_LE in zip(histogram_steps(path, num_experts=64), tokens, strict=True):
            assert np.array_equal(np.stack(list(by_layer.values())), wanted_LE), step
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 4e6
    assert peak_bytes < 8e6  # one block of a quarter MB of text, its lines and its numbers


def test_a_duplicate_is_found_across_blocks(tmp_path: Path) -> None:
    path = tmp_path / "use.csv"
    rows = "\n".join(f"0,{layer},{expert},1" for layer in range(2000) for expert in range(64))
    path.write_text("step,layer,expert,tokens\n" + rows + "\n0,0,0,1\n")
    assert "each layer and expert stands once in a step" in refusal_of(lambda: read_histogram(path, num_experts=64))


@pytest.mark.skipif(HAS_PYARROW, reason="pyarrow is installed here")
def test_parquet_without_pyarrow_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "use.parquet"
    path.write_bytes(b"PAR1")
    assert "parquet needs the package pyarrow; got 'it is not installed'. Install the extra" in refusal_of(
        lambda: read_histogram(path, num_experts=4)
    )
    empty = Histogram(steps_S=np.array([0]), layers=(0,), tokens_SLE=np.ones((1, 1, 4), dtype=int))
    assert "parquet needs the package pyarrow" in refusal_of(lambda: write_histogram(empty, path))


@needs_pyarrow
def test_malformed_parquet_is_refused(tmp_path: Path) -> None:
    import pandas as pd

    path = tmp_path / "use.parquet"
    good = pd.DataFrame({"step": [0, 0], "layer": [0, 0], "expert": [0, 1], "tokens": [5, 6]})
    cases = [
        (good.drop(columns="tokens"), "tokens: must be a column"),
        (good.assign(tokens=[1.5, 2.0]), "tokens: must hold whole numbers; got 'double'"),
        (good.assign(tokens=pd.array([1, None], dtype="Int64")), "tokens: must not hold nulls"),
        (good.assign(tokens=[1, -2]), "row 1: must hold whole numbers below 1e15, none negative; got 'tokens -2'"),
        (good.assign(expert=[0, 9]), "row 2: expert must lie in 0..3; got 9"),
    ]
    for frame, message in cases:
        frame.to_parquet(path)
        assert message in refusal_of(lambda: read_histogram(path, num_experts=4))
    path.write_bytes(path.read_bytes()[:-9])
    assert "must be a sound parquet file" in refusal_of(lambda: read_histogram(path, num_experts=4))


def test_a_load_becomes_weights_whose_draw_gives_that_load() -> None:
    load = np.array([[5, 10, 20, 40, 80, 5, 10, 30], [25] * 8])
    popularities = histogram_popularities(load, Router(top_k=2))
    wanted = 2 * load / load.sum(axis=1, keepdims=True)
    assert popularities.inclusion_LE == pytest.approx(wanted)
    reached = reach_of_sets(popularities.log_weights_LE, np.arange(8), top_k=2, num_sets=8)
    assert reached == pytest.approx(wanted, rel=0.01)


def test_weights_widen_with_a_routers_noise_so_that_its_load_stays() -> None:
    load = np.array([[5, 10, 20, 40, 80, 5, 10, 30]])
    noisy = Router(top_k=2, noise_std=1.0)
    visits = visit_probabilities(histogram_popularities(load, noisy), contiguous(8, 8))
    assert visits.rank_visits_LR == pytest.approx(2 * load / load.sum(), rel=0.01)


def test_a_load_that_no_router_can_give_is_refused() -> None:
    assert "an expert must not take more than all tokens (top-2)" in refusal_of(
        lambda: histogram_popularities(np.array([[90, 5, 5, 5]]), Router(top_k=2))
    )
    assert "must not all be 0 in a layer" in refusal_of(
        lambda: histogram_popularities(np.array([[0, 0, 0, 0]]), Router(top_k=2))
    )
    assert "must be a plain top-k one where only a histogram is given" in refusal_of(
        lambda: histogram_popularities(np.array([[1, 1, 1, 1]]), Router(top_k=2, num_groups=2, top_groups=1))
    )
