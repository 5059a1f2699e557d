"""Figures of the all-to-all notebook: busy ports, when GPUs are done, algorithms over message size and over skew.

Legend: R GPUs of an expert-parallel group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from moesim.report.style import COLOURS, Picture, finish, headline, house_style, light_grid, new_figure, spread
from moesim.units import MILLI, format_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from moesim.study.exchange import ExchangePoint, ExchangeStudy

ALGORITHM_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "direct": "direct (once for each expert)",
        "hierarchical": "hierarchical (once to each node, on by NVLink)",
        "low_latency": "low latency (once for each expert, own NIC)",
    }
)
ALGORITHM_COLOURS: Mapping[str, str] = MappingProxyType(
    {"direct": COLOURS["attention"], "hierarchical": COLOURS["moe"], "low_latency": COLOURS["dispatch"]}
)
_WIDTHS = (5.5, 3.2, 1.4)
_PORT_WORDS = MappingProxyType(
    {
        "nvlink_out": "NVLink out",
        "nvlink_in": "NVLink in",
        "nic_out": "NIC out",
        "nic_in": "NIC in",
    }
)
_PORT_COLOURS = MappingProxyType(
    {"nvlink_out": "#99DDFF", "nvlink_in": "#0072B2", "nic_out": "#EE8866", "nic_in": "#C0143C"}
)


def link_words(link: str) -> str:
    """A link's name for a reader.

    >>> link_words("nic_in of rank 57")
    'NIC in of GPU 57'
    """
    return link.replace("nic_", "NIC ").replace("nvlink_", "NVLink ").replace("_", " ").replace("rank", "GPU")


def ports(study: ExchangeStudy) -> Picture:
    """How long each GPU's ports are busy with one dispatch, by algorithm."""
    from moesim.study.exchange import ALGORITHMS

    busy = {name: study.port_busy_s(name) for name in ALGORITHMS}
    used = [port for port in _PORT_WORDS if any(of[port].any() for of in busy.values())]
    top = max(float(seconds_R.max()) for of in busy.values() for seconds_R in of.values())
    own = study.exact[study.own]
    title = f"The busiest port is {link_words(own.bottleneck)}: {format_seconds(own.lower_bound_s)}"
    with house_style():
        figure = new_figure(9.6, 3.6)
        headline(figure, title)
        for axes, name in zip(figure.subplots(1, 3, sharey=True), ALGORITHMS, strict=True):
            for port in used:
                order = np.sort(busy[name][port])[::-1] / MILLI
                axes.plot(
                    np.arange(1, len(order) + 1), order, color=_PORT_COLOURS[port], label=_PORT_WORDS[port], linewidth=2
                )
            axes.set_title(name.replace("_", " ") + (" (asked for)" if name == study.own else ""), fontsize=9.5)
            axes.set_xlabel("GPUs, each port's busiest first")
            axes.set_ylim(0, 1.05 * top / MILLI)
            light_grid(axes, "y")
            if name == ALGORITHMS[0]:
                axes.set_ylabel("Busy at its rate [ms]")
            if name == "hierarchical":
                axes.legend(loc="upper right")
    shown = "; ".join(f"{name}: {format_seconds(max(s.max() for s in of.values()))}" for name, of in busy.items())
    return finish(figure, f"{title}. Busiest port by algorithm: {shown}.")


def finishes(study: ExchangeStudy) -> Picture:
    """When each GPU is done with the dispatch asked for, exact and port, against the bound."""
    exact, port = study.exact[study.own], study.port[study.own]
    order = np.argsort(exact.completed.finish_R)
    first, last = exact.completed.finish_R.min(), exact.completed.finish_R.max()
    title = f"The first GPU is done after {format_seconds(first)}, the last after {format_seconds(last)}"
    if format_seconds(first) == format_seconds(last):
        title = f"All GPUs are done after {format_seconds(last)}"
    with house_style():
        figure = new_figure(9.6, 3.4)
        headline(figure, title)
        axes = figure.subplots()
        at = np.arange(1, len(order) + 1)
        axes.plot(at, exact.completed.finish_R[order] / MILLI, color=COLOURS["ink"], linewidth=2, label="exact")
        axes.plot(
            at,
            port.completed.finish_R[order] / MILLI,
            color=COLOURS["moe"],
            linestyle="none",
            marker="o",
            markersize=4,
            label="port",
        )
        axes.axhline(exact.lower_bound_s / MILLI, color=COLOURS["alert"], linewidth=1.3, linestyle=(0, (5, 3)))
        axes.annotate(
            "busiest port at its rate",
            (1, exact.lower_bound_s / MILLI),
            xytext=(0, 8),
            textcoords="offset points",
            fontsize=9,
            color=COLOURS["alert"],
        )
        axes.set_xlabel("GPUs of the group, the first to be done at the left")
        axes.set_ylabel("Done after [ms]")
        axes.set_ylim(0, 1.15 * last / MILLI)
        axes.legend(loc="lower right")
        light_grid(axes, "y")
    return finish(figure, f"{title}; the busiest port needs {format_seconds(exact.lower_bound_s)} at its rate.")


