"""Calibration end to end on tiny sizes: a valid profile, resumed after a kill, every case timed on fresh memory."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from reference_model import calibrate as calibration  # noqa: E402
from reference_model import measure as measuring  # noqa: E402
from reference_model import timing  # noqa: E402
from reference_model.calibrate import calibrate, error_table, main, ranks_at_hand  # noqa: E402
from reference_model.cases import Case, all_cases, prepare_case  # noqa: E402
from reference_model.exchange import EXCHANGES, busiest_bytes, exchange_cases, pair_bytes  # noqa: E402
from reference_model.profile_schema import check_profile  # noqa: E402
from reference_model.shapes import CPU_SMALL, NAMED_SHAPES, LayerShapes, shapes_of  # noqa: E402
from reference_model.timing import Arena, Effort, keep_freed_memory, sample_times_s  # noqa: E402

CPU = torch.device("cpu")
TINY = LayerShapes(
    name="tiny",
    hidden=16,
    expert_width=16,
    num_experts=4,
    top_k=2,
    active_experts=(1, 4),
    layer_experts=4,
    max_tokens=16,
    max_rows=32,
)
ONCE = Effort(num_passes=2, min_samples=1, max_samples=2, budget_s=1e-5, num_warmups=1, num_extra_passes=0)


@pytest.fixture(autouse=True)
def _small_arena(monkeypatch):
    monkeypatch.setattr(timing, "_CPU_ARENA_BYTES", (2**20, 2**20))
    monkeypatch.setattr(timing, "_STIRRED_BYTES", 4)


def _silent(*_: object) -> None:
    pass


def test_a_quick_calibration_of_tiny_sizes_writes_a_complete_profile(tmp_path):
    profile = calibrate("cpu", TINY, quick=True, out_path=tmp_path / "p.json", progress=_silent, effort=ONCE)
    written = json.loads((tmp_path / "p.json").read_text())
    assert written == json.loads(json.dumps(profile))
    check_profile(written)
    assert written["named_model"] == ["tiny"]
    assert written["device"]["kind"] == "cpu"
    assert any("says nothing about any GPU" in note for note in written["notes"])
    kinds = {point["kind"] for point in written["points"]}
    products = {"grouped", "grouped_skewed", "dense", "router"}
    exchanges = {"all_to_all", "all_to_all_skewed"} if ranks_at_hand(CPU) > 1 else set()
    assert kinds == products | exchanges | {"permute", "combine", "activation", "copy", "launch", "layer"}
    assert {row["kind"] for row in written["errors"]} >= {"grouped", "grouped_skewed", "layer"}
    assert "grouped forward" in error_table(written)
    assert str(tmp_path) not in (tmp_path / "p.json").read_text(), "a profile names nothing of its host"
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"], "the log of points is gone"


def test_a_killed_calibration_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "ranks_at_hand", lambda _: 1)
    out, log = tmp_path / "p.json", tmp_path / "p.json.points.jsonl"
    num_cases = len(all_cases((TINY,), quick=True)) + 2  # and the floor, and the host's overhead

    def kill(done: int, *_: object) -> None:
        if done == 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate("cpu", TINY, quick=True, out_path=out, progress=kill, effort=ONCE)
    assert not out.exists()
    whole = log.read_text()
    assert whole.count("\n") == 51, "a header and 50 cases"
    log.write_text(whole[:-20])  # the last line was cut short
    kept = json.loads(whole.splitlines()[1])

    visited: list[str] = []
    profile = calibrate(
        "cpu", TINY, quick=True, out_path=out, progress=lambda *seen: visited.append(seen[2]), effort=ONCE
    )
    measured = [text for text in visited if text.startswith("pass") and not text.endswith(": done")]
    assert len(measured) == 2 * num_cases - 49
    assert not log.exists()
    samples = [p["pass_medians_s"] for p in profile["points"]]
    if kept["key"] == "host":
        kept = json.loads(whole.splitlines()[2])
    first = sum(kept["samples_s"]) / len(kept["samples_s"])
    assert any(medians[0] == pytest.approx(first) for medians in samples), "the first run's samples were used"


def calibrate_tiny(out: str) -> None:
    """What the killed process runs."""
    timing._CPU_ARENA_BYTES, timing._STIRRED_BYTES = (2**20, 2**20), 4
    calibrate("cpu", TINY, quick=True, out_path=out, progress=_silent, effort=ONCE)


@pytest.mark.slow
def test_a_process_killed_at_random_moments_loses_at_most_the_point_in_progress(tmp_path):
    out, log = tmp_path / "p.json", tmp_path / "p.json.points.jsonl"
    program = f"from tests.test_calibrate import calibrate_tiny; calibrate_tiny({str(out)!r})"
    moments, kept, kills = random.Random(0), [], 0
    while not out.exists():
        process = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
        deadline = time.monotonic() + 120.0
        while process.poll() is None and time.monotonic() < deadline:
            lines = log.read_bytes().split(b"\n")[:-1] if log.exists() else []
            assert lines[: len(kept)] == kept or not lines, "what was measured before the kill is still there"
            if kills < 4 and len(lines) > len(kept) + 1:  # it has gone on: kill it somewhere in the next points
                time.sleep(moments.uniform(0.0, 0.2))
                os.killpg(process.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.005)
        process.wait()
        if log.exists():
            kept = log.read_bytes().split(b"\n")[:-1]
    assert kills == 4
    profile = json.loads(out.read_text())
    assert all(len(point["pass_medians_s"]) == 2 for point in profile["points"])
    assert len(kept) > 10, "the last run began with many points"
    assert not log.exists()


@pytest.mark.slow
def test_a_quick_calibration_of_the_small_layer_takes_under_a_minute(tmp_path):
    if os.getloadavg()[0] > 0.5:
        pytest.skip("other work is running here, and a minute would not be one")
    start_s = time.monotonic()
    profile = calibrate("cpu", quick=True, out_path=tmp_path / "p.json", progress=_silent)
    assert time.monotonic() - start_s < 60.0
    assert profile["named_model"] == ["cpu-small"]


@pytest.mark.skipif(ranks_at_hand(CPU) < 2, reason="needs two cores; this machine has one")
def test_ranks_that_time_at_once_put_their_samples_together_and_resume_from_one_log(tmp_path):
    out, log = tmp_path / "p.json", tmp_path / "p.json.points.jsonl"
    once = replace(ONCE, num_passes=1)
    first = calibrate("cpu", TINY, quick=True, out_path=out, progress=_silent, effort=once, num_ranks=2)
    assert first["settings"]["num_ranks"] == 2
    assert first["device"]["num_threads"] == 1
    for point in first["points"]:
        exchanged = point["kind"] in EXCHANGES  # all ranks together take one sample
        assert point["num_samples"] >= (1 if exchanged else 2), point
    header = {"schema_version": first["schema_version"], "device": first["device"]}
    header |= {"settings": first["settings"], "shapes": first["shapes"]}
    kept = measuring.PointLog(log, header)
    kept.add("host", [1.0])
    for point in first["points"]:
        names = ("kind", "direction", "size", "width_in", "width_out", "num_active", "top_k", "tokens_per_expert")
        kept.add(Case(**{name: point[name] for name in names}).key, [123.0])
    again = calibrate("cpu", TINY, quick=True, out_path=out, progress=_silent, effort=once, num_ranks=2)
    assert {point["median_s"] for point in again["points"]} == {123.0}, "nothing was timed a second time"


def test_more_ranks_than_cores_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"ranks: this device has cores or GPUs for 1 to \d; got 99"):
        calibrate("cpu", TINY, out_path=tmp_path / "p.json", num_ranks=99)


def test_what_is_late_is_not_timed_a_second_time_and_the_profile_says_so(tmp_path):
    log, case = measuring.PointLog(tmp_path / "log", {}), all_cases((TINY,), quick=True)[:1]
    measuring.measure(case, log, CPU, torch.float32, replace(ONCE, limit_s=0.0), 2**20, _silent)
    assert [len(passes) for passes in log.samples.values()] == [1]
    notes = calibration._notes(CPU, (TINY,), [{"pass_medians_s": [1.0]}, {"pass_medians_s": [1.0, 1.0]}])
    assert any("1 of 2 cases were timed in one pass" in note for note in notes)
    assert any("calibrate again when it is idle" in note for note in notes)


def test_points_of_another_device_or_model_are_not_reused(tmp_path):
    log = tmp_path / "p.json.points.jsonl"
    first = measuring.PointLog(log, {"device": "a"})
    first.add("case", [1.0])
    assert measuring.PointLog(log, {"device": "a"}).samples == {"case": [[1.0]]}
    assert measuring.PointLog(log, {"device": "b"}).samples == {}


def test_a_damaged_line_of_the_log_is_dropped_and_the_rest_kept(tmp_path):
    log = tmp_path / "p.json.points.jsonl"
    first = measuring.PointLog(log, {})
    first.add("a", [1.0])
    first.add("b", [2.0])
    lines = log.read_text().splitlines()
    log.write_text("\n".join([lines[0], "{broken", lines[2]]) + "\n")
    assert measuring.PointLog(log, {}).samples == {"b": [[2.0]]}


def test_every_case_of_every_kind_can_be_timed_and_its_key_is_its_own():
    cases = all_cases((TINY,))
    assert len({case.key for case in cases}) == len(cases)
    arena = Arena(CPU, torch.float32, 2**20)
    for case in {(case.kind, case.direction): case for case in cases}.values():
        samples = sample_times_s(prepare_case(case, arena), CPU, ONCE)
        assert all(seconds > 0 for seconds in samples), case


def test_models_that_share_sizes_are_timed_once():
    assert len(all_cases((TINY, TINY))) == len(all_cases((TINY,)))


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_an_exchanges_size_is_what_its_busiest_rank_sends_and_receives(num_ranks):
    cases = exchange_cases((CPU_SMALL,), num_ranks, 4, quick=False)
    assert len({case.key for case in cases}) == len(cases)
    for case in cases:
        bytes_RR = pair_bytes(case)
        assert case.size - 2 * num_ranks <= busiest_bytes(bytes_RR) <= case.size
        assert not bytes_RR.diagonal().any(), "what stays on a rank is not exchanged"
    assert {case.kind for case in cases} == set(EXCHANGES)
    assert not any(case.tokens_per_expert and not case.held_out for case in cases), "no uneven one reaches the fit"


def test_the_arena_hands_out_all_other_memory_before_any_again():
    arena = Arena(CPU, torch.float32, 2**20)
    first = arena.take(1000).data_ptr()
    others = [arena.take(1000).data_ptr() for _ in range(200)]
    assert len(set(others)) == 200
    assert first not in others
    while (address := arena.take(1000).data_ptr()) != first:
        assert address not in others[:1]
    assert arena.take(10).is_leaf


def test_a_large_block_taken_again_costs_no_page_faults() -> None:
    if not keep_freed_memory():
        pytest.skip("this C library has no mallopt")
    pages = 2**26 // resource.getpagesize()

    def faults_of_a_block() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    # Not the second time already: small blocks may have been cut from the first one's place.
    assert min(faults_of_a_block() for _ in range(6)) < pages / 100


def test_calls_are_prepared_ahead_so_that_a_backward_does_not_find_its_forward_in_the_cache(monkeypatch):
    monkeypatch.setattr(timing, "cache_bytes", lambda _: 1000)
    assert timing.calls_ahead(CPU, 400) == 3
    assert timing.calls_ahead(CPU, 4000) == 1
    assert timing.calls_ahead(CPU, 1) == 16
    events: list[str] = []

    def prepare() -> Callable[[], None]:
        number = sum(event.startswith("prepare") for event in events)
        events.append(f"prepare {number}")
        return lambda: events.append(f"call {number}")

    effort = Effort(num_passes=1, min_samples=4, max_samples=4, budget_s=1.0, num_warmups=0)
    assert len(sample_times_s(prepare, CPU, effort, ahead=2)) == 4
    assert events == [f"{what} {i + j}" for i in (0, 2) for what in ("prepare", "call") for j in (0, 1)]


def test_disturbed_passes_are_repeated_until_two_agree(tmp_path, monkeypatch):
    times = iter([1.0, 5.0, 5.01, 1.02] + [1.0] * 10_000)
    log = measuring.PointLog(tmp_path / "log", {})
    monkeypatch.setattr(measuring, "sample_times_s", lambda *_: [next(times)])
    effort = Effort(num_passes=2, min_samples=1, max_samples=1, budget_s=0.0, num_extra_passes=4)
    case = all_cases((TINY,), quick=True)[:1]
    measuring.measure(case, log, CPU, torch.float32, effort, 2**20, _silent)
    assert log.samples[case[0].key] == [[1.0], [5.0], [5.01], [1.02]]
    assert calibration._point(case[0], log.samples[case[0].key])["median_s"] == 1.0


def test_a_device_that_is_not_there_is_refused(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        calibrate("cuda", out_path=tmp_path / "p.json")
    assert main(["--device", "cuda", "--out", str(tmp_path / "p.json")]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("again", "busy"), [(1.02, False), (1.5, True)])
def test_a_profile_timed_on_a_busy_machine_says_so(again, busy):
    notes = calibration._notes(CPU, (TINY,), [{"pass_medians_s": [1.0, again]}] * 5)
    assert any("calibrate again when it is idle" in note for note in notes) == busy


def test_a_large_models_sizes_are_refused_on_a_cpu(tmp_path):
    with pytest.raises(ValueError, match="shapes deepseek-v3: a CPU times small models"):
        calibrate("cpu", NAMED_SHAPES["deepseek-v3"], out_path=tmp_path / "p.json")


def test_named_shapes_hold_their_models_published_sizes():
    sizes = {name: (s.hidden, s.expert_width, s.num_experts, s.top_k) for name, s in NAMED_SHAPES.items()}
    assert sizes["deepseek-v3"] == (7168, 2048, 256, 8)
    assert sizes["mixtral-8x7b"] == (4096, 14336, 8, 2)
    assert sizes["qwen3-30b-a3b"] == (2048, 768, 128, 8)
    assert NAMED_SHAPES["cpu-small"] is CPU_SMALL


@pytest.mark.parametrize("changes", [{"hidden": 0}, {"top_k": 9}, {"num_experts": 0}])
def test_impossible_shapes_are_refused(changes):
    numbers = {"hidden": 8, "expert_width": 8, "num_experts": 8, "top_k": 2, **changes}
    with pytest.raises(ValueError, match="shapes odd"):
        shapes_of(name="odd", **numbers)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none")
def test_a_tiny_calibration_runs_on_the_gpu(tmp_path):
    profile = calibrate("cuda", TINY, quick=True, out_path=tmp_path / "p.json", progress=_silent, effort=ONCE)
    assert profile["device"]["kind"] == "cuda"
    assert profile["dtype"] == "bfloat16"
    assert profile["device"]["driver"]
