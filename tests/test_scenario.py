"""A scenario changed by single settings."""

from __future__ import annotations

import dataclasses

from moesim.scenario import Scenario


def test_changing_one_setting_keeps_a_field_that_was_replaced_before() -> None:
    scenario = Scenario.make(model="mixtral-8x7b", cluster="h100-8x-ib400", num_gpus=64, ep=8)
    other = dataclasses.replace(scenario, seed=scenario.seed + 7)
    assert other.with_(micro_batch=2).seed == scenario.seed + 7
    assert other.with_(micro_batch=2).to_dict()["seed"] == scenario.seed + 7
