"""The exact solver's clock: messages that share links fairly, from one start or end to the next.

Legend: I messages, J links, C classes (messages that pass the same links, so that they always move at one rate), L
links of a component (links and classes that depend on one another), P links of a route (padded with -1), E pairs of a
link and a class on it, S entries of a stack. Imported only by ``exact``.

A class moves by V bytes per message since its component was built: a message that joins at V with b bytes left is done
when V reaches its mark V + b. So an event costs as much as there are classes, however many messages they hold.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from moesim.fabric.shrink_kernels import classes_of, components_of, links_that_can_fill, local_links

_DONE = 1e-11  # a message is done when this share of its bytes is left: rounding, not waiting
_ROUNDING = 1e-15
_SMALL = 48  # sets of so few messages run to their end
_PATIENCE = 48.0  # events, per message of a class, until a larger set is shrunk anew; doubled while that does not help
_WORTH = 0.8  # a shrink helps if so few of the classes stay


@njit(nogil=True, cache=True, error_model="numpy")
def _sift_down(key, item, size):  # type: ignore[no-untyped-def]
    """Restore a heap whose first entry may be too large."""
    top_key, top_item = key[0], item[0]
    at = 0
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and key[child + 1] < key[child]:
            child += 1
        if key[child] >= top_key:
            break
        key[at], item[at] = key[child], item[child]
        at = child
    key[at], item[at] = top_key, top_item


@njit(nogil=True, cache=True, error_model="numpy")
def _push(key, item, size, new_key, new_item):  # type: ignore[no-untyped-def]
    """Add an entry to a heap of ``size`` entries."""
    at = size
    while at > 0:
        parent = (at - 1) // 2
        if key[parent] <= new_key:
            break
        key[at], item[at] = key[parent], item[parent]
        at = parent
    key[at], item[at] = new_key, new_item


@njit(nogil=True, cache=True, error_model="numpy")
def _fill(rate_L, count_L, first_L1, class_E, size_C, link_CP, weight_CP, speed_C, room_L, free_L, key_L, heap_L, left):  # type: ignore[no-untyped-def]
    """Max-min fair speed_C of ``left`` classes with messages: the link with the least share settles its classes.

    Shares only grow while links are settled, so a heap of outdated shares is a heap of lower bounds.
    """
    size = 0
    for link in range(rate_L.size):
        if count_L[link] > 0.0:
            room_L[link], free_L[link] = rate_L[link], count_L[link]
            _push(key_L, heap_L, size, rate_L[link] / count_L[link], link)
            size += 1
    weighted = weight_CP.size > 0
    speed_C[:] = -1.0
    level = 0.0
    while left > 0:
        link = heap_L[0]
        open_here = free_L[link] > 0.5
        if open_here:
            share = room_L[link] / free_L[link]
            if share > key_L[0]:
                key_L[0] = share
                _sift_down(key_L, heap_L, size)
                if heap_L[0] != link:
                    continue
            level = max(level, share)
        size -= 1
        key_L[0], heap_L[0] = key_L[size], heap_L[size]
        _sift_down(key_L, heap_L, size)
        if not open_here:
            continue
        for entry in range(first_L1[link], first_L1[link + 1]):
            c = class_E[entry]
            if speed_C[c] >= 0.0 or size_C[c] == 0:
                continue
            speed_C[c] = level
            left -= 1
            for hop in range(link_CP.shape[1]):
                other = link_CP[c, hop]
                if other < 0:
                    break
                taken = np.float64(size_C[c])
                if weighted:
                    taken *= weight_CP[c, hop]
                room_L[other] -= level * taken
                free_L[other] -= taken


@njit(nogil=True, cache=True, error_model="numpy")
def _run(component, messages, now, patience):  # type: ignore[no-untyped-def]
    """Move one component from ``now`` on until it is done or, if it is large, for ``patience`` events.

    component: (its messages, class by class; first_C1; link_CP; weight_CP; rate_L), messages: (bytes_I, begin_I,
    left_I, finish_I). Returns (time, messages left, classes left); the messages stand first, their bytes in left_I.
    """
    items, first_C1, link_CP, weight_CP, rate_L = component
    bytes_I, begin_I, left_I, finish_I = messages
    num_classes, num_items, num_links = first_C1.size - 1, items.size, rate_L.size
    weighted = weight_CP.size > 0

    first_L1 = np.zeros(num_links + 1, np.int64)
    for c in range(num_classes):
        for hop in range(link_CP.shape[1]):
            if link_CP[c, hop] < 0:
                break
            first_L1[link_CP[c, hop] + 1] += 1
    first_L1 = np.cumsum(first_L1)
    class_E = np.empty(first_L1[num_links], np.int32)
    filled_L = first_L1[:-1].copy()
    for c in range(num_classes):
        for hop in range(link_CP.shape[1]):
            link = link_CP[c, hop]
            if link < 0:
                break
            class_E[filled_L[link]] = c
            filled_L[link] += 1

    mark = np.empty(num_items)
    held = np.empty(num_items, np.int64)
    size_C, moved_C, speed_C = np.zeros(num_classes, np.int64), np.zeros(num_classes), np.zeros(num_classes)
    count_L, room_L, free_L = np.zeros(num_links), np.empty(num_links), np.empty(num_links)
    key_L, heap_L = np.empty(num_links), np.empty(num_links, np.int64)
    moving = np.empty(num_classes, np.int64)  # classes with messages, then those without
    place_C = np.empty(num_classes, np.int64)
    for c in range(num_classes):
        moving[c] = place_C[c] = c
    num_moving = 0

    begin = np.empty(num_items)
    class_of = np.empty(num_items, np.int64)
    for c in range(num_classes):
        for slot in range(first_C1[c], first_C1[c + 1]):
            begin[slot] = begin_I[items[slot]]
            class_of[slot] = c
    coming = np.argsort(begin, kind="mergesort")
    next_coming = 0
    if begin[coming[0]] > now:
        now = begin[coming[0]]

    while True:
        while next_coming < num_items and begin[coming[next_coming]] <= now:
            slot = coming[next_coming]
            next_coming += 1
            c = class_of[slot]
            low, high = first_C1[c], first_C1[c + 1]
            _push(mark[low:high], held[low:high], size_C[c], moved_C[c] + left_I[items[slot]], items[slot])
            if size_C[c] == 0:
                _swap(moving, place_C, place_C[c], num_moving)
                num_moving += 1
            size_C[c] += 1
            for hop in range(link_CP.shape[1]):
                link = link_CP[c, hop]
                if link < 0:
                    break
                count_L[link] += weight_CP[c, hop] if weighted else 1.0
        if num_moving == 0:
            if next_coming == num_items:
                break
            now = begin[coming[next_coming]]
            continue
        if patience <= 0 and num_items > _SMALL:
            break
        patience -= 1
        _fill(
            rate_L,
            count_L,
            first_L1,
            class_E,
            size_C,
            link_CP,
            weight_CP,
            speed_C,
            room_L,
            free_L,
            key_L,
            heap_L,
            num_moving,
        )
        step = np.inf
        for at in range(num_moving):
            c = moving[at]
            step = min(step, (mark[first_C1[c]] - moved_C[c]) / speed_C[c])
        step = max(step, 0.0)
        until = now + step
        if next_coming < num_items and begin[coming[next_coming]] <= until:
            until = begin[coming[next_coming]]
            step = until - now
        now = until
        at = 0
        while at < num_moving:
            c = moving[at]
            moved_C[c] += speed_C[c] * step
            low, high = first_C1[c], first_C1[c + 1]
            while size_C[c] > 0 and mark[low] - moved_C[c] <= _DONE * bytes_I[held[low]] + _ROUNDING * mark[low]:
                finish_I[held[low]] = now
                left_I[held[low]] = -1.0
                size_C[c] -= 1
                mark[low], held[low] = mark[low + size_C[c]], held[low + size_C[c]]
                _sift_down(mark[low:high], held[low:high], size_C[c])
                for hop in range(link_CP.shape[1]):
                    link = link_CP[c, hop]
                    if link < 0:
                        break
                    count_L[link] -= weight_CP[c, hop] if weighted else 1.0
            if size_C[c] == 0:
                num_moving -= 1
                _swap(moving, place_C, at, num_moving)
            else:
                at += 1

    for at in range(num_moving):
        c = moving[at]
        for slot in range(first_C1[c], first_C1[c] + size_C[c]):
            left_I[held[slot]] = mark[slot] - moved_C[c]
    kept = 0
    for slot in range(num_items):
        if left_I[items[slot]] >= 0.0:
            items[kept] = items[slot]
            kept += 1
    return now, kept, num_moving + num_items - next_coming


@njit(nogil=True, cache=True, error_model="numpy")
def _swap(moving, place_C, one, other):  # type: ignore[no-untyped-def]
    """Exchange two places of ``moving``."""
    moving[one], moving[other] = moving[other], moving[one]
    place_C[moving[one]], place_C[moving[other]] = one, other


@njit(nogil=True, cache=True, error_model="numpy")
def finish_shared(bytes_I, begin_I, link_IP, weight_IP, rate_J, finish_I):  # type: ignore[no-untyped-def]
    """finish_I [s] of messages that begin at begin_I with bytes_I > 0 to move over links of positive, finite rates.

    weight_IP: how many messages such as this a link carries (folded systems); empty where each stands for itself.
    A stack of independent sets of messages; each is shrunk (links that cannot fill, equal routes, components), its
    components are run for a while, and what is left of them goes back on the stack.
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
            patience = 2.0 * waited
            if num_classes < _WORTH * expected:
                patience = _PATIENCE * part.size / num_classes
            component = part, first_C - first_C[0], part_link_CP, weight_CP, part_rate_L
            now_after, kept, kept_classes = _run(component, (bytes_I, begin_I, left_I, finish_I), now, patience)
            if kept > 0:
                todo[first : first + kept] = part[:kept]
                low_S[depth], high_S[depth], time_S[depth] = first, first + kept, now_after
                patience_S[depth], classes_S[depth] = patience, kept_classes
                depth += 1
