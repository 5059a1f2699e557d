"""Which configurations a plan tries: sizes that divide, in a fixed order; and what no configuration can be better than.

A *family* is everything but ZeRO stage, micro-batch and recomputation. Along these memory and time are ordered, so the
search walks a staircase through them (see `moesim.study.plan_search`). See docs/model.md#plan-bounds.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from moesim.cost.activations import BF16_BYTES
from moesim.cost.precision import RECIPES
from moesim.cost.recompute import useful_modules
from moesim.cost.static import rank_parameters, weight_layouts
from moesim.describe.checks import check_choice
from moesim.describe.flops import BACKWARD_OVER_FORWARD, forward_flops_by_part
from moesim.describe.model import Model, MoeFfn
from moesim.describe.parallel import Parallelism
from moesim.describe.pipeline import Placed, trained_layers
from moesim.describe.popularity import Balanced
from moesim.describe.schedules import ScheduleName
from moesim.errors import check
from moesim.scenario import Scenario

Leaves = Mapping[str, Any]  # flat names of a scenario and their values
SHAPE = ("num_gpus", "tp", "cp", "pp", "ep", "etp")  # what decides ranks
INNER = ("zero", "micro_batch", "recompute")  # the staircase
LAST = ("dispatcher", "policy")  # chosen for the best of the others
MOST_VPP = 4
ZEROS = (1, 2, 3)  # without any sharding the optimizer has more to do, and nothing is gained
MOST_MICRO_BATCH = 8
LONG_SEQUENCE_TOKENS = 16384  # from here on sequences may be cut over ranks
MOST_CP = 16
CHEAP_MODULES = ("moe_act", "layernorm", "mla_up_proj")  # cheap to make again, in Megatron's names
CAPACITY_FACTORS = (None, 2.0, 1.5, 1.25, 1.0)  # tried where drops are allowed


@dataclass(frozen=True, kw_only=True)
class Space:
    """Every configuration of one kind of cluster: a scenario on one of its GPUs, and the values of each axis."""

    base: Scenario
    axes: Mapping[str, tuple[Any, ...]]  # zero and micro_batch rising, recompute from nothing to everything

    def families(self) -> Iterator[dict[str, Any]]:
        """Every family that divides: GPUs, heads, experts, layers and the batch come out whole.

        Those of fewer GPUs come first; the last axis varies fastest.
        """
        rest = [name for name in self.axes if name not in (*SHAPE, *INNER, *LAST)]
        for values in itertools.product(*(self.axes[name] for name in SHAPE)):
            shape = dict(zip(SHAPE, values, strict=True))
            if not self._divides(shape):
                continue
            # Spread experts are met as they are most likely to be best: placed by load, sent as DeepEP does.
            last = {name: self.axes[name][-1 if shape["ep"] > 1 else 0] for name in LAST}
            for inner in itertools.product(*(self.axes[name] for name in rest)):
                family = shape | dict(zip(rest, inner, strict=True)) | last
                interleaves = family["vpp"] == 1 or family["pp"] > 1
                if interleaves and family["pp"] * family["vpp"] <= len(self.base.model.layers):
                    yield family

    def others(self, leaves: Leaves) -> list[dict[str, Any]]:
        """A configuration with every other dispatcher and placement; none where experts are not spread."""
        if leaves["ep"] == 1:
            return []
        every = [dict(zip(LAST, values, strict=True)) for values in itertools.product(*(self.axes[n] for n in LAST))]
        return [dict(leaves) | one for one in every if any(leaves[name] != value for name, value in one.items())]

    def _divides(self, shape: Leaves) -> bool:
        model, train = self.base.model, self.base.train
        replica = shape["tp"] * shape["cp"] * shape["pp"]
        if shape["num_gpus"] % replica or shape["tp"] > self.base.cluster.ranks_per_node:
            return False
        per_stage = shape["num_gpus"] // shape["pp"]
        dp, cut = shape["num_gpus"] // replica, shape["ep"] * shape["etp"]
        return (
            per_stage % cut == 0
            and train.global_batch % (dp * self.axes["micro_batch"][0]) == 0
            and shape["pp"] <= len(model.layers)
            and train.seq_len % (shape["tp"] * shape["cp"]) == 0
            and all(layer.attention.num_heads % shape["tp"] == 0 for layer in model.kinds)
        )

    @property
    def first_zeros(self) -> tuple[int, ...]:
        """ZeRO stages that every family is tried with; higher ones cost time, and are where memory asks for them."""
        zeros: tuple[int, ...] = self.axes["zero"]
        return tuple(zero for zero in zeros if zero <= 1) or zeros[:1]

    def takes_micro_batch(self, family: Leaves, micro_batch: int) -> bool:
        """Whether the batch divides into such micro-batches, and in rounds of the pipeline where it is interleaved."""
        dp = family["num_gpus"] // (family["tp"] * family["cp"] * family["pp"])
        whole, rest = divmod(self.base.train.global_batch, dp * micro_batch)
        return rest == 0 and (family["vpp"] == 1 or whole % family["pp"] == 0)


def space_of(base: Scenario, *, min_gpus: int, max_gpus: int, asked: Leaves, drops: bool) -> Space:
    """The space around a scenario. asked: axes that are given, a tuple of values each; drops: tokens may be dropped.

    Raises InputError for an axis that cannot be, or where no cluster size lies between the two.
    """
    model, cluster = base.model, base.cluster
    experts = {layer.ffn.num_experts for layer in model.layers if isinstance(layer.ffn, MoeFfn)}
    counts = [n for n in range(1, max(experts) + 1) if all(e % n == 0 for e in experts)] if experts else [1]
    skewed = bool(experts) and not isinstance(base.routing.popularity, Balanced)
    modules = [module for module in CHEAP_MODULES if module in useful_modules(model)]
    again = [",".join(modules[: n + 1]) for n in range(len(modules)) if n in (0, len(modules) - 1)]
    long = base.train.seq_len > LONG_SEQUENCE_TOKENS
    axes: dict[str, tuple[Any, ...]] = {
        "num_gpus": cluster_sizes(cluster.ranks_per_node, min_gpus, max_gpus),
        "tp": _doubling(cluster.ranks_per_node),
        "cp": _doubling(MOST_CP if long else 1),
        "pp": _stages(len(model.layers), cluster.ranks_per_node),
        "ep": tuple(counts),
        "etp": (1,),
        "zero": tuple(zero for zero in ZEROS if zero >= 2 or not base.parallel.fsdp),
        "vpp": _doubling(MOST_VPP),
        "dispatcher": ("alltoall", "deepep") if experts else ("alltoall",),
        "policy": ("contiguous", "search") if skewed else ("contiguous",),
        "capacity_factor": CAPACITY_FACTORS if drops and experts else (base.routing.capacity_factor,),
        "micro_batch": _doubling(MOST_MICRO_BATCH),
        "recompute": ("none", *again, "full"),
    } | dict(asked)
    for name, values in asked.items():
        check(len(values) > 0, "plan.axes", name, "must have at least one value", list(values))
    _check_numbers(axes)
    for name in ("recompute", "policy", "dispatcher", "cp_kind", "capacity_factor"):
        for value in asked.get(name, ()):
            base.with_(**{name: value})  # one wrong value among others would only be refused again and again
    for value in asked.get("schedule", ()):
        check_choice("plan.axes", "schedule", value, get_args(ScheduleName))
    for name in ("zero", "micro_batch"):
        axes[name] = tuple(sorted(axes[name]))
    axes["recompute"] = tuple(sorted(axes["recompute"], key=_recomputed))
    if len(asked.get("num_gpus", ())):
        axes["num_gpus"] = tuple(sorted(n for n in axes["num_gpus"] if min_gpus <= n <= max_gpus))
    rule = f"leaves no size between min_gpus and max_gpus in whole nodes of {cluster.ranks_per_node}"
    check(len(axes["num_gpus"]) > 0, "plan", "max_gpus", rule, [min_gpus, max_gpus])
    return Space(base=base, axes=axes)


def _check_numbers(axes: Leaves) -> None:
    for name in ("num_gpus", "tp", "cp", "pp", "ep", "etp", "vpp", "micro_batch"):
        for value in axes[name]:
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            check(whole, "plan.axes", name, "must be whole numbers of at least 1", value)
    for value in axes["zero"]:
        check(value in (0, 1, 2, 3) and not isinstance(value, bool), "plan.axes", "zero", "must be 0, 1, 2 or 3", value)
    for value in axes["recompute"]:
        check(isinstance(value, str), "plan.axes", "recompute", "must be texts such as none or full", value)


def cluster_sizes(ranks_per_node: int, min_gpus: int, max_gpus: int) -> tuple[int, ...]:
    """Cluster sizes worth trying: 2**n and 3 * 2**n nodes, and the largest in whole nodes.

    >>> cluster_sizes(8, 16, 100)
    (16, 24, 32, 48, 64, 96)
    """
    most = max_gpus // ranks_per_node
    nodes = {2**n * m for n in range(max(most, 1).bit_length()) for m in (1, 3)} | {most}
    return tuple(n * ranks_per_node for n in sorted(nodes) if n <= most and n > 0 and n * ranks_per_node >= min_gpus)


def _doubling(most: int) -> tuple[int, ...]:
    """
    >>> _doubling(9)
    (1, 2, 4, 8)
    """
    return tuple(2**n for n in range(most.bit_length()))


def _stages(most: int, ranks_per_node: int) -> tuple[int, ...]:
    """Powers of two, and these times the odd part of a node's GPUs: with it replicas of a batch are powers of two.

    >>> _stages(40, 72)
    (1, 2, 4, 8, 9, 16, 18, 32, 36)
    """
    odd = ranks_per_node
    while odd % 2 == 0:
        odd //= 2
    return tuple(sorted({stages * times for stages in _doubling(most) for times in (1, odd) if stages * times <= most}))


def _recomputed(recompute: str) -> tuple[int, int, str]:
    """none first, then by how many modules are made again, full last."""
    rank = {"none": 0, "full": 2}.get(recompute, 1)
    return rank, recompute.count(","), recompute


class StaticBytes:
    """Least memory of the fullest GPU [bytes]: weights, gradients and optimizer states, the mean over stages.

    No stage's fullest GPU holds less than the mean over stages, and activations, buffers and what software takes come
    on top. See docs/model.md#plan-bounds.
    """

    def __init__(self, base: Scenario) -> None:
        self._model, self._train, self._copies = base.model, base.train, base.expert_copies
        self._fsdp = base.parallel.fsdp
        self._layers = Counter(trained_layers(base.model, base.train))
        self._parameters: dict[tuple[int, int], tuple[float, float]] = {}

    def __call__(self, shape: Leaves) -> float:
        """Of a configuration: its tp, cp, pp, ep, etp, zero and num_gpus matter."""
        train, zero = self._train, shape["zero"]
        dense, expert = self._whole(shape["tp"], shape["ep"] * shape["etp"])
        per_stage = shape["num_gpus"] // shape["pp"]
        shards = (per_stage // shape["tp"], per_stage // (shape["ep"] * shape["etp"]))
        casts = 0.0 if train.precision == "bf16" else weight_layouts(train) * RECIPES[train.precision].operand_bytes
        state_bytes = 0.0 if "optimizer" in train.offloaded else train.optimizer.state_bytes

        def of(element_bytes: float, *, sharded: bool) -> float:
            if sharded:
                return element_bytes * (dense / shards[0] + expert / shards[1])
            return element_bytes * (dense + expert)

        wide = 0.0 if train.optimizer.weights == "narrow" or self._fsdp else BF16_BYTES
        weights = of(wide, sharded=zero >= 3) + (0.0 if zero >= 3 else casts * self._in_layers(shape))
        gradients = of(train.optimizer.gradient_bytes, sharded=zero >= 2)
        return (weights + gradients + of(state_bytes, sharded=zero >= 1)) / shape["pp"]

    def _in_layers(self, shape: Leaves) -> float:
        dense, expert = self._whole(shape["tp"], shape["ep"] * shape["etp"])
        return dense + expert - self._outer(shape["tp"])

    def _whole(self, tp: int, cut: int) -> tuple[float, float]:
        """(dense, expert) parameters of all stages' one rank together."""
        if (tp, cut) not in self._parameters:
            parallel = Parallelism(tp=tp, ep=cut)
            sizes = [
                (count, rank_parameters(self._model, Placed(layer=layer, moe_index=0), parallel, self._copies))
                for layer, count in self._layers.items()
            ]
            dense = sum(count * one for count, (one, _) in sizes) + self._outer(tp)
            self._parameters[tp, cut] = dense, sum(count * one for count, (_, one) in sizes)
        return self._parameters[tp, cut]

    def _outer(self, tp: int) -> float:
        """Embedding, and the head where it is not tied."""
        return self._model.vocab * self._model.hidden / tp * (1 if self._model.tie_embeddings else 2)


