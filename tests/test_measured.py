"""The optional extra: a named error without it; with it, the traps of its tables."""

from __future__ import annotations

import importlib.util

import pytest

from moesim.catalog import measured
from moesim.errors import InputError
from moesim.study.accuracy import carried_cases

HAS_EXTRA = all(importlib.util.find_spec(name) is not None for name in (measured.MODULE, "pyarrow"))
needs_extra = pytest.mark.skipif(not HAS_EXTRA, reason="needs the extra: pip install 'moesim[measured]'")


def test_without_the_extra_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        InputError, match=r"needs the package aiconfigurator-core 0\.12.*pip install 'moesim\[measured\]'"
    ):
        measured.measured_cases()


def test_another_version_of_the_extra_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Spec:
        submodule_search_locations = ("somewhere",)

    monkeypatch.setattr(importlib.util, "find_spec", lambda _: Spec())
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.120.1")
    with pytest.raises(InputError, match=r"version 0\.120\.1"):
        measured.tables()


@needs_extra
def test_the_carried_rows_of_the_extra_stand_in_its_tables_to_the_digit() -> None:
    table = {row["id"]: row for row in measured.measured_cases()}
    carried = [row for row in carried_cases("dispatch") if row["source"].startswith(measured.PACKAGE)]
    assert len(carried) == 348
    for row in carried:
        mine = {column: value for column, value in row.items() if value}
        assert {column: table[row["id"]].get(column, "") for column in mine} == mine


@needs_extra
def test_a_message_size_counts_elements() -> None:
    """512 MiB among 8 H100 in 1.49 ms is 315 GB/s of bus bandwidth; as bytes it would be half a link."""
    rows = {row["id"]: row for row in measured.measured_cases()}
    row = rows["nccl_2.29.2_H100_alltoall_8_536870912"]
    bus_bytes_per_s = 7 / 8 * float(row["message_bytes"]) / (float(row["latency_us"]) * 1e-6)
    assert bus_bytes_per_s == pytest.approx(315.2e9, rel=1e-3)


@needs_extra
def test_on_several_nodes_the_h100_table_repeats_the_h200_s() -> None:
    from moesim.door.records import read_parquet_columns

    tables = [
        read_parquet_columns(
            measured.tables() / system / "comm" / "sglang" / "0.5.6.post2" / "wideep_deepep_normal_perf.parquet",
            ("node_num", "num_token", "dispatch_sms", "dispatch_transmit_us"),
        )
        for system in ("h100_sxm", "h200_sxm")
    ]
    keyed = [{tuple(row.values()) for row in table if row["node_num"] > 1} for table in tables]
    assert keyed[0] == keyed[1]
    assert len(keyed[0]) == 414
