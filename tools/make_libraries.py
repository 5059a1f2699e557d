"""Fit the constants of moesim/catalog/libraries.yaml on the carried rows that the split rule names, and write the file.

Run from the repository: python tools/make_libraries.py. Which constants a release has is said here; the values come
from the fit. tests/test_accuracy_fit.py repeats the fit and compares.
"""

from __future__ import annotations

from pathlib import Path

from moesim.catalog import libraries as catalog
from moesim.catalog.libraries import Library, LibraryRate
from moesim.describe.hardware import Sourced
from moesim.study.accuracy import carried_cases
from moesim.study.accuracy_dispatch import Exchange, express, fit_rows
from moesim.study.accuracy_fit import fit_library

OUT = Path(catalog.__file__).parent / "libraries.yaml"
HEAD = """\
# What communication libraries achieve, by release. Made by tools/make_libraries.py: fitted on the carried rows that
# moesim.study.accuracy_dispatch.fit_rows names (moesim/catalog/measurements/dispatch.csv), tested on all others
# (docs/accuracy.md). A value that a release does not give is the cluster's own.
schema: 1
libraries:
"""
UNITS = {"derate": "fraction", "latency": "us", "bytes_per_s": "GB/s"}
SCALE = {"derate": 1.0, "latency": 1e-6, "bytes_per_s": 1e9}
START = {"derate": 0.7, "latency": 2e-5, "bytes_per_s": 1.5e10}
DATE = "2026-11"


def number(value: float) -> Sourced:
    return Sourced(value=value, unit="", kind="measured", source="start of the fit", date=DATE)


def rate(operations: str, tiers: str, *names: str, gpus: str = "") -> LibraryRate:
    start = START | ({"latency": 1.0} if tiers == "nccl" else {})
    values = {name: number(start[name]) for name in names}
    return LibraryRate(
        library="",
        operations=tuple(operations.split()),
        tiers=tuple(tiers.split()),  # type: ignore[arg-type]
        fitted_on="",
        gpus=tuple(gpus.split()),
        **values,  # type: ignore[arg-type]
    )


def library(name: str, title: str, kind: str, *rates: LibraryRate, uses_nvlink: bool = True) -> Library:
    return Library(name=name, title=title, kind=kind, uses_nvlink=uses_nvlink, rates=rates)  # type: ignore[arg-type]


DISPATCH, BOTH = "dispatch_fp8 dispatch_bf16", "dispatch_fp8 dispatch_bf16 combine"
COLLECTIVES = ("alltoall", "all_gather", "reduce_scatter", "all_reduce")
NVLINK_4, NVLINK_5 = "h100-sxm h200", "b200 gb200 gb300"
START_LIBRARIES = (
    library("deepep-v1-initial", "DeepEP V1 initial (IBRC)", "throughput", rate(BOTH, "nic", "derate")),
    library("deepep-v1", "DeepEP V1", "throughput", rate(BOTH, "nvlink", "derate")),
    library("deepep-v2", "DeepEP V2", "throughput", rate(BOTH, "nvlink", "derate")),
    library(
        "deepep-hybrid-branch",
        "DeepEP (hybrid-ep branch)",
        "throughput",
        *(rate(name, "nvlink", "derate") for name in BOTH.split()),
        *(rate(name, "sm", "bytes_per_s") for name in BOTH.split()),
    ),
    library(
        "deepep-v1-initial-low-latency",
        "DeepEP V1 initial low-latency",
        "low_latency",
        rate(BOTH, "nic", "derate"),
        uses_nvlink=False,
    ),
    library("deepep-v1-low-latency", "DeepEP V1 low-latency", "low_latency", rate(BOTH, "nvlink nic", "latency")),
    library(
        "deepep-sglang-0.5.6",
        "DeepEP in sglang 0.5.6",
        "throughput",
        *(rate(name, "nvlink nic", "latency") for name in (DISPATCH, "combine")),
        *(rate(name, "nic", "derate") for name in (DISPATCH, "combine")),
        *(rate(name, "sm", "bytes_per_s") for name in (DISPATCH, "combine")),
    ),
    library(
        "deepep-sglang-0.5.6-low-latency",
        "DeepEP low-latency in sglang 0.5.6",
        "low_latency",
        *(rate(name, "nvlink", "derate") for name in (DISPATCH, "combine")),
        rate(BOTH, "nvlink", "latency"),
        rate(BOTH, "nic", "derate", "latency"),
    ),
    library("nccl-2.27", "NCCL 2.27", "nccl", *(rate(name, "nccl", "derate", "latency") for name in COLLECTIVES)),
    library(
        "nccl-2.29",
        "NCCL 2.29",
        "nccl",
        *(rate(name, "nccl", "derate", "latency", gpus=gpus) for gpus in (NVLINK_4, NVLINK_5) for name in COLLECTIVES),
    ),
)


def fitted_on(rows: list[Exchange]) -> str:
    gpus = sorted({row.gpu for row in rows})
    sizes = sorted({row.num_ranks for row in rows})
    return f"{len(rows)} rows: {', '.join(gpus)}, {', '.join(map(str, sizes))} ranks"


def lines_of(fitted: Library, rows: list[Exchange]) -> list[str]:
    lines = [f"- name: {fitted.name}", f"  title: {fitted.title}", f"  kind: {fitted.kind}"]
    if not fitted.uses_nvlink:
        lines.append("  uses_nvlink: false")
    lines.append("  rates:")
    for entry in fitted.rates:
        keys = set(entry.operations)
        mine = [
            row
            for row in rows
            if (row.operation if "nccl" in entry.tiers else row.rate_key) in keys
            and (not entry.gpus or row.gpu in entry.gpus)
        ]
        lines.append(f"  - operations: [{', '.join(entry.operations)}]")
        lines.append(f"    tiers: [{', '.join(entry.tiers)}]")
        if entry.gpus:
            lines.append(f"    gpus: [{', '.join(entry.gpus)}]")
        lines.append(f'    fitted_on: "{fitted_on(mine)}"')
        source = "; ".join(sorted({row.source.split(",")[0] for row in mine}))
        for name in ("derate", "latency", "bytes_per_s"):
            value = getattr(entry, name)
            if value is None:
                continue
            is_factor = "nccl" in entry.tiers and name == "latency"
            unit, scale = ("count", 1.0) if is_factor else (UNITS[name], SCALE[name])
            lines.append(
                f"    {name}: {{value: {value.value / scale:.4g}, unit: {unit}, kind: measured, "
                f'source: "fitted on rows of {source}", date: {DATE}}}'
            )
    return lines


def fit_all() -> list[tuple[Library, list[Exchange]]]:
    """Every release with its fitted constants and the rows behind them."""
    by_name = {entry.name: entry for entry in START_LIBRARIES}
    exchanges = [express(row, "carried", by_name) for row in carried_cases("dispatch")]
    chosen = fit_rows(exchanges)
    result = []
    for start in START_LIBRARIES:
        rows = [row for row in chosen if row.library.name == start.name]
        result.append((fit_library(start, rows), rows))
    return result


if __name__ == "__main__":
    lines = [line for fitted, rows in fit_all() for line in lines_of(fitted, rows)]
    OUT.write_text(HEAD + "\n".join(lines) + "\n")
    print(f"wrote {OUT}")
