"""How long the documents are that training sequences are packed from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moesim.describe.checks import check_number, check_whole
from moesim.errors import check

OWNER = "train.documents"
MOST_SIGMA = 4.0


@dataclass(frozen=True, kw_only=True)
class LognormalLengths:
    """Lengths whose logarithm is normal: half of the documents are shorter than median_tokens; sigma is the standard
    deviation of the logarithm; longer ones than max_tokens are cut there.
    """

    median_tokens: float
    sigma: float = 1.0
    max_tokens: int | None = None
    kind: Literal["lognormal"] = "lognormal"

    def __post_init__(self) -> None:
        check_number(OWNER, "median_tokens", self.median_tokens)
        check(self.median_tokens >= 1.0, OWNER, "median_tokens", "must be at least 1", self.median_tokens)
        check_number(OWNER, "sigma", self.sigma)
        check(0.0 <= self.sigma <= MOST_SIGMA, OWNER, "sigma", f"must lie in 0..{MOST_SIGMA:g}", self.sigma)
        if self.max_tokens is not None:
            check_whole(OWNER, "max_tokens", self.max_tokens)


@dataclass(frozen=True, kw_only=True)
class HistogramLengths:
    """Lengths as counted: a CSV file with the columns length_tokens and count."""

    file: str
    kind: Literal["histogram"] = "histogram"


Documents = LognormalLengths | HistogramLengths
