"""Tables of the calibration notebook: what was timed and how, and the held-out errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesim.report.calibration_figures import KIND_WORDS
from moesim.report.tables import _table as table_of
from moesim.study.calibration import CalibrationStudy
from moesim.units import GIGA, MICRO

if TYPE_CHECKING:
    from great_tables import GT


def made_with(study: CalibrationStudy) -> GT:
    """Device, software, sizes and effort of the measurement."""
    profile = study.profile
    device, settings, fit = profile.device, profile.settings, profile.fit
    shapes = [
        f"{s.name}: hidden {s.hidden}, expert width {s.expert_width}, {s.num_experts} experts, top-{s.top_k}"
        for s in profile.shapes
    ]
    effort = f"{settings.num_passes} passes over {len(profile.points):,} points{', quick' if settings.quick else ''}"
    ranks = f", by {settings.num_ranks} processes at once" if settings.num_ranks > 1 else ""
    rows = {
        "Device": str(device),
        "Threads": str(device.num_threads),
        "Precision": profile.dtype,
        "Sizes": "; ".join(shapes),
        "Effort": effort + ranks,
        "Best rates of the run": f"{fit.flops_per_s / GIGA:,.0f} GFLOP/s, {fit.bytes_per_s / GIGA:,.1f} GB/s",
        "An empty call": f"{profile.launch_s / MICRO:.1f} us on the device, {profile.host_per_op_s / MICRO:.1f} us of "
        "the host",
        "Measured": profile.date,
    }
    return table_of("made_with", {"": list(rows), "Profile": list(rows.values())}, right=[])


def errors(study: CalibrationStudy) -> GT:
    """Held-out errors by kind and direction, beside the noise of repeating; marked where larger than hoped for."""
    rows = study.profile.errors
    names = [f"{KIND_WORDS[row.kind]}, {row.direction}" for row in rows]
    beyond = [f"{KIND_WORDS[row.kind]}, {row.direction}" for row in study.beyond_goal]
    frame = {
        "": names,
        "Held-out points": [str(row.num_points) for row in rows],
        "Median error": [f"{row.median_fraction:.1%}" for row in rows],
        "Nine in ten": [f"{row.p90_fraction:.1%}" for row in rows],
        "Bias": [f"{row.bias_fraction:+.1%}" for row in rows],
        "Repeat noise": [f"{row.noise_fraction:.1%}" for row in rows],
    }
    return table_of("errors", frame, right=list(frame)[1:], alert=("", beyond))
