"""The training report in plain sentences: a first page, and a takeaway for each figure. All of it is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from moesim.report.sentences import Page, Sentence
from moesim.report.style import short_count
from moesim.report.training_words import (
    collapse_title,
    gain_title,
    row_words,
    signed,
    told_spread,
    words_of,
)
from moesim.study.training import MOE, Comparison, PrecisionRow, Spread, TrainingStudy

if TYPE_CHECKING:
    from moesim.study.training import TrainingRun


def verdict(study: TrainingStudy) -> Page:
    """The first page: quality, specialisation, balance, collapse, precision."""
    curve = next(curve for curve in study.curves if curve.variant == MOE)
    subject = (
        f"A MoE of {short_count(curve.total_parameters)} parameters, {short_count(curve.active_parameters)} active, "
        f"and its dense twin, trained {curve.steps_S[-1]:,.0f} steps, {curve.last.num_seeds} seeds each"
    )
    answers = (
        ("Is the MoE better for the same arithmetic?", about_quality(study)),
        ("Do experts specialise?", about_specialisation(study)),
        ("Is routing steady?", about_consistency(study)),
        ("What does balancing do?", about_balance(study)),
        ("Do experts collapse without it?", about_collapse(study)),
        ("What does half precision do to the router?", about_precision(study)),
    )
    return Page(
        subject=subject,
        sentences=tuple(Sentence(question=asked, text=told.text, tone=told.tone) for asked, told in answers),
    )


def about_quality(study: TrainingStudy) -> Sentence:
    """Dense against MoE: last loss, by domain, steps to reach the dense model's loss."""
    gain = study.gain
    d = gain.difference
    text = f"{gain_title(gain)} (mean {signed(d.mean)}, seeds {signed(d.low)} to {signed(d.high)}). "
    by_domain = ", ".join(f"{name} {signed(s.mean)}" for name, s in gain.difference_by_domain.items())
    others = ", ".join(
        f"{words_of(c.first)} {signed(c.difference.mean)} ({signed(c.difference.low)} to {signed(c.difference.high)})"
        for c in study.gains
        if c is not gain
    )
    text += f"By kind of text: {by_domain}. {_match(gain)} With other ways of balancing: {others}."
    tone = "good" if d.high < 0.0 else "bad" if d.low > 0.0 else "plain"
    return Sentence(text=text, tone=tone)


def _match(gain: Comparison) -> str:
    seeds = gain.difference.num_seeds
    if gain.match_fraction is None:
        return f"It reaches the dense model's last loss in none of {seeds} seeds."
    return (
        f"In {gain.num_matching} of {seeds} seeds it reaches the dense model's last loss, after "
        f"{gain.match_fraction.low:.0%} to {gain.match_fraction.high:.0%} of the steps."
    )


def about_specialisation(study: TrainingStudy) -> Sentence:
    """How much of a token's domain its expert tells, at the start and at the end."""
    routing = study.routing
    first_NL, last_NL = routing.explained_NSL[:, 0], routing.explained_NSL[:, -1]
    told = [
        f"layer {layer} {first_NL[:, i].mean():.0%} at step {routing.steps_S[0]:.0f} and {last_NL[:, i].mean():.0%} at "
        f"the end ({last_NL[:, i].min():.0%} to {last_NL[:, i].max():.0%})"
        for i, layer in enumerate(routing.layers)
    ]
    pure = int((routing.share_LED.max(axis=2) > 0.9).sum())
    text = (
        f"Knowing a held-out token's expert tells part of its domain ({', '.join(routing.domains)}): "
        f"{'; '.join(told)}. {pure} of {routing.share_LED.shape[0] * routing.share_LED.shape[1]} experts of seed "
        f"{routing.shown_seed} take over 90% of their tokens from one domain. "
    )
    text += (
        "Training made experts more telling of the domain than the untrained router was."
        if (last_NL.mean(axis=1) > first_NL.mean(axis=1)).all()
        else "Training did not make experts more telling of the domain than the untrained router was, in every seed."
    )
    return Sentence(text=text)


def about_consistency(study: TrainingStudy) -> Sentence:
    """How early routing settles, and how often neighbours share their expert."""
    routing = study.routing
    told = ", ".join(
        f"step {step:.0f} {told_percent(Spread.of(overlap_N))}"
        for step, overlap_N in zip(routing.steps_S[:-1], routing.overlap_NSL[:, :-1].mean(axis=2).T, strict=True)
    )
    chance = float(routing.chance_NSL[:, 0].mean())
    repeat, shuffled = float(routing.repeat_NL.mean()), float(routing.repeat_chance_NL.mean())
    text = (
        f"Of a held-out token's experts at the last step, it already had at {told}; chance at the first is "
        f"{chance:.0%}. At the end {repeat:.0%} of consecutive tokens have the same first expert, {shuffled:.0%} if "
        "the tokens were shuffled."
    )
    return Sentence(text=text)


def told_percent(value: Spread) -> str:
    """A share over seeds."""
    return f"{value.mean:.0%} ({value.low:.0%} to {value.high:.0%})"


