"""The verb ``plan``: of all layouts on all clusters allowed, the cheapest and the fastest, and why the others lost."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli.app import app
from moesim.cli.call import DONE, GATE_FAILED, Call, verb
from moesim.cli.output import Answer, Table, fields_table, working
from moesim.errors import InputError, check

if TYPE_CHECKING:
    from moesim.study.plan import Plan
    from moesim.study.plan_points import PlanPoint
    from moesim.study.plan_question import Offer, PlanQuestion

EXAMPLES = (
    "Examples:",
    "moesim plan --model deepseek-v3 --precision fp8 --global-batch 15360 --tokens 14.8e12 --deadline 60d --cluster "
    "h800-8x-ib400 --cluster h200-8x-ib400 --cluster b200-8x-ib400 --max-gpus 4096",
    "moesim plan --model mixtral-8x7b --global-batch 1024 --tokens 1e12 --cluster h100-8x-ib400 --max-gpus 256 --price "
    "2.10 --budget 400000 --min-mfu 0.3 --ep 8",
    "moesim plan plan.yaml --axis 'zero=[1, 2]' --json",
    "plan.yaml: base (a scenario file's name, or what would stand in one), tokens, clusters (names, or name, "
    "price_per_gpu_hour, max_gpus), max_gpus, min_gpus, limits (deadline_s, budget, memory_headroom_fraction, "
    "drop_fraction, mfu), axes (names to lists).",
    "Parallel sizes, micro-batch, recomputation, dispatcher and placement that are given stay as they are; the others "
    "are searched. Prices are yours: without them plans are ranked by GPU-hours. Exit status 1 where no plan keeps all "
    "limits; the nearest miss is told.",
)
MOST_SHOWN = 1.5  # times the cheapest's price: what is dearer is told to programs only


@app.command(epilog="\n\n".join(EXAMPLES))
@verb(scenario=True)
def plan(
    call: Call,
    file: Annotated[
        Path | None, typer.Argument(metavar="PLAN.yaml", help="What is asked; options overrule it.", show_default=False)
    ] = None,
    tokens: Annotated[float | None, typer.Option(metavar="N", help="Tokens to train.", show_default=False)] = None,
    deadline: Annotated[
        str | None, typer.Option(metavar="TIME", help="Such as 60d: the run is to be over by then.", show_default=False)
    ] = None,
    budget: Annotated[
        float | None, typer.Option(metavar="X", help="At most, in the prices' currency.", show_default=False)
    ] = None,
    cluster: Annotated[
        list[str] | None, typer.Option(metavar="NAME|FILE", help="A kind that may be had. Repeatable.")
    ] = None,
    max_gpus: Annotated[
        int | None, typer.Option(metavar="N", help="Of one cluster, at most.", show_default=False)
    ] = None,
    min_gpus: Annotated[
        int | None, typer.Option(metavar="N", help="Of one cluster, at least.", show_default=False)
    ] = None,
    price: Annotated[
        list[str] | None, typer.Option(metavar="[NAME=]X", help="Of a GPU for an hour. Repeatable.")
    ] = None,
    currency: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of prices and budget (USD).", show_default=False)
    ] = None,
    headroom: Annotated[
        float | None,
        typer.Option(metavar="X", help="Share of a GPU's memory that stays free (0.05).", show_default=False),
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option(metavar="X", help="Share of assignments dropped, at most.", show_default=False)
    ] = None,
    min_mfu: Annotated[
        float | None, typer.Option(metavar="X", help="Model FLOPs utilisation, at least.", show_default=False)
    ] = None,
    axis: Annotated[
        list[str] | None, typer.Option(metavar="NAME=[V,V...]", help="Try these values of a setting. Repeatable.")
    ] = None,
    goodput: Annotated[
        bool, typer.Option("--goodput", help="Interruptions too, of the cheapest and the fastest (slow).")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", help="Processes; by default two, or the cores.", min=1, show_default=False),
    ] = None,
) -> Answer:
    """Find the cheapest and the fastest layout to train a number of tokens, and tell why the others lost."""
    from moesim.study.plan import plan as find_plan
    from moesim.study.plan_reasons import rejections
    from moesim.study.sweep_workers import processes

    limits = {
        "deadline_s": _deadline(deadline),
        "budget": budget,
        "memory_headroom_fraction": headroom,
        "drop_fraction": max_drop,
        "mfu": min_mfu,
    }
    given = {"tokens": tokens, "max_gpus": max_gpus, "min_gpus": min_gpus, "currency": currency}
    question = _question(call, file, given, limits, cluster or [], price or [], axis or [])
    num = workers or min(2, os.cpu_count() or 1)
    with ExitStack() as stack:
        stack.enter_context(working(call, "Searching"))
        executor = stack.enter_context(processes(num)).executor
        found = find_plan(question, executor, call.note)
    runs = _goodput(found, call) if goodput else {}
    rejected = rejections(found)
    return Answer(
        inputs=_inputs(question),
        result=_result(found, rejected, runs),
        tables=_tables(found, rejected, runs),
        warnings=_warnings(found, runs),
        exit_status=DONE if found.cheapest is not None else GATE_FAILED,
        run={
            "configs_per_s": round(found.configs_per_s, 1),
            "pruned_per_s": round(found.num_pruned / found.search_s, 1),
            "search_s": round(found.search_s, 3),
        },
    )


def _result(found: Plan, rejected: Sequence[Mapping[str, Any]], runs: Mapping[str, Any]) -> dict[str, Any]:
    from moesim.study.plan_reasons import remedies

    nearest = found.nearest
    return {
        "cheapest": found.cheapest and found.cheapest.to_dict(),
        "fastest": found.fastest and found.fastest.to_dict(),
        "pareto": [point.to_dict() for point in found.pareto],
        "rejected": rejected,
        "num_rejected": dict(found.num_rejected),
        "refusals": dict(found.refusals),
        "fallen": [point.to_dict() | {"misses": point.misses} for point in found.fallen],
        "nearest": nearest and nearest.to_dict() | {"misses": nearest.misses, "remedies": remedies(found)},
        "num_families": found.num_families,
        "num_evaluated": found.num_evaluated,
        "num_pruned": found.num_pruned,
        "num_confirmed": found.num_confirmed,
        "ranked_by": "cost" if found.question.is_priced else "gpu_hours",
        "goodput": {name: study.to_dict() for name, study in runs.items()},
    }


def _question(
    call: Call,
    file: Path | None,
    given: Mapping[str, Any],
    limits: Mapping[str, Any],
    clusters: Sequence[str],
    prices: Sequence[str],
    axes: Sequence[str],
) -> PlanQuestion:
    """The file's question with the options laid over it. Raises InputError."""
    from moesim.cli.question import mapping_of, typed_parameters
    from moesim.door.parse import parse_as
    from moesim.study.plan_question import Limits, Offer, PlanFile, PlanQuestion, read_plan, without_axes
    from moesim.study.sweep_file import base_mapping

    asked = PlanFile() if file is None else read_plan(file)
    raw, folder = base_mapping(asked.base, file.parent if file is not None else None)
    raw, fixed = without_axes(mapping_of(call, raw, typed_parameters(call)))
    own_cluster, own_gpus = raw.pop("cluster", None), fixed.get("num_gpus", (None,))[0]
    offers = tuple(Offer(name=name) for name in clusters) or asked.offers
    offers = offers or ((Offer(name=own_cluster),) if own_cluster is not None else ())
    for name, value in (("tokens", given["tokens"] or asked.tokens), ("max_gpus", given["max_gpus"] or asked.max_gpus)):
        rule = f"is required: --{name.replace('_', '-')}, or {name} in the plan's file"
        check(value is not None or (name == "max_gpus" and own_gpus is not None), "plan", name, rule, "nothing")
    tokens = given["tokens"] if given["tokens"] is not None else asked.tokens
    most = given["max_gpus"] if given["max_gpus"] is not None else asked.max_gpus
    assert tokens is not None
    kept = {name: value for name, value in limits.items() if value is not None}
    return PlanQuestion(
        base=raw,
        tokens=tokens,
        offers=_priced(offers, prices),
        max_gpus=own_gpus if most is None else most,
        min_gpus=asked.min_gpus if given["min_gpus"] is None else given["min_gpus"],
        axes=fixed | {name: tuple(values) for name, values in asked.axes.items()} | dict(map(_axis, axes)),
        limits=parse_as(Limits, {**_plain(asked.limits), **kept}, "plan.limits"),
        currency=given["currency"] or asked.currency,
        folder=folder,
    )


