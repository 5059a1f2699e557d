"""The report in plain sentences: a first page (fits, how fast, what binds, what to change) and a takeaway per figure.

Every number in them is taken from results; nothing is written for a case.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from moesim.metrics.step import COMM_PARTS, MEMORY_PARTS, StepResult
from moesim.metrics.summary import RISK
from moesim.report.style import COLOURS, MEMORY_WORDS, WORDS, short_count, signed_percent
from moesim.study.advice import Change
from moesim.study.drops import FEW_DROPS
from moesim.study.planning import PlanningStudy
from moesim.units import GIGA, format_bytes, format_count, format_seconds

_LEVERS = {
    "experts": "This is the work the model is for: faster GPUs or larger micro-batches (fuller products) shorten it.",
    "attention": "Shorter sequences or faster GPUs shorten it.",
    "dense_ffn": "Larger micro-batches or faster GPUs shorten it.",
    "all_to_all": "A faster network, a smaller expert-parallel size, or computing beside it (overlap) shortens it.",
    "wait_for_slowest": "More even expert load (a balancing loss, expert replicas) shortens it.",
    "pipeline_bubble": "More micro-batches per step (a larger global batch) or fewer pipeline stages shorten it.",
    "pipeline_send": "Fewer pipeline stages or virtual stages, or a faster network, shorten it.",
    "host_transfer": "Offloading less shortens it.",
    "gradient_reduction": "Overlap with the backward pass (overlap=grad_reduce) or a larger batch shortens it.",
    "tensor_parallel_comm": "A smaller tensor-parallel size shortens it.",
    "recompute": "More memory per GPU, or a cut that needs less, would spare it.",
    "optimizer": "A larger global batch spreads it over more tokens.",
    "host": "CUDA graphs (cuda_graphs), a fused dispatcher (deepep) or larger micro-batches shorten it.",
}
_WITHOUT_LARGER = {"experts": "This is the work the model is for: faster GPUs shorten it."}  # micro-batches do not fit
_DENSE = "This model has no experts, so there is nothing to compare here."


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
    """What is asked, and sentences about it one below the other."""

    subject: str
    sentences: tuple[Sentence, ...]

    def _repr_html_(self) -> str:
        title = f'<p class="subject" style="font-size:1.25em;font-weight:600">{html.escape(self.subject)}</p>'
        return title + "".join(sentence._repr_html_() for sentence in self.sentences)


def first_page(study: PlanningStudy, changes: Sequence[Change] = ()) -> list[str]:
    """The first page as plain sentences: does it fit, how fast, what binds, what to change, how sure."""
    return [f"{sentence.question} {sentence.text}" for sentence in verdict(study, changes).sentences]


def verdict(study: PlanningStudy, changes: Sequence[Change] = ()) -> Page:
    """The first page, to be shown. changes: what `moesim.study.advice.changes` found."""
    page = [_fit(study.step), _speed(study), _binding(study.step), _change(study, changes)]
    if study.twins is not None:
        page.insert(3, _against_dense(study))
    cluster = study.scenario.cluster
    subject = f"Training {study.scenario.model.name} on {cluster.num_gpus:,} × {cluster.gpu.name}"
    return Page(subject=subject, sentences=(*page, _trust(study.step)))


def _fit(step: StepResult) -> Sentence:
    peak, capacity = step.memory["peak_bytes"], step.memory["peak_bytes"] + step.headroom_bytes
    fullest = max(step.memory_by_rank, key=lambda stage: stage["peak_bytes"])
    largest = max(MEMORY_PARTS, key=lambda part: step.memory[part])
    place = f"pipeline stage {fullest['stage']}" if len(step.memory_by_rank) > 1 else "the model's one stage"
    most = f"The largest part is {MEMORY_WORDS[largest]} ({format_bytes(step.memory[largest])})."
    if step.fits:
        text = (
            f"Yes. The fullest GPU (in {place}) needs {format_bytes(peak)} of {format_bytes(capacity)}; "
            f"{format_bytes(step.headroom_bytes)} stay free. {most}{_over_steps(step)}"
        )
        risky = step.out_of_memory_fraction > RISK
        return Sentence(question="Does it fit?", text=text, tone="bad" if risky else "good")
    text = (
        f"No. The fullest GPU (in {place}) needs {format_bytes(peak)}, {format_bytes(-step.headroom_bytes)} more "
        f"than its "
        f"{format_bytes(capacity)}. {most} All times below are those of GPUs that had enough memory."
    )
    return Sentence(question="Does it fit?", text=text, tone="bad")


def _over_steps(step: StepResult) -> str:
    """What other steps need, where routing moves it: nothing where it hardly does."""
    p99, peak = step.memory["peak_p99_bytes"], step.memory["peak_bytes"]
    if p99 < 1.005 * peak and step.out_of_memory_fraction <= RISK:
        return ""
    chance = f"; {step.out_of_memory_fraction:.1%} of steps do not fit" if step.out_of_memory_fraction > RISK else ""
    return f" Routing differs from step to step: 99 of 100 stay under {format_bytes(p99)}{chance}."


def _speed(study: PlanningStudy) -> Sentence:
    step, scenario = study.step, study.scenario
    days_s = study.tokens_to_train / step.tokens_per_s
    tokens = short_count(scenario.train.global_batch * scenario.train.seq_len)
    text = (
        f"A step of {tokens} tokens takes {format_seconds(step.step_s)}: {step.tokens_per_s_per_gpu:,.0f} "
        f"tokens/s per GPU, "
        f"{format_count(step.tokens_per_s)} tokens/s on {scenario.cluster.num_gpus:,} GPUs. "
        f"{short_count(study.tokens_to_train)} tokens take {format_seconds(days_s)} without interruptions. "
        f"{step.mfu:.1%} of the GPUs' {scenario.train.precision.upper()} peak goes into the model's own "
        f"arithmetic (MFU)."
    )
    return Sentence(question="How fast is it?", text=text)


def _binding(step: StepResult) -> Sentence:
    shares = (
        f"Over the step, the mean GPU computes {step.compute_s / step.step_s:.0%}, waits for communication "
        f"{step.exposed_comm_s / step.step_s:.0%}, for the slowest GPU {step.wait_s / step.step_s:.0%}, and for "
        f"the pipeline to "
        f"fill and drain {step.bubble_fraction:.0%}."
    )
    return Sentence(question="What binds?", text=f"The largest part is {step.binds}. {shares}")


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


def _change(study: PlanningStudy, changes: Sequence[Change]) -> Sentence:
    step = study.step
    question = "What to change first?"
    fitting = [change for change in changes if change.fits]
    if not step.fits:
        if not fitting:
            best = max(changes, key=lambda change: change.headroom_bytes, default=None)
            nearest = f" The nearest, {best.name}, is {format_bytes(-best.headroom_bytes)} short." if best else ""
            text = f"No setting tried makes it fit.{nearest} It takes GPUs with more memory, or more of them."
        else:
            told = "; or ".join(_told(change, step) for change in fitting[:2])
            text = f"To make it fit: {told}."
        return Sentence(question=question, text=text, tone="bad")
    part = _binding_part(step)
    words = "the exchange of tokens between GPUs" if part == "all_to_all" else WORDS[part]
    text = f"The largest share of the time goes to {words}. {_lever(part, changes)}"
    return Sentence(question=question, text=f"{_best(step, fitting)} {text}".strip())


def _lever(part: str, changes: Sequence[Change]) -> str:
    """What shortens a part; larger micro-batches are not named where they do not fit."""
    faster = "A faster device shortens it."
    too_large = any("micro_batch" in change.leaves and not change.fits for change in changes)
    if too_large and "larger micro-batches" in _LEVERS.get(part, "").lower():
        return _WITHOUT_LARGER.get(part, faster)
    return _LEVERS.get(part, faster)


def _best(step: StepResult, fitting: Sequence[Change]) -> str:
    """The fastest change that fits, if it is worth naming."""
    simulated = [change for change in fitting if change.tokens_per_s_per_gpu is not None]
    if not simulated:
        return ""
    if _gain(simulated[0], step) < 0.01:
        return f"None of the {len(simulated)} single changes simulated makes it more than 1% faster."
    return f"Of {len(simulated)} single changes simulated, the best is {_told(simulated[0], step)}."


def _told(change: Change, step: StepResult) -> str:
    speed = ""
    if change.tokens_per_s_per_gpu is not None:
        gain = signed_percent(_gain(change, step))
        speed = ", the same speed" if gain == "0%" else f", {gain} in speed"
    return f"{change.name} ({change.words}; {format_bytes(change.headroom_bytes)} free{speed})"


def _gain(change: Change, step: StepResult) -> float:
    assert change.tokens_per_s_per_gpu is not None
    return change.tokens_per_s_per_gpu / step.tokens_per_s_per_gpu - 1


def _binding_part(step: StepResult) -> str:
    shares = {part: s for part, s in step.step_parts_s.items() if part not in ("dispatch", "combine")}
    shares["all_to_all"] = step.step_parts_s["dispatch"] + step.step_parts_s["combine"]
    return max(shares, key=lambda part: shares[part])


def _trust(step: StepResult) -> Sentence:
    kinds = [item.kind for item in step.provenance]
    words = {"spec": "from data sheets"}
    counts = ", ".join(f"{kinds.count(kind)} {words.get(kind, kind)}" for kind in sorted(set(kinds)))
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
    if study.twins is None:
        return Sentence(text=_DENSE)
    notes = " ".join(study.twins.notes)
    return Sentence(text=f"{_against_dense(study).text} {notes}".strip())


def about_break_even(study: PlanningStudy) -> Sentence:
    """The link speed at which the MoE stops being cheaper than a dense twin."""
    if study.break_even is None:
        return Sentence(text=_DENSE)
    asked = f"This cluster has {study.break_even.asked_bytes_per_s / GIGA:.3g} GB/s per GPU."
    return Sentence(text=f"{study.break_even.sentence} {asked}")


def about_memory(study: PlanningStudy) -> Sentence:
    """Memory over expert-parallel sizes: which fit, and how far off the others are."""
    fitting = [point for point in study.memory_over_ep if point.fits]
    asked = next(point for point in study.memory_over_ep if point.ep == study.scenario.parallel.ep)
    smallest = min(study.memory_over_ep, key=lambda point: point.memory["peak_bytes"])
    if fitting:
        text = f"Expert-parallel sizes that fit: {', '.join(str(point.ep) for point in fitting)}."
    else:
        text = (
            f"No expert-parallel size fits: even at {smallest.ep} the fullest GPU is "
            f"{format_bytes(-smallest.headroom_bytes)} short. More expert parallelism shares out the experts' weights, "
            "but not what a GPU's own tokens leave behind."
        )
    return Sentence(text=text, tone="plain" if asked.fits else "bad")


def about_changes(study: PlanningStudy, changes: Sequence[Change]) -> Sentence:
    """What the best single change is, or that none helps."""
    answer = _change(study, changes)
    return Sentence(text=answer.text, tone=answer.tone)


def about_step(study: PlanningStudy) -> Sentence:
    """Where the time goes: computing, exchanging, waiting; hidden communication."""
    step = study.step
    largest = max(COMM_PARTS, key=lambda part: step.step_parts_s[part])
    hidden = format_seconds(step.hidden_comm_s) if step.hidden_comm_s > 0 else "none"
    text = (
        f"{_binding(step).text} The largest exchange is {WORDS[largest]} "
        f"with {format_seconds(step.step_parts_s[largest])}; "
        f"communication hidden behind compute: {hidden}."
    )
    return Sentence(text=text)


def about_load(study: PlanningStudy) -> Sentence:
    """How even the experts' load is, and whether any expert is alarmingly full."""
    step = study.step
    if study.twins is None:
        return Sentence(text=_DENSE)
    text = (
        f"Expert load: Gini {step.gini:.2f} (0 is even), entropy {step.entropy:.1%} of the largest possible, "
        f"fullest expert "
        f"{step.max_mean_load:.1f} times the mean. "
    )
    if step.alerts:
        layers = len({alert["layer"] for alert in step.alerts})
        worst = max(step.alerts, key=lambda alert: alert["ratio"])
        text += (
            f"Alert: {_count(len(step.alerts), 'expert')} in {_count(layers, 'layer')} over 3 times the mean, the "
            f"fullest "
            f"being expert {worst['expert']} of layer {worst['layer']} (counted from 0)."
        )
    else:
        text += "No expert takes over 3 times the mean."
    return Sentence(text=text, tone="bad" if step.alerts else "good")


