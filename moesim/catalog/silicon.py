"""The extra ``measured``: products timed on GPUs that are not here, kernel by kernel, as tables of shapes and seconds.

Traps: a table's FP8 rows time the scale and the cast of the activations with the product; the same release's own tables
of these two kernels are taken off, and rows that were mostly casts left out. NVFP4 has no such tables. Rows of odd
sizes (4,353 between 4,352 and 4,608) time the edge of a tile, not the size; they are left out of what is interpolated.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from moesim.catalog.measured import SOURCE, SYSTEMS, tables
from moesim.door.records import read_parquet_columns
from moesim.errors import check
from moesim.units import MILLI

Floats = NDArray[np.float64]
NEWEST = "trtllm/1.3.0rc20"  # whose products are torch's (cuBLAS)
DTYPES = {"bf16": "bfloat16", "fp8": "fp8", "nvfp4": "nvfp4"}  # by kernels of efficiency.yaml
LEAST_ROWS, LEAST_SHARE = 64, 0.4


@dataclass(frozen=True, kw_only=True, eq=False)
class ProductTable:
    """Timed products of (m, k) x (k, n), and where they come from. N rows."""

    m_N: Floats
    n_N: Floats
    k_N: Floats
    seconds_N: Floats
    source: str

    def pick(self, chosen_N: NDArray[np.bool_] | NDArray[np.int64]) -> ProductTable:
        """Some of the rows."""
        columns = (self.m_N[chosen_N], self.n_N[chosen_N], self.k_N[chosen_N], self.seconds_N[chosen_N])
        return ProductTable(m_N=columns[0], n_N=columns[1], k_N=columns[2], seconds_N=columns[3], source=self.source)


def release_of(gpu: str, kernels: str) -> str:
    """Whose table is read: of the newest release of the same library, where a GPU and format has one."""
    if kernels == "nvfp4":
        return "vllm/0.24.0"
    return "sglang/0.5.10" if gpu == "a100-80gb" else NEWEST


@cache
def product_table(gpu: str, kernels: str) -> ProductTable:
    """Every timed product of a GPU of the catalog and a format, 64 rows and more. Raises InputError."""
    check(gpu in SYSTEMS, "profile measured", "gpu", f"must be one of {', '.join(SYSTEMS)}", gpu)
    rule = f"must be products in {', '.join(DTYPES)}: no table times others"
    check(kernels in DTYPES, "profile measured", "precision", rule, kernels)
    release, dtype = release_of(gpu, kernels), DTYPES[kernels]
    path = tables() / SYSTEMS[gpu] / "gemm" / release / "gemm_perf.parquet"
    rows = read_parquet_columns(path, ("gemm_dtype", "m", "n", "k", "latency"))
    kept = [row for row in rows if row["gemm_dtype"] == dtype and row["m"] >= LEAST_ROWS]
    m, n, k, latency = (np.array([row[name] for row in kept], dtype=np.float64) for name in ("m", "n", "k", "latency"))
    said = {"fp8": ", scale and cast of the activations taken off", "nvfp4": ", the activations' cast perhaps included"}
    source = f"{SOURCE}, {SYSTEMS[gpu]}/gemm/{release}{said.get(kernels, '')}"
    table = ProductTable(m_N=m, n_N=n, k_N=k, seconds_N=latency * MILLI, source=source)
    return _without_casts(table, gpu) if kernels == "fp8" else table


def _without_casts(table: ProductTable, gpu: str) -> ProductTable:
    casts: dict[tuple[float, float], float] = {}
    for name in ("computescale", "scale_matrix"):
        path = tables() / SYSTEMS[gpu] / "quantize" / NEWEST / f"{name}_perf.parquet"
        for row in read_parquet_columns(path, ("m", "k", "latency")):
            casts[row["m"], row["k"]] = casts.get((row["m"], row["k"]), 0.0) + row["latency"] * MILLI
    cast_N = np.array([casts.get((m, k), np.inf) for m, k in zip(table.m_N, table.k_N, strict=True)])
    bare_N = table.seconds_N - cast_N
    kept = bare_N > LEAST_SHARE * table.seconds_N
    bare = ProductTable(m_N=table.m_N, n_N=table.n_N, k_N=table.k_N, seconds_N=bare_N, source=table.source)
    return bare.pick(kept)
