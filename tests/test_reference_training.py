"""Training: it learns, it can be killed at any moment, its tables say what happened, and moesim reads them."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from moesim.routing.consistency import agreement_of  # noqa: E402
from moesim.routing.histogram import read_histogram  # noqa: E402
from moesim.routing.recorded import read_recorded  # noqa: E402
from moesim.routing.statistics import max_vio  # noqa: E402
from reference_model.experiments import EXPERIMENTS, run_experiment, run_live  # noqa: E402
from reference_model.routers import SWITCH_TOP_1, NoisyTopK, SoftmaxTopK  # noqa: E402
from reference_model.runs import append_rows, cut_tables, read_run, read_runs, read_table, table_sizes  # noqa: E402
from reference_model.text import (  # noqa: E402
    DOMAINS,
    build_corpus,
    code_documents,
    heldout_batch,
    is_held_out,
    prose_documents,
    table_documents,
    train_batch,
)
from reference_model.train import CHECKPOINT, TrainConfig, _draws_of_step, flipped_share, small_config, train  # noqa: E402
from reference_model.transformer import forward_flops_per_token  # noqa: E402

TEXT = build_corpus()
TINY: dict[str, Any] = {
    "num_sequences": 3,
    "seq_len": 16,
    "warmup_steps": 2,
    "log_every": 1,
    "histogram_every": 4,
    "evaluate_every": 5,
    "heldout_per_domain": 2,
}


def tiny(num_steps: int = 10, **changes: Any) -> TrainConfig:
    return small_config(num_steps=num_steps, **(TINY | changes))


def with_moe(config: TrainConfig, **changes: Any) -> TrainConfig:
    assert config.model.moe is not None
    model = dataclasses.replace(config.model, moe=dataclasses.replace(config.model.moe, **changes))
    return dataclasses.replace(config, model=model)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Sums in one order, whatever else the machine does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def files_of(folder: Path) -> dict[str, bytes]:
    """What a run leaves, without the date and duration of run.json and without the container of the checkpoint."""
    kept = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".csv", ".npz")}
    saved = torch.load(folder / CHECKPOINT, weights_only=True)
    kept |= {name: value.numpy().tobytes() for name, value in saved["model"].items()}
    for number, values in saved["optimizer"]["state"].items():
        kept |= {f"optimizer {number} {name}": value.numpy().tobytes() for name, value in values.items()}
    return kept


# ---------------------------------------------------------------------------------------------------------------- text


@pytest.fixture(scope="module")
def documents() -> dict[str, list[tuple[str, str]]]:
    return {"code": list(code_documents()), "prose": list(prose_documents()), "tables": list(table_documents())}


def test_no_paragraph_and_no_document_is_both_trained_on_and_held_out(
    documents: dict[str, list[tuple[str, str]]],
) -> None:
    sides: dict[bool, set[str]] = {False: set(), True: set()}
    for name, text in documents["prose"]:
        sides[is_held_out(name)] |= {"".join(part.lower().split()) for part in text.split("\n\n")}
    assert len(sides[True]) > 100
    assert sides[False] & sides[True] <= {""}
    names = [name for of in documents.values() for name, _ in of]
    assert len(set(names)) == len(names)


def test_a_tenth_of_the_documents_of_each_domain_is_held_out(documents: dict[str, list[tuple[str, str]]]) -> None:
    for of_domain in documents.values():
        held = [is_held_out(name) for name, _ in of_domain]
        assert 0.04 < np.mean(held) < 0.2


def test_the_same_installation_gives_the_same_text() -> None:
    again = build_corpus.__wrapped__()
    assert again.fingerprint == TEXT.fingerprint
    assert all(part.size > 100_000 for part in TEXT.train)
    assert all(part.size > 1_000 for part in TEXT.heldout)


def test_a_corpus_too_small_to_hold_anything_out_is_refused() -> None:
    with pytest.raises(ValueError, match="leave no held-out document of code; take more"):
        build_corpus(5_000)


def test_a_batch_is_a_function_of_seed_and_step_and_domains_take_turns() -> None:
    asked: dict[str, Any] = {"num_sequences": 4, "seq_len": 8}
    first = train_batch(TEXT, seed=3, step=7, **asked)
    assert np.array_equal(first.tokens_BS, train_batch(TEXT, seed=3, step=7, **asked).tokens_BS)
    assert not np.array_equal(first.tokens_BS, train_batch(TEXT, seed=4, step=7, **asked).tokens_BS)
    turns = np.concatenate([train_batch(TEXT, seed=0, step=step, **asked).domain_B for step in range(3)])
    assert np.bincount(turns).tolist() == [4, 4, 4]


def test_batches_are_cut_from_the_domain_that_they_name() -> None:
    batch = heldout_batch(TEXT, sequences_per_domain=3, seq_len=20)
    assert batch.domain_B.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for tokens_S, domain in zip(batch.tokens_BS, batch.domain_B, strict=True):
        assert bytes(tokens_S.astype(np.uint8)) in TEXT.heldout[domain].tobytes()


# ------------------------------------------------------------------------------------------------------------ the loop


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupted."""
    torch.set_num_threads(1)
    return train(tiny(routing_every=5), tmp_path_factory.mktemp("runs") / "whole-s0", seed=0, corpus=TEXT)


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(whole: Path, tmp_path: Path) -> None:
    for stop in (3, 5, 6, None):
        train(tiny(routing_every=5), tmp_path, seed=0, corpus=TEXT, stop_after=stop)
    assert files_of(tmp_path) == files_of(whole)


