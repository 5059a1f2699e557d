"""The routed load of one step, stage by stage: rows of each expert and the time each rank spends in the all-to-alls.

Legend: G expert-parallel groups of a stage, M micro-batches, L MoE layers (of the model, or of a stage), E experts, R
ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from moesim.cost.layer import rank_tokens
from moesim.describe.model import MoeFfn, Router
from moesim.describe.workload import Popularity
from moesim.placement import Placement, contiguous
from moesim.routing.load import ExpertLoad, draw_load
from moesim.routing.popularity import Popularities, popularity_LE
from moesim.scenario import Scenario
from moesim.seeds import stream
from moesim.units import BYTES_PER_ELEMENT

Floats = NDArray[np.float64]
# FP8 rows travel with one float32 scale for each 128 elements. arXiv 2412.19437, section 3.3.
FP8_SCALE_BYTES = BYTES_PER_ELEMENT["float32"] / 128


@dataclass(frozen=True, kw_only=True)
class StepLoad:
    """Where the tokens of one step went, in every MoE layer of the model."""

    scenario: Scenario
    moe: MoeFfn
    layers: tuple[
        int, ...
    ]  # numbers of the MoE layers in the model; trained multi-token-prediction layers follow the stack
    popularities: Popularities
    placement: Placement
    load: ExpertLoad  # assigned_GMLE, kept_GMLE

    @cached_property
    def kept_by_rank_GMLRE(self) -> Floats:
        """Kept assignments of each expert, experts grouped by the rank that holds them."""
        order_E = np.argsort(self.placement.expert_to_rank_E, kind="stable")
        kept = self.load.kept_GMLE[..., order_E]
        return kept.reshape(*kept.shape[:-1], self.scenario.parallel.ep, -1)

    def received_GMLR(self, positions: list[int]) -> Floats:
        """Kept assignments that each expert-parallel rank receives in the MoE layers at these positions of
        ``layers``.
        """
        return self.kept_by_rank_GMLRE[:, :, positions].sum(axis=-1)


def step_load(scenario: Scenario) -> StepLoad | None:
    """Draw the step's load; None for a dense model. Raises NotModelledError where MoE layers differ."""
    model, parallel = scenario.model, scenario.parallel
    stack = model.layers + (model.mtp_layers if scenario.train.mtp else ())
    layers = tuple(i for i, layer in enumerate(stack) if layer.is_moe)
    if not layers:
        return None
    moe = stack[layers[0]].ffn
    assert isinstance(moe, MoeFfn)
    popularities = _popularities(scenario.routing.popularity, len(layers), moe.num_experts, moe.router, scenario.seed)
    load = draw_load(
        popularities,
        scenario.routing,
        tokens_per_rank=rank_tokens(parallel, scenario.train),
        num_source_ranks=parallel.ep * parallel.etp,
        num_groups=scenario.layout.edp,
        num_micro_batches=scenario.num_micro_batches,
        rng=stream(scenario.seed, "load"),
    )
    placement = contiguous(moe.num_experts, parallel.ep)
    return StepLoad(
        scenario=scenario, moe=moe, layers=layers, popularities=popularities, placement=placement, load=load
    )


@lru_cache(maxsize=8)
def _popularities(popularity: Popularity, num_layers: int, num_experts: int, router: Router, seed: int) -> Popularities:
    return popularity_LE(
        popularity, num_layers=num_layers, num_experts=num_experts, router=router, rng=stream(seed, "popularity")
    )
