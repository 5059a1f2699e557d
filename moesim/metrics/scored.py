"""What measured steps like a scenario's say about its step time, from the table of scores that moesim carries."""

from __future__ import annotations

from moesim.catalog.scores import CasesLike, Likeness, cases_like
from moesim.scenario import Scenario

FAR_OFF = 1.25  # a median factor from predicted to measured, or its inverse, that a reader must be told of


def step_likeness(scenario: Scenario) -> Likeness:
    """What a step is compared by. Nodes count as crossed where the run does not fit into one NVLink domain."""
    return Likeness(
        gpu=scenario.cluster.gpu.name,
        is_moe=scenario.model.is_moe,
        crosses_nodes=scenario.cluster.num_gpus > scenario.cluster.ranks_per_node,
        precision=scenario.train.precision,
    )


def accuracy_statement(scenario: Scenario) -> str:
    """How far off moesim was on measured steps like this scenario's, in one sentence for its report.

    >>> accuracy_statement(Scenario.make(model="llama-3-70b", cluster="b200-8x-ib400", num_gpus=8, tp=8))[:50]
    'Cases like this (dense, b200, within a node, bf16)'
    """
    found = cases_like(step_likeness(scenario))
    if found is None:
        return "No measured step is like this one."
    low, _, high = found.measured_over_predicted
    others = "" if scenario.train.software == "megatron" else " They ran Megatron-LM and its kin; this one does not."
    return (
        f"Cases like this ({found.shared}): {found.num_rows} rows, median error {found.median_error:.0%}; they took "
        f"{low:.2f} to {high:.2f} times the predicted step.{others}"
    )


def accuracy_warning(scenario: Scenario) -> str:
    """The statement where measured steps on this very GPU were far from the predicted ones; empty elsewhere."""
    found = cases_like(step_likeness(scenario))
    return accuracy_statement(scenario) if found is not None and is_far_off(found) else ""


def is_far_off(found: CasesLike) -> bool:
    """Whether rows of the same GPU lie a factor FAR_OFF or more beside the prediction in the median."""
    factor = found.measured_over_predicted[1]
    return found.same_gpu and max(factor, 1 / factor) >= FAR_OFF
