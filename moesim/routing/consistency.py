"""Does routing repeat itself? Between two recordings of the same tokens, between neighbours, experts and domains.

Legend: T tokens, L MoE layers, K experts per token, E experts, D domains.

Arrays experts_TLK are router-replay: expert ids, the most probable first. For recordings that do not fit in memory feed
``chunks()`` to the counting functions, whose results add.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.errors import check
from moesim.routing.recorded import RecordedRouting
from moesim.routing.statistics import entropy

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Experts = NDArray[np.integer]


@dataclass(frozen=True, kw_only=True, eq=False)
class Agreement:
    """How far two routings of the same tokens agree, per layer.

    overlap_L: shared experts over k; exact_L: share of tokens with the same set; top1_L: with the same first expert;
    chance_L: the overlap of two routings with these loads that know nothing of each other.
    """

    num_tokens: int
    overlap_L: Floats
    exact_L: Floats
    top1_L: Floats
    chance_L: Floats


def agreement(first_TLK: Experts, second_TLK: Experts, *, num_experts: int) -> Agreement:
    """Agreement of two routings of the same tokens: one input twice, or two checkpoints.

    Chance is sum over experts of p q / k, with p and q their inclusions: k/E where both are even.

    >>> same = agreement(np.array([[[0, 1]]]), np.array([[[1, 2]]]), num_experts=4)
    >>> same.overlap_L.tolist(), same.exact_L.tolist(), same.top1_L.tolist()
    ([0.5], [0.0], [0.0])
    """
    assert first_TLK.shape == second_TLK.shape, "both routings are of the same tokens, layers and k"
    return _agreement([(first_TLK, second_TLK)], num_experts)


def agreement_of(first: RecordedRouting, second: RecordedRouting) -> Agreement:
    """Agreement of two recordings of the same tokens, streamed. InputError where their sizes differ."""
    for name in ("num_experts", "top_k", "layers", "num_tokens"):
        ours, others = getattr(first, name), getattr(second, name)
        check(ours == others, second.owner, name, f"must be that of {first.owner}, {ours}", others)
    return _agreement(_paired(first, second), first.num_experts)


def _paired(first: RecordedRouting, second: RecordedRouting) -> Iterable[tuple[Experts, Experts]]:
    """Both recordings' tokens side by side, whatever the sizes of their chunks."""
    ours, others = first.chunks(), second.chunks()
    a_TLK, b_TLK = next(ours).experts_TLK, next(others).experts_TLK
    while True:
        size = min(len(a_TLK), len(b_TLK))
        yield a_TLK[:size], b_TLK[:size]
        a_TLK, b_TLK = a_TLK[size:], b_TLK[size:]
        if not len(a_TLK):
            chunk = next(ours, None)
            if chunk is None:
                break
            a_TLK = chunk.experts_TLK
        if not len(b_TLK):
            b_TLK = next(others).experts_TLK


def _agreement(pairs: Iterable[tuple[Experts, Experts]], num_experts: int) -> Agreement:
    num_tokens, top_k = 0, 1
    shared_L: Floats | int = 0
    exact_L: Floats | int = 0
    top1_L: Floats | int = 0
    load_LE: Ints | int = 0
    other_LE: Ints | int = 0
    for a_TLK, b_TLK in pairs:
        top_k = a_TLK.shape[2]
        num_shared_TL = shared_experts(a_TLK, b_TLK)
        num_tokens += len(a_TLK)
        shared_L = shared_L + num_shared_TL.sum(axis=0)
        exact_L = exact_L + (num_shared_TL == top_k).sum(axis=0)
        top1_L = top1_L + (a_TLK[:, :, 0] == b_TLK[:, :, 0]).sum(axis=0)
        load_LE, other_LE = load_LE + _counts(a_TLK, num_experts), other_LE + _counts(b_TLK, num_experts)
    assert num_tokens, "agreement needs tokens"
    return Agreement(
        num_tokens=num_tokens,
        overlap_L=np.asarray(shared_L / (num_tokens * top_k)),
        exact_L=np.asarray(exact_L / num_tokens),
        top1_L=np.asarray(top1_L / num_tokens),
        chance_L=(np.asarray(load_LE, dtype=np.float64) * other_LE).sum(axis=1) / (num_tokens**2 * top_k),
    )


def shared_experts(first: Experts, second: Experts) -> Ints:
    """How many experts two choices (..., K) have in common, without their last axis; neither holds an expert twice."""
    both = np.sort(np.concatenate([first, second], axis=-1), axis=-1)
    return (both[..., 1:] == both[..., :-1]).sum(axis=-1)


