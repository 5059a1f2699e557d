"""Where a sweep's points are computed: processes of this machine, or Dask's workers on any number of them.

Both are a ``concurrent.futures.Executor``, and the sweep knows no more of them. See docs/decisions/sweep-workers.md.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from moesim.errors import InputError, MoesimError, check
from moesim.study.sweep_points import versions

MAX_ATTEMPTS = 3  # of a point alone on a worker that dies
DASK_TIMEOUT_S = 30
_SPAWN = multiprocessing.get_context("spawn")  # forked workers would inherit locks and the folder that is held


class WorkerDiedError(Exception):
    """The process that worked on a task is gone, killed by a signal or by its own doing."""


class TookTooLongError(WorkerDiedError):
    """The process that worked on a task was killed since it took longer than was allowed."""


@dataclass(frozen=True, kw_only=True)
class Workers:
    """An executor, and what the sweep must know of it."""

    executor: Executor
    num_workers: int
    max_attempts: int  # of a point alone, before it is given up since its worker dies
    blames_company: bool = False  # a worker's death counts against every task that it held, not only the one at work
    check_reachable: Callable[[], None] = lambda: None  # raises MoesimError where the executor itself is gone


class Processes(Executor):
    """Processes of this machine, each with its own pipe, so that a death is known at once and costs one task.

    A worker that dies fails its task with WorkerDiedError and is replaced. Workers go when their parent does.
    timeout_s: a worker that is longer at one task is killed.
    """

    def __init__(self, num_workers: int, timeout_s: float | None = None) -> None:
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Any] | None] = queue.SimpleQueue()
        self._timeout_s = timeout_s
        self._workers: dict[int, _Worker] = {}
        self._is_stopped = False
        self._threads = [threading.Thread(target=self._serve, args=(i,), daemon=True) for i in range(num_workers)]
        for thread in self._threads:
            thread.start()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Hand in a task: a picklable function and its arguments."""
        future: Future[Any] = Future()
        self._tasks.put((future, (fn, args, kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Stop the workers: after all that was handed in, or at once with cancel_futures."""
        if cancel_futures:
            self._is_stopped = True
            for worker in [*self._workers.values()]:
                worker.process.kill()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads if wait else ():
            thread.join()

    def process_ids(self) -> list[int]:
        """The ids of the processes that live now."""
        return [pid for worker in [*self._workers.values()] if (pid := worker.process.pid) is not None]

    def _serve(self, i: int) -> None:
        """Feed one worker, in a thread of its own, until there is no more to do."""
        while (task := self._tasks.get()) is not None:
            future, call = task
            if self._is_stopped:
                future.cancel()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                is_result, value = self._ask(i, call)
            except Exception as error:  # a death, no process to be had, what cannot be pickled: the caller's to see
                future.set_exception(error)
            else:
                (future.set_result if is_result else future.set_exception)(value)
        if i in self._workers:
            self._workers[i].pipe.close()  # its end of file ends the worker
            self._workers.pop(i).process.join()

    def _ask(self, i: int, call: Any) -> tuple[bool, Any]:
        """(whether the call came to its end, its result or its exception) from worker i, started where there is none.

        Raises WorkerDiedError.
        """
        is_new = i not in self._workers
        if is_new:
            self._workers[i] = _start_worker()
        worker, in_time = self._workers[i], True
        try:
            if is_new:
                worker.pipe.recv()  # that it is ready: starting is no part of a task's time
            worker.pipe.send(call)
            in_time = worker.pipe.poll(self._timeout_s)
            answer: tuple[bool, Any] | None = worker.pipe.recv() if in_time else None
        except (EOFError, OSError):
            answer = None
        if answer is None:
            worker.process.kill()
            worker.process.join()
            del self._workers[i]
            if not in_time:
                raise TookTooLongError(f"took longer than {self._timeout_s:g} s")
            raise WorkerDiedError(_how_it_ended(worker.process.exitcode))
        return answer


@dataclass(frozen=True, kw_only=True)
class _Worker:
    process: Any  # multiprocessing's SpawnProcess
    pipe: Connection[Any, Any]


def _start_worker() -> _Worker:
    mine, its = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_work, args=(its,), daemon=True)
    process.start()
    its.close()  # so that the worker holds the only other end, and its death is an end of file
    return _Worker(process=process, pipe=mine)


def _work(pipe: Connection[Any, Any]) -> None:
    """A worker's life: tasks in, results out, until its parent closes the pipe or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted, and stops its workers itself
    threading.Thread(target=_leave_with_the_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        pipe.send("ready")
        while True:
            fn, args, kwargs = pipe.recv()
            try:
                answer = (True, fn(*args, **kwargs))
            except Exception as error:
                answer = (False, error)
            pipe.send(answer)


def _leave_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _how_it_ended(exit_status: int | None) -> str:
    if exit_status is not None and exit_status < 0:
        with contextlib.suppress(ValueError):
            return f"its worker was killed by {signal.Signals(-exit_status).name}"
    return f"its worker ended with status {exit_status}"


@contextlib.contextmanager
def processes(num_workers: int | None = None, timeout_s: float | None = None) -> Iterator[Workers]:
    """Workers on this machine, by default one for each core that this process may use."""
    num = num_workers or _num_cores()
    executor = Processes(num, timeout_s)
    try:
        yield Workers(executor=executor, num_workers=num, max_attempts=MAX_ATTEMPTS)
    except BaseException:
        executor.shutdown(wait=True, cancel_futures=True)
        raise
    executor.shutdown()


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def dask(address: str | None = None, scheduler_file: str | None = None) -> Iterator[Workers]:
    """The workers of a Dask scheduler that runs already, by its address or by the file that it wrote.

    Raises InputError where distributed is not installed, the scheduler is not reached, or a worker has other versions
    of what makes the numbers.
    """
    owner = "--dask-address" if address else "--dask-scheduler-file"
    try:
        from distributed import Client
    except ImportError:
        rule, hint = "needs the package distributed", "Install the extra moesim[dask]."
        raise InputError(owner, "", rule, "it is not installed", hint) from None
    try:
        client = Client(address, scheduler_file=scheduler_file, timeout=DASK_TIMEOUT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        rule = f"must lead to a scheduler within {DASK_TIMEOUT_S} s"
        raise InputError(owner, "", rule, address or scheduler_file, type(error).__name__) from None
    with client:
        num = _checked_workers(client, owner)

        def check_reachable() -> None:
            if client.status != "running":
                raise MoesimError(f"{owner}: the Dask scheduler was lost; start it anew and add --resume")

        executor = client.get_executor(pure=False)
        try:
            yield Workers(
                executor=executor,
                num_workers=num,
                max_attempts=1,  # Dask itself tries on other workers (distributed.scheduler.allowed-failures)
                blames_company=True,
                check_reachable=check_reachable,
            )
        except BaseException:
            executor.shutdown(wait=False)
            raise
        executor.shutdown()


def _checked_workers(client: Any, owner: str) -> int:
    """The number of a scheduler's threads; every worker must compute as this machine would."""
    try:
        client.wait_for_workers(1, timeout=DASK_TIMEOUT_S)
    except Exception:  # distributed's and asyncio's own kinds of being too late
        raise InputError(owner, "", "must have workers", f"none within {DASK_TIMEOUT_S} s") from None
    here = versions()
    try:
        there = client.run(versions)
    except Exception as error:  # such as a worker without moesim
        raise InputError(owner, "", "its workers must have moesim", f"{type(error).__name__}: {error}") from None
    for worker, found in there.items():
        check(found == here, f"{owner}: {worker}", "versions", f"must be those of this machine, {here}", found)
    return sum(client.nthreads().values())
