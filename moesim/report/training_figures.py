"""Figures of the training notebook: loss at equal FLOPs, specialisation, consistency, balance, collapse, precision.

Legend: N seeds, S recorded steps, L MoE layers, E experts, D domains. A band reaches from the lowest seed to the
highest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moesim.report.style import (
    COLOURS,
    Picture,
    behind,
    finish,
    headline,
    house_style,
    light_grid,
    new_figure,
    spread,
)
from moesim.report.training_words import (
    collapse_title,
    flips_title,
    gain_title,
    row_words,
    signed,
    told_spread,
    words_of,
)
from moesim.routing.statistics import collapse_from
from moesim.study.training import DENSE, MOE, Comparison, LoadCurve, Spread, TrainingStudy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from moesim.study.training import TrainingRun

DASHED = (0, (5, 3))
_COLOURS: Mapping[str, str] = MappingProxyType(
    {
        "dense": COLOURS["dense_active"],
        "auxiliary": "#0072B2",
        "bias": "#009E73",
        "noisy": "#AA7733",
        "none": COLOURS["alert"],
    }
)
_DOMAIN_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#AA4499", "#888888")


def quality(study: TrainingStudy) -> Picture:
    """Held-out loss over steps, dense against MoE, and every MoE variant's difference from dense, seed by seed."""
    gain = study.gain
    title = gain_title(gain)
    chosen = [curve for curve in study.curves if curve.variant in (DENSE, MOE)]
    with house_style():
        figure = new_figure(9.6, 4.0)
        losses, differences = figure.subplots(1, 2, width_ratios=(1.4, 1.0))
        headline(figure, title)
        for curve in chosen:
            colour = COLOURS["moe"] if curve.variant == MOE else _COLOURS[DENSE]
            _band(losses, curve.steps_S[1:], curve.loss_NS[:, 1:], colour)
        names = ["MoE" if curve.variant == MOE else "dense" for curve in chosen]
        colours = [COLOURS["moe"] if curve.variant == MOE else _COLOURS[DENSE] for curve in chosen]
        _name_ends(losses, [curve.last.mean for curve in chosen], names, colours)
        losses.set(xlabel="Training step", ylabel="Held-out loss [nats per byte]", xlim=(0, chosen[0].steps_S[-1]))
        losses.set_title(f"line: mean of {chosen[0].last.num_seeds} seeds; band: all of them", fontsize=9.5)
        light_grid(losses, "y")
        _difference_rows(differences, study.gains)
    alt = "; ".join(f"{name} ends at {told_spread(curve.last)}" for name, curve in zip(names, chosen, strict=True))
    return finish(figure, f"{title}. {alt} nats per byte.")


def _difference_rows(axes: Axes, gains: Sequence[Comparison]) -> None:
    """A row for each MoE variant: its last loss less the dense model's, seed by seed."""
    axes.axvline(0.0, color=COLOURS["ink"], linewidth=1.1)
    for y, gain in enumerate(gains):
        d, colour = gain.difference, COLOURS["moe"] if gain.first == MOE else COLOURS["quiet"]
        axes.plot([d.low, d.high], [y, y], color=colour, linewidth=3, solid_capstyle="round")
        axes.plot(d.mean, y, marker="o", markersize=7, color=colour)
        axes.annotate(
            signed(d.mean),
            (d.mean, y),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=colour,
            bbox=behind(),
        )
    axes.locator_params(axis="x", nbins=5)
    axes.set_yticks(range(len(gains)), [words_of(gain.first) for gain in gains])
    reach = max(max(abs(gain.difference.low), abs(gain.difference.high)) for gain in gains) * 1.25 + 1e-9
    axes.set(xlim=(-reach, reach), ylim=(len(gains) - 0.5, -0.6), xlabel="MoE less dense [nats per byte]")
    axes.set_title("last loss by way of balancing; left of 0: better", fontsize=9.5)
    light_grid(axes, "x")


