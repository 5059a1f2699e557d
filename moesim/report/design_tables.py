"""The design notebook's table: every design in one row, beside its dense twins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesim.report.design_figures import change_words, three_digits
from moesim.report.tables import _table as table_of
from moesim.units import GIGA, format_bytes, format_seconds

if TYPE_CHECKING:
    from great_tables import GT

    from moesim.study.design_axes import DesignStudy


def designs(study: DesignStudy) -> GT:
    """Parameters, compute, memory, communication, step, speed and cost of each design; × are against its own twins."""
    priced = study.price_per_gpu_hour is not None
    cost_name = f"{study.currency} per 1B" if priced else "GPU hours per 1B"
    names = ("Design", "Total", "Active", "GFLOP per token", "Peak", "Comm.", "Step", "Tokens/s per GPU", cost_name)
    frame: dict[str, list[str]] = {name: [] for name in (*names, "× dense active", "× dense total")}
    for point in (study.asked, *study.possible):
        cost, active, total = point.costs
        own = cost.gpu_hours_per_billion_tokens
        money = study.money_per_billion_tokens(cost)
        row = (
            change_words(point),
            three_digits(cost.total_parameters),
            three_digits(cost.active_parameters),
            f"{cost.flops_per_token / GIGA:,.3g}",
            format_bytes(cost.peak_bytes) + ("" if cost.fits else " (too much)"),
            f"{cost.exposed_comm_s / cost.step_s:.0%}",
            format_seconds(cost.step_s),
            f"{cost.tokens_per_s_per_gpu:,.0f}",
            f"{own if money is None else money:,.4g}",
            f"{own / active.gpu_hours_per_billion_tokens:.2f}",
            f"{own / total.gpu_hours_per_billion_tokens:.2f}",
        )
        for column, value in zip(frame.values(), row, strict=True):
            column.append(value)
    return table_of("designs", frame, right=list(frame)[1:])
