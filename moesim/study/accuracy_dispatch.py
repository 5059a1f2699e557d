"""Exchanges alone, predicted from a row of a measurement table: DeepEP's dispatch and combine, NCCL's collectives.

A row says who measured what (library, operation, GPU, ranks, tokens, dtype); port bytes come from the fabric's closed
forms under equal experts, rates from the catalog's libraries. Bandwidths of tables are logical, local copies included;
``bandwidth_def`` says of which bytes, and they are turned into seconds here. docs/model.md#accuracy-dispatch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Literal, get_args

import numpy as np

from moesim.catalog.hardware import load_cluster
from moesim.catalog.libraries import Library, libraries
from moesim.describe.hardware import Cluster
from moesim.describe.model import Router
from moesim.describe.workload import Multinomial
from moesim.door.records import Record
from moesim.errors import InputError
from moesim.fabric.collectives import alltoall_s
from moesim.fabric.nccl import Collective, NcclRates, nccl_s
from moesim.fabric.ports import Ports, rate
from moesim.fabric.traffic import Copies, PortBytes, combine_ports, dispatch_ports
from moesim.placement import contiguous
from moesim.routing.popularity import popularity_LE
from moesim.routing.visits import VisitProbabilities, visit_probabilities
from moesim.study.accuracy import AccuracyRow, Likeness, NotExpressed, Prediction, carried_cases
from moesim.study.accuracy_cases import catalog_gpu, default_cluster, given, number, whole
from moesim.units import GIGA, MICRO

SCALE_ELEMENTS, SCALE_BYTES = 128, 4  # an FP8 row carries one FP32 scale per 128 elements
LOW_LATENCY_HEADER_BYTES = 16  # of each message of DeepEP's low-latency kernels
MOST_NODES = 4  # that a token of a throughput kernel uses where a table does not say: as in DeepEP's tests
LEAST_MESSAGE_BYTES, LEAST_TOKENS, MOST_TOKENS = 65536, 512, 16384  # of the envelope
WITHOUT_SWITCH_REDUCTION = ("a100-80gb",)  # switches reduce from Hopper's generation on
# Words of a table's ``library``, the most telling first, and the catalog's name.
LIBRARY_WORDS = (
    (r"deepep v2", "deepep-v2"),
    (r"deepep v1 initial", "deepep-v1-initial"),
    (r"deepep v1", "deepep-v1"),
    (r"sglang 0\.5\.6.*deepep", "deepep-sglang-0.5.6"),
    (r"nccl 2\.29", "nccl-2.29"),
    (r"nccl 2\.27", "nccl-2.27"),
    (r"deepep$", "deepep-hybrid-branch"),
)


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One measured exchange, in SI; expressed but not yet predicted."""

    id: str
    library: Library
    operation: str  # dispatch, combine, or a collective
    gpu: str
    num_ranks: int
    num_nodes: int
    tokens_per_rank: float
    hidden: int
    top_k: int
    num_experts: int
    most_nodes: int  # that a token of a throughput kernel uses
    dtype: str
    num_sms: float | None
    message_bytes: float
    measured_s: float
    source: str

    @property
    def cluster(self) -> Cluster:
        return _cluster(self.gpu)

    @property
    def rate_key(self) -> str:
        """What the libraries' entries call the operation: FP8 dispatch apart from BF16."""
        return f"dispatch_{self.dtype}" if self.operation == "dispatch" else self.operation

    @property
    def group(self) -> str:
        operation = "" if self.library.kind == "nccl" else f" {self.operation}"
        generation = f", {self.gpu}" if self.library.kind == "nccl" else ""
        return f"{self.library.title}{operation}{generation}"


def predict(row: Record, owner: str) -> list[Prediction]:
    """The predicted and measured seconds of one row, or why there is no prediction."""
    try:
        return [scored(express(row, owner))]
    except InputError as error:
        return [NotExpressed(id=row.get("id", "?"), reason=f"{error.field} {error.rule}: {error.got}")]


def scored(exchange: Exchange) -> AccuracyRow:
    """An exchange beside its prediction."""
    reasons = outside_envelope(exchange)
    return AccuracyRow(
        id=exchange.id,
        group=exchange.group,
        predicted=predicted_s(exchange),
        measured=exchange.measured_s,
        inside_envelope=not reasons,
        used_in_fit=exchange.id in fitted_ids(),
        source=exchange.source,
        reasons=reasons,
        like=Likeness(
            gpu=exchange.gpu,
            is_moe=exchange.library.kind != "nccl",
            crosses_nodes=exchange.num_nodes > 1,
            precision=exchange.dtype,
        ),
    )


