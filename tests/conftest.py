"""Torch works with one thread in tests: pytest-xdist fills the cores already, and small products gain nothing."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def _one_torch_thread() -> None:
    torch = sys.modules.get("torch")  # tests without torch must not wait for its import
    if torch is not None:
        torch.set_num_threads(1)
