"""How long one GPU takes for one piece of work, alone: matrix products, grouped products, streams, attention.

Three sources, never mixed silently: a calibration profile of this very device; timed tables of a GPU that is not here,
where asked for; the datasheet with efficiencies whose source stands in ``catalog/efficiency.yaml``. Each DeviceCost
says which in ``provenance``. See docs/model.md#product, #stream and #silicon-tables.

Legend: E experts on a rank; a leading ... stands for any axes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.catalog.silicon import product_table
from moesim.cost.precision import RECIPES, Cast, Recipe
from moesim.cost.profile import Profile, find_profile, load_profile
from moesim.cost.silicon import Silicon, silicon_of
from moesim.describe.hardware import Gpu
from moesim.describe.workload import Precision
from moesim.door.files import read_yaml
from moesim.errors import check
from moesim.units import BYTES_PER_ELEMENT, MICRO

Floats = NDArray[np.float64]
EFFICIENCY_FILE = Path(__file__).parent.parent / "catalog" / "efficiency.yaml"
_FALLBACK_GPU = "h100-sxm"  # whose efficiencies stand in, marked assumed, for a GPU that the table does not hold
_HOPPER = ("h100-sxm", "h800", "h200")
_SIBLINGS = {"h800": "h100-sxm"}  # GPUs with the very die and memory of another
_PROFILED_DTYPE = {"bf16": "bfloat16"}  # what a profile's products ran in; none is timed in FP8


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a part of a result came from. kind: measured, interpolated, extrapolated, spec or assumed."""

    part: str
    kind: str
    source: str


@dataclass(frozen=True, kw_only=True)
class ProductLaw:
    """How a GPU's matrix products of one precision depend on their shape. See docs/model.md#product."""

    utilisation: float  # of the dense peak, for endless shapes
    reduce_overhead: float  # a tile's start and end, as extra elements of the reduced dimension
    memory_utilisation: float  # of the memory rate
    start_s: float
    tile_rows: int = 64  # rows are padded to whole tiles

    def product_s(self, m: Floats, n: Floats, k: Floats, peak: float, memory: float, element_bytes: float) -> Floats:
        """Seconds of products (m, k) x (k, n) at a peak [FLOP/s] and memory rate [bytes/s]."""
        flops = 2 * np.ceil(m / self.tile_rows) * self.tile_rows * n * (k + self.reduce_overhead)
        moved = (m * k + n * k) * element_bytes + m * n * BYTES_PER_ELEMENT["bf16"]
        return self.kernel_s(flops, moved, peak, memory)

    def kernel_s(self, flops: Floats, moved: Floats, peak: float, memory: float) -> Floats:
        """Seconds of a kernel of so many FLOPs and bytes: where both bind, it hides neither quite behind the other."""
        compute_s, memory_s = flops / (peak * self.utilisation), moved / (memory * self.memory_utilisation)
        return np.asarray(
            self.start_s + np.sqrt(np.sqrt(np.square(np.square(compute_s)) + np.square(np.square(memory_s))))
        )


@dataclass(frozen=True, kw_only=True)
class AttentionRate:
    """Rate of a flash kernel that is causal: half of the endless rate is reached at half_keys keys seen by a query."""

    endless_flops_per_s: float
    half_keys: float

    def flops_per_s(self, keys_seen: float) -> float:
        return self.endless_flops_per_s / (1.0 + self.half_keys / keys_seen)