def specialisation(study: TrainingStudy) -> Picture:
    """Of which domain each expert's tokens are, experts sorted by it, one panel for each MoE layer."""
    routing = study.routing
    last_L = [Spread.of(seed_L) for seed_L in routing.explained_NSL[:, -1].T]
    top = max(range(len(last_L)), key=lambda i: last_L[i].mean)
    title = (
        f"Layer {routing.layers[top]}'s expert tells {last_L[top].mean:.0%} of a token's domain "
        f"({last_L[top].low:.0%} to {last_L[top].high:.0%} over seeds)"
    )
    with house_style():
        figure = new_figure(9.6, 3.6)
        panels = np.atleast_1d(figure.subplots(1, len(routing.layers), sharey=True))
        headline(figure, title)
        for axes, layer, share_ED, told in zip(panels, routing.layers, routing.share_LED, last_L, strict=True):
            order = np.lexsort((-share_ED.max(axis=1), share_ED.argmax(axis=1)))
            bottom = np.zeros(len(order))
            for domain, name in enumerate(routing.domains):
                height = share_ED[order, domain] * 100
                colour = _DOMAIN_COLOURS[domain % len(_DOMAIN_COLOURS)]
                axes.bar(range(len(order)), height, bottom=bottom, color=colour, width=0.86, label=name)
                bottom += height
            axes.axhline(100.0 / len(routing.domains), color="white", linewidth=0.8, linestyle=DASHED)
            axes.set(xlabel="Experts, by their main domain", xlim=(-0.6, len(order) - 0.4), ylim=(0, 100))
            axes.set_title(f"layer {layer}: domain explained {told.mean:.0%}", fontsize=9.5)
            axes.set_xticks([])
            axes.tick_params(length=0)
        panels[0].set_ylabel("Share of the expert's tokens [%]")
        figure.legend(
            *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(routing.domains), fontsize=9.5
        )
    alt = "; ".join(
        f"layer {layer}: "
        + ", ".join(f"{name} {share:.0%}" for name, share in zip(routing.domains, best_D, strict=True))
        for layer, best_D in zip(routing.layers, routing.share_LED.max(axis=1), strict=True)
    )
    return finish(figure, f"{title}. The most that an expert's tokens are of one domain, {alt}.")


def consistency(study: TrainingStudy) -> Picture:
    """How many experts of the last step's choice a token had at each recorded step, against chance."""
    routing = study.routing
    before = routing.overlap_NSL[:, -2] if len(routing.steps_S) > 1 else routing.overlap_NSL[:, -1]
    step = routing.steps_S[-2 if len(routing.steps_S) > 1 else -1]
    title = f"From step {step:.0f} to the end a token keeps {before.mean():.0%} of its experts"
    with house_style():
        figure = new_figure(9.6, 3.6)
        axes = figure.subplots()
        headline(figure, title)
        shades = ("#4477AA", "#EE6677", "#228833", "#CCBB44")
        for i, layer in enumerate(routing.layers):
            colour = shades[i % len(shades)]
            _band(axes, routing.steps_S, routing.overlap_NSL[:, :, i] * 100, colour, marker="o")
            chance_S = routing.chance_NSL[:, :, i].mean(axis=0) * 100
            axes.plot(routing.steps_S, chance_S, color=colour, linewidth=1.2, linestyle=DASHED)
            axes.annotate(
                f"layer {layer}",
                (routing.steps_S[0], float(routing.overlap_NSL[:, 0, i].mean()) * 100),
                xytext=(8, -2),
                textcoords="offset points",
                color=colour,
            )
        axes.set(xlabel="Training step", ylabel="Experts as at the end [%]", ylim=(0, 104))
        axes.set_title(
            "of held-out tokens; dashed: two routings of these loads that know nothing of each other", fontsize=9.5
        )
        light_grid(axes, "y")
    alt = "; ".join(
        f"step {s:.0f}: {overlap.mean():.0%}"
        for s, overlap in zip(routing.steps_S, routing.overlap_NSL.transpose(1, 0, 2), strict=True)
    )
    return finish(figure, f"{title}. Shared with the last step, {alt}.")


def balance(study: TrainingStudy) -> Picture:
    """MaxVio over training under each way of balancing, on a logarithmic scale."""
    loads = study.loads
    best = min(loads, key=lambda load: load.last_max_vio.mean)
    title = (
        f"{words_of(best.variant).capitalize()} ends most even: its busiest expert takes "
        f"{1 + best.last_max_vio.mean:.2f} times the mean"
    )
    with house_style():
        figure = new_figure(9.6, 3.9)
        axes = figure.subplots()
        headline(figure, title)
        for load in loads:
            _band(axes, load.steps_S, load.max_vio_NS, _COLOURS.get(load.variant, COLOURS["quiet"]))
        low, high = (
            min(float(load.max_vio_NS.min()) for load in loads),
            max(float(load.max_vio_NS.max()) for load in loads),
        )
        axes.set_yscale("log")
        axes.set(ylim=(low * 0.8, high * 1.25), xlim=(0, loads[0].steps_S[-1]), xlabel="Training step")
        axes.set_ylabel("MaxVio: busiest expert over the mean, less 1")
        ticks = [t for t in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if low * 0.8 <= t <= high * 1.25]
        axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
        axes.minorticks_off()
        names = [f"{words_of(load.variant)}: {load.last_max_vio.mean:.2f}" for load in loads]
        colours = [_COLOURS.get(load.variant, COLOURS["quiet"]) for load in loads]
        _name_ends(axes, [load.last_max_vio.mean for load in loads], names, colours, logarithmic=True)
        window = loads[0].steps_S[0]
        axes.set_title(f"load of {window:.0f} steps at a time, mean of the MoE layers; bands: all seeds", fontsize=9.5)
        light_grid(axes, "y")
    alt = "; ".join(f"{words_of(load.variant)} ends at {told_spread(load.last_max_vio, 2)}" for load in loads)
    return finish(figure, f"{title}. MaxVio: {alt}.")


