"""Functions of points that tests name: quick, poisonous, slow; an executor without processes."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import Executor, Future
from typing import Any

from moesim.errors import NotModelledError
from moesim.scenario import Scenario
from moesim.study.sweep_points import compute


class Inline(Executor):
    """Computes at once, and says how many points each task had."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        assert fn is compute
        self.sizes.append(len(args[1]))
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def quick(scenario: Scenario) -> dict[str, Any]:
    """A number that depends on the whole point, at once."""
    return {"number": int(scenario.point_id[:12], 16) / 7, "is_even": scenario.seed % 2 == 0}


def steady(scenario: Scenario) -> dict[str, Any]:
    """The same after a few milliseconds, so that there is a moment to be killed in."""
    time.sleep(0.003)
    return quick(scenario)


def poisonous(scenario: Scenario) -> dict[str, Any]:
    """Seed 3 kills its worker, 5 raises, 7 is not modelled, 9 never ends; all others are quick."""
    if scenario.seed == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if scenario.seed == 5:
        raise ZeroDivisionError("five")
    if scenario.seed == 7:
        raise NotModelledError("seven is not modelled")
    if scenario.seed == 9:
        time.sleep(600)
    return quick(scenario)
