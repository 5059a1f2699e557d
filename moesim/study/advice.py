"""What to change: settings of a scenario changed one at a time, with what each does to memory and to speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moesim.errors import MoesimError
from moesim.metrics.memory import PLACED_BLINDLY
from moesim.scenario import Scenario
from moesim.study.fits import RECOMPUTE_ALL, name_of, ways_to_fit
from moesim.study.simulate import simulate
from moesim.study.sizes import rank_memories

MAX_SIMULATED = 8


@dataclass(frozen=True, kw_only=True)
class Change:
    """Changed settings, the fullest GPU's memory with them [bytes] and, where that fits, the speed."""

    leaves: Mapping[str, Any]  # flat names, as Scenario.with_ takes them
    words: str  # what the change means
    peak_bytes: float
    headroom_bytes: float
    tokens_per_s_per_gpu: float | None  # None where memory does not suffice

    @property
    def fits(self) -> bool:
        return self.headroom_bytes >= 0

    @property
    def name(self) -> str:
        """The settings as they are typed: ``ep=32, recompute=full``."""
        return name_of(self.leaves)


def changes(scenario: Scenario, progress: Callable[[str], None] | None = None) -> list[Change]:
    """Single changes of the scenario; those that fit come first, the fastest leading, then the others by memory.

    Where the scenario itself does not fit, ``fits.ways_to_fit`` come before the others; where nothing fits, each is
    combined with full recomputation as well. Impossible ones are left out; of those that fit, at most MAX_SIMULATED are
    simulated.

    >>> changes(scenario)[0].name  # doctest: +SKIP
    'recompute=full'
    """
    ways = [(dict(way.leaves), way.words) for way in ways_to_fit(scenario, progress)]
    singles = [*ways, *(one for one in single_changes(scenario) if one[0] not in [leaves for leaves, _ in ways])]
    tried = _with_memory(scenario, singles)
    if not any(headroom >= 0 for _, _, headroom in tried) and scenario.train.recompute == "none":
        recompute = {"recompute": "full"}
        pairs = [(leaves | recompute, f"{words}; recomputing too") for leaves, words in singles if leaves != recompute]
        tried += _with_memory(scenario, pairs)
    capacity_bytes = scenario.cluster.gpu.memory_bytes.value
    found = []
    num_simulated = 0
    for leaves, words, headroom in tried:
        speed = None
        if headroom >= 0 and num_simulated < MAX_SIMULATED:
            num_simulated += 1
            if progress is not None:
                progress(f"what if {name_of(leaves)}")
            speed = simulate(scenario.with_(**leaves)).tokens_per_s_per_gpu
        found.append(
            Change(
                leaves=leaves,
                words=words,
                peak_bytes=capacity_bytes - headroom,
                headroom_bytes=headroom,
                tokens_per_s_per_gpu=speed,
            )
        )
    return sorted(found, key=lambda change: (-(change.tokens_per_s_per_gpu or 0), -change.headroom_bytes))


def single_changes(scenario: Scenario) -> list[tuple[dict[str, Any], str]]:
    """Settings worth trying, the likeliest to help first, with what each means."""
    p, train = scenario.parallel, scenario.train
    found: list[tuple[dict[str, Any], str]] = []
    if train.recompute == "none":
        found.append(({"recompute": "full"}, RECOMPUTE_ALL))
    else:
        found.append(({"recompute": "none"}, "activations are kept instead of made again"))
    if scenario.model.is_moe:
        if scenario.routing.dispatcher == "alltoall" and p.ep > scenario.cluster.ranks_per_node:
            found.append(
                ({"dispatcher": "deepep"}, "a token crosses the network once for each node, not for each expert")
            )
        if p.ep > 1 and scenario.placement.policy in PLACED_BLINDLY and scenario.routing.popularity.kind != "balanced":
            placed = {"policy": "search", "map": None} if scenario.placement.map else {"policy": "search"}
            found.append((placed, "experts are placed by their expected load instead of in order, so GPUs wait less"))
        if p.ep % 2 == 0:
            found.append(({"ep": p.ep // 2}, "fewer GPUs share the experts, so tokens travel less and each holds more"))
        found.append(({"ep": p.ep * 2}, "more GPUs share the experts, so each holds fewer and tokens travel further"))
    if train.cuda_graphs == "none":
        found.append(({"cuda_graphs": "full"}, "the host issues a step's kernels as one, so a GPU never waits for it"))
    if p.zero == 0:
        found.append(({"zero": 1}, "optimizer states are shared out over the replicas"))
    if p.pp % 2 == 0:
        found.append(({"pp": p.pp // 2}, "fewer pipeline stages with more layers each, and a shorter fill and drain"))
    if p.pp > 1 and p.vpp == 1:
        found.append(({"vpp": 2}, "each GPU holds two smaller pieces of the model, which shortens fill and drain"))
    found.append(({"tp": p.tp * 2}, "layers are cut over more GPUs, which then exchange activations"))
    found.append(({"micro_batch": train.micro_batch * 2}, "more tokens at a time: fuller products, more memory"))
    if train.overlap == "none":
        found.append(({"overlap": "grad_reduce"}, "gradients are reduced behind the last backward pass"))
    found.append(({"pp": p.pp * 2}, "more pipeline stages with fewer layers each, and a longer fill and drain"))
    return found


def _with_memory(
    scenario: Scenario, candidates: list[tuple[dict[str, Any], str]]
) -> list[tuple[dict[str, Any], str, float]]:
    """Each candidate that is possible with the fullest GPU's free memory [bytes], negative where it does not fit."""
    capacity_bytes = scenario.cluster.gpu.memory_bytes.value
    found = []
    for leaves, words in candidates:
        try:
            peak_bytes = max(memory.peak_bytes for memory in rank_memories(scenario.with_(**leaves)))
        except MoesimError:  # does not divide, or is not modelled
            continue
        found.append((leaves, words, capacity_bytes - peak_bytes))
    return found