def usage(study: TrainingStudy) -> Picture:
    """Load of each expert over its layer's mean, window by window, one panel for each way of balancing."""
    import seaborn
    from matplotlib.colors import LogNorm

    maps = study.usage
    highest = max(maps, key=lambda one: float(one.ratio_SE.max()))
    title = (
        f"The largest load of a window is {highest.ratio_SE.max():.1f} times the mean, with {words_of(highest.variant)}"
    )
    with house_style():
        figure = new_figure(9.6, 3.3)
        panels = np.atleast_1d(figure.subplots(1, len(maps), sharey=True))
        headline(figure, title)
        for axes, one in zip(panels, maps, strict=True):
            image = axes.imshow(
                np.clip(one.ratio_SE.T, 1 / 8, 8),
                aspect="auto",
                interpolation="nearest",
                norm=LogNorm(1 / 8, 8),
                cmap=seaborn.color_palette("vlag", as_cmap=True),
                extent=(0.0, float(one.steps_S[-1]), one.ratio_SE.shape[1] - 0.5, -0.5),
            )
            axes.set_title(words_of(one.variant), fontsize=9.5)
            axes.set_xlabel("Training step")
            axes.tick_params(length=0)
        panels[0].set_ylabel(f"Expert of layer {maps[0].layer}")
        bar = figure.colorbar(image, ax=list(panels), pad=0.012, aspect=16)
        ticks = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
        bar.set_ticks(ticks, labels=["⅛×", "¼×", "½×", "1×", "2×", "4×", "8×"])
        bar.ax.minorticks_off()
        bar.set_label("Load over the mean")
        bar.outline.set_visible(False)  # type: ignore[operator]
    return finish(figure, f"{title} (seed {highest.seed}, layer {highest.layer}).")


def collapse(study: TrainingStudy) -> Picture:
    """Share of tokens at a layer's busiest expert, and experts without load, over training of the top-1 runs."""
    title = collapse_title(study)
    with house_style():
        figure = new_figure(9.6, 3.7)
        shares, dead = figure.subplots(1, 2)
        headline(figure, title)
        for load in study.collapse:
            colour = _COLOURS.get(load.variant, COLOURS["quiet"])
            _band(shares, load.steps_S, load.busiest_share_NS * 100, colour)
            _band(dead, load.steps_S, load.num_dead_NS.astype(np.float64), colour)
            shares.plot([], [], color=colour, linewidth=2.2, label=f"top-1, {words_of(load.variant)}")
        limit = 100 * collapse_from(1, study.collapse[0].num_experts)
        shares.axhline(limit, color=COLOURS["alert"], linewidth=1.3, linestyle=DASHED)
        shares.annotate(
            f"collapsed: over {limit:.0f}%",
            (0.99, limit),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            fontsize=9,
            color=COLOURS["alert"],
        )
        shares.set(ylabel="Tokens at a layer's busiest expert [%]", ylim=(0, 100))
        total = study.collapse[0].num_experts
        dead.set(ylabel=f"Experts under 1% of the mean, of {total}", ylim=(-0.03 * total, total))
        for axes in (shares, dead):
            axes.set(xlabel="Training step", xlim=(0, study.collapse[0].steps_S[-1]))
            light_grid(axes, "y")
        shares.legend(loc="upper right", bbox_to_anchor=(1.0, 0.9))
    return finish(figure, f"{title}. {_collapse_alt(study.collapse)}")


def _collapse_alt(loads: Sequence[LoadCurve]) -> str:
    told = (
        f"{words_of(load.variant)}: {told_spread(Spread.of(load.busiest_share_NS[:, -1] * 100), 0)} % of the tokens at "
        f"the busiest expert at the end, {told_spread(Spread.of(load.num_dead_NS[:, -1]), 1)} experts without load"
        for load in loads
    )
    return "; ".join(told) + "."


