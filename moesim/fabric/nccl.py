"""NCCL's collectives inside one NVLink domain, small messages included: two protocols, the faster one counts.

Legend: n ranks, B bytes of the whole tensor, W the bytes through the busiest port.

A small message goes by the low-latency protocol (flags beside the data: half the link's rate, a hop costs well under a
microsecond), a large one by the bulk protocol (full rate, after a start that fills the kernel's pipelines). NCCL's own
tuner takes the faster by the same two terms; its starts and hops are used here (github.com/NVIDIA/nccl at b647562,
src/graph/tuning.cc), one fitted factor scales all of them. docs/model.md#nccl.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.describe.hardware import Gpu
from moesim.errors import check
from moesim.units import MICRO

Floats = NDArray[np.float64]
Collective = Literal["alltoall", "all_gather", "reduce_scatter", "all_reduce"]

LOW_START_S, LOW_HOP_S = 6.6 * MICRO, 0.6 * MICRO  # ring, low-latency protocol, NVLink
BULK_START_S = 23.0 * MICRO  # the tuner's start of a bulk kernel with in-switch reduction, taken for every bulk kernel
LOW_SHARE = 1 / 2  # four bytes of flag beside every four of data
COPY_UTILISATION = 0.8 / 2  # of the memory rate: read and written at the streaming rate (catalog/efficiency.yaml)


@dataclass(frozen=True, kw_only=True)
class NcclRates:
    """What a release achieves for one collective: derate of the NVLink line rate, factor on the tuner's latencies."""

    derate: float
    latency_factor: float

    def __post_init__(self) -> None:
        check(0 < self.derate <= 1, "nccl rates", "derate", "must lie in 0..1", self.derate)
        check(self.latency_factor > 0, "nccl rates", "latency_factor", "must be positive", self.latency_factor)


def nccl_s(
    collective: Collective,
    num_ranks: int,
    num_bytes: ArrayLike,
    gpu: Gpu,
    rates: NcclRates,
    *,
    in_switch_reduction: bool = True,
) -> Floats:
    """Seconds of one collective of num_ranks GPUs of an NVLink domain, on num_bytes of the whole tensor (any shape).

    num_bytes: what a rank ends with (all-gather), starts with (the others). Out of place: all but the all-reduce copy
    the rank's own part through memory. in_switch_reduction: an all-reduce of more than two ranks may use the switches
    (NVLS): (1 + 1/n) B through every port. Raises InputError for an unknown collective.

    >>> from moesim.catalog.hardware import load_gpu
    >>> h100 = load_gpu("h100-sxm")
    >>> rates = NcclRates(derate=0.75, latency_factor=1.0)
    >>> bool(nccl_s("all_gather", 8, 2**29, h100, rates) > nccl_s("all_gather", 8, 2**20, h100, rates))
    True
    """
    known = get_args(Collective)
    check(collective in known, "nccl", "collective", "must be one of " + ", ".join(known), collective)
    whole = np.asarray(num_bytes, dtype=np.float64)
    if num_ranks == 1:
        return np.zeros_like(whole)
    passes = 2 if collective == "all_reduce" else 1
    hops = 1 if collective == "alltoall" else passes * (num_ranks - 1)  # an all-to-all's messages go side by side
    wire = passes * (num_ranks - 1) / num_ranks * whole
    rate, factor = float(gpu.nvlink_bytes_per_s) * rates.derate, rates.latency_factor
    low = factor * (LOW_START_S + hops * LOW_HOP_S) + wire / (rate * LOW_SHARE)
    bulk_wire = wire
    if collective == "all_reduce" and num_ranks > 2 and in_switch_reduction:
        bulk_wire = (1 + 1 / num_ranks) * whole
    own_copy = 0.0 if collective == "all_reduce" else whole / num_ranks / _copy_rate(gpu)
    bulk = factor * BULK_START_S + bulk_wire / rate + own_copy
    return np.where(whole > 0, np.minimum(low, bulk), 0.0)


def _copy_rate(gpu: Gpu) -> float:
    return float(gpu.memory_bytes_per_s) * COPY_UTILISATION
