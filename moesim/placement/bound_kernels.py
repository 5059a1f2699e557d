"""A lower bound of the slowest rank's time that knows slots and replicas. Imported only by ``search``.

Legend: E experts, R ranks, S slots, M at most so many slots of a rank.

A time is refuted when no choice of replicas and slots can meet it. Four kinds of argument, each a necessary condition:
volume (the load fits all ranks together); replicas (an expert heavier than a rank needs several, and there are S
slots); company (a slot shares its rank with n-1 others: what heavy slots have above one weight must find as much room
in light ones below another, and as many of them, see _company_refuted); counting (of slots heavier than v a rank of
capacity C holds at most m with m*v plus the lightest company <= C, and experts are thinned below v only by replicas
that the slots must pay for: a fractional knapsack, an underestimate).
The bound is the largest time refuted by bisection; it holds whether or not the conditions are monotone.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_SLACK = 1e-10  # relative rounding allowance: a bound must never exceed the truth
_NUM_LIGHT = 24  # light weights that the surplus is taken at, then as many closer together around the best


@njit(nogil=True, cache=True)
def _needed(load, most):  # type: ignore[no-untyped-def]
    """Fewest replicas that bring load to at most ``most`` each."""
    return max(1, np.int64(np.ceil(load / most * (1.0 - _SLACK))))


@njit(nogil=True, cache=True)
def _lightest_slots(load_E, least_E, lightest_M):  # type: ignore[no-untyped-def]
    """lightest_M[m]: weight of the m lightest slots when expert e has least_E[e] replicas."""
    share_E = load_E / least_E
    by_share = np.argsort(share_E, kind="mergesort")
    m = 0
    lightest_M[0] = 0.0
    for position in range(by_share.size):
        e = by_share[position]
        for _ in range(least_E[e]):
            if m + 1 < lightest_M.size:
                lightest_M[m + 1] = lightest_M[m] + share_E[e]
                m += 1


@njit(nogil=True, cache=True)
def _company(load_E, least_E, lightest_M, spare, company_M):  # type: ignore[no-untyped-def]
    """company_M[m]: weight that any m slots have at least, when spare slots may thin any expert.

    The better of two underestimates: each expert alone is allowed all spare replicas; and m slots weigh at least what
    the m - spare lightest do without the spare ones (an expert with x more replicas, j of its k + x slots counted:
    j / (k + x) >= (j - x) / k, since j <= k + x).
    """
    thin_E = load_E / (least_E + spare)
    by_thin = np.argsort(thin_E, kind="mergesort")
    position = 0
    used = 0
    company_M[0] = 0.0
    for m in range(1, company_M.size):
        e = by_thin[position]
        company_M[m] = company_M[m - 1] + thin_E[e]
        used += 1
        if used == least_E[e] + spare:
            used = 0
            position = min(position + 1, by_thin.size - 1)
    for m in range(spare + 1, company_M.size):
        company_M[m] = max(company_M[m], lightest_M[m - spare])


@njit(nogil=True, cache=True)
def _fewest_heavier(load_E, least_E, spare, v):  # type: ignore[no-untyped-def]
    """Underestimate of the slots heavier than v: each costs replicas to thin, and only spare more are there."""
    heavy = 0.0
    num_heavy = 0
    saved_E = np.empty(load_E.size)
    ratio_E = np.empty(load_E.size)
    for e in range(load_E.size):
        if load_E[e] / least_E[e] > v * (1.0 + _SLACK):
            heavy += least_E[e]
            cost = _needed(load_E[e], v) - least_E[e]
            if cost > 0:
                saved_E[num_heavy] = least_E[e]
                ratio_E[num_heavy] = least_E[e] / cost
                num_heavy += 1
            else:
                heavy -= least_E[e]
    if spare == 0 or num_heavy == 0:
        return heavy
    left = np.float64(spare)
    by_ratio = np.argsort(-ratio_E[:num_heavy], kind="mergesort")
    for position in range(num_heavy):
        e = by_ratio[position]
        cost = saved_E[e] / ratio_E[e]
        part = min(1.0, left / cost)
        heavy -= part * saved_E[e]
        left -= part * cost
        if left <= 0.0:
            break
    return heavy


@njit(nogil=True, cache=True)
def _surplus(load_E, least_E, spare, heavy, light):  # type: ignore[no-untyped-def]
    """What is above ``heavy`` in all slots less what is free below ``light``, when the spare slots serve it best.

    A replica more takes ``heavy`` off an expert's surplus, the last one what is left, and any replica frees at most
    ``light``; an expert's savings fall one after the other, so the largest of all of them are the most to be saved.
    """
    surplus = 0.0
    whole = np.int64(0)
    last_E = np.empty(load_E.size)
    num_last = 0
    for e in range(load_E.size):
        above = load_E[e] - least_E[e] * heavy
        if above > 0.0:
            surplus += above
            times = np.int64(above / heavy)
            whole += times
            if above - times * heavy > light:
                last_E[num_last] = above - times * heavy
                num_last += 1
        else:
            surplus -= max(0.0, least_E[e] * light - load_E[e])
    if whole >= spare:
        return surplus - spare * heavy
    surplus -= whole * heavy
    left = spare - whole
    if num_last > left:
        last_E[:num_last] = -np.sort(-last_E[:num_last])
        num_last = left
    for i in range(num_last):
        surplus -= last_E[i]
    return surplus - (left - num_last) * light


@njit(nogil=True, cache=True)
def _unmatched(load_E, least_E, spare, heavy, light):  # type: ignore[no-untyped-def]
    """Slots over ``heavy`` less slots up to ``light``, when the spare slots lower it as far as whole experts can.

    An expert passes below heavy, and below light, at the price of some replicas; any replica beyond adds one light
    slot. Of experts the steeper step goes first, in parts too: an underestimate.
    """
    number = 0.0
    steep_X = np.empty(2 * load_E.size)
    price_X = np.empty(2 * load_E.size, np.int64)
    num_steps = 0
    for e in range(load_E.size):
        share = load_E[e] / least_E[e]
        if share <= light * (1.0 + _SLACK):
            number -= least_E[e]
            continue
        to_light = _needed(load_E[e], light) - least_E[e]
        to_middle = _needed(load_E[e], heavy * (1.0 + _SLACK)) - least_E[e]
        above = np.float64(least_E[e]) if to_middle > 0 else 0.0
        number += above
        gain = above + least_E[e] + to_light  # all its replicas are light then
        if 0 < to_middle < to_light and above * to_light >= gain * to_middle:
            if above > to_middle:
                steep_X[num_steps], price_X[num_steps] = above / to_middle, to_middle
                num_steps += 1
            gain -= above
            to_light -= to_middle
        if gain > to_light:
            steep_X[num_steps], price_X[num_steps] = gain / max(1, to_light), max(1, to_light)
            num_steps += 1
    left = np.float64(spare)
    by_steepness = np.argsort(-steep_X[:num_steps])
    for place in range(num_steps):
        if left <= 0.0:
            break
        x = by_steepness[place]
        part = min(left, np.float64(price_X[x]))
        number -= part * steep_X[x]
        left -= part
    return number - left


@njit(nogil=True, cache=True)
def _company_refuted(load_E, least_E, company_M, spare, num_slots_R, capacity_R):  # type: ignore[no-untyped-def]
    """Whether for some weights a >= u the slots above a find too little room, or too few slots, below u.

    If a + (n-1)*u >= C, a rank of n slots that is done in time has sum (w - a)+ <= sum (u - w)+ over its slots: one
    slot above a leaves the others less than u each on average, two leave less still. And where no rank can hold two
    slots above a, each such slot has a slot below u beside it. Either must hold for all slots together.
    """
    share_E = np.sort(load_E / least_E)
    limit = _SLACK * load_E.sum()
    largest = capacity_R.max()
    most = num_slots_R.max()
    for count in range(2):
        centre, width = 0.5, 1.0
        for _ in range(2):
            best = -np.inf
            best_place = centre
            for i in range(_NUM_LIGHT):
                place = centre + width * ((i + 0.5) / _NUM_LIGHT - 0.5)
                if place < 0.0 or place >= 1.0:
                    continue
                light = share_E[np.int64(place * share_E.size)]
                heavy = light
                for r in range(capacity_R.size):
                    if num_slots_R[r] > 0:
                        heavy = max(heavy, capacity_R[r] - (num_slots_R[r] - 1) * light)
                if heavy >= share_E[-1]:
                    continue
                if count == 0:
                    found = _surplus(load_E, least_E, spare, heavy, light)
                elif most >= 2 and 2.0 * heavy + company_M[most - 2] > largest * (1.0 + _SLACK):
                    found = _unmatched(load_E, least_E, spare, heavy, light)
                else:
                    continue
                if found > (limit if count == 0 else 1e-6):
                    return True
                if found > best:
                    best = found
                    best_place = place
            centre, width = best_place, 2.0 / _NUM_LIGHT
    return False


@njit(nogil=True, cache=True)
def _counting_refuted(load_E, least_E, company_M, spare, num_slots_R, capacity_R):  # type: ignore[no-untyped-def]
    """Whether for some weight v there are more slots heavier than v than the ranks can hold with their company."""
    num_slots = num_slots_R.sum()
    for r in range(capacity_R.size):
        if r > 0 and capacity_R[r] == capacity_R[r - 1] and num_slots_R[r] == num_slots_R[r - 1]:
            continue
        for m in range(num_slots_R[r]):
            v = (capacity_R[r] - company_M[num_slots_R[r] - m - 1]) / (m + 1) * (1.0 + _SLACK)
            if v <= 0.0:
                return True
            room = 0
            for other in range(capacity_R.size):
                held = num_slots_R[other]
                while held > 0 and held * v + company_M[num_slots_R[other] - held] > capacity_R[other]:
                    held -= 1
                room += held
            if room < num_slots and np.ceil(_fewest_heavier(load_E, least_E, spare, v) - 1e-6) > room:
                return True
    return False


@njit(nogil=True, cache=True)
def refuted(load_E, num_slots_R, slowness_R, time):  # type: ignore[no-untyped-def]
    """Whether no layout can have every rank done by ``time``."""
    num_slots = num_slots_R.sum()
    capacity_R = time / slowness_R
    if load_E.sum() > capacity_R.sum() * (1.0 + _SLACK):
        return True
    least_E = np.empty(load_E.size, np.int64)
    lightest_M = np.zeros(num_slots + 1)
    company_M = np.zeros(num_slots_R.max() + 1)
    largest = capacity_R.max()
    spare = 0
    for _ in range(3):  # the later passes know the company of the largest slot
        if largest <= 0.0:
            return True
        total = 0
        for e in range(load_E.size):
            least_E[e] = _needed(load_E[e], largest)
            total += least_E[e]
            if total > num_slots:
                return True
        spare = num_slots - total
        _lightest_slots(load_E, least_E, lightest_M)
        _company(load_E, least_E, lightest_M, spare, company_M)
        largest = 0.0
        for r in range(capacity_R.size):
            if num_slots_R[r] > 0:
                largest = max(largest, capacity_R[r] - company_M[num_slots_R[r] - 1])
    if _company_refuted(load_E, least_E, company_M, spare, num_slots_R, capacity_R):
        return True
    return _counting_refuted(load_E, least_E, company_M, spare, num_slots_R, capacity_R)


@njit(nogil=True, cache=True)
def lower_bound(load_E, num_slots_R, slowness_R, reached, num_halvings):  # type: ignore[no-untyped-def]
    """Largest time found refuted below ``reached`` (a time that some layout has), at least the volume bound."""
    low = load_E.sum() / (1.0 / slowness_R).sum()
    high = max(reached, low)
    # Most instances are bound by volume alone: then one test tells.
    if not refuted(load_E, num_slots_R, slowness_R, low * (1.0 + 1e-6)):
        return low
    for _ in range(num_halvings):
        if high - low <= 1e-7 * high:
            break
        middle = 0.5 * (low + high)
        if refuted(load_E, num_slots_R, slowness_R, middle):
            low = middle
        else:
            high = middle
    return low


@njit(nogil=True, cache=True)
def lower_bounds(load_LE, num_slots_R, slowness_R, reached_L, num_halvings, bound_L):  # type: ignore[no-untyped-def]
    for layer in range(load_LE.shape[0]):
        bound_L[layer] = lower_bound(load_LE[layer], num_slots_R, slowness_R, reached_L[layer], num_halvings)
