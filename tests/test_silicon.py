"""Silicon tables of the extra: read, interpolated, refused; and the rule that makes a backward of forward kernels."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from moesim.catalog import measured
from moesim.catalog.hardware import load_gpu
from moesim.catalog.silicon import ProductTable, product_table
from moesim.catalog.step import NO_LOSS
from moesim.cost.device import device_cost
from moesim.cost.silicon import silicon_of
from moesim.errors import InputError
from moesim.study.accuracy import carried_cases
from moesim.study.accuracy_layer import PARTS, express
from moesim.timeline.step import run_step

HAS_EXTRA = all(importlib.util.find_spec(name) is not None for name in (measured.MODULE, "pyarrow"))
needs_extra = pytest.mark.skipif(not HAS_EXTRA, reason="needs the extra: pip install 'moesim[measured]'")


def made_up_table(factor):
    """A table of which every shape takes factor(m, n, k) seconds; the law is one second."""
    m, n, k = (axis.ravel() for axis in np.meshgrid([64.0, 512, 4096], [128.0, 1024], [256.0, 2048], indexing="ij"))
    return ProductTable(m_N=m, n_N=n, k_N=k, seconds_N=factor(m, n, k), source="made up")


def test_a_timed_shape_gives_back_its_factor_and_one_between_lies_between():
    table = made_up_table(lambda m, n, k: np.log2(m) + 10 * np.log2(n) + 100 * np.log2(k))
    silicon = silicon_of(table, np.ones(len(table.m_N)))
    for m, n, k, seconds in zip(table.m_N, table.n_N, table.k_N, table.seconds_N, strict=True):
        assert silicon.factor_by_rows(m, n, k) == pytest.approx(seconds)
        assert silicon.factor_by_reduced(m, n, k) == pytest.approx(seconds)
    # Linear in all three logarithms, so what is linear in them is read back anywhere on the grid.
    assert silicon.factor_by_rows(300, 300, 300) == pytest.approx(np.log2(300) * 111)
    assert silicon.factor_by_reduced(300, 300, np.array([300.0])) == pytest.approx(np.log2(300) * 111)


def test_beyond_the_grid_its_edge_holds_and_a_missing_shape_takes_its_neighbours_along_m():
    table = made_up_table(lambda m, _n, _k: m / 64)
    silicon = silicon_of(table, np.ones(len(table.m_N)))
    assert silicon.factor_by_rows(1e6, 1e6, 1e6) == pytest.approx(64)
    assert silicon.factor_by_rows(1, 1, 1) == pytest.approx(1)
    whole = table.m_N != 512
    whole |= (table.n_N != 128) | (table.k_N != 256)
    holed = silicon_of(table.pick(whole), np.ones(int(whole.sum())))
    assert 1 < holed.factor_by_rows(512, 128, 256) < 64


def test_without_the_extra_measured_is_refused_and_says_how_to_install_it(monkeypatch):
    product_table.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"needs the package aiconfigurator-core.*pip install 'moesim\[measured\]'"):
        device_cost(load_gpu("a100-80gb"), "bf16", "measured")


@pytest.mark.parametrize(
    ("gpu", "precision", "words"),
    [
        ("h800", "bf16", "gpu: must be one of a100-80gb"),
        ("h100-sxm", "fp8", "precision: must be products in bf16, fp8"),
    ],
)
def test_what_no_table_times_is_refused_by_name(gpu, precision, words):
    with pytest.raises(InputError, match=words):
        device_cost(load_gpu(gpu), precision, "measured")


def test_auto_and_datasheet_never_look_at_the_tables():
    for profile in ("auto", "datasheet"):
        assert device_cost(load_gpu("h100-sxm"), "bf16", profile).silicon is None


@needs_extra
@pytest.mark.parametrize(("gpu", "precision"), [("h100-sxm", "bf16"), ("b200", "bf16"), ("b200", "nvfp4")])
def test_every_second_reduced_size_left_out_is_read_back_better_than_by_the_law(gpu, precision):
    device = device_cost(load_gpu(gpu), precision, "datasheet")
    table = product_table(gpu, precision)
    table = table.pick((table.m_N % 64 == 0) & (table.n_N >= 512) & (table.k_N >= 512) & (table.k_N <= 16384))
    law_s = device.law.product_s(
        table.m_N,
        table.n_N,
        table.k_N,
        device.peak_flops_per_s,
        device.memory_bytes_per_s,
        device.recipe.element_bytes,
    )
    left_out = np.isin(table.k_N, np.unique(table.k_N)[1:-1:2])
    silicon = silicon_of(table.pick(~left_out), law_s[~left_out])
    rest = table.pick(left_out)
    factor = [silicon.factor_by_rows(*shape) for shape in zip(rest.m_N, rest.n_N, rest.k_N, strict=True)]
    read_back, by_law = (np.abs(s / rest.seconds_N - 1) for s in (law_s[left_out] * factor, law_s[left_out]))
    print(gpu, precision, f"{np.median(read_back):.1%} by the table, {np.median(by_law):.1%} by the law")
    assert np.median(read_back) < 0.04
    assert np.median(read_back) < 0.6 * np.median(by_law)


@needs_extra
def test_a_measured_device_says_where_both_directions_come_from_and_keeps_a_grouped_kernel_near_the_law():
    device, law = (device_cost(load_gpu("b200"), "mxfp8", name) for name in ("measured", "datasheet"))
    told = {item.part: item for item in device.provenance}
    assert told["products forward"].kind == "interpolated"
    assert told["products backward"].kind == "assumed"
    assert "router and head: products forward" in told
    rows = np.array([[512.0, 0.0, 4096.0, 100.0], [0.0, 0.0, 0.0, 0.0]])
    for name in ("grouped_s", "weight_gradient_s", "backward_s"):
        timed, expected = (getattr(one, name)(rows, 7168, 4096) for one in (device, law))
        assert 0.6 < timed[0] / expected[0] < 1.7
        assert timed[1] == 0.0


@needs_extra
def test_forward_kernels_and_the_rule_of_the_backward_come_near_the_measured_layers():
    errors: dict[bool, list[float]] = {False: [], True: []}
    for row in carried_cases("layer"):
        scenario = express(row, "carried").with_(profile="measured")
        if scenario.train.precision != "bf16":
            continue
        for run in run_step(scenario, constants=NO_LOSS).stages[0].operations:
            seconds = sum(float(run.times.part_R[part].mean()) for part in PARTS if part in run.times.part_R)
            told_ms = float(row["backward_ms" if run.is_backward else "forward_ms"])
            errors[run.is_backward].append(seconds * 1e3 / told_ms - 1)
    median = {way: float(np.median(np.abs(of))) for way, of in errors.items()}
    print({"backward" if way else "forward": f"{value:.1%}" for way, value in median.items()})
    assert median[False] < 0.04
    assert median[True] < 0.08
