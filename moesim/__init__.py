"""moesim: plan clusters for Mixture-of-Experts models.

>>> import moesim  # doctest: +SKIP
>>> scenario = moesim.Scenario.make(model="mixtral-8x7b", cluster="h100-8x-ib400", num_gpus=64, ep=8)  # doctest: +SKIP
>>> moesim.simulate(scenario)  # doctest: +SKIP
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import moesim.describe as _describe

if TYPE_CHECKING:
    from moesim.catalog.hardware import load_cluster
    from moesim.catalog.models import load_model
    from moesim.scenario import Scenario
    from moesim.study.simulate import simulate

__version__ = "0.1.0"
__all__ = ["Scenario", "__version__", "describe", "load_cluster", "load_model", "simulate"]

_HOMES = {
    "Scenario": "moesim.scenario",
    "load_cluster": "moesim.catalog.hardware",
    "load_model": "moesim.catalog.models",
    "simulate": "moesim.study.simulate",
}


class _CallableRoom(ModuleType):
    """``moesim.describe`` is a room and also the function ``describe(model, seq_len)``: the room can be called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from moesim.describe.counts import describe

        return describe(*args, **kwargs)


_describe.__class__ = _CallableRoom


def __getattr__(name: str) -> Any:
    """Load a public name when it is first asked for (PEP 562), so that ``import moesim`` stays quick."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'moesim' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
