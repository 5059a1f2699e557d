"""The training notebook: what its study computes, what its figures and sentences say, that it renders whole."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch")

from moesim.cli import app  # noqa: E402
from moesim.errors import InputError  # noqa: E402
from moesim.report import training_figures, training_sentences, training_tables, training_words  # noqa: E402
from moesim.report.parameters import find_notebook, parameters_of  # noqa: E402
from moesim.report.runner import run_notebook  # noqa: E402
from moesim.study.training import (  # noqa: E402
    DENSE,
    MOE,
    Comparison,
    Spread,
    TrainingStudy,
    compare,
    load_curve,
    loss_curve,
    precision_row,
    training_study,
    usage_map,
)
from reference_model.experiments import EXPERIMENTS, SEEDS, run_live  # noqa: E402
from reference_model.runs import NAMES, RECORDED, read_runs  # noqa: E402
from tests.notebook_cases import SMOKE, loads_nothing  # noqa: E402

NAME = "50_quality_vs_active_flops"
NOTEBOOK = find_notebook(NAME)


# ---------------------------------------------------------------------------------------- the study, on runs made up


@dataclass(frozen=True, kw_only=True)
class MadeUp:
    """A run whose numbers are known."""

    variant: str
    seed: int = 0
    losses: Sequence[float] = (5.0, 3.0, 2.0)
    loads: Sequence[Sequence[int]] = ((5, 5, 5, 5), (10, 5, 5, 0))  # windows x experts, of one layer
    flips: Sequence[float] = (0.5, 0.1, 0.2)
    overflowed: Sequence[int] = (0, 0, 0)
    top_k: int = 1
    routing: tuple[tuple[int, Path], ...] = ()
    moe_layers: tuple[int, ...] = (1,)
    facts: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        moe = {"router": {"top_k": self.top_k}, "router_in_float32": False}
        config = {"model": {"moe": moe}, "precision": "bfloat16", "z_weight": 0.0, "seq_len": 4}
        sizes = {"parameters_by_part": {"head": 10, "experts": 20}, "active_parameters": 15}
        object.__setattr__(self, "facts", {"config": config, **sizes, "forward_flops_per_token": 60.0})

    @property
    def heldout(self) -> dict[str, Any]:
        losses = np.array(self.losses)
        return {"step": np.array([0.0, 10.0, 20.0]), "loss": losses, "loss_code": losses - 1.0} | {
            "flipped_1": np.array(self.flips)
        }

    @property
    def metrics(self) -> dict[str, Any]:
        return {"step": np.array([1.0, 10.0, 20.0]), "overflowed": np.array(self.overflowed)} | {
            "largest_logit_1": np.array([1.0, 4.0, 2.0])
        }

    @property
    def histogram(self) -> dict[str, Any]:
        rows = [(10 * (s + 1), 1, e, n) for s, loads in enumerate(self.loads) for e, n in enumerate(loads)]
        return dict(zip(("step", "layer", "expert", "tokens"), np.array(rows, dtype=float).T, strict=True))


def test_variants_are_compared_seed_by_seed_not_mean_by_mean() -> None:
    first = [MadeUp(variant="a", seed=s, losses=(5.0, 3.0, last)) for s, last in ((0, 2.0), (1, 1.0), (7, 9.0))]
    other = [MadeUp(variant="b", seed=s, losses=(5.0, 4.0, last)) for s, last in ((1, 3.0), (0, 2.5))]
    found = compare(first, other)
    assert found.difference == Spread(mean=-1.25, low=-2.0, high=-0.5, num_seeds=2)
    assert found.difference_by_domain["code"] == found.difference
    # Seed 0 reaches 2.5 halfway between 3.0 and 2.0, so after 15 of 20 steps; seed 1 has 3.0 after 10.
    assert found.match_fraction == Spread(mean=0.625, low=0.5, high=0.75, num_seeds=2)
    with pytest.raises(InputError, match="a and b: must share a seed"):
        compare([MadeUp(variant="a", seed=5)], other)


def test_a_run_that_never_reaches_the_others_loss_has_no_match() -> None:
    found = compare([MadeUp(variant="a", losses=(5, 4, 3))], [MadeUp(variant="b", losses=(5, 3, 2))])
    assert (found.match_fraction, found.num_matching) == (None, 0)
    assert found.difference.mean == 1.0


def test_the_load_curve_counts_busy_dead_and_collapsed_experts() -> None:
    runs = [MadeUp(variant="a"), MadeUp(variant="a", seed=1, loads=((5, 5, 5, 5), (20, 0, 0, 0)))]
    curve = load_curve("a", runs)
    assert curve.max_vio_NS.tolist() == [[0.0, 1.0], [0.0, 3.0]]
    assert curve.num_dead_NS.tolist() == [[0, 1], [0, 3]]
    assert curve.busiest_share_NS.tolist() == [[0.25, 0.5], [0.25, 1.0]]
    assert curve.num_collapsed_N.tolist() == [0, 1]  # half of the tokens is not over half
    assert curve.num_experts == 4
    two = load_curve("a", [MadeUp(variant="a", top_k=2)])
    assert two.busiest_share_NS.tolist() == [[0.5, 1.0]]  # every token can choose two
    assert usage_map(runs[1], 1).ratio_SE.tolist() == [[1, 1, 1, 1], [4, 0, 0, 0]]


def test_precision_leaves_the_untrained_model_out_and_finds_the_first_overflow() -> None:
    row = precision_row("x", [MadeUp(variant="x"), MadeUp(variant="x", seed=1, overflowed=(0, 1, 1))])
    assert row.flipped.mean == pytest.approx(0.15)
    assert row.largest_logit.mean == 4.0
    assert row.overflow_steps == (None, 10)


def test_the_loss_curve_keeps_every_seed() -> None:
    curve = loss_curve("a", [MadeUp(variant="a"), MadeUp(variant="a", seed=1, losses=(6, 4, 3))])
    assert curve.last == Spread(mean=2.5, low=2.0, high=3.0, num_seeds=2)
    assert curve.last_by_domain["code"].mean == 1.5
    assert (curve.total_parameters, curve.active_parameters, curve.flops_per_token) == (30, 15, 60.0)


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(-0.3, -0.1, "0.200 nats per byte below"), (0.1, 0.3, "0.200 nats per byte above"), (-0.1, 0.3, "seeds disagree")],
)
def test_the_title_says_what_the_seeds_agree_on_and_no_more(low: float, high: float, words: str) -> None:
    spread = Spread(mean=(low + high) / 2, low=low, high=high, num_seeds=3)
    gain = Comparison(
        first=MOE, other=DENSE, difference=spread, difference_by_domain={}, match_fraction=None, num_matching=0
    )
    assert words in training_words.gain_title(gain)


def test_missing_runs_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="quality: must hold finished runs of auxiliary"):
        training_study(quality={"dense": [MadeUp(variant="dense")]}, collapse={}, precision={})


# --------------------------------------------------------------------------------------------------- the recorded runs


@pytest.fixture(scope="module")
def study() -> TrainingStudy:
    return training_study(**{name: read_runs(name) for name in EXPERIMENTS})


def test_every_recorded_run_is_finished_and_of_the_configuration_named() -> None:
    assert tuple(EXPERIMENTS) == NAMES
    for name, variants in EXPERIMENTS.items():
        runs = read_runs(name)
        assert set(runs) == set(variants())
        for variant, config in variants().items():
            assert [run.seed for run in runs[variant]] == list(SEEDS)
            for run in runs[variant]:
                assert run.facts["config"] == json.loads(json.dumps(config.written()))
                assert run.facts["steps_done"] == config.num_steps


def test_recorded_runs_saw_the_same_text_and_weigh_little() -> None:
    runs = [run for name in EXPERIMENTS for of in read_runs(name).values() for run in of]
    assert len({run.facts["text"] for run in runs}) == 1
    assert {run.facts["threads"] for run in runs} == {1}
    assert sum(path.stat().st_size for path in RECORDED.rglob("*.*")) < 1_500_000


def test_figures_and_sentences_say_the_studys_numbers(study: TrainingStudy) -> None:
    gain = study.gain
    text = training_sentences.about_quality(study).text
    assert training_words.signed(gain.difference.low) in text
    assert training_words.gain_title(gain) in training_figures.quality(study).alt
    best = min(study.loads, key=lambda load: load.last_max_vio.mean)
    assert f"{best.last_max_vio.mean:.2f}" in training_figures.balance(study).svg
    assert f"{study.routing.explained_NSL[:, -1, 0].mean():.0%}" in training_sentences.about_specialisation(study).text
    assert f"{study.precision[0].flipped.mean:.2%}" in training_figures.precision(study).alt
    last = study.routing.overlap_NSL[:, -2]
    assert f"a token keeps {last.mean():.0%} of its experts" in training_figures.consistency(study).alt
    for table in (training_tables.variants, training_tables.precision, training_tables.made_with):
        assert "gt_table" in table(study).as_raw_html()


def test_collapse_is_said_where_it_happened_and_denied_where_not(study: TrainingStudy) -> None:
    load = next(load for load in study.collapse if load.variant == "none")
    calm = dataclasses.replace(load, num_dead_NS=np.zeros_like(load.num_dead_NS), num_collapsed_N=np.zeros(3, int))
    title = training_words.collapse_title(dataclasses.replace(study, collapse=(calm,)))
    assert "did not collapse in any of 3 seeds" in title
    dead_NS = np.zeros_like(load.num_dead_NS)
    dead_NS[1, -1] = 7
    fallen = dataclasses.replace(study, collapse=(dataclasses.replace(calm, num_dead_NS=dead_NS),))
    assert "loses experts in 1 of 3 seeds: up to 7 of 48" in training_words.collapse_title(fallen)
    assert training_sentences.about_collapse(fallen).tone == "bad"


def test_the_study_as_plain_values_has_all_seeds(study: TrainingStudy) -> None:
    values = json.loads(json.dumps(study.to_dict(), allow_nan=False))
    assert len(values["curves"][0]["loss_NS"]) == len(SEEDS)
    sections = {row[0] for row in study.rows()}
    assert {"loss", "max_vio", "collapse_loss", "collapse_max_vio", "precision_flipped"} <= sections


# -------------------------------------------------------------------------------------------------------- the notebook


def test_the_notebook_renders_whole_at_smoke_size(tmp_path: Path) -> None:
    rendered = run_notebook(NAME, SMOKE[NAME], tmp_path / "out", show_progress=False)
    names = {"report.html", "report.ipynb", "results.json", "results.csv"}
    assert {path.name for path in rendered.iterdir()} == names
    page = (rendered / "report.html").read_text()
    assert page.count("<svg") == 7
    assert page.count('class="takeaway"') == 12
    assert "Traceback" not in page
    assert loads_nothing(page)
    assert json.loads((rendered / "results.json").read_text())["command"] == "report"


def test_the_live_part_says_how_far_it_came(study: TrainingStudy, tmp_path: Path) -> None:
    live = run_live(tmp_path, num_steps=1)
    assert "In 1 step the dense model went from" in training_sentences.about_live(live, study).text
    assert "After 1 step here and now" in training_figures.live(live, study).alt


@pytest.mark.slow  # the kernel imports what an optimizer needs of torch: seconds where no bytecode is kept
def test_the_notebook_trains_live(tmp_path: Path) -> None:
    page = (run_notebook(NAME, {"live_steps": 1}, tmp_path / "out", show_progress=False) / "report.html").read_text()
    assert page.count("<svg") == 8
    assert "After 1 step here and now" in page
    assert "Traceback" not in page


def test_its_parameters_are_its_own_and_a_scenario_is_refused(tmp_path: Path) -> None:
    assert set(parameters_of(NOTEBOOK)) == {"live_steps", "live_seed", "runs_dir", "out_dir"}
    with pytest.raises(InputError, match=r"live_step: is not a parameter.*Did you mean live_steps"):
        run_notebook(NAME, {"live_step": 3}, tmp_path / "out", show_progress=False)
    scenario = tmp_path / "scenario.yaml"
    scenario.write_text("schema: 1\nmodel: mixtral-8x7b\ncluster: h100-8x-ib400\n")
    refused = CliRunner().invoke(app, ["report", NAME, str(scenario)])
    assert refused.exit_code == 2
    assert f"is nothing that {NAME} asks for" in refused.stderr
