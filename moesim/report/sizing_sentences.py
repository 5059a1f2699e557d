"""The sizing notebook in plain sentences: how many GPUs, how long, what it takes, what binds, what fits."""

from __future__ import annotations

from moesim.report.sentences import Page, Sentence
from moesim.report.style import short_count
from moesim.study.goodput import Range
from moesim.study.sizing import SizedRun, SizingStudy
from moesim.units import KILO, MEGA, format_bytes

NOTHING_FITS = "Nothing that was tried fits: more GPUs, more memory or recomputation are needed."


def verdict(study: SizingStudy) -> Page:
    """The first page: what to take, how long, what it takes, what binds, what fits, how sure."""
    model = study.scenario.model.name
    asked = (
        ("How many GPUs?", how_many(study)),
        ("How long does it take?", how_long(study)),
        ("What does it take?", what_it_takes(study)),
        ("What binds?", what_binds(study)),
        ("Does it fit?", what_fits(study)),
        ("How sure is this?", how_sure(study)),
    )
    sentences = tuple(Sentence(question=question, text=said.text, tone=said.tone) for question, said in asked)
    return Page(subject=f"{short_count(study.run.tokens)} tokens of {model}: kinds and sizes", sentences=sentences)


def how_many(study: SizingStudy) -> Sentence:
    """The cheapest in time, and the fastest."""
    best, fastest, limit = study.cheapest, study.fastest, study.deadline_days
    if fastest is None:
        return Sentence(text=NOTHING_FITS, tone="bad")
    if best is None:
        return Sentence(
            text=f"None is done within {limit:g} days in nine of ten draws; the fastest, {fastest.name}, takes "
            f"{_span(fastest.days)} days.",
            tone="bad",
        )
    until = "" if limit is None else f", done within {limit:g} days in nine of ten draws"
    text = f"{best.name} take the least {_what(study)}{until}: {_days(best)}, {_spent(best, study)}."
    if best is not fastest:
        text += f" {fastest.name} are the fastest: {_days(fastest)}, {_spent(fastest, study)}."
    return Sentence(text=text, tone="good")


def how_long(study: SizingStudy) -> Sentence:
    """What more GPUs bring, kind by kind."""
    told = []
    for gpu in dict.fromkeys(point.gpu for point in study.fitting):
        same = sorted((p for p in study.fitting if p.gpu == gpu), key=lambda p: p.num_gpus)
        first, last = same[0], same[-1]
        assert first.days is not None
        assert last.days is not None
        if first is last:
            told.append(f"{first.name} take {_days(first)}")
            continue
        kept = first.days.p50 * first.num_gpus / (last.days.p50 * last.num_gpus)
        told.append(
            f"{gpu}: {first.days.p50:,.0f} days with {first.num_gpus:,}, {last.days.p50:,.0f} with {last.num_gpus:,}, "
            f"each of which gets {kept:.0%} as much done"
        )
    return Sentence(text="; ".join(told) + "." if told else NOTHING_FITS)


def what_it_takes(study: SizingStudy) -> Sentence:
    """GPU-hours or money from the least to the most."""
    if not study.fitting:
        return Sentence(text=NOTHING_FITS, tone="bad")
    hours = sorted(study.fitting, key=lambda p: p.gpu_hours.p50 if p.gpu_hours else 0.0)
    text = f"From {_hours(hours[0])} ({hours[0].name}) to {_hours(hours[-1])} ({hours[-1].name})."
    priced = [point for point in study.fitting if point.cost is not None]
    if not priced:
        return Sentence(text=text + " Nothing is priced: no prices were given.")
    cheap = min(priced, key=lambda p: p.cost.p50 if p.cost else 0.0)
    unpriced = sorted({point.gpu for point in study.fitting if point.cost is None})
    rest = f" No price was given for {', '.join(unpriced)}." if unpriced else ""
    return Sentence(text=f"{text} By your prices {cheap.name} cost least: {_spent(cheap, study, money=True)}.{rest}")


def what_binds(study: SizingStudy) -> Sentence:
    """The largest part of the step at the smallest and largest size of each kind."""
    told = []
    for gpu in dict.fromkeys(point.gpu for point in study.points if point.parts_s):
        same = sorted((p for p in study.points if p.gpu == gpu and p.parts_s), key=lambda p: p.num_gpus)
        few, many = same[0], same[-1]
        text = f"{few.name}: {few.binds}"
        told.append(text if few is many else f"{text}; {many.num_gpus:,}: {many.binds}")
    return Sentence(text=". ".join(told) + "." if told else "Nothing that was tried is possible.")


def what_fits(study: SizingStudy) -> Sentence:
    """Which do not fit or cannot be, and why."""
    over = [f"{p.name} ({_missing(p)} too much)" for p in study.points if p.peak_bytes is not None and not p.fits]
    never = [f"{p.name}: {p.reason}" for p in study.points if p.step_s is None]
    if not over and not never:
        tight = min(study.fitting, key=lambda p: _free(p))
        return Sentence(text=f"All fit; the tightest is {tight.name}, with {format_bytes(_free(tight))} free.")
    parts = ([f"Too little memory: {', '.join(over)}."] if over else []) + (
        [f"Impossible: {'; '.join(never)}."] * bool(never)
    )
    return Sentence(text=" ".join(parts), tone="bad")


def how_sure(study: SizingStudy) -> Sentence:
    """What stands behind the ranges."""
    told = {p.gpu: p.model_error_told for p in study.points if p.model_error_told}
    if not told:
        return Sentence(text="Nothing was drawn.")
    behind = "; ".join(f"{gpu}: {text}" for gpu, text in told.items())
    return Sentence(
        text="P10 to P90 hold what measured steps took over their predictions, an unknown skew where none was given, "
        f"the rate of NICs and how often machines fail. Behind the model error stand {behind}."
    )


def _what(study: SizingStudy) -> str:
    return "money" if study.in_time and all(p.cost is not None for p in study.in_time) else "GPU-hours"


def _days(point: SizedRun) -> str:
    assert point.days is not None
    return f"{point.days.p50:,.0f} days ({_span(point.days)})"


def _hours(point: SizedRun) -> str:
    assert point.gpu_hours is not None
    return f"{_amount(point.gpu_hours.p50)} GPU-hours"


def _spent(point: SizedRun, study: SizingStudy, *, money: bool = False) -> str:
    if (money or _what(study) == "money") and point.cost is not None:
        found = point.cost
        return f"{_amount(found.p50)} {study.run.currency} ({_amount(found.p10)} to {_amount(found.p90)})"
    assert point.gpu_hours is not None
    found = point.gpu_hours
    return f"{_hours(point)} ({_amount(found.p10)} to {_amount(found.p90)})"


def _amount(number: float) -> str:
    """Three digits of a large number, in words.

    >>> _amount(2_664_000.0), _amount(52_480.0)
    ('2.66 million', '52 thousand')
    """
    return f"{number / MEGA:,.3g} million" if number >= MEGA else f"{number / KILO:,.0f} thousand"


def _span(found: Range | None) -> str:
    assert found is not None
    return f"{found.p10:,.0f} to {found.p90:,.0f}"


def _free(point: SizedRun) -> float:
    assert point.memory_bytes is not None
    assert point.peak_bytes is not None
    return point.memory_bytes - point.peak_bytes


def _missing(point: SizedRun) -> str:
    return format_bytes(-_free(point))
