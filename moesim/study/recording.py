"""What a recording says of itself, counted token by token: load, alerts, repetition, who goes together, agreement.

Legend: S steps, L MoE layers, K experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.door.rows import TABLE_SUFFIXES
from moesim.errors import check
from moesim.routing.consistency import active_experts_L, agreement_of, coactivation_LEE, lift_EE
from moesim.routing.histogram import histogram_steps
from moesim.routing.recorded import RecordedRouting, read_recorded, step_of_tokens
from moesim.routing.statistics import collapse_alerts, load_alerts
from moesim.units import GIB

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
DECODE_BATCHES = (16, 64, 256)  # tokens that a decode step handles together
MOST_PAIRS = 10
_LEAST_EXPECTED = 25.0  # meetings by chance below which a pair's lift is mostly noise
_MOST_PAIR_BYTES = 1 * GIB


@dataclass(frozen=True, kw_only=True)
class ExpertPair:
    """Two experts that tokens take together lift times as often as independence says."""

    layer: int
    experts: tuple[int, int]
    num_tokens: int
    lift: float


@dataclass(frozen=True, kw_only=True)
class Consistency:
    """How far another recording of the same tokens routes them alike; shares, mean over layers.

    overlap: shared experts over k; exact: tokens with the same set; first: with the same first expert; chance: the
    overlap of two routings with these loads that know nothing of each other.
    """

    against: str
    overlap: float
    exact: float
    first: float
    chance: float


@dataclass(frozen=True, kw_only=True)
class RecordingFacts:
    """Counted, not sampled. From num_tokens on: None or empty where only a histogram was recorded.

    counts_LE: assignments of each expert; alert_steps, collapse_steps: steps in which an expert takes over 3 times its
    layer's mean, or has taken over (``collapse_from``). first_repeat: pairs of consecutive tokens of a step with the
    same first expert, mean over layers, beside what shuffled tokens would show. active_experts: distinct experts that
    so many consecutive tokens touch. pairs: the strongest, where chance alone would have made them meet 25 times.
    """

    file: str
    layers: tuple[int, ...]
    num_steps: int
    counts_LE: tuple[tuple[int, ...], ...]
    alert_steps: int
    collapse_steps: int
    num_tokens: int | None = None
    first_repeat: float | None = None
    first_repeat_chance: float | None = None
    active_experts: tuple[tuple[int, float], ...] = ()
    pairs: tuple[ExpertPair, ...] = ()
    consistency: Consistency | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def recording_facts(
    path: str | Path, *, num_experts: int, top_k: int, against: str | Path | None = None
) -> RecordingFacts:
    """Count a recording (a replay, or a histogram) as it streams by, four times over for a replay.

    against: another recording of the same tokens, as of a later checkpoint: do the same tokens take the same experts?
    Raises InputError for a malformed file, another model's, and for a histogram where tokens are needed.

    >>> recording_facts("trace.npz", num_experts=64, top_k=8).first_repeat  # doctest: +SKIP
    0.27
    """
    if Path(path).suffix.lower() in TABLE_SUFFIXES:
        check(against is None, str(path), "against", "needs recordings of tokens, not histograms", str(against))
        layers, counts_LE, num_steps, alerts, collapses = _count_steps(_steps_of_table(path, num_experts), top_k)
        return _facts(str(path), layers, counts_LE, num_steps, alerts, collapses)
    recorded = read_recorded(path, num_experts=num_experts)
    _, counts_LE, _, alerts, collapses = _count_steps(_steps_of_replay(recorded), top_k)
    repeats, chance = _first_repeat(recorded)
    consistency = None
    if against is not None:
        found = agreement_of(recorded, read_recorded(against, num_experts=num_experts))
        shares = {"overlap": found.overlap_L, "exact": found.exact_L, "first": found.top1_L, "chance": found.chance_L}
        means = {name: float(share_L.mean()) for name, share_L in shares.items()}
        consistency = Consistency(against=str(against), **means)
    return _facts(
        recorded.owner,
        recorded.layers,
        counts_LE,
        recorded.steps_S.size,
        alerts,
        collapses,
        num_tokens=recorded.num_tokens,
        first_repeat=repeats,
        first_repeat_chance=chance,
        active_experts=_active_experts(recorded),
        pairs=_strongest_pairs(recorded),
        consistency=consistency,
    )


def _facts(
    file: str, layers: tuple[int, ...], counts_LE: Ints, num_steps: int, alerts: int, collapses: int, **more: Any
) -> RecordingFacts:
    return RecordingFacts(
        file=file,
        layers=layers,
        num_steps=num_steps,
        counts_LE=tuple(tuple(row) for row in counts_LE.tolist()),
        alert_steps=alerts,
        collapse_steps=collapses,
        **more,
    )


def _count_steps(
    steps: Iterator[tuple[tuple[int, ...], Ints]], top_k: int
) -> tuple[tuple[int, ...], Ints, int, int, int]:
    """(layers, counts_LE, steps, steps with an alert, steps with a collapse), a step at a time."""
    total: dict[int, Ints] = {}
    num_steps = alerts = collapses = 0
    for layers, load_LE in steps:
        for layer, load_E in zip(layers, load_LE, strict=True):
            total[layer] = total[layer] + load_E if layer in total else load_E.copy()
        busy_LE = load_LE[load_LE.sum(axis=1) > 0]
        num_steps += 1
        if len(busy_LE):
            alerts += bool(load_alerts(busy_LE))
            collapses += bool(collapse_alerts(busy_LE, top_k=top_k))
    numbers = tuple(sorted(total))
    return numbers, np.stack([total[layer] for layer in numbers]), num_steps, alerts, collapses


def _steps_of_table(path: str | Path, num_experts: int) -> Iterator[tuple[tuple[int, ...], Ints]]:
    for _, by_layer in histogram_steps(path, num_experts=num_experts):
        yield tuple(by_layer), np.stack(list(by_layer.values()))


def _steps_of_replay(recorded: RecordedRouting) -> Iterator[tuple[tuple[int, ...], Ints]]:
    """Load of one step after the other, whatever the chunks; steps without tokens too."""
    load_LE = np.zeros((recorded.num_layers, recorded.num_experts), dtype=np.int64)
    current = 0
    for first, experts_TLK in recorded.chunks():
        step_T = step_of_tokens(recorded, first, len(experts_TLK))
        cuts = np.flatnonzero(np.diff(step_T)) + 1
        for start, part_TLK in zip([0, *cuts], np.split(experts_TLK, cuts), strict=True):
            while current < step_T[start]:
                yield recorded.layers, load_LE
                load_LE = np.zeros_like(load_LE)
                current += 1
            for layer, load_E in enumerate(load_LE):
                load_E += np.bincount(part_TLK[:, layer].ravel(), minlength=recorded.num_experts)
    while current < recorded.steps_S.size:
        yield recorded.layers, load_LE
        load_LE = np.zeros_like(load_LE)
        current += 1


def _first_repeat(recorded: RecordedRouting) -> tuple[float | None, float]:
    """(share of consecutive tokens of a step with the same first expert, that of shuffled tokens), mean over layers."""
    first_LE = np.zeros((recorded.num_layers, recorded.num_experts), dtype=np.int64)
    same_L, num_pairs = np.zeros(recorded.num_layers, dtype=np.int64), 0
    last_L, last_step = np.full(recorded.num_layers, -1), -1
    for at, experts_TLK in recorded.chunks():
        first_TL = experts_TLK[:, :, 0]
        for layer, count_E in enumerate(first_LE):
            count_E += np.bincount(first_TL[:, layer], minlength=recorded.num_experts)
        step_T = step_of_tokens(recorded, at, len(experts_TLK))
        before_TL = np.concatenate([last_L[None], first_TL[:-1]])
        follows_T = step_T == np.concatenate([[last_step], step_T[:-1]])
        same_L += ((first_TL == before_TL) & follows_T[:, None]).sum(axis=0)
        num_pairs += int(follows_T.sum())
        last_L, last_step = first_TL[-1].astype(np.int64), int(step_T[-1])
    share_LE = first_LE / recorded.num_tokens
    repeats = float(same_L.mean() / num_pairs) if num_pairs else None
    return repeats, float((share_LE**2).sum(axis=1).mean())


def _active_experts(recorded: RecordedRouting) -> tuple[tuple[int, float], ...]:
    """(batch, distinct experts), mean over layers and whole batches inside the chunks that are read."""
    sums, batches = dict.fromkeys(DECODE_BATCHES, 0.0), dict.fromkeys(DECODE_BATCHES, 0)
    for _, experts_TLK in recorded.chunks():
        for size in DECODE_BATCHES:
            whole = len(experts_TLK) // size
            if whole:
                sums[size] += whole * float(active_experts_L(experts_TLK, batch_tokens=size).mean())
                batches[size] += whole
    return tuple((size, sums[size] / batches[size]) for size in DECODE_BATCHES if batches[size])


def _strongest_pairs(recorded: RecordedRouting) -> tuple[ExpertPair, ...]:
    """The pairs of highest lift over all layers; none where E is so large that counting pairs would take over 1 GiB."""
    if 8.0 * recorded.num_layers * recorded.num_experts**2 > _MOST_PAIR_BYTES:
        return ()
    found: list[ExpertPair] = []
    for layer, together_EE in zip(recorded.layers, coactivation_LEE(recorded), strict=True):
        load_E = np.diagonal(together_EE)
        by_chance_EE = np.outer(load_E, load_E) / recorded.num_tokens
        lift = np.where(by_chance_EE >= _LEAST_EXPECTED, lift_EE(together_EE, num_tokens=recorded.num_tokens), 0.0)
        lift = np.triu(np.nan_to_num(lift), k=1)
        for at in np.argsort(-lift, axis=None, kind="stable")[:MOST_PAIRS]:
            one, other = divmod(int(at), recorded.num_experts)
            if lift[one, other] > 1.0:
                count = int(together_EE[one, other])
                pair = ExpertPair(layer=layer, experts=(one, other), num_tokens=count, lift=float(lift[one, other]))
                found.append(pair)
    return tuple(sorted(found, key=lambda pair: -pair.lift)[:MOST_PAIRS])
