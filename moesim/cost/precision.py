"""Number formats of a training run's matrix products: which peak, which bytes, and what the casts around them move.

A recipe says what a linear layer's operands are cast to, and how. Each operand is needed twice, laid out by rows for
one product and by columns for another (inputs: forward and weight gradient; gradients: input and weight gradient;
weights: forward and input gradient), so a cast reads the wide tensor and writes both. See docs/model.md#casts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from moesim.describe.workload import Dispatcher, Precision
from moesim.units import BYTES_PER_ELEMENT

WIDE_BYTES = BYTES_PER_ELEMENT["bf16"]
LAYOUTS = 2  # by rows and by columns
FP32_BYTES = BYTES_PER_ELEMENT["float32"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the operands of a run's products are. peak: the GPU's peak that counts; kernels: the table of efficiencies
    on GPUs whose tensor cores know the format, kernels_on_hopper on those before; weight_kernels_on_hopper where those
    of weight gradients are others.
    """

    peak: str
    kernels: str
    kernels_on_hopper: str
    weight_kernels_on_hopper: str = ""
    element_bytes: float  # of a narrow element
    scale_bytes: float = 0.0  # of its share of a block's scale
    cast_reads: int = 0  # how often a cast reads the wide tensor: twice where it needs the largest element first
    pads_rows: bool = False  # an expert's rows are copied into whole tiles, and its results out of them
    dispatches_narrow: bool = False  # DeepEP sends rows in this format
    source: str = ""

    @property
    def operand_bytes(self) -> float:
        """Of one element of an operand, its share of scales included."""
        return self.element_bytes + self.scale_bytes

    def cast_bytes(self, num_elements: float) -> float:
        """Bytes that casting a tensor reads and writes, both layouts; 0 where nothing is cast."""
        return num_elements * (self.cast_reads * WIDE_BYTES + LAYOUTS * self.operand_bytes) if self.cast_reads else 0.0

    def dispatch_element_bytes(self, dispatcher: Dispatcher) -> float:
        """Of one element of a row on its way to an expert, forward. Megatron's all-to-all sends BF16 in any recipe."""
        return self.operand_bytes if self.dispatches_narrow and dispatcher == "deepep" else WIDE_BYTES


RECIPES: Mapping[Precision, Recipe] = MappingProxyType(
    {
        "bf16": Recipe(peak="bf16", kernels="bf16", kernels_on_hopper="bf16", element_bytes=WIDE_BYTES),
        "fp8": Recipe(
            peak="fp8",
            kernels="fp8",
            kernels_on_hopper="fp8_block",
            weight_kernels_on_hopper="fp8_block_weights",
            element_bytes=BYTES_PER_ELEMENT["fp8"],
            scale_bytes=FP32_BYTES / 128,
            cast_reads=1,
            pads_rows=True,
            dispatches_narrow=True,
            source="blockwise FP8: 1x128 tiles of inputs and gradients, 128x128 blocks of weights, float32 scales; "
            "DeepSeek-V3, arXiv 2412.19437 section 3.3; Transformer Engine's Float8BlockScaling",
        ),
        "fp8_tensor": Recipe(
            peak="fp8",
            kernels="fp8",
            kernels_on_hopper="fp8",
            element_bytes=BYTES_PER_ELEMENT["fp8"],
            cast_reads=2,
            pads_rows=True,
            source="FP8 with one scale a tensor, from its own largest element: Transformer Engine's "
            "Float8CurrentScaling; arXiv 2209.05433",
        ),
        "mxfp8": Recipe(
            peak="mxfp8",
            kernels="fp8",
            kernels_on_hopper="fp8",
            element_bytes=BYTES_PER_ELEMENT["mxfp8"],
            scale_bytes=1 / 32,
            cast_reads=1,
            pads_rows=True,
            source="MXFP8: blocks of 32 with a one-byte power of two, cast by rows and by columns apart; OCP "
            "Microscaling Formats 1.0, arXiv 2506.08027",
        ),
        "nvfp4": Recipe(
            peak="nvfp4",
            kernels="nvfp4",
            kernels_on_hopper="nvfp4",
            element_bytes=BYTES_PER_ELEMENT["nvfp4"],
            scale_bytes=1 / 16,
            cast_reads=2,
            pads_rows=True,
            source="NVFP4: blocks of 16 with a one-byte scale under one of the whole tensor; all linear layers "
            "(NVIDIA's recipe keeps some in BF16), arXiv 2509.25149",
        ),
    }
)
