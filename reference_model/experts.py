"""Experts, two ways that must agree: one grouped product for all of them, and a readable loop as its oracle.

Rows come sorted by expert: expert e owns the rows from ``ends_E[e - 1]`` to ``ends_E[e]``. Rows behind the last end
belong to nobody: nothing is promised about their values, and nobody may read them.

Legend: P rows (padded copies of tokens), E experts, H hidden, W expert width, I inputs and O outputs of a product.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from reference_model.discard import discard

Path = Literal["grouped", "loop"]
Activation = Literal["swiglu", "gelu", "relu"]

# Public since torch 2.10; private before; absent in old ones, where the loop serves.
_GROUPED = getattr(functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
_ALIGN_BYTES = 16  # the grouped kernels load 16 bytes at a time


def row_alignment(device: torch.device, dtype: torch.dtype) -> int:
    """Rows of one expert must be a multiple of this many.

    On a GPU the weight gradient sums over an expert's rows, and its kernel wants that dimension in whole 16-byte loads:
    8 rows in bf16. The CPU needs no padding.
    """
    return _ALIGN_BYTES // dtype.itemsize if device.type == "cuda" and dtype.itemsize < 4 else 1


def has_grouped_path(device: torch.device, dtype: torch.dtype, *widths: int) -> bool:
    """Whether this torch has a grouped product for these widths: every row must start on a 16-byte border."""
    if _GROUPED is None or (device.type == "cuda" and dtype != torch.bfloat16):
        return False
    return all(width * dtype.itemsize % _ALIGN_BYTES == 0 for width in widths)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The precision that a product of this tensor is taken in: autocast's where that is on, else its own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def grouped_product(x_PI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Each expert's rows times its own matrix, in one call: (P, O).

    ends_E: int32 on x's device, the end of each expert's rows; an expert may have none. Never waits for the device.
    """
    assert _GROUPED is not None, "this torch has no grouped product; use the loop"
    y_PO = _GROUPED(x_PI, weight_EOI.transpose(-2, -1), offs=ends_E)
    if y_PO.requires_grad:
        # The kernels of the backward products refuse an expanded gradient, such as that of a bare ``.sum()``.
        y_PO.register_hook(Tensor.contiguous)
    return y_PO


def looped_product(x_PI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """The oracle: the same, expert by expert; rows behind the last end are zero. It waits for the device."""
    parts, start = [], 0
    for weight_OI, end in zip(weight_EOI, ends_E.tolist(), strict=True):
        parts.append(x_PI[start:end] @ weight_OI.T)
        start = end
    parts.append(x_PI.new_zeros(x_PI.shape[0] - start, weight_EOI.shape[1]))
    return torch.cat(parts)


def inner_width(width: int, activation: Activation) -> int:
    """Outputs of an expert's first product: SwiGLU's gate and up projections stand side by side, gate first."""
    return 2 * width if activation == "swiglu" else width


def _plain_activation(inner: Tensor, activation: Activation) -> Tensor:
    if activation == "gelu":
        return functional.gelu(inner)
    if activation == "relu":
        return functional.relu(inner)
    gate, up = inner.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def _activation_gradient(grad: Tensor, inner: Tensor, weight: Tensor | None, activation: Activation) -> Tensor:
    """Of the weighted activation; with SwiGLU made in place, so that only the result stands beside its inputs."""
    if activation != "swiglu":
        scaled = grad if weight is None else (grad * weight[..., None]).to(grad.dtype)
        return torch.ops.aten.gelu_backward(scaled, inner) if activation == "gelu" else scaled * (inner > 0)
    gate, up = inner.chunk(2, dim=-1)
    result = torch.empty_like(inner)
    of_gate, of_up = result.chunk(2, dim=-1)
    torch.mul(grad, up, out=of_gate)
    torch.ops.aten.silu.out(gate, out=of_up)
    of_up.mul_(grad)
    if weight is not None:
        result.mul_(weight[..., None])
    torch.ops.aten.silu_backward.grad_input(of_gate, gate, grad_input=of_gate)
    return result


class _Activate(torch.autograd.Function):
    """Keeps its inputs only, and recomputes what lies between: plain autograd would keep two more tensors."""

    @staticmethod
    def forward(ctx: Any, inner: Tensor, weight: Tensor | None, activation: Activation) -> Tensor:
        ctx.save_for_backward(inner, weight)
        ctx.activation = activation
        output = _plain_activation(inner, activation)
        # In place: a float32 weight acts on bf16 in float32 without a float32 copy of the rows.
        return output if weight is None else output.mul_(weight[..., None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        inner, weight = ctx.saved_tensors
        grad_weight = None
        if weight is not None:
            grad_weight = _plain_activation(inner, ctx.activation).mul_(grad).sum(dim=-1, dtype=weight.dtype)
        return _activation_gradient(grad, inner, weight, ctx.activation), grad_weight, None


def activate(inner: Tensor, activation: Activation = "swiglu", weight: Tensor | None = None) -> Tensor:
    """silu(gate) * up (``swiglu``, arXiv 2002.05202), gelu or relu, times a weight per row: (..., 2W or W) -> (..., W).

    >>> activate(torch.tensor([[-1.0, 2.0]]), "relu", torch.tensor([0.5])).tolist()
    [[0.0, 1.0]]
    """
    return _Activate.apply(inner, weight, activation)


class Experts(nn.Module):
    """num_experts feed-forward blocks w_out @ activation(w_in @ x), without biases.

    w_in: (E, 2W, H) with SwiGLU, gate's rows first, else (E, W, H); w_out: (E, H, W): laid out as ``nn.Linear`` does,
    one per expert. path: ``grouped`` or ``loop``; None takes the fast one where this device and these widths have one.
    """

    def __init__(
        self,
        *,
        num_experts: int,
        hidden: int,
        width: int,
        activation: Activation = "swiglu",
        path: Path | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.activation, self.forced_path = activation, path
        place = {"device": device, "dtype": dtype}
        self.w_in = nn.Parameter(torch.empty(num_experts, inner_width(width, activation), hidden, **place))
        self.w_out = nn.Parameter(torch.empty(num_experts, hidden, width, **place))
        for weight_EOI in (self.w_in, self.w_out):
            bound = 1.0 / math.sqrt(weight_EOI.shape[-1])
            nn.init.uniform_(weight_EOI, -bound, bound)

    def path(self) -> Path:
        """The path that the next forward takes."""
        _, hidden, width = self.w_out.shape
        fast = has_grouped_path(self.w_out.device, compute_dtype(self.w_out), hidden, width)
        return self.forced_path or ("grouped" if fast else "loop")

    def alignment(self) -> int:
        """Rows of one expert come in multiples of this many."""
        return row_alignment(self.w_out.device, compute_dtype(self.w_out))

    def forward(
        self, x_PH: Tensor, ends_E: Tensor, weight_P: Tensor | None = None, *, recompute_activation: bool = False
    ) -> Tensor:
        """Rows sorted by expert in, the same rows out, each times its weight: (P, H) -> (P, H).

        recompute_activation: the backward computes the activation again instead of keeping its output.
        """
        product = grouped_product if self.path() == "grouped" else looped_product
        dtype = compute_dtype(x_PH)
        inner_PI = product(x_PH.to(dtype), self.w_in.to(dtype), ends_E)

        active_PW = activate(inner_PI, self.activation, weight_P)
        rows_PH = product(active_PW, self.w_out.to(dtype), ends_E)
        if recompute_activation and torch.is_grad_enabled():
            discard([active_PW], lambda: [activate(inner_PI, self.activation, weight_P)], before=[rows_PH])
        return rows_PH
