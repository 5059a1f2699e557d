"""In which order a pipeline stage runs its micro-batches: schedules as small policies.

A schedule is a frozen dataclass that you call: stage in, its operations in order out. It also says where its chunks
stand: a *line* is a way through the pipeline, and a chunk's depth its place on that line (0: where micro-batches
enter). Micro-batches are numbered line by line. num_copies: how often a pipeline holds every parameter. See
docs/model.md#schedules.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from moesim.errors import check

Way = Literal["forward", "backward", "input_gradient", "weight_gradient"]  # backward: both gradients at once
WAYS: tuple[Way, ...] = get_args(Way)
ScheduleName = Literal["gpipe", "1f1b", "zb-h1", "dualpipe"]


class Operation(NamedTuple):
    """One pass of one micro-batch through the layers that a stage holds as one chunk; a forward may run beside a
    backward.
    """

    way: Way
    chunk: int  # 0..num_chunks-1 of the schedule, on this pipeline rank
    micro_batch: int
    beside: Operation | None = None

    @property
    def is_backward(self) -> bool:
        return self.way != "forward"


@dataclass(frozen=True, kw_only=True)
class Gpipe:
    """All forwards, then all backwards. arXiv 1811.06965.

    >>> [f"{op.way[0]}{op.micro_batch}" for op in Gpipe(pp=2)(0, 2)]
    ['f0', 'f1', 'b0', 'b1']
    """

    pp: int
    kind: Literal["gpipe"] = "gpipe"
    num_chunks = num_lines = num_copies = 1

    def __call__(self, stage: int, num_micro_batches: int) -> list[Operation]:  # noqa: ARG002 - all stages alike
        """Operations of one stage in order."""
        ways: tuple[Way, Way] = ("forward", "backward")
        return [Operation(way, 0, m) for way in ways for m in range(num_micro_batches)]

    def place(self, stage: int, chunk: int) -> tuple[int, int]:  # noqa: ARG002
        """Line and depth of a chunk."""
        return 0, stage


@dataclass(frozen=True, kw_only=True)
class OneForwardOneBackward:
    """1F1B: a stage warms up with as many forwards as there are stages after it, then alternates. arXiv 2104.04473,
    section 2.2.

    With vpp > 1 virtual stages the interleaved order of the same paper: micro-batches go in rounds of pp through each
    chunk. paired: each forward of the steady phase runs beside a backward. A stage then warms up with two forwards for
    each stage after it, and one more, so that neither waits for the other's neighbours.

    >>> [f"{op.way[0]}{op.micro_batch}" for op in OneForwardOneBackward(pp=2)(0, 3)]
    ['f0', 'f1', 'b0', 'f2', 'b1', 'b2']
    """

    pp: int
    vpp: int = 1
    paired: bool = False
    kind: Literal["1f1b"] = "1f1b"
    num_lines = num_copies = 1

    @property
    def num_chunks(self) -> int:
        return self.vpp

    def __call__(self, stage: int, num_micro_batches: int) -> list[Operation]:
        """Operations of one stage in order. With vpp > 1, num_micro_batches must be a multiple of pp."""
        assert self.vpp == 1 or num_micro_batches % self.pp == 0
        total = num_micro_batches * self.vpp
        after = self.pp - stage - 1
        warm_up = after if self.vpp == 1 and not self.paired else 2 * after + (self.vpp - 1) * self.pp
        warm_up = min(warm_up + self.paired, total)
        forwards = [Operation("forward", *self._place(i, backward=False)) for i in range(total)]
        backwards = [Operation("backward", *self._place(i, backward=True)) for i in range(total)]
        order = forwards[:warm_up]
        for i in range(total - warm_up):
            forward, backward = forwards[warm_up + i], backwards[i]
            order += [forward._replace(beside=backward)] if self.paired else [forward, backward]
        return order + backwards[total - warm_up :]

    def place(self, stage: int, chunk: int) -> tuple[int, int]:
        """Line and depth of a chunk."""
        return 0, chunk * self.pp + stage

    def _place(self, i: int, *, backward: bool) -> tuple[int, int]:
        """Chunk and micro-batch of a stage's i-th pass in one direction."""
        if self.vpp == 1:
            return 0, i
        round_size = self.pp * self.vpp
        chunk = i % round_size // self.pp
        micro_batch = i // round_size * self.pp + i % self.pp
        return (self.vpp - 1 - chunk if backward else chunk), micro_batch


