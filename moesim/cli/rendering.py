"""The two verbs that do long work elsewhere: ``report`` runs a notebook, ``calibrate`` times the real layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.cli.call import Call
from moesim.cli.output import Answer, Table, fields_table
from moesim.errors import MoesimError, check

if TYPE_CHECKING:
    from moesim.report.parameters import Parameter
    from reference_model.shapes import LayerShapes

PLANNING_NOTEBOOK = "10_planning_report"
DEVICES = ("auto", "cuda", "cpu")


def render_report(call: Call, first: str | None, second: str | None, params_file: Path | None) -> Answer:
    """Check everything that was asked, then run a notebook (the planning one, or the one named) into the output folder.

    first: a notebook's name, then second is the scenario file; or the scenario file itself. Without a scenario file,
    what is not named keeps the notebook's default, exactly as with papermill.
    """
    import time

    from moesim.cli.question import flat_leaves, flat_settings, read_parameters, scenario_of, typed_parameters
    from moesim.leaves import LEAVES
    from moesim.report.parameters import ask, check_parameters, find_notebook, has_scenario, parameters_of
    from moesim.report.runner import run_notebook

    is_scenario = first is None or Path(first).suffix in (".yaml", ".yml", ".json")
    check(second is None or not is_scenario, "report", "SCENARIO", "must be one file, after a notebook's name", second)
    name = PLANNING_NOTEBOOK if is_scenario or first is None else first
    notebook = find_notebook(name)
    scenario_text = first if is_scenario else second
    scenario_file = None if scenario_text is None else Path(scenario_text)
    known = parameters_of(notebook)
    given = read_parameters(params_file) | typed_parameters(call)
    scenario = None
    if not has_scenario(known):
        check(scenario_file is None, "report", "SCENARIO", f"is nothing that {notebook.stem} asks for", second)
        given |= flat_settings(call)
        check_parameters(given, known)
    elif scenario_file is None:
        given |= flat_settings(call)
        scenario = ask(check_parameters(given, known), sorted(given)).scenario
    else:
        leaves = {name: value for name, value in given.items() if name in LEAVES}
        scenario = scenario_of(call, scenario_file, leaves)
        flat = flat_leaves(scenario, scenario_file.parent)
        given = {name: value for name, value in (given | flat).items() if name in known or name not in LEAVES}
        heard = ask(check_parameters(given, known), sorted(given)).scenario.to_dict()
        for name, value in scenario.to_dict().items():
            check(heard[name] == value, "report", name, "says more than the notebook's parameters can", value)
    folder, start_s = call.out or Path("out/report"), time.time()
    run_notebook(name, given, folder, show_progress=False if call.verbosity < 0 else None)
    made = [path for path in folder.glob("*") if path.stat().st_mtime > start_s - 1]  # others lay there before
    files = [str(path) for path in sorted(made, key=_page_first)]
    return Answer(
        inputs={"notebook": notebook.stem, "scenario": scenario and scenario.to_dict(), "parameters": given},
        result={"folder": str(folder), "files": files},
        tables=[Table(title="Report", columns=("File",), rows=[(name,) for name in files])],
        warnings=_kept_of_the_notebook(given, known) if scenario_file is None else (),
        writes_own_files=True,
    )


def _kept_of_the_notebook(given: Mapping[str, Any], known: Mapping[str, Parameter]) -> tuple[str, ...]:
    """What a report takes from its notebook where ``simulate`` would take a scenario's default, once a model, a cluster
    or GPUs are named; in words.
    """
    from moesim.describe.parallel import Parallelism
    from moesim.describe.workload import Training
    from moesim.leaves import LEAVES

    if not given.keys() & {"model", "cluster", "num_gpus"}:
        return ()
    groups = {"parallel": Parallelism(), "train": Training()}
    defaults = {
        name: getattr(groups[path[0]], path[1]) for name, path in LEAVES.items() if path[0] in groups and len(path) == 2
    }
    kept = {
        name: p.default for name, p in known.items() if name not in given and defaults.get(name, p.default) != p.default
    }
    if not kept:
        return ()
    told = ", ".join(f"{name}={value} ({defaults[name]})" for name, value in kept.items())
    return (f"what was not named is the notebook's own, not what simulate takes (in brackets): {told}",)


def _page_first(path: Path) -> tuple[int, str]:
    """The order in which a report's files are named: the page to read, its notebook, the rest by name."""
    from moesim.report.runner import FILES

    return (FILES.index(path.name) if path.name in FILES else len(FILES), path.name)


def run_calibration(call: Call, device: str, model: str | None, quick: bool, ranks: int = 1) -> Answer:
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
