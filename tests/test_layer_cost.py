"""One layer alone: what moving rows takes by dispatcher, and what measured layers take."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.catalog.hardware import load_gpu
from moesim.catalog.models import load_model
from moesim.cost.device import device_cost
from moesim.cost.layer import moving_s
from moesim.study.accuracy import carried_cases, score

DEEPSEEK = load_model("deepseek-v3")
H100 = device_cost(load_gpu("h100-sxm"), "bf16", "datasheet")


def moving(dispatcher="alltoall", *, num_experts=4, tokens=4096.0, arrived=16384.0, exchanges=True):
    rows_E = np.full((1, num_experts), 8 * tokens / num_experts)
    return moving_s(
        DEEPSEEK,
        own_tokens=tokens,
        laid_out_rows=8 * tokens,
        arrived_rows=np.array([arrived]),
        rows_E=rows_E,
        exchanges=exchanges,
        dispatcher=dispatcher,
        device=H100,
    )


def test_a_fused_permutation_reads_a_token_once_and_writes_each_of_its_rows():
    moved = 9 * 4096 * 7168 * 2
    assert float(moving().lay_out_s) == pytest.approx(H100.stream_start_s + moved / H100.stream_bytes_per_s)
    assert moving().unpermute_s == moving().lay_out_s


def test_a_rank_with_one_expert_sorts_nothing_unless_tokens_arrive_unrolled():
    assert np.all(np.asarray(moving(num_experts=1).sort_s) == 0)
    assert np.all(np.asarray(moving("deepep", num_experts=1).sort_s) > 0)


def test_deepep_moves_rows_only_where_they_arrive_and_a_rank_alone_only_once_each_way():
    deepep, alone = moving("deepep"), moving(exchanges=False)
    assert (deepep.lay_out_s, deepep.unpermute_s) == (0.0, 0.0)
    assert (alone.sort_s, alone.sort_back_s) == (0.0, 0.0)
    assert alone.lay_out_s == moving().lay_out_s


@settings(max_examples=30, deadline=None)
@given(arrived=st.floats(4096, 8 * 4096), num_experts=st.integers(2, 16))
def test_deepep_never_moves_more_bytes_than_alltoall(arrived, num_experts):
    def total(dispatcher):
        cost = moving(dispatcher, arrived=arrived, num_experts=num_experts)
        return float(np.sum([cost.lay_out_s, np.sum(cost.sort_s), np.sum(cost.sort_back_s), cost.unpermute_s]))

    assert total("deepep") < total("alltoall")


def test_measured_bf16_layers_are_within_eight_percent_each_by_counting_kernels_alone():
    rows = [row for row in score("layer", carried_cases("layer"), "carried").rows if row.like.precision == "bf16"]
    errors = {row.id: row.error_fraction for row in rows}
    print({name: f"{error:+.1%}" for name, error in errors.items()})
    assert len(errors) == 8
    assert np.median(np.abs(list(errors.values()))) < 0.05
    assert max(map(abs, errors.values())) < 0.08
