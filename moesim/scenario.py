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
from functools import cached_property
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
from moesim.describe.placement import PlacementChoice
from moesim.describe.schedules import check_schedule
from moesim.describe.workload import Recorded, Routing, Training
from moesim.door.files import read_yaml
from moesim.door.parse import apply_overrides, parse_as
from moesim.errors import InputError, check
from moesim.leaves import merge, nest, spelt_out

SCHEMA = 1
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
        self.placement.speed_of_rank(layout.num_gpus)  # refuses ranks that are none
        check(
            p.tp <= self.cluster.ranks_per_node,
            "scenario.parallel",
            "tp",
            f"must fit into a node of {self.cluster.ranks_per_node}",
            p.tp,
        )

    @cached_property
    def layout(self) -> RankLayout:
        return self.parallel.rank_layout(self.cluster.num_gpus)

    @property
    def speed_of_rank(self) -> NDArray[np.float64]:
        """Each GPU's computing speed over the usual one."""
        return self.placement.speed_of_rank(self.cluster.num_gpus)

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
