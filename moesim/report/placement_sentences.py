"""The placement notebook in plain sentences: what to do first, and a takeaway for each figure. All from results."""

from __future__ import annotations

from moesim.report.sentences import Page, Sentence
from moesim.report.style import signed_percent
from moesim.study.placement import GAIN, PlacementPoint, PlacementStudy
from moesim.units import format_bytes, format_seconds


def verdict(study: PlacementStudy) -> Page:
    """The first page: which policy, how many copies, what moving costs, when to do it again."""
    scenario = study.scenario
    ranks = study.base.placed.placements.ranks
    subject = (
        f"Experts of {scenario.model.name} on groups of {ranks.num_ranks} × {scenario.cluster.gpu.name} "
        f"in {_count(ranks.num_nodes, 'node')}"
    )
    questions = (
        ("Where should experts live?", _where(study)),
        ("How many copies?", about_slots(study)),
        ("What does moving cost?", about_moves(study)),
        ("How long does a placement last?", about_ageing(study)),
    )
    answers = [Sentence(question=question, text=said.text, tone=said.tone) for question, said in questions]
    return Page(subject=subject, sentences=tuple(answers))


def _where(study: PlacementStudy) -> Sentence:
    fastest, base = study.fastest, study.base
    if not study.rearranging_helps:
        text = (
            f"Where they are today ({base.policy}): the busiest GPU of a layer gets {base.max_mean:.3f} times the "
            f"mean, and no layout of {base.num_slots} slots gets below {base.lower_bound:.3f}."
        )
        return Sentence(text=text + (" Only copies of experts can help." if base.lower_bound > 1 + GAIN else ""))
    text = (
        f"By {fastest.policy}: the busiest GPU of a layer gets {fastest.max_mean:.3f} times the mean, against "
        f"{base.max_mean:.3f} today ({base.policy}); no layout of {fastest.num_slots} slots gets below "
        f"{fastest.lower_bound:.3f}."
    )
    gain = _gain(study, fastest)
    if gain is None or fastest.step is None or base.step is None:
        return Sentence(text=text)
    text += (
        f" A step takes {format_seconds(fastest.step.step_s)} instead of {format_seconds(base.step.step_s)} "
        f"({signed_percent(-gain)})."
    )
    return Sentence(text=text, tone="good" if gain > GAIN else "plain")


def about_before_after(study: PlacementStudy) -> Sentence:
    """How uneven GPUs were and are, and the layer that stays worst."""
    best, base = study.after, study.base
    worst = int(best.placed.max_mean_L.argmax())
    expert_share = best.placed.load_LE[worst].max() / best.placed.load_LE[worst].sum()
    text = (
        f"Today ({base.policy}) the busiest GPU gets {base.max_mean:.2f} times the mean in the mean layer and "
        f"{base.worst_max_mean:.2f} in the worst layer. {best.policy} with {best.num_slots} slots: "
        f"{best.max_mean:.2f} and {best.worst_max_mean:.2f}."
    )
    ranks = best.placed.placements.ranks.num_ranks
    bound = best.placed.lower_bound_L[worst]
    if best.worst_max_mean > 1.05 and best.worst_max_mean < bound * 1.005:
        text += (
            f" No layout of {best.num_slots} slots can mend layer {study.layers[worst]}: its heaviest expert alone "
            f"brings {expert_share * ranks:.2f} times a GPU's mean load. Copies of it can."
        )
    return Sentence(text=text)


def about_policies(study: PlacementStudy) -> Sentence:
    """The policies in order, and how far the best is from the bound."""
    order = sorted(study.by_policy, key=lambda point: point.max_mean)
    best = order[0]
    if len(order) > 1 and order[-1].max_mean < best.max_mean * (1 + GAIN):
        text = f"All policies come to {best.max_mean:.3f}: with {best.num_slots} slots there is nothing to gain."
        return Sentence(text=text)
    text = (
        f"{best.policy} is {best.max_mean / best.lower_bound - 1:.2%} above what any layout of {best.num_slots} slots "
        "can reach, mean over layers."
    )
    eplb = next((point for point in order if point.policy == "eplb"), None)
    if eplb is not None and eplb is not best:
        text += f" EPLB is {eplb.max_mean / eplb.lower_bound - 1:.1%} above it"
        gain = _gain(study, eplb)
        text += f" and saves {gain:.1%} of today's step." if gain is not None else "."
    return Sentence(text=text)


