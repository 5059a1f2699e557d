"""Which device to work on."""

from __future__ import annotations

import torch


def find_device(device: str) -> torch.device:
    """The device of a name: auto, cpu or cuda. Raises ValueError for one that is not there."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: must be auto, cpu or cuda; got {device!r}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: must be one that is there; got 'cuda', and torch sees no CUDA device")
    return torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
