"""The report in plain sentences: a first page (fits, how fast, what binds, what to change) and a takeaway per figure.

Every number in them is taken from results; nothing is written for a case.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from moesim.metrics.step import COMM_PARTS, MEMORY_PARTS, StepResult
from moesim.report.style import COLOURS, MEMORY_WORDS, WORDS
from moesim.study.advice import MemoryChange
from moesim.study.planning import PlanningStudy
from moesim.units import GIGA, format_bytes, format_count, format_seconds

_LEVERS = {
    "experts": "This is the work the model is for: faster GPUs, FP8, or larger micro-batches (fuller products) "
    "shorten it.",
    "attention": "Shorter sequences, FP8 or faster GPUs shorten it.",
    "dense_ffn": "FP8, larger micro-batches or faster GPUs shorten it.",
    "all_to_all": "A faster network, a smaller expert-parallel size, or overlapping it with compute (not "
    "modelled yet) shorten it.",
    "wait_for_slowest": "More even expert load (a balancing loss, expert replicas) shortens it.",
    "pipeline_bubble": "More micro-batches per step (a larger global batch) or fewer pipeline stages shorten it.",
    "gradient_reduction": "Overlapping it with the backward pass (overlap=grad_reduce) or a larger batch shortens it.",
    "tensor_parallel_comm": "A smaller tensor-parallel size shortens it.",
    "recompute": "More memory per GPU, or a cut that needs less, would spare it.",
    "optimizer": "A larger global batch spreads it over more tokens.",
}


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """One answer under a question, shown as a coloured block; tone is plain, good or bad."""

    text: str
    question: str = ""
    tone: str = "plain"

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        colour = {"good": COLOURS["optimizer"], "bad": COLOURS["alert"]}.get(self.tone, COLOURS["attention"])
        asked = (
            f'<b style="display:block;font-size:.85em;color:{COLOURS["quiet"]}">{html.escape(self.question)}</b>'
            if self.question
            else ""
        )
        box = f"border-left:4px solid {colour};background:#f5f7f9;padding:.55rem .9rem;margin:.6rem 0"
        return f'<div class="takeaway" style="{box}">{asked}{html.escape(self.text)}</div>'


@dataclass(frozen=True, kw_only=True)
class Page:
    """Several sentences shown one below the other."""

    sentences: tuple[Sentence, ...]

    def _repr_html_(self) -> str:
        return "".join(sentence._repr_html_() for sentence in self.sentences)


def first_page(study: PlanningStudy, changes: Sequence[MemoryChange] = ()) -> list[str]:
    """The first page as plain sentences: does it fit, how fast, what binds, what to change, how sure."""
    return [f"{sentence.question} {sentence.text}" for sentence in verdict(study, changes).sentences]


def verdict(study: PlanningStudy, changes: Sequence[MemoryChange] = ()) -> Page:
    """The first page, to be shown. changes: of `moesim.study.advice.memory_changes`, where memory does not suffice."""
    page = [_fit(study.step), _speed(study), _binding(study.step), _change(study, changes)]
    if study.twins is not None:
        page.insert(3, _against_dense(study))
    return Page(sentences=(*page, _trust(study.step)))


def _fit(step: StepResult) -> Sentence:
    peak, capacity = step.memory["peak_bytes"], step.memory["peak_bytes"] + step.headroom_bytes
    fullest = max(step.memory_by_rank, key=lambda stage: stage["peak_bytes"])
    largest = max(MEMORY_PARTS, key=lambda part: step.memory[part])
    place = f"pipeline stage {fullest['stage']}" if len(step.memory_by_rank) > 1 else "the model's one stage"
    most = f"Most of it is {MEMORY_WORDS[largest]} ({format_bytes(step.memory[largest])})."
    if step.fits:
        text = (
            f"Yes. The fullest GPU (in {place}) needs {format_bytes(peak)} of {format_bytes(capacity)}; "
            f"{format_bytes(step.headroom_bytes)} stay free. {most}"
        )
        return Sentence(question="Does it fit?", text=text, tone="good")
    text = (
        f"No. The fullest GPU (in {place}) needs {format_bytes(peak)}, {format_bytes(-step.headroom_bytes)} more "
        f"than its "
        f"{format_bytes(capacity)}. {most} All times below are those of GPUs that had enough memory."
    )
    return Sentence(question="Does it fit?", text=text, tone="bad")


def _speed(study: PlanningStudy) -> Sentence:
    step, scenario = study.step, study.scenario
    days_s = study.tokens_to_train / step.tokens_per_s
    tokens = format_count(scenario.train.global_batch * scenario.train.seq_len)
    text = (
        f"A step of {tokens} tokens takes {format_seconds(step.step_s)}: {step.tokens_per_s_per_gpu:,.0f} "
        f"tokens/s per GPU, "
        f"{format_count(step.tokens_per_s)} tokens/s on {scenario.cluster.num_gpus:,} GPUs. "
        f"{format_count(study.tokens_to_train)} tokens take {format_seconds(days_s)} without interruptions. "
        f"{step.mfu:.1%} of the GPUs' {scenario.train.precision.upper()} peak goes into the model's own "
        f"arithmetic (MFU)."
    )
    return Sentence(question="How fast is it?", text=text)


def _binding(step: StepResult) -> Sentence:
    shares = (
        f"Of the step, the mean GPU computes {step.compute_s / step.step_s:.0%}, waits for communication "
        f"{step.exposed_comm_s / step.step_s:.0%}, for the slowest GPU {step.wait_s / step.step_s:.0%}, and for "
        f"the pipeline to "
        f"fill and drain {step.bubble_fraction:.0%}."
    )
    return Sentence(question="What binds?", text=f"{step.binds[0].upper()}{step.binds[1:]}. {shares}")


def _against_dense(study: PlanningStudy) -> Sentence:
    twins = study.twins
    assert twins is not None
    total, active = 1 / twins.cost_over_total, twins.cost_over_active
    text = (
        f"Per GPU it trains {total:.2g} times the tokens per second of a dense model with as many parameters in total "
        f"({format_count(twins.parameters['total'])}), and each token costs {active:.2g} times the GPU time of a "
        f"dense model "
        f"with as many parameters in use ({format_count(twins.parameters['active'])}): the price of routing, "
        f"traffic and skew."
    )
    return Sentence(question="Is a mixture of experts worth it here?", text=text)


def _change(study: PlanningStudy, changes: Sequence[MemoryChange]) -> Sentence:
    step = study.step
    question = "What to change first?"
    if not step.fits:
        fitting = [change for change in changes if change.fits]
        if fitting:
            best = fitting[0]
            others = "".join(
                f"; or {change.words} ({format_bytes(change.headroom_bytes)} free)" for change in fitting[1:3]
            )
            text = f"To fit: {best.words} ({format_bytes(best.headroom_bytes)} free){others}."
        elif changes:
            best = min(changes, key=lambda change: change.peak_bytes)
            text = (
                f"No single change makes it fit. The nearest: {best.words}, still "
                f"{format_bytes(-best.headroom_bytes)} short. "
                "It takes GPUs with more memory, or more of them."
            )
        else:
            text = "It takes GPUs with more memory, or more of them."
        return Sentence(question=question, text=text, tone="bad")
    part = _binding_part(step)
    words = "the exchange of tokens between GPUs" if part == "all_to_all" else WORDS[part]
    text = f"The largest share of the time goes to {words}. {_LEVERS.get(part, 'A faster device shortens it.')}"
    return Sentence(question=question, text=text)


def _binding_part(step: StepResult) -> str:
    shares = {part: s for part, s in step.step_parts_s.items() if part not in ("dispatch", "combine")}
    shares["all_to_all"] = step.step_parts_s["dispatch"] + step.step_parts_s["combine"]
    return max(shares, key=lambda part: shares[part])


def _trust(step: StepResult) -> Sentence:
    kinds = [item.kind for item in step.provenance]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    first = "".join(step.envelope["reasons"][:1])
    text = f"Of the {len(kinds)} numbers behind it: {counts}. {first}"
    return Sentence(question="How sure is this?", text=text.strip())


def about_parameters(study: PlanningStudy) -> Sentence:
    """Total against active: what memory holds and what a token uses."""
    d = study.description
    text = (
        f"Memory must hold {format_count(d.total_parameters)} parameters; a token's arithmetic uses "
        f"{format_count(d.active_parameters)} "
        f"({format_count(d.active_parameters_no_input_embedding)} without the input embedding), "
        f"{d.total_parameters / d.active_parameters:.1f} times fewer."
    )
    return Sentence(text=text)


def about_twins(study: PlanningStudy) -> Sentence:
    """The MoE against its dense twins, with what to keep in mind about them."""
    assert study.twins is not None
    notes = " ".join(study.twins.notes)
    return Sentence(text=f"{_against_dense(study).text} {notes}".strip())


def about_break_even(study: PlanningStudy) -> Sentence:
    """The link speed at which the MoE stops being cheaper than a dense twin."""
    assert study.break_even is not None
    asked = f"This cluster has {study.break_even.asked_bytes_per_s / GIGA:.3g} GB/s per GPU."
    return Sentence(text=f"{study.break_even.sentence} {asked}")


def about_memory(study: PlanningStudy, changes: Sequence[MemoryChange] = ()) -> Sentence:
    """Memory over expert-parallel sizes: which fit, and what would help."""
    fitting = [point for point in study.memory_over_ep if point.fits]
    asked = next(point for point in study.memory_over_ep if point.ep == study.scenario.parallel.ep)
    smallest = min(study.memory_over_ep, key=lambda point: point.memory["peak_bytes"])
    if fitting:
        text = f"Expert-parallel sizes that fit: {', '.join(str(point.ep) for point in fitting)}."
    else:
        text = (
            f"No expert-parallel size fits: even at {smallest.ep} the fullest GPU is "
            f"{format_bytes(-smallest.headroom_bytes)} short. "
            "Spreading experts does not shrink what each GPU's own tokens leave behind."
        )
    if not asked.fits:
        helps = [change for change in changes if change.fits]
        text += f" What would help: {'; or '.join(change.words for change in helps[:3])}." if helps else ""
    return Sentence(text=text, tone="plain" if asked.fits else "bad")


def about_step(study: PlanningStudy) -> Sentence:
    """Where the time goes: computing, exchanging, waiting; hidden communication."""
    step = study.step
    largest = max(COMM_PARTS, key=lambda part: step.step_parts_s[part])
    hidden = format_seconds(step.hidden_comm_s) if step.hidden_comm_s > 0 else "none"
    text = (
        f"{_binding(step).text} The largest exchange is {WORDS[largest]} "
        f"({format_seconds(step.step_parts_s[largest])}); "
        f"communication hidden behind compute: {hidden}."
    )
    return Sentence(text=text)


def about_load(study: PlanningStudy) -> Sentence:
    """How even the experts' load is, and whether any expert is alarmingly full."""
    step = study.step
    text = (
        f"Expert load: Gini {step.gini:.2f} (0 is even), entropy {step.entropy:.1%} of the largest possible, "
        f"fullest expert "
        f"{step.max_mean_load:.1f} times the mean. "
    )
    if step.alerts:
        layers = len({alert["layer"] for alert in step.alerts})
        text += f"Alert: {len(step.alerts)} experts in {layers} layers take over 3 times the mean."
    else:
        text += "No expert takes over 3 times the mean."
    return Sentence(text=text, tone="bad" if step.alerts else "good")


