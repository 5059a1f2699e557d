"""How every figure looks: one colour per part, words for parts, fonts, and the same SVG for the same figure.

Colours are Okabe and Ito's and Paul Tol's, told apart by colour-blind readers; a part keeps its colour in every figure.
"""

from __future__ import annotations

import html
import io
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from moesim.units import format_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS: Mapping[str, str] = MappingProxyType(
    {
        # time and parameters
        "attention": "#0072B2",
        "dense_ffn": "#56B4E9",
        "router": "#CCBB44",
        "permute": "#AA7733",
        "experts": "#E69F00",
        "shared_experts": "#EE8866",
        "embedding_head": "#332288",
        "input_embedding": "#332288",
        "head": "#7766BB",
        "norms": "#BBBBBB",
        "extra": "#BBBBBB",
        "recompute": "#99DDFF",
        "tensor_parallel_comm": "#882255",
        "dispatch": "#009E73",
        "combine": "#44BB99",
        "pipeline_send": "#AA4499",
        "gradient_reduction": "#CC79A7",
        "optimizer": "#117733",
        "host": "#999933",
        "wait_for_slowest": "#888888",
        "host_transfer": "#661100",
        "pipeline_bubble": "#CCCCCC",
        # memory
        "weights": "#332288",
        "gradients": "#8877CC",
        "activations": "#DDAA33",
        "comm": "#CC79A7",
        "reserved": "#AAAAAA",
        # models
        "moe": "#D55E00",
        "dense_active": "#4A6A8A",
        "dense_total": "#83A0B8",
        # groups of parts
        "compute": "#4477AA",
        "communication": "#228866",
        "other": "#BBBBBB",
        "alert": "#C0143C",
        "ink": "#222222",
        "quiet": "#666666",
    }
)

# What a part is called in front of a reader who has never seen the tool.
WORDS: Mapping[str, str] = MappingProxyType(
    {
        "attention": "attention",
        "dense_ffn": "dense and shared feed-forward",
        "router": "router",
        "permute": "sorting tokens by expert",
        "experts": "experts",
        "shared_experts": "shared experts",
        "embedding_head": "embedding and output head",
        "input_embedding": "input embedding",
        "head": "output head",
        "norms": "norms",
        "extra": "position tables",
        "recompute": "recomputing activations",
        "tensor_parallel_comm": "tensor-parallel exchange",
        "dispatch": "dispatch (tokens to experts)",
        "combine": "combine (results back)",
        "pipeline_send": "sending between pipeline stages",
        "gradient_reduction": "gradient reduction",
        "optimizer": "optimizer",
        "host": "waiting for the host to issue work",
        "wait_for_slowest": "waiting for the slowest GPU",
        "host_transfer": "waiting for the host link",
        "pipeline_bubble": "pipeline fill and drain",
        "weights": "weights",
        "gradients": "gradients",
        "activations": "activations",
        "comm": "network buffers",
        "reserved": "CUDA context and reserve",
    }
)
MEMORY_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "weights_bytes": "weights",
        "gradients_bytes": "gradients",
        "optimizer_bytes": "optimizer states",
        "activations_bytes": "activations",
        "dispatch_bytes": "token dispatch buffers",
        "comm_bytes": "network buffers",
        "reserved_bytes": "context and reserve",
    }
)

PAGE_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_RC: Mapping[str, Any] = MappingProxyType(
    {
        "font.family": "DejaVu Sans",  # ships with matplotlib, so the layout is the same everywhere
        "font.size": 10.0,
        "axes.titlesize": 10.0,
        "axes.titleweight": "normal",
        "axes.titlecolor": COLOURS["quiet"],
        "axes.titlelocation": "left",
        "axes.labelsize": 10.0,
        "axes.edgecolor": "#999999",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": False,
        "grid.color": "#E4E4E4",
        "grid.linewidth": 0.8,
        "xtick.color": COLOURS["ink"],
        "ytick.color": COLOURS["ink"],
        "xtick.labelsize": 9.5,
        "ytick.labelsize": 9.5,
        "text.color": COLOURS["ink"],
        "axes.labelcolor": COLOURS["ink"],
        "hatch.linewidth": 0.7,
        "legend.frameon": False,
        "legend.fontsize": 9.5,
        "svg.fonttype": "none",  # text stays text: it can be searched, and is drawn in the page's own font
        "svg.hashsalt": "moesim",
    }
)


@contextmanager
def house_style() -> Iterator[None]:
    """matplotlib's settings for a figure of ours, put back afterwards."""
    import matplotlib

    with matplotlib.rc_context(typing.cast(Any, dict(_RC))):
        yield


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """A finished figure: shows itself as SVG in a notebook. ``alt`` says in words what it shows."""

    svg: str
    alt: str
    figure: Figure  # for whoever wants to change it; ``svg`` stays as drawn

    def _repr_svg_(self) -> str:
        return self.svg


def finish(figure: Figure, alt: str) -> Picture:
    """Draw once, as one <svg> element: no prolog, no date, so that the same figure gives the same text."""
    buffer = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with house_style():
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = text.replace("font-family: 'DejaVu Sans'", f"font-family: {PAGE_FONTS}")
    label = html.escape(alt, quote=True)
    return Picture(svg=text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1), alt=alt, figure=figure)


def new_figure(width_in: float, height_in: float) -> Figure:
    """An empty figure outside pyplot's global list."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width_in, height_in), layout="constrained")


def headline(figure: Figure, title: str) -> None:
    """The figure's title: the answer, flush left, over two lines where one is too short."""
    lines = textwrap.fill(title, round(9.3 * figure.get_figwidth()))
    figure.suptitle(lines, x=0.005, ha="left", fontsize=12.5, fontweight="bold", color=COLOURS["ink"])


def behind(colour: str = "white") -> dict[str, Any]:
    """A plain box behind a label, so that lines under it do not strike it through."""
    return {"facecolor": colour, "edgecolor": "none", "alpha": 0.85, "pad": 1.2}


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Label positions near the wanted ones, at least ``gap`` apart, in low..high where they fit; order is kept.

    >>> spread([1.0, 1.1, 5.0], 1.0, 0.0, 10.0)
    [1.0, 2.0, 5.0]
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed: list[float] = []
    for i in order:
        floor = placed[-1] + gap if placed else low
        placed.append(max(wanted[i], floor))
    ceiling = high
    for k in range(len(placed) - 1, -1, -1):
        placed[k] = min(placed[k], ceiling)
        ceiling = placed[k] - gap
    result = [0.0] * len(wanted)
    for k, i in enumerate(order):
        result[i] = placed[k]
    return result


def short_count(count: float) -> str:
    """A large round count without idle zeros.

    >>> short_count(14.8e12), short_count(4194304)
    ('14.8T', '4.2M')
    """
    return re.sub(r"\.?0+(?=[A-Z]$)", "", format_count(count)) if "." in format_count(count) else format_count(count)


def signed_percent(change: float) -> str:
    """A relative change for a reader: ``"+12%"``, and ``"0%"`` for next to nothing."""
    return "0%" if abs(change) < 0.005 else f"{change:+.0%}"


def light_grid(axes: Axes, axis: str) -> None:
    """Faint lines across one axis, no tick marks on the other."""
    axes.grid(True, axis=axis)  # type: ignore[arg-type]
    axes.tick_params(axis="both", length=0)
