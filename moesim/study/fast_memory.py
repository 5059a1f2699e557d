"""Peak memory of a configuration, from what each kind of layer keeps and holds at its worst moment.

The sums are those of cost.memory, whose terms are linear in the rows that a rank receives but for a maximum over
moments; they are taken on a grid of rows, once for all configurations that share a shape. See docs/model.md#fast-path.

Legend: L layers of the stack, K kinds of layers, F grid of received rows, S stages, C chunks of a stage, X ranks of all
drawn groups, U distinct moments of a schedule (fast_pipeline.Order).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.cost.activations import layer_input
from moesim.cost.chunks import ChunkMemory, chunk_memory
from moesim.cost.software import software_of
from moesim.describe.pipeline import Placed, trained_layers
from moesim.scenario import Scenario
from moesim.study.fast_layers import Kind, RoutedLoad
from moesim.study.fast_pipeline import Order

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_GRID = np.array([0.0, 0.5, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0, 1000.0])  # rows over the mean rank's


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerBytes:
    """What layers hold by the rows that a rank receives; kept: until the backward; forward, backward: at the worst
    moment of a layer's own pass. received_upto_LX: rows by rank, summed over the layers before.
    """

    kind_L: Ints
    grid_F: Floats
    kept_KF: Floats
    forward_KF: Floats
    backward_KF: Floats
    received_LX: Floats
    head_bytes: float
    embedding_bytes: float
    layer_input_bytes: float


@dataclass(frozen=True, kw_only=True, eq=False)
class KindBytes:
    """One kind's terms, on the grid of received rows; of a dense kind they are all alike."""

    kept_F: Floats
    forward_F: Floats
    backward_F: Floats


def kind_bytes(scenario: Scenario, kind: Kind, mean_rows: float) -> KindBytes:
    """The terms of one kind of layer. mean_rows: what the mean rank receives."""
    found = _chunk(scenario, (kind.placed,), mean_rows)
    forward, backward = (worst.excess_GMRP.sum(axis=-1).reshape(-1) for worst in found.worst)
    return KindBytes(kept_F=found.kept_GMRP.sum(axis=-1).reshape(-1), forward_F=forward, backward_F=backward)


def end_bytes(scenario: Scenario) -> tuple[float, float]:
    """What a stage holds more at its worst moment for the head, and for the embedding."""
    model, train = scenario.model, scenario.train
    mtp = tuple(Placed(layer=layer, moe_index=-1, is_mtp=True) for layer in (model.mtp_layers if train.mtp else ()))
    head, embedding = _chunk(scenario, mtp, 1.0, head=True), _chunk(scenario, (), 1.0, embedding=True)
    of_head, of_embedding = (float(one.worst[1].excess_GMRP.sum(axis=-1).reshape(-1)[0]) for one in (head, embedding))
    return of_head, of_embedding


def _chunk(
    scenario: Scenario, chunk: tuple[Placed, ...], mean_rows: float, *, head: bool = False, embedding: bool = False
) -> ChunkMemory:
    """Memory of a chunk that receives each of the grid's rows."""
    parallel, train = scenario.parallel, scenario.train
    return chunk_memory(
        scenario.model,
        parallel,
        train,
        software_of(scenario.train),
        scenario.routing.dispatcher,
        chunk,
        (_GRID * mean_rows)[:, None, None, None],
        train.micro_batch * train.seq_len / parallel.cp,
        head,
        embedding,
    )


def received_rows(scenario: Scenario, routed: RoutedLoad | None) -> tuple[Floats, float]:
    """received_LX of the stack, and its mean (1 without any)."""
    stack = trained_layers(scenario.model, scenario.train)
    received_LX = np.zeros((len(stack), 1))
    if routed is not None:
        of_moe_LX = routed.received_LR()
        received_LX = np.zeros((len(stack), of_moe_LX.shape[1]))
        received_LX[[i for i, layer in enumerate(stack) if layer.is_moe]] = of_moe_LX
    return received_LX, float(received_LX.mean()) or 1.0


def layer_bytes(
    scenario: Scenario,
    kinds: Sequence[Kind],
    of_kind: Sequence[KindBytes],
    ends: tuple[float, float],
    received: tuple[Floats, float],
) -> LayerBytes:
    """The terms of every kind of layer of a scenario's model."""
    received_LX, mean_rows = received
    kind_L = np.empty(received_LX.shape[0], dtype=np.int64)
    for i, kind in enumerate(kinds):
        kind_L[list(kind.numbers)] = i
    parallel, train = scenario.parallel, scenario.train
    return LayerBytes(
        kind_L=kind_L,
        grid_F=_GRID * mean_rows,
        kept_KF=np.array([one.kept_F for one in of_kind]),
        forward_KF=np.array([one.forward_F for one in of_kind]),
        backward_KF=np.array([one.backward_F for one in of_kind]),
        received_LX=received_LX,
        head_bytes=ends[0],
        embedding_bytes=ends[1],
        layer_input_bytes=train.micro_batch * train.seq_len / parallel.cp * layer_input(scenario.model, parallel).bytes,
    )


