"""Recorded routing: every form reads back the same, every malformed file is refused by name, nothing is held whole.

Closed forms are small recordings counted by hand or by plain loops.
"""

from __future__ import annotations

import importlib.util
import io
import json
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesim.describe.model import Router
from moesim.door.arrays import open_arrays, write_array
from moesim.errors import InputError, MoesimError
from moesim.placement import Placement, contiguous
from moesim.routing.histogram import (
    recorded_histogram,
)
from moesim.routing.recorded import (
    RecordedRouting,
    inclusion_LE,
    load_LE,
    read_recorded,
    recorded_from_array,
    recorded_popularities,
    recorded_visits,
    write_recorded,
)
from moesim.routing.visits import visit_probabilities

FORMS = (".npy", ".npz", ".safetensors", ".jsonl")
HAS_PYARROW = importlib.util.find_spec("pyarrow") is not None
needs_pyarrow = pytest.mark.skipif(not HAS_PYARROW, reason="parquet needs pyarrow, which is not installed")


def replay(tokens: int = 60, layers: int = 3, top_k: int = 2, experts: int = 8, seed: int = 0) -> np.ndarray:
    """Router-replay ids of random tokens with uneven experts, none twice in a token."""
    rng = np.random.default_rng(seed)
    score = rng.gumbel(size=(tokens, layers, experts)) + 0.5 * rng.standard_normal((layers, experts))
    return np.argsort(-score, axis=2)[:, :, :top_k]


def whole(recorded: RecordedRouting) -> np.ndarray:
    return np.concatenate([chunk.experts_TLK for chunk in recorded.chunks()])


def refusal_of(act: Callable[[], object]) -> str:
    with pytest.raises(InputError) as refusal:
        act()
    return str(refusal.value)


def npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def safetensors_bytes(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


# --- forms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_recording_reads_back_the_same_in_every_form(tmp_path: Path, form: str) -> None:
    ids = replay()
    recorded = recorded_from_array(ids, num_experts=8, layers=(1, 4, 5), tokens_per_step=25)
    path = tmp_path / f"trace{form}"
    write_recorded(recorded, path)
    back = read_recorded(path, num_experts=8)
    assert np.array_equal(whole(back), ids)
    assert (back.num_tokens, back.top_k, back.num_layers) == (60, 2, 3)
    if form != ".npy":
        back = read_recorded(path)  # the other forms say how many experts there are
        assert (back.num_experts, back.layers) == (8, (1, 4, 5))
        assert back.steps_S.tolist() == [0, 1, 2]
        assert back.tokens_of_step_S.tolist() == [25, 25, 10]
    assert [name.name for name in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("dtype", ["u1", "i1", "<i2", ">i4", "<u2", "<i8", ">u8"])
def test_ids_of_any_whole_type_and_byte_order_are_read(tmp_path: Path, dtype: str) -> None:
    ids = replay().astype(dtype)
    np.save(tmp_path / "trace.npy", ids)
    np.savez_compressed(tmp_path / "trace.npz", routed_experts=ids, logits=np.zeros(3))
    for name in ("trace.npy", "trace.npz"):
        assert np.array_equal(whole(read_recorded(tmp_path / name, num_experts=8)), ids.astype(int))


def test_safetensors_of_their_own_package_are_read_and_ours_by_it(tmp_path: Path) -> None:
    package = pytest.importorskip("safetensors.numpy")
    ids = replay().astype(np.int32)
    package.save_file(
        {"routed_experts": ids, "other": np.ones(3)}, tmp_path / "theirs.safetensors", {"num_experts": "8"}
    )
    assert np.array_equal(whole(read_recorded(tmp_path / "theirs.safetensors")), ids)
    write_recorded(recorded_from_array(ids, num_experts=8), tmp_path / "ours.safetensors")
    assert np.array_equal(package.load_file(tmp_path / "ours.safetensors")["routed_experts"], ids)


def test_the_named_array_is_read_where_a_file_holds_several(tmp_path: Path) -> None:
    np.savez(tmp_path / "trace.npz", a=replay(seed=1), b=replay(seed=2))
    assert np.array_equal(whole(read_recorded(tmp_path / "trace.npz", num_experts=8, array="b")), replay(seed=2))
    text = refusal_of(lambda: read_recorded(tmp_path / "trace.npz", num_experts=8))
    assert "must hold 'routed_experts', or one array only" in text
    assert "must be an array of the file" in refusal_of(
        lambda: read_recorded(tmp_path / "trace.npz", num_experts=8, array="c")
    )


def test_json_lines_number_their_passes_or_are_numbered(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"step": 3, "routed_experts": [[[0, 1]]]}\n\n{"step": 3, "routed_experts": [[[2, 1]]], "rank": 5}\n'
        '{"routed_experts": []}\n{"step": 9, "routed_experts": [[[1, 0]], [[3, 0]]]}\n'
    )
    recorded = read_recorded(path, num_experts=4)
    assert recorded.steps_S.tolist() == [3, 4, 9]
    assert recorded.tokens_of_step_S.tolist() == [2, 0, 2]
    assert recorded_histogram(recorded).tokens_SLE[:, 0].tolist() == [[1, 2, 1, 0], [0, 0, 0, 0], [2, 1, 0, 1]]


# --- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [".npy", ".npz", ".safetensors"])
def test_a_recording_is_never_held_whole(tmp_path: Path, form: str) -> None:
    shape = (1_000_000, 4, 8)  # 64 MB of ids
    block = (np.arange(50_000 * 32).reshape(50_000, 4, 8) % 8 + 8 * (np.arange(50_000) % 4)[:, None, None]).astype(
        np.int16
    )
    path = tmp_path / f"large{form}"
    tracemalloc.start()
    try:
        write_array(path, (block for _ in range(20)), name="routed_experts", shape=shape, dtype=np.dtype(np.int16))
        recorded = read_recorded(path, num_experts=32)
        write_recorded(recorded, tmp_path / f"again{form}")
        total = load_LE(recorded)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total.tolist() == [[250_000] * 32] * 4
    # Blocks of 8 MB, a sorted copy, and their counts as 8-byte numbers: about half the file, whatever its length.
    assert peak_bytes < 40e6


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[[0, 8]]], "expert ids must lie in 0..7; got 'id 8 at token 0, layer 0'"),
        ([[[0, 1]], [[-1, 1]]], "got 'id -1 at token 1, layer 0'. Leave out tokens that were not routed."),
        ([[[0, 1]], [[3, 3]]], "a token takes an expert once; got '[3, 3] at token 1, layer 0'"),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_bad_ids_are_refused_with_their_place(tmp_path: Path, form: str, ids: list[Any], message: str) -> None:
    path = tmp_path / f"trace{form}"
    array = np.array(ids, dtype=np.int32)
    if form == ".jsonl":
        path.write_text(json.dumps({"routed_experts": ids}) + "\n")
    else:
        write_array(path, [array], name="routed_experts", shape=array.shape, dtype=array.dtype)
    text = refusal_of(lambda: load_LE(read_recorded(path, num_experts=8)))
    assert text.startswith(str(path))
    assert message in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy_bytes(replay().astype(float)), "dtype: must hold whole numbers; got 'float64'"),
        (npy_bytes(np.full((2, 1, 1), np.nan)), "dtype: must hold whole numbers; got 'float64'"),
        (npy_bytes(replay() > 3), "must hold whole numbers; got 'bool'"),
        (npy_bytes(np.array([{"a": 1}])), "must hold plain numbers"),
        (npy_bytes(replay()[0]), "must be (tokens, layers, experts per token); got (3, 2)"),
        (npy_bytes(np.asfortranarray(replay())), "must be stored row by row (C order)"),
        (npy_bytes(replay())[:-1], "must hold the 2880 bytes its header promises; got '2879 bytes'"),
        (npy_bytes(replay()) + b"x", "must hold the 2880 bytes its header promises; got '2881 bytes'"),
        (npy_bytes(replay())[:20], "must be a .npy file of version 1 or 2"),
        (b"not an array", "must be a .npy file of version 1 or 2"),
        (npy_bytes(np.empty((0, 3, 2), dtype=int)), "tokens: must be at least one; got 0"),
        (npy_bytes(np.empty((3, 0, 2), dtype=int)), "layers: must be at least one; got 0"),
        (npy_bytes(replay(top_k=8, experts=8)[:, :, [0] * 9]), "must lie in 1..num_experts=8; got 9"),
    ],
)
def test_a_malformed_npy_recording_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "trace.npy"
    path.write_bytes(content)
    assert message in refusal_of(lambda: load_LE(read_recorded(path, num_experts=8)))


