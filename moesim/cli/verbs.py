"""The verbs: each turns what was asked into an `Answer`. Heavy rooms are imported inside, so help comes at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli.call import Call, Verbs, show_version, verb
from moesim.cli.output import Answer, Table, envelope_of, fields_table, working, write_results
from moesim.errors import check

if TYPE_CHECKING:
    from moesim.metrics.step import StepResult
    from moesim.study.fits import WayToFit
    from moesim.study.gap import Gap

app = typer.Typer(
    name="moesim",
    cls=Verbs,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Try: moesim report --out out/report\n\nmoesim VERB --help shows a verb's options and examples.",
)
ScenarioFile = Annotated[
    Path | None,
    typer.Argument(
        metavar="[SCENARIO.yaml]", help="Scenario file; options given beside it overrule it.", show_default=False
    ),
]
FitOption = Annotated[
    bool, typer.Option("--fit", help="Where it does not fit, say what would make it fit, and at what cost in time.")
]
GapOption = Annotated[
    bool, typer.Option("--gap", help="Tell what makes the step slower than the roofline, one thing after another.")
]
DEFAULT_QUESTION = "Without a scenario, a model or a cluster it takes DeepSeek-V3 on 2,048 H800."


def _examples(*lines: str) -> str:
    return "\n\n".join(("Examples:", *lines))


@app.callback(invoke_without_command=True)
def moesim(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=show_version, is_eager=True)
    ] = False,
) -> None:
    """Plan clusters for Mixture-of-Experts models: skew, traffic, memory, step time, before you pay for GPUs."""
    if context.invoked_subcommand is None and not version:
        print(context.get_help())


@app.command(epilog=_examples("moesim models", "moesim models --json"))
@verb()
def models(_: Call) -> Answer:
    """List the model presets with their sizes."""
    from moesim.catalog.models import MODEL_NAMES, load_model
    from moesim.describe.counts import describe as describe_model
    from moesim.units import format_count

    found, rows = [], []
    for name in MODEL_NAMES:
        model = load_model(name)
        counted = describe_model(model, 4096)
        experts = "dense"
        if model.is_moe:
            moe: Any = model.layers[model.moe_layers[0]].ffn
            experts = f"{moe.num_experts} top-{moe.router.top_k}" + (" + shared" if moe.shared else "")
        found.append(
            {
                "name": name,
                "total_parameters": counted.total_parameters,
                "active_parameters": counted.active_parameters,
                "active_parameters_no_input_embedding": counted.active_parameters_no_input_embedding,
                "active_parameters_published": counted.active_parameters_published,
                "num_layers": len(model.layers),
                "num_moe_layers": len(model.moe_layers),
                "experts": experts,
                "hypothetical": model.hypothetical,
                "source": model.source,
            }
        )
        label = name + (" *" if model.hypothetical else "")
        rows.append(
            (
                label,
                format_count(counted.total_parameters),
                format_count(counted.active_parameters_published),
                str(len(model.layers)),
                experts,
            )
        )
    table = Table(
        title="Models",
        columns=("Name", "Parameters", "Active", "Layers", "Experts"),
        rows=rows,
        right=("Parameters", "Active", "Layers"),
        note="Active follows each publisher's convention (with or without the input embedding). * hypothetical design.",
    )
    return Answer(inputs={}, result={"models": found}, tables=[table])


@app.command(epilog=_examples("moesim gpus", "moesim gpus --json"))
@verb()
def gpus(_: Call) -> Answer:
    """List the GPUs: memory, peaks, links. Every number's source stands in --json."""
    from moesim.catalog.hardware import GPU_NAMES, load_gpu
    from moesim.units import GIB, GIGA, TERA

    known = [load_gpu(name) for name in GPU_NAMES]
    rows = [
        (
            gpu.name,
            f"{gpu.memory_bytes.value / GIB:.0f}",
            f"{gpu.memory_bytes_per_s.value / TERA:.2f}",
            f"{gpu.peak_flops_per_s['bf16'].value / TERA:,.0f}",
            f"{gpu.peak_flops_per_s['fp8'].value / TERA:,.0f}" if "fp8" in gpu.peak_flops_per_s else "-",
            f"{gpu.nvlink_bytes_per_s.value / GIGA:.0f}",
            f"{gpu.tdp_w.value:.0f}",
        )
        for gpu in known
    ]
    columns = ("Name", "GiB", "TB/s", "bf16 TFLOP/s", "fp8 TFLOP/s", "NVLink GB/s", "TDP W")
    note = "Dense peaks (no sparsity); NVLink per GPU and direction."
    table = Table(title="GPUs", columns=columns, rows=rows, right=columns[1:], note=note)
    return Answer(inputs={}, result={"gpus": known}, tables=[table])


