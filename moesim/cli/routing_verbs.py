"""The verb ``route``: where one step's tokens go, what they overload, and what is dropped."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli.app import ScenarioFile, app
from moesim.cli.call import Call, verb
from moesim.cli.output import Answer, Table, envelope_of, fields_table, working, write_results
from moesim.errors import check

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moesim.metrics.memory import MemoryOverSteps
    from moesim.routing.recorded import RecordedRouting
    from moesim.scenario import Scenario
    from moesim.study.balance import BalanceCurve
    from moesim.study.drops import NeededCapacity
    from moesim.study.recording import RecordingFacts
    from moesim.study.routed import RoutedLoad
    from moesim.study.skew import CostPoint, DropCurve

MOST_SHOWN = 10
REPLAY_TOKENS = 65536  # drawn where tokens are written and --replay does not say how many
EXAMPLES = (
    "Examples:",
    "moesim route --model mixtral-8x7b --cluster h100-8x-ib400 --num-gpus 64 --ep 8 --capacity-factor 1.25",
    "moesim route scenario.yaml --recorded routed_experts.npy --out out/route",
    "moesim route scenario.yaml --replay 100000 --out out/route",
    "moesim route --gini 0.4 --wanted-drop 0.001 --full --json",
    "Without a scenario, a model or a cluster it takes DeepSeek-V3 on 2,048 H800.",
)


@app.command(epilog="\n\n".join(EXAMPLES))
@verb(scenario=True, out_help="Write results.json and histogram.csv [step, layer, expert, tokens] into this folder.")
def route(
    call: Call,
    scenario_file: ScenarioFile = None,
    recorded: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Recorded routing instead of a popularity: router-replay .npy, .npz, .safetensors or .jsonl, or a "
            "histogram .csv or .parquet.",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Another recording of the same tokens: do they take the same experts?",
            show_default=False,
        ),
    ] = None,
    wanted_drop: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of assignments that may be dropped.", min=0.0, max=1.0)
    ] = 0.01,
    replay: Annotated[
        int,
        typer.Option(
            metavar="TOKENS", help="Also draw so many tokens and write routed_experts.npy into the folder.", min=0
        ),
    ] = 0,
    write: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Write the routing in this form (repeatable): tokens as .npy, .npz, .safetensors or .jsonl, a "
            "histogram as .csv or .parquet. Of a recording, the recording itself.",
            show_default=False,
        ),
    ] = None,
    training_steps: Annotated[
        int,
        typer.Option(metavar="N", help="Also simulate how balancing evens the load out over N steps.", min=0),
    ] = 0,
    learning_rate: Annotated[float, typer.Option(metavar="RATE", help="Of that training.")] = 3e-4,
    histogram_every: Annotated[
        int, typer.Option(metavar="N", help="Steps between two histograms of expert usage in it (--out).", min=1)
    ] = 1000,
    full: Annotated[
        bool, typer.Option("--full", help="Also simulate what skew and capacity do to step time and memory.")
    ] = False,
) -> Answer:
    """Route one training step: load of every expert, alerts, drops, padding, the capacity that is needed."""
    from moesim.cli.question import scenario_of

    scenario = scenario_of(call, scenario_file)
    from moesim.study.routed import as_recorded
    from moesim.study.routing import facts_of

    has_place = call.out is not None or bool(write)
    check(not replay or has_place, "--replay", "", "needs a folder to write into (--out), or a file (--write)", replay)
    check(not replay or recorded is None, "--replay", "", "draws from a popularity, not from --recorded", replay)
    scenario, rest = as_recorded(scenario, recorded)
    with working(call, f"Routing {scenario.model.name} on {scenario.cluster.num_gpus:,} GPUs"):
        load, result, tables = _routed(scenario, rest, wanted_drop, full=full)
        facts = facts_of(load, against)
        check(against is None or facts is not None, "--against", "", "needs a recording beside it", str(against))
        balancing = _balanced(scenario, training_steps, learning_rate, histogram_every)
    result["recording"] = None if facts is None else facts.to_dict()
    result["balancing"] = [curve.to_dict() for curve in balancing]
    source = None if load.source == "popularity" else load.source
    answer = Answer(
        inputs={"scenario": scenario.to_dict(), "recorded": source, "wanted_drop_fraction": wanted_drop},
        result=result,
        tables=[*tables, *_recording(facts), *_balancing(balancing)],
        provenance=[provenance_of(scenario.to_dict(), load)],
        warnings=warnings_of(result, load),
        writes_own_files=True,
    )
    _write_files(call, answer, scenario, load, balancing, files=write or [], replay=replay)
    return answer


def _routed(
    scenario: Scenario, rest: str | Path | RecordedRouting | None, wanted_drop: float, *, full: bool
) -> tuple[RoutedLoad, dict[str, Any], list[Table]]:
    """(load, result, tables) of one step; with ``full`` what skew and capacity cost beside them."""
    from moesim.study.drops import needed_capacity
    from moesim.study.routed import routed_load
    from moesim.study.routing import routing_study
    from moesim.study.skew import drop_curves

    costs: list[Table] = []
    if full:
        study = routing_study(scenario, wanted_drop_fraction=wanted_drop, recorded=rest)
        load, needed, curves, result = study.load, study.needed, study.drop_curves, study.to_dict()
        costs = [_cost_table(study.over_skew), _memory_table(study.memory)]
    else:
        load, popularities = routed_load(scenario, rest)
        needed = needed_capacity(scenario, popularities, wanted_drop)
        curves = tuple(drop_curves(scenario, popularities, ginis=()))
        result = load.to_dict() | {
            "needed_capacity": dataclasses.asdict(needed),
            "drop_curves": [dataclasses.asdict(curve) for curve in curves],
        }
    title = f"{scenario.model.name} on {scenario.cluster.num_gpus:,} x {scenario.cluster.gpu.name}: routing of one step"
    own = next(curve for curve in curves if curve.asked)
    first = fields_table(title, headline(result, load, needed))
    return load, result, [first, *_alerts(result), _drop_table(own), *costs]


def _balanced(scenario: Scenario, num_steps: int, learning_rate: float, histogram_every: int) -> list[BalanceCurve]:
    """How balancing evens the load out over so many steps; nothing of none."""
    from moesim.study.balance import balance_over_training

    if not num_steps:
        return []
    return balance_over_training(
        scenario, num_steps=num_steps, learning_rate=learning_rate, histogram_every=histogram_every
    )


def _write_files(
    call: Call,
    answer: Answer,
    scenario: Scenario,
    load: RoutedLoad,
    balancing: Sequence[BalanceCurve],
    *,
    files: Sequence[Path],
    replay: int,
) -> None:
    """The files named, and in the folder the results, the load, balancing and the replay."""
    from moesim.report.routing_export import write_balancing
    from moesim.routing.histogram import write_histogram
    from moesim.study.routed import write_routing_file

    written = [write_routing_file(file, scenario, load, replay or REPLAY_TOKENS) for file in files]
    if call.out is not None:
        results, histogram = call.out / "results.json", call.out / "histogram.csv"
        write_results(results, envelope_of(call.command, answer))
        write_histogram(load.histogram, histogram)
        written += [results, histogram, *write_balancing(balancing, call.out)]
        if replay:
            written.append(write_routing_file(call.out / "routed_experts.npy", scenario, load, replay))
    if written:
        call.note("wrote " + ", ".join(map(str, written)))


def provenance_of(scenario: dict[str, Any], load: RoutedLoad) -> dict[str, str]:
    """Where the load came from: assumed popularity, or a recording."""
    if load.source != "popularity":
        return {"part": "expert load", "kind": "measured", "source": load.source}
    asked = f"routing.popularity of the scenario: {scenario['routing']['popularity']}"
    return {"part": "expert load", "kind": "assumed", "source": asked}


def warnings_of(result: dict[str, Any], load: RoutedLoad) -> list[str]:
    """What a reader should not miss: crowded, idle or few experts, many drops."""
    found = []
    if result["alerts"]:
        worst = result["alerts"][0]
        found.append(
            f"{len(result['alerts'])} experts take over 3 times their layer's mean; the worst is expert "
            f"{worst['expert']} of layer {worst['layer']} with {worst['ratio']:.1f} times"
        )
    if result["dead_experts"]:
        found.append(f"{len(result['dead_experts'])} experts get under 1 % of their layer's mean")
    if result["collapsed_experts"]:
        from moesim.report.routing_sentences import collapse_in_words

        found.append(collapse_in_words(len(result["collapsed_experts"])))
    if load.drop_fraction > 0.05:
        found.append(f"{load.drop_fraction:.1%} of all assignments are dropped")
    return found


def headline(result: dict[str, Any], load: RoutedLoad, needed: NeededCapacity) -> list[tuple[str, str]]:
    """The routing in numbers, worded for a reader."""
    experts = len(load.layers) * load.num_experts
    return [
        ("Gini of the load, mean over layers", f"{result['gini']:.3f}"),
        ("Entropy, of the largest possible", f"{result['entropy']:.1%}"),
        ("Coefficient of variation", f"{result['cv']:.3f}"),
        ("Busiest expert over the mean, worst layer", f"{result['max_mean']:.2f}x (MaxVio {result['max_vio']:.2f})"),
        ("Active experts, worst layer", f"{result['num_active_experts']} of {load.num_experts}"),
        ("Experts over 3x the mean", f"{len(result['alerts']):,} of {experts:,}"),
        ("Busiest rank over the mean, per micro-batch", f"{result['busiest_rank_ratio']:.2f}x"),
        ("Dropped assignments", f"{load.drop_fraction:.2%}"),
        ("Tokens' worth lost per step, mean layer", f"{result['tokens_lost_per_step']:,.0f}"),
        ("Empty share of padded buffers", "none padded" if load.places is None else f"{load.padding_fraction:.1%}"),
        (
            f"Capacity factor for at most {needed.wanted_drop_fraction:.2%} drops",
            f"{needed.capacity_factor:.2f} ({needed.worst_layer_capacity_factor:.2f} for the worst layer)",
        ),
        ("Load from", load.source),
    ]


def _alerts(result: dict[str, Any]) -> list[Table]:
    alerts = result["alerts"]
    if not alerts:
        return []
    rows = [(str(alert["layer"]), str(alert["expert"]), f"{alert['ratio']:.2f}x") for alert in alerts[:MOST_SHOWN]]
    note = f"The {MOST_SHOWN} busiest of {len(alerts)}; all in --json." if len(alerts) > MOST_SHOWN else ""
    columns = ("Layer", "Expert", "Over the mean")
    return [Table(title="Experts over 3x the mean", columns=columns, rows=rows, right=columns, note=note)]


def _drop_table(curve: DropCurve) -> Table:
    rows = [
        (f"{point.capacity_factor:g}", f"{point.drop_fraction:.2%}", f"{point.padding_fraction:.1%}")
        for point in curve.points
    ]
    columns = ("Capacity factor", "Dropped", "Empty")
    title = "Drops and empty room over capacity factors (expected)"
    return Table(title=title, columns=columns, rows=rows, right=columns)


def _recording(facts: RecordingFacts | None) -> list[Table]:
    """What was recorded, before anything is drawn from it."""
    if facts is None:
        return []
    rows = [("Steps", f"{facts.num_steps:,}"), ("Steps with an expert over 3x the mean", f"{facts.alert_steps:,}")]
    rows.append(("Steps with an expert that takes over", f"{facts.collapse_steps:,}"))
    if facts.num_tokens is not None:
        rows.insert(0, ("Tokens", f"{facts.num_tokens:,}"))
    if facts.first_repeat is not None:
        chance = f"{facts.first_repeat:.1%} ({facts.first_repeat_chance:.1%} if shuffled)"
        rows.append(("First expert is the previous token's", chance))
    for size, active in facts.active_experts:
        rows.append((f"Active experts of {size} tokens", f"{active:.1f} of {len(facts.counts_LE[0])}"))
    for pair in facts.pairs[:1]:
        one, other = pair.experts
        words = f"{one} and {other} of layer {pair.layer}, {pair.lift:.1f}x as often as chance"
        rows.append(("Experts that most meet", words))
    if facts.consistency is not None:
        same = facts.consistency
        rows.append((f"Experts shared with {same.against}", f"{same.overlap:.1%} (by chance {same.chance:.1%})"))
        rows.append(("Tokens with the same experts, the same first", f"{same.exact:.1%}, {same.first:.1%}"))
    return [fields_table("What was recorded", rows)]


def _balancing(curves: Sequence[BalanceCurve]) -> list[Table]:
    """How even each policy makes the load over training, and what it costs until then."""
    from moesim.units import format_seconds

    rows = [
        (
            curve.policy.replace("_", " "),
            f"{curve.final_max_vio:.2f}",
            "never" if curve.steps_until_balanced is None else f"{curve.steps_until_balanced:,}",
            "never" if curve.first_collapse_step is None else f"{curve.first_collapse_step:,}",
            format_seconds(curve.lost_s),
        )
        for curve in curves
    ]
    columns = ("Policy", "MaxVio at the end", "Balanced from step", "First collapse", "Lost at first")
    note = "Fitted on one published run of a 1B model. Lost: waiting in the first 24 hours, or all steps if fewer."
    title = "Balance over training"
    return [Table(title=title, columns=columns, rows=rows, right=columns[1:], note=note)] if rows else []


def _cost_table(points: tuple[CostPoint, ...]) -> Table:
    from moesim.units import format_bytes, format_seconds

    rows = [
        (
            f"{point.gini:.2f}" + (" (asked)" if point.popularity == "asked" else ""),
            "none" if point.capacity_factor is None else f"{point.capacity_factor:g}",
            format_seconds(point.step_s),
            format_seconds(point.wait_s),
            f"{point.drop_fraction:.1%}",
            format_bytes(point.peak_bytes),
        )
        for point in points
    ]
    columns = ("Gini", "Capacity", "Step", "Waiting", "Dropped", "Peak memory")
    return Table(title="Step time and memory over skew", columns=columns, rows=rows, right=columns)


def _memory_table(found: tuple[MemoryOverSteps, ...]) -> Table:
    from moesim.units import format_bytes

    words = {"counts": "consecutive steps", "favourites": "other favourites", "drift": "drifting favourites"}
    rows = [
        (
            words[memory.redraw],
            *(format_bytes(size) for size in (memory.p50_bytes, memory.p90_bytes, memory.p99_bytes)),
            f"{memory.out_of_memory_fraction:.2%}",
        )
        for memory in found
    ]
    columns = ("Over", "P50", "P90", "P99", "Out of memory")
    return Table(title="Peak memory of the fullest GPU over steps", columns=columns, rows=rows, right=columns[1:])
