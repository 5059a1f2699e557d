"""Histograms of expert use over steps: tables [step, layer, expert, tokens] in and out, as CSV or parquet.

Legend: S steps, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesim.describe.model import MAX_EXPERTS, Router
from moesim.door.rows import table_blocks, write_table
from moesim.errors import InputError, check
from moesim.routing.popularity import Popularities
from moesim.routing.reach import reach_of_sets
from moesim.routing.recorded import RecordedRouting, step_of_tokens, weights_of_inclusion
from moesim.routing.sampler import perturbation_scale
from moesim.units import GIB, format_bytes

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
COLUMNS = ("step", "layer", "expert", "tokens")
MAX_BYTES = 4 * GIB
MAX_LAYERS = 10_000
_REFINEMENTS = 6


@dataclass(frozen=True, kw_only=True, eq=False)
class Histogram:
    """Tokens that took each expert of each layer in each step: tokens_SLE; layers are the model's layer numbers."""

    steps_S: Ints
    layers: tuple[int, ...]
    tokens_SLE: Ints

    def __post_init__(self) -> None:
        shape = (self.steps_S.size, len(self.layers))
        assert self.tokens_SLE.ndim == 3, "a histogram has steps, layers and experts"
        assert self.tokens_SLE.shape[:2] == shape, "a histogram needs a number for each step and layer"

    @property
    def load_LE(self) -> Ints:
        """Summed over steps."""
        return self.tokens_SLE.sum(axis=0)

    @property
    def num_experts(self) -> int:
        return int(self.tokens_SLE.shape[2])


def recorded_histogram(recorded: RecordedRouting) -> Histogram:
    """The histogram of a recording, step by step. Raises InputError where it would not fit in 4 GiB.

    >>> from moesim.routing.recorded import recorded_from_array
    >>> trace = recorded_from_array(np.array([[[0, 2]], [[2, 1]]]), num_experts=3, tokens_per_step=1)
    >>> recorded_histogram(trace).tokens_SLE.tolist()
    [[[1, 0, 1]], [[0, 1, 1]]]
    """
    shape = (recorded.steps_S.size, recorded.num_layers, recorded.num_experts)
    _check_size(shape, recorded.owner)
    tokens_SLE = np.zeros(shape, dtype=np.int64)
    num_experts = recorded.num_experts
    for first, experts_TLK in recorded.chunks():
        step_T = step_of_tokens(recorded, first, len(experts_TLK))
        start, end = int(step_T[0]), int(step_T[-1]) + 1
        cell_T = (step_T - start) * num_experts
        for layer in range(recorded.num_layers):
            cells = (cell_T[:, None] + experts_TLK[:, layer]).ravel()
            counts = np.bincount(cells, minlength=(end - start) * num_experts)
            tokens_SLE[start:end, layer] += counts.reshape(end - start, num_experts)
    return Histogram(steps_S=recorded.steps_S, layers=recorded.layers, tokens_SLE=tokens_SLE)


def _check_size(shape: tuple[int, ...], owner: str) -> None:
    num_bytes = 8 * float(np.prod([float(size) for size in shape]))
    rule = f"steps x layers x experts must fit in {format_bytes(MAX_BYTES)}"
    check(num_bytes <= MAX_BYTES, owner, "histogram", rule, shape, "Stream it, or record fewer steps.")


def histogram_steps(path: str | Path, *, num_experts: int) -> Iterator[tuple[int, dict[int, Ints]]]:
    """(step, tokens_E of each layer seen) of a CSV or parquet table, a step at a time: memory for one step only.

    Rows lie in the order of their steps; within a step in any order, each (layer, expert) once; what is missing is 0.
    Raises InputError for any malformed table.
    """
    owner = str(path)
    check(1 <= num_experts <= MAX_EXPERTS, owner, "num_experts", f"must lie in 1..{MAX_EXPERTS}", num_experts)
    current = -1
    seen: dict[int, Ints] = {}
    for first, block in table_blocks(path, COLUMNS):
        _check_block(block, first, current, num_experts, owner)
        cuts = np.flatnonzero(np.diff(block[:, 0])) + 1
        for rows in np.split(block, cuts):
            if not len(rows):
                continue
            if rows[0, 0] != current:
                if seen:
                    yield current, _blank_to_zero(seen)
                current, seen = int(rows[0, 0]), {}
            _add_rows(seen, rows, current, num_experts, owner)
    check(current >= 0, owner, "", "must hold at least one row", "none")
    yield current, _blank_to_zero(seen)


def _check_block(block: Ints, first: int, last_step: int, num_experts: int, owner: str) -> None:
    late = np.flatnonzero(np.diff(block[:, 0], prepend=last_step) < 0)
    if late.size:
        rule = "must not come before the step of the row above"
        raise InputError(owner, f"row {first + late[0] + 1}", rule, f"step {block[late[0], 0]}")
    for column, name, size in ((1, "layer", MAX_LAYERS), (2, "expert", num_experts)):
        high = np.flatnonzero(block[:, column] >= size)
        if high.size:
            rule = f"{name} must lie in 0..{size - 1}"
            raise InputError(owner, f"row {first + high[0] + 1}", rule, int(block[high[0], column]))


