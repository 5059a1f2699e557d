"""The question: everything one run needs, as one immutable value.

A scenario comes from a YAML file, a mapping, or flat keyword names (``Scenario.make(model=..., ep=64)``), always
through the same door, so notebook parameters, CLI options and files are checked alike. Raises InputError and
NotModelledError.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moesim.catalog.hardware import CLUSTER_NAMES, load_cluster
from moesim.catalog.models import MODEL_NAMES, load_model
from moesim.cost.context import check_context
from moesim.cost.recompute import useful_modules
from moesim.describe.documents import HistogramLengths
from moesim.describe.hardware import Cluster
from moesim.describe.model import Model, MoeFfn
from moesim.describe.parallel import Parallelism, RankLayout
from moesim.describe.pipeline import held_by_stage
from moesim.describe.schedules import check_schedule
from moesim.describe.workload import Recorded, Routing, Training
from moesim.door.files import read_yaml
from moesim.door.parse import apply_overrides, parse_as
from moesim.errors import InputError, check, near_match

SCHEMA = 1
PolicyName = Literal[
    "contiguous",
    "striped",
    "random",
    "by_load",
    "eplb",
    "eplb_global",
    "search",
    "search_hierarchical",
    "node_aware",
    "map",
]
SplitName = Literal["even", "nearest", "least_loaded", "uneven"]
DEFAULTS: Mapping[str, Any] = {
    "model": "deepseek-v3",
    "cluster": "h800-8x-ib400",
    "num_gpus": 2048,
    "tp": 1,
    "pp": 16,
    "ep": 64,
    "global_batch": 15360,
    "precision": "fp8",
}

MEASURES = ("gini", "cv", "max_mean")  # of a popularity

# Flat names, as notebooks and --set use them, and where each lives in the scenario file.
LEAVES: Mapping[str, tuple[str, ...]] = {
    **{name: (name,) for name in ("model", "cluster", "num_gpus", "profile", "fidelity", "seed", "replicas")},
    **{
        name: ("parallel", name)
        for name in (
            *("tp", "pp", "vpp", "cp", "cp_kind", "ep", "etp", "zero"),
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
        )
    },
    **{name: ("train", name) for name in ("offload", "fused_loss")},
    **{name: ("train", "optimizer", name) for name in ("gradients", "main_weights", "moments")},
    "popularity": ("routing", "popularity", "kind"),
    "gini": ("routing", "popularity", "gini"),
    **{name: ("routing", name) for name in ("recording", "capacity_factor", "drop_policy", "dispatcher")},
    **{name: ("placement", name) for name in ("policy", "num_slots", "map", "split", "rank_speeds")},
}


@dataclass(frozen=True, kw_only=True)
class PlacementChoice:
    """How experts are placed, and how a sender chooses among the replicas of one."""

    policy: PolicyName = "contiguous"
    num_slots: int | None = None  # slots of an expert-parallel group, the same on each rank; null: one for each expert
    map: str | None = None  # a file of physical_to_logical or expert_to_rank, for policy: map
    split: SplitName = "even"  # which replica a sender takes; of one replica each there is no choice
    age_steps: int = 0  # steps since experts were placed: a drifting popularity has moved on by then
    # GPUs that compute slower than the others (or faster), by global rank or ranks such as 8-15: speed over theirs.
    rank_speeds: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rule = "must name a file where policy is map, and only there"
        check((self.policy == "map") == (self.map is not None), "scenario.placement", "map", rule, self.map)
        slots = self.num_slots
        check(slots is None or slots >= 1, "scenario.placement", "num_slots", "must be at least 1", slots)
        for name, speed in self.rank_speeds.items():
            check(
                speed > 0, "scenario.placement.rank_speeds", name, "must be positive: a speed over the others'", speed
            )


@dataclass(frozen=True, kw_only=True)
class _File:
    """The scenario file's shape, before names are looked up."""

    schema: Literal[1] = 1
    model: str = ""
    cluster: str = ""
    num_gpus: int | None = None
    parallel: Parallelism = field(default_factory=Parallelism)
    train: Training = field(default_factory=Training)
    routing: Routing = field(default_factory=Routing)
    placement: PlacementChoice = field(default_factory=PlacementChoice)
    profile: str = "auto"
    fidelity: Literal["port", "exact"] = "port"
    seed: int = 0
    replicas: int = 4  # blocks of a stage's ranks that are simulated at most; more are estimated from these


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Model, cluster, parallelism, training, routing, placement: one question, checked as a whole at birth."""

    model: Model
    cluster: Cluster
    parallel: Parallelism = field(default_factory=Parallelism)
    train: Training = field(default_factory=Training)
    routing: Routing = field(default_factory=Routing)
    placement: PlacementChoice = field(default_factory=PlacementChoice)
    profile: str = (
        "auto"  # auto: a committed profile of this GPU, else datasheet; measured: the extra's tables; or a path
    )
    fidelity: Literal["port", "exact"] = "port"
    seed: int = 0
    replicas: int = 4  # blocks of a stage's ranks that are simulated at most; more are estimated from these
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)  # as asked, for echoing

    def __post_init__(self) -> None:
        check(self.seed >= 0, "scenario", "seed", "must be at least 0", self.seed)
        check(self.replicas >= 2, "scenario", "replicas", "must be at least 2", self.replicas)
        p, model = self.parallel, self.model
        layout = self.layout
        age, popularity = self.placement.age_steps, self.routing.popularity
        drift_steps = getattr(getattr(popularity, "correlation", None), "drift_steps", None)
        rule = "needs routing.popularity.correlation.drift_steps: without drift a placement does not age"
        check(age == 0 or drift_steps is not None, "scenario.placement", "age_steps", rule, age)
        self.train.num_micro_batches(layout.dp)
        for module in self.train.recomputed_modules:
            useful = useful_modules(model)
            rule, hint = f"names what no layer of {model.name} has", f"It has {', '.join(useful)}."
            check(module in useful, "scenario.train", "recompute", rule, module, hint)
        held_by_stage(len(model.layers), p, len(model.mtp_layers) if self.train.mtp else 0)
        paired = "forward_backward" in self.train.overlaps
        check_schedule(self.train.schedule, pp=p.pp, vpp=p.vpp, num_micro_batches=self.num_micro_batches, paired=paired)
        if p.vpp > 1 and self.train.num_micro_batches(layout.dp) % p.pp:
            rule = f"interleaving (vpp={p.vpp}) needs a multiple of pp={p.pp} micro-batches"
            raise InputError("scenario.parallel", "vpp", rule, self.train.num_micro_batches(layout.dp))
        check(
            self.train.seq_len % (p.tp * p.cp) == 0,
            "scenario.train",
            "seq_len",
            f"must be a multiple of tp*cp = {p.tp * p.cp}",
            self.train.seq_len,
        )
        check_context(model, p, self.train)
        for layer in model.kinds:
            attention = layer.attention
            check(
                attention.num_heads % p.tp == 0,
                "scenario.parallel",
                "tp",
                f"must divide the {attention.num_heads} attention heads of {model.name}",
                p.tp,
            )
            ffn = layer.ffn
            if not isinstance(ffn, MoeFfn):
                continue
            check(
                ffn.num_experts % p.ep == 0,
                "scenario.parallel",
                "ep",
                f"must divide the {ffn.num_experts} experts of {model.name}",
                p.ep,
            )
            most = ffn.num_experts * p.ep
            rule = f"must not exceed every expert on every expert-parallel rank, {most}"
            slots = self.placement.num_slots
            check(slots is None or slots <= most, "scenario.placement", "num_slots", rule, slots)
            check(
                ffn.expert.width % p.etp == 0,
                "scenario.parallel",
                "etp",
                f"must divide the expert width {ffn.expert.width}",
                p.etp,
            )
        check(
            model.is_moe or p.ep * p.etp == 1,
            "scenario.parallel",
            "ep",
            f"must be 1, since {model.name} is dense",
            p.ep * p.etp,
        )
        _speed_of_rank(self.placement.rank_speeds, layout.num_gpus)  # refuses ranks that are none
        check(
            p.tp <= self.cluster.ranks_per_node,
            "scenario.parallel",
            "tp",
            f"must fit into a node of {self.cluster.ranks_per_node}",
            p.tp,
        )

    @property
    def layout(self) -> RankLayout:
        return self.parallel.rank_layout(self.cluster.num_gpus)

    @property
    def speed_of_rank(self) -> NDArray[np.float64]:
        """Each GPU's computing speed over the usual one."""
        return _speed_of_rank(self.placement.rank_speeds, self.cluster.num_gpus)

    @property
    def expert_copies(self) -> float:
        """Slots over experts: above 1 where experts have replicas."""
        experts = {layer.ffn.num_experts for layer in self.model.layers if isinstance(layer.ffn, MoeFfn)}
        return (self.placement.num_slots or max(experts)) / max(experts) if experts else 1.0

    @property
    def num_micro_batches(self) -> int:
        return self.train.num_micro_batches(self.layout.dp)

    @classmethod
    def make(cls, **leaves: Any) -> Scenario:
        """A scenario from flat names: ``Scenario.make(model="mixtral-8x7b", cluster="h100-8x-ib400", num_gpus=64,
        ep=8)``.
        """
        return cls.from_mapping(nest(leaves))

    @classmethod
    def from_file(cls, path: str | Path, overrides: Iterable[str] = ()) -> Scenario:
        """A scenario from a YAML file; overrides are texts such as ``parallel.ep=32``."""
        raw = read_yaml(Path(path))
        check(isinstance(raw, dict), str(path), "", "must be a mapping of scenario fields", type(raw).__name__)
        return cls.from_mapping(apply_overrides(raw, list(overrides)), owner=str(path), folder=Path(path).parent)

    @classmethod
    def from_mapping(cls, raw: Mapping[str, Any], owner: str = "scenario", folder: Path | None = None) -> Scenario:
        """A scenario from the file's mapping. Files that it names are looked up beside it first."""
        asked = parse_as(_File, spelt_out(raw, owner), owner=owner)
        for name, presets in (("model", MODEL_NAMES), ("cluster", CLUSTER_NAMES)):
            hint = "Presets: " + ", ".join(presets)
            rule = "is required: a preset's name or a file's path"
            check(getattr(asked, name) != "", owner, name, rule, "nothing", hint)
        asked = _files_beside(asked, folder)
        model = load_model(_beside(asked.model, folder))
        cluster = load_cluster(_beside(asked.cluster, folder), asked.num_gpus)
        kept = {
            f.name: getattr(asked, f.name) for f in dataclasses.fields(cls) if f.name not in ("model", "cluster", "raw")
        }
        return cls(model=model, cluster=cluster, raw=_plain(asked), **kept)

    def with_(self, **leaves: Any) -> Scenario:
        """This scenario with some flat names changed, checked again: ``scenario.with_(ep=32, capacity_factor=1.25)``.

        ``model`` and ``cluster`` may also be descriptions.
        """
        described = {
            name: leaves.pop(name) for name in ("model", "cluster") if isinstance(leaves.get(name), Model | Cluster)
        }
        fields = [f.name for f in dataclasses.fields(self) if f.name not in ("model", "cluster", "raw")]
        raw = {**self.raw, **{name: _plain(getattr(self, name)) for name in fields}}  # a replaced field counts
        if leaves.keys() & {"popularity", "gini", "recording"}:  # another one; what it remembers stays
            correlation = raw["routing"]["popularity"].get("correlation")
            forgets = correlation is None or leaves.get("popularity") == "balanced" or leaves.get("recording")
            raw["routing"]["popularity"] = {} if forgets else {"correlation": correlation}
        asked = parse_as(_File, spelt_out(merge(raw, nest(leaves)), "scenario"), owner="scenario")
        named = {"model": "model" in leaves, "cluster": "cluster" in leaves or "num_gpus" in leaves}
        model = described.get("model") or (load_model(asked.model) if named["model"] else self.model)
        cluster = described.get("cluster") or (
            load_cluster(asked.cluster, asked.num_gpus) if named["cluster"] else self.cluster
        )
        return Scenario(
            model=model,
            cluster=cluster,
            raw=_plain(asked) | {"model": model.name, "num_gpus": cluster.num_gpus},
            **{name: getattr(asked, name) for name in fields},
        )

    def placed_anew(self, policy: str, num_slots: int | None) -> Scenario:
        """This scenario with its experts placed now, by another policy or into other slots."""
        changes = {"policy": policy, "num_slots": num_slots, "map": None, "age_steps": 0}
        placement = parse_as(PlacementChoice, _plain(self.placement) | changes, "scenario.placement")
        return dataclasses.replace(self, placement=placement, raw=merge(self.raw, {"placement": _plain(placement)}))

    def with_recording(self, file: str | Path) -> Scenario:
        """This scenario with recorded routing in place of its popularity."""
        popularity = Recorded(file=str(file))
        raw = merge(self.raw, {"routing": {"popularity": None}})
        raw = merge(raw, {"routing": {"popularity": _plain(popularity)}})
        return dataclasses.replace(self, routing=dataclasses.replace(self.routing, popularity=popularity), raw=raw)

    def to_dict(self) -> dict[str, Any]:
        """The canonical mapping: the file's fields, every default filled in."""
        kept = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("model", "cluster", "raw")
        }
        return {
            "schema": SCHEMA,
            "model": self.model.name,
            "cluster": self.cluster.name,
            "num_gpus": self.cluster.num_gpus,
        } | {name: _plain(value) for name, value in kept.items()}

    @property
    def point_id(self) -> str:
        """sha256 of the canonical scenario."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def _speed_of_rank(rank_speeds: Mapping[str, float], num_gpus: int) -> NDArray[np.float64]:
    """1 but for the ranks named. Raises InputError for ranks that are none, or named twice."""
    speed_of_rank, named = np.ones(num_gpus), np.zeros(num_gpus, dtype=bool)
    owner, rule = "scenario.placement.rank_speeds", f"must be ranks in 0..{num_gpus - 1}, such as 3 or 8-15"
    for name, speed in rank_speeds.items():
        first, _, last = name.partition("-")
        check(first.isdecimal() and (last or first).isdecimal(), owner, name, rule, name)
        low, high = int(first), int(last or first)
        check(low <= high < num_gpus, owner, name, rule, name)
        check(not named[low : high + 1].any(), owner, name, "names a rank that another entry names", name)
        speed_of_rank[low : high + 1] = speed
        named[low : high + 1] = True
    return speed_of_rank


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
    of which only a measure is given is lognormal, and so are documents without a file; rank_speeds may be a text such
    as ``3=0.8,8-15=0.5``. Raises
    InputError for a recording beside a popularity.

    >>> spelt_out({"routing": {"recording": "trace.npy"}}, "scenario")
    {'routing': {'popularity': {'kind': 'recorded', 'file': 'trace.npy'}}}
    """
    raw = dict(raw)
    if isinstance(raw.get("placement"), Mapping) and "rank_speeds" in raw["placement"]:
        speeds = _speeds_spelt_out(raw["placement"]["rank_speeds"], f"{owner}.placement")
        raw["placement"] = dict(raw["placement"]) | {"rank_speeds": speeds}
    documents = raw["train"].get("documents") if isinstance(raw.get("train"), Mapping) else None
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


