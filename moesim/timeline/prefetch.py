"""FSDP's gathers and scatters beside a pass: the next layer's weights are fetched while this one is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moesim.timeline.phases import Floats, Phase


def fetched_ahead(phases: Sequence[Phase], num_units: int) -> list[Phase]:
    """A pass whose gathers of weights and scatters of gradients, one for each of num_units layers or tables, hide
    behind the computing of the units beside them: the first gather and the last scatter show, and of the others what
    outlasts the computing. Where the pass exchanges tokens, ports are taken by that. See docs/model.md#fsdp.

    >>> compute = Phase(name="layers", part="attention", layer=0, seconds=4.0)
    >>> gather = Phase(name="gather weights", part="gradient_reduction", layer=-1, seconds=2.0)
    >>> [float(phase.seconds) for phase in fetched_ahead([gather, compute], 4)]
    [0.5, 4.0]
    """
    behind = 1.0 - 1.0 / max(num_units, 1)
    own: Floats = sum((np.asarray(phase.seconds) for phase in phases if not phase.is_comm), np.zeros(()))
    free, shown = own * behind, []
    for phase in phases:
        if phase.part != "gradient_reduction":
            shown.append(phase)
            continue
        fetched = np.asarray(phase.seconds) * behind
        seconds = np.asarray(phase.seconds) - fetched + np.maximum(fetched - free, 0.0)
        free = np.maximum(free - fetched, 0.0)
        shown.append(replace(phase, seconds=seconds))
    return shown
