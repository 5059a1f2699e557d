"""Why the others lost: two steps side by side, in a sentence; and what would make the nearest miss a plan."""

from __future__ import annotations

import json
from typing import Any

from moesim.study.plan import Plan, Rival
from moesim.study.plan_points import Miss, PlanPoint
from moesim.units import format_bytes

TOLD_APART = 0.01  # what the fast path is off by at most with balanced experts
LEAST_TOLD = 0.0005  # of a step
LIMIT_WORDS = {
    "memory": "free memory",
    "deadline": "days",
    "budget": "cost",
    "drops": "dropped assignments",
    "mfu": "MFU",
}
RULE_WORDS = {
    "memory": "Of these, too little memory",
    "deadline": "Of these, past the deadline",
    "budget": "Of these, over the budget",
    "drops": "Of these, too many drops",
    "mfu": "Of these, below the MFU floor",
    "refused": "Of these, refused",
    "memory (bound)": "Left out: weights too large",
    "deadline (bound)": "Left out: too slow at peak",
    "budget (bound)": "Left out: too dear at peak",
    "slower (bound)": "Left out: beaten already",
}
PART_WORDS = {
    "attention": "attention",
    "dense_ffn": "dense feed-forward",
    "router": "the router",
    "permute": "permuting tokens",
    "experts": "expert products",
    "embedding_head": "embedding and head",
    "recompute": "recomputing",
    "tensor_parallel_comm": "tensor- and context-parallel communication",
    "pipeline_send": "sending between stages",
    "gradient_reduction": "gradient reduction",
    "optimizer": "the optimizer",
    "host_transfer": "the link to the host",
    "host": "the host",
    "wait_for_slowest": "waiting for the most loaded GPU",
    "pipeline_bubble": "the pipeline bubble",
}


def rejections(plan: Plan) -> list[dict[str, Any]]:
    """Every other value of every axis, and every other cluster, at its best: which rule it lost by, and why.

    rule is ``dearer``, where value and limit are its price and the cheapest's, or the limit that its best breaks, or
    ``divides`` of a cluster where no layout does.
    """
    ranked = sorted(plan.rivals, key=lambda rival: (rival.axis, _order(rival.value)))
    return [_rejection(rival) for rival in ranked] + [_untried(name) for name in plan.untried]


def _untried(name: str) -> dict[str, Any]:
    return {
        "axis": "cluster",
        "value_tried": name,
        "config": {"cluster": name},
        "rule": "divides",
        "value": None,
        "limit": None,
        "why": f"nothing was tried on {name}: no layout divides its GPUs and the batch (see global_batch and the axes)",
    }


def _rejection(rival: Rival) -> dict[str, Any]:
    point = rival.best
    miss = worst_miss(point)
    return {
        "axis": rival.axis,
        "value_tried": rival.value,
        "config": {"cluster": point.cluster, **point.settings},
        "rule": "dearer" if miss is None else miss.rule,
        "value": point.price if miss is None else miss.value,
        "limit": rival.winner.price if miss is None else miss.limit,
        "why": why(rival),
    }


def worst_miss(point: PlanPoint) -> Miss | None:
    """The limit that a point breaks by most."""
    return max(point.misses, key=lambda miss: miss.shortfall, default=None)


def why(rival: Rival) -> str:
    """Why a value of an axis lost, from the parts of two steps: of the cheapest, and of the cheapest with this value
    alone changed, or where that keeps no limit, of the best with it.

    >>> why(rival)  # doctest: +SKIP
    'ep=32 beats ep=64: +12.0% cost; cross-node dispatch and combine 41% of the step instead of 30%'
    """
    name, point, winner, alone = rival.axis, rival.best, rival.winner, rival.alone
    said = _said(name, rival.value)
    miss = worst_miss(point)
    if miss is not None:
        return f"even the nearest with {said} breaks a limit: {miss_words(miss)}"
    held = _said(name, {"cluster": winner.cluster, **winner.settings}[name])
    more = point.price / winner.price - 1.0
    beats = f"{held} beats {said}" if more >= TOLD_APART else f"{said} is as good as {held}, as far as can be told"
    beats += f": {more:+.1%} {'GPU-hours' if point.cost is None else 'cost'}"
    if alone is None or point.cluster != winner.cluster:
        speed = point.tokens_per_s_per_gpu / winner.tokens_per_s_per_gpu
        hourly = [one.price / one.gpu_hours for one in (point, winner)]
        priced = f", at {hourly[0] / hourly[1]:.2f} times the price of an hour" if point.cost is not None else ""
        return f"{beats}; {point.cluster} trains {speed:.2f} times the tokens a second and GPU{priced}"
    rest = changed_words(name, point, winner)
    if isinstance(alone, PlanPoint) and not alone.misses:
        only = f" with nothing else changed {alone.price / winner.price - 1.0:+.1%}:" if rest else ""
        return f"{beats};{only} {_most_longer(alone, winner)}"
    assert rest, "what keeps all limits differs from what does not"
    alone_misses = None if isinstance(alone, str) else worst_miss(alone)
    alone_lacks = _rule(str(alone)) if alone_misses is None else miss_words(alone_misses)
    return f"{beats}; with nothing else changed: {alone_lacks}; its best has {rest}: {_most_longer(point, winner)}"


