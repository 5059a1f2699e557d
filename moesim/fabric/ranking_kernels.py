"""The exact solver's clock for dense sets: links stay ranked by the level at which they settle their classes.

Legend: C classes (messages that move at one speed), L links, P links of a route (padded with -1), n messages of the
component, E pairs of a link and a class on it. Imported only by ``sharing_kernels``.

A class is bound by the link of its route that is ranked first. ``bound_LL[l, m]`` messages on link l are bound by m, so
a link's level is one row's dot product with the levels of links before it: what they leave of its rate, over the
messages that they leave. From one event to the next few links change places; only what stands behind the first change
is ranked anew. A class moves with the link that binds it, so an event costs nothing per class.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from moesim.fabric.filling_kernels import FREE, links_of, push, sift_down

SAME_TIME = 1e-12  # ends that differ by this share of the clock are one event: rounding, not waiting
_ALIKE = 1.0 + 1e-12  # levels as near as this keep their order
_FULL = 1e-12  # a link overfilled by less than this share is just full: rounding


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "nsz", "contract"})
def _settled(link, low, high, bound_LL, level_L, is_settled_L):  # type: ignore[no-untyped-def]
    """(rate taken, messages settled) on a link by the links from low to high that are settled."""
    taken = settled = 0.0
    for m in range(low, high):
        taken += bound_LL[link, m] * level_L[m]
        settled += bound_LL[link, m] * is_settled_L[m]
    return taken, settled


@njit(nogil=True, cache=True, error_model="numpy")
def _level(room, free, rate):  # type: ignore[no-untyped-def]
    """A link's level: FREE where it settles nothing, -1 where links before it have let too much through."""
    if free > 0.5:
        return room / free
    return FREE if room >= -_FULL * rate else -1.0


@njit(nogil=True, cache=True, error_model="numpy")
def _count(c, change, routes, moving, binder):  # type: ignore[no-untyped-def]
    """So many messages of a class more (or less) on its links, bound by ``binder``."""
    link_CP, weight_CP = routes[0], routes[1]
    _, count_L, bound_LL = moving
    for hop in range(link_CP.shape[1]):
        link = link_CP[c, hop]
        if link < 0:
            break
        messages = change * weight_CP[c, hop] if weight_CP.size else change
        count_L[link] += messages
        bound_LL[link, binder] += messages


@njit(nogil=True, cache=True, error_model="numpy")
def _bind(c, link, routes, ranking, moving, progress):  # type: ignore[no-untyped-def]
    """From now on a class is bound by ``link``."""
    binder_C, size_C = ranking[2], moving[0]
    offset_C, mark_C, moved_L, head_L, first_L = progress
    old = binder_C[c]
    _count(c, -size_C[c], routes, moving, old)
    _count(c, size_C[c], routes, moving, link)
    offset_C[c] += moved_L[link] - moved_L[old]
    mark_C[c] += moved_L[link] - moved_L[old]
    binder_C[c] = link
    if first_L[old] == c:
        first_L[old] = -1
    if first_L[link] >= 0 and mark_C[c] < head_L[link]:
        head_L[link], first_L[link] = mark_C[c], c


@njit(nogil=True, cache=True, error_model="numpy")
def _rank(start, routes, rate_L, ranking, moving, progress, levels):  # type: ignore[no-untyped-def]
    """Set the levels of the links from place ``start`` on, and their places.

    A link whose level is below that of links before it moves before them, and these are then ranked anew. The ranked
    part is always fair among its own links, and grows or gets smaller levels, so this ends.
    """
    _, _, first_L1, class_E, low_L, high_L = routes
    order_L, place_L, binder_C = ranking
    _, count_L, bound_LL = moving
    level_L, is_settled_L, key_L = levels
    for k in range(start, order_L.size):
        level_L[order_L[k]] = is_settled_L[order_L[k]] = 0.0
    k = start
    while k < order_L.size:
        link = order_L[k]
        taken, settled = _settled(link, low_L[link], high_L[link], bound_LL, level_L, is_settled_L)
        room, free = rate_L[link] - taken, count_L[link] - settled
        level = _level(room, free, rate_L[link])
        at = k
        while at > 0 and key_L[order_L[at - 1]] > level * _ALIKE:
            at -= 1
            other = order_L[at]
            room += bound_LL[link, other] * level_L[other]
            free += bound_LL[link, other] * is_settled_L[other]
            level = _level(room, free, rate_L[link])
        if at > 0:
            level = max(level, key_L[order_L[at - 1]])
        if at < k:
            for place in range(k, at, -1):
                other = order_L[place - 1]
                order_L[place] = other
                place_L[other] = place
                level_L[other] = is_settled_L[other] = 0.0
            order_L[at] = link
            place_L[link] = at
            for entry in range(first_L1[link], first_L1[link + 1]):
                c = class_E[entry]
                if place_L[binder_C[c]] > at:
                    _bind(c, link, routes, ranking, moving, progress)
        key_L[link] = level
        if level < FREE:
            level_L[link], is_settled_L[link] = level, 1.0
        k = at + 1


