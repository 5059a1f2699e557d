"""The optional extra ``measured``: NCCL and DeepEP tables of the package aiconfigurator-core, as rows of measurements.

The package (Apache-2.0, NVIDIA) ships parquet tables for A100 to GB300. moesim works without it; what is read here only
scores predictions on more rows (``moesim accuracy --measured``). Traps, each checked by a test:

- NCCL: ``message_size`` counts elements, ``latency`` is in ms; the folder names the release, the column often another.
- DeepEP: times are us of one rank; on several nodes the H100's table repeats the H200's to the digit, so only the
  H200's is read; ``notify`` is waiting for peers, not wire, and is left out.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moesim.door.records import Record, read_parquet_columns
from moesim.errors import InputError
from moesim.units import KILO

PACKAGE, MODULE, VERSION = "aiconfigurator-core", "aiconfigurator_core", "0.12"
SOURCE = f"{PACKAGE} {VERSION}.0"
SYSTEMS = {  # GPU of the catalog -> folder of its tables
    "a100-80gb": "a100_sxm",
    "h100-sxm": "h100_sxm",
    "h200": "h200_sxm",
    "b200": "b200_sxm",
    "gb200": "gb200",
    "gb300": "gb300",
}
# GPU, folder of its system, release of NCCL, folder of the release
NCCL_TABLES = (
    ("A100", "a100_sxm", "2.27", "2.27.3"),
    ("H100", "h100_sxm", "2.29", "2.29.2"),
    ("H200", "h200_sxm", "2.29", "2.29.2"),
    ("B200", "b200_sxm", "2.29", "2.29.2"),
    ("GB200", "gb200", "2.29", "2.29.2"),
    ("GB300", "gb300", "2.29", "2.29.2"),
)
_NCCL_COLUMNS = ("nccl_dtype", "num_gpus", "message_size", "op_name", "latency")
_HALF_BYTES = 2
_SGLANG, _SGLANG_FOLDER = "0.5.6", "0.5.6.post2"
_NORMAL_COLUMNS = (
    *("node_num", "hidden_size", "num_token", "num_topk", "num_experts"),
    *("dispatch_sms", "dispatch_transmit_us", "combine_sms", "combine_transmit_us"),
)
_LOW_COLUMNS = (*_NORMAL_COLUMNS[:5], "dispatch_avg_t_us", "combine_avg_t_us")
_RANKS_PER_NODE = 8


def tables() -> Path:
    """The folder of the package's tables. Raises InputError where it is not installed, or another version is."""
    hint = "Install it: pip install 'moesim[measured]'"
    spec = importlib.util.find_spec(MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise InputError("measured", "", f"needs the package {PACKAGE} {VERSION}", "it is not installed", hint)
    try:
        version = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:  # unpacked beside the code, without its metadata
        version = "unknown"
    if not f"{version}.".startswith(f"{VERSION}."):
        raise InputError("measured", "", f"needs the package {PACKAGE} {VERSION}", f"version {version}", hint)
    return Path(spec.submodule_search_locations[0]) / "systems" / "data"


def measured_cases() -> tuple[Record, ...]:
    """Every row of the extra's NCCL and DeepEP tables, in the columns of the kind ``dispatch``. Raises InputError."""
    folder = tables()
    return (*_nccl_rows(folder), *_normal_rows(folder), *_low_latency_rows(folder))


def _nccl_rows(folder: Path) -> Iterator[Record]:
    """fp16 rows only: int8 repeats the same bytes."""
    for gpu, system, release, version in NCCL_TABLES:
        path = folder / system / "comm" / "nccl" / version / "nccl_perf.parquet"
        for row in read_parquet_columns(path, _NCCL_COLUMNS):
            if row["nccl_dtype"] != "half":
                continue
            num_bytes = int(row["message_size"]) * _HALF_BYTES
            yield {
                "id": f"nccl_{version}_{gpu}_{row['op_name']}_{row['num_gpus']}_{num_bytes}",
                "library": f"NCCL {release}",
                "op": row["op_name"],
                "gpu": gpu,
                "ep_size": str(row["num_gpus"]),
                "message_bytes": str(num_bytes),
                "latency_us": _text(row["latency"] * KILO),
                "source": f"{SOURCE}, {system}/comm/nccl/{version}",
            }


def _normal_rows(folder: Path) -> Iterator[Record]:
    name = "wideep_deepep_normal_perf.parquet"
    path = folder / "h200_sxm" / "comm" / "sglang" / _SGLANG_FOLDER / name
    for row in read_parquet_columns(path, _NORMAL_COLUMNS):
        for operation in ("dispatch", "combine"):
            sms = row[f"{operation}_sms"]
            what = f"normal_{operation}_{row['node_num']}x8_{row['num_token']}_{sms}"
            yield _deepep_row(row, operation, what, "normal", row[f"{operation}_transmit_us"]) | {"num_sms": str(sms)}


def _low_latency_rows(folder: Path) -> Iterator[Record]:
    """256 experts only, as the other rows; runs of the same size are averaged."""
    path = folder / "h200_sxm" / "comm" / "sglang" / _SGLANG_FOLDER / "wideep_deepep_ll_perf.parquet"
    for row in read_parquet_columns(path, _LOW_COLUMNS):
        if row["num_experts"] != 256:
            continue
        for operation in ("dispatch", "combine"):
            what = f"low_latency_{operation}_{row['node_num']}x8_{row['num_token']}"
            yield _deepep_row(row, operation, what, "low-latency", row[f"{operation}_avg_t_us"])


def _deepep_row(row: dict[str, Any], operation: str, what: str, phase: str, time_us: float) -> dict[str, str]:
    return {
        "id": f"sglang_{_SGLANG}_H200_{what}",
        "library": f"sglang {_SGLANG} DeepEP",
        "phase": phase,
        "op": operation,
        "gpu": "H200",
        "ep_size": str(row["node_num"] * _RANKS_PER_NODE),
        "tokens_per_rank": str(row["num_token"]),
        "hidden": str(row["hidden_size"]),
        "topk": str(row["num_topk"]),
        "n_experts": str(row["num_experts"]),
        "dtype": "FP8" if operation == "dispatch" else "BF16",
        "latency_us": _text(time_us),
        "source": f"{SOURCE}, h200_sxm/comm/sglang/{_SGLANG_FOLDER}",
    }


def _text(number: float) -> str:
    return f"{number:.6g}"
