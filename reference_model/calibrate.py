"""Time this device and write its profile: ``python -m reference_model.calibrate --device cpu --quick --out FILE``.

Each measured case is appended at once to FILE.points.jsonl, so a run that is killed goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reference_model.cases import Case, all_cases, prepare_case
from reference_model.fit import fit_points, repeat_noise_fraction, score
from reference_model.profile_schema import SCHEMA, SCHEMA_VERSION, write_profile
from reference_model.shapes import CPU_SMALL, NAMED_SHAPES, LayerShapes, shapes_of
from reference_model.timing import (
    Arena,
    Effort,
    arena_bytes,
    calls_ahead,
    device_description,
    host_overhead_s,
    sample_times_s,
)

Progress = Callable[[int, int, str], None]  # done, total, what comes next

FULL = Effort(num_passes=3, min_samples=5, max_samples=100, budget_s=0.05)
QUICK = Effort(num_passes=2, min_samples=3, max_samples=50, budget_s=0.015, num_extra_passes=1)
FULL_GPU = Effort(num_passes=3, min_samples=10, max_samples=30, budget_s=0.01)
_LAUNCH = Case(kind="launch", direction="forward", size=1)
_HOST_KEY = "host"
_BUSY_FRACTION = 0.2  # disagreement of passes at the 90th percentile, above which a profile says so
_MOST_CPU_FLOPS = 1e11  # a second per product on two slow cores; a whole calibration would take hours beyond
_AGREEMENT_FRACTION = 0.05  # between the two least disturbed passes over a case


def calibrate(
    device: str = "auto",
    shapes: Sequence[LayerShapes] | LayerShapes | None = None,
    quick: bool = False,
    out_path: str | Path = "profile.json",
    progress: Progress | None = None,
    *,
    name: str = "",
    effort: Effort | None = None,
) -> dict[str, Any]:
    """Time this device, write the profile to out_path, and return it as plain values.

    device: ``auto`` (a GPU when there is one), ``cpu`` or ``cuda``; shapes: the models whose sizes to time; None takes
    the small named one on a CPU (in float32) and the published ones of NAMED_SHAPES on a GPU (in bf16).
    Raises ValueError for a device that is not there, and for a large model's sizes on a CPU.

    >>> calibrate("cpu", quick=True, out_path="cpu.json")["named_model"]  # doctest: +SKIP
    ['cpu-small']
    """
    place = find_device(device)
    chosen = _chosen_shapes(shapes, place)
    effort = effort or (FULL_GPU if place.type == "cuda" and not quick else QUICK if quick else FULL)
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    cases = [_LAUNCH, *all_cases(chosen, quick=quick)]
    largest = max(case.num_bytes(dtype.itemsize) for case in cases if case.kind != "launch")
    settings = {
        "quick": quick,
        "num_passes": effort.num_passes,
        "min_samples": effort.min_samples,
        "arena_bytes": arena_bytes(place, largest),
    }
    about = device_description(place)
    header: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "device": about, "settings": settings}
    header["shapes"] = [dataclasses.asdict(shape) for shape in chosen]
    out = Path(out_path)
    log = PointLog(out.with_name(out.name + ".points.jsonl"), header)
    _measure(cases, log, place, dtype, effort, settings["arena_bytes"], progress or print_progress)

    points = [_point(case, log.samples[case.key]) for case in cases]
    fit = fit_points(points, element_bytes=dtype.itemsize)
    profile: dict[str, Any] = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "name": name or out.stem,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),  # noqa: UP017
        "device": about,
        "shapes": header["shapes"],
        "named_model": [shape.name for shape in chosen],
        "dtype": str(dtype).removeprefix("torch."),
        "settings": settings,
        "host_per_op_s": float(np.median(np.concatenate(log.samples[_HOST_KEY]))),
        "fit": fit,
        "errors": score(fit, points),
        "points": points,
        "notes": _notes(place, chosen, points),
    }
    write_profile(json.loads(json.dumps(profile)), out)
    log.delete()
    return profile


class PointLog:
    """The samples taken so far, one JSON line per case and pass behind a header; survives a kill at any moment.

    A file of another device, software or set of shapes is begun anew; a line cut short is dropped.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.samples: dict[str, list[list[float]]] = {}
        first = json.dumps({"header": header}, sort_keys=True)
        kept = self._kept_lines(first)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([first, *kept]) + "\n", encoding="utf-8")

    def _kept_lines(self, first: str) -> list[str]:
        lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n") if self.path.exists() else []
        if not lines or lines[0] != first:
            return []
        kept = []
        for line in lines[1:-1]:  # what follows the last line end was cut short
            try:
                entry = json.loads(line)
                self.samples.setdefault(entry["key"], []).append([float(s) for s in entry["samples_s"]])
            except (ValueError, KeyError, TypeError):
                continue
            kept.append(line)
        return kept

    def add(self, key: str, samples_s: Sequence[float]) -> None:
        """Append one case's samples of one pass."""
        self.samples.setdefault(key, []).append(list(samples_s))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "samples_s": list(samples_s)}) + "\n")

    def delete(self) -> None:
        """The profile now holds it all."""
        self.path.unlink()


