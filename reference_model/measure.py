"""Visiting a calibration's cases in passes, each measured one kept at once; on one process or on all ranks together.

On several ranks every rank times the same case at the same time: what they share (memory, wires) is shared as in a run.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed

from reference_model.cases import Case, prepare_case
from reference_model.exchange import EXCHANGES, prepare_exchange, sample_together_s
from reference_model.ranks import backend_of, run_on_ranks
from reference_model.timing import Arena, Effort, calls_ahead, host_overhead_s, sample_times_s

Progress = Callable[[int, int, str], None]  # done, total, what comes next
HOST_KEY = "host"  # of what the host spends on an operation: no case, but timed among them
_AGREEMENT_FRACTION = 0.05  # between the two least disturbed passes over a case


class PointLog:
    """The samples taken so far, one JSON line per case and pass behind a header; survives a kill at any moment.

    A file of another device, software or set of shapes is begun anew; a line cut short is dropped.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path, self.header, self.keeps_file = path, header, True
        self.samples: dict[str, list[list[float]]] = {}
        first = json.dumps({"header": header}, sort_keys=True)
        kept = self._kept_lines(first)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.part")
        beside.write_text("\n".join([first, *kept]) + "\n", encoding="utf-8")
        os.replace(beside, path)  # whole, or the old one: a kill here loses nothing

    def _kept_lines(self, first: str) -> list[str]:
        lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n") if self.path.exists() else []
        if not lines or lines[0] != first:
            return []
        kept = []
        for line in lines[1:-1]:  # what follows the last line end was cut short
            try:
                entry = json.loads(line)
                self.samples.setdefault(entry["key"], []).append([float(s) for s in entry["samples_s"]])
            except (ValueError, KeyError, TypeError):
                continue
            kept.append(line)
        return kept

    def add(self, key: str, samples_s: Sequence[float]) -> None:
        """Append one case's samples of one pass."""
        self.samples.setdefault(key, []).append(list(samples_s))
        if not self.keeps_file:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "samples_s": list(samples_s)}) + "\n")

    def delete(self) -> None:
        """The profile now holds it all."""
        self.path.unlink()

    def read_again(self) -> PointLog:
        """The log as it is on file now."""
        return PointLog(self.path, self.header)

    def num_kept(self) -> int:
        """Samples on file, of whichever process wrote them."""
        return self.path.read_bytes().count(b"\n") - 1


def measure(
    cases: Sequence[Case | None],
    log: PointLog,
    device: torch.device,
    dtype: torch.dtype,
    effort: Effort,
    num_arena_bytes: int,
    progress: Progress,
    num_ranks: int = 1,
) -> None:
    """Fill the log; None among the cases is the host's overhead. With num_ranks, every rank of the group calls this.

    Each pass visits all cases in another (fixed) order, so drift turns into spread, not into bias. After the planned
    passes come further ones over the cases whose two least disturbed passes still disagree. Ranks' samples are put
    together; an exchange takes as long as its slowest rank.
    """
    arena, start_s = Arena(device, dtype, num_arena_bytes), time.monotonic()
    for number in range(effort.num_passes + effort.num_extra_passes):
        order = np.random.default_rng(number).permutation(len(cases))
        todo = [case for case in (cases[i] for i in order) if len(log.samples.get(_key(case), ())) <= number]
        if number >= effort.num_passes:
            todo = [case for case in todo if case and not _agree(log.samples[case.key])]
        for done, case in enumerate(todo):
            late = number > 0 and time.monotonic() - start_s > effort.limit_s
            if _of_ranks(late, num_ranks)[0]:
                return
            progress(done, len(todo), f"pass {number + 1}: {_key(case)}")
            samples = _sample(case, arena, effort, num_ranks)
            together = case is not None and case.kind in EXCHANGES
            log.add(_key(case), samples if together else list(chain(*_of_ranks(samples, num_ranks))))
        progress(len(todo), len(todo), f"pass {number + 1}: done")


def measure_on_ranks(
    num_ranks: int,
    cases: Sequence[Case | None],
    log: PointLog,
    device: torch.device,
    dtype: torch.dtype,
    effort: Effort,
    num_arena_bytes: int,
    progress: Progress,
) -> PointLog:
    """The same by num_ranks new processes, all at the same time; returns the log as it then is."""
    total, before = len(cases) * effort.num_passes, log.num_kept()
    run_on_ranks(
        _on_rank,
        num_ranks,
        *(cases, log, device.type, dtype, effort, num_arena_bytes),
        backend=backend_of(device.type),
        meanwhile=lambda: progress(min(log.num_kept() - before, total), total, f"{num_ranks} ranks at once"),
    )
    progress(total, total, f"{num_ranks} ranks at once: done")
    return log.read_again()


def _on_rank(
    cases: Sequence[Case | None],
    log: PointLog,
    device_type: str,
    dtype: torch.dtype,
    effort: Effort,
    num_arena_bytes: int,
) -> None:
    rank, num_ranks = distributed.get_rank(), distributed.get_world_size()
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device(device_type)
    log.keeps_file = rank == 0
    measure(cases, log, device, dtype, effort, num_arena_bytes, lambda *_: None, num_ranks)


def _sample(case: Case | None, arena: Arena, effort: Effort, num_ranks: int) -> list[float]:
    if case is None:
        return [host_overhead_s(arena.device)]
    if case.kind in EXCHANGES:
        return sample_together_s(prepare_exchange(case, arena), arena.device, effort)
    if num_ranks > 1:
        distributed.barrier()  # so that all are at the same case
    ahead = calls_ahead(arena.device, case.num_bytes(arena.dtype.itemsize)) if case.direction == "backward" else 1
    return sample_times_s(prepare_case(case, arena), arena.device, effort, ahead)


def _of_ranks(value: Any, num_ranks: int) -> list[Any]:
    """Every rank's value, on every rank; of the flag of one rank all see the first."""
    if num_ranks == 1:
        return [value]
    values: list[Any] = [None] * num_ranks
    distributed.all_gather_object(values, value)
    return values


def _agree(samples_by_pass: Sequence[Sequence[float]]) -> bool:
    least, second = sorted(float(np.median(samples)) for samples in samples_by_pass)[:2]
    return second <= (1.0 + _AGREEMENT_FRACTION) * least


def _key(case: Case | None) -> str:
    return case.key if case else HOST_KEY
