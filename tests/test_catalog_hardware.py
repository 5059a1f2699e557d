"""GPUs and clusters: every preset loads, every number has its pedigree, a user's file is read or refused by name."""

from pathlib import Path

import pytest

from moesim.catalog.hardware import (
    CLUSTER_NAMES,
    GPU_NAMES,
    load_cluster,
    load_gpu,
    sourced_numbers,
)
from moesim.errors import InputError
from moesim.units import GIGA, MIB

CATALOG = Path(__file__).parent.parent / "moesim" / "catalog"
GPU = """
  name: mine
  memory: 96 GiB
  memory_bandwidth: 4 TB/s
  peak: {bf16: 1000 TFLOP/s}
  nvlink: 400 GB/s
  tdp: 700 W
  num_sms: 128
"""
CLUSTER = f"gpu:{GPU}num_gpus: 16\nranks_per_node: 8\nnic: 400 Gbit/s\nlatency_inter: 5us\n"


def test_every_file_of_the_catalog_has_a_name_and_every_name_a_file() -> None:
    assert {path.stem for path in (CATALOG / "gpus").iterdir()} == set(GPU_NAMES)
    assert {path.stem for path in (CATALOG / "clusters").iterdir()} == set(CLUSTER_NAMES)


@pytest.mark.parametrize("name", CLUSTER_NAMES)
def test_every_number_of_a_preset_carries_kind_source_and_date(name: str) -> None:
    cluster = load_cluster(name)
    assert cluster.name == name
    for where, number in sourced_numbers(cluster).items():
        assert number.kind in ("spec", "measured", "assumed"), where
        assert len(number.source) > 3, where
        assert number.date[:2] == "20", where


@pytest.mark.parametrize("name", GPU_NAMES)
def test_gpu_figures_lie_where_a_wrong_unit_would_not(name: str) -> None:
    gpu = load_gpu(name)
    assert 75e9 < gpu.memory_bytes.value < 300e9
    assert 2e12 <= gpu.memory_bytes_per_s.value <= 8e12
    assert 300e12 <= gpu.peak_flops_per_s["bf16"].value <= 2500e12
    assert 200e9 <= gpu.nvlink_bytes_per_s.value <= 900e9
    assert 400 <= gpu.tdp_w.value <= 1400
    assert 108 <= gpu.num_sms.value <= 160


def test_h800_links_are_those_of_the_paper_per_direction() -> None:
    cluster = load_cluster("h800-8x-ib400")
    assert cluster.nvlink_bytes_per_s.value == 200 * GIGA
    assert cluster.nvlink_bytes_per_s.value * cluster.derates["nvlink_alltoall"].value == pytest.approx(160 * GIGA)
    assert cluster.nic_bytes_per_s.value == 50 * GIGA
    assert 43 < cluster.nic_bytes_per_s.value * cluster.derates["nic_alltoall"].value / GIGA < 47


def test_an_80_gb_gpu_has_what_nvidia_smi_prints() -> None:
    assert load_gpu("h100-sxm").memory_bytes.value == 81559 * MIB


def test_num_gpus_beside_the_name_replaces_the_count() -> None:
    assert load_cluster("h100-8x-ib400", num_gpus=24).num_gpus == 24
    assert load_cluster("h100-8x-ib400", num_gpus=4).num_gpus == 4


def test_a_users_cluster_file_with_its_own_gpu_is_read(tmp_path: Path) -> None:
    path = tmp_path / "lab.yaml"
    path.write_text(CLUSTER)
    cluster = load_cluster(path)
    assert cluster.name == "lab"
    assert cluster.gpu.memory_bytes.value == 96 * 1024 * MIB
    assert cluster.nic_bytes_per_s.value == 50 * GIGA
    assert cluster.nvlink_bytes_per_s.value == 400 * GIGA
    assert cluster.latency_inter_s.value == pytest.approx(5e-6)
    assert (cluster.nic_bytes_per_s.kind, cluster.nic_bytes_per_s.source) == ("assumed", str(path))
    assert cluster.latency_intra_s.source.startswith("default")
    assert cluster.derates["nic_alltoall"].kind == "assumed"


def test_a_clusters_own_links_and_derates_replace_those_of_its_gpu_and_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "lab.yaml"
    path.write_text(CLUSTER + "nvlink: 250 GB/s\nderates: {nic_alltoall: 0.5}\nname: my lab\n")
    cluster = load_cluster(path)
    assert cluster.nvlink_bytes_per_s.value == 250 * GIGA
    assert cluster.gpu.nvlink_bytes_per_s.value == 400 * GIGA
    assert (cluster.derates["nic_alltoall"].value, cluster.derates["nic_alltoall"].source) == (0.5, str(path))
    assert cluster.name == "my lab"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("nic: 400 Gbit/s", "nic: 400", "nic: must be a quantity with its unit, such as 450 GB/s; got 400"),
        ("nic: 400 Gbit/s", "nic: 400 GiB", "nic: must be a number with a unit out of B/s"),
        ("nic: 400 Gbit/s", "nic: -1 GB/s", "nic: must be a number with a unit"),
        ("nic: 400 Gbit/s", "nic: 0 GB/s", "nic: must be positive and finite; got 0.0"),
        ("nic: 400 Gbit/s", "", "nic: is required"),
        ("num_gpus: 16", "num_gpus: 12", "num_gpus: must fill whole nodes of 8; got 12"),
        ("num_gpus: 16", "num_gpus: 0", "num_gpus: must be at least 1; got 0"),
        ("num_gpus: 16", "num_gpu: 16", "num_gpu: is an unknown key; got 16. Did you mean num_gpus"),
        ("memory: 96 GiB", "memory: 96", "memory: must be a quantity with its unit, such as 80 GiB; got 96"),
        ("{bf16: 1000 TFLOP/s}", "{fp8: 1 TFLOP/s}", "peak_flops_per_s: must name bf16; got ['fp8']"),
        ("latency_inter: 5us", "derates: {nic: 0.9}", "nic: is an unknown key; got 0.9"),
        ("latency_inter: 5us", "derates: {nic_alltoall: 1.9}", "nic_alltoall: must lie in 0..1; got 1.9"),
        ("latency_inter: 5us", "cross_rail: pxm", "cross_rail: must be pxn or direct or spine; got 'pxm'. Did you"),
        ("latency_inter: 5us", "oversubscription: 0.5", "oversubscription: must be at least 1.0; got 0.5"),
    ],
)
def test_a_bad_cluster_file_is_refused_by_name(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "lab.yaml"
    assert old in CLUSTER
    path.write_text(CLUSTER.replace(old, new))
    with pytest.raises(InputError) as refusal:
        load_cluster(path)
    assert message in str(refusal.value)
    assert str(path) in str(refusal.value)


def test_unknown_names_get_a_near_match() -> None:
    with pytest.raises(InputError, match="Did you mean h800-8x-ib400"):
        load_cluster("h800-8x-ib40")
    with pytest.raises(InputError, match="Did you mean h100-sxm"):
        load_gpu("h100sxm")
    with pytest.raises(InputError, match="must exist"):
        load_cluster("nowhere/cluster.yaml")
