"""The verb ``goodput``: a run of weeks on machines that fail, in days, money and energy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli.app import ScenarioFile, app
from moesim.cli.call import Call, verb
from moesim.cli.output import Answer, Table, fields_table, working
from moesim.errors import InputError

if TYPE_CHECKING:
    from moesim.study.goodput import GoodputStudy, Range

EXAMPLES = (
    "Examples:",
    "moesim goodput --tokens 14.8e12",
    "moesim goodput scenario.yaml --tokens 2e12 --price 2.10 --currency EUR --inspected --spares 4",
    "moesim goodput --model mixtral-8x7b --cluster h100-8x-ib400 --num-gpus 256 --ep 8 --checkpoint-interval 30min "
    "--checkpoint-rate '20 GB/s'",
    "Prices are yours: without --price nothing is priced. Energy is the GPUs' TDP (and --host-watts) times PUE.",
)


@app.command(epilog="\n\n".join(EXAMPLES))
@verb(scenario=True)
def goodput(
    call: Call,
    scenario_file: ScenarioFile = None,
    tokens: Annotated[float, typer.Option(metavar="N", help="Tokens to train.")] = 1e12,
    fleet: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="Whose machines fail alike: unknown (between all), or a published cluster's."
        ),
    ] = "unknown",
    inspected: Annotated[
        bool, typer.Option("--inspected", help="Machines are watched: failures are known within a minute or so.")
    ] = False,
    spares: Annotated[
        int | None, typer.Option(metavar="N", help="Servers of 8 in reserve; by default one of 100.", min=0)
    ] = None,
    checkpoint_interval: Annotated[
        str | None, typer.Option(metavar="TIME", help="Such as 30min; by default the best.", show_default=False)
    ] = None,
    checkpoint_rate: Annotated[
        str | None, typer.Option(metavar="RATE", help="What storage takes from the job, such as '57 GB/s'.")
    ] = None,
    synchronous: Annotated[
        bool, typer.Option("--synchronous", help="Training stands still while a checkpoint is written.")
    ] = False,
    ramp_tokens: Annotated[float, typer.Option(metavar="N", help="Tokens over which the batch grows.")] = 0.0,
    ramp_batch: Annotated[
        int | None, typer.Option(metavar="N", help="Sequences of the first steps of that ramp.", show_default=False)
    ] = None,
    price: Annotated[
        float | None, typer.Option(metavar="X", help="Price of a GPU for an hour.", show_default=False)
    ] = None,
    currency: Annotated[str, typer.Option(metavar="NAME", help="Of the price.")] = "USD",
    pue: Annotated[float, typer.Option(metavar="X", help="Power of the building over that of its machines.")] = 1.25,
    host_watts: Annotated[float, typer.Option(metavar="W", help="Host and network, for each GPU.")] = 0.0,
    runs: Annotated[int, typer.Option(metavar="N", help="Runs that ranges are over.")] = 32,
) -> Answer:
    """Train to a number of tokens, failures and all: days, GPU-hours, cost and energy, each with its range."""
    from moesim.cli.question import scenario_of
    from moesim.study.goodput import RunPlan, goodput_study

    plan = RunPlan(
        tokens=tokens,
        fleet=fleet,
        inspected=inspected,
        num_spares=spares,
        checkpoint_interval_s=_quantity(checkpoint_interval, "s", "--checkpoint-interval"),
        checkpoint_write_bytes_per_s=_quantity(checkpoint_rate, "bytes_per_s", "--checkpoint-rate"),
        checkpoint_async=not synchronous,
        ramp_tokens=ramp_tokens,
        ramp_batch=ramp_batch,
        price_per_gpu_hour=price,
        currency=currency,
        pue=pue,
        host_w_per_gpu=host_watts,
        num_runs=runs,
    )
    scenario = scenario_of(call, scenario_file)
    with working(call, f"Training {tokens:.3g} tokens {runs} times"):
        study = goodput_study(scenario, plan)
    return Answer(
        inputs={"scenario": scenario.raw, "plan": dataclasses.asdict(plan)},
        result=study.to_dict(),
        tables=_tables(study),
        provenance=_provenance(study),
        warnings=_warnings(study),
    )


def _quantity(text: str | None, dimension: str, flag: str) -> float | None:
    from moesim.units import parse_quantity

    if text is None:
        return None
    try:
        return parse_quantity(text, dimension)
    except ValueError as error:
        raise InputError(flag, "", f"must be {error}", text) from None


def _provenance(study: GoodputStudy) -> list[Mapping[str, Any]]:
    from moesim.catalog.failures import sources

    own = [{"part": part, "kind": kind, "source": source} for part, kind, source in sources()]
    return [*own, {"part": "spread of step times", "kind": "measured", "source": study.model_error_told}]


def _warnings(study: GoodputStudy) -> list[str]:
    from moesim.metrics.scored import accuracy_warning

    told = [accuracy_warning(study.scenario)]
    if study.cost is None:
        told.append("nothing is priced: give --price, in the currency and of the day that you pay")
    return [text for text in told if text]


def _tables(study: GoodputStudy) -> list[Table]:
    from moesim.units import DAY_S, format_bytes, format_count, format_seconds

    def told(found: Range, form: str) -> tuple[str, str, str]:
        return format(found.p10, form), format(found.p50, form), format(found.p90, form)

    rows = [
        ("Days", *told(study.days, ",.1f")),
        ("Step [s]", *told(study.step_s, ",.2f")),
        ("Kept of all time", *told(study.goodput_fraction, ".1%")),
        ("Unexpected interruptions", *told(study.failures, ",.0f")),
        ("GPU-hours, spares included", *told(study.gpu_hours, ",.0f")),
        ("Energy [kWh]", *told(study.energy_kwh, ",.0f")),
    ]
    if study.cost is not None:
        rows.append((f"Cost [{study.plan.currency}]", *told(study.cost, ",.0f")))
    scenario, plan = study.scenario, study.plan
    columns = ("", "P10", "P50", "P90")
    lost = {part: share for part, share in study.parts_fraction.items() if part != "training" and share >= 5e-5}
    checkpoints = [
        ("Holds", f"{format_bytes(study.checkpoint_bytes)}, safe after {format_seconds(study.checkpoints.write_s)}"),
        ("Training stands still", format_seconds(study.checkpoints.stall_s)),
        ("Every", f"{format_seconds(study.checkpoints.interval_s)} of training"),
        ("Best", f"{format_seconds(study.best_interval_s)} (Young {format_seconds(study.young_interval_s)}, Daly "
         f"{format_seconds(study.daly_interval_s)}; never before the last one is safe)"),
        ("A failure every", format_seconds(study.mean_time_between_failures_s)),
    ]  # fmt: skip
    return [
        Table(
            title=f"{format_count(plan.tokens)} tokens of {scenario.model.name} on {scenario.cluster.num_gpus:,} GPUs",
            columns=columns,
            rows=rows,
            right=columns[1:],
            note=f"Without failures {study.ideal_s / DAY_S:,.1f} days. Ranges over {plan.num_runs} runs; steps spread "
            f"as {study.model_error_told}.",
        ),
        fields_table(
            "Where the other time goes", [(part.capitalize(), f"{share:.2%}") for part, share in lost.items()]
        ),
        fields_table("Checkpoints", checkpoints),
    ]
