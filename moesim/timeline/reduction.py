"""What replicas exchange of gradients and weights: how long it takes, and how much hides behind the backward."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.cost.static import weight_bytes
from moesim.describe.parallel import Parallelism
from moesim.fabric.collectives import allgather_s, allreduce_s, reduce_scatter_s, send_s
from moesim.scenario import Scenario
from moesim.timeline.phases import OperationTimes


class _Groups(NamedTuple):
    """Who shares out what belongs to a kind of parameters: ranks of a group, and how many of these share a node; groups
    that hold the same, and how many of the ranks that hold the same shard share a node.
    """

    size: int
    together: int
    num_same: int
    same_together: int


def _groups_of(scenario: Scenario, kind: str, copies: int) -> _Groups:
    """The groups that have the fewest ranks together. copies: how often a pipeline holds its parameters, on stages that
    lie apart.
    """
    p, cluster = scenario.parallel, scenario.cluster
    found = _shape_of_groups(p.tp, p.pp, p.cp, p.ep, p.etp, p.replicate, cluster.num_gpus, cluster.ranks_per_node, kind)
    return found._replace(size=found.size * copies)


@lru_cache(maxsize=16384)
def _shape_of_groups(
    tp: int, pp: int, cp: int, ep: int, etp: int, replicate: int, num_gpus: int, ranks_per_node: int, kind: str
) -> _Groups:
    groups_NR = Parallelism(tp=tp, pp=pp, cp=cp, ep=ep, etp=etp).rank_layout(num_gpus).groups(kind)
    split = groups_NR.reshape(len(groups_NR), replicate, -1)  # first ranks share out, then the next ones the same
    stride, size = int(groups_NR[0, -1] - groups_NR[0, 0]) // max(groups_NR.shape[1] - 1, 1), split.shape[2]

    def together(firsts: NDArray[np.int64], apart: int, number: int) -> int:
        """Ranks lie evenly apart, so that where a group's first one stands in its node says how many share a node."""
        firsts_F = np.unique(firsts % ranks_per_node)
        nodes_FR = (firsts_F[:, None] + apart * np.arange(number)) // ranks_per_node
        return min(int(np.bincount(nodes_R).max()) for nodes_R in nodes_FR)

    return _Groups(
        size,
        together(split[:, :, 0], stride, size),
        replicate,
        together(split[:, 0], stride * size, replicate),
    )


def _scatter_s(scenario: Scenario, groups: _Groups, num_bytes: float) -> float:
    """Seconds to reduce-scatter inside each group, and to add the shards up over groups that hold the same."""
    inside = float(reduce_scatter_s(groups.size, groups.together, num_bytes, scenario.cluster))
    if groups.num_same == 1:
        return inside
    shard = num_bytes / groups.size
    return inside + float(allreduce_s(groups.num_same, groups.same_together, shard, scenario.cluster))


def gradient_reduction_s(scenario: Scenario, dense: float, expert: float, copies: int = 1) -> tuple[float, float]:
    """Seconds after the last backward to reduce gradients, and after the optimizer to gather weights. Both are booked
    as the part gradient_reduction, as are ZeRO-3's gathers in every pass. See docs/model.md#gradient-reduction.
    """
    parallel, cluster = scenario.parallel, scenario.cluster
    gradient_bytes = scenario.train.optimizer.gradient_bytes
    reduce_s = gather_s = 0.0
    for kind, count in (("dpcp", dense), ("edp", expert)):
        groups = _groups_of(scenario, kind, copies)
        if groups.size * groups.num_same == 1 or not count:
            continue
        if parallel.zero == 0:
            reduce_s += float(allreduce_s(groups.size, groups.together, count * gradient_bytes, cluster))
        elif parallel.zero == 1 or _reduces_once(parallel):
            reduce_s += _scatter_s(scenario, groups, count * gradient_bytes)
        if parallel.zero in (1, 2):
            gather_s += float(allgather_s(groups.size, groups.together, count * weight_bytes(scenario.train), cluster))
    # A replica's gradient travels to its expert's first slot, the updated weights travel back.
    replicas = expert * (1.0 - 1.0 / scenario.expert_copies)
    near = scenario.parallel.ep * scenario.parallel.etp <= cluster.ranks_per_node
    reduce_s += float(send_s(replicas * gradient_bytes, near, cluster))
    gather_s += float(send_s(replicas * weight_bytes(scenario.train), near, cluster))
    return reduce_s, gather_s


def _reduces_once(parallel: Parallelism) -> bool:
    """Whether gradients of zero 2 and 3 wait for the last micro-batch: FSDP2 under a pipeline's schedule does so."""
    return parallel.fsdp and parallel.pp > 1


def sharded_weights_s(scenario: Scenario, dense: float, expert: float, copies: int = 1) -> tuple[float, float]:
    """Seconds of each pass of a chunk to gather its weights (ZeRO-3), of each backward to scatter its gradients
    (ZeRO-2, 3).
    """
    parallel, gradient_bytes = scenario.parallel, scenario.train.optimizer.gradient_bytes
    gather_s = scatter_s = 0.0
    for kind, count in (("dpcp", dense), ("edp", expert)):
        groups = _groups_of(scenario, kind, copies)
        if groups.size * groups.num_same == 1 or not count:
            continue
        if parallel.zero >= 3:
            num_bytes = count * weight_bytes(scenario.train)
            gather_s += float(allgather_s(groups.size, groups.together, num_bytes, scenario.cluster))
        if parallel.zero >= 2 and not _reduces_once(parallel):
            scatter_s += _scatter_s(scenario, groups, count * gradient_bytes)
    return gather_s, scatter_s


def hidden_behind_s(total_s: float, times: OperationTimes, run: int, *, num_buckets: int, in_pass: int) -> float:
    """How much of a reduction hides behind the last backward of its stage: one bucket a layer, sent as soon as the
    layer is done. The same, time reversed, of gathering weights behind the first forward.

    run: which of the operation's runs, through in_pass of num_buckets layers. While it runs, the exchanges of experts
    leave the ports to the buckets only for the rest of the time. See docs/model.md#gradient-reduction.
    """
    pass_s = float(times.duration_MB[run].min())
    if not total_s or not pass_s:
        return 0.0
    is_exchange_P = np.array([part in ("dispatch", "combine") for part in times.parts], dtype=bool)
    free = max(1.0 - float(times.seconds_PMV[is_exchange_P, run, 0].sum()) / pass_s, 0.0)
    return hidden_buckets_s(total_s, pass_s, free, num_buckets, in_pass)


def hidden_buckets_s(total_s: float, pass_s: float, free: float, num_buckets: int, in_pass: int) -> float:
    """How much of total_s in so many buckets hides behind a pass that makes in_pass of them ready one by one and leaves
    the ports free for a share of the time.
    """
    bucket_s = total_s / num_buckets
    # Chunks that ended earlier reduced while later ones ran; the buckets of the last chunk follow one another.
    done_s = 0.0
    for i in range(in_pass):
        start_s = max(done_s, (i + 1) * pass_s / in_pass)
        room_s = max(pass_s - start_s, 0.0) * free
        done_s = start_s + bucket_s / free if bucket_s < room_s else max(start_s, pass_s) + bucket_s - room_s
    return max(total_s - (done_s - pass_s), 0.0)