@dataclass(frozen=True, kw_only=True)
class DeviceCost:
    """One device's speeds. Calls take sizes and give seconds; they never know about contention."""

    peak_flops_per_s: float  # dense, at the precision of the products
    law: ProductLaw
    weight_law: ProductLaw  # of weight gradients: the same, but where formats have kernels of their own for them
    memory_bytes_per_s: float  # spec; a law says what products achieve of it
    stream_bytes_per_s: float  # achieved by kernels that only move bytes
    stream_start_s: float
    attention_by_dims: Mapping[int, AttentionRate]  # forward, by a head's query and value elements
    attention_backward_share: float  # of the forward's rate
    recipe: Recipe = RECIPES["bf16"]
    times_moved: float = 1.0  # bytes that kernels which are not fused move, over those that are counted
    profile: Profile | None = None
    silicon: Silicon | None = None  # what timed tables say beside the law
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
        padded = over_experts(np.ceil(rows / self.law.tile_rows)) * self.law.tile_rows
        total, num_active = over_experts(rows), over_experts(rows > 0)
        overhead = 1.0 + self.law.reduce_overhead / reduced
        flops = 2.0 * padded * reduced * columns * overhead
        operands = (total * reduced + num_active * reduced * columns) * self.recipe.element_bytes
        results = total * columns * BYTES_PER_ELEMENT["bf16"]
        seconds = self._kernel_s(self.law, flops, operands + results, num_active > 0)
        return seconds if self.silicon is None else seconds * self._timed_factor(rows, total, reduced, columns)

    def weight_gradient_s(self, rows_E: ArrayLike, reduced: float, columns: float) -> Floats:
        """Seconds of one kernel that makes E weight gradients (reduced, columns), each summed over rows_E[..., e] rows:
        a part of backward_s. A profile times both gradients together; half is taken for this one.
        """
        rows = np.asarray(rows_E, dtype=np.float64)
        if self.profile is not None:
            return self._profiled_s(self.profile, rows, reduced, columns, backward=True) / 2
        law = self.weight_law
        padded_reduced = np.ceil(reduced / law.tile_rows) * law.tile_rows
        total, num_active = over_experts(rows), over_experts(rows > 0)
        flops = 2.0 * (total + law.reduce_overhead * num_active) * padded_reduced * columns
        operands = total * (reduced + columns) * self.recipe.element_bytes
        # Summed over micro-batches in float32: what is there is read and written.
        results = 2 * num_active * reduced * columns * BYTES_PER_ELEMENT["float32"]
        seconds = self._kernel_s(law, flops, operands + results, num_active > 0)
        if self.silicon is None:
            return seconds
        factor = self.silicon.factor_by_reduced(reduced, columns, rows)
        return seconds * over_experts(rows * factor) / np.maximum(total, 1.0)

    def _timed_factor(self, rows: Floats, total: Floats, reduced: float, columns: float) -> Floats:
        """What a kernel takes over what the law says: each expert's product counts by its rows."""
        assert self.silicon is not None
        factor = self.silicon.factor_by_rows(rows, columns, reduced)
        return np.asarray(over_experts(rows * factor) / np.maximum(total, 1.0))

    def backward_s(self, rows_E: ArrayLike, reduced: float, columns: float) -> Floats:
        """Seconds of the backward of grouped_s: the gradient of the rows, then of the weights."""
        if self.profile is not None:
            rows = np.asarray(rows_E, dtype=np.float64)
            return self._profiled_s(self.profile, rows, reduced, columns, backward=True)
        return self.grouped_s(rows_E, columns, reduced) + self.weight_gradient_s(rows_E, reduced, columns)

    def stream_s(self, num_bytes: ArrayLike) -> Floats:
        """Seconds of a memory-bound kernel that reads and writes num_bytes in all. See docs/model.md#stream."""
        moved = np.asarray(num_bytes, dtype=np.float64)
        return np.where(moved > 0, self.stream_start_s + moved * self.times_moved / self.stream_bytes_per_s, 0.0)

    def casts_s(self, casts: Sequence[Cast], elements_E: ArrayLike) -> Floats:
        """Seconds of kernels that cast a tensor, elements_E[..., e] of each expert; the result drops the last axis.
        See docs/model.md#casts.
        """
        elements = np.asarray(elements_E, dtype=np.float64)
        whole = over_experts(elements)
        seconds = np.zeros(whole.shape)
        for cast in casts:
            moved = cast.element_bytes / self.times_moved  # one kernel, fused in itself
            seconds += over_experts(self.stream_s(moved * elements)) if cast.by_expert else self.stream_s(moved * whole)
        return seconds

    def attention_s(self, flops: float, *, dims: float, keys_seen: float, backward: bool) -> float:
        """Seconds of the attention kernel alone (scores, softmax, values) for a count of useful FLOPs.

        dims: elements of a head's query and value; keys_seen: by a query on average. See
        docs/model.md#attention-kernel.
        """
        if not flops:
            return 0.0
        timed = sorted(self.attention_by_dims)
        rates = [self.attention_by_dims[each].flops_per_s(keys_seen) for each in timed]
        rate = float(np.interp(dims, timed, rates)) * (self.attention_backward_share if backward else 1.0)
        return self.stream_start_s + flops / rate

    def _profiled_s(
        self, profile: Profile, rows_E: Floats, reduced: float, columns: float, *, backward: bool
    ) -> Floats:
        """A product as the device was timed doing it: one weight is a dense product, several a grouped one."""
        if rows_E.shape[-1] == 1:
            return profile.dense_product_s(rows_E[..., 0], columns, reduced, backward=backward).seconds
        return profile.grouped_product_s(rows_E, reduced, columns, backward=backward).seconds

    def _kernel_s(self, law: ProductLaw, flops: Floats, num_bytes: Floats, any_work: ArrayLike) -> Floats:
        return np.where(any_work, law.kernel_s(flops, num_bytes, self.peak_flops_per_s, self.memory_bytes_per_s), 0.0)


