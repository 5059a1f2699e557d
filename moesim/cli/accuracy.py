"""The verb ``accuracy``: predictions beside measurements, the carried ones or a user's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli.app import app
from moesim.cli.call import Call, verb
from moesim.cli.output import Answer, Table, envelope_of, working, write_results
from moesim.errors import check

if TYPE_CHECKING:
    from moesim.study.accuracy import Accuracy

SHOWN_ROWS = 12
EXAMPLES = (
    "Examples:",
    "moesim accuracy --kind dispatch",
    "moesim accuracy --kind training --out out/accuracy",
    "moesim accuracy --kind training --cases my_runs.csv --json",
    "moesim accuracy --kind dispatch --measured",
)


@app.command(epilog="\n\n".join(EXAMPLES))
@verb(out_help="Write results.json, accuracy.md and the figure accuracy-KIND.svg into this folder.")
def accuracy(
    call: Call,
    cases: Annotated[
        Path | None,
        typer.Option(metavar="FILE.csv", help="Measurements to score; without it those that moesim carries."),
    ] = None,
    kind: Annotated[
        str, typer.Option(metavar="training|layer|dispatch|memory|trace", help="What was measured.", show_default=True)
    ] = "training",
    measured: Annotated[
        bool, typer.Option("--measured", help="Score every row of the optional extra's tables (kind dispatch).")
    ] = False,
) -> Answer:
    """Predict every measured row and show how far off it is: worst first, rows of a fit marked."""
    from moesim.study.accuracy import KINDS, carried_cases, read_cases, score

    check(kind in KINDS, "--kind", "", "must be one of " + ", ".join(KINDS), kind)
    check(not measured or kind == "dispatch", "--measured", "", "goes with --kind dispatch", kind)
    check(not measured or cases is None, "--measured", "", "brings its own rows; leave --cases out", str(cases))
    if measured:
        from moesim.catalog.measured import SOURCE, measured_cases

        rows, owner = measured_cases(), SOURCE
    elif cases is not None:
        rows, owner = read_cases(cases, kind), str(cases)  # type: ignore[arg-type]
    else:
        rows, owner = carried_cases(kind), f"moesim's {kind} rows"  # type: ignore[arg-type]
    with working(call, f"Predicting {len(rows)} rows"):
        found = score(kind, rows, owner)  # type: ignore[arg-type]
    answer = Answer(
        inputs={"cases": str(cases) if cases else None, "kind": kind, "measured": measured},
        result=found.to_dict(),
        tables=_tables(found, owner),
        provenance=[{"part": "measurements", "kind": "measured", "source": owner}],
        warnings=_warnings(found),
        writes_own_files=True,
    )
    if call.out is not None:
        call.note("wrote " + ", ".join(map(str, _write(call.out, found, call, answer))))
    return answer


def _write(folder: Path, found: Accuracy, call: Call, answer: Answer) -> list[Path]:
    from moesim.report.accuracy_export import write_pages

    path = folder / "results.json"
    write_results(path, envelope_of(call.command, answer))
    return [path, *write_pages(found, folder)]


def _warnings(found: Accuracy) -> list[str]:
    told = []
    if found.not_expressed:
        first = found.not_expressed[0]
        count = f"{len(found.not_expressed)} rows have no prediction; --json and accuracy.md say why"
        told.append(f"{count}. The first, {first.id}: {first.reason}")
    if not found.rows:
        told.append("no row could be predicted")
    return told


def _tables(found: Accuracy, owner: str) -> list[Table]:
    """The errors together, by group, and the worst rows."""
    summary = found.summary()
    from moesim.report.accuracy_page import SUMMARISED

    parts: list[dict[str, Any]] = [summary[name] for name in SUMMARISED if summary[name] is not None]
    together = [_errors(part, part["name"].replace("_", " ")) for part in parts]
    groups = [_errors(group, group["name"])[:-1] for group in summary["groups"]]  # 80 columns: long names, no worst
    worst = [
        (row.id, f"{row.error_fraction:+.1%}", "fit" if row.used_in_fit else "in" if row.inside_envelope else "out")
        for row in found.rows[:SHOWN_ROWS]
    ]
    columns = ("", "Rows", "Median", "P90", "Bias", "Worst")
    return [
        Table(title=f"{found.kind}: {owner}", columns=columns, rows=together, right=columns[1:]),
        Table(title="Tested rows by group", columns=columns[:-1], rows=groups, right=columns[1:-1]),
        Table(
            title=f"The worst {len(worst)} of {len(found.rows)} rows",
            columns=("Row", "Error", "Envelope"),
            rows=worst,
            right=("Error",),
            note="in, out: of the envelope; fit: took part in a fit",
        ),
    ]


def _errors(part: dict[str, Any], name: str) -> tuple[str, ...]:
    return (
        name,
        str(part["num_rows"]),
        f"{part['median_absolute_error']:.1%}",
        f"{part['p90_absolute_error']:.1%}",
        f"{part['mean_error']:+.1%}",
        f"{part['worst_error']:+.1%}",
    )
