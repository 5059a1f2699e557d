"""What replicas exchange of gradients and weights: how long it takes, and how much hides behind the backward."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from moesim.cost.static import weight_bytes
from moesim.describe.parallel import Parallelism
from moesim.fabric.collectives import allgather_s, allreduce_s, reduce_scatter_s, send_s
from moesim.scenario import Scenario
from moesim.timeline.phases import OperationTimes


def _group_shape(scenario: Scenario, kind: str, copies: int) -> tuple[int, int]:
    """Ranks of a reduction group, and how many of them share a node: of the group that has the fewest together.

    copies: how often a pipeline holds its parameters, on stages that lie apart.
    """
    p = scenario.parallel
    cluster = scenario.cluster
    size, together = _shape_of_groups(p.tp, p.pp, p.cp, p.ep, p.etp, cluster.num_gpus, cluster.ranks_per_node, kind)
    return size * copies, together


@lru_cache(maxsize=16384)
def _shape_of_groups(
    tp: int, pp: int, cp: int, ep: int, etp: int, num_gpus: int, ranks_per_node: int, kind: str
) -> tuple[int, int]:
    groups_NR = Parallelism(tp=tp, pp=pp, cp=cp, ep=ep, etp=etp).rank_layout(num_gpus).groups(kind)
    size = groups_NR.shape[1]
    stride = int(groups_NR[0, 1] - groups_NR[0, 0]) if size > 1 else 1
    # Ranks of a group lie evenly apart, so that where its first one stands in its node says how many share a node.
    firsts = np.unique(groups_NR[:, 0] % ranks_per_node)
    nodes_FR = (firsts[:, None] + stride * np.arange(size)) // ranks_per_node
    return size, min(int(np.bincount(nodes_R).max()) for nodes_R in nodes_FR)


def gradient_reduction_s(scenario: Scenario, dense: float, expert: float, copies: int = 1) -> tuple[float, float]:
    """Seconds after the last backward to reduce gradients, and after the optimizer to gather weights. Both are booked
    as the part gradient_reduction, as are ZeRO-3's gathers in every pass. See docs/model.md#gradient-reduction.
    """
    zero, cluster = scenario.parallel.zero, scenario.cluster
    gradient_bytes = scenario.train.optimizer.gradient_bytes
    reduce_s = gather_s = 0.0
    for kind, count in (("dpcp", dense), ("edp", expert)):
        size, in_node = _group_shape(scenario, kind, copies)
        if size == 1 or not count:
            continue
        if zero == 0:
            reduce_s += float(allreduce_s(size, in_node, count * gradient_bytes, cluster))
        elif zero == 1:
            reduce_s += float(reduce_scatter_s(size, in_node, count * gradient_bytes, cluster))
        if zero in (1, 2):
            gather_s += float(allgather_s(size, in_node, count * weight_bytes(scenario.train), cluster))
    # A replica's gradient travels to its expert's first slot, the updated weights travel back.
    replicas = expert * (1.0 - 1.0 / scenario.expert_copies)
    near = scenario.parallel.ep * scenario.parallel.etp <= cluster.ranks_per_node
    reduce_s += float(send_s(replicas * gradient_bytes, near, cluster))
    gather_s += float(send_s(replicas * weight_bytes(scenario.train), near, cluster))
    return reduce_s, gather_s


def sharded_weights_s(scenario: Scenario, dense: float, expert: float, copies: int = 1) -> tuple[float, float]:
    """Seconds of each pass of a chunk to gather its weights (ZeRO-3), of each backward to scatter its gradients
    (ZeRO-2, 3).
    """
    gradient_bytes = scenario.train.optimizer.gradient_bytes
    gather_s = scatter_s = 0.0
    for kind, count in (("dpcp", dense), ("edp", expert)):
        size, in_node = _group_shape(scenario, kind, copies)
        if size == 1 or not count:
            continue
        if scenario.parallel.zero >= 3:
            gather_s += float(allgather_s(size, in_node, count * weight_bytes(scenario.train), scenario.cluster))
        if scenario.parallel.zero >= 2:
            scatter_s += float(reduce_scatter_s(size, in_node, count * gradient_bytes, scenario.cluster))
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
