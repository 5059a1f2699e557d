"""The design notebook in plain sentences: against dense models, what each axis does, memory, quality, how sure."""

from __future__ import annotations

from moesim.metrics.scored import accuracy_statement
from moesim.report.design_figures import AXIS_WORDS, change_words, three_digits
from moesim.report.sentences import Page, Sentence
from moesim.report.style import short_count, signed_percent
from moesim.study.design_axes import AXES, DesignCost, DesignPoint, DesignStudy
from moesim.study.quality import SOURCE, TOKENS
from moesim.units import format_bytes


def verdict(study: DesignStudy) -> Page:
    """The first page: is the MoE worth it, what is cheapest, what binds, what of quality, how sure."""
    asked = (
        ("Is it cheaper than a dense model?", against_dense(study)),
        ("Which choice costs most?", about_axes(study)),
        ("Where does the time go?", about_time(study)),
        ("Does it fit?", about_memory(study)),
        ("How good is it?", about_quality(study)),
        ("How sure is this?", Sentence(text=accuracy_statement(study.scenario))),
    )
    scenario = study.scenario
    subject = f"{scenario.model.name} on {scenario.cluster.num_gpus:,} × {scenario.cluster.gpu.name}"
    sentences = tuple(Sentence(question=question, text=said.text, tone=said.tone) for question, said in asked)
    return Page(subject=subject, sentences=sentences)


def against_dense(study: DesignStudy) -> Sentence:
    """The asked design's cost of a token beside its two twins'."""
    moe, active, total = study.asked.costs
    own = moe.gpu_hours_per_billion_tokens
    over_active, over_total = own / active.gpu_hours_per_billion_tokens, own / total.gpu_hours_per_billion_tokens
    return Sentence(
        text=f"A thousand million tokens cost {_price(study, moe)}. A dense model of as many active parameters "
        f"({three_digits(active.total_parameters)}) costs {_price(study, active)}, so routing, traffic and skew make a "
        f"token {over_active:.2f} × as dear; one of as many parameters in all ({three_digits(total.total_parameters)}) "
        f"costs {_price(study, total)}, of which the MoE takes {over_total:.2f} ×." + _cut_words(active, total),
        tone="good" if over_total < 1 else "bad",
    )


def about_axes(study: DesignStudy) -> Sentence:
    """The axes by how far they move the cost, and the cheapest design tried."""
    spans = {axis: study.spread_of(axis) for axis in AXES if len(study.on(axis)) > 1}
    if not spans:
        return Sentence(text="No other design was tried.")
    order = sorted(spans, key=lambda axis: -spans[axis])
    told = ", ".join(f"{AXIS_WORDS[axis]} ({spans[axis]:.2f} ×)" for axis in order)
    best = min(study.possible, key=lambda point: point.costs[0].gpu_hours_per_billion_tokens)
    change = _change(study, best)
    cheapest = (
        f" The cheapest of the {len(study.possible)} variations is {change_words(best)}: {signed_percent(change)}; it "
        "is not as good a model as the one asked for just because it is cheaper."
        if change < 0
        else " None of the variations is cheaper."
    )
    return Sentence(
        text=f"From cheapest to dearest point, a token's cost changes with {told}.{cheapest}{_left_out(study)}"
    )


def about_time(study: DesignStudy) -> Sentence:
    """Communication and waiting as asked, and the designs with the least and the most of both."""

    def lost(point: DesignPoint) -> float:
        moe = point.costs[0]
        return (moe.exposed_comm_s + moe.wait_s) / moe.step_s

    points = (study.asked, *study.possible)
    least, most = min(points, key=lost), max(points, key=lost)
    return Sentence(
        text=f"As asked, {lost(study.asked):.0%} of the step is exposed communication or waiting for the slowest GPU; "
        f"least with {change_words(least)} ({lost(least):.0%}), most with {change_words(most)} ({lost(most):.0%})."
    )


def about_memory(study: DesignStudy) -> Sentence:
    """What the fullest GPU holds, and which designs do not fit."""
    moe = study.asked.costs[0]
    capacity = study.scenario.cluster.gpu.memory_bytes.value
    too_large = [change_words(point) for point in study.possible if not point.costs[0].fits]
    others = f" Too large in this layout: {'; '.join(too_large)}." if too_large else " All variations fit."
    if not study.possible:
        others = ""
    return Sentence(
        text=f"The fullest GPU needs {format_bytes(moe.peak_bytes)} of {format_bytes(capacity)}.{others}",
        tone="plain" if moe.fits else "bad",
    )


def about_quality(study: DesignStudy) -> Sentence:
    """The scaling law's estimates, labelled as such, or why there are none."""
    asked = study.asked.quality
    if asked is None:
        return Sentence(
            text="Not asked: times and costs say nothing of quality (scaling_law=True asks a published law)."
        )
    within = [point for point in (study.asked, *study.possible) if point.quality and point.quality.loss is not None]
    source = f"Estimate by {SOURCE}, for {short_count(TOKENS)} tokens"
    if not within:
        return Sentence(text=f"{source}: no design lies in its range. As asked: {'; '.join(asked.outside)}.")
    told = [
        f"{change_words(point)} {point.quality.loss:.3f} (dense {point.quality.dense_loss:.3f})"
        for point in within
        if point.quality is not None
    ]
    outside = "" if asked.loss is not None else f" Outside as asked: {'; '.join(asked.outside)}."
    return Sentence(text=f"{source}, loss in nats a token: {'; '.join(told)}.{outside}")


def _left_out(study: DesignStudy) -> str:
    impossible = [f"{point.name} ({point.note})" for point in study.points if point.cost is None]
    changed = [f"{change_words(point)} ({point.note})" for point in study.possible if point.note]
    return (f" Cannot be: {'; '.join(impossible)}." if impossible else "") + (
        f" Cut otherwise: {'; '.join(changed)}." if changed else ""
    )


def _cut_words(active: DesignCost, total: DesignCost) -> str:
    named = [kind for kind, cost in (("active", active), ("total", total)) if not cost.fits]
    return f" The twin of equal {' and '.join(named)} size does not fit; its time is a lower bound." if named else ""


def _price(study: DesignStudy, cost: DesignCost) -> str:
    hours = f"{cost.gpu_hours_per_billion_tokens:,.4g} GPU-hours"
    money = study.money_per_billion_tokens(cost)
    return hours if money is None else f"{money:,.4g} {study.currency} ({hours})"


def _change(study: DesignStudy, point: DesignPoint) -> float:
    own = study.asked.costs[0].gpu_hours_per_billion_tokens
    return point.costs[0].gpu_hours_per_billion_tokens / own - 1