def over_experts(values_E: NDArray[Any]) -> Floats:
    """The sum over a short last axis: as a product with ones several times as fast as numpy's own."""
    return np.asarray(values_E.astype(np.float64, copy=False) @ np.ones(values_E.shape[-1]))


@functools.cache
def efficiencies() -> dict[str, Any]:
    """The table of ``catalog/efficiency.yaml``."""
    table = read_yaml(EFFICIENCY_FILE)
    assert isinstance(table, dict)
    return table


def device_cost(gpu: Gpu, precision: Precision, profile: str = "auto", recipe: Recipe | None = None) -> DeviceCost:
    """The cost of a GPU at a precision of its products; recipe: a run's own, in place of the precision's.

    profile: ``auto`` takes a shipped calibration profile of this GPU when there is one, else the datasheet;
    ``datasheet``; ``measured``, the tables of the extra of that name, which never count unasked; or a profile's path,
    which must be of this GPU and precision. With narrow formats the result holds the GPU in BF16 as well. Raises
    InputError for a profile of another device or precision, a precision the GPU lacks, or a table that there is not.
    """
    possible = [name for name, recipe in RECIPES.items() if recipe.peak in gpu.peak_flops_per_s]
    rule = f"must be one that {gpu.name} has a peak for: {', '.join(possible)}"
    check(precision in possible, "scenario.train", "precision", rule, precision)
    dtype = _PROFILED_DTYPE.get(precision)
    calibrated = None
    if profile == "auto":
        found = find_profile(gpu.calibration_name) if gpu.calibration_name else None
        calibrated = found if found is not None and found.dtype == dtype else None
    elif profile not in ("datasheet", "measured"):
        calibrated = load_profile(profile)
        calibrated.check_device(gpu)
        rule = f"must be {dtype or 'of 8 bits (no profile times that)'} for products in {precision}"
        hint = "Use the datasheet: profile: datasheet."
        check(calibrated.dtype == dtype, f"profile {calibrated.name}", "dtype", rule, calibrated.dtype, hint)
    timed = profile == "measured"
    device = _from_datasheet(gpu, recipe or RECIPES[precision], calibrated, timed=timed)
    if precision == "bf16":
        return device
    wide = _from_datasheet(gpu, RECIPES["bf16"], None, timed=timed)
    parts = ("peak bf16", "product efficiency", "products forward", "products backward")
    told = [replace(item, part=f"router and head: {item.part}") for item in wide.provenance if item.part in parts]
    return replace(device, bf16=wide, provenance=(*device.provenance, *told))


