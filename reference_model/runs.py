"""The files of a training run: written row by row so that any moment may kill the writer, read back as arrays.

A run is a folder: run.json (what ran, where), metrics.csv, heldout.csv, histogram.csv, routing-STEP.npz. Recorded runs
lie beside this file, as runs/EXPERIMENT/VARIANT-sSEED.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

RUN = "run.json"
TABLES = ("metrics.csv", "heldout.csv", "histogram.csv")
RECORDED = Path(__file__).parent / "runs"
NAMES = ("quality", "collapse", "precision")  # of the experiments that reference_model.experiments trains

Table = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """One training run: facts of run.json, tables as columns, routing as (step, path of a router-replay file)."""

    variant: str
    seed: int
    facts: Mapping[str, Any]
    metrics: Table
    heldout: Table
    histogram: Table
    routing: tuple[tuple[int, Path], ...]

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The numbers of the MoE layers, counted from 0."""
        return tuple(int(name.removeprefix("max_vio_")) for name in self.metrics if name.startswith("max_vio_"))


def read_run(folder: Path | str) -> Run:
    """The run in a folder. Raises FileNotFoundError where it has not ended yet, since run.json is written last."""
    place = Path(folder)
    facts = json.loads((place / RUN).read_text("utf-8"))
    metrics, heldout, histogram = (read_table(place / name) for name in TABLES)
    routing = tuple((int(path.stem.rsplit("-", 1)[1]), path) for path in sorted(place.glob("routing-*.npz")))
    return Run(
        variant=place.name.rsplit("-s", 1)[0],
        seed=int(facts["seed"]),
        facts=facts,
        metrics=metrics,
        heldout=heldout,
        histogram=histogram,
        routing=routing,
    )


def read_runs(experiment: str, folder: Path | str = RECORDED) -> dict[str, list[Run]]:
    """The finished runs of an experiment by variant, each variant's by seed; the recorded ones unless told otherwise.

    >>> runs = read_runs("quality")
    >>> sorted(runs)
    ['dense', 'moe']
    """
    found: dict[str, list[Run]] = {}
    for path in sorted((Path(folder) / experiment).glob(f"*/{RUN}")):
        run = read_run(path.parent)
        found.setdefault(run.variant, []).append(run)
    return {variant: sorted(runs, key=lambda run: run.seed) for variant, runs in found.items()}


def read_table(path: Path) -> dict[str, NDArray[np.float64]]:
    """The columns of a table; a file that is not there has none."""
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        names, *rows = csv.reader(file)
    values = np.array(rows, dtype=np.float64).reshape(len(rows), len(names))
    return dict(zip(names, values.T, strict=True))


def append_rows(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Add rows to a table; the first ones bring the header. Whole numbers stay whole, others keep six digits."""
    with path.open("a", encoding="utf-8") as file:
        if file.tell() == 0:
            file.write(",".join(rows[0]) + "\n")
        file.writelines(",".join(_cell(value) for value in row.values()) + "\n" for row in rows)


def _cell(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def table_sizes(folder: Path) -> dict[str, int]:
    """How long each table is [bytes], for a checkpoint."""
    return {name: (folder / name).stat().st_size if (folder / name).exists() else 0 for name in TABLES}


def cut_tables(folder: Path, sizes: Mapping[str, int]) -> None:
    """Cut off what was written after the checkpoint that noted these sizes.

    Raises ValueError where a table has lost rows since: cutting would not bring them back.
    """
    for name, held in table_sizes(folder).items():
        if held < sizes[name]:
            raise ValueError(f"{folder / name} has {held} bytes, fewer than the {sizes[name]} its checkpoint noted")
        if held:
            os.truncate(folder / name, sizes[name])


def write_atomically(path: Path, content: bytes) -> None:
    """The whole content or none of it, whenever the writer is killed."""
    beside = path.with_name(f".{path.name}.part")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
