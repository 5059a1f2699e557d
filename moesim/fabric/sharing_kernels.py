"""The exact solver's clock: messages that share links fairly, from one start or end to the next.

Legend: I messages, J links, C classes (messages that pass the same links, so that they always move at one speed), L
links of a component (links and classes that depend on one another), P links of a route (padded with -1), S entries of
a stack. Imported only by ``exact``.

A class moves by V bytes per message since its component was built: a message that joins at V with b bytes left is done
when V reaches its mark V + b. So an event costs as much as there are classes, however many messages they hold.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from moesim.fabric.filling_kernels import FREE, fill, forget, links_of, push, scratch, sift_down
from moesim.fabric.ranking_kernels import SAME_TIME, run_ranked
from moesim.fabric.shrink_kernels import classes_of, components_of, links_that_can_fill, local_links

_SMALL = 64  # sets of so few messages run to their end
_PATIENCE = 96.0  # events, per message of a class, until a larger set is shrunk anew; doubled while that does not help
_MOST_DONE = 8  # but never more events than an eighth of the messages
MOST_PAIRS = 64  # of links per class in a dense set; at more, ranking and filling take alike
_WORTH = 0.8  # a shrink helps if so few of the classes stay


@njit(nogil=True, cache=True, error_model="numpy")
def _count(c, change, system, now_moving):  # type: ignore[no-untyped-def]
    """A message more (1) or less (-1) in a class and on its links."""
    _, link_CP, weight_CP, _, _, _, entry_CP = system
    size_C, count_L, size_E = now_moving
    size_C[c] += change
    for hop in range(link_CP.shape[1]):
        if link_CP[c, hop] < 0:
            break
        count_L[link_CP[c, hop]] += change * weight_CP[c, hop] if weight_CP.size else change
        if entry_CP.size:
            size_E[entry_CP[c, hop]] += change


@njit(nogil=True, cache=True, error_model="numpy")
def _join(c, item, left, first_C1, system, now_moving, progress):  # type: ignore[no-untyped-def]
    """A message with ``left`` bytes starts to move."""
    mark, held, moved_C, head_C = progress
    low, high = first_C1[c], first_C1[c + 1]
    size = np.int64(now_moving[0][c])
    if size == 0:
        moved_C[c] = 0.0
    push(mark[low:high], held[low:high], size, moved_C[c] + left, item)
    head_C[c] = mark[low]
    _count(c, 1.0, system, now_moving)


@njit(nogil=True, cache=True, error_model="numpy")
def _leave(c, first_C1, system, now_moving, progress):  # type: ignore[no-untyped-def]
    """The first message of a class is done. Returns it."""
    mark, held, _, head_C = progress
    low, high = first_C1[c], first_C1[c + 1]
    item = held[low]
    last = np.int64(now_moving[0][c]) - 1
    mark[low], held[low] = mark[low + last], held[low + last]
    sift_down(mark[low:high], held[low:high], last)
    head_C[c] = mark[low] if last > 0 else np.inf
    _count(c, -1.0, system, now_moving)
    return item


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"nnan", "nsz"})
def _next_end(hop_CP, level_L1, moved_C, speed_C, head_C, wait_C):  # type: ignore[no-untyped-def]
    """Set speed_C and wait_C, the seconds until each class's first message is done. Returns the least."""
    step = np.inf
    if hop_CP.shape[1] == 2:
        for c in range(speed_C.size):
            speed_C[c] = min(level_L1[hop_CP[c, 0]], level_L1[hop_CP[c, 1]])
    else:
        for c in range(speed_C.size):
            speed = level_L1[hop_CP[c, 0]]
            for hop in range(1, hop_CP.shape[1]):
                speed = min(speed, level_L1[hop_CP[c, hop]])
            speed_C[c] = speed
    for c in range(speed_C.size):
        wait = (head_C[c] - moved_C[c]) / speed_C[c]
        wait_C[c] = wait
        step = min(step, wait)
    return max(step, 0.0)


@njit(nogil=True, cache=True, error_model="numpy")
def _padded(link_CP, num_links):  # type: ignore[no-untyped-def]
    """Routes whose missing links are number L, which never settles anything; unsigned, so that no index is negative."""
    hop_CP = np.empty(link_CP.shape, np.uint32)
    for c in range(link_CP.shape[0]):
        for hop in range(link_CP.shape[1]):
            hop_CP[c, hop] = link_CP[c, hop] if link_CP[c, hop] >= 0 else num_links
    return hop_CP


