"""Counting FLOPs with torch's own counter, which passes over grouped products: here is what one of them costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def _grouped_flops(a_shape: Any, b_shape: Any, *_: Any, **__: Any) -> int:
    """2 per row and weight of one expert: (P, I) x (E, I, O), or for the weights' gradient (O, P) x (P, I).

    The rows are those set aside, padding included, since their use is known on the device only.
    """
    return 2 * a_shape[0] * a_shape[1] * b_shape[-1]


# In the form that ``FlopCounterMode(custom_mapping=...)`` takes; empty for a torch without grouped products.
GROUPED_FLOPS = {torch.ops.aten._grouped_mm: _grouped_flops} if hasattr(torch.ops.aten, "_grouped_mm") else {}


def flop_counter() -> FlopCounterMode:
    """A context that counts the FLOPs of what runs in it, grouped products too: ``.get_total_flops()`` after it.

    >>> with flop_counter() as counter:
    ...     _ = torch.ones(2, 3) @ torch.ones(3, 4)
    >>> counter.get_total_flops()
    48
    """
    return FlopCounterMode(display=False, custom_mapping=GROUPED_FLOPS)


def counted_flops(run: Callable[[], object]) -> int:
    """FLOPs of one call, grouped products too, and attention as its plain products over all keys.

    A backward takes the kernels of its forward, so the forward belongs in the same call.
    """
    with sdpa_kernel(SDPBackend.MATH), flop_counter() as counter:
        run()
    return int(counter.get_total_flops())
