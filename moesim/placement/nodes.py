"""Nodes and moves: copies that cross nodes, layouts that avoid them under a limit on load, and the front of the three.

Legend: T tokens, K experts per token, L layers, E experts, R ranks, S slots, N nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.errors import check
from moesim.placement.eplb import eplb_layers
from moesim.placement.groups import eplb_groups_LNM, grouped_search, groups_divide, within_nodes
from moesim.placement.search import check_fits, checked_loads, least_max_load
from moesim.placement.slots import LayerPlacements, RankSlots
from moesim.placement.splits import Even, Split, share_by_sender_NEN

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]

LOAD_LIMITS = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # allowed excess over the best load found
_TOKENS_AT_ONCE = 4096
_OVERLOAD_PRICE = 100.0  # in cross-node copies per token: far above what any swap can gain


def coactivation_EE(choices_TK: NDArray[np.integer], num_experts: int) -> Floats:
    """(E, E) share of tokens that use both experts; the diagonal is zero.

    >>> coactivation_EE(np.array([[0, 1], [0, 2]]), 3)[0].tolist()
    [0.0, 0.5, 0.5]
    """
    used_TE = np.zeros((choices_TK.shape[0], num_experts), dtype=np.float32)
    np.put_along_axis(used_TE, choices_TK.astype(np.int64), 1.0, axis=1)
    together_EE = (used_TE.T @ used_TE).astype(np.float64) / choices_TK.shape[0]
    np.fill_diagonal(together_EE, 0.0)
    return together_EE


def cross_node_tokens(
    placed: LayerPlacements,
    choices_LTK: NDArray[np.integer],
    *,
    split: Split | None = None,
    load_LE: ArrayLike | None = None,
) -> Floats:
    """(L,) other nodes that a token's copies go to, deduplicated: expected over its replicas and its own node.

    choices_LTK: tokens' experts in each layer (drawn or recorded). A token of node n visits node m unless all of its
    experts' copies go elsewhere; replicas are chosen independently. Senders are alike over ranks. load_LE is needed for
    splits that look at it.
    """
    split = split or Even()
    load = np.ones((placed.num_layers, placed.num_experts)) if load_LE is None else np.asarray(load_LE)
    sent_N = np.bincount(placed.ranks.node_of_rank_R) / placed.ranks.num_ranks
    crossing_L = np.zeros(placed.num_layers)
    for layer in range(placed.num_layers):
        share_NEN = share_by_sender_NEN(placed, split, load, layer)
        same = share_NEN.strides[0] == 0  # one row for all senders
        for start in range(0, choices_LTK.shape[1], _TOKENS_AT_ONCE):
            chosen_TK = choices_LTK[layer, start : start + _TOKENS_AT_ONCE]
            for node in range(1 if same else placed.ranks.num_nodes):
                away_TKN = 1.0 - share_NEN[node][chosen_TK]
                visited_N = (1.0 - away_TKN.prod(axis=1)).sum(axis=0)
                remote = visited_N @ (1.0 - sent_N) if same else sent_N[node] * np.delete(visited_N, node).sum()
                crossing_L[layer] += float(remote)
    return crossing_L / choices_LTK.shape[1]


def fewer_crossings(
    start: LayerPlacements,
    load_LE: ArrayLike,
    coactivation_LEE: ArrayLike,
    *,
    max_mean_limit_L: ArrayLike,
    rng: np.random.Generator,
    previous: LayerPlacements | None = None,
    cross_weight: float = 1.0,
    move_weight: float = 0.0,
    num_steps: int = 100_000,
) -> LayerPlacements:
    """Swap slots of ``start`` so that experts used together share nodes and few slots move, below a limit on load.

    cross_weight prices a cross-node copy per token, move_weight a slot that was not on its rank in ``previous``. Pairs
    stand for tokens: copies saved are estimated as the pairs of a token's experts that meet on a node, so judge the
    result by `cross_node_tokens`. A layer whose start breaks the limit stays as it is when nothing below is found.
    """
    from moesim.placement import node_kernels

    load, ranks = checked_loads(load_LE), start.ranks
    coactivation = np.asarray(coactivation_LEE, dtype=np.float64)
    expected = (start.num_layers, start.num_experts, start.num_experts)
    check(coactivation.shape == expected, "placement", "coactivation", f"must be {expected}", coactivation.shape)
    limit_L = np.broadcast_to(np.asarray(max_mean_limit_L, dtype=np.float64), (start.num_layers,))
    held_LRE = np.zeros((start.num_layers, ranks.num_ranks, start.num_experts), dtype=bool)
    if previous is not None:
        held_LRE = previous.held_LRE > 0
    expert_LS = start.physical_to_logical_LS.copy()
    weights_3 = np.array([cross_weight, move_weight if previous is not None else 0.0, _OVERLOAD_PRICE])
    on_LEN = start.share_LER @ np.eye(ranks.num_nodes)[ranks.node_of_rank_R]
    for layer in range(start.num_layers):
        node_kernels.trade(
            load[layer],
            coactivation[layer],
            coactivation[layer] @ on_LEN[layer],
            expert_LS[layer],
            ranks.rank_of_slot_S,
            ranks.node_of_rank_R,
            1.0 / ranks.speed_R,
            held_LRE[layer],
            weights_3,
            limit_L[layer] * load[layer].sum() / ranks.speed_R.sum() * (1.0 + 1e-9),
            num_steps,
            rng.integers(0, 2**64, size=1, dtype=np.uint64),
        )
    return replace(start, physical_to_logical_LS=expert_LS)


def renumbered(placed: LayerPlacements, previous: LayerPlacements) -> LayerPlacements:
    """The same layout with nodes, and alike ranks within a node, renumbered to keep what ``previous`` holds in place.

    Loads by rank and copies across nodes stay what they were, up to the numbering. Greedy matching, then exchanges: few
    moves, not provably the fewest.
    """
    ranks, first_R1 = placed.ranks, placed.ranks.first_R1
    new_LRE, old_LRE = placed.held_LRE > 0, previous.held_LRE > 0
    members = [np.flatnonzero(ranks.node_of_rank_R == node) for node in range(ranks.num_nodes)]
    alike = len({tuple(zip(ranks.num_slots_R[m], ranks.speed_R[m], strict=True)) for m in members}) == 1
    kind_R = np.unique(np.stack([ranks.num_slots_R, ranks.speed_R]), axis=1, return_inverse=True)[1].reshape(-1)
    expert_LS = np.empty_like(placed.physical_to_logical_LS)
    for layer in range(placed.num_layers):
        new_NE = np.stack([new_LRE[layer, m].any(axis=0) for m in members])
        old_NE = np.stack([old_LRE[layer, m].any(axis=0) for m in members])
        shared_NN = old_NE.astype(np.int64) @ new_NE.T.astype(np.int64)
        source_N = _matched(shared_NN) if alike else np.arange(ranks.num_nodes)
        for node, source in enumerate(source_N.tolist()):
            to_ranks, from_ranks = members[node], members[source]
            shared = old_LRE[layer, to_ranks].astype(np.int64) @ new_LRE[layer, from_ranks].T.astype(np.int64)
            unlike = kind_R[to_ranks][:, None] != kind_R[from_ranks][None, :]
            taken = _matched(np.where(unlike, -1 - shared.max(initial=0) * shared.shape[0], shared))
            for to_rank, from_rank in zip(to_ranks.tolist(), from_ranks[taken].tolist(), strict=True):
                held = placed.physical_to_logical_LS[layer, first_R1[from_rank] : first_R1[from_rank + 1]]
                expert_LS[layer, first_R1[to_rank] : first_R1[to_rank + 1]] = held
    return replace(placed, physical_to_logical_LS=expert_LS)


def _matched(value_XX: Whole) -> Whole:
    """Column of each row, one each: largest values first, then exchanges of two while they gain."""
    size = value_XX.shape[0]
    taken = np.full(size, -1)
    free = np.ones(size, dtype=bool)
    for cell in np.argsort(-value_XX, axis=None, kind="stable").tolist():
        row, column = divmod(cell, size)
        if taken[row] < 0 and free[column]:
            taken[row], free[column] = column, False
    while True:
        now_X = value_XX[np.arange(size), taken]
        crossed_XX = value_XX[:, taken]  # row x takes the column of row y
        gain_XX = crossed_XX + crossed_XX.T - now_X[:, None] - now_X[None, :]
        x, y = divmod(int(np.argmax(gain_XX)), size)
        if gain_XX[x, y] <= 0:
            return taken
        taken[x], taken[y] = taken[y], taken[x]


@dataclass(frozen=True, kw_only=True, eq=False)
class FrontPoint:
    """One layout of the front: worst layer's max/mean, cross-node copies per token (mean of layers), slots moved."""

    name: str
    max_mean: float
    cross_node_tokens: float
    moved_slots: int
    placed: LayerPlacements