def kept_bytes(
    order: Order, layers: LayerBytes, start_SC: Ints, end_SC: Ints, start_mtp_SC: Ints, end_mtp_SC: Ints
) -> Floats:
    """(S,) the most that chunks in flight and the pass beside them hold on the fullest rank of each stage.

    start, end: the layers of each chunk, and of its multi-token-prediction layers. The first chunk of all has the
    embedding, the last one the head.
    """
    kept: Floats = _most_kept(
        layers.kind_L,
        layers.grid_F,
        layers.kept_KF,
        layers.forward_KF,
        layers.backward_KF,
        layers.received_LX,
        start_SC,
        end_SC,
        start_mtp_SC,
        end_mtp_SC,
        layers.head_bytes,
        layers.embedding_bytes,
        order.flight_stage_U,
        order.flight_chunk_U,
        order.flight_forward_U,
        order.flight_UC,
    )
    return kept


@njit(cache=True)
def _at(value: float, grid_F: Floats, values_F: Floats) -> float:
    """Between two points of a grid that begins at 0."""
    i = 1
    while i < grid_F.size - 1 and grid_F[i] < value:
        i += 1
    share = (value - grid_F[i - 1]) / (grid_F[i] - grid_F[i - 1])
    return values_F[i - 1] + share * (values_F[i] - values_F[i - 1])


@njit(cache=True)
def _most_kept(
    kind_L: Ints,
    grid_F: Floats,
    kept_KF: Floats,
    forward_KF: Floats,
    backward_KF: Floats,
    received_LX: Floats,
    start_SC: Ints,
    end_SC: Ints,
    start_mtp_SC: Ints,
    end_mtp_SC: Ints,
    head_bytes: float,
    embedding_bytes: float,
    flight_stage_U: Ints,
    flight_chunk_U: Ints,
    flight_forward_U: NDArray[np.bool_],
    flight_UC: Ints,
) -> Floats:
    num_stages, num_chunks = start_SC.shape
    kept_SC, forward_SC = np.zeros((num_stages, num_chunks)), np.zeros((num_stages, num_chunks))
    backward_SC = np.full((num_stages, num_chunks), -np.inf)
    layer_of = np.empty(kind_L.size, dtype=np.int64)
    for s in range(num_stages):
        total_X = np.zeros(received_LX.shape[1])
        for c in range(num_chunks):
            for at in range(start_SC[s, c], end_SC[s, c]):
                total_X += received_LX[at]
            for at in range(start_mtp_SC[s, c], end_mtp_SC[s, c]):
                total_X += received_LX[at]
        fullest = total_X.argmax()
        for c in range(num_chunks):
            count = 0
            for at in range(start_SC[s, c], end_SC[s, c]):
                layer_of[count] = at
                count += 1
            for at in range(start_mtp_SC[s, c], end_mtp_SC[s, c]):
                layer_of[count] = at
                count += 1
            before = 0.0
            for i in range(count):
                at = layer_of[i]
                rows, kind = received_LX[at, fullest], kind_L[at]
                forward_SC[s, c] = max(forward_SC[s, c], before + _at(rows, grid_F, forward_KF[kind]))
                before += _at(rows, grid_F, kept_KF[kind])
            kept_SC[s, c] = before
            freed = 0.0
            for i in range(count - 1, -1, -1):
                at = layer_of[i]
                rows, kind = received_LX[at, fullest], kind_L[at]
                backward_SC[s, c] = max(backward_SC[s, c], _at(rows, grid_F, backward_KF[kind]) - freed)
                freed += _at(rows, grid_F, kept_KF[kind])
            if s == 0 and c == 0:
                backward_SC[s, c] = max(backward_SC[s, c], embedding_bytes - before)
            if s == num_stages - 1 and c == num_chunks - 1:
                backward_SC[s, c] = max(backward_SC[s, c], head_bytes)
            if backward_SC[s, c] == -np.inf:
                backward_SC[s, c] = before
    most_S = np.zeros(num_stages)
    for u in range(flight_stage_U.size):
        s, c = flight_stage_U[u], flight_chunk_U[u]
        held = forward_SC[s, c] if flight_forward_U[u] else backward_SC[s, c]
        for other in range(num_chunks):
            held += flight_UC[u, other] * kept_SC[s, other]
        most_S[s] = max(most_S[s], held)
    return most_S
