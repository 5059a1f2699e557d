"""A model's derived sizes in one result: what ``moesim.describe(model)`` returns and shows as a table in a notebook."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moesim.describe.checks import check_whole
from moesim.describe.flops import (
    FLOP_PARTS,
    LayerFlops,
    backward_flops_by_part,
    forward_flops_by_part,
    layer_flops,
    training_flops_per_token,
)
from moesim.describe.model import Model, MoeFfn
from moesim.describe.parameters import (
    PARTS,
    LayerParameters,
    active_parameters,
    active_parameters_by_part,
    attention_parameters,
    ffn_parameters,
    layer_parameters,
    mtp_parameters,
    parameters_by_part,
    published_active_parameters,
    stack_parameters,
    total_parameters,
)
from moesim.errors import check, near_match
from moesim.units import BYTES_PER_ELEMENT, format_bytes, format_count

__all__ = [
    "FLOP_PARTS",
    "PARTS",
    "Description",
    "LayerFlops",
    "LayerParameters",
    "active_parameters",
    "active_parameters_by_part",
    "attention_parameters",
    "backward_flops_by_part",
    "describe",
    "ffn_parameters",
    "forward_flops_by_part",
    "layer_flops",
    "layer_parameters",
    "mtp_parameters",
    "parameters_by_part",
    "published_active_parameters",
    "stack_parameters",
    "total_parameters",
    "training_flops_per_token",
    "weight_bytes_by_part",
]

# What stays in 16 bits when products run in a narrower precision. arXiv 2412.19437 section 3.3.
_WIDE_PARTS = ("input_embedding", "router", "norms", "head", "extra")


@dataclass(frozen=True, kw_only=True)
class Description:
    """Derived sizes of one model at one sequence length and weight precision: FLOPs per token, bytes of all weights.

    ``flops_by_part`` is the forward's with causal attention counted half; ``weight_bytes`` leaves out multi-token
    prediction layers, as ``total_parameters`` does.
    """

    name: str
    source: str
    hypothetical: bool
    hidden: int
    vocab: int
    num_layers: int
    num_moe_layers: int
    num_experts: int
    top_k: int
    seq_len: int
    precision: str
    total_parameters: int
    total_parameters_with_mtp: int
    active_parameters: int
    active_parameters_no_input_embedding: int
    active_parameters_published: int
    parameters_by_part: Mapping[str, int]
    active_parameters_by_part: Mapping[str, int]
    flops_per_token_forward: float
    flops_per_token_backward: float
    flops_per_token_forward_full_attention: float
    flops_by_part: Mapping[str, float]
    flops_by_part_backward: Mapping[str, float]
    weight_bytes: float
    weight_bytes_by_part: Mapping[str, float]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        values = asdict(self)
        values["notes"] = list(self.notes)
        return values

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """(part, parameters, active parameters, forward FLOPs per token, weight bytes) as texts, for tables."""
        flops = dict(self.flops_by_part)
        attention = flops.pop("attention_projections") + flops.pop("attention_sequence")
        flops = {"attention": attention, **flops}
        return [
            (
                part.replace("_", " "),
                format_count(count),
                format_count(self.active_parameters_by_part[part]),
                format_count(flops[part]) if part in flops else "-",
                format_bytes(self.weight_bytes_by_part[part]),
            )
            for part, count in self.parameters_by_part.items()
            if count or flops.get(part)
        ]

    def _repr_html_(self) -> str:
        """A plain table, for notebooks."""
        titles = ("part", "parameters", "active", "forward FLOPs/token", f"weights ({self.precision})")
        sums = (
            format_count(self.total_parameters),
            format_count(self.active_parameters),
            format_count(self.flops_per_token_forward),
            format_bytes(self.weight_bytes),
        )
        body = [*self.rows(), ("total", *sums)]
        head = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
        lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
        experts = f", {self.num_experts} experts, top-{self.top_k}" if self.num_experts else ", dense"
        caption = f"{self.name}{' (hypothetical)' if self.hypothetical else ''}: {self.num_layers} layers{experts}"
        return f"<table><caption>{html.escape(caption)}</caption><tr>{head}</tr>{lines}</table>"


def describe(model: Model, seq_len: int = 4096, precision: str = "bf16") -> Description:
    """Parameters, FLOPs per token and weight bytes of a model, by part.

    seq_len: tokens of a sequence, for the attention's sequence term; precision: of the weights, one of
    BYTES_PER_ELEMENT. Raises InputError for a sequence length below 1 or an unknown precision.

    >>> from moesim.catalog.models import load_model
    >>> describe(load_model("mixtral-8x7b")).total_parameters
    46702792704
    """
    check_whole("describe", "seq_len", seq_len)
    forward = forward_flops_by_part(model, seq_len)
    backward = backward_flops_by_part(model, seq_len)
    full = forward_flops_by_part(model, seq_len, full_attention=True)
    weights = weight_bytes_by_part(model, precision)
    total = total_parameters(model)
    moe = next((layer.ffn for layer in model.layers if isinstance(layer.ffn, MoeFfn)), None)
    return Description(
        name=model.name,
        source=model.source,
        hypothetical=model.hypothetical,
        hidden=model.hidden,
        vocab=model.vocab,
        num_layers=len(model.layers),
        num_moe_layers=len(model.moe_layers),
        num_experts=moe.num_experts if moe else 0,
        top_k=moe.router.top_k if moe else 0,
        seq_len=seq_len,
        precision=precision,
        total_parameters=total,
        total_parameters_with_mtp=total + mtp_parameters(model),
        active_parameters=active_parameters(model),
        active_parameters_no_input_embedding=active_parameters(model, with_input_embedding=False),
        active_parameters_published=published_active_parameters(model),
        parameters_by_part=parameters_by_part(model),
        active_parameters_by_part=active_parameters_by_part(model),
        flops_per_token_forward=sum(forward.values()),
        flops_per_token_backward=sum(backward.values()),
        flops_per_token_forward_full_attention=sum(full.values()),
        flops_by_part=forward,
        flops_by_part_backward=backward,
        weight_bytes=sum(weights.values()),
        weight_bytes_by_part=weights,
        notes=model.notes,
    )


def weight_bytes_by_part(model: Model, precision: str = "bf16") -> dict[str, float]:
    """Bytes of the weights by part [bytes]; below 16 bits, embedding, router, norms and head stay in bf16."""
    known = precision in BYTES_PER_ELEMENT
    check(known, "describe", "precision", "is not known", precision, near_match(str(precision), BYTES_PER_ELEMENT))
    narrow = BYTES_PER_ELEMENT[precision]
    wide = max(narrow, BYTES_PER_ELEMENT["bf16"])
    counts = parameters_by_part(model)
    return {part: count * (wide if part in _WIDE_PARTS else narrow) for part, count in counts.items()}
