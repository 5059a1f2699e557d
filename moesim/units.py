"""Units: the only file where powers of ten and of two stand. Inside moesim everything is SI: seconds, bytes, FLOPs.

GB = 1e9 bytes and GiB = 2**30 bytes; a GPU's "80 GB" is 80 GiB for memory makers, so the catalog always says which.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

KILO, MEGA, GIGA, TERA, PETA = 1e3, 1e6, 1e9, 1e12, 1e15
MILLI, MICRO, NANO = 1e-3, 1e-6, 1e-9
KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40
MINUTE_S, HOUR_S, DAY_S = 60.0, 3600.0, 86400.0

BYTES_PER_ELEMENT: Mapping[str, float] = MappingProxyType(
    {"float32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "fp8_tensor": 1, "mxfp8": 1, "int8": 1, "mxfp4": 0.5, "nvfp4": 0.5}
)

_BY_DIMENSION: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "bytes": {
            "B": 1.0,
            "KB": KILO,
            "MB": MEGA,
            "GB": GIGA,
            "TB": TERA,
            "KiB": KIB,
            "MiB": MIB,
            "GiB": GIB,
            "TiB": TIB,
        },
        "bytes_per_s": {
            **{"B/s": 1.0, "MB/s": MEGA, "GB/s": GIGA, "TB/s": TERA},
            **dict.fromkeys(("Gbit/s", "Gb/s", "Gbps"), GIGA / 8),
        },
        "s": {"s": 1.0, "ms": MILLI, "us": MICRO, "ns": NANO, "min": MINUTE_S, "h": HOUR_S, "d": DAY_S},
        "flops_per_s": {"FLOP/s": 1.0, "GFLOP/s": GIGA, "TFLOP/s": TERA, "PFLOP/s": PETA},
        "w": {"W": 1.0, "kW": KILO},
    }
)
_QUANTITY = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z/]+)\s*$")


def parse_quantity(text: str, dimension: str) -> float:
    """The SI value of a text such as ``"450 GB/s"``.

    dimension: one of ``bytes, bytes_per_s, s, flops_per_s, w``. Raises ValueError that says what was expected.

    >>> parse_quantity("400 Gbit/s", "bytes_per_s")
    50000000000.0
    """
    scale = _BY_DIMENSION[dimension]
    match = _QUANTITY.match(text)
    if match is None or match[2] not in scale:
        raise ValueError(f"a number with a unit out of {', '.join(scale)}")
    return float(match[1]) * scale[match[2]]


def format_bytes(num_bytes: float) -> str:
    """Bytes for a reader, in binary units: ``"37.4 GiB"``."""
    for unit, size in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes:,.0f} B"


def format_seconds(seconds: float) -> str:
    """A duration for a reader: ``"3.21 s"``, ``"45.0 ms"``, ``"2.3 days"``."""
    for unit, size in (("days", DAY_S), ("h", HOUR_S), ("min", MINUTE_S)):
        if abs(seconds) >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    for unit, size, digits in (("s", 1.0, 2), ("ms", MILLI, 1), ("us", MICRO, 1)):
        if abs(seconds) >= size:
            return f"{seconds / size:,.{digits}f} {unit}"
    return "0 s" if seconds == 0 else f"{seconds / NANO:,.0f} ns"


def format_count(count: float) -> str:
    """A large count for a reader: ``"46.70B"``, ``"1.026T"``, ``"512"``."""
    for unit, size, digits in (("T", TERA, 3), ("B", GIGA, 2), ("M", MEGA, 1), ("K", KILO, 1)):
        if abs(count) >= size:
            return f"{count / size:.{digits}f}{unit}"
    return f"{count:.0f}"
