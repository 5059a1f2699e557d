"""What stages hold and exchange once a step: reductions, gathered weights, the optimizer, standing memory; once for all
configurations that differ in their micro-batches alone. The functions are the event engine's.

Legend: S stages, C chunks of a stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.catalog.step import StepConstants
from moesim.cost.activations import placeholder_gradient_bytes, workspace_bytes
from moesim.cost.device import DeviceCost
from moesim.cost.host import once_a_step_s
from moesim.cost.layer import optimizer_s
from moesim.cost.offload import optimizer_transfer_s
from moesim.cost.software import software_of
from moesim.cost.static import outer_parameters, rank_parameters, static_of
from moesim.describe.pipeline import stage_chunks
from moesim.scenario import Scenario
from moesim.timeline.reduction import gradient_reduction_s, sharded_weights_s

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Which layers of the stack each chunk holds: start..end-1, and of the multi-token-prediction layers likewise."""

    start_SC: Ints
    end_SC: Ints
    start_mtp_SC: Ints
    end_mtp_SC: Ints
    alike_S: Ints  # the first stage that holds the same kinds of layers

    @property
    def num_layers_SC(self) -> Ints:
        return self.end_SC - self.start_SC + self.end_mtp_SC - self.start_mtp_SC


def split_of(scenario: Scenario) -> Split:
    """The chunks of every stage, of a schedule with one line."""
    parallel = scenario.parallel
    ranges_SC4, held = [], []
    for stage in range(parallel.pp):
        chunks = stage_chunks(scenario.model, parallel, scenario.train, stage)
        ranges_SC4.append(
            [
                (*_range([i.number for i in c if not i.is_mtp]), *_range([i.number for i in c if i.is_mtp]))
                for c in chunks
            ]
        )
        kinds = tuple(tuple((item.layer, item.is_mtp) for item in chunk) for chunk in chunks)
        held.append((kinds, stage == 0, stage == parallel.pp - 1))
    start_SC, end_SC, start_mtp_SC, end_mtp_SC = np.moveaxis(np.array(ranges_SC4, dtype=np.int64), 2, 0).copy()
    return Split(
        start_SC=start_SC,
        end_SC=end_SC,
        start_mtp_SC=start_mtp_SC,
        end_mtp_SC=end_mtp_SC,
        alike_S=np.array([held.index(one) for one in held]),
    )


def _range(numbers: list[int]) -> tuple[int, int]:
    assert numbers == list(range(numbers[0], numbers[-1] + 1)) if numbers else True
    return (numbers[0], numbers[-1] + 1) if numbers else (0, 0)


@dataclass(frozen=True, kw_only=True, eq=False)
class StageCosts:
    """Seconds and bytes of every stage that its micro-batches do not change."""

    reduce_S: Floats
    gather_S: Floats
    optimizer_S: Floats
    host_S: Floats  # of the optimizer's states on the host link, beyond the update itself
    weight_gather_SC: Floats  # before each pass of a chunk (ZeRO-3)
    gradient_scatter_SC: Floats  # after each backward (ZeRO-2, 3)
    standing_bytes_S: Floats  # weights, gradients, optimizer states, placeholders, workspaces
    update_bytes_S: Floats  # made for a moment by the optimizer


@dataclass(frozen=True, kw_only=True, eq=False)
class StageParameters:
    """What one rank of a stage holds, whatever the number of GPUs: (dense, expert) parameters of its layers, of each
    chunk with embedding or head, and of all; those outside of layers; bytes of placeholders and workspaces.
    """

    layers: tuple[tuple[float, float], ...]
    chunks: tuple[tuple[float, float], ...]
    dense: float
    expert: float
    outer: float
    standing_bytes: float


def stage_parameters(scenario: Scenario, split: Split) -> dict[int, StageParameters]:
    """Of the first stage of each that hold the same."""
    return {stage: _parameters(scenario, stage) for stage in dict.fromkeys(split.alike_S.tolist())}


def _parameters(scenario: Scenario, stage: int) -> StageParameters:
    model, parallel, train = scenario.model, scenario.parallel, scenario.train
    chunks = stage_chunks(model, parallel, train, stage)
    by_kind = {
        (item.layer, item.is_mtp): rank_parameters(model, item, parallel, scenario.expert_copies)
        for item in {(item.layer, item.is_mtp): item for chunk in chunks for item in chunk}.values()
    }
    of_chunks = [[by_kind[item.layer, item.is_mtp] for item in chunk] for chunk in chunks]
    layers = tuple(pair for chunk in of_chunks for pair in chunk)
    outer, with_outer = outer_parameters(model, parallel, train, stage), 0 if stage == 0 else len(chunks) - 1
    software, held = software_of(scenario.train), tuple(item.layer for chunk in chunks for item in chunk)
    return StageParameters(
        layers=layers,
        chunks=tuple(
            (sum(d for d, _ in chunk) + outer * (c == with_outer), sum(e for _, e in chunk))
            for c, chunk in enumerate(of_chunks)
        ),
        dense=sum(d for d, _ in layers) + outer,
        expert=sum(e for _, e in layers),
        outer=outer,
        standing_bytes=placeholder_gradient_bytes(model, held, parallel, software) + workspace_bytes(held, software),
    )


def stage_costs(
    scenario: Scenario,
    split: Split,
    held: Mapping[int, StageParameters],
    device: DeviceCost,
    constants: StepConstants,
) -> StageCosts:
    """The costs of every stage; stages that hold the same, and chunks as large, are computed once."""
    sizes = {size for own in held.values() for size in own.chunks} if scenario.parallel.zero >= 2 else set()
    sharded = {size: sharded_weights_s(scenario, *size) for size in sizes}
    found = {stage: _one(scenario, own, sharded, device, constants) for stage, own in held.items()}
    columns = zip(*(found[stage] for stage in split.alike_S.tolist()), strict=True)
    return StageCosts(
        **{name: np.array(column) for name, column in zip(StageCosts.__dataclass_fields__, columns, strict=True)}
    )


def _one(
    scenario: Scenario,
    held: StageParameters,
    sharded: Mapping[tuple[float, float], tuple[float, float]],
    device: DeviceCost,
    constants: StepConstants,
) -> tuple[float, float, float, float, list[float], list[float], float, float]:
    """One stage's costs, in the order of StageCosts. sharded: seconds to gather and scatter chunks, by their size."""
    parallel, train, layout = scenario.parallel, scenario.train, scenario.layout
    of_chunks = [sharded.get(size, (0.0, 0.0)) for size in held.chunks]
    reduce_s, gather_s = gradient_reduction_s(scenario, held.dense, held.expert)
    num_shards = layout.num_shards()
    shard = held.dense / num_shards[0] + held.expert / num_shards[1]
    update_s = float(optimizer_s(shard, train, device))
    transfer_s = optimizer_transfer_s(shard, train, scenario.cluster.gpu.host_bytes_per_s.value)
    static = static_of(held.layers, held.outer, parallel, layout, train)
    return (
        reduce_s,
        gather_s,
        update_s + once_a_step_s(held.dense + held.expert, device, constants),
        max(transfer_s - update_s, 0.0),
        [gather for gather, _ in of_chunks],
        [scatter for _, scatter in of_chunks],
        static.weights_bytes + static.gradients_bytes + static.optimizer_bytes + held.standing_bytes,
        static.update_bytes,
    )