def about_drops(study: PlanningStudy) -> Sentence:
    """What a capacity limit would drop under this skew."""
    asked = study.scenario.routing.capacity_factor
    enough = next((point for point in study.drop_curve if point.drop_fraction < 0.01), None)
    text = (
        "Without a capacity factor nothing is dropped; a full expert makes its GPU slow instead. "
        if asked is None
        else f"At the asked capacity factor of {asked:g}, {study.step.drop_fraction:.1%} of assignments are dropped. "
    )
    if enough is not None:
        text += (
            f"A capacity factor of {enough.capacity_factor:g} would keep drops under 1%, leaving "
            f"{enough.padding_fraction:.0%} of the "
            "expert buffers empty."
        )
    else:
        text += "None of the capacity factors shown keeps drops under 1%."
    return Sentence(text=text)


def about_sizes(study: PlanningStudy) -> Sentence:
    """Days to train over cluster sizes: what doubling the GPUs buys."""
    points = [point for point in study.cluster_sizes if point.days is not None]
    asked = next(point for point in points if point.num_gpus == study.scenario.cluster.num_gpus)
    larger = next((point for point in points if point.num_gpus == 2 * asked.num_gpus), None)
    text = f"{asked.num_gpus:,} GPUs need {asked.days:,.1f} days for {format_count(study.tokens_to_train)} tokens."
    if larger is not None and larger.days and asked.days:
        text += (
            f" Twice as many need {larger.days:,.1f} days: {asked.days / larger.days:.2f} times as fast, "
            f"{asked.days / larger.days / 2:.0%} of the ideal."
        )
    text += " Interruptions and restarts are not counted."
    return Sentence(text=text)
