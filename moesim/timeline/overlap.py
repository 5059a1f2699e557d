"""Phases that run beside one another: programs for a GPU's two queues, and the times that come of them.

A chain is an operation's phases in order, each waiting for the one before it that stands in line; a phase set aside is
waited for by nobody. Two chains side by side take turns: one computes what the other's collective leaves it time for.
See docs/model.md#overlap.

Legend: P phases, M runs of an operation, R ranks of a stage, B blocks of R, V traced ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moesim.describe.hardware import Gpu, Sourced
from moesim.describe.workload import Dispatcher, Overlap
from moesim.timeline.phases import Floats, OperationTimes, Phase, slowest_of

# Multiprocessors that a dispatcher's kernels hold while they run.
DISPATCHER_SMS: Mapping[Dispatcher, Sourced] = {
    "deepep": Sourced(value=20.0, unit="count", kind="spec", source="arXiv 2412.19437 section 3.2.2", date="2024-12"),
    "alltoall": Sourced(value=16.0, unit="count", kind="assumed", source="one for each NCCL channel", date="2026-11"),
}
SHARED_EXPERTS = "shared experts"
# Overlaps inside one operation.
WITHIN: tuple[Overlap, ...] = ("tensor_parallel", "two_batch", "weight_gradient", "shared_experts", "chunked_dispatch")
EXCHANGES = ("dispatch", "combine")


@dataclass(frozen=True, kw_only=True)
class Program:
    """Phases in program order; after_P: index of the phase that each waits for, -1: of none."""

    phases: tuple[Phase, ...]
    after_P: tuple[int, ...]


def sm_share(dispatcher: Dispatcher, gpu: Gpu) -> float:
    """Share of a GPU's multiprocessors that dispatch and combine hold."""
    return DISPATCHER_SMS[dispatcher].value / gpu.num_sms.value


def alone(chain: Sequence[Phase]) -> Program:
    """One chain: what is set aside runs beside the collective before it."""
    return Program(phases=tuple(chain), after_P=tuple(_links(chain)))


def beside(first: Sequence[Phase], second: Sequence[Phase]) -> Program:
    """Two chains that take turns, segment by segment; a segment ends with its collectives and what is set aside."""
    chains = (first, second)
    links = [_links(chain) for chain in chains]
    segments = [_segments(chain) for chain in chains]
    phases: list[Phase] = []
    after: list[int] = []
    at: list[dict[int, int]] = [{-1: -1}, {-1: -1}]  # where a chain's phase came to stand
    for turn in range(max(len(own) for own in segments)):
        for which, own in enumerate(segments):
            for i in own[turn] if turn < len(own) else ():
                at[which][i] = len(phases)
                phases.append(chains[which][i])
                after.append(at[which][links[which][i]])
    return Program(phases=tuple(phases), after_P=tuple(after))


def overlapped(chain: Sequence[Phase], overlaps: Collection[Overlap], *, tp: int, latency_s: float) -> list[Phase]:
    """A chain with the overlaps inside one operation that are asked for."""
    phases = list(chain)
    if "tensor_parallel" in overlaps:
        phases = _tensor_parallel_in_pieces(phases, tp)
    if "shared_experts" in overlaps:
        phases = _shared_experts_aside(phases)
    if "chunked_dispatch" in overlaps:
        phases = _in_two_chunks(phases, latency_s)
    if "weight_gradient" in overlaps:
        phases = _weights_aside(phases)
    return phases


def halved(chain: Sequence[Phase], latency_s: float) -> list[Phase]:
    """What half of the tokens take: half of everything but the start of a collective."""
    return [_part(phase, 0.5, latency_s) for phase in chain]


def _part(phase: Phase, fraction: float, latency_s: float) -> Phase:
    start_s = latency_s * (1.0 - fraction) if phase.part in EXCHANGES else 0.0
    seconds = np.where(np.asarray(phase.seconds) > 0, np.asarray(phase.seconds) * fraction + start_s, 0.0)
    return replace(phase, seconds=seconds, weights_s=phase.weights_s * fraction, products_s=phase.products_s * fraction)


def _tensor_parallel_in_pieces(chain: Sequence[Phase], tp: int) -> list[Phase]:
    """Tensor-parallel collectives piece by piece beside the products that need or make them. The first of tp pieces,
    and what the products do not cover, stays in front.
    """
    result: list[Phase] = []
    for i, phase in enumerate(chain):
        user = chain[i + 1] if i + 1 < len(chain) else phase
        if phase.part != "tensor_parallel_comm" or not user.products_s or tp == 1:
            result.append(phase)
            continue
        hidden = min(float(np.asarray(phase.seconds)) * (1.0 - 1.0 / tp), user.products_s)
        result.append(replace(phase, seconds=phase.seconds - hidden))
        result.append(replace(phase, name=f"{phase.name} beside products", seconds=hidden))
    for i in range(len(result) - 1, 0, -1):
        if result[i - 1].name.endswith("beside products"):
            result[i] = replace(result[i], back=2)
            join = replace(result[i], name="join", seconds=0.0, weights_s=0.0, products_s=0.0, back=2)
            result.insert(i + 1, join)
    return result


