"""Calibration profiles: what ``reference_model`` timed on a real device, read back and evaluated. No torch here.

A profile holds raw points, and curves of utilisation fitted through the points that were not held out. The seconds of
a call are a floor plus, per expert, ideal time / utilisation; ideal = max(FLOPs / best rate, bytes / best bandwidth),
both measured in the same run; along a curve time is linear in size. See docs/model.md#calibrated-products.

Legend: E experts of one product; ... any leading axes (ranks, layers), each its own call; C columns of a curve's grid.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.describe.hardware import Gpu
from moesim.door import parse_as, read_json
from moesim.errors import InputError, check, near_match

Floats = NDArray[np.float64]
Tag = Literal["measured", "interpolated", "extrapolated"]
Direction = Literal["forward", "backward"]
CurveKind = Literal["grouped", "dense", "router", "permute", "combine", "activation", "copy", "all_to_all"]
PointKind = Literal[CurveKind, "grouped_skewed", "all_to_all_skewed", "launch", "layer"]

SCHEMA, SCHEMA_VERSION = "moesim-profile", 1
PROFILE_FOLDER = Path(__file__).parent.parent / "catalog" / "profiles"
PROFILE_NAMES: tuple[str, ...] = tuple(sorted(path.stem for path in PROFILE_FOLDER.glob("*.json")))
_TAGS: tuple[Tag, ...] = ("measured", "interpolated", "extrapolated")  # from best to worst
_NEEDED = (
    ("grouped", "forward"),
    ("grouped", "backward"),
    ("dense", "forward"),
    ("dense", "backward"),
    ("copy", "forward"),
)


class Timed(NamedTuple):
    """Predicted seconds, and where they come from: the worst tag of all calls asked for at once."""

    seconds: Floats
    tag: Tag


@dataclass(frozen=True, kw_only=True)
class Device:
    """What was timed; ``kind`` is cpu or cuda, ``name`` as the driver (or the kernel) reports it."""

    kind: Literal["cpu", "cuda"]
    name: str
    driver: str
    runtime: str
    torch_version: str
    num_threads: int
    cache_bytes: int
    memory_bytes: int

    def __str__(self) -> str:
        return f"{self.name} ({self.kind}, torch {self.torch_version})"


@dataclass(frozen=True, kw_only=True)
class TimedShapes:
    """The sizes of one model that a calibration timed; see ``reference_model.shapes``."""

    name: str
    hidden: int
    expert_width: int
    num_experts: int
    top_k: int
    active_experts: tuple[int, ...]
    layer_experts: int
    max_tokens: int
    max_rows: int


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How long the calibration looked, and the bytes it rotated through so as to find its operands out of the cache.

    num_ranks: processes that timed every case at the same time, each on its own cores.
    """

    quick: bool
    num_passes: int
    min_samples: int
    arena_bytes: int
    num_ranks: int = 1


