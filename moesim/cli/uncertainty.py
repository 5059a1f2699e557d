"""The verb ``uncertainty``: how sure a prediction is, and what it would take to be surer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli.app import ScenarioFile, app
from moesim.cli.call import Call, verb
from moesim.cli.output import Answer, Table, working
from moesim.errors import check

if TYPE_CHECKING:
    from moesim.study.uncertainty import Pair, UncertaintyStudy

EXAMPLES = (
    "Examples:",
    "moesim uncertainty --tokens 14.8e12 --price 1.8..2.6",
    "moesim uncertainty scenario.yaml --tokens 2e12 --nic 0.7..1.0 --efficiency 0.9..1.05 --failure-rate 2..7",
    "moesim uncertainty today.yaml --against tomorrow.yaml",
    "A range LOW..HIGH is P10 and P90 of a log-normal law. Where the scenario gives no popularity, its Gini lies "
    "anywhere from 0.10 to 0.38.",
)
WORDS: Mapping[str, tuple[str, str]] = {
    "step_s": ("Step [s]", ",.3g"),
    "tokens_per_s_per_gpu": ("Tokens per second and GPU", ",.0f"),
    "mfu": ("MFU (causal attention)", ".1%"),
    "peak_bytes": ("Peak memory, worst rank [GiB]", ",.1f"),
    "days": ("Days", ",.1f"),
    "gpu_hours": ("GPU-hours", ",.0f"),
    "cost": ("Cost", ",.0f"),
}
RangeText = str | None


@app.command(epilog="\n\n".join(EXAMPLES))
@verb(scenario=True)
def uncertainty(
    call: Call,
    scenario_file: ScenarioFile = None,
    tokens: Annotated[
        float | None, typer.Option(metavar="N", help="Tokens to train, for days, GPU-hours and cost.")
    ] = None,
    price: Annotated[RangeText, typer.Option(metavar="RANGE", help="Of a GPU for an hour, such as 2..3.")] = None,
    currency: Annotated[str, typer.Option(metavar="NAME", help="Of the price.")] = "USD",
    gini_range: Annotated[RangeText, typer.Option(metavar="RANGE", help="Skew of the experts' load.")] = None,
    nic: Annotated[RangeText, typer.Option(metavar="RANGE", help="Rate of NICs over the catalog's.")] = None,
    efficiency: Annotated[
        RangeText, typer.Option(metavar="RANGE", help="Speed of arithmetic over the predicted one.")
    ] = None,
    failure_rate: Annotated[
        RangeText, typer.Option(metavar="RANGE", help="Failures of 1,000 servers of 8 in a day.")
    ] = None,
    fleet: Annotated[str, typer.Option(metavar="NAME", help="Whose machines fail alike, as for goodput.")] = "unknown",
    ramp_tokens: Annotated[float, typer.Option(metavar="N", help="Tokens over which the batch grows.")] = 0.0,
    ramp_batch: Annotated[int | None, typer.Option(metavar="N", help="Sequences of that ramp's first steps.")] = None,
    no_model_error: Annotated[
        bool, typer.Option("--no-model-error", help="Leave out what measured steps took over their predictions.")
    ] = False,
    draws: Annotated[int, typer.Option(metavar="N", help="Draws that ranges are over.")] = 1000,
    seeds: Annotated[int, typer.Option(metavar="N", help="Seeds of the engine, at each of three skews.")] = 4,
    against: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Another scenario, compared draw by draw.", show_default=False)
    ] = None,
) -> Answer:
    """P10, P50 and P90 of a step and of a run, what widens them most; or two scenarios compared draw by draw."""
    from moesim.cli.question import scenario_of
    from moesim.study.goodput import RunPlan
    from moesim.study.uncertainty import GINI, NIC, UncertaintyPlan, compare, uncertainty_study
    from moesim.study.uncertainty_inputs import spread_of

    check(tokens is not None or price is None, "--price", "", "needs --tokens", price)
    run = (
        None
        if tokens is None
        else RunPlan(tokens=tokens, fleet=fleet, currency=currency, ramp_tokens=ramp_tokens, ramp_batch=ramp_batch)
    )
    given = {
        flag: None if text is None else spread_of(text, flag)
        for flag, text in {
            "--price": price,
            "--gini-range": gini_range,
            "--nic": nic,
            "--efficiency": efficiency,
            "--failure-rate": failure_rate,
        }.items()
    }
    files = [scenario_file] if against is None else [scenario_file, against]
    studies = []
    for file in files:
        scenario = scenario_of(call, file)
        plan = UncertaintyPlan(
            run=run,
            gini=given["--gini-range"] or (None if _says_popularity(call, file) else GINI),
            nic=given["--nic"] or NIC,
            efficiency=given["--efficiency"],
            failures_per_thousand_server_days=given["--failure-rate"],
            price_per_gpu_hour=given["--price"],
            model_error=not no_model_error,
            num_draws=draws,
            num_seeds=seeds,
        )
        with working(call, f"Drawing {scenario.model.name} on {scenario.cluster.num_gpus:,} GPUs"):
            studies.append(uncertainty_study(scenario, plan))
    pairs = compare(*studies) if against is not None else ()
    tables = [table for study in studies for table in _tables(study, currency)]
    return Answer(
        inputs={"scenario": studies[0].scenario.to_dict(), "plan": studies[0].plan}
        | ({"against": studies[1].scenario.to_dict()} if pairs else {}),
        result=studies[0].to_dict() | ({"against": studies[1].to_dict(), "pairs": list(pairs)} if pairs else {}),
        tables=[*tables, *([_pair_table(pairs)] if pairs else [])],
        provenance=_provenance(studies[0]),
        warnings=_warnings(studies),
    )


def _provenance(study: UncertaintyStudy) -> list[dict[str, str]]:
    return [
        {"part": unknown.words, "kind": "assumed" if unknown.source == "given" else "measured"}
        | {"source": unknown.source}
        for unknown in study.unknowns
    ]


def _warnings(studies: Sequence[UncertaintyStudy]) -> list[str]:
    return [
        f"only {study.fits_fraction:.0%} of draws fit into {study.scenario.cluster.gpu.name}'s memory"
        for study in studies
        if study.fits_fraction < 1
    ]


def _says_popularity(call: Call, file: Path | None) -> bool:
    """Whether the question itself says how uneven experts are."""
    from moesim.cli.question import mapping_of, typed_parameters
    from moesim.door.files import read_yaml

    raw = read_yaml(file) if file is not None else {}
    routing: Any = mapping_of(call, raw, typed_parameters(call)).get("routing") or {}
    return bool(routing.get("popularity") or routing.get("recording"))


def _tables(study: UncertaintyStudy, currency: str) -> list[Table]:
    scenario, plan = study.scenario, study.plan
    rows = []
    for name, found in study.ranges.items():
        words, form = WORDS[name]
        label = f"{words} [{currency}]" if name == "cost" else words
        rows.append((label, *(format(_shown(name, value), form) for value in (found.p10, found.p50, found.p90))))
    title = f"{scenario.model.name} on {scenario.cluster.num_gpus:,} x {scenario.cluster.gpu.name}"
    columns = ("", "P10", "P50", "P90")
    ranges = Table(
        title=title,
        columns=columns,
        rows=rows,
        right=columns[1:],
        note=f"Over {plan.num_draws:,} draws. As predicted, nothing drawn: a step of {study.step.step_s:,.3g} s. Model "
        f"error: {study.told}.",
    )
    metric = study.headline
    words, form = WORDS[metric]
    drawn = {unknown.name: unknown for unknown in study.unknowns}
    told = [
        (
            bar.unknown,
            f"{drawn[bar.unknown].p10:.3g} to {drawn[bar.unknown].p90:.3g}",
            *(format(_shown(metric, value), form) for value in (bar.at_p10, bar.at_p90)),
        )
        for bar in study.tornado(metric)
    ]
    heads = ("Unknown", "P10 to P90", "at its P10", "at its P90")
    note = "; ".join(f"{unknown.name}: {unknown.words}" for unknown in study.unknowns)
    matters = Table(title=f"What matters most: {words}", columns=heads, rows=told, right=heads[1:], note=note)
    return [ranges, matters]


def _shown(name: str, value: float) -> float:
    from moesim.units import GIB

    return value / GIB if name == "peak_bytes" else value


def _pair_table(pairs: tuple[Pair, ...]) -> Table:
    columns = ("Second over first", "P10", "P50", "P90", "Second is better in")
    rows = [
        (
            WORDS[pair.metric][0],
            *(f"{value:.3f}" for value in (pair.ratio.p10, pair.ratio.p50, pair.ratio.p90)),
            f"{pair.second_better_fraction:.0%} of draws",
        )
        for pair in pairs
    ]
    return Table(
        title="The second against the first, draw by draw",
        columns=columns,
        rows=rows,
        right=columns[1:],
        note="Both meet the same luck; where the same measured steps stand behind both, moesim is taken to err alike.",
    )
