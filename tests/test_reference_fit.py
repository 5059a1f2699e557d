"""The fit recovers a known utilisation curve, and held-out points truly never reach it. NumPy only."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest

from reference_model.fit import fit_points, is_held_out, predict, predict_point, repeat_noise_fraction, score, work

FLOPS_PER_S, BYTES_PER_S, FLOOR_S, ELEMENT_BYTES = 4e11, 2e10, 5e-6, 4
SIZES = sorted([2**i for i in range(11)] + [3 * 2**i for i in range(9)])


def _utilisation(size: float) -> float:
    return 0.3 + 0.7 * math.log2(size + 1) / math.log2(SIZES[-1] + 1)


def _true_s(kind: str, direction: str, sizes, width_in: int, width_out: int) -> float:
    seconds = FLOOR_S
    for size in sizes:
        flops, moved = work(kind, direction, size, width_in, width_out, ELEMENT_BYTES)
        seconds += max(float(flops) / FLOPS_PER_S, float(moved) / BYTES_PER_S) / _utilisation(size)
    return seconds


def _point(kind: str, direction: str, size: int, num_active: int, width_in=512, width_out=2048, **changes) -> dict:
    seconds = changes.get("median_s") or _true_s(kind, direction, [size] * num_active, width_in, width_out)
    point = {
        "kind": kind,
        "direction": direction,
        "size": size,
        "num_active": num_active,
        "width_in": width_in,
        "width_out": width_out,
        "tokens_per_expert": None,
        "held_out": False,
        "median_s": seconds,
        "pass_medians_s": [seconds, seconds],
    }
    return {**point, **changes}


def _points() -> list[dict]:
    points = [_point("launch", "forward", 1, 1, median_s=FLOOR_S)]
    for column, num_active in enumerate((1, 4, 8)):
        for i, size in enumerate(SIZES):
            for direction in ("forward", "backward"):
                held_out = is_held_out(i, len(SIZES), column)
                points.append(_point("grouped", direction, size, num_active, held_out=held_out))
    for i in range(9):
        copied_s = FLOOR_S + 2 ** (i + 16) / BYTES_PER_S
        held_out = is_held_out(i, 9, 0)
        points.append(_point("copy", "forward", 2 ** (i + 16), 1, 0, 0, held_out=held_out, median_s=copied_s))
    return points


def test_fit_recovers_a_known_utilisation_curve_between_its_points():
    fit = fit_points(_points(), element_bytes=ELEMENT_BYTES)
    rows = {(row["kind"], row["direction"]): row for row in score(fit, _points())}
    for direction in ("forward", "backward"):
        # Linear in the log is not linear in tokens; and the ideal turns from bytes to FLOPs: a few percent there.
        assert rows["grouped", direction]["median_fraction"] < 0.015
        assert rows["grouped", direction]["p90_fraction"] < 0.03
        assert rows["grouped", direction]["num_points"] == sum(
            is_held_out(i, len(SIZES), column) for column in range(3) for i in range(len(SIZES))
        )
    uneven = [5, 40, 0, 300, 1000]
    seconds, tag = predict(fit, "grouped", "forward", uneven, width_in=512, width_out=2048)
    assert seconds == pytest.approx(_true_s("grouped", "forward", [5, 40, 300, 1000], 512, 2048), rel=0.03)
    assert tag == "interpolated"


def test_held_out_points_never_reach_the_fit():
    honest, tampered = _points(), copy.deepcopy(_points())
    for point in tampered:
        if point["held_out"]:
            point["median_s"] *= 3.0
    fit = fit_points(honest, element_bytes=ELEMENT_BYTES)
    assert fit_points(tampered, element_bytes=ELEMENT_BYTES) == fit
    assert fit_points([p for p in honest if not p["held_out"]], element_bytes=ELEMENT_BYTES) == fit
    grouped = [row for row in score(fit, tampered) if row["kind"] == "grouped"]
    assert [row["median_fraction"] for row in grouped] == pytest.approx([2 / 3, 2 / 3], abs=0.02)
    assert [row["bias_fraction"] for row in grouped] == pytest.approx([-2 / 3, -2 / 3], abs=0.02)


def test_held_out_sizes_are_every_third_and_never_an_end_of_the_range():
    for column in range(3):
        held = [i for i in range(20) if is_held_out(i, 20, column)]
        assert set(np.diff(held)) == {3}
        assert 0 not in held
        assert 19 not in held
    assert not is_held_out(0, 1, 1)


def test_a_point_of_the_fit_comes_back_exactly_and_is_tagged_measured():
    fit = fit_points(_points(), element_bytes=ELEMENT_BYTES)
    for point in _points():
        if point["held_out"] or point["kind"] == "launch":
            continue
        seconds, tag = predict_point(fit, point)
        assert seconds == pytest.approx(point["median_s"], rel=1e-9)
        assert tag == "measured"


@pytest.mark.parametrize(
    ("size", "widths", "tag"),
    [
        ([64] * 4, (512, 2048), "measured"),
        ([64] * 5, (512, 2048), "interpolated"),
        ([64, 65, 64, 64], (512, 2048), "interpolated"),
        ([70] * 4, (512, 2048), "interpolated"),
        ([5000] * 4, (512, 2048), "extrapolated"),
        ([64] * 9, (512, 2048), "extrapolated"),
        ([64] * 4, (512, 4096), "extrapolated"),
        ([0, 0], (512, 2048), "measured"),
    ],
)
def test_each_prediction_says_how_it_was_come_by(size, widths, tag):
    fit = fit_points(_points(), element_bytes=ELEMENT_BYTES)
    assert predict(fit, "grouped", "forward", size, width_in=widths[0], width_out=widths[1])[1] == tag


def test_beyond_the_range_time_stays_linear_in_tokens():
    fit = fit_points(_points(), element_bytes=ELEMENT_BYTES)
    one, two = (predict(fit, "grouped", "forward", [m], width_in=512, width_out=2048)[0] for m in (10**5, 2 * 10**5))
    assert (two - FLOOR_S) / (one - FLOOR_S) == pytest.approx(2.0, rel=1e-3)


def test_noise_is_the_disagreement_of_the_two_least_disturbed_passes():
    assert repeat_noise_fraction({"pass_medians_s": [1.1, 9.0, 1.0]}) == pytest.approx(0.1)
    assert repeat_noise_fraction({"pass_medians_s": [1.0]}) == 0.0
