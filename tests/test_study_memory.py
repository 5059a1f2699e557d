"""Memory over steps of a routing study: what the redraw spreads, and the chance of running out."""

from __future__ import annotations

import numpy as np
import pytest

from moesim import Scenario, simulate
from moesim.describe.model import Router
from moesim.describe.workload import Lognormal
from moesim.errors import InputError
from moesim.metrics.memory import MemoryOverSteps, memory_over_steps, other_favourites
from moesim.routing.popularity import popularity_LE
from tests.routed_cases import SMALL, scenario


def test_other_favourites_keep_the_skew_and_the_routers_groups() -> None:
    rng = np.random.default_rng(0)
    router = Router(top_k=4, num_groups=4, top_groups=2)
    drawn = popularity_LE(Lognormal(gini=0.3), num_layers=3, num_experts=32, router=router, rng=rng)
    other = other_favourites(drawn, rng)
    assert not np.array_equal(other.inclusion_LE, drawn.inclusion_LE)
    for before, after in zip(drawn.inclusion_LE, other.inclusion_LE, strict=True):
        groups = {tuple(sorted(group)) for group in before.reshape(4, 8).tolist()}
        assert {tuple(sorted(group)) for group in after.reshape(4, 8).tolist()} == groups


def test_memory_over_steps_has_the_simulated_step_in_its_range() -> None:
    asked = scenario(capacity_factor=None, micro_batch=8, seq_len=4096, global_batch=128, recompute="none")
    found = memory_over_steps(asked, 12, redraw="counts")
    peak = simulate(asked).memory["peak_bytes"]
    assert len(set(found.peak_bytes_S)) > 1
    spread = max(found.peak_bytes_S) - min(found.peak_bytes_S)
    assert min(found.peak_bytes_S) - spread <= peak <= max(found.peak_bytes_S) + spread


def test_other_favourites_spread_memory_further_than_counting_does() -> None:
    asked = scenario(capacity_factor=None, micro_batch=8, seq_len=4096, global_batch=128, recompute="none", gini=0.6)
    counts, favourites = (memory_over_steps(asked, 12, redraw=redraw) for redraw in ("counts", "favourites"))
    assert np.std(favourites.peak_bytes_S) > 3 * np.std(counts.peak_bytes_S)


def test_drift_spreads_memory_too_and_is_refused_where_nothing_drifts() -> None:
    sizes = {"capacity_factor": None, "micro_batch": 8, "seq_len": 4096, "global_batch": 128, "recompute": "none"}
    asked = scenario(**sizes)
    with pytest.raises(InputError, match="drift_steps: must be given for memory under drift"):
        memory_over_steps(asked, 3, redraw="drift")
    raw = asked.to_dict()
    raw["routing"]["popularity"] = {"kind": "lognormal", "gini": 0.3, "correlation": {"drift_steps": 50}}
    raw |= {"cluster": SMALL["cluster"]}
    drifting = Scenario.from_mapping(raw)
    found = memory_over_steps(drifting, 6, redraw="drift")
    counts = memory_over_steps(drifting, 6, redraw="counts")
    assert np.std(found.peak_bytes_S) > 3 * np.std(counts.peak_bytes_S)


def test_the_same_seed_gives_the_same_memory_and_another_seed_another() -> None:
    asked = scenario(capacity_factor=None, micro_batch=8, seq_len=4096, global_batch=128, recompute="none")
    first, again = memory_over_steps(asked, 3), memory_over_steps(asked, 3)
    assert first == again
    assert memory_over_steps(asked.with_(seed=1), 3) != first


def test_the_chance_of_running_out_is_that_of_largest_values() -> None:
    """Maxima of 1,000 normal draws: P99 and the share over a limit, estimated from 64 of 20,000 samples."""
    rng = np.random.default_rng(5)
    samples = rng.standard_normal((20_000, 1000)).max(axis=1) + 100.0
    limit = float(np.quantile(samples, 0.95))
    parts = samples[: 100 * 64].reshape(100, 64).tolist()
    estimates = [
        MemoryOverSteps(
            redraw="counts", peak_bytes_S=tuple(part), activations_bytes_S=(), dispatch_bytes_S=(), capacity_bytes=limit
        )
        for part in parts
    ]
    true_p99 = float(np.quantile(samples, 0.99))
    assert np.median([e.p99_bytes for e in estimates]) == pytest.approx(true_p99, abs=0.15)
    assert np.median([e.out_of_memory_fraction for e in estimates]) == pytest.approx(0.05, abs=0.015)


def test_a_peak_that_never_changes_is_certain_to_fit_or_not() -> None:
    for capacity, chance in ((81.0, 0.0), (79.0, 1.0)):
        found = MemoryOverSteps(
            redraw="counts",
            peak_bytes_S=(80.0,) * 3,
            activations_bytes_S=(),
            dispatch_bytes_S=(),
            capacity_bytes=capacity,
        )
        assert (found.p99_bytes, found.out_of_memory_fraction, found.fits_at_p99) == (80.0, chance, not chance)