def about_balance(study: TrainingStudy) -> Sentence:
    """MaxVio at the end under each policy, and what each did to the loss."""
    told = ", ".join(f"{words_of(load.variant)} {told_spread(load.last_max_vio, 2)}" for load in study.loads)
    costs = ", ".join(
        f"{words_of(c.first)} {signed(c.difference.mean)} ({signed(c.difference.low)} to {signed(c.difference.high)})"
        for c in study.balancing
    )
    dead = ", ".join(
        f"{words_of(load.variant)} {told_spread(Spread.of(load.num_dead_NS[:, -1]), 1)}" for load in study.loads
    )
    text = (
        f"MaxVio at the end, mean of the MoE layers: {told}. Experts under 1% of their layer's mean by then, of "
        f"{study.loads[0].num_experts}: {dead}. Held-out loss against the auxiliary loss, seed by seed: "
        f"{costs} nats per byte."
    )
    return Sentence(text=text)


def about_collapse(study: TrainingStudy) -> Sentence:
    """Whether the top-1 runs lost experts, in the setting named."""
    config = study.facts["config"]
    told = "; ".join(
        f"{words_of(load.variant)}: busiest expert {told_percent(Spread.of(load.busiest_share_NS[:, -1]))} of a "
        f"layer's tokens, {told_spread(Spread.of(load.num_dead_NS[:, -1]), 1)} of {load.num_experts} experts under 1% "
        "of the mean"
        for load in study.collapse
    )
    load = next((load for load in study.collapse if load.variant == "none"), study.collapse[0])
    fell = bool((load.num_collapsed_N > 0).any() or (load.num_dead_NS[:, -1] > 0).any())
    text = f"{collapse_title(study)}. Learning rate {config['learning_rate']:g}. At the end, {told}."
    return Sentence(text=text, tone="bad" if fell else "good")


def about_precision(study: TrainingStudy) -> Sentence:
    """What a half-precision router flips, whether the z-loss holds logits down, whether anything overflowed."""
    rows = study.precision
    half, full = _flips(rows, in_float32=False), _flips(rows, in_float32=True)
    text = f"Against float64, {half}; {full}. " if half and full else ""
    for row in rows:
        other = next((o for o in rows if o.z_loss and not row.z_loss and _is_same_but_for_z(o, row)), None)
        if other is not None:
            router = "float32" if row.router_in_float32 else row.precision
            text += (
                f"In {row.precision} with a {router} router the largest logit of a run is "
                f"{told_spread(other.largest_logit, 1)} with the z-loss, {told_spread(row.largest_logit, 1)} without. "
            )
    over = [(row, step) for row in rows for step in row.overflow_steps if step is not None]
    runs = sum(len(row.overflow_steps) for row in rows)
    if over:
        row, step = min(over, key=lambda pair: pair[1])
        text += (
            f"{len(over)} of {runs} runs met a number that is not finite, the first at step {step} ({row_words(row)})."
        )
    else:
        text += f"None of {runs} runs met a number that is not finite."
    return Sentence(text=text, tone="bad" if over else "plain")


def _is_same_but_for_z(one: PrecisionRow, other: PrecisionRow) -> bool:
    return (one.precision, one.router_in_float32) == (other.precision, other.router_in_float32)


def _flips(rows: tuple[PrecisionRow, ...], *, in_float32: bool) -> str:
    flips = {
        name: [row.flipped.mean for row in rows if row.precision == name and row.router_in_float32 == in_float32]
        for name in dict.fromkeys(row.precision for row in rows)
    }
    told = " and ".join(f"{np.mean(found):.2%} (in {name})" for name, found in flips.items() if found)
    router = "a float32 router" if in_float32 else "a router in half precision"
    return f"{router} sends {told} of the tokens to other experts" if told else ""


def about_live(runs: Mapping[str, TrainingRun], study: TrainingStudy) -> Sentence:
    """How far the runs made here and now are from the recorded ones of the same seed."""
    told, same_text = [], True
    for name, run in runs.items():
        loss = run.heldout["loss"]
        words = "the MoE" if name == MOE else f"the {words_of(name)} model"
        told.append(f"{words} went from {loss[0]:.2f} to {loss[-1]:.2f} nats per byte in {run.facts['wall_s']:.0f} s")
        same_text &= run.facts["text"] == study.facts["text"]
    step = next(iter(runs.values())).heldout["step"][-1]
    text = f"In {step:.0f} step{'' if step == 1 else 's'} {' and '.join(told)}. "
    recorded = _recorded_at(runs, study)
    if recorded is not None and same_text:
        text += f"Same seed, same text: the recorded runs were at most {recorded:.4f} nats away at that step."
    elif not same_text:
        text += "The text is that of this installation, not the recorded runs' (other versions or packages)."
    return Sentence(text=text)


def _recorded_at(runs: Mapping[str, TrainingRun], study: TrainingStudy) -> float | None:
    """The largest distance from the recorded runs where both were evaluated at the last live step."""
    away = []
    for curve in study.curves:
        run = runs.get(curve.variant)
        if run is None or run.seed not in curve.seeds or run.heldout["step"][-1] not in curve.steps_S:
            continue
        at = int(np.flatnonzero(curve.steps_S == run.heldout["step"][-1])[0])
        away.append(abs(float(curve.loss_NS[curve.seeds.index(run.seed), at] - run.heldout["loss"][-1])))
    return max(away) if away else None
