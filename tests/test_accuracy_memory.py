"""Predicted peaks against measured ones, row by row; nothing is fitted. Bands are what docs/accuracy.md says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moesim.door.records import read_records
from moesim.errors import InputError
from moesim.report.memory_page import memory_section
from moesim.study.accuracy import CARRIED, AccuracyRow
from moesim.study.accuracy_memory import MemoryRow, memory_rows, predict
from moesim.units import GIB

RECORDS = read_records(CARRIED / "memory.csv", needed=("id", "peak", "source"))
ROWS = memory_rows(RECORDS, "memory.csv")


def errors_of(group: str) -> np.ndarray:
    found = [row.error_fraction for row in ROWS if row.group == group]
    assert found
    return np.array(found)


def test_dense_runs_on_b200_are_within_a_tenth_of_a_percent_and_moe_ones_within_one() -> None:
    assert np.abs(errors_of("training step, b200, dense")).max() < 0.001
    assert len(errors_of("training step, b200, dense")) == 31
    assert np.abs(errors_of("training step, b200, MoE")).max() < 0.01


def test_moonlights_peaks_are_within_five_percent_with_its_recipes_number_formats() -> None:
    errors = errors_of("training step, h100-sxm, MoE")
    assert len(errors) == 3
    assert np.abs(errors).max() < 0.05  # 1.3, 3.3 and 3.2 % when written
    peaks = {row.moment for row in ROWS if row.id.startswith("mbridge_moonlight")}
    assert peaks == {"optimizer step"}


def test_single_moe_layers_are_within_two_percent_in_bf16_and_within_six_in_fp8() -> None:
    assert np.abs(errors_of("MoE layer, BF16")).max() < 0.02
    assert np.abs(errors_of("MoE layer, FP8")).max() < 0.06  # both too low: 3.6 and 5.4 % when written


def test_simumax_is_nearer_on_no_run_of_both() -> None:
    both = [row for row in ROWS if row.simumax_error_fraction is not None]
    assert len(both) == 33
    assert all(abs(row.error_fraction) < abs(row.simumax_error_fraction or 0.0) for row in both)


def test_the_section_holds_a_line_for_every_row() -> None:
    text = memory_section(ROWS, {})
    assert all(f"`{row.id.removeprefix('simumax_')}`" in text for row in ROWS)


def test_a_peak_without_its_unit_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="peak_unit"):
        memory_rows([dict(RECORDS[0], peak_unit="apples")], "mine.csv")


def test_rows_say_which_run_and_source_they_are() -> None:
    assert all(isinstance(row, MemoryRow) and row.source for row in ROWS)
    assert len({row.id for row in ROWS}) == len(ROWS)


def test_anybodys_own_peaks_need_no_more_columns_than_say_the_run(tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text(
        "id,model,gpu,n_gpus,tp,pp,cp,seq_len,mbs,gbs,peak,peak_unit\n"
        "mine,mixtral-8x7b,h100-sxm,64,1,8,2,4096,1,64,60,GiB\n"
    )
    (row,) = memory_rows(read_records(file), "mine.csv")
    assert row.measured_bytes == 60 * GIB
    assert 0.5 < row.predicted_bytes / row.measured_bytes < 2


def test_rows_in_the_columns_of_published_tables_are_read_as_the_carried_ones() -> None:
    carried = next(row for row in RECORDS if row["id"].startswith("simumax_deepseekv3"))
    names = ("id", "model", "gpu", "n_gpus", "precision", "gbs", "mbs", "seq_len", "n_layers", "dense_layers", "tp")
    published = {name: carried[name] for name in (*names, "pp", "ep", "recompute", "source")}
    published |= {"max_alloc_mb_per_rank": f"100.5;{carried['peak']}", "routing": "balanced", "etp": "1"}
    (ours,), (theirs,) = predict(carried, "a"), predict(published, "b")
    assert isinstance(ours, AccuracyRow)
    assert isinstance(theirs, AccuracyRow)
    assert theirs.predicted == pytest.approx(ours.predicted, rel=1e-9)
    assert theirs.measured == ours.measured
    assert theirs.inside_envelope


def test_a_row_that_does_not_say_its_formats_lies_outside_the_envelope() -> None:
    carried = next(row for row in RECORDS if row["id"].startswith("simumax_llama3_70b_l12_tp1_pp2"))
    (row,) = predict({**carried, "gradients": "", "precision": "BF16"}, "a")
    assert isinstance(row, AccuracyRow)
    assert not row.inside_envelope
