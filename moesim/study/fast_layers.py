"""What every layer of a model takes on one shape of parallelism, once for all configurations that share it.

The phases are the event engine's own (timeline.stage). Of a layer's ranks four stand for all: the one with the most
rows, the one with the longest exchanges, the one with the fewest rows (whose host falls behind), and the mean one;
collectives wait for the slowest of them. A pass of weight gradients alone has no collective: there every rank counts,
since a chunk ends with the one that has most over all its layers. Loads are drawn as the engine draws them, a few
micro-batches instead of all. See docs/model.md#fast-path.

Legend: L layers of the stack (multi-token-prediction layers that are trained at its end), N sampled micro-batches, W
ways (describe.schedules.WAYS), G groups, R ranks of a group, X ranks of all groups, E experts on a rank, V standing
ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moesim.catalog.step import StepConstants
from moesim.cost.device import DeviceCost
from moesim.cost.host import unfused
from moesim.cost.layer import LayerCost, expert_weight_gradients_s, rank_tokens, weight_casts_s
from moesim.describe.model import Layer, MoeFfn
from moesim.describe.parallel import Parallelism
from moesim.describe.pipeline import Placed, trained_layers
from moesim.describe.schedules import WAYS, Way
from moesim.describe.workload import Balanced
from moesim.scenario import Scenario
from moesim.timeline.load import StepLoad, step_load
from moesim.timeline.phases import OperationTimes, Phase, lay_out
from moesim.timeline.stage import StageLoad, StagePlan

Floats = NDArray[np.float64]
SAMPLES = 4  # micro-batches that are drawn of a skewed step
MOST_GROUPS = 8  # expert-parallel groups that are drawn of a block
_STANDING = 4  # ranks that stand for all: most rows, longest exchanges, fewest rows, the mean
_MEAN = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutedLoad:
    """A few micro-batches of a step's load; at: the standing ranks of each layer, over groups and ranks."""

    step: StepLoad
    at_VNL: NDArray[np.int64]

    @property
    def num_samples(self) -> int:
        return int(self.at_VNL.shape[1])

    def received_LR(self) -> Floats:
        """Rows that each rank of each group receives of a micro-batch, by MoE layer: the mean of the samples."""
        received_GMLR = self.step.received_GMLR(0)
        assert received_GMLR is not None
        num_layers = received_GMLR.shape[2]
        return np.moveaxis(received_GMLR.mean(axis=1, dtype=np.float64), 1, 0).reshape(num_layers, -1)

    def rows_NLXE(self, at: Sequence[int]) -> NDArray[np.floating]:
        """Rows of every expert of every rank, by some of the MoE layers."""
        rows_GNLRE = self.step.rows_GMLRE[:, :, at]
        return np.moveaxis(rows_GNLRE, 0, 2).reshape(*rows_GNLRE.shape[1:3], -1, rows_GNLRE.shape[-1])

    def of_layers(self, at: Sequence[int]) -> StageLoad:
        """Some MoE layers' loads as one layer's micro-batches, on the standing ranks."""
        exchange = self.step.exchange_by_stage[0]
        at_VNL = self.at_VNL[:, :, at]

        def standing(values_GNLR: NDArray[np.floating]) -> Floats:
            """(N*L, 1, V): by standing rank; the mean one's is the mean."""
            values_NLX = _groups_last(values_GNLR)
            chosen = np.take_along_axis(values_NLX, np.moveaxis(at_VNL, 0, 2), axis=2).astype(np.float64)
            chosen[..., _MEAN] = values_NLX.mean(axis=2, dtype=np.float64)
            return chosen.reshape(-1, 1, _STANDING)

        rows_NLVE = np.take_along_axis(self.rows_NLXE(at), np.moveaxis(at_VNL, 0, 2)[..., None], axis=2)
        return StageLoad(
            rows_MLRE=rows_NLVE.reshape(-1, 1, _STANDING, rows_NLVE.shape[-1]).astype(np.float64),
            laid_out_rows=self.step.laid_out_rows,
            arrived_MLR=standing(exchange.arrived_GMLR[:, :, at]),
            dispatch_s_MLR=standing(exchange.dispatch_s_GMLR[:, :, at]),
            combine_s_MLR=standing(exchange.combine_s_GMLR[:, :, at]),
            dispatch_backward_s_MLR=standing(exchange.dispatch_backward_s_GMLR[:, :, at]),
            combine_backward_s_MLR=standing(exchange.combine_backward_s_GMLR[:, :, at]),
        )


def _groups_last(values_GNLR: NDArray[np.floating]) -> NDArray[np.floating]:
    """(N, L, G*R)."""
    return np.moveaxis(values_GNLR, 0, 2).reshape(*values_GNLR.shape[1:3], -1)


