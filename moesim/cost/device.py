"""How long one GPU takes for one piece of work, alone: matrix products, grouped products, streams, attention.

Two sources, never mixed silently: a calibration profile of this very device, or the datasheet with efficiencies whose
source stands in ``catalog/efficiency.yaml``. Each DeviceCost says which in ``provenance``. See docs/model.md#product
and #stream.

Legend: E experts on a rank; a leading ... stands for any axes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.cost.profile import Profile, find_profile, load_profile
from moesim.describe.hardware import Gpu
from moesim.door.files import read_yaml
from moesim.errors import check
from moesim.units import BYTES_PER_ELEMENT

Floats = NDArray[np.float64]
EFFICIENCY_FILE = Path(__file__).parent.parent / "catalog" / "efficiency.yaml"
_FALLBACK_GPU = "h100-sxm"  # whose efficiencies stand in, marked assumed, for a GPU that the table does not hold

_TIMED_GPU = "h800"  # on which the shape of products (FP8) and the stream efficiency were found
_PROFILED_DTYPE = {"bf16": "bfloat16"}  # what a profile's products ran in; none is timed in FP8


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a part of a result came from. kind: measured, interpolated, extrapolated, spec or assumed."""

    part: str
    kind: str
    source: str


@dataclass(frozen=True, kw_only=True)
class DeviceCost:
    """One device's speeds. Calls take sizes and give seconds; they never know about contention."""

    peak_flops_per_s: float  # dense, at the precision of the products
    product_utilisation: float  # of that peak, for endless shapes
    reduce_overhead: float  # a tile's start and end, as extra elements of the reduced dimension
    tile_rows: int
    product_start_s: float
    memory_bytes_per_s: float  # achieved
    attention_forward_flops_per_s: float  # achieved
    attention_backward_flops_per_s: float
    input_bytes: float  # of one element of a product's operands
    profile: Profile | None = None
    bf16: DeviceCost | None = None  # the same device in BF16 where products run in FP8: router and head stay wide
    provenance: tuple[Provenance, ...] = ()

    @property
    def wide(self) -> DeviceCost:
        """The device for products that recipes keep in BF16."""
        return self.bf16 or self

    def product_s(self, rows: ArrayLike, reduced: float, columns: float) -> Floats:
        """Seconds of a (rows, reduced) x (reduced, columns) product; rows may be any array, 0 rows cost nothing. See
        docs/model.md#product.
        """
        return self.grouped_s(np.asarray(rows, dtype=np.float64)[..., None], reduced, columns)

    def grouped_s(self, rows_E: ArrayLike, reduced: float, columns: float) -> Floats:
        """Seconds of one kernel that multiplies rows_E[..., e] rows by each of E weights (reduced, columns); result
        drops the last axis.
        """
        rows = np.asarray(rows_E, dtype=np.float64)
        if self.profile is not None:
            return self._profiled_s(self.profile, rows, reduced, columns, backward=False)
        padded = np.ceil(rows / self.tile_rows) * self.tile_rows
        overhead = 1.0 + self.reduce_overhead / reduced
        flops = 2.0 * padded.sum(axis=-1) * reduced * columns * overhead
        operands = (rows.sum(axis=-1) * reduced + (rows > 0).sum(axis=-1) * reduced * columns) * self.input_bytes
        results = rows.sum(axis=-1) * columns * BYTES_PER_ELEMENT["bf16"]
        return self._kernel_s(flops, operands + results, (rows > 0).any(axis=-1))

    def weight_gradient_s(self, rows_E: ArrayLike, reduced: float, columns: float) -> Floats:
        """Seconds of one kernel that makes E weight gradients (reduced, columns), each summed over rows_E[..., e] rows:
        a part of backward_s. A profile times both gradients together; half is taken for this one.
        """
        rows = np.asarray(rows_E, dtype=np.float64)
        if self.profile is not None:
            return self._profiled_s(self.profile, rows, reduced, columns, backward=True) / 2
        padded_reduced = np.ceil(reduced / self.tile_rows) * self.tile_rows
        flops = 2.0 * ((rows + self.reduce_overhead) * (rows > 0)).sum(axis=-1) * padded_reduced * columns
        operands = rows.sum(axis=-1) * (reduced + columns) * self.input_bytes
        results = (rows > 0).sum(axis=-1) * reduced * columns * BYTES_PER_ELEMENT["float32"]
        return self._kernel_s(flops, operands + results, (rows > 0).any(axis=-1))

    def backward_s(self, rows_E: ArrayLike, reduced: float, columns: float) -> Floats:
        """Seconds of the backward of grouped_s: the gradient of the rows, then of the weights."""
        if self.profile is not None:
            rows = np.asarray(rows_E, dtype=np.float64)
            return self._profiled_s(self.profile, rows, reduced, columns, backward=True)
        return self.grouped_s(rows_E, columns, reduced) + self.weight_gradient_s(rows_E, reduced, columns)

    def stream_s(self, num_bytes: ArrayLike) -> Floats:
        """Seconds of a memory-bound kernel that reads and writes num_bytes in all. See docs/model.md#stream."""
        moved = np.asarray(num_bytes, dtype=np.float64)
        return np.where(moved > 0, self.product_start_s + moved / self.memory_bytes_per_s, 0.0)

    def attention_s(self, flops: float, *, backward: bool) -> float:
        """Seconds of the attention kernel alone (scores, softmax, values) for a count of useful FLOPs."""
        rate = self.attention_backward_flops_per_s if backward else self.attention_forward_flops_per_s
        return self.product_start_s + flops / rate if flops else 0.0

    def _profiled_s(
        self, profile: Profile, rows_E: Floats, reduced: float, columns: float, *, backward: bool
    ) -> Floats:
        """A product as the device was timed doing it: one weight is a dense product, several a grouped one."""
        if rows_E.shape[-1] == 1:
            return profile.dense_product_s(rows_E[..., 0], columns, reduced, backward=backward).seconds
        return profile.grouped_product_s(rows_E, reduced, columns, backward=backward).seconds

    def _kernel_s(self, flops: Floats, num_bytes: Floats, any_work: ArrayLike) -> Floats:
        compute = flops / (self.peak_flops_per_s * self.product_utilisation)
        return np.where(any_work, self.product_start_s + np.maximum(compute, num_bytes / self.memory_bytes_per_s), 0.0)


