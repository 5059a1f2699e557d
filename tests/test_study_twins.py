"""Dense twins: of the right size, in the same layout, without experts."""

import dataclasses

import pytest

from moesim.catalog.models import MODEL_NAMES, load_model
from moesim.describe.parameters import active_parameters, total_parameters
from moesim.errors import InputError
from moesim.scenario import Scenario
from moesim.study.sizes import rank_memories
from moesim.study.twins import WIDTH_MULTIPLE, compare_twins, dense_twin, dense_twins

MOE_NAMES = [name for name in MODEL_NAMES if load_model(name).is_moe]


def asked(model: str, **leaves: object) -> Scenario:
    return Scenario.make(**{"model": model, "cluster": "h100-8x-ib400", "num_gpus": 8, **leaves})


@pytest.mark.parametrize("name", MOE_NAMES)
def test_the_twins_have_the_active_and_the_total_parameters_within_one_percent(name):
    scenario = asked(name)
    active, total = dense_twin(scenario, "active"), dense_twin(scenario, "total")
    assert total_parameters(active) == pytest.approx(active_parameters(scenario.model), rel=0.01)
    assert total_parameters(total) == pytest.approx(total_parameters(scenario.model), rel=0.01)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "switch-base-128", "deepseek-v2"])
def test_a_twin_keeps_all_but_the_experts(name):
    scenario = asked(name, tp=4)
    for kind in ("active", "total"):
        twin = dense_twin(scenario, kind)
        assert not twin.is_moe
        assert (twin.hidden, twin.vocab, len(twin.layers)) == (
            scenario.model.hidden,
            scenario.model.vocab,
            len(scenario.model.layers),
        )
        for was, now in zip(scenario.model.layers, twin.layers, strict=True):
            assert now.attention == was.attention
            if was.is_moe:
                assert now.ffn.width % (WIDTH_MULTIPLE * 4) == 0
                assert now.ffn.gated == was.ffn.expert.gated
            else:
                assert now == was


def test_a_twin_that_fits_runs_in_the_same_layout_with_the_same_batch():
    scenario = asked("mixtral-8x7b", num_gpus=64, tp=2, pp=4, ep=8, global_batch=256)
    twin = dense_twins(scenario)["active"]
    assert twin.parallel == dataclasses.replace(scenario.parallel, ep=1, etp=1)
    assert twin.train == scenario.train
    assert twin.cluster == scenario.cluster
    assert twin.point_id != scenario.point_id


def test_a_twin_that_does_not_fit_is_cut_over_more_ranks_until_it_does():
    scenario = asked("mixtral-8x7b", num_gpus=64, tp=1, pp=2, ep=8, global_batch=256)
    twin = dense_twins(scenario)["total"]
    capacity = scenario.cluster.gpu.memory_bytes.value
    unchanged = scenario.with_(model=twin.model, ep=1)
    assert max(memory.peak_bytes for memory in rank_memories(unchanged)) > capacity
    assert max(memory.peak_bytes for memory in rank_memories(twin)) <= capacity
    assert twin.parallel.tp > 1
    assert (twin.parallel.pp, twin.train.global_batch) == (scenario.parallel.pp, scenario.train.global_batch)
    assert any(f"tp={twin.parallel.tp}" in note for note in compare_twins(scenario).notes)


def test_a_dense_model_has_no_twins():
    with pytest.raises(InputError, match="must have MoE layers to have a dense twin"):
        dense_twins(asked("llama-3-8b"))
