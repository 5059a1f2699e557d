"""A small scenario whose routing several test files study."""

from __future__ import annotations

from moesim import Scenario

SMALL = {
    "model": "olmoe-1b-7b",
    "cluster": "h100-8x-ib400",
    "num_gpus": 16,
    "pp": 2,
    "ep": 8,
    "seq_len": 1024,
    "global_batch": 32,
    "gini": 0.3,
    "capacity_factor": 1.25,
    "recompute": "full",
}


def scenario(**changes: object) -> Scenario:
    return Scenario.make(**SMALL | changes)


def under(convention: dict[str, object], **routing: object) -> Scenario:
    """The small scenario with a capacity convention and other fields of its routing."""
    asked = scenario()
    raw = {name: value for name, value in asked.to_dict().items() if name != "routing"}
    popularity = {"kind": "lognormal", "gini": 0.3}
    kept = {"popularity": popularity, "capacity": convention, "capacity_factor": 1.25} | routing
    return Scenario.from_mapping(raw | {"cluster": SMALL["cluster"], "routing": kept})
