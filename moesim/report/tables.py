"""The report's tables (great-tables): the question asked, headline numbers, cluster sizes, where numbers came from.

Each function takes plain results and returns a GT table that shows itself in a notebook. Ids are fixed, so the same
results give the same HTML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moesim.describe.popularity import popularity_words
from moesim.metrics.part_words import part_in_words
from moesim.metrics.step import StepResult
from moesim.report.style import COLOURS, short_count, signed_percent
from moesim.scenario import Scenario
from moesim.units import GIGA, format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from great_tables import GT

    from moesim.study.advice import Change
    from moesim.study.sizes import SizePoint
    from moesim.study.twins import Twins

_SCHEDULES = {"gpipe": "GPipe", "1f1b": "1F1B", "zb-h1": "zero-bubble (ZB-H1)", "dualpipe": "DualPipe"}
_SOFTWARE = {
    "megatron": "Megatron-LM and its kin: what its steps lost beside their kernels",
    "deepseek": "DeepSeek's own: next to no loss beside its kernels",
    "kernels": "none: kernels alone, a bound that no run reaches",
}
KINDS = ("measured", "interpolated", "extrapolated", "spec", "assumed")  # the surest first


def question(scenario: Scenario) -> GT:
    """What was asked, in words: model, cluster, how the model is cut, the batch, the routing."""
    p, train, cluster, layout = scenario.parallel, scenario.train, scenario.cluster, scenario.layout
    tokens = train.global_batch * train.seq_len
    popularity = scenario.routing.popularity
    skew = {
        "balanced": "every expert equally loaded (as vendors benchmark)",
        "multinomial": "experts equally popular, tokens choose at random",
        "recorded": popularity_words(popularity),
    }.get(popularity.kind, f"uneven: {popularity_words(popularity)} (Gini of real text: 0.10 to 0.38)")
    cut = [
        (p.pp, "pipeline stages" + (f" in {p.vpp} virtual ones each" if p.vpp > 1 else "")),
        (p.tp, "GPUs per layer (tensor parallel)"),
        (p.cp, "GPUs per sequence (context parallel)"),
        (layout.dp, "data-parallel replicas"),
        (p.ep, "GPUs that share the experts (expert parallel)"),
        (p.etp, "GPUs per expert"),
    ]
    made_up = " (hypothetical: nobody has published such a model)" if scenario.model.hypothetical else ""
    memory = format_bytes(cluster.gpu.memory_bytes.value)
    rows = [
        ("Model", scenario.model.name + made_up),
        ("GPUs", f"{cluster.num_gpus:,} × {cluster.gpu.name} with {memory} each; cluster {cluster.name}"),
        (
            "Network",
            f"{cluster.ranks_per_node} GPUs joined by NVLink at {cluster.nvlink_bytes_per_s.value / GIGA:,.0f} GB/s, "
            f"{cluster.nic_bytes_per_s.value / GIGA:,.0f} GB/s per GPU beyond (each way)",
        ),
        ("Cut into", "; ".join(f"{size:,} {words}" for size, words in cut if size > 1) or "one GPU holds all"),
        ("Optimizer", _optimizer_in_words(scenario)),
        (
            "Batch",
            f"{train.global_batch:,} sequences of {train.seq_len:,} tokens, {short_count(tokens)} tokens a step; "
            f"{scenario.num_micro_batches:,} micro-batches of {train.micro_batch} per replica",
        ),
        (
            "Arithmetic",
            f"{train.precision.upper()} products, {_SCHEDULES[train.schedule]} pipeline, "
            f"recomputation of activations: {str(train.recompute).replace(',', ', ')}, "
            f"overlap: {str(train.overlap).replace('_', ' ').replace(',', ', ')}",
        ),
    ]
    rows.append(("Software", _SOFTWARE[train.software]))
    if scenario.model.is_moe:
        rows.append(("Routing", skew))
        rows.append(("Expert capacity", _capacity_in_words(scenario)))
        rows.append(("Placement", _placement_in_words(scenario)))
        travels = {"alltoall": "once for each of its experts", "deepep": "once to each node, and on by NVLink"}
        dispatcher = scenario.routing.dispatcher
        rows.append(("Dispatcher", f"{dispatcher}: a token travels {travels[dispatcher]}"))
    if scenario.placement.rank_speeds:
        slow = ", ".join(f"{rank} at {speed:g} ×" for rank, speed in scenario.placement.rank_speeds.items())
        rows.append(("Unlike GPUs", f"{slow} the speed of the others"))
    return _two_columns("question", rows)


def _optimizer_in_words(scenario: Scenario) -> str:
    """Number formats, and who shares the states out."""
    p, states = scenario.parallel, scenario.train.optimizer
    kept = scenario.train.kept
    told = [
        f"mixed-precision Adam, moments in {states.moments.upper()}",
        f"FSDP, as ZeRO stage {p.zero}" if p.fsdp else f"ZeRO stage {p.zero}",
    ]
    told += [f"{p.replicate} groups that each hold all shards"] if p.replicate > 1 else []
    told += ["weights in the products' format alone"] if states.weights == "narrow" else []
    told += [f"a moving average on the {states.average}"] if states.average != "none" else []
    told += [f"attention's output kept in {kept.attention_output.upper()}"] if kept.attention_output != "bf16" else []
    told += [f"activations' input kept in {kept.activation_input.upper()}"] if kept.activation_input != "bf16" else []
    return ", ".join(told)


def _capacity_in_words(scenario: Scenario) -> str:
    """What an expert takes at most, and what becomes of the rest."""
    routing = scenario.routing
    if not routing.capacity_factor:
        return "no limit: nothing is dropped"
    rest = {
        "probability": "what the router scores lowest is dropped",
        "position": "what comes last is dropped",
        "random": "what exceeds it is dropped at random",
        "reroute": "what exceeds it tries its next experts",
    }[routing.drop_policy]
    room = f"each expert takes {routing.capacity_factor:g} × its mean load at most"
    kind = routing.capacity.kind
    if kind != "megatron":
        room = f"capacity factor {routing.capacity_factor:g} as {kind.replace('_', ' ')} counts it"
    padding = "; buffers are padded to it" if routing.pad_to_capacity else ""
    return f"{room}; {rest}{padding}"


def _placement_in_words(scenario: Scenario) -> str:
    """Where experts live, and what becomes of their copies."""
    choice = scenario.placement
    where = f"the map of {choice.map}" if choice.policy == "map" else choice.policy.replace("_", " ")
    if scenario.expert_copies == 1.0:
        return f"{where}, one slot for each expert"
    senders = {
        "even": "share an expert's tokens evenly",
        "nearest": "serve the senders next to them",
        "least_loaded": "are filled the least loaded first",
        "uneven": "share tokens so that the busiest GPU is least busy",
    }[choice.split]
    return f"{where}, {choice.num_slots} slots for experts and their copies, which {senders}"


def headline(result: StepResult, twins: Twins | None) -> GT:
    """The headline numbers of the asked model, beside those of its dense twins where there are any."""
    results = {"This MoE" if twins else "This model": result}
    if twins is not None:
        results |= {"Dense, equal active size": twins.active, "Dense, equal total size": twins.total}
    names = [name for name, _ in result.rows() if name != "Binds"]
    columns = {name: dict(held.rows()) for name, held in results.items()}
    frame: dict[str, list[str]] = {"": names}
    for name, values in columns.items():
        frame[name] = [values[row] if not _needs_experts(row, name) else "–" for row in names]
    if twins is not None:
        counts = dict(zip(columns, ("moe", "active", "total"), strict=True))
        frame[""] = ["Parameters", *frame[""]]
        for name, key in counts.items():
            frame[name] = [format_count(twins.parameters[key]), *frame[name]]
    return _table("headline", frame, right=list(results))


def sizes(points: Sequence[SizePoint], tokens_to_train: float, asked_num_gpus: int) -> GT:
    """Cluster sizes: GPUs, days to the tokens asked for, throughput, and whether memory suffices."""
    frame: dict[str, list[str]] = {
        name: []
        for name in (
            "GPUs",
            "Fits?",
            f"Days to {short_count(tokens_to_train)} tokens",
            "Step",
            "Tokens/s per GPU",
            "Note",
        )
    }
    for point in points:
        missing = "–"
        note = point.reason if point.fits is not False else "; ".join(filter(None, (_short_by(point), point.reason)))
        fits = {None: "impossible", True: "yes", False: "no"}[point.fits]
        row = (
            f"{point.num_gpus:,}" + (" (asked)" if point.num_gpus == asked_num_gpus else ""),
            fits,
            missing if point.days is None else f"{point.days:,.1f}",
            missing if point.step_s is None else format_seconds(point.step_s),
            missing if point.tokens_per_s_per_gpu is None else f"{point.tokens_per_s_per_gpu:,.0f}",
            note,
        )
        for column, value in zip(frame.values(), row, strict=True):
            column.append(value)
    if not any(frame["Note"]):
        del frame["Note"]
    right = [name for name in frame if name not in ("Fits?", "Note")]
    return _table("sizes", frame, right=right, alert=("Fits?", ("no", "impossible")))


def changes(options: Sequence[Change], step: StepResult) -> GT:
    """Single changes of the scenario: does it fit then, what stays free, how fast."""
    frame: dict[str, list[str]] = {
        name: [] for name in ("Change", "Fits?", "Free per GPU", "Tokens/s per GPU", "Against asked", "What it means")
    }
    for option in (None, *options):
        headroom = step.headroom_bytes if option is None else option.headroom_bytes
        speed = step.tokens_per_s_per_gpu if option is None else option.tokens_per_s_per_gpu
        row = (
            "as asked" if option is None else option.name,
            "yes" if headroom >= 0 else "no",
            format_bytes(headroom),
            "–" if speed is None else f"{speed:,.0f}",
            "–" if speed is None or option is None else signed_percent(speed / step.tokens_per_s_per_gpu - 1),
            "" if option is None else option.words,
        )
        for column, value in zip(frame.values(), row, strict=True):
            column.append(value)
    right = ["Free per GPU", "Tokens/s per GPU", "Against asked"]
    return _table("changes", frame, right=right, alert=("Fits?", ("no",)))


def provenance(result: StepResult) -> GT:
    """Where each number of a step came from, the measured first."""
    return sources([(item.part, item.kind, item.source) for item in result.provenance])


def sources(items: Sequence[tuple[str, str, str]]) -> GT:
    """Numbers with their kind and source, the measured first; items: part, kind, source."""
    order = KINDS
    rows = sorted(items, key=lambda item: (order.index(item[1]) if item[1] in order else len(order), item[0]))
    frame = {
        "Number": [part_in_words(part) for part, _, _ in rows],
        "Kind": [kind for _, kind, _ in rows],
        "Source": [_without_scheme(source) for _, _, source in rows],
    }
    return _table("provenance", frame, right=[])


def not_modelled(result: StepResult) -> GT:
    """What the simulation leaves out, each a reason for care with its times."""
    return _table("limits", {"What these numbers leave out": list(result.envelope["reasons"])}, right=[])


def _two_columns(name: str, rows: Sequence[tuple[str, str]]) -> GT:
    return _table(name, {"": [row[0] for row in rows], "Asked": [row[1] for row in rows]}, right=[])


def _needs_experts(row: str, column: str) -> bool:
    return column.startswith("Dense") and row in ("Busiest expert over the mean", "Dropped assignments")


def _short_by(point: SizePoint) -> str:
    assert point.headroom_bytes is not None
    return f"{format_bytes(-point.headroom_bytes)} short per GPU"


def _without_scheme(source: str) -> str:
    """A source as text: no clickable address, since the report fetches and links nothing."""
    return source.replace("https://", "").replace("http://", "")


def _table(name: str, frame: Mapping[str, Sequence[str]], *, right: Sequence[str], alert: Any = None) -> GT:
    import pandas as pd
    from great_tables import GT, loc, style

    table = GT(pd.DataFrame({key or " ": list(values) for key, values in frame.items()}), id=f"moesim-{name}")
    first = next(iter(frame)) or " "
    short = [key or " " for key, values in frame.items() if max((len(value) for value in values), default=0) < 26]
    wide = [key or " " for key in frame if len(frame) > 3 and (key or " ") not in short]
    table = (
        table.cols_align("left", columns=[key or " " for key in frame if key not in right])
        .cols_align("right", columns=list(right))
        .tab_style(style.text(weight="bold" if len(frame) > 1 else "normal"), locations=loc.body(columns=[first]))
        .tab_style(style.css("white-space: nowrap;"), locations=loc.body(columns=short))
        .tab_style(style.css("min-width: 13rem; overflow-wrap: anywhere;"), locations=loc.body(columns=wide))
        .tab_options(
            table_font_size="14px",
            table_width="100%" if len(frame) <= 3 else "auto",
            table_border_top_style="none",
            table_border_bottom_color=COLOURS["pipeline_bubble"],
            column_labels_border_top_style="none",
            column_labels_font_weight="bold",
            column_labels_font_size="13px",
            data_row_padding="6px",
            data_row_padding_horizontal="10px",
            column_labels_padding_horizontal="10px",
        )
        .opt_css(f"#moesim-{name} .gt_table {{ table-layout: auto; }}")  # JupyterLab makes all columns equal otherwise
    )
    if alert is not None:
        column, values = alert
        rows = [i for i, value in enumerate(frame[column]) if value in values]
        if rows:
            marked = style.text(color=COLOURS["alert"], weight="bold")
            table = table.tab_style(marked, locations=loc.body(columns=[column], rows=rows))
    return table
