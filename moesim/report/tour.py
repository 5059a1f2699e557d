"""The tour: one scenario and the questions moesim answers about it, a sentence each, and their numbers as files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesim.metrics.scored import accuracy_statement
from moesim.metrics.step import StepResult
from moesim.report.alltoall_figures import ALGORITHM_WORDS, link_words
from moesim.report.design_figures import three_digits
from moesim.report.export import write_study
from moesim.report.sentences import Page, Sentence
from moesim.report.style import short_count, signed_percent
from moesim.scenario import Scenario
from moesim.study.exchange import ExchangeStudy, exchange_study
from moesim.study.goodput import GoodputStudy, RunPlan, goodput_study
from moesim.study.simulate import simulate
from moesim.units import DAY_S, MEGA, format_bytes, format_seconds

_NUM_RUNS = 16
_GINI = 0.25  # one point only: the tour shows no sweep
_PLACED_BY = "search"
_STEP_NUMBERS = {
    "step_s": "s",
    "tokens_per_s_per_gpu": "tokens/s",
    "mfu": "1",
    "exposed_comm_s": "s",
    "wait_s": "s",
    "gini": "1",
    "max_mean_load": "1",
    "headroom_bytes": "B",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Tour:
    """One scenario's step, its dispatch, the step with experts placed by their load, and the whole run."""

    scenario: Scenario
    step: StepResult
    exchange: ExchangeStudy
    placed: StepResult
    run: GoodputStudy

    def to_dict(self) -> dict[str, Any]:
        """Headline numbers, plain; each notebook that goes deeper writes all of its own."""
        timed = self.exchange.exact[self.exchange.own]
        return {
            "step": _numbers(self.step),
            "placed": _numbers(self.placed),
            "peak_bytes": self.step.memory["peak_bytes"],
            "fits": self.step.fits,
            "dispatch_s": timed.completed.completion_s,
            "busiest_port_s": timed.lower_bound_s,
            "run": self.run.to_dict(),
        }

    def rows(self) -> Iterator[tuple[str, str, Any, Any, str]]:
        """One long table: section, name, x, value, unit."""
        for section, result in (("step", self.step), ("placed", self.placed)):
            for name, value in _numbers(result).items():
                yield section, name, "", value, _STEP_NUMBERS[name]
        timed = self.exchange.exact[self.exchange.own]
        yield "step", "peak_bytes", "", self.step.memory["peak_bytes"], "B"
        yield "dispatch", "completion_s", "", timed.completed.completion_s, "s"
        yield "dispatch", "lower_bound_s", "", timed.lower_bound_s, "s"
        yield from self.run.rows()


