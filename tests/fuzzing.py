"""Mutated input files, and the commands that read them, under limits of time, memory and place. Run as a program:
``python -m tests.fuzzing KIND NUM FOLDER``; tests/test_fuzz.py does.

Files are made from good ones by wrong values, lost and unknown keys, damaged bytes, odd shapes and types. Whatever is
in a file, a command may end with 0, 1 or 2 (one named error), within 5 s of processor time (the wall tells of other
work as well), within 1 GiB beyond what the program itself takes, and writes in its output folder only. Sweeps compute
in this process, under the same limits; that processes die is tests/test_sweep_kills.py's concern.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from moesim.cli import app
from moesim.errors import MoesimError
from moesim.scenario import Scenario
from moesim.study import sweep_workers
from moesim.study.validate import read_design
from tests.sweep_fakes import Inline

MAX_CPU_S, MAX_WALL_S, MAX_BYTES = 5.0, 60, 2**30
SMALL = ["--model", "olmoe-1b-7b", "--cluster", "h100-8x-ib400", "--num-gpus", "8", "--ep", "8"]
SMALL += ["--seq-len", "64", "--global-batch", "8"]
SCENARIO: Mapping[str, Any] = {
    "schema": 1,
    "model": "olmoe-1b-7b",
    "cluster": "h100-8x-ib400",
    "num_gpus": 8,
    "parallel": {"tp": 1, "pp": 1, "vpp": 1, "cp": 1, "ep": 8, "etp": 1, "zero": 1},
    "train": {"seq_len": 64, "micro_batch": 1, "global_batch": 8, "precision": "bf16", "recompute": ["moe_act"]},
    "routing": {"popularity": {"kind": "lognormal", "gini": 0.25}, "capacity_factor": 1.25, "dispatcher": "alltoall"},
    "placement": {"policy": "search", "num_slots": 72, "rank_speeds": {"3": 0.8, "4-5": 0.5}},
    "seed": 0,
}
DESIGN: Mapping[str, Any] = {
    "schema": 1,
    "name": "mine",
    "hidden": 1024,
    "num_layers": 8,
    "vocab": 32000,
    "attention": {"kind": "gqa", "num_heads": 16, "num_kv_heads": 4},
    "ffn": {"width": 2816},
    "moe": {"every": 2, "num_experts": 16, "top_k": 2, "width": 1408, "shared_width": 1408},
    "dense_first_layers": 1,
}
GATED: Mapping[str, Any] = {
    "schema": 1,
    "name": "small",
    "scenario": {name: value for name, value in SCENARIO.items() if name != "schema"},
    "gates": {"mfu": {"limit": 0.01}, "dropped": {"limit": 0.5}, "memory_headroom": {"limit": 0.05, "warn": 0.1}},
}
GRID: Mapping[str, Any] = {
    "base": {name: value for name, value in SCENARIO.items() if name != "schema"},
    "grid": {"ep": [4, 8], "capacity_factor": [None, 1.5], "routing.popularity.gini": [0.1, 0.3]},
    "points": [{"seed": 1}, {"seed": 2, "pp": 2}],
}
PROFILE = json.loads((Path(__file__).parent.parent / "moesim/catalog/profiles/cpu-xeon-2-threads.json").read_text())
PROFILE["points"] = PROFILE["points"][:12]
PROFILE["device"] |= {"kind": "cuda", "name": "NVIDIA H100 80GB HBM3"}
PROFILE["dtype"] = "bfloat16"
NASTY: list[Any] = [None, True, "", "x", 0, -1, 1, 3, 0.5, -0.0, 1e308, 1e-308, 2**62, 2**63, 10**40, [], {}, [[]]]
NASTY += ["nan", "../../x", "/dev/zero", "/dev/stdin", "pipe", ".", "\0", "é" * 50, "1e999", "0x10", "null", "balanced"]
NASTY += [[1] * 40, {"kind": "zipf"}, {"kind": "recorded", "file": "/dev/zero"}, {"a": {"b": {"c": 1}}}, "450 GB/s"]


@st.composite
def damaged_trees(draw: st.DrawFn, good: Mapping[str, Any]) -> Any:
    """A plain value like good, with one to three things wrong."""
    tree = json.loads(json.dumps(good))
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        at, parent, key = tree, None, None
        while isinstance(at, (dict, list)) and at and (parent is None or draw(st.integers(0, 3))):
            parent, key = at, draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
            at = at[key]
        if parent is None:
            break
        how = draw(st.integers(0, 9))
        if how == 0:
            del parent[key]
        elif how == 1 and isinstance(parent, dict):
            parent[draw(st.text(max_size=6))] = copy.deepcopy(draw(st.sampled_from(NASTY)))
        elif how <= 5 and isinstance(at, (int, float)):
            parent[key] = draw(st.one_of(st.integers(-4, 200), st.floats(allow_nan=False, width=16)))
        else:
            parent[key] = copy.deepcopy(draw(st.sampled_from(NASTY)))
    return tree


@st.composite
def damaged_texts(draw: st.DrawFn, good: Mapping[str, Any]) -> bytes:
    """A file of such a value, in one of four its bytes damaged too."""
    content = json.dumps(draw(damaged_trees(good))).encode()
    return draw(damaged_bytes(content)) if draw(st.integers(0, 3)) == 0 else content


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """content cut, with bytes changed, left out, put in or said twice."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        how = draw(st.integers(0, 4))
        if how == 0 and data:
            data[at] = draw(st.integers(0, 255))
        elif how == 1:
            del data[at : at + draw(st.integers(1, 40))]
        elif how == 2:
            data[at:at] = draw(st.binary(max_size=20))
        elif how == 3:
            data[at:at] = data[at : at + 60]
        else:
            del data[at:]
    return bytes(data)


