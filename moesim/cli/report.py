"""``moesim report``: a notebook run with checked parameters, or a grid of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli.app import app, examples
from moesim.cli.call import Call, verb
from moesim.cli.output import Answer, Table
from moesim.errors import check

if TYPE_CHECKING:
    from moesim.report.parameters import Parameter

PLANNING_NOTEBOOK = "10_planning_report"
REPORT_EXAMPLES = examples(
    "moesim report --out out/report",
    "moesim report -p ep 32 -p recompute full",
    "moesim report -f params.yaml --out out/mine",
    "moesim report scenario.yaml",
    "moesim report 20_routing_and_drops --capacity-factor 1.5 -p wanted_drop 0.001",
    "moesim report 30_expert_placement scenario.yaml --out out/placement",
    "moesim report 50_quality_vs_active_flops --out out/training",
    "moesim report 20_routing_and_drops --grid grid.yaml --out out/reports",
    "A grid: base (flat parameters) and grid (names to lists) or points (a list of names to values); index.html "
    "compares and links the reports.",
    "What is not named keeps the notebook's default, as with papermill: DeepSeek-V3 on 2,048 H800 (PP16, EP64). "
    "A scenario file takes the scenario's own defaults instead.",
)


@app.command(epilog=REPORT_EXAMPLES)
@verb(scenario=True, out_help="Folder of report.html, report.ipynb, results.json, results.csv and more (out/report).")
def report(
    call: Call,
    notebook: Annotated[
        str | None,
        typer.Argument(
            metavar="[NOTEBOOK]",
            help="10_planning_report (the default), 00_tour, 12_memory, 15_calibration, 20_routing_and_drops, "
            "25_dense_vs_moe, 30_expert_placement, 35_all_to_all, 40_cluster_sizing, 45_goodput_and_cost, "
            "50_quality_vs_active_flops, 60_accuracy, 70_validate_design, or a file of your own.",
            show_default=False,
        ),
    ] = None,
    scenario_file: Annotated[
        str | None,
        typer.Argument(metavar="[SCENARIO.yaml]", help="Scenario file; options overrule it.", show_default=False),
    ] = None,
    params_file: Annotated[
        Path | None,
        typer.Option(
            "-f", "--params", metavar="FILE", help="YAML of flat parameters, as papermill's -f.", show_default=False
        ),
    ] = None,
    grid: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Many reports: a grid or list of parameter sets.", show_default=False),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Reports at a time, with --grid; by default one a core.", min=1)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="With --grid: keep the reports that are there.")] = False,
) -> Answer:
    """Render a report: planning (does it fit, how fast, what binds, what to change), routing, or placement."""
    if grid is not None:
        from moesim.cli.report_grid import render_reports

        return render_reports(call, notebook, scenario_file, params_file, grid, workers, resume)
    check(workers is None and not resume, "--workers, --resume", "", "go with --grid", None)
    return _render(call, notebook, scenario_file, params_file)


def _render(call: Call, first: str | None, second: str | None, params_file: Path | None) -> Answer:
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
