"""Fold messages that symmetry makes equal into one: colour refinement, then a proof that the colours are right.

Legend: F messages, J links, I message colours, K link colours, P links of a route (padded with -1), E pairs of a link
and a message on it. Imported only by ``exact``.

Colours are right (an equitable partition) if messages of a colour have equal bytes and begins and pass as many links of
each colour, and links of a colour have equal rates and carry as many messages of each colour. Then speeds that are fair
in the folded system, given to all messages of a colour, are feasible and leave each a full link on which none is
faster; only the fair allocation has that property. Colours stay right when a whole colour starts or is done, so the
folded system's finishes are those of all. Hashes only propose colours; ``is_equitable`` decides.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FACTOR = np.uint64(0xBF58476D1CE4E5B9)
_MOST_ROUNDS = 64


@njit(nogil=True, cache=True, inline="always")
def _mixed(value):  # type: ignore[no-untyped-def]
    value = (value ^ (value >> np.uint64(30))) * _FACTOR + _GOLDEN
    return value ^ (value >> np.uint64(27))


@njit(nogil=True, cache=True, error_model="numpy")
def refine(tag_F, tag_J, link_FP, most_colours):  # type: ignore[no-untyped-def]
    """Hashes of messages and links in ``tag`` refined until links fall into no more colours than before.

    Returns the number of link colours; gives up above most_colours.
    """
    sum_J = np.empty(tag_J.size, np.uint64)
    num_colours = 0
    for _ in range(_MOST_ROUNDS):
        sum_J[:] = 0
        for f in range(tag_F.size):
            for hop in range(link_FP.shape[1]):
                if link_FP[f, hop] >= 0:
                    sum_J[link_FP[f, hop]] += _mixed(tag_F[f])
        for j in range(tag_J.size):
            tag_J[j] = _mixed(tag_J[j] + _GOLDEN * sum_J[j])
        for f in range(tag_F.size):
            total = np.uint64(0)
            for hop in range(link_FP.shape[1]):
                if link_FP[f, hop] >= 0:
                    total += _mixed(tag_J[link_FP[f, hop]])
            tag_F[f] = _mixed(tag_F[f] + _GOLDEN * total)
        before, num_colours = num_colours, np.unique(tag_J).size
        if num_colours == before or num_colours > most_colours:
            break
    return num_colours


@njit(nogil=True, cache=True, error_model="numpy")
def numbered(tag_X):  # type: ignore[no-untyped-def]
    """(colour number of each, first of each colour): equal tags share a number, counted from 0."""
    size = 16
    while size < 2 * tag_X.size:
        size *= 2
    slot_key, slot_colour = np.empty(size, np.uint64), np.full(size, -1, np.int64)
    colour_X, first = np.empty(tag_X.size, np.int32), np.empty(tag_X.size, np.int64)
    num_colours = 0
    for x in range(tag_X.size):
        at = np.int64(_mixed(tag_X[x]) & np.uint64(size - 1))
        while slot_colour[at] >= 0 and slot_key[at] != tag_X[x]:
            at = (at + 1) & (size - 1)
        if slot_colour[at] < 0:
            slot_key[at], slot_colour[at] = tag_X[x], num_colours
            first[num_colours] = x
            num_colours += 1
        colour_X[x] = slot_colour[at]
    return colour_X, first[:num_colours].copy()


@njit(nogil=True, cache=True, error_model="numpy")
def messages_of_links(link_FP, num_links):  # type: ignore[no-untyped-def]
    """(first_J1, message_E): messages of link j stand at first_J1[j] to first_J1[j + 1]."""
    first_J1 = np.zeros(num_links + 1, np.int64)
    for f in range(link_FP.shape[0]):
        for hop in range(link_FP.shape[1]):
            if link_FP[f, hop] >= 0:
                first_J1[link_FP[f, hop] + 1] += 1
    first_J1 = np.cumsum(first_J1)
    filled_J = first_J1[:-1].copy()
    message_E = np.empty(first_J1[num_links], np.int32)
    for f in range(link_FP.shape[0]):
        for hop in range(link_FP.shape[1]):
            link = link_FP[f, hop]
            if link >= 0:
                message_E[filled_J[link]] = f
                filled_J[link] += 1
    return first_J1, message_E


@njit(nogil=True, cache=True, error_model="numpy")
def is_equitable(bytes_F, begin_F, link_FP, rate_J, colour_F, first_I, colour_J, first_K, first_J1, message_E):  # type: ignore[no-untyped-def]
    """Whether equal colours mean equal messages and equal links, counted one by one."""
    count_K, count_I, model_I = np.zeros(first_K.size), np.zeros(first_I.size), np.zeros(first_I.size)
    for f in range(bytes_F.size):
        model = first_I[colour_F[f]]
        if bytes_F[f] != bytes_F[model] or begin_F[f] != begin_F[model]:
            return False
        for hop in range(link_FP.shape[1]):
            if link_FP[f, hop] >= 0:
                count_K[colour_J[link_FP[f, hop]]] += 1.0
            if link_FP[model, hop] >= 0:
                count_K[colour_J[link_FP[model, hop]]] -= 1.0
        for hop in range(link_FP.shape[1]):
            for g in (f, model):
                if link_FP[g, hop] >= 0 and count_K[colour_J[link_FP[g, hop]]] != 0.0:
                    return False
    for link in range(rate_J.size):
        model = first_K[colour_J[link]]
        size = first_J1[link + 1] - first_J1[link]
        if rate_J[link] != rate_J[model] or size != first_J1[model + 1] - first_J1[model]:
            return False
        for entry in range(first_J1[model], first_J1[model + 1]):
            model_I[colour_F[message_E[entry]]] += 1.0
        for entry in range(first_J1[link], first_J1[link + 1]):
            count_I[colour_F[message_E[entry]]] += 1.0
        for entry in range(first_J1[link], first_J1[link + 1]):
            if count_I[colour_F[message_E[entry]]] != model_I[colour_F[message_E[entry]]]:
                return False
        for entry in range(first_J1[model], first_J1[model + 1]):
            model_I[colour_F[message_E[entry]]] = 0.0
        for entry in range(first_J1[link], first_J1[link + 1]):
            count_I[colour_F[message_E[entry]]] = 0.0
    return True


@njit(nogil=True, cache=True, error_model="numpy")
def folded(link_FP, colour_F, first_I, colour_J, first_K, first_J1, message_E):  # type: ignore[no-untyped-def]
    """(link_IP, weight_IP): the link colours that a message colour passes, how many of its messages each carries."""
    num_hops = link_FP.shape[1]
    link_IP, weight_IP = np.full((first_I.size, num_hops), -1, np.int32), np.zeros((first_I.size, num_hops))
    for i in range(first_I.size):
        used = 0
        for hop in range(num_hops):
            link = link_FP[first_I[i], hop]
            if link < 0:
                continue
            known = False
            for earlier in range(used):
                known |= link_IP[i, earlier] == colour_J[link]
            if not known:
                link_IP[i, used] = colour_J[link]
                used += 1
    for k in range(first_K.size):
        for entry in range(first_J1[first_K[k]], first_J1[first_K[k] + 1]):
            i = colour_F[message_E[entry]]
            for hop in range(num_hops):
                if link_IP[i, hop] == k:
                    weight_IP[i, hop] += 1.0
    return link_IP, weight_IP