@st.composite
def damaged_arrays(draw: st.DrawFn, near: Callable[[np.random.Generator], np.ndarray], suffix: str = ".npy") -> bytes:
    """An array file: most like a good one with values changed, some of any shape, type and order, or damaged bytes."""
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    if draw(st.integers(0, 3)):
        array = near(rng).astype(draw(st.sampled_from(["i8", "i4", "u1", "f4"])))
        for _ in range(draw(st.integers(0, 2))):
            array.flat[draw(st.integers(0, array.size - 1))] = draw(st.sampled_from([0, 1, 63, 64, 100, 255]))
    else:
        shape = draw(st.lists(st.integers(0, 20), max_size=5))
        kind = draw(st.sampled_from(["i4", "i8", "u1", "u8", "f8", "f2", "?", "c8", "U3", "M8[s]", ">i8", "i2"]))
        array = rng.integers(0, 100, size=shape).astype(kind, order=draw(st.sampled_from(["C", "F"])))
    if array.dtype.kind == "f" and array.size and draw(st.booleans()):
        array.flat[0] = draw(st.sampled_from([np.nan, np.inf, -1.0, 6e4]))
    file = io.BytesIO()
    if suffix == ".npz":
        np.savez(file, **{draw(st.sampled_from(["routed_experts", "x"])): array})
    elif suffix == ".safetensors":
        kinds = {"i8": "I64", "i4": "I32", "u1": "U8", "f4": "F32"}
        described = {
            "dtype": kinds.get(array.dtype.str[1:], "I16"),
            "shape": array.shape,
            "data_offsets": [0, array.nbytes],
        }
        header = json.dumps(draw(st.one_of(st.just({"x": described}), damaged_trees({"x": described})))).encode()
        file.write(len(header).to_bytes(8, "little") + header + array.tobytes())
    else:
        np.lib.format.write_array(file, array, version=draw(st.sampled_from([(1, 0), (2, 0), (3, 0)])))
    content = file.getvalue()
    return content if draw(st.integers(0, 2)) else draw(damaged_bytes(content))


@st.composite
def damaged_tables(draw: st.DrawFn, rows: Sequence[str]) -> bytes:
    """A CSV with cells changed, in one of four its bytes damaged too."""
    cells = [row.split(",") for row in rows]
    for _ in range(draw(st.integers(1, 3))):
        row = draw(st.sampled_from(cells))
        row[draw(st.integers(0, len(row) - 1))] = str(draw(st.sampled_from(NASTY)))
    content = "".join(",".join(row) + "\n" for row in cells).encode()
    return content if draw(st.integers(0, 3)) else draw(damaged_bytes(content))