class Killed(BaseException):
    pass


def test_what_a_killed_run_wrote_after_its_checkpoint_is_cut_off_and_written_again(whole: Path, tmp_path: Path) -> None:
    def kill(step: int, _loss: float) -> None:
        if step == 7:
            raise Killed

    with pytest.raises(Killed):  # the checkpoint is that of step 4; rows up to step 7 and half a row lie in the tables
        train(tiny(routing_every=5, checkpoint_every=4), tmp_path, seed=0, corpus=TEXT, progress=kill)
    assert read_table(tmp_path / "metrics.csv")["step"][-1] == 7
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("8,0.00")
    (tmp_path / f".{CHECKPOINT}.part").write_bytes(b"half a checkpoint")
    train(tiny(routing_every=5, checkpoint_every=4), tmp_path, seed=0, corpus=TEXT)
    assert files_of(tmp_path) == files_of(whole)


def test_a_run_killed_before_its_first_checkpoint_starts_afresh(whole: Path, tmp_path: Path) -> None:
    tmp_path.joinpath("heldout.csv").write_text("step,loss\n0,5.5")
    train(tiny(routing_every=5), tmp_path, seed=0, corpus=TEXT)
    assert files_of(tmp_path) == files_of(whole)


@pytest.mark.parametrize("router", [NoisyTopK(top_k=2), SoftmaxTopK(top_k=2, bias=True)], ids=["noisy", "bias"])
def test_routers_with_noise_or_a_bias_resume_bit_for_bit_too(router: Any, tmp_path: Path) -> None:
    config = with_moe(tiny(6, bias_rate=0.01), router=router)
    train(config, tmp_path / "a", corpus=TEXT)
    train(config, tmp_path / "b", corpus=TEXT, stop_after=3)
    torch.manual_seed(99)  # what others draw in between is nothing to us
    train(config, tmp_path / "b", corpus=TEXT)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_each_step_of_each_seed_has_its_own_noise_and_leaves_the_default_generator_alone() -> None:
    drawn = {}
    torch.manual_seed(5)
    untouched = torch.get_rng_state()
    for seed, step in ((0, 0), (0, 1), (1, 0)):
        for _ in range(2):
            with _draws_of_step(seed, step):
                drawn.setdefault((seed, step), []).append(torch.rand(4).tolist())
    assert all(first == again for first, again in drawn.values())
    assert len({tuple(first) for first, _ in drawn.values()}) == 3
    assert torch.equal(torch.get_rng_state(), untouched)


