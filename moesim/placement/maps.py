"""A user's map in and out: the JSON that serving engines read and write, as checked placements.

Legend: L layers, E experts, R ranks, S slots. Three forms, told apart by their key:
- ``physical_to_logical_map`` (or ``physical_to_logical``): layers x slots of expert numbers, what SGLang's
  --init-expert-location and EPLB take; a single row stands for every layer.
- ``expert_to_rank``: experts, or layers x experts, of rank numbers; one slot for each expert.
- ``layer_list``: what vLLM-Ascend's expert_map_path takes: for each layer its devices, for each device its experts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moesim.door import read_json, write_text_atomically
from moesim.errors import InputError, check
from moesim.placement.experts import Placement
from moesim.placement.slots import LayerPlacements, RankSlots, from_placements

MapForm = Literal["physical_to_logical_map", "expert_to_rank", "layer_list"]
_KEYS = ("physical_to_logical_map", "physical_to_logical", "expert_to_rank", "layer_list")


def load_map(
    path: str | Path, *, num_layers: int, num_experts: int, ranks: RankSlots, allow_duplicates: bool = True
) -> LayerPlacements:
    """The placement that a JSON file holds. See `parse_map`."""
    return parse_map(
        read_json(path),
        str(path),
        num_layers=num_layers,
        num_experts=num_experts,
        ranks=ranks,
        allow_duplicates=allow_duplicates,
    )


def parse_map(
    raw: object, owner: str, *, num_layers: int, num_experts: int, ranks: RankSlots, allow_duplicates: bool = True
) -> LayerPlacements:
    """Plain JSON values as a placement of num_layers layers on ``ranks``.

    allow_duplicates: whether a rank may hold an expert twice. Raises InputError naming the file, the place and the rule
    for a missing expert, a wrong length, a number out of range, or a duplicate that is not allowed.

    >>> from moesim.placement.slots import even_slots
    >>> parse_map({"expert_to_rank": [1, 0]}, "map.json", num_layers=1, num_experts=2, ranks=even_slots(2, 2)).layer(0)
    Placement(expert_to_rank_E=array([1, 0]), num_ranks=2)
    """
    check(isinstance(raw, Mapping), owner, "", "must be a mapping with one of " + ", ".join(_KEYS), type(raw).__name__)
    assert isinstance(raw, Mapping)
    found = [key for key in _KEYS if key in raw]
    check(len(found) == 1, owner, "", "must hold exactly one of " + ", ".join(_KEYS), sorted(map(str, raw)))
    key, value = found[0], raw[found[0]]
    if key == "layer_list":
        rows = _from_devices(value, owner, num_experts, ranks)
    elif key == "expert_to_rank":
        rows = _from_expert_to_rank(_rows(value, owner, key, num_layers), owner, num_experts, ranks)
    else:
        rows = _rows(value, owner, key, num_layers)
        for layer, row in enumerate(rows):
            _check_row(row, owner, f"{key}[{layer}]", ranks.num_slots, "slots", num_experts, "experts")
    check(len(rows) == num_layers, owner, key, f"must have {num_layers} layers", len(rows))
    for layer, row in enumerate(rows):
        missing = sorted(set(range(num_experts)) - set(row))
        rule = f"must hold each of the {num_experts} experts"
        check(not missing, owner, f"{key}[{layer}]", rule, f"no slot for {_some(missing)}")
        if not allow_duplicates:
            _check_no_twins(row, owner, f"{key}[{layer}]", ranks)
    return LayerPlacements(physical_to_logical_LS=np.array(rows), num_experts=num_experts, ranks=ranks)


def map_text(placed: LayerPlacements, *, form: MapForm = "physical_to_logical_map") -> str:
    """The placement as a JSON text of the form named; expert_to_rank only where each expert has one slot."""
    expert_LS, first_R1 = placed.physical_to_logical_LS, placed.ranks.first_R1
    if form == "physical_to_logical_map":
        return json.dumps({"physical_to_logical_map": expert_LS.tolist()}) + "\n"
    if form == "expert_to_rank":
        rows = [placed.layer(layer).expert_to_rank_E.tolist() for layer in range(placed.num_layers)]
        return json.dumps({"expert_to_rank": rows}) + "\n"
    layers = []
    for layer in range(placed.num_layers):
        devices = [
            {"device_id": r, "device_expert": expert_LS[layer, first_R1[r] : first_R1[r + 1]].tolist()}
            for r in range(placed.ranks.num_ranks)
        ]
        layers.append({"layer_id": layer, "device_count": placed.ranks.num_ranks, "device_list": devices})
    return json.dumps({"moe_layer_count": placed.num_layers, "layer_list": layers}) + "\n"


def save_map(path: str | Path, placed: LayerPlacements, *, form: MapForm = "physical_to_logical_map") -> None:
    """Write `map_text` whole or not at all."""
    write_text_atomically(path, map_text(placed, form=form))


def _rows(value: object, owner: str, key: str, num_layers: int) -> list[list[int]]:
    """A row for each layer; a single row of numbers stands for all."""
    check(isinstance(value, list) and len(value) > 0, owner, key, "must be a non-empty list", value)
    assert isinstance(value, list)
    if not isinstance(value[0], list):
        return [_whole(value, owner, key)] * num_layers
    return [_whole(row, owner, f"{key}[{layer}]") for layer, row in enumerate(value)]


def _whole(row: object, owner: str, field: str) -> list[int]:
    fine = isinstance(row, list) and all(isinstance(item, int) and not isinstance(item, bool) for item in row)
    check(fine, owner, field, "must be a list of whole numbers", row)
    assert isinstance(row, list)
    return row


def _check_row(row: list[int], owner: str, field: str, size: int, sizes: str, limit: int, what: str) -> None:
    check(len(row) == size, owner, field, f"must have {size} {sizes}", len(row))
    outside = next((i for i, item in enumerate(row) if not 0 <= item < limit), None)
    if outside is not None:
        raise InputError(owner, f"{field}[{outside}]", f"must name {what} 0..{limit - 1}", row[outside])


def _check_no_twins(row: list[int], owner: str, field: str, ranks: RankSlots) -> None:
    first_R1 = ranks.first_R1
    for rank in range(ranks.num_ranks):
        held = row[first_R1[rank] : first_R1[rank + 1]]
        twins = sorted({expert for expert in held if held.count(expert) > 1})
        check(not twins, owner, field, "must hold no expert twice on a rank", f"{_some(twins)} on rank {rank}")


def _from_expert_to_rank(rows: list[list[int]], owner: str, num_experts: int, ranks: RankSlots) -> list[list[int]]:
    placements = []
    for layer, row in enumerate(rows):
        field = f"expert_to_rank[{layer}]"
        _check_row(row, owner, field, num_experts, "experts", ranks.num_ranks, "ranks")
        held = np.bincount(row, minlength=ranks.num_ranks)
        wrong = np.flatnonzero(held != ranks.num_slots_R)
        if wrong.size:
            rank = int(wrong[0])
            rule = f"must put {ranks.num_slots_R[rank]} experts on rank {rank}"
            raise InputError(owner, field, rule, int(held[rank]))
        placements.append(Placement(expert_to_rank_E=np.array(row), num_ranks=ranks.num_ranks))
    return from_placements(placements).physical_to_logical_LS.tolist()


def _from_devices(value: Any, owner: str, num_experts: int, ranks: RankSlots) -> list[list[int]]:
    """Rows of experts from a list of layers, each with its devices; layers and devices may stand in any order."""
    rows = {}
    for layer_id, layer in _numbered(value, owner, "layer_list", "layer_id"):
        field = f"layer_list[{layer_id}]"
        row: list[int] = []
        devices = dict(_numbered(layer.get("device_list"), owner, f"{field}.device_list", "device_id"))
        rule = f"must have {ranks.num_ranks} devices, numbered from 0"
        check(sorted(devices) == list(range(ranks.num_ranks)), owner, f"{field}.device_list", rule, sorted(devices))
        for rank in range(ranks.num_ranks):
            place = f"{field}.device_list[{rank}].device_expert"
            held = _whole(devices[rank].get("device_expert"), owner, place)
            _check_row(held, owner, place, int(ranks.num_slots_R[rank]), "slots", num_experts, "experts")
            row += held
        rows[layer_id] = row
    check(sorted(rows) == list(range(len(rows))), owner, "layer_list", "must number its layers from 0", sorted(rows))
    return [rows[layer] for layer in range(len(rows))]


def _numbered(value: Any, owner: str, field: str, key: str) -> list[tuple[int, Mapping[str, Any]]]:
    check(isinstance(value, list) and len(value) > 0, owner, field, "must be a non-empty list", value)
    seen: dict[int, Mapping[str, Any]] = {}
    for item in value:
        check(isinstance(item, Mapping) and isinstance(item.get(key), int), owner, field, f"needs a {key} each", item)
        check(item[key] not in seen, owner, field, f"the same {key} stands twice", item[key])
        seen[item[key]] = item
    return list(seen.items())


def _some(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:5]))
    return (
        ("experts " if len(numbers) > 1 else "expert ")
        + shown
        + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")
    )
