"""What is trained and how tokens are routed: batch, precision, recomputation; popularity, capacity, dispatcher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from moesim.describe.capacity import Capacity, Gshard, Megablocks, Megatron, RankBuffer, Tutel
from moesim.describe.checks import check_choice, check_number, check_whole
from moesim.describe.documents import Documents
from moesim.describe.popularity import (
    Balanced,
    Correlation,
    Dirichlet,
    Domain,
    DomainMixture,
    HotExperts,
    Lognormal,
    Multinomial,
    Popularity,
    PowerLaw,
    Recorded,
    Zipf,
)
from moesim.describe.schedules import ScheduleName
from moesim.errors import InputError, check, near_match

__all__ = [
    "Balanced",
    "Capacity",
    "Correlation",
    "Dirichlet",
    "Domain",
    "DomainMixture",
    "Gshard",
    "HotExperts",
    "Kept",
    "Lognormal",
    "Megablocks",
    "Megatron",
    "Multinomial",
    "Optimizer",
    "Popularity",
    "PowerLaw",
    "RankBuffer",
    "Recorded",
    "Routing",
    "Training",
    "Tutel",
    "Zipf",
]
# fp8: by blocks, as DeepSeek-V3 trained; fp8_tensor: one scale a tensor. See moesim.cost.precision.
Precision = Literal["bf16", "fp8", "fp8_tensor", "mxfp8", "nvfp4"]
# Whose losses a step has beside its kernels alone (catalog/step.yaml): Megatron-LM and its kin; DeepSeek's own
# framework; kernels: no loss at all, a bound that no run reaches.
Software = Literal["megatron", "deepseek", "kernels"]
Module = Literal["core_attn", "mla_up_proj", "mlp", "moe", "moe_act", "layernorm", "shared_experts"]  # Megatron's
MODULES: tuple[Module, ...] = get_args(Module)
# What runs beside computing; docs/model.md#overlap.
Overlap = Literal[
    "grad_reduce",
    "param_gather",
    "tensor_parallel",
    "forward_backward",
    "two_batch",
    "weight_gradient",
    "shared_experts",
    "chunked_dispatch",
]
OVERLAPS: tuple[Overlap, ...] = get_args(Overlap)
Offload = Literal["optimizer", "activations"]
MainWeights = Literal["fp32", "remainder", "bf16", "none"]
Moments = Literal["fp32", "bf16", "fp8"]
ModelWeights = Literal["bf16", "narrow"]
Average = Literal["none", "gpu", "host"]
BYTES_OF: Mapping[str, float] = {"fp32": 4.0, "bf16": 2.0, "remainder": 2.0, "fp8": 1.0, "none": 0.0}
GraphModule = Literal["attn", "mlp", "moe_router", "moe_preprocess", "moe"]  # Megatron's --cuda-graph-scope
GRAPH_MODULES: tuple[GraphModule, ...] = get_args(GraphModule)
Dispatcher = Literal["alltoall", "deepep"]  # deepep: once over the network to each node, then NVLink
DropPolicy = Literal["probability", "position", "random", "reroute"]


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Number formats of a parameter's weight and of what Adam keeps beside it; the defaults are Megatron-LM's.

    weights: ``narrow`` keeps those of layers in the products' format alone, without bf16 ones beside (Megatron's
    --fp8-param-gather). main_weights: ``remainder`` keeps only the 16 bits that a bf16 weight lacks of fp32 (Megatron's
    precision-aware optimizer with store_param_remainders); ``none`` updates the bf16 weight itself. average: where an
    fp32 moving average of the weights lies, if there is one; its way to the host is not timed (DeepSeek-V3, arXiv
    2412.19437 section 3.2.3: behind the next step).

    >>> Optimizer(gradients="bf16", main_weights="remainder", moments="bf16").state_bytes
    6.0
    """

    gradients: Literal["fp32", "bf16"] = "fp32"
    main_weights: MainWeights = "fp32"
    moments: Moments = "fp32"  # both of them
    weights: ModelWeights = "bf16"
    average: Average = "none"

    def __post_init__(self) -> None:
        check_choice("train.optimizer", "gradients", self.gradients, ("fp32", "bf16"))
        check_choice("train.optimizer", "main_weights", self.main_weights, get_args(MainWeights))
        check_choice("train.optimizer", "moments", self.moments, get_args(Moments))
        check_choice("train.optimizer", "weights", self.weights, get_args(ModelWeights))
        check_choice("train.optimizer", "average", self.average, get_args(Average))
        rule = "must be fp32 or bf16 where weights are narrow: those make no main weight"
        good = self.weights == "bf16" or self.main_weights in ("fp32", "bf16")
        check(good, "train.optimizer", "main_weights", rule, self.main_weights)

    @property
    def gradient_bytes(self) -> float:
        """Of one parameter's gradient, as it is accumulated and reduced."""
        return BYTES_OF[self.gradients]

    @property
    def state_bytes(self) -> float:
        """Of one parameter's main weight and two moments, and of its average where the GPU has it."""
        average = BYTES_OF["fp32"] if self.average == "gpu" else 0.0
        return BYTES_OF[self.main_weights] + 2 * BYTES_OF[self.moments] + average

    @property
    def copied_bytes(self) -> float:
        """Of one parameter's states made fp32 for the update: those that are not, but for a remainder."""
        moments = 0.0 if self.moments == "fp32" else 2 * BYTES_OF["fp32"]
        return moments + (BYTES_OF["fp32"] if self.main_weights == "bf16" else 0.0)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Number formats in which tensors wait for the backward, where that is a choice: narrow ones with a scale for each
    128 elements. See docs/model.md#kept-formats.

    attention_output: bf16, as flash attention needs it; e5m6 and fp8 serve it and the projection behind it.
    activation_input: what SwiGLU takes in, in experts and dense blocks (Megatron's --activation-func-fp8-input-store).
    """

    attention_output: Literal["bf16", "e5m6", "fp8"] = "bf16"
    activation_input: Literal["bf16", "fp8"] = "bf16"

    def __post_init__(self) -> None:
        check_choice("train.kept", "attention_output", self.attention_output, ("bf16", "e5m6", "fp8"))
        check_choice("train.kept", "activation_input", self.activation_input, ("bf16", "fp8"))


@dataclass(frozen=True, kw_only=True)
class Training:
    """One optimizer step: global_batch sequences of seq_len tokens, micro_batch at a time on each replica.

    recompute: none, full, or modules that the backward computes again: a list, or a text such as ``moe_act,layernorm``.
    overlap: none, or what runs beside computing: a list or text of names of OVERLAPS.
    offload: none, or what lies in the host's memory: optimizer, activations, or both as ``optimizer,activations``.
    fused_loss: the loss writes its gradient over the bf16 logits instead of keeping fp32 ones.
    cuda_graphs: none, full (the whole step), or modules whose operations the host issues as one, told alike.
    software: whose losses a step has beside its kernels: megatron, deepseek, or kernels (none: a bound).

    >>> Training(recompute=("moe_act", "core_attn")).recompute
    'core_attn,moe_act'
    """

    seq_len: int = 4096
    micro_batch: int = 1
    global_batch: int = 1024
    precision: Precision = "bf16"
    recompute: str | tuple[str, ...] = "none"  # a text once it is born
    schedule: ScheduleName = "1f1b"
    overlap: str | tuple[str, ...] = "none"  # as recompute: a text once it is born
    mtp: bool = False  # train the model's multi-token-prediction layers as well
    optimizer: Optimizer = field(default_factory=Optimizer)
    kept: Kept = field(default_factory=Kept)
    offload: str | tuple[str, ...] = "none"  # a text once it is born
    fused_loss: bool = False
    cuda_graphs: str | tuple[str, ...] = "none"  # a text once it is born
    software: Software = "megatron"
    documents: Documents | None = None  # that sequences are packed from, each seeing itself only; None: whole sequences

    def __post_init__(self) -> None:
        for name in ("seq_len", "micro_batch", "global_batch"):
            check_whole("train", name, getattr(self, name))
        check_choice("train", "precision", self.precision, get_args(Precision))
        object.__setattr__(
            self, "recompute", _names_text("recompute", self.recompute, MODULES, "none, full or modules")
        )
        graphs = _names_text("cuda_graphs", self.cuda_graphs, GRAPH_MODULES, "none, full or modules")
        object.__setattr__(self, "cuda_graphs", graphs)
        object.__setattr__(self, "offload", _names_text("offload", self.offload, get_args(Offload), "none or parts"))
        check_choice("train", "software", self.software, get_args(Software))
        rule = "needs a narrow precision: layers' weights stand in the format of their products"
        good = self.optimizer.weights == "bf16" or self.precision != "bf16"
        check(good, "train.optimizer", "weights", rule, self.optimizer.weights)
        check_choice("train", "schedule", self.schedule, get_args(ScheduleName))
        object.__setattr__(self, "overlap", _names_text("overlap", self.overlap, OVERLAPS, "none or names"))
        rule = "halves each micro-batch, so micro_batch must be even"
        check("two_batch" not in self.overlaps or self.micro_batch % 2 == 0, "train", "overlap", rule, self.overlap)
        in_pairs = "forward_backward" in self.overlaps or self.schedule == "dualpipe"
        rule = "must not name two_batch where forwards run beside backwards"
        check("two_batch" not in self.overlaps or not in_pairs, "train", "overlap", rule, self.overlap)

    @property
    def recomputed_modules(self) -> tuple[Module, ...]:
        """What is recomputed of each layer; nothing where none or all of it is."""
        assert isinstance(self.recompute, str)
        named = self.recompute.split(",")
        return tuple(module for module in MODULES if module in named)

    @property
    def offloaded(self) -> tuple[Offload, ...]:
        """What lies in the host's memory."""
        assert isinstance(self.offload, str)
        return tuple(part for part in get_args(Offload) if part in self.offload.split(","))

    @property
    def overlaps(self) -> tuple[Overlap, ...]:
        """What runs beside computing."""
        assert isinstance(self.overlap, str)
        named = self.overlap.split(",")
        return tuple(name for name in OVERLAPS if name in named)

    @property
    def graphed_modules(self) -> tuple[GraphModule, ...]:
        """The modules that CUDA graphs hold; nothing where none or the whole step is."""
        assert isinstance(self.cuda_graphs, str)
        named = self.cuda_graphs.split(",")
        return tuple(module for module in GRAPH_MODULES if module in named)

    def num_micro_batches(self, dp: int) -> int:
        """Micro-batches that each data-parallel replica runs in one step, or InputError."""
        per_round = self.micro_batch * dp
        rule = f"must be a multiple of micro_batch*dp = {self.micro_batch}*{dp} = {per_round}"
        check(self.global_batch % per_round == 0, "train", "global_batch", rule, self.global_batch)
        return self.global_batch // per_round


def _names_text(field_name: str, asked: str | tuple[str, ...], known: tuple[str, ...], may_be: str) -> str:
    """none or full, where it may be that, or the known names in their order, joined by commas. Raises InputError."""
    whole = {"none", "full"} & set(may_be.replace(",", "").split())
    rule = f"must be {may_be} among {', '.join(known)}"
    is_list = isinstance(asked, (list, tuple)) and all(isinstance(name, str) for name in asked)
    check(isinstance(asked, str) or is_list, "train", field_name, rule, asked)
    names = asked.split(",") if isinstance(asked, str) else asked
    named = {name.strip() for name in names} or {"none"}
    if len(named) == 1 and named <= whole:
        return named.pop()
    for name in sorted(named - set(known)):
        hint = near_match(name, (*known, *sorted(whole)))
        raise InputError("train", field_name, rule, name, hint if hint.startswith("Did you mean") else "")
    return ",".join(name for name in known if name in named)


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Where tokens go. capacity_factor None: dropless; else ``capacity`` says what it is a factor of.

    drop_policy: which assignments a full expert keeps (``reroute``: what overflows tries the token's next experts).
    pad_to_capacity: buffers are sent and computed full, empty places included.
    """

    popularity: Popularity = field(default_factory=Lognormal)
    capacity_factor: float | None = None
    capacity: Capacity = field(default_factory=Megatron)
    drop_policy: DropPolicy = "probability"
    pad_to_capacity: bool = False
    dispatcher: Dispatcher = "alltoall"

    def __post_init__(self) -> None:
        if self.capacity_factor is not None:
            check_number("routing", "capacity_factor", self.capacity_factor)
            rule = "must be positive, or null for dropless"
            may_be_zero = isinstance(self.capacity, Megablocks) and self.capacity_factor == 0  # its word for dropless
            good = self.capacity_factor > 0 or may_be_zero
            check(good, "routing", "capacity_factor", rule, self.capacity_factor)
        check_choice("routing", "drop_policy", self.drop_policy, get_args(DropPolicy))
        rule = "needs a capacity_factor: without one there is nothing to pad to"
        check(not self.pad_to_capacity or bool(self.capacity_factor), "routing", "pad_to_capacity", rule, True)
        rule = "must be probability, position or random: a rank's buffer turns nobody to another expert"
        reroutes_ranks = self.drop_policy == "reroute" and isinstance(self.capacity, RankBuffer)
        check(not reroutes_ranks, "routing", "drop_policy", rule, self.drop_policy)
