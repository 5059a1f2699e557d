"""Which experts each token picks: top-k of Gumbel-perturbed log popularity, plain or inside the best groups.

Legend: T tokens, K experts per token, E experts (zero-compute ones included), L layers, N expert groups.

A token adds an independent Gumbel variable to each expert's log weight and takes the k largest. Group-limited routing
first scores each group by the sum of its two largest perturbed log weights (or its largest), keeps the best top_groups,
and takes the k largest inside them (DeepSeek's rules on perturbed popularity in place of a router's score). Softmax or
sigmoid scores, normalised or not, rank experts alike: the choice is the same, only weights differ. Noisy top-k widens
the perturbation: a Gumbel variable with the variance of both. A random second choice stays with probability
min(1, 2*g2), g2 = exp(y2)/(exp(y1) + exp(y2)) of the two perturbed log weights; a choice that fell is -1. Two
implementations: a plain NumPy oracle that reads like this paragraph, and numba kernels that draw the same law.

Every token has random numbers of its own, so results depend neither on threads nor on how tokens are cut into chunks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moesim.describe.model import Router
from moesim.errors import check

Floats = NDArray[np.float64]
Choices = NDArray[np.int16]
Counts = NDArray[np.int64]
Engine = Literal["numba", "numpy"]

CHUNK_TOKENS = 32768  # tokens in flight per thread while streaming: 0.5 MB of choices at k = 8
MOST_EXPERTS = int(np.iinfo(np.int16).max)
# Beyond this span the least weight underflows to zero and its clock never rings.
_MOST_SPAN = 600.0
_SECOND_STREAM = np.uint64(0xA0761D6478BD642F)  # keeps the numbers that drop second choices apart from the choices'


def draw_choices(
    log_weights_E: Floats,
    router: Router,
    num_tokens: int,
    rng: np.random.Generator,
    *,
    engine: Engine = "numba",
    num_threads: int = 1,
) -> Choices:
    """Experts of each token, best first.

    log_weights_E: log popularity, any offset; zero-compute experts follow the others. Returns choices_TK (int16); no
    expert stands twice in a row; -1 is a random second choice that fell. The result depends on rng's state alone, not
    on num_threads; the two engines draw the same law but not the same numbers. Raises InputError for more experts or a
    wider span of popularity than the sampler takes. Expert choice: see ``routers``. docs/model.md#router-sample.

    >>> draw_choices(np.zeros(8), Router(top_k=2), 3, np.random.default_rng(0)).shape
    (3, 2)
    """
    _check(log_weights_E, router)
    if engine == "numpy":
        return _draw_choices_numpy(log_weights_E, router, num_tokens, rng)
    choices_TK = np.empty((num_tokens, router.top_k), dtype=np.int16)
    weights_E, seed = _weights(log_weights_E, router), _seed(rng)
    parts = np.linspace(0, num_tokens, num_threads + 1).astype(np.int64)
    pieces = [(int(a), choices_TK[a:b]) for a, b in itertools.pairwise(parts)]
    _on_threads(lambda piece: _fill(weights_E, router, seed, *piece), pieces, num_threads)
    return choices_TK


def stream_choices(
    log_weights_E: Floats,
    router: Router,
    num_tokens: int,
    rng: np.random.Generator,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Iterator[Choices]:
    """The same tokens as draw_choices, at most chunk_tokens at a time, so that any number fits into memory.

    Each chunk is a view of one buffer: use it before asking for the next.

    >>> sum(len(chunk) for chunk in stream_choices(np.zeros(8), Router(top_k=2), 70_000, np.random.default_rng(0)))
    70000
    """
    _check(log_weights_E, router)
    weights_E, seed = _weights(log_weights_E, router), _seed(rng)
    buffer_TK = np.empty((min(chunk_tokens, num_tokens), router.top_k), dtype=np.int16)
    for first in range(0, num_tokens, chunk_tokens):
        chunk_TK = buffer_TK[: min(chunk_tokens, num_tokens - first)]
        _fill(weights_E, router, seed, first, chunk_TK)
        yield chunk_TK


def draw_counts_streaming(
    log_weights_LE: Floats,
    router: Router,
    num_tokens: int,
    rng: np.random.Generator,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
    num_threads: int = 1,
) -> Counts:
    """counts_LE: assignments of num_tokens tokens to each expert of each layer, every token drawn, none kept.

    Memory is num_threads chunks of chunk_tokens * k * 2 bytes however many tokens; the counts are those of
    draw_choices, whatever the chunks and threads.

    >>> draw_counts_streaming(np.zeros((2, 8)), Router(top_k=2), 1_000, np.random.default_rng(0)).sum(axis=1)
    array([2000, 2000])
    """
    from moesim.routing import kernels

    counts_LE = np.zeros(log_weights_LE.shape, dtype=np.int64)
    for log_weights_E, counts_E in zip(log_weights_LE, counts_LE, strict=True):
        _check(log_weights_E, router)
        weights_E, seed = _weights(log_weights_E, router), _seed(rng)
        # Each thread walks every num_threads-th chunk with a buffer and counts of its own.
        own_WE = np.zeros((num_threads, counts_E.size), dtype=np.int64)

        def count(worker: int, weights_E: Floats = weights_E, seed: np.uint64 = seed, own: Counts = own_WE) -> None:
            buffer_TK = np.empty((min(chunk_tokens, num_tokens), router.top_k), dtype=np.int16)
            for first in range(worker * chunk_tokens, num_tokens, num_threads * chunk_tokens):
                chunk_TK = buffer_TK[: min(chunk_tokens, num_tokens - first)]
                _fill(weights_E, router, seed, first, chunk_TK)
                kernels.count_choices(chunk_TK, own[worker])

        _on_threads(count, list(range(num_threads)), num_threads)
        counts_E += own_WE.sum(axis=0)
    return counts_LE


def perturbation_scale(router: Router) -> float:
    """Width of the perturbation over a Gumbel variable's: sqrt(1 + 6 s**2 / pi**2) with normal noise of deviation s."""
    return math.sqrt(1.0 + 6.0 * router.noise_std**2 / math.pi**2)