@dataclass(frozen=True, kw_only=True)
class Point:
    """One timed shape; fields as in ``reference_model.profile_schema.POINT_FIELDS``."""

    kind: PointKind
    direction: Direction
    size: int
    width_in: int
    width_out: int
    num_active: int
    top_k: int
    tokens_per_expert: tuple[int, ...] | None
    held_out: bool
    median_s: float
    p10_s: float
    p90_s: float
    num_samples: int
    pass_medians_s: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("median_s", "p10_s", "p90_s", "size", "num_active", "num_samples"):
            check(getattr(self, name) > 0, f"point {self.kind}", name, "must be positive", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class HeldOutError:
    """Error of the fit on points it never saw: predicted / measured - 1; beside it the noise of measuring again."""

    kind: PointKind
    direction: Direction
    num_points: int
    median_fraction: float
    p90_fraction: float
    bias_fraction: float
    noise_fraction: float


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Utilisation over size (tokens per expert, tokens, rows, bytes) for one pair of widths and count of experts."""

    kind: CurveKind
    direction: Direction
    width_in: int
    width_out: int
    num_active: int
    sizes: tuple[int, ...]
    utilisations: tuple[float, ...]

    def __post_init__(self) -> None:
        owner = f"curve {self.kind} {self.direction}"
        check(self.num_active >= 1, owner, "num_active", "must be at least 1", self.num_active)
        check(len(self.sizes) > 0, owner, "sizes", "must not be empty", self.sizes)
        rising = all(a < b for a, b in zip((0, *self.sizes), self.sizes, strict=False))
        check(rising, owner, "sizes", "must be positive and rising", self.sizes)
        same = len(self.sizes) == len(self.utilisations)
        check(
            same, owner, "utilisations", f"must be {len(self.sizes)} numbers, as many as sizes", len(self.utilisations)
        )
        check(min(self.utilisations) > 0, owner, "utilisations", "must be positive", min(self.utilisations))


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The curves and what they relate to: the run's best rate and bandwidth, and the floor that an empty call takes."""

    element_bytes: int
    flops_per_s: float
    bytes_per_s: float
    floor_s: float
    curves: tuple[Curve, ...]

    def __post_init__(self) -> None:
        for name in ("element_bytes", "flops_per_s", "bytes_per_s", "floor_s"):
            check(getattr(self, name) > 0, "fit", name, "must be positive", getattr(self, name))
        held = {(curve.kind, curve.direction) for curve in self.curves}
        missing = [" ".join(pair) for pair in _NEEDED if pair not in held]
        check(not missing, "fit", "curves", "must hold " + ", ".join(" ".join(pair) for pair in _NEEDED), missing)

    def ideal_s(self, kind: CurveKind, direction: Direction, size: Floats, width_in: float, width_out: float) -> Floats:
        """Seconds of the work at the run's best rate and bandwidth; see ``work``."""
        flops, moved = work(kind, direction, size, width_in, width_out, self.element_bytes)
        return np.maximum(flops / self.flops_per_s, moved / self.bytes_per_s)

    def utilisation(self, curve: Curve, size_E: Floats) -> Floats:
        """Along a curve: time linear in size between two timed sizes, beyond them the nearest utilisation; (..., E)."""
        sizes = np.array(curve.sizes, dtype=np.float64)
        within_E = np.clip(size_E, sizes[0], sizes[-1])
        ideal_s, ideal_E_s = (
            self.ideal_s(curve.kind, curve.direction, at, curve.width_in, curve.width_out) for at in (sizes, within_E)
        )
        return ideal_E_s / np.interp(within_E, sizes, ideal_s / np.array(curve.utilisations))


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A device's calibration. Calls take sizes and give ``Timed``: seconds, and how they were come by."""

    schema: str
    schema_version: int
    name: str
    date: str
    device: Device
    shapes: tuple[TimedShapes, ...]
    named_model: tuple[str, ...]
    dtype: Literal["float32", "bfloat16"]
    settings: Settings
    host_per_op_s: float
    fit: Fit
    errors: tuple[HeldOutError, ...]
    points: tuple[Point, ...]
    notes: tuple[str, ...]

    def __post_init__(self) -> None:
        check(self.host_per_op_s > 0, "profile", "host_per_op_s", "must be positive", self.host_per_op_s)

    @property
    def launch_s(self) -> float:
        """What an empty call takes on the device; what the host spends per call is ``host_per_op_s``."""
        return self.fit.floor_s

    @property
    def memory_bytes_per_s(self) -> float:
        """The best copy bandwidth measured, read and written bytes together."""
        return self.fit.bytes_per_s

    @property
    def flops_per_s(self) -> float:
        """The best rate of a product measured."""
        return self.fit.flops_per_s

    def grouped_product_s(
        self, tokens_per_expert_E: ArrayLike, width_in: float, width_out: float, backward: bool = False
    ) -> Timed:
        """Seconds of one grouped product: (..., E) tokens per expert to (...) seconds; no tokens at all take no time.

        backward: both gradients. An uneven load is at best interpolated.

        >>> load_profile("cpu-xeon-2core").grouped_product_s([64, 0, 64, 64], 512, 2048).tag  # doctest: +SKIP
        'interpolated'
        """
        direction: Direction = "backward" if backward else "forward"
        return self.part_s("grouped", tokens_per_expert_E, width_in=width_in, width_out=width_out, direction=direction)

    def dense_product_s(self, m: ArrayLike, n: float, k: float, backward: bool = False) -> Timed:
        """Seconds of an (m, k) x (k, n) product, m of any shape; backward: both gradients."""
        direction: Direction = "backward" if backward else "forward"
        rows = np.asarray(m, dtype=np.float64)[..., None]
        return self.part_s("dense", rows, width_in=k, width_out=n, direction=direction)

    def memory_s(self, num_bytes: ArrayLike) -> Timed:
        """Seconds to move num_bytes (read and written together) through the device's memory; any shape."""
        return self.part_s("copy", np.asarray(num_bytes, dtype=np.float64)[..., None], width_in=0)

    def part_s(
        self,
        kind: CurveKind,
        size_E: ArrayLike,
        *,
        width_in: float,
        width_out: float = 0,
        direction: Direction = "forward",
    ) -> Timed:
        """Seconds of one call of any timed kind: (..., E) sizes to (...); E is 1 for all but grouped products.

        Raises InputError when the profile holds no such kind, or sizes are negative or not finite.
        """
        size = np.asarray(size_E, dtype=np.float64)
        valid = bool(np.isfinite(size).all()) and bool((size >= 0).all())
        check(valid, f"profile {self.name}", f"{kind} sizes", "must be finite and not negative", size)
        curves = [curve for curve in self.fit.curves if (curve.kind, curve.direction) == (kind, direction)]
        check(bool(curves), f"profile {self.name}", "fit.curves", f"must hold {kind} {direction}", "none")
        busy = size > 0
        if not busy.any():
            return Timed(np.zeros(size.shape[:-1]), "measured")
        utilisation, tag = _utilisation(self.fit, curves, np.where(busy, size, 1.0), busy, (width_in, width_out))
        ideal_s = self.fit.ideal_s(kind, direction, size, width_in, width_out)
        seconds = self.fit.floor_s + np.where(busy, ideal_s / utilisation, 0.0).sum(axis=-1)
        return Timed(np.where(busy.any(axis=-1), seconds, 0.0), tag)

    def check_device(self, gpu: Gpu) -> None:
        """Raise InputError unless measured on that GPU: a profile of a CPU or another GPU says nothing about it."""
        same = self.device.kind == "cuda" and self.device.name == gpu.calibration_name
        rule = f"must be a profile of {gpu.calibration_name or gpu.name} for GPU {gpu.name}"
        hint = "Run `moesim calibrate` on that GPU, or use its datasheet: profile: datasheet."
        check(same, f"profile {self.name}", "device", rule, f"{self.device.kind} {self.device.name}", hint)


def work(
    kind: CurveKind, direction: Direction, size: Floats, width_in: float, width_out: float, element_bytes: int
) -> tuple[Floats, Floats]:
    """(FLOPs, bytes) of the ideal: each operand read once, each result written once. Part of the profile's schema.

    size: tokens per expert (grouped), tokens (dense, router, permute, combine), rows (activation), bytes moved (copy),
    bytes that the busiest rank sends and receives together (all_to_all).
    """
    m, k, n, nothing = size, width_in, width_out, np.zeros_like(size)
    passes = 2 if direction == "backward" else 1  # backward makes two products, or two gradients
    if kind in ("grouped", "dense"):
        touched = np.where(m > 0, k * n + m * k + m * n, 0.0)
        return passes * 2 * m * k * n, passes * element_bytes * touched
    if kind == "router":
        return passes * 2 * m * k * n, passes * (element_bytes * m * k + 4 * k * n + 12 * m * n)
    if kind in ("copy", "all_to_all"):
        return nothing, m
    rows_touched = {"permute": 1 + n, "combine": 1 + n, "activation": 1 + 2 * passes}[kind]
    return nothing, element_bytes * m * k * rows_touched


def _utilisation(
    fit: Fit, curves: Sequence[Curve], size_E: Floats, busy_E: NDArray[np.bool_], widths: tuple[float, float]
) -> tuple[Floats, Tag]:
    """Utilisation per expert (..., E) and the worst tag; timed pairs of widths near the wanted one share the say."""
    known = sorted({(curve.width_in, curve.width_out) for curve in curves})
    weights, tag = _width_weights(known, widths)
    total = np.zeros_like(size_E)
    for pair, weight in zip(known, weights, strict=True):
        if weight > 0:
            columns = sorted((c for c in curves if (c.width_in, c.width_out) == pair), key=lambda c: c.num_active)
            own, own_tag = _of_one_pair(fit, columns, size_E, busy_E)
            total += weight * own
            tag = max(tag, own_tag, key=_TAGS.index)
    return total, tag


def _width_weights(known: Sequence[tuple[int, int]], wanted: tuple[float, float]) -> tuple[Floats, Tag]:
    """The very pair alone where it was timed, else all by inverse squared distance of the logarithms."""
    exact = np.array([pair == wanted for pair in known], dtype=np.float64)
    if exact.any():
        return exact, "measured"
    logs = np.log2(np.maximum(np.array(known, dtype=np.float64), 1.0))
    target = np.log2(np.maximum(np.array(wanted, dtype=np.float64), 1.0))
    inverse = 1.0 / ((logs - target) ** 2).sum(axis=1)
    inside = (logs.min(axis=0) <= target).all() and (target <= logs.max(axis=0)).all()
    return inverse / inverse.sum(), "interpolated" if inside else "extrapolated"


def _of_one_pair(fit: Fit, columns: Sequence[Curve], size_E: Floats, busy_E: NDArray[np.bool_]) -> tuple[Floats, Tag]:
    """Along each column as it was timed, and linear in the log of active experts between columns."""
    active = np.maximum(busy_E.sum(axis=-1), 1)  # (...); where nothing is active the result is not used
    grid_C = np.stack([fit.utilisation(column, size_E) for column in columns])
    counts = np.array([column.num_active for column in columns], dtype=np.float64)
    place = np.interp(np.log2(active), np.log2(counts), np.arange(len(columns)))
    low = np.floor(place).astype(np.int64)
    high = np.ceil(place).astype(np.int64)
    share = (place - low)[..., None]

    def column(index: NDArray[np.int64]) -> Floats:
        return np.take_along_axis(grid_C, np.broadcast_to(index[..., None], size_E.shape)[None], axis=0)[0]

    utilisation = (1.0 - share) * column(low) + share * column(high)
    return utilisation, _tag(columns, size_E, busy_E, active, low, high)


def _tag(
    columns: Sequence[Curve],
    size_E: Floats,
    busy_E: NDArray[np.bool_],
    active: NDArray[np.int64],
    low: NDArray[np.int64],
    high: NDArray[np.int64],
) -> Tag:
    first_C = np.array([column.sizes[0] for column in columns])
    last_C = np.array([column.sizes[-1] for column in columns])
    called = busy_E.any(axis=-1)
    smallest = np.where(busy_E, size_E, np.inf).min(axis=-1)
    largest = np.where(busy_E, size_E, 0.0).max(axis=-1)
    fits = (smallest >= np.maximum(first_C[low], first_C[high])) & (largest <= np.minimum(last_C[low], last_C[high]))
    fits &= (active >= columns[0].num_active) & (active <= columns[-1].num_active)
    if not fits[called].all():
        return "extrapolated"
    even = smallest == largest  # a skewed load was not measured, even if each of its sizes was
    timed = [low[called] == i for i in range(len(columns))]
    exact = all(np.isin(largest[called][mine], columns[i].sizes).all() for i, mine in enumerate(timed))
    return "measured" if exact and bool((even & (low == high))[called].all()) else "interpolated"


@functools.lru_cache(maxsize=16)
def _shipped(name: str) -> Profile:
    return _read(PROFILE_FOLDER / f"{name}.json")


def load_profile(path_or_name: str | Path) -> Profile:
    """The profile of a name in PROFILE_NAMES, or of a path to a JSON file that ``moesim calibrate`` wrote.

    Raises InputError for an unknown name, another schema version, a missing, unknown or impossible value.
    """
    if str(path_or_name) in PROFILE_NAMES:
        return _shipped(str(path_or_name))
    is_name = isinstance(path_or_name, str) and not path_or_name.endswith(".json") and "/" not in path_or_name
    if is_name and not Path(path_or_name).exists():
        rule = "must be a shipped profile or a path to one"
        raise InputError("profile", "", rule, path_or_name, near_match(str(path_or_name), PROFILE_NAMES))
    return _read(Path(path_or_name))


def _read(path: Path) -> Profile:
    raw = read_json(path)
    owner = str(path)
    check(isinstance(raw, Mapping), owner, "", "must be a mapping of names to values", raw)
    check(raw.get("schema") == SCHEMA, owner, "schema", f"must be {SCHEMA}", raw.get("schema"))
    version = raw.get("schema_version")
    hint = "Run `moesim calibrate` again with this version of moesim."
    check(version == SCHEMA_VERSION, owner, "schema_version", f"must be {SCHEMA_VERSION}", version, hint)
    return parse_as(Profile, raw, owner)


def find_profile(gpu_calibration_name: str) -> Profile | None:
    """The shipped profile measured on the GPU of this device name, if there is one; never a CPU's."""
    for name in PROFILE_NAMES:
        profile = _shipped(name)
        if profile.device.kind == "cuda" and profile.device.name == gpu_calibration_name:
            return profile
    return None
