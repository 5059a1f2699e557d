"""The verb ``place``: experts and their replicas onto GPUs, from a load given as a file or drawn from a scenario."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli.app import ScenarioFile, app
from moesim.cli.call import Call, verb
from moesim.cli.output import Answer, Table, envelope_of, fields_table, working, write_results
from moesim.errors import check

if TYPE_CHECKING:
    import numpy as np

    from moesim.placement.price import Migration
    from moesim.placement.slots import LayerPlacements, RankSlots
    from moesim.scenario import Scenario
    from moesim.study.place import PlacedLoad
    from moesim.timeline.placed import Choices

PANEL = "What to place"
SHOWN_LAYERS = 12
MAX_CELLS = 400_000_000  # layers x GPUs x experts held at once
EXAMPLES = (
    "Examples:\n\n"
    "moesim place --loads loads.npy --num-gpus 32 --num-nodes 4 --num-slots 288 --num-groups 8 --json\n\n"
    "moesim place --loads loads.npy --num-gpus 32 --policy eplb --previous out/old/physical_to_logical.json "
    "--out out/new\n\n"
    "moesim place --model deepseek-v3 --cluster h800-8x-ib400 --num-gpus 256 --ep 32 --num-slots 288\n\n"
    "Loads: a .npy of layers x experts in any unit. Without it the load is drawn from the scenario. --out also writes "
    "physical_to_logical.json (as SGLang and EPLB read it), expert_map.json (as vLLM Ascend reads it), and "
    "expert_to_rank.json where no expert has replicas."
)


def _given(metavar: str, text: str, *flags: str, **rules: Any) -> Any:
    return typer.Option(*flags, metavar=metavar, help=text, rich_help_panel=PANEL, show_default=False, **rules)


@app.command(epilog=EXAMPLES)
@verb(scenario=True, out_help="Write results.json and the placement's JSON maps into this folder.")
def place(
    call: Call,
    scenario_file: ScenarioFile = None,
    loads: Annotated[Path | None, _given("FILE.npy", "Load of each layer's experts (layers x experts).")] = None,
    num_gpus: Annotated[int | None, _given("N", "GPUs that share the experts; without --loads, of all.", min=1)] = None,
    num_nodes: Annotated[int | None, _given("N", "Nodes that these GPUs stand in, with --loads (1).", min=1)] = None,
    num_slots: Annotated[int | None, _given("N", "Expert slots of all GPUs; above the experts: replicas.")] = None,
    num_groups: Annotated[int | None, _given("N", "Expert groups, with --loads (1).", min=1)] = None,
    policy: Annotated[str | None, _given("NAME", "How to place (search).")] = None,
    map: Annotated[Path | None, _given("FILE.json", "Measure this placement instead of making one.")] = None,
    previous: Annotated[Path | None, _given("FILE.json", "Placement that stands today: what must move?")] = None,
) -> Answer:
    """Place experts and their replicas on GPUs: how even, how far from the best, what moves."""
    from moesim.seeds import stream
    from moesim.study.place import migration_of, place_load, slots_that_fit

    own_policy = policy not in (None, "map")
    check(not (own_policy and map), "--map", "", "says where experts go, as --policy does; give one", policy)
    check(policy != "map" or map is not None, "--map", "", "must name a file where the policy is map", None)
    scenario = None
    if loads is not None:
        load_LE, ranks, groups = _from_file(call, scenario_file, loads, num_gpus, num_nodes, num_slots, num_groups)
        asked: dict[str, Any] = {"loads": str(loads), "num_gpus": num_gpus, "num_nodes": num_nodes or 1}
        wanted, seed, choices = policy, call.seed or 0, None
    else:
        scenario, load_LE, choices, ranks, groups = _from_scenario(
            call, scenario_file, num_gpus, num_nodes, num_slots, num_groups
        )
        asked = {"scenario": scenario.to_dict()}
        wanted, seed = policy or _policy_of(scenario), scenario.seed
        map = map or (Path(scenario.placement.map) if scenario.placement.map and not own_policy else None)
    shape = load_LE.shape
    with working(call, f"Placing {shape[1]} experts of {shape[0]} layers"):
        before = None if previous is None else _read_map(previous, ranks, shape)
        given = None if map is None else _read_map(map, ranks, shape, as_asked=num_slots is not None)
        placed = place_load(
            load_LE,
            ranks,
            policy=wanted,
            given=given,
            num_groups=groups,
            previous=before,
            choices=choices,
            rng=stream(seed, "placement"),
        )
    asked |= {
        "num_slots": placed.placements.ranks.num_slots,
        "num_groups": groups,
        "policy": placed.policy,
        "seed": seed,
    }
    asked |= {"map": _name(map), "previous": _name(previous)}
    moved = None if scenario is None or before is None else migration_of(scenario, before, placed.placements)
    fitting = None if scenario is None else slots_that_fit(scenario)
    slots = placed.placements.ranks.num_slots
    files = _write_maps(call.out, placed.placements) if call.out is not None else []
    answer = Answer(
        inputs=asked,
        result=_result(placed, moved, stream(seed, "drift")) | {"num_slots_that_fit": fitting},
        tables=_tables(placed, moved, call.verbosity > 0),
        warnings=[] if fitting is None or slots <= fitting else [f"{slots} slots do not fit in memory: {fitting} do"],
        writes_own_files=True,
    )
    if call.out is not None:
        write_results(call.out / "results.json", envelope_of(call.command, answer))
        call.note("wrote " + ", ".join(str(path) for path in [call.out / "results.json", *files]))
    return answer


def _from_file(
    call: Call,
    scenario_file: Path | None,
    loads: Path,
    num_gpus: int | None,
    num_nodes: int | None,
    num_slots: int | None,
    num_groups: int | None,
) -> tuple[Any, RankSlots, int]:
    """(load_LE, ranks, expert groups) of a call with --loads."""
    from moesim.door import read_npy
    from moesim.placement.search import checked_loads
    from moesim.placement.slots import even_slots

    others = [*call.leaves, *call.settings, *call.parameters, *([str(scenario_file)] if scenario_file else [])]
    rule = "stands without a scenario: of its options only --num-gpus, --num-slots, --policy and --seed go with it"
    check(not others, "--loads", "", rule, others)
    check(num_gpus is not None, "--num-gpus", "", "is required with --loads", num_gpus)
    assert num_gpus is not None
    raw_LE = read_npy(loads, num_dimensions=2)
    check(raw_LE.size > 0, str(loads), "shape", "must be layers x experts, neither of them 0", raw_LE.shape)
    check(bool((raw_LE >= 0).all()), str(loads), "values", "must not be negative", float(raw_LE.min()))
    load_LE = checked_loads(raw_LE)
    num_experts = load_LE.shape[1]
    groups = num_groups or 1
    check(num_experts % groups == 0, "--num-groups", "", f"must divide the {num_experts} experts", groups)
    _check_size(load_LE.shape, num_gpus)
    slots = _slots(num_slots, num_experts, num_gpus)
    return load_LE, even_slots(slots, num_gpus, num_nodes=num_nodes or 1), groups


def _slots(asked: int | None, num_experts: int, num_ranks: int) -> int:
    """Slots of all ranks: as asked, else the fewest that hold every expert on ranks that are alike."""
    if asked is None:
        return -(-num_experts // num_ranks) * num_ranks
    check(asked >= num_experts, "--num-slots", "", f"must be at least the number of experts, {num_experts}", asked)
    most = num_experts * num_ranks
    check(asked <= most, "--num-slots", "", f"must not exceed every expert on every GPU, {most}", asked)
    below, above = asked // num_ranks * num_ranks, (asked // num_ranks + 1) * num_ranks
    near = f"Nearest: {below}, {above}." if below >= num_experts else f"Nearest: {above}."
    check(asked % num_ranks == 0, "--num-slots", "", f"must be a multiple of the {num_ranks} GPUs", asked, near)
    return asked


def _check_size(shape: tuple[int, ...], num_ranks: int) -> None:
    cells = shape[0] * shape[1] * num_ranks
    check(cells <= MAX_CELLS, "place", "layers x GPUs x experts", f"must not exceed {MAX_CELLS}", cells)


def _from_scenario(
    call: Call,
    scenario_file: Path | None,
    num_gpus: int | None,
    num_nodes: int | None,
    num_slots: int | None,
    num_groups: int | None,
) -> tuple[Scenario, Any, Choices | None, RankSlots, int]:
    """(scenario, load_LE, tokens, ranks, expert groups): one step's load, on the ranks of its first expert group."""
    from moesim.cli.question import scenario_of, typed_parameters
    from moesim.study.place import scenario_load
    from moesim.timeline.placed import scenario_ranks

    for flag, value in (("--num-nodes", num_nodes), ("--num-groups", num_groups)):
        check(value is None, flag, "", "goes with --loads; a scenario knows its own", value)
    leaves = typed_parameters(call) | ({} if num_gpus is None else {"num_gpus": num_gpus})
    scenario = scenario_of(call, scenario_file, leaves)
    check(scenario.model.is_moe, "--model", "", "must have experts to place", scenario.model.name)
    load_LE, choices, router = scenario_load(scenario)
    _check_size(load_LE.shape, scenario.parallel.ep)
    asked = scenario.placement.num_slots if num_slots is None else num_slots
    slots = _slots(asked, load_LE.shape[1], scenario.parallel.ep)
    return scenario, load_LE, choices, scenario_ranks(scenario, slots), router.num_groups


