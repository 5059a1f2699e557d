"""The goodput notebook's own parameters in, its results out: results.json and results.csv."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesim.catalog.failures import sources
from moesim.report.export import write_study
from moesim.study.goodput import GoodputStudy, RunPlan
from moesim.units import GIGA, MINUTE_S


def plan_of(own: Mapping[str, Any]) -> RunPlan:
    """The run that the notebook's own parameters ask for. Raises InputError."""
    minutes, rate = own["checkpoint_interval_min"], own["checkpoint_gb_per_s"]
    return RunPlan(
        tokens=own["tokens_to_train"],
        fleet=own["fleet"],
        inspected=own["inspected"],
        num_spares=own["num_spares"],
        checkpoint_interval_s=None if minutes is None else minutes * MINUTE_S,
        checkpoint_write_bytes_per_s=None if rate is None else rate * GIGA,
        checkpoint_async=own["checkpoint_async"],
        ramp_tokens=own["ramp_tokens"],
        ramp_batch=own["ramp_batch"],
        price_per_gpu_hour=own["price_per_gpu_hour"],
        currency=own["currency"],
        pue=own["pue"],
        num_runs=own["num_runs"],
    )


def write_goodput(study: GoodputStudy, out_dir: str | Path) -> list[Path]:
    """Write results.json and results.csv, nothing where out_dir is ""; returns their paths.

    Raises InputError where the folder cannot be written.
    """
    return write_study(
        out_dir,
        command="goodput",
        inputs={"scenario": study.scenario.to_dict()},
        result=study.to_dict(),
        rows=study.rows(),
        provenance=[{"part": part, "kind": kind, "source": source} for part, kind, source in sources()],
    )
