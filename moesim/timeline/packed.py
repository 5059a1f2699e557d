"""The attention work of a step's packed sequences: the second skew, which meets the ranks micro-batch by micro-batch.

Legend: M micro-batches, D data-parallel replicas, R ranks of a stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moesim.cost.documents import draw_pieces, shares
from moesim.describe.model import GroupedQueryAttention, Layer
from moesim.errors import NotModelledError
from moesim.scenario import Scenario
from moesim.seeds import stream

Floats = NDArray[np.float64]
Window = int | None


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedWork:
    """Attention of each replica's micro-batches over that of unpacked sequences, by sliding window (None: none).

    See docs/model.md#packed-documents.
    """

    share_MD_by_window: Mapping[Window, Floats]
    ranks_per_replica: int  # that share a sequence: tp * cp

    def share_MR(self, layer: Layer) -> Floats:
        """The share of every micro-batch and rank of a stage, in rank order."""
        return np.repeat(self.share_MD_by_window[window_of(layer)], self.ranks_per_replica, axis=1)

    def mean(self, layer: Layer) -> float:
        return float(self.share_MD_by_window[window_of(layer)].mean())

    def evened(self) -> PackedWork:
        """The same work, shared alike by all replicas and micro-batches."""
        even = {window: np.full_like(share, share.mean()) for window, share in self.share_MD_by_window.items()}
        return replace(self, share_MD_by_window=even)

    def numbers(self) -> dict[str, float]:
        """Mean share, its spread over micro-batches and replicas, the slowest replica's over the mean."""
        share_MD = next(iter(self.share_MD_by_window.values()))
        mean = float(share_MD.mean())
        return {
            "mean_share": mean,
            "spread": float(share_MD.std()) / mean,
            "slowest_over_mean": float(share_MD.max(axis=1).mean()) / mean,
            "slowest_replica_over_mean": float(share_MD.mean(axis=0).max()) / mean,
        }


def window_of(layer: Layer) -> Window:
    attention = layer.attention
    return attention.sliding_window if isinstance(attention, GroupedQueryAttention) else None


def packed_work(scenario: Scenario) -> PackedWork | None:
    """Draw the step's documents; None where sequences are not packed from any. Raises NotModelledError."""
    train, parallel, model = scenario.train, scenario.parallel, scenario.model
    if train.documents is None:
        return None
    if any(layer.cross_attention is not None for layer in model.layers):
        raise NotModelledError(f"model {model.name}: packed documents of an encoder and decoder are not modelled")
    num_micro_batches, dp, seq_len = scenario.num_micro_batches, scenario.layout.dp, train.seq_len
    num_sequences = num_micro_batches * dp * train.micro_batch
    rng = stream(scenario.seed, "documents")
    pieces_P, sequence_P = draw_pieces(train.documents, num_sequences, seq_len, rng)
    order_N = rng.permutation(num_sequences)  # data loaders shuffle sequences: a long document's are not neighbours
    windows = dict.fromkeys(window_of(layer) for layer in (*model.layers, *model.mtp_layers))

    def share_MD(window: Window) -> Floats:
        share_N = shares(pieces_P, sequence_P, num_sequences, seq_len, window)
        return share_N[order_N].reshape(num_micro_batches, dp, train.micro_batch).mean(axis=2)

    return PackedWork(
        share_MD_by_window={window: share_MD(window) for window in windows},
        ranks_per_replica=parallel.tp * parallel.cp,
    )
