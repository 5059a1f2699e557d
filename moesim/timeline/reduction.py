"""What replicas exchange of gradients and weights: how long it takes, and how much hides behind the backward."""

from __future__ import annotations

import numpy as np

from moesim.cost.layer import ACTIVATION_BYTES
from moesim.fabric.collectives import allgather_s, allreduce_s, reduce_scatter_s, send_s
from moesim.scenario import Scenario


def _group_shape(scenario: Scenario, kind: str, copies: int) -> tuple[int, int]:
    """Ranks of a reduction group, and how many of them share a node: of the group that has the fewest together.

    copies: how often a pipeline holds its parameters, on stages that lie apart.
    """
    nodes = np.sort(scenario.layout.groups(kind) // scenario.cluster.ranks_per_node, axis=1)
    together = [int(np.unique(own, return_counts=True)[1].max()) for own in np.unique(nodes, axis=0)]
    return nodes.shape[1] * copies, min(together)


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
            gather_s += float(allgather_s(size, in_node, count * ACTIVATION_BYTES, cluster))
    # A replica's gradient travels to its expert's first slot, the updated weights travel back.
    replicas = expert * (1.0 - 1.0 / scenario.expert_copies)
    near = scenario.parallel.ep * scenario.parallel.etp <= cluster.ranks_per_node
    reduce_s += float(send_s(replicas * gradient_bytes, near, cluster))
    gather_s += float(send_s(replicas * ACTIVATION_BYTES, near, cluster))
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
            gather_s += float(allgather_s(size, in_node, count * ACTIVATION_BYTES, scenario.cluster))
        if scenario.parallel.zero >= 2:
            scatter_s += float(reduce_scatter_s(size, in_node, count * gradient_bytes, scenario.cluster))
    return gather_s, scatter_s


def hidden_reduction_s(scenario: Scenario, reduce_s: float, *, last_s: float, num_buckets: int, in_last: int) -> float:
    """How much of the reduction hides behind the last backward: one bucket a layer, sent as soon as the layer is done.

    last_s: the stage's last backward, through in_last of its num_buckets. Contention of the buckets with the backward's
    own all-to-alls is not modelled. See docs/model.md#gradient-reduction.
    """
    if "grad_reduce" not in scenario.train.overlaps or not reduce_s:
        return 0.0
    layer_s, bucket_s = last_s / in_last, reduce_s / num_buckets
    # Chunks that ended earlier reduced while later ones ran; the buckets of the last chunk follow one another.
    done_s = 0.0
    for i in range(in_last):
        done_s = max(done_s, (i + 1) * layer_s) + bucket_s
    exposed_s = done_s - in_last * layer_s
    return max(reduce_s - exposed_s, 0.0)
