"""The routing report in plain sentences: a first page, and a takeaway for each figure. Numbers come from the study."""

from __future__ import annotations

from moesim.report.routing_figures import POLICY_WORDS, REDRAW_WORDS, percent
from moesim.report.sentences import Page, Sentence
from moesim.report.style import short_count
from moesim.study.routing import RoutingStudy
from moesim.study.skew import CostPoint
from moesim.units import format_bytes, format_seconds

_MANY_DROPS = 0.05  # a share of assignments lost that a reader should see in red


def verdict(study: RoutingStudy) -> Page:
    """The first page: how uneven, what is dropped, what it costs in time and in memory."""
    model, cluster = study.scenario.model, study.scenario.cluster
    subject = f"Routing {model.name} on {cluster.num_gpus:,} × {cluster.gpu.name}"
    if study.load.source != "popularity":
        subject += f", as recorded in {study.load.source}"
    answers = (
        ("How uneven is the load?", about_load(study)),
        ("What does it drop?", about_drops(study)),
        ("What does it cost in time?", about_skew(study)),
        ("What does it cost in memory?", about_memory(study)),
    )
    return Page(
        subject=subject,
        sentences=tuple(Sentence(question=asked, text=told.text, tone=told.tone) for asked, told in answers),
    )


def about_load(study: RoutingStudy) -> Sentence:
    """How even the realised load is over experts and over GPUs, and whether any expert is crowded or idle."""
    found, load = study.load.to_dict(), study.load
    text = (
        f"After routing, the load's Gini is {found['gini']:.2f} (0 is even), its entropy {found['entropy']:.1%} of the "
        f"largest possible; the busiest expert of a layer takes up to {found['max_mean']:.1f} times the mean "
        f"(MaxVio {found['max_vio']:.1f}). "
    )
    alerts = found["alerts"]
    if alerts:
        layers = len({alert["layer"] for alert in alerts})
        worst = alerts[0]
        which = "One expert is" if len(alerts) == 1 else f"{len(alerts)} experts in {layers} layers are"
        name = "it is" if len(alerts) == 1 else "the busiest is"
        text += f"{which} over 3 times the mean; {name} expert {worst['expert']} of layer {worst['layer']}. "
    else:
        text += "No expert is over 3 times the mean. "
    if found["dead_experts"]:
        text += f"{len(found['dead_experts'])} experts get under 1% of the mean and hardly learn. "
    if found["collapsed_experts"]:
        text += f"{collapse_in_words(len(found['collapsed_experts']))}. "
    text += (
        f"Over the GPUs that share the experts it is milder: in each micro-batch the busiest receives "
        f"{found['busiest_rank_ratio']:.2f} times the mean."
        if load.kept_LR.shape[1] > 1
        else "One GPU holds all the experts, so no GPU waits for another."
    )
    worrying = alerts or found["dead_experts"] or found["collapsed_experts"]
    return Sentence(text=text, tone="bad" if worrying else "good")


def collapse_in_words(num_collapsed: int) -> str:
    """That so many experts have taken over (``statistics.collapse_from``)."""
    who = "One expert is" if num_collapsed == 1 else f"{num_collapsed} experts are each"
    return f"{who} used by over half of all tokens, a sign of collapse"


def about_recording(study: RoutingStudy) -> Sentence:
    """What the recording says of itself, where there is one: steps, repetition, experts that go together."""
    facts = study.recording
    if facts is None:
        return Sentence(text="Nothing was recorded: the load is drawn from the popularity that was asked for.")
    steps = "One step was" if facts.num_steps == 1 else f"{facts.num_steps:,} steps were"
    tokens = "" if facts.num_tokens is None else f", {facts.num_tokens:,} tokens"
    crowded = "none" if not facts.alert_steps else f"{facts.alert_steps:,}"
    text = f"{steps} recorded{tokens}; in {crowded} of them an expert took over 3 times its layer's mean. "
    if facts.first_repeat is not None:
        text += (
            f"A token's first expert is the previous token's in {facts.first_repeat:.1%} of cases "
            f"({facts.first_repeat_chance:.1%} if tokens were shuffled). "
        )
    if facts.active_experts:
        size, active = facts.active_experts[0]
        text += f"{size} tokens in a row use {active:.1f} of {len(facts.counts_LE[0])} experts. "
    if facts.pairs:
        pair = facts.pairs[0]
        text += (
            f"Experts {pair.experts[0]} and {pair.experts[1]} of layer {pair.layer} are taken together "
            f"{pair.lift:.1f} times as often as chance would have it."
        )
    return Sentence(text=text.strip(), tone="bad" if facts.collapse_steps else "plain")


