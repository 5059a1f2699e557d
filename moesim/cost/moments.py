"""What a layer holds at one moment of its forward or backward beyond the tensors that it saves.

Units as in ``activations``: bytes per token of the rank's micro-batch, bytes per assignment received. See
docs/model.md#memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.cost.activations import AS_MADE, BF16_BYTES, FP32_BYTES, KEPT_BYTES, fc1_rows
from moesim.cost.precision import RECIPES, Recipe
from moesim.cost.software import MEGATRON, Framework
from moesim.describe.model import Layer, Model, MoeFfn
from moesim.describe.parallel import Parallelism
from moesim.describe.workload import Dispatcher, Kept
from moesim.routing.reach import uniform_reach


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Bytes that a layer's backward holds at one moment beyond what is saved: working set and dispatch buffers."""

    name: str
    token_bytes: float = 0.0
    assignment_bytes: float = 0.0
    dispatch_token_bytes: float = 0.0
    dispatch_assignment_bytes: float = 0.0

    @property
    def per_token(self) -> tuple[float, float]:
        """(working set, dispatch buffers)."""
        return self.token_bytes, self.dispatch_token_bytes

    @property
    def per_assignment(self) -> tuple[float, float]:
        """(working set, dispatch buffers)."""
        return self.assignment_bytes, self.dispatch_assignment_bytes


def layer_moments(
    model: Model,
    layer: Layer,
    parallel: Parallelism,
    dispatcher: Dispatcher = "alltoall",
    software: Framework = MEGATRON,
    recipe: Recipe = RECIPES["bf16"],
    kept: Kept = AS_MADE,
) -> tuple[Moment, ...]:
    """The moments at which a layer's backward may need most, beyond its saved tensors (freed ones already subtracted).

    activation: the activation's input gradient exists beside its input. gather: with sequence parallelism the backward
    of a column-parallel product gathers its input and forms the full input gradient. combine: the gradient of the
    layer's output, permuted for sending, and the same as received by the experts' ranks (deepep: one row for each rank
    that a token visits, then one for each of its experts there). send back: where those gradients travel narrow, the
    input's gradients, made and joined in BF16, may need more than they did; the activation is gone by then.
    """
    hidden, tp = model.hidden, parallel.tp
    residual = hidden / tp * BF16_BYTES  # gradient of the layer's output
    saved, taken = recipe.operand_bytes, KEPT_BYTES[kept.activation_input]  # an activation's output, input
    if not isinstance(layer.ffn, MoeFfn):
        rows = fc1_rows(layer.ffn) / tp
        moments = [Moment(name="activation", token_bytes=residual + rows * BF16_BYTES)]
        if tp > 1:
            freed = rows * taken + layer.ffn.width / tp * saved  # activation's input and output
            moments.append(
                Moment(name="gather", token_bytes=residual + 2 * hidden * BF16_BYTES + rows * BF16_BYTES - freed)
            )
        return tuple(moments)
    expert, row = layer.ffn.expert, hidden * BF16_BYTES
    width = expert.width / parallel.etp
    activation = fc1_rows(expert) / parallel.etp * BF16_BYTES
    if not software.fused_activation:  # fp32: gradient of the product, and of both factors; the second made bf16
        activation = (3 * FP32_BYTES + BF16_BYTES - saved) * width  # the product, which is saved too, is gone by then
    always = Moment(name="activation", token_bytes=residual, assignment_bytes=activation)
    if dispatcher == "deepep":
        num_rows = 1 + rows_per_assignment(layer.ffn, parallel)
        sent = model.hidden * recipe.dispatch_element_bytes(dispatcher)
        combine = Moment(name="combine", token_bytes=residual, dispatch_assignment_bytes=num_rows * sent)
        gone = fc1_rows(expert) / parallel.etp * taken + width * saved
        back = Moment(
            name="send back",
            token_bytes=residual,
            assignment_bytes=-gone,
            dispatch_assignment_bytes=num_rows * row,
        )
        return (combine, back, always) if sent < row else (combine, always)
    send = layer.ffn.router.top_k * row / tp
    return (
        Moment(name="combine", token_bytes=residual, dispatch_token_bytes=send, dispatch_assignment_bytes=row),
        Moment(name="sort", token_bytes=residual, dispatch_assignment_bytes=2 * row),
        always,
    )


