"""What one chunk of layers keeps from forward to backward, and what its passes hold at their worst moments.

Legend: G expert-parallel groups, M micro-batches, R expert-parallel ranks, P parts: activations, dispatch buffers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.cost.activations import BF16_BYTES, SavedTensor, head_tensors, layer_input, layer_tensors, mtp_tensors
from moesim.cost.context import buffer_bytes
from moesim.cost.moments import forward_moments, head_moment, layer_moments
from moesim.cost.offload import LAYERS_ON_GPU
from moesim.cost.precision import recipe_of
from moesim.cost.recompute import kept_tensors, made_inside
from moesim.cost.software import Framework
from moesim.cost.static import table_buffers_bytes
from moesim.describe.model import Model
from moesim.describe.parallel import Parallelism
from moesim.describe.pipeline import Placed
from moesim.describe.workload import Dispatcher, Training

Floats = NDArray[np.floating]
# Of a MoE layer, while its experts are at work: kept for the backward or not, they are there.
NEEDED_IN_FORWARD = ("ffn block input", "ffn norm output", "expert input")


@dataclass(frozen=True, kw_only=True, eq=False)
class Worst:
    """What a pass holds at its worst moment beyond what was kept when it began."""

    excess_GMRP: Floats
    choice_GMR: NDArray[np.int64]  # index into names
    names: tuple[str, ...]

    def moment(self, group: int, micro_batch: int, rank: int) -> str:
        return self.names[int(self.choice_GMR[group, micro_batch, rank])]


@dataclass(frozen=True, kw_only=True, eq=False)
class ChunkMemory:
    """What one chunk keeps from forward to backward, and what its passes hold; P: activations, dispatch."""

    kept_GMRP: Floats
    worst: tuple[Worst, Worst]  # of the forward, of the backward


def chunk_memory(
    model: Model,
    parallel: Parallelism,
    train: Training,
    software: Framework,
    dispatcher: Dispatcher,
    chunk: tuple[Placed, ...],
    received_GMLR: Floats,
    tokens: float,
    has_head: bool,
    has_embedding: bool,
) -> ChunkMemory:
    """Memory of one chunk under a load. tokens: of the rank's micro-batch, before tensor parallelism."""
    tensors_of = tuple(
        layer_tensors(model, item.layer, parallel, software, train.precision, train.kept)
        + (mtp_tensors(model, parallel) if item.is_mtp else ())
        for item in chunk
    )
    own = _Chunk(
        model=model,
        parallel=parallel,
        train=train,
        software=software,
        dispatcher=dispatcher,
        layers=chunk,
        received_GMLR=received_GMLR,
        tokens=tokens,
        tensors_of=tensors_of,
        left_of=tuple(
            kept_tensors(tensors, item.layer, train, parallel.tp)
            for tensors, item in zip(tensors_of, chunk, strict=True)
        ),
    )
    kept = [own.saved(left, item) for left, item in zip(own.left_of, chunk, strict=True)]
    on_device = _on_device(kept, train)
    kept_GMRP = np.sum([own.parts((0.0, 0.0), (0.0, 0.0), None), *on_device], axis=0)
    forward = [*own.forward(on_device), (kept_GMRP, "end of the forward")]
    backward = own.backward(kept, on_device)
    if has_head:
        backward.append((own.head(), "backward of the head"))
    if has_embedding:
        table = model.vocab * model.hidden / parallel.tp
        gradient = table * BF16_BYTES + table_buffers_bytes(table, parallel, train)
        backward.append((np.array([gradient, 0.0]) - kept_GMRP, "gradient of the embedding"))
    if not backward:
        backward.append((kept_GMRP, "a stage that holds nothing"))
    return ChunkMemory(kept_GMRP=kept_GMRP, worst=(_worst_of(forward), _worst_of(backward)))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Chunk:
    """A chunk's layers, the tensors that each saves and those left of them, and the load that they meet."""

    model: Model
    parallel: Parallelism
    train: Training
    software: Framework
    dispatcher: Dispatcher
    layers: tuple[Placed, ...]
    received_GMLR: Floats
    tokens: float
    tensors_of: tuple[tuple[SavedTensor, ...], ...]
    left_of: tuple[tuple[SavedTensor, ...], ...]

    def parts(self, per_token: tuple[float, float], per_assignment: tuple[float, float], item: Placed | None) -> Floats:
        """(G, M, R, P) bytes of what scales with tokens and with the assignments that a layer receives."""
        groups, micro_batches, _, ranks = self.received_GMLR.shape
        result = np.broadcast_to(np.array(per_token) * self.tokens, (groups, micro_batches, ranks, 2)).copy()
        if item is not None and item.moe_index >= 0:
            result += self.received_GMLR[:, :, item.moe_index, :, None] * np.array(per_assignment)
        return result

    def saved(self, tensors: tuple[SavedTensor, ...], item: Placed | None) -> Floats:
        return self.parts(_sum(tensors, "token"), _sum(tensors, "assignment"), item)

    def forward(self, on_device: list[Floats]) -> list[tuple[Floats, str]]:
        """What each layer's forward holds at its moments beyond what was kept when the chunk's forward began."""
        found: list[tuple[Floats, str]] = []
        before = self.parts((0.0, 0.0), (0.0, 0.0), None)
        for i, item in enumerate(self.layers):
            held = before + self.saved((*self.left_of[i], *self._not_kept(i, NEEDED_IN_FORWARD)), item)
            where = f"forward of layer {i + 1} of {len(self.layers)}"
            found += [(held + excess, f"{where}: {name}") for excess, name in self._forward_moments(item)]
            before = before + on_device[i]
        return found

    def backward(self, kept: list[Floats], on_device: list[Floats]) -> list[tuple[Floats, str]]:
        """What each layer's backward holds at its moments beyond what the chunk keeps on the GPU."""
        found: list[tuple[Floats, str]] = []
        freed = self.parts((0.0, 0.0), (0.0, 0.0), None)  # by the backward of the layers behind
        for i, item in reversed(list(enumerate(self.layers))):
            where = f"backward of layer {i + 1} of {len(self.layers)}"
            base = kept[i] - on_device[i] - freed  # what the host had comes back, the next layer's meanwhile
            base = base + (kept[i - 1] - on_device[i - 1] if i > 0 else 0.0)
            again = [tensor for tensor in self.tensors_of[i] if tensor not in self.left_of[i]]
            # Of a whole layer all is made again at once; modules of the attention follow the feed-forward's backward.
            of_attention = tuple(tensor for tensor in again if tensor.part == "attention")
            later = of_attention if self.train.recompute != "full" else ()
            made = base + self.saved(tuple(tensor for tensor in again if tensor not in later), item)
            arguments = (self.parallel, self.dispatcher, self.software, recipe_of(self.train), self.train.kept)
            moments = layer_moments(self.model, item.layer, *arguments)
            working = [(self.parts(m.per_token, m.per_assignment, item), m.name) for m in moments]
            found += [(made + excess, f"{where}: {name}") for excess, name in working]
            if self._not_kept(
                i, ("expert input",)
            ):  # the routed experts' forward runs once more, without what it keeps no longer
                begun = made - self.saved(made_inside(tuple(again), item.layer, self.train), item)
                found += [(begun + excess, f"{where} again: {name}") for excess, name in self._forward_moments(item)]
            if later or self.parallel.cp > 1:  # beside the gradient of the output; the feed-forward's own is gone
                gone = self.saved(tuple(tensor for tensor in self.left_of[i] if tensor.part != "attention"), item)
                exchanged = self.parts((buffer_bytes(item.layer.attention, self.parallel), 0.0), (0.0, 0.0), None)
                held = self.saved((*of_attention, layer_input(self.model, self.parallel)), item)
                found.append((base + held + exchanged - gone, f"{where}: attention{' again' if later else ''}"))
            freed = freed + on_device[i]
        return found

    def head(self) -> Floats:
        """What the losses and the head's backward hold."""
        per_token, fixed = head_moment(self.model, self.parallel, self.software)
        num_losses = 1 + sum(item.is_mtp for item in self.layers)
        tensors = head_tensors(self.model, self.parallel, self.software)
        held = num_losses * self.saved(tensors, None) + self.parts((per_token, 0.0), (0.0, 0.0), None)
        table = self.model.vocab * self.model.hidden / self.parallel.tp
        return held + np.array([fixed + table_buffers_bytes(table, self.parallel, self.train), 0.0])

    def _forward_moments(self, item: Placed) -> list[tuple[Floats, str]]:
        moments = forward_moments(self.model, item.layer, self.parallel, self.dispatcher, recipe_of(self.train))
        return [(self.parts(m.per_token, m.per_assignment, item), m.name) for m in moments]

    def _not_kept(self, i: int, names: tuple[str, ...]) -> tuple[SavedTensor, ...]:
        """Those of a layer's tensors that are made again for the backward."""
        return tuple(t for t in self.tensors_of[i] if t.name in names and t not in self.left_of[i])