def test_an_archive_that_is_not_sound_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"

    def archive(members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as file:
            for name, content in members:
                file.writestr(name, content)
        return buffer.getvalue()

    good = archive([("routed_experts.npy", npy_bytes(replay()))])
    flipped = bytearray(good)
    flipped[good.index(npy_bytes(replay())[-40:])] ^= 1  # one bit of one id: only the checksum can tell
    cases = [
        (b"PK nonsense", "must be a sound .npz archive"),
        (good[: len(good) // 2], "must be a sound .npz archive"),
        (bytes(flipped), "Bad CRC-32"),
        (archive([("a.txt", b"hello")]), "a.txt: must be a .npy member"),
        (archive([("a.npy", npy_bytes(replay())[:-8])]), "a: must hold the 2880 bytes its header promises"),
        (archive([("a.npy", npy_bytes(replay()))], zipfile.ZIP_BZIP2), "a: must be stored or deflated"),
        (archive([("a.npy", npy_bytes(np.array([None])))]), "a: must hold plain numbers"),
        (archive([]), "must hold 'routed_experts', or one array only; got []"),
    ]
    for content, message in cases:
        path.write_bytes(content)
        assert message in refusal_of(lambda: load_LE(read_recorded(path, num_experts=16)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x01", "must start with the length of its header; got '1 bytes'"),
        (safetensors_bytes({}, length=2**63), "header length: must not exceed"),
        (safetensors_bytes(b"\xff\xfe"), "header: must be UTF-8"),
        (safetensors_bytes([1]), "header: must be a JSON mapping"),
        (safetensors_bytes(b'{"a": NaN}'), "numbers must be finite"),
        (safetensors_bytes(b'{"a": 1, "a": 2}'), "the same key stands twice"),
        (safetensors_bytes({"a": {"dtype": "I64"}}), "a: must hold ['data_offsets', 'dtype', 'shape']"),
        (safetensors_bytes({"a": {"dtype": "X", "shape": [1], "data_offsets": [0, 1]}}), "a.dtype: must be one of I8"),
        (
            safetensors_bytes({"a": {"dtype": "I8", "shape": [1, 1, -1], "data_offsets": [0, 1]}}),
            "a.shape: must be at most 8 sizes, none negative",
        ),
        (
            safetensors_bytes({"a": {"dtype": "I8", "shape": [1, 1, 3], "data_offsets": [0, 2]}}, b"ab"),
            "a.data_offsets: must span the 3 bytes of its shape",
        ),
        (
            safetensors_bytes({"a": {"dtype": "I8", "shape": [1, 1, 2], "data_offsets": [1, 3]}}, b"abc"),
            "a.data_offsets: must follow the tensor before it, at byte 0",
        ),
        (
            safetensors_bytes({"a": {"dtype": "I8", "shape": [1, 1, 2], "data_offsets": [0, 2]}}, b"a"),
            "must hold the 2 bytes its header promises; got '1 bytes'",
        ),
        (
            safetensors_bytes({"a": {"dtype": "BF16", "shape": [1, 1, 1], "data_offsets": [0, 2]}}, b"ab"),
            "dtype: must hold whole numbers",
        ),
        (
            safetensors_bytes(
                {
                    "__metadata__": {"layers": "[0, 1.5]"},
                    "a": {"dtype": "I8", "shape": [1, 1, 1], "data_offsets": [0, 1]},
                },
                b"\0",
            ),
            "layers: must be an array of whole numbers",
        ),
        (
            safetensors_bytes(
                {
                    "__metadata__": {"layers": "[0, 2]"},
                    "a": {"dtype": "I8", "shape": [1, 1, 1], "data_offsets": [0, 1]},
                },
                b"\0",
            ),
            "layers: must number the 1 layers of the array; got [0, 2]",
        ),
    ],
)
def test_a_malformed_safetensors_recording_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "trace.safetensors"
    path.write_bytes(content)
    assert message in refusal_of(lambda: load_LE(read_recorded(path, num_experts=8)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]\n", "line 1: must be a mapping with 'routed_experts'"),
        ('{"step": 1}\n', "line 1: must be a mapping with 'routed_experts'"),
        ('{"routed_experts": [[[0, NaN]]]}\n', "numbers must be finite; got 'NaN'"),
        ('{"routed_experts": [[[0, 1.5]]]}\n', "line 1: routed_experts: must be an array of whole numbers"),
        ('{"routed_experts": [[[0, 1]], [[0]]]}\n', "got 'lists of unequal lengths'"),
        ('{"routed_experts": [[0, 1]]}\n', "shape: must be (tokens, layers, experts per token); got (1, 2)"),
        ('{"routed_experts": [[["a"]]]}\n', "routed_experts: must be an array of whole numbers"),
        ('{"routed_experts": [[[0, 1]]]}\n{"routed_experts": [[[0]]]}\n', "pass 1: must be (tokens, 1, 2)"),
        ('{"routed_experts": [[[0, 1]]]\n', "line 1: line 1: must be valid JSON"),
        (
            '{"step": 4, "routed_experts": [[[0, 1]]]}\n{"step": 2, "routed_experts": [[[0, 1]]]}\n',
            "steps: must be rising step numbers",
        ),
        ('{"step": -1, "routed_experts": [[[0, 1]]]}\n', "step: must be at least 0; got -1"),
        (
            '{"num_experts": 8, "routed_experts": [[[0, 1]]]}\n{"num_experts": 9, "routed_experts": [[[0, 1]]]}\n',
            "num_experts: must be the same in every line",
        ),
        ('{"num_experts": 16, "routed_experts": [[[0, 1]]]}\n', "num_experts: must be the 8 of the model; got 16"),
        ('{"layers": [3, 1], "routed_experts": [[[0], [1]]]}\n', "layers: must be rising layer numbers"),
        ("", "tokens: must be at least one"),
    ],
)
def test_malformed_json_lines_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    assert message in refusal_of(lambda: load_LE(read_recorded(path, num_experts=8)))


def test_experts_that_nobody_chose_are_never_guessed(tmp_path: Path) -> None:
    np.save(tmp_path / "trace.npy", replay())
    assert "num_experts: must be given, the file does not say it" in refusal_of(
        lambda: read_recorded(tmp_path / "trace.npy")
    )


def test_steps_that_do_not_add_up_to_the_tokens_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "trace.npz", routed_experts=replay(), tokens_of_step=np.array([10, 20]))
    text = refusal_of(lambda: read_recorded(tmp_path / "trace.npz", num_experts=8))
    assert "tokens_of_step: must sum to the 60 tokens of the array; got 30" in text


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.npy"
    np.save(path, replay())
    recorded = read_recorded(path, num_experts=8)
    path.write_bytes(path.read_bytes()[:-100])
    assert "was cut short while it was read" in refusal_of(lambda: load_LE(recorded))


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    bad = recorded_from_array(np.array([[[0, 9]]]), num_experts=4)
    for form in FORMS:
        refusal_of(lambda form=form: write_recorded(bad, tmp_path / f"trace{form}"))
    assert list(tmp_path.iterdir()) == []
    assert "must end in" in refusal_of(lambda: write_recorded(bad, tmp_path / "trace.pt"))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_recordings_read_or_are_refused(tmp_path: Path, data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(FORMS))
    path = tmp_path / f"trace{form}"
    write_recorded(recorded_from_array(replay(tokens=4), num_experts=8), path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    path.write_bytes(bytes(content))
    try:
        recorded = read_recorded(path, num_experts=8)
        assert load_LE(recorded).sum() == recorded.num_tokens * recorded.num_layers * recorded.top_k
    except MoesimError:
        pass


# --- what a recording says ---------------------------------------------------------------------------------------


def test_load_counts_every_assignment() -> None:
    ids = replay()
    counted = np.zeros((3, 8), dtype=int)
    for token in ids:
        for layer, chosen in enumerate(token):
            counted[layer, chosen] += 1
    recorded = recorded_from_array(ids, num_experts=8)
    assert np.array_equal(load_LE(recorded), counted)
    assert inclusion_LE(recorded).sum(axis=1) == pytest.approx([2.0] * 3)


def test_recorded_visits_are_counted_token_by_token() -> None:
    ids = replay(tokens=40, layers=2, top_k=4, experts=16)
    placement = Placement(expert_to_rank_E=np.random.default_rng(3).permutation(np.arange(16) // 4), num_ranks=4)
    node_of_rank = np.array([7, 7, 2, 2])
    visits = recorded_visits(recorded_from_array(ids, num_experts=16), placement, node_of_rank)
    for layer in range(2):
        ranks = [set(placement.expert_to_rank_E[token].tolist()) for token in ids[:, layer]]
        for rank in range(4):
            assert visits.rank_visits_LR[layer, rank] == pytest.approx(np.mean([rank in seen for seen in ranks]))
        nodes = [{visits.node_of_rank_R[rank] for rank in seen} for seen in ranks]
        for node in range(2):
            assert visits.node_visits_LN[layer, node] == pytest.approx(np.mean([node in seen for seen in nodes]))


def test_a_recording_is_a_popularity_whose_load_and_visits_are_its_own() -> None:
    recorded = recorded_from_array(replay(tokens=500, top_k=4, experts=16), num_experts=16)
    router = Router(top_k=4, num_groups=4, top_groups=2)
    popularities = recorded_popularities(recorded, router, rng=np.random.default_rng(0))
    assert np.array_equal(popularities.inclusion_LE, inclusion_LE(recorded))
    assert not popularities.is_uniform
    ours = visit_probabilities(popularities, contiguous(16, 4), np.array([0, 0, 1, 1]))
    counted = recorded_visits(recorded, contiguous(16, 4), np.array([0, 0, 1, 1]))
    assert ours.rank_visits_LR == pytest.approx(counted.rank_visits_LR)
    assert ours.node_visits_LN == pytest.approx(counted.node_visits_LN)


def test_a_long_recording_is_sampled_for_its_visits_and_counted_in_full_for_its_load() -> None:
    recorded = recorded_from_array(replay(tokens=20_000, top_k=2), num_experts=8)
    popularities = recorded_popularities(recorded, Router(top_k=2), rng=np.random.default_rng(0), pool_tokens=4000)
    assert popularities.pool_LTK is not None
    assert popularities.pool_LTK.shape == (3, 4000, 2)
    assert np.array_equal(popularities.inclusion_LE, inclusion_LE(recorded))
    sampled = visit_probabilities(popularities, contiguous(8, 4))
    counted = recorded_visits(recorded, contiguous(8, 4))
    # Five standard errors of a share of 4,000 tokens.
    assert sampled.rank_visits_LR == pytest.approx(counted.rank_visits_LR, abs=5 * 0.5 / np.sqrt(4000))
    again = recorded_popularities(recorded, Router(top_k=2), rng=np.random.default_rng(0), pool_tokens=4000)
    assert np.array_equal(again.pool_LTK, popularities.pool_LTK)


def test_a_perfectly_even_recording_is_not_taken_for_equal_experts() -> None:
    ids = np.array([[[0, 1]], [[2, 3]]] * 10)  # even load, but 0 and 1 always go together
    popularities = recorded_popularities(
        recorded_from_array(ids, num_experts=4), Router(top_k=2), rng=np.random.default_rng(0)
    )
    assert not popularities.is_uniform
    assert visit_probabilities(popularities, contiguous(4, 2)).rank_visits_LR.tolist() == [[0.5, 0.5]]


def test_a_router_with_another_top_k_is_refused() -> None:
    recorded = recorded_from_array(replay(), num_experts=8)
    text = refusal_of(lambda: recorded_popularities(recorded, Router(top_k=4), rng=np.random.default_rng(0)))
    assert "experts per token: must be 4; got 2" in text


def test_an_array_file_lists_what_it_holds(tmp_path: Path) -> None:
    np.savez(tmp_path / "trace.npz", routed_experts=replay(), scalar=np.array(3))
    file = open_arrays(tmp_path / "trace.npz")
    assert {name: stream.shape for name, stream in file.arrays.items()} == {"routed_experts": (60, 3, 2), "scalar": ()}
    assert int(file["scalar"].read()) == 3
