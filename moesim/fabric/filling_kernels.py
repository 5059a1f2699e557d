"""Max-min fair speeds of one moment: links settle their classes in order of their share.

Legend: C classes (messages that move at one speed), L links, P links of a route (padded with -1), E pairs of a link and
a class on it, X states kept half way.

When a class ends, links that had settled before it did settle as they did: their shares never held it. So states are
kept half way, and filling goes on from the last one that is older than whatever has ended.
"""

from __future__ import annotations

import numpy as np
from numba import njit

FREE = 1e300  # the level of a link that settles nothing: above any rate, and finite so that no NaN arises
_NUM_KEPT = 24
_APART = 1.0 + 1e-9  # levels on both sides of a kept state are told apart whatever rounding does
_SPACING = 12  # a state is kept whenever a twelfth of the messages has been settled since the last one


@njit(nogil=True, cache=True, error_model="numpy")
def sift_down(key, item, size):  # type: ignore[no-untyped-def]
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
def push(key, item, size, new_key, new_item):  # type: ignore[no-untyped-def]
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
def links_of(link_CP, weight_CP, num_links):  # type: ignore[no-untyped-def]
    """(first_L1, class_E, other_E, entry_CP): the classes of each link, at first_L1[l] to first_L1[l + 1].

    Where no class passes more than two links, other_E is the other one (its own where there is one) and entry_CP says
    which entries are a class's; else both are empty.
    """
    num_classes, num_hops = link_CP.shape
    first_L1 = np.zeros(num_links + 1, np.int64)
    pairs = weight_CP.size == 0
    for c in range(num_classes):
        for hop in range(num_hops):
            if link_CP[c, hop] < 0:
                break
            first_L1[link_CP[c, hop] + 1] += 1
            pairs &= hop < 2
    for link in range(num_links):
        first_L1[link + 1] += first_L1[link]
    filled_L = first_L1[:-1].copy()
    class_E = np.empty(first_L1[-1], np.int32)
    other_E = np.empty(first_L1[-1] if pairs else 0, np.int32)
    entry_CP = np.empty((num_classes if pairs else 0, num_hops), np.int32)
    for c in range(num_classes):
        for hop in range(num_hops):
            link = link_CP[c, hop]
            if link < 0:
                break
            class_E[filled_L[link]] = c
            if pairs:
                other = link_CP[c, 1 - hop] if num_hops > 1 else -1
                other_E[filled_L[link]] = link if other < 0 else other
                entry_CP[c, hop] = filled_L[link]
            filled_L[link] += 1
    return first_L1, class_E, other_E, entry_CP


@njit(nogil=True, cache=True, error_model="numpy")
def scratch(num_classes, num_links):  # type: ignore[no-untyped-def]
    """Arrays that ``fill`` works in: (open_C, room_L, free_L, key_L, heap_L, kept)."""
    kept_room_XL, kept_free_XL = np.empty((_NUM_KEPT, num_links)), np.empty((_NUM_KEPT, num_links))
    kept = kept_room_XL, kept_free_XL, np.empty(_NUM_KEPT), np.empty(_NUM_KEPT), np.zeros(1, np.int64)
    by_link = np.empty(num_links), np.empty(num_links), np.empty(num_links), np.empty(num_links, np.int64)
    return np.empty(num_classes), by_link[0], by_link[1], by_link[2], by_link[3], kept


@njit(nogil=True, cache=True, error_model="numpy")
def forget(kept, speed, links, weights):  # type: ignore[no-untyped-def]
    """Take a message that moved at ``speed`` out of the states kept before its link settled; drop the later states."""
    _, kept_free_XL, kept_level_X, kept_left_X, num_kept = kept
    while num_kept[0] > 0 and kept_level_X[num_kept[0] - 1] >= speed:
        num_kept[0] -= 1
    for x in range(num_kept[0]):
        kept_left_X[x] -= 1.0
        for hop in range(links.size):
            if links[hop] < 0:
                break
            kept_free_XL[x, links[hop]] -= weights[hop] if weights.size else 1.0


