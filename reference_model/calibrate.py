"""Time this device and write its profile: ``python -m reference_model.calibrate --device cpu --quick --out FILE``.

Each measured case is appended at once to FILE.points.jsonl, so a run that is killed goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reference_model.cases import Case, all_cases
from reference_model.devices import find_device
from reference_model.exchange import EXCHANGES, exchange_cases
from reference_model.fit import (
    GOAL_MEDIAN_FRACTION,
    GOAL_NOISES,
    GOAL_P90_FRACTION,
    fit_points,
    is_within_goal,
    repeat_noise_fraction,
    score,
)
from reference_model.measure import HOST_KEY, PointLog, Progress, measure, measure_on_ranks
from reference_model.profile_schema import SCHEMA, SCHEMA_VERSION, write_profile
from reference_model.shapes import CPU_SMALL, NAMED_SHAPES, LayerShapes, shapes_of
from reference_model.timing import Effort, arena_bytes, device_description

FULL = Effort(num_passes=3, min_samples=5, max_samples=60, budget_s=0.05)
QUICK = Effort(num_passes=2, min_samples=3, max_samples=30, budget_s=0.015, num_extra_passes=1, limit_s=36.0)
FULL_GPU = Effort(num_passes=3, min_samples=10, max_samples=30, budget_s=0.01)
_LAUNCH = Case(kind="launch", direction="forward", size=1)
_BUSY_FRACTION = 0.2  # disagreement of passes at the 90th percentile, above which a profile says so
_MOST_CPU_FLOPS = 1e11  # a second per product on two slow cores; a whole calibration would take hours beyond
_CPU_RANKS = 2  # processes that exchange on a CPU of as many cores


def calibrate(
    device: str = "auto",
    shapes: Sequence[LayerShapes] | LayerShapes | None = None,
    quick: bool = False,
    out_path: str | Path = "profile.json",
    progress: Progress | None = None,
    *,
    name: str = "",
    effort: Effort | None = None,
    num_ranks: int = 1,
) -> dict[str, Any]:
    """Time this device, write the profile to out_path, and return it as plain values.

    device: ``auto`` (a GPU when there is one), ``cpu`` or ``cuda``; shapes: the models whose sizes to time; None takes
    the small named one on a CPU (in float32) and the published ones of NAMED_SHAPES on a GPU (in bf16). num_ranks:
    processes that time every case at the same time, on a CPU with one thread each; with 1 only the exchanges are timed
    by several, as many as are at hand.
    Raises ValueError for a device that is not there or too few of them, and for a large model's sizes on a CPU.

    >>> calibrate("cpu", quick=True, out_path="cpu.json")["named_model"]  # doctest: +SKIP
    ['cpu-small']
    """
    place = find_device(device)
    at_hand = ranks_at_hand(place)
    if not 1 <= num_ranks <= at_hand:
        raise ValueError(f"ranks: this device has cores or GPUs for 1 to {at_hand}; got {num_ranks}")
    chosen = _chosen_shapes(shapes, place)
    effort = effort or (FULL_GPU if place.type == "cuda" and not quick else QUICK if quick else FULL)
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    alone = [_LAUNCH, *all_cases(chosen, quick=quick)]
    together = exchange_cases(chosen, at_hand, dtype.itemsize, quick=quick) if at_hand > 1 else []
    largest = max(case.num_bytes(dtype.itemsize) for case in [*alone, *together] if case.kind != "launch")
    settings = {
        "quick": quick,
        "num_passes": effort.num_passes,
        "min_samples": effort.min_samples,
        "arena_bytes": arena_bytes(place, largest),
        "num_ranks": num_ranks,
    }
    about = device_description(place)
    if num_ranks > 1 and place.type == "cpu":
        about["num_threads"] = 1
    header: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "device": about, "settings": settings}
    header["shapes"] = [dataclasses.asdict(shape) for shape in chosen]
    out = Path(out_path)
    log = PointLog(out.with_name(out.name + ".points.jsonl"), header)
    how = (place, dtype, effort, settings["arena_bytes"], progress or print_progress)
    if num_ranks == 1:
        measure([None, *alone], log, *how)
        log = measure_on_ranks(at_hand, together, log, *how) if together else log
    else:
        log = measure_on_ranks(num_ranks, [None, *alone, *together], log, *how)

    points = [_point(case, log.samples[case.key]) for case in [*alone, *together]]
    fit = fit_points(points, element_bytes=dtype.itemsize)
    errors = score(fit, points)
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
        "host_per_op_s": float(np.median(np.concatenate(log.samples[HOST_KEY]))),
        "fit": fit,
        "errors": errors,
        "points": points,
        "notes": [*_notes(place, chosen, points), _goal_note(errors)],
    }
    write_profile(json.loads(json.dumps(profile)), out)
    log.delete()
    return profile


def _point(case: Case, samples_by_pass: Sequence[Sequence[float]]) -> dict[str, Any]:
    """A profile's point: the case and the summary of all its samples.

    Its time is that of the least disturbed pass, since other work on the machine only adds time; an exchange's that of
    the middle one, since processes that wake each other fall into a quicker or a slower turn for a whole pass.
    """
    samples = np.concatenate([np.asarray(samples) for samples in samples_by_pass])
    medians = [float(np.median(samples)) for samples in samples_by_pass]
    return {
        **dataclasses.asdict(case),
        "median_s": float(np.median(medians)) if case.kind in EXCHANGES else min(medians),
        "p10_s": float(np.quantile(samples, 0.1)),
        "p90_s": float(np.quantile(samples, 0.9)),
        "num_samples": int(samples.size),
        "pass_medians_s": medians,
    }


def ranks_at_hand(device: torch.device) -> int:
    """How many ranks can work at the same time: one for each GPU; on a CPU two, where it has as many cores."""
    return torch.cuda.device_count() if device.type == "cuda" else min(_CPU_RANKS, os.cpu_count() or 1)


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


def _notes(device: torch.device, shapes: Iterable[LayerShapes], points: Sequence[Mapping[str, Any]]) -> list[str]:
    names = ", ".join(shape.name for shape in shapes)
    noise = [repeat_noise_fraction(point) for point in points]
    spread = f"{np.median(noise):.1%} for the median case, {np.quantile(noise, 0.9):.1%} at the 90th percentile"
    notes = [
        f"Timed at the sizes of {names}.",
        f"The two best passes over a case disagree by {spread}.",
        "Held-out points and whole layers were never part of the fit.",
    ]
    once = sum(len(point["pass_medians_s"]) == 1 for point in points)
    if once:
        notes.append(f"Time ran out: {once} of {len(points)} cases were timed in one pass, and stand with no noise.")
    if once or np.quantile(noise, 0.9) > _BUSY_FRACTION:
        notes.append("The machine was busy with other work: calibrate again when it is idle.")
    if device.type == "cpu":
        notes.append("Measured on a CPU: it says nothing about any GPU, and moesim refuses to use it for one.")
    return notes


def _goal_note(errors: Sequence[Mapping[str, Any]]) -> str:
    """One sentence: which kinds' held-out errors are as small as is hoped for."""
    beyond = [f"{row['kind']} {row['direction']}" for row in errors if not is_within_goal(row)]
    goal = f"max({GOAL_MEDIAN_FRACTION:.0%}, {GOAL_NOISES:g} x noise) median, {GOAL_P90_FRACTION:.0%} nine in ten"
    told = f"Held-out error within {goal}: {len(errors) - len(beyond)} of {len(errors)} kinds"
    return f"{told}; beyond it {', '.join(beyond)}." if beyond else f"{told}."


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
    parser.add_argument("--ranks", type=int, default=1, help="processes that time every case at the same time")
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
        profile = calibrate(given.device, shapes, given.quick, given.out, name=given.name, num_ranks=given.ranks)
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