@dataclass(frozen=True, kw_only=True)
class ZeroBubbleH1:
    """1F1B with the backward cut in two: weight gradients, for which nobody waits, fill the bubble. arXiv 2401.10241,
    section 2.3 (ZB-H1).

    A stage holds weight gradients back by as many micro-batches as stages stand before it, so that every stage keeps
    what the first one keeps in 1F1B.

    >>> [f"{op.way[0]}{op.micro_batch}" for op in ZeroBubbleH1(pp=2)(1, 2)]
    ['f0', 'i0', 'f1', 'i1', 'w0', 'w1']
    """

    pp: int
    kind: Literal["zb-h1"] = "zb-h1"
    num_chunks = num_lines = num_copies = 1

    def __call__(self, stage: int, num_micro_batches: int) -> list[Operation]:
        """Operations of one stage in order."""
        warm_up = min(self.pp - stage - 1, num_micro_batches)
        order = [Operation("forward", 0, m) for m in range(warm_up)]
        for i in range(num_micro_batches):
            if warm_up + i < num_micro_batches:
                order.append(Operation("forward", 0, warm_up + i))
            order.append(Operation("input_gradient", 0, i))
            if i >= stage:
                order.append(Operation("weight_gradient", 0, i - stage))
        late = range(max(num_micro_batches - stage, 0), num_micro_batches)
        return order + [Operation("weight_gradient", 0, i) for i in late]

    def place(self, stage: int, chunk: int) -> tuple[int, int]:  # noqa: ARG002
        """Line and depth of a chunk."""
        return 0, stage


