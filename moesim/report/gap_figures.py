"""From the roofline to the step: a waterfall, and what it says in a sentence."""

from __future__ import annotations

from moesim.report.sentences import Sentence
from moesim.report.style import COLOURS, Picture, finish, headline, house_style, light_grid, new_figure
from moesim.study.gap import Gap
from moesim.units import format_seconds


def waterfall(gap: Gap) -> Picture:
    """What each added thing costs [s], one bar after another, from the roofline to the step."""
    added, step_s = gap.added_s, gap.steps[-1].step_s
    first_s = gap.steps[0].step_s
    title = f"The step takes {step_s / first_s:.1f} times the roofline's {format_seconds(first_s)}"
    with house_style():
        figure = new_figure(9.0, 1.2 + 0.42 * (len(gap.steps) + 1))
        axes = figure.subplots()
        headline(figure, title)
        names = []
        for y, step in enumerate(gap.steps):
            own_s = added[step.name]
            colour = COLOURS["quiet"] if y == 0 else COLOURS["optimizer" if own_s < 0 else "experts"]
            axes.barh(y, own_s, left=step.step_s - own_s, height=0.7, color=colour)
            label = format_seconds(own_s) if y == 0 else f"{'−' if own_s < 0 else '+'}{format_seconds(abs(own_s))}"
            axes.text(max(step.step_s, step.step_s - own_s) + step_s * 0.01, y, label, va="center", fontsize=9.5)
            names.append(step.words)
        axes.barh(len(gap.steps), step_s, height=0.7, color=COLOURS["attention"])
        axes.text(step_s * 1.01, len(gap.steps), format_seconds(step_s), va="center", fontsize=9.5)
        axes.set_yticks(range(len(gap.steps) + 1), [*names, "the step"])
        highest_s = max(step.step_s for step in gap.steps)
        axes.set(xlim=(0, highest_s * 1.15), ylim=(len(gap.steps) + 0.6, -0.6), xlabel="Step time [s]")
        light_grid(axes, "x")
        axes.spines["left"].set_visible(False)
    alt = "; ".join(f"{step.words}: {step.step_s:.3g} s" for step in gap.steps)
    return finish(figure, f"{title}. {alt}.")


def about_gap(gap: Gap) -> Sentence:
    """What costs most between the roofline and the step, and what the critical path is made of."""
    added = gap.added_s
    costs = {step.words: added[step.name] for step in gap.steps[1:]}
    most = max(costs, key=lambda words: costs[words])
    parts = sorted(gap.path.parts_s.items(), key=lambda item: -item[1])[:2]
    largest = " and ".join(f"{part.replace('_', ' ')} ({format_seconds(seconds)})" for part, seconds in parts)
    return Sentence(
        text=f"Between the roofline and the step, most is added by {most}: {format_seconds(costs[most])}. Along the "
        f"critical path most goes to {largest}."
    )
