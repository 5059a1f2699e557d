"""A routing study as files for other programs: results.json, results.csv, histogram.csv."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from moesim.door import write_text_atomically
from moesim.report.export import envelope_json, table_csv
from moesim.routing.histogram import write_histogram
from moesim.study.balance import BalanceCurve
from moesim.study.routing import RoutingStudy


def write_routing(study: RoutingStudy, out_dir: str | Path) -> list[Path]:
    """Write results.json, results.csv, histogram.csv [step, layer, expert, tokens], and one for each balancing policy.

    None where out_dir is "". The same study gives the same bytes. Raises InputError where the folder cannot be written.

    >>> write_routing(study, "out/routing")  # doctest: +SKIP
    """
    if not str(out_dir):
        return []
    folder = Path(out_dir)
    paths = [folder / name for name in ("results.json", "results.csv", "histogram.csv")]
    write_text_atomically(paths[0], routing_json(study))
    write_text_atomically(paths[1], table_csv(study.rows()))
    write_histogram(study.load.histogram, paths[2])
    return [*paths, *write_balancing(study.balancing, folder)]


def write_balancing(curves: Sequence[BalanceCurve], folder: Path) -> list[Path]:
    """Write balancing_POLICY.csv for each policy: expert usage [step, layer, expert, tokens] during training."""
    written = []
    for curve in curves:
        assert curve.histogram is not None, "a simulated run has a histogram"
        written.append(folder / f"balancing_{curve.policy}.csv")
        write_histogram(curve.histogram, written[-1])
    return written


def routing_json(study: RoutingStudy) -> str:
    """The study in the envelope of every --json."""
    return envelope_json(
        command="report",
        inputs={
            "scenario": study.scenario.to_dict(),
            "recorded": None if study.load.source == "popularity" else study.load.source,
            "wanted_drop_fraction": study.needed.wanted_drop_fraction,
        },
        result=study.to_dict(),
        provenance=[dataclasses.asdict(item) for item in study.step.provenance],
        warnings=study.step.warnings,
    )
