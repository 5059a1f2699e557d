"""The all-to-all notebook in plain sentences: what an exchange costs and why, a takeaway for each figure."""

from __future__ import annotations

import numpy as np

from moesim.report.alltoall_figures import link_words
from moesim.report.sentences import Page, Sentence
from moesim.study.exchange import ALGORITHMS, ExchangeStudy
from moesim.units import format_bytes, format_seconds


def verdict(study: ExchangeStudy) -> Page:
    """The first page: how long, what bounds it, which algorithm, how good the fast estimate is."""
    scenario, traffic = study.scenario, study.traffic
    subject = (
        f"One dispatch of {scenario.model.name}: {study.topology.num_ranks} × {scenario.cluster.gpu.name}, "
        f"{traffic.tokens_per_rank:,} tokens each, layer {traffic.layer}"
    )
    questions = (
        ("How long does it take, and what bounds it?", about_ports(study)),
        ("Which algorithm?", about_size(study)),
        ("What does skew cost?", about_skew(study)),
        ("How good is the fast estimate?", about_finishes(study)),
    )
    answers = [Sentence(question=question, text=said.text, tone=said.tone) for question, said in questions]
    return Page(subject=subject, sentences=tuple(answers))


def about_ports(study: ExchangeStudy) -> Sentence:
    """What the dispatch asked for takes, its busiest port, and what the other ports do meanwhile."""
    timed = study.exact[study.own]
    link, busy = link_words(timed.bottleneck), study.port_busy_s(study.own)
    used = [seconds_R.mean() for seconds_R in busy.values() if seconds_R.any()]
    idle = 1 - float(np.mean(used)) / timed.completed.completion_s
    return Sentence(
        text=f"The {study.own} dispatch takes {format_seconds(timed.completed.completion_s)} for "
        f"{format_bytes(timed.total_bytes)} between {study.topology.num_ranks} GPUs. {link} alone needs "
        f"{format_seconds(timed.lower_bound_s)}; the busiest GPU receives {study.traffic.max_mean:.2f} times the mean. "
        f"The mean port is idle {idle:.0%} of that time."
    )


def about_finishes(study: ExchangeStudy) -> Sentence:
    """How far port is from exact here, for the last GPU and for each."""
    exact, port = study.exact[study.own].completed, study.port[study.own].completed
    last = port.completion_s / exact.completion_s - 1
    each = float(np.quantile(np.abs(port.finish_R / exact.finish_R - 1), 0.95))
    told = f"is {abs(last):.1%} {'late' if last > 0 else 'early'}" if abs(last) >= 0.0005 else "equals exact"
    return Sentence(
        text=f"The port estimate {told} for the last GPU and is within {max(each, 0.001):.1%} for 95 of 100 GPUs. Half "
        f"of the GPUs are done after {format_seconds(float(np.median(exact.finish_R)))}; all wait for the last.",
        tone="good" if abs(last) < 0.02 else "plain",
    )


def about_size(study: ExchangeStudy) -> Sentence:
    """The fastest algorithm here, and over sizes."""
    seconds = {name: study.done_s(name) for name in ALGORITHMS}
    fastest, others = study.fastest, [name for name in ALGORITHMS if name != study.fastest]
    told = ", ".join(f"{name.replace('_', ' ')} {format_seconds(seconds[name])}" for name in others)
    gain = 1 - seconds[fastest] / seconds[study.own]
    text = f"With the kernel's start, {fastest.replace('_', ' ')}: {format_seconds(seconds[fastest])}, against {told}."
    if gain >= 0.005:
        text += f" That is {gain:.0%} less than today's {study.own} dispatch."
    elif fastest != study.own:
        text += f" Today's {study.own} dispatch takes as long to within half a per cent."
    if study.topology.num_nodes == 1:
        text += (
            " Inside one node all three use the same NVLink ports: little but their kernels' starts tells them apart."
        )
    runs: list[tuple[int, str]] = []  # where another one becomes the fastest
    for size, name in study.algorithm_of_size():
        if not runs or runs[-1][1] != name:
            runs.append((size, name))
    if len(runs) == 1 and runs[0][1] == fastest:
        text += " So at every size tried."
    else:
        told = ", ".join(f"{name.replace('_', ' ')} from {size:,}" for size, name in runs)
        text += f" The fastest over tokens per GPU: {told}."
    return Sentence(text=text, tone="good" if fastest == study.own else "plain")


def about_skew(study: ExchangeStudy) -> Sentence:
    """How the dispatch asked for grows with skew, and the one that grows least."""
    growth = {}
    for name in ALGORITHMS:
        mine = [point for point in study.over_skew if point.algorithm == name]
        growth[name] = mine[-1].done_s / mine[0].done_s
    first, last = study.over_skew[0], study.over_skew[-1]
    least = min(growth, key=lambda name: growth[name])
    return Sentence(
        text=f"From {first.x:g} to {last.x:g} Gini (busiest GPU {first.max_mean:.1f} to {last.max_mean:.1f} times the "
        f"mean) the {study.own} dispatch takes {growth[study.own]:.1f} times as long; {least.replace('_', ' ')} grows "
        f"least, {growth[least]:.1f} times."
    )
