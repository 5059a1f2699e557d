"""What interrupts a run that lasts weeks: how often machines fail, what a failure costs, how work is saved.

Rates are per GPU and hour of the job's own GPUs. See docs/model.md#goodput.
"""

from __future__ import annotations

from dataclasses import dataclass

from moesim.describe.checks import check_number, check_whole
from moesim.describe.hardware import Sourced
from moesim.errors import check
from moesim.units import DAY_S, HOUR_S, KILO

SERVER_GPUS = 8  # of the servers that published rates count, whatever the NVLink domain


@dataclass(frozen=True, kw_only=True)
class FailureKind:
    """One kind of interruption: its share of all, how long until somebody knows, whether a server must be swapped."""

    name: str
    share: float  # of all interruptions; those of a fleet sum to 1
    detection_s: float
    needs_server: bool  # the server leaves for repair and a spare takes its place

    def __post_init__(self) -> None:
        owner = f"failure kind {self.name}"
        check_number(owner, "share", self.share)
        check(0 < self.share <= 1, owner, "share", "must lie in 0..1", self.share)
        check_number(owner, "detection_s", self.detection_s)
        check(self.detection_s >= 0, owner, "detection_s", "must not be negative", self.detection_s)


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """How often the machines of a published cluster interrupted a job, and by what."""

    name: str
    title: str
    per_gpu_hour: Sourced
    kinds: tuple[FailureKind, ...]

    def __post_init__(self) -> None:
        total = sum(kind.share for kind in self.kinds)
        check(abs(total - 1) < 1e-6, f"fleet {self.name}", "kinds", "must have shares that sum to 1", total)

    @property
    def per_thousand_server_days(self) -> float:
        """The rate as fleets publish it: interruptions of 1,000 servers of 8 GPUs in a day."""
        return self.per_gpu_hour.value * SERVER_GPUS * (DAY_S / HOUR_S) * KILO


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """How work is saved. stall_s: training stands still; write_s: until the checkpoint is safe, from its begin.

    A synchronous checkpoint stalls for as long as it writes.
    """

    interval_s: float  # of training between two checkpoints
    stall_s: float
    write_s: float

    def __post_init__(self) -> None:
        for name in ("interval_s", "stall_s", "write_s"):
            check_number("checkpoints", name, getattr(self, name))
        check(self.interval_s > 0, "checkpoints", "interval_s", "must be positive", self.interval_s)
        check(self.stall_s >= 0, "checkpoints", "stall_s", "must not be negative", self.stall_s)
        rule = f"must be at least stall_s = {self.stall_s:g}"
        check(self.write_s >= self.stall_s, "checkpoints", "write_s", rule, self.write_s)


@dataclass(frozen=True, kw_only=True)
class Operations:
    """How a job is run: what a restart takes, servers in reserve, repair, slow servers, planned stops."""

    restart_s: float  # from knowing of a failure to the first step, with all servers there
    num_spares: int = 0  # servers in reserve, paid for as the others
    swap_s: float = 0.0  # to bring a spare in, besides the restart
    repair_s: float = DAY_S  # until a failed server is a spare again
    slow_per_gpu_hour: float = 0.0  # how often a server turns slow
    slow_fraction: float = 0.1  # by which it then slows the whole job
    slow_detection_s: float = 4 * HOUR_S  # until it is found and swapped at the next restart
    planned_per_day: float = 0.0  # stops for maintenance: work is saved first

    def __post_init__(self) -> None:
        check_whole("operations", "num_spares", self.num_spares, least=0)
        for name in ("restart_s", "swap_s", "repair_s", "slow_per_gpu_hour", "slow_detection_s", "planned_per_day"):
            check_number("operations", name, getattr(self, name))
            check(getattr(self, name) >= 0, "operations", name, "must not be negative", getattr(self, name))
        check_number("operations", "slow_fraction", self.slow_fraction)
        check(0 <= self.slow_fraction < 10, "operations", "slow_fraction", "must lie in 0..10", self.slow_fraction)
