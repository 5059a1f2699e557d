"""Self-check: the skew suite as a real layer took it on this device, beside what its calibration profile predicts.

The layer's ranks run one after the other on one device, a step taking as long as its slowest rank; or all at once as a
group that exchanges rows. A case takes as long as its steps in the mean. See docs/model.md#self-check.

Legend: S source ranks (R, the same ranks as holders), E experts, L experts of a rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moesim.cost.profile import Profile, TimedShapes
from moesim.routing.suite import BURST_STEPS, SKEWS, Skew, skew_load
from moesim.study.selfcheck_work import GroupWork, RankWork, Work, predict_work, work_flops

NUM_RANKS = 4  # that run one after the other
SCORED_RATIO = 1.15  # cases less skewed than this say little: any predictor is right about them
_LEAST_HOT = 1.5  # of its even share that a hot rank takes: of two ranks half of all would be none
_TOKENS_STEP = 16  # the suite's larger size over its smaller one, where weights outweigh rows


@dataclass(frozen=True, kw_only=True)
class SkewCase:
    """A case of the suite at one size: for each of its steps the works of the ranks, each kind of work once; or that of
    the group."""

    name: Skew
    tokens_per_rank: int
    works_by_step: tuple[tuple[Work, ...], ...]

    @property
    def works(self) -> tuple[Work, ...]:
        """Every kind of work in it, once."""
        return tuple(dict.fromkeys(work for works in self.works_by_step for work in works))

    def of_slowest(self, value_by_work: Mapping[Work, float]) -> float:
        """Mean over the steps of the largest value among the ranks."""
        return float(np.mean([max(value_by_work[work] for work in works) for works in self.works_by_step]))


@dataclass(frozen=True, kw_only=True)
class CheckedCase:
    """Predicted against measured; ratios are to the balanced case of the same size."""

    name: Skew
    tokens_per_rank: int
    predicted_s: float
    measured_s: float
    flops: float  # of the rank that has most
    noise_fraction: float  # how far the least disturbed pass and the next disagree
    tag: str  # of the prediction: measured, interpolated or extrapolated
    predicted_ratio: float = 1.0
    measured_ratio: float = 1.0
    flops_ratio: float = 1.0  # what counting FLOPs alone would answer


@dataclass(frozen=True, kw_only=True)
class Score:
    """Median |predicted ratio / measured ratio - 1| over the cases above least_ratio; None where there is none.

    median_seconds_error_fraction: of the seconds themselves, over all cases.
    """

    least_ratio: float
    num_cases: int
    median_error_fraction: float | None
    median_error_answering_1_fraction: float | None
    median_error_flops_only_fraction: float | None
    median_seconds_error_fraction: float | None


def suite_cases(shapes: TimedShapes, *, quick: bool = False) -> list[SkewCase]:
    """Every case of the skew suite on NUM_RANKS ranks one by one, at two sizes within what the profile timed.

    At the larger size an expert that every token takes has as many rows as were timed, at most; quick: only that one.
    Raises InputError for experts that do not divide among the ranks.
    """
    return [
        replace(case, works_by_step=tuple(_works(step[0], shapes.top_k) for step in case.works_by_step))
        for case in group_cases(shapes, num_ranks=NUM_RANKS, quick=quick)
    ]


def group_cases(shapes: TimedShapes, *, num_ranks: int, quick: bool = False) -> list[SkewCase]:
    """The same of num_ranks ranks that work at the same time and exchange rows: one work of the group for each step."""
    large = max(1, shapes.max_tokens // num_ranks**2) * num_ranks  # whole tokens for every rank of a ragged source
    small = max(1, large // _TOKENS_STEP // num_ranks) * num_ranks
    sizes = {large: None} if quick else {small: None, large: None}
    return [_case(skew, size, num_ranks, shapes) for size in sizes for skew in SKEWS]


def _case(skew: Skew, tokens_per_rank: int, num_ranks: int, shapes: TimedShapes) -> SkewCase:
    num_steps = {"rotating_hotspot": num_ranks, "burst": BURST_STEPS}.get(skew, 1)
    works_by_step = []
    for step in range(num_steps):
        load_SE = skew_load(
            skew,
            tokens_per_rank=tokens_per_rank,
            num_source_ranks=num_ranks,
            num_experts=shapes.layer_experts,
            num_ranks=num_ranks,
            top_k=shapes.top_k,
            hot_share=max(0.5, _LEAST_HOT / num_ranks),
            step=step,
        )
        works_by_step.append((GroupWork(sent_SE=tuple(tuple(whole_counts(load_E)) for load_E in load_SE)),))
    return SkewCase(name=skew, tokens_per_rank=tokens_per_rank, works_by_step=tuple(works_by_step))


def _works(group: Work, top_k: int) -> tuple[RankWork, ...]:
    assert isinstance(group, GroupWork)
    return tuple(dict.fromkeys(group.of_ranks(top_k)))


def whole_counts(load_E: np.ndarray) -> list[int]:
    """Expected loads as whole numbers of the same sum: rounded down, the largest remainders up.

    >>> whole_counts(np.array([1.5, 0.75, 0.75]))
    [1, 1, 1]
    """
    count_E = np.floor(load_E + 1e-9).astype(int)
    rest = round(load_E.sum()) - count_E.sum()
    count_E[np.argsort(count_E - load_E, kind="stable")[:rest]] += 1
    return count_E.tolist()


def check_cases(
    cases: Sequence[SkewCase],
    seconds_by_pass: Sequence[Mapping[Work, Sequence[float]]],
    profile: Profile,
    shapes: TimedShapes,
) -> list[CheckedCase]:
    """Each case predicted and measured. seconds_by_pass: for each case and kind of work its seconds in every pass.

    A work's seconds are those of its least disturbed pass, as in a profile: other work on the machine only adds time.
    """

    def row(case: SkewCase, passes_by_work: Mapping[Work, Sequence[float]]) -> CheckedCase:
        predicted = {work: predict_work(work, profile, shapes) for work in case.works}
        measured_s = case.of_slowest({work: min(passes) for work, passes in passes_by_work.items()})
        again_s = case.of_slowest({work: sorted(passes)[:2][-1] for work, passes in passes_by_work.items()})
        return CheckedCase(
            name=case.name,
            tokens_per_rank=case.tokens_per_rank,
            predicted_s=case.of_slowest({work: seconds for work, (seconds, _) in predicted.items()}),
            measured_s=measured_s,
            flops=case.of_slowest({work: work_flops(work, shapes) for work in case.works}),
            noise_fraction=again_s / measured_s - 1.0,
            tag=max(predicted.values())[1],  # of the work that decides
        )

    rows = [row(case, passes_by_work) for case, passes_by_work in zip(cases, seconds_by_pass, strict=True)]
    balanced = {row.tokens_per_rank: row for row in rows if row.name == "balanced"}
    return [
        replace(
            row,
            predicted_ratio=row.predicted_s / balanced[row.tokens_per_rank].predicted_s,
            measured_ratio=row.measured_s / balanced[row.tokens_per_rank].measured_s,
            flops_ratio=row.flops / balanced[row.tokens_per_rank].flops,
        )
        for row in rows
    ]


def score_cases(checked: Sequence[CheckedCase], least_ratio: float = SCORED_RATIO) -> Score:
    """How well the skewed cases' ratios were predicted, beside always answering 1 and beside counting FLOPs."""
    scored = [case for case in checked if case.measured_ratio > least_ratio]

    def median_error(answers: Sequence[float]) -> float | None:
        errors = [abs(answer / case.measured_ratio - 1.0) for answer, case in zip(answers, scored, strict=True)]
        return float(np.median(errors)) if errors else None

    seconds = [abs(case.predicted_s / case.measured_s - 1.0) for case in checked]
    return Score(
        least_ratio=least_ratio,
        num_cases=len(scored),
        median_error_fraction=median_error([case.predicted_ratio for case in scored]),
        median_error_answering_1_fraction=median_error([1.0] * len(scored)),
        median_error_flops_only_fraction=median_error([case.flops_ratio for case in scored]),
        median_seconds_error_fraction=float(np.median(seconds)) if seconds else None,
    )
