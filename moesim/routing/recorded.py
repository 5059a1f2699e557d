"""Routing that somebody recorded: which experts every token took, read and written as a stream, never held whole.

Legend: T tokens, L MoE layers, K experts per token, E experts, S steps (forward passes), R ranks, N nodes.

The router-replay array (T, L, K) holds logical expert ids, before replication, the most probable first. Files: .npy,
.npz and .safetensors hold the array (``routed_experts``, or the only array there); .jsonl holds a forward pass a line,
``{"step": 0, "routed_experts": [[[id, ...k] ...layers] ...tokens]}``. A .npz and the metadata of safetensors may also
hold num_experts, layers, steps and tokens_of_step, as the files written here do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.describe.checks import check_whole
from moesim.describe.model import MAX_EXPERTS, Router
from moesim.door import parse_json
from moesim.door.arrays import CHUNK_BYTES, SUFFIXES, ArrayStream, open_arrays, write_array
from moesim.door.rows import json_lines, write_lines
from moesim.errors import InputError, check
from moesim.routing.popularity import Popularities
from moesim.routing.sampler import perturbation_scale
from moesim.routing.visits import ExpertMap, VisitProbabilities

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
ARRAY_NAME = "routed_experts"
LINES_SUFFIX = ".jsonl"
POOL_TOKENS = 65536  # tokens kept for traffic: a share v of visits is then off by sqrt(v(1-v)/65536), below 0.2 %
_SIDE_NAMES = ("num_experts", "layers", "steps", "tokens_of_step")
_LINE_IDS = 100_000  # ids that a written JSON line holds at most
_LEAST_SPREAD = 1e-9


class Chunk(NamedTuple):
    """Consecutive tokens of a recording: the number of the first, and their experts (T, L, K), checked."""

    first_token: int
    experts_TLK: NDArray[np.integer]


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordedRouting:
    """A recording that can be read any number of times, a chunk of tokens at a time.

    layers: the model's numbers of the L MoE layers; steps_S, tokens_of_step_S: the forward passes in order and the
    tokens of each; read: yields the ids in blocks (T, L, K) as they stand in the source.
    """

    owner: str
    num_experts: int
    top_k: int
    layers: tuple[int, ...]
    steps_S: Ints
    tokens_of_step_S: Ints
    read: Callable[[], Iterator[NDArray[Any]]]

    def __post_init__(self) -> None:
        owner = self.owner
        check_whole(owner, "num_experts", self.num_experts)
        check(self.num_experts <= MAX_EXPERTS, owner, "num_experts", f"must not exceed {MAX_EXPERTS}", self.num_experts)
        rule = f"must lie in 1..num_experts={self.num_experts}"
        check(1 <= self.top_k <= self.num_experts, owner, "experts per token", rule, self.top_k)
        check(len(self.layers) > 0, owner, "layers", "must be at least one", 0)
        rising = all(a < b for a, b in zip(self.layers, self.layers[1:], strict=False)) and self.layers[0] >= 0
        check(rising, owner, "layers", "must be rising layer numbers, none negative", list(self.layers))
        same = self.steps_S.shape == self.tokens_of_step_S.shape
        check(same, owner, "tokens_of_step", "must give the tokens of each step", self.tokens_of_step_S.shape)
        in_order = bool((np.diff(self.steps_S) > 0).all() and (self.steps_S >= 0).all())
        check(in_order, owner, "steps", "must be rising step numbers, none negative", self.steps_S.tolist())
        counted = bool((self.tokens_of_step_S >= 0).all())
        check(counted, owner, "tokens_of_step", "must not be negative", self.tokens_of_step_S.tolist())
        check(self.num_tokens > 0, owner, "tokens", "must be at least one", 0)

    @property
    def num_tokens(self) -> int:
        return int(self.tokens_of_step_S.sum())

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def chunks(self) -> Iterator[Chunk]:
        """All tokens in order, each chunk checked: ids in range, no expert twice in one token. Raises InputError."""
        first = 0
        for block_TLK in self.read():
            _check_ids(block_TLK, first, self)
            yield Chunk(first, block_TLK.astype(_id_dtype(self.num_experts), copy=False))
            first += len(block_TLK)
        check(first == self.num_tokens, self.owner, "tokens", f"must be {self.num_tokens}, as announced", first)


def _id_dtype(num_experts: int) -> np.dtype[Any]:
    return np.dtype(np.int16 if num_experts <= np.iinfo(np.int16).max else np.int32)


def _check_ids(block_TLK: NDArray[Any], first_token: int, recorded: RecordedRouting) -> None:
    shape = (recorded.num_layers, recorded.top_k)
    rule = f"must be (tokens, {shape[0]} layers, {shape[1]} experts)"
    check(block_TLK.shape[1:] == shape, recorded.owner, "shape", rule, block_TLK.shape)
    if block_TLK.size == 0:
        return
    if block_TLK.min() < 0 or block_TLK.max() >= recorded.num_experts:
        bad = np.argwhere((block_TLK < 0) | (block_TLK >= recorded.num_experts))[0]
        place = f"id {block_TLK[tuple(bad)]} at token {first_token + bad[0]}, layer {recorded.layers[bad[1]]}"
        hint = "Leave out tokens that were not routed." if block_TLK[tuple(bad)] < 0 else ""
        raise InputError(recorded.owner, "values", f"expert ids must lie in 0..{recorded.num_experts - 1}", place, hint)
    sorted_TLK = np.sort(block_TLK, axis=2)
    twice_TL = (sorted_TLK[:, :, 1:] == sorted_TLK[:, :, :-1]).any(axis=2)
    if twice_TL.any():
        token, layer = np.argwhere(twice_TL)[0]
        place = f"{block_TLK[token, layer].tolist()} at token {first_token + token}, layer {recorded.layers[layer]}"
        raise InputError(recorded.owner, "values", "a token takes an expert once", place)


def recorded_from_array(
    experts_TLK: NDArray[Any],
    *,
    num_experts: int,
    layers: tuple[int, ...] | None = None,
    tokens_per_step: int | None = None,
    owner: str = "recording",
) -> RecordedRouting:
    """A recording from memory. layers None: 0..L-1; tokens_per_step None: all tokens are one step. See read_recorded.

    >>> recorded_from_array(np.array([[[0, 2]], [[2, 1]]]), num_experts=4).num_tokens
    2
    """
    array = np.asarray(experts_TLK)
    _check_replay(array.shape, array.dtype, owner)
    block_rows = _block_rows(array.shape[1:], array.itemsize)
    side = _steps_of(array.shape[0], tokens_per_step, owner)
    return RecordedRouting(
        owner=owner,
        num_experts=num_experts,
        top_k=array.shape[2],
        layers=tuple(range(array.shape[1])) if layers is None else layers,
        steps_S=side[0],
        tokens_of_step_S=side[1],
        read=lambda: (array[at : at + block_rows] for at in range(0, len(array), block_rows)),
    )


def _block_rows(row_shape: tuple[int, ...], itemsize: int) -> int:
    return max(1, CHUNK_BYTES // max(1, int(np.prod(row_shape)) * itemsize))


def _check_replay(shape: tuple[int, ...], dtype: np.dtype[Any], owner: str) -> None:
    check(len(shape) == 3, owner, "shape", "must be (tokens, layers, experts per token)", shape)
    check(dtype.kind in "iu", owner, "dtype", "must hold whole numbers", str(dtype))


def _steps_of(num_tokens: int, tokens_per_step: int | None, owner: str) -> tuple[Ints, Ints]:
    each = num_tokens if tokens_per_step is None else tokens_per_step
    if tokens_per_step is not None:
        check_whole(owner, "tokens_per_step", tokens_per_step)
    starts = np.arange(0, num_tokens, max(each, 1))
    return np.arange(starts.size), np.minimum(each, num_tokens - starts)


def read_recorded(
    path: str | Path, *, num_experts: int | None = None, array: str | None = None, tokens_per_step: int | None = None
) -> RecordedRouting:
    """Open a recording: .npy, .npz, .safetensors or .jsonl. Nothing but headers is read of arrays; lines are counted.

    num_experts: needed where the file does not say it, since the highest id seen says nothing of experts never chosen.
    array: the name of the array where a file holds several. tokens_per_step: cuts an array into steps where the file
    does not. Raises InputError for any malformed file, for its ids when chunks are read. docs/model.md#recorded.

    >>> read_recorded("trace.npy", num_experts=64).layers  # doctest: +SKIP
    (0, 1, 2, 3)
    """
    owner, suffix = str(path), Path(path).suffix.lower()
    known = (*SUFFIXES, LINES_SUFFIX)
    check(suffix in known, owner, "", "must end in " + ", ".join(known), suffix)
    if suffix == LINES_SUFFIX:
        return _read_lines(path, num_experts)
    file = open_arrays(path)
    stream = file[array] if array is not None else _replay_of(file.arrays, owner)
    _check_replay(stream.shape, stream.dtype, owner)
    side = _side_values(file.arrays, file.metadata, owner)
    steps_S, tokens_S = _steps_of(stream.shape[0], tokens_per_step, owner)
    if tokens_per_step is None and "tokens_of_step" in side:
        tokens_S = side["tokens_of_step"].reshape(-1)
        steps_S = side.get("steps", np.arange(tokens_S.size)).reshape(-1)
        given = int(tokens_S.sum())
        rule = f"must sum to the {stream.shape[0]} tokens of the array"
        check(given == stream.shape[0], owner, "tokens_of_step", rule, given)
    layers = side.get("layers", np.arange(stream.shape[1])).reshape(-1)
    rule = f"must number the {stream.shape[1]} layers of the array"
    check(layers.size == stream.shape[1], owner, "layers", rule, layers.tolist())
    stated = int(side["num_experts"].reshape(-1)[0]) if side.get("num_experts", np.empty(0)).size else None
    return RecordedRouting(
        owner=owner,
        num_experts=_num_experts(num_experts, stated, owner),
        top_k=stream.shape[2],
        layers=tuple(layers.tolist()),
        steps_S=steps_S,
        tokens_of_step_S=tokens_S,
        read=stream.rows,
    )


def _num_experts(given: int | None, stated: int | None, owner: str) -> int:
    if given is None:
        hint = "Give the model's, since ids tell nothing of experts that no token chose."
        check(stated is not None, owner, "num_experts", "must be given, the file does not say it", None, hint)
        assert stated is not None
        return stated
    check(stated in (None, given), owner, "num_experts", f"must be the {given} of the model", stated)
    return given


def _replay_of(arrays: Mapping[str, ArrayStream], owner: str) -> ArrayStream:
    """The array named routed_experts, or the only one that is not a side value."""
    if ARRAY_NAME in arrays:
        return arrays[ARRAY_NAME]
    names = [name for name in arrays if name not in _SIDE_NAMES]
    rule = f"must hold {ARRAY_NAME!r}, or one array only"
    check(len(names) == 1, owner, "arrays", rule, sorted(arrays), "Name the array.")
    return arrays[names[0]]


def _side_values(arrays: Mapping[str, ArrayStream], metadata: Mapping[str, str], owner: str) -> dict[str, Ints]:
    values: dict[str, Any] = {name: arrays[name].read() for name in _SIDE_NAMES if name in arrays}
    for name in _SIDE_NAMES:
        if name in metadata and name not in values:
            values[name] = parse_json(metadata[name], f"{owner}: {name}")
    return {name: _whole_array(value, owner, name) for name, value in values.items()}


def _whole_array(value: Any, owner: str, field: str) -> Ints:
    try:
        array = np.asarray(value)
    except ValueError:  # lists of unequal lengths
        raise InputError(owner, field, "must be an array of whole numbers", "lists of unequal lengths") from None
    # An empty list is an empty array of floats.
    is_whole = array.dtype.kind in "iu" or array.size == 0
    check(is_whole, owner, field, "must be an array of whole numbers", value)
    fits = array.size == 0 or int(array.max()) <= np.iinfo(np.int64).max
    check(fits, owner, field, "must fit 63 bits", value)
    return array.astype(np.int64)


def _read_lines(path: str | Path, num_experts: int | None) -> RecordedRouting:
    """One pass counts tokens and finds the sizes; every later pass parses the lines anew."""
    owner = str(path)
    side: dict[str, Ints] = {}
    shape: tuple[int, ...] | None = None
    steps: list[int] = []
    tokens: list[int] = []
    for number, (step, line, experts_TLK) in enumerate(_passes(path)):
        for name in ("num_experts", "layers"):
            if name in line:
                value = _whole_array(line[name], f"{owner}: pass {number}", name)
                agrees = name not in side or np.array_equal(side[name], value)
                check(agrees, owner, name, "must be the same in every line", value.tolist())
                side[name] = value
        if step is None:
            step = steps[-1] + 1 if steps else 0
        if steps and step == steps[-1]:
            tokens[-1] += len(experts_TLK)
        else:
            steps.append(step)
            tokens.append(len(experts_TLK))
        if len(experts_TLK):
            shape = shape or experts_TLK.shape
            same = experts_TLK.shape[1:] == shape[1:]
            check(same, owner, f"pass {number}", f"must be (tokens, {shape[1]}, {shape[2]})", experts_TLK.shape)
    check(shape is not None, owner, "tokens", "must be at least one", 0)
    assert shape is not None
    layers = side.get("layers", np.arange(shape[1])).reshape(-1)
    rule = f"must number the {shape[1]} layers"
    check(layers.size == shape[1], owner, "layers", rule, layers.tolist())
    stated = int(side["num_experts"].reshape(-1)[0]) if side.get("num_experts", np.empty(0)).size else None
    return RecordedRouting(
        owner=owner,
        num_experts=_num_experts(num_experts, stated, owner),
        top_k=shape[2],
        layers=tuple(layers.tolist()),
        steps_S=np.array(steps),
        tokens_of_step_S=np.array(tokens),
        read=lambda: (experts_TLK for _, _, experts_TLK in _passes(path) if len(experts_TLK)),
    )


def _passes(path: str | Path) -> Iterator[tuple[int | None, dict[str, Any], Ints]]:
    """(step, the line, its ids (T, L, K)) of every line of a JSON-lines recording."""
    for number, line in json_lines(path):
        owner = f"{path}: line {number}"
        check(isinstance(line, dict) and ARRAY_NAME in line, owner, "", f"must be a mapping with {ARRAY_NAME!r}", line)
        step = line.get("step")
        if step is not None:
            check_whole(owner, "step", step, least=0)
        experts_TLK = _whole_array(line[ARRAY_NAME], owner, ARRAY_NAME)
        if experts_TLK.size == 0:
            yield step, line, np.empty((0, 0, 0), dtype=np.int64)
            continue
        _check_replay(experts_TLK.shape, experts_TLK.dtype, owner)
        yield step, line, experts_TLK


def write_recorded(recorded: RecordedRouting, path: str | Path) -> None:
    """Write a recording as .npy, .npz, .safetensors or .jsonl (by the ending), chunk by chunk, whole or not at all.

    A .npy has no place for the number of experts, the layers' numbers and the steps; the other forms keep them.
    """
    known = (*SUFFIXES, LINES_SUFFIX)
    suffix = Path(path).suffix.lower()
    check(suffix in known, str(path), "", "must end in " + ", ".join(known), suffix)
    if suffix == LINES_SUFFIX:
        write_lines(path, _lines(recorded))
        return
    side = {
        "num_experts": np.array(recorded.num_experts),
        "layers": np.array(recorded.layers),
        "steps": recorded.steps_S,
        "tokens_of_step": recorded.tokens_of_step_S,
    }
    write_array(
        path,
        (chunk.experts_TLK for chunk in recorded.chunks()),
        name=ARRAY_NAME,
        shape=(recorded.num_tokens, recorded.num_layers, recorded.top_k),
        dtype=_id_dtype(recorded.num_experts),
        beside=side,
    )


def _lines(recorded: RecordedRouting) -> Iterator[str]:
    line_tokens = max(1, _LINE_IDS // (recorded.num_layers * recorded.top_k))
    head: dict[str, Any] = {"num_experts": recorded.num_experts, "layers": list(recorded.layers)}
    for first, experts_TLK in recorded.chunks():
        step_T = step_of_tokens(recorded, first, len(experts_TLK))
        cuts = np.flatnonzero(np.diff(step_T)) + 1
        for start, part_TLK in zip([0, *cuts], np.split(experts_TLK, cuts), strict=True):
            step = int(recorded.steps_S[step_T[start]])
            for at in range(0, len(part_TLK), line_tokens):
                ids = part_TLK[at : at + line_tokens].tolist()
                yield json.dumps({"step": step, **head, ARRAY_NAME: ids}, separators=(",", ":"))
                head = {}


def step_of_tokens(recorded: RecordedRouting, first_token: int, num_tokens: int) -> Ints:
    """(T,) position in steps_S of consecutive tokens."""
    ends_S = np.cumsum(recorded.tokens_of_step_S)
    return np.searchsorted(ends_S, np.arange(first_token, first_token + num_tokens), side="right")


def load_LE(recorded: RecordedRouting) -> Ints:
    """Assignments of each expert of each layer over the whole recording; rows sum to tokens * k.

    >>> load_LE(recorded_from_array(np.array([[[0, 2]], [[2, 1]]]), num_experts=4)).tolist()
    [[1, 1, 2, 0]]
    """
    total_LE = np.zeros((recorded.num_layers, recorded.num_experts), dtype=np.int64)
    for _, experts_TLK in recorded.chunks():
        for layer, count_E in enumerate(total_LE):
            count_E += np.bincount(experts_TLK[:, layer].ravel(), minlength=recorded.num_experts)
    return total_LE


def inclusion_LE(recorded: RecordedRouting) -> Floats:
    """Share of tokens that take each expert; rows sum to k."""
    return load_LE(recorded) / recorded.num_tokens


def recorded_visits(
    recorded: RecordedRouting, placement: ExpertMap, node_of_rank_R: Ints | None = None
) -> VisitProbabilities:
    """Share of the recorded tokens that send a copy to each rank and node under a placement, counted, not sampled.

    As ``moesim.routing.visits.visit_probabilities``, one placement for all layers.
    """
    ranks = placement.num_ranks
    given_R = np.zeros(ranks, dtype=np.int64) if node_of_rank_R is None else np.asarray(node_of_rank_R)
    assert given_R.shape == (ranks,), "every rank of the group needs its node"
    assert placement.expert_to_rank_E.size == recorded.num_experts, "the placement is of another number of experts"
    nodes, node_of_rank_R = np.unique(given_R, return_inverse=True)
    rank_visits_LR = np.zeros((recorded.num_layers, ranks))
    node_visits_LN = np.zeros((recorded.num_layers, nodes.size))
    rank_of_E = placement.expert_to_rank_E.astype(_id_dtype(ranks))
    node_of_E = node_of_rank_R[placement.expert_to_rank_E].astype(_id_dtype(nodes.size))
    for _, experts_TLK in recorded.chunks():
        for layer in range(recorded.num_layers):
            rank_visits_LR[layer] += _visited(rank_of_E[experts_TLK[:, layer]], ranks)
            node_visits_LN[layer] += _visited(node_of_E[experts_TLK[:, layer]], nodes.size)
    return VisitProbabilities(
        rank_visits_LR=rank_visits_LR / recorded.num_tokens,
        node_visits_LN=node_visits_LN / recorded.num_tokens,
        node_of_rank_R=node_of_rank_R,
    )


def _visited(set_TK: NDArray[np.integer], num_sets: int) -> Ints:
    """Tokens that reach each set: a token's sets sorted, each counted once."""
    sorted_TK = np.sort(set_TK, axis=1)
    is_new_TK = np.ones(sorted_TK.shape, dtype=bool)
    is_new_TK[:, 1:] = sorted_TK[:, 1:] != sorted_TK[:, :-1]
    return np.bincount(sorted_TK[is_new_TK], minlength=num_sets)


