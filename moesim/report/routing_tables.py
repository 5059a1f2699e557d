"""Tables of the routing notebook: layers, crowded experts, the capacity that drops take, steps over skew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from moesim.report.routing_figures import percent
from moesim.report.tables import _table as table_of
from moesim.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from great_tables import GT

    from moesim.study.routing import RoutingStudy

MOST_SHOWN = 10


def layers(study: RoutingStudy) -> GT:
    """Statistics of the load: over all layers, the most even layer, the most uneven one."""
    rows = study.load.by_layer()
    calm, rough = (pick(rows, key=lambda row: row["gini"]) for pick in (min, max))
    names = {
        "gini": ("Gini", "{:.3f}"),
        "entropy": ("Entropy, of the largest possible", "{:.1%}"),
        "cv": ("Coefficient of variation", "{:.2f}"),
        "max_mean": ("Busiest expert over the mean", "{:.2f} ×"),
        "max_vio": ("MaxVio", "{:.2f}"),
        "num_active_experts": ("Active experts", "{:.0f}"),
        "busiest_rank_ratio": ("Busiest GPU over the mean, per micro-batch", "{:.2f} ×"),
        "drop_fraction": ("Dropped assignments", "{:.1%}"),
    }
    frame: Mapping[str, Sequence[str]] = {
        "": [words for words, _ in names.values()],
        "Mean layer": [shown.format(sum(row[name] for row in rows) / len(rows)) for name, (_, shown) in names.items()],
        f"Most even: {calm['layer']}": [shown.format(calm[name]) for name, (_, shown) in names.items()],
        f"Most uneven: {rough['layer']}": [shown.format(rough[name]) for name, (_, shown) in names.items()],
    }
    return table_of("layers", frame, right=list(frame)[1:])


def crowded(study: RoutingStudy) -> GT:
    """The busiest experts: where they are, how busy, what they turn away."""
    load = study.load
    ratio_LE = load.load_LE * load.num_experts
    dropped_LE = load.drop_fraction_LE
    busiest = ratio_LE.ravel().argsort(kind="stable")[::-1][:MOST_SHOWN]
    places = [divmod(int(at), load.num_experts) for at in busiest]
    frame = {
        "Layer": [str(load.layers[layer]) for layer, _ in places],
        "Expert": [str(expert) for _, expert in places],
        "Load over the mean": [f"{ratio_LE[place]:.2f} ×" for place in places],
        "Turned away": [f"{dropped_LE[place]:.1%}" for place in places],
    }
    return table_of("crowded", frame, right=list(frame))


def needed(study: RoutingStudy) -> GT:
    """The capacity factor that each share of drops takes."""
    frame = {
        "Dropped at most": [percent(found.wanted_drop_fraction) for found in study.needed_for],
        "Capacity factor": [f"{found.capacity_factor:.2f}" for found in study.needed_for],
        "So that no layer drops more": [f"{found.worst_layer_capacity_factor:.2f}" for found in study.needed_for],
        "Empty places": [f"{found.padding_fraction:.0%}" for found in study.needed_for],
    }
    return table_of("needed", frame, right=list(frame))


def over_skew(study: RoutingStudy) -> GT:
    """Every simulated step of the study over skew."""
    words = {"balanced": "even (forced)", "asked": "as asked"}
    points = study.over_skew
    frame = {
        "Routing": [words.get(p.popularity, f"Gini {p.gini:.2f}") for p in points],
        "Capacity": ["no drops" if p.capacity_factor is None else f"{p.capacity_factor:g}" for p in points],
        "Step": [format_seconds(p.step_s) for p in points],
        "Tokens/s per GPU": [f"{p.tokens_per_s_per_gpu:,.0f}" for p in points],
        "Waiting": [f"{p.wait_s / p.step_s:.1%}" for p in points],
        "Dropped": [f"{p.drop_fraction:.1%}" for p in points],
        "Peak memory": [format_bytes(p.peak_bytes) for p in points],
    }
    return table_of("skew", frame, right=list(frame)[2:])