def test_a_run_draws_its_noise_by_its_seed_and_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def note(seed: int, step: int) -> Any:
        asked.append((seed, step))
        return _draws_of_step(seed, step)

    monkeypatch.setattr("reference_model.train._draws_of_step", note)
    train(tiny(3), tmp_path, seed=4, corpus=TEXT)
    assert asked == [(4, 0), (4, 1), (4, 2)]


def test_a_folder_of_another_run_is_refused_by_what_differs(tmp_path: Path) -> None:
    train(tiny(2), tmp_path, seed=0, corpus=TEXT)
    with pytest.raises(ValueError, match="another run: its seed differ"):
        train(tiny(2), tmp_path, seed=1, corpus=TEXT)
    with pytest.raises(ValueError, match="another run: its config differ"):
        train(tiny(3), tmp_path, seed=0, corpus=TEXT)
    with pytest.raises(ValueError, match="another run: its text differ"):
        train(tiny(2), tmp_path, seed=0, corpus=dataclasses.replace(TEXT, fingerprint="other"))


@pytest.mark.slow
def test_a_process_killed_again_and_again_ends_with_the_same_files(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "reference_model.train", "--steps", "30", "--folder"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([*command, str(tmp_path / "whole")], check=True, env=environment, stdout=subprocess.DEVNULL)
    torn, kills = tmp_path / "torn", 0
    while kills < 3:
        process = subprocess.Popen([*command, str(torn)], env=environment, stdout=subprocess.DEVNULL)
        done = read_table(torn / "metrics.csv").get("step", np.zeros(1))[-1]
        while process.poll() is None:
            time.sleep(0.05)
            if (torn / "metrics.csv").exists() and kills < 3 and _rows(torn) > done + 0.5:
                time.sleep(0.02 * kills)
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
        assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    subprocess.run([*command, str(torn)], check=True, env=environment, stdout=subprocess.DEVNULL)
    assert files_of(torn) == files_of(tmp_path / "whole")


def _rows(folder: Path) -> int:
    """Steps of the last whole row of metrics.csv."""
    lines = (folder / "metrics.csv").read_text().split("\n")[1:-1]
    return int(lines[-1].split(",")[0]) if lines else 0


# ---------------------------------------------------------------------------------------------------------- the tables


def test_tables_agree_with_each_other_and_with_moesims_statistics(whole: Path) -> None:
    run = read_run(whole)
    assert (run.variant, run.seed, run.moe_layers) == ("whole", 0, (1, 3))
    assert run.metrics["step"].tolist() == list(range(1, 11))
    assert run.heldout["step"].tolist() == [0, 5, 10]
    domains = [run.metrics[f"loss_{name}"] for name in DOMAINS]
    np.testing.assert_allclose(np.mean(domains, axis=0), run.metrics["loss"], rtol=1e-4)
    histogram = read_histogram(whole / "histogram.csv", num_experts=24)
    assert histogram.steps_S.tolist() == [4, 8]
    assert histogram.layers == (1, 3)
    assert (histogram.tokens_SLE.sum(axis=2) == 4 * 3 * 16 * 2).all()
    assert run.facts["forward_flops_per_token"] == forward_flops_per_token(tiny().model, 16)
    assert run.facts["text"] == TEXT.fingerprint
    assert json.loads((whole / "run.json").read_text())["torch"] == torch.__version__


def test_a_single_steps_max_vio_is_that_of_its_histogram(tmp_path: Path) -> None:
    run = read_run(train(tiny(2, histogram_every=1), tmp_path / "x-s0", corpus=TEXT))
    counts_SLE = read_histogram(tmp_path / "x-s0" / "histogram.csv", num_experts=24).tokens_SLE
    for column, layer in enumerate(run.moe_layers):
        np.testing.assert_allclose(run.metrics[f"max_vio_{layer}"], max_vio(counts_SLE[:, column]), rtol=1e-5)


def test_recorded_routing_is_read_by_moesim_and_is_of_the_same_tokens(whole: Path) -> None:
    run = read_run(whole)
    assert [step for step, _ in run.routing] == [0, 5, 10]
    first, last = (read_recorded(run.routing[i][1]) for i in (0, -1))
    assert first.layers == (1, 3)
    assert first.num_tokens == len(DOMAINS) * 2 * 16
    agreed = agreement_of(first, last)
    assert (agreed.overlap_L < 1.0).any()
    assert agreement_of(first, first).exact_L.tolist() == [1.0, 1.0]


def test_drops_are_counted_against_what_was_chosen(tmp_path: Path) -> None:
    config = with_moe(tiny(2), capacity_factor=0.5)
    run = read_run(train(config, tmp_path / "x-s0", corpus=TEXT))
    assert (run.metrics["dropped_1"] >= 0.5 - 1e-6).all()
    assert (run.metrics["dropped_1"] < 1.0).all()
    free = read_run(train(tiny(2), tmp_path / "y-s0", corpus=TEXT))
    assert free.metrics["dropped_1"].tolist() == [0.0, 0.0]


def test_a_cut_table_ends_where_its_checkpoint_says(tmp_path: Path) -> None:
    append_rows(tmp_path / "metrics.csv", [{"step": 1, "loss": 0.25}])
    sizes = table_sizes(tmp_path)
    append_rows(tmp_path / "metrics.csv", [{"step": 2, "loss": float("nan")}])
    assert np.isnan(read_table(tmp_path / "metrics.csv")["loss"][-1])
    cut_tables(tmp_path, sizes)
    assert (tmp_path / "metrics.csv").read_text() == "step,loss\n1,0.25\n"
    (tmp_path / "metrics.csv").write_text("step,loss\n")
    with pytest.raises(ValueError, match="fewer than the 17 its checkpoint noted"):
        cut_tables(tmp_path, sizes)


# -------------------------------------------------------------------------------------------------------- what it does


def test_it_learns_more_than_how_frequent_each_byte_is(tmp_path: Path) -> None:
    config = tiny(60, num_sequences=6, seq_len=32, log_every=20, evaluate_every=60, heldout_per_domain=20)
    loss = read_run(train(config, tmp_path / "x-s0", corpus=TEXT)).heldout["loss"]
    share_E = np.bincount(np.concatenate(TEXT.train), minlength=256) / sum(part.size for part in TEXT.train)
    targets = heldout_batch(TEXT, sequences_per_domain=20, seq_len=32).tokens_BS[:, 1:]
    by_frequency = -np.log(np.maximum(share_E, 1e-9))[targets].mean()
    assert loss[-1] < by_frequency - 0.2 < loss[0]


def test_the_bias_moves_against_the_load_and_only_where_asked(tmp_path: Path) -> None:
    for rate in (0.0, 0.01):
        config = with_moe(tiny(1, bias_rate=rate, histogram_every=1), router=SoftmaxTopK(top_k=2, bias=True))
        folder = train(config, tmp_path / f"{rate}", corpus=TEXT)
        bias_E = torch.load(folder / CHECKPOINT, weights_only=True)["model"]["blocks.1.ffn.router_bias"]
        counts_E = read_histogram(folder / "histogram.csv", num_experts=24).tokens_SLE[0, 0]
        np.testing.assert_allclose(bias_E, rate * np.sign(counts_E.mean() - counts_E), rtol=1e-6)


def test_flips_are_counted_against_the_same_product_in_float64() -> None:
    x = torch.randn(400, 32, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    logits = x @ weight.T
    assert flipped_share(x, weight, logits, 2) == 0.0
    rounded = flipped_share(x, weight, (x.bfloat16() @ weight.T.bfloat16()).float(), 2)
    assert 0.0 < rounded < 0.1
    assert flipped_share(x, weight, -logits, 2) > 0.9


def test_a_step_that_overflows_is_noted_and_changes_no_weight(tmp_path: Path) -> None:
    config = tiny(3, precision="float16", loss_scale=1e9, checkpoint_every=1)
    folder = train(config, tmp_path / "x-s0", corpus=TEXT)
    run = read_run(folder)
    assert run.metrics["overflowed"].tolist() == [1, 1, 1]
    assert run.heldout["loss"][0] == run.heldout["loss"][-1]


def test_top_1_without_normalisation_trains_its_router(tmp_path: Path) -> None:
    config = with_moe(tiny(1, balance_weight=0.0, z_weight=0.0), router=SWITCH_TOP_1)
    folder = train(config, tmp_path, corpus=TEXT)
    moments = torch.load(folder / CHECKPOINT, weights_only=True)["optimizer"]["state"]
    sizes = [tuple(values["exp_avg"].shape) for values in moments.values()]
    router = list(moments.values())[sizes.index((24, 32))]
    assert router["exp_avg"].abs().max() > 0


# ---------------------------------------------------------------------------------------------------- the experiments


def test_every_variant_of_an_experiment_costs_a_token_the_same_flops() -> None:
    for name, variants in EXPERIMENTS.items():
        configs = variants().values()
        assert len({forward_flops_per_token(config.model, config.seq_len) for config in configs}) == 1, name
        assert len({(config.num_steps, config.num_sequences, config.learning_rate) for config in configs}) == 1, name


def test_an_experiment_skips_what_is_done_and_goes_on_with_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"a": tiny(2, dense=True), "b": tiny(2)}
    monkeypatch.setitem(EXPERIMENTS, "small", lambda: small)  # type: ignore[arg-type]
    monkeypatch.setattr("reference_model.train.build_corpus", lambda: TEXT)
    said: list[str] = []
    run_experiment("small", tmp_path, seeds=(0,), say=said.append)
    run_experiment("small", tmp_path, seeds=(0, 1), say=said.append)
    assert [line.split("/")[-1].split(":")[0] for line in said] == ["a-s0", "b-s0", "a-s1", "b-s1"]
    runs = read_runs("small", tmp_path)
    assert {variant: [run.seed for run in of] for variant, of in runs.items()} == {"a": [0, 1], "b": [0, 1]}
    assert not list(tmp_path.rglob(CHECKPOINT))


def test_a_live_run_repeats_the_first_steps_of_the_same_recorded_run(tmp_path: Path) -> None:
    live = run_live(tmp_path / "live", num_steps=3, variants=("auxiliary",))["auxiliary"]
    again = run_live(tmp_path / "again", num_steps=3, variants=("auxiliary",))["auxiliary"]
    assert live.heldout["step"].tolist() == [0, 1, 2, 3]
    assert np.array_equal(live.heldout["loss"], again.heldout["loss"])
    assert live.facts["steps_done"] == 3


def test_a_device_that_is_not_there_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        train(tiny(1), tmp_path / "run", device="cuda", corpus=TEXT)
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none")
def test_a_run_on_the_gpu_starts_with_the_cpus_loss_and_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    folder = train(tiny(4), tmp_path / "gpu-s0", device="cuda", corpus=TEXT, stop_after=2)
    run = read_run(train(tiny(4), folder, device="cuda", corpus=TEXT))
    plain = read_run(train(tiny(4), tmp_path / "cpu-s0", corpus=TEXT))
    np.testing.assert_allclose(run.heldout["loss"][0], plain.heldout["loss"][0], rtol=1e-4)
    assert run.facts["processor"] == torch.cuda.get_device_name()