def about_drops(study: PlanningStudy) -> Sentence:
    """What a capacity limit would drop under this skew."""
    if not study.drop_curve:
        return Sentence(text=_DENSE)
    asked = study.scenario.routing.capacity_factor
    enough = next((point for point in study.drop_curve if point.drop_fraction <= FEW_DROPS), None)
    text = (
        "Without a capacity factor nothing is dropped; a full expert makes its GPU slow instead. "
        if asked is None
        else f"At the asked capacity factor of {asked:g}, {study.step.drop_fraction:.1%} of assignments are dropped. "
    )
    if enough is not None:
        text += (
            f"A capacity factor of {enough.capacity_factor:g} would keep drops within {FEW_DROPS:.0%}, leaving "
            f"{enough.padding_fraction:.0%} of the "
            "expert buffers empty."
        )
    else:
        text += f"None of the capacity factors shown keeps drops within {FEW_DROPS:.0%}."
    return Sentence(text=text)


def about_sizes(study: PlanningStudy) -> Sentence:
    """Days to train over cluster sizes: what doubling the GPUs buys."""
    points = [point for point in study.cluster_sizes if point.days is not None]
    asked = next(point for point in points if point.num_gpus == study.scenario.cluster.num_gpus)
    larger = next((point for point in points if point.num_gpus == 2 * asked.num_gpus), None)
    text = f"{asked.num_gpus:,} GPUs need {asked.days:,.1f} days for {short_count(study.tokens_to_train)} tokens."
    if larger is not None and larger.days and asked.days:
        text += (
            f" Twice as many need {larger.days:,.1f} days: {asked.days / larger.days:.2f} times as fast, "
            f"{asked.days / larger.days / 2:.0%} of the ideal."
        )
    text += " Interruptions and restarts are not counted; moesim goodput counts them."
    return Sentence(text=text)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