def express(row: Record, owner: str, known: Mapping[str, Library] | None = None) -> Exchange:
    """A row as an Exchange; known: other libraries than the catalog's. Raises InputError naming the column at fault."""
    library = _library_of(row, owner, libraries() if known is None else known)
    operation = row.get("op", "")
    if operation not in ("dispatch", "combine", *get_args(Collective)):
        raise InputError(owner, "op", "must be dispatch, combine or a collective", operation)
    gpu, ranks = catalog_gpu(row, owner), whole(row, "ep_size", owner)
    if ranks < 2:
        raise InputError(owner, "ep_size", "must be at least 2: one rank exchanges nothing", ranks)
    num_nodes = -(-ranks // _cluster(gpu).ranks_per_node)
    if whole(row, "n_nodes", owner, default=num_nodes) != num_nodes:
        rule = f"must be {num_nodes}: {ranks} ranks fill the nodes of the GPU's cluster"
        raise InputError(owner, "n_nodes", rule, row["n_nodes"])
    is_nccl = library.kind == "nccl"
    exchange = Exchange(
        id=row.get("id", "?"),
        library=library,
        operation=operation,
        gpu=gpu,
        num_ranks=ranks,
        num_nodes=num_nodes,
        tokens_per_rank=0.0 if is_nccl else number(row, "tokens_per_rank", owner),
        hidden=0 if is_nccl else whole(row, "hidden", owner),
        top_k=0 if is_nccl else whole(row, "topk", owner),
        num_experts=0 if is_nccl else _num_experts(row, owner),
        most_nodes=whole(row, "topk_groups", owner, default=MOST_NODES),
        dtype=row.get("dtype", "").lower(),
        num_sms=_num_sms(row, owner),
        message_bytes=number(row, "message_bytes", owner) if is_nccl else 0.0,
        measured_s=0.0,
        source=row.get("source", ""),
    )
    if not is_nccl and exchange.dtype not in ("fp8", "bf16"):
        raise InputError(owner, "dtype", "must be FP8 or BF16", row.get("dtype", ""))
    if exchange.top_k > exchange.num_experts:
        raise InputError(owner, "topk", f"must not exceed n_experts={exchange.num_experts}", exchange.top_k)
    return _with_measured(exchange, row, owner)


def _with_measured(exchange: Exchange, row: Record, owner: str) -> Exchange:
    latency_us = given(row, "latency_us", owner)
    if latency_us is not None:
        return replace(exchange, measured_s=latency_us * MICRO)
    bandwidth = number(row, "bandwidth_GBps", owner) * GIGA
    return replace(exchange, measured_s=logical_bytes(exchange, row.get("bandwidth_def", ""), owner) / bandwidth)


def logical_bytes(exchange: Exchange, definition: str, owner: str) -> float:
    """The bytes that a table divides by time: copies to nodes (RDMA) or ranks (NVLink), the sender's own included.

    As DeepEP's tests count them (tests/test_internode.py, test_intranode.py). Raises InputError for another definition.
    """
    copies = _copies(exchange)
    if "RDMA" in definition and "equivalent" not in definition:
        per_rank = float(copies.node_visits_GMLN.sum())
    elif "NVLink" in definition or "algorithm" in definition:
        per_rank = float(copies.visits_GMLR.sum())
    else:
        raise InputError(owner, "bandwidth_def", "must say of which bytes: RDMA, NVLink or algorithm", definition)
    return per_rank * _row_bytes(exchange)


def predicted_s(exchange: Exchange, load: ExchangeLoad | None = None) -> float:
    """Seconds of the exchange when every expert is equally popular; load: where it is known already.

    docs/model.md#accuracy-dispatch.
    """
    if exchange.library.kind == "nccl":
        return _nccl_s(exchange)
    load = load or exchange_load(exchange)
    ports, sm_bytes_per_s = _rates(exchange)
    seconds = float(alltoall_s(load.port_bytes, ports).max())
    if sm_bytes_per_s is None or exchange.num_sms is None:
        return seconds
    start_s = ports.latency_inter_s if load.port_bytes.nic_out.max() > 0 else ports.latency_intra_s
    return max(seconds, start_s + load.sm_bytes / (exchange.num_sms * sm_bytes_per_s))


@dataclass(frozen=True, kw_only=True, eq=False)
class ExchangeLoad:
    """What an exchange moves, whatever the rates: bytes through ports, and bytes that a rank's SMs copy.

    SMs copy a row per rank that a token goes to and, across nodes, one per node as well; a rank's own copies pass
    through the same buffers.
    """

    port_bytes: PortBytes
    sm_bytes: float


def exchange_load(exchange: Exchange) -> ExchangeLoad:
    """The load of a dispatch or combine.

    Throughput kernels send a token once to each node (to each rank on one node), low-latency ones to each expert.
    """
    copies, row_bytes = _copies(exchange), _row_bytes(exchange)
    crosses_nodes = bool(copies.node_of_rank_R.max())
    ports = dispatch_ports if exchange.operation == "dispatch" else combine_ports
    if exchange.library.kind == "low_latency":
        port_bytes = ports(copies, token_bytes=row_bytes, dedup="none", cross_rail="direct")
    else:
        port_bytes = ports(copies, token_bytes=row_bytes, dedup="node" if crosses_nodes else "rank")
    rows = copies.visits_GMLR.sum() + (copies.node_visits_GMLN.sum() if crosses_nodes else 0.0)
    return ExchangeLoad(port_bytes=port_bytes, sm_bytes=float(rows) * row_bytes)


def _nccl_s(exchange: Exchange) -> float:
    gpu, library = exchange.cluster.gpu, exchange.library
    derate = library.value(exchange.operation, "nccl", gpu.name, "derate")
    factor = library.value(exchange.operation, "nccl", gpu.name, "latency")
    rates = NcclRates(derate=derate or 1.0, latency_factor=factor or 1.0)
    name: Collective = exchange.operation  # type: ignore[assignment]
    switches = gpu.name not in WITHOUT_SWITCH_REDUCTION
    return float(nccl_s(name, exchange.num_ranks, exchange.message_bytes, gpu, rates, in_switch_reduction=switches))


def _rates(exchange: Exchange) -> tuple[Ports, float | None]:
    """Port rates of the library, the cluster's own where it has none; bytes/s of one SM where it is known."""
    cluster, library, key = exchange.cluster, exchange.library, exchange.rate_key

    def tier(name: Literal["nvlink", "nic"]) -> tuple[float, float]:
        line = float(cluster.nvlink_bytes_per_s if name == "nvlink" else cluster.nic_bytes_per_s)
        own_latency = float(cluster.latency_intra_s if name == "nvlink" else cluster.latency_inter_s)
        derate = library.value(key, name, exchange.gpu, "derate")
        latency = library.value(key, name, exchange.gpu, "latency")
        achieved = rate(cluster, name, "alltoall") if derate is None else line * derate
        return achieved, own_latency if latency is None else latency

    nvlink, latency_intra_s = tier("nvlink")
    nic, latency_inter_s = tier("nic")
    ports = Ports(
        nvlink_out_bytes_per_s_R=np.array([nvlink]),
        nvlink_in_bytes_per_s_R=np.array([nvlink]),
        nic_out_bytes_per_s_R=np.array([nic]),
        nic_in_bytes_per_s_R=np.array([nic]),
        latency_intra_s=latency_intra_s,
        latency_inter_s=latency_inter_s,
    )
    return ports, library.value(key, "sm", exchange.gpu, "bytes_per_s")


def _copies(exchange: Exchange) -> Copies:
    """Expected copies of one rank's tokens under equal experts, laid out contiguously."""
    ranks, tokens = exchange.num_ranks, exchange.tokens_per_rank
    is_limited = exchange.library.kind == "throughput" and exchange.num_nodes > exchange.most_nodes
    groups = (exchange.num_nodes, exchange.most_nodes) if is_limited else (1, 1)
    in_node = exchange.cluster.ranks_per_node if exchange.library.uses_nvlink else 1
    visits = _equal_visits(exchange.num_experts, ranks, in_node, exchange.top_k, *groups)
    shape = (1, 1, 1, ranks)
    return Copies(
        assignments_GMLR=np.full(shape, tokens * exchange.top_k / ranks),
        visits_GMLR=(tokens * visits.rank_visits_LR).reshape(shape),
        node_visits_GMLN=(tokens * visits.node_visits_LN).reshape(1, 1, 1, -1),
        node_of_rank_R=visits.node_of_rank_R,
    )


@lru_cache(maxsize=256)
def _equal_visits(
    num_experts: int, num_ranks: int, in_node: int, top_k: int, num_groups: int, top_groups: int
) -> VisitProbabilities:
    """Visits when all experts are equal; a token uses the experts of at most top_groups of num_groups."""
    router = Router(top_k=top_k, num_groups=num_groups, top_groups=top_groups, group_score="max")
    rng = np.random.default_rng(0)
    equal = popularity_LE(Multinomial(), num_layers=1, num_experts=num_experts, router=router, rng=rng)
    return visit_probabilities(equal, contiguous(num_experts, num_ranks), np.arange(num_ranks) // in_node)


def _row_bytes(exchange: Exchange) -> float:
    """One token's copy on the wire."""
    if exchange.dtype == "bf16":
        return 2.0 * exchange.hidden
    header = LOW_LATENCY_HEADER_BYTES if exchange.library.kind == "low_latency" else 0
    return exchange.hidden + exchange.hidden / SCALE_ELEMENTS * SCALE_BYTES + header


def outside_envelope(exchange: Exchange) -> tuple[str, ...]:
    """Why an exchange lies outside what was looked at; a function of its configuration alone."""
    reasons = []
    if exchange.library.kind == "nccl" and exchange.message_bytes < LEAST_MESSAGE_BYTES:
        reasons.append("message below 64 KiB")
    if exchange.library.kind == "throughput" and exchange.tokens_per_rank < LEAST_TOKENS:
        reasons.append("fewer than 512 tokens a rank in a throughput kernel")
    if exchange.library.kind == "throughput" and exchange.tokens_per_rank > MOST_TOKENS:
        reasons.append("more than 16,384 tokens a rank")
    if not exchange.library.rates:
        reasons.append("no rates of this library's release")
    return tuple(reasons)


@cache
def fitted_rows() -> tuple[Exchange, ...]:
    """The carried rows that the libraries' constants were fitted on, by the rule of ``fit_rows``."""
    return tuple(fit_rows([express(row, "carried") for row in carried_cases("dispatch")]))


@cache
def fitted_ids() -> frozenset[str]:
    """Their ids."""
    return frozenset(exchange.id for exchange in fitted_rows())


def has_fit_setting(exchange: Exchange) -> bool:
    """Whether rows of the same library, operation, GPU and number of ranks were fitted on, this one or others."""
    return _setting(exchange) in {_setting(row) for row in fitted_rows()}


def _setting(exchange: Exchange) -> tuple[str, str, str, int]:
    return exchange.library.name, exchange.operation, exchange.gpu, exchange.num_ranks


def fit_rows(exchanges: Sequence[Exchange]) -> list[Exchange]:
    """The rows that constants may be fitted on, chosen by a rule that looks at no measurement.

    Within a library, an operation and a link rate: the GPU with the most numbers of ranks (the first by name where they
    tie), of it the smallest number of ranks and the middle one (the upper of two), never the largest of several. All
    other rows test.
    """
    families: dict[tuple[str, str, float], list[Exchange]] = {}
    for exchange in exchanges:
        link = float(exchange.cluster.gpu.nvlink_bytes_per_s)
        families.setdefault((exchange.library.name, exchange.operation, link), []).append(exchange)
    chosen = []
    for family in families.values():
        sizes_by_gpu = {gpu: sorted({e.num_ranks for e in family if e.gpu == gpu}) for gpu in {e.gpu for e in family}}
        gpu = min(sizes_by_gpu, key=lambda name: (-len(sizes_by_gpu[name]), name))
        sizes = sizes_by_gpu[gpu]
        fitted = {sizes[0], sizes[len(sizes) // 2]} - ({sizes[-1]} if len(sizes) > 1 else set())
        chosen += [exchange for exchange in family if exchange.gpu == gpu and exchange.num_ranks in fitted]
    return chosen


@cache
def _cluster(gpu: str) -> Cluster:
    return load_cluster(default_cluster(gpu))


def _library_of(row: Record, owner: str, known: Mapping[str, Library]) -> Library:
    words = row.get("library", "").lower()
    name = next((name for pattern, name in LIBRARY_WORDS if re.match(pattern, words.split(" (")[0])), None)
    if name is None:
        raise InputError(owner, "library", "must name a known library", row.get("library", ""))
    if row.get("phase", "").startswith("low-latency"):
        name += "-low-latency"
    if name not in known:
        raise InputError(owner, "library", "must name a known library", name)
    return known[name]


def _num_experts(row: Record, owner: str) -> int:
    """The column, or what the row says of its completeness: ``full (expert count V3=256)``."""
    said = re.search(r"expert count \w+=(\d+)", row.get("config_complete", ""))
    if said is not None and not row.get("n_experts"):
        return int(said[1])
    return whole(row, "n_experts", owner)


def _num_sms(row: Record, owner: str) -> float | None:
    """The SMs of ``24 (V1 default ...)``; None where none are given."""
    return given({"num_sms": row.get("num_sms", "").split(" ")[0]}, "num_sms", owner)
