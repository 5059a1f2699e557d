"""Routers that are no race of a single token's experts: experts that choose tokens, and tokens that copy a neighbour.

Legend: T tokens, K choices per token, E experts, C tokens that an expert takes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.describe.model import Router
from moesim.errors import check
from moesim.routing.sampler import Choices, Engine, draw_choices, perturbation_scale

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def expert_choice_tokens(
    log_weights_E: Floats, router: Router, num_tokens: int, rng: np.random.Generator
) -> tuple[Ints, Floats]:
    """(tokens_EC, score_TE): the C = floor(T*k/E) tokens that each expert takes, best first, and all router scores.

    A token's logits are log popularity plus Gumbel noise, its scores their softmax; each expert takes the tokens that
    score highest with it, at least one. Loads are even whatever the popularity. Zhou et al., Mixture-of-Experts with
    Expert Choice Routing, arXiv 2202.09368 section 3.2 (capacity n*c/e with c = k).

    >>> tokens_EC, _ = expert_choice_tokens(np.zeros(4), Router(top_k=2, choice="expert_choice"), 8,
    ...                                     np.random.default_rng(0))
    >>> tokens_EC.shape
    (4, 4)
    """
    num_experts = log_weights_E.size
    taken = max(1, num_tokens * router.top_k // num_experts)
    logit_TE = log_weights_E + rng.gumbel(size=(num_tokens, num_experts)) * perturbation_scale(router)
    score_TE = np.exp(logit_TE - logit_TE.max(axis=1, keepdims=True))
    score_TE /= score_TE.sum(axis=1, keepdims=True)
    return np.argsort(-score_TE, axis=0, kind="stable")[:taken].T.copy(), score_TE


def draw_expert_choice(log_weights_E: Floats, router: Router, num_tokens: int, rng: np.random.Generator) -> Choices:
    """The experts of each token where experts choose, by falling score; -1 fills rows of tokens that fewer chose.

    Rows are as wide as the most chosen token needs; a token that nobody chose is a row of -1.
    """
    tokens_EC, score_TE = expert_choice_tokens(log_weights_E, router, num_tokens, rng)
    chosen_TE = np.zeros(score_TE.shape, dtype=bool)
    np.put_along_axis(chosen_TE, tokens_EC.T, True, axis=0)
    width = max(int(chosen_TE.sum(axis=1).max()), 1)
    ranked_TK = np.argsort(np.where(chosen_TE, -score_TE, np.inf), axis=1, kind="stable")[:, :width]
    return np.where(np.take_along_axis(chosen_TE, ranked_TK, axis=1), ranked_TK, -1).astype(np.int16)


def draw_token_sequence(
    log_weights_E: Floats,
    router: Router,
    num_tokens: int,
    copy_probability: float,
    rng: np.random.Generator,
    *,
    engine: Engine = "numba",
) -> Choices:
    """choices_TK of consecutive tokens, each of which copies its predecessor's first expert with this probability.

    A copying token's other experts are drawn as they go with that first one (from a token of the same draw that has
    it), so every token by itself follows the router's law; only neighbours are alike. The first expert then repeats
    with probability c + (1 - c) S, S the chance of independent tokens; counts keep their means, and the variance of
    first choices grows by (1 + c)/(1 - c).

    >>> drawn = draw_token_sequence(np.zeros(8), Router(top_k=2), 50_000, 0.1, np.random.default_rng(0))
    >>> bool(abs((drawn[1:, 0] == drawn[:-1, 0]).mean() - (0.1 + 0.9 / 8)) < 0.01)
    True
    """
    check(0.0 <= copy_probability < 1.0, "router", "copy_probability", "must lie in 0..1", copy_probability)
    fresh_TK = draw_choices(log_weights_E, router, num_tokens, rng, engine=engine)
    copies_T = rng.random(num_tokens) < copy_probability
    if not copies_T.any():
        return fresh_TK
    run_start_T = np.maximum.accumulate(np.where(copies_T, 0, np.arange(num_tokens)))
    first_T = fresh_TK[run_start_T, 0].astype(np.int64)
    by_first_T = np.argsort(fresh_TK[:, 0], kind="stable")
    size_E = np.bincount(fresh_TK[:, 0], minlength=log_weights_E.size)
    start_E = np.cumsum(size_E) - size_E
    wanted = first_T[copies_T]
    picked = by_first_T[start_E[wanted] + (rng.random(wanted.size) * size_E[wanted]).astype(np.int64)]
    drawn_TK = fresh_TK.copy()
    drawn_TK[copies_T] = fresh_TK[picked]
    return drawn_TK


def draw_preferences(
    log_weights_E: Floats,
    router: Router,
    num_tokens: int,
    rng: np.random.Generator,
    *,
    num_preferences: int,
    chunk_tokens: int = 8192,
) -> tuple[Choices, Floats]:
    """(order_TM, score_TM): the experts each token would take, best first, and its router's scores of them.

    A token's logits are log popularity plus Gumbel noise, so that its first k are distributed as draw_choices draws
    them. Scores: softmax over all experts or sigmoid, over their sum in the first k where the router normalises. Groups
    that a group-limited token may not use end its list with -1. All experts of all tokens are perturbed: about a
    twentieth of the sampler's speed.

    >>> order_TM, score_TM = draw_preferences(np.zeros(8), Router(top_k=2), 3, np.random.default_rng(0),
    ...                                       num_preferences=4)
    >>> bool((np.diff(score_TM, axis=1) <= 0).all() and abs(score_TM[:, :2].sum() - 3) < 1e-9)
    True
    """
    num_experts = log_weights_E.size
    assert router.top_k <= num_preferences <= num_experts, "a token prefers each expert once"
    order_TM = np.empty((num_tokens, num_preferences), dtype=np.int16)
    score_TM = np.empty((num_tokens, num_preferences))
    for first in range(0, num_tokens, chunk_tokens):
        part = slice(first, min(first + chunk_tokens, num_tokens))
        noise_TE = rng.gumbel(size=(part.stop - first, num_experts)) * perturbation_scale(router)
        logit_TE = log_weights_E + noise_TE
        allowed_TE = np.ones(logit_TE.shape, dtype=bool)
        if router.top_groups < router.num_groups:
            logit_TNS = logit_TE.reshape(len(logit_TE), router.num_groups, -1)
            best = 2 if router.group_score == "top2_sum" else 1
            group_TN = np.sort(logit_TNS, axis=2)[:, :, -best:].sum(axis=2)
            outside_TN = np.argsort(-group_TN, axis=1)[:, router.top_groups :]
            allowed_TNS = np.ones(logit_TNS.shape, dtype=bool)
            np.put_along_axis(allowed_TNS, outside_TN[:, :, None], False, axis=1)
            allowed_TE = allowed_TNS.reshape(logit_TE.shape)
        if router.scoring == "softmax":
            score_TE = np.exp(logit_TE - logit_TE.max(axis=1, keepdims=True))
            score_TE /= score_TE.sum(axis=1, keepdims=True)
        else:
            score_TE = 1.0 / (1.0 + np.exp(-logit_TE))
        ranked = np.argsort(np.where(allowed_TE, -logit_TE, np.inf), axis=1, kind="stable")[:, :num_preferences]
        usable = np.take_along_axis(allowed_TE, ranked, axis=1)
        chosen = np.where(usable, np.take_along_axis(score_TE, ranked, axis=1), 0.0)
        if router.normalise_top_k:
            chosen /= chosen[:, : router.top_k].sum(axis=1, keepdims=True)
        order_TM[part], score_TM[part] = np.where(usable, ranked, -1), chosen
    if router.choice == "random_second":
        gates_T2 = score_TM[:, :2] / score_TM[:, :2].sum(axis=1, keepdims=True)
        falls_T = rng.random(num_tokens) >= 2.0 * gates_T2[:, 1]
        order_TM[falls_T, 1] = -1
    return order_TM, score_TM
