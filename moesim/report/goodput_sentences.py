"""The goodput notebook in plain sentences: days, money, what is lost and why, how sure."""

from __future__ import annotations

from moesim.metrics.scored import accuracy_statement
from moesim.report.goodput_figures import PART_WORDS
from moesim.report.sentences import Page, Sentence
from moesim.report.style import short_count
from moesim.study.goodput import UNKNOWN, GoodputStudy, Range
from moesim.units import DAY_S, MEGA, format_bytes, format_seconds


def verdict(study: GoodputStudy) -> Page:
    """The first page: how long, what it costs, what is lost, how often to save, how sure."""
    scenario = study.scenario
    subject = (
        f"{short_count(study.plan.tokens)} tokens of {scenario.model.name} on {scenario.cluster.num_gpus:,} × "
        f"{scenario.cluster.gpu.name}"
    )
    asked = (
        ("How long does it take?", how_long(study)),
        ("What does it cost?", costs(study)),
        ("What is lost?", about_losses(study)),
        ("How often to save?", about_interval(study)),
        ("How sure is this?", how_sure(study)),
    )
    sentences = tuple(Sentence(question=question, text=said.text, tone=said.tone) for question, said in asked)
    return Page(subject=subject, sentences=sentences)


def how_long(study: GoodputStudy) -> Sentence:
    """Days, P10 to P90, against a run that never fails."""
    return Sentence(
        text=f"{study.days.p50:,.1f} days in the median, {study.days.p10:,.1f} to {study.days.p90:,.1f} in eight of "
        f"ten runs; {study.ideal_s / DAY_S:,.1f} without failures. {study.goodput_fraction.p50:.1%} of the time is "
        "kept."
    )


def costs(study: GoodputStudy) -> Sentence:
    """GPU-hours, money where a price was given, energy."""
    plan = study.plan
    hours = f"{_span(study.gpu_hours, MEGA, 2)} million GPU-hours, spares included"
    energy = f"{_span(study.energy_kwh, MEGA, 2)} GWh (GPUs at their TDP, times {plan.pue:g})"
    if study.cost is None:
        return Sentence(text=f"{hours}; {energy}. Nothing is priced: no price per GPU-hour was given.")
    money = f"{_span(study.cost, MEGA, 2)} million {plan.currency} at {plan.price_per_gpu_hour:g} a GPU-hour"
    return Sentence(text=f"{money}, a price that you gave. {hours}; {energy}.")


def about_losses(study: GoodputStudy) -> Sentence:
    """Interruptions and the largest loss."""
    parts = {part: study.parts_fraction[part] for part in PART_WORDS}
    most = max(parts, key=lambda part: parts[part])
    spares = study.operations.num_spares
    return Sentence(
        text=f"{study.failures.p10:,.0f} to {study.failures.p90:,.0f} unexpected interruptions, one every "
        f"{format_seconds(study.mean_time_between_failures_s)}. They and all else lose {sum(parts.values()):.1%} of "
        f"the time, most of it {PART_WORDS[most]} ({parts[most]:.1%}); {spares} spare servers are held.",
        tone="bad" if sum(parts.values()) > 0.1 else "plain",
    )


def about_interval(study: GoodputStudy) -> Sentence:
    """The interval taken, against Young's and Daly's."""
    checkpoints = study.checkpoints
    return Sentence(
        text=f"A checkpoint of {format_bytes(study.checkpoint_bytes)} every {format_seconds(checkpoints.interval_s)} "
        f"of training; best is {format_seconds(study.best_interval_s)}, Young's rule says "
        f"{format_seconds(study.young_interval_s)}, Daly's {format_seconds(study.daly_interval_s)}. Training stands "
        f"still for {format_seconds(checkpoints.stall_s)}; a checkpoint is safe after "
        f"{format_seconds(checkpoints.write_s)}."
    )


def how_sure(study: GoodputStudy) -> Sentence:
    """What the ranges hold."""
    fleet = (
        "a failure rate between the published clusters' (2.3 to 6.5 per 1,000 servers and day)"
        if study.plan.fleet == UNKNOWN
        else f"the failure rate of {study.plan.fleet}"
    )
    return Sentence(
        text=f"Ranges hold {fleet}, the luck of {study.plan.num_runs} runs, and what measured steps took over their "
        f"predictions: {study.model_error_told}. {accuracy_statement(study.scenario)}"
    )


def _span(found: Range, unit: float, digits: int) -> str:
    return f"{found.p10 / unit:,.{digits}f} to {found.p90 / unit:,.{digits}f}"