def _measure(
    cases: Sequence[Case],
    log: PointLog,
    device: torch.device,
    dtype: torch.dtype,
    effort: Effort,
    num_arena_bytes: int,
    progress: Progress,
) -> None:
    """Fill the log. Each pass visits all cases in another (fixed) order, so drift turns into spread, not into bias.

    After the planned passes come further ones over the cases whose two least disturbed passes still disagree.
    """
    everything: list[Case | None] = [None, *cases]  # None: the host's overhead
    arena = Arena(device, dtype, num_arena_bytes)
    for number in range(effort.num_passes + effort.num_extra_passes):
        order = np.random.default_rng(number).permutation(len(everything))
        todo = [case for case in (everything[i] for i in order) if len(log.samples.get(_key(case), ())) <= number]
        if number >= effort.num_passes:
            todo = [case for case in todo if case and not _agree(log.samples[case.key])]
        for done, case in enumerate(todo):
            progress(done, len(todo), f"pass {number + 1}: {_key(case)}")
            if case is None:
                log.add(_HOST_KEY, [host_overhead_s(device)])
            else:
                backward = case.direction == "backward"
                ahead = calls_ahead(device, case.num_bytes(dtype.itemsize)) if backward else 1
                log.add(case.key, sample_times_s(prepare_case(case, arena), device, effort, ahead))
        progress(len(todo), len(todo), f"pass {number + 1}: done")


def _agree(samples_by_pass: Sequence[Sequence[float]]) -> bool:
    least, second = sorted(float(np.median(samples)) for samples in samples_by_pass)[:2]
    return second <= (1.0 + _AGREEMENT_FRACTION) * least


def _key(case: Case | None) -> str:
    return case.key if case else _HOST_KEY


def _point(case: Case, samples_by_pass: Sequence[Sequence[float]]) -> dict[str, Any]:
    """A profile's point: the case and the summary of all its samples."""
    samples = np.concatenate([np.asarray(samples) for samples in samples_by_pass])
    medians = [float(np.median(samples)) for samples in samples_by_pass]
    return {
        **dataclasses.asdict(case),
        "median_s": min(medians),
        "p10_s": float(np.quantile(samples, 0.1)),
        "p90_s": float(np.quantile(samples, 0.9)),
        "num_samples": int(samples.size),
        "pass_medians_s": medians,
    }