def _rule(reason: str) -> str:
    """What a refusal says beside its owner, field, value and hint: those of `moesim.errors.InputError`."""
    return reason.partition("; got")[0].split(": ", 2)[-1]


def _most_longer(point: PlanPoint, winner: PlanPoint) -> str:
    """The part of a step that takes most longer for a token than the winner's, in words."""
    own, other = seconds_per_token(point), seconds_per_token(winner)
    excess = {part: own[part] - other[part] for part in own}
    part = max(excess, key=lambda part: excess[part])
    if excess[part] <= LEAST_TOLD * sum(other.values()):
        return "no part of the step is longer"
    shares = [f"{seconds[part] / sum(seconds.values()):.0%}" for seconds in (own, other)]
    if own[part] / sum(own.values()) <= other[part] / sum(other.values()) or shares[0] == shares[1]:
        return f"{_part_words(part, point)} {excess[part] / sum(other.values()):+.1%} of a step"
    return f"{_part_words(part, point)} {shares[0]} of the step instead of {shares[1]}"


def seconds_per_token(point: PlanPoint) -> dict[str, float]:
    """GPU seconds of a token by part; dispatch and combine are one."""
    total = 1.0 / point.tokens_per_s_per_gpu
    parts = {part: share * total for part, share in point.parts.items() if part not in ("dispatch", "combine")}
    return parts | {"all_to_all": total * (point.parts["dispatch"] + point.parts["combine"])}


def changed_words(name: str, point: PlanPoint, winner: PlanPoint) -> str:
    """The settings beside the axis in which a point differs from the winner."""
    changed = [f"{key}={value}" for key, value in point.settings.items() if value != winner.settings[key]]
    others = [text for text in changed if not text.startswith(f"{name}=")]
    return ", ".join(others)


def _part_words(part: str, point: PlanPoint) -> str:
    if part != "all_to_all":
        return PART_WORDS[part]
    crosses = point.settings["ep"] * point.settings["etp"] > point.ranks_per_node
    return f"{'cross-node' if crosses else 'in-node'} dispatch and combine"


def _said(name: str, value: Any) -> str:
    return str(value) if name == "cluster" else f"{name}={'null' if value is None else value}"


def _order(value: Any) -> tuple[bool, float, str]:
    """Numbers by size, before texts."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return not is_number, float(value) if is_number else 0.0, json.dumps(value)


def miss_words(miss: Miss) -> str:
    """A broken limit in words."""
    if miss.rule == "memory" and miss.value < 0:
        return f"{-miss.value:.1%} of a GPU's memory too much, where {miss.limit:.0%} must stay free"
    form = ",.1f" if miss.rule == "deadline" else ",.0f" if miss.rule == "budget" else ".1%"
    side = "at least" if miss.rule in ("memory", "mfu") else "at most"
    return f"{miss.value:{form}} {LIMIT_WORDS[miss.rule]}, where {side} {miss.limit:{form}} is asked"


def remedies(plan: Plan) -> list[str]:
    """What would make the nearest miss a plan: each limit that it breaks, moved far enough."""
    point = plan.nearest
    if point is None:
        return []
    return [_remedy(miss, point, plan) for miss in point.misses]


def _remedy(miss: Miss, point: PlanPoint, plan: Plan) -> str:
    num_gpus = point.settings["num_gpus"]
    match miss.rule:
        case "memory" if point.headroom_fraction >= 0:
            return f"memory_headroom_fraction of {point.headroom_fraction:.3f}: it fits with less to spare"
        case "memory":
            capacity_bytes = point.peak_bytes / (1.0 - point.headroom_fraction)
            needed_bytes = point.peak_bytes / (1.0 - plan.question.limits.memory_headroom_fraction)
            return (
                f"GPUs with {format_bytes(needed_bytes)} of memory instead of {format_bytes(capacity_bytes)}, more of "
                "them, or settings that the search leaves as they are: zero, offload, moments, fused_loss"
            )
        case "deadline":
            gpus = num_gpus * miss.value / miss.limit
            return f"a deadline of {miss.value:,.1f} days; or about {gpus:,.0f} GPUs as fast as these {num_gpus:,}"
        case "budget":
            hour = miss.limit / point.gpu_hours
            return f"a budget of {miss.value:,.0f} {plan.question.currency}; or {hour:.3g} for an hour of a GPU"
        case "drops":
            return f"a drop_fraction of {miss.value:.4f}, or a larger capacity_factor"
    return f"an MFU floor of {miss.value:.4f}"
