"""Nonsense on the command line: one named error on one line, status 2, nothing on stdout, no traceback."""

from pathlib import Path

import numpy as np
import pytest

from tests.test_cli_runs import moesim

SMALL = ["--model", "olmoe-1b-7b", "--cluster", "h100-8x-ib400", "--num-gpus", "16", "--ep", "8", "--pp", "2"]
SMALL += ["--seq-len", "512", "--global-batch", "32"]
SIMULATE = [
    ("--gini 0.96", "gini: must lie in 0..0.95; got 0.96"),
    ("--gini nan", "gini: must be a number"),
    ("--capacity-factor -1", "capacity_factor: must be positive, or null for dropless"),
    ("--ep 7", "ep=7 does not divide"),
    ("--num-gpus 12", "num_gpus: must fill whole nodes of 8"),
    ("--num-gpus 99999999999", "num_gpus: must not exceed 1000000"),
    ("--global-batch 31", "global_batch: must be a multiple of micro_batch*dp"),
    ("--seq-len 999999999", "popularity: balanced needs no counting"),
    ("--policy serch", "Did you mean search?"),
    ("--num-slots 65", "num_slots: must be a multiple of num_ranks=8; got 65. Nearest: 64, 72."),
    ("--num-slots 8000000", "num_slots: must not exceed every expert on every expert-parallel rank, 512"),
    ("--policy map", "map: must name a file where policy is map"),
    ("--policy map --map empty.json", "must hold exactly one of physical_to_logical_map"),
    ("--policy map --map half.json", "half.json: line 1: must be valid JSON"),
    ("--precision fp4", "precision: must be bf16 or fp8"),
    ("--profile nope.json", "nope.json: must exist"),
    ("--seed 1.5", "--seed: must be a whole number"),
    ("--set foo", "must read key=value or group.key=value"),
    ("--set routing=3", "scenario.routing: must be a mapping of names to values"),
    ("--set routing.pad_to_capacity=true", "pad_to_capacity: needs a capacity_factor"),
    ("--set routing.popularity={kind:zipf}", "routing.popularity"),
    ("-p epp 3", "epp: is not a parameter; got 3. Did you mean"),
    ("--bogus", "No such option: --bogus"),
    ("half.yaml", "half.yaml: line 2: must be valid YAML"),
    ("twice.yaml", "twice.yaml: line 2: the same key stands twice"),
    ("unknown.yaml", "unknown.yaml: routin: is an unknown key; got {}. Did you mean routing?"),
    ("loads.npy", "loads.npy: must be text in UTF-8"),
]
ROUTE = [
    ("--recorded garbage.npy", "garbage.npy: must be a .npy file of version 1 or 2"),
    ("--recorded loads.npy", "loads.npy: shape: must be (tokens, layers, experts per token)"),
    ("--recorded nope", "must end in .npy, .npz, .safetensors, .jsonl"),
    ("--wanted-drop 1", "wanted_drop_fraction: must be at least 0, and below 1; got 1.0"),
    ("--replay 5", "--replay: needs a folder to write into (--out)"),
    ("--popularity hot_experts", "num_hot: is required"),
    ("--gini 0.94", "gini: must stay below 1 - k/E = 0.875 (top-8 of 64 experts)"),
]
PLACE = [
    ("--loads nan.npy --num-gpus 2", "nan.npy: values: must be finite"),
    ("--loads loads.npy", "--num-gpus: is required with --loads"),
    ("--loads loads.npy --num-gpus 3 --num-slots 16", "--num-slots: must be a multiple of the 3 GPUs"),
    ("--loads loads.npy --num-gpus 4 --num-nodes 3", "num_nodes: must divide num_ranks=4"),
    ("--loads loads.npy --num-gpus 4 --policy eplbb", "Did you mean eplb"),
    ("--loads loads.npy --num-gpus 4 --previous empty.json", "must hold exactly one of physical_to_logical_map"),
    ("--loads loads.npy --num-gpus 4 --ep 4", "--loads: stands without a scenario"),
    ("--loads loads.npy --num-gpus 100000000", "layers x GPUs x experts: must not exceed"),
    ("SMALL --num-slots 0", "--num-slots: must be at least the number of experts, 64; got 0"),
    ("SMALL --num-nodes 2", "--num-nodes: goes with --loads"),
]
CASES = [("simulate", f"SMALL {typed}", words) for typed, words in SIMULATE]
CASES += [("route", f"SMALL {typed}", words) for typed, words in ROUTE]
CASES += [("place", typed, words) for typed, words in PLACE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("nonsense")
    np.save(made / "loads.npy", np.ones((2, 16)))
    np.save(made / "nan.npy", np.array([[1.0, np.nan]]))
    (made / "garbage.npy").write_bytes(b"garbage")
    (made / "empty.json").write_text("{}")
    (made / "half.json").write_text("[1,")
    (made / "half.yaml").write_text("model: [1,2\n")
    (made / "twice.yaml").write_text("model: a\nmodel: b\n")
    (made / "unknown.yaml").write_text("model: olmoe-1b-7b\ncluster: h100-8x-ib400\nroutin: {}\n")
    return made


@pytest.mark.parametrize(("verb", "typed", "words"), CASES, ids=[f"{verb} {typed}" for verb, typed, _ in CASES])
def test_nonsense_is_refused_on_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, verb: str, typed: str, words: str
) -> None:
    monkeypatch.chdir(folder)
    arguments = [part for text in typed.split() for part in (SMALL if text == "SMALL" else [text])]
    status, out, err = moesim(verb, *arguments)
    assert (status, out) == (2, ""), err
    assert words in err
    assert err.startswith("moesim: error: ")
    assert len(err.splitlines()) == 1
