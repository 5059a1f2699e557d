"""Make a set of messages smaller before it is solved: idle links, equal routes, parts that do not touch.

Legend: n messages, L links (numbered within the set), C classes of messages with equal routes, G components, P links of
a route (padded with -1). Imported only by ``sharing_kernels``.

Fair rates depend only on which rates are possible. So a link whose messages cannot fill it, because links that they
pass as well let too little through, may be dropped; messages whose other links are equal then share one rate; and
messages that have no link in common, directly or through others, never meet.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_SLACK = 1.0 + 1e-12
_MOST_LINKS = 1 << 15  # four link numbers fit one integer key


@njit(nogil=True, cache=True, error_model="numpy")
def local_links(rows, link_XP, rate_J, local_J):  # type: ignore[no-untyped-def]
    """(routes of some rows in numbers 0..L-1, in the links' order; rate_L). local_J: all -1, before and after."""
    num_hops = link_XP.shape[1]
    link_nP = np.full((rows.size, num_hops), -1, np.int32)
    used = np.empty(min(rate_J.size, rows.size * num_hops), np.int64)
    num_links = 0
    for n in range(rows.size):
        for hop in range(num_hops):
            link = link_XP[rows[n], hop]
            if link < 0:
                break
            if local_J[link] < 0:
                local_J[link] = 0
                used[num_links] = link
                num_links += 1
    used = np.sort(used[:num_links])
    for link in range(num_links):
        local_J[used[link]] = link
    for n in range(rows.size):
        for hop in range(num_hops):
            if link_XP[rows[n], hop] < 0:
                break
            link_nP[n, hop] = local_J[link_XP[rows[n], hop]]
    rate_L = rate_J[used]
    local_J[used] = -1
    return link_nP, rate_L


@njit(nogil=True, cache=True, error_model="numpy")
def links_that_can_fill(link_nP, rate_L):  # type: ignore[no-untyped-def]
    """Drop from the routes every link whose messages are held below its rate by links that stay.

    The messages of a link are told apart by another link of each, the one that holds them tightest (rate over messages
    in common). Where the rates of those add up to no more than the link's own, it cannot be what holds anyone.
    """
    num_links, num_hops = rate_L.size, link_nP.shape[1]
    first_L1 = np.zeros(num_links + 1, np.int64)
    for n in range(link_nP.shape[0]):
        for hop in range(num_hops):
            if link_nP[n, hop] < 0:
                break
            first_L1[link_nP[n, hop] + 1] += 1
    first_L1 = np.cumsum(first_L1)
    message_E = np.empty(first_L1[num_links], np.int32)
    filled_L = first_L1[:-1].copy()
    for n in range(link_nP.shape[0]):
        for hop in range(num_hops):
            link = link_nP[n, hop]
            if link < 0:
                break
            message_E[filled_L[link]] = n
            filled_L[link] += 1

    kept_L = np.ones(num_links, np.bool_)
    common_L = np.zeros(num_links)
    counted_L = np.full(num_links, -1, np.int64)
    for link in np.argsort(-rate_L, kind="mergesort"):
        messages = message_E[first_L1[link] : first_L1[link + 1]]
        for n in messages:
            for hop in range(num_hops):
                other = link_nP[n, hop]
                if other < 0:
                    break
                common_L[other] += 1.0
        held = 0.0
        for n in messages:
            tightest, holder = np.inf, -1
            for hop in range(num_hops):
                other = link_nP[n, hop]
                if other < 0:
                    break
                if other != link and kept_L[other] and rate_L[other] / common_L[other] < tightest:
                    tightest, holder = rate_L[other] / common_L[other], other
            if holder < 0:
                held = np.inf
                break
            if counted_L[holder] != link:
                counted_L[holder] = link
                held += rate_L[holder]
                if held > rate_L[link] * _SLACK:
                    break
        for n in messages:
            for hop in range(num_hops):
                if link_nP[n, hop] < 0:
                    break
                common_L[link_nP[n, hop]] = 0.0
        kept_L[link] = held > rate_L[link] * _SLACK

    for n in range(link_nP.shape[0]):
        kept = 0
        for hop in range(num_hops):
            link = link_nP[n, hop]
            if link < 0:
                break
            if kept_L[link]:
                link_nP[n, kept] = link
                kept += 1
        link_nP[n, kept:] = -1


@njit(nogil=True, cache=True, error_model="numpy")
def classes_of(link_nP, num_links):  # type: ignore[no-untyped-def]
    """The class of each message: equal where the routes are, as sets of links."""
    num_messages, num_hops = link_nP.shape
    if num_links >= _MOST_LINKS:
        return np.arange(num_messages)
    key_n = np.zeros(num_messages, np.int64)
    for n in range(num_messages):
        for hop in range(1, num_hops):  # sort the few links of the route
            at = hop
            while at > 0 and link_nP[n, at - 1] < link_nP[n, at]:
                link_nP[n, at - 1], link_nP[n, at] = link_nP[n, at], link_nP[n, at - 1]
                at -= 1
        for hop in range(num_hops):
            key_n[n] = key_n[n] * (_MOST_LINKS + 1) + link_nP[n, hop] + 1
    order = np.argsort(key_n, kind="mergesort")
    class_n = np.empty(num_messages, np.int64)
    num_classes = 0
    for at in range(num_messages):
        if at > 0 and key_n[order[at]] != key_n[order[at - 1]]:
            num_classes += 1
        class_n[order[at]] = num_classes
    return class_n


@njit(nogil=True, cache=True, error_model="numpy")
def _root(parent_L, link):  # type: ignore[no-untyped-def]
    while parent_L[link] != link:
        parent_L[link] = parent_L[parent_L[link]]
        link = parent_L[link]
    return link


@njit(nogil=True, cache=True, error_model="numpy")
def components_of(link_nP, class_n, num_links):  # type: ignore[no-untyped-def]
    """Order messages by component and class.

    Returns (order: the messages; first_C1: where each class starts in it; link_CP: the classes' routes; first_G1: where
    each component starts among the classes).
    """
    num_messages, num_hops = link_nP.shape
    num_classes = class_n.max() + 1
    parent_L = np.arange(num_links)
    one_C = np.empty(num_classes, np.int64)  # a message of each class
    size_C = np.zeros(num_classes, np.int64)
    for n in range(num_messages):
        one_C[class_n[n]] = n
        size_C[class_n[n]] += 1
    for c in range(num_classes):
        root = _root(parent_L, link_nP[one_C[c], 0])
        for hop in range(1, num_hops):
            if link_nP[one_C[c], hop] < 0:
                break
            parent_L[_root(parent_L, link_nP[one_C[c], hop])] = root
    group_L = np.full(num_links, -1, np.int64)
    group_C = np.empty(num_classes, np.int64)
    num_groups = 0
    for c in range(num_classes):
        root = _root(parent_L, link_nP[one_C[c], 0])
        if group_L[root] < 0:
            group_L[root] = num_groups
            num_groups += 1
        group_C[c] = group_L[root]
    by_group = np.argsort(group_C, kind="mergesort")
    first_G1 = np.zeros(num_groups + 1, np.int64)
    first_C1 = np.zeros(num_classes + 1, np.int64)
    place_C = np.empty(num_classes, np.int64)
    link_CP = np.empty((num_classes, num_hops), np.int32)
    for at in range(num_classes):
        c = by_group[at]
        first_G1[group_C[c] + 1] = at + 1
        first_C1[at + 1] = first_C1[at] + size_C[c]
        place_C[c] = first_C1[at]
        link_CP[at] = link_nP[one_C[c]]
    order = np.empty(num_messages, np.int64)
    for n in range(num_messages):
        order[place_C[class_n[n]]] = n
        place_C[class_n[n]] += 1
    return order, first_C1, link_CP, first_G1
