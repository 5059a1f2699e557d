"""A lower bound of the slowest rank's time that knows slots and replicas. Imported only by ``search``.

Legend: E experts, R ranks, S slots, M at most so many slots of a rank.

A time is refuted when no choice of replicas and slots can meet it. Four arguments, each a necessary condition:
volume (the load fits all ranks together); replicas (an expert heavier than a rank needs several, and there are S
slots); company (a slot shares its rank with n-1 others, which weigh at least the n-1 lightest slots there can be);
counting (of slots heavier than v a rank of capacity C holds at most m with m*v plus the lightest company <= C, and
experts are thinned below v only by replicas that the slots must pay for: a fractional knapsack, an underestimate).
The bound is the largest time refuted by bisection; it holds whether or not the conditions are monotone.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_SLACK = 1e-10  # relative rounding allowance: a bound must never exceed the truth


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
def _heavy_set_refuted(load_E, least_E, lightest_M, spare, num_ranks, slots_per_rank, time):  # type: ignore[no-untyped-def]
    """Whether some set of heaviest experts does not fit with the company it must keep; all ranks alike.

    The set's replicas, h of them, lie on p <= h ranks, which hold n*p - h other slots. So its load plus the lightest
    n*p - h others (less what spare replicas outside the set thin) must be at most p * time, for some h and p.
    """
    by_load = np.argsort(-load_E / least_E, kind="mergesort")
    set_load = 0.0
    fewest = 0
    for position in range(by_load.size):
        e = by_load[position]
        set_load += load_E[e]
        fewest += least_E[e]
        if fewest >= num_ranks:
            return False
        fits = False
        for more in range(spare + 1):
            h = fewest + more
            p = min(h, num_ranks)
            best = -np.inf
            while p > 0:
                others = max(0, slots_per_rank * p - h - (spare - more))
                room = p * time - lightest_M[others]
                if room <= best:
                    break
                best = room
                p -= 1
            if best * (1.0 + _SLACK) >= set_load:
                fits = True
                break
        if not fits:
            return True
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
def _crowd_refuted(load_E, least_E, lightest_M, company_M, spare, num_ranks, slots_per_rank, time):  # type: ignore[no-untyped-def]
    """As _counting_refuted, with the company of all heavy slots at once: no two of them share the lightest slots.

    X slots of weight v or more, at most m on a rank, lie on p ranks, X/m <= p <= X; with them lie n*p - X others.
    v runs over the weights that slots of half to all of ``time`` can have. All ranks alike.
    """
    for e in range(load_E.size):
        replicas = least_E[e]
        while load_E[e] > 0.3 * time * replicas:
            v = load_E[e] / replicas * (1.0 - 1e-9)
            replicas += 1
            heavy = np.int64(np.ceil(_fewest_heavier(load_E, least_E, spare, v) - 1e-6))
            most = slots_per_rank
            while most > 0 and most * v + company_M[slots_per_rank - most] > time * (1.0 + _SLACK):
                most -= 1
            if heavy == 0:
                continue
            if heavy > most * num_ranks:
                return True
            fits = False
            for p in range((heavy + most - 1) // most, min(heavy, num_ranks) + 1):
                others = max(0, slots_per_rank * p - heavy - spare)
                if heavy * v + lightest_M[others] <= p * time * (1.0 + _SLACK):
                    fits = True
                    break
            if not fits:
                return True
    return False


@njit(nogil=True, cache=True)
def refuted(load_E, num_slots_R, slowness_R, time, thorough):  # type: ignore[no-untyped-def]
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
    if _counting_refuted(load_E, least_E, company_M, spare, num_slots_R, capacity_R):
        return True
    alike = slowness_R.min() == slowness_R.max() and num_slots_R.min() == num_slots_R.max()
    if not alike:
        return False
    num_ranks = slowness_R.size
    if _heavy_set_refuted(load_E, least_E, lightest_M, spare, num_ranks, num_slots_R[0], capacity_R[0]):
        return True
    return thorough and _crowd_refuted(
        load_E, least_E, lightest_M, company_M, spare, num_ranks, num_slots_R[0], capacity_R[0]
    )


@njit(nogil=True, cache=True)
def lower_bound(load_E, num_slots_R, slowness_R, reached, num_halvings, thorough):  # type: ignore[no-untyped-def]
    """Largest time found refuted below ``reached`` (a time that some layout has), at least the volume bound."""
    low = load_E.sum() / (1.0 / slowness_R).sum()
    high = max(reached, low)
    # Most instances are bound by volume alone: then one test tells.
    if not refuted(load_E, num_slots_R, slowness_R, low * (1.0 + 1e-6), thorough):
        return low
    for _ in range(num_halvings):
        if high - low <= 1e-7 * high:
            break
        middle = 0.5 * (low + high)
        if refuted(load_E, num_slots_R, slowness_R, middle, thorough):
            low = middle
        else:
            high = middle
    return low


@njit(nogil=True, cache=True)
def lower_bounds(load_LE, num_slots_R, slowness_R, reached_L, num_halvings, thorough, bound_L):  # type: ignore[no-untyped-def]
    for layer in range(load_LE.shape[0]):
        bound_L[layer] = lower_bound(load_LE[layer], num_slots_R, slowness_R, reached_L[layer], num_halvings, thorough)
