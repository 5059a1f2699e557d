"""Run a function on several local ranks: processes of one thread each, joined by gloo, or by NCCL with a GPU each."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import distributed
from torch.multiprocessing.spawn import ProcessException, start_processes

Backend = Literal["gloo", "nccl"]
LIMIT_S = 300.0


def run_on_ranks(
    work: Callable[..., Any],
    num_ranks: int,
    *arguments: Any,
    backend: Backend = "gloo",
    limit_s: float = LIMIT_S,
    meanwhile: Callable[[], object] | None = None,
) -> list[Any]:
    """work(*arguments) on each of num_ranks new processes in one group; what each returned, by rank.

    work and its arguments must be importable and picklable. A rank that raises ends them all: RuntimeError
    with its traceback; a collective that waits longer than limit_s [s] is an error too. meanwhile: called about once a
    second while they work.

    >>> run_on_ranks(torch.distributed.get_rank, 2)  # doctest: +SKIP
    [0, 1]
    """
    # A server that has imported torch once forks each rank in milliseconds; it runs no thread that could be lost.
    multiprocessing.set_forkserver_preload(["reference_model.expert_parallel"])
    with tempfile.TemporaryDirectory() as folder:
        try:
            ranks = start_processes(
                _rank,
                (work, num_ranks, arguments, backend, folder, limit_s),
                nprocs=num_ranks,
                join=False,
                start_method="forkserver",
            )
            assert ranks is not None
            while not ranks.join(timeout=1.0):
                if meanwhile is not None:
                    meanwhile()
        except ProcessException as error:
            # The first to fail says why; the others only that their peer is gone.
            notes = sorted(Path(folder).glob("error*"), key=lambda path: path.stat().st_mtime_ns)
            raise RuntimeError(notes[0].read_text() if notes else str(error)) from error
        return [torch.load(_result(folder, rank), weights_only=False) for rank in range(num_ranks)]


def backend_of(device_type: str) -> Backend:
    """What joins ranks on such devices."""
    return "nccl" if device_type == "cuda" else "gloo"


def _rank(
    rank: int,
    work: Callable[..., Any],
    num_ranks: int,
    arguments: tuple[Any, ...],
    backend: str,
    folder: str,
    limit_s: float,
) -> None:
    torch.set_num_threads(1)
    # The loopback interface always exists; a host's own name need not resolve.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if backend == "nccl":
        torch.cuda.set_device(rank)
    distributed.init_process_group(
        backend,
        init_method=f"file://{Path(folder) / 'meeting'}",
        rank=rank,
        world_size=num_ranks,
        timeout=datetime.timedelta(seconds=limit_s),
    )
    try:
        torch.save(work(*arguments), _result(folder, rank))
        distributed.barrier()
    except BaseException:
        (Path(folder) / f"error{rank}").write_text(f"rank {rank} of {num_ranks}:\n{traceback.format_exc()}")
        raise
    finally:
        distributed.destroy_process_group()


def _result(folder: str, rank: int) -> Path:
    return Path(folder) / f"rank{rank}.pt"
