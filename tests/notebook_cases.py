"""What the tests of notebooks share: a small question, their parameters, their files of parameters, their pages."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import papermill

from moesim.door import read_yaml
from moesim.leaves import LEAVES
from moesim.report.parameters import Question, ask, check_parameters, notebooks_folder, parameters_of

OLMOE_ON_32 = {
    "model": "olmoe-1b-7b",
    "cluster": "h100-8x-ib400",
    "num_gpus": 32,
    "pp": 2,
    "ep": 16,
    "seq_len": 512,
    "global_batch": 32,
    "precision": "bf16",
    "recompute": "none",
}


def takes_flat_names_and(notebook: Path, own: Iterable[str]) -> bool:
    """Whether moesim and papermill both see the scenario's flat names and these, and no others."""
    return set(parameters_of(notebook)) == set(papermill.inspect_notebook(notebook)) == {*LEAVES, *own}


def parameter_files(notebook: Path) -> list[Path]:
    return sorted((notebooks_folder() / "params" / notebook.stem).glob("*.yaml"))


def question_of(notebook: Path, path: Path) -> Question:
    """What a file of parameters asks, checked as the runner checks it."""
    given = read_yaml(path)
    question = ask(check_parameters(given, parameters_of(notebook)), sorted(given))
    assert question.scenario.cluster.num_gpus == given["num_gpus"]
    return question


def loads_nothing(page: str) -> bool:
    """Whether a page needs nothing from the network."""
    return not re.search(r"(?:src|href)\s*=\s*[\"']?\s*(?:https?:)?//", page)
