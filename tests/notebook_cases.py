"""What the tests of notebooks share: the smoke size of each, their files of parameters, their pages.

`python -m benchmarks.notebooks` times these sizes and the notebooks' own.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import papermill

from moesim.door import read_yaml
from moesim.leaves import LEAVES
from moesim.report.parameters import Question, ask, check_parameters, notebooks_folder, parameters_of
from moesim.study.accuracy import carried_cases

OLMOE_ON_16: Mapping[str, Any] = {
    "model": "olmoe-1b-7b",
    "cluster": "h100-8x-ib400",
    "num_gpus": 16,
    "pp": 2,
    "ep": 8,
    "seq_len": 512,
    "micro_batch": 1,
    "global_batch": 32,
    "precision": "bf16",
    "recompute": "none",
}
OLMOE_ON_32 = {**OLMOE_ON_16, "num_gpus": 32, "ep": 16}
SMOKE: Mapping[str, Mapping[str, Any]] = {
    "00_tour": {**OLMOE_ON_16, "pp": 1, "price_per_gpu_hour": 2.0},
    "10_planning_report": {**OLMOE_ON_16, "seq_len": 1024, "tokens_to_train": 1e11},
    "12_memory": {**OLMOE_ON_16, "seq_len": 1024, "micro_batch": 2, "global_batch": 64, "ginis": "0,0.3"},
    "15_calibration": {},
    "20_routing_and_drops": {**OLMOE_ON_16, "seq_len": 1024, "gini": 0.4, "num_steps": 4, "training_steps": 200},
    "25_dense_vs_moe": {
        **OLMOE_ON_16,
        "axes": "top_k=4; capacity_factor=1.0",
        "price_per_gpu_hour": 2.0,
        "scaling_law": True,
    },
    "30_expert_placement": {**OLMOE_ON_32, "policies": "contiguous,eplb,search", "slots": "64,80"},
    "35_all_to_all": {**OLMOE_ON_32, "tokens": "16,128,1024", "ginis": "0,0.3"},
    "40_cluster_sizing": {
        **OLMOE_ON_16,
        "global_batch": 64,
        "clusters": "none",
        "sizes": "8,16",
        "tokens_to_train": 1e12,
        "prices": "h100-sxm:2..3",
    },
    "45_goodput_and_cost": {**OLMOE_ON_16, "tokens_to_train": 1e12, "price_per_gpu_hour": 2.0, "num_runs": 8},
    "50_quality_vs_active_flops": {"live_steps": 0},
    "60_accuracy": {"kind": "training"},  # of few rows
    "70_validate_design": {},  # of a small design
}
SMOKE_DESIGN: Mapping[str, Any] = {
    "schema": 1,
    "name": "small",
    "scenario": {
        "model": "olmoe-1b-7b",
        "cluster": "h100-8x-ib400",
        "num_gpus": 16,
        "parallel": {"pp": 2, "ep": 8},
        "train": {"seq_len": 512, "global_batch": 32},
    },
    "gates": {"mfu": {"limit": 0.9}},
}
FEW_ROWS = ("llama3_70b_l12_tp8_pp1_dp1_mbc4", "llama3_405b_l4_tp8_pp1_dp1_mbc4", "moonlight_recompute_moe_act", "XS")


def smoke(name: str, folder: Path) -> dict[str, Any]:
    """A notebook's parameters at smoke size; files that they name are written into folder."""
    given = dict(SMOKE[name])
    if name == "60_accuracy":
        rows = [row for row in carried_cases("training") if any(part in row["id"] for part in FEW_ROWS)]
        given["cases"] = str(folder / "cases.csv")
        with open(given["cases"], "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif name == "70_validate_design":
        given["design"] = str(folder / "design.yaml")
        Path(given["design"]).write_text(json.dumps(SMOKE_DESIGN))
    return given


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
