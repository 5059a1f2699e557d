"""The balancing dynamics step by step, compiled (numba). The equations are in ``moesim.routing.balancing``.

Legend: T steps, L layers, E experts, R ranks that hold E/R neighbouring experts each.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_NEWTON_STEPS = 60
_CLOSE_FRACTION = 1e-9


@njit(nogil=True, cache=True)
def fluid_inclusion(offset_E, top_k, time, inclusion_E):  # type: ignore[no-untyped-def]
    """Fill inclusion = 1 - exp(-weight time) with the time at which it sums to top_k; returns that time.

    time: a first guess. Newton on a rising concave function: from the right it may leave the range, so it restarts
    from 0 then, whence it converges from below.
    """
    size = offset_E.size
    largest = offset_E.max()
    for _ in range(_NEWTON_STEPS):
        total = 0.0
        slope = 0.0
        for e in range(size):
            weight = np.exp(offset_E[e] - largest)
            left = np.exp(-weight * time)
            inclusion_E[e] = 1.0 - left
            total += inclusion_E[e]
            slope += weight * left
        missing = top_k - total
        if abs(missing) < _CLOSE_FRACTION * top_k:
            break
        time += missing / slope if slope > 0.0 else -time
        if time <= 0.0:
            time = 0.0
    return time


@njit(nogil=True, cache=True)
def advance(  # type: ignore[no-untyped-def]
    preference_LE,
    bias_LE,
    time_L2,
    drift_TLE,
    batch_noise_TLE,
    first_step,
    top_k,
    flattening,
    reinforcement,
    pull,
    bias_rate,
    gate_scale,
    num_ranks,
    takeover_inclusion,
    dead_inclusion,
    max_vio_TL,
    rank_max_mean_TL,
    takeover_LE,
    dead_LE,
    inclusion_LE,
):
    """Run the steps of drift_TLE in place; inclusion_LE is left at the last step's global inclusion."""
    num_steps, num_layers, size = drift_TLE.shape
    offset_E = np.empty(size)
    batch_E = np.empty(size)
    even = top_k / size
    per_rank = size // num_ranks
    for t in range(num_steps):
        for layer in range(num_layers):
            for e in range(size):
                offset_E[e] = (preference_LE[layer, e] + bias_LE[layer, e] / gate_scale) * flattening
            time_L2[layer, 0] = fluid_inclusion(offset_E, top_k, time_L2[layer, 0], inclusion_LE[layer])
            largest = 0.0
            for e in range(size):
                inclusion = inclusion_LE[layer, e]
                largest = max(largest, inclusion)
                if inclusion > takeover_inclusion and takeover_LE[layer, e] < 0:
                    takeover_LE[layer, e] = first_step + t
                if inclusion < dead_inclusion and dead_LE[layer, e] < 0:
                    dead_LE[layer, e] = first_step + t
            max_vio_TL[t, layer] = largest / even - 1.0
            probability_sum = 0.0
            top = offset_E.max()
            for e in range(size):
                probability_sum += np.exp(offset_E[e] - top)
            # What this batch sees: its own mixture of texts, and the noise of counting.
            for e in range(size):
                batch_E[e] = offset_E[e] + batch_noise_TLE[t, layer, e]
            loads_E = inclusion_LE[layer].copy()
            time_L2[layer, 1] = fluid_inclusion(batch_E, top_k, time_L2[layer, 1], loads_E)
            busiest = 0.0
            for rank in range(num_ranks):
                rank_load = 0.0
                for e in range(rank * per_rank, (rank + 1) * per_rank):
                    rank_load += loads_E[e]
                busiest = max(busiest, rank_load)
            rank_max_mean_TL[t, layer] = busiest / (even * per_rank)
            mean_load = 0.0  # as the router's probabilities weigh it
            for e in range(size):
                mean_load += np.exp(offset_E[e] - top) / probability_sum * loads_E[e] / even
            mean_preference = 0.0
            for e in range(size):
                load = loads_E[e] / even
                probability = np.exp(offset_E[e] - top) / probability_sum
                change = drift_TLE[t, layer, e] + reinforcement * (load - 1.0)
                change -= pull * size * probability * (load - mean_load)
                preference_LE[layer, e] += change
                mean_preference += preference_LE[layer, e] / size
                if load < 1.0:
                    bias_LE[layer, e] += bias_rate
                elif load > 1.0:
                    bias_LE[layer, e] -= bias_rate
            for e in range(size):
                preference_LE[layer, e] -= mean_preference