@njit(nogil=True, cache=True, error_model="numpy")
def _run_filling(component, class_n, messages, now, patience):  # type: ignore[no-untyped-def]
    """As ``run_ranked``, for a sparse component: rates are found anew at each event, by filling."""
    items, first_C1, link_CP, weight_CP, rate_L = component
    begin_I, left_I, finish_I = messages
    num_classes, num_items, num_links = first_C1.size - 1, items.size, rate_L.size
    if link_CP.shape[1] > 2 and link_CP[:, 2].max() < 0:
        link_CP = link_CP[:, :2].copy()
    first_L1, class_E, other_E, entry_CP = links_of(link_CP, weight_CP, num_links)
    system = rate_L, link_CP, weight_CP, first_L1, class_E, other_E, entry_CP
    work = scratch(num_classes, num_links)
    hop_CP, level_L1 = _padded(link_CP, num_links), np.full(num_links + 1, FREE)
    size_C = np.zeros(num_classes)
    now_moving = size_C, np.zeros(num_links), np.zeros(other_E.size)
    mark, held = np.empty(num_items), np.empty(num_items, np.int64)
    moved_C, speed_C, wait_C = np.zeros(num_classes), np.zeros(num_classes), np.empty(num_classes)
    head_C = np.full(num_classes, np.inf)
    progress = mark, held, moved_C, head_C
    begin_n = begin_I[items]
    coming = np.argsort(begin_n, kind="mergesort")
    come = num_moving = 0
    now = max(now, begin_n[coming[0]])
    while True:
        while come < num_items and begin_n[coming[come]] <= now:
            item = items[coming[come]]
            _join(class_n[coming[come]], item, left_I[item], first_C1, system, now_moving, progress)
            work[-1][-1][0] = 0  # nothing kept holds for more messages
            num_moving += 1
            come += 1
        if num_moving == 0:
            if come == num_items:
                break
            now = begin_n[coming[come]]
            continue
        if patience <= 0.0:
            break
        patience -= 1.0
        fill(system, now_moving, speed_C, level_L1[:-1], work)
        step = _next_end(hop_CP, level_L1, moved_C, speed_C, head_C, wait_C)
        until = now + step
        if come < num_items and begin_n[coming[come]] <= until:
            until = begin_n[coming[come]]
            step = until - now
        now = until
        soon = step + SAME_TIME * now
        for c in range(num_classes):
            moved_C[c] += speed_C[c] * step
        for c in range(num_classes):
            if wait_C[c] <= soon:
                while size_C[c] > 0.0 and head_C[c] - moved_C[c] <= speed_C[c] * SAME_TIME * now:
                    forget(work[-1], speed_C[c], link_CP[c], weight_CP[c] if weight_CP.size else moved_C[:0])
                    item = _leave(c, first_C1, system, now_moving, progress)
                    finish_I[item], left_I[item] = now, -1.0
                    num_moving -= 1
    for c in range(num_classes):
        for slot in range(first_C1[c], first_C1[c] + np.int64(size_C[c])):
            left_I[held[slot]] = mark[slot] - moved_C[c]
    return now, (size_C > 0.0).sum() + num_items - come


@njit(nogil=True, cache=True, error_model="numpy")
def _run(component, messages, now, patience, most_pairs):  # type: ignore[no-untyped-def]
    """Move one component on until it is done or, if it is large, for ``patience`` events.

    Returns (time, messages left, classes left); the messages stand first.
    """
    items, first_C1, _, _, rate_L = component
    left_I = messages[1]
    num_classes = first_C1.size - 1
    class_n = np.empty(items.size, np.int64)
    for c in range(num_classes):
        class_n[first_C1[c] : first_C1[c + 1]] = c
    if items.size <= _SMALL:
        patience = np.inf
    if rate_L.size**2 <= most_pairs * num_classes:
        now, classes_left = run_ranked(component, class_n, messages, now, patience)
    else:
        now, classes_left = _run_filling(component, class_n, messages, now, patience)
    num_left = 0
    for item in items:
        if left_I[item] >= 0.0:
            items[num_left] = item
            num_left += 1
    return now, num_left, classes_left


@njit(nogil=True, cache=True, error_model="numpy")
def finish_shared(bytes_I, begin_I, link_IP, weight_IP, rate_J, finish_I, most_pairs):  # type: ignore[no-untyped-def]
    """finish_I [s] of messages that begin at begin_I with bytes_I > 0 to move over links of positive, finite rates.

    weight_IP: how many messages such as this a link carries (folded systems); empty where each stands for itself.
    A stack of independent sets of messages; each is shrunk (links that cannot fill, equal routes, components), its
    components are run for a while, and what is left of them goes back on the stack. most_pairs: up to so many pairs of
    links per class a component is dense, and its links are ranked; 0 fills them all.
    """
    num_items = bytes_I.size
    left_I = bytes_I.copy()
    todo = np.arange(num_items)
    low_S, high_S = np.zeros(num_items + 1, np.int64), np.zeros(num_items + 1, np.int64)
    time_S, patience_S, classes_S = np.zeros(num_items + 1), np.zeros(num_items + 1), np.zeros(num_items + 1)
    local_J = np.full(rate_J.size, -1, np.int32)
    high_S[0], classes_S[0] = num_items, np.inf
    depth = 1 if num_items else 0
    while depth > 0:
        depth -= 1
        low, high, now = low_S[depth], high_S[depth], time_S[depth]
        expected, waited = classes_S[depth], patience_S[depth]
        items = todo[low:high].copy()
        link_nP, rate_L = local_links(items, link_IP, rate_J, local_J)
        class_n = np.arange(items.size)
        if weight_IP.size == 0:
            links_that_can_fill(link_nP, rate_L)
            class_n = classes_of(link_nP, rate_L.size)
        order, first_C1, link_CP, first_G1 = components_of(link_nP, class_n, rate_L.size)
        for group in range(first_G1.size - 1):
            first_C = first_C1[first_G1[group] : first_G1[group + 1] + 1]
            num_classes, first = first_C.size - 1, low + first_C[0]
            part = items[order[first_C[0] : first_C[-1]]]
            part_link_CP, part_rate_L = local_links(
                np.arange(first_G1[group], first_G1[group + 1]), link_CP, rate_L, local_J
            )
            weight_CP = weight_IP[part] if weight_IP.size else weight_IP
            patience = min(2.0 * waited, part.size / _MOST_DONE)
            if num_classes < _WORTH * expected:
                patience = _PATIENCE * part.size / num_classes
            component = part, first_C - first_C[0], part_link_CP, weight_CP, part_rate_L
            now_after, kept, kept_classes = _run(component, (begin_I, left_I, finish_I), now, patience, most_pairs)
            if kept > 0:
                todo[first : first + kept] = part[:kept]
                low_S[depth], high_S[depth], time_S[depth] = first, first + kept, now_after
                patience_S[depth], classes_S[depth] = patience, kept_classes
                depth += 1