def take_tour(
    scenario: Scenario,
    tokens_to_train: float,
    price_per_gpu_hour: float | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Tour:
    """Simulate what the tour shows. Raises InputError, and NotModelledError for a model that exchanges nothing.

    >>> take_tour(scenario, 1e12).step.fits  # doctest: +SKIP
    True
    """
    progress("the step")
    step = simulate(scenario)
    progress("one dispatch")
    exchange = exchange_study(scenario, tokens=(scenario.train.seq_len,), ginis=(_GINI,))
    progress("experts placed by their load")
    placed = simulate(scenario.placed_anew(_PLACED_BY, scenario.placement.num_slots))
    progress("the whole run")
    plan = RunPlan(tokens=tokens_to_train, price_per_gpu_hour=price_per_gpu_hour, num_runs=_NUM_RUNS)
    run = goodput_study(scenario, plan)
    return Tour(scenario=scenario, step=step, exchange=exchange, placed=placed, run=run)


def first_page(tour: Tour) -> Page:
    """All sentences below each other, each under its question."""
    scenario = tour.scenario
    asked = (
        ("How fast is a step?", about_step(tour)),
        ("Does it fit?", about_memory(tour)),
        ("How uneven is the routing?", about_routing(tour)),
        ("Where does an all-to-all's time go?", about_exchange(tour)),
        ("What would better placement gain?", about_placement(tour)),
        ("How long, and for how much?", about_run(tour)),
        ("How sure is this?", how_sure(tour)),
    )
    sentences = tuple(Sentence(question=question, text=said.text, tone=said.tone) for question, said in asked)
    return Page(
        subject=f"{scenario.model.name} on {scenario.cluster.num_gpus:,} × {scenario.cluster.gpu.name}",
        sentences=sentences,
    )


def about_step(tour: Tour) -> Sentence:
    """Step time and speed."""
    step = tour.step
    return Sentence(
        text=f"A step takes {format_seconds(step.step_s)}, {step.tokens_per_s_per_gpu:,.0f} tokens per second and GPU; "
        f"{step.mfu:.0%} of the GPUs' peak goes into the model's own arithmetic, "
        f"{step.exposed_comm_s / step.step_s:.0%} of the time into communication that nothing hides."
    )


def about_memory(tour: Tour) -> Sentence:
    """Peak against what a GPU holds."""
    step, capacity = tour.step, tour.scenario.cluster.gpu.memory_bytes.value
    says = "It fits" if step.fits else "It does not fit"
    return Sentence(
        text=f"{says}: the fullest GPU needs {format_bytes(step.memory['peak_bytes'])} of {format_bytes(capacity)}.",
        tone="good" if step.fits else "bad",
    )


def about_routing(tour: Tour) -> Sentence:
    """Skew and what waiting for the busiest costs."""
    step = tour.step
    dropped = f"{step.drop_fraction:.1%} of the tokens' assignments are" if step.drop_fraction else "nothing is"
    return Sentence(
        text=f"The busiest expert takes {step.max_mean_load:.1f} times the mean (Gini {step.gini:.2f}); GPUs wait "
        f"{step.wait_s / step.step_s:.0%} of the step for the slowest, and {dropped} dropped."
    )


def about_exchange(tour: Tour) -> Sentence:
    """One dispatch against its busiest port, and the fastest way of sending."""
    exchange = tour.exchange
    timed = exchange.exact[exchange.own]
    fastest = "; it is the fastest of the three ways of sending"
    if exchange.fastest != exchange.own:
        shorter = 1 - exchange.done_s(exchange.fastest) / exchange.done_s(exchange.own)
        fastest = f"; {ALGORITHM_WORDS[exchange.fastest]} would be {shorter:.0%} shorter"
    return Sentence(
        text=f"One dispatch takes {format_seconds(timed.completed.completion_s)} on the wires, bound by "
        f"{link_words(timed.bottleneck)}{fastest}."
    )


def about_placement(tour: Tour) -> Sentence:
    """The step with experts placed by their load, against as asked."""
    change = tour.placed.step_s / tour.step.step_s - 1
    return Sentence(
        text=f"With experts placed by their load the step takes {format_seconds(tour.placed.step_s)} "
        f"({signed_percent(change)}), and GPUs wait {tour.placed.wait_s / tour.placed.step_s:.0%} of it.",
        tone="good" if change < 0 else "plain",
    )


def about_run(tour: Tour) -> Sentence:
    """Days and GPU-hours to the tokens asked for, failures included; money where a price was given."""
    run = tour.run
    money = "Name a price per GPU-hour for money."
    if run.cost is not None:
        low, high = run.cost.p10 / MEGA, run.cost.p90 / MEGA
        money = f"{low:,.2f} to {high:,.2f} million {run.plan.currency} at {run.plan.price_per_gpu_hour:g} a GPU-hour."
    hours = run.gpu_hours
    return Sentence(
        text=f"{short_count(run.plan.tokens)} tokens take {run.days.p10:,.0f} to {run.days.p90:,.0f} days and "
        f"{three_digits(hours.p10)} to {three_digits(hours.p90)} GPU-hours, failures and the error of the "
        f"predicted step included ({run.ideal_s / DAY_S:,.0f} days without either). {money}"
    )


def how_sure(tour: Tour) -> Sentence:
    """What measured steps like this one say of the predictions."""
    return Sentence(text=accuracy_statement(tour.scenario))


def write_tour(tour: Tour, out_dir: str | Path) -> list[Path]:
    """Write results.json and results.csv, nothing where out_dir is ""; returns their paths.

    Raises InputError where the folder cannot be written.
    """
    return write_study(
        out_dir,
        command="tour",
        inputs={"scenario": tour.scenario.to_dict()},
        result=tour.to_dict(),
        rows=tour.rows(),
        provenance=[item.__dict__ for item in tour.step.provenance],
        warnings=tour.step.warnings,
    )


def _numbers(result: StepResult) -> dict[str, float]:
    return {name: float(getattr(result, name)) for name in _STEP_NUMBERS}
