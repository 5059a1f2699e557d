"""One question, one answer: a scenario in, a step's numbers out."""

from __future__ import annotations

from moesim.metrics.step import StepResult
from moesim.metrics.summary import summarise
from moesim.scenario import Scenario
from moesim.timeline.step import run_step


def simulate(scenario: Scenario) -> StepResult:
    """Simulate one training step. The same scenario gives the same result, on any number of threads.

    Raises InputError and NotModelledError.

    >>> from moesim import Scenario
    >>> scenario = Scenario.make(model="mixtral-8x7b", cluster="h100-8x-ib400", num_gpus=64, ep=8)
    >>> simulate(scenario).fits  # doctest: +SKIP
    False
    """
    return summarise(run_step(scenario))