def _check(log_weights_E: Floats, router: Router) -> None:
    num_experts = log_weights_E.size
    assert router.choice != "expert_choice", "experts choose tokens in routers.draw_expert_choice"
    assert 1 <= router.top_k <= num_experts, "top_k out of range"
    rule = f"must not exceed {MOST_EXPERTS} where tokens are drawn"
    check(num_experts <= MOST_EXPERTS, "moe", "num_experts", rule, num_experts)
    span = float(np.ptp(log_weights_E))
    rule = f"log popularity must be finite and span less than {_MOST_SPAN:g}"
    check(span < _MOST_SPAN, "routing.popularity", "skew", rule, span)


def _weights(log_weights_E: Floats, router: Router) -> Floats:
    return np.exp((log_weights_E - log_weights_E.max()) / perturbation_scale(router))


def _seed(rng: np.random.Generator) -> np.uint64:
    return rng.integers(0, 2**64, dtype=np.uint64)


def _fill(weights_E: Floats, router: Router, seed: np.uint64, first_token: int, choices_TK: Choices) -> None:
    """Tokens first_token... of the seed's sequence into choices_TK."""
    from moesim.routing import kernels

    if router.top_groups < router.num_groups:
        by_two = router.group_score == "top2_sum"
        groups = (router.num_groups, router.top_groups, by_two)
        kernels.draw_grouped(weights_E, *groups, seed, first_token, choices_TK)
        return
    kernels.draw_plain(weights_E, seed, first_token, choices_TK)
    if router.choice == "random_second":
        kernels.drop_seconds(weights_E, seed ^ _SECOND_STREAM, first_token, choices_TK)


def _on_threads(work, pieces, num_threads: int) -> None:  # type: ignore[no-untyped-def]
    """Call work on each piece; the kernels release the interpreter's lock."""
    if num_threads == 1:
        for piece in pieces:
            work(piece)
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(work, pieces))


def _draw_choices_numpy(log_weights_E: Floats, router: Router, num_tokens: int, rng: np.random.Generator) -> Choices:
    """The oracle: perturb every expert of every token and sort."""
    noise_TE = rng.gumbel(size=(num_tokens, log_weights_E.size)) * perturbation_scale(router)
    perturbed_TE = log_weights_E + noise_TE
    if router.top_groups < router.num_groups:
        perturbed_TNS = perturbed_TE.reshape(num_tokens, router.num_groups, -1)
        scored = 2 if router.group_score == "top2_sum" else 1
        score_TN = np.sort(perturbed_TNS, axis=2)[:, :, -scored:].sum(axis=2)
        best_first_TN = np.argsort(-score_TN, axis=1)
        outside_TN = best_first_TN[:, router.top_groups :]
        np.put_along_axis(perturbed_TNS, outside_TN[:, :, None], -np.inf, axis=1)
    choices_TK = np.argsort(-perturbed_TE, axis=1)[:, : router.top_k].astype(np.int16)
    if router.choice == "random_second":
        best_T2 = np.take_along_axis(perturbed_TE, choices_TK.astype(np.int64), axis=1) / perturbation_scale(router)
        second_gate_T = 1.0 / (1.0 + np.exp(best_T2[:, 0] - best_T2[:, 1]))
        choices_TK[rng.random(num_tokens) >= 2.0 * second_gate_T, 1] = -1
    return choices_TK


def warm() -> None:
    """Compile the kernels into numba's cache (a few seconds once; later runs load them)."""
    rng = np.random.default_rng(0)
    for router in (
        Router(top_k=2),
        Router(top_k=2, num_groups=4, top_groups=2),
        Router(top_k=2, choice="random_second"),
    ):
        draw_counts_streaming(np.zeros((1, 8)), router, 2, rng)
