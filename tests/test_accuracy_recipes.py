"""Rows of measurements that name a recipe, and what the recipe's entry says."""

from __future__ import annotations

import pytest

from moesim.study import accuracy_recipes
from moesim.study.accuracy import carried_cases
from moesim.study.accuracy_recipes import completed
from moesim.study.accuracy_training import express

CARDS = [row for row in carried_cases("training") if row["recipe"]]


def test_a_row_keeps_what_it_says_and_its_recipe_fills_the_rest() -> None:
    row = {"recipe": "deepseek_v3_pretrain_256gpu_gb200_fp8mx_config", "pp": "4.0", "vp": "4.0", "recompute": "mlp"}
    filled = completed(row)
    assert filled["recompute"] == "mlp"
    assert (filled["cuda_graphs"], filled["a2a_overlap"], filled["mtp"]) == ("full", "with weight gradients", "1")
    assert filled["layout"] == "Et*4|(tttt|)*14tmL"


def test_a_row_that_tells_of_graphs_in_its_own_words_gets_none_from_the_recipe() -> None:
    row = {"recipe": "qwen3_30b_a3b_pretrain_16gpu_h100_bf16_config", "extra_config": "TE graphs moe_router"}
    assert "cuda_graphs" not in completed(row)
    assert completed(row)["dispatcher"] == "HybridEP"


def test_a_row_without_a_known_recipe_stays_as_it_is() -> None:
    for row in ({"id": "a"}, {"id": "a", "recipe": "my_own_config", "pp": "many"}):
        assert completed(row) == row


@pytest.mark.parametrize("row", CARDS, ids=lambda row: row["id"])
def test_a_card_read_by_its_recipe_alone_is_the_run_that_was_carried(row: dict[str, str]) -> None:
    set_by_recipe = completed({name: row[name] for name in ("recipe", "pp", "vp", "overlap_and_other")}).keys() - {"vp"}
    bare = {**row, **dict.fromkeys(set_by_recipe & set(accuracy_recipes.SETS), "")}
    assert express(bare, "cards")[0] == express(row, "cards")[0]


def test_every_entry_has_a_source_and_says_something() -> None:
    for entry in accuracy_recipes._recipes():
        assert entry["source"]
        assert any(entry[name] for name in accuracy_recipes.SETS)
