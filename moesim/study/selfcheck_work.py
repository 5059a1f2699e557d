"""What a rank, or a group of ranks together, does in one forward of a layer: how long it is predicted to take.

Legend: S source ranks (R, the same ranks as holders), E experts, L experts of a rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.cost.profile import Profile, Timed, TimedShapes

TAGS = ("measured", "interpolated", "extrapolated")  # of a prediction, from best to worst
_COUNT_BYTES = 8  # in which a rank tells another how many rows come for one of its experts
_WEIGHT_BYTES = 4  # of the router's weight that goes with each row


@dataclass(frozen=True, kw_only=True)
class RankWork:
    """One rank's part of a step: copies that its own tokens send each expert, rows that its experts receive."""

    num_tokens: int
    sent_E: tuple[int, ...]
    received_L: tuple[int, ...]  # falling: which of a rank's experts is the busy one makes no difference


@dataclass(frozen=True, kw_only=True)
class GroupWork:
    """A step of ranks that exchange rows: copies that each rank's tokens send each expert. Experts lie contiguously."""

    sent_SE: tuple[tuple[int, ...], ...]

    def of_ranks(self, top_k: int) -> list[RankWork]:
        """Each rank's part."""
        received_RL = -np.sort(-np.array(self.sent_SE).sum(axis=0).reshape(len(self.sent_SE), -1), axis=1)
        return [
            RankWork(num_tokens=sum(sent_E) // top_k, sent_E=sent_E, received_L=tuple(received_L))
            for sent_E, received_L in zip(self.sent_SE, received_RL.tolist(), strict=True)
        ]

    def rows_RR(self) -> NDArray[np.int64]:
        """Rows that each rank sends each rank, itself included."""
        return np.array(self.sent_SE).reshape(len(self.sent_SE), len(self.sent_SE), -1).sum(axis=2)


Work = RankWork | GroupWork


def predict_work(work: Work, profile: Profile, shapes: TimedShapes) -> tuple[float, str]:
    """(seconds, tag) of the forward of a rank alone, exchanges left out, or of a group with them.

    See docs/model.md#self-check.
    """
    if isinstance(work, RankWork):
        return _sum([*_before(work, profile, shapes), *_experts(work, profile, shapes), _after(work, profile, shapes)])
    ranks, hidden = work.of_ranks(shapes.top_k), shapes.hidden
    rows_RR, row_bytes = work.rows_RR(), hidden * profile.fit.element_bytes
    counts_RR = np.full_like(rows_RR, len(work.sent_SE[0]) // len(ranks))
    received = [float(sum(rank.received_L)) for rank in ranks]
    sorting = [
        [profile.part_s(kind, [rows], width_in=hidden, width_out=1) for kind in ("permute", "combine")]
        for rows in received
    ]
    experts = [[*_experts(rank, profile, shapes), *sort] for rank, sort in zip(ranks, sorting, strict=True)]
    stages = [
        _slowest(_before(rank, profile, shapes) for rank in ranks),
        *(_exchange(counts_RR * _COUNT_BYTES, profile), _exchange(rows_RR * row_bytes, profile)),
        _exchange(rows_RR * _WEIGHT_BYTES, profile),
        _slowest(experts),
        _exchange(rows_RR.T * row_bytes, profile),
        _slowest([_after(rank, profile, shapes)] for rank in ranks),
    ]
    return sum(seconds for seconds, _ in stages), max((tag for _, tag in stages), key=TAGS.index)


def _before(work: RankWork, profile: Profile, shapes: TimedShapes) -> list[Timed]:
    tokens, hidden = [work.num_tokens], shapes.hidden
    return [
        profile.part_s("router", tokens, width_in=hidden, width_out=len(work.sent_E)),
        profile.part_s("permute", tokens, width_in=hidden, width_out=shapes.top_k),
    ]


def _experts(work: RankWork, profile: Profile, shapes: TimedShapes) -> list[Timed]:
    rows_L, hidden, width = work.received_L, shapes.hidden, shapes.expert_width
    return [
        profile.part_s("grouped", rows_L, width_in=hidden, width_out=2 * width),
        profile.part_s("activation", [sum(rows_L)], width_in=width),
        profile.part_s("grouped", rows_L, width_in=width, width_out=hidden),
    ]


def _after(work: RankWork, profile: Profile, shapes: TimedShapes) -> Timed:
    return profile.part_s("combine", [work.num_tokens], width_in=shapes.hidden, width_out=shapes.top_k)


def _exchange(bytes_RR: NDArray[np.int64], profile: Profile) -> tuple[float, str]:
    """An all-to-all by the bytes that its busiest rank sends and receives; what stays on a rank is copied there."""
    kept_R = np.diag(bytes_RR)
    through_R = bytes_RR.sum(axis=0) + bytes_RR.sum(axis=1) - 2 * kept_R
    exchanged = profile.part_s("all_to_all", [max(through_R.max(), 1)], width_in=0, width_out=len(bytes_RR))
    return _sum([exchanged, profile.memory_s(2 * kept_R.max())])


def _slowest(parts_by_rank: Iterable[Sequence[Timed]]) -> tuple[float, str]:
    return max(_sum(parts) for parts in parts_by_rank)


def _sum(parts: Sequence[Timed]) -> tuple[float, str]:
    return float(sum(part.seconds for part in parts)), max((part.tag for part in parts), key=TAGS.index)


def work_flops(work: Work, shapes: TimedShapes) -> float:
    """FLOPs of a rank's forward: its experts' products and the router's; of a group those of the rank that has most."""
    if isinstance(work, GroupWork):
        return max(work_flops(rank, shapes) for rank in work.of_ranks(shapes.top_k))
    experts = 6.0 * sum(work.received_L) * shapes.hidden * shapes.expert_width
    return experts + 2.0 * work.num_tokens * shapes.hidden * len(work.sent_E)