def load_key(scenario: Scenario) -> tuple[float, ...]:
    """What a routed load depends on beside the routing and the cluster."""
    p = scenario.parallel
    groups = _num_groups(scenario)
    return rank_tokens(p, scenario.train), p.ep, p.etp, groups, _num_samples(scenario, groups)


def _num_groups(scenario: Scenario) -> int:
    """Expert-parallel groups to draw: those of a block, or those that lie on nodes in different ways."""
    p, in_node = scenario.parallel, scenario.cluster.ranks_per_node
    group = p.ep * p.etp
    in_block = scenario.layout.block_size // group
    ways = 1 if in_node % group == 0 else math.lcm(group, in_node) // group
    skewed = not isinstance(scenario.routing.popularity, Balanced)
    return min(max(in_block if skewed else 1, ways), scenario.layout.edp, max(MOST_GROUPS, ways))


def _num_samples(scenario: Scenario, groups: int) -> int:
    """Micro-batches to draw for each of so many groups."""
    samples = 1 if isinstance(scenario.routing.popularity, Balanced) else max(SAMPLES // groups, 1)
    return min(samples, scenario.num_micro_batches)


def routed_load(scenario: Scenario) -> RoutedLoad:
    """The load of a configuration's expert-parallel group (or of those of a block), for a few micro-batches."""
    p, cluster = scenario.parallel, scenario.cluster
    groups = _num_groups(scenario)
    samples = _num_samples(scenario, groups)
    num_gpus = groups * p.ep * p.etp
    if num_gpus > cluster.ranks_per_node and num_gpus % cluster.ranks_per_node:
        num_gpus = math.lcm(num_gpus, cluster.ranks_per_node)
    alone = replace(
        scenario,
        cluster=replace(cluster, num_gpus=num_gpus),
        parallel=Parallelism(ep=p.ep, etp=p.etp),
        train=replace(
            scenario.train,
            seq_len=int(rank_tokens(p, scenario.train)),
            micro_batch=1,
            global_batch=samples * num_gpus,
            schedule="1f1b",
            recompute="none",
            overlap="none",
        ),
    )
    step = step_load(alone)
    assert step is not None
    exchange = step.exchange_by_stage[0]
    rows_NLX = _groups_last(step.rows_GMLRE.sum(axis=-1))
    wires_NLX = _groups_last(exchange.dispatch_s_GMLR + exchange.combine_s_GMLR)
    beside_mean_NLX = np.abs(rows_NLX - rows_NLX.mean(axis=-1, keepdims=True))
    chosen = [rows_NLX.argmax(-1), wires_NLX.argmax(-1), rows_NLX.argmin(-1), beside_mean_NLX.argmin(-1)]
    return RoutedLoad(step=step, at_VNL=np.stack(chosen))


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerTimes:
    """Seconds of all layers' passes; those of layers a..b-1 are the difference of two entries of an ``upto`` array.

    parts_s: by part, of one micro-batch's passes through all layers, embedding and head, on the mean rank; with
    wait_for_slowest they sum to the passes. exchange_upto_WL: of the dispatches and combines of the mean rank.
    variance_upto_L: of forward and backward together, from micro-batch to micro-batch. late_upto_NXL: of each rank's
    weight gradients beyond the mean's, where they run in a pass of their own and ranks differ.
    """

    upto_WNL: Floats
    casts_upto_L: Floats
    variance_upto_L: Floats
    exchange_upto_WL: Floats
    late_upto_NXL: Floats | None
    embedding_W: Floats
    head_W: Floats
    parts_s: dict[str, float]
    casts_parts_s: dict[str, float]

    @property
    def num_samples(self) -> int:
        return int(self.upto_WNL.shape[1])


@dataclass(frozen=True, kw_only=True, eq=False)
class Kind:
    """Layers of the stack that are alike. numbers: which of it; moe_numbers: which of its MoE layers, if they are."""

    layer: Layer
    is_mtp: bool
    numbers: tuple[int, ...]
    moe_numbers: tuple[int, ...]

    @property
    def placed(self) -> Placed:
        """One of them, alone on a stage."""
        return Placed(layer=self.layer, moe_index=0 if self.layer.is_moe else -1, is_mtp=self.is_mtp)


def stack_kinds(scenario: Scenario) -> tuple[Kind, ...]:
    """The kinds of layers of a scenario's stack."""
    stack, num_stack = trained_layers(scenario.model, scenario.train), len(scenario.model.layers)
    moe_at = {number: at for at, number in enumerate(i for i, layer in enumerate(stack) if layer.is_moe)}
    found: dict[tuple[Layer, bool], list[int]] = {}
    for number, layer in enumerate(stack):
        found.setdefault((layer, number >= num_stack), []).append(number)
    return tuple(
        Kind(
            layer=layer,
            is_mtp=is_mtp,
            numbers=tuple(numbers),
            moe_numbers=tuple(moe_at[i] for i in numbers if i in moe_at),
        )
        for (layer, is_mtp), numbers in found.items()
    )


Costs = dict[int, tuple[LayerCost, tuple[float, float]]]  # StagePlan.costs, of one shape of all plans


@dataclass(frozen=True, kw_only=True, eq=False)
class KindTimes:
    """One kind's: seconds_WNK of its K layers (K = 1: of each of them alike), others likewise; parts of all."""

    seconds_WNK: Floats
    exchange_WK: Floats
    late_NXK: Floats | None  # as LayerTimes.late_upto_NXL
    casts: dict[str, float]  # of one layer, by part
    parts_s: dict[str, float]


def kind_times(
    scenario: Scenario,
    kind: Kind,
    device: DeviceCost,
    constants: StepConstants,
    routed: RoutedLoad | None,
    ways: Sequence[Way],
    costs: Costs,
) -> KindTimes:
    """A kind of layer laid out once for all layers and samples of its kind. routed: of a MoE kind."""
    load = routed.of_layers(kind.moe_numbers) if routed is not None else None
    num_samples, num_numbers = (1, 1) if routed is None else (routed.num_samples, len(kind.numbers))
    plan = _plan(_alone(scenario), device, constants, (kind.placed,), depth=1, load=load, costs=costs)
    seconds_WNK = np.zeros((len(WAYS), num_samples, num_numbers))
    exchange_WK = np.zeros((len(WAYS), num_numbers))
    parts: dict[str, float] = {}
    late_NXK = None
    for way in ways:
        phases = plan.phases(way, 0)
        times = _times(phases, num_samples * num_numbers)
        seconds_WNK[WAYS.index(way)] = times.duration_MB.reshape(-1, num_numbers)
        own = {part: float(value_R[_MEAN]) / times.duration_MB.shape[0] for part, value_R in times.part_R.items()}
        if way == "weight_gradient" and routed is not None:
            late_NXK, mean_NK, of_mean = _weight_gradients(plan, kind, routed, phases)
            seconds_WNK[WAYS.index(way)] = mean_NK
            own |= of_mean
        for part, seconds in own.items():
            parts[part] = parts.get(part, 0.0) + seconds * len(kind.numbers)
        is_wire = [part in ("dispatch", "combine") for part in times.parts]
        wires_M = times.seconds_PMV[is_wire].sum(axis=(0, 2))
        exchange_WK[WAYS.index(way)] = wires_M.reshape(-1, num_numbers).mean(axis=0)
    casts = weight_casts_s(
        scenario.model,
        kind.layer,
        num_rank_experts=0 if load is None else load.rows_MLRE.shape[-1],
        parallel=scenario.parallel,
        device=plan.moe_device if kind.layer.is_moe else device,
    )
    return KindTimes(seconds_WNK=seconds_WNK, exchange_WK=exchange_WK, late_NXK=late_NXK, casts=casts, parts_s=parts)


def _weight_gradients(
    plan: StagePlan, kind: Kind, routed: RoutedLoad, phases: Sequence[Phase]
) -> tuple[Floats, Floats, dict[str, float]]:
    """A pass of weight gradients through each layer of a MoE kind, on every rank: (N, X, K) seconds beyond the mean
    rank's, the mean's (N, K), and its parts that differ between ranks, in a mean layer. phases: the standing ranks'.
    """
    moe = kind.layer.ffn
    assert isinstance(moe, MoeFfn)
    rows_NKXE = routed.rows_NLXE(kind.moe_numbers).astype(np.float64)
    experts_NKX = expert_weight_gradients_s(
        plan.scenario.model, moe, rows_NKXE, parallel=plan.scenario.parallel, device=plan.moe_device
    )
    alike_s = sum(float(np.max(phase.seconds)) for phase in phases if phase.part not in ("experts", "host"))
    all_NKX = np.maximum(experts_NKX + alike_s, sum(phase.issue_s for phase in phases))
    mean_NK, experts_s = all_NKX.mean(axis=-1), float(experts_NKX.mean())
    parts = {"experts": experts_s, "host": float(mean_NK.mean()) - experts_s - alike_s, "wait_for_slowest": 0.0}
    return np.moveaxis(all_NKX - mean_NK[..., None], 1, 2), mean_NK, parts


@dataclass(frozen=True, kw_only=True, eq=False)
class EndTimes:
    """Of the embedding and of the head with its loss."""

    embedding_W: Floats
    head_W: Floats
    parts_s: dict[str, float]


def end_times(scenario: Scenario, device: DeviceCost, constants: StepConstants, ways: Sequence[Way]) -> EndTimes:
    """Both ends of the stack."""
    ends_2W, parts = np.zeros((2, len(WAYS))), dict[str, float]()
    for end_W, depth in zip(ends_2W, (0, 2), strict=True):
        plan = _plan(_alone(scenario), device, constants, (), depth=depth, load=None, costs={})
        for way in ways:
            times = _times(plan.phases(way, 0), 1)
            end_W[WAYS.index(way)] = times.duration_MB[0, 0]
            for part, value_R in times.part_R.items():
                parts[part] = parts.get(part, 0.0) + float(value_R[_MEAN])
    return EndTimes(embedding_W=ends_2W[0], head_W=ends_2W[1], parts_s=parts)


def layer_times(kinds: Sequence[Kind], of_kind: Sequence[KindTimes], ends: EndTimes) -> LayerTimes:
    """Every layer's, from those of its kind."""
    num_layers = sum(len(kind.numbers) for kind in kinds)
    num_samples = max(times.seconds_WNK.shape[1] for times in of_kind)
    seconds_WNL = np.zeros((len(WAYS), num_samples, num_layers))
    exchange_WL, casts_L = np.zeros((len(WAYS), num_layers)), np.zeros(num_layers)
    differ = [times.late_NXK for times in of_kind if times.late_NXK is not None]
    late_NXL = np.zeros((*differ[0].shape[:2], num_layers)) if differ else None
    parts, casts_parts = dict[str, float](), dict[str, float]()
    for kind, times in zip(kinds, of_kind, strict=True):
        numbers = list(kind.numbers)
        seconds_WNL[:, :, numbers], exchange_WL[:, numbers] = times.seconds_WNK, times.exchange_WK
        if late_NXL is not None and times.late_NXK is not None:
            late_NXL[:, :, numbers] = times.late_NXK
        casts_L[numbers] = sum(times.casts.values())
        for part, value in times.casts.items():
            casts_parts[part] = casts_parts.get(part, 0.0) + value * len(numbers)
        for part, value in times.parts_s.items():
            parts[part] = parts.get(part, 0.0) + value
    for part, value in ends.parts_s.items():
        parts[part] = parts.get(part, 0.0) + value
    variance_L = seconds_WNL.sum(axis=0).var(axis=0, ddof=1) if num_samples > 1 else np.zeros(num_layers)
    return LayerTimes(
        upto_WNL=_upto(seconds_WNL),
        casts_upto_L=_upto(casts_L),
        variance_upto_L=_upto(variance_L),
        exchange_upto_WL=_upto(exchange_WL),
        late_upto_NXL=None if late_NXL is None else _upto(late_NXL),
        embedding_W=ends.embedding_W,
        head_W=ends.head_W,
        parts_s=parts,
        casts_parts_s=casts_parts,
    )


def _alone(scenario: Scenario) -> Scenario:
    """The scenario on one stage and one block, since a layer asks for no more."""
    p, cluster = scenario.parallel, scenario.cluster
    num_gpus = scenario.layout.block_size
    if num_gpus > cluster.ranks_per_node and num_gpus % cluster.ranks_per_node:
        num_gpus = math.lcm(num_gpus, cluster.ranks_per_node)
    parallel = Parallelism(tp=p.tp, cp=p.cp, cp_kind=p.cp_kind, ep=p.ep, etp=p.etp)
    dp = parallel.rank_layout(num_gpus).dp
    train = replace(scenario.train, global_batch=scenario.train.micro_batch * dp)
    return replace(scenario, cluster=replace(cluster, num_gpus=num_gpus), parallel=parallel, train=train)


def _plan(
    alone: Scenario,
    device: DeviceCost,
    constants: StepConstants,
    chunk: tuple[Placed, ...],
    *,
    depth: int,
    load: StageLoad | None,
    costs: Costs,
) -> StagePlan:
    """A plan of one layer, or of embedding (depth 0) or head (depth 2) alone."""
    return StagePlan(
        scenario=alone,
        device=device,
        moe_device=unfused(device, constants),
        stage=0,
        chunks=(chunk,),
        first_layers=(0,),
        depths=(depth,),
        num_ranks=_STANDING,
        last_depth=2,
        load=load,
        weight_gather_C=(0.0,),
        gradient_scatter_C=(0.0,),
        issue_s=constants.issue_s,
        costs=costs,
    )


def _times(phases: Sequence[Phase], num_runs: int) -> OperationTimes:
    """Phases on the standing ranks; casts of weights, which only a step's first micro-batch has, stand apart."""
    standing = [
        replace(phase, ranks_in_step=_STANDING if phase.ranks_in_step > 1 else 1)
        for phase in phases
        if phase.name != "cast weights"
    ]
    traced = np.array([_MEAN])
    return lay_out(standing, num_runs=num_runs, num_ranks=_STANDING, block_size=_STANDING, traced=traced)


def _upto(values: Floats) -> Floats:
    """Sums over the last axis up to each place, one entry more."""
    return np.concatenate([np.zeros((*values.shape[:-1], 1)), np.cumsum(values, axis=-1)], axis=-1)
