"""What the network is worth: the MoE and its dense twins over the speed of each GPU's network card."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moesim.scenario import Scenario
from moesim.study.simulate import simulate
from moesim.study.twins import Twins, dense_twins
from moesim.units import GIGA

RATIOS = (1 / 16, 1 / 4, 1.0, 4.0, 16.0)  # of the asked NIC rate
MAX_REFINEMENTS = 3  # each costs two simulations and narrows a factor of 4 to a few per cent


@dataclass(frozen=True, kw_only=True)
class BreakEven:
    """Throughput of the MoE and its twins over the NIC rate, and where the MoE stops being cheaper than a twin.

    tokens_per_s_per_gpu: ``moe, dense_active, dense_total``, one value per rate. A break-even rate is None where the
    curves do not cross in the range.
    """

    nic_bytes_per_s: tuple[float, ...]
    tokens_per_s_per_gpu: Mapping[str, tuple[float, ...]]
    asked_bytes_per_s: float
    total_bytes_per_s: float | None  # MoE and equal-total twin cost the same here
    active_bytes_per_s: float | None
    sentence: str


def with_nic(scenario: Scenario, bytes_per_s: float) -> Scenario:
    """The scenario with another NIC rate; everything else of the cluster stays."""
    was = scenario.cluster.nic_bytes_per_s
    nic = dataclasses.replace(was, value=bytes_per_s, kind="assumed", source="swept by the planning study")
    return scenario.with_(cluster=dataclasses.replace(scenario.cluster, nic_bytes_per_s=nic))


def break_even(scenario: Scenario, twins: Twins, progress: Callable[[str], None] | None = None) -> BreakEven:
    """Simulate MoE and twins over NIC rates around the asked one; find where MoE and equal-total twin cost the same.

    Cost is GPU time per token. The crossing is found by false position on the logarithms, to MAX_REFINEMENTS steps.
    """
    asked = scenario.cluster.nic_bytes_per_s.value
    dense = dense_twins(scenario)
    scenarios = {"moe": scenario, "dense_active": dense["active"], "dense_total": dense["total"]}
    known = {"moe": twins.moe, "dense_active": twins.active, "dense_total": twins.total}

    def throughput(name: str, rate: float) -> float:
        if rate == asked:
            return float(known[name].tokens_per_s_per_gpu)
        if progress is not None:
            progress(f"{name.replace('_', ' ')} at {rate / GIGA:.3g} GB/s")
        return float(simulate(with_nic(scenarios[name], rate)).tokens_per_s_per_gpu)

    rates = tuple(asked * ratio for ratio in RATIOS)
    curves = {name: tuple(throughput(name, rate) for rate in rates) for name in scenarios}

    def gain(twin: str) -> list[float]:
        return [math.log(moe / dense) for moe, dense in zip(curves["moe"], curves[twin], strict=True)]

    def gain_at(rate: float) -> float:
        return math.log(throughput("moe", rate) / throughput("dense_total", rate))

    total = _crossing(rates, gain("dense_total"), gain_at)
    active = _crossing(rates, gain("dense_active"), None)
    return BreakEven(
        nic_bytes_per_s=rates,
        tokens_per_s_per_gpu=curves,
        asked_bytes_per_s=asked,
        total_bytes_per_s=total,
        active_bytes_per_s=active,
        sentence=_sentence(rates, gain("dense_total"), total, twins),
    )


def _crossing(rates: tuple[float, ...], gains: list[float], exact: Callable[[float], float] | None) -> float | None:
    """The highest rate at which the gain changes its sign, or None. Without ``exact``, interpolated only."""
    pairs = [i for i in range(len(rates) - 1) if (gains[i] > 0) != (gains[i + 1] > 0)]
    if not pairs:
        return None
    low, high = math.log(rates[pairs[-1]]), math.log(rates[pairs[-1] + 1])
    at_low, at_high = gains[pairs[-1]], gains[pairs[-1] + 1]
    guess = low - at_low * (high - low) / (at_high - at_low)
    for _ in range(MAX_REFINEMENTS if exact else 0):
        assert exact is not None
        here = exact(math.exp(guess))
        if abs(here) < 0.01:  # within 1 % of the same cost
            break
        if (here > 0) == (at_low > 0):
            low, at_low = guess, here
        else:
            high, at_high = guess, here
        guess = low - at_low * (high - low) / (at_high - at_low)
    return math.exp(guess)


def _sentence(rates: tuple[float, ...], gains: list[float], total: float | None, twins: Twins) -> str:
    twin = "a dense model of equal total size"
    between = f"between {rates[0] / GIGA:.3g} and {rates[-1] / GIGA:.3g} GB/s per GPU"
    if total is not None:
        side = "below" if gains[-1] > 0 else "above"
        words = f"The MoE stops being cheaper than {twin} {side} {total / GIGA:.3g} GB/s per GPU."
    elif gains[0] > 0:
        words = f"At every network speed {between} the MoE is cheaper than {twin}."
    else:
        words = f"At no network speed {between} is the MoE cheaper than {twin}."
    price = f"{twins.cost_over_active:.2f} times the GPU time per token of a dense model of equal active size"
    return f"{words} On this cluster it takes {price}."