def about_drops(study: RoutingStudy) -> Sentence:
    """What the asked capacity drops, and the capacity that a wanted share takes."""
    load, needed, train = study.load, study.needed, study.scenario.train
    factor = study.scenario.routing.capacity_factor
    tokens = train.global_batch * train.seq_len
    if factor is None:
        text = "Nothing: without a capacity factor every expert takes all that it is sent. "
    else:
        text = (
            f"A capacity factor of {factor:g} drops {load.drop_fraction:.1%} of all assignments; in the mean layer "
            f"that is the expert work of {short_count(float(load.tokens_lost_L.mean()))} of the step's "
            f"{short_count(tokens)} tokens. {load.padding_fraction:.0%} of buffers padded to it would stay empty. "
        )
    text += (
        f"To drop at most {percent(needed.wanted_drop_fraction)} takes a factor of {needed.capacity_factor:.2f} "
        f"({needed.worst_layer_capacity_factor:.2f} for the worst layer to manage as well), with "
        f"{needed.padding_fraction:.0%} of padded buffers empty."
    )
    return Sentence(text=text, tone="bad" if load.drop_fraction > _MANY_DROPS else "plain")


def about_where(study: RoutingStudy) -> Sentence:
    """Which layers, experts and GPUs lose the most."""
    load = study.load
    if load.drop_fraction <= 0:
        return Sentence(text="Nothing is dropped, so nothing is lost anywhere.")
    by_layer, by_expert, by_rank = load.drop_fraction_L, load.drop_fraction_LE, load.drop_fraction_LR
    layer, expert = divmod(int(by_expert.argmax()), load.num_experts)
    dropping = int((by_expert > 0.001).sum())
    text = (
        f"Layers lose between {by_layer.min():.1%} and {by_layer.max():.1%} of their assignments. "
        f"{dropping:,} of {by_expert.size:,} experts drop anything to speak of; expert {expert} of layer "
        f"{load.layers[layer]} turns away {by_expert.max():.0%} of its tokens, and the worst GPU of a layer "
        f"{by_rank.max():.0%}."
    )
    if study.tokens is not None:
        tokens = study.tokens
        text += (
            f" Token by token ({tokens.num_tokens:,} drawn in {tokens.num_layers} of {len(load.layers)} layers), "
            f"{tokens.hurt_fraction:.0%} lose at least one of their {load.top_k} experts in a layer, and "
            f"{_small(tokens.lost_fraction)} all of them."
        )
    if load.domain_names:
        shares = ", ".join(
            f"{name} {share:.1%}" for name, share in zip(load.domain_names, load.drop_fraction_D, strict=True)
        )
        text += f" By kind of text: {shares}."
    return Sentence(text=text)


def _small(share: float) -> str:
    return "none" if share == 0 else "under 0.1%" if share < 1e-3 else f"{share:.1%}"


def about_needed(study: RoutingStudy) -> Sentence:
    """What the last bit of drops costs in room."""
    first, last = study.needed_for[0], study.needed_for[-1]
    text = (
        f"Going from {percent(first.wanted_drop_fraction)} to {percent(last.wanted_drop_fraction)} dropped takes "
        f"{last.capacity_factor / first.capacity_factor:.1f} times the room ({first.capacity_factor:.2f} to "
        f"{last.capacity_factor:.2f}), most of it for a few crowded experts: {last.padding_fraction:.0%} of the places "
        "would stay empty."
    )
    return Sentence(text=text)


