"""The root of the command line, which every verb's file joins, and what several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesim.cli.call import Verbs, show_version

app = typer.Typer(
    name="moesim",
    cls=Verbs,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Try: moesim report --out out/report\n\nmoesim VERB --help shows a verb's options and examples.",
)
ScenarioFile = Annotated[
    Path | None,
    typer.Argument(
        metavar="[SCENARIO.yaml]", help="Scenario file; options given beside it overrule it.", show_default=False
    ),
]
DEFAULT_QUESTION = "Without a scenario, a model or a cluster it takes DeepSeek-V3 on 2,048 H800."


def examples(*lines: str) -> str:
    return "\n\n".join(("Examples:", *lines))


@app.callback(invoke_without_command=True)
def moesim(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=show_version, is_eager=True)
    ] = False,
) -> None:
    """Plan clusters for Mixture-of-Experts models: skew, traffic, memory, step time, before you pay for GPUs."""
    if context.invoked_subcommand is None and not version:
        print(context.get_help())