@functools.cache
def efficiencies() -> dict[str, Any]:
    """The table of ``catalog/efficiency.yaml``."""
    table = read_yaml(EFFICIENCY_FILE)
    assert isinstance(table, dict)
    return table


def device_cost(gpu: Gpu, precision: str, profile: str = "auto") -> DeviceCost:
    """The cost of a GPU at a precision of its products.

    profile: ``auto`` takes a shipped calibration profile of this GPU when there is one, else the datasheet;
    ``datasheet``; or a profile's path, which must be of this GPU and precision. In FP8 the result holds the GPU in BF16
    as well, from the datasheet. Raises InputError for a profile of
    another device or precision, or a precision the GPU lacks.
    """
    rule = f"must be one that {gpu.name} has a peak for: {', '.join(sorted(gpu.peak_flops_per_s))}"
    check(precision in gpu.peak_flops_per_s, "scenario.train", "precision", rule, precision)
    dtype = _PROFILED_DTYPE.get(precision)
    calibrated = None
    if profile == "auto":
        found = find_profile(gpu.calibration_name) if gpu.calibration_name else None
        calibrated = found if found is not None and found.dtype == dtype else None
    elif profile != "datasheet":
        calibrated = load_profile(profile)
        calibrated.check_device(gpu)
        rule = f"must be {dtype or 'of 8 bits (no profile times that)'} for products in {precision}"
        hint = "Use the datasheet: profile: datasheet."
        check(calibrated.dtype == dtype, f"profile {calibrated.name}", "dtype", rule, calibrated.dtype, hint)
    device = _from_datasheet(gpu, precision, calibrated)
    if precision == "bf16":
        return device
    wide = _from_datasheet(gpu, "bf16", None)
    parts = ("peak bf16", "product efficiency", "product shape")
    told = [replace(item, part=f"router and head: {item.part}") for item in wide.provenance if item.part in parts]
    return replace(device, bf16=wide, provenance=(*device.provenance, *told))


