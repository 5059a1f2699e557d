"""Compile the numba kernels into their cache during set-up, so that no later run pays for it."""

from __future__ import annotations

import numpy as np

from moesim.fabric import exact, port_kernels, round_kernels
from moesim.placement import search
from moesim.routing import sampler
from moesim.routing.balancing import LossFreeBias, TrainingSetting, simulate_balancing
from moesim.study import fast
from moesim.timeline import stream_kernels


def warm() -> None:
    """Call every room's kernels once."""
    exact.warm()
    port_kernels.warm()
    round_kernels.warm()
    sampler.warm()
    search.warm()
    stream_kernels.warm()
    fast.warm()
    setting = TrainingSetting(
        num_experts=4, top_k=1, num_layers=1, num_steps=2, sequences_per_batch=8, seq_len=16, learning_rate=1e-3
    )
    simulate_balancing(LossFreeBias(), setting, rng=np.random.default_rng(0))


if __name__ == "__main__":
    warm()