def _on_device(kept: list[Floats], train: Training) -> list[Floats]:
    """What stays on the GPU of each layer's kept tensors: with offloaded activations only the last layers', one
    being sent while the next is made.
    """
    if "activations" not in train.offloaded:
        return kept
    return [layer if i >= len(kept) - LAYERS_ON_GPU else np.zeros_like(layer) for i, layer in enumerate(kept)]


def _worst_of(candidates: list[tuple[Floats, str]]) -> Worst:
    stacked = np.stack([np.broadcast_to(excess, candidates[0][0].shape) for excess, _ in candidates])
    choice_GMR = stacked.sum(axis=-1).argmax(axis=0)
    excess_GMRP = np.take_along_axis(stacked, choice_GMR[None, ..., None], axis=0)[0]
    return Worst(excess_GMRP=excess_GMRP, choice_GMR=choice_GMR, names=tuple(name for _, name in candidates))


def _sum(tensors: tuple[SavedTensor, ...], per: str) -> tuple[float, float]:
    """Bytes of the tensors counted per token or per assignment: (activations, dispatch)."""
    chosen = [tensor for tensor in tensors if tensor.per == per]
    dispatch = sum(tensor.bytes for tensor in chosen if tensor.part == "dispatch")
    return sum(tensor.bytes for tensor in chosen) - dispatch, dispatch