def _from_datasheet(gpu: Gpu, precision: str, calibrated: Profile | None) -> DeviceCost:
    table = efficiencies()
    shape, peak = table["shape"], gpu.peak_flops_per_s[precision]
    by_gpu = table["products"][precision]
    known = gpu.name in by_gpu
    best = by_gpu[gpu.name if known else _FALLBACK_GPU]
    # The overhead of a tile is a time; at half the rate it is worth half the elements.
    reduce_overhead = shape["reduce_overhead"]["value"] * (1.0 if precision == "fp8" else 0.5)
    stream, attention = table["memory"]["stream_utilisation"], table["attention"]
    bf16_peak = gpu.peak_flops_per_s["bf16"].value
    beyond = [gpu.name] * (gpu.name != _TIMED_GPU) + [f"{precision}, where the overhead halves"] * (precision != "fp8")
    told = [
        Provenance(part=f"peak {precision}", kind=peak.kind, source=peak.source),
        Provenance(part="memory bandwidth", kind=gpu.memory_bytes_per_s.kind, source=gpu.memory_bytes_per_s.source),
        _told("product efficiency", best)
        if known
        else Provenance(part="product efficiency", kind="assumed", source=f"that of {_FALLBACK_GPU}: {best['source']}"),
        _told_elsewhere("product shape", shape["reduce_overhead"], beyond),
        _told_elsewhere("stream efficiency", stream, [] if gpu.name == _TIMED_GPU else [gpu.name]),
        _told("attention efficiency", attention["forward_utilisation"]),
    ]
    memory_rate = gpu.memory_bytes_per_s.value * stream["value"]
    start_s = shape["product_start"]["value"]
    if calibrated is not None:
        memory_rate, start_s = calibrated.memory_bytes_per_s, calibrated.launch_s
        source = f"calibration profile {calibrated.name} of {calibrated.device}"
        shapes = ", ".join(shape.name for shape in calibrated.shapes)
        curves = f"{source}; utilisation between and beyond its timed shapes ({shapes}) is interpolated"
        told = [
            Provenance(part="products", kind="interpolated", source=curves),
            Provenance(part="memory bandwidth", kind="measured", source=source),
            Provenance(part="kernel start", kind="measured", source=source),
            *told[-1:],
        ]
    return DeviceCost(
        peak_flops_per_s=peak.value,
        product_utilisation=best["value"],
        reduce_overhead=reduce_overhead,
        tile_rows=int(shape["tile_rows"]["value"]),
        product_start_s=start_s,
        memory_bytes_per_s=memory_rate,
        attention_forward_flops_per_s=bf16_peak * attention["forward_utilisation"]["value"],
        attention_backward_flops_per_s=bf16_peak * attention["backward_utilisation"]["value"],
        input_bytes=BYTES_PER_ELEMENT[precision],
        profile=calibrated,
        provenance=tuple(told),
    )


def _told(part: str, entry: dict[str, Any]) -> Provenance:
    """The provenance of an entry of the table."""
    return Provenance(part=part, kind=entry["kind"], source=entry["source"])


def _told_elsewhere(part: str, entry: dict[str, Any], beyond: list[str]) -> Provenance:
    """The provenance of an entry that was found on one GPU; used for anything beyond it, it is assumed."""
    if not beyond:
        return _told(part, entry)
    return Provenance(part=part, kind="assumed", source=f"{entry['source']}; assumed for {' and '.join(beyond)}")
