"""The validation notebook's figure and sentences: every gate beside its limit, and what to do about those that fail."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from moesim.report.junit import gate_words, value_words
from moesim.report.sentences import Page, Sentence
from moesim.report.style import COLOURS, Picture, finish, headline, house_style, new_figure
from moesim.study.validate import Gate, Validation
from moesim.units import format_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STATUS_COLOURS = {"pass": COLOURS["optimizer"], "warn": COLOURS["experts"], "fail": COLOURS["alert"]}
GATE_WORDS = {
    "memory_headroom": "free memory",
    "out_of_memory": "steps out of memory",
    "dropped": "dropped assignments",
    "expert_load": "busiest expert over mean",
    "exposed_communication": "exposed communication",
    "bubble": "pipeline bubble",
    "mfu": "MFU",
    "envelope": "not modelled or validated",
    "goodput": "goodput",
    "days": "days",
    "cost": "cost",
}
_FURTHEST = 2.0  # of a limit: values beyond are drawn at the edge


def verdict(found: Validation) -> Page:
    """The first page: the verdict, what fails, what to do, what to watch."""
    failed = [gate for gate in found.gates if gate.status == "fail"]
    warned = [gate for gate in found.gates if gate.status == "warn"]
    step = found.step
    what = {
        "pass": "Yes: every gate passed.",
        "warn": f"With {len(warned)} {'warning' if len(warned) == 1 else 'warnings'}: no gate failed.",
        "fail": f"No: {len(failed)} of {len(found.gates)} gates failed.",
    }[found.status]
    sentences = [
        Sentence(
            question="Is the design sound?",
            text=f"{what} A step takes {format_seconds(step.step_s)}: {step.tokens_per_s_per_gpu:,.0f} tokens a second "
            "and GPU.",
            tone="good" if found.status == "pass" else "bad" if found.status == "fail" else "plain",
        )
    ]
    sentences += [
        Sentence(question=f"{_upper(GATE_WORDS[gate.name])}: failed", text=about(gate), tone="bad") for gate in failed
    ]
    sentences += [Sentence(question=f"{_upper(GATE_WORDS[gate.name])}: warned of", text=about(gate)) for gate in warned]
    return Page(subject=f"{found.design.name}: {found.status}", sentences=tuple(sentences))


def about(gate: Gate) -> str:
    """One gate: its number against its limit, its evidence, its fix."""
    fix = (
        f" Fix: {gate.fix}."
        if gate.fix
        else (" No single change that was tried helps." if gate.status == "fail" else "")
    )
    return f"{gate_words(gate).removesuffix('.')}. {_upper(gate.evidence).removesuffix('.')}.{fix}"


def _upper(text: str) -> str:
    """The text with a capital at its start; the rest stays."""
    return text[:1].upper() + text[1:]


def gates(found: Validation) -> Picture:
    """Each gate's number over its limit: left of the line is good."""
    shown = [gate for gate in found.gates if _bound(gate) is not None]
    num_failed, num_warned = (sum(gate.status == status for gate in shown) for status in ("fail", "warn"))
    title = f"Of {len(shown)} gates {num_failed} failed, {num_warned} warned"
    with house_style():
        figure = new_figure(9.6, 0.9 + 0.42 * len(shown))
        headline(figure, title)
        axes = figure.subplots()
        for i, gate in enumerate(reversed(shown)):
            _draw(axes, i, gate)
        axes.axvline(1.0, color=COLOURS["ink"], linewidth=1.2)
        axes.set_yticks(range(len(shown)), [GATE_WORDS[gate.name] for gate in reversed(shown)])
        axes.set_xlim(0, 1.75 * _FURTHEST)
        axes.set_xticks([0, 1, _FURTHEST], ["0", "limit", "twice the limit"])
        axes.set_xlabel("How much of its limit a gate takes up: right of the line it fails, or is warned of")
        axes.tick_params(axis="both", length=0)
        axes.spines["left"].set_visible(False)
    told = "; ".join(f"{GATE_WORDS[gate.name]} {gate.status}" for gate in shown)
    return finish(figure, f"{title}: {told}.")


def _bound(gate: Gate) -> float | None:
    """The limit that decided: the failing one, else the one that is warned at."""
    return gate.limit if gate.status == "fail" or gate.warn is None else gate.warn


def used_share(gate: Gate) -> float:
    """How much of its limit a gate takes up: below 1 it is kept."""
    bound, value = _bound(gate), gate.value
    assert bound is not None
    over, under = (value, bound) if gate.sense == "most" else (bound, value)
    if under <= 0:
        return 0.0 if over <= 0 else math.inf
    return max(over, 0.0) / under


def _draw(axes: Axes, at: int, gate: Gate) -> None:
    share, colour = used_share(gate), STATUS_COLOURS[gate.status]
    if math.isinf(share):  # no share of a limit of nothing: a mark beyond the line
        end, gap = 1.04, 10
        axes.plot([end], [at], color=colour, marker=">", markersize=7)
    else:
        end, gap = max(min(share, _FURTHEST), 1.0), 8
        axes.plot([0, min(share, _FURTHEST)], [at, at], color=colour, linewidth=6, solid_capstyle="butt")
    bound = _bound(gate)
    assert bound is not None
    unit = gate.unit if not gate.unit.startswith("of ") else ""
    text = f"{value_words(gate, gate.value)} {unit} (at {gate.sense} {value_words(gate, bound)})".replace("  ", " ")
    axes.annotate(text, (end, at), xytext=(gap, 0), textcoords="offset points", va="center", fontsize=9, color=colour)