def _add_rows(seen: dict[int, Ints], rows: Ints, step: int, num_experts: int, owner: str) -> None:
    for layer in np.unique(rows[:, 1]).tolist():
        of_layer = rows[rows[:, 1] == layer]
        tokens_E = seen.setdefault(layer, np.full(num_experts, -1, dtype=np.int64))
        experts, times = np.unique(of_layer[:, 2], return_counts=True)
        twice = experts[(times > 1) | (tokens_E[experts] >= 0)]
        rule = "each layer and expert stands once in a step"
        check(twice.size == 0, owner, f"step {step}", rule, f"layer {layer}, expert {twice[:1].tolist()} twice")
        tokens_E[of_layer[:, 2]] = of_layer[:, 3]


def _blank_to_zero(seen: dict[int, Ints]) -> dict[int, Ints]:
    return {layer: np.maximum(tokens_E, 0) for layer, tokens_E in sorted(seen.items())}


def read_histogram(path: str | Path, *, num_experts: int) -> Histogram:
    """A whole table in memory. Raises InputError for a malformed one, or one beyond 4 GiB; see ``histogram_steps``."""
    steps: list[int] = []
    by_step: list[dict[int, Ints]] = []
    layers: set[int] = set()
    for step, by_layer in histogram_steps(path, num_experts=num_experts):
        layers |= set(by_layer)
        _check_size((len(steps) + 1, len(layers), num_experts), str(path))
        steps.append(step)
        by_step.append(by_layer)
    numbers = tuple(sorted(layers))
    tokens_SLE = np.zeros((len(steps), len(numbers), num_experts), dtype=np.int64)
    for tokens_LE, by_layer in zip(tokens_SLE, by_step, strict=True):
        for layer, tokens_E in by_layer.items():
            tokens_LE[numbers.index(layer)] = tokens_E
    return Histogram(steps_S=np.array(steps), layers=numbers, tokens_SLE=tokens_SLE)


def histogram_load(path: str | Path, *, num_experts: int) -> tuple[tuple[int, ...], Ints]:
    """(layer numbers, load_LE) of a table of any length, summed over its steps as it streams by."""
    total: dict[int, Ints] = {}
    for _, by_layer in histogram_steps(path, num_experts=num_experts):
        for layer, tokens_E in by_layer.items():
            total[layer] = total[layer] + tokens_E if layer in total else tokens_E
    layers = tuple(sorted(total))
    return layers, np.stack([total[layer] for layer in layers])


def write_histogram(histogram: Histogram, path: str | Path) -> None:
    """Write [step, layer, expert, tokens] rows, zeros included, as CSV or parquet by the ending."""
    layer_LE, expert_LE = np.meshgrid(histogram.layers, np.arange(histogram.num_experts), indexing="ij")
    cells = np.stack([layer_LE.ravel(), expert_LE.ravel()], axis=1)

    def blocks() -> Iterator[Ints]:
        for step, tokens_LE in zip(histogram.steps_S, histogram.tokens_SLE, strict=True):
            yield np.column_stack([np.full(len(cells), step), cells, tokens_LE.ravel()])

    write_table(path, COLUMNS, blocks())


def histogram_popularities(load_LE: Ints, router: Router, *, owner: str = "histogram") -> Popularities:
    """A load as the simulator's popularity, for plain top-k routers: visits then come from the weights.

    The weights are solved so that the plain top-k draw includes each expert as often as the load says, each layer on
    its own. InputError for a router with groups, zero experts or a choice of its own (only recorded tokens say which
    experts go together), for a layer without load, and for an expert that takes more than every token once.
    """
    is_plain = router.top_groups == router.num_groups and router.choice == "top_k" and router.num_zero_experts == 0
    hint = "Record the router-replay array instead."
    check(is_plain, owner, "router", "must be a plain top-k one where only a histogram is given", router, hint)
    total_L = load_LE.sum(axis=1)
    check(bool((total_L > 0).all()), owner, "tokens", "must not all be 0 in a layer", total_L.tolist())
    wanted_LE = load_LE * (router.top_k / total_L[:, None])
    most = float(wanted_LE.max())
    rule = f"an expert must not take more than all tokens (top-{router.top_k})"
    check(most <= 1.0 + 1e-9, owner, "tokens", rule, f"{most:.3g} times")
    floor_LE = np.clip(wanted_LE, 0.5 * router.top_k / total_L[:, None], 1.0 - 1e-6)
    log_weights_LE = weights_of_inclusion(floor_LE)
    experts = np.arange(load_LE.shape[1])
    for _ in range(_REFINEMENTS):
        reached_LE = reach_of_sets(log_weights_LE, experts, top_k=router.top_k, num_sets=experts.size)
        log_weights_LE = log_weights_LE + weights_of_inclusion(floor_LE) - weights_of_inclusion(reached_LE)
    return Popularities(
        router=router,
        log_weights_LE=log_weights_LE * perturbation_scale(router),
        inclusion_LE=np.minimum(wanted_LE, 1.0),
        sigma=max(float(log_weights_LE.std()), 1e-9),
    )