def measured(
    name: str,
    placed: LayerPlacements,
    load_LE: ArrayLike,
    choices_LTK: NDArray[np.integer],
    previous: LayerPlacements | None,
    split: Split | None = None,
) -> FrontPoint:
    """A layout with its three prices."""
    from moesim.placement.price import moved_slots

    return FrontPoint(
        name=name,
        max_mean=float(placed.max_mean(load_LE).max()),
        cross_node_tokens=float(cross_node_tokens(placed, choices_LTK, split=split, load_LE=load_LE).mean()),
        moved_slots=int(moved_slots(previous, placed).sum()) if previous is not None else 0,
        placed=placed,
    )


def undominated(points: Sequence[FrontPoint]) -> list[FrontPoint]:
    """The points that no other beats or ties in all three prices while beating it in one; least load first."""

    def prices(point: FrontPoint) -> tuple[float, float, int]:
        return point.max_mean, point.cross_node_tokens, point.moved_slots

    kept: list[FrontPoint] = []
    for point in sorted(points, key=prices):
        if not any(all(a <= b for a, b in zip(prices(other), prices(point), strict=True)) for other in kept):
            kept.append(point)
    return kept


def pareto_front(
    load_LE: ArrayLike,
    choices_LTK: NDArray[np.integer],
    ranks: RankSlots,
    *,
    rng: np.random.Generator,
    previous: LayerPlacements | None = None,
    num_groups: int = 1,
    starts: Sequence[LayerPlacements] = (),
    load_limits: Sequence[float] = LOAD_LIMITS,
    move_weights: Sequence[float] = (0.0, 0.003, 0.01, 0.03),
    num_steps: int = 100_000,
) -> list[FrontPoint]:
    """Load against cross-node copies against moves: for each limit on load and price of a move, the best trade found.

    Starts are the load search's own layout, those given and ``previous``, and, where nodes divide the router's groups,
    EPLB's hierarchical layout and its groups searched node by node: nothing of EPLB's is better than the whole front.
    Each limit is an excess over the load search's max/mean. Every point is measured on choices_LTK, then the dominated
    ones are dropped.
    """
    load = checked_loads(load_LE)
    check_fits(load.shape[1], ranks)
    coactivation = np.stack([coactivation_EE(chosen_TK, load.shape[1]) for chosen_TK in choices_LTK])
    best = least_max_load(load, ranks, rng=rng)
    if previous is not None:
        best = renumbered(best, previous)
    all_starts = [best, *starts, *([previous] if previous is not None else [])]
    if ranks.num_nodes > 1 and groups_divide(load.shape[1], num_groups, ranks):
        all_starts += _by_group(load, ranks, num_groups, rng, previous)
    points = [measured(f"start {i}", start, load, choices_LTK, previous) for i, start in enumerate(all_starts)]
    for limit in load_limits:
        for move_weight in move_weights if previous is not None else (0.0,):
            for i, start in enumerate(all_starts):
                placed = fewer_crossings(
                    start,
                    load,
                    coactivation,
                    max_mean_limit_L=best.max_mean(load) * (1.0 + limit),
                    rng=rng,
                    previous=previous,
                    move_weight=move_weight,
                    num_steps=num_steps,
                )
                name = f"start {i}, load +{limit:.1%}, move {move_weight:g}"
                points.append(measured(name, placed, load, choices_LTK, previous))
    return undominated(points)