@app.command(epilog=_examples("moesim clusters", "moesim clusters --json"))
@verb()
def clusters(_: Call) -> Answer:
    """List the clusters: GPUs, NVLink domain, NIC. Every number's source stands in --json."""
    from moesim.catalog.hardware import CLUSTER_NAMES, load_cluster
    from moesim.units import GIGA, MICRO

    known = [load_cluster(name) for name in CLUSTER_NAMES]
    rows = [
        (
            cluster.name,
            cluster.gpu.name,
            f"{cluster.num_gpus:,}",
            str(cluster.ranks_per_node),
            f"{cluster.nvlink_bytes_per_s.value / GIGA:.0f}",
            f"{cluster.nic_bytes_per_s.value / GIGA:.0f}",
            f"{cluster.latency_inter_s.value / MICRO:.1f}",
        )
        for cluster in known
    ]
    columns = ("Name", "GPU", "GPUs", "Domain", "NVLink GB/s", "NIC GB/s", "Latency us")
    note = "GPUs: the default (--num-gpus). Domain: GPUs joined by NVLink. Links per GPU and direction."
    table = Table(title="Clusters", columns=columns, rows=rows, right=columns[2:], note=note)
    return Answer(inputs={}, result={"clusters": known}, tables=[table])


@app.command(epilog=_examples("moesim describe mixtral-8x7b", "moesim describe my-design.yaml --seq-len 8192 --json"))
@verb()
def describe(
    _: Call,
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Preset, Hugging Face config.json, or design YAML.", show_default=False),
    ],
    seq_len: Annotated[
        int, typer.Option(metavar="TOKENS", help="Sequence length of the attention's FLOPs.", min=1)
    ] = 4096,
) -> Answer:
    """Count a model's parameters, FLOPs per token and weight bytes, part by part."""
    from moesim.catalog.models import load_model
    from moesim.describe.counts import describe as describe_model
    from moesim.units import format_bytes, format_count

    described = load_model(model)
    counted = describe_model(described, seq_len)
    headline = [
        ("Parameters", f"{counted.total_parameters:,} ({format_count(counted.total_parameters)})"),
        ("Active per token", f"{counted.active_parameters:,} ({format_count(counted.active_parameters)})"),
        ("Active, no input embedding", format_count(counted.active_parameters_no_input_embedding)),
        ("Forward FLOPs per token", f"{format_count(counted.flops_per_token_forward)} at {seq_len:,} tokens"),
        ("Weights in bf16", format_bytes(counted.weight_bytes)),
    ]
    columns = ("Part", "Parameters", "Active", "Forward FLOPs/token", "Weights")
    parts = Table(title="By part", columns=columns, rows=counted.rows(), right=columns[1:])
    title = described.name + (" (hypothetical)" if described.hypothetical else "")
    return Answer(
        inputs={"model": model, "seq_len": seq_len},
        result=counted.to_dict(),
        tables=[fields_table(title, headline), parts],
        provenance=[{"part": "model", "kind": "spec", "source": described.source}],
        warnings=described.notes,
    )


SIMULATE_EXAMPLES = _examples(
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
    from moesim.units import format_bytes, format_seconds

    parts = [
        (name.replace("_", " "), format_seconds(seconds), f"{seconds / step.step_s:.1%}")
        for name, seconds in step.step_parts_s.items()
        if seconds > 0
    ]
    memory = [(name.removesuffix("_bytes"), format_bytes(size)) for name, size in step.memory.items()]
    columns = ("Part", "Time", "Share")
    if with_sources:
        told = [(item.part, item.kind, item.source) for item in step.provenance]
        pedigree = Table(title="Where the numbers come from", columns=("Part", "Kind", "Source"), rows=told)
    else:
        kinds = dict.fromkeys(item.kind for item in step.provenance)
        by_kind = [(kind, ", ".join(item.part for item in step.provenance if item.kind == kind)) for kind in kinds]
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


TRACE_EXAMPLES = _examples(
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


REPORT_EXAMPLES = _examples(
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
    from moesim.cli.rendering import render_report

    if grid is not None:
        from moesim.cli.report_grid import render_reports

        return render_reports(call, notebook, scenario_file, params_file, grid, workers, resume)
    check(workers is None and not resume, "--workers, --resume", "", "go with --grid", None)
    return render_report(call, notebook, scenario_file, params_file)


CALIBRATE_EXAMPLES = _examples(
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
    from moesim.cli.rendering import run_calibration

    return run_calibration(call, device, model, quick, ranks)
