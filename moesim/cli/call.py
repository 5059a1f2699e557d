"""What every verb shares: its common options, its scenario options, and how a call ends (exit status, one error line).

A verb is a function of a `Call` and its own options that returns an `Answer`; `verb` gives it the options, prints the
answer (tables, or JSON) and turns errors into exit statuses.
"""

from __future__ import annotations

import inspect
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from moesim.cli.output import Answer, deliver
from moesim.errors import InputError, MoesimError, near_match

DONE, GATE_FAILED, BAD_INPUT, INTERNAL_ERROR, INTERRUPTED = 0, 1, 2, 3, 130

# Each flat name of a scenario (moesim.leaves.LEAVES), grouped as the help shows them: metavar, help.
SCENARIO_OPTIONS: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "What runs where": {
        "model": ("NAME|FILE", "Preset, Hugging Face config.json, or design YAML."),
        "cluster": ("NAME|FILE", "Preset or cluster YAML."),
        "num_gpus": ("N", "GPUs, in whole nodes."),
        "profile": ("auto|datasheet|measured|FILE", "Where compute efficiency comes from."),
        "policy": ("KIND", "Placement of the experts: contiguous, striped, random, by_load, eplb, search, map, ..."),
        "num_slots": ("N|null", "Slots for experts over the expert-parallel ranks; more than experts: replicas."),
        "map": ("FILE|null", "A placement map (JSON), for the policy map."),
        "split": ("KIND", "Which replica of an expert a sender takes: even, nearest, least_loaded, uneven."),
        "rank_speeds": ("TEXT", "Slow GPUs by rank, speed over the others': 3=0.8,8-15=0.5."),
        "fidelity": ("port|exact", "How all-to-alls are timed: by busiest ports, or message by message (slow)."),
        "replicas": ("N", "Replicas of a stage that are simulated at most; more are estimated from these."),
    },
    "Parallel sizes": {
        "tp": ("N", "Tensor parallel."),
        "pp": ("N", "Pipeline stages."),
        "vpp": ("N", "Virtual stages per pipeline rank."),
        "cp": ("N", "Context parallel."),
        "cp_kind": ("KIND", "How ranks of a sequence reach its keys and values: ring, alltoall (heads) or allgather."),
        "ep": ("N", "Expert parallel."),
        "etp": ("N", "Tensor parallel inside an expert."),
        "zero": ("0..3", "ZeRO stage."),
        "fsdp": (
            "true|false",
            "ZeRO 3, or 2, as PyTorch's FSDP2 does it: layer by layer, fp32 shards.",
        ),
        "replicate": ("N", "Groups of replicas that each hold all of ZeRO's shards (HSDP)."),
        "layout": ("TEXT|LIST", "What each virtual stage holds: Et*3|(tt|)*29m|L as Megatron writes it, or [3,4,4,3]."),
        "num_first_stage_layers": ("N|null", "Layers of the first pipeline rank; the others share the rest."),
        "num_last_stage_layers": ("N|null", "Layers of the last pipeline rank."),
        "embedding_as_layer": ("true|false", "Count the embedding as a layer of the first stage."),
        "loss_as_layer": ("true|false", "Count head and loss as a layer of the last stage."),
    },
    "Training step": {
        "seq_len": ("TOKENS", "Tokens per sequence."),
        "micro_batch": ("N", "Sequences per micro-batch."),
        "global_batch": ("N", "Sequences per step."),
        "precision": ("bf16|fp8|fp8_tensor|mxfp8|nvfp4", "Number format of the matrix products; fp8: by blocks."),
        "recompute": (
            "none|full|MODULES",
            "Recompute activations in the backward pass: all, or modules such as moe_act,layernorm.",
        ),
        "schedule": ("1f1b|gpipe|zb-h1|dualpipe", "Pipeline schedule."),
        "overlap": (
            "none|NAME,NAME...",
            "What runs beside computing: grad_reduce, param_gather, tensor_parallel, forward_backward, two_batch, "
            "weight_gradient, shared_experts, chunked_dispatch.",
        ),
        "offload": ("none|PARTS", "What lies in the host's memory: optimizer, activations, or both."),
        "gradients": ("fp32|bf16", "Number format of accumulated gradients."),
        "main_weights": ("fp32|remainder|bf16|none", "The optimizer's own copy of the weights."),
        "moments": ("fp32|bf16|fp8", "Number format of the optimizer's two moments."),
        "weights": ("bf16|narrow", "Layers' weights: narrow ones stand in the products' format alone."),
        "average": ("none|gpu|host", "Where a moving average of the weights lies."),
        "attention_output": ("bf16|e5m6|fp8", "Format in which it waits for the backward."),
        "activation_input": ("bf16|fp8", "Format in which what SwiGLU takes in waits for the backward."),
        "fused_loss": ("true|false", "The loss writes its gradient over the bf16 logits."),
        "mtp": ("true|false", "Train the multi-token-prediction layers too."),
        "documents": ("FILE|TOKENS", "That sequences are packed from: a histogram of lengths, or their median."),
        "cuda_graphs": (
            "none|full|MODULES",
            "What the host issues as one: the step, or modules such as attn,moe_router,moe_preprocess.",
        ),
        "software": (
            "megatron|deepseek|kernels",
            "Whose losses a step has beside its kernels: Megatron-LM's, DeepSeek's own, or none (a bound).",
        ),
    },
    "Routing": {
        "popularity": ("KIND", "balanced, multinomial, lognormal, dirichlet, zipf, power_law, hot_experts, domains."),
        "gini": ("0..0.95", "Gini coefficient of the load. Other measures: --set routing.popularity.cv=1."),
        "recording": ("FILE|null", "Recorded routing in place of a popularity: router replay, or a histogram."),
        "capacity_factor": ("X|null", "Expert capacity over the mean load; null drops nothing."),
        "drop_policy": ("KIND", "Who gets a full expert's places: probability, position, random, or reroute the rest."),
        "dispatcher": ("alltoall|deepep", "How tokens travel."),
    },
}
LEAF_NAMES = tuple(name for group in SCENARIO_OPTIONS.values() for name in group)


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a verb: its common options, and the scenario options where it has them."""

    command: str
    as_json: bool = False
    out: Path | None = None
    seed: int | None = None
    verbosity: int = 0  # -1 quiet, 0 normal, 1 verbose
    settings: tuple[str, ...] = ()  # --set texts, a.b=c
    parameters: tuple[str, ...] = ()  # -p texts, name=value
    leaves: Mapping[str, str] = field(default_factory=dict)  # flat scenario options, as typed
    started_s: float = field(default_factory=time.perf_counter)

    def note(self, text: str) -> None:
        """A message for the person at the terminal: on stderr, none with -q."""
        if self.verbosity >= 0:
            print(f"moesim: {text}", file=sys.stderr, flush=True)


def _common_parameters(out_help: str) -> list[inspect.Parameter]:
    panel = "Common options"
    return [
        _option("as_json", bool, False, "--json", help="Print the whole result as JSON.", panel=panel),
        _option("out", Path | None, None, "--out", help=out_help, panel=panel, metavar="PATH"),
        _option(
            "verbose", bool, False, "--verbose", "-v", help="Say more; show the traceback of a crash.", panel=panel
        ),
        _option("quiet", bool, False, "--quiet", "-q", help="No messages and no progress on stderr.", panel=panel),
        _option(
            "version", bool, False, "--version", help="Print the version and stop.", panel=panel, callback=show_version
        ),
    ]


def _scenario_parameters() -> list[inspect.Parameter]:
    flat = [
        _option(name, str | None, None, "--" + name.replace("_", "-"), help=text, panel=panel, metavar=metavar)
        for panel, group in SCENARIO_OPTIONS.items()
        for name, (metavar, text) in group.items()
    ]
    panel = "Common options"
    settings = "Set any field of the scenario file, e.g. routing.capacity_factor=1.25. Repeatable."
    return [
        *flat,
        _option("settings", list[str], [], "--set", help=settings, panel=panel, metavar="A.B=C"),
        _option(
            "parameters",
            list[str],
            [],
            "-p",
            help="Set a flat name, as papermill does.",
            panel=panel,
            metavar="NAME VALUE",
        ),
        _option("seed", str | None, None, "--seed", help="Seed of all random draws.", panel=panel, metavar="N"),
    ]


def _option(
    name: str,
    kind: Any,
    default: Any,
    *flags: str,
    help: str,
    panel: str,
    metavar: str | None = None,
    callback: Any = None,
) -> inspect.Parameter:
    option = typer.Option(
        *flags,
        help=help,
        rich_help_panel=panel,
        metavar=metavar,
        callback=callback,
        is_eager=callback is not None,
        show_default=False,
    )
    annotation = Annotated[kind, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def show_version(wanted: bool) -> None:
    """The callback of --version."""
    if wanted:
        from moesim import __version__

        print(__version__)
        raise typer.Exit


def verb(
    *, scenario: bool = False, out_help: str = "Write results.json into this folder."
) -> Callable[[Callable[..., Answer]], Callable[..., None]]:
    """Give a verb its common options (and the scenario's), and print what it answers.

    The verb is called as ``function(call, **own_options)`` and returns an `Answer`.
    """

    def decorate(function: Callable[..., Answer]) -> Callable[..., None]:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        shared = (_scenario_parameters() if scenario else []) + _common_parameters(out_help)
        shared = [p for p in shared if p.name not in {mine.name for mine in own}]  # the verb's own option comes first

        def command(**values: Any) -> None:
            mine = {parameter.name: values.pop(parameter.name) for parameter in own}
            call = Call(
                command=function.__name__.replace("_", "-"),
                as_json=values["as_json"],
                out=values["out"],
                seed=_whole(values["seed"]) if values.get("seed") is not None else None,
                verbosity=int(values["verbose"]) - int(values["quiet"]),
                settings=tuple(values.get("settings", ())),
                parameters=tuple(values.get("parameters", ())),
                leaves={name: values[name] for name in LEAF_NAMES if values.get(name) is not None},
            )
            answer = function(call, **mine)
            deliver(answer, call)
            raise typer.Exit(answer.exit_status)

        keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        command.__signature__ = inspect.Signature([*keyword_only, *shared])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in [*keyword_only, *shared]}
        command.__name__, command.__doc__ = function.__name__, function.__doc__
        return command

    return decorate


def _whole(text: str) -> int:
    from moesim.door.files import parse_yaml

    value = parse_yaml(text, "--seed")
    if type(value) is not int:
        raise InputError("--seed", "", "must be a whole number", text)
    return value


# Verbs as --help tells them: what is there, one step, its parts, a decision, a real layer, in and out. Others follow.
ORDER = (
    *("models", "gpus", "clusters", "describe", "simulate", "trace", "report", "route", "place", "alltoall"),
    *("plan", "sweep", "uncertainty", "goodput", "validate", "diff", "accuracy", "calibrate", "selfcheck"),
)


class Verbs(TyperGroup):
    """The group of verbs: joins ``-p name value``, names near verbs, and maps every way out to its exit status."""

    def list_commands(self, ctx: Any) -> list[str]:
        names = super().list_commands(ctx)
        return sorted(names, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))

    def main(self, args: Sequence[str] | None = None, *_: Any, **options: Any) -> NoReturn:  # type: ignore[override]
        arguments = list(sys.argv[1:] if args is None else args)
        verbose = "-v" in arguments or "--verbose" in arguments
        run = super().main
        options |= {"args": join_parameters(arguments), "prog_name": "moesim", "standalone_mode": False}
        sys.exit(_exit_status(lambda: run(**options), verbose))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            raise InputError("verb", "", "is not known", args[0], near_match(args[0], self.commands))
        return super().resolve_command(ctx, args)


def join_parameters(arguments: list[str]) -> list[str]:
    """``-p NAME VALUE`` as one word ``NAME=VALUE`` (papermill's spelling, which needs two values per option).

    >>> join_parameters(["report", "-p", "ep", "8", "-q"])
    ['report', '-p', 'ep=8', '-q']
    """
    joined: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        joined.append(argument)
        if argument in ("-p", "--parameters"):
            joined[-1] = "-p"
            name = next(waiting, None)
            value = next(waiting, None) if name is not None and "=" not in name else None
            joined += [] if name is None else [name] if value is None else [f"{name}={value}"]
    return joined


def _exit_status(run: Callable[[], object], verbose: bool) -> int:
    """Run, and say how it ended: the exit status, after one line on stderr where it failed."""
    try:
        status = run()
        sys.stdout.flush()
        return status if isinstance(status, int) else DONE
    except MoesimError as error:
        _fail(str(error))
        return BAD_INPUT
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of stdout, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:
        describe_usage = getattr(error, "format_message", None)  # typer's usage errors, whichever click it carries
        if describe_usage is not None:
            _fail(describe_usage())
            return BAD_INPUT
        if verbose:
            traceback.print_exc()
        hint = "" if verbose else " Say it again with -v for the traceback, and please report it."
        _fail(f"internal error, not your input's fault: {type(error).__name__}: {error}.{hint}")
        return INTERNAL_ERROR


def _fail(text: str) -> None:
    print("moesim: error: " + " ".join(text.split()), file=sys.stderr, flush=True)
