"""What one simulated training step came to: the numbers of ``moesim simulate``, with where each came from.

Legend: L MoE layers, E experts.
"""

from __future__ import annotations

import dataclasses
import html
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.cost.device import Provenance
from moesim.units import format_bytes, format_seconds

# The parts a step's time is split into, in the order figures stack them: mean seconds over all ranks, summing to the
# step.
STEP_PARTS = (
    "attention",
    "dense_ffn",
    "router",
    "permute",
    "experts",
    "embedding_head",
    "recompute",
    "tensor_parallel_comm",
    "dispatch",
    "combine",
    "pipeline_send",
    "gradient_reduction",
    "optimizer",
    "host_transfer",
    "host",
    "wait_for_slowest",
    "pipeline_bubble",
)
COMM_PARTS = ("tensor_parallel_comm", "dispatch", "combine", "pipeline_send", "gradient_reduction", "host_transfer")
MEMORY_PARTS = (
    "weights_bytes",
    "gradients_bytes",
    "optimizer_bytes",
    "activations_bytes",
    "dispatch_bytes",
    "comm_bytes",
    "reserved_bytes",
)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One simulated step. Times [s] are means over all ranks unless said otherwise; memory [bytes] is the worst
    rank's.
    """

    scenario: dict[str, Any]
    step_s: float
    tokens_per_s: float
    tokens_per_s_per_gpu: float
    kept_assignment_fraction: float
    drop_fraction: float
    mfu: float
    mfu_full_attention: float
    model_flops_per_s_per_gpu: float
    compute_s: float
    exposed_comm_s: float
    hidden_comm_s: float
    wait_s: float
    bubble_fraction: float
    max_mean_load: float  # busiest expert over the mean of its layer, in the worst layer
    gini: float  # of the load over experts, mean over layers
    entropy: float  # of the load over experts, as a fraction of the largest possible, mean over layers
    memory: dict[str, float]  # MEMORY_PARTS and peak_bytes of the worst rank, and peak_p99_bytes over steps
    memory_by_rank: list[dict[str, Any]]  # one per stage: stage, rank, MEMORY_PARTS, peak_bytes
    fits: bool
    headroom_bytes: float
    out_of_memory_fraction: float  # probability that a step needs more than a GPU holds
    memory_over_steps: dict[str, Any]  # redraw, num_steps, and p50, p90, p99 of peak, activations, dispatch buffers
    envelope: dict[str, Any]  # inside: bool, reasons: list of what is not modelled or not validated
    step_parts_s: dict[str, float]  # STEP_PARTS, summing to step_s
    load_LE: NDArray[np.float64]  # share of the layer's assignments per expert, before drops; rows sum to 1
    alerts: list[dict[str, Any]]  # layer, expert, ratio: experts over 3x the mean
    drop_fraction_by_layer: list[float]
    binds: str  # the part that takes the most time, in words
    provenance: tuple[Provenance, ...]
    warnings: tuple[str, ...]
    # Of packed documents: shares of a whole sequence's attention, and what their unevenness costs; None without them.
    packing: dict[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; load_LE as nested lists."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if self.packing is None:
            del plain["packing"]
        return plain | {
            "load_LE": self.load_LE.tolist(),
            "provenance": [dataclasses.asdict(item) for item in self.provenance],
            "warnings": list(self.warnings),
        }

    def rows(self) -> list[tuple[str, str]]:
        """The headline numbers, worded for a reader."""
        return [
            ("Step time", format_seconds(self.step_s)),
            ("Tokens per second and GPU", f"{self.tokens_per_s_per_gpu:,.0f}"),
            ("MFU (causal attention)", f"{self.mfu:.1%}"),
            ("Peak memory, worst rank", format_bytes(self.memory["peak_bytes"])),
            (
                "Fits",
                f"yes, {format_bytes(self.headroom_bytes)} free"
                if self.fits
                else f"no, {format_bytes(-self.headroom_bytes)} too much",
            ),
            ("Peak memory, 99 of 100 steps", f"under {format_bytes(self.memory['peak_p99_bytes'])}"),
            ("Steps that run out of memory", _chance(self.out_of_memory_fraction)),
            ("Exposed communication", f"{self.exposed_comm_s / self.step_s:.1%} of the step"),
            ("Waiting for the slowest rank", f"{self.wait_s / self.step_s:.1%} of the step"),
            ("Pipeline bubble", f"{self.bubble_fraction:.1%} of the step"),
            ("Busiest expert over the mean", f"{self.max_mean_load:.2f}x"),
            ("Dropped assignments", f"{self.drop_fraction:.2%}"),
            *self._packing_rows(),
            ("Binds", self.binds),
        ]

    def _packing_rows(self) -> list[tuple[str, str]]:
        if self.packing is None:
            return []
        mean, slowest = self.packing["mean_share"], self.packing["slowest_over_mean"]
        late_s = self.packing["imbalance_s"]
        return [
            (
                "Attention of packed documents",
                f"{mean:.0%} of whole sequences', slowest replica {slowest:.2f}x the mean",
            ),
            ("Lost to uneven documents", f"{format_seconds(late_s)}, {late_s / self.step_s:.1%} of the step"),
        ]

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in self.rows()
        )
        return f"<table>{cells}</table>"


def _chance(fraction: float) -> str:
    """How many steps, in words.

    >>> _chance(0.0213)
    '2.13%'
    """
    if fraction < 1e-4:
        return "none"
    return "all" if fraction > 0.9999 else f"{fraction:.2%}"
