"""Profiles in moesim: read strictly, evaluated as the package that fitted them does, never used for another device."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from moesim.cost.profile import PROFILE_NAMES, Profile, find_profile, load_profile, work
from moesim.describe.hardware import Gpu, Sourced
from moesim.errors import InputError
from reference_model import fit as fitting
from reference_model.fit import fit_points, score
from reference_model.profile_schema import dump_profile

CPU_PROFILE = "cpu-xeon-2-threads"


@pytest.fixture(scope="module")
def shipped() -> Profile:
    return load_profile(CPU_PROFILE)


@pytest.fixture(scope="module")
def shipped_raw() -> dict:
    import moesim.cost.profile as module

    return json.loads((module.PROFILE_FOLDER / f"{CPU_PROFILE}.json").read_text())


def _gpu(calibration_name: str) -> Gpu:
    def one(unit: str) -> Sourced:
        return Sourced(value=1.0, unit=unit, kind="assumed", source="test", date="2025-01-01")

    return Gpu(
        name="test-gpu",
        memory_bytes=one("bytes"),
        memory_bytes_per_s=one("bytes_per_s"),
        peak_flops_per_s={"bf16": one("flops_per_s")},
        nvlink_bytes_per_s=one("bytes_per_s"),
        tdp_w=one("w"),
        num_sms=one("count"),
        host_bytes_per_s=one("B/s"),
        calibration_name=calibration_name,
    )


def test_the_shipped_profiles_curves_and_errors_come_from_its_own_points(shipped_raw):
    fit = fit_points(shipped_raw["points"], element_bytes=4)
    assert fit == shipped_raw["fit"]
    assert score(fit, shipped_raw["points"]) == shipped_raw["errors"]


def test_the_shipped_cpu_profile_says_what_it_is_and_how_good(shipped):
    assert CPU_PROFILE in PROFILE_NAMES
    assert shipped.device.kind == "cpu"
    assert shipped.named_model == ("cpu-small",)
    assert not shipped.settings.quick
    errors = {(row.kind, row.direction): row for row in shipped.errors}
    for direction in ("forward", "backward"):
        assert errors["grouped", direction].num_points >= 40
        assert 0 < errors["grouped", direction].median_fraction < 0.06  # the goal set for two CPU cores


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_both_evaluators_agree_on_products_of_any_shape(shipped, shipped_raw, direction):
    rng = np.random.default_rng(0)
    for _ in range(200):
        num_experts = int(rng.integers(1, 20))
        tokens = np.floor(np.exp(rng.uniform(0, 8, num_experts))) * (rng.random(num_experts) < 0.8)
        if rng.random() < 0.3:
            tokens = np.full(num_experts, 2.0 ** rng.integers(0, 10))
        width_in, width_out = [(512, 2048), (1024, 512), (512, 512), (700, 4096)][rng.integers(4)]
        ours = shipped.grouped_product_s(tokens, width_in, width_out, backward=direction == "backward")
        theirs = fitting.predict(
            shipped_raw["fit"], "grouped", direction, tokens, width_in=width_in, width_out=width_out
        )
        assert (float(ours.seconds), ours.tag) == (pytest.approx(theirs[0], rel=1e-12), theirs[1])


@pytest.mark.parametrize(
    ("kind", "width_in", "width_out", "top"),
    [("router", 512, 8, 4096), ("permute", 512, 2, 4096), ("combine", 512, 2, 4096), ("activation", 1024, 0, 8192)],
)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_both_evaluators_agree_on_the_other_parts(shipped, shipped_raw, kind, width_in, width_out, top, direction):
    for size in (1, 16, 100, 333, top):
        ours = shipped.part_s(kind, [size], width_in=width_in, width_out=width_out, direction=direction)
        theirs = fitting.predict(shipped_raw["fit"], kind, direction, size, width_in=width_in, width_out=width_out)
        assert (float(ours.seconds), ours.tag) == (pytest.approx(theirs[0], rel=1e-12), theirs[1])


def test_both_definitions_of_ideal_work_agree():
    sizes = np.array([0.0, 1.0, 64.0, 1000.0])
    for kind in ("grouped", "dense", "router", "permute", "combine", "activation", "copy"):
        for direction in ("forward", "backward"):
            ours, theirs = (f(kind, direction, sizes, 48, 80, 2) for f in (work, fitting.work))
            np.testing.assert_allclose(np.stack(ours), np.stack(theirs), rtol=1e-15)


def test_many_calls_at_once_equal_the_calls_one_by_one(shipped):
    tokens = np.floor(np.random.default_rng(1).lognormal(3.0, 1.5, size=(3, 5, 8)))
    tokens[0, 0] = 0
    together = shipped.grouped_product_s(tokens, 512, 2048)
    assert together.seconds.shape == (3, 5)
    alone = [[float(shipped.grouped_product_s(row, 512, 2048).seconds) for row in rows] for rows in tokens]
    np.testing.assert_allclose(together.seconds, alone, rtol=1e-12)
    assert together.seconds[0, 0] == 0.0


def test_every_point_of_the_fit_comes_back_as_measured(shipped):
    for point in shipped.points:
        if point.kind == "grouped" and not point.held_out:
            backward = point.direction == "backward"
            tokens = [point.size] * point.num_active
            timed = shipped.grouped_product_s(tokens, point.width_in, point.width_out, backward=backward)
            assert timed.tag == "measured"
            assert float(timed.seconds) == pytest.approx(point.median_s, rel=1e-6)
    dense = next(p for p in shipped.points if p.kind == "dense" and p.direction == "forward" and not p.held_out)
    timed = shipped.dense_product_s(dense.size, dense.width_out, dense.width_in)
    assert (float(timed.seconds), timed.tag) == (pytest.approx(dense.median_s, rel=1e-6), "measured")


def test_memory_time_rises_with_bytes_and_stays_near_the_bandwidth(shipped):
    seconds = shipped.memory_s([2**22, 2**24, 2**26]).seconds
    assert (np.diff(seconds) > 0).all()
    assert seconds[-1] >= 0.9 * 2**26 / shipped.memory_bytes_per_s
    assert 0 < shipped.launch_s < 1e-3


def test_a_worst_tag_speaks_for_all_calls_at_once(shipped):
    assert shipped.grouped_product_s([[64] * 8, [64, 64, 64, 64, 64, 64, 64, 65]], 512, 2048).tag == "interpolated"
    assert shipped.grouped_product_s([[64] * 8, [10**6] * 8], 512, 2048).tag == "extrapolated"
    assert shipped.grouped_product_s([64] * 8, 7168, 4096).tag == "extrapolated"


@pytest.mark.parametrize("bad", [[-1.0], [np.nan], [np.inf]])
def test_impossible_token_counts_are_refused(shipped, bad):
    with pytest.raises(InputError, match="must be finite and not negative"):
        shipped.grouped_product_s(bad, 512, 2048)


def test_a_cpu_profile_is_refused_for_every_gpu(shipped):
    for name in ("NVIDIA H200", "", shipped.device.name):
        with pytest.raises(InputError, match=r"must be a profile of .* for GPU test-gpu"):
            shipped.check_device(_gpu(name))
    assert find_profile(shipped.device.name) is None
    assert find_profile("") is None


def test_a_gpu_profile_is_accepted_for_that_gpu_only(tmp_path, shipped_raw):
    raw = {**shipped_raw, "device": {**shipped_raw["device"], "kind": "cuda", "name": "NVIDIA H200"}}
    profile = load_profile(_written(tmp_path, raw))
    profile.check_device(_gpu("NVIDIA H200"))
    with pytest.raises(InputError, match="NVIDIA H100"):
        profile.check_device(_gpu("NVIDIA H100 80GB HBM3"))


def _written(folder: Path, raw: dict, text: str | None = None) -> Path:
    path = folder / "profile.json"
    path.write_text(dump_profile(raw) if text is None else text)
    return path


def _changed(raw: dict, place: list, value: object) -> dict:
    changed = copy.deepcopy(raw)
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    if value is KeyError:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return changed


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (["schema_version"], 2, r"schema_version: must be 1; got 2\. Run `moesim calibrate` again"),
        (["schema"], "other", "schema: must be moesim-profile"),
        (["fit"], KeyError, "fit: is required"),
        (["device", "name"], KeyError, "device: name: is required"),
        (["fit", "floor_s"], -1.0, "floor_s: must be positive; got -1.0"),
        (["fit", "flops_per_s"], 0, "flops_per_s: must be positive"),
        (["fit", "bytes_per_s"], "fast", "bytes_per_s: must be"),
        (["fit", "curves", 0, "utilisations", 0], -0.5, "utilisations: must be positive; got -0.5"),
        (["fit", "curves", 0, "sizes", 1], 1, "sizes: must be positive and rising"),
        (["fit", "curves"], [], "curves: must hold grouped forward"),
        (["points", 0, "median_s"], -1e-3, "median_s: must be positive"),
        (["points", 0, "colour"], 1, "colour: is an unknown key"),
        (["device", "kind"], "tpu", "kind: must be cpu or cuda; got 'tpu'"),
        (["host_per_op_s"], 0, "host_per_op_s: must be positive"),
    ],
)
def test_a_profile_that_breaks_a_rule_is_refused_by_name(tmp_path, shipped_raw, place, value, message):
    with pytest.raises(InputError, match=message):
        load_profile(_written(tmp_path, _changed(shipped_raw, place, value)))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text[: len(text) // 2], "must be valid JSON"),
        (lambda text: text.replace('"floor_s": ', '"floor_s": NaN, "x": ', 1), "numbers must be finite"),
        (lambda _: "[1, 2]", "must be a mapping"),
        (lambda _: "", "must be valid JSON"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, shipped_raw, spoil, message):
    with pytest.raises(InputError, match=message):
        load_profile(_written(tmp_path, {}, text=spoil(dump_profile(shipped_raw))))


def test_an_unknown_profile_name_gets_a_near_match(tmp_path):
    with pytest.raises(InputError, match=f"Did you mean {CPU_PROFILE}"):
        load_profile("cpu-xeon-2-thread")
    with pytest.raises(InputError, match="must exist"):
        load_profile(tmp_path / "none.json")


def test_a_profile_written_by_the_calibration_survives_the_round_trip(tmp_path, shipped, shipped_raw):
    again = load_profile(_written(tmp_path, shipped_raw))
    assert again == shipped