def forward_moments(
    model: Model,
    layer: Layer,
    parallel: Parallelism,
    dispatcher: Dispatcher = "alltoall",
    recipe: Recipe = RECIPES["bf16"],
) -> tuple[Moment, ...]:
    """The moments at which a MoE layer's forward may need most, beyond the tensors that it saves; none of others.

    What Megatron-LM's layer still names while it goes on stays in memory: the rows laid out for the wire and those
    received, until the layer returns; the experts' output while it is sorted back. alltoall: laid out, received, the
    experts' output and the same sorted back; then the same come home in place of the experts' output. deepep: received
    once for each rank, the experts' output, and that joined again. A narrow format pads each expert's rows: copies of
    the input and of the output stand beside them, and the input itself, of which only the cast is saved; rows that
    travel narrow are narrow up to there. Source:
    Megatron-LM core/transformer/moe, moe_layer.py (forward), token_dispatcher.py, experts.py. docs/model.md#memory.
    """
    if not isinstance(layer.ffn, MoeFfn):
        return ()
    row = model.hidden * BF16_BYTES
    out = row / parallel.tp
    padded = recipe.pads_rows
    if dispatcher == "deepep":
        joined = rows_per_assignment(layer.ffn, parallel) * row
        sent = recipe.dispatch_element_bytes(dispatcher) / BF16_BYTES
        held = (joined + 2 * row) * sent + 2 * row  # received, sorted, its copy; output, its copy
        pad = Moment(name="pad", dispatch_assignment_bytes=held)
        join = Moment(name="join", token_bytes=out, dispatch_assignment_bytes=(1 + sent) * joined + (1 + padded) * row)
        return (join, pad) if padded else (join,)
    send = layer.ffn.router.top_k * row / parallel.tp
    if padded:  # what was received, sorted and padded; the output, and that without its padding
        is_sorted = layer.ffn.num_experts > parallel.ep
        held = (4 + is_sorted) * row
        return (Moment(name="pad", dispatch_token_bytes=send, dispatch_assignment_bytes=held),)
    # A rank with one expert sorts nothing: what it receives is the expert's input, and what it sends back its output.
    if layer.ffn.num_experts == parallel.ep:
        return (Moment(name="combine", token_bytes=out, dispatch_token_bytes=2 * send, dispatch_assignment_bytes=row),)
    return (
        Moment(name="sort back", dispatch_token_bytes=send, dispatch_assignment_bytes=3 * row),
        Moment(name="combine", token_bytes=out, dispatch_token_bytes=2 * send, dispatch_assignment_bytes=2 * row),
    )


def rows_per_assignment(ffn: MoeFfn, parallel: Parallelism) -> float:
    """Rows that reach a rank over the assignments that it receives where a token comes once for all its experts there,
    all experts alike.

    >>> from moesim.catalog.models import load_model
    >>> round(rows_per_assignment(load_model("deepseek-v3").layers[-1].ffn, Parallelism(ep=32)), 3)
    0.825
    """
    router, size = ffn.router, ffn.num_experts // parallel.ep
    in_reach = ffn.num_experts  # experts that a token chooses among: those of its best groups
    share = 1.0  # of tokens that choose among a rank's experts
    if router.num_groups > 1 and size <= ffn.num_experts // router.num_groups:
        share = router.top_groups / router.num_groups
        in_reach = int(ffn.num_experts * share)
    reached = float(uniform_reach(in_reach, router.top_k, np.array([size]))[0])
    return share * reached * parallel.ep / router.top_k


def head_moment(model: Model, parallel: Parallelism, software: Framework = MEGATRON) -> tuple[float, float]:
    """(bytes per token, bytes) the head's backward holds beyond ``head_tensors``.

    Per token: the input gradient; with tp > 1 of the whole sequence, beside the communication buffer of the gathered
    input and the gradient scattered back. Fixed: the placeholder gradient of the head's weight.
    """
    hidden, tp = model.hidden, parallel.tp
    per_token = hidden * BF16_BYTES if tp == 1 else (2 + 1 / tp) * hidden * BF16_BYTES
    placeholder = model.vocab * hidden / tp * BF16_BYTES if software.placeholder_gradients else 0.0
    return per_token, placeholder
