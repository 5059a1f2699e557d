"""The verbs ``import-megatron``, ``import-torchtitan`` and ``export``: other programs' files to scenarios and back."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moesim.cli.app import ScenarioFile, app
from moesim.cli.call import Call, verb
from moesim.cli.output import Answer
from moesim.errors import InputError, check, near_match

if TYPE_CHECKING:
    from moesim.catalog.megatron import Imported

FORMATS = ("megatron", "torchtitan", "scenario")
ModelOption = Annotated[
    str | None,
    typer.Option(metavar="NAME|FILE", help="The model, where the file does not describe one that is known."),
]
ClusterOption = Annotated[str, typer.Option(metavar="NAME|FILE", help="Where it runs.", show_default=True)]
GpusOption = Annotated[int | None, typer.Option(metavar="N", help="GPUs, where the file does not say.", min=1)]
OUT_HELP = "Write scenario.yaml into this folder, and model.yaml where no preset has the model."


@app.command(
    "import-megatron",
    epilog="\n\n".join(
        (
            "Examples:",
            "moesim import-megatron pretrain.sh --define NNODES=32 --out out/run",
            "moesim import-megatron args.yaml --model mixtral-8x7b --num-gpus 64 > scenario.yaml",
        )
    ),
)
@verb(out_help=OUT_HELP)
def import_megatron(
    call: Call,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="Shell script, YAML or JSON of flags, or Megatron-Bridge's YAML.", show_default=False
        ),
    ],
    model: ModelOption = None,
    cluster: ClusterOption = "h100-8x-ib400",
    num_gpus: GpusOption = None,
    define: Annotated[
        list[str] | None,
        typer.Option(
            "--define", metavar="NAME=VALUE", help="A variable of the script. Repeatable.", show_default=False
        ),
    ] = None,
) -> Answer:
    """Read Megatron-LM's flags into a scenario; say which of them were left out, and which are unknown."""
    from moesim.catalog.megatron import from_flags
    from moesim.catalog.megatron_bridge import flags_in_bridge, is_bridge
    from moesim.door.files import read_json, read_text, read_yaml
    from moesim.door.flags import flags_of_mapping, flags_of_script

    defined = {}
    for text in define or ():
        name, equals, value = text.partition("=")
        check(bool(equals) and name.isidentifier(), "--define", text, "must read NAME=VALUE", text)
        defined[name] = value
    owner = str(file)
    if file.suffix in (".yaml", ".yml", ".json"):
        raw = read_json(file) if file.suffix == ".json" else read_yaml(file)
        flags = flags_of_mapping(flags_in_bridge(raw, owner) if is_bridge(raw) else raw, owner, defined)
    else:
        flags = flags_of_script(read_text(file), owner, defined)
    check(bool(flags.values), owner, "", "must hold flags such as --num-layers 32", "none")
    return _imported(call, from_flags(flags, model=model, cluster=cluster, num_gpus=num_gpus), file)


@app.command(
    "import-torchtitan",
    epilog="\n\n".join(("Examples:", "moesim import-torchtitan job.toml --num-gpus 256 --out out/run")),
)
@verb(out_help=OUT_HELP)
def import_torchtitan(
    call: Call,
    file: Annotated[Path, typer.Argument(metavar="FILE.toml", help="A job's configuration.", show_default=False)],
    model: ModelOption = None,
    cluster: ClusterOption = "h100-8x-ib400",
    num_gpus: GpusOption = None,
) -> Answer:
    """Read a torchtitan job into a scenario; say what of it was left out, and what is unknown."""
    from moesim.catalog.torchtitan import from_toml
    from moesim.door.files import read_toml

    raw = read_toml(file)
    return _imported(call, from_toml(raw, str(file), model=model, cluster=cluster, num_gpus=num_gpus), file)


