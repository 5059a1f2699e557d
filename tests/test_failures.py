"""The run of weeks: books that balance, the closed form of memoryless failures, spares, slow servers, honest ends."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.catalog.failures import default_operations, fleet_names, load_fleet, mean_time_between_s, restart_s, sources
from moesim.describe.reliability import Checkpoints, FailureKind, Fleet, Operations
from moesim.errors import InputError, MoesimError
from moesim.study.goodput import best_interval_s, daly_interval_s, expected_goodput, young_interval_s
from moesim.timeline.failures import RUN_PARTS, RunOutcome, run_with_failures
from moesim.units import DAY_S, HOUR_S

LLAMA = load_fleet("llama-3-16k-h100")
CRASH = FailureKind(name="crash", share=1.0, detection_s=400.0, needs_server=False)
BREAK = FailureKind(name="break", share=1.0, detection_s=400.0, needs_server=True)


def fleet_of(kind: FailureKind, mean_s: float) -> Fleet:
    """One GPU that fails every mean_s on average."""
    return replace(LLAMA, kinds=(kind,), per_gpu_hour=replace(LLAMA.per_gpu_hour, value=HOUR_S / mean_s))


def run(work_s: float, fleet: Fleet, seed: int = 0, **changes: object) -> RunOutcome:
    given = {
        "num_gpus": 1,
        "checkpoints": Checkpoints(interval_s=1800, stall_s=40, write_s=40),
        "operations": Operations(restart_s=200),
    } | changes
    return run_with_failures(work_s, fleet=fleet, rng=np.random.default_rng(seed), **given)  # type: ignore[arg-type]


@settings(deadline=5000)
@given(
    interval_s=st.floats(60, 20_000),
    stall_s=st.floats(0, 300),
    later_s=st.floats(0, 3000),
    mean_h=st.floats(2, 500),
    spares=st.integers(0, 3),
    slow=st.booleans(),
    planned=st.floats(0, 4),
    seed=st.integers(0, 10_000),
)
def test_the_books_balance_and_the_kept_work_is_all_the_work(
    interval_s: float, stall_s: float, later_s: float, mean_h: float, spares: int, slow: bool, planned: float, seed: int
) -> None:
    work_s = 3 * DAY_S
    operations = Operations(
        restart_s=200,
        num_spares=spares,
        repair_s=6 * HOUR_S,
        swap_s=100,
        slow_per_gpu_hour=0.05 * slow,
        planned_per_day=planned,
    )
    checkpoints = Checkpoints(interval_s=interval_s, stall_s=stall_s, write_s=stall_s + later_s)
    try:
        found = run(work_s, fleet_of(BREAK, mean_h * HOUR_S), seed, operations=operations, checkpoints=checkpoints)
    except MoesimError:
        assert mean_h < 24  # no time to work
        return
    assert set(found.seconds) == set(RUN_PARTS)
    assert min(found.seconds.values()) > -1e-6
    assert sum(found.seconds.values()) == pytest.approx(found.total_s, rel=1e-9)
    assert found.seconds["training"] == pytest.approx(work_s, rel=1e-9)
    assert found.total_s >= work_s * (1 - 1e-12)
    assert all(0 <= outage.lost_s <= interval_s + 2 * (stall_s + later_s) + 1e-6 for outage in found.outages)
    assert len(found.outages) == found.num_failures


def test_without_failures_only_checkpoints_cost() -> None:
    found = run(100 * 1800.0, fleet_of(CRASH, 1e15))
    assert found.num_failures == 0
    assert found.total_s == pytest.approx(100 * 1800 + 99 * 40)  # the last stretch ends the run


@pytest.mark.parametrize("mean_s", [3 * HOUR_S, 12 * HOUR_S])
def test_memoryless_failures_cost_what_dalys_formula_says(mean_s: float) -> None:
    work_s, checkpoints, operations = (
        1800.0 * 3000,
        Checkpoints(interval_s=1800, stall_s=40, write_s=40),
        Operations(restart_s=200),
    )
    fleet = fleet_of(CRASH, mean_s)
    shares = [run(work_s, fleet, seed).goodput_fraction for seed in range(12)]
    rate, recovery_s = 1 / mean_s, 600.0
    exact = 1800 * rate / (math.exp(rate * recovery_s) * math.expm1(rate * 1840))
    # The mean of 12 runs scatters by their spread over the root of 12: three of those.
    assert np.mean(shares) == pytest.approx(exact, abs=3 * np.std(shares) / math.sqrt(12))
    assert expected_goodput(checkpoints, operations, fleet, fleet.per_gpu_hour.value, 1) == pytest.approx(exact)


def test_runs_that_differ_in_their_checkpoints_meet_the_same_failures() -> None:
    fleet = fleet_of(CRASH, 5 * HOUR_S)
    often, seldom = (
        run(20 * DAY_S, fleet, 3, checkpoints=Checkpoints(interval_s=i, stall_s=0, write_s=0)) for i in (600, 7200)
    )
    first = min(len(often.outages), len(seldom.outages)) // 2
    assert [o.start_s for o in often.outages[:first]] == pytest.approx([o.start_s for o in seldom.outages[:first]])
    assert often.goodput_fraction > seldom.goodput_fraction


def test_an_asynchronous_checkpoint_is_no_use_before_it_is_written() -> None:
    fleet = fleet_of(CRASH, 5 * HOUR_S)
    fast, slow = (
        run(20 * DAY_S, fleet, 1, checkpoints=Checkpoints(interval_s=1800, stall_s=5, write_s=write))
        for write in (5, 1500)
    )
    assert slow.seconds["repeated"] > 1.3 * fast.seconds["repeated"]


def test_spares_spare_the_wait_for_a_repair() -> None:
    fleet = fleet_of(BREAK, DAY_S)
    none, three = (
        run(60 * DAY_S, fleet, 2, operations=Operations(restart_s=200, num_spares=n, repair_s=8 * HOUR_S))
        for n in (0, 3)
    )
    assert three.seconds["spare"] < 0.1 * none.seconds["spare"]
    assert none.seconds["spare"] == pytest.approx(none.num_failures * 8 * HOUR_S, rel=0.35)  # two may wait at once


def test_a_slow_server_slows_the_job_until_it_is_found() -> None:
    operations = Operations(restart_s=0, slow_per_gpu_hour=1 / 48, slow_fraction=0.5, slow_detection_s=4 * HOUR_S)
    found = run(200 * DAY_S, fleet_of(CRASH, 1e15), operations=operations)
    share_slow = 4 / (48 + 4)  # of all time
    assert found.seconds["slow"] / found.total_s == pytest.approx(share_slow * (1 - 1 / 1.5), rel=0.15)


def test_a_run_that_cannot_end_says_why() -> None:
    with pytest.raises(MoesimError, match=r"the run does not end: .* a failure comes every 100 s, and a checkpoint"):
        run(DAY_S, fleet_of(CRASH, 100.0))


def test_the_best_interval_beats_its_neighbours_and_lies_near_young_and_daly() -> None:
    operations, rate = default_operations(16384, num_spares=20), LLAMA.per_gpu_hour.value
    shape = Checkpoints(interval_s=1, stall_s=60, write_s=60)
    best = best_interval_s(shape, operations, LLAMA, rate, 16384)
    mean_s = mean_time_between_s(rate, 16384)
    assert best == pytest.approx(daly_interval_s(60, mean_s), rel=0.01)
    assert best == pytest.approx(young_interval_s(60, mean_s), rel=0.1)

    def goodput(interval_s: float) -> float:
        return expected_goodput(replace(shape, interval_s=interval_s), operations, LLAMA, rate, 16384)

    assert goodput(best) > max(goodput(0.8 * best), goodput(1.25 * best))


def test_published_rates_are_what_their_owners_print() -> None:
    printed = {"rsc-1-a100": 6.5, "meta-32k-h100": 2.3, "llama-3-16k-h100": 3.79}
    assert set(fleet_names()) == set(printed)
    for name, rate in printed.items():
        fleet = load_fleet(name)
        assert fleet.per_thousand_server_days == pytest.approx(rate, rel=0.002)
        assert sum(kind.share for kind in fleet.kinds) == pytest.approx(1)
    assert mean_time_between_s(LLAMA.per_gpu_hour.value, 16384) / HOUR_S == pytest.approx(3.09, abs=0.01)
    watched, unwatched = (load_fleet("llama-3-16k-h100", inspected=seen) for seen in (True, False))
    assert all(a.detection_s <= b.detection_s for a, b in zip(watched.kinds, unwatched.kinds, strict=True))


def test_a_restart_takes_longer_on_more_gpus() -> None:
    assert [restart_s(n) for n in (64, 16384, 64000, 98000)] == [200, 200, 600, 900]
    assert restart_s(200_000) > 900
    assert all(kind in ("measured", "assumed", "spec") and source for _, kind, source in sources())


def test_nonsense_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="write_s: must be at least stall_s = 40"):
        Checkpoints(interval_s=10, stall_s=40, write_s=20)
    with pytest.raises(InputError, match=r"goodput: fleet: must be one of .* Did you mean meta-32k-h100"):
        load_fleet("meta-32k-h10")
    with pytest.raises(InputError, match="operations: repair_s: must not be negative"):
        Operations(restart_s=1, repair_s=-1)
