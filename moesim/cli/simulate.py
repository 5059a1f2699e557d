"""``moesim simulate`` and ``moesim trace``: one training step by the event engine, as tables or as a timeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moesim.cli.app import DEFAULT_QUESTION, ScenarioFile, app, examples
from moesim.cli.call import Call, verb
from moesim.cli.output import Answer, Table, envelope_of, fields_table, working, write_results
from moesim.errors import check

if TYPE_CHECKING:
    from moesim.metrics.step import StepResult
    from moesim.study.fits import WayToFit
    from moesim.study.gap import Gap

FitOption = Annotated[
    bool, typer.Option("--fit", help="Where it does not fit, say what would make it fit, and at what cost in time.")
]
GapOption = Annotated[
    bool, typer.Option("--gap", help="Tell what makes the step slower than the roofline, one thing after another.")
]
SIMULATE_EXAMPLES = examples(
    "moesim simulate",
    "moesim simulate --model mixtral-8x7b --cluster h100-8x-ib400 --num-gpus 64 --ep 8",
    "moesim simulate scenario.yaml --set routing.capacity_factor=1.25 --json --out out/step",
    "moesim simulate --model mixtral-8x7b --cluster h100-8x-ib400 --num-gpus 32 --micro-batch 4 --fit",
    DEFAULT_QUESTION,
)


@app.command(epilog=SIMULATE_EXAMPLES)
@verb(scenario=True, out_help="Write results.json and trace.json into this folder.")
def simulate(call: Call, scenario_file: ScenarioFile = None, fit: FitOption = False, gap: GapOption = False) -> Answer:
    """Simulate one training step: time, throughput, memory, load and drops."""
    from moesim.cli.question import scenario_of

    scenario = scenario_of(call, scenario_file)  # before the engine is loaded, so that a refusal comes at once
    from moesim.metrics.summary import summarise
    from moesim.timeline.step import run_step

    with working(call, f"Simulating {scenario.model.name} on {scenario.cluster.num_gpus:,} GPUs"):
        trace = run_step(scenario)
        step = summarise(trace)
    ways: tuple[WayToFit, ...] = ()
    if fit and not step.fits:
        from moesim.study.fits import ways_to_fit

        with working(call, "Trying what would make it fit"):
            ways = ways_to_fit(scenario)
    found: Gap | None = None
    if gap:
        from moesim.study.gap import explain_gap

        with working(call, "Running the step again with one thing added each time"):
            found = explain_gap(scenario)
    title = f"{scenario.model.name} on {scenario.cluster.num_gpus:,} x {scenario.cluster.gpu.name}: one training step"
    reasons = [f"not modelled or not validated: {reason}" for reason in step.envelope.get("reasons", [])]
    answer = Answer(
        inputs={"scenario": scenario.to_dict()},
        result={
            name: value for name, value in step.to_dict().items() if name not in ("scenario", "provenance", "warnings")
        }
        | ({"ways_to_fit": [way.to_dict() for way in ways]} if fit else {})
        | ({"gap": found.to_dict()} if found is not None else {}),
        tables=[
            *_step_tables(step, title, call.verbosity > 0),
            *_fit_tables(ways, asked=fit and not step.fits),
            *_gap_tables(found),
        ],
        provenance=[{"part": item.part, "kind": item.kind, "source": item.source} for item in step.provenance],
        warnings=[*step.warnings, *reasons],
        writes_own_files=True,
    )
    if call.out is not None:
        write_results(call.out / "results.json", envelope_of(call.command, answer))
        trace.write_chrome(call.out / "trace.json")
        call.note(f"wrote {call.out / 'results.json'} and {call.out / 'trace.json'}")
    return answer


def _gap_tables(gap: Gap | None) -> list[Table]:
    """From the roofline to the step, and the critical path of it."""
    from moesim.units import format_seconds

    if gap is None:
        return []
    added = gap.added_s
    rows = [(s.name, format_seconds(s.step_s), f"{added[s.name]:+.3g} s", s.words) for s in gap.steps]
    parts = sorted(gap.path.parts_s.items(), key=lambda item: -item[1])
    path = [(part.replace("_", " "), format_seconds(seconds)) for part, seconds in parts if seconds > 0]
    return [
        Table(title="From the roofline to this step", columns=("Step", "Takes", "Adds", "With"), rows=rows),
        Table(title="Along the critical path", columns=("Part", "Time"), rows=path),
    ]


def _step_tables(step: StepResult, title: str, with_sources: bool) -> list[Table]:
    """A step for a reader: headline, time by part, memory by part, pedigree of the numbers."""
    from moesim.metrics.part_words import part_in_words
    from moesim.units import format_bytes, format_seconds

    parts = [
        (name.replace("_", " "), format_seconds(seconds), f"{seconds / step.step_s:.1%}")
        for name, seconds in step.step_parts_s.items()
        if seconds > 0
    ]
    memory = [(name.removesuffix("_bytes"), format_bytes(size)) for name, size in step.memory.items()]
    columns = ("Part", "Time", "Share")
    if with_sources:
        told = [(part_in_words(item.part), item.kind, item.source) for item in step.provenance]
        pedigree = Table(title="Where the numbers come from", columns=("Part", "Kind", "Source"), rows=told)
    else:
        parts_of: dict[str, list[str]] = {}
        for item in step.provenance:
            parts_of.setdefault(item.kind, []).append(part_in_words(item.part))
        by_kind = [(kind, "; ".join(named)) for kind, named in parts_of.items()]
        pedigree = Table(title="What the numbers are (sources: -v)", columns=("Kind", "Parts"), rows=by_kind)
    return [
        fields_table(title, step.rows()),
        Table(title="Step time by part, mean over ranks", columns=columns, rows=parts, right=columns[1:]),
        Table(title="Memory of the fullest rank", columns=("Part", "Size"), rows=memory, right=("Size",)),
        pedigree,
    ]


def _fit_tables(ways: Sequence[WayToFit], *, asked: bool) -> list[Table]:
    """What would make a step fit, the cheapest first; nothing where nobody asked."""
    from moesim.units import format_bytes

    if not asked:
        return []
    columns = ("Change", "Step time", "Free", "What it means")
    rows = [(way.name, f"{way.cost_fraction:+.1%}", format_bytes(way.headroom_bytes), way.words) for way in ways] or [
        ("none of those tried", "", "", "it takes GPUs with more memory, or more of them")
    ]
    return [Table(title="What would make it fit", columns=columns, rows=rows, right=("Step time", "Free"))]


TRACE_EXAMPLES = examples(
    "moesim trace --model mixtral-8x7b --cluster h100-8x-ib400 --num-gpus 64 --ep 8 --out trace.json",
    "moesim trace scenario.yaml --trace-ranks 0,1,8",
    "Open the file at ui.perfetto.dev or in chrome://tracing.",
)


@app.command(epilog=TRACE_EXAMPLES)
@verb(scenario=True, out_help="The file to write (trace.json).")
def trace(
    call: Call,
    scenario_file: ScenarioFile = None,
    trace_ranks: Annotated[
        str,
        typer.Option(
            metavar="RANKS", help="representative (also the hottest of each stage), or ranks such as 0,1,8-15."
        ),
    ] = "representative",
    max_mb: Annotated[int, typer.Option(metavar="MB", help="Largest file.", min=1)] = 50,
) -> Answer:
    """Simulate one training step and write what each rank did, for Perfetto."""
    from moesim.cli.question import scenario_of
    from moesim.units import MEGA, format_bytes

    scenario = scenario_of(call, scenario_file)
    ranks = parse_ranks(trace_ranks, scenario.cluster.num_gpus)
    from moesim.timeline.step import run_step

    path = call.out or Path("trace.json")
    with working(call, f"Simulating {scenario.model.name} on {scenario.cluster.num_gpus:,} GPUs"):
        step = run_step(scenario, ranks or ())
        written = step.write_chrome(path, ranks=ranks, max_bytes=int(max_mb * MEGA))
    size_bytes = path.stat().st_size
    left_out = [rank for rank in ranks or step.representative_ranks() if rank not in written]
    return Answer(
        inputs={"scenario": scenario.to_dict(), "trace_ranks": trace_ranks, "max_mb": max_mb},
        result={"file": str(path), "size_bytes": size_bytes, "ranks": written, "ranks_left_out": left_out},
        tables=[
            fields_table(
                "Trace",
                [("File", str(path)), ("Size", format_bytes(size_bytes)), ("Ranks", ", ".join(map(str, written)))],
            )
        ],
        warnings=[f"{len(left_out)} ranks left out to stay under {max_mb} MB"] if left_out else [],
        writes_own_files=True,
    )


def parse_ranks(text: str, num_gpus: int) -> list[int] | None:
    """The ranks of a text such as ``0,1,8-15``; None for ``representative``. Raises InputError.

    >>> parse_ranks("0,8-10", 64)
    [0, 8, 9, 10]
    """
    if text == "representative":
        return None
    ranks: set[int] = set()
    rule = f"must be representative, or ranks below {num_gpus} such as 0,1,8-15"
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        check(first.isdecimal() and (last or first).isdecimal(), "--trace-ranks", "", rule, text)
        low, high = int(first), int(last or first)
        check(low <= high < num_gpus, "--trace-ranks", "", rule, text)
        ranks |= set(range(low, high + 1))
    return sorted(ranks)