def recorded_popularities(
    recorded: RecordedRouting, router: Router, *, rng: np.random.Generator, pool_tokens: int = POOL_TOKENS
) -> Popularities:
    """The recording as the simulator's popularity: its load counted in full, its tokens (a sample of them) as the pool.

    All tokens are the pool where they are at most pool_tokens, else as many, chosen evenly at random, in order.
    log_weights_LE are those whose plain top-k draw gives about this load (see ``weights_of_inclusion``); an expert that
    nobody chose counts as half an assignment there. InputError when the router's top_k is not the recording's.
    docs/model.md#recorded.
    """
    check(
        router.top_k == recorded.top_k, recorded.owner, "experts per token", f"must be {router.top_k}", recorded.top_k
    )
    fits = recorded.num_experts <= np.iinfo(np.int16).max
    check(fits, recorded.owner, "num_experts", "must not exceed 32767 in a simulation", recorded.num_experts)
    kept = min(pool_tokens, recorded.num_tokens)
    chosen = np.sort(rng.choice(recorded.num_tokens, size=kept, replace=False, shuffle=False))
    pool_LTK = np.empty((recorded.num_layers, kept, recorded.top_k), dtype=np.int16)
    count_LE = np.zeros((recorded.num_layers, recorded.num_experts), dtype=np.int64)
    for first, experts_TLK in recorded.chunks():
        for layer, count_E in enumerate(count_LE):
            count_E += np.bincount(experts_TLK[:, layer].ravel(), minlength=recorded.num_experts)
        here = slice(*np.searchsorted(chosen, [first, first + len(experts_TLK)]))
        pool_LTK[:, here] = np.moveaxis(experts_TLK[chosen[here] - first], 1, 0)
    inclusion_LE = count_LE / recorded.num_tokens
    log_weights_LE = weights_of_inclusion(np.maximum(inclusion_LE, 0.5 / recorded.num_tokens))
    log_weights_LE *= perturbation_scale(router)
    # A spread of exactly 0 would mean equal experts by symmetry, which a recording never promises.
    sigma = max(float(log_weights_LE.std()), _LEAST_SPREAD)
    return Popularities(
        router=router, log_weights_LE=log_weights_LE, inclusion_LE=inclusion_LE, sigma=sigma, pool_LTK=pool_LTK
    )


def weights_of_inclusion(inclusion_LE: Floats) -> Floats:
    """Log weights whose plain top-k draw includes each expert this often, in the limit of many experts.

    The k first of exponential clocks ring before a time t that hardly varies: inclusion = 1 - exp(-weight t).
    """
    return np.log(-np.log1p(-np.minimum(inclusion_LE, 1.0 - 1e-9)))
