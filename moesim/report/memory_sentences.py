"""The memory notebook in plain sentences: does it fit, when is it fullest, what trades well, what skew adds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesim.report.sentences import Page, Sentence
from moesim.report.style import MEMORY_WORDS, signed_percent
from moesim.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from moesim.scenario import Scenario
    from moesim.study.memory import MemoryStudy, TradePoint

PARTS = ("weights_bytes", "gradients_bytes", "optimizer_bytes", "activations_bytes", "dispatch_bytes")


def verdict(scenario: Scenario, study: MemoryStudy) -> Page:
    """The first page: does it fit, what takes the room, when, what to change, what skew adds."""
    gpus, gpu = scenario.cluster.num_gpus, scenario.cluster.gpu.name
    questions = (
        ("Does it fit?", about_fit(study)),
        ("What takes the room?", about_stages(study)),
        ("When is it fullest?", about_timeline(study)),
        ("What trades memory for time?", about_trades(study)),
        *((("What does skew add?", about_skew(study)),) if study.over_skew else ()),
    )
    answers = [Sentence(question=question, text=said.text, tone=said.tone) for question, said in questions]
    return Page(subject=f"Memory of {scenario.model.name} on {gpus:,} × {gpu}", sentences=tuple(answers))


def about_fit(study: MemoryStudy) -> Sentence:
    """Whether the fullest GPU holds it, and the cheapest ways where it does not."""
    step = study.step
    peak, capacity = step.memory["peak_bytes"], format_bytes(study.capacity_bytes)
    if step.fits:
        tail = f"; 99 of 100 steps stay under {format_bytes(step.memory['peak_p99_bytes'])}"
        return Sentence(text=f"Yes: the fullest GPU needs {format_bytes(peak)} of {capacity}{tail}.", tone="good")
    short = f"No: the fullest GPU needs {format_bytes(peak)}, and has {capacity}."
    if not study.ways:
        return Sentence(text=f"{short} Nothing tried makes it fit: it takes GPUs with more memory.", tone="bad")
    told = "; or ".join(
        f"{way.name} ({signed_percent(way.cost_fraction)} of step time, {format_bytes(way.headroom_bytes)} free)"
        for way in study.ways[:3]
    )
    return Sentence(text=f"{short} The cheapest ways: {told}.", tone="bad")


def about_stages(study: MemoryStudy) -> Sentence:
    """The largest part on the fullest stage, and how far apart stages are."""
    stages = study.step.memory_by_rank
    fullest = max(stages, key=lambda stage: float(stage["peak_bytes"]))
    part = max(PARTS, key=lambda name: float(fullest[name]))
    share = float(fullest[part]) / float(fullest["peak_bytes"])
    text = f"Of the fullest GPU's memory {MEMORY_WORDS[part]} take {share:.0%}, {format_bytes(float(fullest[part]))}."
    if len(stages) > 1:
        least = min(float(stage["peak_bytes"]) for stage in stages)
        text += (
            f" Stage {fullest['stage']} needs {format_bytes(float(fullest['peak_bytes']))}, the emptiest stage "
            f"{format_bytes(least)}."
        )
    return Sentence(text=text)


def about_timeline(study: MemoryStudy) -> Sentence:
    """At which operation the peak lies, and how much of it is there all the time."""
    line = study.fullest
    at = int(line.peak_bytes_K.argmax())
    name, micro_batch = line.names_K[at].replace("_", " "), int(line.micro_batch_K[at])
    where = f"the {name} of micro-batch {micro_batch}" if micro_batch >= 0 else "the optimizer step"
    standing = float(line.begin_bytes_K[0])
    moment = next((s["moment"] for s in study.step.memory_by_rank if s["stage"] == line.stage), "")
    inner = f" ({moment})" if moment and micro_batch >= 0 else ""
    return Sentence(
        text=f"In {where}{inner}, {format_seconds(float(line.start_s_K[at]))} after the step begins. "
        f"{format_bytes(standing)} of the peak's {format_bytes(line.peak_bytes)} are there all the time."
    )


def about_trades(study: MemoryStudy) -> Sentence:
    """The settings that save memory at the least time, and the one that saves most."""
    asked = study.trades[0]
    saving = [point for point in study.worth_it() if point.peak_bytes < 0.99 * asked.peak_bytes]
    if not saving:
        return Sentence(text="Neither recomputation nor offloading lowers the peak by more than a hundredth.")
    first, last = saving[0], saving[-1]
    text = f"{_told(first, asked)}"
    if last is not first:
        text += f"; at most, {_told(last, asked)}"
    return Sentence(text=f"{text}.")


def _told(point: TradePoint, asked: TradePoint) -> str:
    saved = format_bytes(asked.peak_bytes - point.peak_bytes)
    return f"{point.name} saves {saved} for {signed_percent(point.step_s / asked.step_s - 1)} of step time"


def about_skew(study: MemoryStudy) -> Sentence:
    """What the most skewed load needs beyond the evenest."""
    low, high = study.over_skew[0], study.over_skew[-1]
    grown = high.p99_bytes - low.p99_bytes
    fits = [point.gini for point in study.over_skew if point.p99_bytes <= study.capacity_bytes]
    reach = f"99 of 100 steps fit up to Gini {max(fits):g}" if fits else "At none of them do 99 of 100 steps fit"
    more = f"{format_bytes(abs(grown))} {'more' if grown >= 0 else 'less'}"
    text = f"At Gini {high.gini:g}, 99 of 100 steps stay under {format_bytes(high.p99_bytes)}, {more} than at Gini "
    return Sentence(text=f"{text}{low.gini:g}. {reach}.")