def about_skew(study: RoutingStudy) -> Sentence:
    """What the asked skew costs in step time against even routing, with and without drops."""
    even = _point(study, "balanced", limited=False)
    asked = _point(study, "asked", limited=False)
    if even is None or asked is None or even is asked:
        return Sentence(text="Routing is asked to be even, so skew costs nothing here.", tone="good")
    longer = asked.step_s / even.step_s - 1
    word = "longer" if longer >= 0 else "shorter"
    wait = asked.wait_s / asked.step_s
    text = (
        f"Without drops the asked skew makes the step {abs(longer):.1%} {word} than even routing "
        f"({format_seconds(asked.step_s)} against {format_seconds(even.step_s)}); GPUs then wait for the busiest one "
        f"for {wait:.1%} of it. "
    )
    limited = _point(study, "asked", limited=True)
    if limited is not None:
        text += (
            f"With a capacity factor of {limited.capacity_factor:g} it takes {format_seconds(limited.step_s)}: the "
            f"time saved is work not done, {limited.drop_fraction:.1%} of it."
        )
    return Sentence(text=text.strip(), tone="bad" if longer > 0.1 else "plain")


def _point(study: RoutingStudy, popularity: str, *, limited: bool) -> CostPoint | None:
    return next(
        (p for p in study.over_skew if p.popularity == popularity and (p.capacity_factor is not None) == limited), None
    )


def about_capacity(study: RoutingStudy) -> Sentence:
    """What each capacity factor buys in time and memory for what it drops."""
    first, free = study.over_capacity[0], study.over_capacity[-1]
    text = (
        f"A capacity factor of {first.capacity_factor:g} takes {format_seconds(free.step_s - first.step_s)} "
        f"({1 - first.step_s / free.step_s:.1%}) and {format_bytes(free.peak_bytes - first.peak_bytes)} less than no "
        f"limit, and drops {first.drop_fraction:.1%} of the assignments. Per assignment kept it "
        f"{_per_kept(first, free)}."
    )
    return Sentence(text=text)


def _per_kept(limited: CostPoint, free: CostPoint) -> str:
    change = limited.step_s / (1 - limited.drop_fraction) / free.step_s - 1
    return (
        f"costs {abs(change):.1%} {'more' if change > 0 else 'less'} time" if abs(change) >= 5e-4 else "costs as much"
    )


def about_memory(study: RoutingStudy) -> Sentence:
    """Whether memory suffices at P99, and what moves it."""
    worst = max(study.memory, key=lambda memory: memory.p99_bytes)
    lead = (
        f"99 of 100 steps stay under {format_bytes(worst.p99_bytes)} on the fullest GPU, which holds "
        f"{format_bytes(worst.capacity_bytes)}"
    )
    chance = worst.out_of_memory_fraction
    text = f"{lead}; the chance that a step does not fit is {_small(max(chance, 1e-12))}. "
    moves = {m.redraw: max(m.peak_bytes_S) - min(m.peak_bytes_S) for m in study.memory}
    over = f"Over {len(worst.peak_bytes_S)} sampled steps"
    if max(moves.values()) < 1:
        text += f"{over} the peak does not move: it lies where routing has no part in it."
    else:
        told = [f"{REDRAW_WORDS[redraw]} the peak moves by {format_bytes(size)}" for redraw, size in moves.items()]
        text += f"{over}, {', '.join(told)}."
    return Sentence(text=text, tone="good" if worst.fits_at_p99 else "bad")


def about_balancing(study: RoutingStudy) -> Sentence:
    """How soon each policy evens the load out, and what the wait costs."""
    if not study.balancing:
        return Sentence(text="Balancing over training was not asked for.")
    told = []
    for curve in study.balancing:
        until = (
            f"stays under a MaxVio of 0.1 from step {curve.steps_until_balanced:,} on"
            if curve.steps_until_balanced is not None
            else f"ends at {curve.final_max_vio:.2f}"
        )
        lost = format_seconds(curve.lost_s)
        fallen = ""
        if curve.first_collapse_step is not None:
            one = curve.num_collapsed == 1
            many = f"{curve.num_collapsed} experts die or take over, the first"
            fallen = f", and {'one expert dies or takes over' if one else many} at step {curve.first_collapse_step:,}"
        told.append(f"{POLICY_WORDS[curve.policy]} {until} and loses {lost} of training to waiting{fallen}")
    steps = study.balancing[0].first_hours_steps
    whole = steps == study.balancing[0].steps[-1] + 1
    over = f"Over these {steps:,} steps" if whole else f"Over the first {study.balancing[0].first_hours:.0f} hours"
    worst = max(study.balancing, key=lambda curve: curve.lost_s)
    tone = "bad" if worst.num_collapsed else "plain"
    return Sentence(text=f"{over}: {'; '.join(told)}.", tone=tone)