def _shared_experts_aside(chain: Sequence[Phase]) -> list[Phase]:
    """Shared experts beside the layer's first exchange: the dispatch forward, backward the combine's way."""
    result = [phase for phase in chain if phase.name != SHARED_EXPERTS]
    for shared in (phase for phase in chain if phase.name == SHARED_EXPERTS):
        exchanges = [
            i
            for i, phase in enumerate(result)
            if (phase.layer, phase.is_backward) == (shared.layer, shared.is_backward) and phase.name in EXCHANGES
        ]
        if exchanges:
            result.insert(exchanges[0] + 1, replace(shared, aside=True))
        else:
            return list(chain)
    return result


def _in_two_chunks(chain: Sequence[Phase], latency_s: float) -> list[Phase]:
    """From one exchange of a layer to the next in two chunks: while one half is computed the other travels."""
    result: list[Phase] = []
    i = 0
    while i < len(chain):
        phase = chain[i]
        end = i + 1
        while end < len(chain) and chain[end].layer == phase.layer and not chain[end].is_comm:
            end += 1
        is_pair = phase.name in EXCHANGES and end < len(chain) and chain[end].name in EXCHANGES
        if not is_pair or chain[end].layer != phase.layer or all(one.aside for one in chain[i + 1 : end]):
            result.append(phase)
            i += 1
            continue
        between = chain[i + 1 : end]
        inner = [_part(one, 0.5, latency_s) for one in between if not one.aside]
        n = len(inner)
        first, last = (_part(one, 0.5, latency_s) for one in (phase, chain[end]))
        head, again = ([replace(one, back=back if k == 0 else 1) for k, one in enumerate(inner)] for back in (2, n + 1))
        # In line: first, first, the chunks, last, last; each waits for its own chunk's predecessor.
        asides = [one for one in between if one.aside]
        result += [first, first, *asides, *head, *again, replace(last, back=n + 1), replace(last, back=2)]
        i = end + 1
    return result


def _weights_aside(chain: Sequence[Phase]) -> list[Phase]:
    """A backward whose weight gradients wait until the next collective is under way."""
    result: list[Phase] = []
    held_back: list[Phase] = []
    for i, phase in enumerate(chain):
        if np.any(phase.weights_s):
            held_back.append(replace(phase.weights_alone(), aside=True))
            result.append(phase.without_weights())
        else:
            result.append(phase)
        if phase.is_comm and (i + 1 == len(chain) or not chain[i + 1].is_comm):
            result += held_back
            held_back = []
    return result + held_back


def lay_out_program(
    program: Program,
    *,
    num_runs: int,
    num_ranks: int,
    block_size: int,
    traced: NDArray[np.int64],
    sm_share: float,
    issue_s: float = 0.0,
) -> OperationTimes:
    """Run a program on every rank's two queues. sm_share: what dispatch and combine take from computing; issue_s: what
    the host needs to issue all of it, the least that it takes.

    See docs/model.md#overlap.
    """
    from moesim.timeline.stream_kernels import run_streams

    phases = program.phases
    seconds_PMR = np.array([np.broadcast_to(np.asarray(p.seconds), (num_runs, num_ranks)) for p in phases])
    shares_P = np.array([sm_share if p.part in EXCHANGES else 0.0 for p in phases])
    is_comm_P = np.array([p.is_comm for p in phases])
    end_MR, busy_PR, exposed_PR, wait_R, start_PMV, length_PMV = run_streams(
        seconds_PMR.astype(np.float64),
        is_comm_P,
        np.array(program.after_P, dtype=np.int64),
        np.array([p.ranks_in_step for p in phases], dtype=np.int64),
        shares_P,
        traced,
    )
    block_end_MR = slowest_of(end_MR, block_size)
    part_R: dict[str, Floats] = {"wait_for_slowest": wait_R + (block_end_MR - end_MR).sum(axis=0)}
    beyond_MR = np.maximum(issue_s - block_end_MR, 0.0)
    if beyond_MR.any():
        part_R["host"] = beyond_MR.sum(axis=0)
    for i, phase in enumerate(phases):
        own_R = exposed_PR[i] if is_comm_P[i] else busy_PR[i]
        part_R[phase.part] = part_R.get(phase.part, 0.0) + own_R
    return OperationTimes(
        names=tuple(phase.name for phase in phases),
        parts=tuple(phase.part for phase in phases),
        layers=tuple(phase.layer for phase in phases),
        is_backward_P=np.array([phase.is_backward for phase in phases], dtype=bool),
        duration_MB=(block_end_MR + beyond_MR)[:, ::block_size].copy(),
        part_R=part_R,
        hidden_comm_R=(busy_PR - exposed_PR)[is_comm_P].sum(axis=0),
        start_PMV=start_PMV,
        seconds_PMV=length_PMV,
    )


def _links(chain: Sequence[Phase]) -> list[int]:
    """For each phase the one of its chain that it waits for, ``back`` places before it in line; -1: for none."""
    links: list[int] = []
    in_line: list[int] = []
    for i, phase in enumerate(chain):
        waits = not phase.aside and len(in_line) >= phase.back
        links.append(in_line[-phase.back] if waits else -1)
        if not phase.aside:
            in_line.append(i)
    return links


def _segments(chain: Sequence[Phase]) -> list[list[int]]:
    segments: list[list[int]] = [[]]
    launched = False
    for i, phase in enumerate(chain):
        if launched and not phase.is_comm and not phase.aside:
            segments.append([])
            launched = False
        launched = launched or phase.is_comm
        segments[-1].append(i)
    return segments
