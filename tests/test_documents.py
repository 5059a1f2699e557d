"""Packed documents: pieces, shares of attention, and what their unevenness does to a step."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.catalog.models import load_model
from moesim.cost.documents import draw_pieces, shares
from moesim.describe.documents import HistogramLengths, LognormalLengths
from moesim.describe.flops import layer_flops
from moesim.describe.model import GroupedQueryAttention
from moesim.errors import InputError, NotModelledError
from moesim.leaves import merge
from moesim.metrics.summary import summarise
from moesim.scenario import Scenario
from moesim.timeline.packed import packed_work
from moesim.timeline.step import run_step

SMALL: dict[str, Any] = {
    "model": "mixtral-8x7b",
    "cluster": "h100-8x-ib400",
    "num_gpus": 16,
    "parallel": {"ep": 8, "pp": 1},
    "train": {"seq_len": 8192, "global_batch": 64, "recompute": "full"},
}


def scenario(documents: Any = None, **train: Any) -> Scenario:
    return Scenario.from_mapping(SMALL | {"train": SMALL["train"] | {"documents": documents} | train})


@settings(max_examples=40, deadline=None)
@given(median=st.floats(1, 5000), sigma=st.floats(0, 2), num_sequences=st.integers(1, 40), seq_len=st.integers(1, 3000))
def test_pieces_fill_every_sequence_to_the_last_token(
    median: float, sigma: float, num_sequences: int, seq_len: int
) -> None:
    law = LognormalLengths(median_tokens=median, sigma=sigma)
    pieces, sequence = draw_pieces(law, num_sequences, seq_len, np.random.default_rng(0))
    assert pieces.min() >= 1
    assert np.bincount(sequence, weights=pieces).tolist() == [seq_len] * num_sequences
    assert (np.diff(sequence) >= 0).all()
    share = shares(pieces, sequence, num_sequences, seq_len)
    assert 1 / seq_len - 1e-12 <= share.min() <= share.max() <= 1.0


def test_documents_of_one_length_leave_that_share_of_attention() -> None:
    law = LognormalLengths(median_tokens=256, sigma=0)
    pieces, sequence = draw_pieces(law, 5, 4096, np.random.default_rng(0))
    assert shares(pieces, sequence, 5, 4096).tolist() == [256 / 4096] * 5


@pytest.mark.parametrize("window", [None, 128, 1000, 10_000])
def test_shares_are_those_of_the_counted_flops(window: int | None) -> None:
    model = load_model("mixtral-8x7b")
    attention = model.layers[0].attention
    assert isinstance(attention, GroupedQueryAttention)
    layer = dataclasses.replace(model.layers[0], attention=dataclasses.replace(attention, sliding_window=window))
    lengths = np.array([100, 900, 3000, 96])

    def flops(length: int) -> float:
        return length * layer_flops(model, layer, length).attention_sequence

    expected = sum(flops(int(length)) for length in lengths) / flops(4096)
    share = shares(lengths, np.zeros(4, dtype=np.int64), 1, 4096, window)
    assert share[0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("most", [None, 900, 4000])
def test_the_mean_length_is_the_drawn_one(most: int | None) -> None:
    from moesim.cost.documents import _law

    draw, mean_tokens = _law(LognormalLengths(median_tokens=800, sigma=1.2, max_tokens=most))
    drawn = draw(400_000, np.random.default_rng(1))
    assert mean_tokens == pytest.approx(drawn.mean(), rel=0.02)
    assert np.median(drawn) == pytest.approx(800, rel=0.02)
    assert drawn.max() <= (most or math.inf)


def test_documents_as_long_as_sequences_change_not_a_bit() -> None:
    whole, packed = (run_step(scenario(documents)) for documents in (None, {"median_tokens": 1e9, "sigma": 0}))
    assert packed.step_s == whole.step_s
    assert summarise(whole).packing is None
    assert "packing" not in summarise(whole).to_dict()


def test_uneven_documents_cost_time_beyond_their_mean() -> None:
    result = summarise(run_step(scenario({"median_tokens": 1500, "sigma": 1.2})))
    whole = summarise(run_step(scenario()))
    packing = result.packing
    assert packing is not None
    assert packing["imbalance_s"] > 0.0
    assert packing["step_even_s"] < result.step_s < whole.step_s
    assert packing["slowest_over_mean"] > packing["slowest_replica_over_mean"] > 1.0
    assert result.mfu < whole.mfu
    assert any("Lost to uneven documents" in name for name, _ in result.rows())
    even = summarise(run_step(scenario({"median_tokens": 1024, "sigma": 0})))
    assert even.packing is not None
    assert even.packing["imbalance_s"] == pytest.approx(0.0, abs=1e-12)
    assert even.packing["mean_share"] == 1 / 8


def test_a_larger_micro_batch_evens_documents_out() -> None:
    law = {"median_tokens": 1500, "sigma": 1.2}
    spreads = []
    for micro_batch in (1, 4):
        work = packed_work(scenario(law, micro_batch=micro_batch, global_batch=1024))
        assert work is not None
        spreads.append(work.numbers()["spread"])
    assert spreads[1] == pytest.approx(spreads[0] / 2, rel=0.15)


def test_ranks_that_share_a_sequence_have_one_share() -> None:
    raw = SMALL | {
        "parallel": {"ep": 4, "tp": 2, "cp": 2},
        "train": SMALL["train"] | {"documents": {"median_tokens": 99}},
    }
    asked = Scenario.from_mapping(raw)
    work = packed_work(asked)
    assert work is not None
    share_MR = work.share_MR(asked.model.layers[0])
    assert share_MR.shape == (16, 16)
    assert (share_MR.reshape(16, 4, 4) == share_MR.reshape(16, 4, 4)[:, :, :1]).all()
    assert run_step(asked).step_s > 0


def test_a_seed_says_which_documents() -> None:
    law = {"median_tokens": 1500}
    one, same = (packed_work(scenario(law)) for _ in range(2))
    other = packed_work(Scenario.from_mapping(SMALL | {"seed": 1, "train": SMALL["train"] | {"documents": law}}))
    assert one is not None
    assert same is not None
    assert other is not None
    assert one.numbers() == same.numbers() != other.numbers()


def test_a_histogram_file_is_a_law(tmp_path: Path) -> None:
    (tmp_path / "lengths.csv").write_text("length_tokens,count\n512,3\n1024,1\n")
    (tmp_path / "run.yaml").write_text(
        "{model: mixtral-8x7b, cluster: h100-8x-ib400, num_gpus: 16, parallel: {ep: 8}, "
        "train: {seq_len: 8192, global_batch: 64, documents: {file: lengths.csv}}}"
    )
    asked = Scenario.from_file(tmp_path / "run.yaml")
    assert asked.train.documents == HistogramLengths(file=str(tmp_path / "lengths.csv"))
    work = packed_work(asked)
    assert work is not None
    # Mean square over mean of the lengths, less what the ends of sequences cut.
    expected = (3 * 512**2 + 1024**2) / (3 * 512 + 1024) / 8192
    assert 0.9 * expected < work.numbers()["mean_share"] < expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("length_tokens,count\n", "must hold a row"),
        ("length_tokens\n5\n", "must have the column count"),
        ("length_tokens,count\n0,5\n", "length_tokens must be a whole number of at least 1"),
        ("length_tokens,count\n2.5,5\n", "length_tokens must be a whole number of at least 1"),
        ("length_tokens,count\n5,-1\n", "count must be at least 0"),
        ("length_tokens,count\n5,0\n", "must not all be 0"),
        ("length_tokens,count\n5,many\n", "must be a number"),
    ],
)
def test_a_file_that_is_no_histogram_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "lengths.csv"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        draw_pieces(HistogramLengths(file=str(file)), 1, 64, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ({"median_tokens": 0}, "must be at least 1"),
        ({"median_tokens": 10, "sigma": 9}, "must lie in 0..4"),
        ({"median_tokens": 10, "max_tokens": 0}, "max_tokens"),
        ({"sigma": 1}, "median_tokens"),
        ({"file": "nowhere.csv"}, "must exist"),
        ({"kind": "zipf"}, "kind"),
    ],
)
def test_documents_that_make_no_sense_are_refused(documents: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        scenario(documents)


def test_too_many_tiny_documents_and_encoder_decoders_are_refused() -> None:
    with pytest.raises(InputError, match="make more than 50,000,000 documents"):
        draw_pieces(LognormalLengths(median_tokens=1, sigma=0), 100_000, 8192, np.random.default_rng(0))
    raw = SMALL | {"model": "switch-base-128", "train": SMALL["train"] | {"documents": {"median_tokens": 99}}}
    with pytest.raises(NotModelledError, match="encoder and decoder are not modelled"):
        packed_work(Scenario.from_mapping(raw | {"parallel": {"ep": 8}}))


def test_documents_have_a_flat_name_for_a_file_or_a_median_length(tmp_path: Path) -> None:
    file = tmp_path / "lengths.csv"
    file.write_text("length_tokens,count\n100,1\n")
    base = Scenario.from_mapping(SMALL)
    assert base.with_(documents=str(file)).train.documents == HistogramLengths(file=str(file))
    for typed in (800, "800"):
        assert base.with_(documents=typed).train.documents == LognormalLengths(median_tokens=800.0)
    assert base.with_(documents=800).with_(documents=None).train.documents is None
    with pytest.raises(InputError, match=r"nowhere\.csv"):
        Scenario.from_mapping(merge(SMALL, {"train": {"documents": "nowhere.csv"}}))
