"""Timing one call honestly: warm, on cold data, after the device is done, many times.

A stand-alone kernel timed on the same buffers over and over reads them from cache, which a training step never does. So
every sample takes the next views of one large *arena*, larger than the cache, and comes round only after all of it.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Call = Callable[[], object]
_MIB = 2**20
_CPU_ARENA_BYTES = (64 * _MIB, 1024 * _MIB)  # at least, and at most: a virtual machine reports its host's whole cache
_GPU_SLEEP_CYCLES = 1_500_000  # about 0.8 ms of the GPU, so that the host is ahead when the timed kernels start
_MOST_CALLS_AHEAD = 16
_STIRRED_BYTES = 4 * _MIB  # read, and as many written, before each sample on a CPU
_MALLOC_TRIM_THRESHOLD, _MALLOC_MMAP_MAX = -1, -4  # glibc's numbers of these two settings (malloc.h)
_MOST_BUDGETS = 5  # a case may take this many times its budget where the machine is disturbed


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long to measure: passes over all cases (so that a slow minute of the machine spoils one pass, not one case),
    samples per case and pass, seconds after which a case has enough of them, further passes over those cases whose two
    best passes still disagree, and seconds after which nothing is timed a second time."""

    num_passes: int
    min_samples: int
    max_samples: int
    budget_s: float
    num_warmups: int = 2
    num_extra_passes: int = 4
    limit_s: float = math.inf


class Arena:
    """One large filled buffer that hands out views in turn, the least recently used memory first.

    With the first one on a CPU the process begins to keep what it frees: see ``keep_freed_memory``.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, num_bytes: int) -> None:
        if device.type == "cpu":
            keep_freed_memory()
        block = torch.randn(min(num_bytes, 8 * _MIB) // dtype.itemsize, device=device).to(dtype)
        self._flat = block.repeat(math.ceil(num_bytes / (block.numel() * dtype.itemsize)))
        self._next = 0
        self.device, self.dtype, self.num_bytes = device, dtype, self._flat.numel() * dtype.itemsize

    def take(self, *shape: int) -> Tensor:
        """The next view of this shape, a fresh leaf without gradient; starts on a 256-byte border."""
        count = math.prod(shape)
        assert count <= self._flat.numel(), f"{shape} exceeds the arena"
        if self._next + count > self._flat.numel():
            self._next = 0
        view = self._flat[self._next : self._next + count].view(*shape)
        step = 256 // self.dtype.itemsize
        self._next += -(-count // step) * step
        return view.detach()


def keep_freed_memory() -> bool:
    """From here on this process keeps the memory that it frees, as a GPU's caching allocator does; whether it can.

    glibc gives large blocks back to the kernel or keeps them, as its heap happens to stand, and a block taken anew
    costs a page fault for every 4 KiB: a third of a small layer's backward, of a product alone nothing. See
    docs/decisions/kept-memory.md.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:  # another C library
        return False
    return bool(set_option(_MALLOC_MMAP_MAX, 0) and set_option(_MALLOC_TRIM_THRESHOLD, -1))


def arena_bytes(device: torch.device, largest_case_bytes: int) -> int:
    """Bytes that outlast the cache: twice the last-level cache, and room for the largest case at least twice."""
    wanted = 2 * cache_bytes(device)
    if device.type == "cpu":
        wanted = min(max(wanted, _CPU_ARENA_BYTES[0]), _CPU_ARENA_BYTES[1])
    return max(wanted, 2 * largest_case_bytes)


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache, 0 when nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * 1024 for size in sizes if size.endswith("K") and size[:-1].isdigit()), default=0)


def calls_ahead(device: torch.device, case_bytes: int) -> int:
    """How many calls to prepare before the first is timed: a backward's preparation runs its forward, which leaves its
    operands in the cache, until those of as many other calls as fill the cache have gone through it."""
    return min(_MOST_CALLS_AHEAD, 1 + cache_bytes(device) // max(1, case_bytes))


def sample_times_s(prepare: Callable[[], Call], device: torch.device, effort: Effort, ahead: int = 1) -> list[float]:
    """Seconds of each of several calls. ``prepare`` (not timed) gives the next on cold data, ``ahead`` at a time."""
    stir = stirrer(device)
    for _ in range(effort.num_warmups):
        prepare()()
    samples: list[float] = []
    ready: list[Call] = []
    while len(samples) < effort.max_samples:
        if not ready:
            ready = [prepare() for _ in range(ahead)]
            ready.reverse()  # the first prepared is the coldest, and the first to go
        call = ready.pop()
        stir()
        samples.append(sample_call_s(call, device))
        del call
        # By the fastest sample: a disturbed stretch must not end with few samples, all of them disturbed.
        enough = len(samples) * min(samples) >= effort.budget_s or sum(samples) >= _MOST_BUDGETS * effort.budget_s
        if enough and len(samples) >= effort.min_samples:
            break
    return samples


def stirrer(device: torch.device) -> Callable[[], object]:
    """What runs before each sample: on a CPU a copy, which leaves little of the sample's own code in its caches."""
    if device.type == "cuda":
        return lambda: None  # its kernels wait behind the sleep
    source, target = torch.zeros(2, _STIRRED_BYTES // 4)
    return lambda: target.copy_(source)


def sample_call_s(call: Call, device: torch.device) -> float:
    """Seconds of one call, once."""
    return _gpu_sample_s(call) if device.type == "cuda" else _cpu_sample_s(call)


def _cpu_sample_s(call: Call) -> float:
    start = time.perf_counter()
    kept = call()
    seconds = time.perf_counter() - start
    del kept  # freeing the result is not part of the call
    return seconds


def _gpu_sample_s(call: Call) -> float:
    """Device time between two events; the GPU sleeps first, so the host's launches are not part of it."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(_GPU_SLEEP_CYCLES)
    start.record()
    kept = call()
    end.record()
    end.synchronize()
    del kept
    return start.elapsed_time(end) / 1e3


def host_overhead_s(device: torch.device, num_calls: int = 1000, num_repeats: int = 7) -> float:
    """Seconds the host spends per operation when it does nothing else: tiny operations in a row, median of repeats."""
    tiny = torch.zeros(1, device=device)
    times = []
    for _ in range(num_repeats):
        _synchronise(device)
        start = time.perf_counter()
        for _ in range(num_calls):
            tiny.add_(1.0)
        _synchronise(device)
        times.append((time.perf_counter() - start) / num_calls)
    return sorted(times)[num_repeats // 2]


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_description(device: torch.device) -> dict[str, object]:
    """What identifies the device and its software, and nothing of the host: see ``profile_schema.DEVICE_FIELDS``."""
    cuda = device.type == "cuda"
    return {
        "kind": device.type,
        "name": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "driver": _nvidia_driver() if cuda else "",
        "runtime": f"CUDA {torch.version.cuda}" if cuda else "",
        "torch_version": torch.__version__,
        "num_threads": torch.get_num_threads(),
        "cache_bytes": cache_bytes(device),
        "memory_bytes": int(torch.cuda.get_device_properties(device).total_memory) if cuda else _memory_bytes(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unnamed CPU"


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def _nvidia_driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.split()[0] if answer.split() else ""