def _plain(limits: Any) -> dict[str, Any]:
    import dataclasses

    return {f.name: getattr(limits, f.name) for f in dataclasses.fields(limits)}


def _deadline(text: str | None) -> float | None:
    from moesim.units import parse_quantity

    if text is None:
        return None
    try:
        return parse_quantity(text, "s")
    except ValueError as error:
        raise InputError("--deadline", "", f"must be {error}", text) from None


def _priced(offers: tuple[Offer, ...], prices: Sequence[str]) -> tuple[Offer, ...]:
    """Offers with the prices of --price: NAME=X, or X for all of them."""
    from dataclasses import replace

    from moesim.errors import near_match

    names = [offer.name for offer in offers]
    for text in prices:
        name, equals, value = text.rpartition("=")
        check(not equals or name in names, "--price", "", "names no cluster of the plan", name, near_match(name, names))
        try:
            number = float(value)
        except ValueError:
            raise InputError("--price", "", "must be a number, or NAME=number", text) from None
        offers = tuple(
            replace(offer, price_per_gpu_hour=number) if not equals or offer.name == name else offer for offer in offers
        )
    return offers


def _axis(text: str) -> tuple[str, tuple[Any, ...]]:
    """--axis ep=[8,16], ep=8,16 or ep=8 as a name and its values."""
    from moesim.door.files import parse_yaml

    name, equals, value = text.partition("=")
    check(bool(equals) and bool(value.strip()), "--axis", "", "must be NAME=[V,V...]", text)
    spelt = value.strip() if value.strip().startswith("[") else f"[{value}]"
    values = parse_yaml(spelt, "--axis")
    check(isinstance(values, list) and len(values) > 0, "--axis", "", "must be NAME=[V,V...]", text)
    return name.strip(), tuple(values)