def _by_group(
    load_LE: Floats, ranks: RankSlots, num_groups: int, rng: np.random.Generator, previous: LayerPlacements | None
) -> list[LayerPlacements]:
    """EPLB's hierarchical layout as it comes, and layouts on the same nodes, or by other groups, with less load."""
    nodes = ranks.num_nodes
    expert_LS = eplb_layers(load_LE, ranks.num_slots, ranks.num_ranks, num_nodes=nodes, num_groups=num_groups)
    eplb = LayerPlacements(physical_to_logical_LS=expert_LS, num_experts=load_LE.shape[1], ranks=ranks)
    evened = within_nodes(load_LE, eplb_groups_LNM(load_LE, num_groups, nodes), ranks, rng=rng)
    searched = grouped_search(load_LE, ranks, num_groups, rng=rng)
    if previous is None:
        return [eplb, evened, searched]
    return [eplb, *(renumbered(placed, previous) for placed in (eplb, evened, searched))]


def least_objective(
    start: LayerPlacements,
    objective: Callable[[LayerPlacements], float],
    *,
    rng: np.random.Generator,
    num_trials: int = 1000,
) -> LayerPlacements:
    """Swap slots at random as long as ``objective`` (lower is better; say a simulated layer time) does not rise."""
    best, best_value = start, objective(start)
    rank_S = start.ranks.rank_of_slot_S
    for _ in range(num_trials):
        layer = int(rng.integers(start.num_layers))
        i, j = rng.integers(start.ranks.num_slots, size=2).tolist()
        if rank_S[i] == rank_S[j]:
            continue
        expert_LS = best.physical_to_logical_LS.copy()
        expert_LS[layer, [i, j]] = expert_LS[layer, [j, i]]
        trial = replace(best, physical_to_logical_LS=expert_LS)
        value = objective(trial)
        if value <= best_value:
            best, best_value = trial, value
    return best
