"""An estimate of a routed model's loss from a published scaling law; it refuses whatever the law was not fitted on.

Clark et al. 2022, Unified Scaling Laws for Routed Language Models, arXiv 2202.01169: equation 1 with the S-BASE row of
table 3. Fitted on models of 15M to 1.3B parameters without routing, of which every second layer got 2 to 512 experts of
which a token uses one, after 130 thousand million tokens. Nothing is known of it elsewhere: modern designs with k = 8
and ten times the tokens lie far outside. See docs/model.md#quality.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moesim.describe.model import Model, MoeFfn
from moesim.describe.parameters import active_parameters
from moesim.units import GIGA, MEGA, format_count

SOURCE = "Clark et al. 2022, arXiv 2202.01169, equation 1 and table 3 (S-BASE)"
A, B, C, D = -0.082, -0.108, 0.009, 1.104
EXPERTS_START, EXPERTS_MAX = 1.847, 314.478
PARAMETERS = (15 * MEGA, 1.3 * GIGA)  # fitted range, of the model without routing
EXPERTS = (2, 512)
TOKENS = 130 * GIGA


@dataclass(frozen=True, kw_only=True)
class QualityEstimate:
    """loss [nats/token] after TOKENS, dense_loss of the same model without experts; both None outside, with reasons."""

    loss: float | None
    dense_loss: float | None
    outside: tuple[str, ...]


def routed_loss(num_parameters: float, num_experts: float) -> float:
    """Validation loss [nats/token]: num_parameters of the model without routing, num_experts a layer (1: dense).

    log10 L = a log10 N + b log10 e + c log10 N log10 e + d, e the saturated number of experts. Source: SOURCE.

    >>> routed_loss(370e6, 128) < routed_loss(370e6, 8) < routed_loss(370e6, 1)
    True
    """
    grown = num_experts - 1 + 1 / (1 / EXPERTS_START - 1 / EXPERTS_MAX)
    log_experts = math.log10(1 / (1 / grown + 1 / EXPERTS_MAX))
    log_parameters = math.log10(num_parameters)
    return float(10 ** (A * log_parameters + B * log_experts + C * log_parameters * log_experts + D))


def quality_of(model: Model) -> QualityEstimate:
    """The law's estimate for a model, or why it has none.

    Of a model whose tokens use one expert, the active parameters are those of the model without routing (but for the
    routers). Raises nothing.
    """
    moe, parameters = model.layers[model.moe_layers[0]].ffn, active_parameters(model)
    assert isinstance(moe, MoeFfn)
    rules = (
        (moe.router.top_k == 1, f"a token uses {moe.router.top_k} experts, not 1"),
        (moe.shared is None, "it has shared experts"),
        (EXPERTS[0] <= moe.num_experts <= EXPERTS[1], f"{moe.num_experts:,} experts, not {EXPERTS[0]} to {EXPERTS[1]}"),
        (
            PARAMETERS[0] <= parameters <= PARAMETERS[1],
            f"{format_count(parameters)} active parameters, not {format_count(PARAMETERS[0])} to "
            f"{format_count(PARAMETERS[1])}",
        ),
        (
            abs(2 * len(model.moe_layers) - len(model.layers)) <= 1,
            f"{len(model.moe_layers)} of {len(model.layers)} layers have experts, not half of them",
        ),
    )
    outside = tuple(words for holds, words in rules if not holds)
    if outside:
        return QualityEstimate(loss=None, dense_loss=None, outside=outside)
    return QualityEstimate(
        loss=routed_loss(parameters, moe.num_experts), dense_loss=routed_loss(parameters, 1), outside=()
    )
