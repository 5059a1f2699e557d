"""GPUs and clusters as moesim sees them: peaks, memory, links. Rates are per GPU and per direction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from moesim.describe.checks import check_choice, check_number, check_whole
from moesim.errors import check
from moesim.units import MEGA

NumberKind = Literal["spec", "measured", "assumed"]
MAX_GPUS = int(MEGA)  # ten times the largest cluster: a slip of the keyboard must not fill memory
CrossRail = Literal["pxn", "direct", "spine"]


@dataclass(frozen=True, kw_only=True)
class Sourced:
    """A number with its pedigree: ``value`` is SI, ``unit`` names that unit, ``date`` is its source's."""

    value: float
    unit: str
    kind: NumberKind
    source: str
    date: str

    def __post_init__(self) -> None:
        check_number(f"number from {self.source}", "value", self.value)
        check_choice(f"number from {self.source}", "kind", self.kind, get_args(NumberKind))

    def __float__(self) -> float:
        return self.value


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One accelerator. ``peak_flops_per_s`` is dense (no sparsity), by precision: bf16, fp8, ..."""

    name: str
    memory_bytes: Sourced
    memory_bytes_per_s: Sourced
    peak_flops_per_s: Mapping[str, Sourced]
    nvlink_bytes_per_s: Sourced  # per direction
    tdp_w: Sourced
    num_sms: Sourced
    host_bytes_per_s: Sourced  # to the host's memory, per direction
    calibration_name: str = ""  # the device name a calibration profile of this GPU carries

    def __post_init__(self) -> None:
        owner, peaks = f"gpu {self.name}", self.peak_flops_per_s
        for name in (
            "memory_bytes",
            "memory_bytes_per_s",
            "nvlink_bytes_per_s",
            "tdp_w",
            "num_sms",
            "host_bytes_per_s",
        ):
            check(getattr(self, name).value > 0, owner, name, "must be positive", getattr(self, name).value)
        check("bf16" in peaks, owner, "peak_flops_per_s", "must name bf16", sorted(peaks))
        for precision, peak in peaks.items():
            check(peak.value > 0, owner, f"peak_flops_per_s.{precision}", "must be positive", peak.value)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """num_gpus GPUs in NVLink domains of ranks_per_node, joined by one NIC per GPU through rail leaves and a spine."""

    name: str
    gpu: Gpu
    num_gpus: int
    ranks_per_node: int  # GPUs of one NVLink domain (8 of an HGX board, 72 of an NVL72 rack)
    nvlink_bytes_per_s: Sourced  # per GPU and direction
    nic_bytes_per_s: Sourced  # per GPU and direction
    latency_intra_s: Sourced
    latency_inter_s: Sourced
    cross_rail: CrossRail = "pxn"
    oversubscription: float = 1.0  # spine: leaf down-link over up-link
    num_planes: int = 1  # ports of a NIC, each on a fabric of its own
    num_paths: int = 1  # links from a leaf to the spine, per plane, that pairs of ranks are hashed to; 1 is ideal
    derates: Mapping[str, Sourced] = field(default_factory=dict)  # achieved over line rate: nvlink_alltoall, ...

    def __post_init__(self) -> None:
        owner = f"cluster {self.name}"
        check_whole(owner, "num_gpus", self.num_gpus)
        check(self.num_gpus <= MAX_GPUS, owner, "num_gpus", f"must not exceed {MAX_GPUS}", self.num_gpus)
        for name in ("ranks_per_node", "num_planes", "num_paths"):
            check_whole(owner, name, getattr(self, name))
        for name in ("nvlink_bytes_per_s", "nic_bytes_per_s"):
            check(getattr(self, name).value > 0, owner, name, "must be positive", getattr(self, name).value)
        for name in ("latency_intra_s", "latency_inter_s"):
            check(getattr(self, name).value >= 0, owner, name, "must not be negative", getattr(self, name).value)
        for name, derate in self.derates.items():
            check(0 < derate.value <= 1, owner, f"derates.{name}", "must lie in 0..1", derate.value)
        check_choice(owner, "cross_rail", self.cross_rail, get_args(CrossRail))
        check_number(owner, "oversubscription", self.oversubscription)
        check(self.oversubscription >= 1.0, owner, "oversubscription", "must be at least 1.0", self.oversubscription)
        whole = self.num_gpus <= self.ranks_per_node or self.num_gpus % self.ranks_per_node == 0
        check(whole, owner, "num_gpus", f"must fill whole nodes of {self.ranks_per_node}", self.num_gpus)