def _inputs(question: PlanQuestion) -> dict[str, Any]:
    return {
        "base": question.base,
        "tokens": question.tokens,
        "clusters": question.offers,
        "max_gpus": question.max_gpus,
        "min_gpus": question.min_gpus,
        "axes": question.axes,
        "limits": question.limits,
        "currency": question.currency,
    }


def _goodput(found: Plan, call: Call) -> dict[str, Any]:
    """Runs with interruptions of the cheapest and the fastest."""
    from moesim.study.goodput import RunPlan, goodput_study
    from moesim.study.plan import scenario_of

    question, studies = found.question, {}
    for name, point in (("cheapest", found.cheapest), ("fastest", found.fastest)):
        if point is None:
            continue
        price = point.cost / point.gpu_hours if point.cost is not None else None
        run_plan = RunPlan(tokens=question.tokens, price_per_gpu_hour=price, currency=question.currency)
        with working(call, f"Interruptions of the {name}"):
            studies[name] = goodput_study(scenario_of(question, point), run_plan)
    return studies


def _warnings(found: Plan, runs: Mapping[str, Any]) -> list[str]:
    from moesim.metrics.scored import accuracy_warning
    from moesim.study.plan import scenario_of
    from moesim.units import DAY_S

    told: list[str | None] = []
    limits = found.question.limits
    if found.cheapest is not None:
        told.append(accuracy_warning(scenario_of(found.question, found.cheapest)))
    if not runs:
        told.append("days are those of an undisturbed run: --goodput adds interruptions, or see moesim goodput")
    for name, study in runs.items():
        if limits.deadline_s is not None and study.days.p90 * DAY_S > limits.deadline_s:
            told.append(f"with interruptions the {name} takes {study.days.p90:,.1f} days at P90, past the deadline")
    if not found.question.is_priced:
        told.append("nothing is priced: plans are ranked by GPU-hours; give --price for each cluster")
    return [text for text in told if text]


