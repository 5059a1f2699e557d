"""Which sizes a calibration times: plain numbers per model, so that this package needs no catalog.

Sources: each model's ``config.json`` on Hugging Face (mistralai/Mixtral-8x7B-v0.1, deepseek-ai/DeepSeek-V3,
Qwen/Qwen3-30B-A3B), read 2025-12. ``cpu-small`` is nobody's model: it is what a laptop times within a minute.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True)
class LayerShapes:
    """One model's MoE layer, and the range to time.

    active_experts: how many experts a rank holds or uses, each a column of the measured grid; max_tokens: the most
    tokens of one expert; max_rows: the most rows of one grouped product, over all its experts; layer_experts: experts
    of the whole layer that is timed (a rank's share of a large model).
    """

    name: str
    hidden: int
    expert_width: int
    num_experts: int
    top_k: int
    active_experts: tuple[int, ...]
    layer_experts: int
    max_tokens: int = 8192
    max_rows: int = 65536

    def __post_init__(self) -> None:
        sizes = (self.hidden, self.expert_width, self.num_experts, self.top_k, self.max_tokens, self.max_rows)
        if min(sizes) < 1 or not self.active_experts or min(self.active_experts) < 1:
            raise ValueError(f"shapes {self.name}: every size must be at least 1")
        if not self.top_k <= self.layer_experts <= self.num_experts:
            raise ValueError(f"shapes {self.name}: top_k <= layer_experts <= num_experts must hold")
        if max(self.active_experts) > self.max_rows:
            raise ValueError(f"shapes {self.name}: max_rows must give every active expert a row")

    @property
    def products(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of the experts' two products: gate and up in one, then down."""
        return ((self.hidden, 2 * self.expert_width), (self.expert_width, self.hidden))

    @property
    def dense_products(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of the dense products timed beside them: attention-like, and in and out of a wide block."""
        return ((self.hidden, self.hidden), (self.hidden, 4 * self.hidden), (4 * self.hidden, self.hidden))


def shapes_of(*, name: str, hidden: int, expert_width: int, num_experts: int, top_k: int) -> LayerShapes:
    """Shapes of any model from its five numbers, with the columns that common expert parallelism gives a rank."""
    columns = tuple(count for count in (1, 4, 8, 32, 64) if count <= num_experts)
    return LayerShapes(
        name=name,
        hidden=hidden,
        expert_width=expert_width,
        num_experts=num_experts,
        top_k=top_k,
        active_experts=columns if num_experts in columns or num_experts > 64 else (*columns, num_experts),
        layer_experts=min(num_experts, 64),
    )


CPU_SMALL = LayerShapes(
    name="cpu-small",
    hidden=512,
    expert_width=1024,
    num_experts=8,
    top_k=2,
    active_experts=(1, 2, 4, 8),
    layer_experts=8,
    max_tokens=1024,
    max_rows=4096,
)

NAMED_SHAPES: Mapping[str, LayerShapes] = MappingProxyType(
    {
        "cpu-small": CPU_SMALL,
        "mixtral-8x7b": shapes_of(name="mixtral-8x7b", hidden=4096, expert_width=14336, num_experts=8, top_k=2),
        "deepseek-v3": shapes_of(name="deepseek-v3", hidden=7168, expert_width=2048, num_experts=256, top_k=8),
        "qwen3-30b-a3b": shapes_of(name="qwen3-30b-a3b", hidden=2048, expert_width=768, num_experts=128, top_k=8),
    }
)
