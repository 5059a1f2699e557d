"""The fast path for search: a training step's time and memory, configuration by configuration, without a clock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moesim.errors import MoesimError
from moesim.scenario import Scenario

Changes = Mapping[str, Any]  # flat names of a scenario (LEAVES) and their values


@dataclass(frozen=True, kw_only=True)
class FastStep:
    """One step. Times [s] are means over ranks, NaN where this path does not know; peak_bytes is the fullest rank's."""

    step_s: float
    tokens_per_s_per_gpu: float
    exposed_comm_s: float
    bubble_fraction: float
    wait_s: float
    peak_bytes: float
    fits: bool
    headroom_bytes: float
    parts: Mapping[str, float]  # seconds by the names of metrics.step.STEP_PARTS


@dataclass(frozen=True)
class Refused:
    """A configuration that cannot be: reason names the rule that it breaks."""

    reason: str


class FastPath:
    """Steps of a scenario under changes of its flat names; what configurations share is computed once.

    >>> base = Scenario.make(model="olmoe-1b-7b", cluster="h100-8x-ib400", num_gpus=8, ep=8, global_batch=64)
    >>> step, refused = FastPath(base)([{"ep": 4}, {"ep": 3}])
    >>> step.fits, refused.reason
    (True, 'parallel: ep: ep=3 does not divide dp*cp*tp = 8*1*1 = 8; got 3')
    """

    def __init__(self, base: Scenario) -> None:
        self.base = base

    def __call__(self, configurations: Iterable[Changes]) -> list[FastStep | Refused]:
        """A step, or why there is none, for each mapping of flat names to values."""
        return [self._one(changes) for changes in configurations]

    def _one(self, changes: Changes) -> FastStep | Refused:
        try:
            return engine_step(self.base.with_(**changes))
        except MoesimError as error:
            return Refused(str(error))


def engine_step(scenario: Scenario) -> FastStep:
    """A step by the event engine, in the fast path's terms."""
    from moesim.metrics.memory import fullest
    from moesim.metrics.step import COMM_PARTS
    from moesim.metrics.summary import step_parts
    from moesim.timeline.step import run_step

    trace = run_step(scenario)
    parts = step_parts(trace)
    peak_bytes = fullest(scenario, trace.load).peak_bytes
    headroom_bytes = scenario.cluster.gpu.memory_bytes.value - peak_bytes
    tokens = scenario.train.global_batch * scenario.train.seq_len
    return FastStep(
        step_s=trace.step_s,
        tokens_per_s_per_gpu=tokens / trace.step_s / scenario.cluster.num_gpus,
        exposed_comm_s=sum(parts[part] for part in COMM_PARTS),
        bubble_fraction=parts["pipeline_bubble"] / trace.step_s,
        wait_s=parts["wait_for_slowest"],
        peak_bytes=peak_bytes,
        fits=headroom_bytes >= 0,
        headroom_bytes=headroom_bytes,
        parts=parts,
    )
