"""In which order a pipeline stage runs its micro-batches: schedules as small policies.

A schedule is a frozen dataclass that you call: stage in, its operations in order out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple


class Operation(NamedTuple):
    """One pass of one micro-batch through the layers that a stage holds as one chunk."""

    is_backward: bool
    chunk: int  # 0..vpp-1, the virtual stage on this pipeline rank
    micro_batch: int


@dataclass(frozen=True, kw_only=True)
class OneForwardOneBackward:
    """1F1B: a stage warms up with as many forwards as there are stages after it, then alternates. arXiv 2104.04473,
    section 2.2.

    With vpp > 1 virtual stages the interleaved order of the same paper: micro-batches go in rounds of pp through each
    chunk.

    >>> [("B" if op.is_backward else "F") + str(op.micro_batch) for op in OneForwardOneBackward(pp=2, vpp=1)(0, 3)]
    ['F0', 'F1', 'B0', 'F2', 'B1', 'B2']
    """

    pp: int
    vpp: int = 1
    kind: Literal["1f1b"] = "1f1b"

    def __call__(self, stage: int, num_micro_batches: int) -> list[Operation]:
        """Operations of one stage in order. With vpp > 1, num_micro_batches must be a multiple of pp."""
        assert self.vpp == 1 or num_micro_batches % self.pp == 0
        total = num_micro_batches * self.vpp
        if self.vpp == 1:
            warm_up = min(self.pp - stage - 1, total)
        else:
            warm_up = min((self.pp - stage - 1) * 2 + (self.vpp - 1) * self.pp, total)
        forwards = [Operation(False, *self._place(i, backward=False)) for i in range(total)]
        backwards = [Operation(True, *self._place(i, backward=True)) for i in range(total)]
        order = forwards[:warm_up]
        for i in range(total - warm_up):
            order += [forwards[warm_up + i], backwards[i]]
        return order + backwards[total - warm_up :]

    def _place(self, i: int, *, backward: bool) -> tuple[int, int]:
        """Chunk and micro-batch of a stage's i-th pass in one direction."""
        if self.vpp == 1:
            return 0, i
        round_size = self.pp * self.vpp
        chunk = i % round_size // self.pp
        micro_batch = i // round_size * self.pp + i % self.pp
        return (self.vpp - 1 - chunk if backward else chunk), micro_batch
