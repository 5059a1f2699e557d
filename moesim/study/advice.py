"""What to change: settings of a scenario changed one at a time, with what each does to the fullest GPU's memory.

No clock runs here; a change's price in time is only in words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moesim.errors import MoesimError
from moesim.scenario import Scenario
from moesim.study.sizes import rank_memories

MAX_CHANGES = 8


@dataclass(frozen=True, kw_only=True)
class MemoryChange:
    """One changed setting, and the fullest GPU's memory with it [bytes]. ``words`` says what it is and what it "
    "costs."""

    leaves: Mapping[str, Any]  # flat names, as Scenario.with_ takes them
    words: str
    peak_bytes: float
    headroom_bytes: float

    @property
    def fits(self) -> bool:
        return self.headroom_bytes >= 0


def memory_changes(scenario: Scenario) -> list[MemoryChange]:
    """Changes that lower the fullest GPU's memory, the gentlest on speed first; impossible ones are left out.

    Where no single change fits, full recomputation is combined with the others too.

    >>> memory_changes(scenario)[0].words  # doctest: +SKIP
    'ep=16: more GPUs share the experts'
    """
    singles = _candidates(scenario)
    found = _tried(scenario, singles)
    if not any(change.fits for change in found):
        recompute = {"recompute": "full"}
        pairs = [
            (leaves | recompute, f"{words}, together with recompute=full")
            for leaves, words in singles
            if leaves != recompute and scenario.train.recompute == "none"
        ]
        found += _tried(scenario, pairs)
    return found


def _candidates(scenario: Scenario) -> list[tuple[dict[str, Any], str]]:
    p, train = scenario.parallel, scenario.train
    per_stage = scenario.layout.ranks_per_stage
    found: list[tuple[dict[str, Any], str]] = []
    if p.zero == 0:
        found.append(({"zero": 1}, "zero=1: optimizer states shared out over the replicas"))
    if train.micro_batch > 1:
        half = train.micro_batch // 2
        found.append(({"micro_batch": half}, f"micro_batch={half}: fewer tokens in flight, smaller matrix products"))
    if scenario.model.is_moe and p.ep * 2 <= per_stage:
        found.append(({"ep": p.ep * 2}, f"ep={p.ep * 2}: more GPUs share the experts, tokens travel further"))
    if p.zero == 1:
        found.append(({"zero": 2}, "zero=2: gradients shared out too, at the price of more traffic"))
    found.append(({"pp": p.pp * 2}, f"pp={p.pp * 2}: fewer layers per GPU, a longer pipeline to fill and drain"))
    found.append(({"tp": p.tp * 2}, f"tp={p.tp * 2}: layers cut over more GPUs, which then exchange activations"))
    if train.recompute == "none":
        found.append(({"recompute": "full"}, "recompute=full: activations made again in the backward pass"))
    return found[:MAX_CHANGES]


def _tried(scenario: Scenario, candidates: list[tuple[dict[str, Any], str]]) -> list[MemoryChange]:
    capacity_bytes = scenario.cluster.gpu.memory_bytes.value
    found = []
    for leaves, words in candidates:
        try:
            peak = max(memory.peak_bytes for memory in rank_memories(scenario.with_(**leaves)))
        except MoesimError:  # does not divide, or is not modelled
            continue
        change = MemoryChange(leaves=leaves, words=words, peak_bytes=peak, headroom_bytes=capacity_bytes - peak)
        found.append(change)
    return found
