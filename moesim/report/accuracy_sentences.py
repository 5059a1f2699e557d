"""The accuracy report in plain sentences: a first page, and a takeaway for each figure. All of it is computed."""

from __future__ import annotations

from collections.abc import Sequence

from moesim.report.accuracy_figures import PART_WORDS, WHAT
from moesim.report.sentences import Page, Sentence
from moesim.study.accuracy import Accuracy, AccuracyRow, rows_by_part, summarise_errors

_GOOD_MEDIAN, _BAD_MEDIAN = 0.1, 0.25
_LEAST_BIAS = 0.01  # smaller ones are none


def verdict(accuracy: Accuracy) -> Page:
    """The first page: how far off, in which direction, what a new release would see, what is left out."""
    answers = (
        ("How far off are predictions that no constant was fitted on?", about_errors(accuracy)),
        ("And on software that no constant has seen?", about_left_out(accuracy)),
        ("Which rows did something that moesim does not model?", about_envelope(accuracy)),
    )
    sentences = tuple(Sentence(question=asked, text=told.text, tone=told.tone) for asked, told in answers)
    return Page(subject=f"{WHAT[accuracy.kind]}: {len(accuracy.rows)} measured rows", sentences=sentences)


def about_errors(accuracy: Accuracy) -> Sentence:
    """Median, nine in ten, bias and worst of the tested rows."""
    if not accuracy.tested:
        return Sentence(text="Every row took part in a fit: nothing is tested.", tone="bad")
    told = summarise_errors("tested", accuracy.tested)
    tone = "good" if told.median <= _GOOD_MEDIAN else "bad" if told.median >= _BAD_MEDIAN else "plain"
    return Sentence(text=f"{_errors(accuracy.tested)} Worst: {told.worst_id}, {told.worst:+.0%}.", tone=tone)


def about_left_out(accuracy: Accuracy) -> Sentence:
    """All rows with their own release left out of the fit."""
    if not accuracy.left_out:
        return Sentence(text="No row of this kind tells how it would be with its release left out of the fit.")
    return Sentence(text="With each row's own release left out of the fit: " + _errors(accuracy.left_out))


def about_envelope(accuracy: Accuracy) -> Sentence:
    """How many rows lie outside, their errors, and the commonest reason."""
    outside = [row for row in accuracy.rows if row.reasons]
    if not outside:
        return Sentence(text="None: all rows lie inside the envelope.", tone="good")
    reasons = [reason for row in outside for reason in row.reasons]
    common = max(dict.fromkeys(reasons), key=reasons.count)
    share = len(outside) / len(accuracy.rows)
    text = f"{len(outside)} of {len(accuracy.rows)} ({share:.0%}), most often: {common}. "
    tested = [row for row in outside if not row.used_in_fit]
    return Sentence(text=text + (f"Of them, {_errors(tested)}" if tested else ""))


def about_parts(accuracy: Accuracy) -> Sentence:
    """Errors by what takes the step."""
    told = [
        f"{PART_WORDS[name]} ({len(rows)} rows): median {summarise_errors(name, rows).median:.0%}, bias "
        f"{summarise_errors(name, rows).bias:+.0%}"
        for name, rows in rows_by_part(accuracy).items()
    ]
    if not told:
        return Sentence(text="No part of a row stands beside another.")
    return Sentence(
        text="Where a part besides kernels takes a fifth of the step it names the row: " + "; ".join(told) + "."
    )


def _errors(rows: Sequence[AccuracyRow]) -> str:
    told = summarise_errors("rows", rows)
    what, ways = ("peak", ("small", "large")) if rows[0].unit == "bytes" else ("time", ("short", "long"))
    way = f"too {ways[told.bias >= 0]}"
    bias = f"on average {abs(told.bias):.0%} {way}" if abs(told.bias) >= _LEAST_BIAS else "no bias to speak of"
    half = f"half within {told.median:.1%} of the measured {what}"
    return f"{len(rows)} rows: {half}, nine in ten {told.p90:.0%}; {bias}."
