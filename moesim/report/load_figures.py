"""The planning report's figures of expert load: map of layers and experts, sorted curve, drops against capacity.

Legend: L MoE layers, E experts. A load is a ratio to the layer's mean expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moesim.report.style import COLOURS, Picture, behind, finish, headline, house_style, light_grid, new_figure
from moesim.study.drops import FEW_DROPS, DropPoint

ALERT_RATIO = 3.0
MAX_MARKS = 60


class Loaded(Protocol):
    """What a figure of load needs: a simulated step, or one that was only routed."""

    @property
    def load_LE(self) -> NDArray[np.float64]: ...
    @property
    def alerts(self) -> list[dict[str, Any]]: ...


def load_map(result: Loaded, layers: Sequence[int]) -> Picture:
    """Load of every expert in every MoE layer, as a ratio to the layer's mean; blue is idle, red is crowded.

    layers: where the rows of load_LE stand in the model, counted from 0.
    """
    import seaborn
    from matplotlib.colors import LogNorm

    ratio_LE = _ratios(result)
    num_layers, num_experts = ratio_LE.shape
    assert len(layers) == num_layers
    layer, expert = (int(i) for i in np.unravel_index(int(ratio_LE.argmax()), ratio_LE.shape))
    title = f"Some experts get up to {ratio_LE.max():.1f} times the mean load"
    if ratio_LE.max() < 1.05:
        title = "Every expert gets about the mean load"
    span = max(2.0, min(8.0, 2.0 ** np.ceil(np.log2(max(ratio_LE.max(), 1.01)))))
    with house_style():
        figure = new_figure(9.0, min(5.2, 2.2 + 0.07 * num_layers))
        axes = figure.subplots()
        headline(figure, title)
        image = axes.imshow(
            np.clip(ratio_LE, 1 / span, span),
            aspect="auto",
            interpolation="nearest",
            norm=LogNorm(1 / span, span),
            cmap=seaborn.color_palette("vlag", as_cmap=True),
        )
        marked = sorted(result.alerts, key=lambda alert: -alert["ratio"])[:MAX_MARKS]
        for alert in marked:
            row = layers.index(alert["layer"])
            axes.plot(
                alert["expert"], row, marker="s", markersize=5, markerfacecolor="none", markeredgecolor=COLOURS["ink"]
            )
        bar = figure.colorbar(image, ax=axes, pad=0.015, aspect=18)
        ticks = [t for t in (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8) if 1 / span <= t <= span]
        bar.set_ticks(ticks, labels=[f"{t:g}×" for t in ticks])
        bar.ax.minorticks_off()
        bar.set_label("Load over the layer's mean [×]")
        bar.outline.set_visible(False)  # type: ignore[operator]
        axes.set(xlabel=f"Expert (0 to {num_experts - 1})", ylabel="MoE layer, by its place in the model")
        rows = range(0, num_layers, max(1, -(-num_layers // 8)))
        axes.set_yticks(rows, [str(layers[row]) for row in rows])
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        if result.alerts:
            which = (
                "experts"
                if len(marked) == len(result.alerts)
                else f"the {MAX_MARKS} fullest of {len(result.alerts)} experts"
            )
            axes.set_title(f"squares: {which} over {ALERT_RATIO:g} times the mean", fontsize=9)
    alt = f"{title}; the fullest is expert {expert} of layer {layers[layer]}, both counted from 0."
    return finish(figure, alt)


def load_curve(result: Loaded) -> Picture:
    """Experts sorted by load: the median layer, the band from the calmest to the most uneven layer, the alert line."""
    ratio_LE = np.sort(_ratios(result), axis=1)[:, ::-1]
    num_layers, num_experts = ratio_LE.shape
    alerts = len(result.alerts)
    over = (
        f"{alerts} {'expert is' if alerts == 1 else 'experts are'} over the alert line"
        if alerts
        else "no expert reaches the alert line"
    )
    title = f"The fullest expert of a step gets {ratio_LE.max():.1f} times the mean; {over}"
    rank = np.arange(1, num_experts + 1)
    with house_style():
        figure = new_figure(9.0, 3.6)
        axes = figure.subplots()
        headline(figure, title)
        if num_layers > 1:
            axes.fill_between(
                rank, ratio_LE.min(axis=0), ratio_LE.max(axis=0), color=COLOURS["experts"], alpha=0.3, linewidth=0
            )
        middle_E = np.median(ratio_LE, axis=0)
        axes.plot(rank, middle_E, color=COLOURS["experts"], linewidth=2.2)
        axes.axhline(1.0, color=COLOURS["quiet"], linewidth=1.1)
        axes.axhline(ALERT_RATIO, color=COLOURS["alert"], linewidth=1.5, linestyle=(0, (5, 3)))
        top = max(ALERT_RATIO * 1.15, float(ratio_LE.max()) * 1.06)
        place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "ha": "right", "fontsize": 9.5, "va": "bottom"}
        axes.annotate(
            f"alert: {ALERT_RATIO:g} times the mean", (0.995, ALERT_RATIO + top * 0.01), color=COLOURS["alert"], **place
        )
        axes.annotate("mean load", (0.995, 1.0 + top * 0.01), color=COLOURS["quiet"], **place)
        words = (
            "line: the median layer; band: from the most even to the most uneven layer"
            if num_layers > 1
            else "the model's one MoE layer"
        )
        axes.set_title(words, fontsize=9.5)
        axes.set(
            xlim=(1, max(num_experts, 2)),
            ylim=(0, top),
            ylabel="Load over the mean [×]",
            xlabel=f"Experts of a layer, the fullest first [rank, 1 to {num_experts}]",
        )
        light_grid(axes, "y")
    return finish(figure, title)


def drop_curve(points: Sequence[DropPoint], *, asked: float | None) -> Picture:
    """Dropped assignments and padding against the capacity factor.

    asked: the scenario's own capacity factor; None when it is dropless.
    """
    factors = [point.capacity_factor for point in points]
    drops = [point.drop_fraction * 100 for point in points]
    padding = [point.padding_fraction * 100 for point in points]
    enough = next((point.capacity_factor for point in points if point.drop_fraction <= FEW_DROPS), None)
    title = (
        f"A capacity factor of {enough:g} keeps drops within {FEW_DROPS:.0%}"
        if enough is not None
        else f"Even a capacity factor of {factors[-1]:g} drops {drops[-1]:.1f}% of the assignments"
    )
    with house_style():
        figure = new_figure(9.0, 3.5)
        axes = figure.subplots()
        headline(figure, title)
        axes.plot(factors, drops, color=COLOURS["alert"], linewidth=2.2, marker="o", markersize=4.5)
        axes.plot(factors, padding, color=COLOURS["reserved"], linewidth=1.8, marker="o", markersize=4)
        top = max(*drops, *padding, 5.0) * 1.15
        axes.annotate(
            "dropped: tokens an expert turns away",
            (factors[-1], drops[-1]),
            xytext=(-4, 8),
            textcoords="offset points",
            ha="right",
            color=COLOURS["alert"],
            fontsize=9.5,
            va="bottom",
            bbox=behind(),
        )
        axes.annotate(
            "empty: room reserved, not used",
            (factors[-1], padding[-1]),
            xytext=(-4, 8),
            textcoords="offset points",
            ha="right",
            color=COLOURS["quiet"],
            fontsize=9.5,
            va="bottom",
            bbox=behind(),
        )
        if asked is not None:
            axes.axvline(asked, color=COLOURS["quiet"], linewidth=1.3, linestyle=(0, (4, 3)))
            axes.annotate(
                f"asked: {asked:g}", (asked, top * 0.9), xytext=(5, 0), textcoords="offset points", fontsize=9.5
            )
        axes.set(xlabel="Capacity factor: room per expert over its mean load [×]", ylabel="Share [%]", ylim=(0, top))
        light_grid(axes, "y")
    return finish(figure, f"{title}. " + "; ".join(f"{f:g}: {d:.1f}%" for f, d in zip(factors, drops, strict=True)))


def _ratios(result: Loaded) -> np.ndarray:
    ratio_LE = np.asarray(result.load_LE, dtype=float) * result.load_LE.shape[1]
    assert ratio_LE.size, "the figure needs at least one MoE layer"
    return ratio_LE