def over_size(study: ExchangeStudy) -> Picture:
    """Time of the three algorithms over tokens per GPU: with their kernels' starts, and thin the wires alone."""
    ratio = _ratio(study.over_size)
    title = f"With the most tokens, once to each node takes {ratio:.0%} of the time of once for each expert"
    with house_style():
        figure = new_figure(9.6, 3.8)
        headline(figure, title)
        axes = figure.subplots()
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        _lines(axes, study.over_size, logarithmic=True)
        for name in ALGORITHM_WORDS:
            mine = [point for point in study.over_size if point.algorithm == name]
            wires = [point.completion_s / MILLI for point in mine]
            axes.plot(
                [point.x for point in mine], wires, color=ALGORITHM_COLOURS[name], linewidth=1, linestyle=(0, (4, 3))
            )
        sizes = sorted({point.x for point in study.over_size})
        axes.text(
            0.99,
            0.03,
            "dashed: wires alone, without the kernel's start",
            transform=axes.transAxes,
            ha="right",
            fontsize=8.5,
            color=COLOURS["quiet"],
        )
        axes.set_xticks(sizes, [f"{size:,.0f}" for size in sizes])
        axes.minorticks_off()
        axes.set_xlabel("Tokens per GPU")
        axes.set_ylabel("Dispatch done after [ms]")
        light_grid(axes, "y")
    return finish(figure, f"{title}. {_spoken(study.over_size, 'tokens')}")


def over_skew(study: ExchangeStudy) -> Picture:
    """Time of the three algorithms over the Gini coefficient of the experts' popularity."""
    own = [point for point in study.over_skew if point.algorithm == study.own]
    growth = own[-1].done_s / own[0].done_s
    title = f"From {own[0].x:g} to {own[-1].x:g} Gini the {study.own} dispatch takes {growth:.1f} times as long"
    with house_style():
        figure = new_figure(9.6, 3.8)
        headline(figure, title)
        axes = figure.subplots()
        _lines(axes, study.over_skew, logarithmic=False)
        axes.set_xlabel("Gini coefficient of the experts' load (real text: 0.10 to 0.38)")
        axes.set_ylabel("Dispatch done after [ms]")
        axes.set_ylim(0, None)
        light_grid(axes, "y")
    return finish(figure, f"{title}. {_spoken(study.over_skew, 'Gini')}")


def _lines(axes: Axes, points: Sequence[ExchangePoint], *, logarithmic: bool) -> None:
    """One line for each algorithm, told at its end; the first is the widest, so that equal ones show beneath others."""
    ends = {}
    for name, width in zip(ALGORITHM_WORDS, _WIDTHS, strict=True):
        mine = [point for point in points if point.algorithm == name]
        seconds = [point.done_s / MILLI for point in mine]
        axes.plot(
            [point.x for point in mine],
            seconds,
            color=ALGORITHM_COLOURS[name],
            marker="o",
            markersize=width + 2.5,
            linewidth=width,
            label=ALGORITHM_WORDS[name],
        )
        ends[f"{seconds[-1]:.3g} ms"] = seconds[-1], name
    axes.legend(loc="upper left")
    if not logarithmic:
        top = max(value for value, _ in ends.values())
        heights = spread([value for value, _ in ends.values()], 0.07 * top, 0.0, 1.1 * top)
        for (words, (_, name)), height in zip(ends.items(), heights, strict=True):
            axes.annotate(
                words,
                (max(point.x for point in points), height),
                xytext=(8, 0),
                textcoords="offset points",
                color=ALGORITHM_COLOURS[name],
                va="center",
                fontsize=9,
            )
        axes.margins(x=0.09)


def _ratio(points: Sequence[ExchangePoint]) -> float:
    """Hierarchical over direct, with the most tokens."""
    most = max(point.x for point in points)
    at = {point.algorithm: point.done_s for point in points if point.x == most}
    return at["hierarchical"] / at["direct"]


def _spoken(points: Sequence[ExchangePoint], unit: str) -> str:
    return " ".join(
        f"{name.replace('_', ' ')}: "
        + ", ".join(f"{format_seconds(p.done_s)} at {p.x:g} {unit}" for p in points if p.algorithm == name)
        + "."
        for name in ALGORITHM_WORDS
    )
