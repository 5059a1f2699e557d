"""The verbs ``validate`` and ``diff``: is a design sound, and what two of them differ in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli.app import app
from moesim.cli.call import DONE, GATE_FAILED, Call, verb
from moesim.cli.output import Answer, Table, working
from moesim.errors import check

if TYPE_CHECKING:
    from moesim.scenario import Scenario
    from moesim.study.differences import Result
    from moesim.study.validate import Validation

VALIDATE_EXAMPLES = (
    "Examples:",
    "moesim validate design.yaml",
    "moesim validate design.yaml --strict --out out/design --json",
    "moesim validate design.yaml --set parallel.ep=32",
    "design.yaml: scenario (a scenario file's name, or what would stand in one); tokens, price_per_gpu_hour, currency, "
    "fleet, inspected, num_spares for a run's gates; gates: {mfu: {limit: 0.3, warn: 0.35}, bubble: {off: true}}.",
    "Gates: memory_headroom, out_of_memory, dropped, expert_load, exposed_communication, bubble, mfu, envelope; with "
    "tokens goodput, days, cost. Exit status 1 where one fails (with --strict: warns). --out writes junit.xml as well.",
)
DIFF_EXAMPLES = (
    "Examples:",
    "moesim diff today.yaml tomorrow.yaml",
    "moesim diff a.yaml b.yaml --set routing.capacity_factor=1.25 --json",
    "Files are scenarios or designs. Both meet the same random draws, so what differs is due to what was changed.",
)


@app.command(epilog="\n\n".join(VALIDATE_EXAMPLES))
@verb(scenario=True, out_help="Write results.json and junit.xml into this folder.")
def validate(
    call: Call,
    file: Annotated[Path, typer.Argument(metavar="DESIGN.yaml", help="The design.", show_default=False)],
    strict: Annotated[bool, typer.Option("--strict", help="A warning fails too.")] = False,
) -> Answer:
    """Validate a design before training: named gates, each passed, warned of or failed, with the cheapest fix."""
    from moesim.cli.question import mapping_of, typed_parameters
    from moesim.study.validate import read_design
    from moesim.study.validate import validate as ask_gates

    design = read_design(file, lambda raw: mapping_of(call, raw, typed_parameters(call)))
    with working(call, f"Validating {design.name}"):
        found = ask_gates(design)
    if call.out is not None:
        from moesim.door import write_text_atomically
        from moesim.report.junit import junit_xml

        write_text_atomically(call.out / "junit.xml", junit_xml(found))
    failed = found.status == "fail" or (strict and found.status == "warn")
    return Answer(
        inputs={"design": str(file), "scenario": design.scenario.raw, "strict": strict, "settings": call.settings},
        result=found.to_dict(),
        tables=_gates(found),
        provenance=[{"part": p.part, "kind": p.kind, "source": p.source} for p in found.step.provenance],
        warnings=list(found.step.warnings),
        exit_status=GATE_FAILED if failed else DONE,
    )


def _gates(found: Validation) -> list[Table]:
    from moesim.report.junit import gate_words

    rows = [(gate.status.upper(), gate.name, gate_words(gate), gate.fix) for gate in found.gates]
    counts = ", ".join(
        f"{sum(gate.status == status for gate in found.gates)} {word}"
        for status, word in (("fail", "failed"), ("warn", "warned"), ("pass", "passed"))
    )
    return [
        Table(
            title=f"{found.design.name}: {found.status.upper()}",
            columns=("", "Gate", "Value", "Cheapest fix"),
            rows=rows,
            note=f"{counts}. Limits that the file does not set are the house's own.",
        )
    ]


@app.command(epilog="\n\n".join(DIFF_EXAMPLES))
@verb(scenario=True)
def diff(
    call: Call,
    first: Annotated[Path, typer.Argument(metavar="A.yaml", help="A scenario or design.", show_default=False)],
    second: Annotated[Path, typer.Argument(metavar="B.yaml", help="Another one.", show_default=False)],
) -> Answer:
    """Compare two scenarios or designs: which settings differ, and what that does to step, parts and memory."""
    from moesim.study.differences import differences

    asked = [_scenario(call, file) for file in (first, second)]
    with working(call, "Simulating both"):
        found = differences(*asked)
    settings = [(s.name, _shown(s.first), _shown(s.second)) for s in found.settings] or [("nothing", "", "")]
    columns = ("", first.stem, second.stem)
    if first.stem == second.stem:
        columns = ("", str(first), str(second))
    rows = [_row(result) for result in (*found.results, *found.parts)]
    return Answer(
        inputs={"first": str(first), "second": str(second), "settings": call.settings},
        result=found.to_dict(),
        tables=[
            Table(title="Settings that differ", columns=columns, rows=settings),
            Table(title="What that does", columns=(*columns, "Change"), rows=rows, right=(*columns[1:], "Change")),
        ],
    )


def _scenario(call: Call, file: Path) -> Scenario:
    from moesim.cli.question import mapping_of, typed_parameters
    from moesim.door.files import read_yaml
    from moesim.scenario import Scenario
    from moesim.study.validate import read_design

    raw: Any = read_yaml(file)
    check(isinstance(raw, dict), str(file), "", "must be a scenario or a design", type(raw).__name__)
    leaves = typed_parameters(call)
    if "scenario" in raw:
        return read_design(file, lambda inner: mapping_of(call, inner, leaves)).scenario
    return Scenario.from_mapping(mapping_of(call, raw, leaves), owner=str(file), folder=file.parent)


def _shown(value: Any) -> str:
    return "-" if value is None else str(value)


def _row(result: Result) -> tuple[str, str, str, str]:
    from moesim.units import format_bytes, format_seconds

    def told(value: float) -> str:
        match result.unit:
            case "s":
                return format_seconds(value)
            case "B":
                return format_bytes(value)
            case "1" if result.name != "max_mean_load":
                return f"{value:.1%}"
        return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"

    change = result.change_fraction
    name = result.name.removesuffix("_s").removesuffix("_bytes").replace("_", " ")
    return name, told(result.first), told(result.second), "-" if change is None else f"{change:+.1%}"
