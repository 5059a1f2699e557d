"""The calibration report in plain sentences: a first page, and a takeaway for each figure. All of it is computed."""

from __future__ import annotations

import numpy as np

from moesim.report.calibration_figures import DIRECTIONS, KIND_WORDS
from moesim.report.sentences import Page, Sentence
from moesim.study.calibration import (
    GOAL_MEDIAN_FRACTION,
    GOAL_NOISES,
    GOAL_P90_FRACTION,
    CalibrationStudy,
)

_FAR_FRACTION = 0.1  # of a layer's time that the sum of its parts may miss before it is bad news


def verdict(study: CalibrationStudy) -> Page:
    """The first page: products, held-out errors, layers, exchanges."""
    answers = (
        ("How closely are shapes between the timed ones predicted?", about_errors(study)),
        ("Does a whole layer take the sum of its parts?", about_layers(study)),
        ("Do uneven loads follow?", about_skew(study)),
        ("Were exchanges between ranks timed?", about_exchanges(study)),
    )
    subject = f"{study.profile.device.name}, {study.profile.dtype}: profile {study.profile.name}"
    return Page(
        subject=subject,
        sentences=tuple(Sentence(question=asked, text=told.text, tone=told.tone) for asked, told in answers),
    )


def about_errors(study: CalibrationStudy) -> Sentence:
    """Held-out errors against the goal, the kinds beyond it, and the noise."""
    rows, beyond = study.profile.errors, study.beyond_goal
    goal = (
        f"{GOAL_MEDIAN_FRACTION:.0%} in the median (or {GOAL_NOISES:g} times the noise of repeating) and "
        f"{GOAL_P90_FRACTION:.0%} for nine in ten"
    )
    noise = np.median([row.noise_fraction for row in rows])
    text = (
        f"{len(rows) - len(beyond)} of {len(rows)} kinds stay within {goal}, on points that the fit never saw; "
        f"measuring again disagrees by {noise:.1%}."
    )
    if beyond:
        told = ", ".join(
            f"{KIND_WORDS[row.kind]} {row.direction} {row.median_fraction:.1%} and {row.p90_fraction:.1%}"
            for row in beyond
        )
        text += f" Beyond it: {told}."
    return Sentence(text=text, tone="plain" if beyond else "good")


def about_layers(study: CalibrationStudy) -> Sentence:
    """Whole layers against the sum of their parts."""
    median = {d: float(np.median([p.error_fraction for p in study.of("layer", d)])) for d in DIRECTIONS}
    told = [
        f"{direction} {abs(error):.1%} too {'short' if error < 0 else 'long'}" for direction, error in median.items()
    ]
    tone = "bad" if max(map(abs, median.values())) > _FAR_FRACTION else "plain"
    return Sentence(text=f"The sum of the parts is in the median {' and '.join(told)}; no layer was fitted.", tone=tone)


def about_skew(study: CalibrationStudy) -> Sentence:
    """Uneven loads, which no fit saw."""
    told = []
    for direction in DIRECTIONS:
        errors = [abs(p.error_fraction) for p in study.of("grouped_skewed", direction)]
        told.append(f"{direction} {np.median(errors):.1%} in the median, {max(errors):.1%} at worst")
    return Sentence(text=f"Grouped products with uneven loads, none of them fitted, are off by: {'; '.join(told)}.")


def about_exchanges(study: CalibrationStudy) -> Sentence:
    """All-to-alls over local ranks, where there are any."""
    uneven = study.of("all_to_all_skewed", "forward")
    if not uneven:
        return Sentence(text="No: this profile holds no all-to-all; moesim calibrate times them where two ranks fit.")
    errors = [abs(p.error_fraction) for p in uneven]
    return Sentence(
        text=f"Yes, between {uneven[0].point.width_out} ranks; uneven ones, none of them fitted, are off by "
        f"{np.median(errors):.1%} in the median, {max(errors):.1%} at worst."
    )
