"""Figures say their unit on every axis, keep one colour per part, and draw the same SVG each time."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from report_fakes import drops, ep_points, memory, step_result, twins

from moesim.catalog.models import load_model
from moesim.describe.counts import describe
from moesim.metrics.step import MEMORY_PARTS, STEP_PARTS
from moesim.report import figures, load_figures
from moesim.report.style import COLOURS, MEMORY_WORDS, WORDS, Picture, spread
from moesim.study.links import BreakEven
from moesim.units import GIB

UNIT = re.compile(r"\[(s|GiB|GB/s|tokens/s per GPU|billions|%|×|rank, .*)\]$")
COUNTED = re.compile(r"(Expert|Pipeline|MoE layer)")  # positions and sizes, which have no unit


def break_even(at: float | None = 90e9) -> Picture:
    found = BreakEven(
        nic_bytes_per_s=(12.5e9, 50e9, 100e9),
        tokens_per_s_per_gpu={
            "moe": (100.0, 1500.0, 2000.0),
            "dense_active": (1700.0, 1800.0, 1810.0),
            "dense_total": (150.0,) * 3,
        },
        asked_bytes_per_s=50e9,
        total_bytes_per_s=at,
        active_bytes_per_s=None,
        sentence="",
    )
    return figures.break_even(found)


def all_pictures() -> dict[str, Picture]:
    result = step_result()
    slow = step_result(scale=2.0, step_s=9.4, tokens_per_s_per_gpu=160.0)
    return {
        "memory_over_ep": figures.memory_over_ep(ep_points(), capacity=80 * GIB, asked_ep=8),
        "memory_by_stage": figures.memory_by_stage(result),
        "step_time": figures.step_time(result),
        "twins": figures.twins(twins(result, step_result(tokens_per_s_per_gpu=1800.0), slow)),
        "parameters": figures.parameters(describe(load_model("mixtral-8x7b"))),
        "break_even": break_even(),
        "load_map": load_figures.load_map(result, range(4)),
        "load_curve": load_figures.load_curve(result),
        "drop_curve": load_figures.drop_curve(drops(), asked=1.25),
    }


@pytest.fixture(scope="module")
def pictures() -> dict[str, Picture]:
    return all_pictures()


def test_every_axis_carries_its_unit_or_names_what_it_counts(pictures: dict[str, Picture]) -> None:
    for name, picture in pictures.items():
        labels = [label for axes in picture.figure.axes for label in (axes.get_xlabel(), axes.get_ylabel()) if label]
        assert labels, name
        for label in labels:
            assert UNIT.search(label) or COUNTED.match(label), f"{name}: {label}"


def test_every_figure_has_a_title_and_an_alternative_text(pictures: dict[str, Picture]) -> None:
    for name, picture in pictures.items():
        assert picture.figure.get_suptitle(), name
        assert len(picture.alt) > 5, name
        assert 'role="img"' in picture.svg, name


def test_an_svg_is_one_element_without_a_date_or_a_foreign_address(pictures: dict[str, Picture]) -> None:
    for name, picture in pictures.items():
        assert picture.svg.startswith("<svg "), name
        assert picture.svg.rstrip().endswith("</svg>"), name
        assert "dc:date" not in picture.svg, name
        assert set(re.findall(r"https?://[^\"' ]+", picture.svg)) <= {
            "http://www.w3.org/2000/svg",
            "http://www.w3.org/1999/xlink",
        }


def test_the_same_results_draw_the_same_svg(pictures: dict[str, Picture]) -> None:
    again = all_pictures()
    assert {name: p.svg for name, p in again.items()} == {name: p.svg for name, p in pictures.items()}


def test_a_part_has_one_colour_and_words_for_a_reader() -> None:
    assert set(STEP_PARTS) <= set(WORDS)
    assert set(STEP_PARTS) <= set(COLOURS)
    assert set(MEMORY_PARTS) == set(MEMORY_WORDS)
    assert {part.removesuffix("_bytes") for part in MEMORY_PARTS} <= set(COLOURS)
    stacked = [COLOURS[part.removesuffix("_bytes")] for part in MEMORY_PARTS]
    assert len(set(stacked)) == len(stacked)


def test_stacked_memory_bars_reach_the_peak(pictures: dict[str, Picture]) -> None:
    axes = pictures["memory_over_ep"].figure.axes[0]
    tops = [patch.get_y() + patch.get_height() for patch in axes.patches]  # type: ignore[attr-defined]
    assert max(tops) == pytest.approx(max(point.memory["peak_bytes"] for point in ep_points()) / GIB)


def test_the_memory_title_lists_the_sizes_that_fit() -> None:
    picture = figures.memory_over_ep(ep_points(), capacity=80 * GIB, asked_ep=8)
    assert picture.figure.get_suptitle() == "Memory fits with 8, 16 or 32 GPUs sharing the experts"
    none = [point for point in ep_points() if not point.fits]
    assert figures.memory_over_ep(none, capacity=80 * GIB, asked_ep=1).figure.get_suptitle().startswith("No expert")


def test_the_fullest_stage_is_named() -> None:
    stages = [{"stage": s, "rank": s, **memory(scale)} for s, scale in enumerate((0.5, 0.9, 0.7))]
    assert "stage 1 is the fullest" in figures.memory_by_stage(step_result(memory_by_rank=stages)).alt


def test_parts_that_take_no_time_are_left_out_of_the_step_figure() -> None:
    parts = step_result().step_parts_s | {"recompute": 0.0}
    assert WORDS["recompute"] not in figures.step_time(step_result(step_parts_s=parts)).alt


def test_no_break_even_draws_only_this_clusters_line() -> None:
    assert "break-even" in break_even().svg
    assert "break-even" not in break_even(None).svg


def test_a_balanced_load_needs_no_alert() -> None:
    even = step_result(load_LE=step_result().load_LE * 0 + 1 / 16, alerts=[])
    assert load_figures.load_map(even, range(4)).alt.startswith("Every expert gets about the mean load")
    assert "no expert reaches the alert line" in load_figures.load_curve(even).alt


def test_a_long_title_takes_two_lines() -> None:
    wordy = step_result(
        binds="the all-to-alls of dispatch and combine, which is a long way to say it (37% of the step)"
    )
    assert "\n" in figures.step_time(wordy).figure.get_suptitle()


def test_labels_keep_their_order_and_their_distance() -> None:
    places = spread([5.0, 5.1, 5.2, 0.0], 1.0, 0.0, 6.0)
    assert places[3] == 0.0
    assert places[2] - places[1] >= 1.0 - 1e-9
    assert places[1] - places[0] >= 1.0 - 1e-9
    assert max(places) <= 6.0


def test_importing_figures_does_not_load_the_plotting_libraries() -> None:
    code = "import sys, moesim.report.figures, moesim.report.load_figures as _;"
    code += "print({'matplotlib', 'seaborn'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"