def precision(study: TrainingStudy) -> Picture:
    """Tokens that half precision sends elsewhere, and the largest router logit, for each way of computing."""
    rows = study.precision
    title = flips_title(rows)
    with house_style():
        figure = new_figure(9.6, 1.3 + 0.42 * len(rows))
        flips, logits = figure.subplots(1, 2, sharey=True)
        headline(figure, title)
        for y, row in enumerate(rows):
            colour = COLOURS["optimizer"] if row.router_in_float32 else COLOURS["alert"]
            for axes, value, scale, shown in (
                (flips, row.flipped, 100.0, ".2f"),
                (logits, row.largest_logit, 1.0, ".1f"),
            ):
                axes.barh(y, value.mean * scale, color=colour, height=0.62, alpha=0.85 if row.z_loss else 0.55)
                axes.plot([value.low * scale, value.high * scale], [y, y], color=COLOURS["ink"], linewidth=1.4)
                axes.annotate(
                    format(value.mean * scale, shown),
                    (value.high * scale, y),
                    xytext=(5, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=9,
                )
        flips.set_yticks(range(len(rows)), [row_words(row) for row in rows])
        flips.set(xlabel="Tokens with other experts than in float64 [%]", ylim=(len(rows) - 0.4, -0.6))
        logits.set(xlabel="Largest router logit of the run")
        for axes in (flips, logits):
            axes.set_xlim(0, axes.get_xlim()[1] * 1.18)
            light_grid(axes, "x")
        flips.set_title(f"bars: mean of {rows[0].flipped.num_seeds} seeds; lines: all of them", fontsize=9.5)
    alt = "; ".join(
        f"{row_words(row)}: {row.flipped.mean:.2%} flipped, largest logit {row.largest_logit.mean:.1f}" for row in rows
    )
    return finish(figure, f"{title}. {alt}.")


def live(runs: Mapping[str, TrainingRun], study: TrainingStudy) -> Picture:
    """Loss of the runs just made over that of the recorded seeds, step by step."""
    last = {name: run.heldout["loss"][-1] for name, run in runs.items()}
    told = ", ".join(f"{'MoE' if name == MOE else words_of(name)} {loss:.2f}" for name, loss in last.items())
    steps = next(iter(runs.values())).heldout["step"][-1]
    title = f"After {steps:.0f} step{'' if steps == 1 else 's'} here and now: {told} nats per byte"
    with house_style():
        figure = new_figure(9.6, 3.5)
        axes = figure.subplots()
        headline(figure, title)
        for curve in study.curves:
            if curve.variant in runs:
                colour = COLOURS["moe"] if curve.variant == MOE else _COLOURS[DENSE]
                _band(axes, curve.steps_S[1:], curve.loss_NS[:, 1:], colour, linestyle=DASHED, marker="s", markersize=4)
        for name, run in runs.items():
            colour = COLOURS["moe"] if name == MOE else _COLOURS[DENSE]
            axes.plot(
                run.heldout["step"],
                run.heldout["loss"],
                color=colour,
                linewidth=2.4,
                marker="o",
                label=f"{'MoE' if name == MOE else words_of(name)}, now",
            )
        axes.set(xlim=(-0.02 * steps, 1.6 * steps), xlabel="Training step", ylabel="Held-out loss [nats per byte]")
        axes.set_title("dashed, with band: the recorded seeds, evaluated at the squares", fontsize=9.5)
        axes.legend(loc="upper right")
        light_grid(axes, "y")
    return finish(figure, f"{title}.")


def _band(axes: Axes, steps_S: NDArray[np.float64], values_NS: NDArray[np.float64], colour: str, **line: Any) -> None:
    """The mean over seeds as a line, all of them as a band."""
    axes.fill_between(steps_S, values_NS.min(axis=0), values_NS.max(axis=0), color=colour, alpha=0.22, linewidth=0)
    axes.plot(steps_S, values_NS.mean(axis=0), color=colour, **({"linewidth": 2.0} | line))


def _name_ends(
    axes: Axes, ends: Sequence[float], names: Sequence[str], colours: Sequence[str], *, logarithmic: bool = False
) -> None:
    """Each line's name to the right of its end."""
    scale, back = (np.log, np.exp) if logarithmic else (float, float)
    low, high = (scale(limit) for limit in axes.get_ylim())
    gap = (high - low) * 0.085
    for place, name, colour in zip(spread([scale(end) for end in ends], gap, low, high), names, colours, strict=True):
        axes.annotate(
            name,
            (1.012, float(back(place))),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=9.5,
            color=colour,
            annotation_clip=False,
        )