@app.command(
    epilog="\n\n".join(
        (
            "Examples:",
            "moesim export scenario.yaml --format megatron > pretrain.sh",
            "moesim export --model deepseek-v3 --cluster h800-8x-ib400 --num-gpus 256 --ep 32 --format torchtitan",
        )
    )
)
@verb(scenario=True, out_help="Write pretrain.sh, job.toml or scenario.yaml into this folder.")
def export(
    call: Call,
    scenario_file: ScenarioFile = None,
    format: Annotated[str, typer.Option(metavar="|".join(FORMATS), help="Whose file.", show_default=True)] = "megatron",
) -> Answer:
    """Write a scenario as Megatron-LM's flags, as a torchtitan job, or as a scenario with every default filled in."""
    from moesim.cli.question import scenario_of
    from moesim.door.files import to_yaml, write_text_atomically

    if format not in FORMATS:
        raise InputError("--format", "", "must be one of " + ", ".join(FORMATS), format, near_match(format, FORMATS))
    scenario = scenario_of(call, scenario_file)
    model, parallel, train, routing = scenario.model, scenario.parallel, scenario.train, scenario.routing
    num_gpus, unsaid = scenario.cluster.num_gpus, tuple[str, ...]()
    title = f"{model.name} on {num_gpus} GPUs of {scenario.cluster.name}"
    if format == "megatron":
        from moesim.catalog.megatron_export import script_of, to_flags

        exported = to_flags(model, parallel, train, routing, num_gpus)
        text, unsaid, name = script_of(exported, title), exported.unsaid, "pretrain.sh"
    elif format == "torchtitan":
        from moesim.catalog.torchtitan import to_toml

        text, unsaid = to_toml(model, parallel, train, routing, num_gpus)
        text, name = f"# {title}\n{text}", "job.toml"
    else:
        named = {name: str(scenario.raw[name]) for name in ("model", "cluster")}
        text, name = to_yaml(scenario.to_dict() | named), "scenario.yaml"
    if call.out is not None:
        write_text_atomically(call.out / name, text)
    if not call.as_json:
        sys.stdout.write(text)
    return Answer(
        inputs={"scenario": scenario.to_dict(), "format": format},
        result={"text": text, "unsaid": list(unsaid)},
        warnings=[f"not said by the file: {what}" for what in unsaid],
        writes_own_files=True,
    )


def _imported(call: Call, found: Imported, file: Path) -> Answer:
    """The answer of an import, after its scenario has been checked as any other."""
    from moesim.door.files import to_yaml, write_text_atomically

    texts = {"scenario.yaml": to_yaml(dict(found.scenario))}
    if found.design is not None:
        texts["model.yaml"] = to_yaml(dict(found.design))
    _check(texts, file)
    rule = "is needed: no preset has the model that the file describes, so two files are written"
    alone = call.out is not None or call.as_json or found.design is None
    check(alone, "--out", "", rule, None, "Or take --json, which holds both.")
    if call.out is not None:
        for name, text in texts.items():
            write_text_atomically(call.out / name, text)
    if not call.as_json:
        sys.stdout.write(texts["scenario.yaml"])
    told = {
        "assumed": found.assumed,
        "left out": tuple(f"{name} (changes time or memory)" for name in found.left_out),
        "without effect": (", ".join(found.without_effect),) if found.without_effect else (),
        "unknown": tuple(f"{name}{found.near.get(name, '')}" for name in found.unknown),
    }
    return Answer(
        inputs={"file": str(file)},
        result={
            "scenario": found.scenario,
            "design": found.design,
            "assumed": found.assumed,
            "left_out": found.left_out,
            "without_effect": found.without_effect,
            "unknown": found.unknown,
        },
        warnings=[f"{what}: {item}" for what, items in told.items() for item in items],
        writes_own_files=True,
    )


def _check(texts: Mapping[str, str], file: Path) -> None:
    """Refuse, in the file's name, what makes no scenario. Files that it names are looked up beside it."""
    from moesim.door.files import parse_yaml, write_text_atomically
    from moesim.scenario import Scenario

    with tempfile.TemporaryDirectory() as folder:
        for name, text in texts.items():
            write_text_atomically(Path(folder) / name, text)
        raw = parse_yaml(texts["scenario.yaml"], str(file))
        Scenario.from_mapping(raw, owner=str(file), folder=Path(folder))