def find_device(device: str) -> torch.device:
    """The device of a name: auto, cpu or cuda. Raises ValueError for one that is not there."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: must be auto, cpu or cuda; got {device!r}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: must be one that is there; got 'cuda', and torch sees no CUDA device")
    return torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)


def _chosen_shapes(shapes: Sequence[LayerShapes] | LayerShapes | None, device: torch.device) -> tuple[LayerShapes, ...]:
    if shapes:
        chosen = (shapes,) if isinstance(shapes, LayerShapes) else tuple(shapes)
        for shape in chosen:
            flops = max(2 * shape.max_rows * inputs * outputs for inputs, outputs in shape.products)
            if device.type == "cpu" and flops > _MOST_CPU_FLOPS:
                rule = f"a CPU times small models, of at most {_MOST_CPU_FLOPS:.0e} FLOPs in a product"
                raise ValueError(f"shapes {shape.name}: {rule}; got {flops:.0e}; name no model to time cpu-small")
        return chosen
    return (CPU_SMALL,) if device.type == "cpu" else tuple(s for s in NAMED_SHAPES.values() if s is not CPU_SMALL)


def _notes(device: torch.device, shapes: Iterable[LayerShapes], points: Iterable[Mapping[str, Any]]) -> list[str]:
    names = ", ".join(shape.name for shape in shapes)
    noise = [repeat_noise_fraction(point) for point in points]
    spread = f"{np.median(noise):.1%} for the median case, {np.quantile(noise, 0.9):.1%} at the 90th percentile"
    notes = [
        f"Timed at the sizes of {names}.",
        f"The two best passes over a case disagree by {spread}.",
        "Held-out points and whole layers were never part of the fit.",
    ]
    if np.quantile(noise, 0.9) > _BUSY_FRACTION:
        notes.append("The machine was busy with other work: calibrate again when it is idle.")
    if device.type == "cpu":
        notes.append("Measured on a CPU: it says nothing about any GPU, and moesim refuses to use it for one.")
    return notes


def print_progress(done: int, total: int, text: str) -> None:
    """One line that rewrites itself on a terminal; elsewhere a line per tenth of the work. On stderr."""
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r{done}/{total} {text[:70]:<70}", end=end, file=sys.stderr, flush=True)
    elif total and done * 10 // total != (done - 1) * 10 // total:
        print(f"{done}/{total} {text}", file=sys.stderr, flush=True)


def error_table(profile: Mapping[str, Any]) -> str:
    """The held-out errors as text, one line per kind and direction."""
    lines = [f"{'held out':<26}{'points':>7}{'median':>9}{'p90':>9}{'bias':>9}{'noise':>9}"]
    for row in profile["errors"]:
        numbers = (row[f"{name}_fraction"] for name in ("median", "p90", "bias", "noise"))
        kind = f"{row['kind']} {row['direction']}"
        lines.append(f"{kind:<26}{row['num_points']:>7}" + "".join(f"{number:>9.1%}" for number in numbers))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m reference_model.calibrate", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--quick", action="store_true", help="under a minute on two CPU cores; fewer columns and samples"
    )
    parser.add_argument("--out", type=Path, required=True, help="the profile to write (JSON)")
    parser.add_argument("--name", default="", help="the profile's name; default: the file's")
    parser.add_argument("--model", action="append", choices=sorted(NAMED_SHAPES), help="repeatable; default by device")
    sizes = ("hidden", "width", "experts", "top-k")
    for size in sizes:
        parser.add_argument(f"--{size}", type=int, help="of a model that has no name here; give all four")
    given = parser.parse_args(arguments)
    numbers = [getattr(given, size.replace("-", "_")) for size in sizes]
    shapes = [NAMED_SHAPES[model] for model in given.model or ()]
    if any(number is not None for number in numbers):
        if None in numbers:
            parser.error("--hidden, --width, --experts and --top-k go together")
        hidden, width, experts, top_k = numbers
        shapes.append(shapes_of(name="own", hidden=hidden, expert_width=width, num_experts=experts, top_k=top_k))
    try:
        profile = calibrate(given.device, shapes, given.quick, given.out, name=given.name)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{profile['device']['name']}, {profile['dtype']}, {profile['device']['num_threads']} threads: {given.out}")
    fit = profile["fit"]
    print(f"best rate {fit['flops_per_s'] / 1e9:,.0f} GFLOP/s, bandwidth {fit['bytes_per_s'] / 1e9:,.1f} GB/s, "
          f"host {profile['host_per_op_s'] * 1e6:.1f} us per operation")  # fmt: skip
    print(error_table(profile), *profile["notes"], sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
