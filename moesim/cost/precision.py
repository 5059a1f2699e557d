"""Number formats of a training run's matrix products: which peak, which bytes, and what the casts around them move.

A recipe says what a linear layer's operands are cast to, and how. Each operand is needed twice, laid out by rows for
one product and by columns for another (inputs: forward and weight gradient; gradients: input and weight gradient;
weights: forward and input gradient). Transformer Engine reads the wide tensor once and writes both; DeepSeek's own
framework keeps rows, and makes columns of them when the backward needs these. See docs/model.md#casts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from moesim.describe.workload import Dispatcher, Precision, Training
from moesim.units import BYTES_PER_ELEMENT

WIDE_BYTES = BYTES_PER_ELEMENT["bf16"]
LAYOUTS = 2  # by rows and by columns
FP32_BYTES = BYTES_PER_ELEMENT["float32"]


@dataclass(frozen=True, kw_only=True)
class Cast:
    """One kernel that changes a tensor's format. by_expert: launched for each expert's rows apart, whose blocks along
    the tokens end with them.
    """

    element_bytes: float  # read and written for each element
    by_expert: bool = False


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
    # All is kept by rows only, an input once where several layers take it, and columns are made when the backward needs
    # them: inputs are widened and cast again, gradients cast twice, weights transposed.
    keeps_rows: bool = False
    narrows_activations: bool = False  # what activations take in is kept in 8 bits
    pads_rows: bool = False  # an expert's rows are copied into whole tiles, and its results out of them
    dispatches_narrow: bool = False  # DeepEP sends rows in this format
    source: str = ""

    @property
    def operand_bytes(self) -> float:
        """Of one element of an operand, its share of scales included."""
        return self.element_bytes + self.scale_bytes

    def input_casts(
        self, *, backward: bool, arrives_narrow: bool = False, cast_before: bool = False
    ) -> tuple[Cast, ...]:
        """Kernels that cast a linear layer's input. arrives_narrow: the dispatch brought it so; cast_before: another
        layer takes the same.
        """
        if not self.keeps_rows:
            return () if backward else self.both_layouts()
        if cast_before or (arrives_narrow and not backward):
            return ()
        return self._rows_then_columns() if backward else self._kernels(self._rows)

    def gradient_casts(self) -> tuple[Cast, ...]:
        """Kernels that cast the gradient of a linear layer's result."""
        return self._rows_then_columns() if self.keeps_rows else self.both_layouts()

    def activation_casts(self) -> tuple[Cast, ...]:
        """The kernel that keeps an activation's input in 8 bits, or widens it for the backward."""
        return (Cast(element_bytes=WIDE_BYTES + RECIPES["fp8"].operand_bytes),) if self.narrows_activations else ()

    def weight_casts(self) -> tuple[Cast, ...]:
        """Kernels that cast a weight, once a step."""
        return self._kernels(self._rows) if self.keeps_rows else self.both_layouts()

    def weight_transposes(self) -> tuple[Cast, ...]:
        """Kernels that lay a cast weight out for the input gradient, in each backward."""
        return self._kernels(Cast(element_bytes=2 * self.operand_bytes)) if self.keeps_rows else ()

    def both_layouts(self) -> tuple[Cast, ...]:
        """Kernels that look for the largest element, where that must be known first, then write both layouts."""
        largest = (Cast(element_bytes=WIDE_BYTES),) * (self.cast_reads - 1)
        return self._kernels(*largest, Cast(element_bytes=WIDE_BYTES + LAYOUTS * self.operand_bytes))

    def arrives_narrow(self, dispatcher: Dispatcher) -> bool:
        """Whether experts take rows, and gradients of their results, as the dispatch brings them."""
        return self.keeps_rows and self.dispatch_element_bytes(dispatcher) < WIDE_BYTES

    def dispatch_element_bytes(self, dispatcher: Dispatcher) -> float:
        """Of one element of a row on its way to an expert, forward. Megatron's all-to-all sends BF16 in any recipe."""
        return self.operand_bytes if self.dispatches_narrow and dispatcher == "deepep" else WIDE_BYTES

    @property
    def _rows(self) -> Cast:
        return Cast(element_bytes=WIDE_BYTES + self.operand_bytes)

    def _rows_then_columns(self) -> tuple[Cast, ...]:
        """By rows, or widened where that was done before, which moves as much; then by columns."""
        return self._kernels(self._rows, replace(self._rows, by_expert=True))

    def _kernels(self, *casts: Cast) -> tuple[Cast, ...]:
        return casts if self.cast_reads else ()


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
# What DeepSeek's own framework does beside Transformer Engine's recipe of the same format: `software: deepseek`.
DEEPSEEK_FP8 = replace(
    RECIPES["fp8"],
    weight_kernels_on_hopper="fp8_block_weights_2024",
    keeps_rows=True,
    pads_rows=False,  # its permutation lays each expert's rows out in whole tiles
    source="blockwise FP8 as DeepSeek-V3 was trained: inputs kept by rows, widened, transposed and cast again in the "
    "backward; arXiv 2412.19437 sections 3.3 and 3.5.2",
)


def recipe_of(train: Training) -> Recipe:
    """The recipe of a run: of its format, under the software that trains, with what it keeps.

    >>> recipe_of(Training(precision="fp8", software="deepseek")).keeps_rows, recipe_of(Training()).keeps_rows
    (True, False)
    """
    is_own = (train.precision, train.software) == ("fp8", "deepseek")
    recipe = DEEPSEEK_FP8 if is_own else RECIPES[train.precision]
    return replace(recipe, narrows_activations=train.kept.activation_input == "fp8")
