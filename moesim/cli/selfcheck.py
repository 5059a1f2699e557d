"""The verb ``selfcheck``: a real layer under the skew suite on this machine, beside what its profile predicts."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli.app import app
from moesim.cli.calibrate import DEVICES, timing_progress
from moesim.cli.call import Call, verb
from moesim.cli.output import Answer, Table, fields_table
from moesim.errors import MoesimError, check, near_match

if TYPE_CHECKING:
    from moesim.cost.profile import Profile
    from moesim.study.selfcheck import CheckedCase, Score

BUSY_FRACTION = 0.1  # median repeat noise above which the check says so
DRIFT = 1.5  # times that a balanced case may take longer or shorter than predicted before the check says so
EXAMPLES = (
    "Examples:",
    "moesim selfcheck --device cpu --quick",
    "moesim selfcheck --profile profile.json --json --out out/selfcheck",
    "moesim selfcheck --ranks 2",
    "Forward pass of a layer on 4 ranks, run one after the other on this device; a case takes as long as its slowest "
    "rank. Exchanges between ranks are not part of it. With --ranks as many processes run at once and exchange rows, "
    "and so must the profile's have done. Without --profile the layer is calibrated first.",
)


@app.command(epilog="\n\n".join(EXAMPLES))
@verb()
def selfcheck(
    call: Call,
    device: Annotated[str, typer.Option(metavar="auto|cuda|cpu", help="Where to run the layer.")] = "cpu",
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE", help="Predict with this profile of this device and its layer.", show_default=False
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One size of the suite, fewer repetitions.")] = False,
    ranks: Annotated[
        int | None,
        typer.Option(metavar="N", help="Processes that run at once and exchange rows.", min=2, show_default=False),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Threads of torch; 1 disturbs least on a busy machine.", min=1, show_default=False
        ),
    ] = None,
) -> Answer:
    """Run a real MoE layer under the skew suite here: predicted beside measured, case by case."""
    check(device in DEVICES, "--device", "", "must be auto, cuda or cpu", device, near_match(device, DEVICES))
    from moesim.cost.profile import load_profile
    from moesim.study.selfcheck import check_cases, group_cases, score_cases, suite_cases
    from moesim.study.selfcheck_work import TAGS

    told = load_profile(profile) if profile is not None else None
    with tempfile.TemporaryDirectory() as scratch:
        try:
            if threads is not None:
                from reference_model.rank_share import set_threads

                set_threads(threads)
            told = told or _calibrated(call, device, call.out or Path(scratch), ranks)
            shapes = told.shapes[0]
            cases = group_cases(shapes, num_ranks=ranks, quick=quick) if ranks else suite_cases(shapes, quick=quick)
            warnings = _check_device(told, device, ranks)
            works = [(number, work) for number, case in enumerate(cases) for work in case.works]
            passes = _time(call, [work for _, work in works], told, device, quick, ranks)
        except ValueError as error:  # the reference model knows no moesim errors
            raise MoesimError(f"selfcheck: {error}") from None
    by_case: list[dict[Any, Any]] = [{} for _ in cases]
    for (number, work), seconds in zip(works, passes, strict=True):
        by_case[number][work] = seconds
    checked = check_cases(cases, by_case, told, shapes)
    score = score_cases(checked)
    worst = max((case.tag for case in checked), key=TAGS.index)
    return Answer(
        inputs={"device": device, "profile": profile, "quick": quick, "ranks": ranks, "threads": threads},
        result={
            "cases": checked,
            "score": score,
            "repeat_noise_fraction": repeat_noise(checked),
            "device": told.device,
            "layer": shapes,
            "calibrated_here": profile is None,
        },
        tables=_tables(checked, score, told),
        provenance=[
            {"part": "measured_s", "kind": "measured", "source": f"this run on {told.device}"},
            {"part": "predicted_s", "kind": worst, "source": f"calibration profile {told.name}, {told.date}"},
        ],
        warnings=[*warnings, *doubts(checked, score)],
    )


def repeat_noise(checked: Sequence[CheckedCase]) -> float:
    """Median over the cases of how far their least disturbed pass and the next disagree."""
    return statistics.median(case.noise_fraction for case in checked)


def doubts(checked: Sequence[CheckedCase], score: Score) -> list[str]:
    """What a reader of the score must know: a busy machine, one that changed its speed, or nothing to score."""
    noise = repeat_noise(checked)
    factors = [case.measured_s / case.predicted_s for case in checked if case.name == "balanced"]
    furthest = max(factors, key=lambda factor: max(factor, 1 / factor))
    told = []
    if noise > BUSY_FRACTION:
        told.append(f"repeats of a case disagree by {noise:.0%}: the machine is busy, and the errors say little")
    if max(furthest, 1 / furthest) > DRIFT:
        told.append(f"a balanced case took {furthest:.1f} times its prediction: the machine is not as when calibrated")
    if not score.num_cases:
        told.append(f"no case took more than {score.least_ratio:g} times the balanced one: nothing to score")
    return told


def _calibrated(call: Call, device: str, folder: Path, ranks: int | None) -> Profile:
    """A quick profile of the small layer at what one of the ranks does, written into the folder; all ranks at once."""
    from dataclasses import replace

    from moesim.cost.profile import load_profile
    from moesim.study.selfcheck import NUM_RANKS
    from reference_model.calibrate import calibrate
    from reference_model.shapes import CPU_SMALL

    check(not folder.is_file(), "--out", "", "must be a folder", str(folder))
    path = folder / "profile.json"
    num_local = CPU_SMALL.layer_experts // (ranks or NUM_RANKS)
    shape = replace(CPU_SMALL, active_experts=tuple(range(1, num_local + 1)))
    call.note(f"calibrating {shape.name} on this device")
    with timing_progress(call) as progress:
        calibrate(device, shape, True, path, progress, name="selfcheck", num_ranks=ranks or 1)
    return load_profile(path)


def _check_device(profile: Profile, device: str, ranks: int | None) -> list[str]:
    """Warnings about a profile of this device; raises InputError for another's, or one of another number of ranks."""
    from reference_model.devices import find_device
    from reference_model.timing import device_description

    here = device_description(find_device(device))
    same = (profile.device.kind, profile.device.name) == (here["kind"], here["name"])
    rule = f"must be the one to check, {here['name']} ({here['kind']})"
    check(same, f"profile {profile.name}", "device", rule, f"{profile.device.name} ({profile.device.kind})")
    dtype = "bfloat16" if here["kind"] == "cuda" else "float32"
    check(profile.dtype == dtype, f"profile {profile.name}", "dtype", f"must be {dtype} on this device", profile.dtype)
    wanted = ranks or 1
    hint = f"Run `moesim calibrate --ranks {wanted}`." if ranks else ""
    rule = f"must be {wanted}, of processes that timed it at once"
    check(
        profile.settings.num_ranks == wanted,
        f"profile {profile.name}",
        "num_ranks",
        rule,
        profile.settings.num_ranks,
        hint,
    )
    compared = ("torch_version",) if ranks else ("torch_version", "num_threads")  # a rank has one thread
    differs = [name for name in compared if getattr(profile.device, name) != here[name]]
    return [f"the profile's {name} is {getattr(profile.device, name)}, here {here[name]}" for name in differs]


