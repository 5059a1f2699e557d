"""Compile the numba kernels into their cache during set-up, so that no later run pays for it."""

from __future__ import annotations

from moesim.routing.sampler import warm

if __name__ == "__main__":
    warm()
