"""The calibration profile: one JSON file, read by ``moesim.cost.profile``. Nothing in it names the host.

A change that an older reader would misread raises SCHEMA_VERSION.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SCHEMA = "moesim-profile"
SCHEMA_VERSION = 1

# name: (type, what it says)
TOP_FIELDS: Mapping[str, str] = {
    "schema": f"always {SCHEMA!r}",
    "schema_version": "whole number",
    "name": "short name of the profile",
    "date": "day of the measurement, ISO 8601",
    "device": "mapping, DEVICE_FIELDS",
    "shapes": "list of the models timed, with their sizes",
    "named_model": "names of those models; a CPU profile times a small one, never a GPU's",
    "dtype": "float32 or bfloat16",
    "settings": "mapping: quick, num_passes, min_samples, arena_bytes, num_ranks (that timed every case at once)",
    "host_per_op_s": "what the host spends per operation when it does nothing else",
    "fit": "mapping: element_bytes, flops_per_s, bytes_per_s, floor_s, curves (see reference_model.fit.fit_points)",
    "errors": "list of ERROR_FIELDS, on held-out points only",
    "points": "list of POINT_FIELDS, everything that was measured",
    "notes": "list of sentences for the reader",
}
DEVICE_FIELDS: Mapping[str, str] = {
    "kind": "cpu or cuda",
    "name": "as the driver or the kernel reports it",
    "driver": "version, empty on a CPU",
    "runtime": "CUDA version, empty on a CPU",
    "torch_version": "",
    "num_threads": "of torch",
    "cache_bytes": "last-level cache as reported; 0 unknown",
    "memory_bytes": "0 unknown",
}
POINT_FIELDS: Mapping[str, str] = {
    "kind": "grouped, grouped_skewed, dense, router, permute, combine, activation, copy, launch, layer, all_to_all, "
    "all_to_all_skewed",
    "direction": "forward or backward (all gradients of the operation)",
    "size": "tokens per expert, tokens, rows or bytes (all_to_all: of the busiest rank): see reference_model.fit.work",
    "width_in": "inputs of the product, or hidden",
    "width_out": "outputs of the product, experts (router), experts per token (permute, combine), ranks (all_to_all)",
    "num_active": "experts with tokens",
    "top_k": "0 where it plays no role",
    "tokens_per_expert": "list, only where the load is uneven (all_to_all: bytes of each pair of ranks); else null",
    "held_out": "true: never part of the fit",
    "median_s": "median of the least disturbed pass, other work only adds time; of an exchange of the middle pass",
    "p10_s": "over the samples of all passes",
    "p90_s": "over the samples of all passes",
    "num_samples": "of all passes",
    "pass_medians_s": "one per pass; passes visit all cases, so they lie far apart in time",
}
ERROR_FIELDS: Mapping[str, str] = {
    "kind": "of the points",
    "direction": "of the points",
    "num_points": "held out",
    "median_fraction": "median of |predicted / measured - 1|",
    "p90_fraction": "its 90th percentile",
    "bias_fraction": "median of predicted / measured - 1",
    "noise_fraction": "median disagreement of the two least disturbed passes over the same point",
}


def check_profile(profile: Mapping[str, Any]) -> None:
    """Raise ValueError naming the field if the profile is not what this schema says. The writer's own check."""
    _check_fields(profile, TOP_FIELDS, "profile")
    if (profile["schema"], profile["schema_version"]) != (SCHEMA, SCHEMA_VERSION):
        raise ValueError(f"profile: schema must be {SCHEMA} {SCHEMA_VERSION}; got {profile['schema_version']!r}")
    _check_fields(profile["device"], DEVICE_FIELDS, "device")
    for i, point in enumerate(profile["points"]):
        _check_fields(point, POINT_FIELDS, f"points[{i}]")
        times = [point[name] for name in ("median_s", "p10_s", "p90_s")] + list(point["pass_medians_s"])
        if not all(math.isfinite(seconds) and seconds > 0 for seconds in times):
            raise ValueError(f"points[{i}]: times must be positive and finite; got {times}")
    for i, row in enumerate(profile["errors"]):
        _check_fields(row, ERROR_FIELDS, f"errors[{i}]")


def _check_fields(mapping: Mapping[str, Any], fields: Mapping[str, str], owner: str) -> None:
    missing, unknown = set(fields) - set(mapping), set(mapping) - set(fields)
    if missing or unknown:
        raise ValueError(f"{owner}: missing fields {sorted(missing)}, unknown fields {sorted(unknown)}")


def dump_profile(profile: Mapping[str, Any]) -> str:
    """The profile as JSON text: one line per curve, error row and point, so that files compare line by line."""
    lines = []
    for name, value in profile.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            rows = ",\n  ".join(json.dumps(row, allow_nan=False) for row in value)
            lines.append(f"{json.dumps(name)}: [\n  {rows}\n ]")
        elif name == "fit":
            rows = ",\n  ".join(json.dumps(row, allow_nan=False) for row in value["curves"])
            head = ", ".join(
                f"{json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in value.items() if k != "curves"
            )
            lines.append(f'"fit": {{{head}, "curves": [\n  {rows}\n ]}}')
        else:
            lines.append(f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}")
    return "{\n " + ",\n ".join(lines) + "\n}\n"


def write_profile(profile: Mapping[str, Any], path: Path) -> None:
    """Check and write the profile whole, or not at all."""
    check_profile(profile)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(dump_profile(profile), encoding="utf-8")
    os.replace(beside, path)