def about_slots(study: PlacementStudy) -> Sentence:
    """The number of slots with the shortest step that fits, or where balance stops improving."""
    points, chosen = study.by_slots, study.chosen_slots
    ranks, extra = study.base.placed.placements.ranks.num_ranks, chosen.num_slots - study.num_experts
    why = ""
    if chosen is not points[-1]:
        too_large = [p.num_slots for p in points if p.step is not None and not p.step.fits]
        why = " More copies make no step shorter" + (" that still fits." if too_large else ".")
        if chosen.step is None:
            why = " More copies balance no better."
    if extra <= 0:
        return Sentence(text=f"One of each expert ({chosen.num_slots} slots).{why}")
    text = (
        f"{chosen.num_slots} slots, {chosen.num_slots / ranks:g} on each GPU and layer ({extra} beyond one copy of "
        f"each expert): the busiest GPU gets {chosen.max_mean:.3f} times the mean for "
        f"{format_bytes(chosen.replica_bytes.total_bytes)} more per GPU.{why}"
    )
    alone = next((point for point in points if point.num_slots == study.num_experts), None)
    if alone is not None and alone.step is not None and chosen.step is not None:
        shorter = 1 - chosen.step.step_s / alone.step.step_s
        text += f" A step is {shorter:.0%} shorter than with {alone.policy} and one of each expert."
    return Sentence(text=text, tone="good")


def about_front(study: PlacementStudy) -> Sentence:
    """What balance costs in traffic between nodes, and whether the dispatcher profits from less of it."""
    if study.num_nodes == 1:
        return Sentence(text="All GPUs of a group share one node: no copy of a token crosses the network.")
    base, best = study.base, study.best
    text = (
        f"Today's layout ({base.policy}) sends {base.cross_node_per_token:.2f} copies of a token to other nodes, "
        f"{best.policy} {best.cross_node_per_token:.2f} "
        f"({signed_percent(best.cross_node_per_token / base.cross_node_per_token - 1)})."
    )
    within = [trade for trade in study.trades if trade.max_mean <= best.max_mean * 1.1]
    if within:
        least = min(within, key=lambda trade: trade.cross_node_per_token)
        text += (
            f" For at most a tenth less balance ({least.max_mean:.2f} ×), node_aware sends "
            f"{least.cross_node_per_token:.2f}."
        )
    if study.scenario.routing.dispatcher == "alltoall":
        text += (
            " The scenario's dispatcher (alltoall) sends one for each expert, not each node, so fewer nodes shorten "
            "its step little; deepep sends one to each node."
        )
    return Sentence(text=text)


def about_moves(study: PlacementStudy) -> Sentence:
    """What migrating from today's layout takes, and how soon it pays."""
    fastest, move = study.fastest, study.fastest.migration
    if move.num_moved_slots == 0:
        return Sentence(text=f"Nothing moves: {fastest.policy} leaves every expert where it is.")
    total = len(study.layers) * fastest.num_slots
    text = (
        f"Changing from today's layout to {fastest.policy} moves {move.num_moved_slots:,} of {total:,} slots of a "
        f"group, {format_bytes(move.nvlink_bytes + move.nic_bytes)} with optimizer states "
        f"({format_bytes(move.nic_bytes)} between nodes), and stalls training for at least "
        f"{format_seconds(move.stall_s)}."
    )
    if fastest.step is not None and study.base.step is not None:
        saved_s = study.base.step.step_s - fastest.step.step_s
        if saved_s > 0:
            steps = max(1, -(-move.stall_s // saved_s))
            text += f" It saves {format_seconds(saved_s)} a step: paid back after {_count(int(steps), 'step')}."
    return Sentence(text=text)


def about_ageing(study: PlacementStudy) -> Sentence:
    """How a layout ages, and what placing anew keeps."""
    found, best = study.ageing, study.ageing.best
    stale, fresh = found.max_mean[best], found.max_mean["fresh"]
    mild = next((i for i, c in enumerate(found.correlations) if c <= 0.9), len(stale) - 1)
    text = (
        f"When the load's correlation with the one placed for has fallen to {found.correlations[mild]:g}, {best} "
        f"({found.num_slots} slots) gives {stale[mild]:.2f} times the mean instead of {stale[0]:.2f}; "
        f"on another load altogether {stale[-1]:.2f}. "
        f"Placed anew each time it stays at {max(fresh):.2f} or below."
    )
    return Sentence(text=text)


def _gain(study: PlacementStudy, point: PlacementPoint) -> float | None:
    """Share of today's step that a policy saves."""
    if point.step is None or study.base.step is None:
        return None
    return 1 - point.step.step_s / study.base.step.step_s


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