@njit(nogil=True, cache=True, error_model="numpy")
def _resume(system, now_moving, speed_C, level_L, work):  # type: ignore[no-untyped-def]
    """Set up from the last kept state, or anew. Returns (level, messages to settle, entries of the heap)."""
    rate_L, other_E = system[0], system[5]
    size_C, count_L, _ = now_moving
    open_C, room_L, free_L, key_L, heap_L, kept = work
    kept_room_XL, kept_free_XL, kept_level_X, kept_left_X, num_kept = kept
    if num_kept[0] > 0:
        x = num_kept[0] - 1
        level, left = kept_level_X[x], kept_left_X[x]
        room_L[:] = kept_room_XL[x]
        free_L[:] = kept_free_XL[x]
        for link in range(rate_L.size):
            if level_L[link] > level:
                level_L[link] = FREE
        if other_E.size == 0:
            for c in range(size_C.size):
                open_C[c] = size_C[c] if speed_C[c] > level else 0.0
    else:
        level, left = 0.0, size_C.sum()
        room_L[:] = rate_L
        free_L[:] = count_L
        level_L[:] = FREE
        open_C[:] = size_C
    size = 0
    for link in range(rate_L.size):
        if free_L[link] > 0.5:
            push(key_L, heap_L, size, room_L[link] / free_L[link], link)
            size += 1
    return level, left, size


@njit(nogil=True, cache=True, error_model="numpy")
def fill(system, now_moving, speed_C, level_L, work):  # type: ignore[no-untyped-def]
    """Set level_L: the speed at which each link settles its classes, FREE where other links settle all of them.

    system: (rate_L, link_CP, weight_CP, first_L1, class_E, other_E, entry_CP); now_moving: (size_C, count_L, size_E),
    messages of each class, link and entry. A class moves at the least level of its links. Shares only grow while links
    settle, so a heap of outdated shares is a heap of lower bounds.
    """
    _, link_CP, weight_CP, first_L1, class_E, other_E, _ = system
    size_E = now_moving[2]
    open_C, room_L, free_L, key_L, heap_L, kept = work
    kept_room_XL, kept_free_XL, kept_level_X, kept_left_X, num_kept = kept
    level, left, size = _resume(system, now_moving, speed_C, level_L, work)
    spacing = max(64.0, (kept_left_X[0] if num_kept[0] > 0 else left) / _SPACING)
    keep_at = left - (0.0 if num_kept[0] == 0 else spacing)
    while left > 0.5:
        link = heap_L[0]
        share = np.inf
        if free_L[link] > 0.5:
            share = room_L[link] / free_L[link]
            if share > key_L[0]:
                key_L[0] = share
                sift_down(key_L, heap_L, size)
                if heap_L[0] != link:
                    continue
            if share > level:
                if left <= keep_at and num_kept[0] < _NUM_KEPT and share > level * _APART:
                    kept_room_XL[num_kept[0]] = room_L
                    kept_free_XL[num_kept[0]] = free_L
                    kept_level_X[num_kept[0]], kept_left_X[num_kept[0]] = level, left
                    num_kept[0] += 1
                    keep_at = left - spacing
                level = share
            level_L[link] = level
        size -= 1
        key_L[0], heap_L[0] = key_L[size], heap_L[size]
        sift_down(key_L, heap_L, size)
        if share == np.inf:
            continue
        if other_E.size:
            # Some of these were settled by the other link, which is then done: what it is charged is never read.
            left -= free_L[link]
            free_L[link] = 0.0
            for entry in range(first_L1[link], first_L1[link + 1]):
                room_L[other_E[entry]] -= level * size_E[entry]
                free_L[other_E[entry]] -= size_E[entry]
            continue
        free_L[link] = 0.0
        for entry in range(first_L1[link], first_L1[link + 1]):
            c = class_E[entry]
            if open_C[c] > 0.0:
                left -= open_C[c]
                for hop in range(link_CP.shape[1]):
                    other = link_CP[c, hop]
                    if other < 0:
                        break
                    taken = open_C[c] * weight_CP[c, hop] if weight_CP.size else open_C[c]
                    room_L[other] -= level * taken
                    free_L[other] -= taken
                open_C[c] = 0.0