def _files_beside(asked: _File, folder: Path | None) -> _File:
    """The file with the files that it names (recording, documents, map) looked up beside it first; all must exist."""
    popularity, choice = asked.routing.popularity, asked.placement
    if isinstance(popularity, Recorded):
        found = dataclasses.replace(popularity, file=_existing(_beside(popularity.file, folder), "recording"))
        asked = dataclasses.replace(asked, routing=dataclasses.replace(asked.routing, popularity=found))
    documents = asked.train.documents
    if isinstance(documents, HistogramLengths):
        counted = dataclasses.replace(documents, file=_existing(_beside(documents.file, folder), "train.documents"))
        asked = dataclasses.replace(asked, train=dataclasses.replace(asked.train, documents=counted))
    if choice.map is not None:
        named = _existing(_beside(choice.map, folder), "map")
        asked = dataclasses.replace(asked, placement=dataclasses.replace(choice, map=named))
    return asked


def _existing(name: str, field: str) -> str:
    path = Path(name)
    check(
        path.is_file(),
        name,
        field,
        "must be a file" if path.exists() else "must exist",
        "a folder" if path.is_dir() else "no such file",
    )
    return name


def _beside(name: str, folder: Path | None) -> str:
    near = folder / name if folder is not None else None
    return str(near) if near is not None and near.is_file() else name


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return dict(value) if isinstance(value, Mapping) else value