def _counts(experts_TLK: Experts, num_experts: int) -> Ints:
    return np.stack(
        [np.bincount(experts_TLK[:, i].ravel(), minlength=num_experts) for i in range(experts_TLK.shape[1])]
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Repetition:
    """How often consecutive tokens repeat, per layer.

    first_L: share of pairs with the same first expert; any_L: share whose first ``choices`` experts meet at all;
    first_chance_L: first_L's value had the tokens been shuffled; any_chance: any_L's for even experts.
    """

    choices: int
    num_pairs: int
    first_L: Floats
    any_L: Floats
    first_chance_L: Floats
    any_chance: float


def repetition(
    experts_TLK: Experts, *, num_experts: int, choices: int = 2, starts: ArrayLike | None = None
) -> Repetition:
    """Repetition between consecutive tokens of a sequence; starts: the first tokens of sequences (None: one sequence).

    Mixtral 8x7B repeats its first expert on 14 to 28 % of pairs against 12.5 % by chance, and one of the first two on
    45 to 67 % against 46.4 % (arXiv 2401.04088, table 5).

    >>> repeated = repetition(np.array([[[0, 1]], [[0, 2]], [[1, 2]]]), num_experts=8)
    >>> repeated.first_L.tolist(), repeated.any_L.tolist(), round(repeated.any_chance, 3)
    ([0.5], [1.0], 0.464)
    """
    num_tokens, _, top_k = experts_TLK.shape
    assert 1 <= choices <= top_k, "choices counts among a token's experts"
    follows_T = np.ones(num_tokens, dtype=bool)
    follows_T[0] = False
    if starts is not None:
        follows_T[np.asarray(starts, dtype=np.int64)] = False
    later = np.flatnonzero(follows_T)
    assert later.size, "repetition needs two tokens of one sequence"
    head_TLK = experts_TLK[:, :, :choices]
    first_TL = experts_TLK[:, :, 0]
    shuffled_LE = _counts(experts_TLK[:, :, :1], num_experts) / num_tokens
    none_shared = float(np.prod([(num_experts - choices - i) / (num_experts - i) for i in range(choices)]))
    return Repetition(
        choices=choices,
        num_pairs=int(later.size),
        first_L=(first_TL[later] == first_TL[later - 1]).mean(axis=0),
        any_L=(shared_experts(head_TLK[later], head_TLK[later - 1]) > 0).mean(axis=0),
        first_chance_L=(shuffled_LE**2).sum(axis=1),
        any_chance=1.0 - max(none_shared, 0.0),
    )


def coactivation_EE(recorded: RecordedRouting, layer: int) -> Ints:
    """Tokens of one layer (its position, 0..L-1) that take both experts; the diagonal is the load.

    >>> from moesim.routing.recorded import recorded_from_array
    >>> coactivation_EE(recorded_from_array(np.array([[[0, 2]], [[2, 1]]]), num_experts=3), 0).tolist()
    [[1, 0, 1], [0, 1, 1], [1, 1, 2]]
    """
    assert 0 <= layer < recorded.num_layers, "layer is a position in the recording"
    total_EE = np.zeros((recorded.num_experts, recorded.num_experts), dtype=np.int64)
    for _, experts_TLK in recorded.chunks():
        total_EE += _together(experts_TLK[:, layer], recorded.num_experts)
    return total_EE


def coactivation_LEE(recorded: RecordedRouting) -> Ints:
    """coactivation_EE of every layer, in one pass over the recording: L * E * E numbers of 8 bytes."""
    total_LEE = np.zeros((recorded.num_layers, recorded.num_experts, recorded.num_experts), dtype=np.int64)
    for _, experts_TLK in recorded.chunks():
        for layer, total_EE in enumerate(total_LEE):
            total_EE += _together(experts_TLK[:, layer], recorded.num_experts)
    return total_LEE


def _together(experts_TK: Experts, num_experts: int) -> Ints:
    """(E, E) tokens with both experts: every ordered pair of a token's choices is one cell."""
    ids_TK = experts_TK.astype(np.int64)
    cells = (ids_TK[:, :, None] * num_experts + ids_TK[:, None, :]).ravel()
    return np.bincount(cells, minlength=num_experts**2).reshape(num_experts, num_experts)


def lift_EE(together_EE: ArrayLike, *, num_tokens: int) -> Floats:
    """How much oftener two experts meet than independence says: P(both) / (P(one) P(other)); the diagonal is NaN.

    Even routing without any preference gives E (k-1) / (k (E-1)), a little below 1, since k choices exclude each other.
    An expert without load has no lift: NaN.

    >>> float(lift_EE([[2, 1], [1, 2]], num_tokens=4)[0, 1])
    1.0
    """
    counts_EE = np.asarray(together_EE, dtype=np.float64)
    load_E = np.diagonal(counts_EE)
    product_EE = np.outer(load_E, load_E)
    ratio_EE = np.where(product_EE > 0, counts_EE * num_tokens / np.where(product_EE > 0, product_EE, 1.0), np.nan)
    np.fill_diagonal(ratio_EE, np.nan)
    return ratio_EE


def active_experts_L(experts_TLK: Experts, *, batch_tokens: int) -> Floats:
    """Mean number of distinct experts that batch_tokens consecutive tokens touch, per layer (a last short batch is left
    out): what a decode step reads of the weights."""
    num_batches = len(experts_TLK) // batch_tokens
    assert num_batches, "active experts need at least one whole batch"
    _, num_layers, top_k = experts_TLK.shape
    by_batch = experts_TLK[: num_batches * batch_tokens].reshape(num_batches, batch_tokens, num_layers, top_k)
    ids = np.sort(np.moveaxis(by_batch, 2, 1).reshape(num_batches, num_layers, -1), axis=-1)
    return np.asarray(1.0 + (ids[..., 1:] != ids[..., :-1]).sum(axis=-1).mean(axis=0))


@dataclass(frozen=True, kw_only=True, eq=False)
class Specialisation:
    """What an expert says about the domain of its tokens.

    load_DLE: assignments by domain; information_L: mutual information of domain and expert [nats]; chance_L: what
    unrelated ones would show by counting noise, (D-1)(E-1) / (2 assignments) over domains and experts in use;
    explained_fraction_L: information less chance over the domains' entropy, never below 0.
    """

    load_DLE: Ints
    information_L: Floats
    chance_L: Floats
    explained_fraction_L: Floats


def domain_load_DLE(experts_TLK: Experts, domain_T: ArrayLike, *, num_domains: int, num_experts: int) -> Ints:
    """Assignments of each expert by the domain of the token (code, prose, a language); chunks' results add."""
    domains = np.asarray(domain_T)
    assert domains.shape == experts_TLK.shape[:1], "every token has one domain"
    assert bool((domains >= 0).all() and (domains < num_domains).all()), "domains are numbered 0..D-1"
    load_DLE = np.empty((num_domains, experts_TLK.shape[1], num_experts), dtype=np.int64)
    for layer in range(experts_TLK.shape[1]):
        cells = domains[:, None].astype(np.int64) * num_experts + experts_TLK[:, layer]
        counts = np.bincount(cells.ravel(), minlength=num_domains * num_experts)
        load_DLE[:, layer] = counts.reshape(num_domains, num_experts)
    return load_DLE


def specialisation(load_DLE: ArrayLike) -> Specialisation:
    """Mutual information of domain and expert from a load by domain, per layer.

    One domain per expert explains everything; equal loads explain nothing. The chance level treats the k assignments of
    a token as independent (the first term of Miller and Madow's correction).

    >>> specialisation([[[5, 0]], [[0, 5]]]).information_L.round(3).tolist()
    [0.693]
    """
    counts_DLE = np.asarray(load_DLE)
    joint_LDE = np.moveaxis(counts_DLE, 1, 0).astype(np.float64)
    total_L = joint_LDE.sum(axis=(1, 2))
    assert bool((total_L > 0).all()), "every layer needs a load"
    domain_LD, expert_LE = joint_LDE.sum(axis=2), joint_LDE.sum(axis=1)
    domain_nats_L = entropy(domain_LD)
    information_L = domain_nats_L + entropy(expert_LE) - entropy(joint_LDE.reshape(len(total_L), -1))
    freedom_L = ((domain_LD > 0).sum(axis=1) - 1) * ((expert_LE > 0).sum(axis=1) - 1)
    chance_L = freedom_L / (2.0 * total_L)
    explained_L = np.maximum(information_L - chance_L, 0.0) / np.where(domain_nats_L > 0, domain_nats_L, np.inf)
    return Specialisation(
        load_DLE=counts_DLE,
        information_L=np.maximum(information_L, 0.0),
        chance_L=chance_L,
        explained_fraction_L=explained_L,
    )