@dataclass(frozen=True, kw_only=True)
class DualPipe:
    """Micro-batches enter at both ends; a forward of one line runs beside a backward of the other. arXiv 2412.19437,
    section 3.2.1 and figure 5.

    Stage s holds chunk 0, the s-th part of the model, for the line that enters at stage 0, and chunk 1, the s-th part
    from the end, for the other: every parameter stands twice. Needs an even pp and 2 pp micro-batches.

    >>> [f"{op.way[0]}{op.chunk}{op.micro_batch}" for op in DualPipe(pp=2)(0, 4)][:3]
    ['f00', 'f10', 'f01']
    """

    pp: int
    kind: Literal["dualpipe"] = "dualpipe"
    num_chunks = num_lines = num_copies = 2

    def __call__(self, stage: int, num_micro_batches: int) -> list[Operation]:
        """Operations of one stage in order; num_micro_batches counts both lines."""
        assert self.pp % 2 == 0
        assert num_micro_batches % 2 == 0
        assert num_micro_batches >= 2 * self.pp
        from_end = min(stage, self.pp - 1 - stage)
        inner = self.pp // 2 - 1 - from_end  # stages between this one and the middle, on its side
        order = _DualOrder(near=int(stage >= self.pp // 2))
        for _ in range(2 * inner):
            order.forward(0)
        for _ in range(from_end + 1):
            order.forward(0)
            order.forward(1)
        for _ in range(inner):
            order.split_backward(1)
            order.weights()
            order.forward(1)
        for i in range(num_micro_batches // 2 - self.pp + from_end + 1):
            if i == 0 and inner == 0:  # the innermost stages have nothing to run beside yet
                order.forward(0)
                order.backward(1)
            else:
                order.both(0, 1)
            order.both(1, 0)
        for _ in range(inner):
            order.backward(1)
            order.both(1, 0)
        for i in range(2 * (from_end + 1)):  # in the second half weight gradients are held back
            (order.split_backward if i > from_end else order.backward)((i + 1) % 2)
        for _ in range(inner):
            order.weights()
            order.split_backward(0)
        while order.held_back:
            order.weights()
        return order.operations

    def place(self, stage: int, chunk: int) -> tuple[int, int]:
        """Line and depth of a chunk."""
        return chunk, stage if chunk == 0 else self.pp - 1 - stage


class _DualOrder:
    """Operations as they are appended. A side is 0 for the line that enters at this half of the pipeline (near), else
    1.
    """

    def __init__(self, near: int) -> None:
        self.near = near
        self.operations: list[Operation] = []
        self.held_back: deque[Operation] = deque()
        self.forwards, self.backwards = [0, 0], [0, 0]

    def forward(self, side: int) -> None:
        self.operations.append(self._next_forward(side))

    def backward(self, side: int) -> None:
        self.operations.append(self._next_backward(side, "backward"))

    def split_backward(self, side: int) -> None:
        done = self._next_backward(side, "input_gradient")
        self.operations.append(done)
        self.held_back.append(done._replace(way="weight_gradient"))

    def weights(self) -> None:
        self.operations.append(self.held_back.popleft())

    def both(self, forward_side: int, backward_side: int) -> None:
        backward = self._next_backward(backward_side, "backward")
        self.operations.append(self._next_forward(forward_side)._replace(beside=backward))

    def _next_forward(self, side: int) -> Operation:
        line = side ^ self.near
        self.forwards[line] += 1
        return Operation("forward", line, self.forwards[line] - 1)

    def _next_backward(self, side: int, way: Way) -> Operation:
        line = side ^ self.near
        self.backwards[line] += 1
        return Operation(way, line, self.backwards[line] - 1)


Schedule = Gpipe | OneForwardOneBackward | ZeroBubbleH1 | DualPipe


def make_schedule(name: ScheduleName, *, pp: int, vpp: int = 1, paired: bool = False) -> Schedule:
    """The schedule of a name; paired: forwards beside backwards (DualPipe always does).

    >>> make_schedule("1f1b", pp=4, vpp=2).num_chunks
    2
    """
    match name:
        case "1f1b":
            return OneForwardOneBackward(pp=pp, vpp=vpp, paired=paired)
        case "gpipe":
            return Gpipe(pp=pp)
        case "zb-h1":
            return ZeroBubbleH1(pp=pp)
        case "dualpipe":
            return DualPipe(pp=pp)


def check_schedule(name: ScheduleName, *, pp: int, vpp: int, num_micro_batches: int, paired: bool = False) -> None:
    """Raises InputError where a schedule cannot run so many stages and micro-batches, or not in pairs."""
    owner, field = "scenario.train", "schedule"
    rule = "must be 1f1b or dualpipe where forwards run beside backwards (overlap: forward_backward)"
    check(not paired or name in ("1f1b", "dualpipe"), owner, field, rule, name)
    check(vpp == 1 or name == "1f1b", owner, field, f"must be 1f1b with vpp={vpp} virtual stages", name)
    if name == "dualpipe":
        check(pp % 2 == 0, owner, field, f"dualpipe needs an even number of stages, not pp={pp}", name)
        rule = f"dualpipe needs an even number of at least 2*pp = {2 * pp} micro-batches, not {num_micro_batches}"
        check(num_micro_batches % 2 == 0 and num_micro_batches >= 2 * pp, owner, field, rule, name)


def in_flight(operations: Sequence[Operation]) -> list[int]:
    """How many chunks' activations a stage holds after each operation: from its forward until its weight gradient.

    >>> max(in_flight(ZeroBubbleH1(pp=4)(3, 8)))
    4
    """
    held, counts = 0, []
    for op in operations:
        for done in (op, op.beside):
            if done is not None and done.way != "input_gradient":
                held += 1 if done.way == "forward" else -1
        counts.append(held)
    return counts
