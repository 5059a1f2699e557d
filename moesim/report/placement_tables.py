"""Tables of the placement notebook (great-tables): the policies side by side, what moving to each costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesim.report.style import signed_percent
from moesim.report.tables import _table
from moesim.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from great_tables import GT

    from moesim.study.placement import PlacementStudy

_MISSING = "–"


def policies(study: PlacementStudy) -> GT:
    """Each policy: balance, bound, traffic between nodes, step, memory. The most even first."""
    names = (
        "Policy",
        "Busiest GPU",
        "Bound",
        "Copies to other nodes",
        "Step",
        "Against today",
        "Free per GPU",
        "Fits?",
    )
    frame: dict[str, list[str]] = {name: [] for name in names}
    for point in sorted(study.by_policy, key=lambda point: point.max_mean):
        step, base = point.step, study.base.step
        row = (
            point.policy,
            f"{point.max_mean:.3f} ×",
            f"{point.lower_bound:.3f} ×",
            f"{point.cross_node_per_token:.2f}",
            _MISSING if step is None else format_seconds(step.step_s),
            _MISSING if step is None or base is None else signed_percent(step.step_s / base.step_s - 1),
            _MISSING if step is None else format_bytes(step.headroom_bytes),
            _MISSING if step is None else "yes" if step.fits else "no",
        )
        for column, value in zip(frame.values(), row, strict=True):
            column.append(value)
    right = [name for name in names if name not in ("Policy", "Fits?")]
    return _table("placement-policies", frame, right=right, alert=("Fits?", ("no",)))


def moves(study: PlacementStudy) -> GT:
    """What changing from today's layout to each policy moves, and the stall."""
    names = ("Policy", "Slots moved", "Over NVLink", "Between nodes", "Stall at least", "Paid back after")
    frame: dict[str, list[str]] = {name: [] for name in names}
    for point in sorted(study.by_policy, key=lambda point: point.migration.num_moved_slots):
        move = point.migration
        saved_s = 0.0
        if point.step is not None and study.base.step is not None:
            saved_s = study.base.step.step_s - point.step.step_s
        steps = int(max(1, -(-move.stall_s // saved_s))) if saved_s > 0 else 0
        row = (
            point.policy,
            f"{move.num_moved_slots:,}",
            format_bytes(move.nvlink_bytes),
            format_bytes(move.nic_bytes),
            format_seconds(move.stall_s),
            f"{steps:,} step{'' if steps == 1 else 's'}" if steps and move.num_moved_slots else _MISSING,
        )
        for column, value in zip(frame.values(), row, strict=True):
            column.append(value)
    return _table("placement-moves", frame, right=list(names[1:]))
