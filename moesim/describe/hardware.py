"""GPUs and clusters as moesim sees them: peaks, memory, links. Rates are per GPU and per direction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from moesim.errors import check

NumberKind = Literal["spec", "measured", "assumed"]


@dataclass(frozen=True, kw_only=True)
class Sourced:
    """A number with its pedigree. ``value`` is SI; ``unit`` names that SI unit; ``date`` is when the source was read or published."""

    value: float
    unit: str
    kind: NumberKind
    source: str
    date: str

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
    calibration_name: str = ""  # the device name a calibration profile of this GPU carries

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "memory_bytes_per_s", "nvlink_bytes_per_s"):
            check(getattr(self, name).value > 0, f"gpu {self.name}", name, "must be positive", getattr(self, name).value)
        check("bf16" in self.peak_flops_per_s, f"gpu {self.name}", "peak_flops_per_s", "must name bf16", sorted(self.peak_flops_per_s))


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
    cross_rail: Literal["pxn", "direct", "spine"] = "pxn"
    oversubscription: float = 1.0  # spine: leaf down-link over up-link
    derates: Mapping[str, Sourced] = field(default_factory=dict)  # e.g. nvlink_alltoall, nic_alltoall: achieved / line rate

    def __post_init__(self) -> None:
        owner = f"cluster {self.name}"
        check(self.num_gpus >= 1, owner, "num_gpus", "must be at least 1", self.num_gpus)
        check(self.ranks_per_node >= 1, owner, "ranks_per_node", "must be at least 1", self.ranks_per_node)
        check(self.oversubscription >= 1.0, owner, "oversubscription", "must be at least 1.0", self.oversubscription)
        whole = self.num_gpus <= self.ranks_per_node or self.num_gpus % self.ranks_per_node == 0
        check(whole, owner, "num_gpus", f"must fill whole nodes of {self.ranks_per_node}", self.num_gpus)