@njit(nogil=True, cache=True, error_model="numpy")
def _next_end(routes, binder_C, progress, level_L, wait_L):  # type: ignore[no-untyped-def]
    """Set wait_L, the seconds until the first message that each link binds is done. Returns the least."""
    _, _, first_L1, class_E, _, _ = routes
    _, mark_C, moved_L, head_L, first_L = progress
    step = np.inf
    for link in range(wait_L.size):
        if level_L[link] == 0.0:
            wait_L[link] = np.inf
            continue
        if first_L[link] < 0:
            head_L[link] = np.inf
            for entry in range(first_L1[link], first_L1[link + 1]):
                c = class_E[entry]
                if mark_C[c] < head_L[link] and binder_C[c] == link:
                    head_L[link], first_L[link] = mark_C[c], c
        wait_L[link] = (head_L[link] - moved_L[link]) / level_L[link]
        step = min(step, wait_L[link])
    return max(step, 0.0)


@njit(nogil=True, cache=True, error_model="numpy")
def _join(c, item, left, first_C1, routes, binder_C, moving, progress, queue):  # type: ignore[no-untyped-def]
    """A message with ``left`` bytes starts to move."""
    offset_C, mark_C, moved_L, _, first_L = progress
    goal, held = queue
    link, low, size = binder_C[c], first_C1[c], np.int64(moving[0][c])
    if size == 0:
        offset_C[c] = moved_L[link]
    push(goal[low:], held[low:], size, moved_L[link] - offset_C[c] + left, item)
    mark_C[c] = offset_C[c] + goal[low]
    first_L[link] = -1
    moving[0][c] += 1.0
    _count(c, 1.0, routes, moving, link)


@njit(nogil=True, cache=True, error_model="numpy")
def _leave(c, first_C1, routes, binder_C, moving, progress, queue):  # type: ignore[no-untyped-def]
    """The first message of a class is done. Returns it."""
    offset_C, mark_C, _, _, first_L = progress
    goal, held = queue
    low, last = first_C1[c], np.int64(moving[0][c]) - 1
    item = held[low]
    goal[low], held[low] = goal[low + last], held[low + last]
    sift_down(goal[low:], held[low:], last)
    mark_C[c] = offset_C[c] + goal[low] if last > 0 else np.inf
    first_L[binder_C[c]] = -1
    moving[0][c] -= 1.0
    _count(c, -1.0, routes, moving, binder_C[c])
    return item


@njit(nogil=True, cache=True, error_model="numpy")
def _ranges(link_CP, num_links):  # type: ignore[no-untyped-def]
    """(low_L, high_L): the other links of a link's classes lie between."""
    low_L, high_L = np.full(num_links, num_links), np.zeros(num_links, np.int64)
    for c in range(link_CP.shape[0]):
        for hop in range(link_CP.shape[1]):
            for other in range(link_CP.shape[1]):
                if hop != other and link_CP[c, hop] >= 0 and link_CP[c, other] >= 0:
                    low_L[link_CP[c, hop]] = min(low_L[link_CP[c, hop]], link_CP[c, other])
                    high_L[link_CP[c, hop]] = max(high_L[link_CP[c, hop]], link_CP[c, other] + 1)
    return np.minimum(low_L, high_L), high_L


