"""Timing all-to-alls between ranks: which ones, how to set one up, and sampling what all ranks do together.

Only what leaves a rank is exchanged here; what stays is a copy. Through a CPU's loopback interface sending and
receiving share the work, so an exchange goes by the bytes that the busiest rank sends and receives together.

Legend: R ranks.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed

from reference_model.cases import Case, half_steps, powers
from reference_model.expert_parallel import exchange
from reference_model.fit import is_held_out
from reference_model.shapes import LayerShapes
from reference_model.timing import Arena, Call, Effort, sample_call_s, stirrer

EXCHANGES = ("all_to_all", "all_to_all_skewed")
_LEAST_BYTES, _MOST_BYTES = 256, 2**27  # of the busiest rank; numbers of rows are exchanged too, in a few bytes


def exchange_cases(shapes: Sequence[LayerShapes], num_ranks: int, element_bytes: int, *, quick: bool) -> list[Case]:
    """Exchanges between num_ranks ranks up to what these layers send: even ones, and uneven ones kept from the fit."""
    rows = max(min(shape.max_tokens * shape.top_k, shape.max_rows) * shape.hidden for shape in shapes)
    sizes = (powers if quick else half_steps)(_LEAST_BYTES, min(2 * rows * element_bytes, _MOST_BYTES))
    case = Case(kind="all_to_all", width_out=num_ranks)
    cases = [
        Case(kind="all_to_all", width_out=num_ranks, size=size, held_out=is_held_out(i, len(sizes), 0))
        for i, size in enumerate(sizes)
    ]
    return [*cases, *_uneven(case, sizes)]


def _uneven(case: Case, sizes: Sequence[int]) -> Iterator[Case]:
    """One rank sends to all others and gets nothing; a lognormal draw (one seed for all machines)."""
    num_ranks, draws = case.width_out, np.random.default_rng(20240501)
    for size in sizes[len(sizes) // 3 :: max(1, len(sizes) // 6)]:
        one_way_RR = np.zeros((num_ranks, num_ranks))
        one_way_RR[0] = 1.0
        for share_RR in (one_way_RR, draws.lognormal(0.0, 1.0, (num_ranks, num_ranks))):
            np.fill_diagonal(share_RR, 0.0)
            bytes_RR = np.floor(share_RR * size / busiest_bytes(share_RR)).astype(int)
            pairs = tuple(bytes_RR.ravel().tolist())
            yield Case(kind="all_to_all_skewed", width_out=num_ranks, size=size, tokens_per_expert=pairs, held_out=True)


def busiest_bytes(bytes_RR: NDArray) -> float:
    """Most that any rank sends to and receives from others together; bytes_RR[i, j] go from i to j."""
    others_RR = bytes_RR * (1 - np.eye(len(bytes_RR)))
    return float((others_RR.sum(axis=0) + others_RR.sum(axis=1)).max())


def pair_bytes(case: Case) -> NDArray[np.int64]:
    """bytes_RR of a case."""
    num_ranks = case.width_out
    if case.tokens_per_expert is not None:
        return np.array(case.tokens_per_expert).reshape(num_ranks, num_ranks)
    each = case.size // (2 * (num_ranks - 1))
    return each * (1 - np.eye(num_ranks, dtype=np.int64))


def prepare_exchange(case: Case, arena: Arena) -> Callable[[], Call]:
    """What gives this rank's next call of the exchange, on cold data."""
    rank = distributed.get_rank()
    count_RR = -(-pair_bytes(case) // arena.dtype.itemsize)
    send_R, receive_R = count_RR[rank].tolist(), count_RR[:, rank].tolist()

    def prepare() -> Call:
        sent = arena.take(sum(send_R))
        return lambda: exchange(sent, send_R, receive_R, None)

    return prepare


def sample_together_s(prepare: Callable[[], Call], device: torch.device, effort: Effort) -> list[float]:
    """Seconds of a call that all ranks make together, by the slowest rank each time; every rank takes as many samples.

    Ranks wait for one another before each call.
    """
    stir = stirrer(device)

    def sample() -> float:
        call = prepare()
        stir()
        distributed.barrier()
        slowest_s = torch.tensor(sample_call_s(call, device), dtype=torch.float64, device=device)
        distributed.all_reduce(slowest_s, op=distributed.ReduceOp.MAX)
        return float(slowest_s)

    first = [sample() for _ in range(effort.num_warmups + effort.min_samples)][effort.num_warmups :]
    wanted = effort.budget_s / statistics.median(first)  # the same on every rank
    more = min(int(wanted), effort.max_samples) - len(first)
    return first + [sample() for _ in range(more)]