@st.composite
def damaged_lines(draw: st.DrawFn, good: Sequence[Mapping[str, Any]]) -> bytes:
    """JSON lines of which one is damaged."""
    at = draw(st.integers(0, len(good) - 1))
    lines = [json.dumps(line).encode() for line in good]
    lines[at] = draw(damaged_texts(good[at]))
    return b"".join(line + b"\n" for line in lines)


def good_routing(rng: np.random.Generator) -> np.ndarray:
    """Tokens x OLMoE's layers x its top-k, a token's experts all different."""
    return rng.random((20, 16, 64)).argsort(axis=2)[:, :, :8]


def good_loads(rng: np.random.Generator) -> np.ndarray:
    """Layers x experts."""
    return rng.integers(0, 200, size=(2, 16))


def good_bytes(rng: np.random.Generator) -> np.ndarray:
    """Ranks x ranks."""
    return rng.integers(0, 200, size=(8, 8))


ROWS = [f"0,{layer},{expert},{7 + expert}" for layer in range(16) for expert in range(64)]
HISTOGRAM = ["step,layer,expert,tokens", *ROWS]
LINES = [{"step": step, "routed_experts": good_routing(np.random.default_rng(step))[:3].tolist()} for step in range(3)]


def scenarios() -> st.SearchStrategy[tuple[str, bytes]]:
    return st.tuples(st.just("scenario.yaml"), damaged_texts(SCENARIO))


def designs() -> st.SearchStrategy[tuple[str, bytes]]:
    return st.one_of(
        st.tuples(st.sampled_from(["design.yaml", "design.json"]), damaged_texts(DESIGN)),
        st.tuples(st.just("gated.yaml"), damaged_texts(GATED)),
    )


def grids() -> st.SearchStrategy[tuple[str, bytes]]:
    return st.tuples(st.just("grid.yaml"), damaged_texts(GRID))


def traces() -> st.SearchStrategy[tuple[str, bytes]]:
    arrays = [(f"t{suffix}", damaged_arrays(good_routing, suffix)) for suffix in (".npy", ".npz", ".safetensors")]
    texts = [("t.csv", damaged_tables(HISTOGRAM)), ("t.jsonl", damaged_lines(LINES))]
    return st.one_of(st.tuples(st.just(name), contents) for name, contents in [*arrays, *texts])


def profiles() -> st.SearchStrategy[tuple[str, bytes]]:
    return st.tuples(st.just("profile.json"), damaged_texts(PROFILE))


def arrays() -> st.SearchStrategy[tuple[str, bytes]]:
    return st.one_of(
        st.tuples(st.just("loads.npy"), damaged_arrays(good_loads)),
        st.tuples(st.just("bytes.npy"), damaged_arrays(good_bytes)),
    )


def is_small(read: Callable[[], Scenario]) -> bool:
    """Whether a scenario is one that a fuzzed run has the time for: a refusal is, and what is near the good one."""
    try:
        asked = read()
    except MoesimError:
        return True
    tokens = asked.train.global_batch * asked.train.seq_len
    return asked.cluster.num_gpus <= 64 and tokens <= 2**14 and len(asked.model.layers) <= 64


def scenario_command(file: str) -> list[str]:
    small = is_small(lambda: Scenario.from_file(file))
    return ["simulate", file, *(["--out", "out"] if small else ["--set", "seed=-1"])]


def design_command(file: str) -> list[str]:
    """A model's design is described, a whole one with its gates validated."""
    if not file.startswith("gated"):
        return ["describe", file, "--out", "out"]
    small = is_small(lambda: read_design(file).scenario)
    return ["validate", file, *(["--out", "out"] if small else ["--set", "seed=-1"])]


def array_command(file: str) -> list[str]:
    if file == "bytes.npy":
        return ["alltoall", "--bytes", file, "--cluster", "h100-8x-ib400", "--out", "out"]
    return ["place", "--loads", file, "--num-gpus", "4", "--policy", "eplb", "--out", "out"]