@njit(nogil=True, cache=True, error_model="numpy")
def _first_ranking(link_CP, rate_L, first_L1):  # type: ignore[no-untyped-def]
    """(order_L, place_L, binder_C): links by their rate over all their classes."""
    order_L = np.argsort(rate_L / (first_L1[1:] - first_L1[:-1]), kind="mergesort")
    place_L = np.empty(rate_L.size, np.int64)
    place_L[order_L] = np.arange(rate_L.size)
    binder_C = link_CP[:, 0].astype(np.int64)
    for c in range(link_CP.shape[0]):
        for hop in range(1, link_CP.shape[1]):
            if link_CP[c, hop] >= 0 and place_L[link_CP[c, hop]] < place_L[binder_C[c]]:
                binder_C[c] = link_CP[c, hop]
    return order_L, place_L, binder_C


@njit(nogil=True, cache=True, error_model="numpy")
def _set_up(component):  # type: ignore[no-untyped-def]
    """(routes, ranking, moving, progress, queue, levels) of a component in which nothing moves yet."""
    items, first_C1, link_CP, weight_CP, rate_L = component
    num_classes, num_links = first_C1.size - 1, rate_L.size
    low_L, high_L = _ranges(link_CP, num_links)
    first_L1, class_E, _, _ = links_of(link_CP, weight_CP, num_links)
    routes = link_CP, weight_CP, first_L1, class_E, low_L, high_L
    moving = np.zeros(num_classes), np.zeros(num_links), np.zeros((num_links, num_links), np.float32)
    by_class = np.zeros(num_classes), np.full(num_classes, np.inf)
    by_link = np.zeros(num_links), np.full(num_links, np.inf), np.full(num_links, -1)
    progress = by_class[0], by_class[1], by_link[0], by_link[1], by_link[2]
    queue = np.empty(items.size), np.empty(items.size, np.int64)
    levels = np.zeros(num_links), np.zeros(num_links), np.full(num_links, FREE)
    return routes, _first_ranking(link_CP, rate_L, first_L1), moving, progress, queue, levels


@njit(nogil=True, cache=True, error_model="numpy")
def run_ranked(component, class_n, messages, now, patience):  # type: ignore[no-untyped-def]
    """Move one component from ``now`` on until it is done or ``patience`` events are over.

    component: (its messages, class by class; first_C1; link_CP; weight_CP; rate_L); class_n: their classes; messages:
    (begin_I, left_I, finish_I). Returns (time, classes left); left_I holds what is left of each, below 0 if it is done.
    """
    items, first_C1, _, _, rate_L = component
    begin_I, left_I, finish_I = messages
    routes, ranking, moving, progress, queue, levels = _set_up(component)
    _, _, first_L1, class_E, _, _ = routes
    _, place_L, binder_C = ranking
    offset_C, mark_C, moved_L, _, _ = progress
    level_L, wait_L = levels[0], np.empty(rate_L.size)
    begin_n = begin_I[items]
    coming = np.argsort(begin_n, kind="mergesort")
    come = num_moving = start = 0
    now = max(now, begin_n[coming[0]])
    while True:
        while come < items.size and begin_n[coming[come]] <= now:
            item = items[coming[come]]
            _join(class_n[coming[come]], item, left_I[item], first_C1, routes, binder_C, moving, progress, queue)
            num_moving += 1
            come += 1
            start = 0
        if num_moving == 0:
            if come == items.size:
                break
            now = begin_n[coming[come]]
            continue
        if patience <= 0.0:
            break
        patience -= 1.0
        _rank(start, routes, rate_L, ranking, moving, progress, levels)
        step = _next_end(routes, binder_C, progress, level_L, wait_L)
        until = now + step
        if come < items.size and begin_n[coming[come]] <= until:
            until = begin_n[coming[come]]
            step = until - now
        now = until
        start = rate_L.size
        for link in range(rate_L.size):
            moved_L[link] += level_L[link] * step
        for link in range(rate_L.size):
            if wait_L[link] > step + SAME_TIME * now:
                continue
            for entry in range(first_L1[link], first_L1[link + 1]):
                c = class_E[entry]
                while binder_C[c] == link and mark_C[c] - moved_L[link] <= level_L[link] * SAME_TIME * now:
                    item = _leave(c, first_C1, routes, binder_C, moving, progress, queue)
                    finish_I[item], left_I[item] = now, -1.0
                    num_moving -= 1
                    start = min(start, place_L[link])
    goal, held = queue
    for c in range(first_C1.size - 1):
        for slot in range(first_C1[c], first_C1[c] + np.int64(moving[0][c])):
            left_I[held[slot]] = goal[slot] - (moved_L[binder_C[c]] - offset_C[c])
    return now, (moving[0] > 0.0).sum() + items.size - come