def _time(
    call: Call, works: Sequence[Any], profile: Profile, device: str, quick: bool, ranks: int | None
) -> list[list[float]]:
    """Seconds of each work in every pass, on the device itself."""
    from dataclasses import asdict

    from reference_model.devices import find_device
    from reference_model.rank_group import time_groups
    from reference_model.rank_share import FULL, QUICK, time_shares
    from reference_model.shapes import LayerShapes

    call.note(f"running {len(works)} kinds of work" + (f" on {ranks} ranks at once" if ranks else ""))
    shape, effort = LayerShapes(**asdict(profile.shapes[0])), QUICK if quick else FULL
    if ranks:
        return time_groups([work.sent_SE for work in works], shape, find_device(device), effort)
    shares = [(work.sent_E, work.received_L) for work in works]
    with timing_progress(call) as progress:
        return time_shares(shares, shape, find_device(device), effort, progress)


def _tables(checked: Sequence[CheckedCase], score: Score, profile: Profile) -> list[Table]:
    from moesim.units import MILLI

    rows = [
        (
            case.name,
            str(case.tokens_per_rank),
            f"{case.predicted_s / MILLI:.1f}",
            f"{case.measured_s / MILLI:.1f}",
            f"{case.predicted_ratio:.2f}",
            f"{case.measured_ratio:.2f}",
            f"{case.flops_ratio:.2f}",
            f"{case.noise_fraction:.0%}",
        )
        for case in checked
    ]
    columns = ("Case", "Tokens", "ms", "Real", "Ratio", "Real", "FLOPs", "Noise")
    note = "Ratio: over the balanced case. FLOPs: the ratio that counting FLOPs gives. Noise: how far repeats disagree."
    told = {
        "This profile": score.median_error_fraction,
        "Answering 1.0": score.median_error_answering_1_fraction,
        "FLOPs only": score.median_error_flops_only_fraction,
    }
    title = f"Median error of the ratio, {score.num_cases} cases above {score.least_ratio:g}"
    errors = [(name, "-" if error is None else f"{error:.1%}") for name, error in told.items()]
    return [
        Table(title=f"Skew suite on {profile.device.name}", columns=columns, rows=rows, right=columns[1:], note=note),
        fields_table(
            title,
            [
                *errors,
                (
                    "Of the seconds, all cases",
                    "-"
                    if score.median_seconds_error_fraction is None
                    else f"{score.median_seconds_error_fraction:.1%}",
                ),
                ("Repeat noise, median", f"{repeat_noise(checked):.1%}"),
            ],
        ),
    ]
