"""One pipeline stage's operations as phases: which layers, in which order, with which loads and collectives.

Forward: tensor-parallel gather, attention, router, permute, dispatch, sort, experts, sort back, combine, unpermute,
shared or dense feed-forward. Backward: the same in reverse, after a recomputation where one is asked for. See
docs/model.md#layer.

Legend: M micro-batches, L MoE layers of the stage, R ranks of the stage, E experts on one rank, C virtual stages.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from moesim.cost.device import DeviceCost
from moesim.cost.host import issued_operations
from moesim.cost.layer import (
    LayerCost,
    MovingCost,
    PassCost,
    again_s,
    embedding_s,
    expert_activation_s,
    expert_weight_gradients_s,
    experts_s,
    head_s,
    head_weight_gradient_s,
    layer_cost,
    moving_s,
    mtp_projection_s,
    packed_attention_s,
    rank_tokens,
    weight_casts_s,
    weight_gradients_s,
)
from moesim.cost.offload import chunk_offload
from moesim.cost.recompute import ATTENTION_OPERATIONS, FFN_OPERATIONS, Operation, operations_again
from moesim.describe.model import LatentAttention, Layer, MoeFfn
from moesim.describe.pipeline import Placed
from moesim.describe.schedules import Way, make_schedule
from moesim.scenario import Scenario
from moesim.timeline.attention_group import context_s, gather_s
from moesim.timeline.packed import PackedWork
from moesim.timeline.phases import Phase
from moesim.timeline.prefetch import fetched_ahead

Floats = NDArray[np.floating]
SCATTER = "scatter gradients"
_Group = tuple[Placed | None, list[Phase]]  # the phases of one layer; of None: what stands around the layers


@dataclass(frozen=True, kw_only=True)
class StageLoad:
    """What routing brings to one stage: rows of each expert, and each rank's time in the all-to-alls, by MoE layer of
    the stage; and the rows that each rank lays out for the wire in a layer.
    """

    rows_MLRE: Floats
    laid_out_rows: float
    arrived_MLR: Floats  # rows that the dispatch brings each rank: tokens where it sends each only once
    dispatch_s_MLR: Floats
    combine_s_MLR: Floats
    dispatch_backward_s_MLR: Floats
    combine_backward_s_MLR: Floats


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """Everything needed to write down the phases of one stage."""

    scenario: Scenario
    device: DeviceCost
    moe_device: DeviceCost  # for layers with experts
    stage: int
    chunks: tuple[tuple[Placed, ...], ...]  # layers of each virtual stage
    first_layers: tuple[int, ...]  # number of each chunk's first layer in the model
    depths: tuple[int, ...]  # where each chunk stands in the model; the last of all is last_depth
    last_depth: int
    num_ranks: int  # of the stage that are simulated: its first
    load: StageLoad | None  # None: no MoE layer here
    weight_gather_C: tuple[float, ...]  # seconds to gather a chunk's weights before each pass (ZeRO-3), else 0
    gradient_scatter_C: tuple[
        float, ...
    ]  # seconds to reduce-scatter a chunk's gradients after each backward (ZeRO-2, 3), else 0
    issue_s: float = 0.0  # host time to issue one operation

    packed: PackedWork | None = None  # attention of packed sequences; None: of whole ones
    backwards: dict[int, list[_Group]] = field(default_factory=dict, compare=False)  # by chunk, once written down
    # A layer's cost and its weight gradients' seconds (attention, dense block), by its id, once computed.
    costs: dict[int, tuple[LayerCost, tuple[float, float]]] = field(default_factory=dict, compare=False)

    def phases(self, way: Way, chunk: int) -> list[Phase]:
        """Phases of one pass through a chunk; recomputation belongs to the backward, or to the input gradient."""
        if way != "forward" and chunk not in self.backwards:
            self.backwards[chunk] = self._backward(chunk)
        phases: list[Phase] = []
        for placed, own in self._forward(chunk) if way == "forward" else self.backwards[chunk]:
            of_way = _of_way(self._at_own_speed(own), way)
            phases += self._issued(placed.layer, of_way, way) if placed is not None and of_way else of_way
        if self.scenario.parallel.fsdp:
            num_units = len(self.chunks[chunk]) + self._is_first(chunk) + self._is_last(chunk)
            phases = fetched_ahead(phases, num_units)
        if way == "forward":
            return phases + self._host_transfer("send activations to the host", chunk, phases)
        if way != "weight_gradient":
            phases = self._host_transfer("fetch activations from the host", chunk, phases) + phases
        return [replace(phase, is_backward=True) for phase in phases]

    def _forward(self, chunk: int) -> list[_Group]:
        groups: list[_Group] = [(None, self._weights("gather weights", self.weight_gather_C[chunk]))]
        groups += [(None, self._embedding(backward=False))] if self._is_first(chunk) else []
        for index, placed in enumerate(self.chunks[chunk], self.first_layers[chunk]):
            groups += [(None, self._weight_casts(index, placed)), (placed, self._layer_forward(index, placed))]
        return groups + ([(None, self._head(backward=False))] if self._is_last(chunk) else [])

    def _backward(self, chunk: int) -> list[_Group]:
        groups: list[_Group] = [(None, self._weights("gather weights", self.weight_gather_C[chunk]))]
        groups += [(None, self._head(backward=True))] if self._is_last(chunk) else []
        for index, placed in reversed(list(enumerate(self.chunks[chunk], self.first_layers[chunk]))):
            full = self.scenario.train.recompute == "full"
            again = [_as_recompute(phase) for phase in self._layer_forward(index, placed)] if full else []
            groups.append((placed, again + self._layer_backward(index, placed)))
        groups += [(None, self._embedding(backward=True))] if self._is_first(chunk) else []
        return [*groups, (None, self._weights(SCATTER, self.gradient_scatter_C[chunk]))]

    def _host_transfer(self, name: str, chunk: int, phases: list[Phase]) -> list[Phase]:
        """What a pass waits for offloaded activations: their time on the host link beyond the pass's own phases."""
        parallel, train = self.scenario.parallel, self.scenario.train
        layers = chunk_offload(self.scenario.model, parallel, train, self.chunks[chunk])
        if not layers:
            return []
        bytes_MR: Floats | float = 0.0
        for layer in layers:
            bytes_MR = bytes_MR + layer.token_bytes * rank_tokens(parallel, train) * parallel.tp
            if layer.moe_index >= 0:
                assert self.load is not None
                rows_MR = self.load.rows_MLRE[:, layer.moe_index].sum(axis=-1)
                bytes_MR = bytes_MR + layer.assignment_bytes * rows_MR
        own_MR = sum((np.asarray(phase.seconds) for phase in phases), np.zeros(()))
        link_s = bytes_MR / self.scenario.cluster.gpu.host_bytes_per_s.value
        return [Phase(name=name, part="host_transfer", layer=-1, seconds=np.maximum(link_s - own_MR, 0.0))]

    def _at_own_speed(self, phases: list[Phase]) -> list[Phase]:
        """The phases with each rank computing at its own speed; what crosses wires takes the same."""
        speed_R = self.scenario.speed_of_rank[self.scenario.layout.stage_ranks(self.stage)][: self.num_ranks]
        if (speed_R == 1.0).all():
            return phases
        return [
            phase
            if phase.is_comm
            else replace(
                phase, seconds=np.asarray(phase.seconds) / speed_R, weights_s=np.asarray(phase.weights_s) / speed_R
            )
            for phase in phases
        ]

    def _issued(self, layer: Layer, phases: list[Phase], way: Way) -> list[Phase]:
        """The phases of one pass over a layer, and how much longer the host takes to issue them. See
        docs/model.md#host.
        """
        parallel, train, routing = self.scenario.parallel, self.scenario.train, self.scenario.routing
        issue_s = self.issue_s * issued_operations(layer, parallel=parallel, train=train, routing=routing, way=way)
        if not issue_s:
            return phases
        device_s = sum(np.asarray(phase.seconds) for phase in phases)
        beyond_s = np.maximum(issue_s - device_s, 0.0)
        return [*phases, replace(_local("issue", "host", phases[-1].layer, beyond_s), issue_s=issue_s)]

    def _is_first(self, chunk: int) -> bool:
        return self.depths[chunk] == 0

    def _is_last(self, chunk: int) -> bool:
        return self.depths[chunk] == self.last_depth

    def _layer_forward(self, index: int, placed: Placed) -> list[Phase]:
        layer, cost = placed.layer, self._cost(placed.layer)
        phases = [*self._joining(index, placed, backward=False), *self._around(index, layer, cost, cost.forward)]
        if isinstance(layer.ffn, MoeFfn):
            phases += self._moe_forward(index, placed.moe_index, layer.ffn, cost.forward)
        if cost.forward.dense_ffn_s:
            phases.append(
                _local("shared experts" if layer.is_moe else "dense ffn", "dense_ffn", index, cost.forward.dense_ffn_s)
            )
        return phases

    def _layer_backward(self, index: int, placed: Placed) -> list[Phase]:
        layer, cost = placed.layer, self._cost(placed.layer)
        again = operations_again(layer, self.scenario.train)
        _, ffn_weights_s = self._weight_gradients_s(layer)
        phases = []
        for operation in again:
            phases += self._again(index, placed, cost, operation) if operation in FFN_OPERATIONS else []
        if cost.backward.dense_ffn_s:
            name = "shared experts" if layer.is_moe else "dense ffn"
            phases.append(_local(name, "dense_ffn", index, cost.backward.dense_ffn_s, ffn_weights_s))
        if isinstance(layer.ffn, MoeFfn):
            activates = "expert activation" in again
            phases += self._moe_backward(index, placed.moe_index, layer.ffn, cost.backward, activates=activates)
        for operation in again:
            phases += self._again(index, placed, cost, operation) if operation in ATTENTION_OPERATIONS else []
        return [*phases, *self._around(index, layer, cost, cost.backward), *self._joining(index, placed, backward=True)]

    def _weight_casts(self, index: int, placed: Placed) -> list[Phase]:
        """Weights cast before the first micro-batch that a chunk sees, whichever line through the pipeline it is on."""
        num_rank_experts = 0 if self.load is None else self.load.rows_MLRE.shape[-1]
        parallel, train, num_micro_batches = (
            self.scenario.parallel,
            self.scenario.train,
            self.scenario.num_micro_batches,
        )
        casts = weight_casts_s(
            self.scenario.model,
            placed.layer,
            num_rank_experts=num_rank_experts,
            parallel=parallel,
            device=self._device(placed.layer),
        )
        first_M = np.zeros((num_micro_batches, 1))
        num_lines = make_schedule(train.schedule, pp=parallel.pp, vpp=parallel.vpp).num_lines
        first_M[:: num_micro_batches // num_lines] = 1.0
        return [_local("cast weights", part, index, seconds * first_M) for part, seconds in casts.items()]

    def _joining(self, index: int, placed: Placed, *, backward: bool) -> list[Phase]:
        """What a multi-token-prediction layer does before its block."""
        if not placed.is_mtp:
            return []
        model, parallel, train = self.scenario.model, self.scenario.parallel, self.scenario.train
        seconds = mtp_projection_s(model, parallel=parallel, train=train, device=self.device, backward=backward)
        return [_local("join next token", "embedding_head", index, seconds)]

    def _around(self, index: int, layer: Layer, cost: LayerCost, one_pass: PassCost) -> list[Phase]:
        """Attention with the collectives of its tensor- and context-parallel group, all of the layer's in one span."""
        # A forward's products have the FLOPs of their weight gradients, a backward's twice as many.
        attention_s, ffn_s = self._weight_gradients_s(layer)
        is_backward = one_pass is cost.backward
        seconds = one_pass.attention_s + self._packing_s(layer, backward=is_backward)
        attention = _local("attention", "attention", index, seconds, attention_s * is_backward)
        products_s = (attention_s + ffn_s) * (1 + is_backward)
        in_step = self._in_step(index, layer, cost, one_pass.num_tp_collectives, one_pass)
        return [*in_step, replace(attention, products_s=products_s)]

    def _packing_s(self, layer: Layer, *, backward: bool) -> Floats | float:
        """Seconds by which packing changes one pass of a layer's attention."""
        if self.packed is None:
            return 0.0
        return packed_attention_s(
            self.scenario.model,
            layer,
            self.packed.share_MR(layer),
            parallel=self.scenario.parallel,
            train=self.scenario.train,
            device=self._device(layer),
            backward=backward,
        )

    def _weight_gradients_s(self, layer: Layer) -> tuple[float, float]:
        """Of a layer's attention and of its dense or shared block."""
        return self._costs(layer)[1]

    def _in_step(
        self, index: int, layer: Layer, cost: LayerCost, num_tp_collectives: int, attention: PassCost | None
    ) -> list[Phase]:
        """Collectives of the tensor- and context-parallel group; attention: the pass whose exchange is among them."""
        parallel = self.scenario.parallel
        in_step = parallel.tp * parallel.cp
        if in_step == 1:
            return []
        seconds: Floats | float = num_tp_collectives * gather_s(parallel.tp, 1, cost.tp_bytes, self.scenario)
        if attention is not None and parallel.cp > 1:
            is_backward = attention is cost.backward
            core_s = attention.core_attention_s + self._packing_s(layer, backward=is_backward)
            seconds = seconds + context_s(self.scenario, cost, core_s, is_backward=is_backward)
        return [
            Phase(
                name="tensor parallel",
                part="tensor_parallel_comm",
                layer=index,
                seconds=seconds,
                ranks_in_step=in_step,
            )
        ]

    def _again(self, index: int, placed: Placed, cost: LayerCost, operation: Operation) -> list[Phase]:
        """An operation of the forward done again, with its exchanges."""
        layer, train, tp_collectives, attention = placed.layer, self.scenario.train, 0, None
        if operation == "routed experts":
            assert isinstance(layer.ffn, MoeFfn)
            phases = self._moe_forward(index, placed.moe_index, layer.ffn, cost.forward)
        elif operation in ("shared experts", "dense ffn"):
            tp_collectives = 2
            phases = [_local(operation, "dense_ffn", index, cost.forward.dense_ffn_s)]
        else:
            direct = isinstance(layer.attention, LatentAttention) and layer.attention.q_lora_rank is None
            tp_collectives = int(operation == "up projections" and direct)  # queries gather the hidden state
            attention = cost.forward if operation == "core attention" else None
            parallel, device = self.scenario.parallel, self._device(layer)
            seconds = again_s(self.scenario.model, layer, operation, parallel=parallel, train=train, device=device)
            packing_s = self._packing_s(layer, backward=False) if attention is not None else 0.0
            phases = [_local(operation, "attention", index, seconds + packing_s)]
        if tp_collectives or attention is not None:
            phases = [*self._in_step(index, layer, cost, tp_collectives, attention), *phases]
        return [_as_recompute(phase) for phase in phases]

    def _moe_forward(self, index: int, at: int, moe: MoeFfn, one_pass: PassCost) -> list[Phase]:
        assert self.load is not None
        rows_MRE = self.load.rows_MLRE[:, at]
        moving = self._moving(at)
        experts = self._experts_s(moe, rows_MRE, backward=False)
        return [
            _local("router", "router", index, one_pass.router_s),
            *_moved("permute", index, moving.lay_out_s),
            *self._exchange("dispatch", index, self.load.dispatch_s_MLR[:, at]),
            *_moved("sort by expert", index, moving.sort_s),
            _local("experts", "experts", index, experts),
            *_moved("sort back", index, moving.sort_back_s),
            *self._exchange("combine", index, self.load.combine_s_MLR[:, at]),
            *_moved("unpermute", index, moving.unpermute_s),
        ]

    def _moe_backward(self, index: int, at: int, moe: MoeFfn, one_pass: PassCost, *, activates: bool) -> list[Phase]:
        """The forward's phases in reverse: gradients travel the combine's way back first.

        activates: the experts' activation is computed again before its gradient.
        """
        assert self.load is not None
        rows_MRE = self.load.rows_MLRE[:, at]
        moving = self._moving(at)
        model, parallel = self.scenario.model, self.scenario.parallel
        experts = self._experts_s(moe, rows_MRE, backward=True)
        weights = expert_weight_gradients_s(model, moe, rows_MRE, parallel=parallel, device=self.moe_device)
        again = []
        if activates:
            seconds = expert_activation_s(moe, rows_MRE, parallel=parallel, device=self.moe_device)
            again = [_local("expert activation again", "recompute", index, seconds)]
        return [
            *_moved("unpermute", index, moving.unpermute_s),
            *self._exchange("combine", index, self.load.combine_backward_s_MLR[:, at]),
            *_moved("sort back", index, moving.sort_back_s),
            *again,
            _local("experts", "experts", index, experts, weights),
            *_moved("sort by expert", index, moving.sort_s),
            *self._exchange("dispatch", index, self.load.dispatch_backward_s_MLR[:, at]),
            *_moved("permute", index, moving.lay_out_s),
            _local("router", "router", index, one_pass.router_s),
        ]

    def _experts_s(self, moe: MoeFfn, rows_MRE: Floats, *, backward: bool) -> Floats:
        scenario = self.scenario
        return experts_s(
            scenario.model,
            moe,
            rows_MRE,
            parallel=scenario.parallel,
            device=self.moe_device,
            backward=backward,
            dispatcher=scenario.routing.dispatcher,
        )

    def _exchange(self, name: str, index: int, seconds: Floats) -> list[Phase]:
        in_step = self.scenario.parallel.ep * self.scenario.parallel.etp
        if in_step == 1:
            return []
        return [Phase(name=name, part=name, layer=index, seconds=seconds, ranks_in_step=in_step)]

    def _moving(self, at: int) -> MovingCost:
        """What a MoE layer's rows take in each rank's own memory."""
        assert self.load is not None
        parallel, train = self.scenario.parallel, self.scenario.train
        return moving_s(
            self.scenario.model,
            own_tokens=rank_tokens(parallel, train),
            laid_out_rows=self.load.laid_out_rows,
            arrived_rows=self.load.arrived_MLR[:, at],
            rows_E=self.load.rows_MLRE[:, at],
            exchanges=parallel.ep * parallel.etp > 1,
            dispatcher=self.scenario.routing.dispatcher,
            device=self.moe_device,
        )

    def _embedding(self, *, backward: bool) -> list[Phase]:
        model, parallel, train = self.scenario.model, self.scenario.parallel, self.scenario.train
        seconds = embedding_s(model, parallel=parallel, train=train, device=self.device, backward=backward)
        return [_local("embedding", "embedding_head", -1, seconds)]

    def _head(self, *, backward: bool) -> list[Phase]:
        model, train = self.scenario.model, self.scenario.train
        seconds = head_s(model, parallel=self.scenario.parallel, train=train, device=self.device, backward=backward)
        weights_s = 0.0
        if backward:
            weights_s = head_weight_gradient_s(model, parallel=self.scenario.parallel, train=train, device=self.device)
        num_heads = 1 + (len(model.mtp_layers) if train.mtp else 0)
        return [_local("head and loss", "embedding_head", -1, seconds * num_heads, weights_s * num_heads)]

    def _weights(self, name: str, seconds: float) -> list[Phase]:
        return [Phase(name=name, part="gradient_reduction", layer=-1, seconds=seconds)] if seconds else []

    def _device(self, layer: Layer) -> DeviceCost:
        return self.moe_device if layer.is_moe else self.device

    def _cost(self, layer: Layer) -> LayerCost:
        return self._costs(layer)[0]

    def _costs(self, layer: Layer) -> tuple[LayerCost, tuple[float, float]]:
        if id(layer) not in self.costs:
            model, parallel, train, device = (
                self.scenario.model,
                self.scenario.parallel,
                self.scenario.train,
                self._device(layer),
            )
            self.costs[id(layer)] = (
                layer_cost(model, layer, parallel=parallel, train=train, device=device),
                weight_gradients_s(model, layer, parallel=parallel, train=train, device=device),
            )
        return self.costs[id(layer)]


def _of_way(phases: list[Phase], way: Way) -> list[Phase]:
    """What one way does of the phases of a pass; gradients are scattered when those of the weights are made."""
    match way:
        case "input_gradient":
            return [phase.without_weights() for phase in phases if phase.name != SCATTER]
        case "weight_gradient":
            weights = [phase.weights_alone() for phase in phases if np.any(phase.weights_s)]
            return weights + [phase for phase in phases if phase.name == SCATTER]
    return phases


def _moved(name: str, index: int, seconds: Floats | float) -> list[Phase]:
    """A phase that moves rows in memory, where there is any."""
    return [_local(name, "permute", index, seconds)] if np.any(seconds) else []


def _local(name: str, part: str, layer: int, seconds: Floats | float, weights_s: Floats | float = 0.0) -> Phase:
    return Phase(name=name, part=part, layer=layer, seconds=seconds, weights_s=weights_s)


def _as_recompute(phase: Phase) -> Phase:
    """A forward phase done again: its compute counts as recomputation, its communication as communication."""
    return replace(phase, name=f"{phase.name} again", part=phase.part if phase.is_comm else "recompute")