COMMANDS: Mapping[str, tuple[Callable[[], Any], Callable[[str], list[str]]]] = {
    "scenario": (scenarios, scenario_command),
    "design": (designs, design_command),
    "grid": (grids, lambda file: ["sweep", file, "--by", "sizes", "--workers", "1", "--out", "out/sweep"]),
    "trace": (traces, lambda file: ["route", *SMALL, "--recorded", file, "--out", "out"]),
    "profile": (profiles, lambda file: ["simulate", *SMALL, "--profile", file, "--out", "out"]),
    "npy": (arrays, array_command),
}


def watch_writes(allowed: Path) -> list[str]:
    """A list that grows by every path that this process opens for writing, makes, or renames to elsewhere."""
    found: list[str] = []
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND

    def note(path: object) -> None:
        if isinstance(path, (str, bytes, os.PathLike)):
            where = Path(os.path.abspath(os.fsdecode(path)))
            if (
                allowed not in (where, *where.parents)
                and "__pycache__" not in where.parts
                and where != Path(os.devnull)
            ):
                found.append(str(where))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if (event == "open" and isinstance(arguments[2], int) and arguments[2] & writing) or event in (
            "os.mkdir",
            "os.remove",
            "os.rmdir",
        ):
            note(arguments[0])
        elif event in ("os.rename", "os.link", "os.symlink"):
            note(arguments[1])

    sys.addaudithook(hook)
    return found


def limit_memory() -> None:
    """From here on this process may take MAX_BYTES more."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MAX_BYTES, taken + MAX_BYTES))


def fuzz(kind: str, num: int, folder: Path) -> None:
    strategy, command = COMMANDS[kind]
    os.chdir(folder)
    Path("out").mkdir()
    os.mkfifo("pipe")  # who opens it, waits for ever
    sweep_workers.processes = lambda *_: contextlib.nullcontext(  # type: ignore[assignment]
        sweep_workers.Workers(executor=Inline(), num_workers=1, max_attempts=1)
    )
    warm(kind, command)
    limit_memory()
    writes = watch_writes(folder / "out")
    seen: dict[int, int] = {}

    @settings(max_examples=num, deadline=None, database=None, derandomize=True, suppress_health_check=[*HealthCheck])
    @given(strategy())
    def one(case: tuple[str, bytes]) -> None:
        name, content = case
        with open(name, "wb") as file:
            file.write(content)
        writes.clear()
        signal.alarm(MAX_WALL_S)
        began_s = time.process_time()
        done = CliRunner().invoke(app, command(name))
        took_s = time.process_time() - began_s
        signal.alarm(0)
        assert done.exit_code in (0, 1, 2), (done.exit_code, done.stderr, content)
        assert done.exit_code != 2 or done.stderr.startswith("moesim: error: "), done.stderr
        assert took_s < MAX_CPU_S, (took_s, content)
        assert not writes, (writes, content)
        seen[done.exit_code] = seen.get(done.exit_code, 0) + 1
        shutil.rmtree("out/sweep", ignore_errors=True)

    one()
    print(json.dumps(seen))


def warm(kind: str, command: Callable[[str], list[str]]) -> None:
    """Run the command once on each good file, so that what it loads and compiles is there before limits hold."""
    rng = np.random.default_rng(0)
    good: Mapping[str, Mapping[str, Any]] = {
        "scenario": {"good.yaml": SCENARIO},
        "design": {"good.yaml": DESIGN, "gated.yaml": GATED},
        "grid": {"good.yaml": GRID},
        "trace": {"good.npy": good_routing(rng)},
        "profile": {"good.json": PROFILE},
        "npy": {"loads.npy": good_loads(rng), "bytes.npy": good_bytes(rng)},
    }
    for name, content in good[kind].items():
        if isinstance(content, np.ndarray):
            np.save(name, content)
        else:
            Path(name).write_text(json.dumps(content))
        done = CliRunner().invoke(app, command(name))
        assert done.exit_code in (0, 1), done.stderr  # 1: a gate that failed
    shutil.rmtree("out/sweep", ignore_errors=True)


if __name__ == "__main__":
    fuzz(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]).resolve())