def _tables(found: Plan, rejected: Sequence[Mapping[str, Any]], runs: Mapping[str, Any]) -> list[Table]:
    from moesim.study.plan_reasons import RULE_WORDS, miss_words, remedies

    tables = []
    if found.cheapest is not None and found.fastest is not None:
        tables.append(_plans_table(found, runs))
        tables.append(_front_table(found))
    if found.nearest is not None:
        misses = [("Breaks", miss_words(miss)) for miss in found.nearest.misses]
        ways = [("Would do", text) for text in remedies(found)]
        where = f"{found.nearest.settings['num_gpus']:,} GPUs of {found.nearest.cluster}"
        rows = [("On", where), ("Layout", _layout(found.nearest)), *misses, *ways]
        tables.append(fields_table("No plan keeps all limits. The nearest", rows))
    shown = [one for one in rejected if one["rule"] != "dearer" or one["value"] < MOST_SHOWN * one["limit"]]
    if shown:
        left_out = len(rejected) - len(shown)
        title = "Why the others lost" + (f" ({left_out} far dearer ones: --json)" if left_out else "")
        tables.append(Table(title=title, columns=("", ""), rows=[(one["axis"], one["why"]) for one in shown]))
    counts = [(RULE_WORDS[rule], f"{num:,}") for rule, num in found.num_rejected.items()]
    counts = [
        ("Layouts that divide", f"{found.num_families:,}"),
        ("Steps by the fast path", f"{found.num_evaluated:,}, {found.configs_per_s:,.0f} a second"),
        *counts,
        *((f"Refused, {num:,} times", reason) for reason, num in list(found.refusals.items())[:3]),
        ("Steps by the engine", f"{found.num_confirmed}"),
    ]
    return [*tables, fields_table("What was tried, and what left out by which rule", counts)]


def _plans_table(found: Plan, runs: Mapping[str, Any]) -> Table:
    from moesim.units import format_bytes, format_count, format_seconds

    assert found.cheapest is not None
    assert found.fastest is not None
    points = (found.cheapest, found.fastest)
    currency = found.question.currency
    told: list[tuple[str, Any]] = [
        ("Cluster", lambda p: p.cluster),
        ("GPUs", lambda p: f"{p.settings['num_gpus']:,}"),
        ("Layout", _layout),
        ("Days", lambda p: f"{p.days:,.1f}"),
        ("GPU-hours", lambda p: f"{p.gpu_hours:,.0f}"),
        (f"Cost [{currency}]", lambda p: "not priced" if p.cost is None else f"{p.cost:,.0f}"),
        ("Step", lambda p: format_seconds(p.step_s)),
        ("MFU", lambda p: f"{p.mfu:.1%}"),
        ("Peak memory", lambda p: f"{format_bytes(p.peak_bytes)}, {p.headroom_fraction:.0%} free"),
        ("Dropped", lambda p: f"{p.drop_fraction:.2%}"),
        ("Most of the step", _most),
        ("The fast path said", lambda p: format_seconds(p.fast_step_s)),
    ]
    rows = [(label, *(words(point) for point in points)) for label, words in told]
    if runs:
        days = [f"{s.days.p10:,.1f} / {s.days.p50:,.1f} / {s.days.p90:,.1f}" for s in runs.values()]
        rows.append(("Days with interruptions, P10 / P50 / P90", *days))
    title = f"{format_count(found.question.tokens)} tokens of {found.question.base['model']}"
    return Table(title=title, columns=("", "Cheapest", "Fastest"), rows=rows)


def _front_table(found: Plan) -> Table:
    rows = [
        (
            f"{point.days:,.1f}",
            f"{point.price:,.0f}",
            point.cluster,
            f"{point.settings['num_gpus']:,}",
            _layout(point),
            "engine" if point.is_confirmed else "fast path",
        )
        for point in found.pareto
    ]
    price = f"Cost [{found.question.currency}]" if found.question.is_priced else "GPU-hours"
    columns = ("Days", price, "Cluster", "GPUs", "Layout", "By")
    return Table(title="Nobody is both cheaper and faster", columns=columns, rows=rows, right=("Days", price, "GPUs"))


def _layout(point: PlanPoint) -> str:
    """The settings that are not as small as can be."""
    plain = {"num_gpus": None, "capacity_factor": None, "recompute": "none", "policy": "contiguous"}
    shown = [
        f"{name}={value}"
        for name, value in point.settings.items()
        if name != "num_gpus" and value != plain.get(name, 1) and value is not None
    ]
    return " ".join(shown) or "one GPU's worth"


def _most(point: PlanPoint) -> str:
    largest = sorted(point.parts.items(), key=lambda item: -item[1])[:3]
    return ", ".join(f"{part.replace('_', ' ')} {share:.0%}" for part, share in largest)
