"""Flat names and short forms of a scenario file: from what users type to the mapping that the door parses.

Nothing is checked against the scenario's types here; moesim.scenario does that. Raises InputError for unknown names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from moesim.door.parse import apply_overrides
from moesim.errors import InputError, check, near_match

MEASURES = ("gini", "cv", "max_mean")  # of a popularity

# Flat names, as notebooks and --set use them, and where each lives in the scenario file.
LEAVES: Mapping[str, tuple[str, ...]] = {
    **{name: (name,) for name in ("model", "cluster", "num_gpus", "profile", "fidelity", "seed", "replicas")},
    **{
        name: ("parallel", name)
        for name in (
            *("tp", "pp", "vpp", "cp", "cp_kind", "ep", "etp", "zero", "fsdp", "replicate"),
            *("layout", "num_first_stage_layers", "num_last_stage_layers", "embedding_as_layer", "loss_as_layer"),
        )
    },
    **{
        name: ("train", name)
        for name in (
            "seq_len",
            "micro_batch",
            "global_batch",
            "precision",
            "recompute",
            "schedule",
            "overlap",
            "mtp",
            "cuda_graphs",
            "software",
        )
    },
    **{name: ("train", name) for name in ("offload", "fused_loss", "documents")},
    **{name: ("train", "optimizer", name) for name in ("gradients", "main_weights", "moments", "weights", "average")},
    **{name: ("train", "kept", name) for name in ("attention_output", "activation_input")},
    "popularity": ("routing", "popularity", "kind"),
    "gini": ("routing", "popularity", "gini"),
    **{name: ("routing", name) for name in ("recording", "capacity_factor", "drop_policy", "dispatcher")},
    **{name: ("placement", name) for name in ("policy", "num_slots", "map", "split", "rank_speeds")},
}


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Flat names to the file's nesting; an unknown name is refused with a near match.

    >>> nest({"ep": 8, "seed": 1})
    {'parallel': {'ep': 8}, 'seed': 1}
    """
    nested: dict[str, Any] = {}
    for name, value in leaves.items():
        if name not in LEAVES:
            raise InputError("parameters", name, "is not a parameter", value, near_match(name, LEAVES))
        at = nested
        for key in LEAVES[name][:-1]:
            at = at.setdefault(key, {})
        at[LEAVES[name][-1]] = value
    if "gini" in leaves and "popularity" not in leaves:
        nested["routing"]["popularity"]["kind"] = "lognormal"
    return nested


def spelt_out(raw: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """The file's mapping with its short forms written out: ``recording: FILE`` is a popularity, recorded; a popularity
    of which only a measure is given is lognormal, and so are documents without a file; these may be a file's name or
    their median length; rank_speeds may be a text such as ``3=0.8,8-15=0.5``. Raises InputError for a recording beside
    a popularity.

    >>> spelt_out({"routing": {"recording": "trace.npy"}}, "scenario")
    {'routing': {'popularity': {'kind': 'recorded', 'file': 'trace.npy'}}}
    """
    raw = dict(raw)
    if isinstance(raw.get("placement"), Mapping) and "rank_speeds" in raw["placement"]:
        speeds = _speeds_spelt_out(raw["placement"]["rank_speeds"], f"{owner}.placement")
        raw["placement"] = dict(raw["placement"]) | {"rank_speeds": speeds}
    documents = raw["train"].get("documents") if isinstance(raw.get("train"), Mapping) else None
    if isinstance(documents, str | int | float) and not isinstance(documents, bool):
        is_number = str(documents).replace(".", "", 1).isdecimal()
        documents = {"median_tokens": float(documents)} if is_number else {"file": documents}
        raw["train"] = dict(raw["train"]) | {"documents": documents}
    if isinstance(documents, Mapping) and "kind" not in documents:
        kind = {"kind": "histogram" if "file" in documents else "lognormal"}
        raw["train"] = dict(raw["train"]) | {"documents": kind | dict(documents)}
    if not isinstance(raw.get("routing"), Mapping):
        return raw
    routing = dict(raw["routing"])
    recording, popularity = routing.pop("recording", None), routing.get("popularity")
    if not popularity:
        routing.pop("popularity", None)
    if recording is not None:
        rule = "stands in place of a popularity: give one of them"
        check(not popularity, f"{owner}.routing", "recording", rule, popularity, f"The recording: {recording}.")
        routing["popularity"] = {"kind": "recorded", "file": recording}
    elif isinstance(popularity, Mapping) and "kind" not in popularity and popularity.keys() & set(MEASURES):
        routing["popularity"] = {"kind": "lognormal"} | dict(popularity)
    return raw | {"routing": routing}


def _speeds_spelt_out(speeds: Any, owner: str) -> Any:
    """rank_speeds as a mapping with texts for keys."""
    if speeds is None:
        return {}
    if isinstance(speeds, Mapping):
        return {str(rank): speed for rank, speed in speeds.items()}
    rule = "must be a mapping of ranks to speeds, or read such as 3=0.8,8-15=0.5"
    check(isinstance(speeds, str), owner, "rank_speeds", rule, speeds)
    found: dict[str, float] = {}
    for item in filter(None, (part.strip() for part in speeds.split(","))):
        rank, equals, speed = (part.strip() for part in item.partition("="))
        is_number = bool(equals) and speed.replace(".", "", 1).isdecimal()
        check(is_number and rank not in found, owner, "rank_speeds", rule, speeds)
        found[rank] = float(speed)
    return found


def overruled(raw: Mapping[str, Any], leaves: Mapping[str, Any], settings: Iterable[str] = ()) -> dict[str, Any]:
    """A scenario file's mapping with flat names and then ``a.b=c`` texts laid over it, the later overruling.

    A popularity that is named anew forgets what the file said of the old one; so does a recording. Raises InputError.

    >>> overruled({"parallel": {"ep": 4, "pp": 2}}, {"ep": 8}, ["seed=1"])
    {'parallel': {'ep': 8, 'pp': 2}, 'seed': 1}
    """
    spelt = [_dotted(text) for text in settings]
    asked = apply_overrides(nest(leaves), spelt)
    kept = _without_replaced(raw, asked, anew="popularity" in leaves)
    return apply_overrides(merge(kept, nest(leaves)), spelt)


def _dotted(text: str) -> str:
    """A --set text with a flat name (ep=32) spelt as the file nests it (parallel.ep=32)."""
    name, equals, value = text.partition("=")
    if "." in name or name.strip() not in LEAVES:
        return text
    return ".".join(LEAVES[name.strip()]) + equals + value


def _without_replaced(raw: Mapping[str, Any], asked: Mapping[str, Any], *, anew: bool) -> Mapping[str, Any]:
    """A scenario file's mapping without its popularity, or recording, where another is asked for.

    anew: whether the kind of popularity itself is named, which forgets all that the file said of it.
    """
    there, named = raw.get("routing"), asked.get("routing")
    if not isinstance(there, Mapping) or not isinstance(named, Mapping):
        return raw
    old, new = there.get("popularity"), named.get("popularity")
    was_recorded = isinstance(old, Mapping) and old.get("kind") == "recorded"
    is_replaced = anew or named.get("recording") is not None or (new is not None and was_recorded)
    gone = ({"popularity"} if is_replaced else set()) | ({"recording"} if new is not None else set())
    return {**raw, "routing": {name: value for name, value in there.items() if name not in gone}}


def merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """base with change laid over it, mapping by mapping."""
    merged = dict(base)
    for key, value in change.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(value, Mapping) and isinstance(old, Mapping) else value
    return merged