def _policy_of(scenario: Scenario) -> str | None:
    """The scenario's own policy, unless it is the one that nobody had to choose."""
    return None if scenario.placement.policy == "contiguous" else scenario.placement.policy


def _read_map(path: Path, ranks: RankSlots, shape: tuple[int, int], as_asked: bool = False) -> LayerPlacements:
    """A placement from its JSON file; unless as_asked it may have another number of slots than ranks."""
    from moesim.door import read_json
    from moesim.placement.maps import parse_map
    from moesim.study.place import slots_of_map

    raw, (num_layers, num_experts) = read_json(path), shape
    slots = ranks if as_asked else slots_of_map(raw, ranks, num_experts)
    return parse_map(raw, str(path), num_layers=num_layers, num_experts=num_experts, ranks=slots)


def _name(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _result(placed: PlacedLoad, moved: Migration | None, rng: np.random.Generator) -> dict[str, Any]:
    """Every layer as a row under ``layers``, and the same by column, one value per layer.

    migration: bytes and stall of moving from the previous placement, where a scenario says how large experts are;
    staleness: max_mean, mean over layers, once the load's correlation with this one has fallen.
    """
    from moesim.placement.price import staleness
    from moesim.study.ageing import CORRELATIONS, drifted

    ages_DL = staleness(placed.placements, drifted(placed.load_LE, CORRELATIONS, rng))
    rows = placed.layers()
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "layer"}
    contiguous = None if placed.contiguous_max_mean_L is None else placed.contiguous_max_mean_L
    return {
        "policy": placed.policy,
        "layers": rows,
        **columns,
        "contiguous_max_mean": contiguous,
        "migration": None if moved is None else dataclasses.asdict(moved),
        "staleness": {"correlations": list(CORRELATIONS), "max_mean": ages_DL.mean(axis=1).tolist()},
    }


