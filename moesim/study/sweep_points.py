"""What a sweep computes of each point: a function of a scenario, by name, and what a worker runs.

Everything here is imported by workers, so rooms that a function needs are imported inside it.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from moesim.errors import InputError, MoesimError, check, near_match
from moesim.scenario import Scenario

if TYPE_CHECKING:
    from moesim.describe.model import Model
    from moesim.study.fast import FastPath

Result = Mapping[str, Any]  # plain scalars by name: numbers, truth values, texts, None
PointFunction = Callable[[Scenario], Result]
_GROUPS = ("memory", "step_parts_s")  # mappings of a step's result that become columns such as memory.peak_bytes


def engine_point(scenario: Scenario) -> Result:
    """The numbers of ``moesim simulate``: a step by the event engine."""
    from moesim.metrics.summary import summarise
    from moesim.timeline.step import run_step

    step = summarise(run_step(scenario)).to_dict()
    flat = {name: value for name, value in step.items() if value is None or isinstance(value, (int, float, str))}
    for group in _GROUPS:
        flat |= {f"{group}.{name}": value for name, value in step[group].items()}
    return flat | {"inside_envelope": step["envelope"]["inside"], "num_alerts": len(step["alerts"])}


def sizes_point(scenario: Scenario) -> Result:
    """Counts alone, at once: parameters, FLOPs, weights, replicas, micro-batches. No time and no memory."""
    from moesim.describe.counts import describe

    counted = describe(scenario.model, scenario.train.seq_len)
    tokens = scenario.train.global_batch * scenario.train.seq_len
    return {
        "total_parameters": counted.total_parameters,
        "active_parameters": counted.active_parameters,
        "weight_bytes": counted.weight_bytes,
        "flops_per_token_forward": counted.flops_per_token_forward,
        "dp": scenario.layout.dp,
        "num_micro_batches": scenario.num_micro_batches,
        "tokens_per_step": tokens,
    }


def fast_point(scenario: Scenario) -> Result:
    """A step by the fast path: time and memory, without a clock. A worker keeps what its points have in common."""
    step = asdict(_path_of(_Base.of(scenario)).step(scenario))
    parts_s = {f"step_parts_s.{part}": seconds for part, seconds in step.pop("parts").items()}
    memory = {"memory.peak_bytes": step.pop("peak_bytes")}  # named as the engine's
    return step | memory | parts_s


@dataclass(frozen=True)
class _Base:
    """A scenario for a fast path to start from; equal to those that differ in the fast path's axes alone."""

    model: Model
    others: str  # what else is no axis
    scenario: Scenario = field(compare=False)

    @classmethod
    def of(cls, scenario: Scenario) -> _Base:
        from moesim.study.fast import AXES

        parts = (scenario, scenario.cluster, scenario.parallel, scenario.train, scenario.routing)
        left_out = {*AXES, "model", "cluster", "parallel", "train", "routing", "raw"}
        others = [(f.name, getattr(part, f.name)) for part in parts for f in fields(part) if f.name not in left_out]
        return cls(scenario.model, repr(others), scenario)


@lru_cache(maxsize=8)
def _path_of(base: _Base) -> FastPath:
    from moesim.study.fast import FastPath

    return FastPath(base.scenario)


FUNCTIONS: Mapping[str, PointFunction] = {"engine": engine_point, "fast": fast_point, "sizes": sizes_point}


def function_of(by: str) -> PointFunction:
    """The function of points that ``by`` names: one of FUNCTIONS, or ``package.module:function`` of one's own.

    Raises InputError where there is none.

    >>> function_of("moesim.study.sweep_points:sizes_point") is sizes_point
    True
    """
    if by in FUNCTIONS:
        return FUNCTIONS[by]
    module, colon, name = by.partition(":")
    rule = "must be " + ", ".join(FUNCTIONS) + ", or package.module:function"
    check(bool(colon), "--by", "", rule, by, near_match(by, FUNCTIONS))
    try:
        function: PointFunction = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError("--by", "", "must be a function that can be imported", by, f"{error}.") from None
    return function


def compute(by: str, scenarios: Sequence[Scenario]) -> tuple[list[dict[str, Any]], float]:
    """(for each scenario ``{"result": ...}`` or ``{"error": ..., "kind": refused|error}``, seconds for all).

    Runs in a worker. Whatever a point raises is its own failure and no other's.
    """
    began_s, function = time.perf_counter(), function_of(by)
    return [_outcome(function, scenario) for scenario in scenarios], time.perf_counter() - began_s


def _outcome(function: PointFunction, scenario: Scenario) -> dict[str, Any]:
    try:
        return {"result": {name: _plain(value) for name, value in function(scenario).items()}}
    except MoesimError as error:
        return {"kind": "refused", "error": str(error)}
    except Exception as error:  # a poison point: our fault, told by name, while the others go on
        return {"kind": "error", "error": f"{type(error).__name__}: {error}"}


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's; what is not finite as None."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> dict[str, str]:
    """What must be the same on every worker for the same bytes."""
    import sys

    import numpy

    from moesim import __version__

    return {"moesim": __version__, "python": ".".join(map(str, sys.version_info[:2])), "numpy": numpy.__version__}
