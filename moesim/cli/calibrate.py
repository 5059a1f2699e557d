"""``moesim calibrate``: the reference layer timed on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli.app import app, examples
from moesim.cli.call import Call, verb
from moesim.cli.output import Answer, Table, fields_table
from moesim.errors import MoesimError, check

if TYPE_CHECKING:
    from reference_model.shapes import LayerShapes

DEVICES = ("auto", "cuda", "cpu")
CALIBRATE_EXAMPLES = examples(
    "moesim calibrate --out profiles/my-gpu.json",
    "moesim calibrate --device cpu --quick",
)


@app.command(epilog=CALIBRATE_EXAMPLES)
@verb(out_help="The profile to write (profile.json).")
def calibrate(
    call: Call,
    device: Annotated[str, typer.Option(metavar="auto|cuda|cpu", help="Where to time the layer.")] = "auto",
    model: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="Time this model's shapes.", show_default=False)
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer shapes and repetitions.")] = False,
    ranks: Annotated[
        int, typer.Option(metavar="N", help="Processes that time every case at the same time.", min=1)
    ] = 1,
) -> Answer:
    """Time a real MoE layer on this machine and write a profile that scenarios can use."""
    return _calibration(call, device, model, quick, ranks)


def _calibration(call: Call, device: str, model: str | None, quick: bool, ranks: int = 1) -> Answer:
    """Time a real layer with the reference model, which is the one place where torch is loaded."""
    check(device in DEVICES, "--device", "", "must be auto, cuda or cpu", device)
    shapes = _shapes(model) if model is not None else None
    path = call.out or Path("profile.json")
    check(not path.is_dir(), "--out", "", "must be a file", str(path))
    from reference_model.calibrate import calibrate

    with timing_progress(call) as progress:
        try:
            profile = calibrate(device, shapes, quick, path, progress, num_ranks=ranks)
        except ValueError as error:  # the reference model knows no moesim errors
            raise MoesimError(f"calibrate: {error}") from None
    about = profile["device"]
    headline = [
        ("Device", str(about["name"])),
        ("torch", str(about["torch_version"])),
        ("Models timed", ", ".join(profile["named_model"])),
        ("Points", f"{len(profile['points']):,}"),
        ("Profile", str(path)),
    ]
    columns = ("Held-out error of", "Points", "Median", "90 %", "Bias", "Noise")
    errors = [
        (
            f"{row['kind']} {row['direction']}",
            str(row["num_points"]),
            *(f"{row[name]:.1%}" for name in ("median_fraction", "p90_fraction", "bias_fraction", "noise_fraction")),
        )
        for row in profile["errors"]
    ]
    return Answer(
        inputs={"device": device, "model": model, "quick": quick, "ranks": ranks},
        result={name: profile[name] for name in profile if name != "points"} | {"file": str(path)},
        tables=[
            fields_table("Calibration", headline),
            Table(
                title="How well the fit predicts",
                columns=columns,
                rows=errors,
                right=columns[1:],
                note="Noise: how far repeats of one case disagree. An error below it says nothing of the fit.",
            ),
        ],
        provenance=[{"part": "profile", "kind": "measured", "source": f"{about['name']}, {profile['date']}"}],
        warnings=profile["notes"],
        writes_own_files=True,
    )


def _shapes(name: str) -> LayerShapes:
    """The sizes of a model's MoE layer, for timing."""
    from moesim.catalog.models import load_model

    model = load_model(name)
    check(model.is_moe, "--model", "", "must have MoE layers to time", name)
    from reference_model.shapes import shapes_of

    moe: Any = model.layers[model.moe_layers[0]].ffn
    return shapes_of(
        name=model.name,
        hidden=model.hidden,
        expert_width=moe.expert.width,
        num_experts=moe.num_experts,
        top_k=moe.router.top_k,
    )


@contextmanager
def timing_progress(call: Call) -> Iterator[Callable[[int, int, str], None]]:
    """What the reference model reports its progress to: a bar on a terminal, elsewhere a message per tenth."""
    import sys

    if not sys.stderr.isatty():
        yield lambda done, total, _: _note_tenths(call, done, total)
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=call.verbosity < 0) as bar:
        task = bar.add_task("Timing", total=None)
        yield lambda done, total, text: bar.update(task, completed=done, total=total, description=text[:40])


def _note_tenths(call: Call, done: int, total: int) -> None:
    """total may be 0: a calibration that goes on where it stopped has passes with nothing left to do."""
    if total and done * 10 // total != (done - 1) * 10 // total:
        call.note(f"timed {done} of {total} cases")
