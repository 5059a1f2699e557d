"""Tables of the training notebook: the variants side by side, half precision, what the runs were made with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesim.report.style import short_count
from moesim.report.tables import _table as table_of
from moesim.report.training_words import row_words, told_spread, words_of
from moesim.study.training import DENSE

if TYPE_CHECKING:
    from great_tables import GT

    from moesim.study.training import TrainingStudy


def variants(study: TrainingStudy) -> GT:
    """Last held-out loss, sizes and load of every variant at equal active FLOPs."""
    max_vio = {load.variant: f"{load.last_max_vio.mean:.2f}" for load in study.loads}
    curves = study.curves
    frame = {
        "": [words_of(c.variant) if c.variant == DENSE else f"MoE, {words_of(c.variant)}" for c in curves],
        "Parameters": [short_count(c.total_parameters) for c in curves],
        "Active": [short_count(c.active_parameters) for c in curves],
        "Held-out loss (seeds)": [told_spread(c.last) for c in curves],
        **{name: [f"{c.last_by_domain[name].mean:.3f}" for c in curves] for name in curves[0].last_by_domain},
        "MaxVio": [max_vio.get(c.variant, "–") for c in curves],
    }
    return table_of("variants", frame, right=list(frame)[1:])


def precision(study: TrainingStudy) -> GT:
    """Every way of computing in half precision."""
    rows = study.precision
    frame = {
        "": [row_words(row) for row in rows],
        "Flipped against float64": [f"{row.flipped.mean:.3%}" for row in rows],
        "Largest logit (seeds)": [told_spread(row.largest_logit, 1) for row in rows],
        "First overflow, by seed": [
            ", ".join("none" if step is None else f"step {step}" for step in row.overflow_steps) for row in rows
        ],
        "Held-out loss (seeds)": [told_spread(row.last_loss) for row in rows],
    }
    return table_of("precision", frame, right=list(frame)[1:])


def made_with(study: TrainingStudy) -> GT:
    """What the recorded runs were made with, when and where."""
    facts, config = study.facts, study.facts["config"]
    model, moe = config["model"], config["model"]["moe"]
    tokens = config["num_steps"] * config["num_sequences"] * config["seq_len"]
    rows = {
        "Model": f"hidden {model['hidden']}, {model['num_layers']} layers, {model['num_heads']} heads "
        f"({model['num_kv_heads']} for keys and values), bytes as tokens",
        "Experts": f"{moe['num_experts']} of width {moe['width']} in every {moe['every']}nd layer, top-"
        f"{moe['router']['top_k']}",
        "Dense twin": f"width {model['dense_width']}: as many FLOPs per token, the router's included "
        f"({facts['forward_flops_per_token']:,.0f} forward)",
        "Training": f"{config['num_steps']:,} steps, {tokens:,} tokens, AdamW, learning rate "
        f"{config['learning_rate']:g}",
        "Text": f"this Python's sources, manuals and licences of packages, generated tables; print {facts['text']}",
        "Recorded": f"{facts['date']}, torch {facts['torch']}, Python {facts['python']}, {facts['processor']}, "
        f"{facts['threads']} thread",
    }
    return table_of("made_with", {"": list(rows), "Recorded runs": list(rows.values())}, right=[])