class LeastStep:
    """Least seconds of a step: its own arithmetic at the GPUs' peak, without a bubble, a message or a wait.

    Where assignments may be dropped or documents are packed, only what they cannot lessen is counted.
    """

    def __init__(self, base: Scenario) -> None:
        train, model = base.train, base.model
        forward = forward_flops_by_part(model, train.seq_len, with_mtp=train.mtp)
        self._tokens = train.global_batch * train.seq_len
        self._forward = 0.0 if train.documents is not None else sum(forward.values())
        self._without_experts = max(self._forward - forward["experts"], 0.0)
        self._peak = base.cluster.gpu.peak_flops_per_s[RECIPES[train.precision].peak].value

    def __call__(self, leaves: Leaves) -> float:
        forward = self._forward if leaves["capacity_factor"] is None else self._without_experts
        passes = 1.0 + BACKWARD_OVER_FORWARD
        return self._tokens * passes * forward / (leaves["num_gpus"] * self._peak)


def flops_per_token(model: Model, base: Scenario) -> float:
    """Model FLOPs of a trained token, as ``mfu`` counts them."""
    forward = forward_flops_by_part(model, base.train.seq_len, with_mtp=base.train.mtp)
    return (1.0 + BACKWARD_OVER_FORWARD) * sum(forward.values())


def telling(leaves: Leaves) -> Leaves:
    """The settings of a configuration that make a difference: without spread experts these two make none."""
    if leaves["ep"] > 1:
        return leaves
    return {name: value for name, value in leaves.items() if name not in ("dispatcher", "policy")}
