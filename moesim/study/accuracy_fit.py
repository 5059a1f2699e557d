"""The libraries' constants from the rows they may be fitted on: the least mean log error, by pattern search."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from moesim.catalog.libraries import Library, LibraryRate
from moesim.study.accuracy_dispatch import Exchange, exchange_load, predicted_s

FIRST_STEP, LAST_STEP = 0.4, 0.0005  # of a constant's logarithm
SMOOTH_ERROR = 0.05
FITTED = ("derate", "latency", "bytes_per_s")


def fit_library(library: Library, exchanges: Sequence[Exchange]) -> Library:
    """The library with all its values fitted on these exchanges.

    Starts from the library's values; the best step of one logarithm up or down, halved when none helps. Deterministic.
    Errors count absolutely beyond SMOOTH_ERROR, squared below: an outlier weighs little, and the best is one point.
    """
    loads = [None if library.kind == "nccl" else exchange_load(exchange) for exchange in exchanges]
    users = [[at for at, exchange in enumerate(exchanges) if _uses(exchange, rate)] for rate in library.rates]
    assert all(users), f"some constants of {library.name} have no row to be fitted on"

    def errors(candidate: Library, rows: Sequence[int]) -> list[float]:
        times = ((predicted_s(replace(exchanges[at], library=candidate), loads[at]), exchanges[at]) for at in rows)
        return [math.hypot(math.log(predicted / row.measured_s), SMOOTH_ERROR) for predicted, row in times]

    best, error_of_row, step = library, errors(library, range(len(exchanges))), FIRST_STEP
    while step > LAST_STEP:
        gain, chosen = 1e-9, None
        for at, tried in _neighbours(best, step):
            now = errors(tried, users[at])
            gained = sum(error_of_row[row] for row in users[at]) - sum(now)
            if gained > gain:
                gain, chosen = gained, (at, tried, now)
        if chosen is None:
            step /= 2
            continue
        at, best, now = chosen
        for row, error in zip(users[at], now, strict=True):
            error_of_row[row] = error
    return best


def _neighbours(library: Library, step: float) -> Iterator[tuple[int, Library]]:
    """(which entry, the library with one of its values a step up or down on a logarithmic scale); derates at most 1."""
    for at, rate in enumerate(library.rates):
        for name in FITTED:
            value = getattr(rate, name)
            for factor in () if value is None else (math.exp(step), math.exp(-step)):
                moved = value.value * factor
                if name != "derate" or moved <= 1.0:
                    changed = replace(rate, **{name: replace(value, value=moved)})
                    yield at, replace(library, rates=(*library.rates[:at], changed, *library.rates[at + 1 :]))


def _uses(exchange: Exchange, rate: LibraryRate) -> bool:
    key = exchange.operation if "nccl" in rate.tiers else exchange.rate_key
    return key in rate.operations and (not rate.gpus or exchange.gpu in rate.gpus)
