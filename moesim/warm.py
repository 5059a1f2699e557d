"""Compile the numba kernels into their cache during set-up, so that no later run pays for it."""
