"""SwiGLU experts, two ways that must agree: one grouped product for all experts, and a readable loop as its oracle.

Rows come sorted by expert: expert e owns the rows from ``ends_E[e - 1]`` to ``ends_E[e]``. Rows behind the last end
belong to nobody: nothing is promised about their values, and nobody may read them.

Legend: P rows (padded copies of tokens), E experts, H hidden, W expert width, I inputs and O outputs of a product.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Path = Literal["grouped", "loop"]

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


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, with gate and up side by side in the last dimension: (..., 2W) -> (..., W). arXiv 2002.05202."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


class SwigluExperts(nn.Module):
    """num_experts feed-forward blocks down(silu(gate x) * up x), without biases; gate and up share one matrix.

    gate_up: (E, 2W, H), gate's rows first; down: (E, H, W): laid out as ``nn.Linear`` does, one per expert.
    """

    def __init__(self, *, num_experts: int, hidden: int, width: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        place = {"device": device, "dtype": dtype}
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * width, hidden, **place))
        self.down = nn.Parameter(torch.empty(num_experts, hidden, width, **place))
        for weight_EOI in (self.gate_up, self.down):
            bound = 1.0 / math.sqrt(weight_EOI.shape[-1])
            nn.init.uniform_(weight_EOI, -bound, bound)

    def path(self) -> Path:
        """The fast path where this device and these widths have one, else the loop."""
        _, hidden, width = self.down.shape
        return "grouped" if has_grouped_path(self.down.device, self.down.dtype, hidden, width) else "loop"

    def forward(self, x_PH: Tensor, ends_E: Tensor, path: Path | None = None) -> Tensor:
        """Rows sorted by expert in, the same rows out: (P, H) -> (P, H)."""
        product = grouped_product if (path or self.path()) == "grouped" else looped_product
        return product(swiglu(product(x_PH, self.gate_up, ends_E)), self.down, ends_E)
