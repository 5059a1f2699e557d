"""How a model is cut over ranks: parallel sizes and the rank groups that follow, in Megatron's order.

Fastest to slowest a rank's coordinates are tp, cp, dp, pp; the experts' are etp, ep, edp, pp over the same ranks of a
stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from moesim.describe.checks import check_choice, check_whole
from moesim.describe.stages import check_layout
from moesim.errors import InputError, check

CpKind = Literal["ring", "alltoall", "allgather"]


@dataclass(frozen=True, kw_only=True)
class Parallelism:
    """Parallel sizes. dp is derived from num_gpus.

    Where the layers lie: ``layout`` names them stage by stage, in Megatron's text (``Et*3|(tt|)*29m|L``) or as a list
    of layer counts, pp*vpp of them in order of depth; or one of the rules below; or, with none of them, evenly. See
    docs/model.md#stages.
    """

    tp: int = 1  # tensor parallel (with sequence parallelism)
    pp: int = 1  # pipeline stages
    vpp: int = 1  # virtual stages per pipeline rank
    cp: int = 1  # context parallel
    cp_kind: CpKind = "ring"  # how the ranks of a sequence reach each other's keys and values
    ep: int = 1  # expert parallel
    etp: int = 1  # tensor parallel inside an expert
    zero: int = 1  # ZeRO stage 0..3
    fsdp: bool = False  # zero 3, or 2 (weights stay gathered till the backward), as PyTorch's FSDP2 does it
    replicate: int = 1  # groups of replicas that each hold all of zero's shards (HSDP)
    layout: str | tuple[int, ...] | None = None
    num_first_stage_layers: int | None = None  # of the first pipeline rank; the others share the rest
    num_last_stage_layers: int | None = None
    embedding_as_layer: bool = False  # takes a layer's place on its stage
    loss_as_layer: bool = False

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "vpp", "cp", "ep", "etp", "replicate"):
            check_whole("parallel", name, getattr(self, name))
        check_choice("parallel", "cp_kind", self.cp_kind, get_args(CpKind))
        check_whole("parallel", "zero", self.zero, least=0)
        check(0 <= self.zero <= 3, "parallel", "zero", "must be 0, 1, 2 or 3", self.zero)
        check(not self.fsdp or self.zero >= 2, "parallel", "zero", "must be 2 or 3 with fsdp", self.zero)
        rule = "needs zero of at least 1: without it every replica holds all"
        check(self.replicate == 1 or self.zero >= 1, "parallel", "replicate", rule, self.replicate)
        self._check_stages()

    def _check_stages(self) -> None:
        """One rule at most says where layers lie, and it fits pp and vpp."""
        ends = [name for name in ("num_first_stage_layers", "num_last_stage_layers") if getattr(self, name) is not None]
        as_layers = [name for name in ("embedding_as_layer", "loss_as_layer") if getattr(self, name)]
        for name in ends:
            check_whole("parallel", name, getattr(self, name), least=0)
            check(self.pp > 1, "parallel", name, "needs pp of at least 2", getattr(self, name))
        given = [*ends[:1], *as_layers[:1], *(["layout"] if self.layout is not None else [])]
        if len(given) > 1:
            raise InputError("parallel", given[0], f"cannot stand beside {given[1]}: give one", getattr(self, given[0]))
        if self.layout is not None:
            if isinstance(self.layout, list):
                object.__setattr__(self, "layout", tuple(self.layout))
            check_layout(self.layout, self.pp, self.vpp)

    def rank_layout(self, num_gpus: int) -> RankLayout:
        """The rank layout on num_gpus, or InputError naming the size that does not divide."""
        check_whole("parallel", "num_gpus", num_gpus)
        per_replica = self.tp * self.cp * self.pp
        rule = f"tp*cp*pp = {self.tp}*{self.cp}*{self.pp} = {per_replica} must divide num_gpus={num_gpus}"
        check(num_gpus % per_replica == 0, "parallel", "num_gpus", rule, num_gpus)
        dp = num_gpus // per_replica
        per_stage = dp * self.cp * self.tp
        if per_stage % (self.ep * self.etp):
            name = "ep" if self.etp == 1 else "ep*etp"
            product = f"dp*cp*tp = {dp}*{self.cp}*{self.tp} = {per_stage}"
            raise InputError("parallel", "ep", f"{name}={self.ep * self.etp} does not divide {product}", self.ep)
        edp = per_stage // (self.ep * self.etp)
        rule = f"must divide the {dp} replicas, and the {edp} of an expert"
        check(dp % self.replicate == 0 and edp % self.replicate == 0, "parallel", "replicate", rule, self.replicate)
        return RankLayout(parallel=self, num_gpus=num_gpus, dp=dp, edp=edp)


@dataclass(frozen=True, kw_only=True)
class RankLayout:
    """Rank numbers of every group, as arrays. Rank = coordinates in mixed radix (tp fastest, pp slowest)."""

    parallel: Parallelism
    num_gpus: int
    dp: int
    edp: int

    def num_shards(self, num_copies: int = 1) -> tuple[int, int]:
        """Among how many ranks zero shares out what belongs to dense parameters, and to experts; num_copies: how often
        a pipeline holds them all.
        """
        if self.parallel.zero == 0:
            return 1, 1
        groups = self.parallel.replicate
        return self.dp * self.parallel.cp * num_copies // groups, self.edp * num_copies // groups

    @property
    def ranks_per_stage(self) -> int:
        return self.num_gpus // self.parallel.pp

    def stage_ranks(self, stage: int) -> NDArray[np.int64]:
        """(ranks_per_stage,) global ranks of one pipeline stage, in order."""
        return np.arange(self.ranks_per_stage, dtype=np.int64) + stage * self.ranks_per_stage

    @property
    def block_size(self) -> int:
        """Ranks of one stage that must synchronise within a layer: the join of its tp*cp group and its ep*etp group."""
        return int(np.lcm(self.parallel.tp * self.parallel.cp, self.parallel.ep * self.parallel.etp))

    @property
    def num_blocks(self) -> int:
        """Independent blocks per stage; they meet only at the gradient reduction."""
        return self.ranks_per_stage // self.block_size

    def groups(self, kind: str) -> NDArray[np.int64]:
        """(num_groups, group_size) global ranks of each group of a kind.

        kind: tp, cp, dp, pp, ep, etp, edp, or dpcp (the replicas of dense gradients).
        """
        p = self.parallel
        dense = np.arange(self.num_gpus, dtype=np.int64).reshape(p.pp, self.dp, p.cp, p.tp)
        expert = np.arange(self.num_gpus, dtype=np.int64).reshape(p.pp, self.edp, p.ep, p.etp)
        if kind == "dpcp":
            return np.moveaxis(dense, 3, 1).reshape(p.pp * p.tp, self.dp * p.cp)
        axes = {"pp": (dense, 0), "dp": (dense, 1), "cp": (dense, 2), "tp": (dense, 3)}
        axes |= {"edp": (expert, 1), "ep": (expert, 2), "etp": (expert, 3)}
        assert kind in axes, f"unknown group kind {kind}"
        grid, axis = axes[kind]
        return np.moveaxis(grid, axis, -1).reshape(-1, grid.shape[axis])