def _write_maps(folder: Path, placed: LayerPlacements) -> list[Path]:
    from moesim.placement.maps import save_map

    written = [folder / "physical_to_logical.json", folder / "expert_map.json"]
    save_map(written[0], placed)
    save_map(written[1], placed, form="layer_list")
    if placed.ranks.num_slots == placed.num_experts:
        written.append(folder / "expert_to_rank.json")
        save_map(written[-1], placed, form="expert_to_rank")
    return written


def _tables(placed: PlacedLoad, moved: Migration | None, all_layers: bool) -> list[Table]:
    """Headline, then the layers, the most uneven first."""
    from moesim.units import format_bytes, format_seconds

    ranks, max_mean_L = placed.placements.ranks, placed.max_mean_L
    extra = ranks.num_slots - placed.placements.num_experts
    worst, load = int(max_mean_L.argmax()), placed.load_LE.sum(axis=1).mean()
    headline = [
        ("Policy", placed.policy),
        ("GPUs", f"{ranks.num_ranks} in {ranks.num_nodes} node{'s' if ranks.num_nodes > 1 else ''}"),
        ("Slots per layer", f"{ranks.num_slots} for {placed.placements.num_experts} experts ({extra} replicas)"),
        ("Busiest GPU over the mean", f"{max_mean_L.mean():.4f} on average, {max_mean_L[worst]:.4f} in layer {worst}"),
        ("No layout can beat", f"{placed.lower_bound_L.mean():.4f} on average"),
        ("Cross-node tokens", f"{placed.cross_node_tokens_L.mean():,.0f} on average, of {load:,.0f} assignments"),
    ]
    if placed.contiguous_max_mean_L is not None:
        usual = placed.contiguous_max_mean_L
        headline.insert(4, ("Contiguous, no replicas", f"{usual.mean():.4f} on average, {usual.max():.4f} at worst"))
    if placed.moved_slots_L is not None:
        total = ranks.num_slots * len(max_mean_L)
        headline.append(("Experts to move", f"{int(placed.moved_slots_L.sum()):,} of {total:,} slots"))
    if moved is not None:
        crossing = f"{format_bytes(moved.nic_bytes)} of it between nodes"
        headline.append(("Bytes to move", f"{format_bytes(moved.nvlink_bytes + moved.nic_bytes)}, {crossing}"))
        headline.append(("Training stalls for", f"at least {format_seconds(moved.stall_s)}"))
    order = (-max_mean_L).argsort(kind="stable").tolist()
    shown = sorted(order) if all_layers else sorted(order[:SHOWN_LAYERS])
    moved_L = placed.moved_slots_L
    rows = [
        (
            str(layer),
            f"{max_mean_L[layer]:.4f}",
            f"{placed.lower_bound_L[layer]:.4f}",
            f"{placed.cross_node_tokens_L[layer]:,.0f}",
            "-" if moved_L is None else str(moved_L[layer]),
        )
        for layer in shown
    ]
    columns = ("Layer", "Max/mean", "Bound", "Cross-node tokens", "Moved")
    title = "Layers" if len(shown) == len(order) else f"The {len(shown)} most uneven of {len(order)} layers (all: -v)"
    return [
        fields_table("Placement", headline),
        Table(title=title, columns=columns, rows=rows, right=columns[1:]),
    ]