def _from_datasheet(gpu: Gpu, recipe: Recipe, calibrated: Profile | None, *, timed: bool) -> DeviceCost:
    table = efficiencies()
    peak = gpu.peak_flops_per_s[recipe.peak]
    on_hopper = gpu.name in _HOPPER
    kernels = recipe.kernels_on_hopper if on_hopper else recipe.kernels
    weight_kernels = recipe.weight_kernels_on_hopper if on_hopper and recipe.weight_kernels_on_hopper else kernels
    product, product_gpu = _entry(table["products"][kernels], gpu.name)
    weight, weight_gpu = _entry(table["products"][weight_kernels], gpu.name)
    moving, moving_gpu = _entry(table["memory"]["stream"], gpu.name)
    attention, attention_gpu = _entry(table["attention"]["forward"], gpu.name)
    share = table["attention"]["backward_share"]
    law = _law(product)
    told = [
        Provenance(part=f"peak {recipe.peak}", kind=peak.kind, source=peak.source),
        Provenance(part="memory bandwidth", kind=gpu.memory_bytes_per_s.kind, source=gpu.memory_bytes_per_s.source),
        _told("product efficiency", product, product_gpu, gpu.name),
        *([_told("weight gradient efficiency", weight, weight_gpu, gpu.name)] if weight_kernels != kernels else []),
        _told("stream efficiency", moving, moving_gpu, gpu.name),
        _told("attention efficiency", attention, attention_gpu, gpu.name),
        Provenance(part="attention backward", kind=share["kind"], source=share["source"]),
    ]
    if recipe.cast_reads:
        told.append(Provenance(part="casts", kind="assumed", source=recipe.source))
    memory_rate = gpu.memory_bytes_per_s.value
    stream_rate, stream_start_s = memory_rate * moving["utilisation"], moving["start_us"] * MICRO
    if calibrated is not None:
        stream_rate, stream_start_s = calibrated.memory_bytes_per_s, calibrated.launch_s
        source = f"calibration profile {calibrated.name} of {calibrated.device}"
        shapes = ", ".join(shape.name for shape in calibrated.shapes)
        curves = f"{source}; utilisation between and beyond its timed shapes ({shapes}) is interpolated"
        told = [
            Provenance(part="products", kind="interpolated", source=curves),
            Provenance(part="memory bandwidth", kind="measured", source=source),
            Provenance(part="kernel start", kind="measured", source=source),
            *told[-2:],
        ]
    silicon = None
    if timed:
        silicon = _silicon(gpu.name, kernels, law, peak.value, memory_rate, recipe.element_bytes)
        rule = "each gradient as a forward product of its shape, the weights' summed in float32"
        told += [
            Provenance(part="products forward", kind="interpolated", source=silicon.source),
            Provenance(part="products backward", kind="assumed", source=f"{rule}: {silicon.source}"),
        ]
    bf16_peak = gpu.peak_flops_per_s["bf16"].value
    return DeviceCost(
        peak_flops_per_s=peak.value,
        law=law,
        weight_law=_law(weight),
        memory_bytes_per_s=memory_rate,
        stream_bytes_per_s=stream_rate,
        stream_start_s=stream_start_s,
        attention_by_dims={
            int(dims): AttentionRate(endless_flops_per_s=bf16_peak * utilisation, half_keys=half)
            for dims, (utilisation, half) in attention["by_dims"].items()
        },
        attention_backward_share=share["value"],
        recipe=recipe,
        profile=calibrated,
        silicon=silicon,
        provenance=tuple(told),
    )


@functools.cache
def _silicon(gpu: str, kernels: str, law: ProductLaw, peak: float, memory: float, element_bytes: float) -> Silicon:
    """What the tables of a GPU and format say beside the law."""
    table = product_table(gpu, kernels)
    return silicon_of(table, law.product_s(table.m_N, table.n_N, table.k_N, peak, memory, element_bytes))


def _entry(by_gpu: Mapping[str, dict[str, Any]], gpu: str) -> tuple[dict[str, Any], str]:
    """A GPU's entry, or its sibling's, or another's; and whose it is."""
    names = (gpu, _SIBLINGS.get(gpu, ""), _FALLBACK_GPU, next(iter(by_gpu)))
    whose = next(name for name in names if name in by_gpu)
    return by_gpu[whose], whose


def _law(entry: Mapping[str, Any]) -> ProductLaw:
    return ProductLaw(
        utilisation=entry["utilisation"],
        reduce_overhead=entry["reduce_overhead"],
        memory_utilisation=entry["memory_utilisation"],
        start_s=entry["start_us"] * MICRO,
    )


def _told(part: str, entry: dict[str, Any], whose: str, gpu: str) -> Provenance:
    """The provenance of an entry of the table; of another GPU's entry, assumed."""
    if whose == gpu:
        return Provenance(part=part, kind=entry["kind"], source=entry["source"])
    return Provenance(part=part, kind="assumed", source=f"that of {whose}, assumed for {gpu}: {entry['source']}")
