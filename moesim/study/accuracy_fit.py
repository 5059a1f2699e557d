"""The libraries' constants from the rows they may be fitted on: the least mean log error, by pattern search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from moesim.catalog.libraries import Library, LibraryRate
from moesim.study.accuracy_dispatch import Exchange, predicted_s

FIRST_STEP, LAST_STEP = 0.4, 0.0005  # of a constant's logarithm
SMOOTH_ERROR = 0.05
FITTED = ("derate", "latency", "bytes_per_s")


def fit_library(library: Library, exchanges: Sequence[Exchange]) -> Library:
    """The library with all its values fitted on these exchanges, each a row of its own.

    Starts from the library's values; a step of each logarithm up and down, halved when none helps. Deterministic.
    """
    rows = [replace(exchange, library=library) for exchange in exchanges]
    rates = list(library.rates)
    for rate in rates:
        assert any(_uses(row, rate) for row in rows), f"no row to fit {library.name} {rate.tiers} on"
    step = FIRST_STEP
    best = _mean_error(rows)
    while step > LAST_STEP:
        helped = False
        for at in range(len(rates)):
            for name in FITTED:
                value = getattr(rates[at], name)
                for factor in (math.exp(step), math.exp(-step)) if value is not None else ():
                    tried_value = value.value * factor
                    if name == "derate" and tried_value > 1.0:
                        continue
                    tried = [*rates]
                    tried[at] = replace(rates[at], **{name: replace(value, value=tried_value)})
                    candidate = replace(library, rates=tuple(tried))
                    rows_now = [replace(row, library=candidate) for row in rows]
                    error = _mean_error(rows_now)
                    if error < best - 1e-9:
                        best, rates, helped = error, tried, True
                        break
        step = step if helped else step / 2
    return replace(library, rates=tuple(rates))


def _uses(exchange: Exchange, rate: LibraryRate) -> bool:
    key = exchange.operation if "nccl" in rate.tiers else exchange.rate_key
    fits_gpu = not rate.gpus or exchange.gpu in rate.gpus
    return fits_gpu and key in rate.operations


def _mean_error(exchanges: Sequence[Exchange]) -> float:
    """Absolute errors beyond SMOOTH_ERROR, squared ones below, so that an outlier weighs little and the best is one."""
    errors = (math.log(predicted_s(row) / row.measured_s) for row in exchanges)
    return sum(math.hypot(error, SMOOTH_ERROR) for error in errors) / len(exchanges)
