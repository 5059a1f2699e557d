"""How uneven the experts of a model are: the kinds of popularity, each given by what people measure.

A popularity is the law of what one token expects of each expert (its inclusion; rows sum to top_k). Every kind is given
by exactly one of ``gini``, ``cv`` (coefficient of variation), ``max_mean`` (largest over mean), each the mean over
layers of that statistic of the expected load, or by its law's own parameter; ``moesim.routing.popularity`` solves for
the parameter that reaches it under the model's router.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from moesim.describe.checks import check_choice, check_number, check_whole
from moesim.errors import check

OWNER = "routing.popularity"
DEFAULT_GINI = 0.25  # assumed; real text showed 0.10 to 0.38 on five models
HotPlace = Literal["random", "first"]
MAX_DOMAINS = 64


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """What popularity remembers: from layer to layer, from step to step, from token to token.

    layers: correlation of log popularity between any two layers at the same expert number. drift_steps: steps after
    which the correlation of log popularity with its own past has fallen to 1/e (a stationary random walk, so the
    asked skew stays); None: fixed. first_repeat: probability that a token's first expert is the previous token's
    (Mixtral 8x7B: 0.14 to 0.28 where chance is 0.125; arXiv 2401.04088 table 5); None: tokens are independent.
    """

    layers: float = 0.0
    drift_steps: float | None = None
    first_repeat: float | None = None

    def __post_init__(self) -> None:
        owner = f"{OWNER}.correlation"
        check_number(owner, "layers", self.layers)
        check(0.0 <= self.layers <= 1.0, owner, "layers", "must lie in 0..1", self.layers)
        if self.drift_steps is not None:
            check_number(owner, "drift_steps", self.drift_steps)
            rule = "must be positive, or null for a fixed popularity"
            check(self.drift_steps > 0.0, owner, "drift_steps", rule, self.drift_steps)
        if self.first_repeat is not None:
            check_number(owner, "first_repeat", self.first_repeat)
            check(0.0 <= self.first_repeat < 1.0, owner, "first_repeat", "must lie in 0..1", self.first_repeat)


@dataclass(frozen=True, kw_only=True)
class Balanced:
    """Every expert equally popular, and every count its expectation (forced balance, as in vendor benchmarks)."""

    kind: Literal["balanced"] = "balanced"


@dataclass(frozen=True, kw_only=True)
class Multinomial:
    """Every expert equally popular; tokens choose at random, so counts vary as a sample does."""

    correlation: Correlation = field(default_factory=Correlation)
    kind: Literal["multinomial"] = "multinomial"


@dataclass(frozen=True, kw_only=True)
class Lognormal:
    """Log popularity is normal with standard deviation sigma. With nothing given: a Gini of 0.25."""

    gini: float | None = None
    cv: float | None = None
    max_mean: float | None = None
    sigma: float | None = None
    correlation: Correlation = field(default_factory=Correlation)
    kind: Literal["lognormal"] = "lognormal"

    def __post_init__(self) -> None:
        if all(value is None for value in (self.gini, self.cv, self.max_mean, self.sigma)):
            object.__setattr__(self, "gini", DEFAULT_GINI)
        check_measure(self, "sigma")


@dataclass(frozen=True, kw_only=True)
class Dirichlet:
    """Shares of a layer from the symmetric Dirichlet law; a small concentration is a large skew."""

    gini: float | None = None
    cv: float | None = None
    max_mean: float | None = None
    concentration: float | None = None
    correlation: Correlation = field(default_factory=Correlation)
    kind: Literal["dirichlet"] = "dirichlet"

    def __post_init__(self) -> None:
        check_measure(self, "concentration", positive=True)


@dataclass(frozen=True, kw_only=True)
class Zipf:
    """The r-th most popular expert of a layer has weight r**-exponent; which expert is r-th is random."""

    gini: float | None = None
    cv: float | None = None
    max_mean: float | None = None
    exponent: float | None = None
    correlation: Correlation = field(default_factory=Correlation)
    kind: Literal["zipf"] = "zipf"

    def __post_init__(self) -> None:
        check_measure(self, "exponent")


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """Weights drawn from a density proportional to w**-exponent, w from 1 to span (Pareto's law where span is None).

    A span is for reproducing generators that cut the law off, as AIConfigurator's does at 0.8 of the token count; it
    takes an exponent, since the skew of a cut law neither rises nor falls with it throughout.
    """

    gini: float | None = None
    cv: float | None = None
    max_mean: float | None = None
    exponent: float | None = None
    span: float | None = None
    correlation: Correlation = field(default_factory=Correlation)
    kind: Literal["power_law"] = "power_law"

    def __post_init__(self) -> None:
        check_measure(self, "exponent")
        if self.span is not None:
            check_number(OWNER, "span", self.span)
            check(self.span > 1.0, OWNER, "span", "must exceed 1", self.span)
            check(self.exponent is not None, OWNER, "span", "needs an exponent beside it", self.span)
        elif self.exponent is not None:
            check(self.exponent > 1.0, OWNER, "exponent", "must exceed 1 without a span", self.exponent)


@dataclass(frozen=True, kw_only=True)
class HotExperts:
    """num_hot experts of each layer take more than the others, which are equal; share: what the hot take of all load.

    place ``random`` spreads them, ``first`` makes them the first experts (one hot rank under contiguous placement).
    """

    num_hot: int
    share: float | None = None
    gini: float | None = None
    cv: float | None = None
    max_mean: float | None = None
    place: HotPlace = "random"
    correlation: Correlation = field(default_factory=Correlation)
    kind: Literal["hot_experts"] = "hot_experts"

    def __post_init__(self) -> None:
        check_whole(OWNER, "num_hot", self.num_hot)
        check_choice(OWNER, "place", self.place, get_args(HotPlace))
        check_measure(self, "share", positive=True)
        if self.share is not None:
            check(self.share < 1.0, OWNER, "share", "must lie in 0..1", self.share)


@dataclass(frozen=True, kw_only=True)
class Domain:
    """One kind of text (code, prose, a language, numbers) and its share of all tokens."""

    name: str
    share: float

    def __post_init__(self) -> None:
        check_number(f"{OWNER}.domains", "share", self.share)
        check(self.share > 0.0, f"{OWNER}.domains", "share", "must be positive", self.share)


@dataclass(frozen=True, kw_only=True)
class DomainMixture:
    """Domains with lognormal favourites of their own; the load is their mixture, which is what gini, cv, max_mean say.

    overlap: correlation of two domains' log popularity (0: favourites unrelated; 1: one popularity for all).
    run_tokens: consecutive tokens of one domain (1: mixed token by token; seq_len: one domain a sequence). Longer runs
    leave means alone and widen the counts of a micro-batch.
    """

    domains: tuple[Domain, ...]
    gini: float | None = None
    cv: float | None = None
    max_mean: float | None = None
    sigma: float | None = None
    overlap: float = 0.0
    run_tokens: int = 1
    correlation: Correlation = field(default_factory=Correlation)
    kind: Literal["domains"] = "domains"

    def __post_init__(self) -> None:
        check_measure(self, "sigma")
        check(1 <= len(self.domains) <= MAX_DOMAINS, OWNER, "domains", f"must be 1 to {MAX_DOMAINS}", len(self.domains))
        names = [domain.name for domain in self.domains]
        check(len(set(names)) == len(names), OWNER, "domains", "names must differ", names)
        total = sum(domain.share for domain in self.domains)
        check(abs(total - 1.0) <= 1e-6, OWNER, "domains", "shares must sum to 1", total)
        check_number(OWNER, "overlap", self.overlap)
        check(0.0 <= self.overlap <= 1.0, OWNER, "overlap", "must lie in 0..1", self.overlap)
        check_whole(OWNER, "run_tokens", self.run_tokens)


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What somebody recorded: a router-replay file (.npy, .npz, .safetensors, .jsonl) or a histogram (.csv, .parquet).

    Of every MoE layer of the model, in order. A histogram says how often experts were taken, a replay also which ones
    together.
    """

    file: str
    kind: Literal["recorded"] = "recorded"


Skewed = Lognormal | Dirichlet | Zipf | PowerLaw | HotExperts | DomainMixture
Popularity = Balanced | Multinomial | Skewed | Recorded

_OWN = {
    "lognormal": "sigma",
    "dirichlet": "concentration",
    "zipf": "exponent",
    "power_law": "exponent",
    "hot_experts": "share",
    "domains": "sigma",
}
_WORDS = {"gini": "Gini", "cv": "coefficient of variation", "max_mean": "max/mean"}


def check_measure(popularity: Skewed, own: str, *, positive: bool = False) -> None:
    """Raise InputError unless exactly one of gini, cv, max_mean and the law's own parameter is given, within range."""
    given = {name: getattr(popularity, name) for name in ("gini", "cv", "max_mean", own)}
    given = {name: value for name, value in given.items() if value is not None}
    check(len(given) == 1, OWNER, popularity.kind, f"takes exactly one of gini, cv, max_mean, {own}", given or "none")
    name, value = next(iter(given.items()))
    check_number(OWNER, name, value)
    if name == "gini":
        check(0.0 <= value < 0.95, OWNER, name, "must lie in 0..0.95", value)
    elif name == "max_mean":
        check(value >= 1.0, OWNER, name, "must be at least 1", value)
    elif name == own and positive:
        check(value > 0.0, OWNER, name, "must be positive", value)
    else:
        check(value >= 0.0, OWNER, name, "must be at least 0", value)


def measure_of(popularity: Skewed) -> tuple[str, float]:
    """(name, value) of what a skewed popularity is given by.

    >>> measure_of(Zipf(max_mean=4.0))
    ('max_mean', 4.0)
    """
    names = ("gini", "cv", "max_mean", _OWN[popularity.kind])
    return next((name, float(getattr(popularity, name))) for name in names if getattr(popularity, name) is not None)


def popularity_words(popularity: Popularity) -> str:
    """A popularity in a few words, for tables.

    >>> popularity_words(Zipf(max_mean=4.0))
    'zipf popularity with max/mean 4'
    """
    if isinstance(popularity, Balanced):
        return "every expert takes exactly its share"
    if isinstance(popularity, Multinomial):
        return "experts equally popular, counts random"
    if isinstance(popularity, Recorded):
        return f"as recorded in {popularity.file}"
    name, value = measure_of(popularity)
    return f"{popularity.kind.replace('_', ' ')} popularity with {_WORDS.get(name, name)} {value:g}"
