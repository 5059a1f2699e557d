"""Which assignments a limit drops, token by token: a plain oracle, the same in arrays, and a report of what was lost.

Legend: T tokens of an expert-parallel group (source rank after source rank), K experts per token, E experts, R ranks, L
layers, D domains, M preferences.

Assignments stand in line for their expert (or rank) in their bin: by the token's place, by falling router score, or at
random; the first ``places`` stay. Re-routing then runs in rounds: every assignment without a place tries the next
expert on its token's list, in the same order, until all are placed or the lists end (No-Token-Left-Behind, Switch,
arXiv 2101.03961 appendix B).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.describe.model import Router
from moesim.describe.workload import Capacity, DropPolicy, Lognormal, Routing
from moesim.errors import check
from moesim.routing.capacity import Limit, expected_drop_L, limit_of
from moesim.routing.popularity import Popularities, popularity_LE
from moesim.routing.routers import draw_expert_choice, draw_preferences, draw_token_sequence
from moesim.routing.sampler import Choices, draw_choices

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def keep_token_by_token(
    choices_TK: Choices,
    limit: Limit | None,
    policy: DropPolicy,
    *,
    score_TK: Floats | None = None,
    order_TM: Choices | None = None,
    rank_of_E: Ints | None = None,
    rng: np.random.Generator | None = None,
) -> Choices:
    """The oracle: served_TK, the expert that serves each choice, -1 where it is dropped (or was none: -1 in choices).

    score_TK: router scores, for ``probability``; order_TM: each token's experts, best first, for ``reroute`` (its
    first K are the choices); rank_of_E: for a limit of ranks; rng: for ``random``.
    """
    served_TK = choices_TK.copy()
    if limit is None:
        return served_TK
    num_tokens, top_k = choices_TK.shape
    taken: dict[tuple[int, int], int] = {}

    def takes(token: int, expert: int) -> bool:
        target = expert if limit.of == "expert" else int(_ranks(rank_of_E)[expert])
        place = (token // limit.bin_tokens, target)
        if taken.get(place, 0) >= limit.places:
            return False
        taken[place] = taken.get(place, 0) + 1
        return True

    line = [(token, slot) for token in range(num_tokens) for slot in range(top_k) if choices_TK[token, slot] >= 0]
    if limit.slot_major:
        line.sort(key=lambda at: (at[0] // limit.bin_tokens, at[1], at[0]))
    if policy == "probability":
        scores = _given(score_TK)
        line.sort(key=lambda at: -scores[at])
    elif policy == "random":
        assert rng is not None, "dropping at random needs a generator"
        line = [line[i] for i in np.argsort(rng.random(len(line)), kind="stable")]
    homeless = [(token, slot) for token, slot in line if not takes(token, int(choices_TK[token, slot]))]
    for token, slot in homeless:
        served_TK[token, slot] = -1
    if policy != "reroute":
        return served_TK
    next_T = [top_k] * num_tokens
    assert order_TM is not None, "re-routing needs the tokens' further preferences"
    while homeless and any(next_T[token] < order_TM.shape[1] for token, _ in homeless):
        still = []
        for token, slot in homeless:
            tried = order_TM[token, next_T[token]] if next_T[token] < order_TM.shape[1] else -1
            next_T[token] += 1
            if tried >= 0 and takes(token, int(tried)):
                served_TK[token, slot] = tried
            else:
                still.append((token, slot))
        homeless = still
    return served_TK


def keep_choices(
    choices_TK: Choices,
    limit: Limit | None,
    policy: DropPolicy,
    *,
    score_TK: Floats | None = None,
    order_TM: Choices | None = None,
    rank_of_E: Ints | None = None,
    rng: np.random.Generator | None = None,
) -> Choices:
    """As keep_token_by_token, in arrays: a few million assignments a second.

    >>> one_place = Limit(places=1, bin_tokens=3, num_bins=1)
    >>> keep_choices(np.array([[0], [0], [1]], dtype=np.int16), one_place, "position").ravel().tolist()
    [0, -1, 1]
    """
    served_TK = choices_TK.copy()
    if limit is None:
        return served_TK
    num_tokens, top_k = choices_TK.shape
    token_I, slot_I = (index.ravel() for index in np.indices(choices_TK.shape))
    if limit.slot_major:
        line = np.lexsort((token_I, slot_I, token_I // limit.bin_tokens))
        token_I, slot_I = token_I[line], slot_I[line]
    real = choices_TK[token_I, slot_I] >= 0
    token_I, slot_I = token_I[real], slot_I[real]
    if policy == "probability":
        line = np.argsort(-_given(score_TK)[token_I, slot_I], kind="stable")
    elif policy == "random":
        assert rng is not None, "dropping at random needs a generator"
        line = np.argsort(rng.random(token_I.size), kind="stable")
    else:
        line = np.arange(token_I.size)
    token_I, slot_I = token_I[line], slot_I[line]
    target_E = np.arange(int(choices_TK.max(initial=0)) + 1) if limit.of == "expert" else _ranks(rank_of_E)
    if order_TM is not None and limit.of == "expert":
        target_E = np.arange(int(max(order_TM.max(initial=0), choices_TK.max(initial=0))) + 1)
    num_targets = int(target_E.max()) + 1
    taken = np.zeros((num_tokens // limit.bin_tokens + 1) * num_targets, dtype=np.int64)

    def stays(tokens: Ints, experts: NDArray[np.integer]) -> NDArray[np.bool_]:
        place_I = tokens // limit.bin_tokens * num_targets + target_E[experts]
        by_place = np.argsort(place_I, kind="stable")
        sizes = np.bincount(place_I, minlength=taken.size)
        first = np.cumsum(sizes) - sizes
        position = np.empty(place_I.size, dtype=np.int64)
        position[by_place] = np.arange(place_I.size) - first[place_I[by_place]]
        good = position + taken[place_I] < limit.places
        taken[:] = np.minimum(taken + sizes, limit.places)
        return good

    homeless = ~stays(token_I, choices_TK[token_I, slot_I])
    token_I, slot_I = token_I[homeless], slot_I[homeless]
    served_TK[token_I, slot_I] = -1
    if policy != "reroute":
        return served_TK
    assert order_TM is not None, "re-routing needs the tokens' further preferences"
    next_T = np.full(num_tokens, top_k)
    while token_I.size:
        at_I = next_T[token_I] + _repeat_number(token_I)
        next_T += np.bincount(token_I, minlength=num_tokens)
        going = at_I < order_TM.shape[1]
        if not going.any():
            break
        tried_I = np.full(token_I.size, -1)
        tried_I[going] = order_TM[token_I[going], at_I[going]]
        tries = tried_I >= 0
        good = np.zeros(token_I.size, dtype=bool)
        good[tries] = stays(token_I[tries], tried_I[tries])
        served_TK[token_I[good], slot_I[good]] = tried_I[good]
        token_I, slot_I = token_I[~good], slot_I[~good]
    return served_TK


@dataclass(frozen=True, kw_only=True, eq=False)
class DropReport:
    """What one micro-batch of an expert-parallel group lost, every token drawn.

    assigned_LE, kept_LE: assignments chosen, and served (by whatever expert, where re-routed). lost_LE: assignments to
    each expert that nobody served. tokens_hurt_L, tokens_lost_L: tokens that lost any, and all, of their experts.
    places: rows that full buffers of one layer would hold, None without a limit. rank_of_E: where experts are.
    """

    num_tokens: int
    assigned_LE: Ints
    kept_LE: Ints
    lost_LE: Ints
    tokens_hurt_L: Ints
    tokens_lost_L: Ints
    places: int | None
    rank_of_E: Ints
    domain_names: tuple[str, ...] = ()
    drop_fraction_LD: Floats | None = None

    @property
    def drop_fraction(self) -> float:
        return float(self.lost_LE.sum() / self.assigned_LE.sum())

    @property
    def drop_fraction_L(self) -> Floats:
        return self.lost_LE.sum(axis=1) / self.assigned_LE.sum(axis=1)

    @property
    def drop_fraction_LE(self) -> Floats:
        """Of the assignments that chose each expert; 0 where none did."""
        return self.lost_LE / np.maximum(self.assigned_LE, 1)

    @property
    def drop_fraction_LR(self) -> Floats:
        member_ER = np.eye(int(self.rank_of_E.max()) + 1)[self.rank_of_E]
        return (self.lost_LE @ member_ER) / np.maximum(self.assigned_LE @ member_ER, 1)

    @property
    def padding_fraction_L(self) -> Floats:
        """Empty share of full buffers; 0 without a limit."""
        if self.places is None:
            return np.zeros(self.kept_LE.shape[0])
        return 1.0 - self.kept_LE.sum(axis=1) / self.places


def sample_drops(
    popularities: Popularities,
    routing: Routing,
    *,
    tokens_per_rank: int,
    num_source_ranks: int,
    rng: np.random.Generator,
    rank_of_E: Ints | None = None,
) -> DropReport:
    """Draw every token of one micro-batch of an expert-parallel group, layer by layer, and drop by the policy.

    Domains come in runs of their run_tokens, neighbours copy first experts where the popularity says so. rank_of_E:
    where experts are (None: contiguous over the source ranks where these divide the experts, else all on one).
    """
    experts, router = popularities.num_experts, popularities.router
    if rank_of_E is None:
        ranks = num_source_ranks if experts % num_source_ranks == 0 else 1
        rank_of_E = np.arange(experts) // (experts // ranks)
    num_tokens = tokens_per_rank * num_source_ranks
    limit = limit_of(
        routing.capacity,
        capacity_factor=routing.capacity_factor,
        tokens_per_rank=tokens_per_rank,
        num_source_ranks=num_source_ranks,
        num_experts=experts,
        top_k=router.top_k,
        pad=routing.pad_to_capacity,
    )
    domain_T = _domains_of_tokens(popularities, num_tokens, rng)
    num_domains = int(domain_T.max(initial=0)) + 1
    counts = {name: np.zeros((popularities.num_layers, experts), dtype=np.int64) for name in ("chosen", "kept", "lost")}
    hurt_L, lost_L = (np.zeros(popularities.num_layers, dtype=np.int64) for _ in range(2))
    drop_LD = np.zeros((popularities.num_layers, num_domains))
    for layer in range(popularities.num_layers):
        choices_TK, score_TK, order_TM = _drawn_layer(popularities, routing, layer, domain_T, rng)
        # Zero-compute experts have no buffer to overflow.
        choices_TK = np.where(choices_TK < experts, choices_TK, np.int16(-1))
        order_TM = None if order_TM is None else np.where(order_TM < experts, order_TM, np.int16(-1))
        served_TK = keep_choices(
            choices_TK,
            limit,
            routing.drop_policy,
            score_TK=score_TK,
            order_TM=order_TM,
            rank_of_E=rank_of_E,
            rng=rng,
        )
        chosen, kept = choices_TK >= 0, served_TK >= 0
        gone = chosen & ~kept
        counts["chosen"][layer] = np.bincount(choices_TK[chosen], minlength=experts)
        counts["kept"][layer] = np.bincount(served_TK[kept], minlength=experts)
        counts["lost"][layer] = np.bincount(choices_TK[gone], minlength=experts)
        hurt_L[layer] = gone.any(axis=1).sum()
        lost_L[layer] = (chosen.any(axis=1) & ~kept.any(axis=1)).sum()
        per_domain = np.bincount(domain_T, weights=chosen.sum(axis=1), minlength=num_domains)
        drop_LD[layer] = np.bincount(domain_T, weights=gone.sum(axis=1), minlength=num_domains)
        drop_LD[layer] /= np.maximum(per_domain, 1.0)
    places = None
    if limit is not None:
        places = limit.total_places * (experts if limit.of == "expert" else int(rank_of_E.max()) + 1)
    parts = popularities.domains
    return DropReport(
        num_tokens=num_tokens,
        assigned_LE=counts["chosen"],
        kept_LE=counts["kept"],
        lost_LE=counts["lost"],
        tokens_hurt_L=hurt_L,
        tokens_lost_L=lost_L,
        places=places,
        rank_of_E=rank_of_E,
        domain_names=parts.names if parts is not None else (),
        drop_fraction_LD=drop_LD if parts is not None else None,
    )


def drop_by_domain(popularities: Popularities, drop_LE: Floats) -> Floats:
    """(L, D) dropped share of each domain's assignments, given that of each expert's: no policy looks at the domain."""
    parts = popularities.domains
    check(parts is not None, "routing.popularity", "kind", "must be domains to tell them apart", "no domains")
    assert parts is not None
    lost_DL = (parts.inclusion_DLE * drop_LE).sum(axis=-1) / parts.inclusion_DLE.sum(axis=-1)
    return lost_DL.T


def drop_surface(
    ginis: Sequence[float],
    capacity_factors: Sequence[float],
    capacity: Capacity,
    *,
    num_layers: int,
    num_experts: int,
    router: Router,
    tokens_per_rank: int,
    num_source_ranks: int,
    seed: int,
    rank_of_E: Ints | None = None,
) -> Floats:
    """drop_GF: expected dropped share over skew (Gini of a lognormal popularity) and capacity factor, layers' mean.

    The same experts are popular at every Gini, so that a row differs from the next by its skew alone.

    >>> from moesim.describe.workload import Megatron
    >>> drop_surface([0.0, 0.4], [1.0, 2.0], Megatron(), num_layers=2, num_experts=16, router=Router(top_k=2),
    ...              tokens_per_rank=512, num_source_ranks=4, seed=0).round(2)
    array([[0.05, 0.  ],
           [0.3 , 0.09]])
    """
    drop_GF = np.empty((len(ginis), len(capacity_factors)))
    for row, skew in zip(drop_GF, ginis, strict=True):
        drawn = popularity_LE(
            Lognormal(gini=skew),
            num_layers=num_layers,
            num_experts=num_experts,
            router=router,
            rng=np.random.default_rng(seed),
        )
        for at, factor in enumerate(capacity_factors):
            limit = limit_of(
                capacity,
                capacity_factor=factor,
                tokens_per_rank=tokens_per_rank,
                num_source_ranks=num_source_ranks,
                num_experts=num_experts,
                top_k=router.top_k,
            )
            row[at] = expected_drop_L(drawn.inclusion_LE, limit, rank_of_E).mean()
    return drop_GF


def _drawn_layer(
    popularities: Popularities, routing: Routing, layer: int, domain_T: Ints, rng: np.random.Generator
) -> tuple[Choices, Floats | None, Choices | None]:
    """(choices, scores, preferences) of the tokens of one layer; the last two only where the policy asks for them."""
    router, parts = popularities.router, popularities.domains
    weights_DE = popularities.log_weights_LE[None, layer] if parts is None else parts.log_weights_DLE[:, layer]
    if parts is None and popularities.zero_log_weights_LZ is not None:
        weights_DE = np.concatenate([weights_DE, popularities.zero_log_weights_LZ[None, layer]], axis=1)
    if router.choice == "expert_choice":
        rule = "must be null where experts choose tokens: they take no more than they have room for"
        check(routing.capacity_factor is None, "routing", "capacity_factor", rule, routing.capacity_factor)
        return draw_expert_choice(weights_DE[0], router, domain_T.size, rng), None, None
    needs_order = routing.drop_policy == "reroute"
    repeat = 0.0 if popularities.repeat_L is None else float(popularities.repeat_L[layer])
    width = weights_DE.shape[1] if needs_order else router.top_k
    order_TM = np.full((domain_T.size, width), -1, dtype=np.int16)
    score_TK = np.zeros((domain_T.size, router.top_k)) if routing.drop_policy == "probability" else None
    for domain, weights_E in enumerate(weights_DE):
        here = np.nonzero(domain_T == domain)[0]
        if score_TK is not None or needs_order:
            order_TM[here], scores = draw_preferences(weights_E, router, here.size, rng, num_preferences=width)
            if score_TK is not None:
                score_TK[here] = scores[:, : router.top_k]
        elif repeat:
            order_TM[here] = draw_token_sequence(weights_E, router, here.size, repeat, rng)
        else:
            order_TM[here] = draw_choices(weights_E, router, here.size, rng)
    return order_TM[:, : router.top_k], score_TK, order_TM if needs_order else None


def _domains_of_tokens(popularities: Popularities, num_tokens: int, rng: np.random.Generator) -> Ints:
    """(T,) each token's domain, run after run."""
    parts = popularities.domains
    if parts is None:
        return np.zeros(num_tokens, dtype=np.int64)
    num_runs = -(-num_tokens // parts.run_tokens)
    runs = rng.choice(parts.share_D.size, size=num_runs, p=parts.share_D)
    return np.repeat(runs, parts.run_tokens)[:num_tokens]


def _repeat_number(token_I: Ints) -> Ints:
    """How many entries before each one name the same token."""
    by_token = np.argsort(token_I, kind="stable")
    sizes = np.bincount(token_I)
    first = np.cumsum(sizes) - sizes
    number = np.empty(token_I.size, dtype=np.int64)
    number[by_token] = np.arange(token_I.size) - first[token_I[by_token]]
    return number


def _given(score_TK: Floats | None) -> Floats:
    assert score_TK is not None, "dropping by probability needs the router's scores"
    return score_TK


def _ranks(rank_of_E: Ints | None) -> Ints:
    assert rank_of_E is not None, "a limit of ranks needs to know where experts are"
    return rank_of_E
